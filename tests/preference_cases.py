"""Random pairs with every edge case, shared by the tests of DPO, ORPO and KTO."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.core.types import Preferences
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig

ROWS, PROMPT, WIDTH, VOCAB = 8, 3, 6, 22
T = PROMPT + WIDTH
EMPTY, EXCLUDED, IDENTICAL, TIE, REVERSED = 1, 2, 3, 4, 5  # rows of their own kind
MODEL = transformer.build(TransformerConfig(VOCAB, 8, 1, 2, 2, 4, 16, 12, remat="none"))


def preferences(seed: int, soft: bool = True) -> Preferences:
    """Pairs with log-probs of a reference: full, empty, excluded, identical and tied ones, soft labels, uneven weights."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, WIDTH, (ROWS, 2))
    length[0], length[EMPTY], length[IDENTICAL] = (WIDTH, 1), (0, 3), (4, 4)
    tokens = rng.integers(0, VOCAB, (ROWS, 2, T))
    tokens[:, 1, :PROMPT] = tokens[:, 0, :PROMPT]
    tokens[IDENTICAL, 1, : PROMPT + 4] = tokens[IDENTICAL, 0, : PROMPT + 4]  # what follows differs
    label = rng.random(ROWS) if soft else np.ones(ROWS)
    label[0], label[REVERSED] = 1.0, 0.0
    weight = rng.uniform(0.5, 2.0, ROWS)
    weight[EXCLUDED] = 0
    return Preferences(
        tokens=jnp.asarray(tokens, jnp.int32),
        prompt_len=jnp.full((ROWS, 2), PROMPT, jnp.int32),
        response_len=jnp.asarray(length, jnp.int32),
        label=jnp.asarray(label, jnp.float32),
        tie=jnp.arange(ROWS) == TIE,
        weight=jnp.asarray(weight, jnp.float32),
        margin=jnp.asarray(rng.normal(size=ROWS), jnp.float32),
        ref_logprobs=logprobs(seed + 1000),
    )


def logprobs(seed: int, width: int = WIDTH) -> jax.Array:
    """Log-probs of tokens [ROWS, 2, width]."""
    return -jnp.asarray(np.random.default_rng(seed).gamma(2.0, 1.0, (ROWS, 2, width)), jnp.float32)


def with_holes(batch, seed: int):
    """The batch with tokens that do not count inside its responses."""
    kept = np.random.default_rng(seed).random(batch.mask.shape) < 0.7
    return dataclasses.replace(batch, mask=batch.mask & kept)


def total(loss, outputs, batch, config) -> jax.Array:
    """What the train step minimises."""
    return sum(term.coefficient * term.sum / term.count for term in loss(outputs, batch, config)[0].values())


def finite_differences(function, x: np.ndarray, step_size: float = 1e-5) -> np.ndarray:
    """Slope of a float64 function of an array, by central differences."""
    out = np.zeros(x.shape)
    for place in np.ndindex(x.shape):
        high, low = x.copy(), x.copy()
        high[place] += step_size
        low[place] -= step_size
        out[place] = (function(high) - function(low)) / (2 * step_size)
    return out


def spoiled(leaves, batch, garbage: float):
    """Garbage wherever the mask of the batch is False, in arrays of the mask's shape."""
    return jax.tree.map(lambda x: jnp.where(batch.mask, x, garbage), leaves)


def assert_bit_equal(a, b) -> None:
    """Every leaf finite and equal."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.isfinite(y).all()
        np.testing.assert_array_equal(x, y)
