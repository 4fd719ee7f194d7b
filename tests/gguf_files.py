"""GGUF files as llama.cpp's converter would write them of the checkpoints behind `hf.json`, by the package's own writer."""

from __future__ import annotations

import json
import pathlib
import types
from collections.abc import Mapping
from typing import Any

import gguf
import hf_weights
import numpy as np
import tokenizers as library
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).resolve().parent

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def name(tensor: str) -> str:
    """llama.cpp's name of a tensor of transformers."""
    start, _, end = tensor.rpartition(".")
    if start in NAMES:
        return f"{NAMES[start]}.{end}"
    _, _, layer, rest = start.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{end}"


def turned(tensor: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows in a query or key of the architecture llama: pairs side by side."""
    height = len(tensor)
    rows = [h * height // heads + half * height // heads // 2 + i
            for h in range(heads) for i in range(height // heads // 2) for half in (0, 1)]  # fmt: skip
    return tensor[rows]


def stored(values: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors by llama.cpp's names and in its order."""
    found = {}
    for tensor, array in tensors.items():
        heads = {"q_proj": values["num_attention_heads"], "k_proj": values.get("num_key_value_heads")}
        own = next((n for part, n in heads.items() if part in tensor), None)
        found[name(tensor)] = turned(array, own) if own and values["model_type"] in ("llama", "mistral") else array
    return found


def metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a `config.json` under llama.cpp's names."""
    rope = values["rope_parameters"]
    head = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    given = {
        "block_count": values["num_hidden_layers"],
        "context_length": values["max_position_embeddings"],
        "embedding_length": values["hidden_size"],
        "feed_forward_length": values["intermediate_size"],
        "attention.head_count": values["num_attention_heads"],
        "attention.head_count_kv": values["num_key_value_heads"],
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(values["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": values["vocab_size"],
    }
    if rope["rope_type"] == "linear":
        given |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return given


def write(
    file: pathlib.Path,
    kind: str,
    settings: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    quantised: Mapping[str, gguf.GGMLQuantizationType] = types.MappingProxyType({}),
) -> pathlib.Path:
    """A file of these settings, those of the architecture without its name before them, and tensors; the quantised ones
    are given as bytes."""
    writer = gguf.GGUFWriter(file, kind)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    for key, value in settings.items():
        add[type(value)](key if key.startswith(("tokenizer.", "general.", "split.")) else f"{kind}.{key}", value)
    for key, array in tensors.items():
        writer.add_tensor(key, array, raw_dtype=quantised.get(key))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tiny(file: pathlib.Path) -> tuple[pathlib.Path, int]:
    """A file with a model of random weights and a tokenizer; and how many numbers its weights are."""
    case, own = json.loads((HERE / "golden" / "hf.json").read_text())["smollm2"], tokenizer_metadata("smollm")
    ids = len(own["tokenizer.ggml.tokens"])
    shapes = {name: [ids if size == 96 else size for size in shape] for name, shape in case["shapes"].items()}
    values, tensors = case["config"] | {"vocab_size": ids, "max_position_embeddings": 128}, hf_weights.weights(shapes)
    write(file, "llama", metadata(values) | own, stored(values, tensors))
    return file, sum(array.size for array in tensors.values())


# ----------------------------------------------------------------------------------------------------------- tokenizers

TEXTS = [
    "the film is good, isn't it?",
    "a  bad film of 1999,   2.5 stars\n\n\tand  12 more",
    "def f(x):\n    return x ** 2  # a square",
    "naïve café, 你好 ½ ٣ 🎉",
    "<|im_start|>user is text",
    "  ",
    "",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"  # noqa: E501
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTTING = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def theirs(pre: str) -> library.Tokenizer:
    """A tokenizer trained on `TEXTS`, which are cut in this way."""
    made = library.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence(CUTTING[pre]), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL[:3],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    made.add_tokens([library.AddedToken("<think>", normalized=False)])
    return made


def tokenizer_metadata(pre: str) -> dict[str, Any]:
    """The same as a GGUF file has it."""
    made = theirs(pre)
    model = json.loads(made.to_str())["model"]
    tokens = [made.id_to_token(i) for i in range(made.get_vocab_size())]
    kinds = {**dict.fromkeys(SPECIAL[:3], 3), "<think>": 4}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }
