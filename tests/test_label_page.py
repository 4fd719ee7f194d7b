"""The labelling page as a person uses it, in a headless chromium: keys, undo, reload, a server that is gone, hostile texts.

With JAXRLHF_SCREENSHOTS=FOLDER the pictures of docs/feedback.md are written there.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import socket
import sqlite3

import pytest
from hostile_texts import HOSTILE
from labelling import make_store

from jaxrlhf.feedback import accounts, app, assignments, limits, store

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'jaxrlhf[test]'")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("no chromium here: apt-get install chromium", allow_module_level=True)

DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
FREE = limits.Limits(rate=1e6, burst=10**6)  # a browser test presses keys faster than a person


@pytest.fixture(scope="module")
def chromium():
    """One browser for this file; as root it runs without its sandbox, which needs another user."""
    sync_api.expect.set_options(timeout=20_000)  # a machine under load
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "feedback.sqlite"


def site_of(path, **more) -> app.Site:
    return app.Site(path, assignments.Rules(k=1, gold_share=0.0), FREE, port=0, **more)


@pytest.fixture
def visit(chromium):
    """`visit(address, token)`: the page with its guidelines closed. What it asks for, says and pops up is in `page.heard`."""
    contexts = []

    def new(address: str, token: str, context=None, viewport=DESKTOP, **options):
        if context is None:
            context = chromium.new_context(viewport=viewport, **options)
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.heard = {"requests": [], "dialogs": [], "errors": []}
        page.on("request", lambda request: page.heard["requests"].append(request.url))
        page.on("dialog", lambda dialog: (page.heard["dialogs"].append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error: page.heard["errors"].append(str(error)))
        page.on("console", lambda message: message.type == "error" and page.heard["errors"].append(message.text))
        page.goto(f"{address}/#token={token}")
        page.locator("#work, #done, #enter").locator("visible=true").first.wait_for()
        if page.locator("#guidelines").is_visible():
            page.keyboard.press("Escape")
        return page

    yield new
    for context in contexts:
        context.close()


def choices(path) -> list[store.Choice]:
    with contextlib.closing(store.open_store(path)) as db:
        return store.choices(db)


def settled(page, done: int, others: int = 0) -> None:
    """Wait until the page counts so many as done and has nothing more to send, but for what is another person's."""
    sync_api.expect(page.locator("#count")).to_contain_text(f"{done} done")
    sent = "[...Array(localStorage.length).keys()].filter((i) => localStorage.key(i).startsWith('jaxrlhf.outbox')).length"
    for _ in range(800):
        if page.evaluate(sent) == others:
            return
        page.wait_for_timeout(25)
    raise AssertionError("the page still holds what it has not sent")


def press(page, key: str) -> None:
    """A key, and then the next pair (or none)."""
    before = page.locator("#prompt").inner_text()
    page.keyboard.press(key)
    sync_api.expect(page.locator("#prompt")).not_to_have_text(before)


def test_a_person_labels_twenty_pairs_and_what_they_chose_trains_a_reward_model(path, tmp_path, visit):
    """By keyboard, with one undo and a reload in the middle. The person likes what is called good."""
    words = "film sound camera story end cast player music screen joke song phone plot voice set book scene price part line"
    with contextlib.closing(store.open_store(path)) as db:
        pairs = []
        for i, word in enumerate(words.split()):
            good, dull = f" the {word} was good", f" the {word} was dull"
            pairs.append(store.Pair(f"about the {word}", *((good, dull) if i % 2 else (dull, good))))
        assert store.add_pairs(db, pairs) == 20
        ann, root = accounts.create(db, "ann"), accounts.create(db, "root", "admin")
    with app.running(site_of(path)) as address:
        page = visit(address, ann)
        for number in range(19):
            key = "1" if "good" in page.locator("#left").inner_text() else "2"
            if number == 7:  # a mistake, taken back
                seen = page.locator("#prompt").inner_text()
                press(page, "3")
                page.keyboard.press("z")
                sync_api.expect(page.locator("#prompt")).to_have_text(seen)
            if number == 12:
                seen = page.locator("#prompt").inner_text()
                page.reload()
                page.locator("#work").wait_for()
                assert page.locator("#prompt").inner_text() == seen, "the pair in hand is still in hand"
                sync_api.expect(page.locator("#count")).to_contain_text("12 done")
            press(page, key)
        page.keyboard.press("1" if "good" in page.locator("#left").inner_text() else "2")
        page.locator("#done").wait_for()
        settled(page, 20)
        standing = choices(path)
        assert len(standing) == 20
        assert {choice.pair for choice in standing} == {pair.id for pair in pairs}
        assert {choice.left_response for choice in standing} == {"a", "b"}, "which answer stands at the left is drawn"
        assert all(choice.seconds is not None and 0 <= choice.seconds < 60 for choice in standing)
        with contextlib.closing(sqlite3.connect(path)) as db:
            events = [word for (word,) in db.execute("SELECT choice FROM events")]
        assert (len(events), events.count("tie"), events.count("undo")) == (22, 1, 1)
        assert page.heard["errors"] == []
        admin = visit(address, root)
        admin.locator("#open-figures").click()
        with admin.expect_download() as download:
            admin.locator("#download").click()
        download.value.save_as(tmp_path / "choices.jsonl")
    before, after = reward_model_accuracy(tmp_path / "choices.jsonl")
    assert before < 0.9
    assert after == 1.0


def reward_model_accuracy(path: pathlib.Path) -> tuple[float, float]:
    """How often a tiny reward model scores the chosen answer higher, before and after 60 updates on the file's pairs."""
    import jax

    from experiments import preference_data
    from jaxrlhf.algorithms import reward
    from jaxrlhf.core import sharding
    from jaxrlhf.data import comparisons, tokenizer
    from jaxrlhf.models import heads, transformer
    from jaxrlhf.models.config import TransformerConfig
    from jaxrlhf.training import objective, optimizer, step

    rows = preference_data.read(path)
    assert len(rows) == 20
    words = tokenizer.train([row["prompt"] + row["chosen"] + row["rejected"] for row in rows], 300)
    config = TransformerConfig(words.vocab_size, 16, 1, 2, 2, 8, 32, 48, remat=False)
    batch = reward.from_preferences(comparisons.preference_rows(rows, words, 48))
    batch = jax.tree.map(jax.numpy.asarray, batch)
    specs = {"trunk": transformer.param_specs(config), "head": heads.score_specs(16)}
    params = sharding.init_params(specs, jax.random.key(0))
    outputs = objective.make_outputs(transformer.build(config), logprobs=False, scores="mean", trunk="trunk")
    update = optimizer.make(optimizer.OptimizerConfig(learning_rate=1e-2), 60, params)
    train_step = step.make_train_step(outputs, reward.loss, reward.Config(), update)
    state, seen = step.init_state(params, update, jax.random.key(1)), []
    for _ in range(60):
        state, metrics = train_step(state, None, batch)
        seen.append(float(metrics["reward/accuracy"]))
    return seen[0], seen[-1]


INVISIBLE = {
    "\x1b[2J\x1b]0;title\x07": "U+001B[2JU+001B]0;titleU+0007",
    "a\u202eevil\u2066b": "aU+202EevilU+2066b",
    "zero\u200bwidth\ufeff": "zeroU+200BwidthU+FEFF",
    "tag\U000e0041s": "tagU+E0041s",
    "nul\x00": "nulU+0000",
}


def test_hostile_texts_are_shown_as_text(path, visit):
    """0 dialogs, 0 foreign requests, each text literally on the page; what cannot be seen has its number."""
    corpus = [(text, text) for text in HOSTILE] + list(INVISIBLE.items())
    with contextlib.closing(store.open_store(path)) as db:
        pairs = [store.Pair(f"{i} {text}", f"A {text}", f"B {text}") for i, (text, _) in enumerate(corpus)]
        store.add_pairs(db, pairs)
        token = accounts.create(db, "<img src=x onerror=alert(1)>", "admin")
    with app.running(site_of(path, guidelines="<script>alert(1)</script> <b>read</b>")) as address:
        page = visit(address, token)
        assert page.locator("#guidelines-text").text_content() == "<script>alert(1)</script> <b>read</b>"
        for i, (_, expected) in enumerate(corpus):
            sync_api.expect(page.locator("#prompt")).to_have_text(re.compile(rf"^{i} "))
            shown = [page.locator(f"#{name}").evaluate("node => node.textContent") for name in ("prompt", "left", "right")]
            assert shown[0] == f"{i} {expected}"
            assert sorted(shown[1:]) == [f"A {expected}", f"B {expected}"]
            assert page.locator("#work .text *:not(.control):not(mark)").count() == 0, "no text became an element"
            page.keyboard.press("d")
            page.keyboard.press("n")
            page.locator("#note").fill(HOSTILE[i % len(HOSTILE)])
            page.keyboard.press("Escape")
            page.keyboard.press("1")
        page.locator("#done").wait_for()
        page.locator("#open-figures").click()
        sync_api.expect(page.locator("#figures-body td").first).to_have_text("<img src=x onerror=alert(1)>")
        settled(page, len(corpus))
        assert page.heard["dialogs"] == []
        assert [url for url in page.heard["requests"] if not url.startswith((address + "/", "data:"))] == []
        assert page.heard["errors"] == []
    assert [choice.note for choice in choices(path)] == [HOSTILE[i % len(HOSTILE)] for i in range(len(corpus))]


def test_a_line_of_a_megabyte_does_not_stop_the_work(path, visit):
    with contextlib.closing(store.open_store(path)) as db:
        store.add_pairs(db, [store.Pair("p", "x" * 1_000_000, "word " * 4000), store.Pair("q", " a", " b")])
        token = accounts.create(db, "ann")
    with app.running(site_of(path)) as address:
        page = visit(address, token)
        more = page.locator(".answer .more")
        assert sorted(more.all_inner_texts()) == ["Show all 1,000,000 characters", "Show all 19,999 characters"]
        words = page.locator(".answer", has_text="word word")
        assert len(words.locator(".text").inner_text()) < 13_000
        words.locator(".more").click()
        assert len(words.locator(".text").inner_text()) == 19_999
        page.keyboard.press("d")
        sync_api.expect(page.locator("#status")).to_contain_text("too long to mark")
        press(page, "3")
        settled(page, 1)
        assert choices(path)[0].choice == "tie"


def test_a_choice_is_kept_while_the_server_is_gone(path, visit):
    tokens = make_store(path, 8, 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    site = app.Site(path, assignments.Rules(gold_share=0.0), FREE, port=port)
    with app.running(site) as address:
        page = visit(address, tokens["person 0"])
        press(page, "1")
        settled(page, 1)
    press(page, "2")
    press(page, "3")
    sync_api.expect(page.locator("#status")).to_contain_text("2 choices are kept here")
    assert len(choices(path)) == 1
    with app.running(site):
        settled(page, 3)
        sync_api.expect(page.locator("#status")).to_have_text("")
        assert [choice.choice for choice in choices(path)] == ["left", "right", "tie"]
        press(page, "4")
        settled(page, 4)


def test_an_answer_that_was_lost_counts_once_and_a_reload_sends_what_is_kept(path, visit):
    tokens = make_store(path, 8, 1)
    with app.running(site_of(path)) as address:
        page = visit(address, tokens["person 0"])
        lost = []

        def lose(route) -> None:
            route.fetch()  # the server hears it; the page does not hear the server
            lost.append(route.request.post_data)
            route.abort()

        page.route("**/api/choices", lose)
        press(page, "1")
        press(page, "2")
        while len(lost) < 2:  # it is sent again and again
            page.wait_for_timeout(100)
        sync_api.expect(page.locator("#status")).to_contain_text("2 choices are kept here")
        assert set(lost) == {lost[0]}, "the same choice, in order, under the same id"
        page.reload()
        page.unroute("**/api/choices")
        page.locator("#work").wait_for()
        settled(page, 2)
        assert [choice.choice for choice in choices(path)] == ["left", "right"]


@pytest.mark.parametrize("status", [403, 413, 502])
def test_a_fault_on_the_way_loses_nothing(path, visit, status):
    """A proxy that is set up wrongly refuses in its own words: the choice waits until it is mended."""
    tokens = make_store(path, 8, 1)
    with app.running(site_of(path)) as address:
        page = visit(address, tokens["person 0"])
        body = (
            '{"error": {"code": "origin", "message": "a request from elsewhere"}}' if status == 403 else "<h1>Bad gateway</h1>"
        )
        page.route("**/api/choices", lambda route: route.fulfill(status=status, body=body))
        press(page, "1")
        sync_api.expect(page.locator("#status")).to_contain_text("kept here")
        assert choices(path) == []
        page.unroute("**/api/choices")
        settled(page, 1)
        assert [choice.choice for choice in choices(path)] == ["left"]


def test_two_tabs_of_one_person_make_one_choice_a_pair(path, visit):
    tokens = make_store(path, 4, 1)
    with app.running(site_of(path)) as address:
        first = visit(address, tokens["person 0"])
        second = visit(address, tokens["person 0"], context=first.context)
        assert first.locator("#prompt").inner_text() == second.locator("#prompt").inner_text()
        press(first, "1")
        settled(first, 1)
        press(second, "2")
        settled(second, 1)
    (kept,) = choices(path)
    assert kept.choice == "left"


def test_every_key_does_what_it_says(path, visit):
    tokens = make_store(path, 9, 1)
    with app.running(site_of(path)) as address:
        page = visit(address, tokens["person 0"])
        for key in ("1", "2", "3", "4", "s", "Shift+Digit1", "m", "n", "z"):
            if key == "m":
                page.keyboard.press("m")
                press(page, "2")
            elif key == "n":
                page.keyboard.press("n")
                page.keyboard.type("1234sz: it is a note")
                page.keyboard.press("Escape")
                press(page, "1")
            elif key == "z":
                seen = page.locator("#prompt").inner_text()
                page.keyboard.press("z")
                sync_api.expect(page.locator("#prompt")).not_to_have_text(seen)
                sync_api.expect(page.locator("#prompt")).to_have_text("prompt 7")
            else:
                press(page, key)
        settled(page, 7)
        for key in ("Control+1", "Alt+2", "x"):
            page.keyboard.press(key)
        page.keyboard.press("g")
        page.locator("#guidelines").wait_for()
        page.keyboard.press("1")
        page.keyboard.press("Escape")
        assert page.locator("#prompt").inner_text() == "prompt 7"
        kept = choices(path)
        assert [choice.choice for choice in kept] == ["left", "right", "tie", "both_bad", "skip", "left", "right"]
        assert [choice.strength for choice in kept] == [None] * 5 + [3, 3]
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert db.execute("SELECT note FROM events WHERE note <> ''").fetchall() == [("1234sz: it is a note",)]


def test_without_a_token_the_page_asks_for_it_and_forgets_none(path, visit):
    tokens = make_store(path, 3, 1)
    with app.running(site_of(path)) as address:
        page = visit(address, "wrong")
        page.locator("#enter").wait_for()
        sync_api.expect(page.locator("#status")).to_contain_text("no such token")
        page.locator("#token").fill(tokens["person 0"])
        page.keyboard.press("Enter")
        page.locator("#work").wait_for()
        assert "#" not in page.url, "the token is out of the address at once"
        assert not any(tokens["person 0"] in url for url in page.heard["requests"])


def test_the_next_person_at_the_same_browser_gets_their_own_pairs(path, visit):
    """Ann's choice that the server has not heard stays hers, and is sent when she is back."""
    tokens = make_store(path, 8, 2)
    with app.running(site_of(path)) as address:
        page = visit(address, tokens["person 0"])

        def lose_those_of_ann(route) -> None:
            route.abort() if tokens["person 0"] in route.request.headers["authorization"] else route.continue_()

        page.route("**/api/choices", lose_those_of_ann)
        press(page, "1")
        page.goto(f"{address}/#token={tokens['person 1']}")
        sync_api.expect(page.locator("#prompt")).to_have_text("prompt 4")  # four are held for ann
        press(page, "2")
        settled(page, 1, others=1)
        assert [(choice.labeler, choice.choice) for choice in choices(path)] == [("person 1", "right")]
        page.unroute("**/api/choices")
        page.goto(f"{address}/#token={tokens['person 0']}")
        settled(page, 1)
    assert {(choice.labeler, choice.choice) for choice in choices(path)} == {("person 0", "left"), ("person 1", "right")}


SHOWN = [
    (
        "Explain to a ten-year-old why the sky is blue.",
        " Sunlight looks white, but it is made of all the colours of the rainbow. When it comes into the air, it bumps into "
        "tiny bits of gas. Blue light is scattered much more than red light, so blue reaches your eyes from every side.\n\n"
        "At sunset the light has a longer way through the air. Most of the blue is gone by then, and the sky looks red.",
        " Sunlight looks white, but it is made of all the colours of the rainbow. The sky is blue because it mirrors the sea, "
        "so blue reaches your eyes from every side.",
    ),
    ("Write a story about a lighthouse.", " The lamp went round." * 160, " Once upon a time there was a lighthouse." * 90),
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("kind", "viewport"), [("desktop", DESKTOP), ("phone", PHONE)])
def test_it_fits_the_screen(path, tmp_path, visit, kind, viewport, scheme):
    """Nothing is wider than the screen, every button is in sight and large enough for a thumb, dark is dark."""
    with contextlib.closing(store.open_store(path)) as db:
        store.add_pairs(db, [store.Pair(*texts) for texts in SHOWN])
        token = accounts.create(db, "ann")
    folder = pathlib.Path(os.environ.get("JAXRLHF_SCREENSHOTS") or tmp_path)
    with app.running(site_of(path)) as address:
        options = {"is_mobile": True, "has_touch": True} if kind == "phone" else {}
        page = visit(address, token, viewport=viewport, color_scheme=scheme, **options)
        page.keyboard.press("d")
        for number in range(len(SHOWN)):
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            for button in page.locator(".actions button").all():
                box = button.bounding_box()
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= viewport["width"]
                assert box["y"] + box["height"] <= viewport["height"], "in sight without scrolling"
                assert box["height"] >= (44 if button.get_attribute("class") is None else 32)
            colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", colour)[:3])) < 200) == (scheme == "dark")
            if number == 0:
                assert page.locator("mark").count() > 0
                page.screenshot(path=folder / f"labelling_{kind}_{scheme}.png")
                press(page, "3")
        assert page.locator(".answer .more:visible").count() == 2
        before = page.locator("#card-left").bounding_box()["height"]
        page.keyboard.press("e")
        assert page.locator("#card-left").bounding_box()["height"] > before + 100
        page.locator("#theme").click()
        page.locator("#theme").click()  # auto, light, dark
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 26)"
        assert (folder / f"labelling_{kind}_{scheme}.png").stat().st_size < 100_000


def test_pairs_that_come_while_the_page_turns_are_shown_once(path, visit):
    """The last pair in hand is chosen on, and new ones arrive before the page has turned: a note begun then is kept."""
    tokens = make_store(path, 3, 1)
    with app.running(site_of(path)) as address:
        page = visit(address, tokens["person 0"])
        held = []
        page.route("**/api/pairs", lambda route: held.append(route))
        for _ in range(2):
            press(page, "1")
        settled(page, 2)
        with contextlib.closing(store.open_store(path)) as db:
            store.add_pairs(db, [store.Pair("late", " a", " b")])
        while not held:
            page.wait_for_timeout(20)
        page.evaluate("""() => {
            const real = setTimeout;
            window.setTimeout = (act, ms) => real(act, ms === 110 ? 1500 : ms); // the page turns slowly
        }""")
        page.keyboard.press("2")
        held[0].continue_()
        sync_api.expect(page.locator("#prompt")).to_have_text("late")
        page.keyboard.press("n")
        page.keyboard.type("begun")
        page.wait_for_timeout(1800)
        assert page.locator("#note").input_value() == "begun"
