"""Jobs of several processes: real child processes over loopback, one or two devices each, against one process."""

from __future__ import annotations

import contextlib
import json
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import run_cases
import sameness
import tiny_policy
from safetensors.numpy import load_file
from scripts import ROOT, command, environment

from jaxrlhf.core import processes
from jaxrlhf.training import checkpoint, cli, events, timing


def free_port(low: int = 0, high: int = 0) -> int:
    """A port of loopback that nobody listens on now; of a range, the first."""
    for port in range(low, high + 1):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise AssertionError(f"no free port from {low} to {high}")


def together(
    commands: list[list[str]],
    environments: list[dict[str, str]],
    meanwhile: Callable[[list[subprocess.Popen]], None] | None = None,
) -> list[subprocess.CompletedProcess]:
    """Processes started at once; what each wrote, and how it ended. None outlives the test: once one has failed, the others,
    which wait for it, have ten seconds."""
    with contextlib.ExitStack() as files:
        pipes = [[files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in commands]
        running = [
            subprocess.Popen(line, cwd=ROOT, env=own, stdout=out, stderr=error, text=True)
            for line, own, (out, error) in zip(commands, environments, pipes, strict=True)
        ]
        try:
            end = time.monotonic() + 400
            if meanwhile is not None:
                meanwhile(running)
            while any(child.poll() is None for child in running) and time.monotonic() < end:
                if any(child.poll() for child in running):
                    end = min(end, time.monotonic() + 10)
                time.sleep(0.05)
        finally:
            for child in running:
                child.kill()
                child.wait()
        texts = [[pipe.seek(0) or pipe.read() for pipe in pair] for pair in pipes]
    return [subprocess.CompletedProcess(c.args, c.returncode, *text) for c, text in zip(running, texts, strict=True)]


def two(what: str, folder: pathlib.Path, devices: int = 2, **own: Any) -> list[subprocess.CompletedProcess]:
    """tests/two_processes.py in two processes that the flags join."""
    job = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process")
    lines = [[sys.executable, "tests/two_processes.py", what, str(folder), *job, str(i)] for i in range(2)]
    done = together(lines, [environment(devices)] * 2)
    assert [each.returncode for each in done] == [0, 0], done[0].stderr[-2000:] + done[1].stderr[-2000:]
    return done


# ------------------------------------------------------------------------------------------------ in one process


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, None),  # a shell inside of an allocation
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ],
)
def test_a_launcher_is_known_by_its_variables(told, name):
    assert processes.launcher(told) == name


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--coordinator", "h:1"), r"--processes, --process is missing"),
        (("--processes", "2"), r"--coordinator, --process is missing"),
        (("--coordinator", "h", "--processes", "2", "--process", "0"), r"--coordinator h must be HOST:PORT"),
        (
            ("--coordinator", "h:1", "--processes", "2", "--process", "2"),
            r"--process 2: give each of the --processes 2 .* 0 .. 1",
        ),
        (("--processes=two",), r"--processes two must be a whole number"),
    ],
)
def test_a_job_that_is_not_wholly_described_is_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        cli.join(**cli.job(list(flags)))


def test_one_process_needs_nobody(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    flags = ["--seed", "3", "--processes", "1", "--out", "x"]
    assert processes.start(**cli.job(flags)) is False
    assert flags == ["--seed", "3", "--out", "x"]
    assert processes.by_first(lambda: flags) is flags
    assert processes.largest(3, 1) == (3, 1)
    array = np.ones(2)
    assert processes.added(array)[0] is array


def test_a_launcher_that_cannot_be_read_is_named(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")

    def absent(**given):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", absent)
    with pytest.raises(ValueError, match=r"job that Kubernetes describes .*should be defined.*docs/scaling.md"):
        processes.start()


# ------------------------------------------------------------------------------------------------ in two


def test_two_processes_agree(tmp_path):
    done = two("agreed", tmp_path)
    assert "0 is done" in done[0].stdout
    assert "is done" not in done[1].stdout  # only the first talks
    assert json.loads((tmp_path / "run" / "result.json").read_text())["by"] == 0


@pytest.mark.full
def test_two_processes_learn_what_one_does(tmp_path):
    two("trained", tmp_path)
    found = np.load(tmp_path / "found.npy", allow_pickle=True).item()
    sameness.assert_same(found["recorded"], sameness.train(None, sameness.recorded()))
    live = sameness.train(None, None, 1)
    np.testing.assert_array_equal(found["live"]["tokens"], live["tokens"])
    sameness.assert_same(found["live"], live, 1)


def launched(name: str, process: int, port: int) -> dict[str, str]:
    """What a launcher tells each of two processes on this machine; JAX makes the port from the number of the job."""
    if name == "SLURM":
        given = {"JOB_ID": port - 61440, "STEP_NODELIST": "127.0.0.1", "NTASKS": 2, "STEP_NUM_TASKS": 2, "PROCID": process}
        return {f"SLURM_{key}": str(value) for key, value in given.items()} | {"SLURM_LOCALID": "0"}
    uri = f"{(port - 61440) * 4096}.0;tcp://127.0.0.1:34911"
    return {
        "OMPI_MCA_orte_hnp_uri": uri,
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(process),
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    }


@pytest.mark.parametrize("name", ["SLURM", "Open MPI"])
def test_a_launcher_needs_no_flags(tmp_path, name):
    lines = [[sys.executable, "tests/two_processes.py", "joined", str(tmp_path)]] * 2
    port = free_port(61440, 65535)
    done = together(lines, [environment(1) | launched(name, i, port) for i in range(2)])
    assert [each.returncode for each in done] == [0, 0], done[0].stderr[-2000:]
    found = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    assert found == [{"process": i, "processes": 2, "largest": [1]} for i in range(2)]


# ------------------------------------------------------------------------------------------------ the script


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> pathlib.Path:
    """A tiny policy for sums, as it was drawn."""
    return tiny_policy.write(tmp_path_factory.mktemp("start") / "model")


def ppo(start: pathlib.Path, out: pathlib.Path, *more: object) -> list[str]:
    """Two iterations of experiments/ppo.py."""
    flags = ("--preset", "arithmetic", "--policy", start, "--out", out, "--iterations", 2, "--batch", 8, "--evaluate-every", 1)
    flags += ("--held-out-prompts", 8, "--algorithm.minibatches", 2, "--algorithm.epochs", 1, "--mesh.fsdp", 2)
    return command("ppo", *flags, *more)


def rows(out: pathlib.Path) -> list[dict[str, Any]]:
    """Of the metrics, without the clock's figures."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(timing.FIGURES)} for row in found]


@pytest.mark.full
def test_ppo_in_two_processes_is_ppo_in_one(start, tmp_path):
    """The same number of devices: the script's metrics and the policy are the same."""
    one = together([ppo(start, tmp_path / "one")], [environment(2)])[0]
    assert one.returncode == 0, one.stderr[-2000:]
    job = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--process")
    done = together([ppo(start, tmp_path / "two", *job, i) for i in range(2)], [environment(1)] * 2)
    assert [each.returncode for each in done] == [0, 0], (done[0].stderr + done[1].stderr)[-3000:]
    assert "at most at once" in done[0].stdout
    assert "at most at once" not in done[1].stdout
    expected, found = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            # The gathers of two processes may add in another order.
            assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    policies = [load_file(tmp_path / name / "model" / "params.safetensors") for name in ("one", "two")]
    for name, value in policies[0].items():
        np.testing.assert_allclose(policies[1][name], value, rtol=0, atol=1e-6, err_msg=name)
    curves = [json.loads((tmp_path / name / "result.json").read_text())["samples"] for name in ("one", "two")]
    assert curves[0] == curves[1]


@pytest.mark.full
def test_ppo_of_two_processes_that_is_preempted_goes_on(start, tmp_path):
    """SIGTERM to one of two: both save after the same step and end with 143; begun again they end as a job left alone."""
    out = tmp_path / "preempted"

    def run(folder: pathlib.Path, meanwhile: Any = None) -> list[subprocess.CompletedProcess]:
        job = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--iterations", 60, "--process")
        return together([ppo(start, folder, *job, i) for i in range(2)], [environment(1)] * 2, meanwhile)

    def take_back(running: list[subprocess.Popen]) -> None:
        end = time.monotonic() + 300
        while time.monotonic() < end and not any(child.poll() is not None for child in running):
            if (out / "metrics.jsonl").is_file() and len((out / "metrics.jsonl").read_text().splitlines()) >= 3:
                break
            time.sleep(0.05)
        running[1].send_signal(signal.SIGTERM)

    assert [each.returncode for each in run(tmp_path / "whole")] == [0, 0]
    done = run(out, take_back)
    assert [each.returncode for each in done] == [143, 143], (done[0].stderr + done[1].stderr)[-3000:]
    assert "stopped by SIGTERM; the same command goes on from here" in done[0].stderr
    (saved,) = [event["step"] for event in events.read(out) if event["kind"] == "asked to end"]
    assert 3 <= saved < 60
    assert checkpoint.latest(out / "checkpoints") == saved == len(rows(out))
    assert [each.returncode for each in run(out)] == [0, 0]
    assert run_cases.ends(out) == run_cases.ends(tmp_path / "whole")
    best = [json.loads((folder / "result.json").read_text())["best"] for folder in (out, tmp_path / "whole")]
    assert best[0] == best[1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--mesh.fsdp", 3), "does not fit 2 device(s): choose axes whose product is 2"),
        (("--batch", 9), "--batch 9 cannot be shared by data x fsdp = 2 devices: choose 8 or 10"),
    ],
)
def test_bad_input_ends_every_process(start, tmp_path, flags, said):
    job = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--process")
    done = together([ppo(start, tmp_path / "out", *flags, *job, i) for i in range(2)], [environment(1)] * 2)
    for each in done:
        assert each.returncode == 2, each.stderr[-2000:]
        assert said in each.stderr
