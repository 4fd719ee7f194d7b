r"""Device memory of PPO's four roles (policy, reference, value, reward): whole models, copies with adapters, one trunk.

    python benchmarks/roles_memory.py --result benchmarks/results/2026-11-22-roles-memory-cpu.json
    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_gpu_autotune_level=0 python benchmarks/roles_memory.py --target h100 \
        --result benchmarks/results/2026-11-22-roles-memory-h100.json

The second needs jax-cuda12-pjrt and jax-cuda12-plugin (pip install --no-deps), and no GPU. The library's own programs of an
iteration are compiled: `rollout.experience` (log-probs of policy and reference, values), `rewards.reward`, and the train step
of policy and critic. `trained`: four models, of which policy and critic are trained whole, each with Adam's two moments.
`copies`: a frozen copy of the base for each role, an adapter on policy, critic and reward. `one_trunk`: those adapters over
one base, and the reference is the base. `one_trunk_int8`: the same with the base's weight matrices in eight bits. Counted is
all that stands in memory between programs (parameters, moments, frozen models, the batch) and the temporaries that the
compiler gives the largest program; what comes out takes the place of donated arguments. What bounds it: a trained parameter
takes 4 bytes, its moments 8, its gradient 4, a frozen one 4, one in eight bits 1; activations and logits are common to all.
Before that, at a small shape, copies and one trunk run and must give the same losses. No times are taken. The last line of
stdout is one JSON document.
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
import measure
import numpy as np
import targets

from jaxrlhf.algorithms import ppo
from jaxrlhf.core import sharding
from jaxrlhf.core.types import Experience, Outputs, Rollout, SamplingSpec, TrainState
from jaxrlhf.models import heads, int8, lora, roles, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.rewards import model as rewards
from jaxrlhf.sampling import rollout
from jaxrlhf.training import objective, optimizer, plan, step
from jaxrlhf.training.optimizer import OptimizerConfig

GPT2 = TransformerConfig(
    50257, 768, layers=12, heads=12, kv_heads=12, head_width=64, mlp_width=3072, max_length=1024, norm="layer",
    positions="learned", mlp="gelu", dtype="bfloat16",
)  # fmt: skip
SMALL = dataclasses.replace(GPT2, vocab_size=211, width=32, layers=2, heads=2, kv_heads=2, head_width=16, mlp_width=64)
SETUPS = ("trained", "copies", "one_trunk", "one_trunk_int8")
ROLES = ("policy", "reference", "critic", "reward")


def main() -> None:
    """Compile the programs of every setup and print one JSON document."""
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
    place = targets.place(settings.target)
    found = {setup: memory(setup, config, settings, place) for setup in SETUPS}
    total = {setup: found[setup]["arguments"] + found[setup]["temporaries"] for setup in SETUPS}
    document = {
        "benchmark": "roles_memory",
        "date": datetime.date.today().isoformat(),
        "commit": measure.commit(),
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


def memory(setup: str, config: lora.LoraConfig, settings: Any, place: Any) -> dict[str, Any]:
    """Bytes of the setup at the size of GPT-2: what stands between programs, and the temporaries of each program."""

    def there(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    params, frozen = there(jax.eval_shape(lambda: start(setup, GPT2, config)))
    drawn = there(jax.eval_shape(lambda: answers(settings.rows, settings.width, GPT2.vocab_size)))
    update = optimizer.make(OptimizerConfig(), 10, params)
    programs = iteration(setup, GPT2, config, update, settings.width // 2, settings.microbatches)
    count = there(jax.eval_shape(lambda: jnp.int32(0)))
    opt_state = step.GuardedState(there(jax.eval_shape(update.init, params)), count, count)
    state = TrainState(count, params, opt_state, (), there(jax.eval_shape(lambda: jax.random.key(0))))
    batch = there(jax.eval_shape(learned, jax.eval_shape(programs["score"], params, frozen, drawn)))
    arguments = {"score": (params, frozen, drawn), "reward": (frozen, drawn), "update": (state, frozen, batch)}
    found = {name: plan.compiled(programs[name], *args)["temporaries"] for name, args in arguments.items()}
    held = plan.size((params, opt_state, frozen, batch)).total
    print(f"{setup}: held {held / 2**20:.0f} MiB, " + ", ".join(f"{name} {size / 2**20:.0f}" for name, size in found.items()))
    return {"arguments": held, "temporaries": max(found.values()), "temporaries_of": found}


def learned(experience: Experience) -> ppo.Batch:
    """What PPO learns from."""
    return ppo.prepare(experience, ppo.init(ppo.Config()), ppo.Config())[0]


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
) -> dict[str, Callable[..., Any]]:
    """The programs: `score` (params, frozen, rollout), `reward` (frozen, rollout) and `update` (state, frozen, batch)."""
    model, spec = transformer.build(shape), SamplingSpec(temperature=1.0, max_tokens=width, stop=(0,))

    def whole(params: Any, frozen: Any) -> Any:
        """Trees of policy and critic."""
        if setup == "trained":
            return params
        if setup.startswith("one_trunk"):
            return roles.attach(frozen["base"], params, config)
        policy = lora.attach(frozen["policy_base"], params["policy"], config)
        return {"policy": policy, "critic": roles.attach(frozen["critic_base"], params["critic"], config)}

    def score(params: Any, frozen: Any, drawn: Rollout) -> Experience:
        reference = frozen[{"trained": "reference", "copies": "reference_base"}.get(setup, "base")]
        options = rollout.Options(rows=drawn.tokens.shape[0] // microbatches)
        return rollout.experience(model, whole(params, frozen), {"reference": reference}, drawn, spec, options)

    def reward(frozen: Any, drawn: Rollout) -> jax.Array:
        judge = frozen["reward"]
        if setup != "trained":
            judge = roles.attach(frozen["base" if setup.startswith("one_trunk") else "reward_base"], judge, config)
        return rewards.reward(model, "last")(judge, drawn)

    outputs = objective.make_outputs(model, spec, entropy=True, values=True, trunk="policy")

    def over_base(params: Any, frozen: Any, batch: Any, key: jax.Array | None) -> Outputs:
        return outputs(whole(params, frozen), None, batch, key)

    train_step = step.make_train_step(over_base, ppo.loss, ppo.Config(), update, microbatches)
    return {"score": jax.jit(score), "reward": jax.jit(reward), "update": train_step}


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
        programs, drawn = iteration(setup, shape, config, update, 8, 2), answers(8, 16, shape.vocab_size)
        state = step.init_state(params, update, jax.random.key(1))
        found[setup] = []
        for _ in range(steps):
            experience = programs["score"](state.params, frozen, drawn)
            experience = dataclasses.replace(experience, score=programs["reward"](frozen, drawn))
            state, metrics = programs["update"](state, frozen, learned(experience))
            found[setup].append(float(metrics["loss/total"]))
    if not np.allclose(*found.values(), rtol=1e-5, atol=1e-7):
        raise ValueError(f"losses of copies and of one trunk differ: {found}")
    return found


def count(specs: Any) -> int:
    """Parameters of a tree of specs."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, sharding.ParamSpec)))


if __name__ == "__main__":
    main()
