"""The mathematics of the library once more, in float64 NumPy with plain loops, written from the papers.

It imports nothing of ours and shares no trick with it (no masks multiplied in, no scans, no stabilised forms), so that a
mistake would have to be made twice, in two ways, to pass. Masked places are skipped, never read.
"""

from __future__ import annotations

import itertools
import math

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log of exp(z) / sum exp(z) over the last axis."""
    z = np.asarray(logits, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def entropy(logits: np.ndarray) -> np.ndarray:
    """-sum p log p over the last axis, in nats."""
    logp = log_softmax(logits)
    return -(np.exp(logp) * logp).sum(-1)


def real(values: np.ndarray, mask: np.ndarray) -> list[float]:
    """The values where the mask holds, in order."""
    return [float(values[place]) for place in np.ndindex(mask.shape) if mask[place]]


def mean(values: np.ndarray, mask: np.ndarray) -> float:
    """Mean of the real places, 0 if there are none."""
    kept = real(values, mask)
    return sum(kept) / len(kept) if kept else 0.0


def variance(values: np.ndarray, mask: np.ndarray) -> float:
    """Mean squared distance from the mean (sum / n)."""
    centre = mean(values, mask)
    kept = real(values, mask)
    return sum((value - centre) ** 2 for value in kept) / len(kept) if kept else 0.0


def whiten(values: np.ndarray, mask: np.ndarray, shift_mean: bool = True) -> np.ndarray:
    """Unit variance, and mean 0 unless `shift_mean` is false; 1e-8 is added to the variance. lm-human-preferences `whiten`."""
    out = np.zeros(values.shape)
    centre, spread = mean(values, mask), math.sqrt(variance(values, mask) + 1e-8)
    for place in np.ndindex(values.shape):
        if mask[place]:
            out[place] = (values[place] - centre) / spread + (0.0 if shift_mean else centre)
    return out


def kl_estimate(logprob: float, ref_logprob: float, estimator: str) -> float:
    """Schulman 2020 with r = ref / policy: k1 = -log r, k2 = (log r)^2 / 2, k3 = (r - 1) - log r."""
    ratio = math.exp(ref_logprob - logprob)
    return {"k1": -math.log(ratio), "k2": math.log(ratio) ** 2 / 2, "k3": (ratio - 1) - math.log(ratio)}[estimator]


def kl_estimates(logprobs: np.ndarray, ref_logprobs: np.ndarray, mask: np.ndarray, estimator: str) -> np.ndarray:
    """`kl_estimate` of every real token."""
    out = np.zeros(mask.shape)
    for place in np.ndindex(mask.shape):
        if mask[place]:
            out[place] = kl_estimate(float(logprobs[place]), float(ref_logprobs[place]), estimator)
    return out


def adaptive_kl(coefficient: float, kl: float, sequences: int, target: float, horizon: float) -> float:
    """Ziegler et al. 2019, 2.2: e = clip((KL - target) / target, -0.2, 0.2); beta <- beta (1 + K e) with K = n / horizon."""
    error = min(max((kl - target) / target, -0.2), 0.2)
    return coefficient * (1 + error * sequences / horizon)


def gae(rewards, values, mask, bootstrap, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Schulman et al. 2016, equation 16: A_t = sum_l (gamma lam)^l delta_{t+l}, over the real tokens of a row in order."""
    advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
    for row in range(mask.shape[0]):
        places = [t for t in range(mask.shape[1]) if mask[row, t]]
        after = {t: values[row, following] for t, following in itertools.pairwise(places)}
        deltas = [rewards[row, t] + gamma * after.get(t, bootstrap[row]) - values[row, t] for t in places]
        for i, t in enumerate(places):
            advantages[row, t] = sum((gamma * lam) ** k * float(delta) for k, delta in enumerate(deltas[i:]))
            returns[row, t] = advantages[row, t] + values[row, t]
    return advantages, returns


def token_rewards(score, token_kl, mask, kl_coef: float) -> np.ndarray:
    """Ziegler et al. 2019, equation 2, by token: -beta KL everywhere, and the score at a row's last real token."""
    out = np.zeros(mask.shape)
    for row in range(mask.shape[0]):
        places = [t for t in range(mask.shape[1]) if mask[row, t]]
        for t in places:
            out[row, t] = -kl_coef * token_kl[row, t] + (score[row] if t == places[-1] else 0.0)
    return out


def ppo_token(logprob: float, old_logprob: float, advantage: float, clip: float) -> float:
    """Schulman et al. 2017, equation 7, negated: -min(rho A, clip(rho, 1 - e, 1 + e) A)."""
    ratio = math.exp(logprob - old_logprob)
    return -min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


def value_token(value: float, old_value: float, target: float, clip: float | None) -> float:
    """lm-human-preferences `loss`: half the larger of the squared errors of the value and of the value clipped to the old."""
    if clip is None:
        return (value - target) ** 2 / 2
    kept = min(max(value, old_value - clip), old_value + clip)
    return max((value - target) ** 2, (kept - target) ** 2) / 2


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + math.exp(-x))


def pair_loss(scores, preferred, margin, smoothing: float) -> float:
    """Christiano et al. 2017, equation 1, over weighted pairs: -log P(choice), with Llama 2's margin and cDPO's smoothing."""
    total, count = 0.0, 0.0
    for i, j in np.ndindex(preferred.shape):
        if preferred[i, j] > 0:
            lead = float(scores[i]) - float(scores[j]) - float(margin[i, j])
            loss = -(1 - smoothing) * math.log(sigmoid(lead)) - smoothing * math.log(sigmoid(-lead))
            total, count = total + preferred[i, j] * loss, count + preferred[i, j]
    return total / count


def regularised_optimum(ref: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """argmax over p of E_p[reward] - beta KL(p || ref), which is p ~ ref exp(reward / beta). Ziegler et al. 2019, 2.2."""
    weight = ref * np.exp(reward / beta)
    return weight / weight.sum()
