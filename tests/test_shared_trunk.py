"""A reward model over the policy's own start: saved as adapter and head, laid over the same arrays again, and nothing else."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import critics, reward_model, reward_params, stage
from jaxrlhf.core import members, sharding
from jaxrlhf.core.types import Rollout
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.models import heads, hf, lora, products, roles, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.rewards import model as rewards

TOKENIZER = tokenizers.train(["a film that is good", "a film that is bad"], 270)
SHAPE = TransformerConfig(TOKENIZER.vocab_size, 16, 2, 2, 2, 8, 24, 32)
ONE = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
LORA = lora.LoraConfig(rank=3, alpha=6.0, targets=("query", "down"))
LARGER = dataclasses.replace(LORA, rank=6, alpha=30.0)


def start_of(folder: pathlib.Path, seed: int = 0) -> stage.Trained:
    """A language model in a folder, read back."""
    base = jax.jit(transformer.build(SHAPE).init)(jax.random.key(seed))
    stage.save(folder, "policy", jax.device_get(base | {"embed": 20 * base["embed"]}), SHAPE, TOKENIZER)
    return stage.load(folder, ONE)


def adapter(seed: int):
    """As after some training: b is not zero."""
    fresh = sharding.init_params(lora.specs(SHAPE, LORA), jax.random.key(seed))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(seed), x.shape), fresh)


def head(seed: int):
    return {"weight": jax.random.normal(jax.random.key(seed), (16,)), "bias": jnp.float32(0.2 * seed)}


def written(folder: pathlib.Path, start: stage.Trained, **settings) -> reward_model.Config:
    """`model/` and `adapter/` as the script leaves them: one reward model, or an ensemble."""
    config = reward_model.Config(init=folder / "start", out=folder, lora=LORA, **settings)
    several = config.several
    if several is None:
        params = {"trunk": adapter(5), "head": head(6)}
    else:
        params = {"trunk": adapter(5), "head": members.stack([head(6), head(7)])}
        if several.of == "adapters":
            params["trunk"] = members.stack([adapter(5), adapter(8)])
    scaled = reward_params.whole(config, start.params, params)
    scaled |= {"gain": 2.5 * scaled["gain"], "bias": scaled["bias"] - 0.75}
    reward_params.save(folder / "model", config, scaled, SHAPE, TOKENIZER)
    reward_params.save_adapter(folder / "adapter", config, scaled | {"trunk": params["trunk"]}, start.params, start)
    return config


def rollout() -> Rollout:
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, SHAPE.vocab_size, (6, 12)), jnp.int32)
    prompt, response = jnp.full(6, 3, jnp.int32), jnp.arange(4, 10, dtype=jnp.int32)
    nothing = jnp.zeros((6, 9))
    return Rollout(tokens, prompt, response, response > 0, response, response, response, nothing, nothing)


@pytest.mark.parametrize(
    "settings",
    [{}, {"ensemble": 2}, {"ensemble": 2, "ensemble_of": "adapters", "aggregation": "worst"}],
    ids=("one", "heads", "adapters"),
)
def test_scores_are_those_of_the_merged_model_and_the_trunk_is_the_policys(tmp_path, settings):
    """Gain and bias included; 1e-5: float32 sums of another order, scores of size 5."""
    start = start_of(tmp_path / "start")
    written(tmp_path, start, **settings)
    merged, laid = (stage.load_reward(tmp_path / name, ONE, start) for name in ("model", "adapter"))
    want, found = (stage.reward(x)(x.params, rollout()) for x in (merged, laid))
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
    assert np.std(want) > 0.1
    if "ensemble_of" not in settings:  # the merged weights are not the base's: the adapter does something
        assert np.abs(merged.params["trunk"]["layers"]["query"] - start.params["layers"]["query"]).max() > 0.01
    base, _ = lora.detach(laid.params["trunk"], LORA)
    for own, shared in zip(jax.tree.leaves(base), jax.tree.leaves(start.params), strict=True):
        assert own is shared  # no second trunk


def test_another_base_is_refused(tmp_path):
    written(tmp_path, start_of(tmp_path / "start"))
    with pytest.raises(ValueError, match=r"was trained over .*start, whose parameters are not those"):
        stage.load_reward(tmp_path / "adapter", ONE, start_of(tmp_path / "other", seed=1))
    near = start_of(tmp_path / "start")
    near.params["norm"]["scale"] = near.params["norm"]["scale"].at[3].add(1e-6)  # one number, by its last bits
    with pytest.raises(ValueError, match="start from that model, or give the `model` folder"):
        stage.load_reward(tmp_path / "adapter", ONE, near)
    with pytest.raises(ValueError, match="holds a reward_adapter, not a reward_model"):
        stage.load(tmp_path / "adapter", ONE, "reward_model")


@pytest.mark.parametrize("policy", [LARGER, lora.NONE], ids=("adapter", "whole"))
@pytest.mark.parametrize("settings", [{}, {"ensemble": 2, "ensemble_of": "adapters"}], ids=("one", "adapters"))
def test_a_critic_begins_as_the_reward_whatever_scale_the_policys_adapter_has(tmp_path, settings, policy):
    """Its value of a row's last state is the (first member's) score; an adapter beside the policy's, or a model of its own."""
    start = start_of(tmp_path / "start")
    written(tmp_path, start, pooling="last", **settings)
    critic = critics.value_function("reward", start, policy, tmp_path / "adapter", ONE, seed=1)["critic"]
    assert ("embed" in critic["trunk"]) == (policy.rank == 0)
    attached = roles.attach(start.params, critic, policy)
    tokens, length = rollout().tokens, rollout().prompt_len + rollout().response_len
    found = heads.score(attached["head"], start.model.hidden(attached["trunk"], tokens), length)
    alone = {"trunk": lora.merge(start.params, adapter(5), LORA), "head": head(6), "gain": 2.5, "bias": -0.75}
    want = rewards.score(start.model, alone, tokens, length, "last")
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("settings", [{}, {"ensemble": 2, "ensemble_of": "adapters"}], ids=("one", "adapters"))
def test_an_adapter_is_refreshed_over_its_own_base(tmp_path, settings):
    config = dataclasses.replace(written(tmp_path, start_of(tmp_path / "start"), **settings), refresh=tmp_path / "adapter")
    _, base, params = reward_params.initial(config, ONE)
    want = members.stack([adapter(5), adapter(8)]) if settings else adapter(5)
    jax.tree.map(np.testing.assert_array_equal, params["trunk"], want)
    jax.tree.map(np.testing.assert_array_equal, base, start_of(tmp_path / "start").params)
    assert not any(isinstance(x, products.Adapted) for x in base["layers"].values())
    with pytest.raises(ValueError, match=r"holds .* of LoraConfig\(rank=3.*refresh it as what it is"):
        reward_params.initial(dataclasses.replace(config, lora=LARGER), ONE)


# ------------------------------------------------------------------------------------------------ checkpoints as they are


def test_a_checkpoint_of_hugging_face_is_read_where_a_model_folder_is(tmp_path):
    start = start_of(tmp_path / "start")
    hf.save(tmp_path / "hf", start.params, SHAPE, TOKENIZER)
    found = stage.load(tmp_path / "hf", ONE)
    assert found.config == SHAPE
    assert found.tokenizer.encode("a film") == TOKENIZER.encode("a film")
    jax.tree.map(np.testing.assert_array_equal, found.params, start.params)
    with pytest.raises(ValueError, match="holds a checkpoint of a policy, not of a reward_model"):
        stage.load(tmp_path / "hf", ONE, "reward_model")
    reward = {"trunk": start.params, "head": head(0) | {"bias": jnp.float32(0)}, "gain": jnp.float32(2), "bias": jnp.float32(1)}
    hf.save(tmp_path / "scores", reward, SHAPE, TOKENIZER)
    judged = stage.load_reward(tmp_path / "scores", ONE, start)
    want = rewards.reward(start.model, "last")(reward, rollout())
    np.testing.assert_allclose(stage.reward(judged)(judged.params, rollout()), want, rtol=1e-5, atol=1e-5)
    written(tmp_path, start)  # over the one, used over the other: the parameters are what counts
    assert stage.load_reward(tmp_path / "adapter", ONE, found).settings["kind"] == "reward_adapter"


def test_a_folder_that_is_neither_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no trained model there"):
        stage.load(tmp_path / "nothing", ONE)
    TOKENIZER.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type='bert' is not supported"):
        stage.load(tmp_path, ONE)
