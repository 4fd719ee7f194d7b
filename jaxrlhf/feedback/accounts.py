"""Labelers and their tokens. A token is shown once, when it is made; the store keeps its hash."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import sqlite3
import time
import unicodedata
from typing import Literal, NamedTuple

from jaxrlhf.feedback import schema

Role = Literal["labeler", "admin"]


class Account(NamedTuple):
    """Who somebody is, and what they may do."""

    name: str
    role: Role


def create(db: sqlite3.Connection, name: str, role: Role = "labeler", renew: bool = False) -> str | None:
    """Make an account and return its token, the only time that it can be seen; None where the account is there already.

    With `renew` an account that is there gets a new token (and the role), and the old one is worth nothing from then on.

    Raises:
        ValueError: a name that is empty, too long or invisible, a role that is none, or another role than it has.
    """
    if not 1 <= len(name) <= 64 or any(unicodedata.category(c)[0] == "C" for c in name) or name != name.strip():
        raise ValueError(f"name {name[:80]!r}: 1 to 64 visible characters, no space at the ends")
    if role not in ("labeler", "admin"):
        raise ValueError(f"role {role!r}: labeler or admin")
    with schema.transaction(db):
        known = db.execute("SELECT role FROM labelers WHERE name = ?", (name,)).fetchone()
        if known is not None and not renew:
            if known[0] != role:
                raise ValueError(f"{name!r} is there as {known[0]}, not as {role}: renew the token to change the role")
            return None
        token = secrets.token_urlsafe(32)
        db.execute("INSERT OR REPLACE INTO labelers VALUES (?, ?, ?, ?)", (name, role, _hash(token), time.time()))
        return token


def find(db: sqlite3.Connection, token: str) -> Account | None:
    """Whose token it is, or None. Every account is compared, each in constant time."""
    given, found = _hash(token), None
    for name, role, stored in db.execute("SELECT name, role, token_hash FROM labelers ORDER BY name"):
        if hmac.compare_digest(given, stored):
            found = Account(name, role)
    return found


def every(db: sqlite3.Connection) -> list[Account]:
    """All accounts, by name."""
    return [Account(*row) for row in db.execute("SELECT name, role FROM labelers ORDER BY name")]


def _hash(token: str) -> str:
    """256 random bits need no slow hash: there is nothing to guess from."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
