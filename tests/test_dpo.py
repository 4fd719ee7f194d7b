"""DPO and its variants: the loss table, which pairs count, and the KL-regularised optimum that it must reach."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import preference_cases as cases
import pytest
import reference
import reference_preferences

from jaxrlhf.algorithms import dpo
from jaxrlhf.core.types import Outputs, Preferences
from jaxrlhf.sampling import rollout
from jaxrlhf.training import objective

# Written out, not read from the presets: this pins what each name means.
FORMS = {
    "DPO": {"form": "sigmoid", "beta": 0.1, "smoothing": 0.0, "gamma": 0.0, "reduction": "sum", "reference": True},
    "CDPO": {"form": "sigmoid", "beta": 0.1, "smoothing": 0.1, "gamma": 0.0, "reduction": "sum", "reference": True},
    "ROBUST": {"form": "robust", "beta": 0.1, "smoothing": 0.1, "gamma": 0.0, "reduction": "sum", "reference": True},
    "HINGE": {"form": "hinge", "beta": 0.1, "smoothing": 0.0, "gamma": 0.0, "reduction": "sum", "reference": True},
    "IPO": {"form": "ipo", "beta": 0.1, "smoothing": 0.0, "gamma": 0.0, "reduction": "mean", "reference": True},
    "SIMPO": {"form": "sigmoid", "beta": 2.0, "smoothing": 0.0, "gamma": 1.0, "reduction": "mean", "reference": False},
}


def prepared(seed: int, config: dpo.Config, holes: bool = False) -> tuple[dpo.Batch, Outputs]:
    """A batch, and what a policy says of it."""
    batch, _, _ = dpo.prepare(cases.preferences(seed), (), config)
    batch = cases.with_holes(batch, seed) if holes else batch
    return batch, Outputs(logprobs=cases.logprobs(seed + 2000, batch.mask.shape[-1]))


def reference_total(logprobs: np.ndarray, batch: dpo.Batch, settings: dict, nll_coef: float = 0.0) -> float:
    """The whole batch's loss, pair by pair."""
    total = count = 0.0
    mask, weights = np.asarray(batch.mask), np.asarray(batch.weight, np.float64)
    for row in range(len(weights)):
        if weights[row] == 0:
            continue
        policy = [reference_preferences.tokens_of(logprobs[row, side], mask[row, side]) for side in (0, 1)]
        ref = None
        if settings["reference"]:
            ref = [reference_preferences.tokens_of(np.asarray(batch.ref_logprobs)[row, i], mask[row, i]) for i in (0, 1)]
        label = float(batch.label[row])
        pair = reference_preferences.dpo_pair(policy, ref, label, settings)
        total += weights[row] * (pair + nll_coef * reference_preferences.nll_pair(policy, label))
        count += weights[row]
    return total / count


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_loss_equals_the_reference(name, holes):
    config = getattr(dpo, name)
    batch, outputs = prepared(0, config, holes)
    expected = reference_total(np.asarray(outputs.logprobs, np.float64), batch, FORMS[name])
    assert cases.total(dpo.loss, outputs, batch, config) == pytest.approx(expected, rel=1e-5)  # float32 sums


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_ipo_by_sums_and_by_means_are_two_losses(reduction):
    config = dataclasses.replace(dpo.IPO, reduction=reduction)
    batch, outputs = prepared(1, config)
    settings = FORMS["IPO"] | {"reduction": reduction}
    expected = reference_total(np.asarray(outputs.logprobs, np.float64), batch, settings)
    assert cases.total(dpo.loss, outputs, batch, config) == pytest.approx(expected, rel=1e-5)


def test_likelihood_term():
    config = dataclasses.replace(dpo.DPO, nll_coef=0.3)
    batch, outputs = prepared(2, config)
    expected = reference_total(np.asarray(outputs.logprobs, np.float64), batch, FORMS["DPO"], 0.3)
    assert cases.total(dpo.loss, outputs, batch, config) == pytest.approx(expected, rel=1e-5)
    assert dpo.loss(outputs, batch, config)[0]["loss/nll"].coefficient == 0.3


@pytest.mark.parametrize("name", FORMS)
def test_gradient_is_that_of_the_reference(name):
    config = dataclasses.replace(getattr(dpo, name), nll_coef=0.2)
    batch, outputs = prepared(3, config, holes=True)
    gradient = jax.grad(lambda x: cases.total(dpo.loss, Outputs(logprobs=x), batch, config))(outputs.logprobs)
    slope = cases.finite_differences(
        lambda x: reference_total(x, batch, FORMS[name], 0.2), np.asarray(outputs.logprobs, np.float64)
    )
    assert np.abs(slope).max() > 1e-3
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)


def test_a_pair_by_hand():
    # Lead: (-1 - -2) - (-3 - -1) = 1 + 2 = 3; beta 0.5: sigmoid(1.5).
    batch = dpo.Batch(
        tokens=jnp.zeros((1, 2, 3), jnp.int32),
        prompt_len=jnp.ones((1, 2), jnp.int32),
        response_len=jnp.ones((1, 2), jnp.int32),
        mask=jnp.array([[[True, False], [True, False]]]),
        label=jnp.ones(1),
        weight=jnp.ones(1),
        ref_logprobs=jnp.array([[[-2.0, 9.0], [-1.0, 9.0]]]),
    )
    terms, metrics = dpo.loss(Outputs(logprobs=jnp.array([[[-1.0, 7.0], [-3.0, 7.0]]])), batch, dpo.Config(beta=0.5))
    assert terms["loss/dpo"].sum == pytest.approx(np.log1p(np.exp(-1.5)), rel=1e-6)
    found = {name: float(term.sum / term.count) for name, term in metrics.items()}
    expected = {"reward/accuracy": 1.0, "reward/margin": 1.5, "reward/chosen": 0.5, "reward/rejected": -1.0}
    assert found == pytest.approx(expected)


def test_metrics_are_of_decided_pairs():
    batch, outputs = prepared(4, dpo.DPO)
    metrics = dpo.loss(outputs, batch, dpo.DPO)[1]
    mask, weight, label = (np.asarray(x) for x in (batch.mask, batch.weight, batch.label))
    ratio = np.where(mask, np.asarray(outputs.logprobs) - np.asarray(batch.ref_logprobs), 0).sum(-1)
    rows = [row for row in range(cases.ROWS) if weight[row] > 0 and label[row] != 0.5]
    assert cases.TIE not in rows
    sides = [(0, 1) if label[row] > 0.5 else (1, 0) for row in rows]
    chosen, rejected = (np.array([0.1 * ratio[r, s[i]] for r, s in zip(rows, sides, strict=True)]) for i in (0, 1))
    expected = {
        "reward/accuracy": chosen > rejected,
        "reward/margin": chosen - rejected,
        "reward/chosen": chosen,
        "reward/rejected": rejected,
    }
    assert 0 < (chosen > rejected).sum() < len(rows)
    for name, values in expected.items():
        mean = (weight[rows] * values).sum() / weight[rows].sum()
        assert metrics[name].sum / metrics[name].count == pytest.approx(mean, rel=1e-4), name


def test_which_pairs_count():
    given = cases.preferences(5)
    batch, state, metrics = dpo.prepare(given, (), dpo.DPO)
    assert state == ()
    out = [cases.EXCLUDED, cases.IDENTICAL]
    expected = np.asarray(given.weight).copy()
    expected[out] = 0
    np.testing.assert_array_equal(batch.weight, expected)
    mask = np.arange(cases.WIDTH) < np.asarray(given.response_len)[..., None]
    mask[out] = False
    np.testing.assert_array_equal(batch.mask, mask)
    assert batch.label[cases.TIE] == 0.5
    assert {name: float(value) for name, value in metrics.items()} == {
        "preferences/pairs": cases.ROWS - 2,
        "preferences/ties": 1,
        "preferences/identical": 1,
    }


@pytest.mark.parametrize("change", ["token", "length", "prompt"])
def test_a_pair_that_differs_anywhere_is_not_identical(change):
    given = cases.preferences(6)
    row = cases.IDENTICAL
    if change == "token":
        last = given.tokens[row, 1, cases.PROMPT + 3]
        given = given.replace(tokens=given.tokens.at[row, 1, cases.PROMPT + 3].set((last + 1) % cases.VOCAB))
    elif change == "length":
        given = given.replace(response_len=given.response_len.at[row, 1].set(5))
    else:
        given = given.replace(prompt_len=given.prompt_len.at[row, 1].set(2), response_len=given.response_len.at[row, 1].set(5))
    assert dpo.prepare(given, (), dpo.DPO)[2]["preferences/identical"] == 0


@pytest.mark.parametrize("name", FORMS)
def test_order_of_the_responses_changes_nothing(name):
    config = getattr(dpo, name)
    given = cases.preferences(7)
    swapped = given.replace(
        label=1 - given.label,
        **{field: getattr(given, field)[:, ::-1] for field in ("tokens", "prompt_len", "response_len", "ref_logprobs")},
    )
    batch, outputs = prepared(7, config)
    other, _, _ = dpo.prepare(swapped, (), config)
    one = float(cases.total(dpo.loss, outputs, batch, config))
    assert cases.total(dpo.loss, Outputs(logprobs=outputs.logprobs[:, ::-1]), other, config) == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("garbage", [1e6, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", FORMS)
def test_masked_places_are_not_read(name, garbage):
    config = dataclasses.replace(getattr(dpo, name), nll_coef=0.1)
    given = cases.preferences(8)
    inside = np.arange(cases.WIDTH) < np.asarray(given.response_len)[..., None]
    inside &= (np.asarray(given.weight) > 0)[:, None, None]
    past = np.arange(cases.T) >= np.asarray(given.prompt_len + given.response_len)[..., None]
    out = given.weight == 0
    dirty = given.replace(
        tokens=given.tokens,
        ref_logprobs=jnp.where(inside, given.ref_logprobs, garbage),
        label=jnp.where(out, garbage, given.label),
        margin=jnp.full(cases.ROWS, garbage),
    )
    clean_batch, _, clean_metrics = dpo.prepare(given, (), config)
    dirty_batch, _, dirty_metrics = dpo.prepare(dirty, (), config)
    cases.assert_bit_equal((clean_batch, clean_metrics), (dirty_batch, dirty_metrics))
    other = dpo.prepare(given.replace(tokens=jnp.where(past, 7, given.tokens)), (), config)[2]
    cases.assert_bit_equal(clean_metrics, other)  # padding does not make a pair differ

    batch, outputs = prepared(8, config, holes=True)
    dirty_batch = dataclasses.replace(
        batch,
        label=jnp.where(batch.weight == 0, garbage, batch.label),
        ref_logprobs=None if batch.ref_logprobs is None else cases.spoiled(batch.ref_logprobs, batch, -garbage),
    )
    dirty_outputs = cases.spoiled(outputs, batch, garbage)

    def everything(outputs, batch):
        gradient = jax.grad(lambda o: cases.total(dpo.loss, o, batch, config))(outputs)
        return dpo.loss(outputs, batch, config), gradient

    cases.assert_bit_equal(everything(outputs, batch), everything(dirty_outputs, dirty_batch))


@pytest.mark.parametrize("far", [-1e4, -300.0, 300.0, 1e4])
@pytest.mark.parametrize("name", FORMS)
def test_extreme_log_ratios_give_finite_numbers(name, far):
    config = getattr(dpo, name)
    batch, outputs = prepared(9, config)
    moved = outputs.logprobs.at[:, 0].add(far)
    value, gradient = jax.value_and_grad(lambda x: cases.total(dpo.loss, Outputs(logprobs=x), batch, config))(moved)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_nothing_to_learn_from_gives_zero_not_nan():
    given = cases.preferences(10)
    batch, _, metrics = dpo.prepare(given.replace(weight=jnp.zeros(cases.ROWS)), (), dpo.DPO)
    term = dpo.loss(Outputs(logprobs=cases.logprobs(10)), batch, dpo.DPO)[0]["loss/dpo"]
    assert (term.sum, term.count, metrics["preferences/pairs"]) == (0, 0, 0)


def test_before_the_first_update_policy_and_reference_are_one():
    """Reference log-probs computed ahead and the objective's are of the same distribution: every implicit reward is 0."""
    params = jax.jit(cases.MODEL.init)(jax.random.key(3))
    given = cases.preferences(13)
    given = given.replace(ref_logprobs=rollout.batch_logprobs(cases.MODEL, params, given, cases.WIDTH))
    batch, _, _ = dpo.prepare(given, (), dpo.DPO)
    outputs = jax.jit(objective.make_outputs(cases.MODEL))(params, None, batch, None)
    terms, metrics = dpo.loss(outputs, batch, dpo.DPO)
    assert terms["loss/dpo"].sum / terms["loss/dpo"].count == pytest.approx(np.log(2), abs=1e-5)
    for name in ("reward/chosen", "reward/rejected"):
        assert abs(float(metrics[name].sum / metrics[name].count)) < 1e-5, name


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"beta": 0.0}, "beta=0.0"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5 must be in \[0, 0.5\)"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1"),
        ({"loss": "robust", "label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"loss": "robust"}, "set loss='sigmoid', or label_smoothing > 0"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "only sigmoid and robust have it"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "only sigmoid and robust have it"),
        ({"gamma": 0.5}, "set reference=False"),
        ({"gamma": 0.5, "reference": False, "loss": "ipo"}, "SimPO"),
        ({"gamma": 0.5, "reference": False, "label_smoothing": 0.1}, "SimPO"),
        ({"gamma": -0.5, "reference": False}, "gamma=-0.5"),
        ({"nll_coef": -1.0}, "nll_coef=-1.0"),
    ],
    ids=str,
)
def test_impossible_configurations(wrong, said):
    with pytest.raises(ValueError, match=said):
        dpo.Config(**wrong)


def test_missing_parts_are_named():
    given = cases.preferences(14)
    with pytest.raises(ValueError, match=r"Preferences\.ref_logprobs.*batch_logprobs"):
        dpo.prepare(given.replace(ref_logprobs=None), (), dpo.DPO)
    assert dpo.prepare(given.replace(ref_logprobs=None), (), dpo.SIMPO)[0].ref_logprobs is None
    three = jax.tree.map(lambda x: jnp.concatenate([x, x[:, :1]], axis=1) if x.ndim > 1 else x, given)
    with pytest.raises(ValueError, match="sets of 3 responses"):
        dpo.prepare(three, (), dpo.DPO)
    with pytest.raises(ValueError, match=r"Outputs\.logprobs"):
        dpo.loss(Outputs(), prepared(14, dpo.DPO)[0], dpo.DPO)


# The closed-form optimum. Responses of at most two tokens over four ids, id 0 ends one: (0), (a, 0) or (a, b), cut.
IDS = 4
SEQUENCES = [(0,)] + [(a, b) for a in range(1, IDS) for b in range(IDS)]
ROWS_OF = jnp.asarray([[*s, 0][:2] for s in SEQUENCES], jnp.int32)
LENGTHS = jnp.asarray([len(s) for s in SEQUENCES], jnp.int32)


def read(params, tokens):
    """Log-probs [..., 2] of both tokens in a table of conditional distributions."""
    first, second = jax.nn.log_softmax(params["first"]), jax.nn.log_softmax(params["second"])
    return jnp.stack([first[tokens[..., 0]], second[tokens[..., 0], tokens[..., 1]]], axis=-1)


def distribution(params) -> np.ndarray:
    """Probability of every response."""
    logprobs = np.asarray(read(params, ROWS_OF), np.float64)
    return np.exp(np.where(np.arange(2) < np.asarray(LENGTHS)[:, None], logprobs, 0).sum(1))


def test_reaches_the_closed_form_optimum_of_the_regularised_bandit():
    """Choices of all pairs, as a population with Bradley-Terry taste makes them."""
    rng = np.random.default_rng(15)
    ref = {
        "first": jnp.asarray(rng.normal(size=IDS), jnp.float32),
        "second": jnp.asarray(rng.normal(size=(IDS, IDS)), jnp.float32),
    }
    prize = rng.normal(size=len(SEQUENCES))
    config = dpo.Config(beta=0.5)
    left, right = (jnp.asarray(side) for side in zip(*itertools.combinations(range(len(SEQUENCES)), 2), strict=True))
    both = jnp.stack([left, right], axis=1)
    tokens, ones = ROWS_OF[both], jnp.ones(len(both))
    given = Preferences(
        tokens=tokens,
        prompt_len=jnp.zeros(both.shape, jnp.int32),
        response_len=LENGTHS[both],
        label=jnp.asarray(reference_preferences.bradley_terry(prize)[left, right], jnp.float32),
        tie=ones < 0,
        weight=ones,
        margin=ones * 0,
        ref_logprobs=read(ref, tokens),
    )
    batch, _, metrics = dpo.prepare(given, (), config)
    assert metrics["preferences/pairs"] == len(both)
    steps = 1500
    optimizer = optax.adam(optax.linear_schedule(0.05, 0.0, steps))

    def update(carry, _):
        params, opt_state = carry
        gradient = jax.grad(lambda p: cases.total(dpo.loss, Outputs(logprobs=read(p, tokens)), batch, config))(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.jit(lambda start: jax.lax.scan(update, start, length=steps))((ref, optimizer.init(ref)))
    base, reached = distribution(ref), distribution(params)
    optimum = reference.regularised_optimum(base, prize, config.beta)
    assert reached.sum() == pytest.approx(1.0, abs=1e-5)
    assert 0.5 * np.abs(base - optimum).sum() > 0.3  # there is something to learn
    assert 0.5 * np.abs(reached - optimum).sum() < 0.01
