"""The rate of float32 weight products in jax, whichever jax: what ours and Tunix's models are made of. See measure.Products."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

WEIGHTS = 2**24  # numbers, at most, in the weights that are gone through in turn: 64 MiB, as a model's do not stay in a cache
FLOPS = 4e9  # of one go, at most: a product that is larger is taken once


def rates(products: dict) -> dict[str, float]:
    """Floating-point operations a second of each stage's product."""
    return {name: rate(*each["shape"]) for name, each in products.items()}


def rate(m: int, k: int, n: int, goes: int = 20) -> float:
    """Floating-point operations a second of [m, k] x [k, n] over some weights in turn, the best of some goes."""
    count = how_many(m, k, n)
    product = jax.jit(lambda x, weights: [x @ weight for weight in weights])
    given = jnp.ones((m, k)), [jnp.ones((k, n)) for _ in range(count)]
    jax.block_until_ready(product(*given))
    best = float("inf")
    for _ in range(goes):
        start = time.perf_counter()
        jax.block_until_ready(product(*given))
        best = min(best, time.perf_counter() - start)
    return count * 2 * m * k * n / best


def how_many(m: int, k: int, n: int) -> int:
    """Weights of one go."""
    return int(max(1, min(24, WEIGHTS // (k * n), FLOPS // (2 * m * k * n))))
