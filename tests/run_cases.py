"""A training state for tests of what survives a run, and its comparison to the last bit."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.core.types import TrainState
from jaxrlhf.training import metrics, optimizer, step, timing
from jaxrlhf.training.optimizer import OptimizerConfig


def ends(out: pathlib.Path) -> dict[str, bytes]:
    """What runs that are the same must be equal in: the bytes of what they trained, and their metrics but for the clock's."""
    files = [*out.glob("params.npy"), *out.glob("model/params.safetensors")]
    rows = [{k: v for k, v in row.items() if not k.startswith(timing.FIGURES)} for row in metrics.read(out)]
    return {path.name: path.read_bytes() for path in files} | {metrics.FILE: json.dumps(rows).encode()}


def train_state(seed: int = 0) -> TrainState:
    """A state with every kind of leaf: stacked and narrow weights, moments of two optimizers, counters, a random key."""
    rng = np.random.default_rng(seed)
    params = {
        "embed": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
        "layers": {"up": jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32)},
        "half": jnp.asarray(rng.normal(size=(4,)), jnp.bfloat16),
    }
    made = optimizer.make(OptimizerConfig(name="muon"), 10, params)
    return step.init_state(params, made, jax.random.key(seed), {"kl_coef": jnp.float32(0.1)})


def on_host(state) -> list[np.ndarray]:
    return [
        np.array(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in jax.tree.leaves(state)
    ]


def assert_same_bits(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(on_host(a), on_host(b), strict=True):
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()
