"""What a run tells of itself: before it begins, the bytes that it will hold; while it runs, where its time goes, and how much
is computed for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from experiments import stage
from experiments.settings import Settings
from experiments.tasks import Task
from jaxrlhf.core import sharding
from jaxrlhf.models import heads, roles
from jaxrlhf.models.model import EXACT
from jaxrlhf.sampling import rollout
from jaxrlhf.training import plan, timing
from jaxrlhf.training.flops import Pass
from jaxrlhf.training.run import Run

AT_ONCE = rollout.Options()


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
    draws = n > 0 and not options.apart.devices  # else `apart.py` tells what other devices hold
    if draws:
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
    if draws:
        sampled += plan.prefill(start.config, prompts, width)
    stage.tell_memory(run, (*trained, *kept, *sampled))


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
