"""What a batch must be before anything of it is compiled; each error names the number and what to change."""

from __future__ import annotations

import os

import jax
import numpy as np

from jaxrlhf.core import sharding
from jaxrlhf.core.types import Prompts, SamplingSpec
from jaxrlhf.models.model import Model


def numbers(
    model: Model, prompts: Prompts, spec: SamplingSpec, n: int, chunk: int, halvings: int, least: int, slots: int
) -> None:
    """Lengths, options and the spec's ids.

    Raises:
        ValueError: they are not as they must be.
    """
    width = prompts.tokens.shape[1]
    if width + spec.max_tokens > model.max_length:
        raise ValueError(
            f"prompt width {width} + max_tokens {spec.max_tokens} = {width + spec.max_tokens} exceeds the model's context of "
            f"{model.max_length}: cut prompts to {model.max_length - spec.max_tokens} tokens, or lower max_tokens to "
            f"{model.max_length - width}, or use a model with a longer context"
        )
    if n < 1 or chunk < 1 or least < 1 or halvings < 0 or slots < 0:
        raise ValueError(
            f"n={n}, chunk={chunk}, least={least} must be at least 1, halvings={halvings}, slots={slots} at least 0"
        )
    if 0 < slots < prompts.length.shape[0] * n and slots % (n * sharding.ways()):
        raise ValueError(
            f"slots={slots} must be a multiple of n={n} samples times {sharding.ways()} devices that split the batch: "
            f"choose {max(1, slots // (n * sharding.ways())) * n * sharding.ways()}"
        )
    outside = [i for i in (*spec.stop, *spec.forbidden, spec.pad) if not 0 <= i < model.vocab_size]
    if outside:
        raise ValueError(f"SamplingSpec names token ids {outside} outside the vocabulary 0 .. {model.vocab_size - 1}")


def draw(prompts: Prompts, spec: SamplingSpec, besides: int) -> None:
    """Temperature and top-p of each prompt's own.

    Raises:
        ValueError: they are not as they must be.
    """
    if prompts.draw is None:
        return
    if spec.temperature != 1 or spec.filtered or besides:
        raise ValueError(
            f"prompts with a draw of their own, but the spec has temperature={spec.temperature}, top_k={spec.top_k}, "
            f"top_p={spec.top_p}, min_p={spec.min_p}, greedy={spec.greedy} and {besides} rows are under way: leave the spec "
            "at temperature 1 without filters, and use no stragglers"
        )
    temperature, top_p = np.asarray(prompts.draw.temperature), np.asarray(prompts.draw.top_p)
    if not ((temperature >= 0) & np.isfinite(temperature)).all() or not ((top_p > 0) & (top_p <= 1)).all():
        raise ValueError(f"draw: temperature={temperature.tolist()} must be >= 0 and top_p={top_p.tolist()} in (0, 1]")


def ids(model: Model, prompts: Prompts) -> None:
    """Lengths and ids of the prompts, where this host has them.

    Raises:
        ValueError: they are not as they must be.
    """
    tokens, length = prompts.tokens, prompts.length
    if not all(isinstance(x, np.ndarray) or x.is_fully_addressable for x in (tokens, length)):
        return  # another host holds a part of them
    tokens, length = np.asarray(tokens), np.asarray(length)
    width = tokens.shape[1]
    if length.min() < 1 or length.max() > width:
        raise ValueError(
            f"prompt lengths {length.min()} .. {length.max()} must be in 1 .. {width}, the width of the rows: "
            "begin every prompt with a BOS token, and cut long ones"
        )
    outside = (np.arange(width) < length[:, None]) & ((tokens < 0) | (tokens >= model.vocab_size))
    if outside.any():
        row, place = np.argwhere(outside)[0]
        raise ValueError(
            f"prompt {row} has the id {tokens[row, place]} at place {place}, outside the vocabulary 0 .. "
            f"{model.vocab_size - 1}: is its tokenizer that of the model?"
        )


def memory(size: int) -> None:
    """Whether caches of so many bytes, over all devices, fit.

    Raises:
        ValueError: they do not.
    """
    mesh = jax.sharding.get_abstract_mesh()
    size //= 1 if mesh.empty else mesh.size
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    limit = limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > limit:
        raise ValueError(
            f"keys and values of all rows take {size / 2**30:.1f} GiB a device, more than its {limit / 2**30:.1f} GiB: set "
            "slots to fewer rows at a time, or cache.dtype to bfloat16 or int8, or lower max_tokens"
        )


def stops(model: Model, spec: SamplingSpec, stop_table: jax.Array | None) -> None:
    """The table of the stop strings.

    Raises:
        ValueError: there is none, or it is that of a smaller vocabulary.
    """
    if spec.stop_strings and (stop_table is None or stop_table.shape[1] < model.vocab_size):
        raise ValueError(
            f"stop_strings={spec.stop_strings} need a stop_table with a column for each of {model.vocab_size} ids: "
            "stop_strings.table(spec.stop_strings, tokenizer.pieces(), model.vocab_size)"
        )
