"""Counts of operations against XLA's own of our forward and backward passes, and against plain NumPy."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models import heads, lora, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.training import flops
from jaxrlhf.training.flops import Pass

# Unrolled, because XLA counts the body of a loop once, however often it runs.
SHAPE = TransformerConfig(512, 256, 3, 4, 2, 64, 768, 64, scan=False, remat="none")
SHAPES = {
    "grouped heads": SHAPE,
    "remat": dataclasses.replace(SHAPE, remat="layers"),
    "attention kept": dataclasses.replace(SHAPE, remat="attention"),
    "products kept": dataclasses.replace(SHAPE, remat="dots"),
    "parallel": dataclasses.replace(SHAPE, remat="layers", parallel=True, post_norms=False),
    "norms after": dataclasses.replace(SHAPE, remat="layers", post_norms=True),
    "gpt2": dataclasses.replace(SHAPE, mlp="gelu", norm="layer", positions="learned", kv_heads=4, tied_head=False),
}
ROWS, WIDTH, RESPONSE = 2, 48, 16
ADAPTER = lora.LoraConfig(rank=8)

# XLA counts norms, rotations, softmax and gated activations too, which are linear in the width: at D = 256 that is 1 % of all.
# An adapter's first layer needs no gradient of its input, which is 2 % with three layers.
TOLERANCE = 0.025


def counted(function, *args) -> float:
    """By XLA, of the program before it is optimised: what a backend turns into calls of its own libraries it cannot count."""
    found: Any = jax.jit(function).lower(*args).cost_analysis()
    return (found[0] if isinstance(found, list) else found)["flops"]


def program(shape: TransformerConfig):
    """Mean log-prob of the last tokens, as the scripts compute it."""
    model = transformer.build(shape)

    def value(params, tokens):
        states = model.hidden(params, tokens)[:, -RESPONSE - 1 : -1]
        # One block of logits, since blocks are a loop.
        return heads.token_logprobs(model, params, states, tokens[:, -RESPONSE:], block=RESPONSE)[0].mean()

    return value


def abstract(shape: TransformerConfig):
    return jax.eval_shape(transformer.build(shape).init, jax.random.key(0)), jnp.zeros((ROWS, WIDTH), jnp.int32)


@pytest.mark.parametrize("name", SHAPES)
def test_a_forward_pass_is_what_xla_counts(name):
    shape = SHAPES[name]
    found = counted(program(shape), *abstract(shape))
    ours = flops.model(Pass(shape), flops.padded(ROWS, WIDTH, RESPONSE))
    assert ours == pytest.approx(found, rel=TOLERANCE)
    assert ours < found, "what is left out is missing"


@pytest.mark.parametrize("name", SHAPES)
def test_a_gradient_is_what_xla_counts(name):
    """Everything that the program does: remat's second forward pass and attention's own scores among it."""
    shape = SHAPES[name]
    found = counted(jax.value_and_grad(program(shape)), *abstract(shape))
    rows = flops.padded(ROWS, WIDTH, RESPONSE)
    logits_kept = 2 * shape.width * shape.vocab_size * rows.predicted  # of one block they are; of several computed again
    assert flops.hardware(Pass(shape, gradient=True), rows) - logits_kept == pytest.approx(found, rel=TOLERANCE)


def test_the_gradient_of_an_adapter_is_what_xla_counts():
    """Frozen weights have no gradient of their own: that is a third of a whole model's operations."""
    value = program(SHAPE)
    base, tokens = abstract(SHAPE)
    specs = lora.specs(SHAPE, ADAPTER)
    own = jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape), specs, is_leaf=lambda x: hasattr(x, "axes")))

    def loss(adapter, base, tokens):
        return value(lora.attach(base, adapter, ADAPTER), tokens)

    found = counted(jax.value_and_grad(loss), own, base, tokens)
    rows = flops.padded(ROWS, WIDTH, RESPONSE)
    logits_kept = 2 * SHAPE.width * SHAPE.vocab_size * rows.predicted
    ours = flops.hardware(Pass(SHAPE, gradient=True, lora=ADAPTER), rows) - logits_kept
    assert ours == pytest.approx(found, rel=TOLERANCE)
    assert ours < 0.75 * (flops.hardware(Pass(SHAPE, gradient=True), rows) - logits_kept)


def test_pairs_of_attention_are_those_that_a_mask_shows():
    lengths = np.array([1, 5, 9])
    for window in (0, 1, 4, 20):
        seen = 0
        for n in lengths:
            back = np.arange(n)[:, None] - np.arange(n)
            seen += ((back >= 0) & (back < (window or n))).sum()
        assert flops.Rows(lengths, 0.0).pairs(window) == seen
    assert flops.padded(3, 9, 2).pairs(4) == 3 * 81  # computed are all of them


def test_packed_rows_are_their_texts():
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]])
    rows = flops.packed(segments)
    assert sorted(rows.length.tolist()) == [1, 2, 3, 5]
    assert rows.predicted == 2 + 1 + 0 + 4
    assert rows.tokens == 11


def test_sampling_is_a_forward_pass_of_the_same_rows_without_the_second_reading_of_prompts():
    """One token at a time does the work of a whole row; n samples read their prompt once."""
    shape = dataclasses.replace(SHAPE, windows=(0, 6, 0))
    prompt, response = np.array([7, 3]), np.array([5, 2])
    whole = flops.forward(shape, flops.real(prompt, response))
    assert flops.sampling(shape, prompt, response) == pytest.approx(whole, rel=1e-12)
    twice = flops.sampling(shape, prompt, np.repeat(response, 2), n=2)
    read = flops.forward(shape, flops.Rows(prompt, 0.0), logits=False)
    assert twice == pytest.approx(2 * whole - read, rel=1e-12)


def test_experts_count_those_that_a_token_is_sent_to():
    dense = dataclasses.replace(SHAPE, mlp_width=64)
    sparse = dataclasses.replace(dense, experts=8, experts_per_token=2)
    mlp = 2 * 3 * dense.layers * dense.width * dense.mlp_width
    router = 2 * dense.layers * dense.width * 8
    assert flops.products(sparse) == flops.products(dense) + mlp + router


def test_padding_is_no_work_of_the_model():
    """What MFU divides: longer rows of the same texts change what is computed, not what is needed."""
    needed = flops.model(Pass(SHAPE, gradient=True), flops.real(np.array([8, 8]), np.array([4, 2])))
    assert needed < flops.model(Pass(SHAPE, gradient=True), flops.padded(2, 12, 4))
    assert flops.model(Pass(SHAPE, times=2), flops.padded(2, 12, 4)) == 2 * flops.model(Pass(SHAPE), flops.padded(2, 12, 4))
