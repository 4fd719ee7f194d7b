"""Adapters in the peft package's format, against a folder that it wrote and the logits that it gave (tests/golden_peft.py)."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf.models import hf_config, hf_layout, lora, peft, transformer
from jaxrlhf.models.config import TransformerConfig

GOLDEN = pathlib.Path(__file__).parent / "golden" / "peft"
SHAPE = TransformerConfig(
    vocab_size=40, width=24, layers=2, heads=4, kv_heads=2, head_width=6, mlp_width=32, max_length=24, tied_head=False
)
MODEL = transformer.build(SHAPE)
UP = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"


def numbers() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "numbers.npz") as file:
        return dict(file)


def base(stored: dict[str, np.ndarray]) -> dict:
    """The model's tensors as our parameters."""

    def layers(name: str, turned: bool = True):
        found = [stored[f"model.layers.{i}.{name}.weight"] for i in range(2)]
        return jnp.stack([x.T if turned else x for x in found])

    names = {name: module for name, module in peft.MODULES.items() if name != "head"}
    return {
        "embed": jnp.asarray(stored["model.embed_tokens.weight"]),
        "layers": {name: layers(module) for name, module in names.items()}
        | {"attention_norm": {"scale": layers("input_layernorm", False)}}
        | {"mlp_norm": {"scale": layers("post_attention_layernorm", False)}},
        "norm": {"scale": jnp.asarray(stored["model.norm.weight"])},
        "head": jnp.asarray(stored["lm_head.weight"].T),
    }


def test_logits_are_those_of_the_peft_package():
    """Without the adapter, beside the base, merged; 1e-4: float32 through two layers in another order, logits of size 3."""
    stored = numbers()
    start, (adapter, config) = base(stored), peft.load(GOLDEN, SHAPE)
    assert config == lora.LoraConfig(3, 5, lora.TARGETS, rank_stabilised=True)
    run = jax.jit(lambda params: MODEL.logits(params, MODEL.hidden(params, jnp.asarray(stored["tokens"]))))
    np.testing.assert_allclose(run(start), stored["plain"], atol=1e-4)
    np.testing.assert_allclose(run(lora.attach(start, adapter, config)), stored["adapted"], atol=1e-4)
    np.testing.assert_allclose(run(lora.merge(start, adapter, config)), stored["merged"], atol=1e-4)
    assert np.abs(stored["adapted"] - stored["plain"]).max() > 1


def test_what_is_written_is_what_peft_wrote(tmp_path):
    """Name by name and bit by bit; and in the settings all that decides what an adapter does."""
    adapter, config = peft.load(GOLDEN, SHAPE)
    peft.save(tmp_path / "out", jax.tree.map(jnp.asarray, adapter), SHAPE, config, "some/base")
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "out", GOLDEN))
    theirs.pop("base_model.model.lm_head.base_layer.weight")  # a copy of the base's own head
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    settings, want = (json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path / "out", GOLDEN))
    settings["target_modules"], want["target_modules"] = (sorted(x["target_modules"]) for x in (settings, want))
    assert settings.pop("base_model_name_or_path") == "some/base"
    assert settings == {name: want[name] for name in settings}
    again, same = peft.load(tmp_path / "out", SHAPE)
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_some_targets_alone(tmp_path):
    config = lora.LoraConfig(2, 4.0, ("value", "up"))
    adapter = jax.tree.map(
        lambda spec: np.random.default_rng(0).normal(size=spec.shape).astype(np.float32),
        lora.specs(SHAPE, config),
        is_leaf=lambda x: hasattr(x, "axes"),
    )
    peft.save(tmp_path, adapter, SHAPE, config, "base")
    found, same = peft.load(tmp_path, SHAPE)
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, found, adapter)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t, s: t.pop(UP), r"layers.1.mlp.up_proj.lora_B.weight \[32, 3\] is missing"),
        (lambda t, s: t.update(extra=np.zeros((2, 3), np.float32)), r"extra \[2, 3\] is unknown"),
        (lambda t, s: s.update(r=4), r"lora_A.weight is \[3, 24\] there, \[4, 24\] in this model"),
        (lambda t, s: s.update(use_dora=True), "'use_dora': True} would be left out"),
        (lambda t, s: s.update(init_lora_weights="pissa"), "'init_lora_weights': 'pissa'"),
        (lambda t, s: s.update(peft_type="IA3"), "not the settings of a LoRA"),
        (lambda t, s: t.clear(), "no tensor of self_attn.q_proj"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_read_as_it_is_meant(tmp_path, change, told):
    tensors, settings = load_file(GOLDEN / peft.TENSORS), json.loads((GOLDEN / peft.CONFIG).read_text())
    change(tensors, settings)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, tmp_path / peft.TENSORS)
    (tmp_path / peft.CONFIG).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=told):
        peft.load(tmp_path, SHAPE)


@pytest.mark.parametrize("kind", hf_config.CLASSES)
def test_every_architecture_is_written_by_its_own_names_or_refused(tmp_path, kind):
    """The modules that peft is told of are those that the checkpoint's tensors are called after."""
    published = json.loads((GOLDEN.parent / "hf.json").read_text()).values()
    values = next(one["config"] for one in published if one["config"]["model_type"] == kind)
    shape = hf_config.config_from_hf(values)
    if kind in ("gpt2", "gpt_neox"):
        with pytest.raises(ValueError, match="gpt2 and gpt_neox hold query, key and value in one matrix"):
            peft.save(tmp_path, {}, shape, lora.LoraConfig(2), "base")
        return
    tensors = {rule.leaves[0].removeprefix("layers/"): rule.tensor for rule in hf_layout.rules(shape, kind)}
    wanted = lora.specs(shape, lora.LoraConfig(2))
    adapter = jax.tree.map(lambda spec: np.zeros(spec.shape, np.float32), wanted, is_leaf=lambda x: hasattr(x, "axes"))
    peft.save(tmp_path, adapter, shape, lora.LoraConfig(2), "base")
    written = load_file(tmp_path / peft.TENSORS)
    for name in adapter["layers"]:
        for layer in range(shape.layers):
            module = tensors[name].format(layer).removesuffix(".weight")
            assert f"base_model.model.{module}.lora_A.weight" in written
    assert len(written) == 2 * shape.layers * len(adapter["layers"])


def test_no_folder_a_damaged_one_and_another_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json is missing"):
        peft.load(tmp_path, SHAPE)
    shutil.copy(GOLDEN / peft.CONFIG, tmp_path)
    (tmp_path / peft.TENSORS).write_bytes(b"half")
    with pytest.raises(ValueError, match="damaged"):
        peft.load(tmp_path, SHAPE)
    other = TransformerConfig(40, 24, 2, 4, 2, 6, 32, 24, norm="layer", mlp="gelu")
    with pytest.raises(ValueError, match="norm='layer', positions='rope', mlp='gelu' has not Llama's layout"):
        peft.load(GOLDEN, other)
