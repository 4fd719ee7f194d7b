"""Will it fit, and how long will it take? Bytes, FLOPs and seconds of a run before it, from shapes alone.

    python -m experiments.what_fits --model-shape llama-3.1-8b --chip H200 --lora.rank 16 --rows 256 --response 1024
    python -m experiments.what_fits --algorithm sft --model downloads/SmolLM2-135M --chip cpu --rows 64 --prompt 256

Nothing is put on a device, and no weights are read. Told by stage (rollout, score, update, save): what each role holds,
activations, caches, FLOPs, the least seconds that the chip's rates allow, programs. Without `--microbatches` the fewest are
chosen with which it fits; where none do, it says by how much, and what each remedy would come to. `--compile-programs` asks
XLA in place of estimating the update's temporaries, for the kind of device that is here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.fit.memory import memory
from experiments.fit.settings import Config, chip_of, choices, devices, parameters, shape_of
from experiments.fit.work import programs, work
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.models.model import CacheConfig
from jaxrlhf.training import cli, plan
from jaxrlhf.training.chips import Chip
from jaxrlhf.training.plan import Row


def run(config: Config) -> dict[str, Any]:
    """Print what the run would hold, do and take, and give the same as figures.

    Raises:
        ValueError: it does not fit; with what would.
    """
    shape, chip = shape_of(config), chip_of(config)
    limit = int(config.share * chip.memory)
    parts = [config.microbatches] if config.microbatches else choices(config)
    planned = {count: memory(config, shape, count, chip) for count in parts}
    fitting = [count for count, rows in planned.items() if plan.peak(rows).device <= limit]
    count = fitting[0] if fitting else parts[-1]
    rows = planned[count]
    print(f"{config.algorithm} of {parameters(shape) / 1e6:.0f} M parameters on {devices(config)} x {chip.name}\n")
    print(plan.table(rows, limit))
    if not fitting:
        raise ValueError(refusal(config, shape, chip, rows, limit))
    found = {"chip": chip.name, "microbatches": count, "rows_at_once": config.rows // config.minibatches // count}
    found |= {"bytes": plan.peak(rows).device, "limit": limit, "stages": work(config, shape, chip)}
    found["programs"] = programs(config)
    saved = plan.told(int(found["stages"]["save"]["bytes"]))
    print(f"\nmicrobatches: {count}, {found['rows_at_once']} rows at a time; a checkpoint: {saved}\n")
    print(told(found, plan.stages(rows)))
    return found


def refusal(config: Config, shape: TransformerConfig, chip: Chip, rows: tuple[Row, ...], limit: int) -> str:
    """By how much it does not fit, and what each change would come to."""
    most = plan.peak(rows)
    when = max(plan.stages(rows).items(), key=lambda item: item[1].device)[0]
    largest = sorted((row for row in rows if row.when in ("always", when)), key=lambda row: row.size.device, reverse=True)[:3]
    named = ", ".join(f"{row.role} {row.kind} {plan.told(row.size.device)}" for row in largest)
    tried = []
    for name, changed in remedies(config).items():
        least = min(plan.peak(memory(changed, shape, count, chip)).device for count in {1, choices(changed)[-1]})
        tried.append(f"{name}: {plan.told(least)}{', fits' if least <= limit else ''}")
    return (
        f"does not fit: {plan.told(most.device)} a device in {when}, {plan.told(most.device - limit)} more than the "
        f"{plan.told(limit)} ({config.share:.0%} of {chip.name}) that there is (largest: {named}). Try " + "; ".join(tried)
    )


def remedies(config: Config) -> dict[str, Config]:
    """Changes that hold less, each alone, and together where there is more than one."""
    found = {}
    if not config.lora.rank:
        found["--lora.rank 16"] = dataclasses.replace(config, lora=LoraConfig(rank=16))
    narrow = dataclasses.replace(config, lora=config.lora if config.lora.rank else LoraConfig(rank=16), frozen="int8")
    if config.frozen != "int8":
        found["--lora.rank 16 --frozen int8"] = narrow
    for ways in (2, 4, 8):
        split = dataclasses.replace(config.mesh, fsdp=config.mesh.fsdp * ways)
        if (config.rows // config.minibatches) % (max(split.data, 1) * split.fsdp) == 0:
            found[f"--mesh.fsdp {split.fsdp}"] = dataclasses.replace(config, mesh=split)
    if config.sampled:
        options = dataclasses.replace(config.rollouts.generation, cache=CacheConfig(dtype="int8"))
        if not options.slots and config.rows >= 4 * config.samples:
            options = dataclasses.replace(options, slots=config.rows // 4 // config.samples * config.samples)
        fewer = dataclasses.replace(config.rollouts, generation=options)
        name = f"--rollouts.generation.slots {options.slots} --rollouts.generation.cache.dtype int8"
        found[name] = dataclasses.replace(config, rollouts=fewer)
        found["that and adapters over int8"] = dataclasses.replace(narrow, rollouts=fewer)
    return found


def told(found: dict[str, Any], sizes: dict[Any, plan.Size]) -> str:
    """Stages as text."""
    when, total = {"rollout": "sampling", "score": "scoring", "update": "update"}, 0.0
    lines = [("stage", "bytes a device", "TFLOP", "least seconds", "programs")]
    for name, stands in when.items():
        if (work := found["stages"].get(name)) is not None:
            held, total = plan.told(sizes[stands].device), total + work["seconds"]
            operations, seconds = f"{work['flops'] / 1e12:.3g}", f"{work['seconds']:.3g}"
            lines.append((name, held, operations, seconds, str(found["programs"][name])))
    lines.append(("a step", plan.told(found["bytes"]), "", f"{total:.3g}", str(sum(found["programs"].values()))))
    first, *rest = (max(len(line[i]) for line in lines) for i in range(5))
    return "\n".join("  ".join([a.ljust(first), *(x.rjust(w) for x, w in zip(more, rest, strict=True))]) for a, *more in lines)


PRESETS = {
    "default": Config(),
    "sft": Config(algorithm="sft", minibatches=1, rows=64),
    "8b_lora": Config(model_shape="llama-3.1-8b", chip="H200", lora=LoraConfig(rank=64), frozen="int8"),
}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS, model="model")
