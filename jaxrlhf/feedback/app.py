"""The labelling page's server: a small JSON interface over the store, and three static files (extra `serve`).

Every request but those for the static files carries a bearer token; there is no cookie. GET never writes. Whatever goes
wrong is `{"error": {"code", "message"}}`. An answer 200 to a choice means that the choice is on the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jaxrlhf.data import sources
from jaxrlhf.feedback import accounts, assignments, dashboard, exchange, gate, limits, store, writer

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


def make_app(site: Site, writing: writer.Writer) -> gate.App:
    """The ASGI application, all checks included."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    rate = limits.Bucket(site.limits.rate, site.limits.burst)
    wrong = limits.Bucket(site.limits.wrong_tokens / 60, site.limits.wrong_tokens)

    async def on_disk(job: writer.Job) -> Any:
        return await asyncio.wrap_future(writing.submit(job))

    async def who(request: Request, admin: bool = False) -> accounts.Account:
        """Whose token it is, counted against their rate."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        address = request.client.host if request.client else ""
        found = await on_disk(lambda db: accounts.find(db, token)) if scheme.lower() == "bearer" and token else None
        if found is None:
            gate.hold(wrong.wait(address), "too many wrong tokens from this address")
            raise gate.Refused(401, "token", "no such token: open the link that you were given")
        gate.hold(rate.wait(found.name), "too many requests")
        if admin and found.role != "admin":
            raise gate.Refused(403, "role", f"{found.name} is a {found.role}; this is for an admin")
        return found

    async def me(request: Request) -> Response:
        account = await who(request)
        done = await on_disk(lambda db: assignments.progress(db, account.name, site.rules))
        facts = {"name": account.name, "role": account.role, "guidelines": site.guidelines, "k": site.rules.k}
        return JSONResponse(facts | {"progress": done._asdict()})

    async def pairs(request: Request) -> Response:
        account = await who(request)
        want = (await gate.body(request, ASKED, site.limits))["want"]
        if not 1 <= want <= MOST_PAIRS:
            raise gate.Refused(400, "invalid", f"want={want}: 1 to {MOST_PAIRS} pairs")
        given, done = await on_disk(
            lambda db: (
                assignments.give(db, account.name, site.rules, want),
                assignments.progress(db, account.name, site.rules),
            )
        )
        return JSONResponse({"pairs": [shown(each) for each in given], "progress": done._asdict()})

    async def choices(request: Request) -> Response:
        account = await who(request)
        sent = await gate.body(request, CHOSEN, site.limits)
        # The side is the lease's; a word that is none is refused by the store.
        made = store.Choice(**{"labeler": account.name, "left_response": "a", **sent})
        kept = await on_disk(lambda db: assignments.answer(db, made, site.rules))
        return JSONResponse({"pair": kept.pair, "choice": kept.choice, "sequence": kept.sequence})

    async def undo(request: Request) -> Response:
        account = await who(request)
        sent = await gate.body(request, UNDONE, site.limits)
        given = await on_disk(lambda db: assignments.take_back(db, account.name, site.rules, sent["id"]))
        return JSONResponse({"pair": None if given is None else shown(given)})

    def reading(job: writer.Job) -> Any:
        """Beside the writer, on a connection of its own: long reading holds nobody up."""
        with contextlib.closing(store.open_store(site.store)) as db:
            return job(db)

    async def summary(request: Request) -> Response:
        await who(request, admin=True)
        return JSONResponse(await asyncio.to_thread(reading, lambda db: dashboard.summary(db, site.rules)))

    async def export(request: Request) -> Response:
        await who(request, admin=True)
        rows = await asyncio.to_thread(reading, lambda db: store.preferences(db, ties=True))
        named = {"Content-Disposition": 'attachment; filename="choices.jsonl"'}
        return Response(exchange.jsonl(rows), media_type="application/x-ndjson", headers=named)

    def static(name: str, kind: str) -> Any:
        content = (Path(__file__).parent / name).read_bytes()

        async def serve_file(request: Request) -> Response:
            return Response(content, media_type=kind)

        return serve_file

    async def failed(request: Request, error: Exception) -> Response:
        refused = gate.refusal(error)
        if isinstance(error, sqlite3.Error):  # any other fault of ours is logged by uvicorn
            logging.getLogger("uvicorn.error").error("the store: %s", error)
        return JSONResponse(refused.body(), refused.status, refused.headers)

    routes = [
        Route("/", static("page.html", "text/html")),
        Route("/page.css", static("page.css", "text/css")),
        *[Route(f"/{name}", static(name, "text/javascript")) for name in ("page.js", "outbox.js", "text.js", "figures.js")],
        Route("/api/me", me),
        Route("/api/pairs", pairs, methods=["POST"]),
        Route("/api/choices", choices, methods=["POST"]),
        Route("/api/undo", undo, methods=["POST"]),
        Route("/api/summary", summary),
        Route("/api/choices.jsonl", export),
    ]
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
    try:
        import uvicorn
    except ImportError as error:
        raise ValueError("the labelling page needs starlette and uvicorn: pip install 'jaxrlhf[serve]'") from error
    family = socket.AF_INET6 if ":" in site.host else socket.AF_INET
    listening = socket.create_server((site.host, site.port), family=family)
    with listening, contextlib.closing(writer.Writer(site.store, site.limits.waiting)) as writing:
        config = uvicorn.Config(
            make_app(site, writing),
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            http="h11",
            ws="none",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,
            limit_concurrency=2000,  # connections; requests have a limit of their own
            h11_max_incomplete_event_size=16_384,  # of a request's head
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="feedback server", daemon=True)
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            if not server.started:
                raise OSError(f"the server at {site.host} did not start; what it printed says why")
            host = socket.gethostname() if site.host in ("0.0.0.0", "::", "") else site.host
            host = f"[{host}]" if ":" in host else host
            yield f"http://{host}:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def wait_until_labelled(site: Site, limit: int | None = None, linger: int | float = 20.0) -> None:
    """Return when all pairs (or `limit` choices) are labelled, and `linger` seconds have passed in which nobody undid one."""
    complete_since = None
    with contextlib.closing(store.open_store(site.store)) as db:
        while complete_since is None or time.monotonic() - complete_since < linger:
            done = assignments.progress(db, "", site.rules)
            complete = done.labels >= (done.wanted if limit is None else min(limit, done.wanted))
            complete_since = (complete_since or time.monotonic()) if complete else None
            time.sleep(0.5)
