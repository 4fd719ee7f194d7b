"""Choose the better of two answers: people at a page in the browser, a person at the terminal, or a simulated one.

    python -m experiments.label --store runs/demo/feedback.sqlite --page --people ann bob --admins you
    python -m experiments.label --store runs/demo/feedback.sqlite --labeler human --name you
    python -m experiments.label --store runs/demo/feedback.sqlite --labeler simulated
    python -m experiments.label --page --limit 500 --select.by disagreement --select.reward runs/demo/ensemble/model

The page (docs/feedback.md) prints a link for each person, with a token that is shown this once; it ends when every pair has
its labels, or with Ctrl-C. `--select` asks first about the pairs of which a reward model is least sure (docs/selection.md). The
simulated person prefers the text that VADER finds more positive, errs in 10 % of the choices, and calls equal scores a tie;
`--person` gives it other faults. Every choice is on disk before the next pair is shown; the work can be left at any
moment and taken up again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from experiments import selecting
from jaxrlhf.evaluation import judges
from jaxrlhf.feedback import accounts, agreement, app, assignments, gate, labelers, limits, store
from jaxrlhf.training import cli
from jaxrlhf.training.run import Run

ELSEWHERE = ("people", "admins", "renew", "host", "port", "origins", "guidelines", "page", "select")  # may change on the way


@dataclasses.dataclass(frozen=True)
class Config:
    store: Path = Path("runs/demo/feedback.sqlite")
    out: Path = Path("runs/demo/label")
    labeler: Literal["human", "simulated"] = "simulated"
    name: str = "simulated-vader"  # of the labeler, stored with every choice
    person: labelers.Person = labelers.Person()  # the simulated person's faults
    seed: int = 1
    limit: int | None = None  # pairs somebody is asked about in one sitting; at the page, labels of all people together
    select: selecting.Config = selecting.Config()  # which pairs are asked about first
    least: int = 0  # choices without which the stage is not done: the same command then goes on
    page: bool = False  # people choose at a page in the browser
    people: tuple[str, ...] = ()  # who may choose there; without any, `name`
    admins: tuple[str, ...] = ()  # who also sees figures and exports there
    renew: tuple[str, ...] = ()  # of these: people whose token is lost and gets a new one
    host: str = "127.0.0.1"  # what the page listens at; 0.0.0.0 is every network that this machine is in
    port: int = 8765
    origins: tuple[str, ...] = ()  # how a proxy in front of it is called, as https://label.example.org
    guidelines: Path | None = None  # a text file that tells people what to look for
    rules: assignments.Rules = assignments.Rules()  # how many label each pair, how long one is held, how much gold
    limits: limits.Limits = limits.Limits()


def run(config: Config) -> dict[str, Any]:
    """Label the pairs that this labeler has not chosen on yet."""
    with Run.open(config.out, config, free=("out", *ELSEWHERE)) as run:
        if run.result is not None:
            return run.result
        if not config.store.is_file():
            raise FileNotFoundError(f"{config.store}: no feedback store; make pairs first with sample_pairs.py")
        with contextlib.closing(store.open_store(config.store)) as db:
            selected = selecting.ask_first(db, config.select, config.rules, config.seed)
            if config.page:
                serve(config)
            elif config.labeler == "human":
                labelers.label_at_terminal(db, config.name, config.limit)
            else:
                labelers.label_simulated(db, judges.vader, config.name, config.person, config.seed, config.limit)
            every = store.choices(db)
            names = {account.name for account in accounts.every(db)} if config.page else {config.name}
        mine = [choice for choice in every if choice.labeler in names]
        decided = sum(choice.preferred is not None for choice in mine)
        if decided < config.least:
            raise ValueError(f"{decided} choices so far, {config.least} are needed; all are kept: the same command goes on")
        counts, human = Counter(choice.choice for choice in mine), config.page or config.labeler == "human"
        agreed = {
            " and ".join(two): found._asdict() for two, found in agreement.between_labelers(every).items() if names & {*two}
        }
        return run.done(
            {
                "labeler": "human" if human else config.labeler,
                "name": ", ".join(people(config)) if config.page else config.name,
                "noise": config.person.noise,
                "person": None if human else dataclasses.asdict(config.person),
                "select": selected,
                "choices": dict(counts),
                "left": agreement.left_share(mine),  # about half, with its interval: no favourite side
                "agreement": agreed,  # with others who chose on the same pairs
            }
        )


def people(config: Config) -> tuple[str, ...]:
    """Who may choose at the page."""
    return config.people or (() if config.admins else (config.name,))


def serve(config: Config) -> None:
    """The labelling page, until every pair has its labels or somebody presses Ctrl-C.

    Raises:
        ValueError: the extra `serve` is absent, the guidelines cannot be read, or nobody may choose.
        SystemExit: another signal asked the program to end.
    """
    guidelines = app.GUIDELINES if config.guidelines is None else config.guidelines.read_text(encoding="utf-8").strip()
    site = app.Site(
        config.store, config.rules, config.limits, guidelines, config.host, config.port, config.origins
    )  # fmt: skip
    if unknown := set(config.renew) - {*people(config), *config.admins}:
        raise ValueError(f"--renew {sorted(unknown)[0]}: not one of --people or --admins")
    with app.running(site) as address:
        links(config, config.origins[0] if config.origins else address)
        try:
            app.wait_until_labelled(site, config.limit)
        except (KeyboardInterrupt, SystemExit) as end:
            if isinstance(end, SystemExit) and end.code != 128 + signal.SIGINT:
                raise
            print("\nstopped; every choice is kept", flush=True)


def links(config: Config, address: str) -> None:
    """Print where each person begins: a new token once, else that it was given before."""
    with contextlib.closing(store.open_store(config.store)) as db:
        every: list[tuple[str, accounts.Role]] = [(name, "labeler") for name in people(config)]
        for name, role in [*every, *((name, "admin") for name in config.admins)]:
            token = accounts.create(db, name, role, renew=name in config.renew)
            known = f"{address}/  (with the link printed before; --renew {name} makes a new one)"
            print(f"{name}: {known if token is None else f'{address}/#token={token}'}", flush=True)
        if (there := len(accounts.every(db))) < config.rules.k:
            print(f"rules.k={config.rules.k}, but {there} people may choose: no pair can get all its labels", flush=True)
    if config.host not in gate.LOOPBACK and not config.origins:
        print("anybody in reach of this address can read what is sent: put a proxy with TLS in front (--origins)", flush=True)
    print("Ctrl-C ends it; every choice is on the disk at once", flush=True)


PRESETS = {"default": Config()}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
