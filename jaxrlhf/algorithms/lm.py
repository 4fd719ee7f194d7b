"""Next-token prediction: pre-training over packed rows, and supervised fine-tuning on responses, by the same loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from jaxrlhf.core import masking
from jaxrlhf.core.types import Outputs, Term


@dataclasses.dataclass(frozen=True)
class Config:
    """Nothing to choose: the mean negative log-likelihood of a token."""


@struct.dataclass
class Batch:
    """Rows of which some tokens are predicted. Token `prompt_len + t` of a row is response token t."""

    tokens: jax.Array  # [B, T] int32
    prompt_len: jax.Array  # [B] int32
    response_len: jax.Array  # [B] int32
    mask: jax.Array  # [B, R] bool, the response tokens that are learned
    segments: jax.Array | None = None  # [B, T] int32: 1, 2, ... for texts packed into one row, 0 for padding


def packed(tokens: Int[Array | np.ndarray, "b t"], segments: Int[Array | np.ndarray, "b t"] | None = None) -> Batch:
    """Rows for pre-training: every token but a row's first is predicted (R = T - 1).

    With `segments`, the first token of every text and all padding are not, since nothing that may be seen precedes them.
    Without, rows are full and one text may follow another in the same row.
    """
    tokens = jnp.asarray(tokens)
    rows, width = tokens.shape
    if segments is None:
        length, mask = jnp.full(rows, width), jnp.ones((rows, width - 1), bool)
    else:
        segments = jnp.asarray(segments)
        length = (segments > 0).sum(axis=1)
        mask = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    ones = jnp.ones(rows, jnp.int32)
    return Batch(tokens, ones, jnp.maximum(length - 1, 0).astype(jnp.int32), mask, segments)


def responses(
    tokens: Int[Array | np.ndarray, "b t"],
    prompt_len: Int[Array | np.ndarray, " b"],
    response_len: Int[Array | np.ndarray, " b"],
    width: int,
) -> Batch:
    """Rows for fine-tuning: the response is predicted, EOS included, the prompt is not. `width` is R."""
    response_len = jnp.asarray(response_len)
    return Batch(jnp.asarray(tokens), jnp.asarray(prompt_len), response_len, masking.length_mask(response_len, width))


def loss(outputs: Outputs, batch: Batch, config: Config) -> tuple[dict[str, Term], dict[str, Term]]:
    """Negative log-likelihood, nats per learned token of the whole batch. Reads `outputs.logprobs`.

    Raises:
        ValueError: the outputs hold no log-probs.
    """
    del config
    if outputs.logprobs is None:
        raise ValueError("lm.loss needs Outputs.logprobs: ask the objective for them")
    return {"loss/lm": Term(-masking.masked_sum(outputs.logprobs, batch.mask), batch.mask.sum().astype(jnp.float32))}, {}
