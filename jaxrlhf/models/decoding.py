"""A transformer that writes: its weights as sampling reads them, and one token after another over a cache.

Layers are unrolled over one cache a layer, which has two parts: see `models/kv_cache.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import ParamSpec
from jaxrlhf.models import experts, kv_cache, layers, products, rotary
from jaxrlhf.models.attention import MASKED, capped, near, scaled
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.model import EXACT, CacheConfig
from jaxrlhf.models.specs import HEAD, layer_axes, param_specs

Params = Any
Cache = Any


def decode_params(config: TransformerConfig, params: Params) -> Params:
    """Weights as `prefill`, `decode` and `logits` read them while sampling: products' operands in `config.dtype`, adapters
    merged; those in eight bits as they are.

    On a mesh they are gathered over `fsdp`, here and once: left split, all of them would be gathered anew for every chunk of
    tokens, and stand whole in memory all the same. What one device cannot hold so is split over `tensor`.

    The stack of layers becomes a tuple: a layer of a stacked array is copied before its products, on a CPU at every step, on a
    GPU once a chunk (half of the weights as temporaries, compiled for an H100).
    The embedding table stays float32 for look-ups; a tied head becomes a separate narrow copy of it.
    """
    read = functools.partial(products.for_decoding, dtype=config.dtype)
    stack = {name: w if isinstance(w, dict) else read(w) for name, w in params["layers"].items()}
    if config.experts:
        stack["experts"] = experts.decode_weights(config, params["layers"]["experts"])
    tied = config.tied_head
    head = products.table_for_decoding(params["embed"], config.dtype) if tied else read(params["head"])
    axes = jax.tree.map(lambda spec: spec.axes, param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec)) | {
        "head": HEAD
    }
    del axes["layers"]
    stack = tuple(products.gathered(layers.at(stack, i), layer_axes(config)) for i in range(config.layers))
    rest = {name: weight for name, weight in params.items() if name != "layers"} | {"head": head}
    return products.gathered(rest, axes) | {"layers": stack}


def prefill(
    config: TransformerConfig,
    params: Params,
    tokens: Int[Array, "p w"],
    length: Int[Array, " p"],
    n: int,
    width: int,
    cache: CacheConfig = EXACT,
) -> tuple[Float[Array, "p {config.width}"], Cache]:
    """Hidden state of each prompt's last token, and the cache for n responses of at most `width` tokens to each.

    The cache holds, for each layer, keys and values of the prompts `[prompts, K, P, E]` once for their n samples, and
    those of the responses `[prompts * n, K, R, E]`, written by each decode step: see `models/kv_cache.py`.

    Raises:
        ValueError: prompt and response together are longer than `config.max_length`.
    """
    prompts, prompt_width = tokens.shape
    layers.check_length(config, prompt_width + width)
    position = jnp.arange(prompt_width)[None]
    rotations = rotary.rotations(config, position)
    x = layers.embed(config, params, tokens, position)
    cached = []
    for i in range(config.layers):
        x, read = layers.layer(
            config,
            layers.at(params["layers"], i),
            x,
            rotations,
            None,
            None,
            layers.window(config, i),
            attention=cache.attention,
        )
        cached.append(tuple(kv_cache.keep(each.transpose(0, 2, 1, 3), cache.dtype) for each in read))
    last = jnp.take_along_axis(x, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
    empty = kv_cache.empty(prompts * n, config.kv_heads, width, config.head_width, cache.dtype)
    found = {
        "length": length,
        # Angles of all places, looked up by each step: a sine costs a CPU more than the product it turns.
        "rotations": rotary.rotations(config, jnp.arange(prompt_width + width)),
        "prompt": tuple(cached),
        "response": ((empty, empty),) * config.layers,
    }
    return layers.norm(config, params["norm"], last), found


def resume(
    config: TransformerConfig,
    params: Params,
    tokens: Int[Array, "b t"],
    prompt_len: Int[Array, " b"],
    response_len: Int[Array, " b"],
    width: int,
    cache: CacheConfig = EXACT,
) -> tuple[Float[Array, "b {config.width}"], Cache]:
    """Hidden state of the last token of rows that are a part of their response long already, of at most `width` tokens, and the
    cache that decoding them would have left, each row with a prompt of its own (`take`).

    Raises:
        ValueError: the rows are longer than `config.max_length`.
    """
    last, found = prefill(config, params, tokens, prompt_len + response_len, 1, 0, cache)
    prompt_width = tokens.shape[1] - width
    place = jnp.minimum(prompt_len[:, None] + jnp.arange(width), tokens.shape[1] - 1)
    parts = {
        "prompt": jax.tree.map(lambda x: x[:, :, :prompt_width], found["prompt"]),
        "response": kv_cache.pick(found["prompt"], place),
    }
    return last, found | {"length": prompt_len} | parts


def decode(
    config: TransformerConfig, params: Params, cache: Cache, token: Int[Array, " b"], step: Int[Array, "*b"] | int
) -> tuple[Float[Array, "b {config.width}"], Cache]:
    """Read response token number `step` (0, 1, ...) of every row, [] or each its own [B]; its hidden state and the grown
    cache. Rows with steps of their own have prompts of their own (`take`)."""
    step = jnp.asarray(step)
    n = token.shape[0] // cache["length"].shape[0]
    position = jnp.repeat(cache["length"], n) + step
    rotations = jax.tree.map(lambda table: jnp.take(table, position, axis=0, mode="clip"), cache["rotations"])
    x = layers.embed(config, params, token, position)
    grown = []
    for i in range(config.layers):
        weights = layers.at(params["layers"], i)
        window = layers.window(config, i)
        query, k, v = layers.heads(
            config, weights, layers.norm(config, weights["attention_norm"], x), rotary.of_layer(rotations, window)
        )
        response = tuple(kv_cache.write(old, new, step) for old, new in zip(cache["response"][i], (k, v), strict=True))
        mixed = _decode_attention(config, query, cache["prompt"][i], response, (cache["length"], step, window))
        x = sharding.constrain(layers.branches(config, weights, x, mixed), "batch", "residual")
        grown.append(response)
    return layers.norm(config, params["norm"], x), cache | {"response": tuple(grown)}


def take(cache: Cache, rows: Int[Array, " m"]) -> Cache:
    """The cache of some rows, in this order, each with a prompt of its own: samples of one prompt end at different times."""
    responses = cache["response"][0][0].values.shape[0]
    prompts = rows // (responses // cache["length"].shape[0])
    return cache | {
        "length": cache["length"][prompts],
        "prompt": kv_cache.take(cache["prompt"], prompts),
        "response": kv_cache.take(cache["response"], rows),
    }


def put(cache: Cache, rows: Int[Array, " m"], part: Cache) -> Cache:
    """The cache with `part` in the place of some rows, every row of either with a prompt of its own."""
    return cache | {
        "length": cache["length"].at[rows].set(part["length"], mode="drop"),
        "prompt": kv_cache.put(cache["prompt"], rows, part["prompt"]),
        "response": kv_cache.put(cache["response"], rows, part["response"]),
    }


def grow(config: TransformerConfig, cache: Cache, extra: int) -> dict[str, Any]:
    """What changes in the cache with room for so many response tokens more."""
    prompt, response = (cache[part][0][0].values.shape[2] for part in ("prompt", "response"))
    rotations = rotary.rotations(config, jnp.arange(prompt + response + extra))
    return {"rotations": rotations, "response": kv_cache.grow(cache["response"], extra)}


def _decode_attention(config, query, prompt, response, place):
    """Attention [B, H*E] of one query a row over its prompt's keys and its own response's, with one softmax over both.

    `place`: the prompts' lengths, how many response tokens stand before the query, the layer's window.
    """
    length, step, window = place
    b, h, e = query.shape
    prompts, k, p, _ = prompt[0].values.shape
    n, r = b // prompts, response[0].values.shape[2]
    query = scaled(query.reshape(b, k, h // k, e), config.attention_scale)
    step = step[..., None]  # [1] or, each with a prompt of its own, [B, 1]
    in_prompt, in_response = jnp.arange(p) < length[:, None], jnp.arange(r) <= step
    if window:
        in_prompt &= near(length[:, None] + step - jnp.arange(p), window)
        in_response &= near(step - jnp.arange(r), window)
    # A prompt's samples are rows of one product. The responses keep their shape: another one would copy the cache.
    at_prompt = capped(_apart(kv_cache.scores(_together(query, n), prompt[0]), n), config.attention_cap)
    at_prompt = jnp.where(in_prompt.repeat(n, 0)[:, None, None], at_prompt, MASKED)
    at_response = capped(kv_cache.scores(query, response[0]), config.attention_cap)
    at_response = jnp.where(jnp.atleast_2d(in_response)[:, None, None], at_response, MASKED)
    weights = jax.nn.softmax(jnp.concatenate([at_prompt, at_response], axis=-1), axis=-1)
    mixed = _apart(kv_cache.mixed(_together(weights[..., :p], n), prompt[1]), n)
    return (mixed + kv_cache.mixed(weights[..., p:], response[1])).reshape(b, h * e)


def _together(x, n):
    """[prompts * n, K, G, ...] as [prompts, K, n * G, ...]."""
    b, k, g, width = x.shape
    return x.reshape(b // n, n, k, g, width).swapaxes(1, 2).reshape(b // n, k, n * g, width)


def _apart(x, n):
    """The reverse."""
    prompts, k, rows, width = x.shape
    return x.reshape(prompts, k, n, rows // n, width).swapaxes(1, 2).reshape(prompts * n, k, rows // n, width)
