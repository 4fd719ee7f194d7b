"""The labelling server over HTTP: what it refuses and how it says so, many at once, killed at any moment, a full disk."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import pathlib
import platform
import random
import re
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid

import pytest
from labelling import Client, derived_is_true, labels_of_pairs, make_store, server_process, together
from scripts import ROOT, command, environment, script

from jaxrlhf.feedback import accounts, app, assignments, gate, limits, store, writer

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "feedback.sqlite"


@contextlib.contextmanager
def serving(path, **settings):
    """A server in this process, and its address."""
    rules = settings.pop("rules", assignments.Rules(k=2, gold_share=0.0))
    with app.running(app.Site(path, rules, port=0, **settings)) as address:
        yield address


@contextlib.contextmanager
def _ann(path):
    """Ann's connection to a server with six pairs, and that of an admin."""
    tokens = make_store(path, 6, 2)
    with contextlib.closing(store.open_store(path)) as db:
        admin = accounts.create(db, "root", "admin") or ""
    with serving(path, limits=limits.Limits(rate=1e6, burst=10**6)) as address:
        ann, root = Client(address, tokens["person 0"]), Client(address, admin)
        yield ann, root
        ann.close()
        root.close()


@pytest.fixture
def ann(path):
    with _ann(path) as (client, _):
        yield client


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """A server that is asked only what it refuses: its store, Ann, and two pairs, of which the first was given to her."""
    path = tmp_path_factory.mktemp("refusing") / "feedback.sqlite"
    with _ann(path) as (client, _):
        mine = client.pairs(2)[0]["pair"]
        with contextlib.closing(store.open_store(path)) as db:
            yield path, client, mine, store.pairs(db)[5].id


def _events(path) -> list[tuple]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT pair, labeler, choice, id FROM events ORDER BY sequence").fetchall()


def test_a_choice_goes_to_the_disk_and_the_next_pair_comes(ann, path):
    first, second = ann.pairs(2)
    assert first.keys() == {"pair", "prompt", "left", "right"}, "the page does not get to know who wrote what"
    status, body, _ = ann.choose(first["pair"], "right", strength=3, note="clearer", seconds=1.5)
    assert (status, body["choice"], body["sequence"]) == (200, "right", 1)
    with contextlib.closing(store.open_store(path)) as db:
        (kept,) = store.choices(db)
    assert (kept.labeler, kept.strength, kept.note, kept.seconds) == ("person 0", 3, "clearer", 1.5)
    assert kept.left_response == store.left_response(kept.pair, "person 0")
    assert [pair["pair"] for pair in ann.pairs(1)] == [second["pair"]]
    status, body, _ = ann.ask("GET", "/api/me")
    assert (status, body["name"], body["role"], body["progress"]["done"]) == (200, "person 0", "labeler", 1)
    status, body, _ = ann.ask("POST", "/api/undo", {"id": "undo-0001"})
    assert (status, body["pair"]) == (200, first)


def test_sent_again_it_is_one_choice(ann, path):
    pair = ann.pairs()[0]["pair"]
    answers = [ann.choose(pair, "left", "same click of a mouse")[:2] for _ in range(3)]
    answers.append(ann.choose(pair, "right")[:2])  # the same pair in another tab
    assert answers == [answers[0]] * 4
    assert answers[0][0] == 200
    assert len(_events(path)) == 1


LONG = b'{"want": 1, "x": "' + b"x" * 70_000 + b'"}'


@pytest.mark.parametrize(
    ("method", "where", "sent", "headers", "status", "code"),
    [
        ("POST", "/api/pairs", b"{", {}, 400, "invalid"),
        ("POST", "/api/pairs", b"", {}, 400, "invalid"),
        ("POST", "/api/pairs", b"[1]", {}, 400, "invalid"),
        ("POST", "/api/pairs", b"\xff\xfe", {}, 400, "invalid"),
        ("POST", "/api/pairs", b"[" * 10_000, {}, 400, "invalid"),
        ("POST", "/api/pairs", b'{"want": NaN}', {}, 400, "invalid"),
        ("POST", "/api/pairs", b'{"want": 1, "want": 2}', {}, 400, "invalid"),
        ("POST", "/api/pairs", b'{"want": "1"}', {}, 400, "invalid"),
        ("POST", "/api/pairs", b'{"want": true}', {}, 400, "invalid"),
        ("POST", "/api/pairs", b'{"want": -1}', {}, 400, "invalid"),
        ("POST", "/api/pairs", b'{"want": 9}', {}, 400, "invalid"),
        ("POST", "/api/pairs", b'{"want": 1, "labeler": "person 1"}', {}, 400, "invalid"),
        ("POST", "/api/pairs", LONG, {}, 413, "too_long"),
        ("POST", "/api/pairs", b'{"want": 1}', {"Content-Length": "-5"}, 400, None),
        ("POST", "/api/pairs", b'{"want": 1}', {"Content-Type": "text/plain"}, 415, "content_type"),
        ("POST", "/api/pairs", b'{"want": 1}', {"Origin": "http://evil.example"}, 403, "origin"),
        ("POST", "/api/pairs", b'{"want": 1}', {"Origin": "null"}, 403, "origin"),
        ("POST", "/api/pairs", b'{"want": 1}', {"Sec-Fetch-Site": "cross-site"}, 403, "origin"),
        ("POST", "/api/pairs", b'{"want": 1}', {"Host": "evil.example"}, 403, "origin"),
        ("GET", "/api/me", None, {"Host": "evil.example"}, 403, "origin"),
        ("GET", "/api/me", None, {"Host": "[::1"}, 403, "origin"),
        ("POST", "/api/pairs", b'{"want": 1}', {"Origin": "http://[x"}, 403, "origin"),
        ("POST", "/api/pairs", b'{"want": 1}', {"Authorization": ""}, 401, "token"),
        ("POST", "/api/pairs", b'{"want": 1}', {"Authorization": "Bearer wrong"}, 401, "token"),
        ("GET", "/api/me?token={token}", None, {"Authorization": ""}, 401, "token"),
        ("GET", "/api/me", None, {"Authorization": "", "Cookie": "token={token}"}, 401, "token"),
        ("GET", "/api/summary", None, {}, 403, "role"),
        ("GET", "/api/choices.jsonl", None, {}, 403, "role"),
        ("GET", "/api/pairs", None, {}, 405, "method"),
        ("GET", "/api/choices", None, {}, 405, "method"),
        ("POST", "/api/me", b"{}", {}, 405, "method"),
        ("GET", "/../../etc/passwd", None, {}, 404, "not_found"),
        ("GET", "/%2e%2e/app.py", None, {}, 404, "not_found"),
        ("GET", "/store.py", None, {}, 404, "not_found"),
        ("POST", "/api/choices", b'{"id": "12345678", "pair": "unknown", "choice": "left"}', {}, 404, "unknown_pair"),
        ("POST", "/api/choices", b'{"id": "12345678", "pair": "{other}", "choice": "left"}', {}, 404, "unknown_pair"),
        ("POST", "/api/choices", b'{"id": "12345678", "pair": "{pair}", "choice": "undo"}', {}, 400, "invalid"),
        ("POST", "/api/choices", b'{{left}, "seconds": -1}', {}, 400, "invalid"),
        ("POST", "/api/choices", b'{{left}, "seconds": 1e999}', {}, 400, "invalid"),
        ("POST", "/api/choices", b'{{left}, "strength": 0}', {}, 400, "invalid"),
        ("POST", "/api/choices", b'{"id": "1", "pair": "{pair}", "choice": "left"}', {}, 400, "invalid"),
        ("POST", "/api/choices", b'{{left}, "note": "\\ud800"}', {}, 400, "invalid"),
        ("POST", "/api/undo", b'{"id": "1"}', {}, 400, "invalid"),
        ("POST", "/api/undo", b"{}", {}, 400, "invalid"),
    ],
)  # fmt: skip
def test_refusals_have_one_form_and_write_nothing(refusing, method, where, sent, headers, status, code):
    path, ann, mine, other = refusing
    if sent is not None and sent is not LONG:
        sent = sent.replace(b"{left}", b'"id": "12345678", "pair": "{pair}", "choice": "left"')
        sent = sent.replace(b"{pair}", mine.encode()).replace(b"{other}", other.encode())
    headers = {name: value.replace("{token}", ann.token) for name, value in headers.items()}
    found, body, answered = ann.ask(method, where.replace("{token}", ann.token), headers=headers, raw=sent)
    assert found == status, body
    if code is not None:  # None: the framework itself refuses what is no HTTP
        assert body.keys() == {"error"}
        assert body["error"].keys() == {"code", "message"}
        assert body["error"]["code"] == code
        assert answered["Content-Security-Policy"] == gate.POLICY
    assert _events(path) == []
    assert ann.token not in str(body)


def test_every_answer_carries_the_headers_that_keep_strangers_out(ann):
    for where in ("/", "/page.js", "/page.css", "/api/me", "/nothing"):
        headers = ann.ask("GET", where)[2]
        for name, value in gate.HEADERS.items():
            assert headers[name] == value, where
        assert headers["Server"] is None
        assert headers["Set-Cookie"] is None
    assert "unsafe" not in gate.POLICY
    assert "default-src 'none'" in gate.POLICY


def test_the_page_asks_nobody_else_and_holds_no_inline_code():
    folder = pathlib.Path(app.__file__).parent
    for name in ("page.html", "page.css", "page.js", "outbox.js", "text.js", "figures.js"):
        text = (folder / name).read_text()
        assert re.findall(r"https?://|//[a-z0-9.-]+\.[a-z]{2,}/", text) == [], name
        assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text) == [], name
        assert re.findall(r"\son[a-z]+=\"|style=\"|<style|<script(?![^>]* src=)|@import|url\(", text) == [], name


def test_only_an_admin_sees_figures_and_exports(path):
    with _ann(path) as (ann, root):
        ann.choose(ann.pairs()[0]["pair"], "left")
        _figures_and_export(root)


def _figures_and_export(root) -> None:
    status, body, _ = root.ask("GET", "/api/summary")
    assert (status, body["labels"], body["wanted"]) == (200, 1, 12)
    assert {each["name"]: each["choices"] for each in body["labelers"]} == {"person 0": 1, "person 1": 0, "root": 0}
    assert body["together"] is None, "nobody judged the same pair"
    first, second = body["ratings"]
    assert first["rating"] > second["rating"]
    assert first["comparisons"] == second["comparisons"] == 1
    status, text, headers = root.ask("GET", "/api/choices.jsonl")
    assert status == 200
    assert "attachment" in headers["Content-Disposition"]
    (row,) = [json.loads(line) for line in text.split("\n") if line]
    assert row["labeler"] == "person 0"


def test_a_pair_that_others_filled_is_told(path, monkeypatch):
    tokens = make_store(path, 1, 2)
    rules, moment = assignments.Rules(k=1, lease_seconds=60, gold_share=0.0), [1_700_000_000.0]
    monkeypatch.setattr(assignments, "now", lambda: moment[0])
    with serving(path, rules=rules) as address:
        ann, bob = (Client(address, token) for token in tokens.values())
        pair = ann.pairs()[0]["pair"]
        assert bob.pairs() == []
        moment[0] += 61
        assert bob.pairs()[0]["pair"] == pair
        assert bob.choose(pair)[0] == 200
        status, body, _ = ann.choose(pair)
        assert (status, body["error"]["code"]) == (409, "pair_full")
        assert ann.pairs() == []


def test_too_many_requests_of_one_person_wait(path):
    tokens = make_store(path, 6, 2)
    with serving(path, limits=limits.Limits(rate=0.05, burst=5)) as address:
        ann, bob = (Client(address, token) for token in tokens.values())
        found = [ann.ask("GET", "/api/me") for _ in range(6)]
        assert [status for status, _, _ in found] == [200] * 5 + [429]
        assert found[5][1]["error"]["code"] == "rate"
        assert 1 <= int(found[5][2]["Retry-After"]) <= 20
        assert bob.ask("GET", "/api/me")[0] == 200, "others do not wait for ann"


def test_an_absent_extra_is_named(path, monkeypatch):
    make_store(path, 1, 0)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxrlhf\[serve\]'"), serving(path):
        pass


def test_guessing_tokens_ends_after_ten(path):
    tokens = make_store(path, 6, 1)
    with serving(path) as address:
        guessing = Client(address)
        found = [guessing.ask("GET", "/api/me", headers={"Authorization": f"Bearer {i}"})[0] for i in range(12)]
        assert found == [401] * 10 + [429] * 2
        assert Client(address, tokens["person 0"]).ask("GET", "/api/me")[0] == 200, "whoever has a token may go on"


def test_a_body_of_unknown_length_is_cut_off(ann):
    """Chunked, without Content-Length, and more than the limit."""
    with contextlib.closing(http.client.HTTPConnection(urllib.parse.urlsplit(ann.address).netloc, timeout=20)) as raw:
        headers = {"Authorization": f"Bearer {ann.token}", "Content-Type": "application/json"}
        raw.request("POST", "/api/pairs", iter([b"x" * 10_000] * 10), headers, encode_chunked=True)
        answer = raw.getresponse()
        assert answer.status == 413
        assert json.loads(answer.read())["error"]["code"] == "too_long"


def test_a_body_that_does_not_come_is_not_waited_for(path):
    tokens = make_store(path, 1, 1)
    with serving(path, limits=limits.Limits(read_seconds=0.3)) as address:
        netloc = urllib.parse.urlsplit(address).netloc
        with socket.create_connection(netloc.split(":"), timeout=20) as slow:
            head = f"POST /api/pairs HTTP/1.1\r\nHost: {netloc}\r\nAuthorization: Bearer {tokens['person 0']}\r\n"
            slow.sendall((head + "Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{").encode())
            assert slow.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_client_that_goes_away_is_no_fault_of_the_server(path):
    tokens, records = make_store(path, 1, 1), []
    with serving(path) as address:
        handler = logging.Handler()
        handler.emit = records.append
        logging.getLogger("uvicorn.error").addHandler(handler)
        try:
            netloc = urllib.parse.urlsplit(address).netloc
            head = f"POST /api/pairs HTTP/1.1\r\nHost: {netloc}\r\nAuthorization: Bearer {tokens['person 0']}\r\n"
            for _ in range(3):
                with socket.create_connection(netloc.split(":"), timeout=20) as gone:
                    gone.sendall((head + "Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{").encode())
                    time.sleep(0.1)
            assert Client(address, tokens["person 0"]).ask("GET", "/api/me")[0] == 200
            time.sleep(0.2)
        finally:
            logging.getLogger("uvicorn.error").removeHandler(handler)
    assert [record.getMessage() for record in records if record.levelno >= logging.ERROR] == []


def test_more_requests_than_may_wait_are_sent_away(path):
    tokens = make_store(path, 6, 1)
    with contextlib.closing(store.open_store(path)) as other, serving(path, limits=limits.Limits(at_once=2)) as address:
        other.execute("BEGIN IMMEDIATE")  # another program holds the store: requests wait
        waiting = [Client(address, tokens["person 0"]) for _ in range(2)]
        threads = [threading.Thread(target=lambda each=each: each.ask("GET", "/api/me")) for each in waiting]
        for thread in threads:
            thread.start()
        late, status = Client(address, tokens["person 0"]), 0
        for _ in range(200):
            status, body, headers = late.ask("GET", "/page.css")
            if status == 503:
                break
            time.sleep(0.01)
        assert status == 503
        assert body["error"]["code"] == "busy"
        assert headers["Retry-After"] == "1"
        other.execute("ROLLBACK")
        for thread in threads:
            thread.join()


def test_the_queue_for_the_disk_is_finite(path):
    make_store(path, 1, 1)
    with contextlib.closing(writer.Writer(path, waiting=3)) as writing:
        hold, held = threading.Event(), threading.Event()
        first = writing.submit(lambda db: (held.set(), hold.wait())[1])
        held.wait()
        others = [writing.submit(lambda db: store.last_sequence(db)) for _ in range(3)]
        with pytest.raises(writer.Busy, match="3 requests wait"):
            writing.submit(lambda db: 0)
        hold.set()
        assert first.result()
        assert [each.result() for each in others] == [0, 0, 0]


def test_a_full_disk_is_told_and_nothing_is_half_written(path):
    """SQLite's own limit of pages stands for the disk: the error is the same."""
    tokens = make_store(path, 40, 1)
    with contextlib.closing(writer.Writer(path)) as writing, contextlib.closing(store.open_store(path)) as db:
        writing.submit(
            lambda db: db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")
        ).result()
        rules, kept, failed = assignments.Rules(gold_share=0.0), [], 0
        given = writing.submit(lambda db: assignments.give(db, "person 0", rules, 3))
        assert isinstance(given.exception(), sqlite3.OperationalError) or len(given.result()) == 3
        for number, pair in enumerate(store.pairs(db)):
            long = store.Choice(pair.id, "person 0", "left", "a", note="x" * 2000, id=f"number {number:04d}")
            try:
                kept.append(writing.submit(lambda db, long=long: store.record(db, [long])).result()[0].id)
            except sqlite3.OperationalError as error:
                refused = gate.refusal(error)
                assert (refused.status, refused.code) == (507, "storage")
                assert "send it again" in refused.message
                failed += 1
        assert failed > 0
        assert [choice.id for choice in store.choices(db)] == kept
        assert derived_is_true(db)
        writing.submit(lambda db: db.execute("PRAGMA max_page_count = 1000000")).result()  # room again
        again = store.Choice(store.pairs(db)[-1].id, "person 0", "left", "a", id="number 0039")
        assert writing.submit(lambda db: store.record(db, [again])).result()[0].id == "number 0039"
        assert accounts.find(db, tokens["person 0"]) is not None


def test_jobs_of_one_commit_fail_alone(path):
    make_store(path, 3, 1)
    with contextlib.closing(writer.Writer(path)) as writing, contextlib.closing(store.open_store(path)) as db:
        hold = threading.Event()
        writing.submit(lambda db: hold.wait())
        ids = [pair.id for pair in store.pairs(db)]

        def chosen(*pairs: str):
            return writing.submit(lambda db: [store.record(db, [store.Choice(pair, "ann", "left", "a")]) for pair in pairs])

        jobs = [chosen(ids[0]), chosen(ids[1], "unknown"), chosen(ids[2])]
        hold.set()
        assert [job.exception() is None for job in jobs] == [True, False, True]
        assert [choice.pair for choice in store.choices(db)] == [ids[0], ids[2]]


def test_nobody_is_answered_before_the_commit(path):
    make_store(path, 3, 1)
    answered = []

    def at_commit(statement: str) -> None:
        if statement == "COMMIT":
            answered.append([future.done() for _, future in batch])

    with contextlib.closing(store.open_store(path)) as db:
        batch = [(lambda db: store.last_sequence(db), writer.Future()) for _ in range(3)]
        db.set_trace_callback(at_commit)
        writer.commit(db, batch)
    assert answered == [[False] * 3]
    assert [future.result() for _, future in batch] == [0, 0, 0]


def _label_all(address: str, token: str, acked: dict, think: float, seconds: list, seed: int) -> None:
    """One person, until no pair is left: asks for pairs, chooses, keeps ids that were acknowledged and how long each took."""
    client, draw = Client(address, token), random.Random(seed)
    while given := client.pairs(2):
        time.sleep(think * draw.random() * 2)
        name, started = uuid.uuid4().hex, time.perf_counter()
        status, body, _ = client.choose(given[0]["pair"], draw.choice(["left", "right", "tie"]), name)
        seconds.append(time.perf_counter() - started)
        assert status == 200, body
        acked[name] = given[0]["pair"]
    client.close()


@pytest.mark.parametrize(("people", "pairs", "think"), [(8, 40, 0.0), pytest.param(50, 2000, 0.25, marks=pytest.mark.full)])
def test_many_labelers_at_once_give_each_pair_exactly_three_labels(path, people, pairs, think):
    tokens = make_store(path, pairs, people)
    acked, seconds = {}, []
    started = time.monotonic()
    with server_process(path, k=3, gold_share=0.0) as (address, _):
        together(
            [
                lambda token=token, seed=seed: _label_all(address, token, acked, think, seconds, seed)
                for seed, token in enumerate(tokens.values())
            ]
        )
    with contextlib.closing(store.open_store(path)) as db:
        assert labels_of_pairs(db) == [3] * pairs
        assert derived_is_true(db)
        kept = store.choices(db)
    assert {choice.id: choice.pair for choice in kept} == acked
    assert len({(choice.pair, choice.labeler) for choice in kept}) == len(kept) == 3 * pairs
    if people == 50:
        cuts = statistics.quantiles(seconds, n=100)
        _figures("labelling-load", {
            "labelers": people, "pairs": pairs, "k": 3, "choices": len(kept), "think_seconds_mean": think,
            "wall_seconds": round(time.monotonic() - started, 1),
            "choice_ms_p50": round(1e3 * cuts[49], 1), "choice_ms_p99": round(1e3 * cuts[98], 1),
            "choice_ms_max": round(1e3 * max(seconds), 1),
        })  # fmt: skip


def _figures(name: str, found: dict) -> None:
    """Figures of a full test: printed, and a dated file under benchmarks/results/."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    machine = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version, "commit": commit}
    text = json.dumps({"test": f"pytest -m full tests/{pathlib.Path(__file__).name}", **found, **machine}, indent=1)
    print(text)
    (ROOT / "benchmarks" / "results" / f"{time.strftime('%Y-%m-%d')}-{name}.json").write_text(text + "\n")


class _Persistent:
    """A person who sends each thing again, to whichever server is up, until it is acknowledged."""

    def __init__(self, token: str, seed: int):
        self.token, self.draw = token, random.Random(seed)
        self.acked: dict[str, str] = {}  # id: pair, or "undo"
        self.client: Client | None = None

    def until_answered(self, address, stop, method: str, where: str, sent: dict):
        while not stop.is_set():
            try:
                if self.client is None or self.client.address != address[0]:
                    self.client = Client(address[0], self.token)
                status, body, _ = self.client.ask(method, where, sent)
                if status in (200, 409):
                    return status, body
                assert status in (503, 507), body
            except (OSError, http.client.HTTPException):
                self.client = None
                time.sleep(0.01)
        return 0, {}

    def work(self, address, stop) -> None:
        while not stop.is_set():
            _, body = self.until_answered(address, stop, "POST", "/api/pairs", {"want": 2})
            for pair in body.get("pairs", []):
                name = uuid.uuid4().hex
                sent = {"id": name, "pair": pair["pair"], "choice": self.draw.choice(["left", "right", "tie", "skip"])}
                status, _ = self.until_answered(address, stop, "POST", "/api/choices", sent)
                if status == 200:
                    self.acked[name] = pair["pair"]
                if self.draw.random() < 0.2:
                    name = uuid.uuid4().hex
                    if self.until_answered(address, stop, "POST", "/api/undo", {"id": name})[1].get("pair"):
                        self.acked[name] = "undo"


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.full)])
def test_killed_at_random_moments_every_acknowledged_choice_is_there_once(path, kills):
    tokens = make_store(path, 40 * kills, 4)
    people = [_Persistent(token, seed) for seed, token in enumerate(tokens.values())]
    address, stop, draw = [""], threading.Event(), random.Random(kills)

    def kill_again_and_again() -> None:
        try:
            for _ in range(kills):
                with server_process(path, k=2, gold_share=0.0) as (address[0], process):
                    time.sleep(draw.uniform(0.02, 0.4))
                    process.send_signal(signal.SIGKILL)
                    assert process.wait() == -signal.SIGKILL
            with server_process(path, k=2, gold_share=0.0) as (address[0], _):
                time.sleep(0.3)  # what was under way is sent again
                stop.set()
                for thread in threads:
                    thread.join()
        finally:
            stop.set()

    threads = [threading.Thread(target=person.work, args=(address, stop)) for person in people]
    for thread in threads:
        thread.start()
    kill_again_and_again()
    acked = {name: what for person in people for name, what in person.acked.items()}
    with contextlib.closing(store.open_store(path)) as db:
        events = db.execute("SELECT id, pair, choice FROM events").fetchall()
        assert derived_is_true(db)
        assert max(labels_of_pairs(db)) <= 2
        standing = store.choices(db)
    assert len({name for name, _, _ in events}) == len(events), "no event twice"
    found = {name: "undo" if choice == "undo" else pair for name, pair, choice in events}
    assert {name: found.get(name) for name in acked} == acked, "every acknowledged choice is there"
    assert len(found) - len(acked) <= len(people), "what is there and was not acknowledged was under way at the end"
    assert len({(choice.pair, choice.labeler) for choice in standing}) == len(standing)
    assert len(acked) >= kills
    if kills == 200:
        _figures("labelling-kills", {"kills": kills, "acknowledged": len(acked), "events": len(events), "lost": 0, "twice": 0})


def test_the_script_serves_prints_tokens_once_and_ends_when_all_is_labelled(path, tmp_path):
    make_store(path, 3, 0)
    flags = (
        "--store",
        path,
        "--page",
        "--people",
        "ann",
        "--admins",
        "root",
        "--port",
        0,
        "--rules.k",
        1,
        "--out",
        tmp_path / "o",
    )

    def start() -> tuple[subprocess.Popen, list[str]]:
        process = subprocess.Popen(
            command("label", *flags), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        return process, [process.stdout.readline() for _ in range(3)]

    process, lines = start()
    address, token = re.fullmatch(r"ann: (http://127\.0\.0\.1:\d+)/#token=(\S+)\n", lines[0]).groups()
    ann = Client(address, token)
    assert ann.choose(ann.pairs()[0]["pair"])[0] == 200
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, "stopped; every choice is kept" in out) == (0, True), error
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert (result["choices"], result["name"]) == ({"left": 1}, "ann")
    flags = (*flags[:-1], tmp_path / "again")
    process, lines = start()
    assert "--renew ann makes a new one" in lines[0], "a token is printed once"
    address = re.search(r"http://[\d.:]+", lines[0]).group()
    ann = Client(address, token)
    assert ann.choose(ann.pairs()[0]["pair"])[0] == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not (tmp_path / "again" / "result.json").exists()
    process.stdout.close()
    process.stderr.close()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--page", "--host", "192.0.2.1"), "192.0.2.1"),
        (("--page", "--rules.k", "0"), "k=0"),
        (("--page", "--limits.rate", "0"), "limits.rate=0"),
        (("--page", "--guidelines", "{tmp}/none.txt"), "none.txt"),
        (("--page", "--people", "ann", "--renew", "bob"), "--renew bob"),
    ],
)
def test_bad_settings_of_the_page_get_one_line(path, tmp_path, flags, told):
    make_store(path, 1, 0)
    done = script("label", "--store", path, "--out", tmp_path / "o", *(flag.format(tmp=tmp_path) for flag in flags))
    assert done.returncode == 2, done.stderr
    assert told in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
