"""Our `TransformerConfig` as `config.json` of Hugging Face transformers.

Which architecture it is follows from its settings. One is written only if reading it back gives the same configuration.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.hf_config import CLASSES, GATED, GEMMA, PLAIN, config_from_hf


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """`config.json` of the architecture that this configuration is, rope parameters flat, which transformers 4 and 5 read.

    Raises:
        ValueError: no architecture of transformers that we know has these settings; it names those that do not fit.
    """
    kind = model_type(config)
    values = _to_gpt2(config) if kind == "gpt2" else _to_gpt_neox(config) if kind == "gpt_neox" else _to_llama(kind, config)
    values = {"model_type": kind, "architectures": [CLASSES[kind][0]]} | values
    ours, again = dataclasses.asdict(config), dataclasses.asdict(config_from_hf(values))
    speed = ("dtype", "scan", "remat", "dropout")
    if wrong := [name for name in ours if name not in speed and ours[name] != again[name]]:
        told = ", ".join(f"{name}={ours[name]} (there {again[name]})" for name in wrong)
        raise ValueError(f"no architecture of transformers has these settings; nearest is {kind}, which differs in {told}")
    return values


def model_type(config: TransformerConfig) -> str:
    """The architecture of transformers that comes nearest."""
    if config.experts:
        return "qwen3_moe" if config.qk_norm else "mixtral"
    if config.norm == "layer":
        return "gpt2" if config.positions == "learned" else "gpt_neox"
    if config.norm_plus_one:
        return "gemma3_text" if config.qk_norm else "gemma2" if config.post_norms else "gemma"
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias and not config.output_bias:
        return "qwen2"
    return "mistral" if config.windows else "llama"


def _name(choices: dict[str, str], value: str) -> str:
    """The first name that transformers has for our activation; '' where it has none."""
    return next((theirs for theirs, ours in choices.items() if ours == value), "")


def _to_llama(kind: str, config: TransformerConfig) -> dict[str, Any]:
    activation = _name(GATED, config.mlp) or config.mlp
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": activation,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_head,
        "rope_theta": config.rope_theta,
    }
    values |= _scaling(config)
    values |= _experts(kind, config)
    if kind in ("llama", "qwen3", "qwen3_moe", *GEMMA):
        values["attention_bias"] = config.output_bias
    if kind == "llama":
        values["mlp_bias"] = config.mlp_bias
    if kind in GEMMA:
        values["hidden_activation"] = activation
    window = max(config.windows, default=0)
    if kind not in ("llama", "gemma"):
        # transformers builds a mask for the window of Gemma whether or not a layer has one.
        values["sliding_window"] = window or (config.max_length if kind in GEMMA else None)
    if kind.startswith("qwen"):
        first = 0 if kind == "qwen3_moe" else config.layers
        values |= {"use_sliding_window": bool(window), "max_window_layers": first}
    if kind not in ("llama", "gemma", "mistral", "mixtral", "qwen3_moe"):
        windows = config.windows or (0,) * config.layers
        values["layer_types"] = ["sliding_attention" if each else "full_attention" for each in windows]
    if kind in ("gemma2", "gemma3_text"):
        scale = config.attention_scale or config.head_width**-0.5
        values |= {"query_pre_attn_scalar": round(scale**-2), "attn_logit_softcapping": config.attention_cap}
        values["final_logit_softcapping"] = config.logit_cap
    if kind == "gemma3_text":
        values["rope_local_base_freq"] = config.rope_local_theta or config.rope_theta
    return values


def _experts(kind: str, config: TransformerConfig) -> dict[str, Any]:
    if kind == "mixtral":
        return {"num_local_experts": config.experts, "num_experts_per_tok": config.experts_per_token}
    if kind != "qwen3_moe":
        return {}
    return {
        "num_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.mlp_width,
        "norm_topk_prob": config.renormalise_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _scaling(config: TransformerConfig) -> dict[str, Any]:
    if config.rope_scaling == "none":
        return {}
    scaling: dict[str, Any] = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": config.rope_low, "high_freq_factor": config.rope_high}
        scaling["original_max_position_embeddings"] = config.rope_original_length
    return {"rope_scaling": scaling}


def _to_gpt2(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
        "n_positions": config.max_length,
        "activation_function": _name(PLAIN, config.mlp) or config.mlp,
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tied_head,
        "scale_attn_weights": config.attention_scale is None,
    }


def _to_gpt_neox(config: TransformerConfig) -> dict[str, Any]:
    values = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": _name(PLAIN, config.mlp) or config.mlp,
        "max_position_embeddings": config.max_length,
        "layer_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_head,
        "use_parallel_residual": config.parallel,
        "attention_bias": config.qkv_bias,
        "rotary_pct": (config.rotary_width or config.head_width) / config.head_width,
        "rotary_emb_base": config.rope_theta,
        "rope_theta": config.rope_theta,
    }
    return values | _scaling(config)
