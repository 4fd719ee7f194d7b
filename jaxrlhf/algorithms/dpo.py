"""Direct preference optimisation: from choices between two responses to a policy, without a reward model.

Rafailov et al. 2023. The implicit reward of a response is beta (log policy - log reference), summed over its tokens; the loss
is that of a Bradley-Terry model of the choices with this reward, so that its optimum is the KL-regularised one. IPO, cDPO,
robust DPO, hinge and SimPO are presets; online DPO makes its pairs by `from_experience`.

Log-probs of policy and reference must be of one distribution: the plain softmax for texts that somebody else wrote, the
sampling policy (temperature and constraints, no filters: what `Experience.ref_logprobs` are of) for pairs of one's own. The
objective is given the same `spec`, or none.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxrlhf.algorithms import checks, pairwise, preference
from jaxrlhf.core import masking
from jaxrlhf.core.types import Experience, Outputs, Preferences, Term


@dataclasses.dataclass(frozen=True)
class Config:
    beta: float = 0.1  # implicit reward per nat; in IPO the regularisation tau
    loss: Literal["sigmoid", "robust", "hinge", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0  # share of choices taken to be the wrong way round: cDPO with sigmoid, or robust
    reduction: preference.Reduction = "sum"  # log-prob of a response: sum or mean over its tokens
    reference: bool = True  # False: the implicit reward is beta log policy alone
    gamma: float = 0.0  # SimPO: by how much the chosen one's reward shall lead
    nll_coef: float = 0.0  # of the chosen response's negative log-likelihood per token

    def __post_init__(self):
        checks.above(self, 0, "beta")
        checks.at_least(self, 0, "gamma", "nll_coef")
        e = self.label_smoothing
        if not 0 <= e < 0.5:
            raise ValueError(f"label_smoothing={e} must be in [0, 0.5); at 0.5 a choice says nothing")
        if e and self.loss in ("hinge", "ipo"):
            raise ValueError(f"label_smoothing={e} with loss='{self.loss}': only sigmoid and robust have it; set it to 0")
        if self.loss == "robust" and not e:
            raise ValueError("loss='robust' with label_smoothing=0 is plain DPO: set loss='sigmoid', or label_smoothing > 0")
        if self.gamma and (self.reference or self.loss != "sigmoid" or e):
            raise ValueError(
                f"gamma={self.gamma} is SimPO's: set reference=False, loss='sigmoid', label_smoothing=0 beside it, or gamma=0"
            )


DPO = Config()
CDPO = Config(label_smoothing=0.1)
ROBUST = Config(loss="robust", label_smoothing=0.1)
HINGE = Config(loss="hinge")
IPO = Config(loss="ipo", reduction="mean")  # as TRL, whose authors asked IPO's; OpenRLHF takes sums: reduction="sum"
SIMPO = Config(beta=2.0, gamma=1.0, reduction="mean", reference=False)


@struct.dataclass
class Batch:
    tokens: jax.Array  # [B, 2, T] int32
    prompt_len: jax.Array  # [B, 2] int32
    response_len: jax.Array  # [B, 2] int32
    mask: jax.Array  # [B, 2, R] bool, response tokens of the pairs that count
    label: jax.Array  # [B], probability that response 0 is preferred
    weight: jax.Array  # [B], 0 leaves the pair out
    ref_logprobs: jax.Array | None  # [B, 2, R]; None without a reference


def prepare(preferences: Preferences, state: tuple, config: Config) -> tuple[Batch, tuple, dict[str, Array]]:
    """The pairs that count: identical ones are left out and counted. There is no state.

    `margin` is not read. Without a reference R = T - 1.

    Raises:
        ValueError: no reference log-probs where the loss needs them, or sets of other than two responses.
    """
    reference = preferences.ref_logprobs
    if config.reference and reference is None:
        raise ValueError(
            "DPO needs Preferences.ref_logprobs: fill them by rollout.batch_logprobs, or set reference=False (SimPO)"
        )
    width = preferences.tokens.shape[-1] - 1 if reference is None else reference.shape[-1]
    mask, label, weight, metrics = preference.pairs(preferences, width)
    batch = Batch(
        tokens=jnp.asarray(preferences.tokens),
        prompt_len=jnp.asarray(preferences.prompt_len),
        response_len=jnp.asarray(preferences.response_len),
        mask=mask,
        label=label,
        weight=weight,
        ref_logprobs=masking.masked(jnp.asarray(reference), mask) if config.reference else None,
    )
    return batch, state, metrics


def from_experience(experience: Experience, n: int, soft: bool = False) -> Preferences:
    """Pairs for online DPO: of the n responses to each prompt (one `rollout.group`) the best and the worst by score.

    Responses of weight 0 take no part; prompts whose scores are all equal, or not n in number, get weight 0. The label is 1,
    or with `soft` the Bradley-Terry probability sigmoid(best - worst): right where the score is a log-odds, and then the
    optimum is the one of the KL-regularised score. Reference log-probs are carried over, so they are of the sampling policy.
    Source: Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback", algorithm 1.

    Raises:
        ValueError: n < 2, n does not divide the rows, or the rollout holds tokens that the policy did not write.
    """
    rollout = experience.rollout
    rows = rollout.tokens.shape[0]
    if n < 2 or rows % n:
        raise ValueError(f"n={n} responses a prompt of {rows} rows: n must be at least 2 and divide the rows")
    if rollout.written is not None:
        raise ValueError("online DPO: Rollout.written marks tokens of others, which Preferences cannot hold: use PPO or GRPO")
    order = jnp.argsort(rollout.group, stable=True).reshape(-1, n)
    group, score = rollout.group[order], experience.score[order]
    eligible = (experience.weight[order] > 0) & (group == group[:, :1]).all(axis=1, keepdims=True)
    high, low = jnp.where(eligible, score, -jnp.inf), jnp.where(eligible, score, jnp.inf)
    lead = high.max(axis=1) - low.min(axis=1)
    counted = jnp.isfinite(lead) & (lead > 0)
    best_worst = jnp.stack([high.argmax(axis=1), low.argmin(axis=1)], axis=1)
    chosen = jnp.take_along_axis(order, best_worst, axis=1)  # [prompts, 2] rows
    zeros = jnp.zeros(len(order))
    return Preferences(
        tokens=rollout.tokens[chosen],
        prompt_len=rollout.prompt_len[chosen],
        response_len=rollout.response_len[chosen],
        label=jax.nn.sigmoid(masking.masked(lead, counted)) if soft else zeros + 1.0,
        tie=zeros > 0,
        weight=counted.astype(jnp.float32),
        margin=zeros,
        ref_logprobs=experience.ref_logprobs[chosen],
    )


def _of_choice(lead: Float[Array, " b"], config: Config) -> Float[Array, " b"]:
    """Loss of a choice, where `lead` is the chosen response's log-ratio less the rejected one's.

    Source: sigmoid Rafailov et al. 2023, equation 7; smoothed E. Mitchell 2023, "A note on DPO with noisy preferences";
    gamma Meng et al. 2024 (SimPO), equation 6; robust Chowdhury et al. 2024 (rDPO), section 3; hinge SLiC as normalised by a
    reference in Liu et al. 2023 (RSO), section 3; ipo Azar et al. 2023, equation 17.
    """
    reward = config.beta * lead
    e = config.label_smoothing
    match config.loss:
        case "sigmoid":
            return pairwise.bradley_terry(reward - config.gamma, e)
        case "robust":
            return ((1.0 - e) * pairwise.bradley_terry(reward) - e * pairwise.bradley_terry(-reward)) / (1.0 - 2.0 * e)
        case "hinge":
            return jax.nn.relu(1.0 - reward)
        case "ipo":
            return jnp.square(lead - 0.5 / config.beta)


def loss(outputs: Outputs, batch: Batch, config: Config) -> tuple[dict[str, Term], dict[str, Term]]:
    """Mean over weighted pairs of the loss expected under the label, and by option the chosen one's likelihood.

    Reads `outputs.logprobs` [B, 2, R]. A label between 0 and 1 counts both ways.
    Source: see `_of_choice`; likelihood term Pang et al. 2024 (iterative RPO), equation 1.

    Raises:
        ValueError: the outputs hold no log-probs.
    """
    checks.given(outputs, "dpo.loss", "logprobs")
    policy = preference.response_logprob(outputs.logprobs, batch.mask, config.reduction)  # [B, 2]
    ratio = policy
    if batch.ref_logprobs is not None:
        ratio = policy - preference.response_logprob(batch.ref_logprobs, batch.mask, config.reduction)
    lead = ratio[:, 0] - ratio[:, 1]
    label = jnp.where(batch.weight > 0, batch.label, 0.5)
    expected = label * _of_choice(lead, config) + (1.0 - label) * _of_choice(-lead, config)
    terms = {"loss/dpo": preference.weighted_mean(expected, batch.weight)}
    if config.nll_coef > 0:
        per_token = preference.response_logprob(outputs.logprobs, batch.mask, "mean")
        nll = -(label * per_token[:, 0] + (1.0 - label) * per_token[:, 1])
        terms["loss/nll"] = preference.weighted_mean(nll, batch.weight, config.nll_coef)
    return terms, preference.choice_metrics(config.beta * ratio, label, batch.weight)
