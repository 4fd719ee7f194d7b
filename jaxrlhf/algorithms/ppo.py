"""Proximal policy optimisation of a language model against a score, held near a reference policy.

Ziegler et al. 2019 and Stiennon et al. 2020, with the details of Huang et al. 2024 ("The N+ implementation details of RLHF
with PPO"). Each response token is an action; the reward of a token is minus the KL coefficient times the KL estimate
there, and the last token also earns the score.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms import advantages, kl, surrogate
from jaxrlhf.core import masking
from jaxrlhf.core.types import Experience, Outputs, Term


@dataclasses.dataclass(frozen=True)
class Config:
    kl_coef: float = 0.1  # reward lost per nat of KL to the reference
    kl_estimator: kl.Estimator = "k1"
    kl_target: float | None = None  # nats per response that the coefficient is steered to; None: it stays as it is
    kl_horizon: float = 10_000.0  # responses over which the coefficient can change by 20 %
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2  # the ratio counts within 1 - clip and 1 + clip
    value_clip: float | None = 0.2  # None: plain squared error
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    missing_eos_penalty: float = 1.0  # taken off the score of a response that did not end by itself
    bootstrap: bool = False  # a cut response is continued by its value, instead of counting as ended
    score_clip: float | None = None  # scores are kept within +-score_clip, before the penalty
    whiten_rewards: bool = False  # scale to unit variance, mean kept
    whiten_advantages: bool = True
    epochs: int = 2  # passes over one rollout
    minibatches: int = 4  # optimizer steps a pass

    def __post_init__(self):
        for name in ("kl_coef", "clip", "value_coef", "entropy_coef", "missing_eos_penalty"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 0")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")
        for name in ("kl_target", "value_clip", "score_clip"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be > 0; None turns it off")
        for name in ("epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        if self.kl_horizon <= 0:
            raise ValueError(f"kl_horizon={self.kl_horizon} must be > 0 responses")


@struct.dataclass
class State:
    """What survives from one rollout to the next."""

    kl_coef: jax.Array  # [] float32


@struct.dataclass
class Batch:
    tokens: jax.Array  # [B, T] int32
    prompt_len: jax.Array  # [B] int32
    response_len: jax.Array  # [B] int32
    mask: jax.Array  # [B, R] bool, tokens that the policy wrote, of rows that count
    old_logprobs: jax.Array  # [B, R]
    old_values: jax.Array  # [B, R]
    advantages: jax.Array  # [B, R]
    returns: jax.Array  # [B, R]


def init(config: Config) -> State:
    """The state before the first rollout."""
    return State(jnp.asarray(config.kl_coef, jnp.float32))


def token_rewards(
    score: Float[Array, " b"], token_kl: Float[Array, "b r"], mask: Bool[Array, "b r"], kl_coef: Float[Array, ""]
) -> Float[Array, "b r"]:
    """Reward of each response token: -kl_coef * KL, plus the score at the last real one; 0 where masked.

    Source: Ziegler et al. 2019, equation 2, spread over the tokens as in their code.
    """
    last = mask & (jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)  # one real token from here to the end
    return masking.masked(jnp.where(last, score[:, None], 0.0) - kl_coef * token_kl, mask)


def _score(experience: Experience, config: Config) -> Float[Array, " b"]:
    score = experience.score
    if config.score_clip is not None:
        score = jnp.clip(score, -config.score_clip, config.score_clip)
    return score - config.missing_eos_penalty * ~experience.rollout.finished


def _variance(values: Float[Array, "*s"], mask: Bool[Array, "*s"]) -> Float[Array, ""]:
    return masking.masked_mean(jnp.square(values - masking.masked_mean(values, mask)), mask)


def _explained_variance(
    returns: Float[Array, "b r"], values: Float[Array, "b r"], mask: Bool[Array, "b r"]
) -> Float[Array, ""]:
    """Share of the returns' variance that the values foresaw: 1 at best, 0 for a constant, negative if worse than that."""
    return 1.0 - _variance(returns - values, mask) / jnp.maximum(_variance(returns, mask), 1e-8)


def prepare(experience: Experience, state: State, config: Config) -> tuple[Batch, State, dict[str, Array]]:
    """Rewards, advantages and returns of a whole rollout, the next KL coefficient, and what there is to report.

    Whitening and the controller look at the whole batch, so this runs before it is split.

    Raises:
        ValueError: the experience has no values.
    """
    if experience.values is None:
        raise ValueError("PPO needs Experience.values: collect with a value head (or use an algorithm without a critic)")
    rollout, width = experience.rollout, experience.logprobs.shape[1]
    counted = experience.weight > 0
    mask = masking.response_mask(rollout.response_len, width, rollout.written) & counted[:, None]
    score = _score(experience, config)
    token_kl = kl.estimate(experience.logprobs, experience.ref_logprobs, mask, config.kl_estimator)
    rewards = token_rewards(score, token_kl, mask, state.kl_coef)
    if config.whiten_rewards:
        rewards = masking.whiten(rewards, mask, shift_mean=False)
    bootstrap = jnp.where(counted & ~rollout.finished & config.bootstrap, experience.bootstrap, 0.0)
    advantage, returns = advantages.gae(rewards, experience.values, mask, bootstrap, config.gamma, config.lam)
    batch = Batch(
        tokens=rollout.tokens,
        prompt_len=rollout.prompt_len,
        response_len=rollout.response_len,
        mask=mask,
        old_logprobs=masking.masked(experience.logprobs, mask),
        old_values=masking.masked(experience.values, mask),
        advantages=masking.whiten(advantage, mask) if config.whiten_advantages else advantage,
        returns=returns,
    )
    sequence_kl = masking.masked_mean(kl.sequence_kl(experience.logprobs, experience.ref_logprobs, mask), counted)
    sequences = counted.sum().astype(jnp.float32)
    metrics = {
        "policy/kl_ref": sequence_kl,
        "policy/kl_coef": state.kl_coef,
        "reward/score": masking.masked_mean(experience.score, counted),
        "reward/score_std": jnp.sqrt(_variance(experience.score, counted)),
        "reward/total": masking.masked_mean(rewards.sum(axis=1), counted),
        "value/explained_variance": _explained_variance(returns, experience.values, mask),
        "rollout/length": mask.sum() / jnp.maximum(sequences, 1.0),
        "rollout/finished": masking.masked_mean(rollout.finished.astype(jnp.float32), counted),
    }
    if config.kl_target is not None:
        state = State(kl.adapt(state.kl_coef, sequence_kl, sequences, config.kl_target, config.kl_horizon))
    return batch, state, metrics


def loss(outputs: Outputs, batch: Batch, config: Config) -> tuple[dict[str, Term], dict[str, Term]]:
    """Clipped policy loss, clipped value loss and entropy bonus, each a mean over all real tokens of the optimizer batch.

    Reads `outputs.logprobs` and `outputs.values`, and `outputs.entropy` where there is a bonus (else only to report it).

    Raises:
        ValueError: an output that is read is missing.
    """
    if outputs.logprobs is None or outputs.values is None:
        raise ValueError("ppo.loss needs Outputs.logprobs and Outputs.values: ask the objective for both")
    log_ratio = surrogate.log_ratio(outputs.logprobs, batch.old_logprobs, batch.mask)
    policy, clipped = surrogate.clipped_policy(log_ratio, batch.advantages, batch.mask, config.clip, config.clip)
    value, value_clipped = surrogate.clipped_value(
        outputs.values, batch.old_values, batch.returns, batch.mask, config.value_clip
    )

    def mean(values, coefficient=1.0):
        return surrogate.token_mean(values.astype(jnp.float32), batch.mask, coefficient)

    terms = {"loss/policy": mean(policy), "loss/value": mean(value, config.value_coef)}
    metrics = {
        "policy/ratio": mean(jnp.exp(log_ratio)),
        "policy/clip_fraction": mean(clipped),
        "policy/approx_kl": mean(0.5 * jnp.square(log_ratio)),
        "value/clip_fraction": mean(value_clipped),
    }
    if config.entropy_coef > 0:
        if outputs.entropy is None:
            raise ValueError(f"entropy_coef={config.entropy_coef} needs Outputs.entropy: ask the objective for entropies")
        terms["loss/entropy"] = mean(-outputs.entropy, config.entropy_coef)
    if outputs.entropy is not None:
        metrics["policy/entropy"] = mean(outputs.entropy)
    return terms, metrics
