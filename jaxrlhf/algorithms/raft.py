"""Reward-ranked fine-tuning (rejection sampling): of several responses to a prompt, learn to write the best.

Dong et al. 2023 ("RAFT"); the rejection sampling of Llama 2 (Touvron et al. 2023, section 3.2.3). No KL term: what holds
the policy near the reference is that it only ever sees its own samples, and few steps.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from jaxrlhf.algorithms import checks, lm, policy, shaping
from jaxrlhf.core.types import Experience, Outputs, Term


@dataclasses.dataclass(frozen=True)
class Config:
    samples: int = 8  # responses to a prompt, of which the best is learned
    score: shaping.Config = shaping.Config()
    epochs: int = 1  # passes over one rollout
    minibatches: int = 1  # optimizer steps a pass

    def __post_init__(self):
        checks.at_least(self, 2, "samples")
        checks.at_least(self, 1, "epochs", "minibatches")


RAFT = Config()

Batch = lm.Batch


def init(config: Config) -> tuple:
    """Nothing survives from one rollout to the next."""
    return ()


def prepare(experience: Experience, state: tuple, config: Config) -> tuple[Batch, tuple, dict[str, Array]]:
    """The best response of each group learns; of equal ones the first. Rows of weight 0 are never the best.

    Source: Dong et al. 2023, algorithm 1.
    """
    rollout = experience.rollout
    mask = policy.written(experience)
    counted = mask.any(axis=1)
    score = jnp.where(counted, shaping.score(experience.score, rollout.finished, config.score), -jnp.inf)
    same = rollout.group[:, None] == rollout.group[None, :]
    before = jnp.arange(len(score))[:, None] > jnp.arange(len(score))[None, :]
    beaten = same & ((score[None, :] > score[:, None]) | ((score[None, :] == score[:, None]) & before))
    best = counted & ~beaten.any(axis=1)
    batch = Batch(rollout.tokens, rollout.prompt_len, rollout.response_len, mask & best[:, None])
    metrics = policy.report(experience, mask) | {
        "reward/best": jnp.where(best, experience.score, 0.0).sum() / jnp.maximum(best.sum(), 1),
        "group/learned": best.mean(),
    }
    return batch, state, metrics


def loss(outputs: Outputs, batch: Batch, config: Config) -> tuple[dict[str, Term], dict[str, Term]]:
    """Negative log-likelihood of the best responses, nats a token: `lm.loss`."""
    return lm.loss(outputs, batch, lm.Config())
