"""The run's directory: whose it is, what survives a kill, how signals end it, what a person sees."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.training import checkpoint, cli, ending, events, metrics, progress, session
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path = Path("x")
    steps: int = 4
    inner: Inner = Inner()


def open_run(out, config=None, **options) -> Run:
    return Run.open(out, Config() if config is None else config, tensorboard=False, **options)


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_a_new_run_writes_its_settings_and_its_result(tmp_path):
    with open_run(tmp_path / "a" / "b") as run:
        assert run.result is None
        run.done({"accuracy": jnp.float32(0.5), "n": np.int64(3)})
    assert cli.load(Config, tmp_path / "a" / "b" / "config.yaml") == Config()
    result = json.loads((tmp_path / "a" / "b" / "result.json").read_text())
    assert result["accuracy"] == 0.5
    assert result["n"] == 3
    assert 0 <= result["seconds"] < 60
    with open_run(tmp_path / "a" / "b") as run:
        assert run.result == result


def test_seconds_add_up_over_sessions(tmp_path):
    for _ in range(2):
        with open_run(tmp_path):
            time.sleep(0.1)
    with open_run(tmp_path) as run:
        assert 0.2 <= run.done({})["seconds"] < 10


def test_a_second_run_in_the_same_directory_is_refused_at_once(tmp_path):
    with open_run(tmp_path):
        start = time.monotonic()
        with pytest.raises(ValueError, match=rf"in use by another run \(pid {os.getpid()} on .*\)"):
            open_run(tmp_path)
        assert time.monotonic() - start < 2
    with open_run(tmp_path):  # free again
        pass


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    with open_run(tmp_path):
        pass
    (tmp_path / ".lock").write_text("pid 1 on here\n")
    with open_run(tmp_path):
        assert f"pid {os.getpid()} " in (tmp_path / ".lock").read_text()


def test_a_foreign_directory_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"is not empty and was not made by this program \(no run\.json\)"):
        open_run(tmp_path)
    assert contents(tmp_path) == before


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: --out must name a directory"):
        open_run(tmp_path / "file")
    with pytest.raises(ValueError, match=r"cannot write to the run directory .*; choose another --out"):
        open_run(tmp_path / "file" / "below")
    with pytest.raises(ValueError, match="cannot write to the run directory /proc/no/such"):
        open_run("/proc/no/such")


def test_a_run_that_ended_before_it_began_does_not_keep_its_settings(tmp_path):
    for steps in (4, 5):  # the first had a path wrong, say
        with pytest.raises(FileNotFoundError), open_run(tmp_path, Config(steps=steps)):
            raise FileNotFoundError("no model there")
    assert cli.load(Config, tmp_path / "config.yaml").steps == 5
    with open_run(tmp_path, Config(steps=6)) as run:
        run.log(0, {"loss": 1.0})
    with pytest.raises(ValueError, match=r"other settings \(steps: 6 there, 7 here\)"):
        open_run(tmp_path, Config(steps=7))


def test_other_settings_are_refused_by_name(tmp_path):
    with open_run(tmp_path) as run:
        run.log(0, {"loss": 1.0})
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(steps: 4 there, 5 here, inner\.rate: 0\.1 there, 0\.2 here\)"):
        open_run(tmp_path, Config(steps=5, inner=Inner(0.2)))
    assert contents(tmp_path) == before
    with open_run(tmp_path, Config(out=Path("moved"))):  # where it lies is no setting of the run
        pass
    with open_run(tmp_path, Config(steps=9), free=("out", "steps")):
        pass
    with open_run(tmp_path, Config(steps=9, inner=Inner(0.3)), free=("inner",)):  # with all that is in it
        pass
    assert cli.load(Config, tmp_path / "config.yaml").steps == 9


def test_damaged_json_is_named(tmp_path):
    with open_run(tmp_path):
        pass
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result\.json is not readable JSON"):
        open_run(tmp_path)
    (tmp_path / "result.json").unlink()
    with open_run(tmp_path):  # the failed one gave the lock back
        pass


def train(out: Path, total: int, stop_after: int | None = None, save_seconds: float = 0.0) -> np.ndarray:
    """A toy run: each step adds its own random number."""
    with open_run(out, save_seconds=save_seconds) as run:
        state = run.restore({"sum": jnp.zeros(2), "key": jax.random.key(0)})
        for step in run.steps(run.start, total, "toy"):
            noise = jax.random.normal(jax.random.fold_in(state["key"], step), (2,))
            state = state | {"sum": state["sum"] + noise}
            run.log(step, {"sum": state["sum"].sum()})
            if step == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            run.maybe_save(step, state)
        return np.asarray(state["sum"])


def test_resuming_at_every_step_is_the_unbroken_run(tmp_path):
    want = train(tmp_path / "whole", 4)
    rows = metrics.read(tmp_path / "whole")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for stop in range(4):
        with pytest.raises(SystemExit):
            train(tmp_path / str(stop), 4, stop_after=stop)
        assert checkpoint.latest(tmp_path / str(stop) / "checkpoints") == stop + 1
        np.testing.assert_array_equal(train(tmp_path / str(stop), 4), want)
        assert metrics.read(tmp_path / str(stop)) == rows


def signalled(out: Path, number: int, times: int = 1, save: bool = True) -> None:
    """A run that gets a signal in its third step."""
    with open_run(out) as run:
        for step in run.steps(0, 9, "toy"):
            for _ in range(times if step == 2 else 0):
                os.kill(os.getpid(), number)
            if save:
                run.maybe_save(step, {"w": jnp.full(2, step)})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_step_and_a_save(tmp_path, number, capsys):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        signalled(tmp_path, number)
    assert ended.value.code == 128 + number
    assert checkpoint.latest(tmp_path / "checkpoints") == 3
    assert signal.getsignal(number) == before
    assert "finishing this step and saving" in capsys.readouterr().err


def test_a_loop_without_saves_ends_too(tmp_path):
    with pytest.raises(SystemExit) as ended:
        signalled(tmp_path, signal.SIGTERM, save=False)
    assert ended.value.code == 143


def test_the_second_signal_does_not_wait(tmp_path):
    with pytest.raises(SystemExit) as ended:
        signalled(tmp_path, signal.SIGINT, times=2)
    assert ended.value.code == 130
    assert checkpoint.latest(tmp_path / "checkpoints") is None


def test_a_signal_between_loops_does_not_wait(tmp_path):
    went_on = []

    def run():
        with open_run(tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
            went_on.append(True)

    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 143
    assert not went_on


def test_saves_are_spaced_by_time_and_the_last_one_is_asked_for(tmp_path):
    with open_run(tmp_path, save_seconds=1000.0) as run:
        for step in run.steps(0, 3, "toy"):
            run.maybe_save(step, {"w": jnp.ones(1)}, last=step == 2)
    assert checkpoint.steps(tmp_path / "checkpoints") == [3]


def test_a_run_outside_the_main_thread_leaves_signals_alone(tmp_path):
    failed = []

    def work():
        try:
            with open_run(tmp_path) as run:
                assert list(run.steps(0, 2, "toy")) == [0, 1]
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed


def test_gradients_that_stay_bad_stop_the_run(tmp_path):
    steps = []

    def run():
        with open_run(tmp_path) as run:
            for step in run.steps(0, 9, "toy"):
                steps.append(step)
                run.log(step, {"optimizer/skipped_in_a_row": jnp.int32(step + 1)})

    with pytest.raises(ValueError, match="step 2: the gradient was not finite for 3 updates in a row"):
        run()
    assert steps == [0, 1, 2, 3]  # a row is read when the next one comes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with open_run(tmp_path) as run:
        for step in run.steps(0, 100, "ppo", show=("policy/kl_ref",)):
            now[0] += 20.0 if step == 0 else 2.0  # the first one compiles
            run.log(step, {"policy/kl_ref": 1.23456 + step})
    lines = terminal.getvalue().split("\r\x1b[2K")
    assert lines[1] == "ppo 0/100"
    assert lines[11] == "ppo 10/100  2.00 s/step  3:00 left  policy/kl_ref 9.235"
    assert lines[-1] == ""  # wiped


def test_quiet_where_there_is_no_terminal(tmp_path, capsys):
    with open_run(tmp_path) as run:
        list(run.steps(0, 3, "ppo"))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (65, "1:05"), (3725, "1:02:05")])
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def log_rows(out: Path, rows: list[dict], start: int = 0, save_last: bool = False) -> Run:
    """A run that logs rows and nothing else, and a checkpoint where one is asked for."""
    with open_run(out) as run:
        run.restore({"w": jnp.zeros(2)})
        for step, row in enumerate(rows, start):
            run.log(step, row, {"tokens": jnp.full(3, step)})
        if save_last:
            run.maybe_save(start + len(rows) - 1, {"w": jnp.zeros(2)}, last=True)
        return run


def alarms(out: Path) -> list[tuple[int, str]]:
    return [(event["step"], event["metric"]) for event in events.read(out) if event["kind"] == "alarm"]


FLAT = [{"loss/total": 1.0 + 0.01 * (i % 3)} for i in range(24)]


def test_a_jump_of_the_loss_is_an_event_each_time_and_printed_once(tmp_path, capsys):
    log_rows(tmp_path, [*FLAT, {"loss/total": 9.0}, {"loss/total": 9.5}, {"loss/total": 1.0}])
    assert alarms(tmp_path) == [(24, "loss/total"), (25, "loss/total")]
    assert capsys.readouterr().err.count("loss/total jumped") == 1


def test_an_alarm_stops_a_run_that_asks_for_it_and_leaves_the_batch(tmp_path):
    stop = session.use(session.Session(stop_on_alarm=True))
    with stop, pytest.raises(ValueError, match=r"step 24: loss/total jumped to 9: .*bad_batch_00000024\.npz"):
        log_rows(tmp_path, [*FLAT, {"loss/total": 9.0}, {"loss/total": 1.0}])
    assert np.load(tmp_path / "bad_batch_00000024.npz")["['tokens']"].tolist() == [24, 24, 24]


def test_a_kl_that_runs_away_is_an_event_and_ends_a_run_that_asks_for_it(tmp_path):
    rows = [{"policy/kl_ref": 2.0 + 0.1 * i} for i in range(6)]
    log_rows(tmp_path / "on", [*rows, {"policy/kl_ref": 40.0}, {"policy/kl_ref": 2.0}])
    assert alarms(tmp_path / "on") == [(6, "policy/kl_ref")]
    stop = session.use(session.Session(stop_on_alarm=True))
    with stop, pytest.raises(ValueError, match=r"step 6: policy/kl_ref ran away to 40 .*bad_batch_00000006\.npz"):
        log_rows(tmp_path / "off", [*rows, {"policy/kl_ref": 40.0}, {"policy/kl_ref": 2.0}])


def test_alarms_of_a_resumed_run_are_those_of_the_unbroken_one(tmp_path):
    """What the loss was before the run was interrupted still counts."""
    rows = [*FLAT, {"loss/total": 9.0}, {"loss/total": 1.0}]
    log_rows(tmp_path / "whole", rows)
    log_rows(tmp_path / "broken", rows[:22], save_last=True)
    log_rows(tmp_path / "broken", rows[22:], start=22)
    assert alarms(tmp_path / "broken") == alarms(tmp_path / "whole") == [(24, "loss/total")]


def test_a_fact_from_outside_is_asked_for_once_and_saved(tmp_path):
    asked = iter([7, 8, 9])
    for expected in (7, 7):
        with open_run(tmp_path) as run:
            assert run.once("sequence", lambda: next(asked)) == expected
            run.restore({"w": jnp.zeros(2)})
            assert run.once("sequence", lambda: next(asked)) == expected
            run.log(run.start, {"x": 1})
            run.maybe_save(run.start, {"w": jnp.zeros(2)}, last=True)
    with open_run(tmp_path / "another") as run:
        assert run.once("sequence", lambda: next(asked)) == 8


def test_the_time_is_up_after_a_step_that_the_next_one_would_not_fit_behind(tmp_path, monkeypatch, capsys):
    """Steps of 10 s, a minute in all, 2 s in reserve: the fifth ends at 50 s, and a sixth would be too much."""
    now = [1000.0]
    monkeypatch.setattr(ending.time, "monotonic", lambda: now[0])
    given, stopped = session.Session(max_minutes=1.0, started=1000.0), pytest.raises(SystemExit)
    with session.use(given), stopped as ended, open_run(tmp_path, save_seconds=1e9) as run:
        for step in run.steps(0, 99, "toy"):
            now[0] += 10.0
            run.log(step, {"x": step})
            run.maybe_save(step, {"w": jnp.zeros(2)})
    assert ended.value.code == session.OUT_OF_TIME == 75
    assert checkpoint.latest(tmp_path / "checkpoints") == 5
    assert [row["step"] for row in metrics.read(tmp_path)] == [0, 1, 2, 3, 4]
    assert "out of time (--max-minutes 1.0); the same command goes on" in capsys.readouterr().err


def test_a_loop_without_saves_is_ended_by_the_clock_too(tmp_path, monkeypatch):
    now, done, stopped = [0.0], [], pytest.raises(SystemExit)
    monkeypatch.setattr(ending.time, "monotonic", lambda: now[0])
    with session.use(session.Session(max_minutes=1.0, started=0.0)), stopped, open_run(tmp_path) as run:
        for step in run.steps(0, 99, "toy"):
            now[0] += 25.0
            done.append(step)
    assert done == [0, 1]


def test_a_signal_that_comes_behind_a_save_costs_no_step(tmp_path):
    """Between `maybe_save` and the next step: that step is done and saved, not dropped with those before it."""
    stopped = pytest.raises(SystemExit)
    with stopped, open_run(tmp_path, save_seconds=1e9) as run:
        for step in run.steps(0, 9, "toy"):
            run.log(step, {"x": step})
            run.maybe_save(step, {"w": jnp.full(2, step)})
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
    assert checkpoint.latest(tmp_path / "checkpoints") == 4
    assert [row["step"] for row in metrics.read(tmp_path)] == [0, 1, 2, 3]


def test_a_save_that_fails_behind_the_steps_is_told_by_the_next_one(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.manifests, "write", full)
    told = pytest.raises(OSError, match=r"the disk was full before checkpoint 1 .*there is no older one")
    with told, open_run(tmp_path, save_seconds=0.0) as run:
        for step in run.steps(0, 99, "toy"):
            run.log(step, {"x": step})
            run.maybe_save(step, {"w": jnp.zeros(2)})
            time.sleep(0.02)
    assert [event["kind"] for event in events.read(tmp_path)] == ["started", "not saved"]
    assert checkpoint.numbered(tmp_path / "checkpoints") == []


def test_what_a_run_says_of_its_machine_is_a_list_and_no_more(tmp_path, monkeypatch):
    """Versions, devices, commit; not the environment, in which secrets are."""
    monkeypatch.setenv("SECRET_OF_A_TEST", "hunter2")
    with open_run(tmp_path) as run:
        run.restore({"w": jnp.zeros(2)})
    told = json.loads((tmp_path / events.ENVIRONMENT).read_text())
    assert told["versions"]["jax"] == jax.__version__
    assert told["devices"] == {"cpu": jax.device_count()}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    told["versions"]["jax"] = "0.0.1"
    (tmp_path / events.ENVIRONMENT).write_text(json.dumps(told))
    with open_run(tmp_path) as run:
        run.restore({"w": jnp.zeros(2)})
    (changed,) = events.read(tmp_path)[-1]["changed"]
    assert changed.startswith("versions: ")


def test_an_event_that_a_power_cut_tore_is_dropped_and_none_before_it(tmp_path):
    first = events.Events(tmp_path)
    first.write("one", step=1)
    first.close()
    with open(tmp_path / events.FILE, "ab") as file:
        file.write(b'{"number": 2, "ki')
    before = (tmp_path / events.FILE).read_bytes()
    again = events.Events(tmp_path)
    again.write("two")
    again.close()
    assert (tmp_path / events.FILE).read_bytes().startswith(before.partition(b"\n")[0] + b"\n")
    assert [(event["number"], event["kind"]) for event in events.read(tmp_path)] == [(1, "one"), (2, "two")]
