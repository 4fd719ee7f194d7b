"""Scripts of the algorithms that learn from preferences, on sums: own answers, and choices from each kind of file."""

from __future__ import annotations

import contextlib
import json
import pathlib

import pytest
from scripts import check_clock, script

from jaxrlhf.data import arithmetic, sources, tfds_preferences
from jaxrlhf.feedback import store, unpaired

SMALL = ("--preset", "arithmetic", "--evaluate-every", 2, "--held-out-prompts", 48)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> pathlib.Path:
    """The start of the sums, `--preset smoke`."""
    out = tmp_path_factory.mktemp("sums") / "start"
    done = script("arithmetic", "--preset", "smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def choices(tmp_path_factory) -> dict[str, pathlib.Path]:
    """Right answers preferred to ones that forget a unit, in a JSON-lines file and in a TFDS folder."""
    folder = tmp_path_factory.mktemp("choices")
    rows = [
        {"prompt": row["prompt"], "chosen": row["answer"], "rejected": str(int(row["answer"]) + 1)}
        for row in arithmetic.problems("train")[:64]
    ]
    sources.write_jsonl(folder / "choices.jsonl", rows)
    return {"jsonl": folder / "choices.jsonl", "tfds": tfds_preferences.write_tfds(folder, {"train": rows})}


def learned(name: str, start: pathlib.Path, out: pathlib.Path, *flags: object) -> tuple[dict, list[dict]]:
    """Result and metrics of a script: the start is its own reference, and four updates moved the policy."""
    done = script(name, *SMALL, "--policy", start / "model", "--out", out, *flags)
    assert done.returncode == 0, done.stderr
    assert (out / "model" / "params.safetensors").is_file()
    result = json.loads((out / "result.json").read_text())
    assert [row["step"] for row in result["curve"]] == [0, 2, 4]
    assert abs(result["curve"][0]["held_out/kl"]) < 1e-5
    assert abs(result["curve"][-1]["held_out/kl"]) > 1e-5
    assert len(result["samples"]) == 12
    check_clock(out, ("data", "update"), updates=2)
    return result, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.full
def test_dpo_pairs_its_own_answers(start, tmp_path):
    flags = ("--steps", 4, "--batch", 16, "--pairs.prompts", 256, "--algorithm.loss", "ipo", "--algorithm.nll-coef", 0)
    result, rows = learned("dpo", start, tmp_path / "dpo", *flags)
    beta = 0.3  # of the preset
    assert rows[0]["loss/dpo"] == pytest.approx((0.5 / beta) ** 2, rel=1e-3)  # all implicit rewards are 0 at first
    assert rows[0]["preferences/pairs"] == 16
    assert result["pairs"]["train"] > result["pairs"]["held_out"]["preferences/pairs"] > 0


def test_orpo_learns_from_a_json_lines_file(start, choices, tmp_path):
    result, rows = learned("orpo", start, tmp_path / "orpo", "--steps", 4, "--batch", 16, "--choices", choices["jsonl"])
    assert result["pairs"] == {"train": 55, "too_long": 0}
    assert rows[0]["loss/total"] == pytest.approx(rows[0]["loss/lm"] + 0.1 * rows[0]["loss/odds"], rel=1e-5)
    assert rows[3]["loss/lm"] < rows[0]["loss/lm"]


@pytest.mark.full
def test_kto_learns_from_a_tfds_folder(start, choices, tmp_path):
    result, rows = learned("kto", start, tmp_path / "kto", "--steps", 4, "--batch", 32, "--choices", choices["tfds"])
    assert result["data"] == {"answers": 110, "desirable": 55, "too_long": 0}
    assert rows[0]["policy/kl_mismatched"] == pytest.approx(0, abs=1e-4)  # policy and reference are one at first
    assert rows[1]["policy/kl_mismatched"] != 0
    assert rows[0]["loss/kto"] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("learn", ["thumbs", "both"])
def test_kto_learns_from_thumbs(start, tmp_path, learn):
    """Of a store with 40 thumbs up, 20 down and 20 choices."""
    rows = arithmetic.problems("train")[:80]
    right, wrong = ([str(int(row["answer"]) + i) for row in rows] for i in (0, 1))
    with contextlib.closing(store.open_store(tmp_path / "feedback.sqlite")) as db:
        unpaired.add(db, [unpaired.Rating(row["prompt"], right[i], "ann", True) for i, row in enumerate(rows[:40])])
        unpaired.add(db, [unpaired.Rating(row["prompt"], wrong[i], "ann", False) for i, row in enumerate(rows[:20])])
        pairs = [store.Pair(row["prompt"], right[i], wrong[i]) for i, row in enumerate(rows) if i >= 60]
        store.add_pairs(db, pairs)
        store.record(db, [store.Choice(pair.id, "ann", "left", "a") for pair in pairs])
    flags = ("--steps", 4, "--batch", 16, "--choices", tmp_path / "feedback.sqlite", "--learn", learn)
    result, rows = learned("kto", start, tmp_path / "kto", *flags)
    chosen = 17 if learn == "both" else 0  # 15 % of 20 choices are held out
    assert result["data"] == {"answers": 60 + 2 * chosen, "desirable": 40 + chosen, "too_long": 0}
    assert rows[0]["loss/kto"] == pytest.approx(0.5, abs=1e-4)
    assert rows[0]["examples/counted"] == 16


@pytest.mark.full
def test_online_dpo_learns_from_its_own_scored_answers(start, tmp_path):
    _, rows = learned("online_dpo", start, tmp_path / "online", "--iterations", 4, "--batch", 16, "--n", 4)
    assert (
        rows[0]["rollout/sampler_gap_max"] < 1e-4
    )  # of the rows that are checked: a pair needs the reference's log-probs alone
    assert 0 < rows[0]["preferences/pairs"] <= 16
    assert rows[0]["reward/score"] == pytest.approx(rows[0]["reward/correct"] + 0.1 * rows[0]["reward/digits"], abs=1e-5)
