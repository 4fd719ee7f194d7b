"""OpenAI's interface: what a request asks for, and how answers and errors read.

What is not offered is refused by name; nothing that a client asks for is dropped in silence.
Source: OpenAI's API reference, "Create chat completion" and "Create completion" (platform.openai.com/docs/api-reference).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxrlhf.data import sources
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.feedback.gate import Refused
from jaxrlhf.serving.texts import Answer

CHAT = sources.Schema(required={"model": str, "messages": list})
TEXT = sources.Schema(required={"model": str})
MOST_STOPS = 4
# Fields that ask for nothing where they have this value (or null).
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
}
KNOWN = {
    *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "seed", "stop"),
    *("logprobs", "stream", "stream_options", "store", "user"),
}
TYPES = {400: "invalid_request_error", 404: "invalid_request_error", 413: "invalid_request_error"}
TYPES |= {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "overloaded_error"}


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a request that does not say gets, and the most that it may ask for."""

    temperature: float
    top_p: float
    max_tokens: int  # the default and the most
    n: int  # the most


@dataclasses.dataclass(frozen=True)
class Wanted:
    """How a request wants its answers."""

    n: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    logprobs: bool
    stream: bool
    usage: bool  # of a stream, in a last piece
    store: bool  # the answers may be judged, and then be kept
    user: str


def refused(field: str, problem: str, code: str = "invalid_value") -> Refused:
    """A request that asks for what there is not."""
    error = Refused(400, code, f"{field}: {problem}")
    error.param = field
    return error


def told(error: Refused) -> dict[str, Any]:
    """A refusal as OpenAI words it."""
    kind = TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def read(row: Mapping[str, Any], defaults: Defaults) -> Wanted:
    """What a request wants, checked.

    Raises:
        Refused: 400, naming the field.
    """
    row = {name: value for name, value in row.items() if value is not None}
    for name, value in row.items():
        if name in NEUTRAL and not any(value == each and type(value) in (type(each), int, float) for each in NEUTRAL[name]):
            raise refused(name, f"{json.dumps(value)[:80]} is not offered here; leave it out", "unsupported_value")
        if name not in NEUTRAL and name not in KNOWN:
            raise refused(name, "unknown field", "unknown_parameter")
    most = row.get("max_completion_tokens", row.get("max_tokens", defaults.max_tokens))
    wanted = Wanted(
        n=_whole("n", row.get("n", 1), 1, defaults.n),
        max_tokens=_whole("max_tokens", most, 1, defaults.max_tokens),
        temperature=_number("temperature", row.get("temperature", defaults.temperature), 0.0, 2.0),
        top_p=_number("top_p", row.get("top_p", defaults.top_p), 0.0, 1.0),
        seed=_whole("seed", row["seed"], -(2**63), 2**63 - 1) if "seed" in row else None,
        stop=_stops(row.get("stop", ())),
        logprobs=_logprobs(row),
        stream=_flag("stream", row.get("stream", False)),
        usage=_usage(row.get("stream_options", {})),
        store=_flag("store", row.get("store", False)),
        user=_text("user", row.get("user", "")),
    )
    if wanted.top_p == 0:
        raise refused("top_p", "0 keeps no token; above 0 up to 1")
    return wanted


def messages(value: list[Any]) -> list[dict[str, str]]:
    """The turns of a conversation, the last of them the user's.

    Raises:
        Refused: 400.
    """
    for number, each in enumerate(value):
        if not isinstance(each, dict) or each.get("role") not in ("system", "developer", "user", "assistant"):
            raise refused(f"messages[{number}]", "an object with a role (system, user, assistant) and a content")
        if not isinstance(each.get("content"), str):
            raise refused(f"messages[{number}].content", "must be text")
    if not value or value[-1]["role"] != "user":
        raise refused("messages", "the last one must be the user's")
    return [{"role": each["role"], "content": each["content"]} for each in value]


def prompts(value: Any, vocab_size: int) -> list[str | list[int]]:
    """The prompts of a completion: a text, several, ids, or several rows of ids.

    Raises:
        Refused: 400.
    """
    given = [value] if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int) else value
    if not isinstance(given, list) or not given:
        raise refused("prompt", "a text, a list of texts, or token ids")
    for each in given:
        ids = isinstance(each, list) and each and all(type(i) is int and 0 <= i < vocab_size for i in each)
        if not isinstance(each, str) and not ids:
            raise refused("prompt", f"a text, a list of texts, or token ids from 0 to {vocab_size - 1}")
    return given


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise refused(name, f"{json.dumps(value)[:80]} must be a whole number from {least} to {most}")
    return value


def _number(name: str, value: Any, least: float, most: float) -> float:
    if type(value) not in (int, float) or not least <= value <= most:
        raise refused(name, f"{json.dumps(value)[:80]} must be a number from {least:g} to {most:g}")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise refused(name, f"{json.dumps(value)[:80]} must be true or false")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > 64:
        raise refused(name, "a text of at most 64 characters")
    return value


def _stops(value: Any) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or len(found) > MOST_STOPS or not all(isinstance(x, str) and x for x in found):
        raise refused("stop", f"a text or a list of up to {MOST_STOPS}, none of them empty")
    return tuple(found)


def _logprobs(row: Mapping[str, Any]) -> bool:
    """Of the tokens that were drawn; those of others are not kept."""
    value = row.get("logprobs", False)
    if "messages" in row:
        return _flag("logprobs", value)
    if value is not False and (type(value) is not int or value != 0):
        raise refused("logprobs", "0 gives those of the tokens drawn; others are not offered", "unsupported_value")
    return value is not False


def _usage(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) - {"include_usage"}:
        raise refused("stream_options", "an object with include_usage")
    return _flag("stream_options.include_usage", value.get("include_usage", False))


# ------------------------------------------------------------------------------------------------ answers


def usage(prompt: int, answers: list[Answer]) -> dict[str, int]:
    """Tokens read and written."""
    written = sum(len(each.tokens) for each in answers)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def choice(index: int, said: str, answer: Answer, first: int, pieces: list[bytes] | None, form: str) -> dict[str, Any]:
    """One choice, or a part of one: `said` is its text, whose tokens begin at `first`. `form`: chat, delta or text."""
    tokens, logprobs = answer.tokens[first:], answer.logprobs[first:]
    told: dict[str, Any] | None = None
    if pieces is not None and form == "text":
        texts = [_piece(pieces, i).decode("utf-8", "replace") for i in tokens]
        before = sum(len(_piece(pieces, i).decode("utf-8", "replace")) for i in answer.tokens[:first])
        offsets = [before + sum(map(len, texts[:k])) for k in range(len(texts))]
        told = {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}
    elif pieces is not None:
        told = {"content": [_token(_piece(pieces, i), p) for i, p in zip(tokens, logprobs, strict=True)], "refusal": None}
    end = answer.end or None
    named = {"text": {"text": said}, "chat": {"message": {"role": "assistant", "content": said, "refusal": None}}}
    named["delta"] = {"delta": {"content": said}}
    return {"index": index, **named[form], "logprobs": told, "finish_reason": end}


def pieces_of(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each id, for log-probs.

    Raises:
        Refused: 400: the tokenizer has none.
    """
    try:
        return tokenizer.pieces()
    except ValueError as error:
        raise refused("logprobs", str(error), "unsupported_value") from error


def _piece(pieces: list[bytes], token: int) -> bytes:
    return pieces[token] if token < len(pieces) else b""


def _token(piece: bytes, logprob: float) -> dict[str, Any]:
    text = piece.decode("utf-8", "replace")
    return {"token": text, "bytes": list(piece), "logprob": logprob, "top_logprobs": []}
