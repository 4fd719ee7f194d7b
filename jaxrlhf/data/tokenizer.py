"""A byte-level BPE tokenizer, trained in a second, that `transformers.AutoTokenizer` loads too; or that of a checkpoint.

Nothing a person types becomes a special token ("<eos>" in a text is five letters), and no text gets one by itself: BOS and EOS
are put where rows are made. The trained kind encodes every Unicode text.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<bos>", "<eos>")
_SMALLEST = len(SPECIAL) + 256  # the special tokens and every byte
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back. `train` and `load` make it."""

    whole: tokenizers.Tokenizer  # of some kinds, puts the space before a first word that any later word has
    continuation: tokenizers.Tokenizer  # the same without that space
    starts_word: np.ndarray  # [V] bool, the token begins with a space
    pad: int
    bos: int
    eos: int
    prefixed: bool  # `whole` does put that space
    files: dict[str, str]  # what `save` writes

    @property
    def vocab_size(self) -> int:
        """Ids go up to here; may be smaller than asked for where the text had too few pairs to merge."""
        return len(self.starts_word)

    def encode(self, text: str, continuation: bool = False) -> list[int]:
        """Ids of a text, without BOS and EOS. `continuation`: the text follows other text, so its spaces stay."""
        return (self.continuation if continuation else self.whole).encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], continuation: bool = False) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        encoder = self.continuation if continuation else self.whole
        return [encoding.ids for encoding in encoder.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | np.ndarray, continuation: bool = False) -> str:
        """Text of ids; special tokens are left out. A space that `encode` put before the first word is dropped, unless the
        text is a `continuation`.

        A sampled response may end inside a character: such bytes become U+FFFD.
        """
        text = self.continuation.decode([int(i) for i in ids], skip_special_tokens=True)
        return text.removeprefix(" ") if self.prefixed and not continuation else text

    def decode_batch(self, rows: Iterable[Sequence[int] | np.ndarray], continuation: bool = False) -> list[str]:
        """`decode` of many rows."""
        return [self.decode(row, continuation) for row in rows]

    def pieces(self) -> list[bytes]:
        """The bytes that each id adds to a text, [V]; none for special tokens and for holes in the vocabulary.

        Raises:
            ValueError: the tokenizer is of a kind whose ids do not stand for bytes of their own.
        """
        kind = self.continuation.decoder
        names = [self.continuation.id_to_token(i) for i in range(self.vocab_size)]
        special = {i for i, token in self.continuation.get_added_tokens_decoder().items() if token.special}
        if isinstance(kind, decoders.ByteLevel):
            read = _byte_level
        elif isinstance(kind, decoders.Metaspace | decoders.Sequence):
            read = _metaspace
        else:
            raise ValueError(
                f"a tokenizer with the decoder {kind}: only byte-level and SentencePiece ones have pieces of bytes"
            )
        return [b"" if name is None or i in special else read(name) for i, name in enumerate(names)]

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """What each of these ids adds to a text that goes on; together they are the text. A character of several tokens stands
        with its last one, special tokens add nothing."""
        try:
            pieces = self.pieces()
        except ValueError:  # of a kind that has none: each is read alone
            return [self.decode([i], continuation=True) for i in ids]
        reader = codecs.getincrementaldecoder("utf-8")("replace")
        texts = [reader.decode(pieces[i] if i < len(pieces) else b"") for i in ids]
        if texts:
            texts[-1] += reader.decode(b"", final=True)
        return texts

    def save(self, folder: Path | str) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and what else came with them, which transformers reads as well."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")


def _byte_level(name: str) -> bytes:
    """A token of byte-level BPE has a letter for each byte. Source: openai/gpt-2 encoder.py `bytes_to_unicode`."""
    if all(letter in _BYTES for letter in name):
        return bytes(_BYTES[letter] for letter in name)
    return name.encode()  # added by hand, in plain text


def _metaspace(name: str) -> bytes:
    """A token of SentencePiece is text with a mark for each space, or the number of one byte."""
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    return name.replace("▁", " ").encode()


_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # a byte that prints is its own letter
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
_BYTES = {chr(byte): byte for byte in _PRINTED} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


def wrap(files: dict[str, str], ids: tuple[int, int, int]) -> Tokenizer:
    """A tokenizer from its files and the ids of pad, BOS and EOS."""
    serialised = json.loads(files["tokenizer.json"])
    bare = serialised | {part: _without_prefix(serialised.get(part)) for part in ("normalizer", "pre_tokenizer", "decoder")}
    whole, continuation = (tokenizers.Tokenizer.from_str(json.dumps(each)) for each in (serialised, bare))
    for one in (whole, continuation):
        one.encode_special_tokens = True  # never read a special token out of a text
    size = 1 + max(whole.get_vocab().values())  # there may be holes
    starts_word = np.array([(whole.id_to_token(i) or "").startswith(("Ġ", "▁")) for i in range(size)])
    prefixed = whole.encode("a", add_special_tokens=False).ids != continuation.encode("a", add_special_tokens=False).ids
    return Tokenizer(whole, continuation, starts_word, *ids, prefixed, files)


def _without_prefix(part: Any) -> Any:
    """A part of `tokenizer.json` that neither puts a space before the first word nor takes it away again."""
    if isinstance(part, list):
        return [each for each in map(_without_prefix, part) if each is not None]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend" or (part.get("type") == "Strip" and "content" in part):
        return None
    off = {"add_prefix_space": False, "prepend_scheme": "never"}
    return {name: off[name] if name in off else _without_prefix(value) for name, value in part.items()}


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with a space put before the first word. The same texts give the same tokenizer.

    Raises:
        ValueError: `vocab_size` has no room for the special tokens and 256 bytes.
    """
    if vocab_size < _SMALLEST:
        raise ValueError(f"vocab_size={vocab_size} must be at least {_SMALLEST}: {len(SPECIAL)} special tokens and 256 bytes")
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # as here: a special token's name in a text is only text
    }
    files = {"tokenizer.json": model.to_str(pretty=True), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
    return wrap(files, (PAD, BOS, EOS))


def load(folder: Path | str) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` or transformers wrote into this folder.

    Where its files name no EOS, as those of GPT-2, the ids in the `config.json` beside them say which tokens are special. A
    missing pad token is EOS, which no mask here is ever read from; a missing BOS is EOS too, which then begins every row.

    Raises:
        FileNotFoundError: no `tokenizer.json` or `tokenizer_config.json` in the folder.
        ValueError: a file is not readable, there is no EOS, or a special token is not in the vocabulary.
    """
    folder = Path(folder)
    for name in _FILES[:2]:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file; give the folder of a finished run or of a checkpoint")
    try:
        files = {name: (folder / name).read_text(encoding="utf-8") for name in _FILES if (folder / name).is_file()}
        tokenizer = wrap(files, (PAD, BOS, EOS))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{folder / _FILES[0]}: not a tokenizer: {error}") from None
    try:
        named = json.loads(files.get(_FILES[2], "{}")) | json.loads(files[_FILES[1]])
        if named.get("eos_token") is None:
            named |= (added := _named_by_id(folder, tokenizer))
            files[_FILES[1]] = json.dumps(json.loads(files[_FILES[1]]) | added, indent=2) + "\n"
    except ValueError as error:
        raise ValueError(f"{folder / _FILES[1]}: not readable JSON ({error})") from None
    ids = {name: _special_id(folder, tokenizer, f"{name}_token", named.get(f"{name}_token")) for name in ("pad", "bos", "eos")}
    if (eos := ids["eos"]) is None:
        raise ValueError(f"{folder / _FILES[1]}: eos_token is missing: without it no text ends")
    given = {name: eos if i is None else i for name, i in ids.items()}
    return dataclasses.replace(tokenizer, pad=given["pad"], bos=given["bos"], eos=eos)


def _named_by_id(folder: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """Special tokens by the ids of a checkpoint's `config.json`; of several EOS the first."""
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = {}
    for name in ("pad", "bos", "eos"):
        given = values.get(f"{name}_token_id")
        given = given[0] if isinstance(given, list) else given
        if given is not None and (token := tokenizer.whole.id_to_token(given)) is not None:
            found[f"{name}_token"] = token
    return found


def _special_id(folder: Path, tokenizer: Tokenizer, field: str, token: Any) -> int | None:
    """The id of a special token as `tokenizer_config.json` names it: by its text, or with its properties."""
    if token is None:
        return None
    text = token["content"] if isinstance(token, dict) else token
    if (found := tokenizer.whole.token_to_id(text)) is None:
        raise ValueError(
            f"{folder / _FILES[1]}: {field}='{text}' is not in the vocabulary of {_FILES[0]}: they do not belong together"
        )
    return found
