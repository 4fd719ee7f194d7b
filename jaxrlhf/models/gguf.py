"""GGUF files, as llama.cpp has them, read without torch by the package `gguf` (extra `gguf`).

Quantised weights become numbers part by part, as each device holds them: beside the parameters, the host holds at most one
device's part of one of our leaves. The tokenizer in the same file: `data/gguf_tokenizer.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxrlhf.models import hf, hf_layout, rotary
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.hf_config import config_from_hf
from jaxrlhf.models.hf_files import Stored

SUFFIX = ".gguf"
ROPE_FREQS = "rope_freqs.weight"  # what the wavelengths of Llama 3.1 and later are stretched by, [head_width / 2]

# general.architecture: the model_type of transformers, which here has the same name. Mistral's files say llama.
ARCHITECTURES = ("llama", "qwen2", "qwen3")

# What a tensor is called by transformers and by llama.cpp (its `gguf/tensor_mapping.py`).
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.{}": "blk.{}",
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
# Of the settings below `ARCHITECTURE.`: the field of `config.json` that each is.
_FIELDS = {
    "vocab_size": "vocab_size",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
# These are read too, or say what is so in any case.
_CHECKED = ("attention.value_length", "attention.causal", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor")
_HARMLESS = ("rope.scaling.finetuned", "rope.scaling.original_context_length", "tensor_data_layout")


@dataclasses.dataclass(frozen=True)
class File:
    """An opened GGUF file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]  # by llama.cpp's names and in its order of rows, shapes [out, in]


def open_file(path: Path | str) -> File:
    """Metadata and tensors of a file; no weight is read yet.

    Raises:
        FileNotFoundError: there is none.
        ImportError: the extra `gguf` is not installed.
        ValueError: it is damaged, one of several parts, or holds a quantisation that cannot be read.
    """
    try:
        import gguf
    except ImportError:
        raise ImportError("GGUF files need the package gguf: pip install 'jaxrlhf[gguf]'") from None
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a GGUF file")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    # What its reader runs into when numbers in the file make no sense; it checks few of them.
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path}: damaged, not a GGUF file, or of a kind that gguf {_version()} does not know ({error}); download it again"
        ) from error
    if reader.byte_order != "I":
        raise ValueError(f"{path}: has the other byte order than this machine: convert it with gguf-convert-endian")
    if (parts := metadata.get("split.count", 1)) > 1:
        raise ValueError(f"{path}: is one of {parts} parts: merge them with llama.cpp's gguf-split --merge")
    _check_kinds(path, reader.tensors)
    tensors = {}
    for found in reader.tensors:
        shape = tuple(reversed(found.shape.tolist()))
        tensors[found.name] = Stored(path, shape, functools.partial(_read, path, found.data_offset, found.tensor_type, shape))
    return File(path, metadata, tensors)


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("gguf")


def _check_kinds(path: Path, tensors: list[Any]) -> None:
    """Refuse a quantisation that the package cannot undo."""
    import gguf

    for kind, name in {found.tensor_type: found.name for found in tensors}.items():
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise ValueError(
                f"{path}: tensor {name} is quantised as {kind.name}, which gguf {_version()} cannot read: take a file of "
                "another quantisation (F32, F16, BF16, Q4_0 to Q8_0, Q2_K to Q6_K)"
            ) from None


def _read(path: Path, offset: int, kind: Any, shape: tuple[int, ...], index: tuple[slice, ...] = ()) -> np.ndarray:
    """float32 of a part of a tensor [out, in] or [out]. Its rows are quantised in blocks."""
    import gguf

    # Read, not mapped: pages of a mapped file would count as the process's memory.
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = (slice(None), *(index or (slice(None),) * len(shape)))[-2:]
    height, width = (1, *shape)[-2:]
    (top, bottom, _), (left, right, _) = rows.indices(height), columns.indices(width)
    begin, end, stride = left // block, -(-right // block), width // block * size
    raw = np.fromfile(path, np.uint8, (bottom - top) * stride, offset=offset + top * stride).reshape(-1, stride)
    numbers = gguf.dequantize(np.ascontiguousarray(raw[:, begin * size : end * size]), kind)
    part = numbers[:, left - begin * block : right - begin * block]
    return part if len(shape) == 2 else part[0]


def load(file: File, mesh: Mesh, dtype: str = "float32") -> tuple[dict[str, Any], TransformerConfig]:
    """Parameters of this type on the mesh, and their configuration.

    Raises:
        ValueError: the architecture is not supported, or a tensor is missing, not expected or of another shape.
    """
    values = config_values(file)
    config = config_from_hf(values)
    trunk = [dataclasses.replace(rule, tensor=_name(rule.tensor)) for rule in hf_layout.rules(config, values["model_type"])]
    places = {name: stored for name, stored in file.tensors.items() if name != ROPE_FREQS}
    hf.check(file.path, places, hf_layout.expected(trunk, config), headless=False, asking="its metadata")
    if values["model_type"] == "llama":
        turned = (".attn_q.weight", ".attn_k.weight", ".attn_q.bias", ".attn_k.bias")
        places |= {name: _in_halves(x, config.head_width) for name, x in places.items() if name.endswith(turned)}
    return hf.place(places, trunk, config, mesh, dtype), config


def _name(tensor: str) -> str:
    """`model.layers.{}.mlp.up_proj.weight` as llama.cpp calls it."""
    whole, _, end = tensor.rpartition(".")
    if whole in _NAMES:
        return f"{_NAMES[whole]}.{end}"
    layer = "model.layers.{}"
    return f"{_NAMES[layer]}.{_NAMES[whole.removeprefix(f'{layer}.')]}.{end}"


def _in_halves(stored: Stored, head_width: int) -> Stored:
    """A tensor whose rows are in our order: of each head the first halves of all pairs that rope turns, then the second ones.

    llama.cpp keeps the rows of a pair side by side. Source: `LlamaModel.permute` of its `convert_hf_to_gguf.py`.
    """

    def read(index: tuple[slice, ...]) -> np.ndarray:
        rows, *columns = index or (slice(None),)
        top, bottom, _ = rows.indices(stored.shape[0])
        begin, end = top // head_width * head_width, -(-bottom // head_width) * head_width  # of whole heads
        pairs = stored.read((slice(begin, end), *(columns or (slice(None),) * (len(stored.shape) - 1))))
        halves = pairs.reshape(-1, head_width // 2, 2, *pairs.shape[1:]).swapaxes(1, 2).reshape(pairs.shape)
        return halves[top - begin : bottom - begin]

    return stored._replace(read=read)


# ------------------------------------------------------------------------------------------------------- configuration


def config_values(file: File) -> dict[str, Any]:
    """What `config.json` of this model would hold.

    Raises:
        ValueError: an architecture or a setting that is not supported, or a setting is missing.
    """
    kind = file.metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: general.architecture='{kind}' is not supported: choose one of {', '.join(ARCHITECTURES)} "
            "(Mistral's files are called llama)"
        )
    settings = {name.removeprefix(f"{kind}."): x for name, x in file.metadata.items() if name.startswith(f"{kind}.")}
    known = {*_FIELDS, *_CHECKED, *_HARMLESS}
    # What is 0 or false says that there is none of it: experts, windows.
    if unknown := {name: value for name, value in settings.items() if name not in known and value not in (None, False, 0)}:
        named = ", ".join(f"{kind}.{name}={value!r}" for name, value in sorted(unknown.items()))
        raise ValueError(f"{file.path}: {named} is not supported: the file may hold {', '.join(sorted({*_FIELDS, *_CHECKED}))}")
    several = {name: value for name, value in settings.items() if isinstance(value, list)}
    if several:
        raise ValueError(f"{file.path}: {kind} has a list of {', '.join(several)}: all layers must be alike")
    values = {_FIELDS[name]: _plain(value) for name, value in settings.items() if name in _FIELDS}
    return {"model_type": kind} | _from_tensors(kind, file.tensors) | values | _rope(file, kind, settings, values)


def _from_tensors(kind: str, tensors: dict[str, Stored]) -> dict[str, Any]:
    """What llama.cpp reads from which tensors there are."""
    values: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in tensors}
    if "token_embd.weight" in tensors:
        values["vocab_size"] = tensors["token_embd.weight"].shape[0]
    if kind != "qwen2":  # which has them in any case
        values["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if kind == "llama":
        values["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    return values


def _plain(value: Any) -> Any:
    """A float32 as it was written in decimals: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope(file: File, kind: str, settings: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The rope parameters; heads must be turned whole, and be as wide in values as in keys."""
    heads, width = values.get("num_attention_heads"), values.get("hidden_size")
    head_width = values.get("head_dim") or (width // heads if heads and width else None)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (found := settings.get(name, head_width)) != head_width:
            raise ValueError(f"{file.path}: {kind}.{name}={found} is not supported: it must be the head width {head_width}")
    if not settings.get("attention.causal", True):
        raise ValueError(f"{file.path}: {kind}.attention.causal=False is not supported: a policy reads from left to right")
    scaling, parameters = settings.get("rope.scaling.type", "none"), {}
    if ROPE_FREQS in file.tensors:
        parameters = _llama3(file, values | {"head_dim": head_width})
    elif scaling == "linear":
        parameters = {"rope_type": "linear", "factor": _plain(settings.get("rope.scaling.factor"))}
    elif scaling != "none":
        raise ValueError(f"{file.path}: {kind}.rope.scaling.type='{scaling}' is not supported: choose one of none, linear")
    return {"head_dim": head_width, "rope_scaling": parameters}


def _llama3(file: File, values: dict[str, Any]) -> dict[str, Any]:
    """Llama 3's stretching, of which a file keeps only the result.

    Raises:
        ValueError: it is not what the published models (3.1, 3.2, 3.3) have, with which all but the factor is the same.
    """
    found = file.tensors[ROPE_FREQS].read(())
    parameters = {
        "rope_type": "llama3",
        "factor": _plain(float(found.max())),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = config_from_hf(values | {"model_type": "llama", "rope_scaling": parameters, "vocab_size": 1})
    half = config.head_width // 2
    frequency = np.float32(config.rope_theta) ** (-np.arange(half, dtype=np.float32) / half)
    ours = frequency / np.asarray(rotary.stretched(config, frequency))
    if found.shape != ours.shape or not np.allclose(found, ours, rtol=1e-4):  # float32 powers, each made in its own way
        raise ValueError(
            f"{file.path}: {ROPE_FREQS} is not Llama 3's for an original length of 8192, factors 1 and 4, and a stretch of "
            f"{parameters['factor']}: other scalings are not supported"
        )
    return parameters
