"""From prompts to experience: responses, their log-probs under learner and reference, and their values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxrlhf.core import masking
from jaxrlhf.core.types import Experience, Prompts, Rollout, SamplingSpec
from jaxrlhf.models import heads
from jaxrlhf.models.model import Model
from jaxrlhf.sampling import generate


def collect(
    model: Model,
    params: dict[str, Any],
    frozen: dict[str, Any],
    prompts: Prompts,
    spec: SamplingSpec,
    key: PRNGKeyArray,
    n: int = 1,
    version: int | jax.Array = 0,
    reuse_sampler_logprobs: bool = False,
    rows: int = 32,
) -> Experience:
    """Sample n responses to each prompt from `params["policy"]` and score them: see `generate.generate` and `experience`."""
    rollout = generate.generate(model, params["policy"], prompts, spec, key, n, version=version)
    return experience(model, params, frozen, rollout, spec, reuse_sampler_logprobs, rows)


def experience(
    model: Model,
    params: dict[str, Any],
    frozen: dict[str, Any],
    rollout: Rollout,
    spec: SamplingSpec,
    reuse_sampler_logprobs: bool = False,
    rows: int = 32,
) -> Experience:
    """A rollout with the log-probs of `params["policy"]` and `frozen["reference"]` and, where there is a head
    `params["value"]`, its values. The score is 0 for the caller to replace; every row has weight 1.

    `values[:, t]` is the value before response token t; `bootstrap` that after the last token of a cut response, 0 after a
    finished one. All log-probs are of the policy (temperature and constraints, no filters), 0 past the end.
    `reuse_sampler_logprobs` takes the sampler's own for the learner's, which saves a pass. `rows` are scored at a time, a
    matter of memory and speed only.
    """
    return _experience(model, spec, reuse_sampler_logprobs, rows, params, frozen["reference"], rollout)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _experience(model, spec, reuse, rows, params, reference, rollout) -> Experience:
    head = params.get("value")

    def learner(part: Rollout):
        if reuse and head is None:
            return part.logprobs, None, None
        hidden = model.hidden(params["policy"], part.tokens)
        logprobs = part.logprobs if reuse else _logprobs(model, params["policy"], hidden, part, spec, entropy=False)[0]
        return logprobs, *((None, None) if head is None else _values(head, hidden, part))

    def score(part: Rollout):
        hidden = model.hidden(reference, part.tokens)
        return *learner(part), _logprobs(model, reference, hidden, part, spec, entropy=False)[0]

    logprobs, values, bootstrap, ref_logprobs = _by_rows(score, rollout, rows)
    count = rollout.tokens.shape[0]
    return Experience(
        rollout=rollout,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        bootstrap=jnp.zeros(count) if bootstrap is None else bootstrap,
        score=jnp.zeros(count),
        weight=jnp.ones(count),
    )


def score_rollout(
    model: Model, policy: Any, rollout: Rollout, spec: SamplingSpec, rows: int = 32
) -> tuple[Float[Array, "b r"], Float[Array, "b r"]]:
    """Teacher-forced log-probs and entropies of the policy's distribution at every response token, 0 past the end."""
    return _score_rollout(model, spec, rows, policy, rollout)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _score_rollout(model, spec, rows, policy, rollout):
    def score(part: Rollout):
        return _logprobs(model, policy, model.hidden(policy, part.tokens), part, spec, entropy=True)

    return _by_rows(score, rollout, rows)


def stats(experience: Experience) -> dict[str, Float[Array, ""]]:
    """Length, share finished, and the gap between the learner's log-probs and the sampler's (nats a token, mean and largest).

    The gap is rounding: more of it than 1e-4 in float32 says that sampler and scorer read different rows or rules.
    """
    rollout = experience.rollout
    mask = masking.response_mask(rollout.response_len, rollout.logprobs.shape[1], rollout.written)
    gap = masking.masked(jnp.abs(experience.logprobs - rollout.logprobs), mask)
    return {
        "rollout/length": rollout.response_len.mean(),
        "rollout/finished": rollout.finished.mean(),
        "rollout/sampler_gap": masking.masked_mean(gap, mask),
        "rollout/sampler_gap_max": gap.max(),
    }


def _logprobs(
    model: Model, trunk: Any, hidden: Float[Array, "b t d"], part: Rollout, spec: SamplingSpec, entropy: bool
) -> tuple[Float[Array, "b r"], Float[Array, "b r"] | None]:
    width = part.logprobs.shape[1]
    index = jnp.minimum(masking.response_index(part.prompt_len, width), part.tokens.shape[1] - 1)
    tokens = jnp.take_along_axis(part.tokens, index, axis=1)
    states = heads.response_hidden(hidden, part.prompt_len, width)
    logprobs, entropies = heads.token_logprobs(model, trunk, states, tokens, spec, entropy)
    mask = masking.response_mask(part.response_len, width)
    return masking.masked(logprobs, mask), None if entropies is None else masking.masked(entropies, mask)


def _values(head: Any, hidden: Float[Array, "b t d"], part: Rollout) -> tuple[Float[Array, "b r"], Float[Array, " b"]]:
    """Values before each response token, and the value after the last one where the response was cut."""
    width = part.logprobs.shape[1]
    values = heads.values(head, heads.response_hidden(hidden, part.prompt_len, width))
    last = jnp.take_along_axis(hidden, (part.prompt_len + part.response_len - 1)[:, None, None], axis=1)[:, 0]
    after = jnp.where(part.finished, 0.0, heads.values(head, last))
    return masking.masked(values, masking.response_mask(part.response_len, width)), after


def _by_rows(function: Callable[[Rollout], Any], rollout: Rollout, rows: int) -> Any:
    """`function` of about `rows` rows at a time, so that logits stay in the cache; of all where no near number divides them."""
    count = rollout.tokens.shape[0]
    rows = next((size for size in range(rows, rows // 2, -1) if count % size == 0), count)
    if rows == count:
        return function(rollout)
    # Part i holds rows i, i + parts, ...: each part then lies on all devices that share the batch.
    split = jax.tree.map(lambda x: x.reshape(rows, -1, *x.shape[1:]).swapaxes(0, 1), rollout)
    out = jax.lax.map(function, split)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(count, *x.shape[2:]), out)


def batch_logprobs(
    model: Model, policy: Any, batch: Any, width: int, spec: SamplingSpec | None = None, rows: int = 32
) -> Float[Array, "*b {width}"]:
    """Log-probs of the response tokens of rows that were not sampled here, 0 past the end; R = `width`.

    `batch` has tokens [..., T], prompt_len and response_len [...], as `Preferences` and the algorithms' batches do. Without
    `spec` they are of the plain softmax, else of the policy that it describes. What a loss needs of a frozen reference is
    computed so once, before training. `rows` rows at a time, the last ones filled up.

    Raises:
        ValueError: a response is longer than `width`.
    """
    longest = int(jnp.max(batch.response_len))
    if longest > width:
        raise ValueError(f"a response has {longest} tokens, more than width={width}: its end would not count; widen it")
    fields = (batch.tokens, batch.prompt_len, batch.response_len)
    return _batch_logprobs(model, spec, width, rows, policy, *fields)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _batch_logprobs(model, spec, width, rows, policy, tokens, prompt_len, response_len):
    shape = response_len.shape
    count = response_len.size
    rows = min(rows, count)
    flat = tokens.reshape(count, -1), prompt_len.reshape(count), response_len.reshape(count)
    filled = jax.tree.map(lambda x: jnp.pad(x, [(0, -count % rows)] + [(0, 0)] * (x.ndim - 1)), flat)

    def score(part):
        tokens, prompt_len, response_len = part
        hidden = model.hidden(policy, tokens)
        index = jnp.clip(masking.response_index(prompt_len, width), 0, tokens.shape[1] - 1)
        states = heads.response_hidden(hidden, prompt_len, width)
        predicted = jnp.take_along_axis(tokens, index, axis=1)
        logprobs, _ = heads.token_logprobs(model, policy, states, predicted, spec)
        return masking.masked(logprobs, masking.length_mask(response_len, width))

    return _by_rows(score, filled, rows)[:count].reshape(*shape, width)
