"""REINFORCE leave-one-out: the baseline of a response is the mean reward of the others to its prompt.

Kool et al. 2019; Ahmadian et al. 2024 ("Back to basics"). The whole response is one action: its reward is the score minus
the KL coefficient times the KL of the response, its log-prob the sum over its tokens.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from jaxrlhf.algorithms import advantages, checks, kl, offpolicy, policy, shaping
from jaxrlhf.core import masking
from jaxrlhf.core.types import Experience, Outputs, Term


@dataclasses.dataclass(frozen=True)
class Config:
    samples: int = 4  # responses to a prompt
    kl_coef: float = 0.05  # reward lost per nat of KL to the reference
    kl_estimator: kl.Estimator = "k1"
    clip: policy.Clip = policy.Clip("response")  # acts from the second update on a rollout on, as in TRL `RLOOTrainer`
    whiten_advantages: bool = False
    score: shaping.Config = shaping.Config()
    importance: offpolicy.Config | None = None  # weigh responses by policy / sampled; None: only report
    epochs: int = 1  # passes over one rollout
    minibatches: int = 1  # optimizer steps a pass

    def __post_init__(self):
        checks.at_least(self, 2, "samples")
        checks.at_least(self, 1, "epochs", "minibatches")
        checks.at_least(self, 0, "kl_coef")
        if self.importance is not None and self.importance.level != "response":
            raise ValueError("importance.level='token': the action of RLOO is the whole response, so set it to 'response'")


RLOO = Config()

Batch = policy.Batch


def init(config: Config) -> tuple:
    """Nothing survives from one rollout to the next."""
    return ()


def prepare(experience: Experience, state: tuple, config: Config) -> tuple[Batch, tuple, dict[str, Array]]:
    """Advantage: reward - mean reward of the others of its group = k / (k - 1) (reward - mean of all k).

    A response that is alone in its group, because the others have weight 0, has no baseline and leaves.
    Source: Ahmadian et al. 2024, equation 8.
    """
    rollout = experience.rollout
    mask = policy.written(experience)
    counted = mask.any(axis=1)
    score = shaping.score(experience.score, rollout.finished, config.score)
    token_kl = kl.estimate(experience.logprobs, experience.ref_logprobs, mask, config.kl_estimator, experience.ref_kl)
    reward = score - config.kl_coef * token_kl.sum(axis=1)
    baseline, others = advantages.group_mean(reward, rollout.group, counted, leave_out=True)
    learned = counted & (others > 0)
    advantage = masking.masked(reward - baseline, learned)
    if config.whiten_advantages:
        advantage = masking.whiten(advantage, learned)
    spread = jnp.broadcast_to(advantage[:, None], mask.shape)
    batch, off_policy = policy.batch(experience, mask & learned[:, None], spread, config.importance)
    metrics = (
        policy.report(experience, mask)
        | off_policy
        | {
            "reward/total": masking.masked_mean(reward, counted),
            "group/learned": learned.mean(),
        }
    )
    return batch, state, metrics


def loss(outputs: Outputs, batch: Batch, config: Config) -> tuple[dict[str, Term], dict[str, Term]]:
    """Mean over responses of -advantage * policy / old policy of the whole response: `policy.loss`.

    On the first update of a rollout the ratio is 1, and the gradient that of -advantage * log policy(response).
    Source: Ahmadian et al. 2024, equations 6 and 8.
    """
    return policy.loss(outputs, batch, config.clip, "sequence", 0.0, config.kl_estimator)
