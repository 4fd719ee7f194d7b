"""What a policy is trained for, the same four functions for either task, so that a script is a page.

`sentiment`: continue a review; a reward model scores, judges that no training read judge.
`arithmetic`: write a sum; the right answer scores, greedy answers to sums that nobody trained on judge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments import held_out, stage
from jaxrlhf.core import offload, processes, sharding
from jaxrlhf.core.types import Prompts, Rollout, SamplingSpec
from jaxrlhf.data import arithmetic as sums
from jaxrlhf.data import human_sentiment, pipeline
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.evaluation import judges, policy
from jaxrlhf.models import roles
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.models.model import EXACT
from jaxrlhf.rewards import functions
from jaxrlhf.sampling import generate
from jaxrlhf.training import plan
from jaxrlhf.training.run import Run

Name = Literal["sentiment", "arithmetic"]
Figures = dict[str, float]  # ready for `Run.log`

ARITHMETIC = stage.Sampling(temperature=1.0, max_tokens=6, min_tokens=0)
ARITHMETIC_POLICY = Path("runs/arithmetic/start/model")  # what experiments/arithmetic.py writes
PROMPT_WIDTH = 8  # of a sum: bos, a space, two digits, plus, two digits, equals

AT_ONCE = generate.Options()


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


class Settings(Protocol):
    """What the configuration of a script says of its task."""

    @property
    def task(self) -> Name:
        """Which task."""
        ...

    @property
    def policy(self) -> Path:
        """Where the policy starts."""
        ...

    @property
    def reward(self) -> Path:
        """The reward model; arithmetic reads none."""
        ...

    @property
    def sampling(self) -> stage.Sampling:
        """How answers are drawn."""
        ...

    @property
    def batch(self) -> int:
        """Prompts an iteration."""
        ...

    @property
    def seed(self) -> int:
        """Of the order of the prompts."""
        ...

    @property
    def held_out_prompts(self) -> int:
        """How many prompts the policy is judged on."""
        ...

    @property
    def lora(self) -> LoraConfig:
        """The adapter that is trained, if one is."""
        ...


def make(
    config: Settings, mesh: jax.sharding.Mesh, frozen: stage.Weights = "float32", offloaded: stage.Offload = "none"
) -> Task:
    """The task called `config.task`, its start with the weights `frozen`, and as `offloaded` says in the hosts' memory.

    Raises:
        ValueError, FileNotFoundError: a folder holds no such model, more held-out prompts are asked for than there are, or the
            reference is to be offloaded where it cannot.
    """
    start = stage.load(config.policy, mesh, weights=frozen)
    if offloaded in ("reference", "both"):
        if config.lora.rank or (config.task != "arithmetic" and stage.kind(config.reward) == "reward_adapter"):
            raise ValueError(
                f"offload='{offloaded}': the reference is the base that adapters lie over, which every program reads: offload "
                "the optimizer alone, or train without --lora.rank and give a reward model with a trunk of its own"
            )
        start = dataclasses.replace(start, params=offload.to_host_memory(start.params))
    return arithmetic(config, start, mesh) if config.task == "arithmetic" else sentiment(config, start, mesh)


def tell_memory(
    run: Run,
    config: Settings,
    task: Task,
    params: Any,
    update: Any,
    n: int = 0,
    generation: generate.Options = AT_ONCE,
    average: bool = False,
) -> None:
    """Print and keep what the run will hold (`stage.tell_memory`), before training is compiled: `params` to be trained by
    `update`, the frozen start, the reward, and n samples of each prompt, or where n is 0 those of the judgement alone.
    """
    start, tree = task.start, params if "policy" in params else {"policy": params}
    trained = plan.training(params, update, average)
    kept = plan.frozen({"base and reference" if config.lora.rank else "reference": start.params, "reward": task.reward})
    policy = roles.attach(start.params, tree, config.lora)["policy"]
    drawn = [(config.held_out_prompts, 1, EXACT)]
    if n:
        in_slots = 0 < generation.slots < config.batch * n  # each with a prompt of its own
        prompts, samples = (generation.slots, 1) if in_slots else (config.batch, n)
        drawn.append((prompts, samples, generation.cache))
    prompts, samples, cache = max(drawn, key=lambda rows: rows[0] * rows[1])
    width = task.prompts[0].tokens.shape[1]
    sampled = plan.sampling(start.model, policy, task.spec, (prompts, width), samples, cache)
    stage.tell_memory(run, (*trained, *kept, *sampled))


def sentiment(config: Settings, first: stage.Trained, mesh: jax.sharding.Mesh) -> Task:
    """Continue the first words of a review; the reward model in `config.reward` scores."""
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
    task = learned(setting, first, review_prompts(first.tokenizer, config.batch, config.seed), held_out.JUDGES)
    return dataclasses.replace(task, reward=judged.params)


def learned(setting: held_out.Setting, start: stage.Trained, prompts: Any, judged_by: Mapping[str, judges.Judge]) -> Task:
    """Answer `prompts`, scored by the setting's reward; on its own prompts judges read the answers."""
    before = held_out.sample(setting, start.params, jax.random.key(0))

    def score(rollout: Rollout, prompts: Prompts) -> tuple[jax.Array, jax.Array, Figures]:
        del prompts
        part = functions.of_values(setting.reward(rollout), rollout, start.tokenizer.decode, "model")
        return *sharding.shard_batch((part.score, part.weight), setting.mesh), {
            "reward/faults": float((part.weight == 0).sum())
        }

    def judge(params: Any) -> tuple[Figures, list[dict[str, str]]]:
        after = held_out.sample(setting, params, jax.random.key(1))  # other draws than the start's, so that equals win half
        return held_out.flat(held_out.report(after, before, judged_by)), policy.side_by_side(before, after)

    return Task(start, setting.spec, prompts, score, judge)


def review_prompts(tokenizer: Tokenizer, batch: int, seed: int) -> Any:
    """`[iteration]`: the first words of training reviews."""
    texts = [pipeline.clean(rating.text) for rating in human_sentiment.reviews("train")]
    return pipeline.prompt_batches(pipeline.cut_prompts(tokenizer.encode_batch(texts), tokenizer, seed), batch, seed)


def arithmetic(config: Settings, first: stage.Trained, mesh: jax.sharding.Mesh) -> Task:
    """Write a sum: 1 for the right answer, and 0.1 for an answer of digits alone."""
    tokenizer, spec, rows = first.tokenizer, stage.spec(config.sampling, first.tokenizer), sums.problems("train")
    asked = held_out_sums(config.held_out_prompts)
    parts = {"correct": functions.exact_match, "digits": functions.format_match(r"\d+")}
    weights = {"correct": 1.0, "digits": 0.1}
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
    return Task(first, spec, prompts, score, judge)


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
    drawn = generate.generate(policy.model, params, sharding.shard_batch(prompts, mesh), spec, jax.random.key(0))
    return float(correct(drawn, policy.tokenizer, rows).mean(dtype=np.float64)), stage.texts(drawn, policy.tokenizer)[1]
