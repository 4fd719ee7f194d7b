"""A decoder-only transformer as pure functions over a pytree of parameters.

`specs.py` declares every parameter on one line, `layers.py` is what a layer computes, `decoding.py` writes tokens over a cache
of its own for each layer. Here are whole rows, for training and scoring: a scan over the stacked `[L, ...]` layers with
rematerialisation. Only the operands of weight products have the type `config.dtype`; the residual stream, norms, attention,
softmax and all sums are float32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrlhf.core import sharding
from jaxrlhf.models import decoding, experts, layers, products, rotary
from jaxrlhf.models.attention import capped
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.model import Model
from jaxrlhf.models.specs import HEAD, TABLE, param_specs

Params = Any

# What the backward pass finds stored of a layer, by the names that `products.product`, `experts.mlp` and attention give.
_STORED = {
    "dots": jax.checkpoint_policies.save_only_these_names("product", "attention"),
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "layers": jax.checkpoint_policies.nothing_saveable,
}


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
        decode_params=functools.partial(decoding.decode_params, config),
        prefill=functools.partial(decoding.prefill, config),
        decode=functools.partial(decoding.decode, config),
        resume=functools.partial(decoding.resume, config),
        take=decoding.take,
        put=decoding.put,
        grow=functools.partial(decoding.grow, config),
    )


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
    layers.check_length(config, tokens.shape[1])
    position = _positions(tokens, segments)
    rotations = rotary.rotations(config, position)

    def layer(x, xs):
        weights, key, window = xs
        return layers.layer(config, weights, x, rotations, segments, key, window)[0], None

    if config.remat != "none":
        # prevent_cse guards a recomputation that XLA could merge with the forward pass; inside a scan it cannot.
        layer = jax.checkpoint(layer, prevent_cse=not config.scan, policy=_STORED[config.remat])
    keys = None if dropout_key is None or not config.dropout else jax.random.split(dropout_key, config.layers)
    x = layers.embed(config, params, tokens, position)
    if config.scan:
        windows = jnp.asarray(config.windows, jnp.int32) if config.windows else None
        x, _ = jax.lax.scan(layer, x, (params["layers"], keys, windows))
    else:
        for i in range(config.layers):
            x, _ = layer(x, (layers.at(params["layers"], i), None if keys is None else keys[i], layers.window(config, i)))
    return layers.norm(config, params["norm"], x)


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
    layers.check_length(config, tokens.shape[1])
    position = _positions(tokens, segments)
    rotations, x, loads = rotary.rotations(config, position), layers.embed(config, params, tokens, position), []
    for i in range(config.layers):
        weights = layers.at(params["layers"], i)
        mixed, _ = layers.mix(config, weights, x, rotations, segments, layers.window(config, i))
        _, read = layers.attended(config, weights, x, mixed)
        chosen, _ = experts.route(config, weights["experts"]["router"], read.reshape(-1, config.width))
        loads.append(experts.load(chosen, config.experts, None if mask is None else mask.reshape(-1)))
        x = layers.branches(config, weights, x, mixed)
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
