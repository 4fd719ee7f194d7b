r"""Bytes of a device, and of its host, that the programs of PPO hold, with each choice that trades them: compiled, not run.

    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_gpu_autotune_level=0 python benchmarks/memory.py --target h100 \
        --result benchmarks/results/2026-11-22-memory-h100.json
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/memory.py --target v5e

Needs what `benchmarks/sharding.py` needs. For each model, with nothing offloaded, with the optimizer's state in the host's
memory, with the reference there, and with both: arguments and temporaries of the update and of the scoring; and what stands on
the device while answers are sampled, when neither program runs (parameters, moments, reference). What bounds it: Adam's
moments are twice the parameters, the reference as much as they. No times are taken; the way to the host and back is the price.
The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
from pathlib import Path
from typing import Any

import hlo
import measure
import programs
import sharding as shapes
import targets

from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.training import plan

CHOICES = ("none", "optimizer", "reference", "both")
CASES: dict[str, dict[str, tuple[programs.Case, MeshConfig]]] = {
    "cpu": {"tiny": (programs.Case(), MeshConfig(1, 2, 1))},
    "h100": {name: shapes.CASES["h100"][name] for name in ("0.5B one", "1.5B one", "1.5B fsdp8")},
    "v5e": {name: shapes.CASES["v5e"][name] for name in ("0.5B fsdp4", "1.5B fsdp4")},
}


def main() -> None:
    """Compile every case with every choice, and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=CASES, default="cpu")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=CHOICES)
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    settings = parser.parse_args()
    cases = {name: case for name, case in CASES[settings.target].items() if name.startswith(settings.only)}
    devices = targets.devices(settings.target, max(math.prod(mesh.sizes) for _, mesh in cases.values()))
    found: dict[str, Any] = {}
    for name, (case, shape) in cases.items():
        placed = shapes.mesh_of(shape, devices)
        own, mesh = list(placed.devices.flat), targets.with_host_memory(placed)
        chosen = {choice: dataclasses.replace(case, offload=choice) for choice in settings.choices}
        found[name] = {choice: held(each, mesh, own) for choice, each in chosen.items()}
        for choice, each in found[name].items():
            print(
                f"{name}, {choice}: " + ", ".join(f"{what} {size / 2**20:.0f} MiB" for what, size in each.items()), flush=True
            )
    document = measure.head("memory", vars(settings)) | {"found": found}
    measure.write(document, settings.result)


def held(case: programs.Case, mesh: Any, devices: list[Any]) -> dict[str, int]:
    """Bytes of a device, and what it has in the host's memory."""
    found = {}
    for name, lowered in programs.lowered(case, mesh, ("ppo", "score")):
        sizes = hlo.memory(targets.compiled(lowered, devices))
        found |= {f"{name} {what}": sizes[what] for what in ("arguments", "temporaries", "host_arguments", "host_temporaries")}
        gc.collect()
    with programs.under(mesh):
        params, frozen = programs.trained(case, mesh, value=True)
        state, _ = programs.state_of(case, params, mesh)
    return found | {"while sampling": plan.size((state.params, state.opt_state, frozen)).device}


if __name__ == "__main__":
    main()
