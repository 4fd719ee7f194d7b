"""metrics.jsonl and the TensorBoard files."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import json
import math
import sys
import types

import jax.numpy as jnp
import pytest

from jaxrlhf.training import metrics, timing
from jaxrlhf.training.metrics import Metrics
from jaxrlhf.training.run import Run


def test_rows_are_written_one_step_late_and_in_full_at_the_end(tmp_path):
    log = Metrics(tmp_path, tensorboard=False)
    log.log(0, {"loss/lm": jnp.float32(0.5), "time/step": 0.25, "note": "first"})
    assert metrics.read(tmp_path) == []
    log.log(1, {"loss/lm": jnp.float32(0.25), "optimizer/skipped": jnp.int32(2)})
    assert metrics.read(tmp_path) == [{"step": 0, "loss/lm": 0.5, "time/step": 0.25, "note": "first"}]
    assert log.last["loss/lm"] == 0.5
    log.close()
    assert metrics.read(tmp_path)[1] == {"step": 1, "loss/lm": 0.25, "optimizer/skipped": 2}


def test_going_on_drops_the_rows_that_come_again_and_a_line_cut_short(tmp_path):
    log = Metrics(tmp_path, tensorboard=False)
    for step in range(5):
        log.log(step, {"x": step})
        if step == 2:
            log.sync()
            size = log.size()  # as a checkpoint notes it
    log.close()
    before = (tmp_path / metrics.FILE).read_bytes()
    with open(tmp_path / metrics.FILE, "a") as file:
        file.write('{"step": 5, "x"')  # killed while it wrote
    log = Metrics(tmp_path, start=3, size=size, tensorboard=False)
    assert (tmp_path / metrics.FILE).read_bytes() == before[:size]
    for step in range(3, 6):
        log.log(step, {"x": 10 * step})
    log.close()
    rows = metrics.read(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["x"] for row in rows] == [0, 1, 2, 30, 40, 50]


def test_every_line_is_json_even_with_numbers_that_json_lacks(tmp_path):
    log = Metrics(tmp_path, tensorboard=False)
    log.log(0, {"a": jnp.float32("nan"), "b": float("-inf")})
    log.close()

    def refuse(name):
        raise AssertionError(name)

    json.loads((tmp_path / metrics.FILE).read_text(), parse_constant=refuse)
    row = metrics.read(tmp_path)[0]
    assert math.isnan(row["a"])
    assert row["b"] == -math.inf


def test_rows_that_a_checkpoint_counts_on_may_not_be_missing(tmp_path):
    log = Metrics(tmp_path, tensorboard=False)
    log.log(0, {"x": 1})
    log.close()
    with pytest.raises(ValueError, match=r"has 20 bytes, but 30 when step 2 was saved: rows are missing"):
        Metrics(tmp_path, start=2, size=30, tensorboard=False)


def test_a_damaged_file_is_named_with_its_line(tmp_path):
    (tmp_path / metrics.FILE).write_text('{"step": 0}\nrubbish\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON object"):
        metrics.read(tmp_path)


def test_tensorboard_holds_the_same_numbers(tmp_path):
    log = Metrics(tmp_path)
    for step in range(3):
        log.log(step, {"loss/lm": jnp.float32(step) / 2, "note": "text is not plotted"})
    log.close()
    from tensorboardX.proto import event_pb2

    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found, at = file.read_bytes(), {}, 0
    while at < len(data):  # each record: length, its checksum, the event, its checksum
        size = int.from_bytes(data[at : at + 8], "little")
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
        found.update({(v.tag, event.step): v.simple_value for v in event.summary.value})
        at += size + 16
    assert found == {("loss/lm", 0): 0.0, ("loss/lm", 1): 0.5, ("loss/lm", 2): 1.0}


def test_without_tensorboardx_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"jaxrlhf\[loop\].*tensorboard=False"):
        Metrics(tmp_path)


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.json"
    metrics.write_atomic(path, "old")
    metrics.write_atomic(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


class Wandb(types.ModuleType):
    """What wandb.init and its run are asked for, in a module of that name."""

    def __init__(self, monkeypatch):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.begun, self.rows, self.finished = [], [], 0
        monkeypatch.setitem(sys.modules, "wandb", self)

    def init(self, **given):
        self.begun.append(given)
        return self

    def log(self, row, step):
        self.rows.append((step, row))

    def finish(self):
        self.finished += 1


def test_weights_and_biases_gets_the_numbers_of_every_row_under_one_id(tmp_path, monkeypatch):
    wandb = Wandb(monkeypatch)
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    for start in (0, 2):
        log = metrics.Metrics(tmp_path, start, log_size(tmp_path), tensorboard=False, wandb="proj")
        for step in (start, start + 1):
            log.log(step, {"loss": step / 2, "said": "words"})
        log.close()
    assert wandb.rows == [(i, {"loss": i / 2}) for i in range(4)]
    assert wandb.finished == 2
    first, second = wandb.begun
    assert first == second  # the same run goes on
    assert len(first.pop("id")) == 16
    expected = {"project": "proj", "resume": "allow", "name": tmp_path.name, "dir": str(tmp_path), "config": {"seed": 3}}
    assert first == expected


def log_size(folder) -> int:
    return (folder / metrics.FILE).stat().st_size if (folder / metrics.FILE).is_file() else 0


@dataclasses.dataclass(frozen=True)
class Config:
    watch: timing.Options = timing.Options()


def test_a_script_sends_rows_there_by_a_flag_and_is_refused_where_it_cannot(tmp_path, monkeypatch):
    config = Config(timing.Options(wandb="proj"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"watch\.wandb=proj: wandb is not installed: pip install 'jaxrlhf\[wandb\]'"):
        Run.open(tmp_path / "refused", config)
    assert not (tmp_path / "refused").exists()
    wandb = Wandb(monkeypatch)
    with Run.open(tmp_path, config, tensorboard=False) as run:
        for step in run.steps(0, 2, "toy"):
            run.log(step, {"loss": 1.0})
    assert [step for step, _ in wandb.rows] == [0, 1]
    assert {"loss", "time/step"} <= wandb.rows[0][1].keys()
