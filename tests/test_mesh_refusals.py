"""A mesh or a batch that cannot be is refused by every script before it reads, compiles or writes anything."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax
import pytest

from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig

SAMPLE = ("ppo", "grpo", "rloo", "reinforce", "raft", "online_dpo")
LEARN = (*SAMPLE, "dpo", "kto", "orpo", "arithmetic", "pretrain", "sft")
ROWS = [(name, "batch") for name in (*LEARN, "sample_pairs")] + [("reward_model", "reference_samples"), ("evaluate", "prompts")]
ROWS += [(name, "held_out_prompts") for name in (*SAMPLE, "dpo", "kto", "orpo", "arithmetic")] + [
    ("evaluate", "best_of_prompts")
]
EIGHT = MeshConfig(fsdp=4, tensor=2)


def refused(name: str, out: Any, **changes: Any) -> str:
    """What the script says to its default settings with these changes. It leaves no folder."""
    module = importlib.import_module(f"experiments.{name}")
    config = dataclasses.replace(module.PRESETS["default"], out=out, **changes)
    with pytest.raises(ValueError) as error:  # noqa: PT011  the callers look at what it says
        module.run(config)
    assert not out.exists()
    return str(error.value)


@pytest.mark.parametrize("name", [*LEARN, "sample_pairs", "reward_model", "evaluate"])
def test_a_mesh_larger_than_the_devices_is_refused(tmp_path, name):
    said = refused(name, tmp_path / "out", mesh=MeshConfig(fsdp=16))
    assert f"fsdp=16 x tensor=1 does not fit {jax.device_count()} device(s): choose axes whose product is" in said


@pytest.mark.parametrize(("name", "setting"), ROWS)
def test_rows_that_the_mesh_does_not_divide_are_refused(tmp_path, name, setting):
    whole = dict.fromkeys([row for script, row in ROWS if script == name], 64)
    said = refused(name, tmp_path / "out", mesh=EIGHT, **whole | {setting: 30})
    assert f"--{setting.replace('_', '-')} 30 cannot be shared by data x fsdp = 4 devices: choose 28 or 32" in said


@pytest.mark.parametrize("name", SAMPLE)
def test_minibatches_that_the_mesh_does_not_divide_are_refused(tmp_path, name):
    module = importlib.import_module(f"experiments.{name}")
    config = module.PRESETS["default"]
    own = {"minibatches": 64} if name == "online_dpo" else {"algorithm": dataclasses.replace(config.algorithm, minibatches=64)}
    said = refused(name, tmp_path / "out", mesh=EIGHT, batch=16, held_out_prompts=64, **own)
    assert "cannot be dealt into minibatches=64 of a multiple of data x fsdp = 4 rows" in said


def test_numbers_that_fit_pass():
    mesh = sharding.make_mesh(EIGHT)
    sharding.check_rows(mesh, {"batch": 32, "none": 0}, (32, 8))
    with pytest.raises(ValueError, match=r"--batch 3 cannot be shared by data x fsdp = 4 devices: choose 4, or"):
        sharding.check_rows(mesh, {"batch": 3})
