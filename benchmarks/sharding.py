r"""What the library's programs move between devices, copy and hold, compiled for a mesh from shapes alone; against a budget.

    python benchmarks/sharding.py --target cpu
    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_gpu_autotune_level=0 python benchmarks/sharding.py --target h100 --only 0.5B \
        --result benchmarks/results/2026-11-22-sharding-h100-0.5B.json
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python benchmarks/sharding.py --target v5e

The second needs jax-cuda12-pjrt and jax-cuda12-plugin, the third libtpu (pip install --no-deps); none needs the devices. The
programs: an update of fine-tuning and of PPO, the scoring of a rollout, the weights that sampling reads, reading prompts, a
chunk of decoding. Counted for each: collectives by kind (how often they run, bytes of their results a device), copies and
transpositions outside of fusions as large as a weight matrix or as [tokens, F] (a loop's body as often as it turns), bytes of
arguments, results, of these in the place of donated arguments, and temporaries. A case that goes over `benchmarks/budgets.json`
ends the program with exit code 1; with `--update` a budget falls to what was found, never rises, and one that is not there is
added. No times are taken. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

import hlo
import jax
import measure
import programs
import targets

from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig

BUDGETS = Path(__file__).parent / "budgets.json"


def _large(model: str, rows: int, rank: int = 0, frozen: str = "float32") -> programs.Case:
    return programs.Case(model, rank, frozen, rows, prompt=256, response=256, microbatches=2, scored=rows, chunk=8)


# Eight rows a device; what a device cannot hold is left out: 8 billion parameters are trained as an adapter over eight bits.
CASES: dict[str, dict[str, tuple[programs.Case, MeshConfig]]] = {
    "cpu": {
        "one": (programs.Case(), MeshConfig(1, 1, 1)),
        "data8": (programs.Case(rows=32), MeshConfig(8, 1, 1)),
        "fsdp8": (programs.Case(rows=32), MeshConfig(1, 8, 1)),
        "tensor8": (programs.Case(), MeshConfig(1, 1, 8)),
        "2x2x2": (programs.Case(rows=16), MeshConfig(2, 2, 2)),
        "2x2x2 lora": (programs.Case(rows=16, rank=4), MeshConfig(2, 2, 2)),
        "2x2x2 experts": (programs.Case("tiny_experts", rows=16), MeshConfig(2, 2, 2)),
        "experts apart": (programs.Case("tiny_experts", rows=16), MeshConfig(1, 2, 2, 2)),
    },
    "h100": {
        "0.5B one": (_large("0.5B", 8), MeshConfig(1, 1, 1)),
        "0.5B fsdp8": (_large("0.5B", 64), MeshConfig(1, 8, 1)),
        "1.5B one": (_large("1.5B", 8), MeshConfig(1, 1, 1)),
        "1.5B fsdp8": (_large("1.5B", 64), MeshConfig(1, 8, 1)),
        "mixture fsdp8": (_large("mixture", 64), MeshConfig(1, 8, 1)),
        "mixture expert8": (_large("mixture", 64), MeshConfig(1, 1, 1, 8)),
        "mixture fsdp2 expert4": (_large("mixture", 64), MeshConfig(1, 2, 1, 4)),
        "8B lora one": (_large("8B", 8, rank=16, frozen="int8"), MeshConfig(1, 1, 1)),
        "8B lora fsdp8": (_large("8B", 64, rank=16, frozen="int8"), MeshConfig(1, 8, 1)),
        "8B lora fsdp4 tensor2": (_large("8B", 32, rank=16, frozen="int8"), MeshConfig(1, 4, 2)),
    },
    "v5e": {
        "0.5B fsdp4": (_large("0.5B", 32), MeshConfig(1, 4, 1)),
        "1.5B fsdp4": (_large("1.5B", 32), MeshConfig(1, 4, 1)),
        "8B lora fsdp4": (_large("8B", 32, rank=16, frozen="int8"), MeshConfig(1, 4, 1)),
        "8B lora tensor4": (_large("8B", 8, rank=16, frozen="int8"), MeshConfig(1, 1, 4)),
    },
}


def main() -> None:
    """Compile every case of a target, compare with the budgets, and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=CASES, default="cpu")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--programs", nargs="+", choices=programs.NAMES, default=programs.NAMES)
    parser.add_argument(
        "--update", action="store_true", help="lower budgets to what was found, and add those that are not there"
    )
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    settings = parser.parse_args()
    cases = {name: case for name, case in CASES[settings.target].items() if name.startswith(settings.only)}
    most = max(math.prod(mesh.sizes) for _, mesh in cases.values())
    devices = targets.devices(settings.target, most)
    found, faults = {}, []
    for name, (case, shape) in cases.items():
        found[name] = counted(case, mesh_of(shape, devices), tuple(settings.programs))
        faults += over(found[name], budgets(settings.target).get(name, {}), f"{settings.target} {name}")
        if settings.update:
            update(settings.target, name, found[name])
    shapes = {
        name: {"case": dataclasses.asdict(case), "mesh": dataclasses.asdict(mesh)} for name, (case, mesh) in cases.items()
    }
    document = measure.head("sharding", vars(settings) | {"cases": shapes}) | {"found": found, "over_budget": faults}
    measure.write(document, settings.result)
    for fault in faults:
        print(fault, file=sys.stderr)
    sys.exit(1 if faults else 0)


def mesh_of(shape: MeshConfig, devices: list[Any]) -> jax.sharding.Mesh:
    """The mesh over the first of the devices."""
    return sharding.make_mesh(shape, devices[: math.prod(shape.sizes)])


def counted(case: programs.Case, mesh: jax.sharding.Mesh, names: tuple[str, ...] = programs.NAMES) -> dict[str, Any]:
    """What each program moves, copies and holds."""
    found, least = {}, programs.large(case, mesh)
    for name, lowered in programs.lowered(case, mesh, names):
        compiled = lowered.compile()
        text = compiled.as_text()
        moves = hlo.moved(text, least)
        found[name] = {"collectives": hlo.collectives(text), "memory": hlo.memory(compiled)}
        found[name]["moved"] = {"runs": sum(count for _, _, count in moves), "bytes": sum(size * n for _, size, n in moves)}
        found[name]["largest_moves"] = [f"{count} x {what}" for what, _, count in moves[:6]]
        sums = {kind: f"{each['runs']} x, {each['bytes'] / 2**20:.2f} MiB" for kind, each in found[name]["collectives"].items()}
        held = found[name]["memory"]
        print(f"  {name}: {sums}, moved {moves and found[name]['moved']}", end="; ")
        print(f"arguments {held['arguments'] / 2**20:.2f} MiB, temporaries {held['temporaries'] / 2**20:.2f} MiB", flush=True)
        del compiled, text, lowered
        gc.collect()
    return found


def bound(found: dict[str, Any]) -> dict[str, Any]:
    """Of what was found, the numbers that a budget bounds."""
    kept = {f"{kind} {what}": each[what] for kind, each in found["collectives"].items() for what in ("runs", "bytes")}
    return (
        kept
        | {f"moved {what}": found["moved"][what] for what in ("runs", "bytes")}
        | {
            "temporaries": found["memory"]["temporaries"],
            "not donated": found["memory"]["results"] - found["memory"]["aliased"],
        }
    )


def over(found: dict[str, Any], budget: dict[str, Any], where: str) -> list[str]:
    """What goes over its budget; a collective that the budget does not name has none. An empty budget bounds nothing."""
    faults = []
    for name, each in found.items():
        limits = budget.get(name)
        if limits is None:
            continue
        for what, value in bound(each).items():
            if value > limits.get(what, 0):
                faults.append(f"{where}, {name}: {what} is {value}, the budget is {limits.get(what, 0)}")
    return faults


def version() -> str:
    """What makes the programs: budgets of one version of jax are not another's."""
    return "jax " + ".".join(jax.__version__.split(".")[:2])


def budgets(target: str) -> dict[str, Any]:
    """{case: {program: {what: most}}} of a target and this version of jax; empty where none were taken."""
    return json.loads(BUDGETS.read_text()).get(f"{target}, {version()}", {}) if BUDGETS.is_file() else {}


def update(target: str, name: str, found: dict[str, Any]) -> None:
    """Let budgets fall to what was found; add those that are not there."""
    every = json.loads(BUDGETS.read_text()) if BUDGETS.is_file() else {}
    own = every.setdefault(f"{target}, {version()}", {}).setdefault(name, {})
    for program, each in found.items():
        limits = own.get(program)
        new = bound(each)
        own[program] = new if limits is None else {what: min(most, new.get(what, 0)) for what, most in limits.items()}
    BUDGETS.write_text(json.dumps(every, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
