"""The page on `/`: what it is made of; in a headless Chromium it draws, follows and cancels."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from support.doors import LedDoor, eventually


@pytest.fixture(scope="module")
def door() -> Iterator[LedDoor]:
    found = LedDoor(queue_size=3)
    yield found
    found.close()


def test_the_page_brings_all_that_it_names_and_nothing_from_elsewhere(door: LedDoor) -> None:
    page = door.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    script, style = door.client.get("/page.js"), door.client.get("/page.css")
    assert script.headers["content-type"].startswith("text/javascript")
    assert style.headers["content-type"].startswith("text/css")
    assert "http" not in page.text + script.text + style.text
    assert set(re.findall(r'(?:href|src)="([^"]+)"', page.text)) == {"page.css", "page.js"}
    ids = set(re.findall(r'id="([^"]+)"', page.text))
    assert set(re.findall(r'\$\("([^"]+)"\)', script.text)) <= ids


def test_health_says_what_the_page_begins_with(door: LedDoor) -> None:
    health = door.client.get("/health").json()
    assert health["defaults"]["num_inference_steps"] == 4
    assert health["limits"]["max_side"] == 256


@pytest.fixture
def page(door: LedDoor) -> Iterator[Any]:
    """The page in Chromium, which must meet no error."""
    api = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium") or pytest.skip("no chromium on PATH")
    with api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        shown = chromium.new_page()
        shown.set_default_timeout(10_000)
        errors: list[str] = []
        shown.on("pageerror", lambda error: errors.append(str(error)))
        shown.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        shown.goto(door.web.address)
        assert eventually(lambda: shown.input_value("#steps") == "4")
        yield shown
        chromium.close()
        assert [e for e in errors if "422" not in e] == []


def state(page: Any) -> str:
    return page.inner_text("article .state")


@pytest.mark.slow
def test_it_follows_the_steps_and_shows_picture_and_decisions(page: Any, door: LedDoor) -> None:
    door.painter.free = False
    page.fill("#prompt", "a ring")
    page.fill("#seed", "7")
    page.select_option("#cache", "budget")
    page.fill("#budget", "3")
    assert page.inner_text("#budget-said") == "3 of 4"
    page.click("#draw")
    assert eventually(lambda: "step 0 of 4" in state(page))
    door.painter.steps.release(2)
    assert eventually(lambda: "step 2 of 4, 25 %" in state(page))
    assert page.is_disabled("#draw")
    door.painter.steps.release(2)
    page.wait_for_selector("article img[src]")
    assert "seed 7" in state(page) and page.get_attribute("article img", "alt") == "a ring, seed 7"
    assert page.evaluate("document.querySelector('article img').naturalWidth") == 128
    order = door.painter.drawn[-1]
    assert (order["prompt"], order["seed"], order["num_inference_steps"]) == ("a ring", 7, 4)
    assert order["cache"]["use_cache"] == "Fast" and order["cache"]["computed_steps"] == 3
    assert page.locator("article .steps li").count() == 2
    assert page.locator("article .steps i.s").count() == 3
    assert page.is_enabled("#draw") and page.is_disabled("#cancel")


@pytest.mark.slow
def test_it_compares_with_the_uncached_picture_of_the_same_noise(page: Any, door: LedDoor) -> None:
    door.painter.free = True
    page.fill("#prompt", "a ring")
    page.check("#compare")
    page.click("#draw")
    assert eventually(lambda: page.locator("article img[src]").count() == 2)
    assert eventually(lambda: "the very same picture" in page.inner_text("article h2"))
    cached, plain = door.painter.drawn[-2:]
    assert cached["seed"] == plain["seed"] and plain["cache"] is False


@pytest.mark.slow
def test_it_cancels_what_waits_and_says_what_is_refused(page: Any, door: LedDoor) -> None:
    door.painter.free = False
    before = door.outcome("hung_up")
    page.fill("#prompt", "a ring")
    page.click("#draw")
    assert eventually(lambda: "step 0" in state(page))
    page.click("#cancel")
    assert eventually(lambda: state(page) == "cancelled")
    assert eventually(lambda: door.outcome("hung_up") == before + 1)
    door.painter.free = True
    door.painter.steps.release(4)
    page.evaluate("document.getElementById('width').removeAttribute('step')")
    page.fill("#width", "100")
    page.click("#draw")
    assert eventually(lambda: "width=100 is not allowed" in page.inner_text("#said"))
    assert state(page) == "failed"
