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
from jaxtyping import Array, Float, Int

from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import ParamSpec
from jaxrlhf.models import products
from jaxrlhf.models.attention import MASKED, attention, capped, near, scaled
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.model import Model

Params = Any
Cache = Any
GATED = ("swiglu", "geglu")


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
            "up": into(c.mlp_width, "mlp"),
            "down": back(c.mlp_width, "mlp"),
        },
        "norm": _norm_specs(c, (), ()),
    }
    own = specs["layers"]
    if c.mlp in GATED:
        own["gate"] = into(c.mlp_width, "mlp")
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
        decode_params=functools.partial(decode_params, config),
        prefill=functools.partial(prefill, config),
        decode=functools.partial(decode, config),
        take=take,
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
    position = segment_positions(segments) if segments is not None else jnp.arange(tokens.shape[1])[None]
    rotations = _rotations(config, position)

    def layer(x, xs):
        weights, key, window = xs
        return _layer(config, weights, x, rotations, segments, key, window)[0], None

    if config.remat:
        # prevent_cse guards a recomputation that XLA could merge with the forward pass; inside a scan it cannot.
        layer = jax.checkpoint(layer, prevent_cse=not config.scan)
    keys = None if dropout_key is None or not config.dropout else jax.random.split(dropout_key, config.layers)
    x = _embed(config, params, tokens, position)
    if config.scan:
        windows = jnp.asarray(config.windows, jnp.int32) if config.windows else None
        x, _ = jax.lax.scan(layer, x, (params["layers"], keys, windows))
    else:
        for i in range(config.layers):
            x, _ = layer(x, (_at(params["layers"], i), None if keys is None else keys[i], _window(config, i)))
    return _norm(config, params["norm"], x)


def logits(config: TransformerConfig, params: Params, hidden: Float[Array, "*s d"]) -> Float[Array, "*s v"]:
    """Unnormalised log-probabilities of the next token, from the head or, where there is none, the embedding table."""
    if "head" in params:
        return capped(products.product(config.dtype, hidden, params["head"]), config.logit_cap)
    return capped(products.product(config.dtype, hidden, params["embed"], flipped=True), config.logit_cap)


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
    # Ids at padded places may be anything. Clipped, because the default fills with NaN, which 0 * NaN would spread.
    # Gathered over fsdp first: a look-up in a table split along the width makes the partitioner replicate the result.
    x = jnp.take(sharding.constrain(params["embed"], "vocab", None), tokens, axis=0, mode="clip")
    x = x.astype(jnp.float32)  # of a table kept in bfloat16
    if config.embed_scale != 1:
        x = x * config.embed_scale
    if config.positions == "learned":
        x = x + jnp.take(params["positions"], position, axis=0, mode="clip")
    return sharding.constrain(x, "batch", *("length",) * (x.ndim - 2), "residual")


def _layer(config, weights, x, rotations, segments, key, window):
    """One layer; also its keys and values [B,T,K,E]."""
    b, t, _ = x.shape
    query, k, v = _heads(config, weights, _norm(config, weights["attention_norm"], x), _of_layer(rotations, window))
    mixed = attention(query, k, v, segments, "xla", window, config.attention_scale, config.attention_cap).reshape(b, t, -1)
    keys = (None, None) if key is None else jax.random.split(key)
    x = _branches(config, weights, x, mixed, keys)
    return sharding.constrain(x, "batch", "length", "residual"), (k, v)


def _branches(config, weights, x, mixed, keys=(None, None)):
    """The residual stream after a layer: x, what attention mixed, and the MLP."""
    attended = _linear(config, weights, "output", mixed)
    if config.post_norms:
        attended = _norm(config, weights["attention_post_norm"], attended)
    after = x + _dropout(config, keys[0], attended)
    mlp = _mlp(config, weights, _norm(config, weights["mlp_norm"], x if config.parallel else after))
    if config.post_norms:
        mlp = _norm(config, weights["mlp_post_norm"], mlp)
    return after + _dropout(config, keys[1], mlp)


def _linear(config, weights, name, x):
    """x times the weight of this name, plus its bias where it has one."""
    y = products.product(config.dtype, x, weights[name])
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
    """SwiGLU or GEGLU (Shazeer 2020, arXiv 2002.05202), or GELU in its tanh form, as in GPT-2, or exact, as in GPT-NeoX."""
    up = _linear(config, weights, "up", x)
    if config.mlp == "swiglu":
        inner = jax.nn.silu(_linear(config, weights, "gate", x)) * up
    elif config.mlp == "geglu":
        inner = jax.nn.gelu(_linear(config, weights, "gate", x), approximate=True) * up
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
    merged.

    On a CPU the stack of layers becomes a tuple, because indexing a stacked array there copies it at every step.
    The embedding table stays float32 for look-ups; a tied head becomes a separate narrow copy of it.
    """
    dtype = jnp.dtype(config.dtype)
    layers = {name: w if isinstance(w, dict) else products.whole(w).astype(dtype) for name, w in params["layers"].items()}
    if jax.default_backend() == "cpu":
        layers = tuple(_at(layers, i) for i in range(config.layers))
    if config.tied_head:
        return params | {"layers": layers, "head": products.transpose(params["embed"].astype(dtype))}
    return params | {"layers": layers, "head": products.whole(params["head"]).astype(dtype)}


def prefill(
    config: TransformerConfig, params: Params, tokens: Int[Array, "p w"], length: Int[Array, " p"], n: int, width: int
) -> tuple[Float[Array, "p {config.width}"], Cache]:
    """Hidden state of each prompt's last token, and the cache for n responses of at most `width` tokens to each.

    The cache holds, for each layer, keys and values of the prompts `[prompts, K, P, E]` once for their n samples, and
    those of the responses `[prompts * n, K, R, E]`, written at one common place by each decode step.

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
        x, (k, v) = _layer(config, _at(params["layers"], i), x, rotations, None, None, _window(config, i))
        cached.append((k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)))
    last = jnp.take_along_axis(x, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
    empty = jnp.zeros((prompts * n, config.kv_heads, width, config.head_width))
    empty = sharding.constrain(empty, "batch", "kv_heads", None, None)  # else every device would hold all of it
    cache = {
        "length": length,
        # Angles of all places, looked up by each step: a sine costs a CPU more than the product it turns.
        "rotations": _rotations(config, jnp.arange(prompt_width + width)),
        "prompt": tuple(cached),
        "response": ((empty, empty),) * config.layers,
    }
    return _norm(config, params["norm"], last), cache


def decode(
    config: TransformerConfig, params: Params, cache: Cache, token: Int[Array, " b"], step: Int[Array, ""] | int
) -> tuple[Float[Array, "b {config.width}"], Cache]:
    """Read response token number `step` (0, 1, ...) of every row; its hidden state and the grown cache."""
    n = token.shape[0] // cache["length"].shape[0]
    position = jnp.repeat(cache["length"], n) + step
    rotations = jax.tree.map(lambda table: jnp.take(table, position, axis=0, mode="clip"), cache["rotations"])
    x = _embed(config, params, token, position)
    grown = []
    for i in range(config.layers):
        weights = _at(params["layers"], i)
        window = _window(config, i)
        query, k, v = _heads(config, weights, _norm(config, weights["attention_norm"], x), _of_layer(rotations, window))
        response = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, new[:, :, None], step, axis=2)
            for old, new in zip(cache["response"][i], (k, v), strict=True)
        )
        mixed = _decode_attention(config, query, cache["prompt"][i], response, (cache["length"], step, window))
        x = sharding.constrain(_branches(config, weights, x, mixed), "batch", "residual")
        grown.append(response)
    return _norm(config, params["norm"], x), cache | {"response": tuple(grown)}


def take(cache: Cache, rows: Int[Array, " m"]) -> Cache:
    """The cache of some rows, in this order, each with a prompt of its own: samples of one prompt end at different times."""
    responses = cache["response"][0][0].shape[0]
    prompts = rows // (responses // cache["length"].shape[0])

    def of(index: jax.Array, x: jax.Array) -> jax.Array:
        return sharding.constrain(x[index], "batch", *("kv_heads", None, None)[: x.ndim - 1])

    return cache | {
        "length": cache["length"][prompts],
        "prompt": jax.tree.map(functools.partial(of, prompts), cache["prompt"]),
        "response": jax.tree.map(functools.partial(of, rows), cache["response"]),
    }


def _decode_attention(config, query, prompt, response, place):
    """Attention [B, H*E] of one query a row over its prompt's keys and its own response's, with one softmax over both.

    `place`: the prompts' lengths, how many response tokens stand before the query, the layer's window.
    """
    length, step, window = place
    b, h, e = query.shape
    prompts, k, p, _ = prompt[0].shape
    n, r = b // prompts, response[0].shape[2]
    query = scaled(query.reshape(b, k, h // k, e), config.attention_scale)
    in_prompt, in_response = jnp.arange(p) < length[:, None], jnp.arange(r) <= step
    if window:
        in_prompt &= near(length[:, None] + step - jnp.arange(p), window)
        in_response &= near(step - jnp.arange(r), window)
    # A prompt's samples are rows of one product. The responses keep their shape: another one would copy the cache.
    at_prompt = capped(_apart(jnp.matmul(_together(query, n), prompt[0].swapaxes(2, 3)), n), config.attention_cap)
    at_prompt = jnp.where(in_prompt.repeat(n, 0)[:, None, None], at_prompt, MASKED)
    at_response = capped(jnp.matmul(query, response[0].swapaxes(2, 3)), config.attention_cap)
    at_response = jnp.where(in_response, at_response, MASKED)
    weights = jax.nn.softmax(jnp.concatenate([at_prompt, at_response], axis=-1), axis=-1)
    mixed = _apart(jnp.matmul(_together(weights[..., :p], n), prompt[1]), n) + jnp.matmul(weights[..., p:], response[1])
    return mixed.reshape(b, h * e)


def _together(x, n):
    """[prompts * n, K, G, ...] as [prompts, K, n * G, ...]."""
    b, k, g, width = x.shape
    return x.reshape(b // n, n, k, g, width).swapaxes(1, 2).reshape(b // n, k, n * g, width)


def _apart(x, n):
    """The reverse."""
    prompts, k, rows, width = x.shape
    return x.reshape(prompts, k, n, rows // n, width).swapaxes(1, 2).reshape(prompts * n, k, rows // n, width)
