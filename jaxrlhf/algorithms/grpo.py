"""Group-relative policy optimisation: no value function; a response is measured against the others to its prompt.

Shao et al. 2024 ("DeepSeekMath"), and as presets what others changed: Dr. GRPO (Liu et al. 2025), DAPO (Yu et al. 2025),
GSPO (Zheng et al. 2025). They differ in the deviation, the reduction, the limits of the ratio and its level.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from jaxrlhf.algorithms import advantages, checks, kl, offpolicy, policy, shaping, surrogate
from jaxrlhf.core import masking
from jaxrlhf.core.types import Experience, Outputs, Term


@dataclasses.dataclass(frozen=True)
class Config:
    samples: int = 8  # responses to a prompt
    divide_by_deviation: bool = True  # advantages over the deviation of their group
    reduction: surrogate.Reduction = "sequence"
    clip: policy.Clip = policy.Clip()
    kl_coef: float = 0.04  # of the KL to the reference in the loss
    kl_estimator: kl.Estimator = "k3"  # as published; its gradient is not the KL's, that of k2 and exact is
    drop_equal_groups: bool = False  # groups whose scores are all equal count nowhere, instead of adding zeros to a mean
    drop_cut: bool = False  # responses that did not end count nowhere
    score: shaping.Config = shaping.Config(missing_eos_penalty=0.0)
    overlong_buffer: int = 0  # last tokens of the width over which a long response loses more and more
    overlong_penalty: float = 1.0  # lost at full width
    importance: offpolicy.Config | None = None  # weigh tokens by policy / sampled; None: only report
    epochs: int = 1  # passes over one rollout
    minibatches: int = 1  # optimizer steps a pass

    def __post_init__(self):
        checks.at_least(self, 2, "samples")
        checks.at_least(self, 1, "epochs", "minibatches")
        checks.at_least(self, 0, "kl_coef", "overlong_buffer", "overlong_penalty")


GRPO = Config()
DR_GRPO = Config(divide_by_deviation=False, reduction="width", kl_coef=0.0)
# Filtering: DAPO samples on until a batch has enough groups that differ; here the others leave it, which gives the same
# gradient for the groups that are left.
DAPO = Config(reduction="token", clip=policy.Clip(high=0.28), kl_coef=0.0, drop_equal_groups=True, overlong_buffer=8)
GSPO = Config(clip=policy.Clip("response_mean", low=3e-4, high=4e-4), kl_coef=0.0)  # limits: their section 5.1

Batch = policy.Batch


def init(config: Config) -> tuple:
    """Nothing survives from one rollout to the next."""
    return ()


def prepare(experience: Experience, state: tuple, config: Config) -> tuple[Batch, tuple, dict[str, Array]]:
    """Advantages of a whole rollout: (score - mean of the group) / deviation of the group, at every token of a response.

    Rows of weight 0 leave, their group's mean and deviation too.
    Source: Shao et al. 2024, section 4.1.2.

    Raises:
        ValueError: the overlong buffer is wider than the responses.
    """
    rollout = experience.rollout
    width = experience.logprobs.shape[1]
    if config.overlong_buffer > width:
        raise ValueError(
            f"overlong_buffer={config.overlong_buffer} is wider than a response of at most {width} tokens: lower it"
        )
    score = shaping.score(experience.score, rollout.finished, config.score)
    if config.overlong_buffer:
        score -= shaping.overlong(rollout.response_len, width, config.overlong_buffer, config.overlong_penalty)
    mask = policy.written(experience)
    # A response without a token of the policy's has nothing to learn from, and would still move its group's mean.
    counted = mask.any(axis=1)
    advantage, differs = advantages.group_normalised(score, rollout.group, counted, config.divide_by_deviation)
    learned = counted & (differs | (not config.drop_equal_groups)) & (rollout.finished | (not config.drop_cut))
    spread = jnp.broadcast_to(advantage[:, None], mask.shape)
    batch, off_policy = policy.batch(experience, mask & learned[:, None], spread, config.importance)
    metrics = (
        policy.report(experience, mask)
        | off_policy
        | {
            "group/differs": masking.masked_mean(differs.astype(jnp.float32), counted),
            "group/learned": learned.mean(),
        }
    )
    return batch, state, metrics


def loss(outputs: Outputs, batch: Batch, config: Config) -> tuple[dict[str, Term], dict[str, Term]]:
    """Clipped policy loss and the KL to the reference: `policy.loss`. Source: Shao et al. 2024, equation 3; see the presets."""
    return policy.loss(outputs, batch, config.clip, config.reduction, config.kl_coef, config.kl_estimator)
