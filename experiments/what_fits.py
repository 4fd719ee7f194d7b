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
import functools
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from experiments import stage
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.core.types import SamplingSpec
from jaxrlhf.models import heads, hf, hf_config, int8, lora, pretrained, roles, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.models.model import CacheConfig
from jaxrlhf.models.products import Quantised
from jaxrlhf.sampling import generate, rollout
from jaxrlhf.training import chips, cli, flops, optimizer, plan
from jaxrlhf.training.chips import Chip
from jaxrlhf.training.flops import Pass
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.plan import Row

Algorithm = Literal["ppo", "grpo", "sft", "reward_model"]


def _shape(*sizes: int, **more: Any) -> TransformerConfig:
    return TransformerConfig(*sizes, max_length=32768, dtype="bfloat16", **more)


# As their published config.json have them.
SHAPES = {
    "demo": dataclasses.replace(_shape(4096, 192, 4, 4, 4, 48, 512), max_length=128),  # experiments/pretrain.py
    "gpt2": _shape(50257, 768, 12, 12, 12, 64, 3072, norm="layer", positions="learned", mlp="gelu", qkv_bias=True),
    "smollm2-135m": _shape(49152, 576, 30, 9, 3, 64, 1536),
    "qwen2.5-0.5b": _shape(151936, 896, 24, 14, 2, 64, 4864, qkv_bias=True),
    "qwen2.5-1.5b": _shape(151936, 1536, 28, 12, 2, 128, 8960, qkv_bias=True),
    "llama-3.1-8b": _shape(128256, 4096, 32, 32, 8, 128, 14336, tied_head=False, rope_theta=5e5),
}
ShapeName = Literal["demo", "gpt2", "smollm2-135m", "qwen2.5-0.5b", "qwen2.5-1.5b", "llama-3.1-8b"]


@dataclasses.dataclass(frozen=True)
class Config:
    algorithm: Algorithm = "ppo"
    model: Path | None = None  # a stage's model or a Hugging Face checkpoint, whose config alone is read; None: model_shape
    model_shape: ShapeName = "qwen2.5-0.5b"
    dtype: Literal["float32", "bfloat16"] | None = None  # operands of weight products; None: as the model has them
    chip: str = "H100"  # H100, H200, A100, v5e, v5p, v6e; or cpu, measured here
    mesh: MeshConfig = MeshConfig(data=1)
    rows: int = 256  # answers an iteration, or texts a step; of a reward model both texts of each pair
    samples: int = 1  # answers to each prompt
    prompt: int = 512  # tokens of a prompt
    response: int = 512  # tokens of a response
    epochs: int = 1  # passes over one rollout
    minibatches: int = 4  # optimizer steps a pass
    microbatches: int | None = None  # of a minibatch; None: the fewest with which it fits
    critic: Literal["shared", "separate"] = "shared"  # of PPO
    reward: bool = True  # a reward model of the policy's shape scores; else a function
    lora: LoraConfig = LoraConfig()
    frozen: stage.Weights = "float32"
    rollouts: rollout.Options = rollout.Options()
    optimizer: OptimizerConfig = OptimizerConfig(name="adamw")
    share: float = 0.9  # of the chip's memory that is used
    compile_programs: bool = False  # ask XLA for the update's temporaries, in place of estimating them

    def __post_init__(self):
        least = {"rows": 1, "samples": 1, "prompt": 1, "response": 1, "epochs": 1, "minibatches": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {low}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} of the chip's memory must be in (0, 1]")
        if self.rows % (self.samples * self.minibatches):
            raise ValueError(f"rows={self.rows} must be a multiple of samples={self.samples} x minibatches={self.minibatches}")
        if self.frozen == "int8" and not self.lora.rank and self.algorithm == "sft":
            raise ValueError("frozen='int8' with lora.rank=0: then nothing is frozen; set a rank, 8 say")

    @property
    def sampled(self) -> bool:
        """Whether the algorithm samples."""
        return self.algorithm in ("ppo", "grpo")


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


def shape_of(config: Config) -> TransformerConfig:
    """The model's shape, read from the folder's config alone.

    Raises:
        ValueError, FileNotFoundError: the folder holds no model that we know, or its rows are shorter than those asked for.
    """
    shape = SHAPES[config.model_shape]
    if config.model is not None:
        folder = config.model
        if stage.is_checkpoint(folder):
            shape = hf_config.config_from_hf(hf.read_config(folder))
        else:
            shape = TransformerConfig(**pretrained.settings(folder)["transformer"])
    if config.prompt + config.response > shape.max_length:
        raise ValueError(
            f"prompt={config.prompt} + response={config.response} tokens are more than the {shape.max_length} that the model "
            "reads: shorten one of them"
        )
    return shape if config.dtype is None else dataclasses.replace(shape, dtype=config.dtype)


def chip_of(config: Config) -> Chip:
    """The chip by name, or this CPU."""
    return measured() if config.chip.lower() == "cpu" else chips.named(config.chip)


def measured(repeats: int = 5) -> Chip:
    """This machine as a chip: the best rates of a large product in either type and of a copy, and the memory it has."""
    import os

    def best(function: Any, x: jax.Array) -> float:
        jax.block_until_ready(function(x))
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            jax.block_until_ready(function(x))
            times.append(time.perf_counter() - begin)
        return min(times)

    size, place = 1024, jax.devices("cpu")[0]
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    wide = jax.device_put(jnp.ones((size, size)), place)
    narrow_rate, rate = (2 * size**3 / best(product, wide.astype(dtype)) for dtype in ("bfloat16", "float32"))
    copied = jax.device_put(jnp.ones(2**24), place)
    bandwidth = 2 * copied.nbytes / best(jax.jit(lambda x: x + 1), copied)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Chip("this CPU, measured", narrow_rate, rate, bandwidth, memory)


def devices(config: Config) -> int:
    """How many, of all axes; `data=-1` is one."""
    return max(config.mesh.data, 1) * config.mesh.fsdp * config.mesh.tensor


def parameters(shape: TransformerConfig) -> int:
    """Of one model."""
    specs = transformer.param_specs(shape)
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, sharding.ParamSpec)))


def choices(config: Config) -> list[int]:
    """Numbers of microbatches to try, from the fewest: those that split a minibatch evenly over the devices."""
    rows, ways = config.rows // config.minibatches, max(config.mesh.data, 1) * config.mesh.fsdp
    if rows % ways:
        raise ValueError(f"a minibatch of {rows} rows cannot be shared by data x fsdp = {ways} devices: choose a multiple")
    return [count for count in range(1, rows // ways + 1) if (rows // ways) % count == 0]


# ------------------------------------------------------------------------------------------------------------ bytes


def abstract_mesh(config: Config) -> AbstractMesh:
    """The mesh over devices that need not be here."""
    sizes = (max(config.mesh.data, 1), config.mesh.fsdp, config.mesh.tensor)
    return AbstractMesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def memory(config: Config, shape: TransformerConfig, microbatches: int, chip: Chip) -> tuple[Row, ...]:
    """What the run would hold, by role and stage."""
    rows = held(dataclasses.replace(config, microbatches=None, compile_programs=False), shape, chip)
    if microbatches > 1:  # the sum of their gradients, and that of one
        rows += tuple(dataclasses.replace(row, kind="gradient of a part") for row in rows if row.kind == "gradient")
    at_once = config.rows // config.minibatches // microbatches
    with jax.sharding.use_abstract_mesh(abstract_mesh(config)):
        width, block = config.prompt + config.response, block_of(chip, shape)
        rows += plan.update(learning(config, shape), at_once, width, config.response, block)
    return compiled(config, shape, microbatches, rows) if config.compile_programs else rows


@functools.cache
def held(config: Config, shape: TransformerConfig, chip: Chip) -> tuple[Row, ...]:
    """The part of it that does not depend on microbatches."""
    mesh: Any = abstract_mesh(config)
    with jax.sharding.use_abstract_mesh(mesh):
        base, params = frozen_base(config, shape, mesh), trained(config, shape, mesh)
        rows = plan.training(params, optimizer.make(config.optimizer, 100, params))
        kept = {"reference" if config.sampled else "base": base} if config.sampled or config.lora.rank else {}
        kept |= {"reward": base_of(shape, mesh)} if config.sampled and config.reward else {}
        rows += plan.frozen(kept)
        if config.sampled:
            width = config.prompt + config.response
            rows += plan.scoring(
                scoring(config, shape), config.rollouts.rows * sharding.ways(), width, config.response, block_of(chip, shape)
            )
            rows += sampling(config, shape, roles.attach(base, params, config.lora)["policy"])
    return rows


def block_of(chip: Chip, shape: TransformerConfig) -> int:
    """Logits that are made at a time on this chip."""
    return heads.at_once("cpu" if chip.name.startswith("this CPU") else "gpu", shape.vocab_size)


def base_of(shape: TransformerConfig, mesh: Any) -> Any:
    """A model's parameters, float32."""
    return sharding.abstract(transformer.param_specs(shape), mesh)


def frozen_base(config: Config, shape: TransformerConfig, mesh: Any) -> Any:
    """What adapters lie over, and the reference."""
    whole = base_of(shape, mesh)
    if config.frozen != "int8":
        return whole
    narrow = jax.eval_shape(int8.quantise, whole)

    def placed(leaf: Any, wide: jax.ShapeDtypeStruct) -> Any:
        if isinstance(leaf, Quantised):
            values: Any = jax.ShapeDtypeStruct(leaf.values.shape, leaf.values.dtype, sharding=wide.sharding)
            return Quantised(values, leaf.scale)
        return wide

    return jax.tree.map(placed, narrow, whole, is_leaf=lambda x: isinstance(x, Quantised))


def trained(config: Config, shape: TransformerConfig, mesh: Any) -> dict[str, Any]:
    """What is trained, as the scripts have it."""
    specs = lora.specs(shape, config.lora) if config.lora.rank else transformer.param_specs(shape)
    tree, head = sharding.abstract(specs, mesh), sharding.abstract(heads.value_specs(shape.width), mesh)
    if config.algorithm == "reward_model":
        return {"trunk": tree, "head": head}
    if config.algorithm != "ppo":
        return {"policy": tree}
    return {"policy": tree} | ({"critic": {"trunk": tree, "head": head}} if config.critic == "separate" else {"value": head})


def sampling(config: Config, shape: TransformerConfig, policy: Any) -> tuple[Row, ...]:
    """What drawing the answers holds."""
    slots, generation = config.rollouts.generation.slots, config.rollouts.generation
    prompts, samples = (slots, 1) if 0 < slots < config.rows else (config.rows // config.samples, config.samples)
    spec = SamplingSpec(temperature=1.0, max_tokens=config.response, stop=(0,))
    rows = plan.sampling(transformer.build(shape), policy, spec, (prompts, config.prompt), samples, generation.cache)
    return rows + plan.prefill(shape, prompts, config.prompt)


def compiled(config: Config, shape: TransformerConfig, microbatches: int, rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The same with what XLA gives a forward and backward pass of one microbatch in place of the estimate of it.

    Raises:
        ValueError: a mesh of several devices, for which there would have to be as many here.
    """
    if devices(config) > 1:
        raise ValueError(f"compile_programs compiles for one device that is here, not for {devices(config)}: leave it out")
    model, place = transformer.build(shape), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    base = jax.eval_shape(model.init, jax.random.key(0))
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), base)
    width, count = config.prompt + config.response, config.rows // config.minibatches // microbatches
    tokens = jax.ShapeDtypeStruct((count, width), jnp.int32, sharding=place)

    def loss(own: Any, base: Any, tokens: jax.Array) -> jax.Array:
        tree = lora.attach(base, own, config.lora) if config.lora.rank else own
        states = model.hidden(tree, tokens)[:, config.prompt - 1 : -1]
        return heads.token_logprobs(model, tree, states, tokens[:, config.prompt :], entropy=True)[0].mean()

    own = base
    if config.lora.rank:
        specs = lora.specs(shape, config.lora)
        own = jax.eval_shape(lambda: sharding.init_params(specs, jax.random.key(0)))
        own = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), own)
    found = plan.compiled(jax.jit(jax.value_and_grad(loss)), own, base, tokens)["temporaries"]
    kept = tuple(row for row in rows if not (row.role == "activations" and row.when == "update"))
    return (*kept, Row("activations", "of the update, by XLA", "update", plan.Size(found, found)))


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


# ------------------------------------------------------------------------------------------------------------- work


def learning(config: Config, shape: TransformerConfig) -> tuple[Pass, ...]:
    """What an update reads its rows with."""
    own = Pass(shape, gradient=True, logits=config.algorithm != "reward_model", lora=config.lora)
    return (own,) + (dataclasses.replace(own, logits=False),) * (config.algorithm == "ppo" and config.critic == "separate")


def scoring(config: Config, shape: TransformerConfig) -> tuple[Pass, ...]:
    """What reads a rollout: policy, reference, a critic of its own, a reward model."""
    silent = int(config.reward) + (config.algorithm == "ppo" and config.critic == "separate")
    passes = (Pass(shape, logits=not config.rollouts.reuse_sampler_logprobs, lora=config.lora), Pass(shape))
    return passes + (Pass(shape, logits=False),) * silent


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


def saved_bytes(config: Config, shape: TransformerConfig, chip: Chip) -> int:
    """Of what a checkpoint holds: parameters and moments."""
    rows = held(dataclasses.replace(config, microbatches=None, compile_programs=False), shape, chip)
    return sum(row.size.total for row in rows if row.kind in ("parameters", "moments"))


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
    options, ways = config.rollouts.generation, max(config.mesh.data, 1) * config.mesh.fsdp
    in_slots = 0 < options.slots < config.rows
    rows, sizes = options.slots if in_slots else config.rows, 1
    while sizes <= generate.HALVINGS and rows // 2 >= options.least and rows % (2 * ways) == 0:
        rows, sizes = rows // 2, sizes + 1
    rooms = 2 if config.response >= generate.GROWING and not in_slots else 1
    # Weights as they are read, prompts read, slots refilled; for each number of rows chunks, halving and the end.
    sampled = 2 + in_slots + sizes * rooms + (sizes - 1) * rooms + sizes + (sizes if rooms > 1 else 0)
    return {"rollout": sampled, "score": 2 + config.reward, "update": 2}


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
