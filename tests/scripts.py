"""Scripts run as a person runs them: in a process of their own."""

from __future__ import annotations

import json
import math
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def environment(devices: int = 1) -> dict[str, str]:
    return os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "PYTHONPATH": str(ROOT)}


def command(script: str, *flags: object) -> list[str]:
    return [sys.executable, "-m", f"experiments.{script}", *map(str, flags)]


def script(name: str, *flags: object, stdin: str = "", devices: int = 1) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(name, *flags), cwd=ROOT, env=environment(devices), input=stdin, capture_output=True, text=True, timeout=550
    )


def check_clock(out: pathlib.Path, stages: tuple[str, ...], updates: int, once: tuple[str, ...] = ("train_step",)) -> None:
    """A run's rows have all stages, whose times add up; the programs of `once` were compiled once each."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows[:updates]:
        times = {name[5:]: value for name, value in row.items() if name.startswith("time/")}
        whole = times.pop("step")
        assert math.isclose(sum(times.values()), whole, rel_tol=1e-9), (sum(times.values()), whole)
        assert {stage for stage in stages if times[stage] > 0} == set(stages), times
        assert row["throughput/tokens_per_s"] > 0
        assert 0 < row["throughput/padding_efficiency"] <= 1
        assert 0 < row.get("throughput/rollout_utilisation", 1) <= 1
        assert row["throughput/model_flops_per_s"] > 0
    names = [program["name"] for program in json.loads((out / "programs.json").read_text())["programs"]]
    assert [names.count(name) for name in once] == [1] * len(once), names
