"""Bradley-Terry ratings of checkpoints from people's choices between their answers, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxrlhf.feedback import store

ELO = 400 / math.log(10)  # Elo points of a natural-log unit of strength


class Rating(NamedTuple):
    """A checkpoint's rating in Elo points around a mean of 0, its 95 % interval, and in how many choices it took part."""

    checkpoint: str
    rating: float
    low: float
    high: float
    comparisons: int


def strengths(wins: Float[np.ndarray, "n n"], prior: float = 0.5) -> Float[np.ndarray, " n"]:
    """Log strengths, of mean 0, that make the wins likeliest; `wins[i, j]`: how often i was preferred to j, a tie half each.

    `prior`: wins and losses that each checkpoint has beforehand against an average one, so that one that always won stays
    finite. With 0 the likeliest strengths may not exist.
    Source: Bradley and Terry 1952; the prior as Caron and Doucet 2012. By Newton's method: the likelihood is concave.

    Raises:
        ValueError: a negative count, or no likeliest strengths.
    """
    if (wins < 0).any() or prior < 0:
        raise ValueError(f"wins={wins.tolist()} with prior={prior}: counts are >= 0")
    played, found = wins + wins.T, np.zeros(len(wins))
    for _ in range(100):
        chance, average = 1 / (1 + np.exp(found - found[:, None])), 1 / (1 + np.exp(-found))
        slope = (wins - played * chance).sum(axis=1) + prior - 2 * prior * average
        bend = played * chance * (1 - chance)
        curvature = np.diag(bend.sum(axis=1) + 2 * prior * average * (1 - average)) - bend
        step = np.clip(np.linalg.pinv(curvature) @ slope, -2, 2)  # without a prior the common offset is free: pinv leaves it
        found = found + step
        if np.abs(step).max() < 1e-10 and np.abs(found).max() < 30:  # odds of e^30 are a curvature rounded to nothing
            return found - found.mean()
    raise ValueError("no likeliest strengths: a checkpoint won or lost all its comparisons; give a prior > 0")


def ratings(choices: Sequence[store.Choice], pairs: Mapping[str, store.Pair], draws: int = 200, seed: int = 0) -> list[Rating]:
    """Ratings of the checkpoints whose answers were compared, best first; empty where no two checkpoints were.

    Ties and two bad ones are half a win each; skips, and pairs of one checkpoint's own answers, do not count. Intervals:
    percentiles over `draws` bootstrap samples of the pairs (not of the choices: those on one pair are not independent).
    """
    played = [(choice, pairs[choice.pair]) for choice in choices if choice.choice != "skip"]
    played = [(choice, pair) for choice, pair in played if pair.checkpoint_a != pair.checkpoint_b]
    if not played:
        return []
    first, second = ([getattr(pair, f"checkpoint_{side}") for _, pair in played] for side in "ab")
    names, number = np.unique([first, second], return_inverse=True)
    number = number.reshape(2, -1)
    _, game = np.unique([choice.pair for choice, _ in played], return_inverse=True)
    share = np.array([{"a": 1.0, "b": 0.0, None: 0.5}[choice.preferred] for choice, _ in played])

    def table(weight: Float[np.ndarray, " games"]) -> Float[np.ndarray, "n n"]:
        """Wins, where each pair counts so often."""
        wins = np.zeros((len(names), len(names)))
        np.add.at(wins, (number[0], number[1]), weight[game] * share)
        np.add.at(wins, (number[1], number[0]), weight[game] * (1 - share))
        return wins

    games, rng = game.max() + 1, np.random.default_rng(seed)
    sampled = [np.bincount(rng.integers(0, games, games), minlength=games).astype(np.float64) for _ in range(draws)]
    drawn = ELO * np.stack([strengths(table(weight)) for weight in sampled])
    whole = table(np.ones(games))
    middle, comparisons = ELO * strengths(whole), (whole + whole.T).sum(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    counted = comparisons.round().astype(int)
    rows = zip(*(values.tolist() for values in (names, middle, low, high, counted)), strict=True)
    return sorted((Rating(*row) for row in rows), key=lambda rating: -rating.rating)
