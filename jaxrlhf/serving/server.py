"""The chat service: OpenAI's interface over the engine, and a page on which people talk, choose and judge (extra `serve`).

GET never writes. Without a store nothing that anybody types is kept; with one, what a person chose and judged is, once that
person has agreed to it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import secrets
import sqlite3
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jaxrlhf.data import pipeline, sources
from jaxrlhf.feedback import accounts, gate, limits, listen, store, unpaired, writer
from jaxrlhf.serving import protocol, texts
from jaxrlhf.serving.engine import Ask, Bench, Busy, Engine, Piece
from jaxrlhf.serving.protocol import Defaults, Wanted
from jaxrlhf.serving.texts import Answer

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

WORDING = (
    "May what you type here, the answers to it, and what you choose be kept, to train and to study language models? "
    "Nothing is kept if you say no, and you can talk all the same."
)
REMEMBERED = 1000  # answers that can still be judged
CONSENTED = sources.Schema(required={"given": bool}, optional={"user": str})
CHOSEN = sources.Schema(required={"completion": str, "choice": str}, optional={"user": str, "seconds": float})
RATED = sources.Schema(required={"completion": str, "index": int, "good": bool}, optional={"user": str})


@dataclasses.dataclass(frozen=True)
class Site:
    """What is served, and to whom."""

    name: str  # by which clients call the policy
    defaults: Defaults
    task: texts.Task = "continue"
    store: Path | None = None  # where people's choices go
    tokens: bool = False  # every request needs the token of an account of the store
    ask_share: float = 0.0  # of the answers on the page, shown two at a time
    limits: limits.Limits = limits.Limits()
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    origins: tuple[str, ...] = ()  # by which a proxy in front of it is called

    def __post_init__(self):
        if not 0 <= self.ask_share <= 1:
            raise ValueError(f"ask_share={self.ask_share} must be in [0, 1]")
        if self.ask_share and self.store is None:
            raise ValueError(f"ask_share={self.ask_share} asks for choices, but there is no store to keep them in")
        if self.tokens and self.store is None:
            raise ValueError("tokens are those of the accounts of a store: give one")
        if self.host not in gate.LOOPBACK and not self.tokens:
            raise ValueError(f"host={self.host}: whoever reaches it could use it; ask for tokens (--people)")


@dataclasses.dataclass(frozen=True)
class Kept:
    """Answers that may still be judged; in memory only."""

    person: str
    prompt: str
    answers: tuple[str, ...]
    version: str
    sampling: str


@dataclasses.dataclass(frozen=True)
class Desk:
    """What every request is answered from."""

    site: Site
    engine: Engine
    writing: writer.Writer | None
    rate: limits.Bucket  # by person
    wrong: limits.Bucket  # tokens, by address
    began: int  # seconds since 1970
    recent: collections.OrderedDict[str, Kept]

    async def on_disk(self, job: writer.Job) -> Any:
        """What a job on the store gives, when it is on the disk.

        Raises:
            gate.Refused: 404, there is no store.
        """
        if self.writing is None:
            raise gate.Refused(404, "no_store", "this service keeps nothing: it has no store")
        return await asyncio.wrap_future(self.writing.submit(job))

    async def who(self, request: Request) -> str:
        """The account whose token it is, or nobody by name where none is asked for; counted against the rate.

        Raises:
            gate.Refused: 401 or 429.
        """
        address = request.client.host if request.client else ""
        if not self.site.tokens:
            gate.hold(self.rate.wait(address), "too many requests")
            return ""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = scheme.lower() == "bearer" and token
        found = await self.on_disk(lambda db: accounts.find(db, token)) if given else None
        if found is None:
            gate.hold(self.wrong.wait(address), "too many wrong tokens from this address")
            raise gate.Refused(401, "invalid_api_key", "no such token: send that of your account as the API key")
        gate.hold(self.rate.wait(found.name), "too many requests")
        return found.name

    def remember(self, name: str, kept: Kept) -> None:
        """Keep answers in memory, and let the oldest go."""
        self.recent[name] = kept
        while len(self.recent) > REMEMBERED:
            self.recent.popitem(last=False)


class Call:
    """The rows of one request, from when they wait until they are written or their client is gone."""

    def __init__(self, engine: Engine, bench: Bench, prompts: list[list[int]], wanted: Wanted, strip: bool):
        """Raises:
        Busy, ValueError: as `Engine.submit`.
        """
        loop, self._engine = asyncio.get_running_loop(), engine
        self._written: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        rows = [(tuple(ids), _uid(wanted.seed, k)) for ids in prompts for k in range(wanted.n)]
        self.answers = [Answer(bench.policy.tokenizer, wanted.stop, strip) for _ in rows]

        def put(index: int) -> Callable[[Piece], None]:
            def emit(piece: Piece) -> None:
                with contextlib.suppress(RuntimeError):  # the server has ended
                    loop.call_soon_threadsafe(self._written.put_nowait, (index, piece))

            return emit

        asks = [Ask(ids, uid, wanted.max_tokens, wanted.temperature, wanted.top_p) for ids, uid in rows]
        self._running = engine.submit(bench, asks, [put(index) for index in range(len(rows))])

    async def parts(self) -> AsyncGenerator[tuple[int, str, int], None]:
        """(row, what is new to see of it, first of the tokens that are new), until all have ended.

        Raises:
            gate.Refused: 500, the engine failed.
        """
        try:
            while not all(answer.end for answer in self.answers):
                index, piece = await self._written.get()
                answer = self.answers[index]
                if answer.end:
                    continue
                if piece.end == "error":
                    raise gate.Refused(500, "internal", "a fault of the server; its log has it")
                first = len(answer.tokens)
                said = answer.add(piece.tokens, piece.logprobs, piece.end)
                if answer.end and not piece.end:
                    self._engine.cancel([self._running[index]])
                yield index, said, first
        finally:
            self._engine.cancel(self._running)

    async def whole(self, request: Request) -> None:
        """Wait until all have ended.

        Raises:
            gate.Refused: the client went away, and its rows were given up; or as `parts`.
        """

        async def work() -> None:
            async for _ in self.parts():
                pass

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.ensure_future(work()), asyncio.ensure_future(gone())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise gate.Refused(499, "gone", "the client went away")
            tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()


def _uid(seed: int | None, index: int) -> int:
    """The name of a row's random numbers: 31 bits."""
    if seed is None:
        return secrets.randbits(31)
    return int.from_bytes(hashlib.blake2b(f"{seed} {index}".encode(), digest_size=4).digest(), "big") >> 1


# ------------------------------------------------------------------------------------------------ OpenAI's interface


async def models(desk: Desk, request: Request) -> dict[str, Any]:
    """The one policy that is served."""
    await desk.who(request)
    return {"object": "list", "data": [_model(desk)]}


async def model(desk: Desk, request: Request) -> dict[str, Any]:
    """One by its name."""
    await desk.who(request)
    _named(desk, request.path_params["name"])
    return _model(desk)


def _model(desk: Desk) -> dict[str, Any]:
    return {"id": desk.site.name, "object": "model", "created": desk.began, "owned_by": "jaxrlhf"}


def _named(desk: Desk, name: str) -> None:
    if name != desk.site.name:
        error = gate.Refused(404, "model_not_found", f"the model {name[:80]!r} does not exist; {desk.site.name!r} does")
        error.param = "model"
        raise error


async def chat_completions(desk: Desk, request: Request) -> Any:
    """Answers to a conversation."""
    person = await desk.who(request)
    row = await gate.fields(request, protocol.CHAT, desk.site.limits)
    _named(desk, row["model"])
    wanted, messages = protocol.read(row, desk.site.defaults), protocol.messages(row["messages"])
    bench = desk.engine.bench
    prompt = texts.chat(bench.policy.tokenizer, messages, desk.site.task)
    alone = [each["content"] for each in messages if each["role"] == "user"] if len(messages) == 1 else []
    return await _answered(desk, request, person, wanted, bench, [prompt], alone)


async def completions(desk: Desk, request: Request) -> Any:
    """Texts that go on with others."""
    person = await desk.who(request)
    row = await gate.fields(request, protocol.TEXT, desk.site.limits)
    _named(desk, row["model"])
    wanted, bench = protocol.read(row, desk.site.defaults), desk.engine.bench
    given = protocol.prompts(row.get("prompt"), bench.policy.model.vocab_size)
    prompts = [texts.prompt(bench.policy.tokenizer, each) if isinstance(each, str) else each for each in given]
    return await _answered(desk, request, person, wanted, bench, prompts, None)


async def _answered(
    desk: Desk,
    request: Request,
    person: str,
    wanted: Wanted,
    bench: Bench,
    prompts: list[list[int]],
    alone: list[str] | None,  # the message, where there is but one; None: no chat
) -> Any:
    if problem := next((len(ids) for ids in prompts if len(ids) > bench.width), 0):
        message = f"the prompt has {problem} tokens; {bench.width} are read beside an answer: shorten it"
        raise gate.Refused(400, "context_length_exceeded", message)
    chat = alone is not None
    strip = chat and desk.site.task != "continue"
    pieces = protocol.pieces_of(bench.policy.tokenizer) if wanted.logprobs else None
    call = Call(desk.engine, bench, prompts, wanted, strip)
    name = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
    kind = ("chat.completion" if chat else "text_completion") + (".chunk" if chat and wanted.stream else "")
    head = {"id": name, "object": kind, "created": int(time.time()), "model": desk.site.name}
    head |= {"system_fingerprint": bench.policy.version}
    read = sum(map(len, prompts))

    def ended() -> None:
        if wanted.store and alone and desk.writing is not None:
            drawn = {field: getattr(wanted, field) for field in ("temperature", "top_p", "max_tokens", "seed")}
            kept = tuple(each.text for each in call.answers)
            who = person_of(person, wanted.user)
            desk.remember(name, Kept(who, pipeline.clean(alone[0]), kept, bench.policy.version, json.dumps(drawn)))

    if wanted.stream:
        return _streamed(call, head, wanted, pieces, chat, read, ended)
    await call.whole(request)
    ended()
    form = "chat" if chat else "text"
    said = [each.text.lstrip() if strip else each.text for each in call.answers]
    choices = [protocol.choice(i, text, call.answers[i], 0, pieces, form) for i, text in enumerate(said)]
    return head | {"choices": choices, "usage": protocol.usage(read, call.answers)}


async def _streamed(
    call: Call,
    head: dict[str, Any],
    wanted: Wanted,
    pieces: list[bytes] | None,
    chat: bool,
    read: int,
    ended: Callable[[], None],
) -> AsyncIterator[bytes]:
    """Server-sent events."""
    none = {"usage": None} if wanted.usage else {}
    try:
        for index in range(len(call.answers) if chat else 0):
            delta = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            yield _event(head | {"choices": [delta]} | none)
        async with contextlib.aclosing(call.parts()) as parts:
            async for index, said, first in parts:
                choice = protocol.choice(index, said, call.answers[index], first, pieces, "delta" if chat else "text")
                if all(answer.end for answer in call.answers):
                    ended()  # before the client knows that it may judge them
                yield _event(head | {"choices": [choice]} | none)
    except gate.Refused as error:
        yield _event(protocol.told(error))
        return
    if wanted.usage:
        yield _event(head | {"choices": [], "usage": protocol.usage(read, call.answers)})
    yield b"data: [DONE]\n\n"


def _event(told: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(told, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


# ------------------------------------------------------------------------------------------------ the page's own


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


def person_of(account: str, user: str) -> str:
    """Under which name something is kept: that of the account, or what a visitor's page made up for itself."""
    return account or f"visitor {user[:64]}".strip()


def _judged(desk: Desk, account: str, sent: dict[str, Any]) -> Kept:
    kept = desk.recent.get(sent["completion"])
    if kept is None or kept.person != person_of(account, sent.get("user", "")):
        raise gate.Refused(404, "unknown_answer", "no such answer of yours that could still be judged")
    return kept


def _check_consent(db: sqlite3.Connection, person: str) -> None:
    if not unpaired.consented(db, person):
        raise gate.Refused(403, "consent", "nothing is kept: you have not agreed to it")


# ------------------------------------------------------------------------------------------------ serving


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
    routes += [answering("/v1/models", models, "GET"), answering("/v1/models/{name}", model, "GET")]
    routes += [answering("/v1/chat/completions", chat_completions, "POST"), answering("/v1/completions", completions, "POST")]
    routes += [answering("/api/chat", about, "GET"), answering("/api/consent", consent, "POST")]
    routes += [answering("/api/choices", choose, "POST"), answering("/api/ratings", rate, "POST")]
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
