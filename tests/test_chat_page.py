"""The chat page as a person uses it, in a headless chromium: consent, a stream, two answers, thumbs, hostile texts.

With JAXRLHF_SCREENSHOTS=FOLDER the picture of docs/serving.md is written there.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil

import pytest
import serving_cases

from jaxrlhf.feedback import store, unpaired

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'jaxrlhf[test]'")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("no chromium here: apt-get install chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("store") / "feedback.sqlite"


@pytest.fixture(scope="module")
def address(tmp_path_factory, path):
    """A service that always shows two answers."""
    folder = serving_cases.policy(tmp_path_factory.mktemp("policy") / "first", 0)
    with serving_cases.service(folder, store=path, ask_share=1.0) as (found, _):
        yield found


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, address):
    """The page, fresh; what it asks for, says and pops up is in `page.heard`."""
    context = chromium.new_context(viewport={"width": 900, "height": 560})
    made = context.new_page()
    made.set_default_timeout(20_000)
    made.heard = {"requests": [], "dialogs": [], "errors": []}
    made.on("request", lambda request: made.heard["requests"].append(request.url))
    made.on("dialog", lambda dialog: (made.heard["dialogs"].append(dialog.message), dialog.dismiss()))
    made.on("pageerror", lambda error: made.heard["errors"].append(str(error)))
    made.on("console", lambda message: message.type == "error" and made.heard["errors"].append(message.text))
    made.goto(f"{address}/")
    made.locator("body[data-ready]").wait_for()
    yield made
    assert made.heard["errors"] == []
    assert made.heard["dialogs"] == []
    assert all(url.startswith((address, "data:")) for url in made.heard["requests"])
    context.close()


def send(page, text: str) -> None:
    page.locator("#ask").wait_for(state="hidden")  # it closes when the answer is on the disk
    before = page.locator("article").count()
    page.locator("#message").fill(text)
    page.keyboard.press("Enter")
    page.locator("article").nth(before).wait_for()
    page.locator("#send").wait_for()  # hidden while an answer is written


def kept(path) -> tuple[list, list, list]:
    with contextlib.closing(store.open_store(path)) as db:
        return store.pairs(db), store.choices(db), unpaired.ratings(db)


def test_nothing_is_kept_of_a_person_who_says_no(page, path):
    before = kept(path)
    assert "be kept" in page.locator("#wording").inner_text()
    page.locator("#no").click()
    send(page, "1+2=")
    assert page.locator(".answer").count() == 1, "nobody is asked to choose whose choice is not kept"
    assert page.locator(".actions button").count() == 0
    page.reload()
    page.locator("body[data-ready]").wait_for()
    assert not page.locator("#ask").is_visible(), "asked once"
    assert kept(path) == before


def test_a_person_chooses_between_two_and_judges(page, path):
    page.locator("#yes").click()
    for number, word in enumerate(("left", "right", "tie")):
        send(page, f"{number}+2=")
        turn = page.locator("article").nth(number)
        texts = turn.locator(".answer .text").all_inner_texts()
        assert len(texts) == 2
        if os.environ.get("JAXRLHF_SCREENSHOTS") and number == 1:
            page.screenshot(path=pathlib.Path(os.environ["JAXRLHF_SCREENSHOTS"]) / "chat.png")
        buttons = turn.locator(".actions button")
        buttons.nth(("left", "right", "tie").index(word)).click()
        turn.locator(".question").wait_for(state="hidden")
        assert turn.locator(".answer.chosen").count() == (word != "tie")
    turn = page.locator("article").nth(1)
    turn.get_by_label("a good answer").nth(1).click()
    turn.locator("button[aria-pressed=true]").wait_for()
    turn.get_by_label("a bad answer").nth(1).click()  # a change of mind
    turn.locator("button[aria-pressed=true][aria-label='a bad answer']").wait_for()
    pairs, choices, ratings = kept(path)
    mine = [(choice.choice, choice.preferred) for choice in choices]
    assert mine == [("left", "a"), ("right", "b"), ("tie", None)]
    assert [pair.prompt for pair in pairs] == ["0+2=", "1+2=", "2+2="]
    assert [(each.prompt, each.response, each.good) for each in ratings] == [("1+2=", pairs[1].response_b, False)]
    page.locator("#agreed").uncheck()
    page.locator("#agreed:not(:checked)").wait_for()
    send(page, "9+9=")
    assert page.locator("article").last.locator(".answer").count() == 1
    assert kept(path)[0] == pairs


def test_hostile_texts_stay_text_and_refusals_are_shown(page):
    page.locator("#no").click()
    send(page, "<img src=x onerror=alert(1)>\u202e")
    said = page.locator(".said .text").inner_text()
    assert said == "<img src=x onerror=alert(1)>U+202E"
    assert page.locator("main img").count() == 0
    page.locator("#message").fill("1+" * 400)
    page.locator("#send").click()
    page.get_by_text("are read beside an answer").wait_for()
    page.heard["errors"] = [each for each in page.heard["errors"] if "status of 400" not in each]  # chromium tells them too
