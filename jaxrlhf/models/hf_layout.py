"""How checkpoints of Hugging Face transformers lay a model out: names and shapes of tensors, and our leaves in them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from flax import traverse_util

from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig

SCORE = "score.weight"  # of a reward model, [1, D]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One of their tensors, `{}` its layer and a second one its expert, and the leaves of ours that it holds side by side."""

    tensor: str
    leaves: tuple[str, ...]  # `layers/query`, stacked over layers; `layers/experts/up`, over layers and experts
    transposed: bool = False  # theirs is [out, in]
    by_head: bool = False  # its leaves stand side by side within each head, else one after another


_QKV = ("query", "key", "value")
_LLAMA = {name: f"self_attn.{name[0]}_proj" for name in _QKV}
_LLAMA |= {"output": "self_attn.o_proj", "up": "mlp.up_proj", "gate": "mlp.gate_proj", "down": "mlp.down_proj"}
_LLAMA_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_GEMMA2_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_HEAD_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
_MIXTRAL = {"router": "block_sparse_moe.gate"}
_MIXTRAL |= {name: f"block_sparse_moe.experts.{{}}.{own}" for name, own in (("gate", "w1"), ("up", "w3"), ("down", "w2"))}
_QWEN3_MOE = {"router": "mlp.gate"} | {name: f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")}
_GPT2 = {"output": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
_NEOX = {"output": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}


def rules(config: TransformerConfig, kind: str) -> list[Rule]:
    """Where each leaf of a trunk stands in a checkpoint of this model_type."""
    if kind == "gpt2":
        names = ("transformer.", "transformer.h.{}.", "wte", "ln_f", "lm_head")
        linear, norms, qkv = _GPT2, {"attention_norm": "ln_1", "mlp_norm": "ln_2"}, "attn.c_attn"
    elif kind == "gpt_neox":
        names = ("gpt_neox.", "gpt_neox.layers.{}.", "embed_in", "final_layer_norm", "embed_out")
        linear, norms, qkv = _NEOX, _LLAMA_NORMS, "attention.query_key_value"
    else:
        names = ("model.", "model.layers.{}.", "embed_tokens", "norm", "lm_head")
        linear, norms, qkv = _LLAMA, (_GEMMA2_NORMS if config.post_norms else _LLAMA_NORMS) | _HEAD_NORMS, ""
    whole, layer, embed, norm, head = names
    flip = kind != "gpt2"  # its Conv1D keeps [in, out]
    found = [
        Rule(f"{whole}{embed}.weight", ("embed",)),
        Rule(f"{whole}wpe.weight", ("positions",)),
        Rule(f"{whole}{norm}.weight", ("norm/scale",)),
        Rule(f"{whole}{norm}.bias", ("norm/bias",)),
        Rule(f"{head}.weight", ("head",), transposed=True),
    ]
    for ours, theirs in norms.items():
        found.append(Rule(f"{layer}{theirs}.weight", (f"layers/{ours}/scale",)))
        found.append(Rule(f"{layer}{theirs}.bias", (f"layers/{ours}/bias",)))
    for ours, theirs in linear.items():
        found.append(Rule(f"{layer}{theirs}.weight", (f"layers/{ours}",), transposed=flip))
        found.append(Rule(f"{layer}{theirs}.bias", (f"layers/bias/{ours}",)))
    if qkv:
        found.append(Rule(f"{layer}{qkv}.weight", tuple(f"layers/{n}" for n in _QKV), flip, by_head=flip))
        found.append(Rule(f"{layer}{qkv}.bias", tuple(f"layers/bias/{n}" for n in _QKV), by_head=flip))
    for ours, theirs in {"mixtral": _MIXTRAL, "qwen3_moe": _QWEN3_MOE}.get(kind, {}).items():
        found.append(Rule(f"{layer}{theirs}.weight", (f"layers/experts/{ours}",), transposed=True))
    specs = flat(transformer.param_specs(config))
    return [rule for rule in found if rule.leaves[0] in specs]


def stacked_axes(rule: Rule) -> int:
    """How many axes of its leaves are stacked."""
    return rule.tensor.count("{}")


def flat(tree: Any) -> dict[str, Any]:
    """Leaves by their path, `layers/query`."""
    return traverse_util.flatten_dict(tree, sep="/")


def split(rule: Rule, tensor: np.ndarray, head_width: int) -> list[np.ndarray]:
    """Our leaves (of one layer) from their tensor."""
    tensor = tensor.T if rule.transposed else tensor
    parts = len(rule.leaves)
    if not rule.by_head:
        return np.split(tensor, parts, axis=-1)
    lead = tensor.shape[:-1]
    return [part.reshape(*lead, -1) for part in np.split(tensor.reshape(*lead, -1, parts * head_width), parts, axis=-1)]


def join(rule: Rule, leaves: list[np.ndarray], head_width: int) -> np.ndarray:
    """Their tensor from our leaves (of one layer)."""
    if rule.by_head:
        lead = leaves[0].shape[:-1]
        tensor = np.concatenate([leaf.reshape(*lead, -1, head_width) for leaf in leaves], axis=-1).reshape(*lead, -1)
    else:
        tensor = np.concatenate(leaves, axis=-1)
    return np.ascontiguousarray(tensor.T if rule.transposed else tensor)


def expected(trunk: list[Rule], config: TransformerConfig, reward: bool = False) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor that the configuration asks for."""
    specs, shapes = flat(transformer.param_specs(config)), {}
    for rule in trunk:
        shape, stacked = specs[rule.leaves[0]].shape, stacked_axes(rule)
        one = (*shape[stacked:-1], sum(specs[leaf].shape[-1] for leaf in rule.leaves))
        for which in np.ndindex(shape[:stacked]):
            shapes[rule.tensor.format(*which)] = one[::-1] if rule.transposed else one
    return shapes | ({SCORE: (1, specs["norm/scale"].shape[0])} if reward else {})
