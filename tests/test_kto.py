"""KTO: the loss of single responses, its reference point, and the rows that it is estimated from."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import preference_cases as cases
import pytest
import reference_preferences

from jaxrlhf.algorithms import kto
from jaxrlhf.core.types import Outputs

CONFIG = kto.Config(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
SETTINGS = {"beta": 0.3, "desirable": 1.2, "undesirable": 0.7}
EMPTY, EXCLUDED, ALONE = 1, 2, 4  # ALONE has no usable mismatched row


def examples(seed: int, shift: float = 1.0) -> kto.Examples:
    """Rows of both kinds, an empty one and an excluded one, with log-ratios of mismatched rows around `shift`."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, cases.WIDTH + 1, cases.ROWS)
    length[EMPTY] = 0
    weight, other = rng.uniform(0.5, 2.0, cases.ROWS), np.ones(cases.ROWS)
    weight[EXCLUDED] = other[EXCLUDED] = other[ALONE] = 0
    return kto.Examples(
        tokens=jnp.asarray(rng.integers(0, cases.VOCAB, (cases.ROWS, cases.T)), jnp.int32),
        prompt_len=jnp.full(cases.ROWS, cases.PROMPT, jnp.int32),
        response_len=jnp.asarray(length, jnp.int32),
        desirable=jnp.asarray(rng.permutation(np.arange(cases.ROWS) < cases.ROWS // 2)),
        weight=jnp.asarray(weight, jnp.float32),
        ref_logprobs=cases.logprobs(seed + 1000)[:, 0],
        other_ratio=jnp.asarray(shift + rng.normal(size=cases.ROWS), jnp.float32),
        other_weight=jnp.asarray(other, jnp.float32),
    )


def prepared(seed: int, holes: bool = False, shift: float = 1.0) -> tuple[kto.Batch, Outputs]:
    """A batch, and what a policy says of it."""
    batch, _, _ = kto.prepare(examples(seed, shift), (), CONFIG)
    batch = cases.with_holes(batch, seed) if holes else batch
    return batch, Outputs(logprobs=cases.logprobs(seed + 2000)[:, 0])


def reference_total(logprobs: np.ndarray, batch: kto.Batch, others: list[float]) -> tuple[float, float]:
    """The whole batch's loss and its reference point."""
    mask, ref = np.asarray(batch.mask), np.asarray(batch.ref_logprobs)
    policy, reference = ([reference_preferences.tokens_of(x[i], mask[i]) for i in range(cases.ROWS)] for x in (logprobs, ref))
    desirable, weight = np.asarray(batch.desirable), np.asarray(batch.weight, np.float64)
    return reference_preferences.kto(policy, reference, desirable, weight, others, SETTINGS)


def others_of(given: kto.Examples) -> list[float]:
    return [float(x) for x, weight in zip(given.other_ratio, given.other_weight, strict=True) if weight > 0]


@pytest.mark.parametrize("shift", [2.0, -2.0], ids=["positive", "clamped"])
@pytest.mark.parametrize("holes", [False, True])
def test_loss_and_reference_point_equal_the_reference(holes, shift):
    batch, outputs = prepared(0, holes, shift)
    others = others_of(examples(0, shift))
    loss, z0 = reference_total(np.asarray(outputs.logprobs, np.float64), batch, others)
    assert (z0 > 0) == (shift > 0)
    np.testing.assert_allclose(batch.baseline, np.full(cases.ROWS, z0), rtol=1e-5)
    assert cases.total(kto.loss, outputs, batch, CONFIG) == pytest.approx(loss, rel=1e-5)  # float32 sums
    assert kto.prepare(examples(0, shift), (), CONFIG)[2]["policy/kl_mismatched"] == pytest.approx(np.mean(others), rel=1e-5)


def test_gradient_is_that_of_the_reference():
    batch, outputs = prepared(1, holes=True)
    others = others_of(examples(1))
    gradient = jax.grad(lambda x: cases.total(kto.loss, Outputs(logprobs=x), batch, CONFIG))(outputs.logprobs)
    slope = cases.finite_differences(lambda x: reference_total(x, batch, others)[0], np.asarray(outputs.logprobs, np.float64))
    assert np.abs(slope).max() > 1e-3
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)
    rows = np.asarray(batch.mask).any(1)
    up = np.asarray(gradient.sum(1) < 0)
    np.testing.assert_array_equal(up[rows], np.asarray(batch.desirable)[rows])  # what is desired becomes more probable


def test_no_gradient_flows_through_the_reference_point():
    def loss(ratio):
        batch, _, _ = kto.prepare(examples(2).replace(other_ratio=ratio), (), CONFIG)
        return cases.total(kto.loss, prepared(2)[1], batch, CONFIG)

    assert not np.asarray(jax.grad(loss)(examples(2).other_ratio)).any()


def test_mismatched_rows_by_hand():
    given = kto.Examples(
        tokens=jnp.asarray([[1, 2, 7, 8, 9, 90], [3, 5, 6, 90, 90, 90], [3, 4, 4, 90, 90, 90], [1, 2, 2, 5, 5, 90]]),
        prompt_len=jnp.asarray([2, 1, 1, 4]),
        response_len=jnp.asarray([3, 2, 2, 1]),
        desirable=jnp.asarray([True, False, True, False]),
        weight=jnp.asarray([1.0, 2.0, 1.0, 1.0]),
    )
    made = kto.mismatched(given)
    prompts, responses = [[1, 2], [3], [3], [1, 2, 2, 5]], [[5, 6], [4, 4], [5], [7, 8, 9]]
    for row in range(4):
        expected = reference_preferences.mismatched_row(prompts[row], responses[row], 6)
        length = len(expected) - len(prompts[row])  # the last response has no room for its third token
        assert made.response_len[row] == length
        assert made.prompt_len[row] == len(prompts[row])
        assert made.tokens[row, : len(expected)].tolist() == expected
    assert made.response_len.tolist() == [2, 2, 1, 2]
    assert made.weight.tolist() == [1.0, 0.0, 1.0, 1.0]  # rows 1 and 2 answer the same prompt
    one_out = kto.mismatched(given.replace(weight=jnp.asarray([1.0, 2.0, 1.0, 0.0])))
    assert one_out.weight.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_examples_from_pairs():
    given = cases.preferences(3)
    made = kto.from_preferences(given)
    rows = cases.ROWS
    label = np.where(np.asarray(given.tie), 0.5, np.asarray(given.label))
    out = np.isin(np.arange(rows), [cases.EXCLUDED, cases.IDENTICAL, cases.TIE])
    for side in (0, 1):
        part = slice(side * rows, (side + 1) * rows)
        np.testing.assert_array_equal(made.tokens[part], given.tokens[:, side])
        np.testing.assert_array_equal(made.response_len[part], given.response_len[:, side])
        np.testing.assert_array_equal(made.ref_logprobs[part], given.ref_logprobs[:, side])
        np.testing.assert_array_equal(made.weight[part], np.where(out, 0, given.weight))
        wanted = label > 0.5 if side == 0 else label < 0.5
        np.testing.assert_array_equal(np.asarray(made.desirable[part])[~out], wanted[~out])


@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf, -np.inf])
def test_masked_places_are_not_read(garbage):
    given = examples(4)
    inside = (np.arange(cases.WIDTH) < np.asarray(given.response_len)[:, None]) & (np.asarray(given.weight) > 0)[:, None]
    dirty = given.replace(
        ref_logprobs=jnp.where(inside, given.ref_logprobs, garbage),
        other_ratio=jnp.where(given.other_weight > 0, given.other_ratio, garbage),
        desirable=given.desirable.at[EXCLUDED].set(~given.desirable[EXCLUDED]),
    )
    cases.assert_bit_equal(kto.prepare(given, (), CONFIG), kto.prepare(dirty, (), CONFIG))

    batch, outputs = prepared(4, holes=True)

    def everything(outputs, batch):
        gradient = jax.grad(lambda o: cases.total(kto.loss, o, batch, CONFIG))(outputs)
        return kto.loss(outputs, batch, CONFIG), gradient

    dirty_batch = dataclasses.replace(batch, ref_logprobs=cases.spoiled(batch.ref_logprobs, batch, -garbage))
    dirty_outputs = cases.spoiled(outputs, batch, garbage)
    cases.assert_bit_equal(everything(outputs, batch), everything(dirty_outputs, dirty_batch))


@pytest.mark.parametrize("garbage", [7, 10**6])
def test_padding_does_not_enter_mismatched_rows(garbage):
    given = examples(5)
    past = np.arange(cases.T) >= np.asarray(given.prompt_len + given.response_len)[:, None]
    clean, dirty = (kto.mismatched(x) for x in (given, given.replace(tokens=jnp.where(past, garbage, given.tokens))))
    inside = np.arange(cases.T) < np.asarray(clean.prompt_len + clean.response_len)[:, None]
    np.testing.assert_array_equal(np.asarray(clean.tokens)[inside], np.asarray(dirty.tokens)[inside])
    np.testing.assert_array_equal(clean.weight, dirty.weight)


@pytest.mark.parametrize("far", [-1e4, 1e4])
def test_extreme_log_ratios_give_finite_numbers(far):
    batch, outputs = prepared(6)
    value, gradient = jax.value_and_grad(lambda x: cases.total(kto.loss, Outputs(logprobs=x + far), batch, CONFIG))(
        outputs.logprobs
    )
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_what_makes_no_sense_is_refused():
    for name in ("beta", "desirable_weight", "undesirable_weight"):
        with pytest.raises(ValueError, match=f"{name}=0.0"):
            kto.Config(**{name: 0.0})
    given = examples(9)
    for name in ("ref_logprobs", "other_ratio", "other_weight"):
        with pytest.raises(ValueError, match=rf"Examples\.{name}"):
            kto.prepare(given.replace(**{name: None}), (), CONFIG)
    with pytest.raises(ValueError, match="1 row has none, take at least 2"):
        kto.prepare(jax.tree.map(lambda x: x[:1], given), (), CONFIG)
    with pytest.raises(ValueError, match=r"Outputs\.logprobs"):
        kto.loss(Outputs(), prepared(9)[0], CONFIG)
