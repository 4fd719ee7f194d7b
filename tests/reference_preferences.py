"""Preference losses once more, in float64 NumPy with plain loops, written from the papers; see tests/reference.py.

It imports nothing of ours. A pair is (log-probs of response 0's tokens, of response 1's), each a list of real tokens.
"""

from __future__ import annotations

import math

import numpy as np


def minus_log_sigmoid(x: float) -> float:
    """log(1 + exp(-x)), which no float64 of these tests overflows."""
    return math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    """exp(-(-log sigmoid(x)))."""
    return math.exp(-minus_log_sigmoid(x))


def tokens_of(logprobs: np.ndarray, mask: np.ndarray) -> list[float]:
    """The real tokens of one response, in order; the others are not read."""
    return [float(logprobs[t]) for t in range(len(mask)) if mask[t]]


def reduced(tokens: list[float], reduction: str) -> float:
    """Log-prob of a response; 0 for an empty one."""
    if not tokens:
        return 0.0
    return sum(tokens) / (len(tokens) if reduction == "mean" else 1)


def dpo_choice(h: float, form: str, beta: float, smoothing: float, gamma: float) -> float:
    """Loss of a sure choice whose log-ratio leads by h.

    DPO: Rafailov 2023, eq. 7. cDPO: Mitchell 2023. Robust: Chowdhury 2024. Hinge: Liu 2023. IPO: Azar 2023, eq. 17.
    SimPO: Meng 2024, eq. 6, h then without a reference.
    """
    if form == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if form == "hinge":
        return max(0.0, 1 - beta * h)
    right, wrong = minus_log_sigmoid(beta * h - gamma), minus_log_sigmoid(-(beta * h - gamma))
    if form == "robust":
        return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
    return (1 - smoothing) * right + smoothing * wrong


def dpo_pair(policy, ref, label: float, settings: dict) -> float:
    """Expected loss of one pair. `policy`, `ref`: two lists of token log-probs each; `ref` None: no reference."""
    total = [reduced(tokens, settings["reduction"]) for tokens in policy]
    if ref is not None:
        total = [a - reduced(tokens, settings["reduction"]) for a, tokens in zip(total, ref, strict=True)]
    rest = settings["form"], settings["beta"], settings["smoothing"], settings["gamma"]
    return label * dpo_choice(total[0] - total[1], *rest) + (1 - label) * dpo_choice(total[1] - total[0], *rest)


def nll_pair(policy, label: float) -> float:
    """Pang 2024, eq. 1: -log p of the chosen one over its length, expected under the label."""
    return -label * reduced(policy[0], "mean") - (1 - label) * reduced(policy[1], "mean")


def log_odds(tokens: list[float]) -> float:
    """Hong 2024: p is the geometric mean of the tokens' probabilities, the odds are p / (1 - p)."""
    p = math.exp(reduced(tokens, "mean"))
    return math.log(p / (1 - p))


def orpo(pairs, labels, weights, odds_coef: float) -> float:
    """Hong 2024, eq. 6: likelihood of chosen tokens, and lambda times the odds-ratio loss of pairs."""
    nll = chosen_tokens = odds = total = 0.0
    for pair, label, weight in zip(pairs, labels, weights, strict=True):
        if weight == 0 or not all(pair):
            continue
        for tokens, share in zip(pair, (label, 1 - label), strict=True):
            nll -= weight * share * sum(tokens)
            chosen_tokens += weight * share * len(tokens)
        lead = log_odds(pair[0]) - log_odds(pair[1])
        odds += weight * (label * minus_log_sigmoid(lead) + (1 - label) * minus_log_sigmoid(-lead))
        total += weight
    return nll / chosen_tokens + odds_coef * odds / total


def kto(policy, ref, desirable, weights, others, settings: dict) -> tuple[float, float]:
    """Ethayarajh 2024: mean of lambda_y - v(x, y), and z0. `others`: log-ratios of mismatched prompts and responses."""
    z0 = max(0.0, sum(others) / len(others)) if others else 0.0
    beta = settings["beta"]
    total = count = 0.0
    for tokens, ref_tokens, good, weight in zip(policy, ref, desirable, weights, strict=True):
        if weight == 0:
            continue
        r = sum(tokens) - sum(ref_tokens)
        if good:
            scale, value = settings["desirable"], settings["desirable"] * sigmoid(beta * (r - z0))
        else:
            scale, value = settings["undesirable"], settings["undesirable"] * sigmoid(beta * (z0 - r))
        total, count = total + weight * (scale - value), count + weight
    return total / count, z0


def mismatched_row(prompt: list[int], response: list[int], width: int) -> list[int]:
    """A prompt with another one's response, cut to `width`."""
    return (prompt + response)[:width]


def bradley_terry(reward: np.ndarray) -> np.ndarray:
    """P(i preferred to j) of every pair of rewards."""
    return np.array([[sigmoid(a - b) for b in reward] for a in reward])


def best_and_worst(scores, groups, weights) -> dict[int, tuple[int, int] | None]:
    """Of each group, the rows with the highest and the lowest score among those that count; None where these are equal."""
    chosen = {}
    for group in dict.fromkeys(groups):
        rows = [i for i in range(len(scores)) if groups[i] == group and weights[i] > 0]
        if not rows:
            chosen[group] = None
            continue
        best, worst = max(rows, key=lambda i: scores[i]), min(rows, key=lambda i: scores[i])
        chosen[group] = None if scores[best] == scores[worst] else (best, worst)
    return chosen
