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


def whiten(values: np.ndarray, mask: np.ndarray, shift_mean: bool = True, bessel: bool = False) -> np.ndarray:
    """Unit variance, and mean 0 unless `shift_mean` is false; 1e-8 is added to the variance. lm-human-preferences `whiten`."""
    out = np.zeros(values.shape)
    number = len(real(values, mask))
    widened = number / (number - 1) if bessel and number > 1 else 1.0
    centre, spread = mean(values, mask), math.sqrt(variance(values, mask) * widened + 1e-8)
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


def shaped_score(raw, finished, config) -> np.ndarray:
    """Scale, limit, and the penalty of a cut response: taken off its score (TRL 0.24), or put in its place (the EOS trick)."""
    out = []
    for number, ended in zip(raw, finished, strict=True):
        number = float(number) * config.scale
        if config.clip is not None:
            number = min(max(number, -config.clip), config.clip)
        if not ended:
            number = -config.missing_eos_penalty if config.missing_eos == "replace" else number - config.missing_eos_penalty
        out.append(number)
    return np.array(out)


def group_advantages(score, group, counted, scale: bool) -> np.ndarray:
    """DeepSeekMath 4.1.2: (r_i - mean) / std over the counted responses of a group; std of a sample, plus 1e-4 (TRL)."""
    out = np.zeros(len(score))
    for i in range(len(score)):
        others = [float(score[j]) for j in range(len(score)) if group[j] == group[i] and counted[j]]
        if counted[i] and len(others) > 1:
            spread = np.std(others, ddof=1)
            out[i] = (float(score[i]) - np.mean(others)) / (spread + 1e-4 if scale else 1.0)
    return out


def leave_one_out(reward, group, counted) -> tuple[np.ndarray, np.ndarray]:
    """Ahmadian et al. 2024, equation 8: r_i - mean of the other responses to the prompt; and which have any other."""
    out, learned = np.zeros(len(reward)), np.zeros(len(reward), bool)
    for i in range(len(reward)):
        others = [float(reward[j]) for j in range(len(reward)) if group[j] == group[i] and counted[j] and j != i]
        if counted[i] and others:
            out[i], learned[i] = float(reward[i]) - sum(others) / len(others), True
    return out, learned


def reduced(values, mask, reduction: str) -> float:
    """A mean over all tokens; or over responses of their tokens' means; or of their tokens' sums, over the width."""
    rows = [[float(values[row, t]) for t in range(mask.shape[1]) if mask[row, t]] for row in range(mask.shape[0])]
    rows = [row for row in rows if row]
    if reduction == "token":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if reduction == "sequence":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(map(sum, rows)) / (len(rows) * mask.shape[1])


def clipped_token(log_ratio: float, advantage: float, low: float, high: float, dual: float | None = None) -> float:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A); for A < 0 with a dual clip c: at most -c A (Ye et al. 2020, equation 5)."""
    ratio = math.exp(min(log_ratio, 700.0))
    kept = min(max(ratio, 1 - low), 1 + high)
    gain = min(ratio * advantage, kept * advantage)
    return -max(gain, dual * advantage) if dual is not None and advantage < 0 else -gain


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
