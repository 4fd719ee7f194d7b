"""Sampling: prefill, fixed-length chunks of decode steps, and a host loop between them.

Between two chunks rows that have ended leave, whenever those that go on fill no more than half of the batch; when none goes
on, the loop stops. So the time of a batch follows its tokens, not its longest row.
"""

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
class _Written:
    """What rows have written so far. W is max_tokens rounded up to whole chunks."""

    tokens: jax.Array  # [B, W] int32
    logprobs: jax.Array  # [B, W]
    sampled_logprobs: jax.Array  # [B, W]
    kept: jax.Array | None  # [B, W, ceil(V/32)] uint32, where the kept sets are recorded
    length: jax.Array  # [B] int32
    finished: jax.Array  # [B] bool


@struct.dataclass
class _Wave:
    """Rows between two decode steps: all of the batch, or those that are left of it."""

    step: jax.Array  # [] int32, index of the response token to be written next
    cache: Any
    hidden: jax.Array  # [B, D], predicts that token
    uniforms: jax.Array  # [B, W]
    limit: jax.Array  # [B] int32, most tokens of each row
    row: jax.Array  # [B] int32, its place in the batch
    written: _Written


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
    any batch, order, n, chunk length or number of devices, whichever rows have left (up to the last bits of its logits).
    Decoding runs in chunks of `chunk` tokens at most; between two, the host looks how many rows go on.

    Raises:
        ValueError: prompt and response do not fit the model, a prompt is empty or longer than its row, or an id is not in
            the vocabulary.
    """
    _check(model, prompts, spec, n, chunk)
    chunks = -(-spec.max_tokens // chunk)
    steps = -(-spec.max_tokens // chunks)  # chunks of equal length: one compiled program, the fewest steps past the end
    weights = _decode_params(model, params)
    wave = _start(model, spec, n, chunks * steps, weights, prompts, key)
    done = None  # what all rows have written, once some have left
    for left in reversed(range(chunks)):
        wave, live = _advance(model, spec, steps, weights, wave)
        # A fixed number of steps a program, not one loop until all have ended: a GPU would ask the host after every token.
        if not left or not (live := int(live)):
            break
        size = _fewer(wave.row.shape[0], live, left)
        if size < wave.row.shape[0]:
            done, wave = _compact(model, size, done, wave)
    written = wave.written if done is None else _collect(done, wave.row, wave.written)
    return _rollout(spec, n, prompts, written, version)


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


def _fewer(rows: int, live: int, left: int) -> int:
    """To how many rows a wave of which `live` go on shrinks, with `left` chunks to come: halves, each a program of its own."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    while left > 1 and live <= rows // 2 and rows // 2 >= LEAST and rows % (2 * ways) == 0:
        rows //= 2
    return rows


@functools.partial(jax.jit, static_argnums=0)
def _decode_params(model: Model, params: Any) -> Any:
    return model.decode_params(params)


LEAST = 8  # rows; fewer take a product as long


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _start(model: Model, spec: SamplingSpec, n: int, width: int, weights: Any, prompts: Prompts, key: PRNGKeyArray) -> _Wave:
    """Read the prompts."""
    hidden, cache = model.prefill(weights, prompts.tokens, prompts.length, n, spec.max_tokens)
    rows = prompts.tokens.shape[0] * n
    written = _Written(
        tokens=jnp.zeros((rows, width), jnp.int32),
        logprobs=jnp.zeros((rows, width)),
        sampled_logprobs=jnp.zeros((rows, width)),
        kept=jnp.zeros((rows, width, -(-model.vocab_size // 32)), jnp.uint32) if spec.replayed else None,
        length=jnp.zeros(rows, jnp.int32),
        finished=jnp.zeros(rows, bool),
    )
    limit = jnp.full(rows, spec.max_tokens) if prompts.limit is None else jnp.repeat(prompts.limit, n)
    wave = _Wave(
        step=jnp.int32(0),
        cache=(),
        hidden=jnp.repeat(hidden, n, axis=0),
        uniforms=_uniforms(key, jnp.repeat(prompts.uid, n), _samples(prompts, n), width),
        limit=jnp.minimum(limit, spec.max_tokens).astype(jnp.int32),  # the last chunk may run past the end
        row=jnp.arange(rows, dtype=jnp.int32),
        written=written,
    )
    return _constrain_rows(wave).replace(cache=cache)


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


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames="wave")
def _advance(model: Model, spec: SamplingSpec, steps: int, weights: Any, wave: _Wave) -> tuple[_Wave, Int[Array, ""]]:
    """Write `steps` more tokens of every row; also the number of rows that go on."""
    wave, _ = jax.lax.scan(lambda w, _: (_step(model, spec, weights, w), None), wave, length=steps)
    return wave, _live(wave).sum()


def _live(wave: _Wave) -> Bool[Array, " b"]:
    return ~wave.written.finished & (wave.step < wave.limit)


def _step(model: Model, spec: SamplingSpec, weights: Any, wave: _Wave) -> _Wave:
    """Choose one token of every row and read it."""
    t, old = wave.step, wave.written
    position = jnp.full(old.length.shape, t)
    logits = heads.policy_logits(model.logits(weights, wave.hidden), position, spec)
    uniform = jax.lax.dynamic_index_in_dim(wave.uniforms, t, axis=1, keepdims=False)
    token, logprob, sampled_logprob, kept = _choose(logits, uniform, spec)
    live = _live(wave)
    token = jnp.where(live, token, spec.pad)
    stopped = (token[:, None] == jnp.array(spec.stop, jnp.int32)).any(-1)
    # Past the end, the cache's last place is overwritten; nothing reads it any more.
    hidden, cache = model.decode(weights, wave.cache, token, t)

    def write(buffer, column):
        return jax.lax.dynamic_update_slice_in_dim(buffer, column[:, None], t, axis=1)

    written = _Written(
        tokens=write(old.tokens, token),
        logprobs=write(old.logprobs, masking.masked(logprob, live)),
        sampled_logprobs=write(old.sampled_logprobs, masking.masked(sampled_logprob, live)),
        kept=None if old.kept is None else write(old.kept, masking.pack_bits(kept & live[:, None])),
        length=old.length + live,
        finished=old.finished | (live & stopped),
    )
    wave = dataclasses.replace(wave, step=t + 1, cache=(), hidden=hidden, written=written)
    return _constrain_rows(wave).replace(cache=cache)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="done")
def _compact(model: Model, size: int, done: _Written | None, wave: _Wave) -> tuple[_Written, _Wave]:
    """Put down what all rows have written, and go on with `size` rows, those among them that go on."""
    done = wave.written if done is None else _collected(done, wave.row, wave.written)
    rows = jnp.argsort(~_live(wave), stable=True)[:size]
    cache, step = model.take(wave.cache, rows), wave.step
    wave = jax.tree.map(lambda x: x[rows], dataclasses.replace(wave, cache=(), step=None))
    return _constrain_rows(done), dataclasses.replace(_constrain_rows(wave), cache=cache, step=step)


def _collected(done: _Written, row: Int[Array, " b"], written: _Written) -> _Written:
    return jax.tree.map(lambda every, own: every.at[row].set(own), done, written)


@functools.partial(jax.jit, donate_argnames="done")
def _collect(done: _Written, row: Int[Array, " b"], written: _Written) -> _Written:
    """What all rows have written, when the last have ended."""
    return _constrain_rows(_collected(done, row, written))


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
def _rollout(spec: SamplingSpec, n: int, prompts: Prompts, written: _Written, version: int | jax.Array) -> Rollout:
    """Rows with each response directly after its prompt, and `spec.pad` after that."""
    prompt, prompt_len = jnp.repeat(prompts.tokens, n, axis=0), jnp.repeat(prompts.length, n)
    rows, width = prompt.shape
    place = jnp.arange(width + spec.max_tokens)
    prompt = jnp.pad(prompt, ((0, 0), (0, spec.max_tokens)))
    response = jnp.take_along_axis(written.tokens, jnp.clip(place - prompt_len[:, None], 0, spec.max_tokens - 1), axis=1)
    row = jnp.where(masking.length_mask(prompt_len, place.size), prompt, response)
    row = jnp.where(masking.length_mask(prompt_len + written.length, place.size), row, spec.pad)
    rollout = Rollout(
        tokens=row,
        prompt_len=prompt_len,
        response_len=written.length,
        finished=written.finished,
        group=jnp.repeat(prompts.uid, n),
        sample=_samples(prompts, n),
        version=jnp.full(rows, version, jnp.int32),
        logprobs=written.logprobs[:, : spec.max_tokens],
        sampled_logprobs=written.sampled_logprobs[:, : spec.max_tokens],
        kept=None if written.kept is None else written.kept[:, : spec.max_tokens],
    )
    return _constrain_rows(rollout)


def _constrain_rows(tree: Any) -> Any:
    """Split every array of rows over the devices; so it has the same sharding, and a program the same input, at each chunk."""
    return jax.tree.map(lambda x: sharding.constrain(x, "batch", *(None,) * (x.ndim - 1)) if x.ndim else x, tree)
