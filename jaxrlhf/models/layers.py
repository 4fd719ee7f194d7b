"""One layer of a transformer: attention and MLP, each a branch of the residual stream, which stays float32.

`weights` are those of one layer, x states `[..., D]`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrlhf.core import sharding
from jaxrlhf.models import experts, products, rotary
from jaxrlhf.models.attention import attention as attend
from jaxrlhf.models.config import GATED, TransformerConfig
from jaxrlhf.models.specs import layer_axes

Params = Any


def check_length(config: TransformerConfig, length: int) -> None:
    """Refuse rows that the model cannot read.

    Raises:
        ValueError: they are longer than `config.max_length`.
    """
    if length > config.max_length:
        raise ValueError(
            f"rows of {length} tokens exceed max_length={config.max_length}: shorten them or build a model with a longer one"
        )


def at(layers: Params, i: int) -> Params:
    """Layer i of a stack, or of the tuple that `decode_params` made of it."""
    return layers[i] if isinstance(layers, tuple) else jax.tree.map(lambda w: w[i], layers)


def window(config: TransformerConfig, i: int) -> int | None:
    """How many tokens a query of layer i sees; None or 0: all."""
    return config.windows[i] if config.windows else None


def embed(
    config: TransformerConfig, params: Params, tokens: Int[Array, "*s"], position: Int[Array, "*t"]
) -> Float[Array, "*s d"]:
    """The residual stream before the first layer. `position` may have one row for all."""
    # Ids at padded places may be anything: those outside the table are clipped.
    # Gathered over fsdp first: a look-up in a table split along the width makes the partitioner replicate the result.
    x = products.look_up(jax.tree.map(lambda table: sharding.constrain(table, "vocab", None), params["embed"]), tokens)
    if config.embed_scale != 1:
        x = x * config.embed_scale
    if config.positions == "learned":
        x = x + jnp.take(params["positions"], position, axis=0, mode="clip")
    return sharding.constrain(x, "batch", *("length",) * (x.ndim - 2), "residual")


def layer(
    config: TransformerConfig,
    weights: Params,
    x: Float[Array, "b t d"],
    rotations: Any,
    segments: Int[Array, "b t"] | None,
    key: jax.Array | None,
    window: Any,
    attention: Any = "xla",
) -> tuple[Float[Array, "b t d"], Any]:
    """One layer; also its keys and values [B,T,K,E]."""
    mixed, cached = mix(config, weights, x, rotations, segments, window, attention)
    keys = (None, None) if key is None else jax.random.split(key)
    x = branches(config, weights, x, mixed, keys)
    return sharding.constrain(x, "batch", "length", "residual"), cached


def mix(
    config: TransformerConfig,
    weights: Params,
    x: Float[Array, "b t d"],
    rotations: Any,
    segments: Int[Array, "b t"] | None,
    window: Any,
    attention: Any = "xla",
) -> tuple[Float[Array, "b t m"], Any]:
    """What attention mixes [B,T,H*E]; also the layer's keys and values."""
    query, k, v = heads(config, weights, norm(config, weights["attention_norm"], x), rotary.of_layer(rotations, window))
    mixed = attend(query, k, v, segments, attention, window, config.attention_scale, config.attention_cap)
    return mixed.reshape(*x.shape[:2], -1), (k, v)


def branches(
    config: TransformerConfig, weights: Params, x: Float[Array, "*s d"], mixed: Float[Array, "*s m"], keys: Any = (None, None)
) -> Float[Array, "*s d"]:
    """The residual stream after a layer: x, what attention mixed, and the MLP."""
    after, read = attended(config, weights, x, mixed, keys[0])
    out = mlp(config, weights, read)
    if config.post_norms:
        out = norm(config, weights["mlp_post_norm"], out)
    return after + dropout(config, keys[1], out)


def attended(
    config: TransformerConfig,
    weights: Params,
    x: Float[Array, "*s d"],
    mixed: Float[Array, "*s m"],
    key: jax.Array | None = None,
) -> tuple[Float[Array, "*s d"], Float[Array, "*s d"]]:
    """The residual stream with what attention mixed, and what the MLP reads."""
    out = linear(config, weights, "output", mixed)
    if config.post_norms:
        out = norm(config, weights["attention_post_norm"], out)
    after = x + dropout(config, key, out)
    return after, norm(config, weights["mlp_norm"], x if config.parallel else after)


def linear(config: TransformerConfig, weights: Params, name: str, x: Float[Array, "*s i"]) -> Float[Array, "*s o"]:
    """x times the weight of this name, plus its bias where it has one."""
    y = products.product(config.dtype, x, weights[name], axes=layer_axes(config)[name])
    bias = weights.get("bias", {}).get(name)
    return y if bias is None else y + bias


def heads(
    config: TransformerConfig, weights: Params, x: Float[Array, "*s d"], rotation: Any
) -> tuple[Float[Array, "*s h e"], Float[Array, "*s k e"], Float[Array, "*s k e"]]:
    """Query, key and value of normalised states, the first two turned."""
    query, key, value = (
        linear(config, weights, name, x).reshape(*x.shape[:-1], -1, config.head_width) for name in ("query", "key", "value")
    )
    if config.qk_norm:  # Source: Henry et al. 2020 (arXiv 2010.04245), with RMSNorm as in Qwen3 and Gemma 3
        query, key = rms(config, weights["query_norm"], query), rms(config, weights["key_norm"], key)
    return rotary.rotate(query, rotation), rotary.rotate(key, rotation), value


def mlp(config: TransformerConfig, weights: Params, x: Float[Array, "*s d"]) -> Float[Array, "*s d"]:
    """Experts, or one MLP: SwiGLU or GEGLU, or GELU in its tanh form, as in GPT-2, or exact, as in GPT-NeoX."""
    if config.experts:
        return experts.mlp(config, weights["experts"], x)
    up = linear(config, weights, "up", x)
    if config.mlp in GATED:
        inner = experts.gated(config, linear(config, weights, "gate", x), up)
    else:
        inner = jax.nn.gelu(up, approximate=config.mlp == "gelu")
    return linear(config, weights, "down", inner)


def norm(config: TransformerConfig, weights: Params, x: Float[Array, "*s d"]) -> Float[Array, "*s d"]:
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467 equation 4) or LayerNorm (Ba et al. 2016, arXiv 1607.06450)."""
    if config.norm == "layer":
        return rms(config, weights, x - x.mean(-1, keepdims=True)) + weights["bias"]
    return rms(config, weights, x)


def rms(config: TransformerConfig, weights: Params, x: Float[Array, "*s d"]) -> Float[Array, "*s d"]:
    """RMSNorm, its scale as it is or one more."""
    scale = weights["scale"] + 1 if config.norm_plus_one else weights["scale"]
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_epsilon) * scale


def dropout(config: TransformerConfig, key: jax.Array | None, x: Float[Array, "*s d"]) -> Float[Array, "*s d"]:
    """Zero a share of the entries, the others larger by as much; without a key all as they are."""
    if key is None:
        return x
    # One random byte a place, not a float: a quarter of the random bits, which on a CPU cost as much as the layer itself.
    dropped = round(config.dropout * 256)
    keep = jax.random.bits(key, x.shape, jnp.uint8) >= dropped
    return jnp.where(keep, x * (256 / (256 - dropped)), 0)
