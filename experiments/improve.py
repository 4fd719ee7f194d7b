"""Rounds of improvement: people choose, the reward model and the policy learn from it, and what passes every gate is served.

    python -m experiments.improve --store runs/demo/feedback.sqlite    # waits for 200 new choices, again and again
    python -m experiments.improve --once                               # one round now
    python -m experiments.improve --every-minutes 720                  # by schedule, where anything is new
    python -m experiments.improve --rounds 3 --simulate 512            # simulated people choose
    python -m experiments.improve --rollback previous                  # or a round's number
    python -m experiments.serve --policy runs/improve/serving          # follows each promotion

A round freezes the choices up to an event, refreshes the served round's reward model on old and new ones, trains the policy
from the served one, measures the candidate against it and promotes it if every gate passes; else it is kept and reported.
Killed anywhere, the same command goes on. docs/improvement.md has the gates and the manifests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import time
from pathlib import Path
from typing import Any, Literal

import jax

from experiments import dpo, grpo, one_round, ppo, reinforce, reward_model, rlhf, rloo, stage
from jaxrlhf.core.sharding import MeshConfig
from jaxrlhf.feedback import improve, labelers, rounds, snapshots, store
from jaxrlhf.training import cli, session
from jaxrlhf.training.run import Run

FIXED = ("start", "reward", "held_out")  # of all rounds of a folder; the rest may change from one round to the next


@dataclasses.dataclass(frozen=True)
class Wait:
    """When a round begins."""

    choices: int = 200  # since the last round, whatever became of that
    seconds: float = 30.0  # between two looks at the store

    def __post_init__(self):
        if self.choices < 1 or self.seconds <= 0:
            raise ValueError(f"wait.choices={self.choices}, wait.seconds={self.seconds}: both must be above 0")


@dataclasses.dataclass(frozen=True)
class Simulated:
    """Who chooses where `simulate` asks for it; the choices say so."""

    person: labelers.Person = labelers.Person()  # errors, ties, laziness, drift
    inverted: bool = False  # a drill: the worse answer is chosen, and the gates should stop the round


@dataclasses.dataclass(frozen=True)
class Config:
    start: Path = Path("runs/demo/sft/model")  # round 0's policy, copied once
    reward: Path = Path("runs/demo/reward_model/model")  # round 0's reward model, copied once
    store: Path = Path("runs/demo/feedback.sqlite")
    out: Path = Path("runs/improve")
    seed: int = 1
    mesh: MeshConfig = MeshConfig()
    wait: Wait = Wait()
    once: bool = False  # one round, without waiting
    every_minutes: float | None = None  # a round each so many minutes if there are new choices, however few
    rounds: int | None = None  # end when so many have been; None: go on until Ctrl-C
    rollback: int | Literal["previous"] | None = None  # serve that round's policy again, and end
    simulate: int = 0  # prompts that the served policy answers twice before each round, a simulated person choosing; 0: people
    simulated: Simulated = Simulated()
    algorithm: Literal["ppo", "grpo", "rloo", "reinforce", "dpo"] = "ppo"
    reference: Literal["first", "current"] = "first"  # policy that training is held near: round 0's, or the served one
    held_out: float = 0.15  # of the choices, by the hash of their prompt
    leave_out: tuple[str, ...] = ()  # labelers whose choices are not used
    prompts: int = 768  # held-out ones that policies are judged on
    judge: Literal["textblob", "vader"] = "textblob"  # of the win rate and of regression prompts
    width: int = 64  # tokens of a choice that is measured; longer ones are left out there
    regression: Path | None = None  # .jsonl of prompt and score: the least that the judge must give the most probable answer
    sampling: stage.Sampling = stage.Sampling()  # of answers that are judged
    gates: improve.Limits = improve.Limits()
    reward_model: reward_model.Config = rlhf.REFRESH
    ppo: ppo.Config = dataclasses.replace(rlhf.AGAIN, evaluate_every=24)
    grpo: grpo.Config = grpo.Config(evaluate_every=24)
    rloo: rloo.Config = rloo.Config(evaluate_every=24)
    reinforce: reinforce.Config = reinforce.Config(evaluate_every=24)
    dpo: dpo.Config = dpo.Config(evaluate_every=120)

    def __post_init__(self):
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} must be in (0, 1): the gates need choices that nothing learned from")
        if self.every_minutes is not None and self.every_minutes <= 0:
            raise ValueError(f"every_minutes={self.every_minutes} must be above 0")


def run(config: Config) -> dict[str, Any]:
    """Rounds until there were `config.rounds` of them; or a rollback. Returns which round is served, and what became of each.

    Raises:
        ValueError: the folder is in use, holds another chain, or a file of it is not as it was written.
        SystemExit: 75 when the time is up (`--max-minutes`).
    """
    if jax.process_count() > 1:
        raise ValueError("rounds of improvement run in one process: leave --processes out")
    if config.rollback is not None:
        number = rounds.roll_back(config.out, None if config.rollback == "previous" else config.rollback)
        print(f"{config.out / rounds.SERVING} leads to round {number}")
        return {"served": number, "rounds": []}
    free = tuple(field.name for field in dataclasses.fields(config) if field.name not in FIXED)
    one_round.check_start(config)
    with Run.open(config.out, config, tensorboard=False, free=free):
        one_round.first(config)
        rounds.chain(config.out)
        found: list[dict[str, Any]] = []
        while config.rounds is None or rounds.finished(config.out) <= config.rounds:  # round 0 is none of them
            number = rounds.finished(config.out)
            if not one_round.under_way(config.out):
                wait(config, number)
            manifest = one_round.run(config, number)
            found.append({"round": number, "passed": manifest["passed"]})
            served = rounds.served(config.out)[-1]
            print(f"\n{improve.table(manifest)}\n{config.out / rounds.SERVING} leads to round {served}", flush=True)
            if config.once:
                break
    return {"served": rounds.served(config.out)[-1], "rounds": found}


def wait(config: Config, number: int) -> None:
    """Return when the round may begin.

    Raises:
        FileNotFoundError: there is no store.
        SystemExit: the time is up.
    """
    if config.simulate:
        one_round.simulate(config, number)
        return
    if not config.store.is_file():
        raise FileNotFoundError(f"{config.store}: no feedback store; make pairs with sample_pairs.py and label them")
    before, told = rounds.read(config.out, number - 1), -1
    began = datetime.datetime.fromisoformat(before["time"])
    while True:
        with contextlib.closing(store.open_store(config.store)) as db:
            new = snapshots.new_choices(db, before.get("snapshot", {}).get("upto", 0), config.leave_out)
        minutes = (datetime.datetime.now(datetime.UTC) - began).total_seconds() / 60
        if config.once or improve.due(new, minutes, config.wait.choices, config.every_minutes):
            return
        if new != told:
            print(f"round {number}: {new} new choices of {config.wait.choices}", flush=True)
            told = new
        if session.current().left() < config.wait.seconds:
            raise SystemExit(session.OUT_OF_TIME)
        time.sleep(config.wait.seconds)


SMOKE = Config(
    simulate=32,
    rounds=1,
    prompts=48,
    reward_model=dataclasses.replace(rlhf.SMOKE.refresh, steps=6, held_out_texts=64),
    ppo=ppo.Config(iterations=2, batch=32, evaluate_every=2, held_out_prompts=16),
    grpo=grpo.Config(iterations=2, batch=8, evaluate_every=2, held_out_prompts=16),
    rloo=rloo.Config(iterations=2, batch=8, evaluate_every=2, held_out_prompts=16),
    reinforce=reinforce.Config(iterations=2, batch=32, evaluate_every=2, held_out_prompts=16),
    dpo=dpo.Config(steps=2, batch=16, evaluate_every=2, held_out_prompts=16),
)
PRESETS = {"default": Config(), "smoke": SMOKE}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS, model="start")
