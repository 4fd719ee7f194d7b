"""Choices out of a feedback store and into one, and gold pairs whose answer is known.

    python -m experiments.choices --store runs/demo/feedback.sqlite --write choices.jsonl     # or .parquet, or a folder (TFDS)
    python -m experiments.choices --store mine.sqlite --read theirs.parquet --labeler theirs
    python -m experiments.choices --store runs/demo/feedback.sqlite --gold known.jsonl
    python -m experiments.choices --store runs/demo/feedback.sqlite --withdraw 59849df4a7785bdc6732d2c8
    python -m experiments.choices --store runs/demo/feedback.sqlite --ratings thumbs.jsonl    # thumbs, as KTO reads them

Rows have prompt, chosen and rejected, as TRL and Hugging Face data sets do, and where known tie, labeler and where each
answer came from. Reading the same file twice adds nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from jaxrlhf.data import sources
from jaxrlhf.feedback import assignments, exchange, store, unpaired
from jaxrlhf.training import cli


@dataclasses.dataclass(frozen=True)
class Config:
    store: Path = Path("runs/demo/feedback.sqlite")
    read: Path | None = None  # choices to add; a store that is not there is made
    labeler: str = "imported"  # who chose, where a row does not say
    gold: Path | None = None  # pairs whose answer is known, to be mixed in: their `chosen` is right
    write: Path | None = None  # where to write all choices, ties too
    withdraw: tuple[str, ...] = ()  # ids of pairs whose texts are taken out of the file for good
    ratings: Path | None = None  # where to write judgements of single answers, thumbs up or down (.jsonl)
    withdraw_answers: tuple[str, ...] = ()  # of single answers, as --withdraw
    upto: int | None = None  # only what stood after this event, the number that a training run keeps


def run(config: Config) -> dict[str, Any]:
    """Read, then withdraw, then write.

    Raises:
        ValueError: nothing to do, or a bad row.
        FileNotFoundError: no store to write from.
    """
    if not (config.read or config.gold or config.withdraw or config.write or config.ratings or config.withdraw_answers):
        raise ValueError("nothing to do: give --read, --gold, --withdraw, --write, --ratings or --withdraw-answers")
    if config.read is None and config.gold is None and not config.store.is_file():
        raise FileNotFoundError(f"{config.store}: no feedback store")
    result: dict[str, Any] = {}
    with contextlib.closing(store.open_store(config.store)) as db:
        if config.read is not None:
            result["read"] = exchange.add_rows(db, exchange.read(config.read), config.labeler)
        if config.gold is not None:
            result["gold"] = assignments.add_gold(db, exchange.as_gold(exchange.read(config.gold)))
        if config.withdraw:
            result["withdrawn"] = store.withdraw(db, config.withdraw)
        if config.write is not None:
            every = store.preferences(db, config.upto, ties=True)
            rows = exchange.writable(every)
            result |= {"unreadable": len(every) - len(rows)} if len(rows) < len(every) else {}
            result |= {"written": len(rows), "to": str(exchange.write(config.write, rows)), "upto": store.last_sequence(db)}
        for answer in config.withdraw_answers:
            unpaired.withdraw(db, answer)
        if config.ratings is not None:
            judged = unpaired.rows(db)
            sources.write_jsonl(config.ratings, judged)
            result |= {"ratings": len(judged), "ratings_to": str(config.ratings)}
    print("  ".join(f"{name}: {value}" for name, value in result.items()))
    return result


PRESETS = {"default": Config()}

if __name__ == "__main__":
    cli.main(run, Config, PRESETS)
