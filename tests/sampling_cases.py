"""A small model with clear preferences, prompts of it, and what two rollouts must have in common."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.core.types import Prompts, Rollout, SamplingSpec
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig

VOCAB, PAD, BOS, EOS = 48, 0, 1, 2
CONFIG = TransformerConfig(
    vocab_size=VOCAB,
    width=16,
    layers=1,
    heads=2,
    kv_heads=2,
    head_width=8,
    mlp_width=32,
    max_length=24,
    tied_head=False,
)
MODEL = transformer.build(CONFIG)
KEY = jax.random.key(7)


def weights(model=MODEL):
    """Weights that give clear preferences: logits of a fresh model are nearly flat."""
    fresh = model.init(jax.random.key(0))
    return fresh | {"head": fresh["head"] * 20}


def spec(**changes) -> SamplingSpec:
    return SamplingSpec(**{"temperature": 0.7, "max_tokens": 10, "stop": (EOS, 5, 6), "pad": PAD, **changes})


def prompts(count: int = 8, width: int = 6) -> Prompts:
    rng = np.random.default_rng(3)
    length = rng.integers(1, width + 1, count).astype(np.int32)
    tokens = rng.integers(3, VOCAB, (count, width)).astype(np.int32)  # garbage stands after a prompt's end, on purpose
    uid = (100 + 3 * np.arange(count)).astype(np.int32)
    return jax.tree.map(jnp.asarray, Prompts(tokens=tokens, length=length, uid=uid, row=uid - 100))


def take(data, index):
    return jax.tree.map(lambda x: x[jnp.asarray(index)], data)


def assert_same(a: Rollout, b: Rollout) -> None:
    """Equal choices; log-probs up to the order in which products of another shape are summed."""
    for name in ("tokens", "prompt_len", "response_len", "finished", "group", "sample"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    for name in ("logprobs", "sampled_logprobs"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=3e-5, err_msg=name)


def responses(rollout: Rollout) -> list[list[int]]:
    rows = zip(rollout.tokens.tolist(), rollout.prompt_len.tolist(), rollout.response_len.tolist(), strict=True)
    return [row[start : start + length] for row, start, length in rows]
