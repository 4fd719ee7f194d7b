"""What is measured of a candidate before it may be served: by judges, on people's held-out choices, on regression prompts.

A stage of experiments/improve.py, whose gates these numbers go through (`jaxrlhf/feedback/improve.py`). Three policies answer
the same held-out prompts: round 0's, the one that is served, and the candidate. The reward model of the served round and the
refreshed one are held against choices that neither learned from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments import held_out, reward_model, reward_scores, stage
from jaxrlhf.core import processes, sharding
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.data import comparisons, pipeline, sources, strict
from jaxrlhf.evaluation import policy, win_rate
from jaxrlhf.feedback import improve, snapshots
from jaxrlhf.sampling import generate, rollout
from jaxrlhf.training.run import Run

REGRESSION = strict.Schema(required={"prompt": str, "score": float}, filled=frozenset({"prompt"}))
Pairs = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Config:
    first: Path  # round 0's policy
    served: Path
    candidate: Path
    reward_before: Path  # the served round's reward model
    reward_after: Path
    snapshot: Path
    out: Path
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    prompts: int = 768  # held out
    judge: Literal["textblob", "vader"] = "textblob"  # whose win rate is a gate; simulated people choose by vader
    width: int = 64  # tokens of a prompt with its answer; longer choices are left out
    regression: Path | None = None  # .jsonl: prompt, and the score that the judge must give the most probable answer at least
    sampling: stage.Sampling = stage.Sampling()
    gates: improve.Limits = improve.Limits()


def run(config: Config) -> dict[str, Any]:
    """Write what is measured, and what each gate says of it, to `result.json` in `config.out`."""
    mesh = stage.mesh(config.mesh, prompts=config.prompts)
    with Run.open(config.out, config) as run:
        if run.result is not None:
            return run.result
        with jax.set_mesh(mesh):
            return run.done(measure(config, mesh))


def measure(config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Answers judged, choices foretold, regression prompts answered; the gates."""
    every = {name: stage.load(getattr(config, name), mesh) for name in ("first", "served", "candidate")}
    rewards = [stage.load(folder, mesh, "reward_model") for folder in (config.reward_before, config.reward_after)]
    samples = answers(config, every, rewards[1], mesh)
    judged = {name: policy.judge(found, held_out.JUDGES) for name, found in samples.items()}
    rows = {name: policy.evaluate_policy(samples[name], judged[name]) for name in every}
    on_choices, told = choices(config, every, rewards)
    wins = win_rate.outcomes(judged["candidate"][config.judge], judged["served"][config.judge])
    candidate, first = rows["candidate"], rows["first"]
    measured = improve.Measured(
        wins=improve.Rows(wins, [str(i) for i in range(len(wins))]),
        kl=candidate["kl"],
        length=candidate["length"] / first["length"],
        distinct_2=candidate["distinct_2"] / max(first["distinct_2"], 1e-9),
        fallen=fallen(config, every["candidate"], mesh),
        **on_choices,
    )
    over = {name: {j: win_rate.win_rate(judged["candidate"][j], judged[name][j]) for j in held_out.JUDGES} for name in every}
    return {
        "gates": [gate.plain() for gate in improve.gates(measured, config.gates)],
        "policies": rows,
        "win_rate": {name: over[name] for name in ("first", "served")},
        **told,
        "samples": policy.side_by_side(samples["served"], samples["candidate"]),
    }


def answers(
    config: Config, every: dict[str, stage.Trained], judged: stage.Trained, mesh: jax.sharding.Mesh
) -> dict[str, policy.Samples]:
    """One answer of each policy to each held-out prompt, with its KL to round 0's policy."""
    first, reward = every["first"], stage.reward(judged)
    setting = held_out.Setting(
        model=first.model,
        reference=first.params,
        reward=lambda rollout: reward(judged.params, rollout),
        prompts=held_out.prompts(first.tokenizer, config.prompts),
        spec=stage.spec(config.sampling, first.tokenizer),
        tokenizer=first.tokenizer,
        mesh=mesh,
    )
    keys = jax.random.split(jax.random.key(config.seed))  # other draws than the served policy's, so that equals win half
    found = {"first": held_out.sample(setting, first.params, keys[0])}
    same = config.served == config.first
    found["served"] = found["first"] if same else held_out.sample(setting, every["served"].params, keys[0])
    return found | {"candidate": held_out.sample(setting, every["candidate"].params, keys[1])}


# ------------------------------------------------------------------------------------------------------ people's choices


def choices(
    config: Config, every: dict[str, stage.Trained], rewards: list[stage.Trained]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of `improve.Measured` that are of choices; and for the report `accuracy`, [before, after] on held-out ones,
    and `labelers`, [right, said] of each one's new choices by the served reward model: who chooses against it stands out.
    """
    told = snapshots.check(config.snapshot)
    sides = {name: decided(config, every["first"], name) for name in ("held_out", "learned", "gold")}
    before, after = ({name: right_by_reward(config, one, sides[name]) for name in sides} for one in rewards)
    gain = {name: after[name] - before[name] for name in sides}
    new = [
        (row, right)
        for name in ("held_out", "learned")
        for row, right in zip(sides[name], before[name], strict=True)
        if row["sequence"] > told["known"]
    ]
    held = sides["held_out"]
    earlier = np.array([row["sequence"] <= told["known"] for row in held], bool)
    own = {name: right_by_policy(config, every[name], every["first"], held) for name in ("served", "candidate")}
    gold = told["people_on_gold"]
    rows = {
        "new_choices": improve.Rows(np.array([right for _, right in new], np.float64), prompts_of([row for row, _ in new])),
        "held_out_choices": improve.Rows(gain["held_out"], prompts_of(held)),
        "earlier_choices": improve.Rows(
            gain["held_out"][earlier], prompts_of([row for row, kept in zip(held, earlier, strict=True) if kept])
        ),
        "gold_choices": improve.Rows(gain["gold"], prompts_of(sides["gold"])),
        "people_on_gold": improve.Rows(np.array([right for _, right in gold], np.float64), [pair for pair, _ in gold]),
        "policy_choices": improve.Rows(own["candidate"], prompts_of(held)),
    }
    labelers: dict[str, list[float]] = {}
    by_labeler: dict[str, tuple[list[float], list[str]]] = {}
    for row, right in new:
        count = labelers.setdefault(row["labeler"], [0.0, 0.0])
        count[0], count[1] = count[0] + float(right), count[1] + 1
        after_event = max(event for event in (told["known"], *told["since"]) if event < row["sequence"])
        values, prompts = by_labeler.setdefault(f"{row['labeler']} after event {after_event}", ([], []))
        values.append(float(right))
        prompts.append(row["prompt"])
    found = {who: improve.Rows(np.array(values), prompts) for who, (values, prompts) in by_labeler.items()}
    means = {"reward_model": (before["held_out"], after["held_out"]), "policy": (own["served"], own["candidate"])}
    accuracy = {name: [float(one.mean()) for one in two] for name, two in means.items() if held}
    return rows | {"by_labeler": found}, {"accuracy": accuracy, "labelers": labelers}


def prompts_of(rows: Pairs) -> list[str]:
    """By which choices hang together."""
    return [row["prompt"] for row in rows]


def decided(config: Config, writer: stage.Trained, name: str) -> Pairs:
    """Choices of a part of the snapshot that are no ties and have room in `config.width`, or in the policy's context."""
    rows = [row for row in snapshots.read(config.snapshot, name) if not row["tie"]]
    return [dict(row) for row in comparisons.fitting(rows, writer.tokenizer, room(config, writer))] if rows else []


def room(config: Config, writer: stage.Trained) -> int:
    """Tokens of a choice."""
    return min(config.width, writer.model.max_length)


def right_by_reward(config: Config, judged: stage.Trained, rows: Pairs) -> np.ndarray:
    """`improve.outcomes` of a reward model, or of an ensemble taken together, [n]."""
    if not rows:
        return np.zeros(0)
    several = stage.ensembled(judged.settings)
    scored = reward_model.Config(pooling=judged.settings["pooling"])
    if several is not None:
        scored = dataclasses.replace(
            scored,
            ensemble=several.members,
            ensemble_of=several.of,
            aggregation=several.aggregation,
            uncertainty_coef=several.uncertainty_coef,
            lora=several.lora,
        )
    pairs = comparisons.preference_rows(rows, judged.tokenizer, room(config, judged))
    tokens = np.asarray(pairs.tokens).reshape(2 * len(rows), -1)
    length = np.asarray(pairs.prompt_len + pairs.response_len).reshape(-1)
    found = reward_scores.score_texts(scored, judged.model, judged.params, {"tokens": tokens, "length": length})
    score = reward_scores.together(scored, found).astype(np.float64).reshape(-1, 2)
    return improve.outcomes(score[:, 0] - score[:, 1])


def right_by_policy(config: Config, writer: stage.Trained, first: stage.Trained, rows: Pairs, size: int = 128) -> np.ndarray:
    """`improve.outcomes` of what a policy prefers more than round 0's does, [n]; of that policy itself 1/2."""
    width, found = room(config, writer), []
    for start in range(0, len(rows), size):
        pairs = comparisons.preference_rows(rows[start : start + size], writer.tokenizer, width)
        filled = np.resize(np.arange(len(pairs.weight)), size)  # one program, however many there are
        pairs = jax.tree.map(lambda x, filled=filled: np.asarray(x)[filled], pairs)
        two = [rollout.batch_logprobs(one.model, one.params, pairs, width).sum(-1) for one in (writer, first)]
        own = np.asarray(processes.to_host(two[0] - two[1]), np.float64)
        found.append((own[:, 0] - own[:, 1])[: len(rows) - start])
    return improve.outcomes(np.concatenate(found)) if found else np.zeros(0)


# ------------------------------------------------------------------------------------------------------ regression prompts


def fallen(config: Config, writer: stage.Trained, mesh: jax.sharding.Mesh) -> int | None:
    """Regression prompts whose most probable answer the judge scores below what its row expects; None without a file.

    Raises:
        ValueError: `file:line: field: problem`, or a prompt that the context has no room for.
    """
    if config.regression is None:
        return None
    rows = sources.read_jsonl(config.regression, REGRESSION)
    texts = best_answers(config, writer, [row["prompt"] for row in rows], mesh)
    scores = held_out.JUDGES[config.judge]([policy.whole(*pair) for pair in texts])
    return int(sum(score < row["score"] for score, row in zip(scores, rows, strict=True)))


def best_answers(config: Config, writer: stage.Trained, texts: Sequence[str], mesh: jax.sharding.Mesh) -> list[tuple[str, str]]:
    """Each prompt with the answer that a policy thinks most probable: the same one whenever it is asked."""
    spec = dataclasses.replace(stage.spec(config.sampling, writer.tokenizer), greedy=True, replay=False)
    most = 1 + max(len(row) for row in writer.tokenizer.encode_batch(texts))
    prompts = pipeline.text_prompts(texts, writer.tokenizer, min(most, writer.model.max_length - spec.max_tokens))
    rows = np.resize(np.arange(len(texts)), -(-len(texts) // sharding.ways()) * sharding.ways())
    batch = sharding.shard_batch(pipeline.take_prompts(prompts, rows), mesh)
    drawn = generate.generate(writer.model, writer.params, batch, spec, jax.random.key(0))
    return list(zip(*stage.texts(drawn, writer.tokenizer), strict=True))[: len(texts)]
