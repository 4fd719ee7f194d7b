"""Scripts run as a person runs them: in a process of their own."""

from __future__ import annotations

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
