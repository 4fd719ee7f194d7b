"""A trained model as a folder: what is written is read back, and damage is named."""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.core import sharding
from jaxrlhf.models import pretrained, transformer
from jaxrlhf.models.config import TransformerConfig

CONFIG = TransformerConfig(16, 8, 2, 2, 1, 4, 12, 10)


@pytest.fixture
def params():
    random = np.random.default_rng(0)

    def one(spec):
        return jnp.asarray(random.normal(size=spec.shape).astype(np.float32))

    return jax.tree.map(one, transformer.param_specs(CONFIG), is_leaf=lambda x: isinstance(x, sharding.ParamSpec))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_is_saved_is_loaded(tmp_path, params):
    pretrained.save(tmp_path / "a" / "model", params, CONFIG)
    loaded, config = pretrained.load(tmp_path / "a" / "model")
    assert_equal(loaded, params)
    assert TransformerConfig(**config) == CONFIG
    assert sorted(os.listdir(tmp_path / "a" / "model")) == ["config.json", "params.safetensors"]
    assert os.listdir(tmp_path / "a") == ["model"]  # nothing temporary is left


def test_any_type_and_a_dict_as_configuration(tmp_path):
    params = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": {"c": np.arange(4), "d": np.float32(2)}}
    pretrained.save(tmp_path / "m", params, {"kind": "reward_model", "transformer": dataclasses.asdict(CONFIG)})
    loaded, config = pretrained.load(tmp_path / "m")
    assert_equal(loaded, params)
    assert loaded["a"].dtype == jnp.bfloat16
    assert loaded["b"]["d"].shape == ()
    assert config["kind"] == "reward_model"


def test_parameters_split_over_devices_are_written_whole(tmp_path, params):
    mesh = sharding.make_mesh(sharding.MeshConfig(4, 2, 1))
    split = jax.device_put(params, sharding.shardings(transformer.param_specs(CONFIG), mesh))
    pretrained.save(tmp_path / "m", split, CONFIG)
    assert_equal(pretrained.load(tmp_path / "m")[0], params)


def test_an_earlier_model_is_replaced_and_survives_a_failure(tmp_path, params, monkeypatch):
    model = tmp_path / "m"
    pretrained.save(model, params, CONFIG)
    changed = jax.tree.map(lambda x: x + 1, params)

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            pretrained.save(model, changed, CONFIG)
    assert_equal(pretrained.load(model)[0], params)
    with pytest.raises(TypeError, match="not JSON serializable"):
        pretrained.save(model, changed, {"mesh": object()})
    assert_equal(pretrained.load(model)[0], params)
    pretrained.save(model, changed, CONFIG)
    assert_equal(pretrained.load(model)[0], changed)
    assert os.listdir(tmp_path) == ["m"]


def test_a_folder_of_something_else_is_not_overwritten(tmp_path, params):
    (tmp_path / "thesis").mkdir()
    pretrained.save(tmp_path / "thesis", params, CONFIG)  # empty: free to use
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(ValueError, match=r"photos exists and holds no model \(config.json is missing\): choose another folder"):
        pretrained.save(tmp_path / "photos", params, CONFIG)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat"
    with pytest.raises(ValueError, match=r"cat.jpg exists and holds no model"):
        pretrained.save(tmp_path / "photos" / "cat.jpg", params, CONFIG)


def test_a_name_that_cannot_be_flattened_is_refused(tmp_path):
    with pytest.raises(ValueError, match="have '/' in a name"):
        pretrained.save(tmp_path / "m", {"a/b": np.ones(2)}, CONFIG)


def test_what_cannot_be_loaded_is_named(tmp_path, params):
    model = tmp_path / "m"
    with pytest.raises(FileNotFoundError, match=r"m: no trained model there \(config.json is missing\)"):
        pretrained.load(model)
    pretrained.save(model, params, CONFIG)
    weights = (model / "params.safetensors").read_bytes()
    (model / "params.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=r"params.safetensors: damaged or not safetensors"):
        pretrained.load(model)
    (model / "params.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"\(params.safetensors is missing\)"):
        pretrained.load(model)
    (model / "params.safetensors").write_bytes(weights)
    (model / "config.json").write_text('{"layers": ')
    with pytest.raises(ValueError, match=r"config.json: not readable JSON"):
        pretrained.load(model)
    (model / "config.json").write_text(json.dumps([1, 2]))
    with pytest.raises(ValueError, match=r"config.json: holds list, not the settings of a model"):
        pretrained.load(model)
