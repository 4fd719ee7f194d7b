"""Answers drawn on devices of their own: which weights draw which, the run in turns bit for bit, and a run that was stopped."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import threading
import types
from typing import Any

import jax
import numpy as np
import pytest
import tiny_policy
from run_cases import ends

from experiments import apart, grpo, raft, stage
from jaxrlhf.algorithms import offpolicy
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.rewards import pool
from jaxrlhf.sampling import generate, rollout
from jaxrlhf.training import timing
from jaxrlhf.training.optimizer import OptimizerConfig
from jaxrlhf.training.run import Run

WEIGHED = dataclasses.replace(grpo.ARITHMETIC.algorithm, samples=2, importance=offpolicy.Config())


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> pathlib.Path:
    return tiny_policy.write(tmp_path_factory.mktemp("apart") / "start")


@pytest.fixture
def devices(monkeypatch):
    """As many devices as a test asks for are all that there are."""
    every = jax.devices()
    return lambda count: monkeypatch.setattr(jax, "devices", lambda *_: every[:count])


def settings(start: pathlib.Path, out: pathlib.Path, **own: Any) -> grpo.Config:
    return dataclasses.replace(
        grpo.ARITHMETIC,
        policy=start,
        out=out,
        iterations=4,
        batch=8,
        algorithm=WEIGHED,
        evaluate_every=4,
        held_out_prompts=8,
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
        pool=pool.Config(functions=("test_apart:letters",)),
        rollouts=rollout.Options(apart=rollout.Apart(**own)),
    )


def letters(prompt: str, response: str, row: dict) -> float:
    """A reward that a policy which was not trained gets more or less of: or else it would not move."""
    del prompt, row
    return sum(letter in "0123456789" for letter in response) - 0.1 * len(response)


def rows(out: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][:4]


# ------------------------------------------------------------------------------------------------ weights and their age


@pytest.mark.parametrize(("k", "drawn_with"), [(0, [0, 1, 2, 3, 4]), (1, [0, 0, 1, 2, 3]), (2, [0, 0, 0, 2, 2])])
def test_answers_are_of_the_weights_pushed_last_and_never_older_than_k(monkeypatch, start, tmp_path, devices, k, drawn_with):
    """Weights are those of their iteration though the update takes their memory; the next answers are drawn meanwhile."""
    devices(3)
    config = dataclasses.replace(settings(start, tmp_path, devices=2, steps=k), iterations=5)
    learning = sharding.make_mesh(MeshConfig(), apart.learning(config))
    assert learning.size == 1
    seen, threads = [], set()

    def traced(model, policy, prompts, spec, key, n, version, options):
        del model, spec, key, options
        assert policy["norm"]["scale"].sharding.device_set == prompts.tokens.sharding.device_set == set(jax.devices()[1:])
        assert len(prompts.tokens.addressable_shards) == 2
        seen.append((version, float(policy["norm"]["scale"][0])))
        threads.add(threading.current_thread())
        return (prompts.tokens, n), []

    monkeypatch.setattr(generate, "traced", traced)
    first = stage.load(start, learning)
    task: Any = types.SimpleNamespace(start=first, spec=None, prompts=Prompted())
    sampler = apart.sampler(config, task, 2, timing.Clock(timing.Options(), None))
    assert sampler is not None
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    params = {"policy": jax.tree.map(lambda x: x * 0, first.params)}
    pushed = sampler.push(params, 0) if k else None
    for i in range(5):
        (tokens, _), prompts, _, pushed = sampler.answers(params, i, pushed)
        np.testing.assert_array_equal(tokens, prompts.tokens)
        assert int(prompts.uid[0]) == 100 * i
        assert sampler.figures == {"rollout/staleness": i - drawn_with[i]}
        params = update(params)
    assert seen == [(version, version) for version in drawn_with]
    assert threading.main_thread() not in threads
    if k:
        with pytest.raises(ValueError, match=rf"iteration 9 was given weights \d iterations old, rollouts.apart.steps={k}"):
            sampler.answers(params, 9, pushed)


class Prompted:
    """Prompts of an iteration, made by the thread that learns, whose clock times it."""

    def __getitem__(self, i: int) -> Any:
        assert threading.current_thread() is threading.main_thread()
        number = np.arange(8, dtype=np.int32)
        return apart.Prompts(np.full((8, 4), i, np.int32), number, 100 * i + number, number)


# --------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_learns_from_answers_of_older_weights(start, tmp_path, devices):
    """Each row says how old; the weights that drew them are not those that learn from them."""
    devices(2)
    grpo.run(dataclasses.replace(settings(start, tmp_path / "apart", devices=1, steps=2), iterations=3, evaluate_every=3))
    found = rows(tmp_path / "apart")[:3]
    assert [row["rollout/staleness"] for row in found] == [0, 1, 2]
    gaps = [row["rollout/sampler_gap_max"] for row in found]
    assert gaps[0] < 1e-4 < 1e-3 < min(gaps[1:])
    assert all(row["importance/outside"] >= 0 for row in found)
    compiled = json.loads((tmp_path / "apart" / "programs.json").read_text())["programs"]
    assert "rollout" in {program["during"] for program in compiled if program["name"] == "advance"}


@pytest.mark.full
def test_with_no_steps_between_it_is_the_run_that_draws_and_learns_in_turns(start, tmp_path, devices):
    """Bit for bit."""
    devices(1)
    grpo.run(dataclasses.replace(settings(start, tmp_path / "turns"), iterations=2))
    devices(2)
    grpo.run(dataclasses.replace(settings(start, tmp_path / "apart", devices=1, steps=0), iterations=2))
    found, expected = ends(tmp_path / "apart"), ends(tmp_path / "turns")
    assert found["params.safetensors"] == expected["params.safetensors"]
    for ours, theirs in zip(rows(tmp_path / "apart"), rows(tmp_path / "turns"), strict=True):
        assert ours.pop("rollout/staleness", 0.0) == 0.0
        same = {name for name in theirs if not name.startswith(timing.FIGURES)}
        assert {name: ours.get(name) for name in same} == {name: theirs[name] for name in same}


@pytest.mark.full
def test_a_run_that_is_stopped_goes_on_to_the_same_end(start, tmp_path, devices, monkeypatch):
    """After each of its iterations; and it is another run than the one in turns, which importance weights show."""
    devices(4)
    config = settings(start, tmp_path / "whole", devices=2, steps=2)
    grpo.run(config)
    ages = [row["rollout/staleness"] for row in rows(tmp_path / "whole")]
    assert ages == [0, 1, 2, 1]
    apart_from_one = [row["importance/max"] for row in rows(tmp_path / "whole")]
    assert apart_from_one[0] == pytest.approx(1, abs=1e-4)
    assert min(apart_from_one[1:]) > 1.001
    save = Run.maybe_save

    def stopped(run, step, state, last=False):
        save(run, step, state, last=True)
        if not last:
            raise SystemExit(130)

    broken = dataclasses.replace(config, out=tmp_path / "broken")
    monkeypatch.setattr(Run, "maybe_save", stopped)
    for _ in range(4):
        with pytest.raises(SystemExit):
            grpo.run(broken)
    monkeypatch.setattr(Run, "maybe_save", save)
    grpo.run(broken)
    assert ends(tmp_path / "broken") == ends(tmp_path / "whole")


@pytest.mark.full
def test_adapters_are_pushed_alone(start, tmp_path, devices):
    devices(4)
    config = settings(start, tmp_path / "lora", devices=2, steps=1, mesh=MeshConfig(tensor=2))
    grpo.run(dataclasses.replace(config, mesh=MeshConfig(fsdp=2), lora=dataclasses.replace(config.lora, rank=2)))
    assert [row["rollout/staleness"] for row in rows(tmp_path / "lora")] == [0, 1, 1, 1]
    assert rows(tmp_path / "lora")[0]["rollout/sampler_gap_max"] < 1e-4


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("own", "more", "said"),
    [
        ({"devices": 8}, {}, r"apart.devices=8 of 8 device\(s\) leaves none to learn: choose at most 7"),
        ({"devices": 1}, {"algorithm": dataclasses.replace(WEIGHED, importance=None)}, "need importance weights"),
        ({"devices": 1}, {"watch": timing.Options(strict=True)}, "watch.strict"),
        ({"devices": 1}, {"stragglers": 4}, "rollouts.stragglers"),
        ({"devices": 1}, {"reuse_sampler_logprobs": True}, "reuse_sampler_logprobs"),
        ({"devices": 3, "mesh": MeshConfig(fsdp=2)}, {}, r"fsdp=2 x tensor=1 does not fit 3"),
        ({"devices": 2}, {"mesh": MeshConfig(fsdp=4)}, "does not fit 6"),
        ({"devices": 7}, {}, "--batch 8 cannot be shared by data x fsdp = 7"),
    ],
    ids=["none left", "no weights", "strict", "stragglers", "reuse", "mesh", "learning mesh", "rows"],
)
def test_settings_that_cannot_go_together_are_refused(start, tmp_path, own, more, said):
    config = settings(start, tmp_path / "out", **own)
    options = {name: more.pop(name) for name in ("stragglers", "reuse_sampler_logprobs") if name in more}
    config = dataclasses.replace(config, rollouts=dataclasses.replace(config.rollouts, **options), **more)
    with pytest.raises(ValueError, match=said):
        grpo.run(config)
    assert not (tmp_path / "out").exists()


def test_an_algorithm_without_importance_weights_draws_in_turns(start, tmp_path):
    """And numbers below 0 are none."""
    config = dataclasses.replace(raft.ARITHMETIC, policy=start, out=tmp_path / "out")
    config = dataclasses.replace(config, rollouts=rollout.Options(apart=rollout.Apart(devices=1)))
    with pytest.raises(ValueError, match="need importance weights"):
        raft.run(config)
    with pytest.raises(ValueError, match="neither can be below 0"):
        rollout.Apart(devices=1, steps=-1)
