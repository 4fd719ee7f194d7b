"""Runs that are killed, told to stop, or run out of time or room, and then are started again: real processes, real signals.

A run that was broken must end as the unbroken one: the same parameters, and the same metrics, byte for byte.
"""

from __future__ import annotations

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest
import run_cases
from scripts import ROOT, command, environment

from experiments import stage
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.training import checkpoint, events, metrics
from jaxrlhf.training import step as train

TOY = pathlib.Path(__file__).parent / "toy.py"
TINY = TransformerConfig(
    vocab_size=259, width=16, layers=1, heads=2, kv_heads=2, head_width=8, mlp_width=32, max_length=16, dtype="float32"
)


def toy(out: pathlib.Path, *flags: object) -> list[str]:
    return [sys.executable, str(TOY), "--out", str(out), *map(str, flags)]


def start(words: list[str], fault: str = "") -> subprocess.Popen:
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=ROOT, env=environment() | {"FAULT": fault}, **quiet)


def finish(words: list[str], fault: str = "") -> subprocess.CompletedProcess:
    settings = {"capture_output": True, "text": True, "check": False, "timeout": 500}
    return subprocess.run(words, cwd=ROOT, env=environment() | {"FAULT": fault}, **settings)


def read_until(process: subprocess.Popen, word: str, times: int) -> bool:
    """Read its output to the given occurrence of a word; False if it ended before."""
    for line in process.stdout:
        times -= line.startswith(word)
        if times == 0:
            return True
    return False


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def ends(out: pathlib.Path) -> dict[str, bytes]:
    """What a finished run must be equal in."""
    found = run_cases.ends(out)
    assert len(found) == 2
    rows = [row["step"] for row in metrics.read(out)]
    assert rows == list(range(len(rows))), "each step once"
    return found


def kinds(out: pathlib.Path) -> list[str]:
    """What happened, but for the best steps that were kept."""
    return [event["kind"] for event in events.read(out) if event["kind"] != "best"]


def best(out: pathlib.Path) -> dict:
    """The best step of a finished run, of which what is kept is as it was written."""
    found = json.loads((out / "result.json").read_text())["best"]
    checkpoint.verify(out / "best", found["step"])
    assert checkpoint.contents(out / "best", found["step"]) == found["blake2b"]
    assert not list((out / "best").glob(".tmp-*"))
    return found


# ------------------------------------------------------------------------------------------------------------- SIGKILL


STEPS = ("--steps", 24, "--width", 300, "--evaluate-every", 3, "--pause", 0.05)
KINDS = {"checkpoints": "saved", "best": "best"}  # of events
EACH = ("--save-seconds", 0)  # as soon as the last one is whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    """The unbroken run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = finish(toy(out, *STEPS, *EACH))
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.timeout(3000)  # fifty kills take nine minutes on two busy cores
@pytest.mark.parametrize(
    ("said", "folder", "kills"),
    [
        ("saving", "checkpoints", 1),
        pytest.param("saving", "checkpoints", 50, marks=pytest.mark.full),
        pytest.param("keeping", "best", 20, marks=pytest.mark.full),
    ],
)
def test_killed_inside_saves(whole, tmp_path, said, folder, kills):
    """A kill counts where it left an unfinished save behind: of the state, or of the best step."""
    took = sorted(event["took"] for event in events.read(whole) if event["kind"] == KINDS[folder])
    moments, inside, sessions, runs = random.Random(kills), 0, 0, 0
    while inside < kills:
        out, last, runs = tmp_path / f"killed{runs}", 0, runs + 1
        while inside < kills and not (out / "result.json").exists():
            process = start(toy(out, *STEPS, *EACH))
            if read_until(process, said, moments.randint(1, 3)):
                time.sleep(moments.uniform(0, took[len(took) // 2]))
            kill(process)
            sessions += 1
            inside += bool(list((out / folder).glob(".tmp-[0-9]*")))
            found = checkpoint.latest(out / "checkpoints") or 0
            assert found >= last, "a kill took a step that was saved"
            last = found
        again = finish(toy(out, *STEPS, *EACH))
        assert again.returncode == 0, again.stderr
        assert ends(out) == ends(whole)
        assert best(out) == best(whole)
        assert not list((out / "checkpoints").glob(".tmp-*"))
        found = events.read(out)
        assert [event["number"] for event in found] == list(range(1, len(found) + 1))
        assert found[-1]["kind"] == "done"
    print(f"{inside} kills inside saves ({folder}) in {sessions} sessions of {runs} runs")


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> pathlib.Path:
    """An untrained model for sums, as the start's stage leaves one."""
    out = tmp_path_factory.mktemp("start")
    params = transformer.build(TINY).init(jax.random.key(0))
    stage.save(out, "policy", jax.device_get(params), TINY, tokenizers.train(["1+1="], TINY.vocab_size))
    return out


def ppo(out: pathlib.Path, policy: pathlib.Path, iterations: int) -> list[str]:
    small = ("--iterations", iterations, "--batch", 16, "--evaluate-every", 4, "--held-out-prompts", 8)
    return command("ppo", "--preset", "arithmetic", "--policy", policy, "--out", out, *small, "--save-seconds", 0)


@pytest.mark.full
@pytest.mark.timeout(3000)  # on two busy cores ten minutes are not enough
def test_ppo_killed_anywhere_twenty_times(policy, tmp_path):
    iterations, kills = 30, 20
    began = time.monotonic()
    whole = finish(ppo(tmp_path / "whole", policy, iterations))
    assert whole.returncode == 0, whole.stderr
    length, moments, landed, runs = time.monotonic() - began, random.Random(kills), 0, 0
    while landed < kills:
        out, runs = tmp_path / f"killed{runs}", runs + 1
        while landed < kills and not (out / "result.json").exists():
            process = start(ppo(out, policy, iterations))
            try:
                process.communicate(timeout=moments.uniform(0.1, 0.9) * length)
            except subprocess.TimeoutExpired:
                landed += 1
                kill(process)
        again = finish(ppo(out, policy, iterations))
        assert again.returncode == 0, again.stderr
        assert ends(out) == ends(tmp_path / "whole")
    print(f"{landed} kills in {runs} runs of PPO")


# ------------------------------------------------------------------------------------------------- asked to stop early


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.full) for n in (signal.SIGHUP, signal.SIGINT))]
)
def test_a_signal_costs_no_step(whole, tmp_path, number):
    """It ends after the step that is going on, or the one after it, and a save; what was logged was saved."""
    process = start(toy(tmp_path / "run", *STEPS))
    assert read_until(process, "step", 4)
    process.send_signal(number)
    output, said = process.communicate()
    assert process.returncode == 128 + number
    assert "the same command goes on from here" in said
    last = 3 + output.count("step")  # of those that had begun
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") == last + 1 == len(metrics.read(tmp_path / "run"))
    assert output.count("step") <= 1
    assert kinds(tmp_path / "run") == ["started", "saved", "asked to end"]
    assert finish(toy(tmp_path / "run", *STEPS)).returncode == 0
    assert ends(tmp_path / "run") == ends(whole)


@pytest.mark.full
@pytest.mark.parametrize("pause", [0.0, 0.05, 0.5])
def test_the_second_signal_does_not_wait_for_a_save(tmp_path, pause):
    process = start(toy(tmp_path / "run", "--steps", 10_000, "--width", 1500, "--save-seconds", 0, "--pause", 1))
    assert read_until(process, "saving", 1)
    process.send_signal(signal.SIGINT)
    time.sleep(pause)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said


@pytest.mark.full
def test_the_clock_ends_a_run_in_time_and_the_same_command_goes_on(whole, tmp_path):
    words, sessions = toy(tmp_path / "run", *STEPS[:-1], 0.5), 0
    while (done := finish([*words, "--max-minutes", "0.2"])).returncode == 75 and sessions < 20:
        assert "out of time (--max-minutes 0.2); the same command goes on from here" in done.stderr
        sessions += 1
    assert sessions >= 1
    assert done.returncode == 0, done.stderr
    assert ends(tmp_path / "run") == ends(whole)


# ---------------------------------------------------------------------------------------------------- gradients and disk


def test_gradients_that_stay_bad_end_the_run_and_leave_the_batch(tmp_path):
    done = finish(toy(tmp_path / "run", "--save-seconds", 0), fault="not finite from 2")
    assert done.returncode == 2
    assert "step 4: the gradient was not finite for 3 updates in a row" in done.stderr
    assert "bad_batch_00000004.npz" in done.stderr
    batch = np.load(tmp_path / "run" / "bad_batch_00000004.npz")
    (name,) = batch.files
    assert "rows" in name
    assert np.isnan(batch[name][0, 0])
    assert np.isfinite(batch[name].ravel()[1:]).all()
    want = jax.random.normal(jax.random.fold_in(jax.random.key(1), 4), (4, 100))
    np.testing.assert_array_equal(batch[name].ravel()[1:], np.asarray(want).ravel()[1:])
    found = events.read(tmp_path / "run")
    assert [event["step"] for event in found if event["kind"] == "skipped"] == [2, 3, 4]
    assert [event["step"] for event in found if event["kind"] == "stopped"] == [4]


def in_small_disk(script: str, mount: pathlib.Path, size: str) -> subprocess.CompletedProcess:
    """Run a shell script in which a real file system of `size` is mounted; it goes when the script ends."""
    mount.mkdir()
    for unshare in (["unshare", "-m"], ["unshare", "-rm"]):
        words = [*unshare, "sh", "-c", f"mount -t tmpfs -o size={size} tmpfs {mount} && {script}"]
        try:
            if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode == 0:
                return subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        except FileNotFoundError:
            break
    pytest.skip("no mount namespaces here")


@pytest.mark.parametrize(("fault", "size"), [pytest.param("", 3900, marks=pytest.mark.full), ("no look at the disk", 1700)])
def test_a_full_disk_is_one_line_and_the_last_good_step_is_exact(tmp_path, fault, size):
    """Noticed before a save; or, where something else fills the disk meanwhile, in the middle of it."""
    mount = tmp_path / "disk"
    # A checkpoint is 1.9 MB of arrays, which Orbax packs into 0.6: after two, the third has no room.
    run = " ".join(toy(mount / "run", "--steps", 12, "--width", 400, "--save-seconds", 0, "--pause", 1))
    keep = f"cp -r {mount}/run {tmp_path}/kept; echo $code > {tmp_path}/code"
    in_small_disk(f"{{ FAULT='{fault}' {run} 2> {tmp_path}/said; code=$?; {keep}; }}", mount, f"{size}k")
    said = (tmp_path / "said").read_text().strip().splitlines()
    assert (tmp_path / "code").read_text().strip() == "2", said
    assert len(said) == 1, said
    assert "is kept as it was: make room, and the same command goes on" in said[0]
    assert ("MB free" in said[0]) == (not fault)
    folder = tmp_path / "kept" / "checkpoints"
    found = checkpoint.steps(folder)
    assert found == list(range(found[0], found[0] + len(found)))
    assert not list(folder.glob(".tmp-*"))
    assert kinds(tmp_path / "kept")[-1] == "not saved"
    made = optax.adam(0.01)
    like = train.init_state({"w": jax.numpy.zeros((400, 400))}, made, jax.random.key(0))
    assert int(checkpoint.restore(folder, like)[0].step) == found[-1]  # which compares every hash
