"""OpenAI's interface over the engine: models, completions, and chat completions, whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from jaxrlhf.data import pipeline
from jaxrlhf.feedback import gate
from jaxrlhf.serving import protocol, texts
from jaxrlhf.serving.desk import Desk, Kept, person_of
from jaxrlhf.serving.engine import Ask, Bench, Engine, Piece
from jaxrlhf.serving.protocol import Wanted
from jaxrlhf.serving.texts import Answer

if TYPE_CHECKING:
    from starlette.requests import Request


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
