"""What a run would be: its settings, the shape of its model, its chip and its devices, without any of them being here."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from experiments import stage
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.models import hf, hf_config, pretrained, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.sampling import rollout
from jaxrlhf.training import chips
from jaxrlhf.training.chips import Chip
from jaxrlhf.training.flops import Pass
from jaxrlhf.training.optimizer import OptimizerConfig

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
    return math.prod(config.mesh.sizes)


def parameters(shape: TransformerConfig) -> int:
    """Of one model."""
    specs = transformer.param_specs(shape)
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, sharding.ParamSpec)))


def choices(config: Config) -> list[int]:
    """Numbers of microbatches to try, from the fewest: those that split a minibatch evenly over the devices."""
    rows, ways = config.rows // config.minibatches, sharding.parts("batch", abstract_mesh(config))
    if rows % ways:
        shared = "data x fsdp" + " x expert" * (config.mesh.expert > 1)
        raise ValueError(f"a minibatch of {rows} rows cannot be shared by {shared} = {ways} devices: choose a multiple")
    return [count for count in range(1, rows // ways + 1) if (rows // ways) % count == 0]


def abstract_mesh(config: Config) -> AbstractMesh:
    """The mesh over devices that need not be here."""
    return sharding.abstract_mesh(config.mesh)


def learning(config: Config, shape: TransformerConfig) -> tuple[Pass, ...]:
    """What an update reads its rows with."""
    own = Pass(shape, gradient=True, logits=config.algorithm != "reward_model", lora=config.lora)
    return (own,) + (dataclasses.replace(own, logits=False),) * (config.algorithm == "ppo" and config.critic == "separate")


def scoring(config: Config, shape: TransformerConfig) -> tuple[Pass, ...]:
    """What reads a rollout: policy, reference, a critic of its own, a reward model."""
    silent = int(config.reward) + (config.algorithm == "ppo" and config.critic == "separate")
    passes = (Pass(shape, logits=not config.rollouts.reuse_sampler_logprobs, lora=config.lora), Pass(shape))
    return passes + (Pass(shape, logits=False),) * silent
