"""Real human ratings of short English texts, shipped inside the package: 15,725 train and 2,775 test texts of three domains.

Every rater's integer score is kept, from -4 (extremely negative) to +4 (extremely positive), 15 to 99 raters a text.
MIT licence, (c) 2016 C.J. Hutto; cite Hutto & Gilbert, "VADER", ICWSM 2014 (`human_sentiment/CITATION`). The movie texts
are sentences of the Rotten Tomatoes set, so never test on Rotten Tomatoes after training on these.
"""

from __future__ import annotations

import dataclasses
import functools
from importlib import resources
from pathlib import Path

from jaxrlhf.data import sources

DOMAINS = ("movie", "product", "tweet")
ROWS = {"train": 15_725, "test": 2_775}
SCHEMA = sources.Schema({"domain": str, "id": str, "text": str, "ratings": list}, filled=frozenset({"domain", "text"}))


@dataclasses.dataclass(frozen=True)
class Rating:
    """One text and what people thought of it."""

    domain: str
    id: str  # of the original file; unique within a domain
    text: str
    ratings: tuple[float, ...]  # one score a person; integers in the packaged data
    mean: float


def _rating(row: dict, place: str) -> Rating:
    scores = row["ratings"]
    if not scores or any(type(score) not in (int, float) for score in scores):
        raise ValueError(f"{place}: ratings: must be a list of one or more numbers, one a person")
    return Rating(row["domain"], row["id"], row["text"], tuple(scores), sum(scores) / len(scores))


def read(path: Path | str) -> list[Rating]:
    """Rated texts of a `.jsonl` or `.jsonl.gz` file with the fields domain, id, text, ratings, of any domains and any scale.

    Raises:
        ValueError: `file:line: field: problem`.
        FileNotFoundError, PermissionError: naming the file.
    """
    return [_rating(row, f"{path}:{number}") for number, row in enumerate(sources.read_jsonl(path, SCHEMA), 1)]


def load(split: str) -> list[Rating]:
    """The packaged split `train` or `test`, in the order of the file.

    Raises:
        ValueError: another split is asked for, or the installed file is damaged.
    """
    if split not in ROWS:
        raise ValueError(f"split '{split}': choose one of {', '.join(ROWS)}")
    return list(_load(split))


@functools.cache  # a stage asks for it several times
def _load(split: str) -> tuple[Rating, ...]:
    with resources.as_file(resources.files("jaxrlhf.data") / "human_sentiment" / f"{split}.jsonl.gz") as path:
        ratings = read(path)
    if len(ratings) != ROWS[split]:
        raise ValueError(f"human_sentiment/{split}.jsonl.gz has {len(ratings)} rows, not {ROWS[split]}: install jaxrlhf again")
    return tuple(ratings)


def reviews(split: str) -> list[Rating]:
    """The movie and product texts of a split: the text of the language model and of prompts. Tweets are for rating only."""
    return [rating for rating in load(split) if rating.domain != "tweet"]
