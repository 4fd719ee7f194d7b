"""What a reward model learns from: sets of texts that people rated, and pairs between which they chose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import preference_data
from jaxrlhf.algorithms import pairwise
from jaxrlhf.data import comparisons, human_sentiment
from jaxrlhf.data.human_sentiment import DOMAINS
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.rewards import ensemble as ensembles
from jaxrlhf.training.run import Run

if TYPE_CHECKING:
    from experiments.reward_model import Config


def dataset(config: Config, tokenizer: Tokenizer, window: int = 12, run: Run | None = None) -> tuple[Any, list[dict[str, Any]]]:
    """`dataset[step]`: a set of rated texts, with chosen pairs where there are any; and the pairs that are held out."""
    ratings = [rating for rating in human_sentiment.load("train") if rating.domain in config.domains]
    if not ratings:
        raise ValueError(f"domains={config.domains}: no ratings; choose from {', '.join(DOMAINS)}")
    rated = comparisons.rated_rows(ratings, tokenizer, config.width)
    widths = comparisons.choose_widths(rated["length"], config.texts, count=config.widths)
    pairs, held_out = None, []
    if config.choices is not None:
        pairs, held_out = chosen_pairs(config, config.choices, tokenizer, run)

    def sets(seed: int) -> Any:
        if pairs is None:
            return comparisons.rated_sets(rated, config.texts, seed, widths, window)
        size = (config.texts, config.pairs)
        return comparisons.compared_sets(rated, pairs, size, seed, widths, window, ties=config.algorithm.ties != "half")

    if config.several is not None:
        return of_members(config.several, sets, config.seed), held_out
    return sets(config.seed), held_out


def of_members(several: ensembles.Config, sets: Callable[[int], Any], seed: int) -> Any:
    """The data of an ensemble from `sets(seed)`: an order for each model or adapter, or a bootstrap for each head."""
    if several.of != "heads":
        return comparisons.stacked_sets([sets(seed + 1000 * m) for m in range(several.members)])
    return comparisons.bootstrapped_sets(sets(seed), several.members, seed)


def chosen_pairs(
    config: Config, choices: Path, tokenizer: Tokenizer, run: Run | None = None
) -> tuple[Any, list[dict[str, Any]]]:
    """The choices to learn from, and those held out."""
    found = preference_data.read(choices, config.algorithm.ties != "half", run, config.skip_bad)
    rows = comparisons.fitting(found, tokenizer, config.width)
    if len(rows) < config.pairs:
        raise ValueError(f"{choices}: {len(rows)} choices, but a set takes {config.pairs}: make more with label.py")
    order = np.random.default_rng(config.seed).permutation(len(rows))
    cut = int(len(rows) * config.held_out_pairs)
    held_out, train = ([rows[i] for i in part] for part in (order[:cut], order[cut:]))
    return comparisons.preference_rows(train, tokenizer, config.width), [dict(row) for row in held_out if not row["tie"]]


def length_coef(config: Config, tokenizer: Tokenizer, run: Run | None = None, sets: int = 40) -> float:
    """What length alone is worth in the choices of some sets; those to learn from are of nearly equal length each."""
    data, _ = dataset(dataclasses.replace(config, ensemble=1), tokenizer, 1, run)
    seen = [data[i] for i in range(sets)]
    preferred, length = (np.concatenate([one[name] for one in seen]) for name in ("preferred", "response_len"))
    return pairwise.fit_length(preferred, length)
