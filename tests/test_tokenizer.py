"""The tokenizer: round trips, no forged special tokens, the same ids in transformers, and plain errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from jaxrlhf.data import human_sentiment, tokenizer
from jaxrlhf.data.tokenizer import BOS, EOS, PAD


@pytest.fixture(scope="module")
def texts():
    return [rating.text.lower() for rating in human_sentiment.load("test")]


@pytest.fixture(scope="module")
def trained(texts):
    return tokenizer.train(texts, 700)


def test_size_and_special_ids(trained):
    assert trained.vocab_size == 700
    assert (trained.pad, trained.bos, trained.eos) == (PAD, BOS, EOS) == (0, 1, 2)
    assert [trained.whole.id_to_token(i) for i in range(3)] == ["<pad>", "<bos>", "<eos>"]
    assert {i for ids in trained.encode_batch(["a b", "c"]) for i in ids}.isdisjoint({0, 1, 2})


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(text=strategies.text(strategies.characters(blacklist_categories=["Cs"]), max_size=40))
def test_any_text_comes_back(trained, text):
    assert trained.decode(trained.encode(text, continuation=True), continuation=True) == text
    if not text.startswith(" "):
        assert trained.decode(trained.encode(text)) == text
        assert trained.encode(text) == (trained.encode(" " + text, continuation=True) if text else [])


def test_a_prompt_and_its_continuation_are_the_whole_text(trained, texts):
    for text in texts[:300]:
        words = text.split()
        start, rest = " ".join(words[:3]), "".join(f" {word}" for word in words[3:])
        assert trained.encode(start) + trained.encode(rest, continuation=True) == trained.encode(start + rest)


def test_a_batch_is_its_texts_one_by_one(trained, texts):
    for continuation in (False, True):
        batch = trained.encode_batch(texts[:50], continuation)
        assert batch == [trained.encode(text, continuation) for text in texts[:50]]
        assert trained.decode_batch(batch, continuation) == [trained.decode(ids, continuation) for ids in batch]


@pytest.mark.parametrize("text", ["<eos>", "a<pad>b", "<bos> hi <eos>", "<|endoftext|>"])
def test_a_text_cannot_forge_a_special_token(trained, text):
    ids = trained.encode(text)
    assert min(ids) > EOS
    assert trained.decode(ids) == text


def test_special_ids_and_numpy_rows_decode_to_text_only(trained):
    ids = [BOS, *trained.encode("great film"), EOS, PAD, PAD]
    assert trained.decode(np.asarray(ids, np.int32)) == "great film"


def test_a_character_cut_in_half_is_marked(trained):
    ids = trained.encode("界")
    assert len(ids) > 1
    assert "\ufffd" in trained.decode(ids[:-1])


def test_starts_word_marks_the_tokens_with_a_space(trained):
    ids = trained.encode("a subtle, dry film")
    assert trained.starts_word.shape == (trained.vocab_size,)
    for i in ids:
        assert trained.starts_word[i] == trained.decode([i], continuation=True).startswith(" ")
    assert not trained.starts_word[[PAD, BOS, EOS]].any()


def test_the_same_texts_give_the_same_tokenizer_in_any_order_of_threads(trained, texts, tmp_path):
    code = (
        "import sys; from jaxrlhf.data import human_sentiment, tokenizer\n"
        "texts = [r.text.lower() for r in human_sentiment.load('test')]\n"
        "tokenizer.train(texts, 700).save(sys.argv[1])"
    )
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "4"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True, env=environment)
    trained.save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_save_and_load(trained, texts, tmp_path):
    trained.save(tmp_path)
    again = tokenizer.load(tmp_path)
    assert again.encode_batch(texts[:100]) == trained.encode_batch(texts[:100])
    assert again.encode("<eos>") == trained.encode("<eos>")
    assert again.encode("x", continuation=True) == trained.encode("x", continuation=True)
    assert (again.starts_word == trained.starts_word).all()


def test_transformers_reads_the_same_tokenizer(trained, texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    trained.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (PAD, BOS, EOS)
    assert len(theirs) == trained.vocab_size
    assert theirs.padding_side == "right"
    for text in [*texts[:100], "<eos> café  two   spaces", "界"]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == trained.encode(text)
        assert theirs.decode(ids, skip_special_tokens=True).removeprefix(" ") == trained.decode(ids)


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size=258 must be at least 259"):
        tokenizer.train(["a"], 258)


def test_a_small_text_gives_a_smaller_vocabulary():
    assert 259 <= tokenizer.train(["ab ab"], 1000).vocab_size < 270


def test_loading_what_is_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text('{"half": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer: "):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer: "):
        tokenizer.load(tmp_path)


def test_a_tokenizer_without_its_special_tokens_is_refused(trained, tmp_path):
    trained.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())).replace("<eos>", "</s>"))
    with pytest.raises(ValueError, match="eos_token='<eos>' is not in the vocabulary"):
        tokenizer.load(tmp_path)
