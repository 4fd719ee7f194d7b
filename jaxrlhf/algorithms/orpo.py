"""ORPO: fine-tuning on the chosen response and away from the rejected one at once, without a reference (Hong et al. 2024).

The loss is the negative log-likelihood of the chosen response plus `odds_coef` times -log sigmoid of the log odds ratio, where
a response's probability is the geometric mean of its tokens'.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxrlhf.algorithms import checks, pairwise, preference
from jaxrlhf.core import masking
from jaxrlhf.core.types import Outputs, Preferences, Term

# The odds of a certain response are infinite: above this mean log-prob they count as constant, and have no gradient.
CERTAIN = -1e-6


@dataclasses.dataclass(frozen=True)
class Config:
    odds_coef: float = 0.1  # lambda, of the odds-ratio term

    def __post_init__(self):
        checks.at_least(self, 0, "odds_coef")


@struct.dataclass
class Batch:
    tokens: jax.Array  # [B, 2, T] int32
    prompt_len: jax.Array  # [B, 2] int32
    response_len: jax.Array  # [B, 2] int32
    mask: jax.Array  # [B, 2, R] bool, response tokens of the pairs that count
    label: jax.Array  # [B], probability that response 0 is preferred
    weight: jax.Array  # [B], 0 leaves the pair out


def prepare(preferences: Preferences, state: tuple, config: Config) -> tuple[Batch, tuple, dict[str, Array]]:
    """The pairs that count: identical ones, and those with an empty response, are left out and counted. There is no state.

    `margin` and `ref_logprobs` are not read.

    Raises:
        ValueError: sets of other than two responses.
    """
    del config
    response_len = jnp.asarray(preferences.response_len)
    mask, label, weight, metrics = preference.pairs(preferences, preferences.tokens.shape[-1] - 1)
    empty = (response_len == 0).any(axis=1)  # no tokens, hence no geometric mean
    metrics = metrics | {
        "preferences/pairs": ((weight > 0) & ~empty).sum().astype(jnp.float32),
        "preferences/empty": ((weight > 0) & empty).sum().astype(jnp.float32),
    }
    batch = Batch(
        tokens=jnp.asarray(preferences.tokens),
        prompt_len=jnp.asarray(preferences.prompt_len),
        response_len=response_len,
        mask=mask & ~empty[:, None, None],
        label=label,
        weight=jnp.where(empty, 0.0, weight),
    )
    return batch, state, metrics


def log_odds(logprob: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """log(p / (1 - p)) of a log-prob, which counts as at most CERTAIN.

    Source: Hong et al. 2024, equations 4 and 5.
    """
    logprob = jnp.minimum(logprob, CERTAIN)
    return logprob - jnp.log(-jnp.expm1(logprob))  # 1 - exp(x) would lose all digits near 0


def loss(outputs: Outputs, batch: Batch, config: Config) -> tuple[dict[str, Term], dict[str, Term]]:
    """Negative log-likelihood per token of the chosen responses, and the odds-ratio loss per pair.

    Reads `outputs.logprobs` [B, 2, R]. A label between 0 and 1 counts both ways, in both terms. The likelihood is of the
    response alone (the authors' code adds the prompt's), its mean over all chosen tokens of the optimizer batch.
    Source: Hong et al. 2024, equations 3 (length-normalised log-prob), 6 and 7.

    Raises:
        ValueError: the outputs hold no log-probs.
    """
    checks.given(outputs, "orpo.loss", "logprobs")
    label = jnp.where(batch.weight > 0, batch.label, 0.5)
    share = jnp.stack([batch.weight * label, batch.weight * (1.0 - label)], axis=1)  # [B, 2], of which response was chosen
    logprobs = masking.masked(outputs.logprobs, batch.mask)
    tokens = batch.mask.sum(axis=-1)
    odds = log_odds(preference.response_logprob(logprobs, batch.mask, "mean"))
    lead = odds[:, 0] - odds[:, 1]
    expected = label * pairwise.bradley_terry(lead) + (1.0 - label) * pairwise.bradley_terry(-lead)
    terms = {
        "loss/lm": Term((share * -logprobs.sum(axis=-1)).sum(), (share * tokens).sum()),
        "loss/odds": preference.weighted_mean(expected, batch.weight, config.odds_coef),
    }
    return terms, preference.choice_metrics(odds, label, batch.weight)
