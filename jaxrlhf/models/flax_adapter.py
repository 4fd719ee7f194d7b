"""Any module that maps tokens to hidden states, `flax.linen`, `flax.nnx` or other, as a `Model`.

Sampling such a model costs a forward pass over the whole row for each token, because nothing is known about its cache:
right for any causal module, fit for trying one out. For speed give `Model` a `prefill` and a `decode` of your own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrlhf.core import masking
from jaxrlhf.models.model import EXACT, CacheConfig, Model


def from_flax(
    hidden: Callable[[Any, jax.Array], jax.Array],
    logits: Callable[[Any, jax.Array], jax.Array],
    init: Callable[[jax.Array], Any],
    vocab_size: int,
    width: int,
    max_length: int,
) -> Model:
    """A model from three pure functions over one tree of parameters.

    `hidden(params, tokens [B,T]) -> [B,T,D]` must be causal, accept any T up to `max_length`, and use no dropout;
    `logits(params, hidden [..., D]) -> [..., V]`; `init(key) -> params`. See docs/flax_modules.md for both kinds of module.
    Packed rows are refused: the module cannot know where one text ends. Call this once a module: models are compared by
    identity, and another object is another compilation.
    """
    forward = functools.partial(_forward, hidden, width, max_length)
    return Model(
        vocab_size=vocab_size,
        width=width,
        max_length=max_length,
        init=init,
        hidden=forward,
        logits=lambda params, states: logits(params, states).astype(jnp.float32),
        decode_params=lambda params: params,
        prefill=functools.partial(_prefill, forward),
        decode=functools.partial(_decode, forward),
        resume=functools.partial(_resume, forward),
        take=lambda cache, rows: jax.tree.map(lambda x: x[rows], cache),
        put=lambda cache, rows, part: jax.tree.map(lambda x, new: x.at[rows].set(new, mode="drop"), cache, part),
        grow=lambda cache, extra: {"tokens": jnp.pad(cache["tokens"], ((0, 0), (0, extra)))},
    )


def _forward(
    hidden: Callable[[Any, jax.Array], jax.Array],
    width: int,
    max_length: int,
    params: Any,
    tokens: Int[Array, "b t"],
    segments: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t {width}"]:
    if segments is not None:
        raise ValueError("a model from from_flax cannot keep packed texts apart: give it one text a row, without segments")
    if tokens.shape[1] > max_length:
        raise ValueError(f"rows of {tokens.shape[1]} tokens exceed max_length={max_length}: shorten them")
    return hidden(params, tokens).astype(jnp.float32)


def _prefill(
    forward: Callable[..., jax.Array],
    params: Any,
    tokens: jax.Array,
    length: jax.Array,
    n: int,
    width: int,
    cache: CacheConfig = EXACT,
):
    """The cache is the rows themselves, each prompt followed by room for its response."""
    if cache != EXACT:
        raise ValueError(f"{cache}: a model from from_flax keeps no keys and values; leave it at its defaults")
    last = _at(forward(params, tokens), length - 1)
    rows = jnp.pad(jnp.repeat(tokens, n, axis=0), ((0, 0), (0, width)))
    return last, {"tokens": rows, "length": jnp.repeat(length, n)}


def _resume(
    forward: Callable[..., jax.Array],
    params: Any,
    tokens: jax.Array,
    prompt_len: jax.Array,
    response_len: jax.Array,
    width: int,
    cache: CacheConfig = EXACT,
):
    last, found = _prefill(forward, params, tokens, prompt_len + response_len, 1, 0, cache)
    return last, found | {"length": prompt_len}


def _decode(forward: Callable[..., jax.Array], params: Any, cache: Any, token: jax.Array, step: jax.Array | int):
    place = cache["length"] + step
    # What stood there, and stands behind it, was padding of the prompt; a causal module does not look so far.
    rows = jnp.where(masking.length_mask(place, cache["tokens"].shape[1]), cache["tokens"], token[:, None])
    return _at(forward(params, rows), place), cache | {"tokens": rows}


def _at(hidden: Float[Array, "b t d"], place: Int[Array, " b"]) -> Float[Array, "b d"]:
    return jnp.take_along_axis(hidden, jnp.clip(place, 0, hidden.shape[1] - 1)[:, None, None], axis=1)[:, 0]
