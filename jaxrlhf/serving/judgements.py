"""What the chat page asks beside answers: whether anything is kept, and keeping what its people choose and judge.

Without a store nothing that anybody types is kept; with one, what a person chose and judged is, once that person has agreed.
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any

from jaxrlhf.data import sources
from jaxrlhf.feedback import gate, store, unpaired
from jaxrlhf.serving.desk import Desk, Kept, person_of

if TYPE_CHECKING:
    from starlette.requests import Request

WORDING = (
    "May what you type here, the answers to it, and what you choose be kept, to train and to study language models? "
    "Nothing is kept if you say no, and you can talk all the same."
)
CONSENTED = sources.Schema(required={"given": bool}, optional={"user": str})
CHOSEN = sources.Schema(required={"completion": str, "choice": str}, optional={"user": str, "seconds": float})
RATED = sources.Schema(required={"completion": str, "index": int, "good": bool}, optional={"user": str})


async def about(desk: Desk, request: Request) -> dict[str, Any]:
    """What the page begins with."""
    await desk.who(request)
    site = desk.site
    return {"model": site.name, "keeps": site.store is not None, "ask_share": site.ask_share, "wording": WORDING}


async def consent(desk: Desk, request: Request) -> dict[str, Any]:
    """Note that somebody agrees, or no longer does."""
    account = await desk.who(request)
    sent = await gate.body(request, CONSENTED, desk.site.limits)
    person = person_of(account, sent.get("user", ""))
    await desk.on_disk(lambda db: unpaired.consent(db, person, sent["given"], WORDING))
    return {"given": sent["given"]}


async def choose(desk: Desk, request: Request) -> dict[str, Any]:
    """Keep which of two answers somebody prefers. The first stood at the left; both were drawn alike."""
    account = await desk.who(request)
    sent = await gate.body(request, CHOSEN, desk.site.limits)
    kept = _judged(desk, account, sent)
    if len(kept.answers) != 2:
        raise gate.Refused(400, "invalid", f"there were {len(kept.answers)} answers; a choice is between two")
    pair = store.Pair(kept.prompt, *kept.answers, kept.version, kept.version, kept.sampling)
    made = store.Choice(pair.id, kept.person, sent["choice"], "a", seconds=sent.get("seconds"))

    def job(db: sqlite3.Connection) -> store.Choice:
        _check_consent(db, kept.person)
        store.add_pairs(db, [pair])
        return store.record(db, [made])[0]

    return {"choice": (await desk.on_disk(job)).choice}


async def rate(desk: Desk, request: Request) -> dict[str, Any]:
    """Keep whether somebody finds an answer good."""
    account = await desk.who(request)
    sent = await gate.body(request, RATED, desk.site.limits)
    kept = _judged(desk, account, sent)
    if not 0 <= sent["index"] < len(kept.answers):
        raise gate.Refused(400, "invalid", f"index={sent['index']}: there were {len(kept.answers)} answers")
    answer = kept.answers[sent["index"]]
    rating = unpaired.Rating(kept.prompt, answer, kept.person, sent["good"], kept.version, kept.sampling)

    def job(db: sqlite3.Connection) -> None:
        _check_consent(db, kept.person)
        unpaired.add(db, [rating])

    await desk.on_disk(job)
    return {"good": sent["good"]}


def _judged(desk: Desk, account: str, sent: dict[str, Any]) -> Kept:
    kept = desk.recent.get(sent["completion"])
    if kept is None or kept.person != person_of(account, sent.get("user", "")):
        raise gate.Refused(404, "unknown_answer", "no such answer of yours that could still be judged")
    return kept


def _check_consent(db: sqlite3.Connection, person: str) -> None:
    if not unpaired.consented(db, person):
        raise gate.Refused(403, "consent", "nothing is kept: you have not agreed to it")
