"""Random rollouts for the tests of algorithms: every awkward row at once."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxrlhf.core.types import Experience, Rollout

ROWS, PROMPT, WIDTH = 8, 3, 6


def experience(seed: int, holes: bool = False, samples: int = 1) -> Experience:
    """Rows in groups of `samples`: a full one, an empty one, cut and finished ones, and one of weight 0."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, WIDTH, ROWS)
    length[:2] = WIDTH, 0
    finished = rng.random(ROWS) < 0.5
    finished[:4] = False, False, True, False
    weight = np.ones(ROWS)
    weight[4] = 0

    def per_token(scale=1.0):
        return jnp.asarray(scale * rng.normal(size=(ROWS, WIDTH)), jnp.float32)

    def per_row(values, dtype):
        return jnp.asarray(values, dtype)

    rows = np.arange(ROWS)
    rollout = Rollout(
        tokens=jnp.asarray(rng.integers(0, 9, (ROWS, PROMPT + WIDTH)), jnp.int32),
        prompt_len=jnp.full(ROWS, PROMPT),
        response_len=per_row(length, jnp.int32),
        finished=per_row(finished, bool),
        group=per_row(rows // samples * 7, jnp.int32),
        sample=per_row(rows % samples, jnp.int32),
        version=per_row(0 * rows, jnp.int32),
        logprobs=per_token(),
        sampled_logprobs=per_token(),
        written=jnp.asarray(rng.random((ROWS, WIDTH)) < 0.6) if holes else None,
    )
    score, bootstrap = rng.normal(size=(2, ROWS))
    return Experience(
        rollout,
        per_token(0.5),
        per_token(0.5),
        per_token(),
        per_row(bootstrap, jnp.float32),
        per_row(2 * score, jnp.float32),
        per_row(weight, jnp.float32),
    )


def mask_of(data: Experience) -> np.ndarray:
    """The tokens that count, by hand."""
    mask = np.arange(WIDTH) < np.asarray(data.rollout.response_len)[:, None]
    mask &= np.asarray(data.weight)[:, None] > 0
    return mask if data.rollout.written is None else mask & np.asarray(data.rollout.written)


def spoil(data: Experience, garbage: float) -> Experience:
    """Garbage in every place that the mask leaves out, rows of weight 0 whole."""
    mask = jnp.asarray(mask_of(data))
    excluded = data.weight == 0

    def token(x):
        return None if x is None else jnp.where(mask, x, garbage)

    def row(x):
        return None if x is None else jnp.where(excluded, garbage, x)

    rollout = data.rollout.replace(logprobs=token(data.rollout.logprobs), sampled_logprobs=token(data.rollout.sampled_logprobs))
    return data.replace(
        rollout=rollout,
        logprobs=token(data.logprobs),
        ref_logprobs=token(data.ref_logprobs) * -1,
        values=token(data.values),
        ref_kl=token(data.ref_kl),
        baseline=row(data.baseline),
        bootstrap=jnp.where(data.rollout.finished | excluded, garbage, data.bootstrap),
        score=row(data.score),
    )
