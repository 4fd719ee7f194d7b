"""The one place that runs a model for a loss: parameters and a batch in, `Outputs` out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

from jaxrlhf.core import members as ensembles
from jaxrlhf.core import offload, sharding
from jaxrlhf.core.types import Outputs, SamplingSpec
from jaxrlhf.models import heads, lora, roles
from jaxrlhf.models.model import Model

OutputsFn = Callable[[Any, Any, Any, jax.Array | None], Outputs]


def make_outputs(
    model: Model,
    spec: SamplingSpec | None = None,
    logprobs: bool = True,
    entropy: bool = False,
    values: bool = False,
    ref_kl: bool = False,
    text: bool = False,
    scores: Literal["last", "mean"] | None = None,
    trunk: str | None = None,
    packed: bool = False,
    dropout: bool = False,
    members: Literal["heads", "adapters", "models"] | None = None,
    adapters: lora.LoraConfig = lora.NONE,
) -> OutputsFn:
    """A function (params, frozen, batch, key) -> Outputs that computes what is asked for, and nothing else.

    `params` is the language model's tree, or a dict that holds it at `trunk` with a head beside it: the value function
    (`models/roles.py`, read where `values`) or `head` (read where `scores`). The batch has `tokens` [B,T], `prompt_len`,
    `response_len`, and `segments` or none; where it holds sets of N responses, [B] is [B,N] throughout, outputs included.

    Log-probs, entropies, values and `ref_kl` (against `frozen["reference"]`) are those of the R response tokens, R the width of
    `batch.mask`: of the policy that `spec` describes, or without `spec` of the plain softmax; with `spec.replay` log-probs and
    entropies are renormalised over the sets in `batch.kept`. `text` adds plain log-probs of
    the packed rows in `batch.text` (an `lm.Batch` of as many rows). `packed`: every prompt is one token and R = T - 1
    (`lm.packed`), so states are read in place, not gathered. Dropout is on where `dropout` and a key are.

    `members`: the scores are an ensemble's [M,B,N], of heads stacked [M,...] on one trunk, or of models stacked as wholes, or
    of adapters stacked with their heads; each of the latter two reads its own rows of tokens [B,M,N,T].

    `adapters` of rank > 0: `params` hold adapters in place of trees, over the frozen base (`roles.attach`, `roles.base`).

    Raises:
        ValueError: options that contradict each other.
    """
    _check(logprobs or entropy or values or ref_kl or text, values, scores, trunk, members, adapters)
    if packed and spec is not None and spec.penalised:
        raise ValueError("make_outputs: a packed row holds several texts, so repetition_penalty has no one row to look at")

    def tree_of(params: Any) -> Any:
        return params if trunk is None else params[trunk]

    def over_base(params: Any, frozen: Any) -> Any:
        return roles.attach(roles.base(frozen), params, adapters) if adapters.rank else params

    def run(params: Any, tokens: jax.Array, segments: jax.Array | None, key: jax.Array | None) -> jax.Array:
        if dropout and key is not None:
            return model.hidden(tree_of(params), tokens, segments, dropout_key=key)
        return model.hidden(tree_of(params), tokens, segments)

    def token_outputs(params: Any, frozen: Any, batch: Any, key: jax.Array | None) -> Outputs:
        params = over_base(params, frozen)
        rows = _rows(batch, spec)
        hidden = run(params, rows.tokens, rows.segments, key)
        width = batch.mask.shape[-1]
        predicted, states = _shifted(rows.tokens, hidden, width) if packed else _gathered(rows, hidden, width)
        found: dict[str, Any] = {}
        seen = heads.seen_from(rows.tokens, rows.prompt_len, model.vocab_size, spec)
        if logprobs or entropy:
            tree = tree_of(params)
            logps, entropies = heads.token_logprobs(model, tree, states, predicted, spec, entropy, kept=rows.kept, seen=seen)
            found = {"logprobs": logps if logprobs else None, "entropy": entropies}
        if values:
            head, value_hidden = roles.value_states(model, params, rows.tokens, hidden)
            found["values"] = heads.values(head, heads.response_hidden(value_hidden, rows.prompt_len, width))
        if ref_kl:
            reference = jax.lax.stop_gradient(offload.fetch(frozen["reference"]))
            ref_states = heads.response_hidden(model.hidden(reference, rows.tokens), rows.prompt_len, width)
            found["ref_kl"] = heads.token_kl(model, tree_of(params), reference, (states, ref_states), spec, seen=seen)
        found = {name: None if x is None else x.reshape(*batch.tokens.shape[:-1], width) for name, x in found.items()}
        return Outputs(**found, text_logprobs=text_logprobs(params, batch.text, key) if text else None)

    def text_logprobs(params: Any, rows: Any, key: jax.Array | None) -> jax.Array:
        states = run(params, rows.tokens, rows.segments, key)[:, :-1]
        return heads.token_logprobs(model, tree_of(params), states, rows.tokens[:, 1:])[0]

    return token_outputs if scores is None else _score_outputs(run, over_base, scores, members)


def _check(
    per_token: bool, values: bool, scores: str | None, trunk: str | None, members: str | None, adapters: lora.LoraConfig
) -> None:
    if scores is not None and per_token:
        raise ValueError(
            "make_outputs: scores is computed alone; set logprobs=False and leave out entropy, values, ref_kl, text"
        )
    if members is not None and scores is None:
        raise ValueError("make_outputs: an ensemble's members score; set scores='last' or 'mean' beside members")
    if members in ("adapters", "models") and (members == "adapters") != (adapters.rank > 0):
        raise ValueError(
            f"make_outputs: members='{members}' with adapters of rank {adapters.rank}: adapters have a rank > 0, models rank 0"
        )
    if scores is None and not per_token:
        raise ValueError("make_outputs: nothing asked for; set logprobs, entropy, values, ref_kl, text or scores")
    if (values or scores is not None) and trunk is None:
        raise ValueError("make_outputs: a head needs trunk='...', the key of the model's tree beside it (policy, trunk)")


def _score_outputs(
    run: Callable[..., jax.Array], over_base: Callable[[Any, Any], Any], pooling: str, members: str | None
) -> OutputsFn:
    def rows_scores(frozen: Any, params: Any, rows: jax.Array, length: jax.Array, key: jax.Array | None) -> jax.Array:
        params = over_base(params, frozen)
        hidden = run(params, sharding.constrain(rows, "batch", None), None, key)
        read = functools.partial(heads.score, hidden=hidden, length=length, pooling=pooling)
        return jax.vmap(read)(params["head"]) if members == "heads" else read(params["head"])

    def score_outputs(params: Any, frozen: Any, batch: Any, key: jax.Array | None) -> Outputs:
        tokens, length = batch.tokens, batch.prompt_len + batch.response_len
        scores_of = functools.partial(rows_scores, frozen)
        if members in (None, "heads"):
            found = scores_of(params, tokens.reshape(-1, tokens.shape[-1]), length.reshape(-1), key)  # [B*N] or [M, B*N]
            return Outputs(scores=found.reshape(*found.shape[:-1], *tokens.shape[:-1]))
        b, m, n, t = tokens.shape
        rows, length = tokens.swapaxes(0, 1).reshape(m, b * n, t), length.swapaxes(0, 1).reshape(m, b * n)
        keys = None if key is None else jax.random.split(key, m)  # each member's own dropout
        return Outputs(scores=ensembles.each(scores_of, params, rows, length, keys).reshape(m, b, n))

    return score_outputs


class _Rows(NamedTuple):
    """A batch with its leading axes made one."""

    tokens: jax.Array  # [B, T]
    prompt_len: jax.Array  # [B]
    segments: jax.Array | None  # [B, T]
    kept: jax.Array | None  # [B, R, ceil(V/32)]


def _rows(batch: Any, spec: SamplingSpec | None) -> _Rows:
    tokens, segments = batch.tokens, getattr(batch, "segments", None)
    replayed = spec is not None and spec.replayed
    if replayed and getattr(batch, "kept", None) is None:
        raise ValueError(
            "the spec says replay=True, but the batch has no kept sets: sample with the same spec, and let prepare keep them"
        )
    kept = batch.kept if replayed else None
    if tokens.ndim == 2:
        return _Rows(tokens, batch.prompt_len, segments, kept)
    tokens = sharding.constrain(tokens.reshape(-1, tokens.shape[-1]), "batch", None)
    return _Rows(tokens, batch.prompt_len.reshape(-1), segments, kept)


def _shifted(tokens: jax.Array, hidden: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    if width != tokens.shape[1] - 1:
        raise ValueError(f"packed rows of {tokens.shape[1]} tokens predict all but the first, not {width}: see lm.packed")
    return tokens[:, 1:], hidden[:, :-1]


def _gathered(rows: _Rows, hidden: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """The R response tokens of each row, and the states that predict them."""
    tokens = heads.response_tokens(rows.tokens, rows.prompt_len, width)
    return tokens, heads.response_hidden(hidden, rows.prompt_len, width)
