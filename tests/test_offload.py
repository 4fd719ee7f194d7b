"""Arrays that rest in the host's memory: the same numbers, the same place afterwards, a refusal where there is none."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sameness
import tiny_policy

from experiments import ppo, stage
from jaxrlhf.algorithms import ppo as algorithm
from jaxrlhf.core import offload, processes, sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.models import lora
from jaxrlhf.sampling import generate, rollout
from jaxrlhf.training import checkpoint, optimizer, plan, step
from jaxrlhf.training.optimizer import OptimizerConfig

HERE = [memory.kind for memory in jax.devices()[0].addressable_memories()]
pytestmark = pytest.mark.skipif(offload.KIND not in HERE, reason=f"only {HERE} here")


def kinds(tree: Any) -> set[str]:
    """Where the arrays of a tree are, single numbers left out."""
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim}


ADAMW = OptimizerConfig(learning_rate=1e-3)


def two_updates(offloaded: bool, split: Any = 1, settings: OptimizerConfig = ADAMW) -> tuple[Any, Any, Any]:
    """The state after two updates on the mesh, its metrics, and the bytes of the program, if it is one."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    params, recorded = sameness.start(), sameness.recorded()[0]
    update = optimizer.make(settings, 20, params)
    with jax.set_mesh(mesh):
        placed = processes.from_host(params, sharding.shardings(sameness.SPECS, mesh))
        state = step.init_state(placed, update, jax.random.key(1), algorithm.init(sameness.PPO))
        drawn = sharding.shard_batch(recorded, mesh)
        frozen = {"reference": placed["policy"]}
        if offloaded:
            state = dataclasses.replace(state, opt_state=offload.to_host_memory(state.opt_state))
            frozen = offload.to_host_memory(frozen)
            assert kinds(state.opt_state) == kinds(frozen) == {offload.KIND}
        experience = rollout.experience(sameness.MODEL, state.params, frozen, drawn, sameness.SPEC)
        experience = dataclasses.replace(experience, score=sharding.shard_batch(sameness.scores(0), mesh))
        batch, _, _ = algorithm.prepare(experience, state.algorithm, sameness.PPO)
        train = step.make_epochs(sameness.OUTPUTS, algorithm.loss, sameness.PPO, update, 1, 2, split)
        sizes = train.lower(state, None, batch).compile().memory_analysis() if split == 1 else None
        before = state
        state, metrics = train(state, None, batch)
        assert all(x.is_deleted() for x in jax.tree.leaves((before.params, before.opt_state.inner)))
    return state, metrics, sizes


@pytest.mark.full
def test_rows_sorted_by_length_and_the_average_of_schedule_free():
    """Programs of their own, and a model that is served out of the optimizer's state."""
    settings = OptimizerConfig(name="schedule_free", schedule="constant", learning_rate=1e-3)
    split = step.Microbatches(tokens=64, multiple=4)
    (here, metrics, _), (there, other_metrics, _) = (two_updates(each, split, settings) for each in (False, True))
    assert kinds(there.opt_state) == {offload.KIND}
    assert kinds(step.served(there)) == {"device"}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(metrics), jax.device_get(other_metrics))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(step.served(here)), jax.device_get(step.served(there)))


@pytest.mark.full
def test_updates_are_the_same_and_the_state_stays_where_it_was(tmp_path):
    here, metrics, _ = two_updates(False)
    there, other_metrics, sizes = two_updates(True)
    assert kinds(here.opt_state) == kinds(there.params) == {"device"}
    assert kinds(there.opt_state) == {offload.KIND}
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((there.params, there.opt_state.inner)))
    assert sizes.alias_size_in_bytes + sizes.host_alias_size_in_bytes >= held  # donated, wherever it is
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(metrics), jax.device_get(other_metrics))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(here.params), jax.device_get(there.params))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(here.opt_state), jax.device_get(there.opt_state))
    checkpoint.save(tmp_path, 1, there)
    found, _ = checkpoint.restore(tmp_path, here)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found.opt_state), jax.device_get(there.opt_state))
    rows = plan.frozen({"moments": there.opt_state, "parameters": there.params})
    assert rows[0].size.total > 1.9 * rows[1].size.total
    assert rows[0].size.device < 100  # counts


def test_a_program_without_such_arrays_is_as_it_was():
    tree = {"a": jnp.ones(3), "b": jnp.ones([])}
    made = jax.make_jaxpr(lambda x: offload.leave(offload.fetch(x, after=x), x))(tree)
    assert not made.eqns
    assert offload.to_device_memory(tree)["a"] is tree["a"]


def test_the_reference_answers_from_the_hosts_memory():
    """As the scripts ask it, before training."""
    policy = jax.tree.map(jnp.asarray, sameness.start()["policy"])
    args = (sameness.prompts(0), sameness.SPEC, jax.random.key(0))
    expected = generate.generate(sameness.MODEL, policy, *args)
    found = generate.generate(sameness.MODEL, offload.to_host_memory(policy), *args)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_a_device_without_such_memory_is_named(monkeypatch):
    monkeypatch.setattr(offload, "KIND", "tape")
    with pytest.raises(ValueError, match=r"has no memory 'tape' to offload to, only .*set offload to none"):
        offload.to_host_memory({"a": jnp.ones(3)})


# ------------------------------------------------------------------------------------------------ the script


def config(start: Any, out: Any, **changes: Any) -> ppo.Config:
    own = dataclasses.replace(ppo.ARITHMETIC.algorithm, epochs=1, minibatches=2)
    same = {"policy": start, "out": out, "iterations": 1, "batch": 16, "held_out_prompts": 8, "algorithm": own}
    return dataclasses.replace(ppo.ARITHMETIC, **same, **changes)


@pytest.mark.full
def test_one_setting_of_ppo_moves_both(tmp_path):
    start = tiny_policy.write(tmp_path / "start")
    rows = {}
    for choice in ("none", "both"):
        ppo.run(config(start, tmp_path / choice, offload=choice))
        rows[choice] = [json.loads(line) for line in (tmp_path / choice / "metrics.jsonl").read_text().splitlines()]
    assert rows["none"] == rows["both"]
    told = {choice: json.loads((tmp_path / choice / "memory.json").read_text())["rows"] for choice in rows}
    sizes = {choice: {(row["role"], row["kind"]): row["size"] for row in own} for choice, own in told.items()}
    reference = ("reference", "frozen")
    assert sizes["both"][reference]["total"] == sizes["none"][reference]["total"] > 0
    assert sizes["both"][reference]["device"] == 0 < sizes["none"][reference]["device"]


def test_a_reference_that_adapters_lie_over_stays(tmp_path):
    start = tiny_policy.write(tmp_path / "start")
    with pytest.raises(ValueError, match=r"offload='both': the reference is the base that adapters lie over"):
        ppo.run(config(start, tmp_path / "out", offload="both", lora=lora.LoraConfig(2)))


def test_the_state_of_every_choice():
    params = {"w": jnp.ones((2, 2))}
    state = step.init_state(params, optimizer.make(OptimizerConfig(), 2, params), jax.random.key(0))
    assert stage.at_rest(state, "reference") is state
    assert kinds(stage.at_rest(state, "optimizer").opt_state) == {offload.KIND}
