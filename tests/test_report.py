"""The report without a browser: figures and choices that a person can derive, nothing unescaped, and the size kept."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from picinspector import report
from picinspector.errors import ErrorKind, PhotoError, StorageError, UsageError
from picinspector.photo import thumbnail
from picinspector.report import Options, thumbnails
from picinspector.report.digest import GROUP_MEMBERS, Sections, digest
from picinspector.report.page import policy
from picinspector.report.thumbnails import LEFT_OUT
from picinspector.selection import save
from picinspector.tables import Destination
from picinspector.text import one_line
from tests.report_library import jpeg, row, write, write_groups
from tests.s3_server import S3Server

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror='pwned=1'>\"\u2028\u202e\n&amp;"


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and what is inside of scripts and styles."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[tuple[str, dict[str, str | None], str]] = []
        self.text = ""
        self._raw: tuple[str, dict[str, str | None]] | None = None
        self.feed(content.decode())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._raw = (tag, dict(attrs)) if tag in ("script", "style") else None

    def handle_data(self, data: str) -> None:
        if self._raw is not None:
            self.inside.append((*self._raw, data))
            self._raw = None
        else:
            self.text += data

    def data(self, name: str = "data") -> Any:
        """The content of a JSON block."""
        return json.loads(next(text for tag, found, text in self.inside if found.get("id") == name))


def page_of(dest: Destination, tmp_path: Path, options: Options = Options()) -> tuple[Page, dict[str, Any], bytes]:
    said = report.write(dest, tmp_path / "report.html", options)
    content = (tmp_path / "report.html").read_bytes()
    assert said["bytes"] == len(content)
    return Page(content), said, content


def names(found: Any, view: str) -> list[str]:
    return [Path(found.photos[place]["uri"]).stem for place in found.views[view]]


def scored(folder: Path, qualities: Sequence[float | None]) -> list[dict[str, Any]]:
    """Photos 0.jpg, 1.jpg ... that are not there: for what is said without looking at them."""
    return [row(f"{folder}/{number}.jpg", quality) for number, quality in enumerate(qualities)]


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_by_hand(tmp_path: Path) -> None:
    rows = scored(tmp_path, [1.0, 1.24, 1.25, 5.5, 10.0, None, None, None])
    rows[0]["scene"] = rows[1]["scene"] = "human"
    rows[4]["attribute_sharpness"] = 20.0
    rows[7] |= {"error_kind": "timeout", "error_message": "no answer"}
    found = digest(write(tmp_path / "tables", rows))
    summary = found.summary
    assert (summary["scored"], summary["failed"], summary["photos"], summary["size_bytes"]) == (5, 3, 8, 8000)
    bars = {place: count for place, count in enumerate(summary["histogram"]) if count}
    assert bars == {0: 2, 1: 1, 18: 1, 35: 1}, "quarters of a point from 1; 10 is in the last"
    assert summary["quantiles"] == pytest.approx([1.096, 1.24, 1.25, 5.5, 8.2], abs=1e-6)
    assert summary["scenes"] == [
        {"scene": "night", "count": 3, "median": pytest.approx(5.5)},
        {"scene": "human", "count": 2, "median": pytest.approx(1.12)},
    ]
    sharpness = next(found for found in summary["attributes"] if found["name"] == "sharpness")
    assert sharpness["quantiles"] == pytest.approx([20 + 60 * 0.4, 80, 80, 80, 80])
    assert [(error["kind"], error["count"], error["transient"]) for error in found.errors] == [
        ("truncated", 2, False),
        ("timeout", 1, True),
    ]
    assert [example["uri"] for example in found.errors[0]["examples"]] == [f"{tmp_path}/5.jpg", f"{tmp_path}/6.jpg"]
    assert [(photo["place"], photo["percentile"]) for photo in found.photos] == [
        (place, pytest.approx(100 - 20 * place)) for place in range(5)
    ]
    assert [photo["scene_percentile"] for photo in found.photos[-2:]] == [100, 50], "of its scene, human"


def test_which_photos_are_shown(tmp_path: Path) -> None:
    """100 photos, of which 16 may be shown: an eighth, two, of each view, and the rest at even steps."""
    dest = write(tmp_path / "tables", scored(tmp_path, [1 + number * 0.09 for number in range(100)]))
    found = digest(dest, Sections(photos=16))
    assert names(found, "best") == ["99", "98"]
    assert names(found, "worst") == ["0", "1"]
    assert sorted(names(found, "borderline")) == ["49", "50"], "either side of the median, 5.455"
    assert names(found, "improvable") == [], "every attribute is 80"
    assert len(found.photos) == 16
    others = [number for number in range(100) if number not in (0, 1, 49, 50, 98, 99)]  # 94, of which ten
    spread = sorted(int(Path(photo["uri"]).stem) for photo in found.photos[6:])
    assert len(spread) == found.summary["spread"] == 10
    steps = np.diff([others.index(number) for number in spread])
    assert set(steps) <= {9, 10}
    assert found.summary["cut"] == pytest.approx(5.455) and names(found, "selected") == []
    chosen = [f"{tmp_path}/{number}.jpg" for number in (98, 3, 7, 20, 95)]
    save(dest, pa.table({"image_id": [f"{uri}@1" for uri in [*chosen, "/left.jpg"]], "rank": range(1, 7)}))
    found = digest(dest, Sections(photos=16))
    assert names(found, "selected") == ["98", "3", "7", "20"], "a quarter of those shown, in their order"
    assert found.summary["selected"] == 5, "one has left the library since"
    assert [photo["selected"] for photo in found.photos[:4]] == [1, 2, 3, 4]
    assert names(found, "borderline")[0] == "95", "the fifth best"
    assert len(digest(dest, Sections(photos=1)).photos) == 1
    everything = digest(dest, Sections(photos=100))
    assert len({photo["uri"] for photo in everything.photos}) == 100


def test_most_improvable_is_what_the_suggestions_promise(tmp_path: Path) -> None:
    rows = scored(tmp_path, [5, 5, 5, 5])
    rows[0]["attribute_sharpness"] = 30.0
    rows[1]["attribute_sharpness"] = 10.0
    rows[2]["attribute_sharpness"] = 59.9  # less than 0.05 of a point to gain: nothing is suggested
    rows[3] |= {"attribute_sharpness": 5.0, "scorer_kind": "zero_shot"}  # attributes of another kind
    rows[1]["suggestions"] = ["what was said then; do that"]
    found = digest(write(tmp_path / "tables", rows))
    assert names(found, "improvable") == ["1", "0"]
    shown = {Path(photo["uri"]).stem: photo for photo in found.photos}
    assert shown["1"]["suggestions"] == [{"text": "what was said then; do that", "gain": None}], "as the table has it"
    rows[1]["suggestions"] = None
    texts = _suggested(rows[0])
    rows[0]["suggestions"] = [text for text, _ in texts]
    photo = next(p for p in digest(write(tmp_path / "more", rows)).photos if p["uri"] == rows[0]["uri"])
    assert [suggestion["gain"] for suggestion in photo["suggestions"]] == [gain for _, gain in texts]
    assert photo["gain"] == pytest.approx(30 * 0.611 * 0.09)


def _suggested(photo: dict[str, Any]) -> list[tuple[str, float]]:
    from picinspector import schema
    from picinspector.feedback import suggest

    attributes = {name: photo[f"attribute_{name}"] for name in schema.ATTRIBUTES}
    return [(found.text, found.gain) for found in suggest(attributes, {}, photo, photo["scene"])]


def test_groups_are_shown_largest_first_with_the_pick_first(tmp_path: Path) -> None:
    rows = scored(tmp_path, [float(2 + number % 7) for number in range(40)])
    dest = write(tmp_path / "tables", rows)
    large, small = rows[: GROUP_MEMBERS + 3], rows[20:22]
    write_groups(
        dest,
        [
            ("burst", [(small[1], "sharpest of 2"), (small[0], "less sharp than the pick")]),
            ("near", [(photo, None) for photo in large]),
            ("single", [(rows[30], None)]),
            ("near", [({"image_id": f"gone{number}", "uri": f"/gone{number}"}, None) for number in range(30)]),
        ],
    )
    found = digest(dest)
    assert [(group["kind"], group["size"], len(group["members"])) for group in found.groups] == [
        ("near", GROUP_MEMBERS + 3, GROUP_MEMBERS),
        ("burst", 2, 2),
    ]
    pick, other = (found.photos[place] for place in found.groups[1]["members"])
    assert (pick["uri"], pick["rank_in_group"], pick["reason"]) == (small[1]["uri"], 1, "sharpest of 2")
    assert (other["uri"], other["reason"], other["group"]) == (small[0]["uri"], "less sharp than the pick", 1)
    summary = found.summary
    assert (summary["groups"], summary["grouped"], summary["not_picked"]) == (2, len(large) + 2, len(large))
    assert summary["group_known"] == len(large) + 3, "photos that have gone are not counted"
    few = digest(dest, Sections(photos=8))
    assert [group["kind"] for group in few.groups] == [], "the largest alone would be more than half of the page"
    assert len(few.photos) == 8
    page, said, _ = page_of(dest, tmp_path)
    assert "18 of 40 photos" in page.text
    assert said["groups"] == 2


def test_nothing_scored(tmp_path: Path) -> None:
    page, said, _ = page_of(write(tmp_path / "tables", scored(tmp_path, [None, None])), tmp_path)
    assert (said["photos"], said["failed"], said["shown"]) == (0, 2, 0)
    assert "No photo has a quality score." in page.text
    assert "2 of 2 photos have no score" in page.text
    with pytest.raises(UsageError, match="no committed scores here"):
        report.write(Destination(tmp_path / "nowhere"), tmp_path / "report.html")


def test_numbers_that_are_none(tmp_path: Path) -> None:
    rows = scored(tmp_path, [math.nan, 5.0])
    rows[1] |= {"attribute_contrast": math.nan, "quality_low": math.inf, "exposure_s": math.nan, "width": 0}
    page, said, _ = page_of(write(tmp_path / "tables", rows), tmp_path)
    [photo] = page.data()["photos"]
    assert said["photos"] == 1
    assert (photo["attributes"][3], photo["low"], photo["ratio"]) == (None, None, 1.5)


def test_zero_shot_scores_say_so_and_have_their_own_labels(tmp_path: Path) -> None:
    rows = [row(f"{tmp_path}/{number}.jpg", 5.0, scorer_kind="zero_shot") for number in range(2)]
    rows[1]["scorer_fingerprint"] = "another"
    page, _, _ = page_of(write(tmp_path / "tables", rows), tmp_path)
    assert "These scores are zero-shot" in page.text
    assert "More than one scorer" in page.text
    assert page.data()["labels"][1] == "brightness"


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path: Path) -> Destination:
    """A library in which everything that people or cameras write attacks."""
    photo = jpeg(tmp_path / HOSTILE.replace("\u2028", "") / f"{'long' * 50}\n\u202egpj.exe.jpg")
    texts = {"camera": HOSTILE, "lens": HOSTILE, "caption": HOSTILE, "suggestions": [HOSTILE], "format": HOSTILE}
    good = row(photo, 7.0, **texts)
    pair = row(jpeg(tmp_path / "pair.jpg"), 6.0)
    bad = row(f"/{HOSTILE}.jpg", None, error_kind=HOSTILE, error_message=HOSTILE)
    bundle = dict.fromkeys(("name", "version", "encoder_fingerprint", "scorer_fingerprint", "scorer_kind"), HOSTILE)
    record = {"library": HOSTILE, "bundle": bundle, "environment": {HOSTILE: HOSTILE}, "kind": HOSTILE}
    dest = write(tmp_path / "tables", [good, pair, bad], record)
    write_groups(dest, [("burst", [(good, HOSTILE), (pair, HOSTILE)])])
    return dest


def test_hostile_texts_are_texts(hostile: Destination, tmp_path: Path) -> None:
    page, _, content = page_of(hostile, tmp_path, Options(title=HOSTILE))
    assert b"<script>window" not in content
    assert b"<img" not in content, "the script makes them"
    for forbidden in ("\u2028", "\u202e"):
        assert forbidden not in content.decode()
    scripts = [(found.get("id"), found.get("type")) for tag, found in page.elements if tag == "script"]
    assert scripts == [("data", "application/json"), ("thumbnails-0", "application/json"), (None, None)]
    attributes = [(tag, name) for tag, found in page.elements for name in found]
    assert [found for found in attributes if found[1].startswith("on") or found[1] == "style"] == []
    photo = page.data()["photos"][0]
    assert photo["caption"] == photo["suggestions"][0]["text"] == photo["reason"] == one_line(HOSTILE)
    assert dict(photo["facts"])["camera"] == one_line(HOSTILE)
    assert photo["name"] == f"{'long' * 12}lo…{('long' * 50 + '��gpj.exe.jpg')[-50:]}"
    assert page.text.count(one_line(HOSTILE)) >= 10


def test_nothing_is_asked_of_the_network_and_the_policy_knows_what_runs(hostile: Destination, tmp_path: Path) -> None:
    page, _, _ = page_of(hostile, tmp_path)
    addresses = [
        found[name] for _, found in page.elements for name in ("src", "href", "action", "srcset") if name in found
    ]
    assert addresses == ["data:,", "#photos"]
    assert not any(word in text for tag, _, text in page.inside if tag == "style" for word in ("url(", "@import"))
    [told] = [found["content"] for _, found in page.elements if found.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in str(told).split(";"))
    for tag in ("style", "script"):
        [text] = [text for found, attributes, text in page.inside if found == tag and "id" not in attributes]
        digest_ = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest_}'"
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert policy("a", "b") != policy("a", "c")


def test_the_same_input_gives_the_same_page(tmp_path: Path) -> None:
    rows = [row(jpeg(tmp_path / f"{number}.jpg", number, noise=30), 2.0 + number % 5) for number in range(30)]
    dest = write(tmp_path / "tables", rows)
    first = page_of(dest, tmp_path, Options(Sections(photos=20), threads=1))[2]
    assert page_of(dest, tmp_path, Options(Sections(photos=20), threads=4))[2] == first


def test_names_and_facts_in_words(tmp_path: Path) -> None:
    exif = {"camera": "Leica Q3", "iso": 400, "exposure_s": 1 / 250, "f_number": 2.8, "focal_length_mm": 28.0}
    photo = row(f"{tmp_path}/a b.jpg", 6.0, format="JPEG", **exif) | {"size_bytes": 4_200_000, "etag": None}
    page, _, _ = page_of(write(tmp_path / "tables", [photo]), tmp_path)
    [shown] = page.data()["photos"]
    assert shown["name"] == "a b.jpg"
    assert dict(shown["facts"]) == {
        "taken": "2026-05-01 12:00:00",
        "camera": "Leica Q3",
        "exposure": "1/250 s · f/2.8 · ISO 400 · 28 mm",
        "file": "600 × 400 px (0.2 MP) · JPEG · 4.2 MB",
    }


def test_the_page_says_where_its_scores_are_from(tmp_path: Path) -> None:
    page, _, _ = page_of(write(tmp_path / "tables", scored(tmp_path, [5.0, None])), tmp_path)
    words = " ".join(page.text.split())
    for told in ("20260101T000000.000Z-aaaaaa", "builtin 0.3.0", "encoder-1", "scorer-1", "ray 2.60.0", "/photos"):
        assert told in words
    assert "1 scored, 1 failed" in words


# --- thumbnails and size ----------------------------------------------------------------------------------------------


def pictures(page: Page) -> list[str | None]:
    blocks = sum(str(found.get("id")).startswith("thumbnails-") for _, found in page.elements)
    return [image for block in range(blocks) for image in page.data(f"thumbnails-{block}")]


def test_thumbnails_are_the_photos(tmp_path: Path) -> None:
    rows = [row(jpeg(tmp_path / f"{number}.jpg", number, (900, 600)), 9.0 - number) for number in range(3)]
    page, said, _ = page_of(write(tmp_path / "tables", rows), tmp_path, Options(thumbnail_px=320))
    assert (said["thumbnails"], said["thumbnail_px"], said["unreadable"], said["left_out"]) == (3, 320, 0, 0)
    for number, image in enumerate(pictures(page)):
        small = Image.open(io.BytesIO(base64.b64decode(str(image))))
        whole = np.asarray(Image.open(tmp_path / f"{number}.jpg"))
        assert (small.format, small.size) == ("WEBP", (320, 213))
        assert np.abs(np.asarray(small.convert("RGB")).mean((0, 1)) - whole.mean((0, 1))).max() < 4


def test_photos_that_are_not_there_any_more_say_why(tmp_path: Path) -> None:
    rows = [row(jpeg(tmp_path / f"{number}.jpg", number), 9.0 - number) for number in range(4)]
    (tmp_path / "0.jpg").unlink()
    jpeg(tmp_path / "1.jpg", 9, (80, 80))  # replaced since
    rows[2] |= {"etag": None, "size_bytes": None}
    (tmp_path / "2.jpg").write_bytes(b"no photo")
    page, said, _ = page_of(write(tmp_path / "tables", rows), tmp_path)
    assert (said["thumbnails"], said["unreadable"], said["left_out"]) == (1, 3, 0)
    reasons = [photo["missing"].split(":")[0] for photo in page.data()["photos"]]
    assert reasons == ["not_found", "changed", "unknown_format", ""]
    assert [image is None for image in pictures(page)] == [True, True, True, False]
    assert "3 could not be read again" in " ".join(page.text.split())


def test_photos_of_unknown_size_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 MB are read at a time: eight photos of unknown size, each taken for 16 MB."""
    uri, windows, fetch = str(jpeg(tmp_path / "a.jpg")), [], thumbnails.fetch

    def counting(uris: Sequence[str], *others: Any, **named: Any) -> list[bytes | PhotoError]:
        windows.append(len(uris))
        return fetch(uris, *others, **named)

    monkeypatch.setattr(thumbnails, "fetch", counting)
    for size, expected in ((None, [8, 8, 4]), (1000, [20]), (0, [20]), (200_000_000, [1] * 20)):
        windows.clear()
        photo = {"uri": uri, "etag": None, "size_bytes": size}
        thumbnails.make([photo] * 20, 1_000_000)
        assert windows == expected


def test_the_size_is_kept(tmp_path: Path) -> None:
    rows = [row(jpeg(tmp_path / f"{n}.jpg", n, (700, 500), noise=90), 9.0 - n / 10) for n in range(24)]
    dest = write(tmp_path / "tables", rows)
    _, said, content = page_of(dest, tmp_path, Options(max_megabytes=1.0))
    assert len(content) <= 1_000_000
    assert (said["thumbnails"], said["left_out"]) == (24, 0)
    assert said["thumbnail_px"] < 640, "noise of that size takes more"
    _, said, content = page_of(dest, tmp_path, Options(max_megabytes=0.2))
    assert (len(content) <= 200_000, said["thumbnail_px"], said["left_out"]) == (True, 160, 0)
    less = len(content) - 20_000
    page, said, content = page_of(dest, tmp_path, Options(max_megabytes=less / 1e6))
    assert len(content) <= less
    assert 0 < said["thumbnails"] == 24 - said["left_out"] < 24
    missing = [photo["missing"] for photo in page.data()["photos"]]
    assert missing == [""] * said["thumbnails"] + [LEFT_OUT] * said["left_out"], "those that matter most have one"
    assert f"{said['left_out']} pictures were left out" in " ".join(page.text.split())
    with pytest.raises(UsageError, match=r"0\.1 MB without thumbnails, and 0\.01 MB are allowed: show fewer") as caught:
        report.write(dest, tmp_path / "report.html", Options(max_megabytes=0.01))
    assert "\n" not in str(caught.value)


def test_a_thumbnail_is_upright_and_never_larger(tmp_path: Path) -> None:
    pixels = np.zeros((600, 1200, 3), np.uint8)
    pixels[:, :600] = 255  # the left half is white: turned by 90 degrees clockwise, the upper
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", exif=exif)
    small = thumbnail(content.getvalue(), 100)
    assert small.shape == (100, 50, 3)
    assert small[:45].min() > 250
    assert small[55:].max() < 5
    assert thumbnail(content.getvalue(), 5000).shape == (1200, 600, 3)
    for data, kind in ((b"", ErrorKind.EMPTY), (b"text", ErrorKind.UNKNOWN_FORMAT)):
        with pytest.raises(PhotoError) as caught:
            thumbnail(data, 100)
        assert caught.value.kind == kind


# --- where it is written ----------------------------------------------------------------------------------------------


def test_the_page_can_go_to_any_filesystem(tmp_path: Path) -> None:
    dest = write(tmp_path / "tables", [row(jpeg(tmp_path / "a.jpg"), 5.0)])
    said = report.write(dest, "memory://report-test/page.html")
    assert said["out"] == "memory://report-test/page.html"
    _, _, content = page_of(dest, tmp_path)
    assert fsspec.filesystem("memory").cat_file("/report-test/page.html") == content
    report.write(dest, tmp_path / "new folder" / "r.html")
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["r.html"], "and nothing half"


def test_a_browser_shows_the_page_from_a_bucket(tmp_path: Path, s3_server: S3Server, s3_bucket: str) -> None:
    dest, url = write(tmp_path / "tables", [row(jpeg(tmp_path / "a.jpg"), 5.0)]), f"s3://{s3_bucket}/a b/report.html"
    options = Options(storage_options=s3_server.storage_options)
    said = report.write(dest, url, options)
    stored = s3_server.client().get_object(Bucket=s3_bucket, Key="a b/report.html")
    assert (said["out"], stored["ContentType"]) == (url, "text/html")
    assert stored["Body"].read() == page_of(dest, tmp_path)[2]
    with pytest.raises(StorageError, match=r"cannot write s3://no-such-bucket-\S+/r.html: .*; name a file"):
        report.write(dest, f"s3://no-such-bucket-{s3_bucket}/r.html", options)


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    dest = write(tmp_path / "tables", scored(tmp_path, [5.0]))
    (tmp_path / "folder").mkdir()
    for out in (tmp_path / "folder", tmp_path / "tables" / "runs" / f"{dest.runs()[0]['run_id']}/run.json/r.html"):
        with pytest.raises(StorageError, match=r"cannot write .*; name a file") as caught:
            report.write(dest, out)
        assert "\n" not in str(caught.value)
    assert list((tmp_path / "folder").iterdir()) == []
    assert list(tmp_path.glob("*.part")) == []
