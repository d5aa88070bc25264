"""One photo inspected: what is printed, what JSON holds, the picture drawn, and what is refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from picinspector import schema
from picinspector.cli import main
from picinspector.errors import ErrorKind, PhotoError
from picinspector.feedback import Suggestion, suggest
from picinspector.plot import SIZE_PX, draw
from picinspector.stages.single import fetch_photo, judge, judge_bytes, pixels_of
from picinspector.wording import Facts, compose
from tests.test_web import Server, ok, server  # noqa: F401  (a fixture)

HOSTILE = "$\\frac{1}{0}$ \x1b[31mred \u202egpj.jpg"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "noise.jpg"
    Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(path, quality=90)
    return path


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["inspect", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


# --- what is said -----------------------------------------------------------------------------------------------------


def test_json_holds_everything(photo: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run([str(photo), "--bundle", str(tiny), "--json"], capsys)
    assert (code, err) == (0, "")
    row = json.loads(out)
    assert list(row) == [
        *("uri", "caption", "caption_source", "quality_score", "quality_low", "quality_high", "predicted_mos"),
        *("scorer_kind", "scene", "scene_probability", "attributes", "scenes", "suggestions", "facts"),
        *("measurements", "error_kind", "error_message"),
    ]
    assert row["uri"] == str(photo)
    assert 1 <= row["quality_low"] <= row["quality_score"] <= row["quality_high"] <= 10
    assert row["scene"] == max(row["scenes"], key=lambda name: row["scenes"][name])
    assert row["scene_probability"] == max(row["scenes"].values())
    assert (row["facts"]["width"], row["facts"]["height"], row["facts"]["format"]) == (90, 60, "JPEG")
    assert set(row["attributes"]) == set(schema.ATTRIBUTES)
    assert all(isinstance(value, float) for value in [*row["attributes"].values(), *row["measurements"].values()])


def test_words_are_those_of_the_same_facts(photo: Path, tiny: Path) -> None:
    row = judge(str(photo), str(tiny))
    facts = Facts(row["attributes"], row["scenes"], row["measurements"]["brightness"])
    assert (row["caption"], row["caption_source"]) == (compose(facts), "composed")
    expected = suggest(row["attributes"], row["measurements"], row["facts"], row["scene"])
    fields = ("topic", "evidence", "advice", "gain")
    assert [Suggestion(**{name: one[name] for name in fields}) for one in row["suggestions"]] == expected
    assert [one["text"] for one in row["suggestions"]] == [one.text for one in expected]


def test_a_captioner_of_the_bundle_is_asked(photo: Path, captioned_bundle: Path) -> None:
    """Its weights are random: what it says is no sentence, and the caption stage says so by its source."""
    row = judge(str(photo), str(captioned_bundle))
    assert row["caption"] and row["caption_source"] in schema.CAPTION_SOURCES


def test_text_names_what_a_person_asks_for(photo: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run([str(photo), "--bundle", str(tiny)], capsys)
    row = judge(str(photo), str(tiny))
    assert code == 0
    flat = " ".join(out.split())
    assert row["caption"] in flat
    quality = f"quality {row['quality_score']:.2f} of 10, likely {row['quality_low']:.1f} to {row['quality_high']:.1f}"
    assert quality in flat
    assert f"scene {row['scene'].replace('_', ' ')} ({row['scene_probability']:.0%})" in flat
    for label, name in (("noise-free", "noisiness"), ("exposure", "brightness"), ("overall", "mos")):
        assert f"{label} {row['attributes'][name]:.1f}" in flat
    for suggestion in row["suggestions"]:
        assert suggestion["text"] in flat


def test_a_hostile_name_reaches_no_terminal(
    photo: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = photo.rename(tmp_path / HOSTILE)
    plot = tmp_path / "evil.png"
    code, out, err = run([str(evil), "--bundle", str(tiny), "--plot", str(plot)], capsys)
    assert (code, err) == (0, "")
    assert "\x1b" not in out and "\u202e" not in out and "red" in out
    assert Image.open(plot).size == SIZE_PX
    evil.write_bytes(b"no photo")
    code, out, err = run([str(evil), "--bundle", str(tiny)], capsys)
    assert (code, out) == (1, "") and "\x1b" not in err and "unknown_format" in err


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_photo_that_is_not_there(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run([str(tmp_path / "none.jpg"), "--bundle", str(tiny), "--plot", str(tmp_path / "x.png")], capsys)
    assert (code, out, err.count("\n")) == (1, "", 1) and "not_found" in err
    assert not (tmp_path / "x.png").exists()


def test_an_error_keeps_the_shape_of_the_row(photo: Path, tiny: Path) -> None:
    good = judge(str(photo), str(tiny))
    bad = judge_bytes(PhotoError(ErrorKind.TIMEOUT, "took too long"), "http://x/y.jpg?key=secret", str(tiny))
    assert list(bad) == list(good) and {*bad["attributes"]} == {*good["attributes"]}
    assert (bad["error_kind"], bad["error_message"], bad["quality_score"]) == ("timeout", "took too long", None)
    assert "secret" not in json.dumps(bad)


@pytest.mark.parametrize("plot", ["picture.jpg", "no/such/folder/picture.png"])
def test_a_plot_that_cannot_be_written(
    photo: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], plot: str
) -> None:
    code, _, err = run([str(photo), "--bundle", str(tiny), "--plot", str(tmp_path / plot)], capsys)
    assert code == 2 and err.count("\n") == 1 and "picture" in err


# --- URLs -------------------------------------------------------------------------------------------------------------


def test_a_photo_of_the_web_is_judged_like_a_file(
    photo: Path,
    tiny: Path,
    server: Server,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.answers["/noise.jpg?sig=secret"] = ok(photo.read_bytes())
    url = server.url("/noise.jpg?sig=secret")
    code, out, _ = run([url, "--bundle", str(tiny), "--json", "--allow-private"], capsys)
    found, expected = json.loads(out), judge(str(photo), str(tiny))
    assert code == 0 and "secret" not in out
    assert found["uri"] == server.url("/noise.jpg?…")
    assert found["attributes"] == expected["attributes"] and found["caption"] == expected["caption"]


def test_private_addresses_are_refused_unless_allowed(
    tiny: Path,
    server: Server,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = run([server.url("/a.jpg?sig=secret"), "--bundle", str(tiny)], capsys)
    assert (code, out) == (2, "") and "--allow-private" in err and "secret" not in err
    assert server.requests == []
    code, _, err = run([server.url("/gone.jpg"), "--bundle", str(tiny), "--allow-private"], capsys)
    assert code == 1 and "not_found" in err


def test_no_chain_of_fsspec_goes_around_the_guard(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(["simplecache::http://127.0.0.1/a.jpg", "--bundle", str(tiny)], capsys)
    assert code == 2 and "unguarded" in err


def test_other_urls_are_left_to_fsspec(photo: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe_file("/a.jpg", photo.read_bytes())
    assert fetch_photo("memory://a.jpg") == photo.read_bytes()
    assert fetch_photo(photo.as_uri()) == photo.read_bytes()


# --- without a cluster ------------------------------------------------------------------------------------------------


def test_neither_ray_nor_pyplot_is_loaded_for_one_photo(photo: Path, tmp_path: Path) -> None:
    """In a process of its own, with the builtin bundle, as a person runs it."""
    code = (
        "import sys; from picinspector.cli import main; code = main(sys.argv[1:]);"
        "loaded = {'ray', 'matplotlib.pyplot'} & set(sys.modules);"
        "sys.exit(f'loaded {loaded}' if loaded else code)"
    )
    plot = tmp_path / "out.png"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(photo), "--json", "--plot", str(plot)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scorer_kind"] == "lightgbm"
    assert Image.open(plot).size == SIZE_PX


# --- the picture ------------------------------------------------------------------------------------------------------


def made_up(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"uri": "/photos/a.jpg", "quality_score": 5.5, "quality_low": 4.0, "quality_high": 7.0}
    row |= {"attributes": dict.fromkeys(schema.ATTRIBUTES, 50.0), "caption": "It is sharp.", "suggestions": []}
    return row | {"scene": "still_life", "scene_probability": 0.5, "scorer_kind": "lightgbm"} | changes


def picture(**changes: Any) -> np.ndarray:
    content = draw(made_up(**changes), np.full((40, 60, 3), 255, np.uint8))
    assert content.startswith(b"\x89PNG")
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size) == ("PNG", SIZE_PX)
        return np.asarray(image.convert("RGB")).astype(int)


def test_the_area_of_the_radar_grows_with_the_square_of_the_attributes() -> None:
    """A hexagon of 80 has four times the area of one of 40; lines and letters on it cost some pixels."""

    def filled(value: float) -> int:
        pixels = picture(attributes=dict.fromkeys(schema.ATTRIBUTES, value))
        tint = np.array([209, 228, 240])  # 18 % of #0072B2 on white
        return int((np.abs(pixels - tint).max(axis=2) <= 2).sum())

    assert filled(80) / filled(40) == pytest.approx(4, rel=0.15)
    assert filled(0) == 0


def test_the_photo_is_in_it_with_its_colours() -> None:
    red = np.zeros((300, 400, 3), np.uint8)
    red[..., 0] = 200
    with Image.open(io.BytesIO(draw(made_up(), red))) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    height, width = SIZE_PX[1], SIZE_PX[0]
    assert (np.abs(pixels - [200, 0, 0]).max(axis=2) <= 2).sum() > 0.2 * height * width


def test_the_score_stands_on_the_scale_and_the_interval_around_it() -> None:
    """The dot is the only saturated blue on its line; 1 and 10 are at the ends of the grey line."""

    def dot(quality: float) -> float:
        pixels = picture(quality_score=quality, quality_low=None, quality_high=None)
        line = pixels[130:150]
        blue = np.abs(line - [0, 114, 178]).max(axis=2) <= 2
        return float(np.nonzero(blue)[1].mean())

    left, middle, right = dot(1), dot(5.5), dot(10)
    assert left < middle < right
    assert middle == pytest.approx((left + right) / 2, abs=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"uri": f"/x/{HOSTILE}"},
        {"uri": "/x/" + "a" * 3000},
        {"uri": "/写真/夕焼け.jpg"},
        {"caption": "$\\frac{1}{$ _{ \x1b[31m" + "word " * 2000},
        {"caption": "x" * 5000},
        {"caption": None},
        {"suggestions": [{"text": "$\\badcommand{" + "more " * 500}] * 3},
        {"quality_low": None, "quality_high": None, "scorer_kind": "zero_shot"},
        {"attributes": dict.fromkeys(schema.ATTRIBUTES, 0.0), "quality_score": 1.0, "quality_low": 1.0},
        {"attributes": dict.fromkeys(schema.ATTRIBUTES, 100.0), "quality_score": 10.0, "quality_high": 10.0},
    ],
)
def test_it_is_drawn_whatever_it_is_called_and_said(changes: dict[str, Any], recwarn: pytest.WarningsRecorder) -> None:
    picture(**changes)
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize("shape", [(1, 500, 3), (500, 1, 3), (1, 1, 3), (512, 2000, 3)])
def test_a_photo_of_any_shape_is_drawn(shape: tuple[int, int, int]) -> None:
    assert draw(made_up(), np.zeros(shape, np.uint8)).startswith(b"\x89PNG")


def test_the_pixels_to_look_at_are_upright_and_small(tmp_path: Path) -> None:
    pixels = np.zeros((1200, 1600, 3), np.uint8)
    pixels[:, :800] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left comes to the top
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    shown = pixels_of((tmp_path / "a.jpg").read_bytes(), "a.jpg")
    assert shown.shape[1] == 512 and shown.shape[0] > 512
    assert shown[:300].mean() > 250 and shown[-300:].mean() < 5
