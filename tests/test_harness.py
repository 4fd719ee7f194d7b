"""The lm-eval harness's model: log-likelihoods against NumPy, rolling windows, stop strings, whole tasks without torch."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import reference_model
import yaml

from experiments import evaluate_harness, stage
from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.evaluation import harness
from jaxrlhf.models import transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.sampling import rollout

TEXTS = ["the film was good, and the end of it was better.", "a bad film: long, loud and sad."]
SHAPE = TransformerConfig(
    vocab_size=320, width=24, layers=2, heads=2, kv_heads=2, head_width=12, mlp_width=32, max_length=40, remat="none"
)


@functools.cache
def tokenizer():
    return tokenizers.train(TEXTS, 310)  # fewer ids than the embedding has rows


@functools.cache
def parameters():
    params = jax.jit(transformer.build(SHAPE).init)(jax.random.key(0))
    return params | {"embed": 25 * params["embed"]}  # clear preferences, as of a trained model


def judged(devices: int = 1, **fields) -> harness.Judged:
    mesh = sharding.make_mesh(MeshConfig(fsdp=devices), jax.devices()[:devices])
    params = jax.device_put(parameters(), sharding.shardings(transformer.param_specs(SHAPE), mesh))
    return harness.Judged(transformer.build(SHAPE), params, tokenizer(), mesh, **{"rows": 8} | fields)


@functools.cache
def wide():
    return jax.tree.map(np.float64, parameters())


def alone(row: list[int]) -> np.ndarray:
    """Log-softmax [T, V] of one row, by itself and without padding: all in float64 NumPy."""
    logits = reference_model.logits(wide(), np.asarray(row), dataclasses.asdict(SHAPE))
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def expected(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    told = alone(context + continuation)[len(context) - 1 : -1]
    return told[np.arange(len(continuation)), continuation].sum(), bool((told.argmax(-1) == continuation).all())


def continued(context: list[int], count: int) -> list[int]:
    """The most probable continuation, one token at a time."""
    row = list(context)
    for _ in range(count):
        row.append(int(alone(row)[-1].argmax()))
    return row[len(context) :]


def pairs() -> list[tuple[list[int], list[int]]]:
    random = np.random.default_rng(0)
    found = [(random.integers(3, 300, n).tolist(), random.integers(3, 300, m).tolist()) for n, m in LENGTHS]
    return [(context, continued(context, len(b)) if i % 3 == 0 else b) for i, (context, b) in enumerate(found)]


LENGTHS = [(3, 2), (12, 1), (3, 2), (30, 10), (1, 1), (3, 2), (12, 1), (1, 39)]


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.full)])
def test_loglikelihoods_equal_numpy_in_the_order_asked(devices):
    subject = judged(devices)
    with jax.set_mesh(subject.mesh):
        found = harness.loglikelihoods(subject, pairs())
    wanted = [expected(*pair) for pair in pairs()]
    # 1e-4: float32 logits of size 20, over at most 39 tokens.
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in wanted], atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert {greedy for _, greedy in found} == {True, False}
    assert not subject.cut["loglikelihood"]


def test_one_token_that_is_not_the_most_probable_is_enough():
    context = [1, 50, 60]
    best = continued(context, 4)
    for place in range(4):
        other = best.copy()
        other[place] = (other[place] + 1) % 300
        assert [greedy for _, greedy in harness.loglikelihoods(judged(), [(context, best), (context, other)])] == [True, False]


def test_many_requests_share_a_few_programs():
    random = np.random.default_rng(1)
    many = [(random.integers(3, 300, n).tolist(), [5] * m) for n in range(1, 30) for m in (1, 3, 4)]
    before = rollout._batch_choices._cache_size()
    subject = judged(rows=16)
    harness.loglikelihoods(subject, many)
    assert rollout._batch_choices._cache_size() - before <= 6  # rows of 16, 32, 40 tokens; answers of 1 and 4


def test_a_context_too_long_loses_its_beginning_and_is_counted():
    subject, context = judged(), list(range(3, 63))
    found = harness.loglikelihoods(subject, [(context, [7, 8]), ([5], [6])])
    assert found[0][0] == pytest.approx(expected(context[-38:], [7, 8])[0], abs=1e-4)
    assert subject.cut["loglikelihood"] == 1
    answer = harness.answers(subject, [(context, {"max_gen_toks": 4})])
    assert answer == [tokenizer().decode(written(context[-36:], 4), continuation=True)]
    assert subject.cut["generate_until"] == 1


@pytest.mark.parametrize("pair", [([], [5]), ([5], []), ([5], [6] * 40)])
def test_a_request_that_cannot_be_scored_is_refused(pair):
    with pytest.raises(ValueError, match="request 1 has a context of"):
        harness.loglikelihoods(judged(), [([1], [2]), pair])


@pytest.mark.parametrize("length", [5, 39, 40, 41, 100])
def test_rolling_predicts_each_token_once_in_windows_as_wide_as_the_model(length):
    text = np.random.default_rng(length).integers(3, 300, length).tolist()
    row, widest, total, done = [tokenizer().bos, *text], 39, 0.0, 0
    while done < length:  # the last window begins as early as its width lets it
        end = min(done + widest, length)
        begin = max(0, end - widest)
        total += expected(row[begin : done + 1], row[done + 1 : end + 1])[0]
        done = end
    assert harness.rolling(judged(), [[9], text, []])[1:] == pytest.approx([total, 0], abs=2e-4)


# ------------------------------------------------------------------------------------------------ answers


def written(context: list[int], count: int) -> list[int]:
    """The most probable answer: pad and BOS are never written, EOS ends it."""
    row = list(context)
    for _ in range(count):
        told = alone(row)[-1]
        told[[tokenizers.PAD, tokenizers.BOS]] = -np.inf
        row.append(int(told.argmax()))
        if row[-1] == tokenizers.EOS:
            break
    return row[len(context) :]


def test_answers_are_greedy_and_end_before_the_first_stop_string():
    contexts = [[1, *range(10, 10 + n)] for n in (2, 9, 4, 3)]
    plain = [tokenizer().decode(written(context, 12), continuation=True) for context in contexts]
    assert len(set(plain)) > 1
    assert harness.answers(judged(rows=4), [(context, {"max_gen_toks": 12}) for context in contexts]) == plain
    requests, wanted = [], []
    for context, text in zip(contexts, plain, strict=True):
        stop = text[len(text) // 2 :][:2]  # may begin and end within tokens
        requests.append((context, {"until": [stop, "never said"], "max_gen_toks": 12, "do_sample": False}))
        wanted.append(text[: text.index(stop)])
    found = harness.answers(judged(rows=4), requests)
    assert found == wanted
    assert all(len(a) < len(b) for a, b in zip(found, plain, strict=True))


@pytest.mark.full
def test_drawn_answers_depend_on_the_seed_alone():
    settings = {"do_sample": True, "temperature": 2.0, "top_p": 0.9, "max_gen_toks": 4}
    requests = [([1, 9, i], settings) for i in range(5)]
    found = harness.answers(judged(), requests)
    assert found == harness.answers(judged(rows=4), requests)
    assert found != harness.answers(judged(seed=1), requests)


def test_settings_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match=r"\{'num_beams': 4\} are not known"):
        harness.answers(judged(), [([1], {"num_beams": 4})])
    with pytest.raises(ValueError, match="max_gen_toks=40"):
        harness.answers(judged(), [([1], {"max_gen_toks": 40})])


# ------------------------------------------------------------------------------------------------ within lm-eval


def test_rows_begin_with_bos_once():
    model = harness.language_model(judged(), "name")
    requests = [SimpleNamespace(args=args) for args in (("", "good"), ("the film", " was good"), ("the film ", "was good"))]
    ids, bos = tokenizer().encode, tokenizer().bos
    wanted = [expected([bos], ids("good"))[0], *[expected([bos, *ids("the film")], ids("the film was good")[2:])[0]] * 2]
    assert len(ids("the film")) == 2
    assert [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)] == pytest.approx(wanted, abs=1e-4)
    one = model.loglikelihood_rolling([SimpleNamespace(args=("the film",))])
    assert one == pytest.approx([expected([bos], ids("the film"))[0]], abs=1e-4)


def test_conversations_are_written_by_the_template():
    files = tokenizer().files | {
        "chat_template.jinja": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
        "{% if not loop.last %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<eos>assistant:{% endif %}"
    }
    subject = judged(chat=True)
    subject = dataclasses.replace(subject, tokenizer=dataclasses.replace(tokenizer(), files=files))
    model = harness.language_model(subject, "name")
    asked = [{"role": "user", "content": "good?"}]
    text = model.apply_chat_template(asked)
    assert text == "user: good?<eos>assistant:"
    begun = [*asked, {"role": "assistant", "content": "it was"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == "user: good?<eos>assistant: it was"
    assert model.chat_template(True) == files["chat_template.jinja"]
    ids = model.tok_encode(text)
    assert ids.count(tokenizers.EOS) == 1
    assert ids[0] != tokenizers.BOS
    assert tokenizers.EOS not in tokenizer().encode(text)
    answer = model.generate_until([SimpleNamespace(args=(text, {"max_gen_toks": 5}))])
    assert answer == [tokenizer().decode(written(ids, 5), continuation=True)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks over one JSONL file, and a policy."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"q": f"the film was {word}", "choices": [" good", " bad, and long"], "answer": i % 2} for i, word in enumerate("abc")
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
    }
    kinds = {
        "chosen": {
            "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}],
        },
        "written": {
            "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{q}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}],
        },
        "rolled": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{q}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    }  # fmt: skip
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | data | kind))
    stage.save(folder / "model", "policy", jax.device_get(parameters()), SHAPE, tokenizer())
    return folder, rows


def test_whole_tasks_run_without_torch(tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, rows = tasks
    names = ("chosen", "written", "rolled")
    config = evaluate_harness.Config(
        names, folder / "model", folder, tmp_path / "out", rows=2, mesh=MeshConfig(data=1, fsdp=2, tensor=4)
    )
    found = evaluate_harness.run(config)
    assert "torch" not in sys.modules
    ids, right, nats, size = tokenizer().encode, 0, 0.0, 0
    for row in rows:
        context = [tokenizer().bos, *ids(row["q"])]
        values = [expected(context, ids(row["q"] + choice)[len(context) - 1 :])[0] for choice in row["choices"]]
        right += np.argmax(values) == row["answer"]
        nats += expected([tokenizer().bos], ids(row["q"]))[0]
        size += len(row["q"].encode())
    assert found["results"]["chosen"]["acc,none"] == pytest.approx(right / len(rows))
    assert found["results"]["rolled"]["bits_per_byte,none"] == pytest.approx(-nats / size / np.log(2), rel=1e-5)
    assert found["results"]["written"]["exact_match,none"] == 0
    assert found["n-samples"]["chosen"] == {"original": 3, "effective": 3}
    assert json.loads((tmp_path / "out" / "result.json").read_text())["results"] == found["results"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"tasks": ()}, "name one or more"),
        ({"tasks": ("no_such_task",)}, r"\['no_such_task'\] are not known; .* has chosen"),
        ({"tasks": ("chosen",), "folder": "no_such_folder"}, "no_such_folder: no such folder"),
    ],
    ids=("none", "unknown", "folder"),
)
def test_tasks_that_are_not_there(tasks, tmp_path, fields, told):
    folder, _ = tasks
    given = {"policy": folder / "model", "folder": folder, "out": tmp_path / "out", "mesh": MeshConfig(tensor=8)} | fields
    if isinstance(given["folder"], str):
        given["folder"] = tmp_path / given["folder"]
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        evaluate_harness.run(evaluate_harness.Config(**given))
