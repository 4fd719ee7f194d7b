"""Scripts of the algorithms that learn from rewards, on sums; published recipes in small; and a fork in two new files."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file
from scripts import ROOT, check_clock, environment, script

from experiments import grpo
from jaxrlhf.sampling import generate, rollout, stragglers
from jaxrlhf.training.run import Run

SMALL = ("--iterations", 2, "--evaluate-every", 1, "--held-out-prompts", 48)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> pathlib.Path:
    """The start of the sums, `--preset smoke`."""
    out = tmp_path_factory.mktemp("sums") / "start"
    done = script("arithmetic", "--preset", "smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def check(out: pathlib.Path, start: pathlib.Path) -> list[dict]:
    """The start is its own reference, rewards and accuracy are logged, and the policy moved. Returns the metrics."""
    result = json.loads((out / "result.json").read_text())
    first = json.loads((start / "result.json").read_text())
    assert [row["step"] for row in result["curve"]] == [0, 1, 2]
    assert abs(result["curve"][0]["held_out/kl"]) < 1e-5
    assert result["curve"][0]["held_out/accuracy"] == first["accuracy"]
    assert abs(result["curve"][-1]["held_out/kl"]) > 1e-5
    assert len(result["samples"]) == 12
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows[:2]:
        assert row["reward/faults"] == 0
        assert row["reward/score"] == pytest.approx(row["reward/correct"] + 0.1 * row["reward/digits"], abs=1e-5)
        assert row["optimizer/grad_norm"] > 0
    return rows


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        pytest.param("ppo", ("--batch", 32), marks=pytest.mark.full),  # plain pytest runs it below, with options
        pytest.param("grpo", ("--batch", 8, "--watch.strict"), marks=pytest.mark.full),
        pytest.param("grpo", ("--batch", 8, "--microbatches.tokens", 64, "--microbatches.multiple", 7), marks=pytest.mark.full),
        pytest.param("rloo", ("--batch", 8), marks=pytest.mark.full),  # and this as the fork
        pytest.param(
            "reinforce",
            ("--batch", 32, "--algorithm.baseline", "greedy", "--algorithm.no-whiten-advantages"),
            marks=pytest.mark.full,
        ),
        ("raft", ("--batch", 8, "--optimizer.name", "schedule_free", "--optimizer.schedule", "constant")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_algorithm_learns_sums(start, tmp_path, name, flags):
    done = script(name, "--preset", "arithmetic", "--policy", start / "model", "--out", tmp_path / name, *SMALL, *flags)
    assert done.returncode == 0, done.stderr
    rows = check(tmp_path / name, start)
    stages = ("data", "rollout", "score", "update", "evaluate", "other")
    whole = () if "--microbatches.tokens" in flags else ("train_step",)  # sorted rows have programs of other names
    check_clock(tmp_path / name, stages, updates=2, once=(*whole, "prepare", "_experience"))
    assert rows[0]["rollout/sampler_gap_max"] < 1e-4
    if name != "raft":
        assert rows[0]["importance/max"] == pytest.approx(1, abs=1e-4)


def test_ppo_with_every_option_that_is_off_by_default(start, tmp_path):
    """A critic of its own that warms up, averaged weights, an exact KL in the loss, filters replayed."""
    flags = ("--batch", 32, "--critic", "separate", "--ema-decay", 0.5, "--algorithm.critic-warmup", 1)
    flags += ("--algorithm.kl-in", "loss", "--algorithm.kl-estimator", "exact", "--sampling.top-p", 0.9, "--sampling.replay")
    done = script("ppo", "--preset", "arithmetic", "--policy", start / "model", "--out", tmp_path / "ppo", *SMALL, *flags)
    assert done.returncode == 0, done.stderr
    curve = json.loads((tmp_path / "ppo" / "result.json").read_text())["curve"]
    assert curve[1]["held_out/kl"] == pytest.approx(0, abs=1e-5)  # the first iteration warms the critic up
    assert abs(curve[2]["held_out/kl"]) > 1e-5
    rows = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss/kl"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["rollout/sampler_gap_max"] < 1e-4  # against what was drawn from


@pytest.mark.full
def test_answers_under_way_survive_a_run_that_is_stopped(start, tmp_path, monkeypatch):
    settings = dataclasses.replace(
        grpo.ARITHMETIC,
        policy=start / "model",
        iterations=3,
        batch=8,
        evaluate_every=3,
        held_out_prompts=16,
        rollouts=rollout.Options(stragglers=4, generation=generate.Options(chunk=2)),
    )
    save, carry_on, calls = Run.maybe_save, stragglers.carry_on, []
    monkeypatch.setattr(Run, "maybe_save", lambda run, step, state, last=False: save(run, step, state, last=True))

    def broken(*given):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(carry_on(*given))
        return calls[-1]

    whole = grpo.run(dataclasses.replace(settings, out=tmp_path / "whole"))
    monkeypatch.setattr(stragglers, "carry_on", broken)
    with pytest.raises(KeyboardInterrupt):
        grpo.run(dataclasses.replace(settings, out=tmp_path / "stopped"))
    begun = calls[-1][2]
    assert begun.row.size == 4 * settings.algorithm.samples
    assert (begun.rollout.response_len > 0).any()  # or nothing was under way
    monkeypatch.setattr(stragglers, "carry_on", carry_on)
    again = grpo.run(dataclasses.replace(settings, out=tmp_path / "stopped"))
    assert again["samples"] == whole["samples"]
    one, other = (load_file(tmp_path / name / "model" / "params.safetensors") for name in ("whole", "stopped"))
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[name])
    rows = [json.loads(line) for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert max(row.get("rollout/age", 0) for row in rows) > 0
    nine = dataclasses.replace(settings, out=tmp_path / "nine", rollouts=rollout.Options(stragglers=9))
    with pytest.raises(ValueError, match="stragglers=9 must be between 0 and batch=8"):
        grpo.run(nine)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("grpo", (*SMALL, "--batch", 8, "--lora.targets", "query", "down")),
        pytest.param("ppo", (*SMALL, "--batch", 32, "--critic", "separate", "--ema-decay", 0.5), marks=pytest.mark.full),
        *(pytest.param(name, (*SMALL, "--batch", batch, *more), marks=pytest.mark.full) for name, batch, *more in (
            ("rloo", 8), ("raft", 8), ("online_dpo", 16),
            ("reinforce", 32, "--algorithm.baseline", "greedy", "--algorithm.no-whiten-advantages"))),
        *(pytest.param(name, ("--steps", 2, "--evaluate-every", 1, "--held-out-prompts", 48, "--batch", 16,
                              "--pairs.prompts", 256), marks=pytest.mark.full) for name in ("dpo", "kto", "orpo")),
    ],
    ids=("grpo", "ppo", "rloo", "raft", "online_dpo", "reinforce", "dpo", "kto", "orpo"),
)  # fmt: skip
def test_an_adapter_is_trained_over_the_start_and_saved_twice(start, tmp_path, name, flags):
    """Merged, for the stages that follow, and alone, from which the merged model comes out again bit for bit."""
    out = tmp_path / name
    command = ("--preset", "arithmetic", "--policy", start / "model", "--out", out, *flags, "--lora.rank", 4)
    done = script(name, *command)
    assert done.returncode == 0, done.stderr
    assert "base and reference" in done.stdout  # the table of what the run holds
    planned = {(row["role"], row["kind"]): row["size"] for row in json.loads((out / "memory.json").read_text())["rows"]}
    weights = sum(x.nbytes for x in load_file(start / "model" / "params.safetensors").values())
    assert planned["base and reference", "frozen"] == {"total": weights, "device": weights}
    assert 0 < planned["policy", "moments"]["total"] < weights
    curve = json.loads((out / "result.json").read_text())["curve"]
    assert abs(curve[0]["held_out/kl"]) < 1e-5
    assert abs(curve[-1]["held_out/kl"]) > 1e-7
    merged = tmp_path / "merged"
    done = script("merge_adapter", "--base", start / "model", "--adapter", out / "adapter", "--out", merged)
    assert done.returncode == 0, done.stderr
    saved, again, before = (load_file(x / "model" / "params.safetensors") for x in (out, merged, start))
    for leaf, value in saved.items():
        np.testing.assert_array_equal(again[leaf], value, err_msg=leaf)
    moved = {leaf for leaf, value in saved.items() if (value != before[leaf]).any()}
    targets = ("query", "down") if name == "grpo" else ("query", "key", "value", "output", "gate", "up", "down")
    assert moved == {f"layers/{target}" for target in targets}


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("grpo", ("--batch", 8, "--lora.rank", 4, "--lora.targets", "query", "down")),
        ("ppo", ("--batch", 32)),
    ],
    ids=("adapter", "reference"),
)
def test_the_frozen_start_in_eight_bits(start, tmp_path, name, flags):
    """What is saved is what was trained: over the weights that the eight bits stand for, or, without adapters, over the start's
    own, near a reference that is off by rounding alone."""
    out = tmp_path / name
    command = ("--preset", "arithmetic", "--policy", start / "model", "--out", out, *SMALL, *flags, "--frozen", "int8")
    done = script(name, *command)
    assert done.returncode == 0, done.stderr
    kl = json.loads((out / "result.json").read_text())["curve"][0]["held_out/kl"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["rollout/sampler_gap_max"] < 1e-4
    saved, before = (load_file(x / "model" / "params.safetensors") for x in (out, start))
    assert {value.dtype for value in saved.values()} == {np.dtype(np.float32)}
    if name == "ppo":
        assert 0 < abs(kl) < 0.05
        return
    assert abs(kl) < 1e-5
    for leaf in ("layers/key", "layers/up"):
        step = np.abs(before[leaf]).max(-2, keepdims=True) / 127
        np.testing.assert_allclose(saved[leaf], np.round(before[leaf] / step) * step, atol=1e-6, err_msg=leaf)
        assert (saved[leaf] != before[leaf]).any()
    step = np.abs(before["layers/query"]).max(-2, keepdims=True) / 127
    rest = saved["layers/query"] - np.round(before["layers/query"] / step) * step  # the adapter
    assert np.linalg.matrix_rank(rest[0], tol=1e-6) <= 4
    assert np.abs(rest).max() > 1e-6


def test_a_new_algorithm_is_two_new_files_and_no_edit(start, tmp_path):
    """A fork: a copy of rloo.py with another advantage and a copy of its script, in folders of their own."""
    algorithm = (ROOT / "jaxrlhf" / "algorithms" / "rloo.py").read_text()
    assert algorithm.count("reward - baseline, learned") == 1
    (tmp_path / "sign_rloo.py").write_text(
        algorithm.replace("reward - baseline, learned", "jnp.sign(reward - baseline), learned")
    )
    page = (ROOT / "experiments" / "rloo.py").read_text()
    page = page.replace("from jaxrlhf.algorithms import rloo", "import sign_rloo").replace("rloo.", "sign_rloo.")
    (tmp_path / "fork.py").write_text(page)
    flags = ["--preset", "arithmetic", "--policy", start / "model", "--out", tmp_path / "run", "--batch", 8, *SMALL]
    path = environment() | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run([sys.executable, tmp_path / "fork.py", *map(str, flags)], env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(tmp_path / "run", start)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("ziegler_sentiment", ("--ensemble", 2, "--aggregation", "worst")),
        pytest.param("ziegler_sentiment", (), marks=pytest.mark.full),
        pytest.param("tldr", ("--ensemble", 2, "--ensemble-of", "models"), marks=pytest.mark.full),
        pytest.param("hh", (), marks=pytest.mark.full),
    ],
    ids=("ziegler_sentiment-heads", "ziegler_sentiment", "tldr-models", "hh"),
)
def test_recipes_run_in_small(tmp_path, name, flags):
    done = script(f"recipes.{name}", "--preset", "smoke", "--out", tmp_path / name, *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / name / "result.json").read_text())
    assert result["reward_model"]["accuracy"] > 0.5
    assert abs(result["ppo"]["curve"][0]["held_out/kl"]) < 1e-5
    assert result["ppo"]["curve"][-1]["held_out/kl"] != 0, "the policy was trained"
    config = json.loads((tmp_path / name / "reward_model" / "model" / "config.json").read_text())
    assert config.get("ensemble", {"members": 1})["members"] == (2 if flags else 1)
    for part in ("warm_up", "sft", "reward_model", "ppo"):
        assert (tmp_path / name / part / "model" / "params.safetensors").is_file()


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_thirty_points_on_held_out_sums(tmp_path, name, seed):
    first = script("arithmetic", "--seed", seed, "--out", tmp_path / "start")
    assert first.returncode == 0, first.stderr
    assert 0.2 <= json.loads((tmp_path / "start" / "result.json").read_text())["accuracy"] <= 0.5
    flags = ("--preset", "arithmetic", "--policy", tmp_path / "start" / "model")
    done = script(name, *flags, "--seed", seed, "--out", tmp_path / name)
    assert done.returncode == 0, done.stderr
    curve = json.loads((tmp_path / name / "result.json").read_text())["curve"]
    assert curve[-1]["held_out/accuracy"] >= curve[0]["held_out/accuracy"] + 0.3
