"""What the scripts share that draw answers at every iteration, so that each shows its algorithm alone.

    begin      tell what will be held in memory; the state before the first step
    resume     the state, and the answers under way, as the newest checkpoint has them
    collector  prompts -> answers with their log-probs
    reward     answers -> scores
    preparer   scores -> the batch that the algorithm learns from
    record     a few answers, token by token, for `experiments/inspect_run.py`
    learner    batch -> the next state
    judged     the policy on held-out prompts, every so many iterations; the best one so far is kept
    finish     the last judgement; the policy and the result are written

Each stage is timed and its work counted. A script calls what it wants of these, and writes the rest itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import apart, best, stage, tasks, watched
from experiments.settings import Online
from jaxrlhf.core import sharding
from jaxrlhf.core.types import Experience, Prompts, Rollout, SamplingSpec, TrainState
from jaxrlhf.models import roles
from jaxrlhf.sampling import generate, rollout, stragglers
from jaxrlhf.sampling.stragglers import Begun
from jaxrlhf.training import flops, recorder, step, timing
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Loop:
    """What the functions here read of a run; made by `loop`."""

    run: Run
    config: Online
    task: tasks.Task  # timed
    mesh: jax.sharding.Mesh
    n: int  # answers to each prompt
    options: rollout.Options  # how they are drawn and scored
    sampler: apart.Sampler | None  # devices that only draw, and none of the mesh; None: those of the mesh do


def loop(
    run: Run, config: Online, task: tasks.Task, mesh: jax.sharding.Mesh, n: int, options: rollout.Options | None = None
) -> Loop:
    """For n answers to each prompt, drawn as the settings say unless `options` do."""
    task = watched.timed(run.clock, task)
    sampler = apart.sampler(config, task, n, run.clock)
    return Loop(run, config, task, mesh, n, config.rollouts if options is None else options, sampler)


# ------------------------------------------------------------------------------------------------- from start to finish


def begin(loop: Loop, params: Any, update: Any, algorithm: Any = (), average: float | None = None) -> TrainState:
    """The state before the first step, with an average of the weights where it has a decay; its memory told."""
    averaged = average is not None
    watched.tell_memory(loop.run, loop.config, loop.task, params, update, loop.n, loop.options, averaged)
    state = step.init_state(params, update, _keys(loop)[0], algorithm)
    return state if average is None else step.update_ema(state, average)


def resume(loop: Loop, state: TrainState, offloaded: stage.Offload = "none") -> tuple[TrainState, UnderWay]:
    """The state and what is under way of the newest checkpoint, or where there is none this state and none written yet."""
    state, begun = loop.run.restore((state, under_way(loop, state.params)))
    return stage.at_rest(state, offloaded), begun


UnderWay = Begun | apart.Pushed | None  # what a batch leaves for the next besides the state


def under_way(loop: Loop, params: Any) -> UnderWay:
    """Answers under way before the first batch, of which no token is written: `rollouts.stragglers` prompts of the batch that
    would come after the last; the first weights on devices that only draw; None without either.

    Raises:
        ValueError: more prompts than a batch has.
    """
    if loop.sampler is not None:
        pushed = loop.sampler.push(params, 0)
        loop.sampler.tell_memory(pushed)
        return pushed if loop.sampler.steps else None
    count, batch = loop.config.rollouts.stragglers, loop.config.batch
    if not count:
        return None
    if not 0 < count <= batch:
        raise ValueError(f"rollouts.stragglers={count} must be between 0 and batch={batch}, the prompts of a batch")
    first = jax.tree.map(lambda x: x[:count], loop.task.prompts[loop.config.iterations])
    return sharding.shard_batch(stragglers.begin(first, loop.task.start.model, loop.task.spec, loop.n), loop.mesh)


def judged(loop: Loop, number: int, state: TrainState) -> tasks.Figures:
    """Held-out figures of the policy before this iteration, where it is one of those that begin with a judgement."""
    every, metric = loop.config.evaluate_every, loop.task.best
    return best.judged(loop.run, number, every, metric, _served(state), _judge(loop))


def finish(loop: Loop, state: TrainState, begun: UnderWay) -> dict[str, Any]:
    """Save the last state, judge the policy and write it, or with keep="best" the best one; the result: what was held out over
    time, answers before and after."""
    run, config, start = loop.run, loop.config, loop.task.start
    run.maybe_save(config.iterations - 1, (state, begun), last=True)
    last = config.iterations, config.evaluate_every, loop.task.best, _served(state)
    params, (_, samples) = best.finish(run, *last, _judge(loop), config.keep)
    stage.save_policy(config.out, start, params, config.lora, config.policy)
    curve = [row for row in run.metrics() if "held_out/kl" in row]
    return run.done({"curve": curve, "samples": samples})


def over_start(loop: Loop, params: Any) -> dict[str, Any]:
    """{"policy": ...} and what else is trained, or from a policy alone, each adapter laid over the start."""
    tree = params if "policy" in params else {"policy": params}
    return roles.attach(loop.task.start.params, tree, loop.config.lora)


def _judge(loop: Loop) -> Callable[[Any], best.Judgement]:
    return lambda params: loop.task.judge(_policy(loop, params))


def _policy(loop: Loop, params: Any) -> Any:
    return over_start(loop, params)["policy"]


def _served(state: TrainState) -> Any:
    """The policy, or its adapter, as it is judged and saved."""
    params = step.served(state)
    return params.get("policy", params)


def _keys(loop: Loop) -> jax.Array:
    """Of the updates, and of the answers."""
    return jax.random.split(jax.random.key(loop.config.seed))


# ---------------------------------------------------------------------------------------------- stages of an iteration

Collected = tuple[Experience, Prompts, UnderWay]


def collector(loop: Loop, frozen: dict[str, Any]) -> Callable[[Any, int, UnderWay], Collected]:
    """(params, iteration, begun) -> answers to its prompts with the log-probs of learner and reference, and values where there
    is a value function; the prompts that they answer; and what is under way after it (`rollout.collect`, with stragglers
    `stragglers.carry_on`, or from devices that only draw `apart.Sampler.answers`). Its two halves are timed as rollout and
    score; the reward model's work is counted here too.
    """
    task, clock, options = loop.task, loop.run.clock, loop.options
    answer = answerer(loop, task.spec, loop.n, options.generation)
    score = clock.timed("score", rollout.experience, after="score")

    def collect(params: Any, number: int, begun: UnderWay) -> Collected:
        current = over_start(loop, params)
        if loop.sampler is None:
            prompts = sharding.shard_batch(task.prompts[number], loop.mesh)
            answers, prompts, begun = answer(current["policy"], prompts, number, begun)
        else:
            answers, prompts, begun = from_afar(params, number, begun)
        experience = score(task.start.model, current, frozen, answers, task.spec, options)
        clock.scored(answers, *watched.scoring(loop.config, task, current, options))
        return experience, prompts, begun

    def from_afar(params: Any, number: int, begun: Any) -> tuple[Rollout, Prompts, UnderWay]:
        assert loop.sampler is not None
        with clock.within("rollout"):  # the wait for them
            answers, prompts, chunks, begun = loop.sampler.answers(params, number, begun)
            _count(loop, loop.n, prompts, answers, chunks)
            answers, prompts = jax.device_put((answers, prompts), sharding.batch_sharding(loop.mesh))
        return answers, prompts, begun

    return collect


def answerer(
    loop: Loop, spec: SamplingSpec, n: int = 1, options: generate.Options = watched.AT_ONCE.generation
) -> Callable[..., tuple[Rollout, Prompts, Begun | None]]:
    """(policy, prompts, iteration, begun=None) -> n answers to each prompt by `spec`, timed and counted as rollout; their
    prompts; and what is under way. In a strict run the first call compiles whatever a later batch may want: that depends on
    the lengths of its answers.
    """
    start, clock, answers_key = loop.task.start, loop.run.clock, _keys(loop)[1]

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

    sample = clock.timed("rollout", watched.after_first(warm, sample) if clock.options.strict else sample)

    def answer(policy: Any, prompts: Prompts, number: int, begun: Begun | None = None) -> tuple[Rollout, Prompts, Begun | None]:
        before = _written(begun)
        answers, prompts, begun, chunks = sample(policy, prompts, jax.random.fold_in(answers_key, number), number, begun)
        _count(loop, n, prompts, answers, chunks, _written(begun) - before)
        return answers, prompts, begun

    return answer


def _count(loop: Loop, n: int, prompts: Prompts, answers: Rollout, chunks: Any, more: int = 0) -> None:
    """Count the work of n answers to each prompt, and `more` tokens of answers that are under way."""
    if timing.is_here(prompts.length):
        asked, written = np.asarray(prompts.length), np.asarray(answers.response_len)
        done = flops.sampling(loop.task.start.config, asked, written, n)
        loop.run.clock.count.sampled(done, int(written.sum()) + more, chunks)


def _written(begun: Begun | None) -> int:
    """Tokens of the answers under way, as far as this process can read them."""
    if begun is None or not timing.is_here(begun.rollout.response_len):
        return 0
    return int(np.asarray(begun.rollout.response_len).sum())


def reward(loop: Loop, experience: Experience, prompts: Prompts) -> tuple[Experience, tasks.Figures]:
    """The experience with its scores, and with weight 0 where no score could be had."""
    score, weight, figures = loop.task.score(experience.rollout, prompts)
    figures |= {} if loop.sampler is None else loop.sampler.figures
    return dataclasses.replace(experience, score=score, weight=weight), figures


def record(
    loop: Loop, number: int, experience: Experience, advantages: Any = None, rewards: Callable[[], Any] | None = None
) -> None:
    """Keep a few answers of this iteration token by token (`training/recorder.py`), with their advantages [B, R] and the
    rewards [B, R] of their tokens, made only if it is one of those kept; without them the score stands at the last token."""
    tokenizer = loop.task.start.tokenizer

    def rows() -> list[dict[str, Any]]:
        given = None if rewards is None else rewards()
        return recorder.of_experience(experience, advantages, given, tokenizer.token_texts, tokenizer.decode)

    loop.run.sample(number, rows)


def preparer(loop: Loop, prepare: Callable) -> Callable[[Experience, Any], tuple[Any, Any, dict[str, Any]]]:
    """(experience, what the algorithm keeps) -> batch, what it keeps, figures: an algorithm's `prepare`, compiled; among the
    figures those of the rollout (`rollout.stats`)."""
    program, describe = jax.jit(prepare, static_argnames="config"), jax.jit(rollout.stats)
    timed = loop.run.clock.timed("update", program, after="prepare")

    def call(experience: Experience, kept: Any) -> tuple[Any, Any, dict[str, Any]]:
        drawn = describe(experience)
        batch, kept, stats = timed(experience, kept, config=loop.config.algorithm)
        return batch, kept, drawn | stats

    call.lower = program.lower
    return call


def learner(
    loop: Loop, outputs: Any, loss: step.LossFn, update: Any, params: Any, reference: bool = False
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Any]]]:
    """(state, frozen, batch) -> (state, metrics): the algorithm's epochs over one rollout's batch by `step.make_epochs`.

    `params` are what is trained; `reference` says that the loss reads the reference, for an exact KL.
    """
    config, algorithm = loop.config, loop.config.algorithm
    parts = algorithm.epochs, algorithm.minibatches, config.microbatches
    run_epochs = step.make_epochs(outputs, loss, algorithm, update, *parts)
    passes = watched.learning(config, loop.task, params, reference)
    return loop.run.clock.learner(run_epochs, *passes, times=algorithm.epochs)
