"""From texts to rows of token ids, and from rows to batches.

Every batch is a pure function of the step number, so that a resumed run reads what the unbroken one would. A data set is a
`grain.MapDataset`: `dataset[step]` is the batch of that step, as NumPy arrays. The order of rows is a fresh stateless
permutation each epoch; no batch depends on what was read before.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxrlhf.core.types import Prompts
from jaxrlhf.data.tokenizer import BOS, EOS, PAD, Tokenizer

Arrays = dict[str, np.ndarray]

_PLAIN = str.maketrans({"‘": "'", "’": "'", "`": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})


def clean(text: str) -> str:
    """Lower case, straight quotes and dashes, single spaces: the form of every text that a default run reads."""
    if not text.isascii() or "`" in text:
        text = text.translate(_PLAIN)
    return " ".join(text.lower().split())


def pad_rows(rows: Sequence[Sequence[int]], width: int, pad: int = PAD) -> tuple[Int[np.ndarray, "n w"], Int[np.ndarray, " n"]]:
    """Rows of ids right-padded to `width`, and their lengths.

    Raises:
        ValueError: a row is longer than `width`.
    """
    length = np.fromiter(map(len, rows), np.int32, len(rows))
    if len(rows) and length.max() > width:
        raise ValueError(
            f"row {length.argmax()} has {length.max()} tokens, more than the width {width}: cut it or choose a larger width"
        )
    tokens = np.full((len(rows), width), pad, np.int32)
    tokens[np.arange(width) < length[:, None]] = np.fromiter(itertools.chain.from_iterable(rows), np.int32, length.sum())
    return tokens, length


def pack(
    rows: Sequence[Sequence[int]], width: int, bos: int = BOS, eos: int = EOS, pad: int = PAD
) -> tuple[Int[np.ndarray, "n w"], Int[np.ndarray, "n w"]]:
    """The stream bos + text + eos of all texts, cut every `width` tokens: (tokens, segments). Only the last row has padding.

    `segments` counts the texts of a row from 1 (a text that began in the row before counts too); 0 is padding.

    Raises:
        ValueError: there are no texts.
    """
    if not len(rows):
        raise ValueError("there are no texts to pack: give at least one")
    length = np.fromiter(map(len, rows), np.int64, len(rows)) + 2
    ends = np.cumsum(length)
    total = int(length.sum())
    height = -(-total // width)
    begins = np.zeros(height * width, np.int64)
    begins[ends - length] = 1
    is_text = np.arange(height * width) < total
    is_text[ends - length] = is_text[ends - 1] = False
    stream = np.full(height * width, pad, np.int32)
    stream[ends - length], stream[ends - 1] = bos, eos
    stream[is_text] = np.fromiter(itertools.chain.from_iterable(rows), np.int32, total - 2 * len(rows))
    number = np.cumsum(begins).reshape(height, width)
    segments = (number - number[:, :1] + 1).astype(np.int32)
    segments.reshape(-1)[total:] = 0
    return stream.reshape(height, width), segments


def encode_rows(texts: Sequence[str], tokenizer: Tokenizer, rows: int, width: int, seed: int) -> tuple[list[list[int]], int]:
    """As many texts, in an order drawn by `seed`, as fill `rows` rows of `width` when packed; and how many texts that took.

    With `mixed_rows_read` a run encodes no more of a large source than it will read.
    """
    shuffled = np.random.default_rng(seed).permutation(len(texts))
    encoded: list[list[int]] = []
    total, at = 0, 0
    while at < len(texts) and total < rows * width:
        chunk = tokenizer.encode_batch([texts[int(i)] for i in shuffled[at : at + 20_000]])
        at += len(chunk)
        for row in chunk:
            encoded.append(row)
            total += len(row) + 2
            if total >= rows * width:
                break
    return encoded, len(encoded)


def continuation_rows(
    rows: Sequence[Sequence[int]],
    width: int = 36,
    shortest: int = 8,
    longest: int = 33,
    context: int = 4,
    bos: int = BOS,
    eos: int = EOS,
) -> Arrays:
    """Fine-tuning rows bos + text + eos, one text each, of texts of `shortest` to `longest` tokens; the others are left out.

    Returns tokens [N, width], prompt_len [N] (bos and `context` tokens), response_len [N] (the rest and EOS), row [N]
    (index into `rows`).

    Raises:
        ValueError: `width` has no room for the longest text, or no text is left.
    """
    if longest + 2 > width or not 0 < context < shortest:
        raise ValueError(
            f"width={width}, shortest={shortest}, longest={longest}, context={context}: "
            "need longest + 2 <= width and 0 < context < shortest"
        )
    kept = np.array([i for i, row in enumerate(rows) if shortest <= len(row) <= longest], np.int32)
    if not len(kept):
        raise ValueError(f"none of {len(rows)} texts has {shortest} to {longest} tokens: change shortest or longest")
    tokens, length = pad_rows([[bos, *rows[i], eos] for i in kept], width)
    prompt_len = np.full_like(length, 1 + context)
    return {"tokens": tokens, "prompt_len": prompt_len, "response_len": length - prompt_len, "row": kept}


def reply_rows(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    prompt_width: int = 16,
    response_width: int = 32,
    bos: int = BOS,
    eos: int = EOS,
) -> Arrays:
    """Fine-tuning rows bos + turn + eos + reply + eos of (turn, reply) ids that fit; the others are left out.

    Returns tokens [N, prompt_width + response_width], prompt_len [N] (bos, turn, eos), response_len [N], row [N].

    Raises:
        ValueError: no pair fits.
    """
    kept = [i for i, (turn, reply) in enumerate(pairs) if len(turn) + 2 <= prompt_width and len(reply) + 1 <= response_width]
    if not kept:
        raise ValueError(f"none of {len(pairs)} pairs fits into {prompt_width} + {response_width} tokens: widen them")
    tokens, length = pad_rows([[bos, *pairs[i][0], eos, *pairs[i][1], eos] for i in kept], prompt_width + response_width)
    prompt_len = np.fromiter((len(pairs[i][0]) + 2 for i in kept), np.int32, len(kept))
    return {"tokens": tokens, "prompt_len": prompt_len, "response_len": length - prompt_len, "row": np.array(kept, np.int32)}


def evaluation_rows(rows: Sequence[Sequence[int]], tokenizer: Tokenizer, width: int = 64) -> Arrays:
    """Held-out rows bos + text + eos, cut to `width`: tokens [N, width], length [N], characters [N] of the kept tokens.

    Bits per character are the total negative log-likelihood of tokens 1 .. length-1, over log 2 and the total characters.
    """
    full = [[tokenizer.bos, *row, tokenizer.eos][:width] for row in rows]
    tokens, length = pad_rows(full, width)
    characters = np.fromiter((len(tokenizer.decode(row)) for row in full), np.int32, len(full))
    return {"tokens": tokens, "length": length, "characters": characters}


def cut_prompts(
    rows: Sequence[Sequence[int]], tokenizer: Tokenizer, seed: int, shortest: int = 2, longest: int = 7, width: int = 8
) -> Prompts:
    """Prompts: bos and the first words of each text. The cut falls before a word, after `shortest` to `longest` tokens.

    Where several cuts are possible `seed` chooses; a text without any is left out. `row` and `uid` are its index in `rows`.

    Raises:
        ValueError: `width` has no room for the longest prompt, or no text can be cut.
    """
    if longest + 1 > width or not 1 <= shortest <= longest:
        raise ValueError(f"width={width}, shortest={shortest}, longest={longest}: need 1 <= shortest <= longest < width")
    uniform = np.random.default_rng(seed).random(len(rows))
    prompts, kept = [], []
    for i, row in enumerate(rows):
        cuts = [k for k in range(shortest, min(longest, len(row) - 1) + 1) if tokenizer.starts_word[row[k]]]
        if cuts:
            prompts.append([tokenizer.bos, *row[: cuts[int(uniform[i] * len(cuts))]]])
            kept.append(i)
    if not kept:
        raise ValueError(f"none of {len(rows)} texts can be cut after {shortest} to {longest} tokens: give longer texts")
    tokens, length = pad_rows(prompts, width)
    row = np.array(kept, np.int32)
    return Prompts(tokens=tokens, length=length, uid=row, row=row)


def text_prompts(texts: Sequence[str], tokenizer: Tokenizer, width: int) -> Prompts:
    """Prompts that somebody wrote: bos + text. Nothing is cut.

    Raises:
        ValueError: a text is empty or has no room in `width` (naming which, and by how much).
    """
    rows = tokenizer.encode_batch(texts)
    for i, row in enumerate(rows):
        which = f"prompt {i} ('{texts[i][:40]}')"
        if not row:
            raise ValueError(f"{which} is empty: write at least one word")
        if len(row) + 1 > width:
            raise ValueError(f"{which} has {len(row)} tokens, the limit is {width - 1}: shorten it")
    tokens, length = pad_rows([[tokenizer.bos, *row] for row in rows], width)
    row = np.arange(len(rows), dtype=np.int32)
    return Prompts(tokens=tokens, length=length, uid=row, row=row)


def turn_prompts(turns: Sequence[Sequence[int]], width: int = 16, bos: int = BOS, eos: int = EOS) -> Prompts:
    """Chat prompts bos + turn + eos of the turns that fit into `width`; the others are left out."""
    kept = [i for i, turn in enumerate(turns) if len(turn) + 2 <= width]
    if not kept:
        raise ValueError(f"none of {len(turns)} turns fits into {width} tokens: widen it")
    tokens, length = pad_rows([[bos, *turns[i], eos] for i in kept], width)
    row = np.array(kept, np.int32)
    return Prompts(tokens=tokens, length=length, uid=row, row=row)


def order(rows: int, seed: int) -> Any:
    """An endless `grain.MapDataset` of row numbers: every epoch another permutation of `range(rows)`.

    Raises:
        ValueError: there are no rows.
    """
    import grain

    if rows < 1:
        raise ValueError("the data set is empty: there is nothing to draw batches from")
    return grain.MapDataset.range(rows).seed(seed).shuffle().repeat()


def span(rows: Any, start: int, stop: int) -> Int[np.ndarray, " n"]:
    """The row numbers at places start .. stop-1 of an `order`."""
    return np.fromiter((rows[i] for i in range(start, stop)), np.int64, stop - start)


def by_step(batch: Callable[[int], Any], steps: int | None = None) -> Any:
    """A `grain.MapDataset` with `batch(step)` at every step; endless, or repeating after `steps`."""
    import grain

    return grain.MapDataset.range(np.iinfo(np.int32).max if steps is None else steps).map(lambda step: batch(int(step)))


def within(batches: Any, vocab_size: int) -> Any:
    """A `grain.MapDataset` of batches (arrays by name, or a type with `tokens`), each checked on the host when it is read.

    A device does not complain of an id that is too large: it takes the last row of the embedding, or NaN.

    Raises:
        ValueError: when a batch with an id outside 0 .. vocab_size-1 is read; it names step, row and place.
    """

    def check(step: int, batch: Any) -> Any:
        tokens = np.asarray(batch["tokens"] if isinstance(batch, Mapping) else batch.tokens)
        if tokens.min(initial=0) < 0 or tokens.max(initial=0) >= vocab_size:
            where = np.argwhere((tokens < 0) | (tokens >= vocab_size))[0]
            raise ValueError(
                f"batch {step}: token id {tokens[tuple(where)]} at {where.tolist()} of its tokens, but the model has ids 0 to "
                f"{vocab_size - 1}: the texts were encoded by the tokenizer of another model"
            )
        return batch

    return batches.map_with_index(check)


def height(arrays: Mapping[str, np.ndarray]) -> int:
    """Number of rows of a data set of arrays, which must agree on it."""
    heights = {name: len(array) for name, array in arrays.items()}
    if len(set(heights.values())) != 1:
        raise ValueError(f"the arrays of a data set must have equally many rows, not {heights}")
    return next(iter(heights.values()))


def batches(arrays: Mapping[str, np.ndarray], batch_size: int, seed: int) -> Any:
    """Endless batches of the rows of `arrays`: `dataset[step]` is {name: [batch_size, ...]}.

    Raises:
        ValueError: no rows, unequally many rows, or batch_size < 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    rows = order(height(arrays), seed)

    def batch(step: int) -> Arrays:
        taken = span(rows, step * batch_size, (step + 1) * batch_size)
        return {name: array[taken] for name, array in arrays.items()}

    return by_step(batch)


def take_prompts(prompts: Prompts, index: slice | np.ndarray) -> Prompts:
    """Some of the prompts, with all that is known of them."""
    fields = {field.name: getattr(prompts, field.name) for field in dataclasses.fields(prompts)}
    return Prompts(**{name: None if values is None else values[index] for name, values in fields.items()})


def prompt_batches(prompts: Prompts, batch_size: int, seed: int) -> Any:
    """Endless batches of prompts. `uid` is the place in the stream, so that no two prompts of a batch share a random stream."""
    rows = order(len(prompts.row), seed)

    def batch(step: int) -> Prompts:
        taken = take_prompts(prompts, span(rows, step * batch_size, (step + 1) * batch_size))
        return dataclasses.replace(taken, uid=(step * batch_size + np.arange(batch_size)).astype(np.int32))

    return by_step(batch)


def _read_before(step: int, batch_size: int, steps: int, share: tuple[float, float]) -> int:
    """Rows of the second source in steps 0 .. step-1, when its share of a batch rises linearly from share[0] to share[1]."""
    slope = (share[1] - share[0]) / max(steps - 1, 1)
    return int(np.floor(batch_size * (share[0] * step + slope * step * (step - 1) / 2) + 1e-9))


def mixed_rows_read(batch_size: int, steps: int, share: tuple[float, float]) -> tuple[int, int]:
    """Rows that `mixed` reads of each source in `steps` steps: no more of a large source need be encoded."""
    second = _read_before(steps, batch_size, steps, share)
    return batch_size * steps - second, second


def mixed(
    first: Mapping[str, np.ndarray],
    second: Mapping[str, np.ndarray],
    batch_size: int,
    seed: int,
    steps: int,
    share: tuple[float, float] = (0.35, 0.95),
) -> Any:
    """Batches of two sources; the share of the second rises linearly from share[0] at step 0 to share[1] at the last step.

    Each source is read in its own stateless order without leaving a row out. Rows of the second source come last in a batch.

    Raises:
        ValueError: a share outside [0, 1], other names in the two sources, no rows, or no steps.
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps={steps} and batch_size={batch_size} must be at least 1")
    if not (0 <= share[0] <= 1 and 0 <= share[1] <= 1):
        raise ValueError(f"share={share} must be two numbers in [0, 1]")
    if set(first) != set(second):
        raise ValueError(f"the two sources must have the same arrays, not {sorted(first)} and {sorted(second)}")
    orders = order(height(first), seed), order(height(second), seed + 1)

    def batch(step: int) -> Arrays:
        low, high = (_read_before(s, batch_size, steps, share) for s in (step, step + 1))
        of_second = span(orders[1], low, high)
        of_first = span(orders[0], batch_size * step - low, batch_size * (step + 1) - high)
        return {name: np.concatenate([first[name][of_first], second[name][of_second]]) for name in first}

    return by_step(batch, steps)
