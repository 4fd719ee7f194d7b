"""Conversations as rows of token ids by a checkpoint's chat template.

What the assistant wrote is known from how a row is made: the template is rendered with a mark in place of each message, and the
ids of the messages are put where the marks stood. No text is tokenised twice, and no message can hold a special token.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool, Int

from jaxrlhf.data import pipeline, sources
from jaxrlhf.data.pipeline import Arrays
from jaxrlhf.data.tokenizer import Tokenizer

SCHEMA = sources.Schema(required={"messages": list})
_MARK = "\ue000{}\ue001"  # private use: no text should hold it, and no template takes it apart
_MARKED = re.compile("\ue000(\\d+)\ue001")

Messages = Sequence[Mapping[str, Any]]


def encode(tokenizer: Tokenizer, messages: Messages, ask: bool = False) -> tuple[Int[np.ndarray, " t"], Bool[np.ndarray, " t"]]:
    """Ids of a conversation, and whether the assistant wrote each: its message and the special token that ends its turn.

    With `ask` the ids end where the assistant's next answer begins.

    Raises:
        ValueError: there is no chat template, or it does not keep every message once.
    """
    named = _named(tokenizer)
    marked = [{**message, "content": _MARK.format(i)} for i, message in enumerate(messages)]
    pieces = _MARKED.split(_render(named, marked, ask))  # text, number, text, number, ..., text
    if [int(number) for number in pieces[1::2]] != list(range(len(messages))):
        raise ValueError(
            f"the chat template keeps messages {', '.join(pieces[1::2]) or 'none'} of 0 .. {len(messages) - 1}: each must "
            f"stand there once; the roles are {', '.join(str(message.get('role')) for message in messages)}"
        )
    read = reader(tokenizer)
    special = {i for i, token in read.get_added_tokens_decoder().items() if token.special}
    ids, written = [], []
    for i, text in enumerate(pieces[::2]):
        spoken = i > 0 and messages[i - 1]["role"] == "assistant"
        between = read.encode(text, add_special_tokens=False).ids
        ids += between
        written += [spoken and k == 0 and token in special for k, token in enumerate(between)]
        if i < len(messages):
            said = tokenizer.encode(messages[i]["content"], continuation=True)
            ids += said
            written += [messages[i]["role"] == "assistant"] * len(said)
    return np.array(ids, np.int32), np.array(written, bool)


def render(tokenizer: Tokenizer, messages: Messages, ask: bool = False) -> str:
    """A conversation as the chat template writes it, for programs that want text; the messages are not kept apart from it.

    `ask`: the text ends where the assistant's next answer begins, else where the last message ends.

    Raises:
        ValueError: there is no chat template.
    """
    return _render(_named(tokenizer), [dict(message) for message in messages], ask, go_on=not ask)


def template(tokenizer: Tokenizer) -> str:
    """The chat template.

    Raises:
        ValueError: there is none.
    """
    return _named(tokenizer)["chat_template"]


def answer_rows(conversations: Sequence[Messages], tokenizer: Tokenizer, width: int) -> tuple[Arrays, int]:
    """Fine-tuning rows, one for each of the assistant's turns that ends within `width` tokens, and how many do not.

    Returns tokens [N, width], prompt_len [N] (all before the turn), response_len [N], row [N] (index into `conversations`).

    Raises:
        ValueError: no turn fits.
    """
    rows, prompts, kept, left = [], [], [], 0
    for number, messages in enumerate(conversations):
        ids, written = encode(tokenizer, messages)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], written, [False]])))
        for start, end in edges.reshape(-1, 2).tolist():
            if end > width or not start:
                left += 1
                continue
            rows.append(ids[:end].tolist())
            prompts.append(start)
            kept.append(number)
    if not rows:
        raise ValueError(f"none of {left} turns of the assistant ends within {width} tokens: choose a larger width")
    tokens, length = pipeline.pad_rows(rows, width, tokenizer.pad)
    prompt_len = np.array(prompts, np.int32)
    return {
        "tokens": tokens,
        "prompt_len": prompt_len,
        "response_len": length - prompt_len,
        "row": np.array(kept, np.int32),
    }, left


def read(file: Path | str, rejects: Path | str | None = None) -> list[list[dict[str, str]]]:
    """The conversations of a `.jsonl` file: `{"messages": [{"role": "user", "content": "..."}, ...]}` a line.

    With `rejects`, lines that are none are left out and named there.

    Raises:
        ValueError: a line is not one (naming file, line and field).
    """

    def check(row: dict[str, Any], place: str) -> dict[str, Any]:
        for message in row["messages"]:
            if not isinstance(message, dict) or not all(isinstance(message.get(name), str) for name in ("role", "content")):
                raise ValueError(f"{place}: messages: each needs a role and a content, both text, not {message!r}")
        return row

    return [row["messages"] for row in sources.read_jsonl(file, SCHEMA, rejects=rejects, check=check)]


@functools.lru_cache(maxsize=2)
def reader(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """What reads a template's own text, special tokens and all."""
    return tokenizers.Tokenizer.from_str(tokenizer.continuation.to_str())


def _named(tokenizer: Tokenizer) -> dict[str, Any]:
    """`tokenizer_config.json` with the chat template in it.

    Raises:
        ValueError: there is none.
    """
    values = json.loads(tokenizer.files["tokenizer_config.json"])
    template: Any = tokenizer.files.get("chat_template.jinja", values.get("chat_template"))
    if isinstance(template, list):  # several, by name
        template = next((each["template"] for each in template if each["name"] == "default"), None)
    if not template:
        raise ValueError("the tokenizer has no chat template (chat_template.jinja): take the checkpoint of an instructed model")
    return values | {"chat_template": template}


def _render(values: dict[str, Any], messages: list[dict[str, Any]], ask: bool, go_on: bool = False) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {name: token for name, token in values.items() if name.endswith("_token") and token is not None}
    special = {name: token["content"] if isinstance(token, dict) else token for name, token in special.items()}
    rendered: Any = render_jinja_template(
        [messages],
        chat_template=values["chat_template"],
        add_generation_prompt=ask,
        continue_final_message=go_on,
        **special,
    )
    return rendered[0][0]
