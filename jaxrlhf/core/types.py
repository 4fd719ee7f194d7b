"""Every batch and state type, and the specification of a sampling distribution.

Axis letters, the same in annotations, einsums and docs:

====  ===========================  ====  ========================
B     sequences                    V     vocabulary
N     responses compared           L     layers
P     prompt width                 D     model width
R     response width               F     MLP width
T     row width (prompt+response)  H     query heads
S     cache width                  K     key/value heads
                                   E     head width
====  ===========================  ====  ========================

Rows are contiguous and right-padded: a prompt, at once its response, then padding. Batches store lengths;
`core/masking.py` turns lengths into masks. No mask is ever inferred from a token id, so pad may equal EOS.
Log-probs, values, rewards and losses are float32, tokens and lengths int32. Everything per token that RL touches is
`[B, R]`, indexed by response position. Fields are a plain `Array` with a shape comment, because a field whose shape
is checked at construction breaks `vmap` and `scan`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
from flax import struct

Array = jax.Array | Any  # a leaf of a batch: a jax array; on the host NumPy; in a template its shape or sharding


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """The distribution a response is drawn from, read by the sampler and by the scorer alike.

    The *policy* is softmax(constrained logits / temperature): the constraints (`repetition_penalty`, `min_tokens`, `forbidden`)
    are known from the row before the token and are part of it, so they enter every log-prob. `top_k`, `top_p`, `min_p`
    are *filters*: they change what is drawn but not the policy's log-prob (`Rollout.logprobs` against
    `Rollout.sampled_logprobs`). Order: constraints, temperature, top-k, top-p, min-p, as in transformers' warpers. With
    `replay` the filtered distribution itself is what is trained: see `Rollout.kept`.
    """

    temperature: float  # > 0; no default, so that no log-prob is ever computed without stating it
    max_tokens: int  # R, EOS included
    stop: tuple[int, ...]  # ids that end a response; the id itself belongs to the response
    min_tokens: int = 0  # a stop id is impossible before this many tokens were written
    forbidden: tuple[int, ...] = ()  # ids that are never written (pad, BOS)
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    greedy: bool = False  # the most probable token instead of a draw
    repetition_penalty: float = 1.0  # logits of tokens in the row, prompt included: divided by it above 0, else multiplied
    stop_strings: tuple[str, ...] = ()  # a response ends with the token that completes one: `sampling/stop_strings.py`
    replay: bool = False  # record which tokens the filters kept; the learner's log-probs are then renormalised over them
    pad: int = 0  # written after the end; only a filler

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be > 0; for the most probable token set greedy=True")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]; 1 keeps every token")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be in [0, 1]; 0 keeps every token")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be >= 0; 0 keeps every token")
        if not 0 <= self.min_tokens <= self.max_tokens or self.max_tokens < 1:
            raise ValueError(
                f"min_tokens={self.min_tokens}, max_tokens={self.max_tokens}: need 0 <= min_tokens <= max_tokens"
                " and 1 <= max_tokens"
            )
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be > 0; 1 changes nothing, 1.2 discourages")
        if isinstance(self.stop_strings, str) or not all(self.stop_strings):
            raise ValueError(f"stop_strings={self.stop_strings!r} must be a tuple of strings, none of them empty")
        if self.replay and self.greedy:
            raise ValueError(
                "replay=True with greedy=True: the most probable token is no draw, so there is no kept set to replay"
            )

    @property
    def filtered(self) -> bool:
        """Whether the distribution drawn from differs from the policy's."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or self.greedy

    @property
    def penalised(self) -> bool:
        """Whether the policy depends on which tokens stand in the row."""
        return self.repetition_penalty != 1

    @property
    def replayed(self) -> bool:
        """Whether rollouts hold kept sets. Without filters every token is kept, and there is nothing to record."""
        return self.replay and self.filtered


class Term(NamedTuple):
    """One term of a loss, or one metric: a sum and the count it is to be divided by.

    `count` depends on the batch only, never on parameters. The train step adds both over all microbatches and devices
    and minimises the sum over terms of coefficient * sum / count, so that any split of a batch gives the same gradient.
    """

    sum: Array  # [] float32
    count: Array  # [] float32
    coefficient: float | jax.Array = 1.0


@struct.dataclass
class Draw:
    """How the responses to each prompt are drawn where that differs from prompt to prompt, in place of what the spec says: a
    service answers many people in one batch, and a number of each row is no program of its own."""

    temperature: Array  # [B] float32; 0: the most probable token, its log-prob that of temperature 1
    top_p: Array  # [B] float32


@struct.dataclass
class Prompts:
    tokens: Array  # [B, P] int32
    length: Array  # [B] int32
    uid: Array  # [B] int32, names the prompt's random stream
    row: Array  # [B] int32, index of the source row (reference answer, consent)
    limit: Array | None = None  # [B] int32, most tokens of its responses; None, or above it: SamplingSpec.max_tokens
    draw: Draw | None = None  # of each prompt's own; the spec then has temperature 1 and no filter


@struct.dataclass
class Rollout:
    """What the sampler wrote, and what it knew when it wrote it."""

    tokens: Array  # [B, T] int32
    prompt_len: Array  # [B] int32
    response_len: Array  # [B] int32, EOS included
    finished: Array  # [B] bool, a stop id was written
    group: Array  # [B] int32, equal for samples of one prompt
    sample: Array  # [B] int32, 0 .. n-1
    version: Array  # [B] int32, policy step that sampled
    logprobs: Array  # [B, R] of the policy: full softmax at the sampling temperature
    sampled_logprobs: Array  # [B, R] of the distribution really drawn from
    kept: Array | None = None  # [B, R, ceil(V/32)] uint32, bit v % 32 of word v // 32: token v could be drawn
    written: Array | None = None  # [B, R] bool, False where the policy did not write the token


@struct.dataclass
class Experience:
    """A rollout with everything an algorithm may need to learn from it."""

    rollout: Rollout
    logprobs: Array  # [B, R] of the learner before the update
    ref_logprobs: Array  # [B, R]
    values: Array | None  # [B, R], values[:, t] is the value before response token t
    bootstrap: Array  # [B], value after the last token of a cut response, else 0
    score: Array  # [B]
    weight: Array  # [B], 0 excludes the row
    ref_kl: Array | None = None  # [B, R], KL(learner || reference) of the whole distribution at each response token
    baseline: Array | None = None  # [B], score of the prompt's greedy response (ReMax)
    checked: Array | None = (
        None  # [B] bool, rows whose log-probs the learner computed, the others' are the sampler's; None: all
    )


@struct.dataclass
class Preferences:
    """Sets of N responses that a person compared; N = 2 is the usual pair."""

    tokens: Array  # [B, N, T] int32
    prompt_len: Array  # [B, N] int32
    response_len: Array  # [B, N] int32
    label: Array  # [B] float32, probability that response 0 is preferred: 1, soft, or 0.5
    tie: Array  # [B] bool
    weight: Array  # [B] float32
    margin: Array  # [B] float32
    ref_logprobs: Array | None = None  # [B, N, R] of the reference


@struct.dataclass
class Outputs:
    """What the model said about a batch; None unless asked for. Where a batch holds sets of N responses, [B] is [B, N]."""

    logprobs: Array = None  # [B, R]
    entropy: Array = None  # [B, R]
    values: Array = None  # [B, R]
    scores: Array = None  # [B], of an ensemble [M, B]
    ref_kl: Array = None  # [B, R], KL(policy || reference) of the whole distribution
    text_logprobs: Array = None  # [B, T - 1] of the pre-training rows in `batch.text`


@struct.dataclass
class TrainState:
    """Everything that a training step changes. Frozen models are a separate argument of the step."""

    step: Array  # [] int32
    params: Any
    opt_state: Any
    algorithm: Any  # what an algorithm keeps between batches (adaptive KL coefficient, ...); () for most
    key: Array  # [] typed PRNG key; randomness of step n is fold_in(key, n)
    ema: Any = None
