r"""Device memory of PPO's four roles (policy, reference, value, reward): whole models, copies with adapters, one trunk.

    python benchmarks/roles_memory.py --result benchmarks/results/2026-11-22-roles-memory-cpu.json
    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_gpu_autotune_level=0 python benchmarks/roles_memory.py --target h100 \
        --result benchmarks/results/2026-11-22-roles-memory-h100.json

The second needs jax-cuda12-pjrt and jax-cuda12-plugin (pip install --no-deps), and no GPU.
One program scores a rollout by all four roles and makes one update of policy and critic, so that everything that PPO holds is
its argument; rows are read in microbatches, whose gradients add up. `trained`: four models, of which policy and critic are
trained whole, each with Adam's two moments. `copies`: a frozen copy of the base for each role, an adapter on policy, critic
and reward. `one_trunk`: those adapters over one base, and the reference is the base. `one_trunk_int8`: the same with the
weight matrices of the base in eight bits. Counted is what the compiler says that the program needs: arguments plus temporaries
(what comes out takes the place of donated arguments). What bounds it: a trained parameter takes 4 bytes, its moments 8, its
gradient 4, a frozen one 4; one in eight bits 1; activations and logits are common to all. Before that, at a small shape,
copies and one trunk run and must give the same losses. No times are taken. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sampling import commit

from jaxrlhf.algorithms import ppo
from jaxrlhf.core import sharding
from jaxrlhf.core.types import Rollout, SamplingSpec
from jaxrlhf.models import heads, int8, lora, roles, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.rewards import model as rewards
from jaxrlhf.sampling import rollout
from jaxrlhf.training import objective, optimizer
from jaxrlhf.training.optimizer import OptimizerConfig

GPT2 = TransformerConfig(
    50257, 768, layers=12, heads=12, kv_heads=12, head_width=64, mlp_width=3072, max_length=1024, norm="layer",
    positions="learned", mlp="gelu", dtype="bfloat16",
)  # fmt: skip
SMALL = dataclasses.replace(GPT2, vocab_size=211, width=32, layers=2, heads=2, kv_heads=2, head_width=16, mlp_width=64)
SETUPS = ("trained", "copies", "one_trunk", "one_trunk_int8")
ROLES = ("policy", "reference", "critic", "reward")
# Typed from Nvidia's figures; they choose kernels, and take no part in what is measured.
H100 = """
  gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
  platform_name: "CUDA" dnn_version_info { major: 9 minor: 1 }
  runtime_version { major: 12 minor: 8 } device_description_str: "NVIDIA H100 80GB HBM3" """


def main() -> None:
    """Compile the programs and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--width", type=int, default=128, help="tokens of a row; half of them are the response")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--target", choices=["cpu", "h100"], default="cpu")
    parser.add_argument("--result", type=Path, help="also write the JSON document here")
    settings = parser.parse_args()
    config = lora.LoraConfig(rank=settings.rank, alpha=2.0 * settings.rank)
    losses = same_losses(config)
    place = target(settings.target)
    found = {setup: memory(setup, config, settings, place) for setup in SETUPS}
    total = {setup: found[setup]["arguments"] + found[setup]["temporaries"] for setup in SETUPS}
    document = {
        "benchmark": "roles_memory",
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "settings": {name: value for name, value in vars(settings).items() if name != "result"},
        "model": dataclasses.asdict(GPT2) | {"parameters": count(transformer.param_specs(GPT2))},
        "adapter": dataclasses.asdict(config) | {"parameters": count(lora.specs(GPT2, config))},
        "compiled_for": "one H100" if settings.target == "h100" else "CPU",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "losses_at_a_small_shape": losses,
        "bytes": found,
        "one_trunk_of_trained": total["one_trunk"] / total["trained"],
        "one_trunk_of_copies": total["one_trunk"] / total["copies"],
        "int8_of_one_trunk": total["one_trunk_int8"] / total["one_trunk"],
    }
    if settings.result is not None:
        settings.result.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


def target(name: str) -> Any:
    """The sharding of every argument: of this CPU, or of an H100 that need not be here."""
    if name == "cpu":
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="cuda", topology_name="h100", target_config=H100, topology="1x1x1").devices
    jax.default_backend = lambda: "gpu"  # the library asks it which form of a product and how many logits at a time are best
    return jax.sharding.SingleDeviceSharding(devices[0])


def memory(setup: str, config: lora.LoraConfig, settings: Any, place: Any) -> dict[str, int]:
    """Bytes of the setup's program at the size of GPT-2."""
    update = optimizer.make(OptimizerConfig(), 10, jax.eval_shape(lambda: start(setup, GPT2, config)[0]))
    data = jax.eval_shape(lambda: (*start(setup, GPT2, config), answers(settings.rows, settings.width, GPT2.vocab_size)))
    args = (data[0], jax.eval_shape(update.init, data[0]), *data[1:])
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    step = iteration(setup, GPT2, config, update, settings.width // 2, settings.microbatches)
    program = jax.jit(step, donate_argnums=(0, 1))
    sizes: Any = program.lower(*args).compile().memory_analysis()
    found = {"arguments": sizes.argument_size_in_bytes, "temporaries": sizes.temp_size_in_bytes}
    print(f"{setup}: " + ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in found.items()))
    return found


def start(setup: str, shape: TransformerConfig, config: lora.LoraConfig) -> tuple[Any, Any]:
    """(what is trained, what is frozen). Of `copies` and `one_trunk` the adapters are the same, and not zero."""
    base = transformer.build(shape).init(jax.random.key(0))
    if setup == "one_trunk_int8":
        base = int8.quantise(base)
    scalar = sharding.init_params(heads.score_specs(shape.width), jax.random.key(1))
    unit = {"gain": jnp.ones([]), "bias": jnp.zeros([])}
    if setup == "trained":
        params = {"policy": base, "critic": {"trunk": base, "head": scalar}}
        return params, {"reference": base, "reward": {"trunk": base, "head": scalar} | unit}

    def adapter(seed: int) -> Any:
        fresh = sharding.init_params(lora.specs(shape, config), jax.random.key(seed))
        return jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(seed), x.shape), fresh)

    params = {"policy": adapter(2), "critic": {"trunk": adapter(3), "head": scalar}}
    frozen = {"reward": {"trunk": adapter(4), "head": scalar} | unit}
    return params, frozen | ({"base": base} if setup.startswith("one_trunk") else {f"{role}_base": base for role in ROLES})


def iteration(
    setup: str, shape: TransformerConfig, config: lora.LoraConfig, update: Any, width: int, microbatches: int
) -> Callable[..., Any]:
    """(params, optimizer state, frozen, rollout) -> the first two after one update, and the loss."""
    model, spec = transformer.build(shape), SamplingSpec(temperature=1.0, max_tokens=width, stop=(0,))
    settings = ppo.Config()

    def whole(params: Any, frozen: Any) -> tuple[Any, Any, Any]:
        """Trees of policy and critic, of the reference, and of the reward."""
        if setup == "trained":
            return params, frozen["reference"], frozen["reward"]
        if setup.startswith("one_trunk"):
            reward = roles.attach(frozen["base"], frozen["reward"], config)
            return roles.attach(frozen["base"], params, config), frozen["base"], reward
        policy = lora.attach(frozen["policy_base"], params["policy"], config)
        critic = roles.attach(frozen["critic_base"], params["critic"], config)
        reward = roles.attach(frozen["reward_base"], frozen["reward"], config)
        return {"policy": policy, "critic": critic}, frozen["reference_base"], reward

    outputs = objective.make_outputs(model, spec, entropy=True, values=True, trunk="policy")

    def step(params: Any, state: Any, frozen: Any, drawn: Rollout) -> tuple[Any, Any, jax.Array]:
        trees, reference, reward = whole(params, frozen)
        rows = drawn.tokens.shape[0] // microbatches
        found = rollout.experience(model, trees, {"reference": reference}, drawn, spec, rollout.Options(rows=rows))
        score = jax.lax.map(
            lambda part: rewards.score(model, reward, part.tokens, part.prompt_len + part.response_len, "last"),
            jax.tree.map(lambda x: x.reshape(microbatches, rows, *x.shape[1:]), drawn),
        ).reshape(-1)
        batch, _, _ = ppo.prepare(dataclasses.replace(found, score=score), ppo.init(settings), settings)

        parts = jax.tree.map(lambda x: x.reshape(microbatches, rows, *x.shape[1:]), batch)

        def loss(params: Any) -> jax.Array:
            def terms_of(part: ppo.Batch) -> Any:
                return ppo.loss(outputs(whole(params, frozen)[0], None, part, None), part, settings)[0]

            terms = jax.lax.map(jax.checkpoint(terms_of), parts)
            return jnp.stack([t.coefficient[0] * t.sum.sum() / t.count.sum() for t in terms.values()]).sum()

        value, gradient = jax.value_and_grad(loss)(params)
        moved, state = update.update(gradient, state, params)
        return optax.apply_updates(params, moved), state, value

    return step


def answers(rows: int, width: int, vocab: int) -> Rollout:
    """A rollout of random tokens; prompts take half of a row, every response fills the rest."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, vocab, (rows, width)), jnp.int32)
    half, zeros = jnp.full(rows, width // 2, jnp.int32), jnp.zeros(rows, jnp.int32)
    logprobs = jnp.zeros((rows, width // 2))
    return Rollout(tokens, half, half, zeros == 1, jnp.arange(rows), zeros, zeros, logprobs, logprobs)


def same_losses(config: lora.LoraConfig, steps: int = 3) -> dict[str, list[float]]:
    """Losses of some updates at a small shape, of copies and of one trunk.

    Raises:
        ValueError: they differ by more than 1e-5 of their size.
    """
    shape = dataclasses.replace(SMALL, dtype="float32")
    found: dict[str, list[float]] = {}
    for setup in ("copies", "one_trunk"):
        params, frozen = start(setup, shape, config)
        update = optimizer.make(OptimizerConfig(learning_rate=1e-3), steps, params)
        program, state = jax.jit(iteration(setup, shape, config, update, 8, 2)), update.init(params)
        found[setup] = []
        for _ in range(steps):
            params, state, loss = program(params, state, frozen, answers(8, 16, shape.vocab_size))
            found[setup].append(float(loss))
    if not np.allclose(*found.values(), rtol=1e-5, atol=1e-7):
        raise ValueError(f"losses of copies and of one trunk differ: {found}")
    return found


def count(specs: Any) -> int:
    """Parameters of a tree of specs."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, sharding.ParamSpec)))


if __name__ == "__main__":
    main()
