"""Batches for a reward model: sets of texts that people rated, alone or together with pairs that somebody chose from."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxrlhf.core.types import Preferences
from jaxrlhf.data import pipeline
from jaxrlhf.data.human_sentiment import DOMAINS, Rating
from jaxrlhf.data.pipeline import Arrays
from jaxrlhf.data.tokenizer import PAD, Tokenizer


def rated_rows(ratings: Sequence[Rating], tokenizer: Tokenizer, width: int = 64, domains: Sequence[str] = DOMAINS) -> Arrays:
    """Rated texts as rows bos + clean text + eos, cut to `width` (a cut row has no EOS).

    Returns tokens [N, width], length [N], rating [N] (mean over the people), domain [N] (index into `domains`).

    Raises:
        ValueError: a text's domain is not one of `domains`.
    """
    if unknown := sorted({rating.domain for rating in ratings} - set(domains)):
        raise ValueError(f"domain '{unknown[0]}' is none of {', '.join(domains)}: name all domains of the data")
    encoded = tokenizer.encode_batch([pipeline.clean(rating.text) for rating in ratings])
    tokens, length = pipeline.pad_rows([[tokenizer.bos, *row, tokenizer.eos][:width] for row in encoded], width)
    return {
        "tokens": tokens,
        "length": length,
        "rating": np.array([rating.mean for rating in ratings], np.float32),
        "domain": np.array([list(domains).index(rating.domain) for rating in ratings], np.int32),
    }


def choose_widths(
    length: Int[np.ndarray, " n"], size: int, window: int = 12, count: int = 4, multiple: int = 4
) -> tuple[int, ...]:
    """At most `count` row widths, multiples of `multiple`, that pad the batches of `rated_sets` (`size` texts in all) least.

    Each width is a program to compile (seconds), each padded token is computed for nothing. Measured on one epoch of the
    same windows in another order; the largest width holds the longest text.
    """
    windows = np.random.default_rng(0).permutation(length)[: len(length) // (window * size) * window * size]
    longest = np.sort(windows.reshape(-1, window * size), axis=1)[:, size - 1 :: size].reshape(-1)
    needed = -(-np.append(longest, length.max()) // multiple) * multiple
    choices, times = np.unique(needed, return_counts=True)
    subsets = itertools.combinations(choices.tolist(), min(count, len(choices)))
    whole = [np.asarray(subset) for subset in subsets if subset[-1] == choices[-1]]
    best = min(whole, key=lambda subset: (subset[np.searchsorted(subset, choices)] * times).sum())
    return tuple(best.tolist())


def _width(length: Int[np.ndarray, "*n"], widths: Sequence[int]) -> int:
    """The smallest of the widths that holds the longest row."""
    longest = int(length.max())
    fitting = [width for width in widths if width >= longest]
    if not fitting:
        raise ValueError(f"a row has {longest} tokens, more than the largest width {max(widths)}: add a width")
    return min(fitting)


def _resize(tokens: Int[np.ndarray, "n t"], width: int) -> Int[np.ndarray, "n {width}"]:
    """Rows cut or padded to `width`; only padding is cut."""
    return np.pad(tokens[:, :width], ((0, 0), (0, max(0, width - tokens.shape[1]))), constant_values=PAD)


def rated_sets(
    rows: Arrays, size: int, seed: int, widths: Sequence[int], window: int = 12, sets: int = 1, min_gap: float = 0.5
) -> Any:
    """Endless batches for the reward model: `sets` sets of `size` texts of all domains, each set compared within itself.

    Rows are sorted by length within `window` batches and a batch is as wide as the smallest of `widths` that holds it;
    the batches of a window come in an order drawn by (seed, window). `dataset[step]` has the fields of `reward.Batch` but
    `margin`: tokens [sets, size, T], prompt_len (0), response_len [sets, size], preferred [sets, size, size].

    Raises:
        ValueError: fewer rows than one batch, or a row longer than the largest width.
    """
    taken = _windows(rows["length"], size * sets, seed, widths, window)

    def batch(step: int) -> Arrays:
        index = taken(step)
        length, rating, domain = (rows[name][index].reshape(sets, size) for name in ("length", "rating", "domain"))
        width = _width(length, widths)
        return {
            "tokens": _resize(rows["tokens"][index], width).reshape(sets, size, width),
            "prompt_len": np.zeros_like(length),
            "response_len": length,
            "preferred": preferred_by_rating(rating, domain, min_gap),
        }

    return pipeline.by_step(batch)


def _windows(
    length: Int[np.ndarray, " n"], size: int, seed: int, widths: Sequence[int], window: int
) -> Callable[[int], Int[np.ndarray, " size"]]:
    """(step) -> the rows of that step, of nearly equal length."""
    if len(length) < size:
        raise ValueError(f"{len(length)} rated texts are fewer than one batch of {size}: take smaller sets")
    _width(length, widths)
    stream = pipeline.order(len(length), seed)

    @functools.lru_cache(maxsize=2)  # of a pure function: a window is sorted once, not at each of its steps
    def sorted_window(number: int) -> np.ndarray:
        index = pipeline.span(stream, number * window * size, (number + 1) * window * size)
        index = index[np.argsort(length[index], kind="stable")].reshape(window, size)
        return np.random.default_rng([seed, number]).permutation(index)

    def taken(step: int) -> np.ndarray:
        # mixed again, else the first of several sets would get the shorter texts
        return np.random.default_rng([seed, step, 1]).permutation(sorted_window(step // window)[step % window])

    return taken


def preferred_by_rating(
    rating: Float[np.ndarray, "b n"], domain: Int[np.ndarray, "b n"], min_gap: float
) -> Float[np.ndarray, "b n n"]:
    """1 where people rated text i at least `min_gap` above text j of the same domain, else 0."""
    gap = rating[:, :, None] - rating[:, None, :]
    # means of small integers: a gap of exactly min_gap may come out one rounding below it
    return ((gap >= min_gap - 1e-5) & (gap > 0) & (domain[:, :, None] == domain[:, None, :])).astype(np.float32)


def real_share(dataset: Any, steps: int) -> float:
    """Share of the tokens of the first `steps` batches that are not padding."""
    seen = [dataset[step] for step in range(steps)]
    return sum(int((b["prompt_len"] + b["response_len"]).sum()) for b in seen) / sum(b["tokens"].size for b in seen)


def preference_rows(rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, width: int) -> Preferences:
    """Token rows bos + prompt + response + eos of pairs {prompt, chosen, rejected} and, where given, tie, weight, margin.

    Response 0 is the chosen one: the label is 1, or 0.5 for a tie. A response is read as it follows the prompt, so it keeps
    the space that it starts with. Texts are not cleaned.

    Raises:
        ValueError: there are no rows, or one has no room in `width` (`fitting` leaves such rows out).
    """
    if not rows:
        raise ValueError("there are no preference pairs: label some first")
    encoded = _encode_pairs(rows, tokenizer)
    for i, (_, *responses) in enumerate(encoded):
        if (longest := max(map(len, responses))) > width:
            raise ValueError(f"pair {i} has {longest} tokens, more than the width {width}: widen it, or leave the pair out")
    return _laid_out(rows, encoded, width)


def whole_rows(rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, multiple: int = 16) -> Preferences:
    """`preference_rows` as wide as the longest row, rounded up to a multiple: to be scored, where none may be left out.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("there are no preference pairs to score")
    encoded = _encode_pairs(rows, tokenizer)
    longest = max(len(row) for _, *two in encoded for row in two)
    return _laid_out(rows, encoded, -(-longest // multiple) * multiple)


def _laid_out(
    rows: Sequence[Mapping[str, Any]], encoded: Sequence[tuple[int, list[int], list[int]]], width: int
) -> Preferences:
    tokens, length = pipeline.pad_rows([row for _, *two in encoded for row in two], width)
    prompt_len = np.repeat(np.array([[prompt] for prompt, *_ in encoded], np.int32), 2, axis=1)
    tie = np.array([bool(row.get("tie", False)) for row in rows])
    return Preferences(
        tokens=tokens.reshape(-1, 2, width),
        prompt_len=prompt_len,
        response_len=length.reshape(-1, 2) - prompt_len,
        label=np.where(tie, 0.5, 1.0).astype(np.float32),
        tie=tie,
        weight=np.array([row.get("weight", 1.0) for row in rows], np.float32),
        margin=np.array([row.get("margin", 0.0) for row in rows], np.float32),
    )


def fitting(rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, width: int) -> list[Mapping[str, Any]]:
    """The pairs of which both rows have room in `width`; count what is missing."""
    encoded = _encode_pairs(rows, tokenizer)
    return [row for row, (_, *two) in zip(rows, encoded, strict=True) if max(map(len, two)) <= width]


def answer_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, width: int
) -> tuple[dict[str, np.ndarray], list[Mapping[str, Any]]]:
    """Token rows bos + prompt + completion + eos of the single answers {prompt, completion, ...} that have room in `width`.

    Returns tokens [n, width], prompt_len [n], response_len [n], and the rows that they are of; count what is missing.
    """
    prompts = tokenizer.encode_batch([row["prompt"] for row in rows])
    answers = tokenizer.encode_batch([row["completion"] for row in rows], continuation=True)
    whole = [[tokenizer.bos, *prompt, *answer, tokenizer.eos] for prompt, answer in zip(prompts, answers, strict=True)]
    kept = [i for i, row in enumerate(whole) if len(row) <= width]
    tokens, length = pipeline.pad_rows([whole[i] for i in kept], width)
    prompt_len = np.array([len(prompts[i]) + 1 for i in kept], np.int32)
    arrays = {"tokens": tokens, "prompt_len": prompt_len, "response_len": length - prompt_len}
    return arrays, [rows[i] for i in kept]


def _encode_pairs(rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[tuple[int, list[int], list[int]]]:
    """(prompt length with BOS, row of the chosen response, row of the rejected one) of each pair."""
    prompts = tokenizer.encode_batch([row["prompt"] for row in rows])
    sides = [tokenizer.encode_batch([row[side] for row in rows], continuation=True) for side in ("chosen", "rejected")]
    bos, eos = tokenizer.bos, tokenizer.eos
    return [
        (len(prompt) + 1, [bos, *prompt, *chosen, eos], [bos, *prompt, *rejected, eos])
        for prompt, chosen, rejected in zip(prompts, *sides, strict=True)
    ]


def compared_sets(
    rows: Arrays,
    pairs: Preferences,
    size: tuple[int, int],
    seed: int,
    widths: Sequence[int],
    window: int = 12,
    min_gap: float = 0.5,
    ties: bool = False,
) -> Any:
    """Endless batches that mix rated texts with chosen pairs: one set of size[0] texts and size[1] pairs.

    Pairs weigh as their labels say; a tie counts half each way or, with `ties`, stands in the field `tied` as itself. The
    pairs of rated texts together weigh as much as all the chosen pairs together. `dataset[step]` has the fields of
    `rated_sets`, with one set of N = size[0] + 2 * size[1] rows.

    Raises:
        ValueError: as `rated_sets`, or there are no pairs.
    """
    if pairs.tokens.shape[1] != 2:
        raise ValueError(f"sets of {pairs.tokens.shape[1]} responses: only pairs can be mixed with rated texts")
    fields = {name: np.asarray(getattr(pairs, name)) for name in ("tokens", "prompt_len", "response_len", "label", "weight")}
    tie = np.asarray(pairs.tie)
    fields["label"] = np.where(tie, 0.5, fields["label"])
    fields["tied"] = np.where(tie & ties, fields["weight"], 0.0).astype(np.float32)
    fields["weight"] = fields["weight"] - fields["tied"]
    rated = rated_sets(rows, size[0], seed, widths, window, min_gap=min_gap)
    chosen = pipeline.batches(fields, size[1], seed + 1)

    def batch(step: int) -> Arrays:
        texts, two = rated[step], chosen[step]
        prompt_len, response_len = (np.append(texts[name][0], two[name]) for name in ("prompt_len", "response_len"))
        width = _width(prompt_len + response_len, widths)
        of_pairs = two["tokens"].reshape(2 * size[1], -1)
        weights = two["weight"] * two["label"], two["weight"] * (1 - two["label"]), two["tied"]
        preferred, tied = _balance(texts["preferred"][0], *weights)
        return {
            "tokens": np.concatenate([_resize(texts["tokens"][0], width), _resize(of_pairs, width)])[None],
            "prompt_len": prompt_len[None],
            "response_len": response_len[None],
            "preferred": preferred[None],
            **({"tied": tied[None]} if ties else {}),
        }

    return pipeline.by_step(batch)


def _balance(
    rated: Float[np.ndarray, "n n"],
    forward: Float[np.ndarray, " k"],
    backward: Float[np.ndarray, " k"],
    tie: Float[np.ndarray, " k"],
) -> tuple[Float[np.ndarray, "m m"], Float[np.ndarray, "m m"]]:
    """Weights of the choices and of the ties of N texts and K pairs, the texts' pairs scaled to the chosen ones' total."""
    texts, pairs = len(rated), len(forward)
    preferred, tied = np.zeros((2, texts + 2 * pairs, texts + 2 * pairs), np.float32)
    total = float(forward.sum() + backward.sum() + tie.sum())
    preferred[:texts, :texts] = rated * (total / max(float(rated.sum()), 1.0))
    first = texts + 2 * np.arange(pairs)
    preferred[first, first + 1], preferred[first + 1, first] = forward, backward
    tied[first, first + 1] = tie
    return preferred, tied


def stacked_sets(datasets: Sequence[Any]) -> Any:
    """The batches of several data sets side by side: every field [B, M, ...], rows as wide as the widest.

    What an ensemble of M models learns from where each reads the data in an order of its own.
    """

    def batch(step: int) -> Arrays:
        found = [dataset[step] for dataset in datasets]
        width = max(one["tokens"].shape[-1] for one in found)
        for one in found:
            rows = _resize(one["tokens"].reshape(-1, one["tokens"].shape[-1]), width)
            one["tokens"] = rows.reshape(*one["tokens"].shape[:-1], width)
        return {name: np.stack([one[name] for one in found], axis=1) for name in found[0]}

    return pipeline.by_step(batch)


def bootstrapped_sets(dataset: Any, members: int, seed: int) -> Any:
    """The batches of a data set with weights of each member's own: `preferred` (and `tied`) [B, M, N, N].

    Each member holds each text as often as a Poisson number of mean 1 says, the same one whenever the text comes; a pair
    counts as often as the copies of its two texts can be paired. So members of an ensemble share rows but not the sample.
    Source: Efron 1979 (the bootstrap); Oza and Russell 2001, "Online bagging and boosting" (its Poisson form).
    """

    def batch(step: int) -> Arrays:
        found = dataset[step]
        b, n, _ = found["tokens"].shape
        length = found["prompt_len"] + found["response_len"]
        copies = np.zeros((b, members, n), np.float32)
        for i, j in np.ndindex(b, n):  # a text is known by its tokens, whatever the padding
            name = zlib.crc32(np.ascontiguousarray(found["tokens"][i, j, : length[i, j]]).tobytes())
            copies[i, :, j] = np.random.default_rng([seed, name]).poisson(1.0, members)
        times = copies[..., :, None] * copies[..., None, :]
        own = {name: (found[name][:, None] * times).astype(np.float32) for name in ("preferred", "tied") if name in found}
        return found | own

    return pipeline.by_step(batch)
