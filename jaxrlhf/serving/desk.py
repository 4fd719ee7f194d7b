"""What is served, to whom, and what every request to it is answered from."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrlhf.feedback import accounts, gate, limits, writer
from jaxrlhf.serving import texts
from jaxrlhf.serving.engine import Engine
from jaxrlhf.serving.protocol import Defaults

if TYPE_CHECKING:
    from starlette.requests import Request

REMEMBERED = 1000  # answers that can still be judged


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


def person_of(account: str, user: str) -> str:
    """Under which name something is kept: that of the account, or what a visitor's page made up for itself."""
    return account or f"visitor {user[:64]}".strip()
