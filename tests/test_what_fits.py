"""What is told before a run: nothing is put anywhere for it; the fewest microbatches that fit, else what would help."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import what_fits
from experiments.fit import memory, settings, work
from experiments.fit.settings import Config
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.core.types import Prompts, SamplingSpec
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.sampling import generate, rollout
from jaxrlhf.training import chips, plan, programs

H200 = Config(chip="H200", model_shape="qwen2.5-1.5b", rows=512, minibatches=1)
GENERATIONS = {
    "wave": (generate.Options(), 32, 8, 4),
    "slots": (generate.Options(slots=16), 32, 8, 1),
    "growing": (generate.Options(chunk=128), 16, generate.GROWING, 1),
}


def test_nothing_is_put_on_a_device_and_nothing_compiled():
    listening = programs.Programs(show=False).open()
    before = len(jax.live_arrays())
    try:
        found = what_fits.run(dataclasses.replace(H200, critic="separate", mesh=MeshConfig(data=1, fsdp=8)))
    finally:
        listening.close()
    assert not listening.found
    assert len(jax.live_arrays()) <= before  # others may have been let go meanwhile
    assert found["bytes"] <= found["limit"] == int(0.9 * 141e9)


@pytest.mark.full
def test_the_fewest_microbatches_that_fit():
    """One fewer divisor is too much; a given number is taken as it is."""
    found = what_fits.run(H200)
    count = found["microbatches"]
    assert count > 1
    fewer = max(n for n in range(1, count) if 512 % n == 0)
    with pytest.raises(ValueError, match="does not fit"):
        what_fits.run(dataclasses.replace(H200, microbatches=fewer))
    assert what_fits.run(dataclasses.replace(H200, microbatches=2 * count))["microbatches"] == 2 * count


def bytes_of(text: str) -> int:
    number, unit = re.match(r"([\d.]+) (GiB|MiB)", text).groups()  # type: ignore[union-attr]
    return round(float(number) * 2 ** {"GiB": 30, "MiB": 20}[unit])


def test_a_refusal_says_by_how_much_and_what_each_remedy_comes_to():
    large = Config(model_shape="llama-3.1-8b", chip="H100", rows=64)
    with pytest.raises(ValueError, match="does not fit: ") as refused:
        what_fits.run(large)
    said = str(refused.value)
    whole, more = (bytes_of(said.split(start)[1]) for start in ("does not fit: ", "a device in update, "))
    assert whole - more == pytest.approx(0.9 * 80e9, rel=1e-3)
    assert re.search(r"largest: policy (moments|gradient) 59\.83 GiB", said)
    remedies = what_fits.remedies(large)
    assert [name for name in remedies if name.startswith("--lora")]
    assert [name for name in remedies if name.startswith("--mesh")]
    for name, changed in remedies.items():
        told = bytes_of(said.split(f"{name}: ")[1])
        fits = said.split(f"{name}: ")[1].split(";")[0].endswith("fits")
        assert fits == (told <= 0.9 * 80e9)
        if fits:
            assert what_fits.run(changed)["bytes"] <= 0.9 * 80e9


def test_adapters_hold_a_base_and_little_more():
    whole, thin = (memory.memory(dataclasses.replace(H200, lora=LoraConfig(rank=rank)), shape(), 8, chip()) for rank in (0, 16))
    parameters = 4 * settings.parameters(shape())
    assert total(whole, "policy") == pytest.approx(5 * parameters, rel=1e-4)  # gradient twice, two moments
    assert total(thin, "policy") < 0.1 * parameters
    narrow = memory.memory(dataclasses.replace(H200, lora=LoraConfig(rank=16), frozen="int8"), shape(), 8, chip())
    assert total(narrow, "reference") == pytest.approx(parameters / 4, rel=0.02)
    assert total(whole, "reference") == total(thin, "reference") == parameters


def shape() -> TransformerConfig:
    return settings.shape_of(H200)


def chip() -> chips.Chip:
    return chips.named("H200")


def total(rows, role: str) -> int:
    return sum(row.size.total for row in rows if row.role == role)


def test_decoding_is_bound_by_bytes_until_rows_are_many():
    """Against the arithmetic by hand: weights and cache once a step, or 2 operations a parameter and row."""
    few = dataclasses.replace(H200, rows=8, prompt=512, response=512)
    config, parameters = shape(), settings.parameters(shape())
    cache = 4 * 2 * config.layers * config.kv_heads * config.head_width * 8 * 1024
    moved = 2 * parameters + cache
    found = work.decoding(few, config, chip())
    assert found["bytes_a_step"] == moved
    assert found["seconds"] == pytest.approx(512 * moved / 4.8e12, rel=0.1)  # reading the prompts is the rest
    many = dataclasses.replace(few, rows=4096, prompt=8, response=8)
    least = 8 * 4096 * 2 * parameters / 989.4e12
    assert work.decoding(many, config, chip())["seconds"] == pytest.approx(2 * least, rel=0.3)  # and as much for prompts


def test_more_chips_take_less_time_and_a_step_is_the_sum_of_its_stages():
    one, eight = (work.work(dataclasses.replace(H200, mesh=MeshConfig(1, ways)), shape(), chip()) for ways in (1, 8))
    for name in ("score", "update"):
        assert one[name]["seconds"] == pytest.approx(8 * eight[name]["seconds"])
    epochs = work.work(dataclasses.replace(H200, epochs=2), shape(), chip())
    assert epochs["update"]["flops"] == 2 * one["update"]["flops"]
    assert epochs["score"] == one["score"]


def test_a_folder_is_read_for_its_config_alone(tmp_path):
    """No weights need be there: of a stage's model, and of a checkpoint of Hugging Face."""
    small = TransformerConfig(64, 32, 2, 4, 2, 8, 48, 32)
    (tmp_path / "config.json").write_text(json.dumps({"kind": "policy", "transformer": dataclasses.asdict(small)}))
    (tmp_path / "params.safetensors").touch()
    asked = Config(model=tmp_path, prompt=8, response=8, rows=8, dtype="bfloat16")
    assert settings.shape_of(asked) == dataclasses.replace(small, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"prompt=8 \+ response=32 .* more than the 32"):
        settings.shape_of(dataclasses.replace(asked, response=32))
    (tmp_path / "params.safetensors").unlink()
    values = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True, "head_dim": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert settings.parameters(settings.shape_of(asked)) == settings.parameters(small)


def test_settings_that_cannot_be_are_refused_by_name():
    for wrong, said in (
        ({"rows": 0}, "rows=0 must be at least 1"),
        ({"rows": 10, "minibatches": 4}, "rows=10 must be a multiple of samples=1 x minibatches=4"),
        ({"share": 1.5}, r"share=1.5 .* in \(0, 1\]"),
        ({"algorithm": "sft", "frozen": "int8"}, "nothing is frozen"),
    ):
        with pytest.raises(ValueError, match=said):
            Config(**wrong)
    with pytest.raises(ValueError, match="64 rows cannot be shared by data x fsdp = 3 devices"):
        what_fits.run(Config(mesh=MeshConfig(data=1, fsdp=3)))
    with pytest.raises(ValueError, match="compiles for one device"):
        what_fits.run(Config(mesh=MeshConfig(data=1, fsdp=2), compile_programs=True))


def test_this_cpu_is_measured():
    found = settings.measured(repeats=1)
    assert 1e8 < found.product_float32 < 1e14
    assert 1e7 < found.bandwidth < 1e13
    assert found.memory > 1e9


def test_what_xla_says_takes_the_place_of_the_estimate():
    """Within the tolerance of tests/test_plan.py, at a shape that compiles at once."""
    small = TransformerConfig(512, 128, 4, 4, 4, 32, 384, 64)
    config = Config(algorithm="sft", chip="cpu", rows=16, minibatches=1, prompt=32, response=32)
    here = chips.Chip("this CPU, measured", 1e11, 1e11, 1e10, 2**34)
    estimated, real = (
        memory.memory(dataclasses.replace(config, compile_programs=asked), small, 1, here) for asked in (False, True)
    )
    sizes = [plan.stages([row for row in rows if row.role == "activations"])["update"].total for rows in (estimated, real)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.25)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "wave" else pytest.mark.full) for name in GENERATIONS])
def test_the_samplers_programs_are_as_many_as_told(name):
    options, rows, response, n = GENERATIONS[name]
    config = Config(
        rows=rows, samples=n, minibatches=1, prompt=4, response=response, rollouts=rollout.Options(generation=options)
    )
    model = transformer.build(TransformerConfig(32, 16, 1, 2, 2, 8, 16, response + 4))
    params, count = model.init(jax.random.key(0)), np.arange(rows // n, dtype=np.int32)
    prompts = Prompts(jnp.ones((rows // n, 4), jnp.int32), jnp.full(rows // n, 4), jnp.asarray(count), jnp.asarray(count))
    spec, key = SamplingSpec(temperature=1.0, max_tokens=response, stop=(0,)), jax.random.key(1)
    jax.clear_caches()
    listening = programs.Programs(show=False).open()
    generate.warm(model, params, prompts, spec, key, n, options)
    listening.close()
    ours = ("_decode_changes", "start", "start_slots", "refill", "advance", "halve", "grow", "finish")
    assert work.programs(config)["rollout"] == sum(found.name in ours for found in listening.found)
