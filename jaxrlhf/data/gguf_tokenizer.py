"""The tokenizer that the metadata of a GGUF file describes; `models/gguf.py` reads the metadata.

Byte-level BPE only. `tokenizer.ggml.pre` names how text is cut before any merge; what a name means stands in llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from jaxrlhf.data.tokenizer import Tokenizer, wrap

_CONTROL, _OWN = 3, 4  # tokenizer.ggml.token_type: special; of the model's makers, read whole wherever it stands in a text
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# tokenizer.ggml.pre: how a text is cut. Source: llama.cpp, src/llama-vocab.cpp; the expressions of Llama 3, Qwen 2 and Tekken
# in the form that transformers gives them (`integrations/gguf`, `Qwen2Tokenizer`).
_WORDS = {
    **dict.fromkeys(("gpt-2", "olmo"), "gpt2"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), "digits"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": _TEKKEN,
}
# A word that is a token is that token, whether or not merges lead to it; and BOS begins a text where the file does not say.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")


def from_metadata(metadata: Mapping[str, Any], file: Path | str) -> Tokenizer:
    """The tokenizer, with a `tokenizer.json` of its own. `file` is named in errors.

    A missing pad token is EOS, and so is a missing BOS.

    Raises:
        ValueError: another kind of tokenizer, or a field is missing or does not fit the vocabulary.
    """
    try:
        return _made(metadata)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _made(metadata: Mapping[str, Any]) -> Tokenizer:
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ValueError(
            f"tokenizer.ggml.model='{kind}' is not supported: only gpt2, which is byte-level BPE; import the folder of the "
            "Hugging Face checkpoint instead"
        )
    if pre not in _WORDS:
        raise ValueError(f"tokenizer.ggml.pre='{pre}' is not supported: choose one of {', '.join(_WORDS)}")
    tokens: list[str] = _need(metadata, "tokenizer.ggml.tokens")
    merges: list[str] = _need(metadata, "tokenizer.ggml.merges")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise ValueError(f"tokenizer.ggml.tokens: {len(tokens) - len(vocabulary)} of {len(tokens)} tokens stand there twice")
    if wrong := [merge for merge in merges if merge.count(" ") != 1 or merge.replace(" ", "") not in vocabulary]:
        raise ValueError(f"tokenizer.ggml.merges: '{wrong[0]}' is not two tokens that make a third: the file is damaged")
    pairs = [(merge.partition(" ")[0], merge.partition(" ")[2]) for merge in merges]
    made = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre in _WHOLE_WORDS))
    if pre in ("qwen2", "deepseek-r1-qwen"):  # llama.cpp leaves it out; `Qwen2Tokenizer` has it
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer, made.decoder = _cutting(_WORDS[pre]), decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    for special, number in ((True, _CONTROL), (False, _OWN)):
        own = [token for token, found in zip(tokens, kinds, strict=False) if found == number]
        made.add_tokens([AddedToken(token, special=special, normalized=False) for token in own])
    named = _special(metadata, tokens)
    if metadata.get("tokenizer.ggml.add_bos_token", pre in _WHOLE_WORDS) and "bos_token" in named:
        bos = named["bos_token"]
        made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    files = {"tokenizer.json": made.to_str(pretty=True), "tokenizer_config.json": _config(named)}
    if template := metadata.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template
    ids = {name: vocabulary[token] for name, token in named.items()}
    return wrap(files, (ids.get("pad_token", ids["eos_token"]), ids.get("bos_token", ids["eos_token"]), ids["eos_token"]))


def _need(metadata: Mapping[str, Any], name: str) -> Any:
    if not metadata.get(name):
        raise ValueError(f"{name} is missing: the file has no tokenizer; take one that does")
    return metadata[name]


def _cutting(words: str) -> pre_tokenizers.PreTokenizer:
    """How a text is cut into the words within which merges are made."""
    if words == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words == "digits":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    split = pre_tokenizers.Split(Regex(words), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _special(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    """The special tokens as `tokenizer_config.json` names them."""
    names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    given = {ours: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for theirs, ours in names.items()}
    given = {name: i for name, i in given.items() if i is not None}
    if outside := {name: i for name, i in given.items() if not 0 <= i < len(tokens)}:
        raise ValueError(f"special ids {outside} are outside the vocabulary 0 .. {len(tokens) - 1}: the file is damaged")
    if "eos_token" not in given:
        raise ValueError("tokenizer.ggml.eos_token_id is missing: without it no text ends")
    return {name: tokens[i] for name, i in given.items()}


def _config(named: Mapping[str, str]) -> str:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
