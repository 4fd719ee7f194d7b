"""Human small talk from the `chitchat-dataset` package (MIT): 7,168 chats, about 258,000 messages.

The file is read directly, without importing the package. Messages with an e-mail address or a phone number are left out.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from pathlib import Path

SHORTEST, LONGEST = 3, 250  # characters of a message that is kept
_PHONE = re.compile(r"\d{3}\)?[ .-]?\d{3}[ .-]?\d{4}")


def path() -> Path:
    """The data file of the installed package.

    Raises:
        ValueError: the package is absent.
    """
    spec = importlib.util.find_spec("chitchat_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("chat text needs the package chitchat-dataset: pip install 'jaxrlhf[loop]'")
    return Path(spec.submodule_search_locations[0]) / "dataset.json"


def keep(text: str) -> bool:
    """Whether a message is plain short ASCII text without an address or a phone number."""
    return SHORTEST <= len(text) <= LONGEST and text.isascii() and "@" not in text and _PHONE.search(text) is None


def chats() -> list[list[list[str]]]:
    """Every chat as its turns, a turn being the messages that one person sent in a row. Unfiltered, in the file's order.

    Raises:
        ValueError: the package is absent or its file is damaged.
    """
    file = path()
    try:
        data = json.loads(file.read_bytes())
        return [[[message["text"] for message in turn] for turn in chat["messages"]] for chat in data.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not the chitchat data ({error!r}); reinstall chitchat-dataset") from None


def messages(data: list[list[list[str]]] | None = None) -> list[str]:
    """All messages that `keep` accepts, chat after chat: text for language modelling."""
    return [text for chat in (chats() if data is None else data) for turn in chat for text in turn if keep(text)]


def pairs(data: list[list[list[str]]] | None = None) -> list[tuple[str, str]]:
    """(turn, reply) of two people: the last message of one turn and the first of the next, where `keep` accepts both."""
    return [
        (turn[-1], reply[0])
        for chat in (chats() if data is None else data)
        for turn, reply in itertools.pairwise(chat)
        if turn and reply and keep(turn[-1]) and keep(reply[0])
    ]
