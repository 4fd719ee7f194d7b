"""`config.json` of Hugging Face transformers as our `TransformerConfig`; `hf_export.py` is the way back.

Nothing is guessed: a field that we do not know and that is set is refused.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxrlhf.models.config import TransformerConfig

# model_type: (class of a language model, class of a reward model)
CLASSES = {
    "llama": ("LlamaForCausalLM", "LlamaForSequenceClassification"),
    "mistral": ("MistralForCausalLM", "MistralForSequenceClassification"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
    "mixtral": ("MixtralForCausalLM", "MixtralForSequenceClassification"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeForSequenceClassification"),
    "gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification"),
    "gemma": ("GemmaForCausalLM", "GemmaForSequenceClassification"),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2ForSequenceClassification"),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
}
GEMMA = ("gemma", "gemma2", "gemma3_text")

# Read, for each model_type.
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_LLAMA = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", *_ROPE),
)
_WINDOWS = ("sliding_window", "layer_types")
_QWEN = ("use_sliding_window", "max_window_layers", *_WINDOWS)
_GEMMA2 = ("hidden_activation", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", *_WINDOWS)
_QWEN_EXPERTS = (  # transformers 5 writes num_local_experts, the published files have num_experts
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    *("decoder_sparse_step", "mlp_only_layers", "use_sliding_window", "sliding_window", "max_window_layers"),
)
_FIELDS = {
    "llama": (*_LLAMA, "attention_bias", "mlp_bias"),
    "mistral": (*_LLAMA, "sliding_window"),
    "qwen2": (*_LLAMA, *_QWEN),
    "qwen3": (*_LLAMA, "attention_bias", *_QWEN),
    "mixtral": (*_LLAMA, "sliding_window", "num_local_experts", "num_experts_per_tok"),
    "qwen3_moe": (*_LLAMA, "attention_bias", *_QWEN_EXPERTS),
    "gpt2": (
        *("vocab_size", "n_positions", "n_ctx", "n_embd", "n_layer", "n_head", "n_inner", "activation_function"),
        *("layer_norm_epsilon", "scale_attn_weights", "tie_word_embeddings"),
    ),
    "gpt_neox": (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
        *("max_position_embeddings", "layer_norm_eps", "tie_word_embeddings", "use_parallel_residual", "attention_bias"),
        *("rotary_pct", "rotary_emb_base", "partial_rotary_factor", *_ROPE),
    ),
    "gemma": (*_LLAMA, "hidden_activation", "attention_bias"),
    "gemma2": (*_LLAMA, "attention_bias", *_GEMMA2),
    "gemma3_text": (*_LLAMA, "attention_bias", *_GEMMA2, "rope_local_base_freq", "sliding_window_pattern"),
}
# These change no logit: names and ids, dropout, noise, losses and initialisation of training, settings of generation, caches
# and kernels.
_HARMLESS = {
    *("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map", "torch_dtype", "dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "id2label", "label2id", "num_labels"),
    *("problem_type", "is_llama_config", "pretraining_tp", "rope_interleaved", "score_offset"),
    *("attention_dropout", "hidden_dropout", "classifier_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
    *("router_aux_loss_coef", "router_jitter_noise", "output_router_logits"),
    *("initializer_range", "initializer_factor", "use_cache", "cache_implementation", "is_decoder", "chunk_size_feed_forward"),
    *("task_specific_params", "reorder_and_upcast_attn", "_attn_implementation", "attn_implementation", "output_attentions"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    *("return_dict", "output_hidden_states", "transformers.js_config", "_sliding_window_pattern", "gradient_checkpointing"),
    *("temperature", "top_p", "top_k", "do_sample", "max_length", "model_name", "unsloth_fixed", "unsloth_version"),
}
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
PLAIN = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_exact"}


def config_from_hf(values: dict[str, Any]) -> TransformerConfig:
    """Our configuration of a checkpoint's `config.json`; rope parameters flat, as transformers 4 wrote them, or nested.

    Raises:
        ValueError: an architecture, a field or a value that is not supported, with those that are; or a field is missing.
    """
    kind = values.get("model_type")
    if kind not in CLASSES:
        raise ValueError(f"config.json: model_type='{kind}' is not supported: choose one of {', '.join(CLASSES)}")
    known = {*_FIELDS[kind], *_HARMLESS}
    unknown = {name: value for name, value in values.items() if name not in known and value not in (None, False)}
    if unknown:
        named = ", ".join(f"{name}={value!r}" for name, value in sorted(unknown.items()))
        raise ValueError(
            f"config.json: {named} is not supported for model_type='{kind}': it may hold {', '.join(sorted(_FIELDS[kind]))}"
        )
    if kind == "gpt2":
        return _from_gpt2(values)
    return _from_gpt_neox(values) if kind == "gpt_neox" else _from_llama(kind, values)


def _from_llama(kind: str, values: dict[str, Any]) -> TransformerConfig:
    gemma, heads, layers = kind in GEMMA, _need(values, "num_attention_heads"), _need(values, "num_hidden_layers")
    width, bias = _need(values, "hidden_size"), bool(values.get("attention_bias"))
    activation = values.get("hidden_activation") or values.get("hidden_act") or "silu"
    if gemma and activation == "gelu":  # what the first files of Gemma say; it was trained with the tanh form
        activation = "gelu_pytorch_tanh"
    config = TransformerConfig(
        vocab_size=_need(values, "vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_width=values.get("head_dim") or {"qwen3": 128}.get(kind, 256 if gemma else width // heads),
        mlp_width=_need(values, "moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"),
        max_length=_need(values, "max_position_embeddings"),
        norm_epsilon=values.get("rms_norm_eps", 1e-5 if kind == "mixtral" else 1e-6),
        mlp=_choice("hidden_act", activation, GATED),
        tied_head=values.get("tie_word_embeddings", gemma),
        qkv_bias=bias or kind == "qwen2",
        output_bias=bias,
        mlp_bias=bool(values.get("mlp_bias")),
        qk_norm=kind in ("qwen3", "qwen3_moe", "gemma3_text"),
        windows=_windows(kind, values, layers),
        **_experts(kind, values),
        **_rope_of(kind, values),
    )
    if not gemma:
        return config
    config = dataclasses.replace(config, norm_plus_one=True, embed_scale=width**0.5)
    if kind == "gemma":
        return config
    return dataclasses.replace(
        config,
        post_norms=True,
        attention_scale=values.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_cap=values.get("attn_logit_softcapping", 50.0 if kind == "gemma2" else None),
        logit_cap=values.get("final_logit_softcapping", 30.0 if kind == "gemma2" else None),
    )


def _experts(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """Our settings of a mixture of experts."""
    if kind not in ("mixtral", "qwen3_moe"):
        return {}
    for name, only in (("mlp_only_layers", []), ("decoder_sparse_step", 1)) * (kind == "qwen3_moe"):
        if (value := values.get(name)) not in (None, only):
            raise ValueError(f"config.json: {name}={value} is not supported: every layer must have experts ({name}={only})")
    named = "num_experts" if values.get("num_experts") is not None else "num_local_experts"
    return {
        "experts": _need(values, named),
        "experts_per_token": _need(values, "num_experts_per_tok"),
        "renormalise_experts": kind == "mixtral" or bool(values.get("norm_topk_prob")),
    }


def _from_gpt2(values: dict[str, Any]) -> TransformerConfig:
    width, heads = _need(values, "n_embd"), _need(values, "n_head")
    return TransformerConfig(
        vocab_size=_need(values, "vocab_size"),
        width=width,
        layers=_need(values, "n_layer"),
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        mlp_width=values.get("n_inner") or 4 * width,
        max_length=_need(values, "n_positions"),
        norm="layer",
        norm_epsilon=values.get("layer_norm_epsilon", 1e-5),
        positions="learned",
        mlp=_choice("activation_function", values.get("activation_function", "gelu_new"), PLAIN),
        tied_head=values.get("tie_word_embeddings", True),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        attention_scale=None if values.get("scale_attn_weights", True) else 1.0,
    )


def _from_gpt_neox(values: dict[str, Any]) -> TransformerConfig:
    width, heads = _need(values, "hidden_size"), _need(values, "num_attention_heads")
    bias = values.get("attention_bias", True)
    return TransformerConfig(
        vocab_size=_need(values, "vocab_size"),
        width=width,
        layers=_need(values, "num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_width=width // heads,
        mlp_width=_need(values, "intermediate_size"),
        max_length=_need(values, "max_position_embeddings"),
        norm="layer",
        norm_epsilon=values.get("layer_norm_eps", 1e-5),
        mlp=_choice("hidden_act", values.get("hidden_act", "gelu"), PLAIN),
        tied_head=values.get("tie_word_embeddings", False),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        parallel=values.get("use_parallel_residual", True),
        **_rope_of("gpt_neox", values),
    )


def _need(values: dict[str, Any], name: str) -> Any:
    if values.get(name) is None:
        raise ValueError(f"config.json: {name} is missing: add it")
    return values[name]


def _choice(field: str, value: str, choices: dict[str, str]) -> Any:
    if value not in choices:
        raise ValueError(f"config.json: {field}='{value}' is not supported: choose one of {', '.join(choices)}")
    return choices[value]


def _windows(kind: str, values: dict[str, Any], layers: int) -> tuple[int, ...]:
    """The window of each layer; empty where no layer has one."""
    window = values.get("sliding_window")
    if not window or (kind.startswith("qwen") and not values.get("use_sliding_window")):
        return ()
    types = values.get("layer_types")
    if kind == "qwen3_moe" and values.get("max_window_layers"):  # releases of transformers differ in which layers these are
        raise ValueError(
            f"config.json: max_window_layers={values['max_window_layers']} is not supported with use_sliding_window=True for "
            "model_type='qwen3_moe': it must be 0, a window in every layer"
        )
    if types is None:
        every = {"mistral": 0, "gemma2": 2, "gemma3_text": values.get("sliding_window_pattern", 6)}
        first = values.get("max_window_layers", 28) if kind in ("qwen2", "qwen3") else 0
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
        if every.get(kind):
            types = ["sliding_attention" if (i + 1) % every[kind] else "full_attention" for i in range(layers)]
    if len(types) != layers or not {*types} <= {"sliding_attention", "full_attention"}:
        raise ValueError(
            f"config.json: layer_types={types} must name {layers} layers, each sliding_attention or full_attention"
        )
    windows = tuple(window if each == "sliding_attention" else 0 for each in types)
    return windows if any(windows) else ()


def _rope_of(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """Our settings of rotary positions, from the flat fields of transformers 4 or the nested ones of transformers 5."""
    given = values.get("rope_parameters") or {}
    theta = {"gemma3_text": 1e6, "mixtral": 1e6}.get(kind, values.get("rotary_emb_base", 1e4))
    flat = {"rope_theta": values.get("rope_theta") or theta, **(values.get("rope_scaling") or {})}
    whole = flat | (given.get("full_attention") or {} if "full_attention" in given else given)
    if kind == "gpt_neox":
        partial = whole.pop("partial_rotary_factor", values.get("partial_rotary_factor", values.get("rotary_pct", 0.25)))
        head = values["hidden_size"] // values["num_attention_heads"]
        width = int(head * partial)
        return _rope(whole) | {"rotary_width": None if width == head else width}
    settings = _rope(whole)
    if kind == "gemma3_text":
        local = {"rope_theta": values.get("rope_local_base_freq", 1e4)} | given.get("sliding_attention", {})
        settings["rope_local_theta"] = _rope(local)["rope_theta"]
        if "rope_scaling" in _rope(local):
            raise ValueError(f"config.json: rope parameters {local} of sliding_attention must have rope_type='default'")
    return settings


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    names = {"factor": "rope_factor", "low_freq_factor": "rope_low", "high_freq_factor": "rope_high"}
    names["original_max_position_embeddings"] = "rope_original_length"
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    read = {"default": (), "linear": ("factor",), "llama3": tuple(names)}
    if kind not in read:
        raise ValueError(f"config.json: rope_type='{kind}' is not supported: choose one of {', '.join(read)}")
    if unknown := parameters.keys() - {"rope_theta", "rope_type", "type", *names}:
        raise ValueError(f"config.json: rope parameters {sorted(unknown)} are not supported: choose from {', '.join(names)}")
    settings: dict[str, Any] = {"rope_theta": float(parameters["rope_theta"])}
    if kind != "default":
        settings["rope_scaling"] = kind
    return settings | {names[name]: _need(parameters, name) for name in read[kind]}
