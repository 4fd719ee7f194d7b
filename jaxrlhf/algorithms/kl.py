"""Estimates of KL(policy || reference) from the policy's own samples, and the controller of its coefficient."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrlhf.core import masking

Estimator = Literal["k1", "k2", "k3", "exact"]


def estimate(
    logprobs: Float[Array, "b r"],
    ref_logprobs: Float[Array, "b r"],
    mask: Bool[Array, "b r"],
    estimator: Estimator,
    exact: Float[Array, "b r"] | None = None,
) -> Float[Array, "b r"]:
    """KL in nats at each response token, 0 where masked. With d = log policy - log reference of the token drawn:

    k1 = d is unbiased with high variance and may be negative; k2 = d^2 / 2 is biased, never negative; k3 = exp(-d) - 1 + d
    is unbiased, never negative; "exact" is `exact`, the sum over the whole vocabulary, without variance.
    As a loss (differentiated on samples of the policy itself) k2 and "exact" have the gradient of the KL at a token: k1's
    is zero in expectation and k3's is that of KL(reference || policy).
    Source: J. Schulman, "Approximating KL divergence" (2020); limits of d for k3 as in verl `kl_penalty_forward`.

    Raises:
        ValueError: "exact" without `exact`.
    """
    if estimator == "exact":
        if exact is None:
            raise ValueError(
                "kl_estimator='exact' needs the KL of the whole distribution: ask the rollout (exact_kl) or the "
                "objective (ref_kl) for it"
            )
        return masking.masked(exact, mask)
    difference = masking.masked(logprobs - ref_logprobs, mask)
    match estimator:
        case "k1":
            return difference
        case "k2":
            return 0.5 * jnp.square(difference)
        case "k3":
            # exp overflows float32 beyond 88. verl also limits the result to 10, which already biases it at d = -2.6.
            difference = jnp.clip(difference, -20.0, 20.0)
            return jnp.expm1(-difference) + difference


def sequence_kl(
    logprobs: Float[Array, "b r"], ref_logprobs: Float[Array, "b r"], mask: Bool[Array, "b r"]
) -> Float[Array, " b"]:
    """k1 summed over each response, in nats: what is reported, and what the controller steers."""
    return estimate(logprobs, ref_logprobs, mask, "k1").sum(axis=1)


def adapt(
    coefficient: Float[Array, ""], kl: Float[Array, ""], sequences: Float[Array, ""], target: float, horizon: float
) -> Float[Array, ""]:
    """The next KL coefficient: larger where the batch's mean KL per sequence (`kl`, nats) lies above `target`.

    coefficient * (1 + clip(kl / target - 1, -0.2, 0.2) * sequences / horizon)
    Source: Ziegler et al. 2019, section 2.2; openai/lm-human-preferences `AdaptiveKLController`.
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return jax.lax.stop_gradient(coefficient * (1.0 + error * sequences / horizon))
