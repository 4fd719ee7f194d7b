"""Goldens of Hugging Face transformers, and the proof that it loads what we write.

    export PYTHONPATH=tests
    python tests/golden/make_hf.py make [NAME ...]         # writes hf.json and hf.npz beside this file, or in them these alone
    python tests/golden/make_hf.py of CHECKPOINT G.npz     # logits or scores of any checkpoint, for experiments/import_hf.py;
                                                           # a folder, or a .gguf file (needs accelerate and gguf as well)
    python tests/golden/make_hf.py check FOLDER            # every checkpoint below FOLDER that experiments/export_hf.py wrote

Needs torch, which the library does not: run in an environment with torch 2.13.0, transformers 5.23.0 and safetensors. `check`
reads `ours.npz` (tokens, and our logits or scores as outputs) from each checkpoint and prints the greatest difference as JSON.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers
from hf_weights import tokens, weights
from safetensors import safe_open
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).resolve().parent
V = 96
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NEOX = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **IDS,
}
LLAMA = NEOX | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **IDS}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
SMALL = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48, "tie_word_embeddings": True}
EXPERTS = {"num_experts_per_tok": 2, "mlp_only_layers": [], "moe_intermediate_size": 24, "intermediate_size": 40}
GEMMA = LLAMA | {"head_dim": 16, "num_key_value_heads": 1}
CASES = {
    "llama2": ("llama", LLAMA | {"num_key_value_heads": 4}),
    "llama3": ("llama", LLAMA | {"rope_parameters": LLAMA3_ROPE, "head_dim": 12}),
    "llama_linear": ("llama", LLAMA | {"rope_parameters": LINEAR_ROPE, "attention_bias": True, "mlp_bias": True}),
    "smollm2": ("llama", LLAMA | SMALL),
    "mistral": ("mistral", LLAMA | {"sliding_window": 5}),
    "qwen2": ("qwen2", LLAMA | {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2_windows": ("qwen2", LLAMA | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 12}),
    "mixtral": ("mixtral", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}),
    "qwen3_moe": ("qwen3_moe", LLAMA | EXPERTS | {"num_experts": 6, "head_dim": 12, "norm_topk_prob": True}),
    # Weights as they are in the softmax over all, and 3 of 5.
    "qwen3_moe_plain": ("qwen3_moe", LLAMA | EXPERTS | {"num_experts": 5, "num_experts_per_tok": 3}),
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", NEOX | {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 100.0}}),
    "gpt_neox_serial": ("gpt_neox", NEOX | {"use_parallel_residual": False, "rope_parameters": {"partial_rotary_factor": 1.0}}),
    "gemma": ("gemma", GEMMA),
    "gemma2": (
        "gemma2",
        GEMMA
        | {"sliding_window": 5, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0},
    ),
    "gemma3": (
        "gemma3_text",
        GEMMA
        | {
            "num_hidden_layers": 3,
            "sliding_window": 5,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}


def filled(auto: type, kind: str, values: dict) -> tuple[torch.nn.Module, dict, dict[str, list[int]]]:
    """A model with the formula's weights; its config.json and the shapes of the tensors that transformers writes."""
    config = transformers.AutoConfig.for_model(kind, **values)
    model = auto.from_config(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = pathlib.Path(folder) / "model.safetensors"
        written = json.loads((pathlib.Path(folder) / "config.json").read_text())
        with safe_open(file, "numpy") as opened:
            shapes = {name: list(opened.get_slice(name).get_shape()) for name in sorted(opened.keys())}
        save_file(weights(shapes), file, {"format": "pt"})
        model = loaded(auto, folder)
    return model, written, shapes


def loaded(auto: type, folder: pathlib.Path | str) -> torch.nn.Module:
    """A checkpoint, every tensor of which is used, with none missing."""
    path = pathlib.Path(folder)
    place = {"pretrained_model_name_or_path": path}
    if path.suffix == ".gguf":
        place = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model, info = auto.from_pretrained(**place, attn_implementation="eager", output_loading_info=True, dtype=torch.float32)
    assert not info["unexpected_keys"], info
    assert not info["missing_keys"], info
    return model.eval()


def make(*names: str) -> None:
    told, arrays = {}, {}
    if names:
        told, arrays = json.loads((HERE / "hf.json").read_text()), dict(np.load(HERE / "hf.npz"))
    rows = torch.from_numpy(tokens(V))
    for name in names or CASES:
        kind, values = CASES[name]
        model, config, shapes = filled(transformers.AutoModelForCausalLM, kind, values)
        logits = model(rows).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, V), rows[:, 1:].reshape(-1))
        loss.backward()
        norm = torch.sqrt(sum(p.grad.double().square().sum() for p in model.parameters()))
        reward, reward_config, reward_shapes = filled(
            transformers.AutoModelForSequenceClassification, kind, values | {"num_labels": 1}
        )
        with torch.no_grad():
            scores = reward(rows).logits[:, 0]
        told[name] = {"config": config, "shapes": shapes, "reward_config": reward_config, "reward_shapes": reward_shapes}
        arrays |= {f"{name}/logits": logits.detach().numpy(), f"{name}/scores": scores.numpy()}
        arrays[f"{name}/gradient_norm"] = np.float64(norm.item())
        print(name, f"largest logit {logits.abs().max():.2f}, gradient norm {norm:.3f}, scores {scores.tolist()}")
    (HERE / "hf.json").write_text(json.dumps({name: told[name] for name in CASES}, indent=1) + "\n")
    np.savez_compressed(HERE / "hf.npz", **arrays)


def kind(folder: pathlib.Path | str) -> tuple[type, str]:
    """The class that loads a checkpoint, and whether it gives logits or scores."""
    if pathlib.Path(folder).suffix == ".gguf":
        return transformers.AutoModelForCausalLM, "logits"
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    if config["architectures"][0].endswith("ForSequenceClassification"):
        return transformers.AutoModelForSequenceClassification, "scores"
    return transformers.AutoModelForCausalLM, "logits"


def outputs(model: torch.nn.Module, rows: np.ndarray, what: str) -> np.ndarray:
    with torch.no_grad():
        found = model(torch.from_numpy(rows)).logits.numpy()
    return found[:, 0] + getattr(model.config, "score_offset", 0.0) if what == "scores" else found


def of(folder: str, target: str) -> None:
    auto, what = kind(folder)
    model = loaded(auto, folder)
    rows = np.random.default_rng(0).integers(0, model.config.vocab_size - 1, (2, 32))
    rows += rows >= (model.config.vocab_size if model.config.pad_token_id is None else model.config.pad_token_id)  # never pad
    np.savez(target, tokens=rows, **{what: outputs(model, rows, what)})


def check(folder: str) -> None:
    figures = {}
    for file in sorted(pathlib.Path(folder).rglob("ours.npz")):
        ours = np.load(file)
        auto, what = kind(file.parent)
        model = loaded(auto, file.parent)
        theirs = outputs(model, ours["tokens"], what)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent)
        figures[file.parent.name] = {
            "class": type(model).__name__,
            "largest": float(np.abs(theirs).max()),
            "greatest_difference": float(np.abs(theirs - ours["outputs"]).max()),
            "special_ids": [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id],
            "chat_template": tokenizer.chat_template is not None,
        }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"versions": versions, "checkpoints": figures}, indent=1))


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    {"make": make, "of": of, "check": check}[sys.argv[1]](*sys.argv[2:])
