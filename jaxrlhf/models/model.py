"""The few functions through which sampling and training see a model, whoever wrote it.

`models/transformer.py` builds one from a `TransformerConfig`; `models/flax_adapter.py` builds one from any `flax.linen` or
`flax.nnx` module. Nothing else in the library knows which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """How a model keeps what it has read while it samples."""

    dtype: Literal["float32", "bfloat16", "int8"] = "float32"  # of keys and values; narrow ones move log-probs a little
    attention: Literal["xla", "cudnn"] = "xla"  # implementation that reads the prompts


EXACT = CacheConfig()  # what was read is kept as it was computed


def _as_they_are(params: Any) -> Any:
    return params


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A decoder-only language model as pure functions. Compared by identity, so it may be a static argument of `jit`."""

    vocab_size: int
    width: int  # D of the hidden states
    max_length: int  # longest row that the model can read
    init: Callable[[jax.Array], Any]
    """(key) -> params, float32."""
    hidden: Callable[..., jax.Array]
    """(params, tokens [B,T], segments [B,T] | None = None) -> [B,T,D] float32, after the last norm.
    Causal. `segments` (1, 2, ...; 0 is padding) keeps packed texts from seeing each other and restarts positions.
    Right-padding needs no mask: a real token never looks forward."""
    logits: Callable[[Any, jax.Array], jax.Array]
    """(params, hidden [..., D]) -> [..., V] float32."""
    decode_params: Callable[[Any], Any]
    """(params) -> what `prefill` and `decode` read; made once per rollout (architecture decision 4)."""
    prefill: Callable[[Any, jax.Array, jax.Array, int, int, CacheConfig], tuple[jax.Array, Any]]
    """(decode_params, tokens [B,P], length [B], samples n, width R, how) -> (hidden [B,D] of each prompt's last token, cache).
    The cache serves B * n rows (row i continues prompt i // n) of at most R response tokens."""
    decode: Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]
    """(decode_params, cache, token [B*n], step) -> (hidden [B*n,D], cache): read response token number `step`, one for all
    rows [] or, where each has a prompt of its own, each its own [B]."""
    resume: Callable[[Any, jax.Array, jax.Array, jax.Array, int, CacheConfig], tuple[jax.Array, Any]]
    """(decode_params, tokens [B,P+R], prompt_len [B], response_len [B], width R, how) -> (hidden [B,D] of each row's last
    token, cache as `take` gives it), of rows that have written a part of their response, read as if `decode` had read it."""
    take: Callable[[Any, jax.Array], Any]
    """(cache, rows [m]) -> the cache of these rows alone, in this order; each then continues a prompt of its own."""
    put: Callable[[Any, jax.Array, Any], Any]
    """(cache, rows [m], part) -> the cache with that of m other rows in these places; those of either come from `take`."""
    grow: Callable[[Any, int], dict[str, Any]]
    """(cache, extra) -> those entries of the cache, a dict, that change with room for `extra` response tokens more a row."""
    head: Callable[[Any], Any] = _as_they_are
    """(params) -> params whose `logits` are read block by block in one program: on a mesh, with the head gathered once."""


def decode_changes(model: Model, params: Any) -> Any:
    """`model.decode_params(params)` with None in the place of every leaf that is as it was: what sampling holds besides."""
    given = {id(leaf) for leaf in jax.tree.leaves(params)}
    return jax.tree.map(lambda leaf: None if id(leaf) in given else leaf, model.decode_params(params))
