"""Learning a score from choices: pairs, ties, the best of several, and a weak pull of the scores towards zero.

A set holds N texts, scored once each; `preferred[i, j]` says with what weight text i was chosen over text j. So 64 rated
texts give some thousand pairs for the price of 64 forward passes, and a pair of responses is the case N = 2.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms import pairwise
from jaxrlhf.core import masking
from jaxrlhf.core.types import Outputs, Preferences, Term


@dataclasses.dataclass(frozen=True)
class Config:
    centre_coef: float = 1e-3  # times the mean square of the scores; pairs leave their common offset free
    smoothing: float = 0.0  # probability that a choice was meant the other way
    ties: pairwise.Ties = "half"  # a tie is half a choice each way, or an outcome of its own by Davidson or by Rao and Kupper
    tie_probability: float = 1 / 3  # of two texts of equal score, where ties are an outcome of their own
    length_coef: float = 0.0  # logit a response token that length alone earns in a choice; the score learns the rest

    def __post_init__(self):
        if not 0 <= self.smoothing < 0.5:
            raise ValueError(f"smoothing={self.smoothing} must be in [0, 0.5); at 0.5 a choice says nothing")
        if self.centre_coef < 0:
            raise ValueError(f"centre_coef={self.centre_coef} must be >= 0; 0 turns centring off")
        if self.ties not in ("half", "davidson", "rao_kupper"):
            raise ValueError(f"ties='{self.ties}' must be half, davidson or rao_kupper")
        if not 0 < self.tie_probability < 1:
            raise ValueError(f"tie_probability={self.tie_probability} must be in (0, 1); without ties set ties='half'")


@struct.dataclass
class Batch:
    """Sets of texts. For an ensemble each field may have an axis of members [B, M, ...]: what each of them learns from."""

    tokens: jax.Array  # [B, N, T] int32
    prompt_len: jax.Array  # [B, N] int32
    response_len: jax.Array  # [B, N] int32
    preferred: jax.Array  # [B, N, N] float32, weight with which i is preferred to j; 0: no choice was made
    margin: jax.Array | None = None  # [B, N, N] float32, by how much i's score should lead j's
    tied: jax.Array | None = None  # [B, N, N] float32, weight with which i and j were called equal, on either side or both
    best: jax.Array | None = None  # [B] int32, the text chosen from all that have a response; -1: none was


# What a field of a single model's batch has, so that an axis of members is seen.
_RANK = {"tokens": 3, "prompt_len": 2, "response_len": 2, "preferred": 3, "margin": 3, "tied": 3, "best": 1}


def from_preferences(preferences: Preferences, ties: pairwise.Ties = "half") -> Batch:
    """Pairs that a person chose from. A label between 0 and 1 counts both ways, and so does a tie where ties='half'.

    `margin` is by how much response 0 should lead, so its sign turns when the pair is read from response 1.

    Raises:
        ValueError: sets of more or fewer than two responses.
    """
    if preferences.tokens.shape[1] != 2:
        raise ValueError(
            f"from_preferences: sets of {preferences.tokens.shape[1]} responses, but a label compares 2; "
            "for larger sets fill Batch.preferred"
        )
    label = jnp.where(preferences.tie, 0.5, preferences.label)
    decided = preferences.weight if ties == "half" else jnp.where(preferences.tie, 0.0, preferences.weight)
    forward, backward = decided * label, decided * (1.0 - label)
    zero = jnp.zeros_like(forward)
    margin = jnp.stack([zero, preferences.margin, -preferences.margin, zero], axis=-1).reshape(-1, 2, 2)
    preferred = jnp.stack([zero, forward, backward, zero], axis=-1).reshape(-1, 2, 2)
    rows = (preferences.tokens, preferences.prompt_len, preferences.response_len)
    if ties == "half":
        return Batch(*rows, preferred, margin)
    tied = jnp.stack([zero, preferences.weight - decided, zero, zero], axis=-1).reshape(-1, 2, 2)
    return Batch(*rows, preferred, margin, tied)


def _differences(scores: Float[Array, "b n"], pair: Bool[Array, "b n n"]) -> Float[Array, "b n n"]:
    return jnp.where(pair, scores[:, :, None] - scores[:, None, :], 0.0)


def loss(outputs: Outputs, batch: Batch, config: Config) -> tuple[dict[str, Term], dict[str, Term]]:
    """Mean over weighted pairs of -log P(choice or tie), mean over sets of -log P(best), and `centre_coef` times the mean
    square score of the texts compared.

    Reads `outputs.scores` [B, N], or [M, B, N] of an ensemble: then every term holds M sums and counts, and what the step
    minimises is the sum of the members' own losses. A text in no choice does not count. Accuracy: an equal score is wrong.
    With `length_coef` the logit of a choice is score + length_coef * tokens, so that the score need not pay for length.
    Source: algorithms/pairwise.py; centring from Eisenstein et al. 2023, section 5 (there on the sum of a pair's scores);
    best of n: Ziegler et al. 2019, equation 1; length: product of experts, Clark et al. 2019, section 3.2.

    Raises:
        ValueError: the outputs hold no scores.
    """
    scores = outputs.scores
    if scores is None:
        raise ValueError("reward.loss needs Outputs.scores: ask the objective for them")
    if scores.ndim == 2:
        return _loss(scores, batch, config)
    own = {name: 1 if getattr(getattr(batch, name), "ndim", 0) > rank else None for name, rank in _RANK.items()}
    return jax.vmap(lambda s, b: _loss(s, b, config), in_axes=(0, Batch(**own)))(scores, batch)  # type: ignore[arg-type]


def _loss(scores: Float[Array, "b n"], batch: Batch, config: Config) -> tuple[dict[str, Term], dict[str, Term]]:
    pair = batch.preferred > 0
    tie = jnp.zeros_like(pair) if batch.tied is None else batch.tied > 0
    compared = (pair | tie).any(axis=2) | (pair | tie).any(axis=1)
    logits = scores + config.length_coef * batch.response_len if config.length_coef else scores
    led = _differences(logits, pair | tie)
    if batch.margin is not None:
        led = led - jnp.where(pair | tie, batch.margin, 0.0)
    chosen, tied = pairwise.choice(led, config.smoothing, config.ties, config.tie_probability)
    count = decided = batch.preferred.sum()
    total = (batch.preferred * chosen).sum()
    if batch.tied is not None:
        total, count = total + (batch.tied * tied).sum(), count + batch.tied.sum()
    terms = {"loss/pairs": Term(total, count)}
    if batch.best is not None:
        given = batch.best >= 0
        candidates = (batch.response_len > 0) & given[:, None]
        terms["loss/best"] = Term(_best(logits, batch.best, candidates), given.sum().astype(jnp.float32))
        compared = compared | candidates
    texts = compared.sum().astype(jnp.float32)
    terms["loss/centre"] = Term(
        masking.masked_sum(jnp.square(masking.masked(scores, compared)), compared), texts, config.centre_coef
    )
    difference = _differences(scores, pair)
    metrics = {
        "reward/accuracy": Term((batch.preferred * (difference > 0).astype(jnp.float32)).sum(), decided),
        "reward/margin": Term((batch.preferred * difference).sum(), decided),
        "reward/score": Term(masking.masked_sum(scores, compared), texts),
    }
    return terms, metrics


def _best(logits: Float[Array, "b n"], best: Array, candidates: Bool[Array, "b n"]) -> Float[Array, ""]:
    """Sum over the sets with a choice of -log softmax over the candidates, at the one chosen."""
    # Finite where there is no candidate: the gradient of a softmax over none would be NaN.
    kept = jnp.where(candidates, logits, -1e30)
    chosen = jnp.take_along_axis(kept, jnp.maximum(best, 0)[:, None], axis=1)[:, 0]
    return masking.masked_sum(jax.nn.logsumexp(kept, axis=1) - chosen, best >= 0)
