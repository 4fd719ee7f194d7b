"""A decoder-only transformer as pure functions over a pytree of parameters.

`param_specs` declares every parameter on one line. Training and scoring scan the stacked `[L, ...]` layers with
rematerialisation; prefill and decode unroll them over one cache a layer. Only the operands of weight products have the
type `config.dtype`; the residual stream, norms, attention, softmax and all sums are float32.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import ParamSpec
from jaxrlhf.models import experts, kv_cache, products
from jaxrlhf.models.attention import MASKED, capped, near, scaled
from jaxrlhf.models.attention import attention as attend
from jaxrlhf.models.config import GATED, TransformerConfig
from jaxrlhf.models.model import EXACT, CacheConfig, Model

Params = Any
Cache = Any

# What the backward pass finds stored of a layer, by the names that `products.product`, `experts.mlp` and attention give.
_STORED = {
    "dots": jax.checkpoint_policies.save_only_these_names("product", "attention"),
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "layers": jax.checkpoint_policies.nothing_saveable,
}


def param_specs(config: TransformerConfig) -> Params:
    """Shape, logical axes and initialiser of every parameter."""
    c, layers = config, config.layers
    heads, kv_heads = c.heads * c.head_width, c.kv_heads * c.head_width

    def into(out: int, axis: str) -> ParamSpec:  # out of the residual stream
        return ParamSpec((layers, c.width, out), ("layers", "embed", axis), sharding.normal(c.width**-0.5))

    def back(inner: int, axis: str) -> ParamSpec:  # 2L branches add up, each scaled so that their sum keeps its size
        std = (inner * 2 * layers) ** -0.5
        return ParamSpec((layers, inner, c.width), ("layers", axis, "embed"), sharding.normal(std))

    specs = {
        "embed": ParamSpec((c.vocab_size, c.width), ("vocab", "embed"), sharding.normal(0.02)),
        "layers": {
            "attention_norm": _norm_specs(c, (layers,), ("layers",)),
            "query": into(heads, "heads"),
            "key": into(kv_heads, "kv_heads"),
            "value": into(kv_heads, "kv_heads"),
            "output": back(heads, "heads"),
            "mlp_norm": _norm_specs(c, (layers,), ("layers",)),
        },
        "norm": _norm_specs(c, (), ()),
    }
    own = specs["layers"]
    if c.experts:
        own["experts"] = experts.specs(c)
    else:
        own |= {"up": into(c.mlp_width, "mlp"), "down": back(c.mlp_width, "mlp")}
        own |= {"gate": into(c.mlp_width, "mlp")} if c.mlp in GATED else {}
    if c.qk_norm:
        own |= {name: {"scale": _scale_spec(c, (layers, c.head_width))} for name in ("query_norm", "key_norm")}
    if c.post_norms:
        own |= {name: _norm_specs(c, (layers,), ("layers",)) for name in ("attention_post_norm", "mlp_post_norm")}
    biased = ("query", "key", "value") * c.qkv_bias + ("output",) * c.output_bias + ("up", "gate", "down") * c.mlp_bias
    if biases := {name: _bias_spec(own[name]) for name in biased if name in own}:
        own["bias"] = biases
    if c.positions == "learned":
        specs["positions"] = ParamSpec((c.max_length, c.width), (None, "embed"), sharding.normal(0.02))
    if not c.tied_head:
        specs["head"] = ParamSpec((c.width, c.vocab_size), ("embed", "vocab"), sharding.normal(0.02))
    return specs


HEAD, TABLE = ("embed", "vocab"), ("vocab", "embed")


@functools.cache
def _layer_axes(config: TransformerConfig) -> dict[str, Any]:
    """Logical axes of the parameters of one layer."""
    own = param_specs(config)["layers"]
    return jax.tree.map(lambda spec: spec.axes[1:], own, is_leaf=lambda x: isinstance(x, ParamSpec))


def _norm_specs(config: TransformerConfig, lead: tuple[int, ...], axes: tuple[str, ...]) -> dict[str, ParamSpec]:
    specs = {"scale": _scale_spec(config, (*lead, config.width))}
    if config.norm == "layer":
        specs["bias"] = ParamSpec((*lead, config.width), (*axes, None), sharding.zeros)
    return specs


def _scale_spec(config: TransformerConfig, shape: tuple[int, ...]) -> ParamSpec:
    axes = ("layers",) * (len(shape) - 1)
    return ParamSpec(shape, (*axes, None), sharding.zeros if config.norm_plus_one else sharding.ones)


def _bias_spec(weight: ParamSpec) -> ParamSpec:
    return ParamSpec((weight.shape[0], weight.shape[2]), (weight.axes[0], weight.axes[2]), sharding.zeros)


@functools.cache
def build(config: TransformerConfig) -> Model:
    """The model's functions. Equal configs give the same object, so that jitted functions are compiled once."""
    return Model(
        vocab_size=config.vocab_size,
        width=config.width,
        max_length=config.max_length,
        init=lambda key: sharding.init_params(param_specs(config), key),
        hidden=functools.partial(hidden, config),
        logits=functools.partial(logits, config),
        head=head,
        decode_params=functools.partial(decode_params, config),
        prefill=functools.partial(prefill, config),
        decode=functools.partial(decode, config),
        resume=functools.partial(resume, config),
        take=take,
        put=put,
        grow=functools.partial(grow, config),
    )


# ------------------------------------------------------------------------------------------------ whole rows


def hidden(
    config: TransformerConfig,
    params: Params,
    tokens: Int[Array, "b t"],
    segments: Int[Array, "b t"] | None = None,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "b t {config.width}"]:
    """Hidden states after the last norm. With `dropout_key`, dropout on the residual branches.

    Raises:
        ValueError: the rows are longer than `config.max_length`.
    """
    _check_length(config, tokens.shape[1])
    position = _positions(tokens, segments)
    rotations = _rotations(config, position)

    def layer(x, xs):
        weights, key, window = xs
        return _layer(config, weights, x, rotations, segments, key, window)[0], None

    if config.remat != "none":
        # prevent_cse guards a recomputation that XLA could merge with the forward pass; inside a scan it cannot.
        layer = jax.checkpoint(layer, prevent_cse=not config.scan, policy=_STORED[config.remat])
    keys = None if dropout_key is None or not config.dropout else jax.random.split(dropout_key, config.layers)
    x = _embed(config, params, tokens, position)
    if config.scan:
        windows = jnp.asarray(config.windows, jnp.int32) if config.windows else None
        x, _ = jax.lax.scan(layer, x, (params["layers"], keys, windows))
    else:
        for i in range(config.layers):
            x, _ = layer(x, (_at(params["layers"], i), None if keys is None else keys[i], _window(config, i)))
    return _norm(config, params["norm"], x)


def expert_load(
    config: TransformerConfig,
    params: Params,
    tokens: Int[Array, "b t"],
    mask: Bool[Array, "b t"] | None = None,
    segments: Int[Array, "b t"] | None = None,
) -> Float[Array, "{config.layers} {config.experts}"]:
    """Of each layer the share of the tokens' (in the mask) places that each expert has: 1 / X where all are used alike, and
    1 / k for the k experts that have all.

    Raises:
        ValueError: the model has no experts, or the rows are longer than `config.max_length`.
    """
    if not config.experts:
        raise ValueError("expert_load: this model has experts=0, one MLP that all tokens share: there is no load")
    _check_length(config, tokens.shape[1])
    position = _positions(tokens, segments)
    rotations, x, loads = _rotations(config, position), _embed(config, params, tokens, position), []
    for i in range(config.layers):
        weights = _at(params["layers"], i)
        mixed, _ = _mixed(config, weights, x, rotations, segments, _window(config, i))
        _, read = _attended(config, weights, x, mixed)
        chosen, _ = experts.route(config, weights["experts"]["router"], read.reshape(-1, config.width))
        loads.append(experts.load(chosen, config.experts, None if mask is None else mask.reshape(-1)))
        x = _branches(config, weights, x, mixed)
    return jnp.stack(loads)


def logits(config: TransformerConfig, params: Params, hidden: Float[Array, "*s d"]) -> Float[Array, "*s v"]:
    """Unnormalised log-probabilities of the next token, from the head or, where there is none, the embedding table."""
    if "head" in params:
        return capped(products.product(config.dtype, hidden, params["head"], axes=HEAD), config.logit_cap)
    return capped(products.product(config.dtype, hidden, params["embed"], flipped=True, axes=TABLE), config.logit_cap)


def head(params: Params) -> Params:
    """Parameters whose `logits` are read block by block: what they read is gathered before."""
    name, axes = ("head", HEAD) if "head" in params else ("embed", TABLE)
    return params | products.gathered({name: params[name]}, {name: axes})


def _positions(tokens, segments):
    """Place of each token within its own text."""
    return jnp.arange(tokens.shape[1])[None] if segments is None else segment_positions(segments)


def segment_positions(segments: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Place of each token within its own packed text."""
    index = jnp.arange(segments.shape[1])
    start = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return (index - jax.lax.cummax(jnp.where(start, index, 0), axis=1)).astype(segments.dtype)


def _check_length(config: TransformerConfig, length: int) -> None:
    if length > config.max_length:
        raise ValueError(
            f"rows of {length} tokens exceed max_length={config.max_length}: shorten them or build a model with a longer one"
        )


def _at(layers: Params, i: int) -> Params:
    """Layer i of a stack, or of the tuple that `decode_params` made of it."""
    return layers[i] if isinstance(layers, tuple) else jax.tree.map(lambda w: w[i], layers)


def _window(config: TransformerConfig, i: int) -> int | None:
    """How many tokens a query of layer i sees; None or 0: all."""
    return config.windows[i] if config.windows else None


def _embed(config, params, tokens, position):
    # Ids at padded places may be anything: those outside the table are clipped.
    # Gathered over fsdp first: a look-up in a table split along the width makes the partitioner replicate the result.
    x = products.look_up(jax.tree.map(lambda table: sharding.constrain(table, "vocab", None), params["embed"]), tokens)
    if config.embed_scale != 1:
        x = x * config.embed_scale
    if config.positions == "learned":
        x = x + jnp.take(params["positions"], position, axis=0, mode="clip")
    return sharding.constrain(x, "batch", *("length",) * (x.ndim - 2), "residual")


def _layer(config, weights, x, rotations, segments, key, window, attention="xla"):
    """One layer; also its keys and values [B,T,K,E]."""
    mixed, cached = _mixed(config, weights, x, rotations, segments, window, attention)
    keys = (None, None) if key is None else jax.random.split(key)
    x = _branches(config, weights, x, mixed, keys)
    return sharding.constrain(x, "batch", "length", "residual"), cached


def _mixed(config, weights, x, rotations, segments, window, attention="xla"):
    """What attention mixes [B,T,H*E]; also the layer's keys and values."""
    query, k, v = _heads(config, weights, _norm(config, weights["attention_norm"], x), _of_layer(rotations, window))
    mixed = attend(query, k, v, segments, attention, window, config.attention_scale, config.attention_cap)
    return mixed.reshape(*x.shape[:2], -1), (k, v)


def _branches(config, weights, x, mixed, keys=(None, None)):
    """The residual stream after a layer: x, what attention mixed, and the MLP."""
    after, read = _attended(config, weights, x, mixed, keys[0])
    mlp = _mlp(config, weights, read)
    if config.post_norms:
        mlp = _norm(config, weights["mlp_post_norm"], mlp)
    return after + _dropout(config, keys[1], mlp)


def _attended(config, weights, x, mixed, key=None):
    """The residual stream with what attention mixed, and what the MLP reads."""
    attended = _linear(config, weights, "output", mixed)
    if config.post_norms:
        attended = _norm(config, weights["attention_post_norm"], attended)
    after = x + _dropout(config, key, attended)
    return after, _norm(config, weights["mlp_norm"], x if config.parallel else after)


def _linear(config, weights, name, x):
    """x times the weight of this name, plus its bias where it has one."""
    y = products.product(config.dtype, x, weights[name], axes=_layer_axes(config)[name])
    bias = weights.get("bias", {}).get(name)
    return y if bias is None else y + bias


def _heads(config, weights, x, rotation):
    """Query [..., H, E], key and value [..., K, E] of normalised states [..., D]."""
    query, key, value = (
        _linear(config, weights, name, x).reshape(*x.shape[:-1], -1, config.head_width) for name in ("query", "key", "value")
    )
    if config.qk_norm:  # Source: Henry et al. 2020 (arXiv 2010.04245), with RMSNorm as in Qwen3 and Gemma 3
        query, key = _rms(config, weights["query_norm"], query), _rms(config, weights["key_norm"], key)
    return _rotate(query, rotation), _rotate(key, rotation), value


def _mlp(config, weights, x):
    """Experts, or one MLP: SwiGLU or GEGLU, or GELU in its tanh form, as in GPT-2, or exact, as in GPT-NeoX."""
    if config.experts:
        return experts.mlp(config, weights["experts"], x)
    up = _linear(config, weights, "up", x)
    if config.mlp in GATED:
        inner = experts.gated(config, _linear(config, weights, "gate", x), up)
    else:
        inner = jax.nn.gelu(up, approximate=config.mlp == "gelu")
    return _linear(config, weights, "down", inner)


def _norm(config, weights, x):
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467 equation 4) or LayerNorm (Ba et al. 2016, arXiv 1607.06450)."""
    if config.norm == "layer":
        return _rms(config, weights, x - x.mean(-1, keepdims=True)) + weights["bias"]
    return _rms(config, weights, x)


def _rms(config, weights, x):
    scale = weights["scale"] + 1 if config.norm_plus_one else weights["scale"]
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_epsilon) * scale


def _rotations(config, position):
    """cos and sin [..., 1, W/2] of rotary positions: of all layers, or of those without a window and those with one.

    None with learned positions. Source: Su et al. 2021, arXiv 2104.09864; two bases: Gemma Team 2025, arXiv 2503.19786.
    """
    if config.positions == "learned":
        return None
    half = (config.rotary_width or config.head_width) // 2
    turns = -jnp.arange(half, dtype=jnp.float32) / half
    frequencies = [stretched(config, config.rope_theta**turns)]
    if config.rope_local_theta is not None:
        frequencies.append(config.rope_local_theta**turns)
    angles = [position[..., None, None].astype(jnp.float32) * frequency for frequency in frequencies]
    return tuple((jnp.cos(angle), jnp.sin(angle)) for angle in angles)


def stretched(config, frequency):
    """Frequencies for rows longer than the model was first trained on: linear interpolation (Chen et al. 2023, arXiv
    2306.15595), or that of Llama 3.1 (meta-llama/llama-models `apply_scaling`), which spares short wavelengths."""
    if config.rope_scaling == "none":
        return frequency
    if config.rope_scaling == "linear":
        return frequency / config.rope_factor
    waves = config.rope_original_length * frequency / (2 * math.pi)  # that fit into the original length
    spared = jnp.clip((waves - config.rope_low) / (config.rope_high - config.rope_low), 0, 1)
    return spared * frequency + (1 - spared) * frequency / config.rope_factor


def _of_layer(rotations, window):
    """The rotation of a layer with this window."""
    if rotations is None:
        return None
    if len(rotations) == 1 or window is None:
        return rotations[0]
    return jax.tree.map(lambda whole, local: jnp.where(window > 0, local, whole), *rotations)


def _rotate(x, rotation):
    """Turn the pairs (x_i, x_{i+W/2}) of the first W entries, which is the order of Llama's published weights."""
    if rotation is None:
        return x
    cos, sin = rotation
    width = 2 * cos.shape[-1]
    a, b = jnp.split(x[..., :width], 2, axis=-1)
    turned = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate(turned if width == x.shape[-1] else [*turned, x[..., width:]], axis=-1)


def _dropout(config, key, x):
    if key is None:
        return x
    # One random byte a place, not a float: a quarter of the random bits, which on a CPU cost as much as the layer itself.
    dropped = round(config.dropout * 256)
    keep = jax.random.bits(key, x.shape, jnp.uint8) >= dropped
    return jnp.where(keep, x * (256 / (256 - dropped)), 0)


# ------------------------------------------------------------------------------------------------ sampling


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
    layers = {name: w if isinstance(w, dict) else read(w) for name, w in params["layers"].items()}
    if config.experts:
        layers["experts"] = experts.decode_weights(config, params["layers"]["experts"])
    tied = config.tied_head
    head = products.table_for_decoding(params["embed"], config.dtype) if tied else read(params["head"])
    axes = jax.tree.map(lambda spec: spec.axes, param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec)) | {
        "head": HEAD
    }
    del axes["layers"]
    layers = tuple(products.gathered(_at(layers, i), _layer_axes(config)) for i in range(config.layers))
    rest = {name: weight for name, weight in params.items() if name != "layers"} | {"head": head}
    return products.gathered(rest, axes) | {"layers": layers}


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
    _check_length(config, prompt_width + width)
    position = jnp.arange(prompt_width)[None]
    rotations = _rotations(config, position)
    x = _embed(config, params, tokens, position)
    cached = []
    for i in range(config.layers):
        x, read = _layer(
            config, _at(params["layers"], i), x, rotations, None, None, _window(config, i), attention=cache.attention
        )
        cached.append(tuple(kv_cache.keep(each.transpose(0, 2, 1, 3), cache.dtype) for each in read))
    last = jnp.take_along_axis(x, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
    empty = kv_cache.empty(prompts * n, config.kv_heads, width, config.head_width, cache.dtype)
    found = {
        "length": length,
        # Angles of all places, looked up by each step: a sine costs a CPU more than the product it turns.
        "rotations": _rotations(config, jnp.arange(prompt_width + width)),
        "prompt": tuple(cached),
        "response": ((empty, empty),) * config.layers,
    }
    return _norm(config, params["norm"], last), found


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
    x = _embed(config, params, token, position)
    grown = []
    for i in range(config.layers):
        weights = _at(params["layers"], i)
        window = _window(config, i)
        query, k, v = _heads(config, weights, _norm(config, weights["attention_norm"], x), _of_layer(rotations, window))
        response = tuple(kv_cache.write(old, new, step) for old, new in zip(cache["response"][i], (k, v), strict=True))
        mixed = _decode_attention(config, query, cache["prompt"][i], response, (cache["length"], step, window))
        x = sharding.constrain(_branches(config, weights, x, mixed), "batch", "residual")
        grown.append(response)
    return _norm(config, params["norm"], x), cache | {"response": tuple(grown)}


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
    rotations = _rotations(config, jnp.arange(prompt + response + extra))
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
