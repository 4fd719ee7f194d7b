"""Judgement of a policy on held-out prompts, by judges that no training read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from experiments import stage
from jaxrlhf.core import masking, processes, sharding
from jaxrlhf.core.types import Prompts, Rollout, SamplingSpec
from jaxrlhf.data import human_sentiment, pipeline
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.evaluation import judges, policy
from jaxrlhf.models.model import Model
from jaxrlhf.sampling import generate, rollout

JUDGES: dict[str, judges.Judge] = {"vader": judges.vader, "textblob": judges.textblob}


def prompts(tokenizer: Tokenizer, count: int) -> Prompts:
    """The first words of `count` held-out reviews: always the same ones, in an order drawn once.

    Raises:
        ValueError: more prompts are asked for than there are.
    """
    rows = tokenizer.encode_batch([pipeline.clean(rating.text) for rating in human_sentiment.reviews("test")])
    every = pipeline.cut_prompts(rows, tokenizer, seed=0)
    if count > len(every.row):
        raise ValueError(f"{count} held-out prompts asked for, but there are {len(every.row)}: ask for fewer")
    return pipeline.take_prompts(every, np.random.default_rng(0).permutation(len(every.row))[:count])


@dataclasses.dataclass(frozen=True)
class Setting:
    """What stays the same over the policies compared: prompts, reference, reward, distribution."""

    model: Model
    reference: Any
    reward: Callable[[Rollout], jax.Array]
    prompts: Prompts
    spec: SamplingSpec
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    gold: Callable[[Rollout], jax.Array] | None = None  # another reward, which nobody trains on


def sample(setting: Setting, params: Any, key: jax.Array) -> policy.Samples:
    """One response to each held-out prompt, with entropy, KL to the reference and proxy score."""
    batch = sharding.shard_batch(setting.prompts, setting.mesh)
    drawn = generate.generate(setting.model, params, batch, setting.spec, key, options=stage.ONCE)
    logprobs, entropy = rollout.score_rollout(setting.model, params, drawn, setting.spec)
    reference, _ = rollout.score_rollout(setting.model, setting.reference, drawn, setting.spec)
    mask = masking.response_mask(drawn.response_len, logprobs.shape[1])
    starts, responses = stage.texts(drawn, setting.tokenizer)
    entropy, divergence = masking.masked(entropy, mask).sum(1), masking.masked(logprobs - reference, mask).sum(1)
    found = {"entropy": entropy, "kl": divergence, "proxy": setting.reward(drawn)}
    found |= {} if setting.gold is None else {"gold": setting.gold(drawn)}
    found = processes.to_host(found | {"length": drawn.response_len, "finished": drawn.finished})
    return policy.Samples(
        prompts=starts,
        responses=responses,
        length=found["length"],
        finished=found["finished"],
        entropy=found["entropy"] / found["length"],
        kl=found["kl"],
        proxy=found["proxy"],
        gold=found.get("gold"),
    )


def report(
    samples: policy.Samples, baseline: policy.Samples | None = None, judged_by: Mapping[str, judges.Judge] = JUDGES
) -> dict[str, Any]:
    """The figures of one policy, with win rates over a baseline's samples where given."""
    scores = policy.judge(samples, judged_by)
    return policy.evaluate_policy(samples, scores, None if baseline is None else policy.judge(baseline, judged_by))


def flat(row: dict[str, Any]) -> dict[str, float]:
    """`held_out/NAME` metrics of a report."""
    plain = {name: value for name, value in row.items() if isinstance(value, (int, float))}
    wins = {f"win_{name}": rate[0] for name, rate in row.get("win_rate", {}).items()}
    return {f"held_out/{name}": value for name, value in (plain | row["judges"] | wins).items()}
