"""Bytes of a run by role and stage, from shapes alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.fit.settings import Config, abstract_mesh, devices, learning, scoring
from jaxrlhf.core import sharding
from jaxrlhf.core.types import SamplingSpec
from jaxrlhf.models import heads, int8, lora, roles, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.products import Quantised
from jaxrlhf.training import optimizer, plan
from jaxrlhf.training.chips import Chip
from jaxrlhf.training.plan import Row


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


def saved_bytes(config: Config, shape: TransformerConfig, chip: Chip) -> int:
    """Of what a checkpoint holds: parameters and moments."""
    rows = held(dataclasses.replace(config, microbatches=None, compile_programs=False), shape, chip)
    return sum(row.size.total for row in rows if row.kind in ("parameters", "moments"))
