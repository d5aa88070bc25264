"""The service's page in a real browser, before a stand-in for the replicas."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from picinspector import schema
from tests.browser import launch
from tests.test_serve_front import RULES, TOKEN, Replicas, answer, served

expect.set_options(timeout=30_000)  # two processors may be busy

SCRIPT = "<img src=x onerror=window.pwned=1>"


def judged(name: str) -> dict[str, Any]:
    """A photo of middling exposure that is otherwise good."""
    values = {f"attribute_{attribute}": 80.0 for attribute in schema.ATTRIBUTES} | {"attribute_brightness": 35.5}
    values |= {f"scene_{scene}": 0.01 for scene in schema.SCENES} | {"scene_still_life": 0.92, "scene": "still_life"}
    values |= {"quality_low": 6.0, "quality_high": 8.25, "caption": f"This photo is dark. {SCRIPT}"}
    return answer(name, scorer_kind="lightgbm", suggestions=["it is 1 stop too dark; expose longer"], **values)


class Judging(Replicas):
    async def judge(self, data: bytes, name: str) -> dict[str, Any]:
        said = await super().judge(data, name)
        return said if said["error_kind"] else judged(name)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launch() as started:
        yield started


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with served(replicas=Judging()) as (client, _):
        yield str(client.base_url)


@contextmanager
def opened(browser: Browser, site: str, **options: Any) -> Iterator[Page]:
    """The page; that its policy refused something, or that a script failed, is a failure."""
    context = browser.new_context(**options)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if "Security Policy" in message.text else None)
    page.goto(site)
    yield page
    context.close()
    assert problems == []


def png() -> bytes:
    Image.new("RGB", (60, 40), (200, 120, 40)).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def choose(page: Page, data: bytes, name: str = "photo.png") -> None:
    page.set_input_files("#photo", {"name": name, "mimeType": "image/png", "buffer": data})


def test_a_photo_is_judged_and_shown(browser: Browser, site: str) -> None:
    with opened(browser, site) as page:
        expect(page.locator("#result")).to_be_hidden()
        choose(page, png(), f"{SCRIPT}.png")
        expect(page.get_by_role("heading", level=2)).to_have_text(f"{SCRIPT}.png")
        expect(page.locator("#quality")).to_have_text("7.50")
        expect(page.locator("#interval")).to_contain_text("6.0 to 8.3")
        expect(page.locator("#scene")).to_have_text("Scene: still life (92 %)")
        expect(page.locator("#caption")).to_contain_text("This photo is dark.")
        expect(page.locator("#suggestions li")).to_have_text(["it is 1 stop too dark; expose longer"])
        expect(page.get_by_role("row", name="exposure")).to_contain_text("35.5")
        assert page.locator("#attributes tr").count() == 6
        assert page.evaluate("document.querySelector('#preview').naturalWidth") == 60
        assert page.evaluate("document.activeElement.id") == "result", "a screen reader goes on from here"
        assert page.evaluate("window.pwned") is None


def test_the_radar_is_of_the_values(browser: Browser, site: str) -> None:
    """Exposure, the second of six, points to the right and up: 35.5 of 100 at 30 degrees above the horizontal."""
    with opened(browser, site) as page:
        choose(page, png())
        points = page.locator("#radar .area").get_attribute("points")
        assert points is not None
        corners = [tuple(map(float, corner.split(","))) for corner in points.split()]
        assert corners[0] == (0.0, -80.0)
        assert corners[1] == pytest.approx((35.5 * 0.866, -35.5 / 2), abs=0.06)
        assert len(corners) == 6
        assert page.locator("#radar text").all_text_contents()[1] == "exposure"
        expect(page.get_by_role("img", name="radar chart")).to_be_visible()


def test_a_dropped_photo_is_judged_too(browser: Browser, site: str) -> None:
    with opened(browser, site) as page:
        page.evaluate(
            """() => {
                const data = new DataTransfer();
                data.items.add(new File(["x"], "dropped.jpg", {type: "image/jpeg"}));
                document.querySelector("#drop").dispatchEvent(
                    new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
            }"""
        )
        expect(page.get_by_role("heading", level=2)).to_have_text("dropped.jpg")
        expect(page.locator("#preview")).to_be_hidden()  # no browser can show it


def test_what_is_wrong_is_said(browser: Browser, site: str) -> None:
    with opened(browser, site) as page:
        choose(page, png())
        expect(page.locator("#result")).to_be_visible()
        choose(page, b"bad", "b.png")
        expect(page.get_by_role("alert")).to_have_text("b.png: truncated: it ends early")
        expect(page.locator("#result")).to_be_hidden()
        page.route("**/v1/score", lambda route: route.abort())
        choose(page, png())
        expect(page.get_by_role("alert")).to_contain_text("did not answer")


def test_a_token_is_asked_for_where_there_is_one(browser: Browser, site: str) -> None:
    with opened(browser, site) as page:
        assert page.locator("#token").count() == 0
    guarded = served(replace(RULES, token=TOKEN), replicas=Judging())
    with guarded as (client, _), opened(browser, str(client.base_url)) as page:
        choose(page, png())
        expect(page.get_by_role("alert")).to_contain_text("unauthorized")
        page.get_by_label("Token of this service").fill(TOKEN)
        choose(page, png())
        expect(page.locator("#quality")).to_have_text("7.50")


def test_it_can_be_used_without_a_mouse(browser: Browser, site: str) -> None:
    with opened(browser, site) as page:
        photo = {"name": "a.png", "mimeType": "image/png", "buffer": png()}
        page.on("filechooser", lambda chooser: chooser.set_files(photo))
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "photo"
        page.keyboard.press("Enter")
        expect(page.locator("#quality")).to_have_text("7.50")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", ["empty", "judged", "failed"])
def test_accessibility(browser: Browser, site: str, scheme: str, state: str) -> None:
    """WCAG A and AA as axe checks them, contrast included."""
    with opened(browser, site, color_scheme=scheme, bypass_csp=True) as page:
        if state == "judged":
            choose(page, png())
            expect(page.locator("#quality")).to_have_text("7.50")
        elif state == "failed":
            choose(page, b"bad")
            expect(page.get_by_role("alert")).not_to_be_empty()
        found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]})
        problems = [
            (violation["id"], [node["html"][:200] for node in violation["nodes"][:3]])
            for violation in found.response["violations"]
        ]
        assert problems == []


def test_a_phone_needs_no_sideways_scrolling(browser: Browser, site: str) -> None:
    with opened(browser, site, viewport={"width": 360, "height": 740}) as page:
        choose(page, png(), "a" * 200 + ".png")
        expect(page.locator("#quality")).to_have_text("7.50")
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


def test_injected_script_does_not_run(browser: Browser, site: str) -> None:
    """What the text nodes might one day let through, the policy stops."""
    context = browser.new_context()
    page = context.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))

    def inject(route: Any) -> None:
        response = route.fetch()
        route.fulfill(response=response, body=response.text().replace("</body>", "<script>pwned=1</script></body>"))

    page.route(site, inject)
    page.route(f"{site}/", inject)
    page.goto(site)
    assert page.evaluate("window.pwned") is None
    assert any("Content Security Policy" in text for text in refused)
    context.close()
