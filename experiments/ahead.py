"""The programs that follow the first rollout, compiled in a thread while that is sampled: scores, advantages, updates.

Their arguments are known before they exist: a rollout's shapes from prompts and spec, the rest from what the program before
says that it gives. The calls that come later find what was compiled, and wait where it is not done.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments import tasks
from jaxrlhf.core import sharding
from jaxrlhf.core.types import Rollout
from jaxrlhf.sampling import rollout
from jaxrlhf.training import timing


def start(
    clock: timing.Clock,
    task: tasks.Task,
    params: dict[str, Any],
    frozen: Any,
    state: Any,
    later: tuple[Any, Any, Any],
    n: int,
    options: rollout.Options,
) -> None:
    """Begin to compile `rollout.experience` of n answers to a batch of prompts, and `later`: the jitted `prepare` of an
    algorithm, its config, and the step made by `step.make_epochs`, which `clock.learner` may have wrapped.

    `params` is what the rollout is sampled with, `state` the state before the first step.
    """
    mesh = jax.tree.leaves(state.params)[0].sharding.mesh
    if jax.process_count() > 1:  # each process would have to compile in the same order
        return
    prepare, config, run_epochs = later
    found: dict[str, Any] = {}
    drawn = answers(task, n, mesh)  # here, since the clock that times the task's prompts is this thread's

    def score() -> None:
        args = (task.start.model, task.spec, options, params, frozen["reference"], drawn)
        one = jax.ShapeDtypeStruct(drawn.prompt_len.shape, jnp.float32, sharding=sharding.batch_sharding(mesh))
        found["experience"] = dataclasses.replace(result(rollout.experience_program.lower(*args)), score=one, weight=one)

    def advantages() -> None:
        found["batch"] = result(prepare.lower(found["experience"], state.algorithm, config=config))[0]

    def update() -> None:
        run_epochs.lower(state, frozen, found["batch"]).compile()

    jobs = {"score": score, "prepare": advantages}
    if getattr(run_epochs, "lower", None) is not None:  # not of rows sorted by length, whose programs depend on the lengths
        jobs["update"] = update
    clock.programs.ahead(jobs, lambda: jax.set_mesh(mesh))


def answers(task: tasks.Task, n: int, mesh: jax.sharding.Mesh) -> Rollout:
    """Shapes of n answers to each prompt of a batch."""
    count, width = task.prompts[0].tokens.shape
    rows, most = count * n, task.spec.max_tokens

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding.batch_sharding(mesh))

    number, numbers = array(jnp.int32), array(jnp.float32, most)
    kept = array(jnp.uint32, most, -(-task.start.model.vocab_size // 32)) if task.spec.replayed else None
    tokens, ended = array(jnp.int32, width + most), array(bool)
    return Rollout(tokens, number, number, ended, number, number, number, numbers, numbers, kept)


def result(lowered: Any) -> Any:
    """Compile a program; what it gives, as shapes with shardings."""
    places = lowered.compile().output_shardings
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), lowered.out_info, places)
