"""Rows and batches: nothing is lost between texts and rows, and every batch is a function of its step."""

from __future__ import annotations

import itertools
import pathlib
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from jaxrlhf.core.types import Prompts
from jaxrlhf.data import human_sentiment, pipeline, tokenizer
from jaxrlhf.data.tokenizer import BOS, EOS, PAD

ROWS = strategies.lists(strategies.lists(strategies.integers(3, 50), max_size=12), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def texts():
    return [pipeline.clean(rating.text) for rating in human_sentiment.reviews("test")]


@pytest.fixture(scope="module")
def trained(texts):
    return tokenizer.train(texts, 1000)


@pytest.fixture(scope="module")
def encoded(trained, texts):
    return trained.encode_batch(texts)


# --- texts ---


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  The “Rock”—it’s\tBig…\n", 'the "rock"-it\'s big...'),
        ("a ``b'' c", "a ''b'' c"),
        ("CAFÉ\u00a0\u2028ÎLE", "café île"),
        ("", ""),
    ],
)
def test_clean(text, cleaned):
    assert pipeline.clean(text) == cleaned
    assert pipeline.clean(cleaned) == cleaned


def test_the_page_about_data_runs():
    page = (pathlib.Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 5
    exec(compile("\n".join(blocks), "docs/data.md", "exec"), {})


# --- rows ---


def test_pad_rows():
    tokens, length = pipeline.pad_rows([[5, 6], [], [7, 8, 9]], 4)
    assert tokens.tolist() == [[5, 6, 0, 0], [0, 0, 0, 0], [7, 8, 9, 0]]
    assert length.tolist() == [2, 0, 3]
    assert (tokens.dtype, length.dtype) == (np.int32, np.int32)
    assert pipeline.pad_rows([], 4)[0].shape == (0, 4)
    with pytest.raises(ValueError, match="row 1 has 5 tokens, more than the width 4"):
        pipeline.pad_rows([[1], [1] * 5], 4)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(rows=ROWS, width=strategies.integers(1, 20))
def test_packing_keeps_the_stream_and_numbers_its_texts(rows, width):
    tokens, segments = pipeline.pack(rows, width)
    stream = [(token, number) for number, row in enumerate(rows) for token in [BOS, *row, EOS]]
    total = len(stream)
    assert tokens.shape == segments.shape == (-(-total // width), width)
    assert tokens.reshape(-1)[:total].tolist() == [token for token, _ in stream]
    assert not tokens.reshape(-1)[total:].any()
    assert not segments.reshape(-1)[total:].any()
    for row in range(len(tokens)):
        numbers = [number for _, number in stream[row * width : (row + 1) * width]]
        expected = [number - numbers[0] + 1 for number in numbers]
        assert segments[row, : len(numbers)].tolist() == expected


def test_packing_with_other_special_ids():
    tokens, segments = pipeline.pack([[5], [6]], 8, bos=90, eos=91, pad=92)
    assert tokens.tolist() == [[90, 5, 91, 90, 6, 91, 92, 92]]
    assert segments.tolist() == [[1, 1, 1, 2, 2, 2, 0, 0]]


def test_packing_nothing_is_refused():
    with pytest.raises(ValueError, match="there are no texts to pack"):
        pipeline.pack([], 8)


def test_continuation_rows():
    rows = [[9] * 7, list(range(10, 18)), [9] * 34, list(range(10, 43))]
    data = pipeline.continuation_rows(rows)
    assert data["row"].tolist() == [1, 3]
    assert data["tokens"].shape == (2, 36)
    assert data["tokens"][0].tolist() == [BOS, *range(10, 18), EOS] + [PAD] * 26
    assert data["prompt_len"].tolist() == [5, 5]  # BOS and the first 4 tokens
    assert data["response_len"].tolist() == [5, 30]  # the rest and EOS


def test_continuation_rows_that_do_not_fit():
    with pytest.raises(ValueError, match=r"need longest \+ 2 <= width"):
        pipeline.continuation_rows([[9] * 8], width=34)
    with pytest.raises(ValueError, match="0 < context < shortest"):
        pipeline.continuation_rows([[9] * 8], context=8)
    with pytest.raises(ValueError, match="none of 1 texts has 8 to 33 tokens"):
        pipeline.continuation_rows([[9]])


def test_reply_rows():
    pairs = [([5, 6], [7]), ([5] * 7, [7]), ([5], [7] * 4), ([], [])]
    data = pipeline.reply_rows(pairs, prompt_width=8, response_width=4)
    assert data["row"].tolist() == [0, 3]
    assert data["tokens"].tolist() == [[BOS, 5, 6, EOS, 7, EOS] + [PAD] * 6, [BOS, EOS, EOS] + [PAD] * 9]
    assert data["prompt_len"].tolist() == [4, 2]
    assert data["response_len"].tolist() == [2, 1]
    with pytest.raises(ValueError, match="none of 1 pairs fits into 8 \\+ 4 tokens"):
        pipeline.reply_rows([([5] * 7, [7])], prompt_width=8, response_width=4)


def test_evaluation_rows_count_the_characters_of_what_they_keep(trained, texts, encoded):
    whole = pipeline.evaluation_rows(encoded[:50], trained, width=200)
    assert whole["characters"].tolist() == [len(text) for text in texts[:50]]
    cut = pipeline.evaluation_rows(encoded[:50], trained, width=16)
    for tokens, length, characters, text, ids in zip(*cut.values(), texts, encoded, strict=False):
        assert tokens[:length].tolist() == [BOS, *ids, EOS][:16]
        kept = trained.decode(ids[:15])
        assert characters == len(kept)
        assert text.startswith(kept)


def test_encode_rows_encodes_just_enough(trained, texts):
    encoded, count = pipeline.encode_rows(texts, trained, rows=20, width=32, seed=3)
    assert len(encoded) == count < len(texts)
    assert pipeline.pack(encoded, 32)[0].shape[0] in (20, 21)
    assert len(pipeline.pack(encoded[:-1], 32)[0]) <= 20
    assert encoded == pipeline.encode_rows(texts, trained, rows=20, width=32, seed=3)[0]
    assert encoded != pipeline.encode_rows(texts, trained, rows=20, width=32, seed=4)[0]
    everything, count = pipeline.encode_rows(texts, trained, rows=10**6, width=32, seed=3)
    assert count == len(texts)
    assert sorted(everything) == sorted(trained.encode_batch(texts))


# --- prompts ---


def test_prompts_end_before_a_word(trained, texts, encoded):
    prompts = pipeline.cut_prompts(encoded, trained, seed=0)
    assert prompts.tokens.shape == (len(prompts.row), 8)
    assert len(prompts.row) > 0.9 * len(texts)
    assert set(prompts.length.tolist()) == {3, 4, 5, 6, 7, 8}
    for tokens, length, row in zip(prompts.tokens, prompts.length, prompts.row, strict=True):
        start = trained.decode(tokens[:length])
        assert tokens[:length].tolist() == [BOS, *encoded[row][: length - 1]]
        assert not tokens[length:].any()
        assert texts[row].startswith(start + " ")


def test_prompts_depend_on_the_seed_and_not_on_other_texts(trained, encoded):
    first, again = (pipeline.cut_prompts(encoded, trained, seed=0) for _ in range(2))
    assert (first.tokens == again.tokens).all()
    other = pipeline.cut_prompts(encoded, trained, seed=1)
    assert (first.length != other.length).any()
    changed = pipeline.cut_prompts([*encoded[:100], [7], *encoded[101:]], trained, seed=0)
    kept = [np.flatnonzero(p.row == 150)[0] for p in (first, changed)]
    assert (first.tokens[kept[0]] == changed.tokens[kept[1]]).all()


def test_prompts_that_cannot_be_cut(trained):
    with pytest.raises(ValueError, match="none of 2 texts can be cut after 2 to 7 tokens"):
        pipeline.cut_prompts([trained.encode("a"), []], trained, seed=0)
    with pytest.raises(ValueError, match="need 1 <= shortest <= longest < width"):
        pipeline.cut_prompts([[7] * 9], trained, seed=0, longest=8)


def test_written_prompts(trained):
    prompts = pipeline.text_prompts(["a fine film", "the"], trained, 8)
    assert [trained.decode(t[:n]) for t, n in zip(prompts.tokens, prompts.length, strict=True)] == ["a fine film", "the"]
    with pytest.raises(ValueError, match=r"prompt 1 \(''\) is empty"):
        pipeline.text_prompts(["a", ""], trained, 8)
    long = "word " * 20
    tokens = len(trained.encode(long))
    with pytest.raises(ValueError, match=rf"prompt 0 \('word .*'\) has {tokens} tokens, the limit is 7: shorten it"):
        pipeline.text_prompts([long], trained, 8)


def test_turn_prompts():
    prompts = pipeline.turn_prompts([[5], [5] * 7, [6, 7]], width=8)
    assert prompts.tokens[:, :5].tolist() == [[BOS, 5, EOS, 0, 0], [BOS, 6, 7, EOS, 0]]
    assert prompts.length.tolist() == [3, 4]
    assert prompts.row.tolist() == prompts.uid.tolist() == [0, 2]
    with pytest.raises(ValueError, match="none of 1 turns fits into 4 tokens"):
        pipeline.turn_prompts([[5] * 3], width=4)


# --- order ---


def test_each_epoch_is_another_permutation():
    order = pipeline.order(50, seed=4)
    epochs = [[int(order[i]) for i in range(e * 50, (e + 1) * 50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != [int(pipeline.order(50, seed=5)[i]) for i in range(50)]


def same(a, b):
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


def data(rows, start=0):
    x = np.arange(start, start + rows)
    return {"x": x, "y": np.stack([x, -x], axis=1)}


def make(kind):
    if kind == "batches":
        return pipeline.batches(data(37), 8, seed=1)
    if kind == "mixed":
        return pipeline.mixed(data(37), data(11, 1000), 8, seed=1, steps=30)
    tokens = np.arange(37 * 3, dtype=np.int32).reshape(37, 3)
    row = np.arange(37, dtype=np.int32)
    prompts = Prompts(tokens=tokens, length=row % 3, uid=row, row=row)
    return pipeline.prompt_batches(prompts, 8, seed=1).map(lambda p: {name: getattr(p, name) for name in PROMPT_FIELDS})


PROMPT_FIELDS = ("tokens", "length", "uid", "row")


@pytest.mark.parametrize("kind", ["batches", "mixed", "prompts"])
def test_a_resumed_run_reads_the_batches_of_the_unbroken_one(kind):
    unbroken = list(itertools.islice(iter(make(kind)), 30))
    for start in (29, 3):  # another object each
        again = make(kind)
        for step in range(start, 30):
            same(again[step], unbroken[step])


def test_grain_iterators_resume_too():
    iterator = iter(make("batches").to_iter_dataset())
    for _ in range(5):
        next(iterator)
    state, expected = iterator.get_state(), None
    expected = next(iterator)
    other = iter(make("batches").to_iter_dataset())
    other.set_state(state)
    same(next(other), expected)


def test_batches_keep_rows_together_and_leave_none_out():
    batches = [make("batches")[step] for step in range(37)]  # 8 epochs
    for batch in batches:
        assert batch["x"].shape == (8,)
        assert (batch["y"] == np.stack([batch["x"], -batch["x"]], axis=1)).all()
    everything = np.concatenate([batch["x"] for batch in batches])
    assert (np.bincount(everything) == 8).all()


def test_bad_batches():
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        pipeline.batches(data(3), 0, 1)
    with pytest.raises(ValueError, match="the data set is empty"):
        pipeline.batches(data(0), 2, 1)
    with pytest.raises(ValueError, match=r"equally many rows, not \{'x': 3, 'y': 4\}"):
        pipeline.batches({"x": np.zeros(3), "y": np.zeros(4)}, 2, 1)


def test_no_two_prompts_of_a_batch_share_a_stream():
    tokens, row = np.zeros((5, 2), np.int32), np.arange(5, dtype=np.int32)
    batches = pipeline.prompt_batches(Prompts(tokens=tokens, length=row, uid=row, row=row), 8, seed=1)  # rows repeat
    uids = np.concatenate([batches[step].uid for step in range(4)])
    assert uids.tolist() == list(range(32))
    assert (batches[0].length == batches[0].row).all()


def test_take_prompts():
    row = np.arange(5, dtype=np.int32)
    prompts = Prompts(tokens=row[:, None], length=row, uid=row, row=row)
    assert pipeline.take_prompts(prompts, slice(1, 3)).row.tolist() == [1, 2]
    assert pipeline.take_prompts(prompts, np.array([4, 0])).tokens.tolist() == [[4], [0]]
    limited = prompts.replace(limit=10 * row)
    assert pipeline.take_prompts(limited, slice(1, 3)).limit.tolist() == [10, 20]
    assert pipeline.prompt_batches(limited, 5, seed=1)[0].limit.sum() == 100


@pytest.mark.parametrize("share", [(0.35, 0.95), (0.0, 1.0), (1.0, 0.0), (0.5, 0.5), (0.3, 0.3), (1.0, 1.0)])
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_the_share_of_the_second_source_rises_linearly(share, steps):
    dataset = pipeline.mixed(data(100), data(30, 1000), 8, seed=1, steps=steps, share=share)
    assert len(dataset) == steps
    batches = [dataset[step]["x"] for step in range(steps)]
    counts = np.array([(batch >= 1000).sum() for batch in batches])
    wanted = 8 * np.linspace(*share, steps)
    assert all(len(batch) == 8 for batch in batches)
    assert np.abs(np.cumsum(counts) - np.cumsum(wanted)).max() < 1 + 1e-6
    everything = np.concatenate(batches)
    first, second = everything[everything < 1000], everything[everything >= 1000]
    assert pipeline.mixed_rows_read(8, steps, share) == (len(first), len(second))
    # each source is read without leaving a row out: no row comes k + 1 times before every row came k times
    for taken, rows in ((first, 100), (second - 1000, 30)):
        count = np.bincount(taken, minlength=rows) if len(taken) else np.zeros(rows)
        assert count.max() - count.min() <= 1


def test_bad_mixtures():
    with pytest.raises(ValueError, match=r"share=\(0.5, 1.5\) must be two numbers in \[0, 1\]"):
        pipeline.mixed(data(3), data(3), 2, 1, 5, share=(0.5, 1.5))
    with pytest.raises(ValueError, match=r"the same arrays, not \['x', 'y'\] and \['x'\]"):
        pipeline.mixed(data(3), {"x": np.zeros(3)}, 2, 1, 5)
    with pytest.raises(ValueError, match="steps=0 and batch_size=2 must be at least 1"):
        pipeline.mixed(data(3), data(3), 2, 1, 0)


@pytest.mark.parametrize("bad", [-1, 10])
def test_a_token_id_that_the_model_lacks_is_named_before_any_device_sees_it(bad):
    tokens = np.arange(24, dtype=np.int32).reshape(6, 4) % 10
    good = pipeline.batches({"tokens": tokens}, 2, seed=0)
    for step in range(6):
        np.testing.assert_array_equal(pipeline.within(good, 10)[step]["tokens"], good[step]["tokens"])
    tokens[4, 3] = bad
    checked, found = pipeline.within(pipeline.batches({"tokens": tokens}, 2, seed=0), 10), []
    for step in range(3):  # an epoch
        try:
            _ = checked[step]
        except ValueError as error:
            found.append(str(error))
    (told,) = found
    assert f"token id {bad} at [" in told
    assert "3] of its tokens, but the model has ids 0 to 9" in told
