"""Adapters in the format of the peft package, out and in: `adapter_config.json` and `adapter_model.safetensors`.

For models of Llama's layout (RMSNorm, rotary positions, a gated MLP), whose modules stand one to one for our weights. A torch
linear layer holds [out, in], so every matrix is transposed on the way: lora_A is A^T [r, in], lora_B is B^T [out, r].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from jaxrlhf.core.sharding import ParamSpec
from jaxrlhf.models import lora
from jaxrlhf.models.config import GATED, TransformerConfig

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
MODULES: dict[lora.Target, str] = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "head": "lm_head",
}
# What would change the product x W + scale * (x A) B, or add to it; each must be absent, false, empty or "none".
UNREAD = (
    "use_dora", "bias", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias",
    "layers_to_transform", "layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens",
    "use_qalora", "use_bdlora",
)  # fmt: skip
KEEPS_BASE = (None, True, False, "gaussian", "orthogonal", "eva")  # `init_lora_weights` that leave the base as it was


def holds(shape: TransformerConfig) -> bool:
    """Whether adapters of this model can be written."""
    return (shape.norm, shape.positions) == ("rms", "rope") and shape.mlp in GATED


def save(path: Path, adapter: dict[str, Any], shape: TransformerConfig, config: lora.LoraConfig, base: Path | str) -> None:
    """Write the folder `path`; `base` names the model that the adapter lies over.

    Raises:
        ValueError: a model of another layout.
    """
    from safetensors.numpy import save_file

    _check(shape)
    names = [*adapter.get("layers", {}), *(("head",) if "head" in adapter else ())]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rank_stabilised,
        "target_modules": [MODULES[name].rpartition(".")[2] for name in names],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    path.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(jax.tree.map(np.asarray, adapter))
    save_file({name: np.ascontiguousarray(leaf) for name, leaf in tensors.items()}, path / TENSORS)
    (path / CONFIG).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def load(path: Path, shape: TransformerConfig) -> tuple[dict[str, Any], lora.LoraConfig]:
    """(adapter as NumPy arrays, its settings) of a folder that the peft package or `save` wrote, for a model of this shape.

    Raises:
        FileNotFoundError: no such folder, or a file is missing from it.
        ValueError: a setting that we do not read; a tensor missing, unknown or of another shape (naming it and both shapes).
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    _check(shape)
    for name in (CONFIG, TENSORS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path}: no adapter there ({name} is missing); give the folder that peft saved")
    try:
        settings = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        found = load_file(path / TENSORS)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}); save the adapter again") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise ValueError(f"{path / CONFIG}: not the settings of a LoRA adapter, the only kind that is read")
    wrong = {name: settings[name] for name in UNREAD if settings.get(name) not in (None, False, "none", [], {})}
    if settings.get("init_lora_weights") not in KEEPS_BASE:
        wrong["init_lora_weights"] = settings["init_lora_weights"]
    if wrong:
        raise ValueError(f"{path / CONFIG}: {wrong} would be left out; merge this adapter with peft, then read the model")
    # peft keeps a copy of the base's own head beside an adapter on it.
    found = {name: leaf for name, leaf in found.items() if not name.endswith(".base_layer.weight")}
    targets: tuple[lora.Target, ...] = tuple(
        name for name, module in MODULES.items() if any(f".{module}.lora_A." in key for key in found)
    )
    if not targets:
        raise ValueError(f"{path / TENSORS}: no tensor of {', '.join(MODULES.values())}; it holds {', '.join(list(found)[:3])}")
    config = lora.LoraConfig(settings["r"], settings["lora_alpha"], targets, bool(settings.get("use_rslora")))
    wanted = lora.specs(shape, config)
    empty = jax.tree.map(lambda spec: np.broadcast_to(0.0, spec.shape), wanted, is_leaf=lambda x: isinstance(x, ParamSpec))
    _compare(path / TENSORS, found, _tensors(empty))
    own = {key: found[key].astype(np.float32).T for key in found}

    def leaf(place: tuple[str, ...], spec: ParamSpec) -> np.ndarray:
        target, part = place[-2:]
        if target == "head":
            return own[_name(target, part)]
        return np.stack([own[_name(target, part, layer)] for layer in range(spec.shape[0])])

    flat: dict[tuple[str, ...], ParamSpec] = traverse_util.flatten_dict(wanted)  # type: ignore[assignment]
    return traverse_util.unflatten_dict({place: leaf(place, spec) for place, spec in flat.items()}), config


def _check(shape: TransformerConfig) -> None:
    if not holds(shape):
        raise ValueError(
            f"peft: a model with norm='{shape.norm}', positions='{shape.positions}', mlp='{shape.mlp}' has not Llama's layout "
            "(rms, rope, swiglu or geglu), the only one whose adapters are written and read"
        )


def _name(target: Any, part: str, layer: int | None = None) -> str:
    place = "" if layer is None else f"model.layers.{layer}."
    return f"base_model.model.{place}{MODULES[target]}.lora_{part.upper()}.weight"


def _tensors(adapter: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every matrix as the peft package names and turns it."""
    found = {}
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(adapter)  # type: ignore[assignment]
    for (*where, target, part), leaf in flat.items():
        if where:
            found |= {_name(target, part, layer): own.T for layer, own in enumerate(leaf)}
        else:
            found[_name(target, part)] = leaf.T
    return found


def _compare(path: Path, found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    problems = [f"{name} {list(leaf.shape)} is missing" for name, leaf in wanted.items() if name not in found]
    problems += [f"{name} {list(leaf.shape)} is unknown" for name, leaf in found.items() if name not in wanted]
    for name, leaf in wanted.items():
        if name in found and found[name].shape != leaf.shape:
            problems.append(f"{name} is {list(found[name].shape)} there, {list(leaf.shape)} in this model")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path} is of another model: {'; '.join(problems[:3])}{more}")
