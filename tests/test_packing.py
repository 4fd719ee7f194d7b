"""Packed texts for each way of attending: their loss is that of each text alone, and none reads another."""

from __future__ import annotations

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import lm
from jaxrlhf.core import sharding
from jaxrlhf.core.types import Outputs
from jaxrlhf.models import attention, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.training import objective

PLAIN = TransformerConfig(
    vocab_size=40, width=24, layers=2, heads=4, kv_heads=4, head_width=6, mlp_width=32, max_length=24, remat="none"
)
EVERY = {"kv_heads": 2, "windows": (3, 0), "attention_cap": 1.5, "attention_scale": 0.7}
PATHS = {
    "plain": {},
    "unrolled": {"scan": False},
    "one-kv-head": {"kv_heads": 1},
    "grouped": {"kv_heads": 2},
    "windows": {"windows": (3, 0)},
    "windows-unrolled": {"windows": (3, 0), "scan": False},
    "cap": {"attention_cap": 1.5},
    "learned": {"positions": "learned"},
    "learned-windows": {"positions": "learned", "windows": (3, 3)},
    "two-ropes": {"windows": (3, 0), "rope_local_theta": 100.0, "qk_norm": True},
    "parallel": {"parallel": True, "rotary_width": 4},
    "all": EVERY,
    "all-unrolled": EVERY | {"scan": False, "remat": "layers"},
    "all-learned": EVERY | {"positions": "learned", "scan": False},
}
LENGTHS = ((5, 1, 7, 3), (9, 6), (1, 2, 12))  # of the texts in each row; the rest of 16 places is padding
FULL = ("plain", "grouped", "windows-unrolled", "learned-windows", "parallel")  # each of their parts stands in another path
EACH = pytest.mark.parametrize(
    "config",
    [
        pytest.param(dataclasses.replace(PLAIN, **change), marks=pytest.mark.full if name in FULL else ())
        for name, change in PATHS.items()
    ],
    ids=PATHS,
)


@functools.cache
def parameters(config: TransformerConfig):
    specs = transformer.param_specs(config)
    drawn = sharding.init_params(specs, jax.random.key(0))
    return drawn | {name: 20 * drawn[name] for name in ("embed", "positions") if name in drawn}  # far from uniform


def packed() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments [3, 16]; padding holds tokens too."""
    tokens = np.random.default_rng(0).integers(1, 40, (3, 16)).astype(np.int32)
    numbers = [np.repeat(np.arange(1, len(row) + 1), row) for row in LENGTHS]
    return tokens, np.stack([np.pad(row, (0, 16 - len(row))) for row in numbers]).astype(np.int32)


def apart() -> tuple[np.ndarray, np.ndarray]:
    """The same texts, one a row [9, 12] and without segments, and their lengths."""
    tokens, segments = packed()
    texts = [row[number == i] for row, number in zip(tokens, segments, strict=True) for i in range(1, number.max() + 1)]
    return np.stack([np.pad(text, (0, 12 - len(text))) for text in texts]), np.array([len(text) for text in texts], np.int32)


@functools.cache
def outputs_of(config: TransformerConfig, in_rows: bool):
    return objective.make_outputs(transformer.build(config), packed=in_rows)


@functools.cache
def logprobs_of(config: TransformerConfig, in_rows: bool):
    return jax.jit(lambda params, batch: outputs_of(config, in_rows)(params, None, batch, None).logprobs)


def mean(logprobs, batch: lm.Batch) -> jax.Array:
    term = lm.loss(Outputs(logprobs=logprobs), batch, lm.Config())[0]["loss/lm"]
    return term.sum / term.count


def texts_alone() -> lm.Batch:
    tokens, length = apart()
    return lm.responses(tokens, np.ones_like(length), length - 1, 11)


@EACH
def test_the_loss_is_that_of_each_text_alone(config):
    batches = lm.packed(*packed()), texts_alone()
    together, alone = (
        float(mean(logprobs_of(config, in_rows)(parameters(config), batch), batch))
        for in_rows, batch in zip((True, False), batches, strict=True)
    )
    assert together == pytest.approx(alone, rel=1e-6)
    assert alone > 1


@pytest.mark.parametrize("name", ["all", pytest.param("all-unrolled", marks=pytest.mark.full)])
def test_so_is_its_gradient(name):
    config = dataclasses.replace(PLAIN, **PATHS[name])

    def slope(in_rows, batch):
        return jax.jit(jax.grad(lambda p: mean(outputs_of(config, in_rows)(p, None, batch, None).logprobs, batch)))(
            parameters(config)
        )

    found, wanted = slope(True, lm.packed(*packed())), slope(False, texts_alone())
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    # 1e-5 of the largest: float32 sums over 36 tokens in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), found, wanted)


@EACH
def test_a_text_that_changes_changes_no_other(config):
    """To the bit: what a text may not see has a weight of 0, not a small one."""
    tokens, segments = packed()

    def logprobs(rows):
        return np.asarray(logprobs_of(config, True)(parameters(config), lm.packed(rows, segments)))

    before, learned = logprobs(tokens), np.asarray(lm.packed(tokens, segments).mask)
    for number in range(segments.max() + 1):  # 0: the padding
        after = logprobs(np.where(segments == number, (tokens + 17) % 40, tokens))
        own = segments[:, 1:] == number
        np.testing.assert_array_equal(after[learned & ~own], before[learned & ~own])
        assert (after != before)[learned & own].all()


@pytest.mark.parametrize("implementation", get_args(attention.Implementation))
def test_every_implementation_keeps_texts_apart_or_refuses_them(implementation):
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 4))
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0]])
    run = functools.partial(attention.attention, segments=segments, implementation=implementation)
    if implementation == "cudnn":
        with pytest.raises(ValueError, match="cannot keep packed segments apart"):
            run(query, key, value)
        return
    first = segments[0] == 1
    other = [jnp.where(first[None, :, None, None], -x, x) for x in (query, key, value)]
    found, changed = run(query, key, value), run(*other)
    np.testing.assert_array_equal(found[:, 3:], changed[:, 3:])
    assert (found[:, :3] != changed[:, :3]).any()
