"""Hugging Face checkpoints: logits, scores and gradients of transformers, round trips, shardings, and what is refused.

The goldens are made by tests/golden/make_hf.py; the weights behind them come from a formula that both programs know.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import hf_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf.core import sharding
from jaxrlhf.models import heads, hf, hf_config, hf_export, hf_files, hf_layout, transformer
from jaxrlhf.models.config import TransformerConfig

HERE = pathlib.Path(__file__).resolve().parent
PUBLISHED = json.loads((HERE / "golden" / "published.json").read_text())  # config.json files in short, and what they mean
CASES = json.loads((HERE / "golden" / "hf.json").read_text())
GOLDEN = np.load(HERE / "golden" / "hf.npz")
ROWS = hf_weights.tokens(96).astype(np.int32)
ALL = pytest.mark.parametrize("name", CASES)
ONE = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
EIGHT = sharding.MeshConfig(1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Ids:
    """As much of a tokenizer as a checkpoint of 96 ids needs."""

    vocab_size: int = 96
    pad: int = 0
    bos: int = 1
    eos: int = 2

    def save(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def checkpoint(folder: pathlib.Path, name: str, kind: str = "") -> pathlib.Path:
    """What transformers writes of a model with the formula's weights; `kind`: "" or "reward_"."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CASES[name][f"{kind}config"]))
    save_file(hf_weights.weights(CASES[name][f"{kind}shapes"]), folder / "model.safetensors")
    return folder


def few(*names: str) -> list:
    """These in plain pytest; the rest, which take the same code with other numbers, in the full tier."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.full) for name in CASES]


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(ours, golden):
    # 1e-5 where the largest is below 5: float32 sums of some 50 numbers in another order, through two or three layers.
    np.testing.assert_allclose(ours, golden, atol=2e-6 * max(5.0, np.abs(golden).max()))


@ALL
def test_logits_and_scores_equal_those_of_transformers(name, tmp_path):
    params, config = hf.load(checkpoint(tmp_path / "policy", name), ONE)
    model = transformer.build(config)

    @jax.jit
    def run(params, head):
        hidden = model.hidden(params, jnp.asarray(ROWS))
        return model.logits(params, hidden), heads.score(head, hidden, jnp.asarray([14, 14]))

    reward, reward_config = hf.load(checkpoint(tmp_path / "reward", name, "reward_"), ONE)
    with jax.default_matmul_precision("highest"):
        logits, score = run(params, reward["head"])
    assert_close(logits, GOLDEN[f"{name}/logits"])
    assert_close(reward["gain"] * score + reward["bias"], GOLDEN[f"{name}/scores"])
    assert reward_config == config  # and the same trunk
    for leaf in reward["trunk"].keys() - {"head"}:
        assert_equal(reward["trunk"][leaf], params[leaf])


@pytest.mark.parametrize("name", few("gpt_neox", "gemma2", "qwen3_moe"))
def test_the_gradient_has_the_norm_of_that_of_transformers(name, tmp_path):
    params, config = hf.load(checkpoint(tmp_path, name), ONE)
    model, rows = transformer.build(config), jnp.asarray(ROWS)

    def loss(params):
        logits = model.logits(params, model.hidden(params, rows))
        return -heads.logprobs_and_entropy(logits[:, :-1], rows[:, 1:])[0].mean()

    with jax.default_matmul_precision("highest"):
        slope = jax.jit(jax.grad(loss))(params)
    norm = np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in jax.tree.leaves(jax.device_get(slope))))
    np.testing.assert_allclose(norm, GOLDEN[f"{name}/gradient_norm"], rtol=1e-5)  # ten times what float32 sums leave


@pytest.mark.parametrize("name", few("llama3", "mistral", "mixtral", "gpt2", "gpt_neox", "gemma2", "gemma3"))
def test_cached_logits_equal_those_of_transformers(name, tmp_path):
    params, config = hf.load(checkpoint(tmp_path, name), ONE)
    model = transformer.build(config)
    length = np.array([6, 3])
    responses = np.stack([ROWS[i, p : p + 8] for i, p in enumerate(length)])

    @jax.jit
    def run(params):
        weights = model.decode_params(params)
        first, cache = model.prefill(weights, jnp.asarray(ROWS[:, :6]), jnp.asarray(length), 1, 8)

        def step(cache, xs):
            state, cache = model.decode(weights, cache, *xs)
            return cache, state

        _, states = jax.lax.scan(step, cache, (jnp.asarray(responses.T), jnp.arange(8)))
        return model.logits(weights, jnp.concatenate([first[None], states])).swapaxes(0, 1)

    with jax.default_matmul_precision("highest"):
        logits = run(params)
    assert_close(logits, np.stack([GOLDEN[f"{name}/logits"][i, p - 1 : p + 8] for i, p in enumerate(length)]))


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "mixtral"])
def test_packed_texts_equal_those_of_transformers_alone(name, tmp_path):
    """Windows, two rope bases and learned positions begin anew with each text."""
    params, config = hf.load(checkpoint(tmp_path, name), ONE)
    model = transformer.build(config)
    row = jnp.asarray(np.concatenate([ROWS[0, :9], ROWS[1, :11]]))[None]
    segments = jnp.asarray(np.repeat([1, 2], [9, 11]))[None]
    logits = jax.jit(lambda p: model.logits(p, model.hidden(p, row, segments)))(params)
    golden = GOLDEN[f"{name}/logits"]
    assert_close(logits[0], np.concatenate([golden[0, :9], golden[1, :11]]))


# ---------------------------------------------------------------------------------------------------- and back


@ALL
def test_a_checkpoint_comes_back_bit_for_bit(name, tmp_path):
    for kind in ("", "reward_"):
        params, config = hf.load(checkpoint(tmp_path / f"{kind}in", name, kind), ONE)
        hf.save(tmp_path / f"{kind}out", params, config, Ids())
        # Theirs, byte for byte, and nothing else.
        assert_equal(load_file(tmp_path / f"{kind}out" / "model.safetensors"), hf_weights.weights(CASES[name][f"{kind}shapes"]))
        again, read = hf.load(tmp_path / f"{kind}out", ONE)
        assert read == config
        assert_equal(again, params)
        written, theirs = (json.loads((tmp_path / f"{kind}{way}" / "config.json").read_text()) for way in ("out", "in"))
        for field in ("model_type", "architectures", "pad_token_id", "bos_token_id", "eos_token_id"):
            assert written[field] == theirs[field]


def test_a_checkpoint_in_several_files(tmp_path):
    params, config = hf.load(checkpoint(tmp_path / "in", "llama2"), ONE)
    hf.save(tmp_path / "out", params, config, Ids(), shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shapes = CASES["llama2"]["shapes"]
    assert index["weight_map"].keys() == shapes.keys()
    assert index["metadata"]["total_size"] == 4 * sum(np.prod(shape) for shape in shapes.values())
    assert all((tmp_path / "out" / file).stat().st_size < 22_000 for file in files)
    assert_equal(hf.load(tmp_path / "out", ONE)[0], params)
    (tmp_path / "out" / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{files[1]}: no such file"):
        hf.load(tmp_path / "out", ONE)


def test_a_reward_model_keeps_its_unit_and_its_offset(tmp_path):
    params, config = hf.load(checkpoint(tmp_path / "in", "llama2", "reward_"), ONE)
    params |= {"gain": jnp.float32(3), "bias": jnp.float32(-2)}
    params["head"] = params["head"] | {"bias": jnp.float32(0.5)}
    values = hf.save(tmp_path / "out", params, config, Ids())
    assert values["score_offset"] == -0.5  # 3 * 0.5 - 2
    again, _ = hf.load(tmp_path / "out", ONE)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32))
    scores = [p["gain"] * heads.score(p["head"], hidden, jnp.asarray([5, 2])) + p["bias"] for p in (params, again)]
    np.testing.assert_allclose(*scores, rtol=1e-6)  # the gain is multiplied before the sum


def test_narrow_weights_are_read_as_they_are(tmp_path):
    weights = {name: x.astype(jnp.bfloat16) for name, x in hf_weights.weights(CASES["gemma2"]["shapes"]).items()}
    save_file(weights, checkpoint(tmp_path / "in", "gemma2") / "model.safetensors")
    wide, config = hf.load(tmp_path / "in", ONE)
    narrow, _ = hf.load(tmp_path / "in", ONE, "bfloat16")
    assert {x.dtype for x in jax.tree.leaves(narrow)} == {jnp.dtype("bfloat16")}
    assert_equal(jax.tree.map(lambda x: x.astype(jnp.float32), narrow), wide)
    state = jax.eval_shape(transformer.build(config).hidden, narrow, jnp.asarray(ROWS))
    assert state.dtype == jnp.float32  # the residual stream stays wide
    hf.save(tmp_path / "out", narrow, config, Ids())
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), weights)


@pytest.mark.parametrize("name", ["llama2", "gpt2", "gpt_neox", "qwen3_moe"])
def test_each_device_reads_its_own_part_only(name, tmp_path, monkeypatch):
    mesh, sizes = sharding.make_mesh(EIGHT), []
    read = hf_files._read

    def counted(*arguments):
        sizes.append(read(*arguments).nbytes)
        return read(*arguments)

    monkeypatch.setattr(hf_files, "_read", counted)
    params, config = hf.load(checkpoint(tmp_path, name), mesh)
    assert jax.tree.map(lambda x: x.sharding, params) == sharding.shardings(transformer.param_specs(config), mesh)
    if name in ("llama2", "qwen3_moe"):  # the others join three matrices in one tensor, which is read whole
        assert max(sizes) == 4 * 96 * 32 // 8
    monkeypatch.undo()
    assert_equal(params, hf.load(tmp_path, ONE)[0])


def test_earlier_releases_of_gpt2_and_pythia(tmp_path):
    """Without the prefix of the whole model, and with masks among the weights."""
    folder = checkpoint(tmp_path, "gpt2")
    params, _ = hf.load(folder, ONE)
    weights = {name.removeprefix("transformer."): x for name, x in load_file(folder / "model.safetensors").items()}
    weights |= {"h.0.attn.bias": np.tril(np.ones((1, 1, 64, 64), np.float32)), "lm_head.weight": weights["wte.weight"]}
    save_file(weights, folder / "model.safetensors")
    assert_equal(hf.load(folder, ONE)[0], params)


# ------------------------------------------------------------------------------------------- the configuration


def test_rope_parameters_flat_or_nested():
    llama = CASES["llama3"]["config"]
    nested = llama["rope_parameters"]
    flat = {name: value for name, value in llama.items() if name != "rope_parameters"}
    flat |= {"rope_theta": nested["rope_theta"], "rope_scaling": {n: v for n, v in nested.items() if n != "rope_theta"}}
    config = hf_config.config_from_hf(llama)
    assert (config.rope_scaling, config.rope_factor, config.rope_original_length) == ("llama3", 4.0, 16)
    assert hf_config.config_from_hf(flat) == config
    neox = CASES["gpt_neox"]["config"]
    flat = {name: value for name, value in neox.items() if name != "rope_parameters"}
    flat |= {"rotary_pct": 0.5, "rotary_emb_base": 100}
    assert hf_config.config_from_hf(flat) == hf_config.config_from_hf(neox)
    assert hf_config.config_from_hf(neox).rotary_width == 4
    gemma = CASES["gemma3"]["config"]
    flat = {name: value for name, value in gemma.items() if name not in ("rope_parameters", "layer_types")}
    flat |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert hf_config.config_from_hf(flat | {"sliding_window_pattern": 3}) == hf_config.config_from_hf(gemma)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    config = hf_config.config_from_hf(PUBLISHED[name]["config"])
    expected = PUBLISHED[name]["expected"]
    assert {field: json.loads(json.dumps(getattr(config, field))) for field in expected} == expected
    assert hf_config.config_from_hf(hf_export.config_to_hf(config)) == config
    assert TransformerConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, r"model_type='mamba' is not supported: choose one of llama, mistral, qwen2, qwen3, mixtral"),
        ({"model_type": None}, "model_type='None' is not supported"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\} is not supported.*may hold attention_bias"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping=30.0 is not supported for model_type='llama'"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported: choose one of silu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "rope_type='yarn' is not supported: choose one of default"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor.*not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        (
            {"model_type": "gemma2", "sliding_window": 4, "layer_types": ["chunked_attention"] * 2},
            "layer_types=.*must name 2 layers",
        ),
    ],
)
def test_what_is_not_supported_is_said_with_what_is(change, message):
    values = {name: value for name, value in CASES["llama2"]["config"].items() if name != "rope_parameters"}
    with pytest.raises(ValueError, match=message):
        hf_config.config_from_hf(values | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not supported: every layer must have experts \(mlp_only_layers="),
        ({"decoder_sparse_step": 2}, r"decoder_sparse_step=2 is not supported: every layer must have experts"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
        ({"num_local_experts": None}, "num_local_experts is missing"),
        ({"num_experts_per_tok": 7}, r"experts_per_token=7 must be in 1 .. experts=6"),
        ({"shared_expert_intermediate_size": 8}, r"shared_expert_intermediate_size=8 is not supported.*may hold.*num_experts"),
        (
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "max_window_layers=1 is not supported with use_sliding_window=True",
        ),
    ],
)
def test_what_is_not_supported_of_experts(change, message):
    with pytest.raises(ValueError, match=message):
        hf_config.config_from_hf(CASES["qwen3_moe"]["config"] | change)


def test_experts_by_either_name_and_windows_in_every_layer():
    values = CASES["qwen3_moe"]["config"]
    assert values["num_local_experts"] == 6  # transformers 5; the published files say num_experts
    earlier = {name: value for name, value in values.items() if name != "num_local_experts"} | {"num_experts": 6}
    config = hf_config.config_from_hf(earlier)
    assert config == hf_config.config_from_hf(values)
    assert (config.experts, config.experts_per_token, config.mlp_width) == (6, 2, 24)
    windows = hf_config.config_from_hf(values | {"use_sliding_window": True, "sliding_window": 4})
    assert windows.windows == (4, 4)
    assert hf_config.config_from_hf(hf_export.config_to_hf(windows)) == windows
    plain = hf_config.config_from_hf(CASES["qwen3_moe_plain"]["config"])
    assert not plain.renormalise_experts
    with pytest.raises(ValueError, match=r"nearest is mixtral, which differs in renormalise_experts=False \(there True\)"):
        hf_export.config_to_hf(dataclasses.replace(plain, qk_norm=False))


def test_a_model_that_no_architecture_fits_is_not_written(tmp_path):
    params, config = hf.load(checkpoint(tmp_path / "in", "llama2"), ONE)
    with pytest.raises(ValueError, match=r"nearest is llama, which differs in embed_scale=2.0 \(there 1.0\)"):
        hf.save(tmp_path / "out", params, dataclasses.replace(config, embed_scale=2.0), Ids())
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------- bad input


def test_a_wrong_tensor_is_named_with_both_shapes(tmp_path):
    folder = checkpoint(tmp_path, "llama2")
    file, weights = folder / "model.safetensors", hf_weights.weights(CASES["llama2"]["shapes"])
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: x for key, x in weights.items() if key != name}, file)
    with pytest.raises(ValueError, match=rf"tensor {name} of shape \(48, 32\) is missing"):
        hf.load(folder, ONE)
    save_file(weights | {name: weights[name].T.copy()}, file)
    with pytest.raises(ValueError, match=rf"{name} has shape \(32, 48\), but config.json asks for \(48, 32\)"):
        hf.load(folder, ONE)
    save_file(weights | {"model.layers.2.mlp.up_proj.weight": weights[name]}, file)
    with pytest.raises(ValueError, match=r"model.layers.2.mlp.up_proj.weight of shape \(48, 32\) is not one"):
        hf.load(folder, ONE)
    save_file(weights | {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}, file)
    with pytest.raises(ValueError, match=r"q_proj.bias of shape \(32,\) is not one"):
        hf.load(folder, ONE)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors: damaged"):
        hf.load(folder, ONE)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: no such file; weights must be safetensors"):
        hf.load(folder, ONE)


def test_a_classifier_of_several_labels_is_refused(tmp_path):
    folder = checkpoint(tmp_path, "qwen3", "reward_")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"score.weight": np.zeros((3, 32), np.float32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"score.weight has shape \(3, 32\), but config.json asks for \(1, 32\)"):
        hf.load(folder, ONE)


def test_a_config_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file; give the folder"):
        hf.load(tmp_path, ONE)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not readable JSON"):
        hf.load(tmp_path, ONE)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: holds list"):
        hf.load(tmp_path, ONE)


def test_ids_that_the_embedding_does_not_hold_are_refused(tmp_path):
    params, config = hf.load(checkpoint(tmp_path / "in", "llama2"), ONE)
    with pytest.raises(ValueError, match="the tokenizer has 97 ids, but the embedding has vocab_size=96 rows"):
        hf.save(tmp_path / "out", params, config, Ids(vocab_size=97))
    with pytest.raises(ValueError, match=r"special ids \{'eos': 96\} are outside the vocabulary 0 .. 95"):
        hf.save(tmp_path / "out", params, config, Ids(eos=96))
    reward, _ = hf.load(checkpoint(tmp_path / "reward", "llama2", "reward_"), ONE)
    with pytest.raises(ValueError, match="pad and EOS are both id 2"):
        hf.save(tmp_path / "out", reward, config, Ids(pad=2))
    with pytest.raises(ValueError, match="in exists and is not empty"):
        hf.save(tmp_path / "in", params, config, Ids())


# ------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import json, resource, sys
import jax
from jaxrlhf.core import sharding
from jaxrlhf.models import hf, hf_layout, transformer
mesh = sharding.make_mesh(sharding.MeshConfig(1, 2, 4))
jax.block_until_ready(jax.device_put(jax.numpy.zeros((8, 8)), jax.sharding.NamedSharding(mesh, jax.P("fsdp", "tensor"))))
kib = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
params, config = hf.load(sys.argv[1], mesh)
jax.block_until_ready(params)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
held = {path: leaf.addressable_shards[0].data.nbytes / leaf.nbytes for path, leaf in hf_layout.flat(params).items()}
whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"model": whole, "peak": 1024 * (peak - kib), "held": held}))
"""


@pytest.mark.full
def test_a_gigabyte_in_eight_files_is_held_once(tmp_path):
    """Peak memory less that of the process before loading, over the model; each device holds an eighth of every matrix."""
    config = TransformerConfig(16_384, 1024, 16, 16, 16, 64, 4096, 2048, tied_head=True)
    kind = "llama"
    values = hf_export.config_to_hf(config)
    (tmp_path / "config.json").write_text(json.dumps(values))
    shapes = hf_layout.expected(hf_layout.rules(config, kind), config)
    names, index = list(shapes), {}
    for file in range(8):
        part = {name: np.full(shapes[name], 0.5, np.float32) for name in names[file::8]}
        save_file(part, tmp_path / f"{file}.safetensors")
        index |= dict.fromkeys(part, f"{file}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"model {found['model'] / 1e9:.3f} GB, peak {found['peak'] / 1e9:.3f} GB")
    assert found["model"] > 1e9
    assert found["peak"] < 1.35 * found["model"]
    assert {path: share for path, share in found["held"].items() if "norm" not in path} == dict.fromkeys(
        ("embed", *(f"layers/{name}" for name in ("query", "key", "value", "output", "up", "gate", "down"))), 1 / 8
    )
