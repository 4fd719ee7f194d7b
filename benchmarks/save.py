"""What a save costs the run that it interrupts: the seconds for which a step waits, and those that go on behind it.

    python benchmarks/save.py --result benchmarks/results/DATE-save.json

What bounds it: the copy of the arrays to the host (the part that waits: memory bandwidth, PCIe on a GPU), hashing (blake2b, one
core) and the disk. Three states under AdamW: of as many parameters as the default run's policy, of 20 and of 80 million. Beside
it the save as it was before it went to the background: the same bytes, waited for. Saves come every 30 seconds (`Run.open`).
`share` is blocked / 30 s, that is, of each step between two saves; the bar is 0.05. `share_with_slower_steps` adds what steps
lose to the thread that hashes and writes, which on a CPU computes where they do. On a machine that others use too, seconds of
the processor say more: `blocked_processor` of the thread that waits, `whole_processor` of all threads while a save runs alone.
The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrlhf.core.types import Outputs, Term
from jaxrlhf.training import checkpoint
from jaxrlhf.training import step as train

ROOT = Path(__file__).resolve().parent.parent
CADENCE = 30.0  # seconds, the default of Run.open
KEYS = ("step", "waited", "blocked", "blocked_processor", "whole", "whole_processor", "step_during")
STATES = {"2.6 million": (12, 465), "20 million": (20, 1000), "80 million": (20, 2000)}  # leaves, width of each square one


def main() -> None:
    """Measure every state and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--states", nargs="+", choices=list(STATES), default=list(STATES))
    parser.add_argument("--folder", type=Path, help="where to save; a new temporary folder by default")
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    config = parser.parse_args()
    document = {
        "benchmark": "save",
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "cadence_s": CADENCE,
        "states": {name: measure(name, config) for name in config.states},
    }
    if config.result is not None:
        config.result.parent.mkdir(parents=True, exist_ok=True)
        config.result.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


def measure(name: str, config: argparse.Namespace) -> dict[str, Any]:
    """Step, waited save and save behind the steps, of one state; seconds as [median, least, most]."""
    leaves, width = STATES[name]
    train_step, state, batch = toy(leaves, width)
    state, _ = train_step(state, (), batch)
    folder = Path(tempfile.mkdtemp(dir=config.folder))
    found: dict[str, list[float]] = {key: [] for key in KEYS}
    try:
        for number in range(config.repeats + 1):  # the first one warms up
            shutil.rmtree(folder)
            seconds = once(train_step, state, batch, folder)
            state = seconds.pop("state")
            for key, value in seconds.items():
                found[key] += [value] if number else []
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    size = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
    told = {key: [round(f(values), 5) for f in (statistics.median, min, max)] for key, values in found.items()}
    step, blocked, waited = (statistics.median(found[key]) for key in ("step", "blocked", "waited"))
    every = max(CADENCE, step)  # seconds between two saves
    whole, during = (statistics.median(found[key]) for key in ("whole", "step_during"))
    lost = blocked + max(0.0, whole - blocked) * max(0.0, 1 - step / during)
    shares = {"share": blocked / every, "share_with_slower_steps": lost / every, "share_before": waited / every}
    return {"megabytes": round(size / 1e6, 1), **told, **{key: round(value, 5) for key, value in shares.items()}}


def once(train_step: Any, state: Any, batch: Any, folder: Path) -> dict[str, Any]:
    """One of each: steps alone; a save that is waited for; a save with steps meanwhile."""
    began = time.perf_counter()
    for _ in range(3):
        state, measured = train_step(state, (), batch)
    jax.block_until_ready(measured)
    step = (time.perf_counter() - began) / 3
    jax.block_until_ready(state)
    began, processor = time.perf_counter(), time.process_time()
    checkpoint.save(folder / "waited", 1, state)
    found = {"step": step, "waited": time.perf_counter() - began, "whole_processor": time.process_time() - processor}
    processor = time.thread_time()
    saving = checkpoint.save_async(folder / "behind", 1, state)
    found["blocked_processor"] = time.thread_time() - processor
    began, count = time.perf_counter(), 0
    while not saving.done() or not count:
        state, measured = train_step(state, (), batch)
        jax.block_until_ready(measured)
        count += 1
    during = (time.perf_counter() - began) / count
    return found | {"state": state, "blocked": saving.blocked, "whole": saving.took(), "step_during": during}


def toy(leaves: int, width: int) -> tuple[Any, Any, Any]:
    """A chain of square matrices under AdamW, whose state is three times the parameters as that of a language model is."""

    def outputs(params, frozen, batch, key):
        x = batch
        for name in sorted(params):
            x = jnp.tanh(x @ params[name])
        return Outputs(scores=x.sum(axis=1))

    def loss(outputs, batch, config):
        return {"loss/toy": Term(jnp.square(outputs.scores).sum(), jnp.float32(batch.shape[0]))}, {}

    keys = jax.random.split(jax.random.key(0), leaves)
    params = {f"layer_{i:02d}": jax.random.normal(key, (width, width)) / width**0.5 for i, key in enumerate(keys)}
    made = optax.adamw(1e-4)
    state = train.init_state(params, made, jax.random.key(0))
    return train.make_train_step(outputs, loss, None, made), state, jax.random.normal(keys[0], (256, width))


if __name__ == "__main__":
    main()
