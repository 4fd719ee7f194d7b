"""From hidden states and logits to log-probs, entropies, values and scores."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrlhf.core import masking, sharding
from jaxrlhf.core.sharding import ParamSpec
from jaxrlhf.core.types import SamplingSpec

# Logit of an impossible token. Finite, because the gradient of a softmax of -inf is NaN.
IMPOSSIBLE = -1e30


def policy_logits(logits: Float[Array, "*s v"], position: Int[Array, "*s"], spec: SamplingSpec) -> Float[Array, "*s v"]:
    """Logits of the policy: temperature and the constraints known from positions alone. Sampler and scorer both call this.

    `position[...]` is the index, in its response, of the token that the logits predict.

    Raises:
        ValueError: a constrained id is not in the vocabulary.
    """
    vocab = logits.shape[-1]
    logits = logits / spec.temperature
    if spec.forbidden:
        logits = jnp.where(_ids(spec.forbidden, vocab, "forbidden"), IMPOSSIBLE, logits)
    if spec.min_tokens and spec.stop:
        early = position[..., None] < spec.min_tokens
        logits = jnp.where(early & _ids(spec.stop, vocab, "stop"), IMPOSSIBLE, logits)
    return logits


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
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1)
    # A sum over a comparison: its gradient is a select, where that of a gather would be a scatter into [..., V].
    picked = jnp.where(jnp.arange(logits.shape[-1]) == tokens[..., None], logits, 0.0).sum(-1)
    if not entropy:
        return picked - total, None
    probability = jnp.exp(logits - total[..., None])
    return picked - total, total - (probability * logits).sum(-1)


def response_hidden(hidden: Float[Array, "b t d"], prompt_len: Int[Array, " b"], width: int) -> Float[Array, "b {width} d"]:
    """The states that predict the response: `[:, t]` is the state before response token t, at place prompt_len - 1 + t.

    Places past the row's end repeat its last state; no loss reads them.
    """
    index = jnp.clip(masking.response_index(prompt_len, width) - 1, 0, hidden.shape[1] - 1)
    return jnp.take_along_axis(hidden, index[..., None], axis=1)


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
