"""The stages of one round of experiments/improve.py: snapshot, reward model, policy, measurement, manifest.

Each is found done or is done: a round that was killed anywhere goes on with the choices, the served policy and the settings
that it began with (`begun.json`). What a stage leaves is copied whole into `policy/` and `reward_model/`; `stages/` is not read
again once the round has its manifest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import candidate, dpo, grpo, ppo, reinforce, reward_model, rloo, sample_pairs, stage
from jaxrlhf.evaluation import judges
from jaxrlhf.feedback import improve, labelers, rounds, snapshots, store
from jaxrlhf.training import cli, events
from jaxrlhf.training.metrics import write_atomic

if TYPE_CHECKING:
    from experiments.improve import Config

ALGORITHMS = {"ppo": ppo, "grpo": grpo, "rloo": rloo, "reinforce": reinforce, "dpo": dpo}
FREE = ("out", "mesh", "wait", "once", "every_minutes", "rounds", "rollback", "simulate", "simulated")  # no settings of a round


def check_start(config: Config) -> None:
    """Refuse what round 0 cannot begin with, before anything is written.

    Raises:
        FileNotFoundError, ValueError: there is no such model, or it is of another kind.
    """
    for source, kind in ((config.start, "policy"), (config.reward, "reward_model")):
        if not rounds.finished(config.out) and (found := stage.kind(source)) != kind:
            raise ValueError(f"{source}: holds a {found}, not a {kind}")


def first(config: Config) -> None:
    """Round 0: a copy of the policy and the reward model that all begins with; promoted."""
    folder = rounds.place(config.out, 0)
    if not rounds.finished(config.out):
        folder.mkdir(parents=True, exist_ok=True)
        rounds.copy(config.start, folder / "policy")
        rounds.copy(config.reward, folder / "reward_model")
        rounds.seal(config.out, 0, {"served": None, "passed": True} | described(config))
    settle(config.out)


def settle(out: Path) -> None:
    """Serve what the newest round decided, and let the symlink follow the log: a process may have ended in between."""
    newest = rounds.read(out, rounds.finished(out) - 1)
    if newest["passed"] and not rounds.decided(out, newest["round"]):
        rounds.promote(out, newest["round"], newest["served"])
    rounds.point(out)


def under_way(out: Path) -> bool:
    """Whether the round after the newest one has begun."""
    return (rounds.place(out, rounds.finished(out)) / rounds.BEGUN).is_file()


def simulate(config: Config, number: int) -> None:
    """Fill the store: the served policy answers prompts twice, and a simulated person chooses, by VADER with errors, on pairs
    that nobody has chosen on."""
    served = rounds.served(config.out)[-1]
    sample_pairs.run(
        sample_pairs.Config(
            policies=(rounds.place(config.out, served) / "policy",),
            store=config.store,
            out=rounds.place(config.out, number) / "stages" / "sample_pairs",
            seed=seed_of(config, number),
            mesh=config.mesh,
            count=config.simulate,
            against=0,
            batch=min(256, config.simulate),
        )
    )
    name, sign = ("simulated-inverted", -1) if config.simulated.inverted else ("simulated-vader", 1)
    with contextlib.closing(store.open_store(config.store)) as db:
        choices = store.choices(db)
        known = {choice.pair for choice in choices}
        pairs = [pair for pair in store.pairs(db) if pair.id not in known]
        made = sum(choice.labeler == name for choice in choices)
        judge, person = (lambda texts: sign * judges.vader(texts)), config.simulated.person
        store.record(db, labelers.simulated(pairs, judge, name, person, config.seed, made))


def run(config: Config, number: int) -> dict[str, Any]:
    """All stages of a round that are not done, then its manifest, and where it passed its promotion; returns the manifest."""
    out, folder = config.out, rounds.place(config.out, number)
    begun = begin(config, number)
    with contextlib.closing(store.open_store(config.store)) as db:
        choices = begun["upto"], begun["known"], config.held_out, config.leave_out, begun["since"]
        told = snapshots.freeze(db, folder / "snapshot", *choices)
    origin, served = (rounds.place(out, n) for n in (0, begun["served"]))
    for other in {0, begun["served"]}:
        rounds.check(out, other, ("policy", "reward_model"))
    common = {"seed": seed_of(config, number), "mesh": config.mesh}
    refresh = dataclasses.replace(
        config.reward_model,
        refresh=served / "reward_model",
        reference=origin / "policy",
        choices=folder / "snapshot" / "learned.jsonl",
        held_out_pairs=0.0,  # they stand in a file of their own
        out=folder / "stages" / "reward_model",
        **common,
    )
    reward_model.run(refresh)
    rounds.copy(refresh.out / "model", folder / "reward_model")
    reference = served if config.reference == "current" else origin
    tune(config, folder, reference / "policy", served / "policy", common)
    measured = candidate.run(
        candidate.Config(
            first=origin / "policy",
            served=served / "policy",
            candidate=folder / "policy",
            reward_before=served / "reward_model",
            reward_after=folder / "reward_model",
            snapshot=folder / "snapshot",
            out=folder / "stages" / "candidate",
            seed=config.seed,  # the same random numbers in every round
            mesh=config.mesh,
            **{name: getattr(config, name) for name in ("prompts", "judge", "width", "regression", "sampling", "gates")},
        )
    )
    return conclude(config, number, begun, told, measured)


def begin(config: Config, number: int) -> dict[str, Any]:
    """What the round learns from and is measured against, noted once.

    Raises:
        ValueError: too few choices, or it was begun with other settings.
    """
    content: dict[str, Any] = {"round": number, "settings": settings_of(config)}
    if not under_way(config.out):
        served = rounds.served(config.out)[-1]
        with contextlib.closing(store.open_store(config.store)) as db:
            rows = [row for row in store.preferences(db) if row["labeler"] not in config.leave_out]
            learned = sum(not snapshots.is_held_out(row["prompt"], config.held_out) for row in rows)
            if learned < (least := max(1, config.reward_model.pairs)):
                raise ValueError(f"{config.store}: {learned} choices to learn from, a round needs {least}: label more pairs")
            known, *since = [rounds.read(config.out, n).get("snapshot", {}).get("upto", 0) for n in range(served, number)]
            content |= {"served": served, "upto": store.last_sequence(db), "known": known, "since": since, "time": now()}
    return rounds.begin(config.out, number, content)


def tune(config: Config, folder: Path, reference: Path, served: Path, common: dict[str, Any]) -> None:
    """Train the policy from the one that is served, near the reference, against the refreshed reward model."""
    chosen = getattr(config, config.algorithm)
    more = {"choices": folder / "snapshot" / "learned.jsonl"} if config.algorithm == "dpo" else {}
    settings = dataclasses.replace(
        chosen,
        policy=reference,
        init=None if served == reference else served,
        reward=folder / "reward_model",
        out=folder / "stages" / config.algorithm,
        **common,
        **more,
    )
    ALGORITHMS[config.algorithm].run(settings)
    rounds.copy(settings.out / "model", folder / "policy")


def conclude(
    config: Config, number: int, begun: dict[str, Any], told: dict[str, Any], measured: dict[str, Any]
) -> dict[str, Any]:
    """Write the report and the manifest, and serve the policy where every gate let it pass."""
    source = begun["served"] if config.reference == "current" else 0
    content = {
        "served": begun["served"],
        "passed": all(gate["passed"] for gate in measured["gates"]),
        "algorithm": config.algorithm,
        "reference": {"round": source, "blake2b": rounds.read(config.out, source)["policy"]["blake2b"]},
        "snapshot": told,
        **{name: measured[name] for name in ("gates", "accuracy", "labelers", "policies", "win_rate")},
        **described(config),
    }
    write_atomic(rounds.place(config.out, number) / "report.md", improve.table({"round": number} | content))
    manifest = rounds.seal(config.out, number, content)
    settle(config.out)
    return manifest


def described(config: Config) -> dict[str, Any]:
    """Settings, their hash, time, commit and versions, as a manifest has them."""
    settings, where = settings_of(config), events.environment()
    told = {name: where[name] for name in ("commit", "versions", "backend")}
    return {"settings": settings, "settings_blake2b": rounds.digest_of(settings), "time": now(), **told}


def settings_of(config: Config) -> dict[str, Any]:
    """What a round depends on: without the other algorithms' settings, and without when it begins."""
    every = cli.plain(dataclasses.asdict(config))
    return {
        name: value
        for name, value in every.items()
        if name not in FREE and (name == config.algorithm or name not in ALGORITHMS)
    }


def seed_of(config: Config, number: int) -> int:
    """Of a round's stages: each round reads other prompts."""
    return config.seed + 1000 * number


def now() -> str:
    """Of this moment, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
