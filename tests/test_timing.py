"""The clock of a run: stages that add up to the whole, rates of what was really computed, traces of the steps asked for."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import lm
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.training import chips, cli, flops, timing
from jaxrlhf.training.flops import Pass
from jaxrlhf.training.run import Run
from jaxrlhf.training.timing import Clock, Options

SHAPE = TransformerConfig(64, 32, 2, 4, 2, 8, 48, 32)


class Watch:
    """Seconds that a test turns on by hand."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def work(self, seconds: float, result=None):
        self.seconds += seconds
        return result


def seconds(row: dict[str, float]) -> dict[str, float]:
    return {name[5:]: value for name, value in row.items() if name.startswith("time/")}


def test_stages_have_their_own_time_and_add_up():
    """The innermost stage has the time; compiling inside a stage is not the stage's."""
    watch = Watch()
    clock = Clock(now=watch)
    update = clock.timed("update", lambda: watch.work(4))

    def judge():
        watch.work(1)
        update()
        clock.programs.seconds += 2  # jax says that it compiled two of these seconds
        watch.work(3)

    rows = []
    for i in clock.steps(range(3), 3):
        watch.work(0.5)
        update()
        if i == 1:
            clock.timed("evaluate", judge)()
        watch.work(0.25)
        rows.append(seconds(clock.row()))
        with clock.within("save"):
            watch.work(8)
    assert rows[0] == {"step": 4.75, "other": 0.75, "compile": 0, "update": 4}
    assert rows[1] == {"step": 20.75, "other": 0.75, "compile": 2, "update": 8, "evaluate": 2, "save": 8}
    assert rows[2] == {"step": 12.75, "other": 0.75, "compile": 0, "update": 4, "evaluate": 0, "save": 8}
    for row in rows:
        assert sum(row.values()) - row["step"] == row["step"]


def test_a_real_run_adds_up_to_the_wall_clock():
    """With jax at work and compiling: what the stages sum to is what another clock says of the same moments."""
    clock = Clock()
    clock.programs.open()
    try:
        update = clock.timed("update", jax.jit(lambda x: (x @ x).sum()))
        marks = []
        for i in clock.steps(range(3), 3):
            update(np.ones((64 + i, 64 + i), np.float32))
            with clock.within("evaluate"):
                jnp.ones(i + 3).sum()
            row = clock.row()
            marks.append((clock._since, row))
    finally:
        clock.programs.close()
    for (before, _), (after, row) in itertools.pairwise(marks):
        times = seconds(row)
        whole = times.pop("step")
        assert whole == pytest.approx(after - before, rel=1e-9)
        assert sum(times.values()) == pytest.approx(whole, rel=1e-9)
        assert min(times.values()) >= 0
        assert times["compile"] > 0  # every step has another shape
        assert row["compile/programs"] >= 1


def test_waiting_is_a_choice():
    """With `wait` a stage ends when its results are there; without, it hands them on as they are."""
    waited = []

    @dataclasses.dataclass
    class Result:
        def block_until_ready(self):
            waited.append(self)
            return self

    for wait, count in ((True, 1), (False, 0)):
        waited.clear()
        Clock(Options(wait=wait)).timed("score", Result)()
        assert len(waited) == count


def learned(clock: Clock, batch, *passes: Pass, times: int = 1) -> None:
    clock.learner(lambda state, frozen, batch: (state, {"loss": jnp.zeros([])}), *passes, times=times)(None, None, batch)


def rows(prompt: list[int], response: list[int], width: int = 12) -> lm.Batch:
    return lm.responses(np.zeros((len(prompt), width), np.int32), np.array(prompt), np.array(response), width - 1)


def test_rates_are_of_real_tokens_over_the_steps_own_time():
    """Padding is computed and not counted; evaluation, saving and compiling are no part of the time."""
    watch = Watch()
    clock = Clock(Options(product_rate=1e9), now=watch)
    one = Pass(SHAPE, gradient=True)
    for _ in clock.steps(range(1), 1):
        with clock.within("update"):
            learned(clock, rows([3, 2], [5, 2]), one, times=3)
            watch.work(2)
        with clock.within("evaluate"):
            watch.work(50)
        clock.programs.seconds += 10
        watch.work(10)
        row = clock.row()
    lengths = flops.real(np.array([3, 2]), np.array([5, 2]))
    per_second = 1e9 * jax.device_count()
    assert row["throughput/tokens_per_s"] == 12 / 2
    assert row["throughput/padding_efficiency"] == 12 / 24
    assert row["throughput/model_flops_per_s"] == 3 * flops.model(one, lengths) / 2
    assert row["throughput/mfu"] == pytest.approx(3 * flops.model(one, lengths) / 2 / per_second)
    assert row["throughput/hfu"] == pytest.approx(3 * flops.hardware(one, lengths) / 2 / per_second)
    assert row["throughput/mfu_update"] == row["throughput/mfu"]
    assert row["throughput/hfu"] > row["throughput/mfu"], "remat computes the forward pass twice"


def test_packed_rows_count_their_texts_and_a_mix_counts_both():
    clock = Clock()
    segments = np.array([[1, 1, 2, 2, 2, 0]])
    packed = lm.packed(np.zeros((1, 6), np.int32), segments)
    learned(clock, packed, Pass(SHAPE, gradient=True))
    assert clock.count.model["update"] == flops.model(Pass(SHAPE, gradient=True), flops.packed(segments))
    assert (clock.count.tokens, clock.count.computed) == (5, 6)

    @dataclasses.dataclass
    class Mixed:
        tokens: Any
        prompt_len: np.ndarray
        response_len: np.ndarray
        text: lm.Batch

    batch = rows([3], [4])
    learned(clock, Mixed(batch.tokens, np.array([3]), np.array([4]), packed), Pass(SHAPE, gradient=True), Pass(SHAPE))
    assert clock.count.tokens == 5 + 7 + 5  # the texts are read by what is trained, not by the reference


def test_utilisation_is_tokens_written_over_rows_times_steps():
    watch = Watch()
    clock = Clock(now=watch)
    for _ in clock.steps(range(1), 1):
        with clock.within("rollout"):
            clock.count.sampled(1e6, 30, [(8, 4), (4, 4)])
            watch.work(2)
        row = clock.row()
    assert row["throughput/rollout_utilisation"] == 30 / 48
    assert row["throughput/rollout_tokens_per_s"] == 15


def test_without_a_rate_there_is_no_mfu():
    """A CPU's name tells no rate, and a guess would look like a measurement."""
    clock = Clock()
    for _ in clock.steps(range(1), 1):
        learned(clock, rows([3], [5]), Pass(SHAPE, gradient=True))
        row = clock.row()
    assert "throughput/tokens_per_s" in row
    assert not [name for name in row if "mfu" in name or "hfu" in name]


def test_chips_are_known_by_the_names_that_jax_gives_them():
    @dataclasses.dataclass
    class Device:
        device_kind: str

    kinds = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200", "NVIDIA A100-SXM4-80GB": "A100"}
    kinds |= {"TPU v5 lite": "v5e", "TPU v5p": "v5p", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
    for kind, name in kinds.items():
        assert chips.of(Device(kind)) is chips.CHIPS[name]
    assert chips.of(Device("cpu")) is None
    assert chips.named("h200").memory == 141 * 10**9
    with pytest.raises(ValueError, match="chip 'B900' is not known: choose from A100, H100"):
        chips.named("B900")


def test_memory_is_the_devices_or_the_process_own(monkeypatch):
    assert timing.memory()["memory/process_peak_bytes"] > 1e7

    class Device:
        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return {"peak_bytes_in_use": self.peak}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(3), Device(9)])
    assert timing.memory() == {"memory/device_peak_bytes": 9}


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 4
    watch: Options = Options()


def test_a_run_logs_the_clock_and_writes_programs_and_traces(tmp_path):
    config = Config(watch=Options(profile_steps=(1, 3)))
    with Run.open(tmp_path / "run", config, tensorboard=False) as run:
        square = run.clock.timed("update", jax.jit(lambda x: x @ x))
        for i in run.steps(run.start, config.steps, "test"):
            run.log(i, {"loss": square(np.eye(4, dtype=np.float32)).sum()})
        found = run.metrics()
        run.done({})
    assert found == [{"step": i, "loss": 4.0} for i in range(4)], "what a run found, without figures of the machine"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in lines:
        times = {name: value for name, value in row.items() if name.startswith("time/")}
        assert sum(times.values()) == pytest.approx(2 * times["time/step"], rel=1e-9)
    assert lines[0]["compile/programs"] >= 1
    assert lines[2]["compile/programs"] == 0
    assert sorted(path.name for path in (tmp_path / "run" / "profile").iterdir()) == ["step_1", "step_3"]
    assert list((tmp_path / "run" / "profile" / "step_3").rglob("*.xplane.pb"))
    assert "<lambda>" in {row["name"] for row in json.loads((tmp_path / "run" / "programs.json").read_text())["programs"]}


def test_watching_otherwise_is_no_other_run(tmp_path):
    for options in (Options(), Options(wait=False, strict=True)):
        with Run.open(tmp_path, Config(watch=options), tensorboard=False):
            pass
    assert cli.load(Config, Path(tmp_path) / "config.yaml").watch.strict


def test_steps_that_do_not_come_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"profile_steps=\(1, 9\).*ends before step 4, so \[9\]"):
        list(Clock(Options(profile_steps=(1, 9)), tmp_path).steps(range(4), 4))
    with pytest.raises(ValueError, match="steps are 0, 1, 2"):
        Options(profile_steps=(-1,))
    with pytest.raises(ValueError, match="product_rate=0 must be > 0"):
        Options(product_rate=0)
