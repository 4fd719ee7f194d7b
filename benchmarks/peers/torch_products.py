"""The rate of float32 weight products in torch: what its models are made of. See measure.Products, and jax_products.py."""

from __future__ import annotations

import time

import torch

WEIGHTS = 2**24  # as jax_products.py
FLOPS = 4e9


@torch.no_grad()
def rates(products: dict) -> dict[str, float]:
    """Floating-point operations a second of each stage's product."""
    return {name: rate(*each["shape"]) for name, each in products.items()}


def rate(m: int, k: int, n: int, goes: int = 20) -> float:
    """Floating-point operations a second of [m, k] x [k, n] over some weights in turn, held as linear layers do; the best."""
    count = int(max(1, min(24, WEIGHTS // (k * n), FLOPS // (2 * m * k * n))))
    x, weights = torch.ones(m, k), [torch.ones(n, k) for _ in range(count)]
    best = float("inf")
    for _ in range(goes + 1):
        start = time.perf_counter()
        for weight in weights:
            torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return count * 2 * m * k * n / best
