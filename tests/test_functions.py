"""Rewards in plain Python: what they see, what a fault costs, how several add up, and the verifiable ones."""

from __future__ import annotations

import math
import random
import sys
import warnings
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
import reference_tasks as reference

from jaxrlhf.core.types import Rollout
from jaxrlhf.rewards import functions


def rollout(tokens, prompt_len, response_len) -> Rollout:
    tokens = jnp.asarray(tokens, jnp.int32)
    rows = len(tokens)
    zeros = jnp.zeros(rows, jnp.int32)
    nothing = jnp.zeros((rows, 3))
    lengths = (jnp.asarray(x, jnp.int32) for x in (prompt_len, response_len))
    return Rollout(tokens, *lengths, zeros == 0, zeros, zeros, zeros, nothing, nothing)


def some(rows: int) -> Rollout:
    """Rows whose prompts are "0 1", "10 11", ...: one can see which row a report means."""
    tokens = 10 * np.arange(rows)[:, None] + np.arange(4)
    return rollout(tokens, np.full(rows, 2), np.full(rows, 2))


def decode(ids: list[int]) -> str:
    return " ".join(str(i) for i in ids)


def quietly(function, *arguments):
    """Scores without the warning, which another test reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return functions.apply(function, *arguments)


# ---------------------------------------------------------------------------------------------------------- apply


def test_functions_see_prompt_response_and_row():
    data = rollout([[5, 6, 7, 2, 0], [3, 4, 0, 0, 0]], [2, 1], [2, 1])
    seen = []

    def answer_length(prompt, response, row):
        seen.append((prompt, response, row["answer"]))
        return len(response)

    scores = functions.apply(answer_length, data, decode, [{"answer": "a"}, {"answer": "b"}])
    assert seen == [("5 6", "7 2", "a"), ("3", "4", "b")]
    np.testing.assert_array_equal(scores.score, [3.0, 1.0])
    np.testing.assert_array_equal(scores.weight, [1.0, 1.0])
    assert scores.score.dtype == scores.weight.dtype == np.float32
    assert scores.faults == ()


FAULTY = [None, math.nan, math.inf, -math.inf, 1e39, 10**400, "1.5", "", [1.0], {}, 1j, np.ones(2), object()]


@pytest.mark.parametrize("value", FAULTY, ids=lambda value: repr(value)[:12])
def test_a_value_that_is_no_finite_number_excludes_its_row_only(value):
    values = iter([1.5, value, 2])
    scores = quietly(lambda *item: next(values), some(3), decode)
    np.testing.assert_array_equal(scores.score, [1.5, 0, 2])
    np.testing.assert_array_equal(scores.weight, [1, 0, 1])
    assert [(fault.row, fault.prompt) for fault in scores.faults] == [(1, "10 11")]


@pytest.mark.parametrize("value", [True, np.float32(1), np.int64(1), jnp.float32(1), Fraction(2, 2), -3.4e38, 1e-300])
def test_a_number_of_any_kind_is_one(value):
    scores = functions.apply(lambda *item: value, some(2), decode)
    np.testing.assert_array_equal(scores.score, np.float32(float(value)))
    np.testing.assert_array_equal(scores.weight, 1)


def test_what_a_function_raises_costs_that_row_and_is_named():
    def reads_an_answer(prompt, response, row):
        return 1.0 if row["answer"] else 1 / 0

    rows = [{"answer": 1}, {}, {"answer": 0}, {"answer": 1}]
    with pytest.warns(UserWarning, match="2 of 4 responses") as caught:
        scores = functions.apply(reads_an_answer, some(4), decode, rows)
    np.testing.assert_array_equal(scores.score, [1, 0, 0, 1])
    np.testing.assert_array_equal(scores.weight, [1, 0, 0, 1])
    assert [(f.reward, f.row, f.prompt) for f in scores.faults] == [
        ("reads_an_answer", 1, "10 11"),
        ("reads_an_answer", 2, "20 21"),
    ]
    assert scores.faults[0].cause == "raised KeyError: 'answer'"
    assert scores.faults[1].cause.startswith("raised ZeroDivisionError")
    (warning,) = caught
    for part in ("'reads_an_answer'", "row 1", "'10 11'", "KeyError"):
        assert part in str(warning.message)


def test_the_end_of_a_process_is_not_swallowed():
    def stopped(prompt, response, row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        functions.apply(stopped, some(2), decode)


def test_a_report_holds_the_first_80_characters_of_a_prompt():
    scores = quietly(lambda *item: None, some(1), lambda ids: "x" * 500, None, "mine")
    assert scores.faults == (functions.Fault("mine", 0, "x" * 80, "returned None, which is no finite number"),)


def test_functions_need_a_row_for_each_response():
    with pytest.raises(ValueError, match="1 data rows for 2 responses"):
        functions.apply(lambda *item: 0.0, some(2), decode, [{}])


# ------------------------------------------------------------------------------------------------------ all at once


@pytest.mark.parametrize("kind", [list, np.array, jnp.array])
def test_values_of_all_rows(kind):
    scores = functions.of_values(kind([0.1, -2.0, 3.0]), some(3), decode, "model")
    np.testing.assert_array_equal(scores.score, np.array([0.1, -2.0, 3.0], np.float32))
    np.testing.assert_array_equal(scores.weight, 1)
    with pytest.warns(UserWarning, match=r"reward 'model' could not score 2 of 3 .* row 0 with the prompt '0 1': returned nan"):
        scores = functions.of_values(kind([math.nan, -2.0, math.inf]), some(3), decode, "model")
    np.testing.assert_array_equal(scores.score, [0, -2, 0])
    np.testing.assert_array_equal(scores.weight, [0, 1, 0])
    assert [fault.prompt for fault in scores.faults] == ["0 1", "20 21"]


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_number_of_rewards_is_an_error(count):
    with pytest.raises(ValueError, match=f"gave {count} values for 3 responses"):
        functions.of_values([1.0] * count, some(3), decode, "mine")


# ---------------------------------------------------------------------------------------------------- weighted sums


def test_a_weighted_sum_equals_the_reference_and_a_fault_in_any_part_excludes_the_row():
    draw = random.Random(0)
    for _ in range(20):
        rows = draw.randint(1, 9)
        values = {
            name: [draw.choice([draw.gauss(0, 10), math.nan, -math.inf, 1.0, 0.0]) for _ in range(rows)] for name in "abc"
        }
        weights = {name: draw.gauss(0, 2) for name in "abc"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = {name: functions.of_values(given, some(rows), decode, name) for name, given in values.items()}
        total, logged = functions.weighted_sum(parts, weights)
        score, weight = reference.weighted_sum(values, weights)
        np.testing.assert_allclose(total.score, score, rtol=1e-6, atol=1e-6)  # rounded to float32 once
        np.testing.assert_array_equal(total.weight, weight)
        assert total.score.dtype == total.weight.dtype == np.float32
        assert logged["reward/faults"] == rows - sum(weight)
        assert {fault.row for fault in total.faults} == {i for i in range(rows) if not weight[i]}
        for name, given in values.items():
            kept = [value for value in given if math.isfinite(value)]
            want = sum(kept) / len(kept) if kept else math.nan
            assert logged[f"reward/{name}"] == pytest.approx(want, rel=1e-5, nan_ok=True)


def test_functions_and_arrays_add_up():
    function = functions.apply(lambda prompt, response, row: len(prompt), some(2), decode)
    array = functions.of_values(jnp.array([0.5, 1.0]), some(2), decode, "model")
    total, logged = functions.weighted_sum({"length": function, "model": array}, {"length": 2.0, "model": -1.0})
    np.testing.assert_array_equal(total.score, [5.5, 9.0])
    assert logged == {"reward/length": 4.0, "reward/model": 0.75, "reward/faults": 0.0}


@pytest.mark.parametrize(
    ("parts", "weights", "told"),
    [
        ({}, {}, "give each reward its weight"),
        ({"a": 2}, {}, "give each reward its weight"),
        ({"a": 2}, {"a": 1.0, "b": 1.0}, "give each reward its weight"),
        ({"a": 2}, {"a": math.nan}, "not finite"),
        ({"a": 2, "b": 3}, {"a": 1.0, "b": 1.0}, "unequally many rows"),
    ],
)
def test_sums_that_make_no_sense_are_refused(parts, weights, told):
    scores = {name: functions.Scores(np.ones(rows, np.float32), np.ones(rows, np.float32)) for name, rows in parts.items()}
    with pytest.raises(ValueError, match=told):
        functions.weighted_sum(scores, weights)


# ---------------------------------------------------------------------------------------------- verifiable rewards


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("the answer is 42.", 42),
        ("first 1, then 2", 2),
        ("-7", -7),
        ("\u22127", -7),  # the minus sign of print
        ("is -$1,234.50", Fraction("-1234.5")),
        ("+3", 3),
        ("5-3", 3),  # an operator, no sign
        ("(5)-3", 3),
        ("x-3", 3),
        ("5 - 3", 3),
        ("5 = -3", -3),
        ("1,234,567", 1234567),
        ("1,2", 2),
        ("12,34", 34),
        ("1234,567", 567),
        ("0.50", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("-.5", Fraction(-1, 2)),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        ("1.5/0.5", 3),
        ("2e3", 2000),
        ("2E-1", Fraction(1, 5)),
        ("1e999999999", 999999999),  # no exponent that would fill the memory
        ("50%", 50),
        ("3/0", None),
        ("no number", None),
        ("", None),
        ("\u0663", None),  # an Arabic three
        ("9" * 5000, None),  # more digits than Python reads
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert functions.last_number(text) == number


@pytest.mark.parametrize(
    ("answer", "response", "exact", "number"),
    [
        ("95", "95", 1, 1),
        ("95", " 95\n", 1, 1),
        (95, "95", 1, 1),
        ("95", "95.0", 0, 1),
        ("95", "it is 95", 0, 1),
        ("95", "95 or 96", 0, 0),
        ("95", "", 0, 0),
        ("95", "-95", 0, 0),
        ("3/4", "so 0.75", 0, 1),
        ("1,200", "1200", 0, 1),
        ("1e-30", "0", 0, 0),
    ],
)
def test_right_answers(answer, response, exact, number):
    assert functions.exact_match("", response, {"answer": answer}) == exact
    assert functions.number_match("", response, {"answer": answer}) == number


def test_a_reference_without_a_number_is_an_error():
    with pytest.raises(ValueError, match="'many' holds no number"):
        functions.number_match("", "many", {"answer": "many"})


def test_the_whole_response_must_have_the_form():
    digits, boxed = functions.format_match(r"\d+"), functions.format_match(r"<think>.*</think> \d+")
    assert [digits("", text, {}) for text in ("12", "12 ", "a12", "")] == [1, 0, 0, 0]
    assert boxed("", "<think>a\nb</think> 7", {}) == 1
    with pytest.raises(ValueError, match=r"format_match\('\('\) is not a regular expression"):
        functions.format_match("(")


def test_words_beyond_the_length_cost():
    length = functions.length_within(2, 4)
    assert [length("", " ".join("a" * words), {}) for words in range(8)] == [-0.5, -0.25, 0, 0, 0, -0.25, -0.5, -0.75]
    for least, most in ((-1, 2), (3, 2), (0, 0)):
        with pytest.raises(ValueError, match="need 0 <= least <= most and most >= 1"):
            functions.length_within(least, most)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_repetition_equals_the_reference(n):
    draw, reward = random.Random(n), functions.repetition(n)
    for words in range(12):
        text = [draw.choice("abA") for _ in range(words)]
        want = -reference.repeated_share([word.lower() for word in text], n)
        assert reward("", " ".join(text), {}) == pytest.approx(want, abs=1e-12)
    assert reward("", "a b c d e f", {}) == 0
    assert reward("", "la " * 100, {}) < -0.98
    with pytest.raises(ValueError, match=r"repetition\(n=0\)"):
        functions.repetition(0)


def test_equal_formulas():
    pytest.importorskip("math_verify")
    equal = functions.math_match()
    assert equal("", r"so it is $\frac{1}{2}$", {"answer": "0.5"}) == 1
    assert equal("", "1/2", {"answer": r"\frac{1}{2}"}) == 1
    assert equal("", "$x^2 + 2x + 1$", {"answer": "$(x+1)^2$"}) == 1
    assert equal("", "2", {"answer": "0.5"}) == 0
    assert equal("", "no idea", {"answer": "0.5"}) == 0
    with pytest.raises(ValueError, match="finds no formula"):
        equal("", "1", {"answer": ""})


def test_an_absent_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"jaxrlhf\[math\]"):
        functions.math_match()
