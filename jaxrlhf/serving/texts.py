"""Between messages and token ids: what a policy reads of a conversation, and what a person sees of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxrlhf.data import conversations, pipeline
from jaxrlhf.data.tokenizer import Tokenizer

Task = Literal["continue", "reply", "template"]  # go on with a text; reply in our own format; by the checkpoint's template


def prompt(tokenizer: Tokenizer, text: str, task: Task = "continue") -> list[int]:
    """One text as a policy reads it."""
    if task == "template":
        return conversations.encode(tokenizer, [{"role": "user", "content": text}], ask=True)[0].tolist()
    return [tokenizer.bos, *tokenizer.encode(pipeline.clean(text)), *([tokenizer.eos] if task == "reply" else [])]


def chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], task: Task) -> list[int]:
    """A conversation as a policy reads it. Only a template has a place for earlier turns: without one, the last is read.

    Raises:
        ValueError: there is no chat template.
    """
    if task == "template":
        return conversations.encode(tokenizer, messages, ask=True)[0].tolist()
    return prompt(tokenizer, messages[-1]["content"], task)


def shown(text: str, stops: tuple[str, ...], ended: bool) -> str:
    """What a person sees of an answer: all before a stop string and, while more may come, no half of one or of a character."""
    end = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    if ended or end < len(text):
        return text[:end]
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held].rstrip("\ufffd")


class Answer:
    """One answer as it grows. What it holds at its end depends on the tokens alone, not on the pieces in which they came."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...], strip: bool):
        """`strip`: without white space at its beginning."""
        self._tokenizer, self._stops, self._strip = tokenizer, stops, strip
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""  # as the policy wrote it, up to a stop string
        self.end = ""  # stop, length, error
        self._told = ""

    def add(self, tokens: list[int], logprobs: list[float], end: str) -> str:
        """What is new to see."""
        before = len(self.tokens)
        self.tokens, self.logprobs, self.end = self.tokens + tokens, self.logprobs + logprobs, end
        text = self._read(len(self.tokens))
        if any(stop in text for stop in self._stops):
            # The first token with which one stands whole: what follows it is an accident of the chunk.
            last = next(n for n in range(before + 1, len(self.tokens) + 1) if self._stopped(n))
            del self.tokens[last:], self.logprobs[last:]
            text, self.end = self._read(last), "stop"
        self.text = shown(text, self._stops, ended=bool(self.end))
        visible = self.text.lstrip() if self._strip else self.text
        new, self._told = visible[len(self._told) :], visible
        return new

    def _read(self, count: int) -> str:
        return self._tokenizer.decode(self.tokens[:count], continuation=True)

    def _stopped(self, count: int) -> bool:
        return any(stop in self._read(count) for stop in self._stops)
