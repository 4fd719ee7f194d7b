"""A transformer written in float64 NumPy, one row and one head at a time, importing nothing of ours."""

from __future__ import annotations

import math

import numpy as np


def rms_norm(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    """Zhang and Sennrich 2019, equation 4."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def layer_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    """Ba et al. 2016, equation 4 with the variance's epsilon of every implementation."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * scale + bias


def rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """Rotary positions of one head [T, E] as complex numbers: pair (i, i + E/2) at place m turns by m * theta^(-2i/E)."""
    half = x.shape[1] // 2
    angle = np.arange(x.shape[0])[:, None] * theta ** (-2 * np.arange(half) / x.shape[1])
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=1)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One head [T, E], causal, one query at a time."""
    out = np.zeros_like(q)
    for t in range(q.shape[0]):
        scores = k[: t + 1] @ q[t] / math.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max())
        out[t] = (weights / weights.sum()) @ v[: t + 1]
    return out


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form of GPT-2."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def experts(p: dict, x: np.ndarray, k: int, renormalised: bool) -> np.ndarray:
    """What k of the X experts make of each token of x [T, D], one token and one expert at a time.

    Jiang et al. 2024 (arXiv 2401.04088), section 2.1; not renormalised: the weights of the softmax over all experts.
    """
    out = np.zeros_like(x)
    for t, state in enumerate(x):
        scores = state @ p["router"]
        probs = np.exp(scores - scores.max())
        probs = probs / probs.sum()
        chosen = sorted(range(len(probs)), key=lambda e: (-probs[e], e))[:k]
        total = sum(probs[e] for e in chosen) if renormalised else 1.0
        for e in chosen:
            inner = silu(state @ p["gate"][e]) * (state @ p["up"][e])
            out[t] += probs[e] / total * (inner @ p["down"][e])
    return out


def logits(params: dict, tokens: np.ndarray, c: dict) -> np.ndarray:
    """Logits [T, V] of one row of tokens [T]; `c` holds heads, kv_heads, head_width, norm, norm_epsilon, positions, rope_theta
    and mlp by the names of the configuration."""

    def norm(x, p):
        if c["norm"] == "rms":
            return rms_norm(x, p["scale"], c["norm_epsilon"])
        return layer_norm(x, p["scale"], p["bias"], c["norm_epsilon"])

    def sliced(tree, i):
        return {name: sliced(leaf, i) if isinstance(leaf, dict) else leaf[i] for name, leaf in tree.items()}

    e = c["head_width"]
    x = params["embed"][tokens]
    if c["positions"] == "learned":
        x = x + params["positions"][: len(tokens)]
    for i in range(params["layers"]["query"].shape[0]):
        p = sliced(params["layers"], i)
        y = norm(x, p["attention_norm"])
        q, k, v = y @ p["query"], y @ p["key"], y @ p["value"]
        mixed = np.zeros_like(q)
        for h in range(c["heads"]):
            g = h // (c["heads"] // c["kv_heads"])  # the key/value head that serves this query head
            qh, kh, vh = q[:, h * e : (h + 1) * e], k[:, g * e : (g + 1) * e], v[:, g * e : (g + 1) * e]
            if c["positions"] == "rope":
                qh, kh = rotate(qh, c["rope_theta"]), rotate(kh, c["rope_theta"])
            mixed[:, h * e : (h + 1) * e] = attention(qh, kh, vh)
        x = x + mixed @ p["output"]
        y = norm(x, p["mlp_norm"])
        if "experts" in p:
            x = x + experts(p["experts"], y, c["experts_per_token"], c["renormalise_experts"])
            continue
        inner = silu(y @ p["gate"]) * (y @ p["up"]) if c["mlp"] == "swiglu" else gelu(y @ p["up"])
        x = x + inner @ p["down"]
    x = norm(x, params["norm"])
    return x @ (params["head"] if "head" in params else params["embed"].T)
