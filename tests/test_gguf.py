"""GGUF files that the test writes: the same parameters as from safetensors, part by part, and what is refused."""

from __future__ import annotations

import json
import math
import pathlib
import sys

import gguf as library
import gguf_files
import hf_weights
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import save_file

from jaxrlhf.core import sharding
from jaxrlhf.models import gguf, hf, transformer

HERE = pathlib.Path(__file__).resolve().parent
CASES = json.loads((HERE / "golden" / "hf.json").read_text())
GOLDEN = np.load(HERE / "golden" / "hf.npz")
ONE = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
EIGHT = sharding.MeshConfig(1, 2, 4)
NAMES = ("llama2", "llama_linear", "smollm2", "qwen2", "qwen3")
# Wide enough for blocks of 256, in heads of 64: four to a query, two to a key.
WIDE = CASES["llama2"]["config"] | {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 2, "head_dim": 64}
WIDE_SHAPES = {
    "model.embed_tokens.weight": (96, 256),
    "model.norm.weight": (256,),
    "lm_head.weight": (96, 256),
} | {
    f"model.layers.{i}.{name}.weight": shape
    for i in range(2)
    for name, shape in {
        "self_attn.q_proj": (256, 256),
        "self_attn.k_proj": (128, 256),
        "self_attn.v_proj": (128, 256),
        "self_attn.o_proj": (256, 256),
        "mlp.gate_proj": (512, 256),
        "mlp.up_proj": (512, 256),
        "mlp.down_proj": (256, 512),
        "input_layernorm": (256,),
        "post_attention_layernorm": (256,),
    }.items()
}


def written(file: pathlib.Path, name: str) -> pathlib.Path:
    """A golden checkpoint as a GGUF file in float32."""
    values, tensors = CASES[name]["config"], hf_weights.weights(CASES[name]["shapes"])
    return gguf_files.write(file, values["model_type"], gguf_files.metadata(values), gguf_files.stored(values, tensors))


def loaded(file: pathlib.Path, mesh=ONE):
    return gguf.load(gguf.open_file(file), mesh)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_are_those_of_the_checkpoint(name, tmp_path):
    """And so the logits of transformers, which tests/test_hf.py compares; once more here, for the whole route."""
    (tmp_path / "config.json").write_text(json.dumps(CASES[name]["config"]))
    save_file(hf_weights.weights(CASES[name]["shapes"]), tmp_path / "model.safetensors")
    params, config = loaded(written(tmp_path / "model.gguf", name))
    expected, their_config = hf.load(tmp_path, ONE)
    assert config == their_config
    assert_equal(params, expected)
    model, rows = transformer.build(config), jax.numpy.asarray(hf_weights.tokens(96), np.int32)
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda p: model.logits(p, model.hidden(p, rows)))(params)
    golden = GOLDEN[f"{name}/logits"]
    np.testing.assert_allclose(logits, golden, atol=2e-6 * max(5.0, np.abs(golden).max()))  # as in test_hf.py


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q5_0, Kind.Q4_0, Kind.Q4_1, Kind.Q6_K, Kind.Q4_K])
def test_quantised_weights_are_what_the_package_makes_of_them(kind, tmp_path):
    """Whole and in eight parts, some of which begin within a block."""
    own = gguf_files.stored(WIDE, hf_weights.weights(WIDE_SHAPES))
    matrices = [name for name, array in own.items() if array.ndim == 2]
    raw = own | {name: quantised(own[name], kind) for name in matrices}
    file = gguf_files.write(tmp_path / "model.gguf", "llama", gguf_files.metadata(WIDE), raw, dict.fromkeys(matrices, kind))
    back = own | {name: library.dequantize(raw[name], kind) for name in matrices}
    (tmp_path / "config.json").write_text(json.dumps(WIDE))
    save_file({name: unturned(name, back[gguf_files.name(name)]) for name in WIDE_SHAPES}, tmp_path / "model.safetensors")
    expected, their_config = hf.load(tmp_path, ONE)
    params, config = loaded(file)
    assert config == their_config
    assert_equal(params, expected)
    mesh = sharding.make_mesh(EIGHT)
    parts, _ = loaded(file, mesh)
    assert jax.tree.map(lambda x: x.sharding, parts) == sharding.shardings(transformer.param_specs(config), mesh)
    assert_equal(parts, expected)


def quantised(array: np.ndarray, kind: Kind) -> np.ndarray:
    """The rows in blocks; of a kind that the package only reads, blocks of random bytes without NaN among their scales."""
    try:
        return library.quantize(array, kind)
    except NotImplementedError:
        block, size = library.GGML_QUANT_SIZES[kind]
        return np.random.default_rng(0).integers(0, 64, (len(array), array.shape[1] // block * size), np.uint8)


def unturned(name: str, array: np.ndarray) -> np.ndarray:
    """The rows of a query or key in the order of transformers."""
    heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
    if not heads:
        return np.ascontiguousarray(array, np.float32)
    back = np.empty_like(array)
    back[gguf_files.turned(np.arange(len(array)), heads)] = array
    return back


def test_each_device_reads_its_own_part_only(tmp_path, monkeypatch):
    read, sizes = np.fromfile, []

    def counted(*arguments, **named):
        sizes.append(read(*arguments, **named).nbytes)
        return read(*arguments, **named)

    monkeypatch.setattr(np, "fromfile", counted)
    loaded(written(tmp_path / "model.gguf", "llama2"), sharding.make_mesh(EIGHT))
    # Rows are read whole and cut to the columns of the device: the embedding [96, 32] by four devices along its rows.
    assert max(sizes) == 4 * 96 * 32 // 4


def stretches(theta: float, factor: float, width: int) -> np.ndarray:
    """As llama.cpp's converter writes them; Source: `LlamaModel.generate_extra_tensors`."""
    found = []
    for i in range(width // 2):
        wave = 2 * math.pi * theta ** (2 * i / width)
        if wave < 8192 / 4:
            found.append(1.0)
        elif wave > 8192:
            found.append(factor)
        else:
            smooth = (8192 / wave - 1) / 3
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_the_stretching_of_llama_3_is_recognised(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    values = WIDE | {"rope_parameters": rope | {"original_max_position_embeddings": 8192}}
    tensors = gguf_files.stored(values, hf_weights.weights(WIDE_SHAPES))
    factors = stretches(5e5, 32.0, 64)
    assert 1 < len({*factors.tolist()}) > 4  # between the two ends there are some
    file = gguf_files.write(tmp_path / "a.gguf", "llama", gguf_files.metadata(values), tensors | {"rope_freqs.weight": factors})
    _, config = loaded(file)
    assert config == hf.config_from_hf(values)
    wrong = tensors | {"rope_freqs.weight": factors**0.9}
    file = gguf_files.write(tmp_path / "b.gguf", "llama", gguf_files.metadata(values), wrong)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is not Llama 3's for an original length of 8192"):
        loaded(file)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("mamba", {}, "general.architecture='mamba' is not supported: choose one of llama, qwen2, qwen3"),
        ("llama", {"expert_count": 8}, "llama.expert_count=8 is not supported"),
        ("qwen2", {"attention.sliding_window": 5}, "qwen2.attention.sliding_window=5 is not supported"),
        ("llama", {"attention.head_count_kv": [2, 4]}, "a list of attention.head_count_kv: all layers must be alike"),
        ("llama", {"rope.scaling.type": "yarn"}, r"llama.rope.scaling.type='yarn' .* choose one of none, linear"),
        ("llama", {"rope.dimension_count": 4}, "llama.rope.dimension_count=4 .* must be the head width 8"),
        ("llama", {"attention.causal": False}, "attention.causal=False is not supported"),
        ("llama", {"block_count": 3}, r"tensor blk.2.attn_norm.weight of shape \(32,\) is missing: its metadata asks"),
        ("llama", {"block_count": 1}, r"tensor blk.1.\S+ of shape .* is not one that its metadata asks for"),
        ("llama", {"feed_forward_length": 64}, r"ffn_down.weight has shape \(32, 48\), but its metadata asks for \(32, 64\)"),
        ("llama", {"split.count": 3}, "is one of 3 parts: merge them"),
    ],
)
def test_what_is_not_supported_is_said(kind, change, message, tmp_path):
    values, tensors = CASES["llama2"]["config"], hf_weights.weights(CASES["llama2"]["shapes"])
    settings = gguf_files.metadata(values) | change
    file = gguf_files.write(tmp_path / "model.gguf", kind, settings, gguf_files.stored(values, tensors))
    with pytest.raises(ValueError, match=message):
        loaded(file)


def test_settings_that_say_that_there_is_none_are_read_over(tmp_path):
    values, tensors = CASES["llama2"]["config"], hf_weights.weights(CASES["llama2"]["shapes"])
    settings = gguf_files.metadata(values) | {"expert_count": 0, "attention.causal": True, "rope.dimension_count": 8}
    _, config = loaded(gguf_files.write(tmp_path / "model.gguf", "llama", settings, gguf_files.stored(values, tensors)))
    assert config == hf.config_from_hf(values)


def test_a_damaged_file_is_refused(tmp_path):
    file = written(tmp_path / "model.gguf", "llama2")
    whole = file.read_bytes()
    for length in (0, 3, 20, 200, 900, len(whole) // 2, len(whole) - 100):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model.gguf: damaged, not a GGUF file, or of a kind that gguf .* does not know"):
            gguf.open_file(file)
    file.write_bytes(b"PK" + whole[2:])
    with pytest.raises(ValueError, match="not a GGUF file"):
        gguf.open_file(file)
    with pytest.raises(FileNotFoundError, match="no such file; give a GGUF file"):
        gguf.open_file(tmp_path / "other.gguf")


def test_a_quantisation_that_cannot_be_read_is_named(tmp_path):
    settings = gguf_files.metadata(CASES["llama2"]["config"])
    array = np.zeros((2, 32), np.int8)
    file = gguf_files.write(tmp_path / "model.gguf", "llama", settings, {"output.weight": array})
    with pytest.raises(ValueError, match=r"tensor output.weight is quantised as I8, which gguf .* cannot read"):
        gguf.open_file(file)
    at = file.read_bytes().index(b"output.weight") + len("output.weight") + 4 + 2 * 8
    raw = bytearray(file.read_bytes())
    assert raw[at : at + 4] == (24).to_bytes(4, "little")  # I8
    raw[at : at + 4] = (250).to_bytes(4, "little")
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"of a kind that gguf .* does not know \(.*250.* is not a valid"):
        gguf.open_file(file)


def test_an_absent_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxrlhf\[gguf\]'"):
        gguf.open_file(tmp_path / "model.gguf")
