"""Every parameter of a transformer on one line: its shape, its logical axes and how it begins."""

from __future__ import annotations

import functools
from typing import Any

import jax

from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import ParamSpec
from jaxrlhf.models import experts
from jaxrlhf.models.config import GATED, TransformerConfig

HEAD, TABLE = ("embed", "vocab"), ("vocab", "embed")


def param_specs(config: TransformerConfig) -> Any:
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


@functools.cache
def layer_axes(config: TransformerConfig) -> dict[str, Any]:
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
