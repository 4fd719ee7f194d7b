"""Damage to a checkpoint is found, and named by file and leaf; nothing that is wrong is restored in silence."""

from __future__ import annotations

import pathlib
import random
import re
import shutil
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from run_cases import assert_same_bits, train_state

from jaxrlhf.training import checkpoint, manifest, session
from jaxrlhf.training.run import Run

# TensorStore leaves a future behind that nobody asked, when a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

LEAVES = set(manifest.leaves_of(train_state()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("saved")
    checkpoint.save(directory, 6, train_state(5))
    checkpoint.save(directory, 7, train_state())
    return directory


def flip(files: list[pathlib.Path], rng: random.Random) -> list[str]:
    path = rng.choice([path for path in files if path.stat().st_size])
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return [path.name]


def truncate(files: list[pathlib.Path], rng: random.Random) -> list[str]:
    path = rng.choice([path for path in files if path.stat().st_size])
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    return [path.name]


def delete(files: list[pathlib.Path], rng: random.Random) -> list[str]:
    path = rng.choice(files)
    path.unlink()
    return [path.name]


def swap(files: list[pathlib.Path], rng: random.Random) -> list[str]:
    one, two = next(pair for pair in iter(lambda: rng.sample(files, 2), None) if pair[0].read_bytes() != pair[1].read_bytes())
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    return [one.name, two.name]


def damaged(saved: pathlib.Path, copy: pathlib.Path, harm: Callable, rng: random.Random) -> None:
    """Harm one copy, and restore it."""
    shutil.copytree(saved, copy)
    files = sorted(path for path in (copy / "00000007").rglob("*") if path.is_file())
    names = harm(files, rng)
    with pytest.raises(ValueError, match="00000007 is damaged: file") as raised:
        checkpoint.restore(copy, train_state(1))
    said = str(raised.value)
    assert any(name in said for name in names), (names, said)
    if manifest.FILE in names:
        assert "no leaf of it can be trusted" in said
    else:
        named = re.search(r"\((?:no leaf|leaf (.*?)(?: and \d+ more)?) is touched\)", said)
        assert named, said
        assert set((named[1] or "").split(", ")) - {""} <= LEAVES
    if "remove the folder" not in said:
        assert "--from-step 6 goes on from the one before" in said
    restored, at = checkpoint.restore(copy, train_state(1), step=6)  # which only an explicit step does
    assert at == 6
    assert_same_bits(restored, train_state(5))
    shutil.rmtree(copy)


@pytest.mark.parametrize("harm", [flip, truncate, delete, swap])
def test_damage_is_found_and_named(saved, tmp_path, harm):
    for seed in range(2):
        damaged(saved, tmp_path / "copy", harm, random.Random(seed))


@pytest.mark.full
def test_a_hundred_damages_are_found_and_named(saved, tmp_path):
    rng = random.Random(1)
    for number in range(100):
        damaged(saved, tmp_path / "copy", (flip, truncate, delete, swap)[number % 4], rng)


def test_the_leaf_that_is_touched_is_named_and_no_other(tmp_path):
    rng, draw = random.Random(0), np.random.default_rng(0)
    state = {name: jnp.asarray(draw.normal(size=20_000)) for name in ("one", "two")}
    checkpoint.save(tmp_path, 1, state)
    path = max((p for p in (tmp_path / "00000001").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data, found = path.read_bytes(), set()
    for _ in range(8):
        at = rng.randrange(1000, len(data) - 3000)  # the index at the end belongs to both
        path.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"\(leaf (one|two) is touched\)") as raised:
            checkpoint.restore(tmp_path, state)
        found.add(str(raised.value).partition("(")[2].partition(")")[0])
    assert len(found) == 2


def test_an_older_step_is_taken_only_when_it_is_asked_for(saved, tmp_path):
    out = tmp_path / "run"
    with Run.open(out, train_config(), tensorboard=False) as run:
        run.log(0, {"x": 0})
        for step in (5, 6):
            run.log(step, {"x": step})
            run.maybe_save(step, train_state(step), last=True)
    folder = out / "checkpoints"
    delete([next((folder / "00000007").rglob("manifest.ocdbt"))], random.Random(0))
    with Run.open(out, train_config(), tensorboard=False) as run, pytest.raises(ValueError, match="--from-step 6 goes on"):
        run.restore(train_state(1))
    assert checkpoint.steps(folder) == [6, 7]
    with session.use(session.Session(from_step=6)), Run.open(out, train_config(), tensorboard=False) as run:
        assert_same_bits(run.restore(train_state(1)), train_state(5))
        assert run.start == 6
        assert [row["step"] for row in run.metrics()] == [0, 5]
        assert session.current().from_step is None  # a later stage goes on from its newest
        assert checkpoint.steps(folder) == [6]
        assert (folder / "left-00000007").is_dir()
        run.maybe_save(6, train_state(8), last=True)
    assert checkpoint.steps(folder) == [6, 7]  # the new one, which the old one did not stand in the way of
    told = pytest.raises(FileNotFoundError, match=r"no complete checkpoint of step 3 .*; complete: 6, 7")
    with session.use(session.Session(from_step=3)), Run.open(out, train_config(), tensorboard=False) as run, told:
        run.restore(train_state(1))


def train_config():
    """Any settings will do."""
    return session.Session(started=0.0)
