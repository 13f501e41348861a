"""The page in a real browser: what it shows while blocks are unmasked, and what it lets happen."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from pipelines.serving import server
from pipelines.serving.server import ServeConfig
from student_train.using.settings import SampleConfig
from student_train.using.student import LoadedStudent, load_for_use, sample

BLOCK = 8
SAMPLING = SampleConfig(new_tokens=24, min_new_tokens=24, block=BLOCK)
NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def loaded(student: str) -> LoadedStudent:
    return load_for_use(student, "cpu")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as driver:
        as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
        try:
            chromium = driver.chromium.launch(executable_path=found, args=as_root)
        except Error as error:
            pytest.skip(f"no Chromium can be started here: {error.message.splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.fixture
def page(loaded: LoadedStudent, browser: Browser) -> Iterator[Page]:
    """As wide as a phone; whatever the browser refuses is an error of the test."""
    refused: list[str] = []
    with server.served(loaded, ServeConfig("small", SAMPLING, port=0)) as address:
        shown = browser.new_page(viewport={"width": 380, "height": 720})
        shown.set_default_timeout(20_000)
        shown.on("pageerror", lambda error: refused.append(str(error)))
        shown.goto(address)
        expect(shown.locator("h1")).to_have_text("small")
        yield shown
        assert shown.evaluate("document.documentElement.scrollWidth") <= 380
        shown.close()
    assert not refused


@contextmanager
def stepwise(model: Any) -> Iterator[threading.Semaphore]:
    """A pass of the model for each release."""
    may = threading.Semaphore(0)
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda *_: may.acquire(timeout=20) and None
    )
    try:
        yield may
    finally:
        hook.remove()
        may.release(1000)


def test_an_answer_is_seen_as_it_is_unmasked(page: Page, loaded: LoadedStudent) -> None:
    """Token by token, with how sure the student was; at the end it is the sampler's."""
    asked = "Write <img src=x> `f`."
    prompt = loaded.tokenizer.encode_prompt([{"role": "user", "content": asked}])
    first = BLOCK - len(prompt) % BLOCK
    masks, tokens = page.locator(".mask"), page.locator("main span[title]")
    with stepwise(loaded.model) as may:
        page.locator("textarea").fill(asked)
        page.keyboard.press("Enter")
        for step in range(1, min(first, 3)):
            may.release()
            expect(masks).to_have_count(first - step)
            expect(tokens).to_have_count(step)
        shades = tokens.evaluate_all("all => all.map(one => getComputedStyle(one).background)")
        assert all("rgba(240, 140, 0" in shade for shade in shades)
        may.release(1000)
    expect(page.locator("#send")).to_have_text("Send")
    wanted = loaded.tokenizer.text(sample(loaded.model, [prompt], loaded.special, SAMPLING)[0])
    assert page.locator("main div").first.text_content() == asked
    assert (page.locator("main div").nth(1).text_content() or "").strip() == wanted.strip() != ""
    assert masks.count() == 0 and "tokens in" in page.locator("#status").inner_text()


def test_what_a_student_writes_is_never_html(
    page: Page, loaded: LoadedStudent, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = [b"<img src=x onerror=alert(1)>"] * len(loaded.tokenizer.token_bytes)
    monkeypatch.setitem(vars(loaded.tokenizer), "token_bytes", table)
    with stepwise(loaded.model) as may:
        page.locator("textarea").fill("x")
        page.locator("#send").click()
        may.release(2)
        expect(page.locator("main span[title]").first).to_have_text(table[0].decode())
        assert page.locator("main img").count() == 0


def test_stop_and_errors(page: Page, loaded: LoadedStudent) -> None:
    """After either the question is there again, and the next one is answered."""
    send, status = page.locator("#send"), page.locator("#status")
    question = page.locator("textarea")
    question.fill("again")
    page.locator("summary").click()
    page.get_by_label("Temperature").fill("-1")
    send.click()
    expect(status).to_contain_text("`temperature`")
    expect(question).to_have_value("again")
    page.get_by_label("Temperature").fill("")
    with stepwise(loaded.model):
        send.click()
        expect(send).to_have_text("Stop")
        page.keyboard.press("Escape")
        expect(send).to_have_text("Send")
        expect(question).to_have_value("again")
    send.click()
    expect(status).to_contain_text("tokens in")
    expect(page.locator("main div")).to_have_count(2)
