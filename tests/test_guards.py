"""Alarms: what is a jump of the loss, what is a KL that runs away, and what is neither."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from jaxrlhf.training.guards import Guard


def heard(name: str, values: list[float]) -> list[int]:
    guard = Guard()
    return [i for i, value in enumerate(values) if guard.read({name: value})]


def noise(count: int, seed: int = 0) -> list[float]:
    return (2.0 + 0.1 * np.random.default_rng(seed).standard_normal(count)).tolist()


def test_a_loss_six_deviations_up_is_a_jump_and_does_not_hide_the_next():
    rows = [*noise(60), 3.5, *noise(5, 1), 3.0]
    assert heard("loss/total", rows) == [60, 66]


def test_five_deviations_or_a_fall_are_none():
    rows = noise(60)
    deviation = float(np.std(rows))
    assert heard("loss/total", [*rows, 2.0 + 4.5 * deviation]) == []
    assert heard("loss/total", [*rows, -50.0]) == []


def test_the_first_rows_of_a_run_are_no_jumps():
    assert heard("loss/total", [1.0] * 19 + [50.0]) == []
    assert heard("loss/total", [1.0] * 20 + [50.0]) == [20]


def test_a_nearly_flat_curve_may_rise_by_a_tenth():
    assert heard("loss/total", [1.0] * 30 + [1.09]) == []
    assert heard("loss/total", [1.0] * 30 + [1.11]) == [30]


def test_only_the_last_128_rows_are_what_a_loss_is_measured_against():
    """A loss of long ago, far above today's, would hide a jump."""
    rows = [100.0 * (i % 2) for i in range(64)] + noise(128)
    assert heard("loss/total", [*rows, 5.0]) == [192]


@pytest.mark.parametrize(
    ("values", "alarms"),
    [
        ([0.001 * 2**i for i in range(12)], []),  # doubling from nothing is how a run begins
        ([1.0, 1.1, 1.2, 4.7], []),  # below 5 nats
        ([1.0, 1.1, 1.2, 5.1], [3]),
        ([5.0 + 0.5 * i for i in range(40)], []),
        ([6.0] * 10 + [23.9], []),
        ([6.0] * 10 + [24.1], [10]),
        ([60.0], []),  # the first row of a run that begins far away
    ],
)
def test_a_kl_runs_away_at_four_times_its_last_rows(values, alarms):
    assert heard("policy/kl_ref", values) == alarms


def test_what_is_no_number_is_passed_over():
    guard = Guard()
    for value in [*noise(30), math.nan, math.inf]:
        assert guard.read({"loss/total": value, "policy/kl_ref": value}) == {}
    assert guard.read({"reward/score": 1e9}) == {}
    assert "loss/total" in guard.read({"loss/total": 9.0})


def test_its_state_goes_through_json_and_says_the_same():
    rows = [*noise(50), 4.0]
    first = Guard()
    for value in rows[:40]:
        first.read({"loss/total": value, "policy/kl_ref": value})
    again = Guard(json.loads(json.dumps(first.state)))
    for value in rows[40:]:
        row = {"loss/total": value, "policy/kl_ref": value}
        assert first.read(row) == again.read(row)
    assert first.state == again.state
