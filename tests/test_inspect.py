"""The rollouts that a run keeps, and the page of a run: each step once, every number right, nothing in it obeyed."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import html.parser
import json
import os
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from hostile_texts import HOSTILE

from experiments import inspect_run
from jaxrlhf.core.types import Experience, Rollout
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.evaluation import inspection, page
from jaxrlhf.training import recorder
from jaxrlhf.training.run import Run


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 6
    name: str = "</pre><script>alert(1)</script>"


# ------------------------------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("total", [1, 2, 23, 24, 25, 100, 701, 100_000])
def test_few_steps_of_any_run_are_kept_its_first_and_last_among_them(total):
    kept = [step for step in range(total) if recorder.due(step, total)]
    assert kept[0] == 0
    assert kept[-1] == total - 1
    assert min(total, recorder.STEPS // 2) <= len(kept) <= recorder.STEPS + 1


def experience(height: int = 6, width: int = 5) -> Experience:
    rng = np.random.default_rng(0)
    numbers = iter(rng.normal(size=(9, height, width)).astype(np.float32))
    tokens = np.arange(height * 8, dtype=np.int32).reshape(height, 8)
    length = np.array([5, 1, 0, 3, 2, 5], np.int32)[:height]
    ids, each = np.arange(height, dtype=np.int32), np.full(height, 2, np.int32)
    rollout = Rollout(tokens, each + ids % 2, length, length < 5, ids // 2, ids % 2, ids, next(numbers), next(numbers))
    score = next(numbers)[:, 0]
    score[1] = np.nan
    return Experience(rollout, next(numbers), next(numbers), next(numbers), score, score, np.array([1, 0, 1, 1, 1, 1.0]))


def letters(ids) -> list[str]:
    return [f"<{i}>" for i in ids]


def test_a_row_has_the_numbers_of_its_tokens_and_no_others():
    found, advantages, rewards = experience(), np.arange(30.0).reshape(6, 5), -np.arange(30.0).reshape(6, 5)
    rows = recorder.of_experience(found, advantages, rewards, letters, lambda ids: f"prompt {ids}")
    assert [row["row"] for row in rows] == [0, 1, 3, 4]
    for row in rows:
        i = row["row"]
        start, length = int(found.rollout.prompt_len[i]), int(found.rollout.response_len[i])
        assert row["prompt"] == f"prompt {list(range(8 * i, 8 * i + start))}"
        assert row["tokens"] == [f"<{8 * i + start + t}>" for t in range(length)]
        np.testing.assert_allclose(row["kl"], (found.logprobs - found.ref_logprobs)[i, :length], rtol=1e-3)
        np.testing.assert_allclose(row["value"], found.values[i, :length], rtol=1e-3)
        assert row["advantage"] == advantages[i, :length].tolist()
        assert row["reward"] == rewards[i, :length].tolist()
        assert row["finished"] == (length < 5)
    assert rows[1]["score"] is None  # not finite
    assert rows[1]["weight"] == 0
    exact = dataclasses.replace(found, ref_kl=np.full((6, 5), 0.25, np.float32), values=None)
    rows = recorder.of_experience(exact, None, None, letters, str)
    assert rows[0]["kl"] == [0.25] * 5
    np.testing.assert_allclose(rows[0]["reward"], [0, 0, 0, 0, found.score[0]], rtol=1e-3)  # the score, at the last token
    assert not {"value", "advantage"} & rows[0].keys()


def test_kept_sets_are_left_on_the_device():
    class Large:
        def __array__(self, *_, **__):
            raise AssertionError("fetched")

    found = experience()
    found = dataclasses.replace(found, rollout=dataclasses.replace(found.rollout, kept=Large()))
    assert len(recorder.of_experience(found, None, None, letters, str)) == 4


def test_a_long_response_is_cut_and_says_so(monkeypatch):
    monkeypatch.setattr(recorder, "TOKENS", 2)
    monkeypatch.setattr(recorder, "LETTERS", 3)
    row = recorder.of_experience(experience(), None, None, letters, lambda ids: "abcdef")[0]
    assert row["prompt"] == "def"
    assert row["length"] == 5
    assert {len(row[name]) for name in ("tokens", "kl", "value", "reward", "logprob")} == {2}


def test_texts_of_tokens_are_together_the_text():
    made = tokenizers.train(["naïve café 東京 🙂 good movie"] * 20, 320)
    for text in ("naïve 🙂🙂 café", "東京 is good\n\ttoo", "x"):
        ids = made.encode(text, continuation=True)
        texts = made.token_texts([made.bos, *ids, made.eos])
        assert len(texts) == len(ids) + 2
        assert texts[0] == texts[-1] == ""
        assert "".join(texts) == text
    broken = made.encode("🙂", continuation=True)[:1]  # a response may end inside a character
    assert made.token_texts(broken) == ["\ufffd"] or len(made.encode("🙂", continuation=True)) == 1


# ------------------------------------------------------------------------------------------------ in a run


def rows_of(step: int) -> list[dict]:
    numbers = {name: [0.5 * step, -1.0] for name in ("logprob", "kl", "reward", "advantage", "value")}
    about = {"row": 0, "group": 0, "prompt": "p", "length": 2, "finished": True, "score": 1.5, "weight": 1.0}
    return [{**about, "tokens": [" a", ""], **numbers}, {**about, "row": 3, "tokens": ["b", " c"], **numbers}]


def train(out, crash_at: int | None = None, save_every: int = 2) -> None:
    with Run.open(out, Config(), tensorboard=False, save_seconds=1e9) as run:
        state = run.restore({"w": jnp.zeros(2)})
        for step in run.steps(run.start, 6, "toy"):
            run.sample(step, rows_of, step)
            run.log(step, {"reward/score": float(step), "policy/kl_ref": 0.1 * step})
            if step == crash_at:
                raise KeyboardInterrupt
            run.maybe_save(step, state, last=step % save_every == 1)
        run.done({"ok": True})


@pytest.mark.parametrize("crash_at", [0, 1, 2, 3, 4, 5])
def test_each_step_is_kept_once_wherever_the_run_was_broken(tmp_path, crash_at):
    train(tmp_path / "whole")
    with contextlib.suppress(KeyboardInterrupt):
        train(tmp_path / "broken", crash_at)
    kept = [row["step"] for row in recorder.read(tmp_path / "broken")]
    assert kept == sorted([*range(crash_at + 1)] * 2)
    train(tmp_path / "broken")
    for name in (recorder.FILE, "metrics.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_rows_that_a_checkpoint_counts_and_the_file_lacks_are_missed(tmp_path):
    with contextlib.suppress(KeyboardInterrupt):
        train(tmp_path, 3)
    os.truncate(tmp_path / recorder.FILE, 10)
    with pytest.raises(ValueError, match=r"samples\.jsonl has 10 bytes, but \d+ when step 2 was saved: rows are missing"):
        train(tmp_path)


def test_a_file_that_is_full_stays_as_it_is_and_that_is_an_event(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "LARGEST", 900)
    train(tmp_path)
    assert (tmp_path / recorder.FILE).stat().st_size <= 900
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    left_out = [event["step"] for event in events if event["kind"] == "samples left out"]
    assert left_out
    assert sorted({row["step"] for row in recorder.read(tmp_path)} | set(left_out)) == [0, 1, 2, 3, 4, 5]


def test_a_run_without_rollouts_has_no_file_of_them(tmp_path):
    with Run.open(tmp_path, Config(), tensorboard=False) as run:
        for step in run.steps(0, 2, "toy"):
            run.maybe_save(step, {"w": jnp.zeros(2)}, last=True)
    assert not (tmp_path / recorder.FILE).exists()


@pytest.mark.parametrize("line", ["{", "[]", '{"step": 1}', '{"step": 1, "tokens": ["a"], "kl": []}', '{"step": 1, "kl": 3}'])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / recorder.FILE).write_text(line + "\n")
    with pytest.raises(ValueError, match=r"samples\.jsonl:1: not a rollout"):
        recorder.read(tmp_path)


# ------------------------------------------------------------------------------------------------ the page


class Reader(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def inspected(folder, **settings) -> tuple[str, Reader]:
    inspect_run.run(inspect_run.Config(folder, **settings))
    text = (folder / "inspect.html").read_text()
    reader = Reader()
    reader.feed(text)
    return text, reader


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run in which everything that a page shows is hostile."""
    folder = tmp_path_factory.mktemp("runs") / "<img src=x onerror=alert(1)>"
    train(folder)
    numbers = {name: [None, -2.0, 0.0] for name in ("kl", "reward", "advantage", "value", "logprob")}
    with open(folder / recorder.FILE, "w") as file:
        for step, text in enumerate(HOSTILE):
            row = {"step": step, "row": 0, "group": 0, "prompt": text, "tokens": [text, '" onclick=alert(1) x="', ""]}
            row |= {"length": 900, "finished": True, "score": None, "weight": 0.0} | numbers
            file.write(json.dumps(row) + "\n")
        file.write(json.dumps(row | {"step": 99, "prompt": "\ud800 lone", "tokens": ["a\u202eb", "\x1b[2J", "\n"]}) + "\n")
    moves = {f"odd/{HOSTILE[1]}", "odd/$x^{"}
    times = {"time/update": 1.0, "time/step": 2.0, "time/save": 1.0}
    losses = enumerate([1.0, "nan", 3.0, "inf", 2.0])
    rows = [{"step": i, "loss/total": loss} | dict.fromkeys(moves, i) | times for i, loss in losses]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(folder / "events.jsonl", "a") as file:
        alarm = {"number": 99, "time": "2026-01-01T00:00:00", "kind": "alarm", "step": 2, "reason": HOSTILE[0]}
        file.write(json.dumps(alarm) + "\n")
    return folder, *inspected(folder, steps=(*range(len(HOSTILE)), 99))


def test_nothing_hostile_is_a_tag_and_all_of_it_is_told(hostile):
    _, text, reader = hostile
    assert not {"script", "img", "iframe", "object", "link", "base", "a", "form"} & set(reader.tags)
    assert {name for name, _ in reader.attributes if name.startswith("on")} == set()
    assert {value for name, value in reader.attributes if name in ("href", "src")} <= {
        v for n, v in reader.attributes if n == "href" and v.startswith("#")
    }
    assert "default-src 'none'" in text
    shown = "".join(reader.text)
    for each in HOSTILE:
        assert shown.count(page.visible(each, breaks=True)) >= 1, each
    assert "</pre><script>alert(1)</script>" in shown  # a setting
    assert "U+D800" in shown
    assert "U+202E" in shown
    assert "\u241b[2J" in shown
    assert "\u21b5" in shown
    assert re.search(r"url\(|@import", re.sub(r"<p.*?</p>|<i .*?</i>|<pre>.*?</pre>", "", text, flags=re.DOTALL)) is None
    assert "not finite" in shown
    assert "left out of the update" in shown
    assert "900 tokens, the first 3 shown" in shown


def test_the_numbers_of_a_token_stand_beside_it(tmp_path):
    train(tmp_path)
    text, reader = inspected(tmp_path, steps=(4,))
    told = [value for name, value in reader.attributes if name == "data-t"]
    assert told[0] == "' a': KL 2 \u00b7 advantage 2 \u00b7 value 2 \u00b7 reward 2 \u00b7 log-prob 2"
    colours = [value for name, value in reader.attributes if name == "style" and value and value.startswith("--h0")]
    assert colours[0].split(";")[0] == "--h0:1.000"  # the largest
    assert colours[1].split(";")[0] == "--h0:-0.500"  # -1 of 2
    assert len(told) == 4
    assert "step 4: 2 rollouts, mean score 1.5" in "".join(reader.text)
    assert reader.tags.count("svg") == 2
    assert text.count("checked") == 1 + text.count(":checked")


def test_a_step_that_was_not_kept_is_refused_with_those_that_were(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match=r"steps \[77\]: no rollouts .* those of 0, 1, 2, 3, 4, 5"):
        inspect_run.run(inspect_run.Config(tmp_path, steps=(77,)))
    with pytest.raises(ValueError, match=r"is no run's directory \(no run\.json\)"):
        inspect_run.run(inspect_run.Config(tmp_path / "nothing"))


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    with Run.open(tmp_path, Config(), tensorboard=False):
        _, reader = inspected(tmp_path)
    assert "running, or killed" in "".join(reader.text)


def test_a_thinned_curve_keeps_its_ends_and_every_spike():
    x = [float(i) for i in range(10_000)]
    y = [0.0] * 10_000
    y[1234], y[8765] = 50.0, -7.0
    few, values = inspection.thin(x, y, 100)
    assert len(few) <= 100
    assert (few[0], min(values), max(values)) == (0.0, -7.0, 50.0)
    assert few == sorted(few)


def test_times_are_shares_of_all_rows(hostile):
    _, _, reader = hostile
    assert "5.0 s \u00b7 50.0 %" in "".join(reader.text)


def test_in_a_browser_nothing_runs_nothing_is_fetched_and_a_phone_need_not_scroll_sideways(hostile):
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'jaxrlhf[test]'")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("no chromium here: apt-get install chromium")
    folder, _, _ = hostile
    heard = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        tab = browser.new_page(viewport={"width": 390, "height": 844})
        tab.on("dialog", lambda dialog: (heard.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda request: heard.append(request.url))
        tab.goto((folder / "inspect.html").as_uri())
        assert heard == [(folder / "inspect.html").as_uri()]
        assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        token = tab.locator(".tokens i").nth(1)
        before = token.evaluate("e => getComputedStyle(e).backgroundColor")
        first = tab.locator(".tokens i").nth(0).evaluate("e => getComputedStyle(e).backgroundColor")
        assert before != first  # -2 is coloured, what is not finite is not
        token.click()
        assert "KL -2" in token.evaluate("e => getComputedStyle(e, '::after').content")
        browser.close()
