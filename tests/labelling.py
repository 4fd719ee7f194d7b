"""What the tests of the labelling server and its page share: a store with pairs, a client, a server in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import pathlib
import subprocess
import sys
import threading
import urllib.parse
import uuid
from collections.abc import Iterator

from scripts import ROOT

from jaxrlhf.feedback import accounts, assignments, store

SERVER = """
import sys, time, json, pathlib
from jaxrlhf.feedback import app, assignments, limits
given = json.loads(sys.argv[2])
rules = assignments.Rules(**given["rules"])
site = app.Site(pathlib.Path(sys.argv[1]), rules, limits.Limits(rate=1e9, burst=10**9), port=0)
with app.running(site) as address:
    print(address, flush=True)
    sys.stdin.read()
"""


def make_store(path: pathlib.Path, pairs: int, people: int) -> dict[str, str]:
    """A store with made-up pairs; returns the token of each person."""
    with contextlib.closing(store.open_store(path)) as db:
        store.add_pairs(db, [store.Pair(f"prompt {i}", f" first {i}", f" second {i}", "ppo", "sft") for i in range(pairs)])
        return {f"person {i}": accounts.create(db, f"person {i}") or "" for i in range(people)}


@dataclasses.dataclass
class Client:
    """One connection to the server, with one person's token."""

    address: str
    token: str = ""

    def __post_init__(self):
        self._connection: http.client.HTTPConnection | None = None

    def ask(self, method: str, path: str, sent=None, headers=None, raw: bytes | None = None):
        """(status, body as JSON or text, headers).

        Raises:
            OSError, http.client.HTTPException: no answer.
        """
        named = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        content = raw
        if sent is not None:
            content = json.dumps(sent).encode()
        if content is not None:
            named["Content-Type"] = "application/json"
        named |= headers or {}
        if self._connection is None:
            self._connection = http.client.HTTPConnection(urllib.parse.urlsplit(self.address).netloc, timeout=20)
        try:
            self._connection.request(method, path, content, named)
            answer = self._connection.getresponse()
            text = answer.read().decode()
        except (OSError, http.client.HTTPException):
            self.close()
            raise
        kind = answer.headers.get("Content-Type", "")
        return answer.status, json.loads(text) if kind.startswith("application/json") else text, answer.headers

    def pairs(self, want: int = 1) -> list[dict]:
        status, body, _ = self.ask("POST", "/api/pairs", {"want": want})
        assert status == 200, body
        return body["pairs"]

    def choose(self, pair: str, word: str = "left", name: str | None = None, **more):
        return self.ask("POST", "/api/choices", {"id": name or uuid.uuid4().hex, "pair": pair, "choice": word, **more})

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@contextlib.contextmanager
def server_process(path: pathlib.Path, **rules) -> Iterator[tuple[str, subprocess.Popen]]:
    """The server in a process of its own: (address, process). It is killed at the end."""
    command = [sys.executable, "-c", SERVER, str(path), json.dumps({"rules": rules})]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address, "the server did not start"
            yield address, process
        finally:
            process.kill()


def together(workers: list) -> None:
    """Run functions in threads of their own, and raise the first failure of any."""
    failures = []

    def guarded(work) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def labels_of_pairs(db) -> list[int]:
    """How many standing labels (skips are none) each pair has, counted from the log."""
    counted = {pair.id: 0 for pair in store.pairs(db)}
    for choice in store.choices(db):
        counted[choice.pair] += choice.choice != "skip"
    return list(counted.values())


def derived_is_true(db) -> bool:
    """Whether `progress`, which triggers keep, is what the log says."""
    kept = dict(db.execute("SELECT pair, labels FROM progress"))
    known = store.gold(db)
    counted = {pair.id: 0 for pair in store.pairs(db) if pair.id not in known}
    for choice in store.choices(db):
        if choice.pair in counted:
            counted[choice.pair] += choice.choice != "skip"
    return kept == counted


RULES = assignments.Rules(k=2, gold_share=0.0)
