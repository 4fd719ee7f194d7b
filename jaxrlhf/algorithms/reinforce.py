"""REINFORCE with a choice of baselines, and as presets ReMax and REINFORCE++.

Williams 1992. ReMax (Li et al. 2024) takes the score of the prompt's greedy response for the baseline; REINFORCE++ (Hu et
al. 2025) none, but normalises the advantages of all tokens of the batch and clips as PPO does; with a baseline it takes the
mean of the group and puts the KL into the loss.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms import advantages, checks, kl, offpolicy, policy, shaping, surrogate
from jaxrlhf.core import masking
from jaxrlhf.core.types import Experience, Outputs, Term


@dataclasses.dataclass(frozen=True)
class Config:
    samples: int = 1  # responses to a prompt
    baseline: Literal["none", "batch", "group", "greedy"] = "batch"  # what a score is measured against
    kl_coef: float = 0.05
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: kl.Estimator = "k1"
    gamma: float = 1.0
    whiten_advantages: bool = False
    reduction: surrogate.Reduction = "width"  # a sum over tokens, as the gradient of log policy(response) is
    clip: policy.Clip = policy.Clip(low=None)
    score: shaping.Config = shaping.Config()
    importance: offpolicy.Config | None = None  # weigh tokens by policy / sampled; None: only report
    epochs: int = 1  # passes over one rollout
    minibatches: int = 1  # optimizer steps a pass

    def __post_init__(self):
        checks.at_least(self, 2 if self.baseline == "group" else 1, "samples")
        checks.at_least(self, 1, "epochs", "minibatches")
        checks.at_least(self, 0, "kl_coef")
        checks.within(self, 0, 1, "gamma")


REINFORCE = Config()
REMAX = Config(baseline="greedy")
REINFORCE_PP = Config(baseline="none", whiten_advantages=True, reduction="token", clip=policy.Clip())
REINFORCE_PP_BASELINE = dataclasses.replace(REINFORCE_PP, samples=4, baseline="group", kl_in="loss", kl_estimator="k2")

Batch = policy.Batch


def init(config: Config) -> tuple:
    """Nothing survives from one rollout to the next."""
    return ()


def prepare(experience: Experience, state: tuple, config: Config) -> tuple[Batch, tuple, dict[str, Array]]:
    """Advantage of a token: the return from there on, where the last token earns the score less the baseline.

    Source: Williams 1992; Li et al. 2024, algorithm 1; Hu et al. 2025, equations 7 to 9.

    Raises:
        ValueError: a greedy baseline without `Experience.baseline`.
    """
    mask = policy.written(experience)
    counted = mask.any(axis=1)
    score = shaping.score(experience.score, experience.rollout.finished, config.score)
    token_kl = kl.estimate(experience.logprobs, experience.ref_logprobs, mask, config.kl_estimator, experience.ref_kl)
    kl_coef = config.kl_coef if config.kl_in == "reward" else 0.0
    rewards = shaping.token_rewards(score - _baseline(score, experience, counted, config), token_kl, mask, kl_coef)
    advantage = advantages.returns_to_go(rewards, mask, config.gamma)
    if config.whiten_advantages:
        advantage = masking.whiten(advantage, mask)
    batch, off_policy = policy.batch(experience, mask, advantage, config.importance)
    return batch, state, policy.report(experience, mask) | off_policy


def _baseline(
    score: Float[Array, " b"], experience: Experience, counted: Bool[Array, " b"], config: Config
) -> Float[Array, " b"]:
    if config.baseline == "greedy":
        checks.given(experience, "baseline='greedy'", "baseline")
        # In the unit of the scores; the greedy response counts as ended, so that only a drawn one pays for being cut.
        return shaping.score(jnp.asarray(experience.baseline), jnp.ones_like(counted), config.score)
    if config.baseline == "group":
        return advantages.group_mean(score, experience.rollout.group, counted)[0]
    mean = masking.masked_mean(score, counted) if config.baseline == "batch" else 0.0
    return jnp.full_like(score, mean)


def loss(outputs: Outputs, batch: Batch, config: Config) -> tuple[dict[str, Term], dict[str, Term]]:
    """-advantage * policy / old policy of each token, by option clipped, and the KL where it is in the loss: `policy.loss`."""
    kl_coef = config.kl_coef if config.kl_in == "loss" else 0.0
    return policy.loss(outputs, batch, config.clip, config.reduction, kl_coef, config.kl_estimator)
