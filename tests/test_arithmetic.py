"""Sums: right answers, careless ones, and no leak between the splits."""

from __future__ import annotations

import numpy as np
import pytest
import reference_tasks as reference

from jaxrlhf.data import arithmetic


def operands(prompt: str) -> frozenset[str]:
    left, right = prompt.removesuffix("=").split("+")
    return frozenset((left, right))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_pair_of_operands_is_in_both_splits(seed):
    train, held_out = ([row["prompt"] for row in arithmetic.problems(split, seed)] for split in ("train", "held_out"))
    assert len(held_out) == 512
    assert len(set(map(operands, held_out))) == 512, "every pair once, in one order"
    assert not set(map(operands, train)) & set(map(operands, held_out))
    assert len(set(train)) == len(train) == 90 * 90 - sum(1 if len(operands(p)) == 1 else 2 for p in held_out)
    assert len(set(map(operands, train))) + 512 == 90 * 91 // 2


def test_no_demonstration_is_held_out_whatever_the_seed_of_a_run():
    held_out = {operands(row["prompt"]) for row in arithmetic.problems("held_out")}
    for seed in range(4):
        shown = {operands(prompt) for prompt, _ in arithmetic.demonstrations(50_000, 0.5, seed)}
        assert not shown & held_out
        assert len(shown) == 90 * 91 // 2 - 512, "and nothing else is left out"


def test_answers_are_right_and_the_order_is_drawn_by_the_seed():
    for split in ("train", "held_out"):
        rows = arithmetic.problems(split)
        for row in rows:
            left, right = row["prompt"].removesuffix("=").split("+")
            assert (int(left), int(right)) == (row["left"], row["right"])
            assert row["answer"] == reference.written_sum(left, right, carry=True)
        assert rows == arithmetic.problems(split)
        assert rows != arithmetic.problems(split, seed=1)


def test_careless_people_drop_every_carry():
    right = 0
    for left in range(10, 100):
        for other in range(10, 100):
            want = reference.written_sum(str(left), str(other), carry=False)
            assert str(arithmetic.without_carry(left, other)) == want
            right += int(want) == left + other
    assert right / 8100 == pytest.approx(0.24, abs=0.01)


@pytest.mark.parametrize("careless", [0.0, 0.6, 1.0])
def test_the_careless_share_of_the_demonstrations(careless):
    shown = arithmetic.demonstrations(20_000, careless, seed=1)
    rows = {row["prompt"]: row for row in arithmetic.problems("train")}
    tell_tale = [
        (p, a) for p, a in shown if arithmetic.without_carry(rows[p]["left"], rows[p]["right"]) != int(rows[p]["answer"])
    ]
    dropped = [a == str(arithmetic.without_carry(rows[p]["left"], rows[p]["right"])) for p, a in tell_tale]
    assert all(a == rows[p]["answer"] for (p, a), drop in zip(tell_tale, dropped, strict=True) if not drop)
    assert np.mean(dropped) == pytest.approx(careless, abs=0.02)  # 5 standard deviations of 15,000 draws
    assert shown == arithmetic.demonstrations(20_000, careless, seed=1)
    assert shown != arithmetic.demonstrations(20_000, careless, seed=2)


@pytest.mark.parametrize(("count", "careless"), [(0, 0.5), (5, -0.1), (5, 1.1)])
def test_demonstrations_that_make_no_sense_are_refused(count, careless):
    with pytest.raises(ValueError, match=r"need count >= 1 and careless in \[0, 1\]"):
        arithmetic.demonstrations(count, careless, seed=0)
