"""Proximal policy optimisation of a language model against a score, held near a reference policy.

Ziegler et al. 2019 and Stiennon et al. 2020, with the details of Huang et al. 2024 ("The N+ implementation details of RLHF
with PPO"). Each response token is an action; the reward of a token is minus the KL coefficient times the KL estimate
there, and the last token also earns the score. docs/details.md says of every switch where its default comes from.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from jaxrlhf.algorithms import advantages, checks, kl, offpolicy, policy, shaping, surrogate
from jaxrlhf.core import masking
from jaxrlhf.core.types import Experience, Outputs, Term


@dataclasses.dataclass(frozen=True)
class Config:
    kl_coef: float = 0.1  # reward lost per nat of KL to the reference
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: kl.Estimator = "k1"  # in the loss take k2 or exact: the gradient of the others is another
    kl_target: float | None = None  # nats per response that the coefficient is steered to; None: it stays as it is
    kl_horizon: float = 10_000.0  # responses over which the coefficient can change by 20 %
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2  # the ratio counts within 1 - clip and 1 + clip
    clip_high: float | None = None  # the upper limit is 1 + clip_high; None: clip serves for both
    dual_clip: float | None = None  # > 1: most that a negative advantage is multiplied with
    value_clip: float | None = 0.2  # None: plain squared error
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    text_coef: float = 0.0  # of the language-model loss of pre-training rows in Batch.text (PPO-ptx)
    score: shaping.Config = shaping.Config()  # scale, limit, and what a cut response loses
    bootstrap: bool = False  # a cut response is continued by its value, instead of counting as ended
    whiten_rewards: bool = False  # scale to unit variance, mean kept
    whiten_advantages: bool = True
    bessel: bool = False  # whitening divides by n - 1
    importance: offpolicy.Config | None = None  # weigh tokens by policy / sampled; None: only report
    critic_warmup: int = 0  # first iterations in which only the value function learns
    epochs: int = 2  # passes over one rollout
    minibatches: int = 4  # optimizer steps a pass

    def __post_init__(self):
        checks.at_least(self, 0, "kl_coef", "value_coef", "entropy_coef", "text_coef", "critic_warmup")
        checks.at_least(self, 1, "epochs", "minibatches")
        checks.above(self, 0, "clip", "clip_high", "kl_target", "value_clip", "kl_horizon")
        checks.above(self, 1, "dual_clip")
        checks.within(self, 0, 1, "gamma", "lam")


@struct.dataclass
class State:
    """What survives from one rollout to the next."""

    kl_coef: jax.Array  # [] float32
    iteration: jax.Array  # [] int32


@struct.dataclass
class Batch:
    tokens: jax.Array  # [B, T] int32
    prompt_len: jax.Array  # [B] int32
    response_len: jax.Array  # [B] int32
    mask: jax.Array  # [B, R] bool, tokens that the policy wrote, of rows that count
    old_logprobs: jax.Array  # [B, R]
    ref_logprobs: jax.Array  # [B, R]
    old_values: jax.Array  # [B, R]
    advantages: jax.Array  # [B, R]
    returns: jax.Array  # [B, R]
    importance: jax.Array  # [B, R], weight of a token's policy loss
    kl_coef: jax.Array  # [B], of a KL in the loss
    learns: jax.Array  # [B], 0 while only the value function learns
    kept: jax.Array | None = None  # [B, R, W] uint32, see Rollout.kept
    text: Any = None  # an lm.Batch of B packed rows, for text_coef > 0


def init(config: Config) -> State:
    """The state before the first rollout."""
    return State(jnp.asarray(config.kl_coef, jnp.float32), jnp.zeros([], jnp.int32))


def token_rewards(experience: Experience, state: State, config: Config) -> Float[Array, "b r"]:
    """What each response token is rewarded with, before any whitening: the shaped score at the last one, less the KL."""
    mask = policy.written(experience)
    score = shaping.score(experience.score, experience.rollout.finished, config.score)
    token_kl = kl.estimate(experience.logprobs, experience.ref_logprobs, mask, config.kl_estimator, experience.ref_kl)
    return shaping.token_rewards(score, token_kl, mask, state.kl_coef * (config.kl_in == "reward"))


def prepare(experience: Experience, state: State, config: Config) -> tuple[Batch, State, dict[str, Array]]:
    """Rewards, advantages and returns of a whole rollout, the next KL coefficient, and what there is to report.

    Whitening and the controller look at the whole batch, so this runs before it is split.

    Raises:
        ValueError: the experience has no values.
    """
    if experience.values is None:
        raise ValueError("PPO needs Experience.values: collect with a value head (or use an algorithm without a critic)")
    rollout, old = experience.rollout, experience.logprobs
    counted = experience.weight > 0
    mask, rewards = policy.written(experience), token_rewards(experience, state, config)
    if config.whiten_rewards:
        rewards = masking.whiten(rewards, mask, shift_mean=False, bessel=config.bessel)
    bootstrap = jnp.where(counted & ~rollout.finished & config.bootstrap, experience.bootstrap, 0.0)
    advantage, returns = advantages.gae(rewards, experience.values, mask, bootstrap, config.gamma, config.lam)
    importance, off_policy = offpolicy.weights(old, rollout.sampled_logprobs, mask, config.importance)
    batch = Batch(
        tokens=rollout.tokens,
        prompt_len=rollout.prompt_len,
        response_len=rollout.response_len,
        mask=mask,
        old_logprobs=masking.masked(old, mask),
        ref_logprobs=masking.masked(experience.ref_logprobs, mask),
        old_values=masking.masked(experience.values, mask),
        advantages=masking.whiten(advantage, mask, bessel=config.bessel) if config.whiten_advantages else advantage,
        returns=returns,
        importance=importance,
        kl_coef=jnp.full_like(experience.score, state.kl_coef),
        learns=jnp.full_like(experience.score, state.iteration >= config.critic_warmup),
        kept=rollout.kept,
    )
    report = policy.report(experience, mask)
    metrics = (
        report
        | off_policy
        | {
            "policy/kl_coef": state.kl_coef,
            "reward/total": masking.masked_mean(rewards.sum(axis=1), counted),
            "value/explained_variance": advantages.explained_variance(returns, experience.values, mask),
        }
    )
    coefficient = state.kl_coef
    if config.kl_target is not None:
        sequences = counted.sum().astype(jnp.float32)
        coefficient = kl.adapt(coefficient, report["policy/kl_ref"], sequences, config.kl_target, config.kl_horizon)
    return batch, State(coefficient, state.iteration + 1), metrics


def loss(outputs: Outputs, batch: Batch, config: Config) -> tuple[dict[str, Term], dict[str, Term]]:
    """Clipped policy loss, clipped value loss, and by option KL, entropy bonus and language-model loss; means over tokens.

    Reads `outputs.logprobs` and `outputs.values`; `outputs.entropy` where there is a bonus (else only to report it),
    `outputs.ref_kl` for an exact KL in the loss, `outputs.text_logprobs` for `text_coef`.
    Source of the last: Ouyang et al. 2022, "Training language models to follow instructions", equation 2.

    Raises:
        ValueError: an output that is read is missing.
    """
    checks.given(outputs, "ppo.loss", "logprobs", "values")
    mask = batch.mask
    log_ratio = surrogate.log_ratio(outputs.logprobs, batch.old_logprobs, mask)
    high = config.clip if config.clip_high is None else config.clip_high
    gain, clipped = surrogate.clipped_policy(log_ratio, batch.advantages, mask, config.clip, high, config.dual_clip)
    value, value_clipped = surrogate.clipped_value(outputs.values, batch.old_values, batch.returns, mask, config.value_clip)

    def mean(values, coefficient=1.0):
        return surrogate.token_mean(values.astype(jnp.float32), mask, coefficient)

    on = batch.learns[:, None]
    terms = {"loss/policy": mean(gain * batch.importance * on), "loss/value": mean(value, config.value_coef)}
    metrics = {
        "policy/ratio": mean(jnp.exp(log_ratio)),
        "policy/clip_fraction": mean(clipped),
        "policy/approx_kl": mean(0.5 * jnp.square(log_ratio)),
        "value/clip_fraction": mean(value_clipped),
    }
    if config.kl_in == "loss":
        token_kl = kl.estimate(outputs.logprobs, batch.ref_logprobs, mask, config.kl_estimator, outputs.ref_kl)
        terms["loss/kl"] = mean(token_kl * batch.kl_coef[:, None] * on)
    if config.entropy_coef > 0:
        checks.given(outputs, f"ppo.loss with entropy_coef={config.entropy_coef}", "entropy")
        terms["loss/entropy"] = mean(-outputs.entropy * on, config.entropy_coef)
    if config.text_coef > 0:
        checks.given(outputs, f"ppo.loss with text_coef={config.text_coef}", "text_logprobs")
        terms["loss/text"] = surrogate.token_mean(-outputs.text_logprobs * on, batch.text.mask, config.text_coef)
    if outputs.entropy is not None:
        metrics["policy/entropy"] = mean(outputs.entropy)
    return terms, metrics
