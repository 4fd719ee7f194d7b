"""Two small models with adapters as after some training: what the tests of adapters and of eight bits share."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import lm
from jaxrlhf.core import sharding
from jaxrlhf.core.types import Prompts, SamplingSpec
from jaxrlhf.models import lora, transformer
from jaxrlhf.models.config import TransformerConfig

LLAMA = TransformerConfig(
    vocab_size=40, width=24, layers=2, heads=4, kv_heads=2, head_width=6, mlp_width=32, max_length=24, tied_head=False,
    remat="none",
)  # fmt: skip
GPT = dataclasses.replace(LLAMA, kv_heads=4, norm="layer", positions="learned", mlp="gelu", tied_head=True)
CONFIG = lora.LoraConfig(rank=3, alpha=6.0)
EVERY = lora.LoraConfig(rank=3, alpha=6.0, targets=lora.TARGETS, rank_stabilised=True)
KINDS = pytest.mark.parametrize(
    ("shape", "config"), [(LLAMA, EVERY), pytest.param(GPT, CONFIG, marks=pytest.mark.full)], ids=["llama", "gpt"]
)
SPEC = SamplingSpec(temperature=0.7, max_tokens=8, stop=(2,), forbidden=(0, 1))


@functools.cache
def base_of(shape: TransformerConfig):
    base = jax.jit(transformer.build(shape).init)(jax.random.key(0))
    # Larger than at the start, so that tokens are not all alike.
    return base | {name: 10 * base[name] for name in ("embed", "head", "positions") if name in base}


@functools.cache
def adapter_of(shape: TransformerConfig, config: lora.LoraConfig, seed: int = 1):
    """As after some training: b is not zero."""
    fresh = sharding.init_params(lora.specs(shape, config), jax.random.key(seed))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: 0.2 * jax.random.normal(jax.random.key(len(str(path))), x.shape) if path[-1].key == "b" else x, fresh
    )


def tokens(rows: int = 4, width: int = 12) -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).integers(3, 40, (rows, width)), jnp.int32)


def prompts(rows: int = 4) -> Prompts:
    count = jnp.arange(rows, dtype=jnp.int32)
    return Prompts(tokens=tokens(rows, 6), length=3 + count % 4, uid=count, row=count)


@functools.cache
def logits_of(shape: TransformerConfig):
    model = transformer.build(shape)
    return jax.jit(lambda params, rows: model.logits(params, model.hidden(params, rows)))


def batch_of(rows: int = 8) -> lm.Batch:
    return lm.responses(np.asarray(tokens(rows)), np.full(rows, 3), np.arange(rows) % 6 + 3, 9)
