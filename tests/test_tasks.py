"""What scripts train on: who gets which score, what is held out, and how accuracy is counted."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import arithmetic as start
from experiments import ppo, stage, tasks
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.core.types import Rollout
from jaxrlhf.data import arithmetic, pipeline
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.data.tokenizer import EOS
from jaxrlhf.models import transformer

TINY = start.PRESETS["smoke"].model


def unordered(row: dict) -> frozenset[int]:
    return frozenset((row["left"], row["right"]))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained model, as the start's stage leaves one."""
    out = tmp_path_factory.mktemp("start")
    tokenizer = tokenizers.train(["1+1="], TINY.vocab_size)
    params = transformer.build(TINY).init(jax.random.key(0))
    stage.save(out, "policy", jax.device_get(params), TINY, tokenizer)
    return out


@pytest.fixture(scope="module")
def task(mesh, folder):
    config = dataclasses.replace(ppo.ARITHMETIC, policy=folder, batch=4, held_out_prompts=48)
    with jax.set_mesh(mesh), tasks.make(config, mesh) as made:
        return made


def answered(prompts, answers: list[list[str]], tokenizer) -> Rollout:
    """A rollout in which prompt i is continued by each of answers[i]."""
    rows, lengths = [], []
    for tokens, length, several in zip(prompts.tokens, prompts.length, answers, strict=True):
        for answer in several:
            response = [*tokenizer.encode(answer, continuation=True), EOS]
            rows.append([*tokens[:length].tolist(), *response])
            lengths.append((length, len(response)))
    tokens, _ = pipeline.pad_rows(rows, 16)
    prompt_len, response_len = np.array(lengths, np.int32).T
    zeros = np.zeros(len(rows), np.int32)
    nothing = np.zeros((len(rows), 6), np.float32)
    return Rollout(tokens, prompt_len, response_len, zeros == 0, zeros, zeros, zeros, nothing, nothing)


def test_a_digit_is_a_token(task):
    assert task.start.tokenizer.vocab_size == 259
    assert len(task.start.tokenizer.encode("95", continuation=True)) == 2
    assert set(task.prompts[0].length) == {tasks.PROMPT_WIDTH}


def test_every_sample_of_a_prompt_is_scored_by_that_prompts_answer(task, mesh):
    prompts = task.prompts[3]
    problems = arithmetic.problems("train")
    right = [problems[i]["answer"] for i in prompts.row]
    assert len(set(right)) > 1, "else a shift would not show"
    texts = [task.start.tokenizer.decode(row[:n]) for row, n in zip(prompts.tokens, prompts.length, strict=True)]
    assert texts == [problems[i]["prompt"] for i in prompts.row]
    answers = [[value, str(int(value) + 1), value + "x"] for value in right]
    with jax.set_mesh(mesh):
        score, weight, figures = task.score(answered(prompts, answers, task.start.tokenizer), prompts)
    np.testing.assert_allclose(score, [1.1, 0.1, 0.0] * 4, rtol=1e-6)
    np.testing.assert_array_equal(weight, 1)
    assert figures["reward/correct"] == pytest.approx(1 / 3)
    assert figures["reward/digits"] == pytest.approx(2 / 3)
    assert figures["reward/faults"] == 0


def test_prompts_are_drawn_by_the_seed_and_none_is_held_out(mesh, folder):
    rows, held_out = arithmetic.problems("train"), {unordered(row) for row in arithmetic.problems("held_out")}
    orders = []
    for seed in (1, 1, 2):
        config = dataclasses.replace(ppo.ARITHMETIC, policy=folder, batch=64, seed=seed, held_out_prompts=8)
        with jax.set_mesh(mesh), tasks.make(config, mesh) as task:
            tokens = np.concatenate([task.prompts[i].tokens for i in range(4)])
            index = np.concatenate([task.prompts[i].row for i in range(4)])
        prompts = task.start.tokenizer.decode_batch(tokens)
        assert prompts == [rows[i]["prompt"] for i in index]
        assert not {unordered(rows[i]) for i in index} & held_out
        orders.append(prompts)
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("solved", [0, 13, 48])
def test_accuracy_is_the_share_of_right_greedy_answers(task, mesh, monkeypatch, solved):
    rows = arithmetic.problems("held_out")[:48]
    seen = []

    def written(model, params, prompts, spec, key, options):
        seen.append(spec)
        given = [[row["answer"] if i < solved else str(arithmetic.HIGH)] for i, row in enumerate(rows)]
        return answered(jax.device_get(prompts), given, task.start.tokenizer)

    monkeypatch.setattr(tasks.generate, "generate", written)
    by_chance = sum(row["answer"] == str(arithmetic.HIGH) for row in rows[solved:])
    with jax.set_mesh(mesh):
        accuracy, answers = tasks.greedy(task.start, task.start.params, tasks.ARITHMETIC, 48, mesh)
    assert accuracy == (solved + by_chance) / 48
    assert len(answers) == 48
    assert seen[0].greedy


def test_the_start_against_itself(task, mesh):
    with jax.set_mesh(mesh):
        figures, samples = task.judge(task.start.params)
        worse, _ = task.judge(jax.tree.map(lambda x: x + 0.05, task.start.params))
    assert figures["held_out/kl"] == 0
    assert worse["held_out/kl"] > 0
    assert figures["held_out/accuracy"] == 0, "nothing was learned yet"
    assert [sample["before"] for sample in samples] == [sample["after"] for sample in samples]
    assert [sample["prompt"] for sample in samples] == [row["prompt"] for row in arithmetic.problems("held_out")[:12]]


@pytest.mark.parametrize("count", [0, 513])
def test_more_held_out_problems_than_there_are(count):
    with pytest.raises(ValueError, match=f"{count} held-out problems asked for, but there are 512"):
        tasks.held_out_sums(count)


def test_rows_of_the_start_are_problem_and_answer_and_the_end(task):
    tokenizer = task.start.tokenizer
    pairs = [("37+58=", "95"), ("99+99=", "198"), ("55+55=", "0")]
    rows = start.rows(pairs, tokenizer)
    for i, (prompt, answer) in enumerate(pairs):
        begin, end = rows["prompt_len"][i], rows["prompt_len"][i] + rows["response_len"][i]
        assert tokenizer.decode(rows["tokens"][i, :begin]) == prompt
        assert tokenizer.decode(rows["tokens"][i, begin:end], continuation=True) == answer
        assert rows["tokens"][i, end - 1] == EOS
        prompts = pipeline.text_prompts([prompt], tokenizer, tasks.PROMPT_WIDTH)
        np.testing.assert_array_equal(prompts.tokens[0], rows["tokens"][i, :begin], "as the task asks later")


def test_a_run_that_cannot_fit_is_refused_before_it_trains(mesh, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage.plan, "limit", lambda devices: 1 << 16)
    config = dataclasses.replace(ppo.ARITHMETIC, policy=folder, out=tmp_path, batch=32, held_out_prompts=48)
    with pytest.raises(ValueError, match=r"this run takes .* a device, .* more than the 0.1 MiB that it has"):
        ppo.run(config)
    assert "% of 0.1 MiB" in capsys.readouterr().out
    kept = json.loads((tmp_path / "memory.json").read_text())
    assert kept["device_bytes"] == 1 << 16
    assert {row["role"] for row in kept["rows"]} == {"policy", "value", "reference", "reward", "sampling", "activations"}
    assert not (tmp_path / "metrics.jsonl").exists()
