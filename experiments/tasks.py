"""What a policy is trained for, the same four functions for either task, so that a script is a page.

`sentiment`: continue a review; a reward model scores, judges that no training read judge.
`arithmetic`: write a sum; the right answer scores, greedy answers to sums that nobody trained on judge.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import apart, held_out, stage
from experiments.settings import Settings
from jaxrlhf.core import offload, processes, sharding
from jaxrlhf.core.types import Prompts, Rollout, SamplingSpec
from jaxrlhf.data import arithmetic as sums
from jaxrlhf.data import human_sentiment, pipeline
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.evaluation import judges, policy
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.rewards import child, functions, pool
from jaxrlhf.sampling import generate
from jaxrlhf.training.run import Run

Name = Literal["sentiment", "arithmetic"]
Figures = dict[str, float]  # ready for `Run.log`

ARITHMETIC = stage.Sampling(temperature=1.0, max_tokens=6, min_tokens=0)
ARITHMETIC_POLICY = Path("runs/arithmetic/start/model")  # what experiments/arithmetic.py writes
PROMPT_WIDTH = 8  # of a sum: bos, a space, two digits, plus, two digits, equals

Rewards = Mapping[str, functions.RewardFunction | pool.Remote]
NONE: Rewards = {}
SUMS = {
    "correct": pool.Source("jaxrlhf.rewards.functions:exact_match"),
    "digits": pool.Source("jaxrlhf.rewards.functions:format_match", {"pattern": r"\d+"}),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """Rows of a rollout are B * n: row i continues prompt i // n."""

    start: stage.Trained  # the policy before training, which is also the reference
    spec: SamplingSpec
    prompts: Any  # [iteration] -> Prompts [B], on the host
    score: Callable[[Rollout, Prompts], tuple[jax.Array, jax.Array, Figures]]
    """(rollout, prompts) -> score [B*n], weight [B*n] (0: no score could be had), what to log."""
    judge: Callable[[Any], tuple[Figures, list[dict[str, str]]]]
    """(policy params) -> held-out figures, the KL to the reference (`held_out/kl`) among them; answers beside the start's."""
    reward: Any = None  # parameters of the reward model, where one scores
    scorer: TransformerConfig | None = None  # its shape
    warm: Callable[[Any], None] | None = None
    """(policy params): compile every program that `judge` may want, whatever the lengths of the answers."""
    best: str = "held_out/proxy"  # of the figures that `judge` gives, the one by which the best policy is chosen: the higher


def run(
    config: Settings,
    train: Callable[[Run, Any, Task, jax.sharding.Mesh], dict[str, Any]],
    dealt: tuple[int, int] | None = None,
    weights: stage.Weights = "float32",
    offloaded: stage.Offload = "none",
) -> dict[str, Any]:
    """What `train(run, config, task, mesh)` gives, in the run's folder and on its mesh; of a run that is done, what it gave.

    `dealt` are the rows of an iteration, and the minibatches that they are dealt into; the others are those of `make`.
    """
    mesh = stage.mesh(config.mesh, dealt, apart.learning(config), batch=config.batch, held_out_prompts=config.held_out_prompts)
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        with jax.set_mesh(mesh), make(config, mesh, weights, offloaded) as task:
            return train(run, config, task, mesh)


@contextlib.contextmanager
def make(
    config: Settings, mesh: jax.sharding.Mesh, frozen: stage.Weights = "float32", offloaded: stage.Offload = "none"
) -> Iterator[Task]:
    """The task called `config.task`, its start with the weights `frozen`, and as `offloaded` says in the hosts' memory; at the
    end of the `with` its child processes end.

    Raises:
        ValueError, FileNotFoundError: a folder holds no such model, more held-out prompts are asked for than there are, there
            is no such reward function, or the reference is to be offloaded where it cannot.
    """
    start = stage.load(config.policy, mesh, weights=frozen)
    if offloaded in ("reference", "both"):
        if config.lora.rank or (config.task != "arithmetic" and stage.kind(config.reward) == "reward_adapter"):
            raise ValueError(
                f"offload='{offloaded}': the reference is the base that adapters lie over, which every program reads: offload "
                "the optimizer alone, or train without --lora.rank and give a reward model with a trunk of its own"
            )
        start = dataclasses.replace(start, params=offload.to_host_memory(start.params))
    own = {place.rpartition(":")[2]: pool.Source(place) for place in config.pool.functions}
    if len(own) < len(config.pool.functions) or (taken := own.keys() & {"model", *SUMS}):
        raise ValueError(f"pool.functions={config.pool.functions}: two rewards of one name ({', '.join(taken) or 'twice'})")
    sources = own | (SUMS if config.task == "arithmetic" else {})
    with contextlib.ExitStack() as opened:
        if config.pool.workers and sources:
            given = opened.enter_context(pool.open_pool(sources, config.pool))
        else:
            given = {name: child.find(source) for name, source in sources.items()}
        task = arithmetic if config.task == "arithmetic" else sentiment
        yield task(config, start, mesh, given)


def sentiment(config: Settings, first: stage.Trained, mesh: jax.sharding.Mesh, own: Rewards) -> Task:
    """Continue the first words of a review; the reward model in `config.reward` scores, and what is the user's own."""
    judged = stage.load_reward(config.reward, mesh, first)
    value = stage.reward(judged)
    setting = held_out.Setting(
        model=first.model,
        reference=first.params,
        reward=lambda answers: value(judged.params, answers),
        prompts=held_out.prompts(first.tokenizer, config.held_out_prompts),
        spec=stage.spec(config.sampling, first.tokenizer),
        tokenizer=first.tokenizer,
        mesh=mesh,
    )
    prompts = review_prompts(first.tokenizer, config.batch, config.seed)
    task = learned(setting, first, prompts, held_out.JUDGES, own)
    return dataclasses.replace(task, reward=judged.params, scorer=judged.config)


def learned(
    setting: held_out.Setting, start: stage.Trained, prompts: Any, judged_by: Mapping[str, judges.Judge], own: Rewards = NONE
) -> Task:
    """Answer `prompts`, scored by the setting's reward and the user's own; on its own prompts judges read the answers."""
    before = held_out.sample(setting, start.params, jax.random.key(0))

    def score(rollout: Rollout, prompts: Prompts) -> tuple[jax.Array, jax.Array, Figures]:
        del prompts
        given = {name: functions.apply(part, rollout, start.tokenizer.decode, name=name) for name, part in own.items()}
        given["model"] = functions.of_values(setting.reward(rollout), rollout, start.tokenizer.decode, "model")
        total, figures = functions.weighted_sum(given, dict.fromkeys(given, 1.0))
        return *sharding.shard_batch((total.score, total.weight), setting.mesh), figures

    def judge(params: Any) -> tuple[Figures, list[dict[str, str]]]:
        after = held_out.sample(setting, params, jax.random.key(1))  # other draws than the start's, so that equals win half
        return held_out.flat(held_out.report(after, before, judged_by)), policy.side_by_side(before, after)

    prompts = pipeline.within(prompts, start.config.vocab_size)
    # Not by what is trained on, if anything else judges: that may rise while the texts get worse.
    best = "gold" if setting.gold is not None else next(iter(judged_by), "proxy")
    return Task(start, setting.spec, prompts, score, judge, warm=warming(setting, setting.spec), best=f"held_out/{best}")


def warming(setting: held_out.Setting, *specs: SamplingSpec) -> Callable[[Any], None]:
    """`Task.warm` of judgements that answer the setting's prompts by these specs."""

    def warm(params: Any) -> None:
        prompts = sharding.shard_batch(setting.prompts, setting.mesh)
        for spec in specs:
            generate.warm(setting.model, params, prompts, spec, jax.random.key(0))

    return warm


def review_prompts(tokenizer: Tokenizer, batch: int, seed: int) -> Any:
    """`[iteration]`: the first words of training reviews."""
    texts = [pipeline.clean(rating.text) for rating in human_sentiment.reviews("train")]
    return pipeline.prompt_batches(pipeline.cut_prompts(tokenizer.encode_batch(texts), tokenizer, seed), batch, seed)


def arithmetic(config: Settings, first: stage.Trained, mesh: jax.sharding.Mesh, parts: Rewards) -> Task:
    """Write a sum: 1 for the right answer, 0.1 for an answer of digits alone, and what is the user's own."""
    tokenizer, spec, rows = first.tokenizer, stage.spec(config.sampling, first.tokenizer), sums.problems("train")
    asked = held_out_sums(config.held_out_prompts)
    weights = dict.fromkeys(parts, 1.0) | {"digits": 0.1}
    setting = held_out.Setting(
        model=first.model,
        reference=first.params,
        reward=lambda answers: jnp.asarray(correct(answers, tokenizer, asked)),
        prompts=pipeline.text_prompts([row["prompt"] for row in asked], tokenizer, PROMPT_WIDTH),
        spec=spec,
        tokenizer=tokenizer,
        mesh=mesh,
    )
    _, before = greedy(first, first.params, config.sampling, config.held_out_prompts, mesh)

    def score(rollout: Rollout, prompts: Prompts) -> tuple[jax.Array, jax.Array, Figures]:
        index = np.repeat(processes.to_host(prompts.row), rollout.tokens.shape[0] // prompts.row.shape[0])
        problems = [rows[i] for i in index]
        given = {name: functions.apply(part, rollout, tokenizer.decode, problems, name) for name, part in parts.items()}
        total, figures = functions.weighted_sum(given, weights)
        return *sharding.shard_batch((total.score, total.weight), mesh), figures

    def judge(params: Any) -> tuple[Figures, list[dict[str, str]]]:
        accuracy, answers = greedy(first, params, config.sampling, config.held_out_prompts, mesh)
        drawn = held_out.sample(setting, params, jax.random.key(1))
        figures = {
            "held_out/accuracy": accuracy,
            "held_out/sampled_accuracy": float(drawn.proxy.mean()),
            "held_out/kl": float(drawn.kl.mean()),
            "held_out/entropy": float(drawn.entropy.mean()),
            "held_out/length": float(drawn.length.mean()),
            "held_out/eos_rate": float(drawn.finished.mean()),
        }
        shown = zip(asked[:12], before, answers, strict=False)
        return figures, [{"prompt": row["prompt"], "before": old, "after": new} for row, old, new in shown]

    texts = [row["prompt"] for row in rows]
    prompts = pipeline.prompt_batches(pipeline.text_prompts(texts, tokenizer, PROMPT_WIDTH), config.batch, config.seed)
    most_probable = dataclasses.replace(spec, greedy=True, replay=False)
    prompts = pipeline.within(prompts, first.config.vocab_size)
    return Task(first, spec, prompts, score, judge, warm=warming(setting, spec, most_probable), best="held_out/accuracy")


def held_out_sums(count: int) -> list[dict[str, Any]]:
    """The first `count` held-out problems.

    Raises:
        ValueError: more are asked for than there are.
    """
    rows = sums.problems("held_out")
    if not 1 <= count <= len(rows):
        raise ValueError(f"{count} held-out problems asked for, but there are {len(rows)}: ask for 1 to {len(rows)}")
    return rows[:count]


def correct(answers: Rollout, tokenizer: Tokenizer, rows: list[dict[str, Any]]) -> np.ndarray:
    """1 for each answer that is right, 0 for each that is not, [B]."""
    return functions.apply(functions.exact_match, answers, tokenizer.decode, rows).score


def greedy(
    policy: stage.Trained, params: Any, sampling: stage.Sampling, count: int, mesh: jax.sharding.Mesh
) -> tuple[float, list[str]]:
    """Share of `count` held-out sums that `params` write right by their most probable answers, and these answers."""
    rows = held_out_sums(count)
    spec = dataclasses.replace(stage.spec(sampling, policy.tokenizer), greedy=True, replay=False)
    prompts = pipeline.text_prompts([row["prompt"] for row in rows], policy.tokenizer, PROMPT_WIDTH)
    prompts = sharding.shard_batch(prompts, mesh)
    drawn = generate.generate(policy.model, params, prompts, spec, jax.random.key(0), options=stage.ONCE)
    return float(correct(drawn, policy.tokenizer, rows).mean(dtype=np.float64)), stage.texts(drawn, policy.tokenizer)[1]
