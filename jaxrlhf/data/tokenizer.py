"""A byte-level BPE tokenizer, trained in a second, that `transformers.AutoTokenizer` loads too.

Every Unicode text can be encoded, and nothing a person types becomes a special token: "<eos>" in a text is five letters.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<bos>", "<eos>")
_SMALLEST = len(SPECIAL) + 256  # the special tokens and every byte


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back. `train` and `load` make it."""

    whole: tokenizers.Tokenizer  # puts the space before a first word that any later word has
    continuation: tokenizers.Tokenizer  # the same without that space
    starts_word: np.ndarray  # [V] bool, the token begins with a space
    pad: int = PAD
    bos: int = BOS
    eos: int = EOS

    @property
    def vocab_size(self) -> int:
        """Number of ids; may be smaller than asked for where the text had too few pairs to merge."""
        return len(self.starts_word)

    def encode(self, text: str, continuation: bool = False) -> list[int]:
        """Ids of a text, without BOS and EOS. `continuation`: the text follows other text, so its spaces stay."""
        return (self.continuation if continuation else self.whole).encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], continuation: bool = False) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        encoder = self.continuation if continuation else self.whole
        return [encoding.ids for encoding in encoder.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | np.ndarray, continuation: bool = False) -> str:
        """Text of ids; special tokens are left out. The first word's space is dropped, unless the text is a `continuation`.

        A sampled response may end inside a character: such bytes become U+FFFD.
        """
        text = self.whole.decode([int(i) for i in ids], skip_special_tokens=True)
        return text if continuation else text.removeprefix(" ")

    def decode_batch(self, rows: Iterable[Sequence[int] | np.ndarray], continuation: bool = False) -> list[str]:
        """`decode` of many rows."""
        return [self.decode(row, continuation) for row in rows]

    def save(self, folder: Path | str) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which transformers reads as well."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
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
        self.whole.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _wrap(serialised: str) -> Tokenizer:
    """A tokenizer from its JSON text."""
    whole, continuation = (tokenizers.Tokenizer.from_str(serialised) for _ in range(2))
    continuation.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for one in (whole, continuation):
        one.encode_special_tokens = True  # never read a special token out of a text
    starts_word = np.array([(whole.id_to_token(i) or "").startswith("Ġ") for i in range(whole.get_vocab_size())])
    return Tokenizer(whole, continuation, starts_word)


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
    return _wrap(model.to_str())


def load(folder: Path | str) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote.

    Raises:
        FileNotFoundError: no `tokenizer.json` in the folder.
        ValueError: the file is not a tokenizer, or not one of this kind.
    """
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; give the folder of a finished run")
    try:
        tokenizer = _wrap(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{file}: not a tokenizer: {error}") from None
    if tuple(tokenizer.whole.id_to_token(i) for i in (PAD, BOS, EOS)) != SPECIAL:
        raise ValueError(
            f"{file}: ids 0, 1, 2 must be {', '.join(SPECIAL)}; train a tokenizer with jaxrlhf.data.tokenizer.train"
        )
    return tokenizer
