"""What stands before every request of the labelling server: who may ask, how much, and how a refusal reads."""

from __future__ import annotations

import asyncio
import math
import sqlite3
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from jaxrlhf.data import sources
from jaxrlhf.feedback import assignments, limits, writer

if TYPE_CHECKING:
    from starlette.requests import Request

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Scripts, styles and requests of this server alone, none inline; no text can become markup (Trusted Types).
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """A request that is not answered as asked."""

    def __init__(self, status: int, code: str, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.param: str | None = None  # the field that is to blame, where one is
        self.headers = {"Retry-After": str(math.ceil(retry_after))} if retry_after else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        """The one form that every error has."""
        return {"error": {"code": self.code, "message": self.message}}


def refusal(error: Exception) -> Refused:
    """How an error of the store, of the framework or of ours is told to the client."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, assignments.NotGiven):
        return Refused(404, "unknown_pair", str(error))
    if isinstance(error, assignments.Full):
        return Refused(409, "pair_full", str(error))
    if isinstance(error, writer.Busy):
        return Refused(503, "busy", str(error), 1.0)
    if isinstance(error, sqlite3.OperationalError):
        locked = (error.sqlite_errorcode & 255) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
        if locked:
            return Refused(503, "busy", "another program holds the store; the choice was not kept, send it again", 1.0)
        return Refused(507, "storage", f"the choice was not kept, send it again: {error}", 5.0)
    if isinstance(error, ValueError):
        return Refused(400, "invalid", str(error))
    status = getattr(error, "status_code", 500)  # starlette's own: no such path, no such method
    if status == 500:
        return Refused(500, "internal", "a fault of the server; its log has it")
    return Refused(status, {404: "not_found", 405: "method"}.get(status, "http"), str(getattr(error, "detail", error)))


def hold(seconds: float, why: str) -> None:
    """Refuse for so many seconds, where there are any.

    Raises:
        Refused: 429 with Retry-After.
    """
    if seconds > 0:
        raise Refused(429, "rate", f"{why}: wait {math.ceil(seconds)} s", seconds)


async def body(request: Request, schema: sources.Schema, limit: limits.Limits) -> dict[str, Any]:
    """The request's JSON object with the fields of `schema` and no other.

    Raises:
        Refused: 400, 408, 413 or 415, saying why.
    """
    row = await fields(request, schema, limit)
    if unknown := row.keys() - schema.required.keys() - schema.optional.keys():
        raise Refused(400, "invalid", f"body: unknown field {sorted(unknown)[0]!r}")
    return row


async def fields(request: Request, schema: sources.Schema, limit: limits.Limits) -> dict[str, Any]:
    """The request's JSON object with the fields of `schema`, and whatever others it has.

    Raises:
        Refused: 400, 408, 413 or 415, saying why.
    """
    from starlette.requests import ClientDisconnect

    length = request.headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise Refused(400, "invalid", f"Content-Length {length[:20]!r} is no length")
    too_long = Refused(413, "too_long", f"the body is longer than {limit.body:,} bytes")
    if int(length) > limit.body:
        raise too_long
    content = b""
    try:
        async with asyncio.timeout(limit.read_seconds):
            async for part in request.stream():
                content += part
                if len(content) > limit.body:
                    raise too_long
    except TimeoutError:
        raise Refused(408, "slow", f"the body was not here after {limit.read_seconds} s") from None
    except ClientDisconnect:
        raise Refused(400, "gone", "the client went away before the body's end") from None
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "content_type", "Content-Type must be application/json")
    try:
        return sources.parse_line(content, schema, "body", limit.body)
    except ValueError as error:
        raise Refused(400, "invalid", str(error)) from None


def foreign(headers: dict[str, str], host: str, origins: tuple[str, ...], writes: bool) -> str | None:
    """Why a request comes from another page than ours, if so."""
    named = _place(f"//{headers.get('host', '')}").hostname or ""
    known = {_place(origin).hostname for origin in origins}
    if host in LOOPBACK and named not in LOOPBACK and named not in known:
        return f"this server is not called {named[:80]!r}"  # a name that somebody let point to this machine
    if not writes:
        return None
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return "a request from another site"
    origin = headers.get("origin")
    if origin is not None and origin not in origins and _place(origin).netloc != headers.get("host"):
        return f"a request from {origin[:80]!r}"
    return None


def _place(address: str) -> SplitResult:
    """An address taken apart; nowhere where it is none."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def guarded(
    app: App,
    host: str,
    origins: tuple[str, ...],
    limit: limits.Limits,
    told: Callable[[Refused], dict[str, Any]] = Refused.body,
) -> App:
    """`app` behind the checks that need no account: where a request comes from, and how many there are at once. `told`: how
    a refusal reads."""
    busy = 0

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal busy
        if scope["type"] != "http":
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.lower().encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = None
        if problem := foreign(headers, host, origins, scope["method"] not in ("GET", "HEAD")):
            refused = Refused(403, "origin", problem)
        elif busy >= limit.at_once:
            refused = Refused(503, "busy", f"{busy} requests at once", 1.0)
        if refused is not None:
            from starlette.responses import JSONResponse

            await JSONResponse(told(refused), refused.status, refused.headers)(scope, receive, send_with_headers)  # pyright: ignore[reportArgumentType]
            return
        busy += 1
        try:
            await app(scope, receive, send_with_headers)
        finally:
            busy -= 1

    return serve
