"""The best step of a run: chosen by one figure, kept whole, named by the checkpoints, and the same after any interruption."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import best as scripts
from jaxrlhf.training import best, checkpoint, events, metrics, session
from jaxrlhf.training.run import Run

VALUES = (5.0, 3.0, 4.0, math.nan, 3.0, 2.0, 2.5)  # before each step and after the last: fewest after 0, 1, 5 updates


@dataclasses.dataclass(frozen=True)
class Config:
    out: pathlib.Path = pathlib.Path("unused")


class Killed(Exception):
    """The process ended here."""


def open_run(out: pathlib.Path) -> Run:
    return Run.open(out, Config(), save_seconds=1e9, tensorboard=False)


def train(out: pathlib.Path, saves: tuple[int, ...] = (), killed_at: int | None = None, values=VALUES) -> dict:
    """A run whose weights are the number of its updates; it saves after the steps named."""
    with open_run(out) as run:
        state = run.restore({"w": jnp.zeros(3)})
        for step in run.steps(run.start, len(values) - 1, "toy"):
            run.best(step, "held_out/loss", values[step], state, higher=False)
            if step == killed_at:
                raise Killed  # what is being saved becomes whole first
            state = {"w": state["w"] + 1}
            run.log(step, {"x": step})
            run.maybe_save(step, state, last=step in saves)
        run.best(len(values) - 1, "held_out/loss", values[-1], state, higher=False)
        found = run.best_params(state)
        return run.done({"kept": float(found["w"][0])})


def kept(out: pathlib.Path) -> list[int]:
    return checkpoint.steps(out / best.FOLDER)


@pytest.mark.parametrize(
    ("before", "value", "higher", "better"),
    [
        (None, 1.0, True, True),
        (1.0, 1.1, True, True),
        (1.0, 0.9, True, False),
        (1.0, 0.9, False, True),
        (1.0, 1.1, False, False),
        (1.0, 1.0, True, False),  # of equals the first
        (1.0, 1.0, False, False),
        (None, math.nan, True, False),
        (1.0, math.inf, True, False),
    ],
)
def test_what_is_better(before, value, higher, better):
    known = None if before is None else {"metric": "m", "value": before, "step": 3}
    assert best.is_better(known, "m", value, higher) is better


def test_a_run_has_its_best_by_one_metric():
    with pytest.raises(ValueError, match="by one metric: held_out/a so far, held_out/b now"):
        best.is_better({"metric": "held_out/a", "value": 1.0, "step": 0}, "held_out/b", 2.0, True)


def test_the_best_is_kept_named_and_never_removed_by_later_saves(tmp_path):
    result = train(tmp_path, saves=(0, 1, 2, 3, 4, 5))
    told = json.loads((tmp_path / "result.json").read_text())["best"]
    assert told == result["best"]
    assert (told["metric"], told["value"], told["step"]) == ("held_out/loss", 2.0, 5)
    assert result["kept"] == 5.0  # the weights as they were when they were measured
    assert told["blake2b"] == checkpoint.contents(tmp_path / best.FOLDER, 5)
    assert [e["step"] for e in events.read(tmp_path) if e["kind"] == "best"] == [0, 1, 5]
    assert checkpoint.steps(tmp_path / best.CHECKPOINTS) == [5, 6]
    assert kept(tmp_path) == [1, 5]  # 1 is named by checkpoint 5, from which the run may go on
    assert checkpoint.notes(tmp_path / best.CHECKPOINTS, 5)["best"]["step"] == 1
    assert checkpoint.notes(tmp_path / best.CHECKPOINTS, 6)["best"] == told


@pytest.mark.parametrize("killed_at", [1, 5, *(pytest.param(n, marks=pytest.mark.full) for n in (0, 2, 3, 4))])
@pytest.mark.parametrize("saves", [(0, 1, 2, 3, 4, 5), (2,), ()])
def test_a_run_killed_around_an_improvement_chooses_as_the_unbroken_one(tmp_path, saves, killed_at):
    want = train(tmp_path / "whole", saves)
    with pytest.raises(Killed):
        train(tmp_path / "broken", saves, killed_at)
    again = train(tmp_path / "broken", saves)
    assert again["best"] == want["best"]
    assert again["kept"] == want["kept"]
    assert kept(tmp_path / "broken") == kept(tmp_path / "whole")


def test_a_best_that_no_checkpoint_names_is_not_believed(tmp_path):
    """Those steps are done anew, here with other figures: what was kept of them before is not what is found now."""
    with pytest.raises(Killed):
        train(tmp_path, saves=(2,), killed_at=5)  # kept 5, and goes on from 3, which names 1
    assert kept(tmp_path) == [1, 5]
    result = train(tmp_path, saves=(2,), values=(*VALUES[:5], 9.0, 9.0))
    assert (result["best"]["step"], result["kept"]) == (1, 1.0)
    assert kept(tmp_path) == [1]


def test_going_back_finds_the_best_of_then(tmp_path):
    train(tmp_path, saves=(4, 5))
    (tmp_path / "result.json").unlink()
    with session.use(session.Session(from_step=5)):
        result = train(tmp_path, values=(*VALUES[:5], 9.0, 9.0))
    assert (result["best"]["step"], result["best"]["value"], result["kept"]) == (1, 3.0, 1.0)
    assert kept(tmp_path) == [1]


def test_a_best_that_was_removed_is_said_to_be_gone_and_another_is_found(tmp_path, capsys):
    with pytest.raises(Killed):
        train(tmp_path, saves=(2,), killed_at=4)
    shutil.rmtree(tmp_path / best.FOLDER)
    result = train(tmp_path)
    assert "the best step, 1, is gone: looking anew" in capsys.readouterr().err
    assert [e["step"] for e in events.read(tmp_path) if e["kind"] == "best is gone"] == [1]
    assert (result["best"]["step"], result["kept"]) == (5, 5.0)


def test_a_best_that_is_not_what_was_kept_is_refused(tmp_path):
    """A changed file, and a whole checkpoint of something else in its place."""
    with pytest.raises(Killed):
        train(tmp_path, saves=(2,), killed_at=4)
    folder = checkpoint.folder(tmp_path / best.FOLDER, 1)
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"is damaged: file .*; remove {tmp_path}/best, and the same command goes on"):
        train(tmp_path)
    path.write_bytes(data)
    checkpoint.remove(tmp_path / best.FOLDER, [1])
    checkpoint.save(tmp_path / best.FOLDER, 1, {"w": jnp.full(3, 7.0)})
    with pytest.raises(ValueError, match="holds other arrays than those of the best step that the run noted"):
        train(tmp_path)


def test_a_save_of_the_best_that_fails_ends_the_run_and_leaves_the_one_before(tmp_path, monkeypatch):
    with pytest.raises(Killed):
        train(tmp_path, saves=(2,), killed_at=4)
    whole = checkpoint.manifests.write

    def full(folder, step, leaves, notes):
        if "metric" in notes:
            raise OSError(28, "No space left on device")
        whole(folder, step, leaves, notes)

    monkeypatch.setattr(checkpoint.manifests, "write", full)
    with pytest.raises(OSError, match=r"the disk was full before checkpoint 5 in .*best was whole; step 1 is kept as it was"):
        train(tmp_path)
    assert kept(tmp_path) == [1]
    assert events.read(tmp_path)[-1]["kind"] == "not saved"
    monkeypatch.undo()
    assert train(tmp_path)["best"]["step"] == 5


def test_without_a_figure_there_is_no_best(tmp_path):
    with pytest.raises(ValueError, match="no step has a held-out figure"), open_run(tmp_path) as run:
        run.best_params({"w": jnp.zeros(3)})


# ------------------------------------------------------------------------------------------------------------ in a script


def script(out: pathlib.Path, keep: scripts.Keep, every: int) -> tuple[float, float, dict]:
    """A script's loop: what it writes as the model, the figure of that, and the result."""
    by_weight = dict(enumerate(VALUES))

    def judge(params):
        return {"held_out/loss": by_weight[int(params["w"][0])]}, None

    with open_run(out) as run:
        state = run.restore({"w": jnp.zeros(3)})
        for step in run.steps(run.start, 6, "toy"):
            judged = scripts.judged(run, step, every, "held_out/loss", state, judge, higher=False)
            state = {"w": state["w"] + 1}
            run.log(step, judged | {"x": step})
        params, (figures, _) = scripts.finish(run, 6, every, "held_out/loss", state, judge, keep, higher=False)
        return float(params["w"][0]), figures["held_out/loss"], run.done({})


@pytest.mark.parametrize(("keep", "written", "figure"), [("last", 6.0, 2.5), ("best", 5.0, 2.0)])
def test_what_is_written_is_the_last_or_the_best_and_the_figures_are_its_own(tmp_path, keep, written, figure):
    params, told, result = script(tmp_path, keep, 1)
    assert (params, told) == (written, figure)
    assert result["best"]["step"] == 5
    rows = metrics.read(tmp_path)
    np.testing.assert_array_equal([row["held_out/loss"] for row in rows], VALUES)
    assert [row["step"] for row in rows] == list(range(7))


def test_every_so_many_steps(tmp_path):
    params, _, result = script(tmp_path, "best", 4)
    assert [row["step"] for row in metrics.read(tmp_path) if "held_out/loss" in row] == [0, 4, 6]
    assert (params, result["best"]["step"]) == (6.0, 6)


def test_a_script_that_measures_at_its_end_alone_keeps_nothing_beside(tmp_path):
    params, figure, result = script(tmp_path, "last", 0)
    assert (params, figure) == (6.0, 2.5)
    assert "best" not in result
    assert not (tmp_path / best.FOLDER).exists()
    assert [row for row in metrics.read(tmp_path) if "held_out/loss" in row] == []


@pytest.mark.parametrize(("keep", "every"), [("best", 0), ("last", -1)])
def test_the_best_of_nothing_is_refused(keep, every):
    with pytest.raises(ValueError, match=f"keep={keep} with evaluate_every={every}: give the steps"):
        scripts.check(keep, every)
