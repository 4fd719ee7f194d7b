"""Checkpoints: bit-exact, complete or absent, and damage is found and named."""

from __future__ import annotations

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from run_cases import assert_same_bits, train_state

from jaxrlhf.core import sharding
from jaxrlhf.core.types import Outputs, Term
from jaxrlhf.training import checkpoint, manifest, optimizer, step
from jaxrlhf.training.optimizer import OptimizerConfig


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with checkpoint 7, and what is in it. Copy it before changing it."""
    directory = tmp_path_factory.mktemp("saved")
    state = train_state()
    checkpoint.save(directory, 7, state)
    return directory, state


def test_what_is_restored_is_what_was_saved(saved):
    directory, state = saved
    restored, at = checkpoint.restore(directory, train_state(1))
    assert at == 7
    assert_same_bits(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, state)


def test_a_relative_directory_is_as_good(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save("here", 1, {"w": jnp.ones(2)})
    assert checkpoint.restore("here", {"w": jnp.zeros(2)})[0]["w"].tolist() == [1, 1]


def test_only_the_newest_two_stay(tmp_path):
    for at in range(1, 5):
        checkpoint.save(tmp_path, at, {"w": jnp.full(2, at)})
    assert checkpoint.steps(tmp_path) == [3, 4]
    assert checkpoint.latest(tmp_path) == 4
    assert checkpoint.restore(tmp_path, {"w": jnp.zeros(2, jnp.int32)}, step=3)[0]["w"].tolist() == [3, 3]
    checkpoint.save(tmp_path, 4, {"w": jnp.full(2, 9)})  # exists: left as it is
    assert checkpoint.restore(tmp_path, {"w": jnp.zeros(2, jnp.int32)})[0]["w"].tolist() == [4, 4]


def test_what_a_killed_save_left_is_removed_and_never_listed(tmp_path):
    checkpoint.save(tmp_path, 3, {"w": jnp.ones(2)})
    (tmp_path / ".tmp-00000008").mkdir()
    shutil.copytree(tmp_path / "00000003", tmp_path / ".tmp-old-00000001")
    assert checkpoint.steps(tmp_path) == [3]
    assert checkpoint.clean(tmp_path) == [".tmp-00000008", ".tmp-old-00000001"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000003"]


def test_a_newest_step_without_a_manifest_is_damage_and_not_passed_over(tmp_path):
    checkpoint.save(tmp_path, 3, {"w": jnp.ones(2)})
    shutil.copytree(tmp_path / "00000003", tmp_path / "00000009")
    (tmp_path / "00000009" / manifest.FILE).unlink()
    assert checkpoint.latest(tmp_path) == 3
    with pytest.raises(ValueError, match=r"00000009 is damaged: file manifest\.json is missing.*--from-step 3 goes on"):
        checkpoint.restore(tmp_path, {"w": jnp.zeros(2)})
    assert checkpoint.restore(tmp_path, {"w": jnp.zeros(2)}, step=3)[0]["w"].tolist() == [1, 1]
    assert checkpoint.set_aside(tmp_path, 3) == ["left-00000009"]
    checkpoint.save(tmp_path, 9, {"w": jnp.full(2, 2.0)})
    assert checkpoint.restore(tmp_path, {"w": jnp.zeros(2)})[0]["w"].tolist() == [2, 2]


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
    """What is on the disk is what was given, whatever became of the arrays since."""
    grow = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(300_000)
    for at in range(1, 6):
        x = grow(x)
        saving = checkpoint.save_async(tmp_path, at, {"x": x}, keep=9, notes={"at": at})
        for _ in range(3):
            x = grow(x)
        saving.wait()
        assert saving.done()
        assert 0 < saving.blocked <= saving.took()
        assert (np.asarray(checkpoint.restore(tmp_path, {"x": jnp.zeros(300_000)})[0]["x"]) == 4 * at - 3).all()
        assert checkpoint.notes(tmp_path, at) == {"at": at}


def test_the_newest_is_never_removed(tmp_path):
    with pytest.raises(ValueError, match="keep=0 checkpoints: at least 1"):
        checkpoint.save(tmp_path, 1, {"w": jnp.ones(2)}, keep=0)
    assert not list(tmp_path.iterdir())
    for at in (1, 2):
        checkpoint.save(tmp_path, at, {"w": jnp.full(2, at)}, keep=1)
    assert checkpoint.steps(tmp_path) == [2]


def test_nothing_to_restore_is_said(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    with pytest.raises(FileNotFoundError, match="no complete checkpoint in"):
        checkpoint.restore(tmp_path / "none", {"w": jnp.zeros(2)})
    checkpoint.save(tmp_path, 3, {"w": jnp.ones(2)})
    with pytest.raises(FileNotFoundError, match="no complete checkpoint of step 4"):
        checkpoint.restore(tmp_path, {"w": jnp.zeros(2)}, step=4)


def misfit(state, kind):
    params = dict(state.params)
    if kind == "shape":
        params["embed"] = jnp.zeros((7, 4))
    elif kind == "dtype":
        params["embed"] = params["embed"].astype(jnp.float16)
    elif kind == "rank":
        params["half"] = params["half"].reshape(2, 2)
    elif kind == "missing":
        params["head"] = jnp.zeros(4)
    elif kind == "extra":
        del params["half"]
    return state.replace(params=params)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("shape", r"params\.embed is float32\[6, 4\] there, float32\[7, 4\] here"),
        ("dtype", r"params\.embed is float32\[6, 4\] there, float16\[6, 4\] here"),
        ("rank", r"params\.half is bfloat16\[4\] there, bfloat16\[2, 2\] here"),
        ("missing", r"params\.head is missing in it"),
        ("extra", r"params\.half is only in it"),
    ],
)
def test_another_model_is_refused_by_name(saved, kind, message):
    directory, state = saved
    with pytest.raises(ValueError, match=message):
        checkpoint.restore(directory, misfit(state, kind))


def test_another_optimizer_is_refused(saved):
    directory, state = saved
    made = optimizer.make(OptimizerConfig(name="adamw"), 10, state.params)
    with pytest.raises(ValueError, match="of another model or optimizer"):
        checkpoint.restore(directory, step.init_state(state.params, made, state.key, state.algorithm))


def test_a_changed_value_is_named_by_its_leaf(saved, tmp_path):
    """Files as they were written, but other values in them: the hash of the values speaks."""
    shutil.copytree(saved[0], tmp_path / "copy")
    changed = saved[1].replace(params=saved[1].params | {"embed": saved[1].params["embed"].at[2, 1].add(1e-3)})
    checkpoint.save(tmp_path / "other", 7, changed)
    mine, theirs = (tmp_path / name / "00000007" for name in ("copy", "other"))
    leaves = manifest.read(mine)["leaves"]
    shutil.rmtree(mine / "state")
    shutil.move(theirs / "state", mine / "state")
    manifest.write(mine, 7, leaves, {})
    with pytest.raises(ValueError, match=r"is damaged: leaf params\.embed is not as it was written; there is no older one"):
        checkpoint.restore(tmp_path / "copy", train_state(1))


def test_a_note_that_was_changed_is_refused(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": jnp.ones(2)}, notes={"metrics_bytes": 120})
    path = tmp_path / "00000001" / manifest.FILE
    path.write_text(path.read_text().replace("120", "121"))
    with pytest.raises(ValueError, match=r"00000001 is damaged: file manifest\.json is not as it was written"):
        checkpoint.notes(tmp_path, 1)


def test_a_step_moved_to_another_number_is_refused(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "copy")
    (tmp_path / "copy" / "00000007").rename(tmp_path / "copy" / "00000008")
    with pytest.raises(ValueError, match=r"00000008 is damaged: file manifest\.json is that of step 7"):
        checkpoint.restore(tmp_path / "copy", train_state(1))


def test_a_save_that_fails_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"w": jnp.ones(2)})

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write_atomic", full)
    with pytest.raises(OSError, match=r"the disk was full before checkpoint 2 .* was whole; step 1 is kept as it was"):
        checkpoint.save(tmp_path, 2, {"w": jnp.zeros(2)}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["00000001"]
    assert checkpoint.restore(tmp_path, {"w": jnp.zeros(2)})[0]["w"].tolist() == [1, 1]


def test_room_on_the_disk_is_looked_at_before_a_save(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"w": jnp.ones(2)})
    state = {"w": jnp.zeros(1_000_000)}  # 4 MB, and one beside them

    def free(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9**9, 0, size))

    free(4_999_999)
    with pytest.raises(OSError, match=r"checkpoint 2 takes 5\.0 MB and .* has 5\.0 MB free; step 1 is kept as it was"):
        checkpoint.save(tmp_path, 2, state)
    assert [p.name for p in tmp_path.iterdir()] == ["00000001"]
    free(5_000_000)
    checkpoint.save(tmp_path, 2, state)
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_another_mesh_reads_the_same_values(tmp_path):
    specs = {"w": sharding.ParamSpec((8, 4), ("embed", "mlp"), sharding.normal(1.0))}
    values = sharding.init_params(specs, jax.random.key(0))
    wide = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    checkpoint.save(tmp_path, 1, jax.device_put(values, sharding.shardings(specs, wide)))
    narrow = sharding.make_mesh(sharding.MeshConfig(fsdp=4), jax.devices()[:4])
    restored, _ = checkpoint.restore(tmp_path, sharding.abstract(specs, narrow))
    np.testing.assert_array_equal(restored["w"], values["w"])
    assert restored["w"].sharding == sharding.shardings(specs, narrow)["w"]


def toy_outputs(params, frozen, batch, key):
    del frozen
    return Outputs(scores=batch @ params["w"] + 0.01 * jax.random.normal(key))


def toy_loss(outputs, batch, config):
    del batch, config
    return {"loss/toy": Term(jnp.square(outputs.scores - 1).sum(), jnp.float32(outputs.scores.shape[0]))}, {}


def test_resuming_at_every_step_is_the_unbroken_run_bit_for_bit(tmp_path):
    made = optax.adam(0.1)
    train_step = step.make_train_step(toy_outputs, toy_loss, None, made)

    def start():
        return step.init_state({"w": jnp.arange(3.0)}, made, jax.random.key(0))

    def batch(i):  # a function of the step alone
        return jax.random.normal(jax.random.fold_in(jax.random.key(1), i), (4, 3))

    state, total = start(), 6
    for i in range(total):
        checkpoint.save(tmp_path, i, state, keep=total)
        state, _ = train_step(state, (), batch(i))
    for stop in range(total):
        resumed, at = checkpoint.restore(tmp_path, start(), step=stop)
        assert at == int(resumed.step) == stop
        for i in range(stop, total):
            resumed, _ = train_step(resumed, (), batch(i))
        assert_same_bits(resumed, state)
    assert train_step.programs() == 1  # a restored state is placed as a new one


def test_manifest_says_what_is_inside(saved):
    told = json.loads((saved[0] / "00000007" / manifest.FILE).read_text())
    assert told["leaves"]["params.embed"].keys() == {"shape", "dtype", "blake2b"}
    assert told["leaves"]["params.half"]["dtype"] == "bfloat16"
    files = [p for p in (saved[0] / "00000007").rglob("*") if p.is_file() and p.stat().st_size]
    on_disk = {os.path.relpath(p, saved[0] / "00000007" / "state") for p in files} - {"../manifest.json"}
    assert on_disk == {name for name in told["files"] if (saved[0] / "00000007" / "state" / name).stat().st_size}
