"""The chat service: OpenAI's interface over the engine, and a page on which people talk, choose and judge (extra `serve`).

GET never writes.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jaxrlhf.feedback import gate, limits, listen, writer
from jaxrlhf.serving import completions, judgements, protocol
from jaxrlhf.serving.desk import Desk, Site
from jaxrlhf.serving.engine import Busy, Engine

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response


def make_app(site: Site, engine: Engine, writing: writer.Writer | None) -> gate.App:
    """The ASGI application, all checks included."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    rates = limits.Bucket(site.limits.rate, site.limits.burst)
    wrong = limits.Bucket(site.limits.wrong_tokens / 60, site.limits.wrong_tokens)
    desk = Desk(site, engine, writing, rates, wrong, int(time.time()), collections.OrderedDict())

    def answering(path: str, answer: Callable[[Desk, Request], Awaitable[Any]], method: str) -> Route:
        async def endpoint(request: Request) -> Response:
            found = await answer(desk, request)
            if isinstance(found, dict):
                return JSONResponse(found)
            return StreamingResponse(found, media_type="text/event-stream")

        return Route(path, endpoint, methods=[method])

    def static(path: str, file: Path, kind: str) -> Route:
        content = file.read_bytes()

        async def endpoint(request: Request) -> Response:
            return Response(content, media_type=kind)

        return Route(path, endpoint)

    async def failed(request: Request, error: Exception) -> Response:
        refused = gate.Refused(503, "busy", str(error), 1.0) if isinstance(error, Busy) else gate.refusal(error)
        if isinstance(error, sqlite3.Error):
            logging.getLogger("uvicorn.error").error("the store: %s", error)
        return JSONResponse(protocol.told(refused), refused.status, refused.headers)

    here, beside = Path(__file__).parent, Path(gate.__file__).parent
    routes = [static("/", here / "chat.html", "text/html"), static("/chat.css", here / "chat.css", "text/css")]
    routes += [static("/chat.js", here / "chat.js", "text/javascript")]
    routes += [static("/text.js", beside / "text.js", "text/javascript")]
    routes += [answering("/v1/models", completions.models, "GET"), answering("/v1/models/{name}", completions.model, "GET")]
    routes += [answering("/v1/completions", completions.completions, "POST")]
    routes += [answering("/v1/chat/completions", completions.chat_completions, "POST")]
    routes += [answering("/api/chat", judgements.about, "GET"), answering("/api/consent", judgements.consent, "POST")]
    routes += [answering("/api/choices", judgements.choose, "POST"), answering("/api/ratings", judgements.rate, "POST")]
    kinds = (HTTPException, gate.Refused, ValueError, sqlite3.Error, writer.Busy, Busy)
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys([*kinds, Exception], failed))  # pyright: ignore[reportArgumentType]
    return gate.guarded(cast(gate.App, app), site.host, site.origins, site.limits, protocol.told)


@contextlib.contextmanager
def running(site: Site, engine: Engine, grace: int = listen.GRACE) -> Iterator[str]:
    """The service, from when it answers until the block ends; gives its address. Requests under way then have `grace` seconds.

    Raises:
        ValueError, OSError: as `listen.listening`, or the store is none.
    """
    with contextlib.ExitStack() as stack:
        writing = None
        if site.store is not None:
            writing = stack.enter_context(contextlib.closing(writer.Writer(site.store, site.limits.waiting)))
        yield stack.enter_context(listen.listening(lambda: make_app(site, engine, writing), site.host, site.port, grace))
