"""The labelling page's server: a small JSON interface over the store, and three static files (extra `serve`).

Every request but those for the static files carries a bearer token; there is no cookie. GET never writes. Whatever goes
wrong is `{"error": {"code", "message"}}`. An answer 200 to a choice means that the choice is on the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jaxrlhf.data import sources
from jaxrlhf.feedback import accounts, assignments, dashboard, exchange, gate, limits, listen, store, writer

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

GUIDELINES = "\n\n".join(
    (
        "Read the prompt, then both answers to their end. Choose the one that you would rather be given.",
        "A better answer does what the prompt asks, is true, and is clear. Longer is not better. Where a text tells you which "
        "one to choose, take no notice: it is part of the answer.",
        "Tie: you could not say which. Both bad: neither is of any use. Skip: you cannot judge this one.",
    )
)

ASKED = sources.Schema(required={"want": int})
CHOSEN = sources.Schema(
    required={"id": str, "pair": str, "choice": str}, optional={"strength": int, "note": str, "seconds": float}
)
UNDONE = sources.Schema(required={"id": str})
MOST_PAIRS = 8  # given at once


@dataclasses.dataclass(frozen=True)
class Site:
    """What the server shows and to whom."""

    store: Path
    rules: assignments.Rules = assignments.Rules()
    limits: limits.Limits = limits.Limits()
    guidelines: str = GUIDELINES
    host: str = "127.0.0.1"  # what it listens at; anything else than loopback is for you to say
    port: int = 8765  # 0: any that is free
    origins: tuple[str, ...] = ()  # by which a proxy in front of it is called, as https://label.example.org


@dataclasses.dataclass(frozen=True)
class Desk:
    """What every request is answered from."""

    site: Site
    writing: writer.Writer
    rate: limits.Bucket  # by person
    wrong: limits.Bucket  # tokens, by address

    async def on_disk(self, job: writer.Job) -> Any:
        """What a job on the store gives, when it is on the disk."""
        return await asyncio.wrap_future(self.writing.submit(job))

    async def aside(self, job: writer.Job) -> Any:
        """What a job reads, on a connection of its own beside the writer: long reading holds nobody up."""

        def read() -> Any:
            with contextlib.closing(store.open_store(self.site.store)) as db:
                return job(db)

        return await asyncio.to_thread(read)

    async def who(self, request: Request, admin: bool = False) -> accounts.Account:
        """Whose token it is, counted against their rate.

        Raises:
            gate.Refused: 401, 403 or 429.
        """
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        address = request.client.host if request.client else ""
        given = scheme.lower() == "bearer" and token
        found = await self.on_disk(lambda db: accounts.find(db, token)) if given else None
        if found is None:
            gate.hold(self.wrong.wait(address), "too many wrong tokens from this address")
            raise gate.Refused(401, "token", "no such token: open the link that you were given")
        gate.hold(self.rate.wait(found.name), "too many requests")
        if admin and found.role != "admin":
            raise gate.Refused(403, "role", f"{found.name} is a {found.role}; this is for an admin")
        return found


async def me(desk: Desk, request: Request) -> dict[str, Any]:
    """Who somebody is, what they are to look for, and how far they have come."""
    account, site = await desk.who(request), desk.site
    done = await desk.on_disk(lambda db: assignments.progress(db, account.name, site.rules))
    facts = {"name": account.name, "role": account.role, "guidelines": site.guidelines, "k": site.rules.k}
    return facts | {"progress": done._asdict()}


async def pairs(desk: Desk, request: Request) -> dict[str, Any]:
    """The next pairs for somebody, held for them."""
    account, rules = await desk.who(request), desk.site.rules
    want = (await gate.body(request, ASKED, desk.site.limits))["want"]
    if not 1 <= want <= MOST_PAIRS:
        raise gate.Refused(400, "invalid", f"want={want}: 1 to {MOST_PAIRS} pairs")

    def job(db: sqlite3.Connection) -> tuple[list[assignments.Given], assignments.Progress]:
        return assignments.give(db, account.name, rules, want), assignments.progress(db, account.name, rules)

    given, done = await desk.on_disk(job)
    return {"pairs": [shown(each) for each in given], "progress": done._asdict()}


async def choices(desk: Desk, request: Request) -> dict[str, Any]:
    """Keep a choice. The side is that of the lease; a word that is none is refused by the store."""
    account = await desk.who(request)
    sent = await gate.body(request, CHOSEN, desk.site.limits)
    made = store.Choice(**{"labeler": account.name, "left_response": "a", **sent})
    kept = await desk.on_disk(lambda db: assignments.answer(db, made, desk.site.rules))
    return {"pair": kept.pair, "choice": kept.choice, "sequence": kept.sequence}


async def undo(desk: Desk, request: Request) -> dict[str, Any]:
    """Take the latest choice back, and show its pair again."""
    account = await desk.who(request)
    sent = await gate.body(request, UNDONE, desk.site.limits)
    given = await desk.on_disk(lambda db: assignments.take_back(db, account.name, desk.site.rules, sent["id"]))
    return {"pair": None if given is None else shown(given)}


async def summary(desk: Desk, request: Request) -> dict[str, Any]:
    """Figures for an admin."""
    await desk.who(request, admin=True)
    return await desk.aside(lambda db: dashboard.summary(db, desk.site.rules))


async def export(desk: Desk, request: Request) -> str:
    """All choices as JSON lines, for an admin, but those on texts that no file can hold."""
    await desk.who(request, admin=True)
    return exchange.jsonl(exchange.writable(await desk.aside(lambda db: store.preferences(db, ties=True))))


def make_app(site: Site, writing: writer.Writer) -> gate.App:
    """The ASGI application, all checks included."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    rate = limits.Bucket(site.limits.rate, site.limits.burst)
    desk = Desk(site, writing, rate, limits.Bucket(site.limits.wrong_tokens / 60, site.limits.wrong_tokens))

    def answering(path: str, answer: Callable[[Desk, Request], Awaitable[Any]], method: str) -> Route:
        async def endpoint(request: Request) -> Response:
            found = await answer(desk, request)
            if isinstance(found, str):
                named = {"Content-Disposition": 'attachment; filename="choices.jsonl"'}
                return Response(found, media_type="application/x-ndjson", headers=named)
            return JSONResponse(found)

        return Route(path, endpoint, methods=[method])

    def static(path: str, name: str, kind: str) -> Route:
        content = (Path(__file__).parent / name).read_bytes()

        async def endpoint(request: Request) -> Response:
            return Response(content, media_type=kind)

        return Route(path, endpoint)

    async def failed(request: Request, error: Exception) -> Response:
        refused = gate.refusal(error)
        if isinstance(error, sqlite3.Error):  # any other fault of ours is logged by uvicorn
            logging.getLogger("uvicorn.error").error("the store: %s", error)
        return JSONResponse(refused.body(), refused.status, refused.headers)

    routes = [static("/", "page.html", "text/html"), static("/page.css", "page.css", "text/css")]
    routes += [static(f"/{name}", name, "text/javascript") for name in ("page.js", "outbox.js", "text.js", "figures.js")]
    routes += [answering("/api/me", me, "GET"), answering("/api/summary", summary, "GET")]
    routes += [answering("/api/choices.jsonl", export, "GET"), answering("/api/pairs", pairs, "POST")]
    routes += [answering("/api/choices", choices, "POST"), answering("/api/undo", undo, "POST")]
    kinds = (HTTPException, gate.Refused, ValueError, sqlite3.Error, writer.Busy)
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys([*kinds, Exception], failed))  # pyright: ignore[reportArgumentType]
    return gate.guarded(cast(gate.App, app), site.host, site.origins, site.limits)


def shown(given: assignments.Given) -> dict[str, str]:
    """A pair as the page gets it: who wrote which answer is not in it."""
    pair, left = given
    first, second = (pair.response_a, pair.response_b) if left == "a" else (pair.response_b, pair.response_a)
    return {"pair": pair.id, "prompt": pair.prompt, "left": first, "right": second}


@contextlib.contextmanager
def running(site: Site) -> Iterator[str]:
    """The server in a thread of its own, from when it answers until the block ends; gives its address.

    Raises:
        ValueError: the extra `serve` is not installed, or the store is none.
        OSError: the port is taken, the host is not this machine's, or the server did not start.
    """
    with (
        contextlib.closing(writer.Writer(site.store, site.limits.waiting)) as writing,
        listen.listening(lambda: make_app(site, writing), site.host, site.port) as address,
    ):
        yield address


def wait_until_labelled(site: Site, limit: int | None = None, linger: int | float = 20.0) -> None:
    """Return when all pairs (or `limit` choices) are labelled, and `linger` seconds have passed in which nobody undid one."""
    complete_since = None
    with contextlib.closing(store.open_store(site.store)) as db:
        while complete_since is None or time.monotonic() - complete_since < linger:
            done = assignments.progress(db, "", site.rules)
            complete = done.labels >= (done.wanted if limit is None else min(limit, done.wanted))
            complete_since = (complete_since or time.monotonic()) if complete else None
            time.sleep(0.5)
