"""Floating-point operations of a model over rows of tokens: what it needs, and what our programs do for it.

A product of [m, k] and [k, n] is 2 m k n operations. Counted are weight products, attention's two products and the logits;
norms, activations, rotations and the softmax, linear in the width, are not (`tests/test_flops.py` says what that leaves out).

Source: Kaplan et al. 2020 (arXiv 2001.08361), section 2.1 (2 N a token forward, twice that backward); attention, and model
against hardware FLOPs: Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), appendix B.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxrlhf.models.config import GATED, TransformerConfig
from jaxrlhf.models.lora import NONE, LoraConfig


@dataclasses.dataclass(frozen=True)
class Rows:
    """Texts that a model reads, and of which of their tokens it gives logits."""

    length: np.ndarray  # [B] real tokens of each text
    predicted: float  # tokens in all whose logits are computed
    width: int = 0  # > 0: every text is computed as so many tokens, and attention over all pairs of them

    @property
    def tokens(self) -> float:
        """Tokens that go through the layers."""
        return float(self.length.size * self.width if self.width else self.length.sum())

    def pairs(self, window: int = 0) -> float:
        """(query, key) pairs of attention: causal, within `window` places where it is not 0."""
        if self.width:
            return float(self.length.size) * self.width**2
        n = self.length.astype(np.float64)
        near = np.minimum(n, window) if window else n
        return float((near * (near + 1) / 2 + (n - near) * near).sum())


@dataclasses.dataclass(frozen=True)
class Pass:
    """One reading of rows by one model: forward, or with its gradient."""

    shape: TransformerConfig
    gradient: bool = False
    logits: bool = True  # of `Rows.predicted` tokens; a critic or a reward model has none
    lora: LoraConfig = NONE  # where its rank is > 0: the gradient of this adapter alone; forward through it too
    times: float = 1.0


def real(prompt_len: np.ndarray, response_len: np.ndarray) -> Rows:
    """Rows as they are: no padding, logits of their responses. Lengths [...]."""
    prompt, response = np.asarray(prompt_len, np.int64).reshape(-1), np.asarray(response_len, np.int64).reshape(-1)
    return Rows(prompt + response, float(response.sum()))


def packed(segments: np.ndarray) -> Rows:
    """Rows [B, T] of several texts each (segments 1, 2, ...; 0 is padding), of which every token but the first is predicted."""
    rows = np.asarray(segments).reshape(-1, segments.shape[-1])
    numbers = rows.astype(np.int64) + np.arange(len(rows))[:, None] * (int(rows.max(initial=0)) + 1)
    length = np.bincount(numbers[rows > 0])
    length = length[length > 0]
    return Rows(length, float((length - 1).sum()))


def padded(count: int, width: int, response: int) -> Rows:
    """Rows as a program computes them: `count` of `width` tokens, of each of which `response` are predicted."""
    return Rows(np.full(count, width), float(count * response), width)


def products(shape: TransformerConfig) -> int:
    """Multiplications and additions (2 each) of a token with the weights of all layers; of experts those that it is sent to."""
    heads, kv_heads = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    mlp = (3 if shape.mlp in GATED else 2) * shape.width * shape.mlp_width
    if shape.experts:
        mlp = shape.experts_per_token * mlp + shape.width * shape.experts
    return 2 * shape.layers * (2 * shape.width * heads + 2 * shape.width * kv_heads + mlp)


def adapter(shape: TransformerConfig, lora: LoraConfig) -> tuple[int, int]:
    """The same for the two thin products of an adapter on each of its targets: (of all layers, of the head)."""
    if not lora.rank:
        return 0, 0
    heads, kv_heads = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    sizes = {"query": heads, "key": kv_heads, "value": kv_heads, "output": heads, "head": shape.vocab_size}
    sizes |= dict.fromkeys(("up", "down") + ("gate",) * (shape.mlp in GATED), shape.mlp_width)
    targets = [name for name in sizes if name != "head"] if lora.targets is None else lora.targets
    of = {name: 2 * lora.rank * (shape.width + sizes[name]) for name in targets}
    head = of.pop("head", 0)
    return shape.layers * sum(of.values()), head


def forward(shape: TransformerConfig, rows: Rows, logits: bool = True, lora: LoraConfig = NONE) -> float:
    """Operations of one forward pass."""
    of_layers, of_head = adapter(shape, lora)
    head = (2 * shape.width * shape.vocab_size + of_head) * rows.predicted if logits else 0.0
    return (products(shape) + of_layers) * rows.tokens + attention(shape, rows) + head


def attention(shape: TransformerConfig, rows: Rows) -> float:
    """Operations of q k and of weights times v over all layers: 4 H E a pair."""
    windows = shape.windows or (0,) * shape.layers
    return 4.0 * shape.heads * shape.head_width * sum(rows.pairs(window) for window in windows)


def model(which: Pass, rows: Rows) -> float:
    """Operations that the pass needs, however it is programmed: the numerator of MFU.

    A gradient takes twice the forward pass, once for states and once for weights; under an adapter the frozen weights have
    none, which leaves 2 forwards in place of 3, and the adapter's own products have both.
    """
    ahead = forward(which.shape, rows, which.logits, which.lora)
    if not which.gradient:
        return which.times * ahead
    backward = 2 * ahead
    if which.lora.rank:
        backward -= _weights(which, rows)
    return which.times * (ahead + backward)


def hardware(which: Pass, rows: Rows) -> float:
    """Operations that our programs do for it: the numerator of HFU, `model` and what the backward pass computes again.

    That is the layers' forward pass by `remat` layers or attention, but for the products whose results only the residual stream
    takes, and by the latter but for attention itself; the scores in attention's own backward pass; and the logits, where there
    are so many that `models/heads.py` makes them in blocks.
    """
    done = model(which, rows)
    if not which.gradient:
        return done
    again = attention(which.shape, rows) / 2
    if which.logits:
        again += 2 * which.shape.width * which.shape.vocab_size * rows.predicted
    if which.shape.remat in ("layers", "attention"):
        again += forward(which.shape, rows, False, which.lora) - _last(which.shape) * rows.tokens
    if which.shape.remat == "attention":
        again -= attention(which.shape, rows)
    return done + which.times * again


def _last(shape: TransformerConfig) -> int:
    """Operations a token of the products at the ends of branches: nothing in the backward pass asks for their results."""
    if shape.post_norms:
        return 0
    down = shape.mlp_width * max(shape.experts_per_token, 1)
    return 2 * shape.layers * shape.width * (down + shape.heads * shape.head_width * shape.parallel)


def _weights(which: Pass, rows: Rows) -> float:
    """Operations of the gradient of the weights that are frozen under an adapter."""
    head = 2 * which.shape.width * which.shape.vocab_size * rows.predicted if which.logits else 0.0
    return products(which.shape) * rows.tokens + head


def sampling(shape: TransformerConfig, prompt_len: np.ndarray, response_len: np.ndarray, n: int = 1) -> float:
    """Operations of reading prompts [P] once each, and of writing their n responses [P * n] token by token."""
    prompt, response = (np.asarray(x, np.int64).reshape(-1) for x in (prompt_len, response_len))
    read = forward(shape, Rows(prompt, 0.0), logits=False)
    before = np.repeat(prompt, n)
    seen = attention(shape, Rows(before + response, 0.0)) - attention(shape, Rows(before, 0.0))
    head = 2 * shape.width * shape.vocab_size
    return read + float(response.sum()) * (products(shape) + head) + seen
