"""Tokenizers out of a GGUF file's metadata, against the library's own with the same vocabulary and cutting."""

from __future__ import annotations

import json

import pytest
import tokenizers as library
from gguf_files import CUTTING, TEXTS, theirs, tokenizer_metadata

from jaxrlhf.data import conversations, gguf_tokenizer
from jaxrlhf.data import tokenizer as tokenizers


@pytest.mark.parametrize("pre", CUTTING)
def test_ids_are_those_of_the_library(pre):
    tokenizer, expected = gguf_tokenizer.from_metadata(tokenizer_metadata(pre), "tiny.gguf"), theirs(pre)
    expected.encode_special_tokens = True
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == expected.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
        assert {0, 1, 2}.isdisjoint(ids)  # a special token's name in a text is text
    assert expected.token_to_id("<think>") in tokenizer.encode("so <think> it")  # read whole, as llama.cpp does
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos) == (0, 1, 2)
    assert tokenizer.vocab_size == expected.get_vocab_size()


def test_how_digits_and_the_spaces_before_them_are_cut():
    """SmolLM's way; the plain way of GPT-2 would give the last space to the number."""
    spaces = tokenizer_metadata("smollm")
    ids = gguf_tokenizer.from_metadata(spaces, "tiny.gguf").encode("a  12")
    other = gguf_tokenizer.from_metadata(spaces | {"tokenizer.ggml.pre": "gpt-2"}, "tiny.gguf").encode("a  12")
    tokens = spaces["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in ids] == ["a", "ĠĠ", "1", "2"]
    assert [tokens[i] for i in other][:3] == ["a", "Ġ", "Ġ"]


def test_it_is_written_and_read_as_any_other(tmp_path):
    made = gguf_tokenizer.from_metadata(tokenizer_metadata("smollm"), "tiny.gguf")
    made.save(tmp_path)
    again = tokenizers.load(tmp_path)
    assert (again.pad, again.bos, again.eos) == (0, 1, 2)
    assert again.files == made.files
    assert [again.encode(text) for text in TEXTS] == [made.encode(text) for text in TEXTS]
    ids, _ = conversations.encode(made, [{"role": "user", "content": "the film <|im_end|>"}], ask=True)
    tail = [1, *made.encode("assistant\n")]
    assert ids[: 1 + len(made.encode("user\n"))].tolist() == [1, *made.encode("user\n")]
    assert ids[-len(tail) :].tolist() == tail
    assert ids.tolist().count(2) == 1  # the template's, not the text's


def test_bos_begins_a_text_where_the_file_says_so():
    given = tokenizer_metadata("llama-bpe")
    whole = json.loads(gguf_tokenizer.from_metadata(given, "tiny.gguf").files["tokenizer.json"])
    assert library.Tokenizer.from_str(json.dumps(whole)).encode("a film").ids[0] == 1  # in transformers
    assert whole["model"]["ignore_merges"]
    assert gguf_tokenizer.from_metadata(given, "tiny.gguf").encode("a film")[0] != 1  # here rows get theirs where they are made
    without = gguf_tokenizer.from_metadata(given | {"tokenizer.ggml.add_bos_token": False}, "tiny.gguf")
    assert json.loads(without.files["tokenizer.json"])["post_processor"] is None


def test_missing_pad_and_bos_are_eos():
    given = tokenizer_metadata("gpt-2")
    del given["tokenizer.ggml.padding_token_id"], given["tokenizer.ggml.bos_token_id"]
    tokenizer = gguf_tokenizer.from_metadata(given, "tiny.gguf")
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos) == (2, 2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, r"tokenizer.ggml.model='llama' is not supported: only gpt2"),
        ({"tokenizer.ggml.pre": "viking"}, r"tokenizer.ggml.pre='viking' is not supported: choose one of gpt-2, olmo, smollm"),
        ({"tokenizer.ggml.pre": None}, r"tokenizer.ggml.pre='None' is not supported"),
        ({"tokenizer.ggml.tokens": None}, r"tokenizer.ggml.tokens is missing: the file has no tokenizer"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, r"tokenizer.ggml.tokens: 1 of 3 tokens stand there twice"),
        ({"tokenizer.ggml.merges": ["a b", "q"]}, r"tokenizer.ggml.merges: '\S+ ?\S*' is not two tokens that make a third"),
        ({"tokenizer.ggml.eos_token_id": None}, r"tokenizer.ggml.eos_token_id is missing: without it no text ends"),
        ({"tokenizer.ggml.eos_token_id": 100_000}, r"special ids \{'eos_token': 100000\} are outside the vocabulary 0 .. "),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=f"tiny.gguf: {message}"):
        gguf_tokenizer.from_metadata(tokenizer_metadata("smollm") | change, "tiny.gguf")
