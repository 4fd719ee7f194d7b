"""What is drawn, against the distributions that transformers makes of the same logits (tests/golden/make_warpers.py)."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.core.types import SamplingSpec
from jaxrlhf.models import heads
from jaxrlhf.sampling import filters, nucleus

GOLDEN = dict(np.load(pathlib.Path(__file__).parent / "golden" / "warpers.npz"))
CASES = json.loads(str(GOLDEN["cases"]))


def drawable(logits: jax.Array, tokens: jax.Array, spec: SamplingSpec) -> jax.Array:
    """Logits of what may be drawn, by the library's own steps."""
    length = jnp.full(len(tokens), 12)  # 12 tokens of prompt, 8 of response: the next is number 8
    seen = heads.seen_from(tokens, length, logits.shape[1], spec)
    policy = heads.policy_logits(logits, jnp.full(len(logits), 8), spec, None if seen is None else seen <= 8)
    return filters.apply(policy, spec)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[",".join(case) for case in CASES])
def test_the_distribution_is_that_of_transformers(number):
    spec = SamplingSpec(max_tokens=9, stop=(), **CASES[number])
    logits, tokens, want = GOLDEN["logits"], GOLDEN["tokens"], GOLDEN[f"probability_{number}"].astype(np.float64)
    found = drawable(jnp.asarray(logits), jnp.asarray(tokens), spec)
    np.testing.assert_array_equal(found > heads.IMPOSSIBLE / 2, want > 0)
    np.testing.assert_allclose(jax.nn.softmax(found, -1), want, rtol=2e-5, atol=1e-8)  # float32 on both sides
    count, rows = 4000, len(logits)
    uniform = jax.random.uniform(jax.random.key(number), (count * rows,))
    token, logprob = jax.jit(nucleus.draw)(jnp.tile(found, (count, 1)), uniform)
    drawn = np.asarray(token).reshape(count, rows)
    np.testing.assert_allclose(logprob.reshape(count, rows), np.log(want[np.arange(rows), drawn]), atol=3e-5)
    for row in range(rows):  # chi-square, far inside its 99.99 % bound for a draw of a committed seed
        expected = count * want[row]
        counts = np.bincount(drawn[:, row], minlength=len(expected))
        likely = expected > 5
        pooled = [*zip(counts[likely], expected[likely], strict=True), (counts[~likely].sum(), expected[~likely].sum())]
        chi_square = sum((got - exact) ** 2 / max(exact, 1e-9) for got, exact in pooled if exact > 1)
        degrees = len(pooled) - 1
        assert chi_square < degrees + 4 * np.sqrt(2 * degrees) + 6
        assert counts[want[row] == 0].sum() == 0
