"""How surely each labeler follows the common taste: the optimum of the written-out likelihood, and made-up people found."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math

import numpy as np
import pytest
import reference_feedback as reference

from jaxrlhf.feedback import assignments, dashboard, reliability, store


def _people(betas, pairs: int, judges: int, gold: int, seed: int) -> tuple[list[store.Choice], dict[str, str]]:
    """Choices of made-up labelers, `judges` of them on each pair; of the first `gold` pairs the answer is known."""
    rng, choices, known = np.random.default_rng(seed), [], {}
    for number in range(pairs):
        margin = rng.normal()
        if number < gold:
            known[f"{number}"] = "a" if margin > 0 else "b"
        for who in rng.permutation(len(betas))[:judges].tolist():
            prefers = rng.random() < 1 / (1 + math.exp(-betas[who] * margin))
            left = "a" if rng.random() < 0.5 else "b"
            choices.append(store.Choice(f"{number}", f"p{who}", "left" if prefers == (left == "a") else "right", left))
    return choices, known


@pytest.mark.parametrize("gold", [0, 6])
def test_the_fit_is_where_the_likelihood_has_no_slope(gold):
    choices, known = _people((3.0, 1.0, 0.2, -0.5), pairs=30, judges=3, gold=gold, seed=gold)
    table = reliability.tabulate(choices, known)
    found = reliability.likeliest(table)
    names = [f"p{i}" for i in range(4)]
    said, of_gold = [], []
    for pair in sorted({choice.pair for choice in choices}):
        words = {choice.labeler: choice.preferred for choice in choices if choice.pair == pair}
        right = known.get(pair, "a")
        said.append([0 if name not in words else 1 if words[name] == right else -1 for name in names])
        of_gold.append(pair in known)
    for i in range(4):
        up, down = (found + sign * 1e-3 * np.eye(4)[i] for sign in (1, -1))
        slope = (reference.log_posterior(up, said, of_gold) - reference.log_posterior(down, said, of_gold)) / 2e-3
        assert abs(slope) < 2e-3, (i, slope)  # the curvature is above 1: beta within 0.002 of the optimum
    for other in (found + 0.3, np.ones(4), np.zeros(4)):
        assert reference.log_posterior(found, said, of_gold) > reference.log_posterior(other, said, of_gold)


def test_who_reads_is_told_from_who_does_not():
    betas = (3.0, 1.5, 0.7, 0.0)
    inside = 0
    for seed in range(6):
        choices, known = _people(betas, pairs=1000, judges=3, gold=0, seed=seed)
        found = {each.labeler: each for each in reliability.reliability(choices, known)}
        assert next(iter(found)) == "p0"
        assert found["p3"].high < found["p2"].beta < found["p1"].beta
        assert found["p3"].agrees == pytest.approx(0.5, abs=0.08)
        assert all(abs(each.pairs - 750) < 75 for each in found.values())
        assert all(each.low < each.beta < each.high for each in found.values())
        inside += sum(found[f"p{who}"].low < beta < found[f"p{who}"].high for who, beta in enumerate(betas))
    assert inside >= 20  # of 24 intervals of 95 %: fewer than once in a hundred, were they right
    assert reliability.reliability(choices, known) == list(found.values()), "the bootstrap is seeded"


def test_gold_finds_a_reversed_majority():
    """Three people of a reversed taste and one who reads: among themselves the three are right, against gold they are not."""
    choices, known = _people((-3.0, -3.0, -3.0, 3.0), pairs=200, judges=4, gold=60, seed=5)
    alone = {each.labeler: each.beta for each in reliability.reliability(choices, {}, draws=2)}
    assert alone["p0"] > 1.5 > 0 > alone["p3"]
    with_gold = {each.labeler: each.beta for each in reliability.reliability(choices, known, draws=2)}
    assert with_gold["p0"] < -1.5 < 0 < with_gold["p3"]


def test_what_tells_nothing_is_left_out():
    said = [
        store.Choice("x", "ann", "left", "a"),
        store.Choice("y", "ann", "left", "a"),
        store.Choice("y", "bob", "tie", "a"),
        store.Choice("z", "ann", "skip", "a"),
        store.Choice("z", "bob", "right", "a"),
    ]
    assert reliability.reliability(said, {}) == []
    assert reliability.reliability(said, {"y": "tie"}) == []
    (only,) = reliability.reliability(said, {"x": "a"}, draws=4)
    assert (only.labeler, only.pairs) == ("ann", 1)
    assert reliability.reliability([], {}) == []


def test_an_admin_sees_it(tmp_path):
    choices, _ = _people((3.0, 2.0, 0.0), pairs=40, judges=3, gold=0, seed=1)
    pairs = {f"{i}": store.Pair(f"prompt {i}", " one", " two") for i in range(40)}
    with contextlib.closing(store.open_store(tmp_path / "feedback.sqlite")) as db:
        store.add_pairs(db, pairs.values())
        assert dashboard.summary(db, assignments.Rules(k=3))["reliability"] == []
        store.record(db, [dataclasses.replace(choice, pair=pairs[choice.pair].id) for choice in choices])
        shown = json.loads(json.dumps(dashboard.summary(db, assignments.Rules(k=3)), allow_nan=False))["reliability"]
    assert sorted(each["labeler"] for each in shown) == ["p0", "p1", "p2"]
    assert all(each["low"] < each["beta"] < each["high"] and each["pairs"] == 40 for each in shown)
    assert shown[-1]["labeler"] == "p2"


def test_pairs_judged_alike_are_one_row_and_sides_do_not_matter():
    choices = [
        *(store.Choice("x", who, "left", "a") for who in ("ann", "bob")),
        *(store.Choice("y", who, "left", "b") for who in ("ann", "bob")),
        store.Choice("z", "ann", "right", "a"),
        store.Choice("z", "bob", "left", "a"),
    ]
    table = reliability.tabulate(choices, {})
    assert table.labelers == ["ann", "bob"]
    assert sorted(zip(table.said.tolist(), table.count.tolist(), strict=True)) == [([1, -1], 1.0), ([1, 1], 2.0)]


def test_agreeing_is_the_mean_over_the_margins():
    m = np.abs(np.random.default_rng(0).normal(size=200_000))
    for beta in (-1.0, 0.0, 0.7, 3.0):
        expected = float(np.mean(1 / (1 + np.exp(-beta * m))))
        assert float(reliability.agreeing(np.array([beta]))[0]) == pytest.approx(expected, abs=2e-3)  # of the sampling
