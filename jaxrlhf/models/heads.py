"""From hidden states and logits to log-probs, entropies, values and scores."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxrlhf.core import masking, sharding
from jaxrlhf.core.sharding import ParamSpec
from jaxrlhf.core.types import SamplingSpec
from jaxrlhf.models.model import Model

FEWEST = 128  # tokens of a block of logits on a CPU
# Logit of an impossible token. Finite, because the gradient of a softmax of -inf is NaN.
IMPOSSIBLE = -1e30


def policy_logits(
    logits: Float[Array, "*s v"],
    position: Int[Array, "*s"],
    spec: SamplingSpec,
    seen: Bool[Array, "*s v"] | None = None,
) -> Float[Array, "*s v"]:
    """Logits of the policy: the constraints, then temperature. Sampler and scorer both call this.

    `position[...]` is the index, in its response, of the token that the logits predict; `seen` says which tokens stand before
    it in the row, prompt included, and is read where the spec has a repetition penalty.
    Source of the penalty: Keskar et al. 2019 (arXiv 1909.05858), section 4.1, in the form of transformers'
    `RepetitionPenaltyLogitsProcessor`.

    Raises:
        ValueError: a constrained id is not in the vocabulary, or there is a penalty and `seen` is missing.
    """
    vocab = logits.shape[-1]
    if spec.penalised:
        if seen is None:
            raise ValueError(f"repetition_penalty={spec.repetition_penalty} needs to know which tokens stand in the row")
        less = jnp.where(logits > 0, logits / spec.repetition_penalty, logits * spec.repetition_penalty)
        logits = jnp.where(seen, less, logits)
    logits = logits / spec.temperature
    if spec.forbidden:
        logits = jnp.where(_ids(spec.forbidden, vocab, "forbidden"), IMPOSSIBLE, logits)
    if spec.min_tokens and spec.stop:
        early = position[..., None] < spec.min_tokens
        logits = jnp.where(early & _ids(spec.stop, vocab, "stop"), IMPOSSIBLE, logits)
    return logits


def seen_from(
    tokens: Int[Array, "b t"], prompt_len: Int[Array, " b"], vocab: int, spec: SamplingSpec | None
) -> Int[Array, "b v"] | None:
    """The response position from which on each token stands in the row: 0 for those of the prompt, t + 1 for one that first
    stands at response position t, T for none. None where the spec has no use for it.
    """
    if spec is None or not spec.penalised:
        return None
    b, t = tokens.shape
    after = jnp.maximum(jnp.arange(t) - prompt_len[:, None] + 1, 0)
    # What stands behind the response comes after all its positions. An id outside the vocabulary is padding: dropped.
    rows = jnp.arange(b)[:, None]
    return jnp.full((b, vocab), t).at[rows, tokens].min(after, mode="drop")


def _ids(ids: tuple[int, ...], vocab: int, name: str) -> np.ndarray:
    if not all(0 <= i < vocab for i in ids):
        raise ValueError(f"SamplingSpec.{name}={ids} holds an id outside the vocabulary 0 .. {vocab - 1}")
    mask = np.zeros(vocab, bool)
    mask[list(ids)] = True
    return mask


def logprobs_and_entropy(
    logits: Float[Array, "*s v"], tokens: Int[Array, "*s"], entropy: bool = False
) -> tuple[Float[Array, "*s"], Float[Array, "*s"] | None]:
    """log softmax(logits)[tokens] and, where asked for, the entropy in nats; float32.

    Tokens at places that no loss reads may be any integer: one outside the vocabulary gives a finite, meaningless number.
    """
    terms: Any = _softmax_terms(entropy, logits.astype(jnp.float32), tokens)
    return terms[0], terms[1] if entropy else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax_terms(entropy, logits, tokens):
    return _softmax_terms_forward(entropy, logits, tokens)[0]


def _softmax_terms_forward(entropy, logits, tokens):
    total = checkpoint_name(jax.nn.logsumexp(logits, axis=-1), "softmax_terms")
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1, mode="clip")[..., 0]
    uncertainty = jnp.zeros_like(total)
    if entropy:
        probability = jnp.exp(logits - total[..., None])
        uncertainty = total - (probability * logits).sum(-1)  # an impossible token adds 0 * -1e30 = 0
        uncertainty = checkpoint_name(uncertainty, "softmax_terms")
    return (picked - total, uncertainty), (logits, tokens, total, uncertainty)


def _softmax_terms_backward(entropy, residual, g):
    """In one pass over [..., V] and without a scatter: d logprob = onehot - p, d entropy = -p (log p + entropy)."""
    logits, tokens, total, uncertainty = residual
    logprobs = logits - total[..., None]
    probability = jnp.exp(logprobs)
    tokens = jnp.clip(tokens, 0, logits.shape[-1] - 1)
    onehot = jnp.arange(logits.shape[-1]) == tokens[..., None]
    slope = g[0][..., None] * (onehot - probability)
    if entropy:
        slope -= g[1][..., None] * probability * (logprobs + uncertainty[..., None])
    return slope, None


_softmax_terms.defvjp(_softmax_terms_forward, _softmax_terms_backward)


def token_logprobs(
    model: Model,
    params: Any,
    hidden: Float[Array, "b r d"],
    tokens: Int[Array, "b r"],
    spec: SamplingSpec | None = None,
    entropy: bool = False,
    block: int = 0,
    kept: UInt32[Array, "b r w"] | None = None,
    seen: Int[Array, "b v"] | None = None,
) -> tuple[Float[Array, "b r"], Float[Array, "b r"] | None]:
    """Log-probs (and entropies) of response tokens under the policy `spec`, from the states that predict them.

    `spec=None` is the plain softmax: temperature 1, no constraint. `seen`: `seen_from` of the rows. With `kept`
    (`Rollout.kept`) the policy is renormalised over each token's recorded set, which gives it the distribution that was drawn
    from. The logits exist for `block` positions of all rows at a time (0: chosen by size) and are computed again in the
    backward pass, so that [B, R, V] never stands in memory.
    """

    params = model.head(params)

    def one(args):
        hidden, tokens, kept, position = args
        logits = _policy(model, params, hidden, position, spec, seen)
        if kept is not None:
            logits = jnp.where(masking.unpack_bits(kept, model.vocab_size), logits, IMPOSSIBLE)
        return logprobs_and_entropy(logits, tokens, entropy)

    return _by_positions(one, (hidden, tokens, kept), model.vocab_size, block)


def token_kl(
    model: Model,
    params: Any,
    reference: Any,
    hidden: tuple[Float[Array, "b r d"], Float[Array, "b r d"]],
    spec: SamplingSpec | None = None,
    block: int = 0,
    seen: Int[Array, "b v"] | None = None,
) -> Float[Array, "b r"]:
    """KL(policy || reference) in nats of the whole next-token distribution, from the states (policy's, reference's).

    sum over v of p(v) (log p(v) - log q(v)), both at the spec's temperature and constraints. `seen`: `seen_from` of the rows.
    """

    params, reference = model.head(params), model.head(reference)

    def one(args):
        states, ref_states, position = args
        log_p = jax.nn.log_softmax(_policy(model, params, states, position, spec, seen), axis=-1)
        log_q = jax.nn.log_softmax(_policy(model, reference, ref_states, position, spec, seen), axis=-1)
        # An impossible token's log-probs differ by rounding of 1e30: its term is 0 by the rule, not by arithmetic.
        possible = log_p > IMPOSSIBLE / 2
        difference = jnp.where(possible, log_p - log_q, 0.0)
        return (jnp.exp(log_p) * difference).sum(-1)

    return _by_positions(one, hidden, model.vocab_size, block)


def most_probable(model: Model, params: Any, hidden: Float[Array, "b r d"], block: int = 0) -> Int[Array, "b r"]:
    """The most probable token after each state under the plain softmax, of several alike the first; blocks as above."""
    params = model.head(params)
    return _by_positions(lambda args: model.logits(params, args[0]).argmax(-1), (hidden,), model.vocab_size, block)


def _policy(model, params, hidden, position, spec, seen):
    logits = model.logits(params, hidden)
    if spec is None:
        return logits
    before = None if seen is None else seen[:, None] <= position[:, None]
    return policy_logits(logits, jnp.broadcast_to(position, logits.shape[:-1]), spec, before)


def at_once(backend: str, vocab: int) -> int:
    """How many logits a device has of a block: few enough for the cache of a CPU, but of tokens enough for its products to be
    worth reading the head once more; on an accelerator, few against its memory, many against its cores."""
    return max(2**20, FEWEST * vocab) if backend == "cpu" else 2**26


def _by_positions(function: Callable[[tuple], Any], arrays: tuple, vocab: int, block: int) -> Any:
    """`function((*arrays, position [r]))` of arrays [B, R, ...] or None, for blocks of R so that few logits exist at a time."""
    b, r = arrays[0].shape[:2]
    # Every device has its share of a block; a mesh adds up the gradient of the head once for each.
    elements = sharding.ways() * at_once(jax.default_backend(), vocab)
    blocks = -(-r // (block or max(1, elements // (b * vocab))))
    block = -(-r // blocks)
    if blocks == 1:
        return function((*arrays, jnp.arange(r)))

    def split(x):  # along positions, never along rows, which a mesh has already split
        x = jnp.pad(x, ((0, 0), (0, blocks * block - r)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(b, blocks, block, *x.shape[2:]).swapaxes(0, 1)

    place = jnp.arange(blocks * block).reshape(blocks, block)
    keep = jax.checkpoint_policies.save_only_these_names("softmax_terms")  # two numbers a token; the logits are not kept
    one = jax.checkpoint(function, prevent_cse=False, policy=keep)
    out = jax.lax.map(one, (*jax.tree.map(split, arrays), place))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(b, blocks * block)[:, :r], out)


def response_hidden(hidden: Float[Array, "b t d"], prompt_len: Int[Array, " b"], width: int) -> Float[Array, "b {width} d"]:
    """The states that predict the response: `[:, t]` is the state before response token t, at place prompt_len - 1 + t.

    Places past the row's end repeat its last state; no loss reads them.
    """
    index = jnp.clip(masking.response_index(prompt_len, width) - 1, 0, hidden.shape[1] - 1)
    return jnp.take_along_axis(hidden, index[..., None], axis=1)


def response_tokens(tokens: Int[Array, "b t"], prompt_len: Int[Array, " b"], width: int) -> Int[Array, "b {width}"]:
    """The tokens of the response, at places prompt_len + t. Places past the row's end repeat its last token."""
    index = jnp.clip(masking.response_index(prompt_len, width), 0, tokens.shape[1] - 1)
    return jnp.take_along_axis(tokens, index, axis=1)


def value_specs(width: int) -> dict[str, ParamSpec]:
    """A value head that starts at 0. Source: openai/lm-human-preferences model.py (`scale=0`)."""
    return {"weight": ParamSpec((width,), (None,), sharding.zeros), "bias": ParamSpec((), (), sharding.zeros)}


def score_specs(width: int) -> dict[str, ParamSpec]:
    """A reward head, normal with std 1/sqrt(D+1). Source: openai/lm-human-preferences `fc_layer`; Stiennon et al. 2020."""
    init = sharding.normal((width + 1) ** -0.5)
    return {"weight": ParamSpec((width,), (None,), init), "bias": ParamSpec((), (), sharding.zeros)}


def values(head: dict[str, Any], hidden: Float[Array, "*s d"]) -> Float[Array, "*s"]:
    """One number for each state."""
    return (hidden * head["weight"]).sum(-1) + head["bias"]


def score(
    head: dict[str, Any], hidden: Float[Array, "b t d"], length: Int[Array, " b"], pooling: str = "last"
) -> Float[Array, " b"]:
    """One number for each row of `length` real tokens: read from the last one's state, or from the mean of all.

    Raises:
        ValueError: unknown pooling.
    """
    if pooling == "last":
        state = jnp.take_along_axis(hidden, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
    elif pooling == "mean":
        mask = masking.length_mask(length, hidden.shape[1])
        total = jnp.where(mask[..., None], hidden, 0.0).sum(1)
        state = total / jnp.maximum(length, 1)[:, None]
    else:
        raise ValueError(f"pooling='{pooling}' must be last or mean")
    return values(head, state)
