"""Low-rank adapters: a frozen model, and for some of its weight matrices W a trained A B with few columns in between.

An adapter is a tree of its own, {"layers": {"query": {"a" [L, in, r], "b" [L, r, out]}, ...}, "head": {"a", "b"}}: what an
optimizer, a checkpoint and a gradient hold. `attach` lays it over its base, which is an argument like any other, and gives a
tree that every function of the model reads: y = x W + scale * (x A) B, without W + scale * A B ever standing in memory.
Sampling merges the two (`Model.decode_params`). There is no dropout: it would part the sampler's policy from the learner's.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1; there W is [out, in] and B A.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import jax

from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import ParamSpec
from jaxrlhf.models import products, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.products import Adapted

Target = Literal["query", "key", "value", "output", "gate", "up", "down", "head"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int = 0  # r, columns of A; 0: no adapter, the whole model is trained
    alpha: float = 16.0  # of the scale alpha / r
    targets: tuple[Target, ...] | None = None  # weights with an adapter; None: all of the layers, not the head
    rank_stabilised: bool = False  # scale alpha / sqrt(r), so that a high rank learns as fast as a low one

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"lora rank={self.rank} must be >= 0; 0 trains the whole model")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"lora alpha={self.alpha} must be > 0 and finite")
        named = TARGETS if self.targets is None else self.targets
        if not named or not set(named) <= set(TARGETS) or len(set(named)) < len(named):
            raise ValueError(f"lora targets={named}: name some of {', '.join(TARGETS)}, each once; None is all but the head")

    @property
    def scale(self) -> float:
        """What A B is multiplied by. Source: Hu et al. 2021, section 4.1; Kalajdzievski 2023 (rsLoRA), equation 6."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


NONE = LoraConfig()


def specs(shape: TransformerConfig, config: LoraConfig) -> dict[str, Any]:
    """Shape, logical axes and initialiser of the adapter's parameters: A normal, B zero, split as the weight beside them.

    Raises:
        ValueError: rank 0, or a target that this model has not (naming what it has).
    """
    if not config.rank:
        raise ValueError("lora rank=0 has no adapter: choose a rank, 8 say")
    base = transformer.param_specs(shape)
    weights = {name: spec for name, spec in base["layers"].items() if isinstance(spec, ParamSpec)}
    targets = tuple(weights) if config.targets is None else config.targets
    if "head" in base:
        weights["head"] = base["head"]
    found: dict[str, Any] = {}
    for name in targets:
        if name not in weights:
            raise ValueError(f"lora target '{name}': this model has no such weight matrix; it has {', '.join(weights)}")
        place = found if name == "head" else found.setdefault("layers", {})
        place[name] = _pair(weights[name], config.rank)
    return found


def _pair(weight: ParamSpec, rank: int) -> dict[str, ParamSpec]:
    (*lead, inner, out), (*lead_axes, inner_axis, out_axis) = weight.shape, weight.axes
    return {
        # Of the deviation that gives x A the size of x.
        "a": ParamSpec((*lead, inner, rank), (*lead_axes, inner_axis, None), sharding.normal(inner**-0.5)),
        "b": ParamSpec((*lead, rank, out), (*lead_axes, None, out_axis), sharding.zeros),
    }


def attach(base: Any, adapter: Any, config: LoraConfig) -> Any:
    """The model's parameters with the adapter beside its targets, for every function of `Model`; the base gets no gradient.

    A whole model in the place of an adapter, with which some role may do without one, is given back as it is.

    Raises:
        ValueError: the adapter has a target that the base has not.
    """
    if not config.rank or "embed" in adapter:
        return adapter
    return _overlay(jax.lax.stop_gradient(base), adapter, config)


def _overlay(base: Any, adapter: Any, config: LoraConfig) -> Any:
    found = dict(base)
    for name, own in adapter.items():
        if name not in base:
            raise ValueError(f"lora: the adapter has a target '{name}', which the base has not; it has {', '.join(base)}")
        pair = own.keys() == {"a", "b"}
        found[name] = Adapted(base[name], own["a"], own["b"], config.scale) if pair else _overlay(base[name], own, config)
    return found


def detach(params: Any, config: LoraConfig) -> tuple[Any, Any]:
    """(base, adapter) of what `attach` laid together; the adapter's B as it must be to do the same under `config`'s scale."""
    base, adapter = {}, {}
    for name, own in params.items():
        if isinstance(own, Adapted):
            base[name], adapter[name] = own.weight, {"a": own.a, "b": own.b * (own.scale / config.scale)}
        elif isinstance(own, dict):
            base[name], inner = detach(own, config)
            adapter |= {name: inner} if inner else {}
        else:
            base[name] = own
    return base, adapter


def merge(base: Any, adapter: Any, config: LoraConfig) -> Any:
    """The model as one tree of plain weights, W + scale * A B; of a base in eight bits, the W that they stand for."""
    return whole(attach(base, adapter, config))


def whole(params: Any) -> Any:
    """Parameters of which every adapter is merged into its weight, and every weight in eight bits is wide again."""
    return jax.tree.map(products.whole, params, is_leaf=products.is_weight)


def unmerge(merged: Any, adapter: Any, config: LoraConfig) -> Any:
    """The base that `merge` was given, W - scale * A B, up to rounding."""
    return merge(merged, jax.tree_util.tree_map_with_path(_negative_b, adapter), config)


def _negative_b(path: tuple, leaf: jax.Array) -> jax.Array:
    return -leaf if path[-1].key == "b" else leaf
