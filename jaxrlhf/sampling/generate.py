"""Sampling: prefill, fixed-length chunks of decode steps, and a host loop that stops when every row has ended."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxrlhf.core import masking, sharding
from jaxrlhf.core.types import Prompts, Rollout, SamplingSpec
from jaxrlhf.models import heads
from jaxrlhf.models.model import Model
from jaxrlhf.sampling import filters, nucleus


@struct.dataclass
class _State:
    """A wave of rows between two decode steps. W is max_tokens rounded up to whole chunks."""

    step: jax.Array  # [] int32, index of the response token to be written next
    hidden: jax.Array  # [B, D], predicts that token
    cache: Any
    uniforms: jax.Array  # [B, W]
    tokens: jax.Array  # [B, W] int32
    logprobs: jax.Array  # [B, W]
    sampled_logprobs: jax.Array  # [B, W]
    kept: jax.Array | None  # [B, W, ceil(V/32)] uint32, where the kept sets are recorded
    length: jax.Array  # [B] int32
    finished: jax.Array  # [B] bool


def generate(
    model: Model,
    params: Any,
    prompts: Prompts,
    spec: SamplingSpec,
    key: PRNGKeyArray,
    n: int = 1,
    chunk: int = 8,
    version: int | jax.Array = 0,
) -> Rollout:
    """n responses to each prompt; row i continues prompt i // n, and its `group` is that prompt's uid.

    Every token is drawn with one number that depends on key, uid, sample and position alone, so a response is the same in
    any batch, order, n, chunk length or number of devices (up to the last bits of its logits). Decoding runs in chunks of
    `chunk` tokens at most; between two, the host looks whether any row goes on.

    Raises:
        ValueError: prompt and response do not fit the model, a prompt is empty or longer than its row, or an id is not in
            the vocabulary.
    """
    _check(model, prompts, spec, n, chunk)
    chunks = -(-spec.max_tokens // chunk)
    steps = -(-spec.max_tokens // chunks)  # chunks of equal length: one compiled program, the fewest steps past the end
    weights = _decode_params(model, params)
    state = _start(model, spec, n, chunks * steps, weights, prompts, key)
    for i in range(chunks):
        state, live = _advance(model, spec, steps, weights, state)
        # A fixed number of steps a program, not one loop until all have ended: a GPU would ask the host after every token.
        if i + 1 < chunks and not int(live):
            break
    return _rollout(spec, n, prompts, state.replace(cache=(), uniforms=None, hidden=None), version)


def _check(model: Model, prompts: Prompts, spec: SamplingSpec, n: int, chunk: int) -> None:
    width = prompts.tokens.shape[1]
    if width + spec.max_tokens > model.max_length:
        raise ValueError(
            f"prompt width {width} + max_tokens {spec.max_tokens} = {width + spec.max_tokens} exceeds the model's context of "
            f"{model.max_length}: cut prompts to {model.max_length - spec.max_tokens} tokens, or lower max_tokens to "
            f"{model.max_length - width}, or use a model with a longer context"
        )
    if n < 1 or chunk < 1:
        raise ValueError(f"n={n} and chunk={chunk} must be at least 1")
    outside = [i for i in (*spec.stop, *spec.forbidden, spec.pad) if not 0 <= i < model.vocab_size]
    if outside:
        raise ValueError(f"SamplingSpec names token ids {outside} outside the vocabulary 0 .. {model.vocab_size - 1}")
    length = prompts.length
    if isinstance(length, np.ndarray) or length.is_fully_addressable:  # else another host holds a part of it
        length = np.asarray(length)
        if length.min() < 1 or length.max() > width:
            raise ValueError(
                f"prompt lengths {length.min()} .. {length.max()} must be in 1 .. {width}, the width of the rows: "
                "begin every prompt with a BOS token, and cut long ones"
            )


@functools.partial(jax.jit, static_argnums=0)
def _decode_params(model: Model, params: Any) -> Any:
    return model.decode_params(params)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _start(model: Model, spec: SamplingSpec, n: int, width: int, weights: Any, prompts: Prompts, key: PRNGKeyArray) -> _State:
    """Read the prompts."""
    hidden, cache = model.prefill(weights, prompts.tokens, prompts.length, n, spec.max_tokens)
    rows = prompts.tokens.shape[0] * n
    state = _State(
        step=jnp.int32(0),
        hidden=jnp.repeat(hidden, n, axis=0),
        cache=(),
        uniforms=_uniforms(key, jnp.repeat(prompts.uid, n), _samples(prompts, n), width),
        tokens=jnp.zeros((rows, width), jnp.int32),
        logprobs=jnp.zeros((rows, width)),
        sampled_logprobs=jnp.zeros((rows, width)),
        kept=jnp.zeros((rows, width, -(-model.vocab_size // 32)), jnp.uint32) if spec.replayed else None,
        length=jnp.zeros(rows, jnp.int32),
        finished=jnp.zeros(rows, bool),
    )
    return _constrain_rows(state).replace(cache=cache)


def _samples(prompts: Prompts, n: int) -> Int[Array, " b"]:
    return jnp.tile(jnp.arange(n, dtype=jnp.int32), prompts.length.shape[0])


def _uniforms(key: PRNGKeyArray, uid: Int[Array, " b"], sample: Int[Array, " b"], width: int) -> Float[Array, "b {width}"]:
    """One number in [0, 1) for each token, from fold_in(fold_in(fold_in(key, uid), sample), position)."""
    position = jnp.tile(jnp.arange(width, dtype=jnp.int32), uid.shape[0])
    names = jnp.stack([jnp.repeat(uid, width), jnp.repeat(sample, width), position])
    keys = jnp.broadcast_to(key, position.shape)
    # A loop over the three names, because XLA takes 2 s to compile hashes nested in one another, 0.4 s so.
    keys, _ = jax.lax.scan(lambda keys, name: (jax.vmap(jax.random.fold_in)(keys, name), None), keys, names)
    return jax.vmap(jax.random.uniform)(keys).reshape(-1, width)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames="state")
def _advance(model: Model, spec: SamplingSpec, steps: int, weights: Any, state: _State) -> tuple[_State, Int[Array, ""]]:
    """Write `steps` more tokens of every row; also the number of rows that have not ended."""
    state, _ = jax.lax.scan(lambda s, _: (_step(model, spec, weights, s), None), state, length=steps)
    return state, (~state.finished).sum()


def _step(model: Model, spec: SamplingSpec, weights: Any, state: _State) -> _State:
    """Choose one token of every row and read it."""
    t = state.step
    position = jnp.full(state.length.shape, t)
    logits = heads.policy_logits(model.logits(weights, state.hidden), position, spec)
    uniform = jax.lax.dynamic_index_in_dim(state.uniforms, t, axis=1, keepdims=False)
    token, logprob, sampled_logprob, kept = _choose(logits, uniform, spec)
    live = ~state.finished & (t < spec.max_tokens)  # the last chunk may run past the end
    token = jnp.where(live, token, spec.pad)
    stopped = (token[:, None] == jnp.array(spec.stop, jnp.int32)).any(-1)
    # Past the end, the cache's last place is overwritten; nothing reads it any more.
    hidden, cache = model.decode(weights, state.cache, token, t)

    def write(buffer, column):
        return jax.lax.dynamic_update_slice_in_dim(buffer, column[:, None], t, axis=1)

    state = dataclasses.replace(
        state,
        step=t + 1,
        hidden=hidden,
        cache=(),
        tokens=write(state.tokens, token),
        logprobs=write(state.logprobs, masking.masked(logprob, live)),
        sampled_logprobs=write(state.sampled_logprobs, masking.masked(sampled_logprob, live)),
        kept=None if state.kept is None else write(state.kept, masking.pack_bits(kept & live[:, None])),
        length=state.length + live,
        finished=state.finished | (live & stopped),
    )
    return _constrain_rows(state).replace(cache=cache)


def _choose(
    logits: Float[Array, "b v"], uniform: Float[Array, " b"], spec: SamplingSpec
) -> tuple[Int[Array, " b"], Float[Array, " b"], Float[Array, " b"], Bool[Array, "b v"]]:
    """A token from policy logits, its log-prob under the policy, that under the distribution drawn from, and the kept set."""
    drawable = logits
    if spec.greedy:
        token = nucleus.greedy(logits)
        sampled_logprob = jnp.zeros(token.shape)  # drawn with certainty
    else:
        drawable = filters.apply(logits, spec) if spec.filtered else logits
        token, sampled_logprob = nucleus.draw(drawable, uniform)
    kept = drawable > heads.IMPOSSIBLE / 2
    if not spec.filtered:
        return token, sampled_logprob, sampled_logprob, kept
    picked = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return token, picked - jax.nn.logsumexp(logits, axis=-1), sampled_logprob, kept


@functools.partial(jax.jit, static_argnums=(0, 1))
def _rollout(spec: SamplingSpec, n: int, prompts: Prompts, state: _State, version: int | jax.Array) -> Rollout:
    """Rows with each response directly after its prompt, and `spec.pad` after that."""
    prompt, prompt_len = jnp.repeat(prompts.tokens, n, axis=0), jnp.repeat(prompts.length, n)
    rows, width = prompt.shape
    place = jnp.arange(width + spec.max_tokens)
    prompt = jnp.pad(prompt, ((0, 0), (0, spec.max_tokens)))
    response = jnp.take_along_axis(state.tokens, jnp.clip(place - prompt_len[:, None], 0, spec.max_tokens - 1), axis=1)
    row = jnp.where(masking.length_mask(prompt_len, place.size), prompt, response)
    row = jnp.where(masking.length_mask(prompt_len + state.length, place.size), row, spec.pad)
    rollout = Rollout(
        tokens=row,
        prompt_len=prompt_len,
        response_len=state.length,
        finished=state.finished,
        group=jnp.repeat(prompts.uid, n),
        sample=_samples(prompts, n),
        version=jnp.full(rows, version, jnp.int32),
        logprobs=state.logprobs[:, : spec.max_tokens],
        sampled_logprobs=state.sampled_logprobs[:, : spec.max_tokens],
        kept=None if state.kept is None else state.kept[:, : spec.max_tokens],
    )
    return _constrain_rows(rollout)


def _constrain_rows(tree: Any) -> Any:
    """Split every array of rows over the devices; so it has the same sharding, and a program the same input, at each chunk."""
    return jax.tree.map(lambda x: sharding.constrain(x, "batch", *(None,) * (x.ndim - 1)) if x.ndim else x, tree)
