"""The report in a real browser: what a person can do with it, by mouse and without one, on any screen, offline."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from picinspector import report
from picinspector.report import Options
from picinspector.report.digest import Sections
from picinspector.selection import save
from tests.browser import launch
from tests.report_library import jpeg, row, write, write_groups

NAME = "<img src=x onerror=window.pwned=1>\u202egpj\n'\".jpg"
CAPTION = "</script><script>window.pwned=1</script>"
MANY = 2000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launch() as started:
        yield started


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 photos, 29.jpg the best: a third are plants, sharpness falls with the score, three groups, two errors.

    1.jpg is not there any more, and 28.jpg has the name and the caption of an attacker.
    """
    folder = tmp_path_factory.mktemp("small")
    rows = []
    for number in range(30):
        photo = jpeg(folder / (NAME if number == 28 else f"{number}.jpg"), number, (90, 60) if number % 2 else (60, 90))
        facts = {"camera": "Leica Q3" if number % 2 else "Pixel 8", "width": 60 + 30 * (number % 2), "height": 60}
        rows.append(row(photo, 2 + number / 5, scene="plant" if number % 3 == 0 else "night", **facts))
        rows[-1] |= {"attribute_sharpness": 90 - 2.0 * number, "quality_low": 1.5 + number / 5, "quality_high": 9.0}
    rows[28] |= {"caption": CAPTION, "caption_source": "model", "suggestions": ["noise at ISO 3200; use a tripod"]}
    (folder / "1.jpg").unlink()
    errors = [row(folder / f"bad{number}.jpg", None) for number in range(2)]
    dest = write(folder / "tables", rows + errors)
    groups = [(rows[3 * at + 2], rows[3 * at], rows[3 * at + 1]) for at in range(3)]
    write_groups(dest, [("burst", [(pick, "sharpest of 3"), (a, "less sharp"), (b, CAPTION)]) for pick, a, b in groups])
    report.write(dest, folder / "report.html", Options(Sections(best=8, worst=8, borderline=8, improvable=8)))
    return folder / "report.html"


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight photos, 7.jpg the best, of which 3, 7, 0 and 5 were selected, in this order; 3 is the pick of 3 and 2."""
    folder = tmp_path_factory.mktemp("selected")
    rows = [row(jpeg(folder / f"{number}.jpg", number), 2.0 + number) for number in range(8)]
    dest = write(folder / "tables", rows)
    write_groups(dest, [("near", [(rows[3], "highest score of 2"), (rows[2], "scores 1.00 lower")])])
    chosen = [rows[number]["image_id"] for number in (3, 7, 0, 5)]
    save(dest, pa.table({"image_id": chosen, "rank": range(1, 5)}))
    report.write(dest, folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 2,000 photos."""
    folder = tmp_path_factory.mktemp("large")
    original = jpeg(folder / "photo.jpg", 1, (48, 32))
    rows = []
    for number in range(MANY):
        shutil.copyfile(original, folder / f"{number:04}.jpg")
        rows.append(row(folder / f"{number:04}.jpg", 1 + 9 * number / MANY))
    report.write(write(folder / "tables", rows), folder / "report.html", Options(thumbnail_px=48))
    return folder / "report.html"


@dataclass
class Heard:
    """What a page said and asked for."""

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def opened(browser: Browser, file: Path, fragment: str = "", width: int = 1280, height: int = 900, **settings: object
           ) -> Iterator[Page]:  # fmt: skip
    """The page, in a window of its own; on leaving, it must have complained of nothing and asked for nothing."""
    heard = Heard()
    context = browser.new_context(viewport={"width": width, "height": height}, **settings)  # type: ignore[arg-type]
    page = context.new_page()
    page.on("console", lambda message: heard.complaints.append(message.text))
    page.on("pageerror", lambda error: heard.complaints.append(str(error)))
    page.on("request", lambda request: heard.requests.append(request.url))
    page.goto(file.as_uri() + fragment)
    yield page
    asked = [url for url in heard.requests if not url.startswith("data:")]
    assert (heard.complaints, [url.split("#")[0] for url in asked]) == ([], [file.as_uri()])
    assert page.evaluate("window.pwned") is None
    context.close()


def view(page: Page, name: str) -> None:
    page.locator(f"[data-view={name}]").click()


def names(page: Page) -> list[str]:
    """Of the cards, in their order; without `.jpg`."""
    return [name.removesuffix(".jpg") for name in page.locator(".card .name").all_text_contents()]


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.closest('.card')?.querySelector('.name').textContent ?? ''"))


def set_range(page: Page, name: str, value: float) -> None:
    page.locator(f"#{name}").fill(str(value))


# --- views, filters, order --------------------------------------------------------------------------------------------


def test_the_views_show_what_they_say(browser: Browser, small: Path) -> None:
    with opened(browser, small) as page:
        expect(page).to_have_title("Photo report")
        assert names(page)[0] == "29"
        assert len(names(page)) == 8
        view(page, "worst")
        assert names(page) == [str(number) for number in range(8)]
        view(page, "all")
        assert len(names(page)) == 30
        expect(page.locator("#status")).to_have_text("30 photos")
        view(page, "improvable")  # sharpness below 60 is from 16 on, the least at 29
        assert names(page)[0] == "29"
        expect(page.locator(".card .gain").first).to_have_text("+1.5")  # (60 - 32) x 0.611 x 0.09
        view(page, "errors")
        expect(page.locator("#errors")).to_contain_text("truncated 2")
        expect(page.locator("#errors li")).to_have_count(2)
        expect(page.locator(".card")).to_have_count(0)
        view(page, "runs")
        expect(page.locator("#runs")).to_contain_text("20260101T000000.000Z-aaaaaa")
        expect(page.locator("#errors")).to_be_hidden()


def test_groups_have_their_pick_and_its_reason(browser: Browser, small: Path) -> None:
    with opened(browser, small, "#view=groups") as page:
        expect(page.locator(".group")).to_have_count(3)
        first = page.locator(".group").first
        expect(first.locator("h3")).to_have_text("Burst of 3")
        expect(first.locator("p")).to_contain_text("Pick: 2.jpg – sharpest of 3")
        expect(first.locator(".badge")).to_have_count(1)
        expect(first.locator(".card").first).to_have_attribute(
            "aria-label", "2.jpg, quality 2.4, night, the pick of its group"
        )
        page.locator("#text").fill("8.jpg")
        assert names(page) == ["8", "6", "7"], "the group in which one fits, all of it"


def test_the_page_opens_at_the_selection(browser: Browser, selected: Path) -> None:
    with opened(browser, selected) as page:
        expect(page.locator("[data-view=selected]")).to_have_text("Selected 4")
        expect(page.locator("[data-view=selected]")).to_have_attribute("aria-pressed", "true")
        expect(page.locator("#lead")).to_have_text("The photos to keep, in the order in which they were chosen.")
        expect(page.locator("#status")).to_have_text("4 photos")
        assert names(page) == ["3", "7", "0", "5"]
        expect(page.locator(".badge")).to_have_count(0)
        labels = [card.get_attribute("aria-label") for card in page.locator(".card").all()]
        assert labels[:2] == [
            "3.jpg, quality 5.0, night, the pick of its group, selected",
            "7.jpg, quality 9.0, night, selected",
        ]
        page.locator(".card").nth(1).click()
        expect(page.locator("#details")).to_contain_text("Rank 1 of 8: percentile 100 of the library")
        expect(page.locator("#details")).to_contain_text("Selected, number 2 of 4.")
        page.get_by_label("Next photo").click()
        expect(page.locator("#details")).to_contain_text("Selected, number 3 of 4.")
        page.keyboard.press("Escape")
        view(page, "best")
        assert names(page) == [str(number) for number in range(7, -1, -1)]
        badges = page.locator(".card").filter(has=page.locator(".badge", has_text="selected")).locator(".name")
        assert badges.all_text_contents() == ["7.jpg", "5.jpg", "3.jpg", "0.jpg"]
        assert page.locator(".card").nth(1).get_attribute("aria-label") == "6.jpg, quality 8.0, night"
        page.locator(".card").nth(1).click()
        expect(page.locator("#details")).to_contain_text("Rank 2 of 8")
        expect(page.locator("#details")).not_to_contain_text("Selected")
        page.keyboard.press("Escape")
        view(page, "borderline")  # the fourth best, 4.jpg with 6.0, is the last above the cut
        expect(page.locator("#lead")).to_contain_text("6.00, above which there are as many photos as were selected")
        assert names(page)[0] == "4"
        view(page, "groups")
        expect(page.locator(".badge")).to_have_text(["pick"])


def test_filters(browser: Browser, small: Path) -> None:
    with opened(browser, small, "#view=all") as page:
        page.locator("#scene").select_option("plant")
        assert names(page) == [str(number) for number in range(27, -1, -3)]
        set_range(page, "low", 5)  # from 15.jpg on
        set_range(page, "high", 6.8)  # to 24.jpg
        assert names(page) == ["24", "21", "18", "15"]
        expect(page.locator("#status")).to_have_text("4 of 30 photos fit")
        expect(page.locator("#range-output")).to_have_text("5.0 to 6.8")
        page.locator("#attribute").select_option("sharpness")
        set_range(page, "least", 50)  # 90 - 2 x 20
        assert names(page) == ["18", "15"]
        page.locator("#text").fill("LEICA")
        assert names(page) == ["15"]
        page.locator("#text").fill("nothing has this")
        expect(page.locator(".empty")).to_be_visible()
        page.locator("#reset").click()
        assert len(names(page)) == 30
        set_range(page, "high", 3)
        set_range(page, "low", 4)
        expect(page.locator("#range-output")).to_have_text("4.0 to 4.0")
        assert names(page) == ["10"]
        # Bars of the histogram outside of 4.0 to 4.0 are grey.
        assert page.locator(".histogram .bar:not(.out)").count() == 1


def test_sorting(browser: Browser, small: Path) -> None:
    with opened(browser, small, "#view=best") as page:
        best = names(page)
        page.locator("#direction").click()
        assert names(page) == best[::-1]
        page.locator("#direction").click()
        view(page, "worst")
        page.locator("#sort").select_option("quality")
        assert names(page) == [str(number) for number in range(7, -1, -1)]
        page.locator("#sort").select_option(label="sharpness")
        assert names(page) == [str(number) for number in range(8)]
        page.locator("#sort").select_option("scene")
        page.locator("#direction").click()
        assert names(page) == ["7", "5", "4", "2", "1", "6", "3", "0"], "by scene, then the better first"
        expect(page.locator("#direction")).to_have_attribute("aria-label", "Lowest first")


def test_dragging_shows_the_last_step_of_a_frame_and_makes_no_card_anew(browser: Browser, small: Path) -> None:
    dragged = """() => {
        const [low, status] = ['low', 'status'].map((name) => document.getElementById(name));
        for (const value of [3, 6, 5]) {
            low.value = value;
            low.dispatchEvent(new Event('input'));
        }
        const at_once = status.textContent;
        return new Promise((done) => requestAnimationFrame(() => done([at_once, status.textContent])));
    }"""
    with opened(browser, small, "#view=all") as page:
        every = names(page)
        page.evaluate("document.querySelectorAll('.card').forEach((card, at) => { card.made = at; })")
        assert page.evaluate(dragged) == ["30 photos", "15 of 30 photos fit"]
        expect(page).not_to_have_url(re.compile("low="))
        page.locator("#low").dispatch_event("change")  # the slider is let go
        expect(page).to_have_url(re.compile("low=5"))
        page.locator("#sort").select_option("scene")
        page.locator("#reset").click()
        view(page, "groups")
        expect(page.locator(".card")).to_have_count(9)
        view(page, "all")
        assert names(page) == every
        assert page.evaluate("[...document.querySelectorAll('.card')].map((card) => card.made)") == [*range(30)]


def test_the_address_holds_the_state(browser: Browser, small: Path) -> None:
    with opened(browser, small, "#view=all&scene=plant&low=5&sort=a5&descending=false") as page:
        assert names(page) == ["27", "24", "21", "18", "15"]
        page.locator(".card").nth(1).click()
        expect(page.locator("#panel")).to_be_visible()
        address = page.url
    with opened(browser, small, address[address.index("#") :]) as page:
        expect(page.locator("#panel-name")).to_have_text("24.jpg")
        page.keyboard.press("Escape")
        expect(page).not_to_have_url(re.compile("photo="))  # a dialog tells of its end a moment later
        assert len(names(page)) == 5
    with opened(browser, small, "#view=<b>&scene=x&low=abc&sort=constructor&attribute=99&photo=1e9") as page:
        assert len(names(page)) == 8, "what makes no sense is left out"


# --- one photo --------------------------------------------------------------------------------------------------------


def test_the_panel(browser: Browser, small: Path) -> None:
    with opened(browser, small, "#view=best") as page:
        page.locator(".card").nth(1).click()
        panel = page.locator("#panel")
        expect(panel).to_be_visible()
        expect(panel.locator(".headline")).to_contain_text("7.6")
        expect(panel).to_contain_text("likely 7.1 to 9.0")
        expect(panel).to_contain_text("Rank 2 of 30: percentile 97 of the library")
        expect(panel.locator(".caption")).to_have_text(CAPTION)
        expect(panel.locator(".suggestions li")).to_have_text(["noise at ISO 3200; use a tripod"])
        expect(panel.locator(".where")).to_contain_text("<img src=x onerror=window.pwned=1>�gpj�'\".jpg")
        expect(panel.locator(".facts")).to_contain_text("Pixel 8")
        told = panel.locator(".radar").get_attribute("aria-label")
        assert told == ("Attributes, 0 to 100: overall 80, exposure 80, colour 80, contrast 80, noise-free 80, "
                        "sharpness 34")  # fmt: skip
        assert page.evaluate("document.querySelector('.stage img').naturalWidth") == 60
        # Sharpness, the sixth, at 34 of 100: the point lies at an angle of -60 degrees from the top.
        points = str(panel.locator(".radar .shape").get_attribute("points")).split()
        x, y = map(float, points[5].split(","))
        assert (x, y) == (pytest.approx(170 - 90 * 0.34 * 0.866, abs=0.1), pytest.approx(130 - 90 * 0.34 / 2, abs=0.1))
        panel.get_by_label("Next photo").click()
        expect(panel.locator("#panel-name")).to_have_text("27.jpg")
        panel.get_by_label("Close").click()
        expect(panel).to_be_hidden()
        assert focused(page) == "27.jpg", "where one was last"


def test_the_panel_leads_to_the_others_of_a_group(browser: Browser, small: Path) -> None:
    with opened(browser, small, "#view=groups") as page:
        page.locator(".card").nth(1).click()
        panel = page.locator("#panel")
        expect(panel).to_contain_text("Group: burst, 2 of 3")
        expect(panel).to_contain_text("less sharp")
        expect(panel.locator(".siblings button")).to_have_count(3)
        panel.locator(".siblings button").first.click()
        expect(panel.locator("#panel-name")).to_have_text("2.jpg")
        expect(panel.locator(".siblings button[aria-current=true] .badge")).to_have_text("pick")


def test_a_photo_that_is_not_there_says_why(browser: Browser, small: Path) -> None:
    with opened(browser, small, "#view=worst") as page:
        card = page.locator(".card").nth(1)
        expect(card.locator(".missing")).to_contain_text("not_found")
        card.click()
        expect(page.locator(".stage .missing")).to_contain_text("not_found")


# --- without a mouse --------------------------------------------------------------------------------------------------


def test_keys(browser: Browser, small: Path) -> None:
    with opened(browser, small, "#view=all") as page:
        page.locator(".card").first.focus()
        order = [f"{name}.jpg" for name in names(page)]
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert focused(page) == order[2]
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")  # there is nothing before the first
        assert focused(page) == order[0]
        page.keyboard.press("ArrowDown")
        below = page.evaluate("document.activeElement.getBoundingClientRect().top - "
                              "document.querySelector('.card').getBoundingClientRect().top")  # fmt: skip
        assert 190 < below < 260, "one row"
        page.keyboard.press("ArrowUp")
        assert focused(page) == order[0]
        page.keyboard.press("End")
        assert focused(page) == order[-1]
        expect(page.locator(".card:focus")).to_be_in_viewport()
        page.keyboard.press("Home")
        page.keyboard.press("Enter")
        panel = page.locator("#panel")
        expect(panel).to_be_visible()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowLeft")
        expect(panel.locator("#position")).to_have_text("2 of 30")
        page.keyboard.press("Escape")
        expect(panel).to_be_hidden()
        assert page.evaluate("document.activeElement.className") == "card"
        page.keyboard.press("/")
        page.keyboard.type("12.jpg")
        assert names(page) == ["12"]
        page.keyboard.press("Escape")
        page.keyboard.press("?")
        expect(page.locator("#help")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#help")).to_be_hidden()


def test_every_control_is_reached_by_tab_and_seen(browser: Browser, small: Path) -> None:
    with opened(browser, small, "#view=best") as page:
        seen = []
        for _ in range(40):
            page.keyboard.press("Tab")
            seen.append(
                page.evaluate("(({id, dataset, className}) => id || dataset.view || className)(document.activeElement)")
            )
            if seen[-1] == "card":
                break
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", seen[-1]
        assert seen[0] == "skip"
        for name in (
            "best",
            "errors",
            "text",
            "scene",
            "low",
            "high",
            "attribute",
            "least",
            "sort",
            "direction",
            "reset",
        ):
            assert name in seen
        assert seen[-1] == "card"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") != "card", "the grid is one stop; arrows move in it"


# --- what it costs, and on which screen -------------------------------------------------------------------------------


def test_two_thousand_photos_begin_with_those_on_the_screen(browser: Browser, large: Path) -> None:
    with opened(browser, large, "#view=all") as page:
        expect(page.locator(".card")).to_have_count(MANY)
        page.wait_for_selector(".frame img")
        assert page.locator(".frame img").count() < MANY / 10
        blocks = page.locator("script[id^=thumbnails-]")
        assert blocks.count() > MANY / 50 * 0.8, "the other blocks have not even been parsed"
        page.locator(".card").last.scroll_into_view_if_needed()
        expect(page.locator(".card").last.locator("img")).to_have_count(1)
        assert page.locator(".frame img").count() < MANY / 5
        set_range(page, "high", 5.5)  # the better half goes, and those that come to its place get their pictures
        assert names(page)[0] == "1000"
        page.locator(".card").first.scroll_into_view_if_needed()
        expect(page.locator(".card").first.locator("img")).to_have_count(1)
        view(page, "best")
        page.locator("#reset").click()
        view(page, "all")
        expect(page.locator(".card")).to_have_count(MANY)
        page.locator(".card").nth(500).scroll_into_view_if_needed()
        expect(page.locator(".card").nth(500).locator("img")).to_have_count(1)


def test_the_figures_need_no_script(browser: Browser, small: Path) -> None:
    with opened_without_script(browser, small) as page:
        expect(page.locator("h1")).to_have_text("Photo report")
        expect(page.get_by_role("img", name="Histogram of 30 quality scores")).to_be_visible()
        expect(page.get_by_text("They need the JavaScript of this page")).to_be_visible()
        expect(page.locator("#errors")).to_be_visible()


@contextmanager
def opened_without_script(browser: Browser, file: Path) -> Iterator[Page]:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    yield page
    context.close()


def overflow(page: Page) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@pytest.mark.parametrize("fragment", ["#view=all", "#view=groups", "#view=errors", "#view=runs", "#view=best&photo=1"])
def test_a_phone_needs_no_sideways_scrolling(browser: Browser, small: Path, fragment: str) -> None:
    with opened(browser, small, fragment, width=360, height=740, has_touch=True, is_mobile=True) as page:
        assert overflow(page) == 0
        pressed = page.locator("[data-view][aria-pressed=true]").bounding_box()
        assert pressed is not None
        assert 0 <= pressed["x"] <= pressed["x"] + pressed["width"] <= 360, "the row of views moves to it"
        if "photo=" in fragment:
            box = page.locator("#details").bounding_box()
            assert box is not None
            assert (box["x"], box["width"]) == (0, 360)
            assert page.evaluate("document.querySelector('#details').scrollWidth") <= 360
        else:
            expect(page.locator("#filters")).to_be_hidden()
            if "#view=all" in fragment:
                page.locator("#filters-toggle").tap()
                expect(page.locator("#text")).to_be_visible()
                assert overflow(page) == 0


@pytest.mark.parametrize(("width", "least"), [(1280, 4), (360, 2)])
def test_pictures_fill_their_frames_from_the_middle(browser: Browser, small: Path, width: int, least: int) -> None:
    """No edge of a photo is cut off more than the opposite one, and a row has several, on a phone too."""
    boxes = """[...document.querySelectorAll('.frame:has(img)')].slice(0, 6).map((frame) =>
        [frame, frame.querySelector('img')].map((part) => part.getBoundingClientRect().toJSON()))"""
    with opened(browser, small, "#view=all", width=width, reduced_motion="reduce") as page:
        page.locator(".card").nth(5).scroll_into_view_if_needed()
        expect(page.locator(".frame img").nth(5)).to_be_attached()
        found = page.evaluate(boxes)
        for frame, image in found:
            for side in ("top", "bottom", "left", "right"):
                assert image[side] == pytest.approx(frame[side], abs=0.5)
        tops = [frame["top"] for frame, _ in found]
        assert sum(abs(top - tops[0]) < 1 for top in tops) >= least
        assert "50%" in page.evaluate("getComputedStyle(document.querySelector('.frame img')).objectPosition")


def test_dark_and_reduced_motion_are_followed(browser: Browser, small: Path) -> None:
    def colour(page: Page, what: str = "body") -> int:
        told = page.evaluate(f"getComputedStyle(document.querySelector('{what}')).backgroundColor")
        return sum(map(int, told.removeprefix("rgb(").removesuffix(")").split(",")))

    with opened(browser, small, color_scheme="light") as page:
        assert colour(page) > 3 * 240
        assert page.evaluate("getComputedStyle(document.querySelector('.frame img')).transitionDuration") == "0.25s"
    with opened(browser, small, color_scheme="dark", reduced_motion="reduce") as page:
        assert colour(page) < 3 * 30
        assert page.evaluate("getComputedStyle(document.querySelector('.frame img')).transitionDuration") == "0s"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("fragment", ["#view=all&low=4", "#view=groups", "#view=errors", "#view=runs", "#photo=0"])
def test_accessibility(browser: Browser, small: Path, scheme: str, fragment: str) -> None:
    """WCAG A and AA as axe checks them, contrast included."""
    with opened(browser, small, fragment, color_scheme=scheme, bypass_csp=True) as page:
        check_accessibility(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("fragment", ["", "#view=best"])
def test_accessibility_of_a_selection(browser: Browser, selected: Path, scheme: str, fragment: str) -> None:
    with opened(browser, selected, fragment, color_scheme=scheme, bypass_csp=True) as page:
        check_accessibility(page)


def check_accessibility(page: Page) -> None:
    found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]})
    problems = [
        (violation["id"], violation["impact"], [node["html"][:200] for node in violation["nodes"][:3]])
        for violation in found.response["violations"]
        if violation["impact"] in ("serious", "critical", "moderate")
    ]
    assert problems == []
    assert any(passed["id"] == "color-contrast" for passed in found.response["passes"])


def test_injected_script_does_not_run(browser: Browser, small: Path, tmp_path: Path) -> None:
    """What the escaping might one day let through, the policy stops."""
    content = small.read_text().replace(
        "</body>", "<script>window.pwned=1</script><img src=x onerror='pwned=2'></body>"
    )
    (tmp_path / "page.html").write_text(content)
    context = browser.new_context()
    page = context.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto((tmp_path / "page.html").as_uri())
    expect(page.locator(".card").first).to_be_visible()
    assert page.evaluate("window.pwned") is None
    assert sum("Content Security Policy" in text for text in refused) >= 2
    context.close()
