"""What a policy's held-out samples are like: length, end, entropy, KL, diversity, and what judges say of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrlhf.evaluation import judges as judging
from jaxrlhf.evaluation import win_rate


@dataclasses.dataclass(frozen=True)
class Samples:
    """One response to each held-out prompt, and what was measured while it was written; arrays are [n]."""

    prompts: Sequence[str]
    responses: Sequence[str]
    length: np.ndarray  # response tokens, EOS included
    finished: np.ndarray  # bool: EOS was written
    entropy: np.ndarray  # nats a token: mean over the response of the policy's entropy
    kl: np.ndarray  # nats a response: sum over its tokens of log policy - log reference; 0 for the reference itself
    proxy: np.ndarray  # the reward model's normalised score
    gold: np.ndarray | None = None  # the score of a reward that nobody trains on, where there is one

    def __post_init__(self):
        for name in ("responses", "length", "finished", "entropy", "kl", "proxy", "gold"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.prompts):
                raise ValueError(f"{len(values)} {name} for {len(self.prompts)} prompts: need one each")


def whole(prompt: str, response: str) -> str:
    """Prompt and response as one text. A response keeps the space before its first word, as it was written."""
    return prompt + response


def texts(samples: Samples) -> list[str]:
    """Prompt and response of each sample as one text: what judges read, as the reward model does."""
    return [whole(prompt, response) for prompt, response in zip(samples.prompts, samples.responses, strict=True)]


def judge(samples: Samples, judges: Mapping[str, judging.Judge]) -> dict[str, np.ndarray]:
    """Each judge's score of each sample's whole text, [n]."""
    read = texts(samples)
    return {name: score(read) for name, score in judges.items()}


def evaluate_policy(
    samples: Samples, scores: Mapping[str, np.ndarray], baseline: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """The row of a policy in the report: plain numbers, ready for JSON.

    `scores` are `judge(samples, ...)`, `baseline` the same judges' of the baseline's samples on the same prompts: with it
    the row holds a win rate with its 95 % interval for each judge. Distinct-n is over whole texts.

    Raises:
        ValueError: no sample.
    """
    if not len(samples.prompts):
        raise ValueError("no held-out prompt to evaluate a policy on")
    read = texts(samples)
    row: dict[str, Any] = {
        "prompts": len(read),
        "proxy": float(np.mean(samples.proxy)),
        "kl": float(np.mean(samples.kl)),
        "entropy": float(np.mean(samples.entropy)),
        "length": float(np.mean(samples.length)),
        "eos_rate": float(np.mean(samples.finished)),
        "distinct_1": win_rate.distinct_n(read, 1),
        "distinct_2": win_rate.distinct_n(read, 2),
        "distinct_texts": win_rate.distinct_texts(read),
        "judges": {name: float(np.mean(score)) for name, score in scores.items()},
    }
    if samples.gold is not None:
        row["gold"] = float(np.mean(samples.gold))
    if baseline is not None:
        row["win_rate"] = {name: list(win_rate.win_rate(scores[name], baseline[name])) for name in scores}
    return row


def side_by_side(before: Samples, after: Samples, count: int = 12) -> list[dict[str, str]]:
    """The first `count` prompts with both responses: the first, not the best."""
    rows = zip(before.prompts, before.responses, after.responses, strict=True)
    return [{"prompt": prompt, "before": old, "after": new} for (prompt, old, new), _ in zip(rows, range(count), strict=False)]
