"""What a policy is trained for, the same four functions for either task, so that a script is a page.

`sentiment`: continue a review; a reward model scores, judges that no training read judge.
`arithmetic`: write a sum; the right answer scores, greedy answers to sums that nobody trained on judge.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments import held_out, stage
from jaxrlhf.core import offload, processes, sharding
from jaxrlhf.core.types import Experience, Prompts, Rollout, SamplingSpec
from jaxrlhf.data import arithmetic as sums
from jaxrlhf.data import human_sentiment, pipeline
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.evaluation import judges, policy
from jaxrlhf.models import heads, roles
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.models.model import EXACT
from jaxrlhf.rewards import functions, pool
from jaxrlhf.sampling import generate, rollout, stragglers
from jaxrlhf.sampling.stragglers import Begun
from jaxrlhf.training import flops, plan, timing
from jaxrlhf.training.by_length import Microbatches
from jaxrlhf.training.flops import Pass
from jaxrlhf.training.run import Run

Name = Literal["sentiment", "arithmetic"]
Figures = dict[str, float]  # ready for `Run.log`

ARITHMETIC = stage.Sampling(temperature=1.0, max_tokens=6, min_tokens=0)
ARITHMETIC_POLICY = Path("runs/arithmetic/start/model")  # what experiments/arithmetic.py writes
PROMPT_WIDTH = 8  # of a sum: bos, a space, two digits, plus, two digits, equals

AT_ONCE = rollout.Options()

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
    def microbatches(self) -> Microbatches:
        """Parts of the rows of an update."""
        ...

    @property
    def held_out_prompts(self) -> int:
        """How many prompts the policy is judged on."""
        ...

    @property
    def pool(self) -> pool.Config:
        """Child processes for reward functions, and functions of the user's own."""
        ...

    @property
    def lora(self) -> LoraConfig:
        """The adapter that is trained, if one is."""
        ...


class OnlineSettings(Settings, Protocol):
    """What it says besides where answers are drawn at each iteration."""

    @property
    def iterations(self) -> int:
        """Batches of answers."""
        ...

    @property
    def rollouts(self) -> rollout.Options:
        """How they are drawn."""
        ...


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
            given = {name: pool.find(source) for name, source in sources.items()}
        task = arithmetic if config.task == "arithmetic" else sentiment
        yield task(config, start, mesh, given)


def tell_memory(
    run: Run,
    config: Settings,
    task: Task,
    params: Any,
    update: Any,
    n: int = 0,
    options: rollout.Options = AT_ONCE,
    average: bool = False,
) -> None:
    """Print and keep what the run will hold (`stage.tell_memory`), before training is compiled: `params` to be trained by
    `update`, the frozen start, the reward, and n samples of each prompt with what scoring them and learning from them take, or
    where n is 0 those of the judgement alone.
    """
    start, tree = task.start, params if "policy" in params else {"policy": params}
    trained = plan.training(params, update, average, config.microbatches.parts)
    kept = plan.frozen({"base and reference" if config.lora.rank else "reference": start.params, "reward": task.reward})
    width, written = task.prompts[0].tokens.shape[1], task.spec.max_tokens
    policy = roles.attach(start.params, tree, config.lora)["policy"]
    drawn = [(config.held_out_prompts, 1, EXACT)]
    if n:
        generation = options.generation
        prompts, samples = config.batch, n
        if options.stragglers:  # each row with a prompt of its own, and so in slots
            prompts, samples = (config.batch + options.stragglers) * n, 1
        elif 0 < generation.slots < config.batch * n:
            prompts, samples = generation.slots, 1
        drawn.append((prompts, samples, generation.cache))
    prompts, samples, cache = max(drawn, key=lambda rows: rows[0] * rows[1])
    sampled = plan.sampling(start.model, policy, task.spec, (prompts, width), samples, cache)
    if n:
        shape = (width + written, written, heads.at_once(jax.default_backend(), start.config.vocab_size))
        kept += plan.update(learning(config, task, params), rows_at_once(config, n), *shape)
        kept += plan.scoring(scoring(config, task, params, options), options.rows * sharding.ways(), *shape)
        sampled += plan.prefill(start.config, prompts, width)
    stage.tell_memory(run, (*trained, *kept, *sampled))


def under_way(config: OnlineSettings, task: Task, n: int, mesh: jax.sharding.Mesh) -> Begun | None:
    """Answers under way before the first batch, of which no token is written: `config.rollouts.stragglers` prompts of the batch
    that would come after the last; None without stragglers.

    Raises:
        ValueError: more prompts than a batch has.
    """
    count = config.rollouts.stragglers
    if not count:
        return None
    if not 0 < count <= config.batch:
        raise ValueError(f"rollouts.stragglers={count} must be between 0 and batch={config.batch}, the prompts of a batch")
    first = jax.tree.map(lambda x: x[:count], task.prompts[config.iterations])
    return sharding.shard_batch(stragglers.begin(first, task.start.model, task.spec, n), mesh)


def rows_at_once(config: Any, n: int) -> int:
    """Rows that a gradient is taken of at a time."""
    minibatches = getattr(config.algorithm, "minibatches", None) or config.minibatches
    return config.batch * n // (minibatches * config.microbatches.parts)


def timed(clock: timing.Clock, task: Task) -> Task:
    """The task, whose prompts, scores and judgements count as data, score and evaluate; judgements warmed in a strict run."""
    judge = task.judge
    if clock.options.strict and task.warm is not None:
        judge = after_first(task.warm, task.judge)
    score, judge = clock.timed("score", task.score), clock.timed("evaluate", judge)
    return dataclasses.replace(task, prompts=stage.timed(clock, task.prompts), score=score, judge=judge)


def after_first(warm: Callable, function: Callable) -> Callable:
    """`function`, before whose first call `warm` is called with the same."""
    first = [True]

    def call(*args: Any) -> Any:
        if first:
            warm(*args)
            first.clear()
        return function(*args)

    return call


Collected = tuple[Experience, Prompts, Begun | None]


def collector(
    clock: timing.Clock, config: Settings, task: Task, frozen: Any, n: int, options: rollout.Options
) -> Callable[[dict[str, Any], Prompts, jax.Array, int, Begun | None], Collected]:
    """(params, prompts, key, version, begun) -> n answers to each prompt, scored by learner and reference, the prompts that
    they answer, and what is under way after it (`rollout.collect`, or with stragglers `stragglers.carry_on`): its two halves
    timed as rollout and score, and their work counted, that of the reward model included.
    """
    answer = answering(clock, task, task.spec, n, options.generation)
    score = clock.timed("score", rollout.experience, after="score")

    def collect(params: dict[str, Any], prompts: Prompts, key: jax.Array, version: int, begun: Begun | None) -> Collected:
        answers, prompts, begun = answer(params["policy"], prompts, key, version, begun)
        experience = score(task.start.model, params, frozen, answers, task.spec, options)
        clock.scored(answers, *scoring(config, task, params, options))
        return experience, prompts, begun

    return collect


def answering(
    clock: timing.Clock, task: Task, spec: SamplingSpec, n: int = 1, options: generate.Options = AT_ONCE.generation
) -> Callable[..., tuple[Rollout, Prompts, Begun | None]]:
    """(policy params, prompts, key, version, begun=None) -> n answers to each prompt by `spec`, timed and counted as rollout;
    their prompts; and what is under way. In a strict run the first call compiles whatever a later batch may want: that depends
    on the lengths of its answers.
    """
    start = task.start

    def sample(policy: Any, prompts: Prompts, key: jax.Array, version: int, begun: Begun | None) -> Any:
        if begun is not None:
            return stragglers.carry_on(start.model, policy, prompts, begun, spec, key, n, version, options)
        answers, chunks = generate.traced(start.model, policy, prompts, spec, key, n, version, options)
        return answers, prompts, None, chunks

    def warm(policy: Any, prompts: Prompts, key: jax.Array, version: int, begun: Begun | None) -> None:
        del version
        if begun is not None:
            raise ValueError(
                "watch.strict with rollouts.stragglers: which programs a batch wants is not known before; set one off"
            )
        generate.warm(start.model, policy, prompts, spec, key, n, options)

    sample = clock.timed("rollout", after_first(warm, sample) if clock.options.strict else sample)

    def answer(
        policy: Any, prompts: Prompts, key: jax.Array, version: int, begun: Begun | None = None
    ) -> tuple[Rollout, Prompts, Begun | None]:
        before = written_of(begun)
        answers, prompts, begun, chunks = sample(policy, prompts, key, version, begun)
        if timing.is_here(prompts.length):
            asked, written = np.asarray(prompts.length), np.asarray(answers.response_len)
            # Of answers under way, the tokens of this batch.
            new = int(written.sum()) + written_of(begun) - before
            clock.count.sampled(flops.sampling(start.config, asked, written, n), new, chunks)
        return answers, prompts, begun

    return answer


def written_of(begun: Begun | None) -> int:
    """Tokens of the answers under way, as far as this process can read them."""
    if begun is None or not timing.is_here(begun.rollout.response_len):
        return 0
    return int(np.asarray(begun.rollout.response_len).sum())


def scoring(config: Settings, task: Task, params: dict[str, Any], options: rollout.Options) -> tuple[Pass, ...]:
    """What reads a rollout: the policy unless its own log-probs are taken, the reference, a critic, the reward model."""
    shape, own = task.start.config, not options.reuse_sampler_logprobs or options.exact_kl
    passes = (Pass(shape),)  # the reference
    passes += (Pass(shape, logits=own, lora=config.lora),) * (own or "value" in params)
    passes += (Pass(shape, logits=False, lora=config.lora),) * ("critic" in params)
    return passes + (() if task.scorer is None else (Pass(task.scorer, logits=False),))


def learning(config: Settings, task: Task, params: Any, reference: bool = False) -> tuple[Pass, ...]:
    """What an update reads its rows with: the policy, a critic with a trunk of its own, and the reference where the loss
    has an exact KL."""
    shape = task.start.config
    passes = (Pass(shape, gradient=True, lora=config.lora),)
    passes += (Pass(shape, gradient=True, logits=False, lora=config.lora),) * ("critic" in params)
    return passes + (Pass(shape),) * reference


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
    return Task(start, setting.spec, prompts, score, judge, warm=warming(setting, setting.spec))


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
    best = dataclasses.replace(spec, greedy=True, replay=False)
    prompts = pipeline.within(prompts, first.config.vocab_size)
    return Task(first, spec, prompts, score, judge, warm=warming(setting, spec, best))


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
