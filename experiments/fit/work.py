"""FLOPs, least seconds and programs of a run by stage, from shapes alone."""

from __future__ import annotations

import numpy as np

from experiments.fit.memory import saved_bytes
from experiments.fit.settings import Config, abstract_mesh, devices, learning, parameters, scoring
from jaxrlhf.core import sharding
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.sampling import generate
from jaxrlhf.training import flops
from jaxrlhf.training.chips import Chip


def work(config: Config, shape: TransformerConfig, chip: Chip) -> dict[str, dict[str, float]]:
    """FLOPs of all devices and the least seconds of each stage, every row of full length and computed as our programs do.

    Seconds are those of a chip at its full rates, split evenly over the devices and without what they say to one another:
    score and update are bound by products, FLOPs / rate, and the optimizer by the bytes of its state; a decode step takes the
    larger of FLOPs / rate and the bytes of weights and cache / bandwidth.

    Source: Williams et al. 2009 (the roofline model); for decoding Pope et al. 2022 (arXiv 2211.05102), section 2.
    """
    ways, rate = devices(config), chip.rate(shape.dtype)
    rows = flops.padded(config.rows, config.prompt + config.response, config.response)
    times = config.epochs if config.sampled else 1
    updated = times * sum(flops.hardware(one, rows) for one in learning(config, shape))
    found = {"update": {"flops": updated, "seconds": updated / rate / ways + state_seconds(config, shape, chip)}}
    if config.sampled:
        scored = sum(flops.hardware(one, rows) for one in scoring(config, shape))
        found = {"rollout": decoding(config, shape, chip), "score": {"flops": scored, "seconds": scored / rate / ways}} | found
    return found | {"save": {"flops": 0.0, "seconds": 0.0, "bytes": float(saved_bytes(config, shape, chip))}}


def state_seconds(config: Config, shape: TransformerConfig, chip: Chip) -> float:
    """Of reading and writing parameters and moments, and reading the gradient, at each optimizer step."""
    steps = config.minibatches * (config.epochs if config.sampled else 1)
    return steps * 2.5 * saved_bytes(config, shape, chip) / devices(config) / chip.bandwidth


def decoding(config: Config, shape: TransformerConfig, chip: Chip) -> dict[str, float]:
    """Reading the prompts, and all rows together to their last token, `slots` at a time where there are fewer."""
    ways, rate, count = devices(config), chip.rate(shape.dtype), config.rows
    prompts = count // config.samples
    lengths = np.full(prompts, config.prompt), np.full(count, config.response)
    operations = flops.sampling(shape, *lengths, config.samples)
    read = flops.forward(shape, flops.Rows(lengths[0], 0.0), logits=False)
    at_once = min(config.rollouts.generation.slots or count, count)
    waves = -(-count // at_once)
    width = {"bfloat16": 2, "float32": 4, "int8": 1}[config.rollouts.generation.cache.dtype]
    entry = 2 * shape.layers * shape.kv_heads * shape.head_width * width  # a token's keys and values
    weights = parameters(shape) * (2 if shape.dtype == "bfloat16" else 4)
    own_prompts = at_once if config.rollouts.generation.slots else at_once // config.samples
    moved = weights * (config.mesh.fsdp * max(config.mesh.data, 1)) + entry * (
        own_prompts * config.prompt + at_once * config.response
    )
    written = (operations - read) / (waves * config.response)  # FLOPs of a step
    step = max(written / rate / ways, moved / ways / chip.bandwidth)
    return {"flops": operations, "seconds": read / rate / ways + waves * config.response * step, "bytes_a_step": float(moved)}


def programs(config: Config) -> dict[str, int]:
    """How many programs an iteration may compile, by stage: the sampler's, for each number of rows that may be left."""
    if not config.sampled:
        return {"update": 1}
    options, ways = config.rollouts.generation, sharding.parts("batch", abstract_mesh(config))
    in_slots = 0 < options.slots < config.rows
    rows, sizes = options.slots if in_slots else config.rows, 1
    while sizes <= options.halvings and rows // 2 >= options.least and rows % (2 * ways) == 0:
        rows, sizes = rows // 2, sizes + 1
    rooms = 2 if config.response >= generate.GROWING and not in_slots else 1
    # Weights as they are read, prompts read, slots refilled; for each number of rows chunks, halving and the end.
    sampled = 2 + in_slots + sizes * rooms + (sizes - 1) * rooms + sizes + (sizes if rooms > 1 else 0)
    return {"rollout": sampled, "score": 2 + config.reward, "update": 2}
