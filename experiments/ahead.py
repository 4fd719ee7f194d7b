"""The programs that follow the first rollout, compiled in a thread while that is sampled: scores, advantages, updates.

Their arguments are known before they exist: a rollout's shapes from prompts and spec, the rest from what the program before
says that it gives. The calls that come later find what was compiled, and wait where it is not done.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.online import Loop, over_start
from jaxrlhf.core import sharding
from jaxrlhf.core.types import Rollout, TrainState
from jaxrlhf.sampling import rollout


def start(loop: Loop, frozen: dict[str, Any], state: TrainState, prepare: Any, learn: Any) -> None:
    """Begin to compile `rollout.experience` of the answers to a batch of prompts, `online.preparer`'s program and
    `online.learner`'s; `state` is that before the first step.
    """
    if jax.process_count() > 1:  # each process would have to compile in the same order
        return
    task, config, mesh = loop.task, loop.config, loop.mesh
    params = over_start(loop, state.params)
    found: dict[str, Any] = {}
    drawn = answers(loop)  # here, since the clock that times the task's prompts is this thread's

    def score() -> None:
        args = (task.start.model, task.spec, loop.options, params, frozen["reference"], drawn)
        one = jax.ShapeDtypeStruct(drawn.prompt_len.shape, jnp.float32, sharding=sharding.batch_sharding(mesh))
        found["experience"] = dataclasses.replace(result(rollout.experience_program.lower(*args)), score=one, weight=one)

    def advantages() -> None:
        found["batch"] = result(prepare.lower(found["experience"], state.algorithm, config=config.algorithm))[0]

    def update() -> None:
        learn.lower(state, frozen, found["batch"]).compile()

    jobs = {"score": score, "prepare": advantages}
    if getattr(learn, "lower", None) is not None:  # not of rows sorted by length, whose programs depend on the lengths
        jobs["update"] = update
    loop.run.clock.programs.ahead(jobs, lambda: jax.set_mesh(mesh))


def answers(loop: Loop) -> Rollout:
    """Shapes of the answers to the prompts of a batch."""
    task, mesh = loop.task, loop.mesh
    count, width = task.prompts[0].tokens.shape
    rows, most = count * loop.n, task.spec.max_tokens

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
