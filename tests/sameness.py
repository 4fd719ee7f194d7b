"""PPO on recorded rollouts and live, written once for every mesh: `tests/test_sameness.py` in one process, and
`tests/two_processes.py` in two."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms import ppo
from jaxrlhf.core import processes, sharding
from jaxrlhf.core.types import Prompts, SamplingSpec
from jaxrlhf.models import heads, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.sampling import generate, rollout
from jaxrlhf.training import objective, optimizer, step
from jaxrlhf.training.optimizer import OptimizerConfig

# Every axis of the table has a size that eight divide, and layers, groups of queries and prompts of unequal length are there.
CONFIG = TransformerConfig(64, 32, 2, 8, 8, 8, 48, 16)
MODEL = transformer.build(CONFIG)
SPECS = {"policy": transformer.param_specs(CONFIG), "value": heads.value_specs(CONFIG.width)}
SPEC = SamplingSpec(0.8, 8, (2,), min_tokens=2, forbidden=(0, 1))
OUTPUTS = objective.make_outputs(MODEL, SPEC, entropy=True, values=True, trunk="policy")
PPO = ppo.Config(kl_coef=0.05, epochs=2, minibatches=2)
ROWS, ITERATIONS = 16, 5  # of 2 epochs x 2 minibatches: 20 updates
CHUNKS = generate.Options(chunk=3, least=8)


@functools.cache
def start() -> Any:
    """Parameters, on the host. The value head is not zero, as it would be at the start."""
    params = jax.device_get(jax.jit(lambda key: sharding.init_params(SPECS, key))(jax.random.key(0)))
    return params | {"value": {"weight": np.linspace(-1, 1, CONFIG.width, dtype=np.float32), "bias": np.float32(0.1)}}


def prompts(iteration: int) -> Prompts:
    """Of 1 to 6 tokens."""
    rng = np.random.default_rng(iteration)
    tokens = rng.integers(3, CONFIG.vocab_size, (ROWS, 6)).astype(np.int32)
    length = rng.integers(1, 7, ROWS).astype(np.int32)
    row = np.arange(ROWS, dtype=np.int32)
    return Prompts(tokens, length, row + ROWS * iteration, row)


def scores(iteration: int) -> np.ndarray:
    """Of each row, drawn."""
    return np.random.default_rng(100 + iteration).normal(size=ROWS).astype(np.float32)


@functools.cache
def recorded() -> list[Any]:
    """Rollouts of the start, on the host: what every mesh learns from."""
    key = jax.random.key(3)
    drawn = [
        generate.generate(MODEL, start()["policy"], prompts(i), SPEC, jax.random.fold_in(key, i)) for i in range(ITERATIONS)
    ]
    return jax.device_get(drawn)


def train(mesh: jax.sharding.Mesh | None, rollouts: list[Any] | None, iterations: int = ITERATIONS) -> dict[str, Any]:
    """Iterations of PPO on the mesh, or without one: losses of each, parameters at the end, tokens drawn.

    `rollouts`: recorded ones to learn from; None: each iteration samples its own.
    """
    params = start()
    update = optimizer.make(OptimizerConfig(learning_rate=1e-3, epsilon=1e-5, clip_norm=1.0), 20, params)
    run_epochs = step.make_epochs(OUTPUTS, ppo.loss, PPO, update, PPO.epochs, PPO.minibatches)
    prepare = jax.jit(ppo.prepare, static_argnames="config")

    def put(tree: Any) -> Any:
        return jax.tree.map(jnp.asarray, tree) if mesh is None else sharding.shard_batch(tree, mesh)

    placed = params if mesh is None else processes.from_host(params, sharding.shardings(SPECS, mesh))
    frozen = {"reference": jax.tree.map(jnp.asarray, placed["policy"])}
    state = step.init_state(jax.tree.map(jnp.asarray, placed), update, jax.random.key(1), ppo.init(PPO))
    losses, tokens = [], []
    for i in range(iterations):
        key = jax.random.fold_in(jax.random.key(3), i)
        options = rollout.Options(rows=8, generation=CHUNKS)
        if rollouts is None:
            drawn = generate.generate(MODEL, state.params["policy"], put(prompts(i)), SPEC, key, options=CHUNKS)
        else:
            drawn = put(rollouts[i])
        experience = rollout.experience(MODEL, state.params, frozen, drawn, SPEC, options)
        experience = dataclasses.replace(experience, score=put(scores(i)))
        batch, algorithm, stats = prepare(experience, state.algorithm, config=PPO)
        before = state
        state, metrics = run_epochs(dataclasses.replace(state, algorithm=algorithm), frozen, batch)
        donated = jax.tree.leaves((before.params, before.opt_state.inner))
        assert all(x.is_deleted() for x in donated), "the old state's arrays still stand in memory"
        losses.append(processes.to_host(stats | metrics))
        tokens.append(processes.to_host(drawn.tokens))
    return {"params": processes.to_host(state.params), "losses": losses, "tokens": np.stack(tokens)}


def on(mesh: jax.sharding.Mesh, rollouts: list[Any] | None, iterations: int = ITERATIONS) -> dict[str, Any]:
    """`train` under the mesh."""
    with jax.set_mesh(mesh):
        return train(mesh, rollouts, iterations)


def assert_same(found: dict[str, Any], expected: dict[str, Any], iterations: int | None = None) -> None:
    """Parameters and losses to 1e-5, of a leaf's largest number: single entries may be sums that cancel."""
    for i, (ours, theirs) in enumerate(zip(found["losses"][:iterations], expected["losses"][:iterations], strict=True)):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-5, err_msg=f"iteration {i}: {name}")
    if iterations is not None:
        return
    leaves = jax.tree_util.tree_leaves_with_path(found["params"])
    for (path, ours), theirs in zip(leaves, jax.tree.leaves(expected["params"]), strict=True):
        atol = 1e-5 * max(1.0, np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=sharding.path_name(path))
