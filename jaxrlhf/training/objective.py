"""The one place that runs a model for a loss: parameters and a batch in, `Outputs` out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrlhf.core import masking, sharding
from jaxrlhf.core import members as ensembles
from jaxrlhf.core.types import Outputs, SamplingSpec
from jaxrlhf.models import heads
from jaxrlhf.models.model import Model

OutputsFn = Callable[[Any, Any, Any, jax.Array | None], Outputs]


def make_outputs(
    model: Model,
    spec: SamplingSpec | None = None,
    logprobs: bool = True,
    entropy: bool = False,
    values: bool = False,
    scores: Literal["last", "mean"] | None = None,
    trunk: str | None = None,
    packed: bool = False,
    dropout: bool = False,
    members: Literal["heads", "models"] | None = None,
) -> OutputsFn:
    """A function (params, frozen, batch, key) -> Outputs that computes what is asked for, and nothing else.

    `params` is the language model's tree, or a dict that holds it at `trunk` with a scalar head beside it: `value` (read
    where `values`) or `head` (read where `scores`). The batch has `tokens` [B,T] (or [B,N,T] where `scores`),
    `prompt_len`, `response_len`, and `segments` or none. `frozen` is passed for objectives of your own; none here reads it.

    Log-probs, entropies and values are those of the R response tokens: of the policy that `spec` describes, R =
    spec.max_tokens, or without `spec` of the plain softmax, R = the width of `batch.mask`. `packed`: every prompt is one
    token and R = T - 1 (`lm.packed`), so states are read in place, not gathered. Dropout is on where `dropout` and a key are.

    `members`: the scores are an ensemble's [M,B,N], of heads stacked [M,...] on one trunk, or of models stacked as wholes, each
    of which reads its own rows of tokens [B,M,N,T].

    Raises:
        ValueError: options that contradict each other.
    """
    if scores is not None and (logprobs or entropy or values):
        raise ValueError("make_outputs: scores is computed alone; set logprobs=False, entropy=False, values=False beside it")
    if members is not None and scores is None:
        raise ValueError("make_outputs: an ensemble's members score; set scores='last' or 'mean' beside members")
    if scores is None and not (logprobs or entropy or values):
        raise ValueError("make_outputs: nothing asked for; set logprobs, entropy, values or scores")
    if (values or scores is not None) and trunk is None:
        raise ValueError("make_outputs: a head needs trunk='...', the key of the model's tree beside it (policy, trunk)")

    def run(params: Any, tokens: jax.Array, segments: jax.Array | None, key: jax.Array | None) -> jax.Array:
        tree = params if trunk is None else params[trunk]
        if dropout and key is not None:
            return model.hidden(tree, tokens, segments, dropout_key=key)
        return model.hidden(tree, tokens, segments)

    pooling = scores or "last"

    def score_rows(params: Any, rows: jax.Array, length: jax.Array, key: jax.Array | None) -> jax.Array:
        hidden = run(params, sharding.constrain(rows, "batch", None), None, key)
        read = functools.partial(heads.score, hidden=hidden, length=length, pooling=pooling)
        return jax.vmap(read)(params["head"]) if members == "heads" else read(params["head"])

    def score_outputs(params: Any, frozen: Any, batch: Any, key: jax.Array | None) -> Outputs:
        del frozen
        tokens, length = batch.tokens, batch.prompt_len + batch.response_len
        if members == "models":
            return Outputs(scores=_each_model(score_rows, params, tokens, length, key))
        found = score_rows(params, tokens.reshape(-1, tokens.shape[-1]), length.reshape(-1), key)  # [B*N] or [M, B*N]
        return Outputs(scores=found.reshape(*found.shape[:-1], *tokens.shape[:-1]))

    def token_outputs(params: Any, frozen: Any, batch: Any, key: jax.Array | None) -> Outputs:
        del frozen
        hidden = run(params, batch.tokens, getattr(batch, "segments", None), key)
        width = batch.mask.shape[1] if spec is None else spec.max_tokens
        predicted, states = _shifted(batch, hidden, width) if packed else _gathered(batch, hidden, width)
        found: dict[str, Any] = {}
        if logprobs or entropy:
            tree = params if trunk is None else params[trunk]
            logps, entropies = heads.token_logprobs(model, tree, states, predicted, spec, entropy)
            found = {"logprobs": logps if logprobs else None, "entropy": entropies}
        if values:
            found["values"] = heads.values(params["value"], states)
        return Outputs(**found)

    return token_outputs if scores is None else score_outputs


def _each_model(score_rows: Callable, params: Any, tokens: jax.Array, length: jax.Array, key: jax.Array | None) -> jax.Array:
    """Scores [M,B,N] of M models, each of its own rows and with its own dropout."""
    b, m, n, t = tokens.shape
    rows, length = tokens.swapaxes(0, 1).reshape(m, b * n, t), length.swapaxes(0, 1).reshape(m, b * n)
    keys = None if key is None else jax.random.split(key, m)
    return ensembles.each(score_rows, params, rows, length, keys).reshape(m, b, n)


def _shifted(batch: Any, hidden: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    if width != batch.tokens.shape[1] - 1:
        raise ValueError(f"packed rows of {batch.tokens.shape[1]} tokens predict all but the first, not {width}: see lm.packed")
    return batch.tokens[:, 1:], hidden[:, :-1]


def _gathered(batch: Any, hidden: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """The R response tokens of each row, and the states that predict them."""
    index = jnp.clip(masking.response_index(batch.prompt_len, width), 0, batch.tokens.shape[1] - 1)
    return jnp.take_along_axis(batch.tokens, index, axis=1), heads.response_hidden(hidden, batch.prompt_len, width)
