"""Suggestions: each rule fires on the evidence it names and on nothing else; gains are those of the coefficients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picinspector.feedback import (
    EXIF,
    MAX_SUGGESTIONS,
    MEASURED,
    MIN_GAIN,
    MOS_PER_POINT,
    NIGHT_LUMA,
    TARGET,
    Suggestion,
    stops_off,
    suggest,
    suggest_all,
)
from picinspector.schema import ATTRIBUTES, FACTS, MEASUREMENTS, SCENES
from picinspector.wording import MIDDLE_LUMA

# All good, and ordinary in every measurement: nothing to suggest.
GOOD = dict.fromkeys(ATTRIBUTES, 70.0)
ORDINARY = {
    "sharpness": 700.0,
    "noise": 1.5,
    "brightness": MIDDLE_LUMA,
    "contrast": 0.21,
    "colorfulness": 40.0,
    "clipped_highlights": 0.0,
    "clipped_shadows": 0.0,
}
NO_EXIF = dict.fromkeys(FACTS.names) | {"width": 4000, "height": 3000}


def ask(
    low: dict[str, float],
    measured: dict[str, float] | None = None,
    scene: str = "other",
    **facts: float,
) -> list[Suggestion]:
    """Suggestions for a good, ordinary photo but for what is given."""
    return suggest(GOOD | low, ORDINARY | (measured or {}), NO_EXIF | facts, scene)


def only(low: dict[str, float], measured: dict[str, float] | None = None, scene: str = "other", **facts: float) -> str:
    (suggestion,) = ask(low, measured, scene, **facts)
    assert [suggestion.topic] == list(low)
    return suggestion.text


def luma_at(stops: float, middle: float = MIDDLE_LUMA) -> float:
    """Mean luma so many stops from the middle, by the power part of the sRGB curve."""
    light = ((middle + 0.055) / 1.055) ** 2.4 * 2.0**stops
    return 1.055 * light ** (1 / 2.4) - 0.055


# --- exposure in stops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0])
def test_stops_are_halvings_and_doublings_of_light(stops: float) -> None:
    assert stops_off(luma_at(stops)) == pytest.approx(stops, abs=1e-9)


def test_the_middle_is_a_mid_grey() -> None:
    grey = 1.055 * 0.18 ** (1 / 2.4) - 0.055  # 18 % of the light
    assert stops_off(grey) == pytest.approx(0.08, abs=0.005)


def test_night_may_be_dark_but_not_black() -> None:
    assert stops_off(NIGHT_LUMA, "night") == 0.0
    assert stops_off(0.35, "night") == 0.0
    assert stops_off(0.35, "landscape") < -0.5
    assert stops_off(luma_at(-1, NIGHT_LUMA), "night") == pytest.approx(-1.0)
    assert stops_off(luma_at(1), "night") == pytest.approx(1.0)  # as bright as by day is right, brighter is not


@pytest.mark.parametrize(
    ("stops", "words"),
    [
        (-0.6, "about 0.5 stops underexposed"),
        (-1.0, "about 1 stop underexposed"),
        (-1.6, "about 1.5 stops underexposed"),
        (-6.0, "more than 4 stops underexposed"),
        (1.0, "about 1 stop overexposed"),
        (2.0, "about 2 stops overexposed"),
    ],
)
def test_exposure_is_told_in_half_stops(stops: float, words: str) -> None:
    text = only({"brightness": 30}, {"brightness": luma_at(stops)})
    assert text.startswith(f"{words}: mean luma {100 * luma_at(stops):.0f} %")


def test_black_and_blown_pixels_are_evidence_and_change_the_advice() -> None:
    dark, bright = luma_at(-2), luma_at(1.9)
    assert only({"brightness": 30}, {"brightness": dark}).endswith("raise the exposure by 2 EV, or open the shadows")
    black = only({"brightness": 30}, {"brightness": dark, "clipped_shadows": 0.31})
    assert "31 % of pixels black; raise the exposure by 2 EV: what is black cannot be opened later" in black
    blown = only({"brightness": 30}, {"brightness": bright, "clipped_highlights": 0.2})
    # Clipping hides how far it is over: rounded down.
    assert blown.startswith("at least 1.5 stops overexposed") and "20 % of pixels blown out" in blown
    assert "cannot be brought back" in blown
    backlit = only({"brightness": 30}, {"brightness": dark, "clipped_highlights": 0.2})
    assert "underexposed" in backlit and "bracket" in backlit


@pytest.mark.parametrize(
    ("facts", "advice"),
    [
        # 1/500 s and two stops more are 1/125 s, which a hand holds at 50 mm.
        ({"exposure_s": 1 / 500, "focal_length_mm": 50}, "use 1/125 s instead of 1/500 s"),
        # 1/15 s it does not hold: two stops by ISO, and where that would be above 800 by two steps of aperture.
        ({"exposure_s": 1 / 60, "focal_length_mm": 50, "iso": 200}, "use ISO 800 instead of 200"),
        ({"exposure_s": 1 / 60, "focal_length_mm": 50, "iso": 400, "f_number": 8}, "use f/4 instead of f/8"),
        ({"exposure_s": 1 / 60, "focal_length_mm": 50, "iso": 400, "f_number": 4}, "raise the exposure by 2 EV"),
        ({"iso": 400}, "raise the exposure by 2 EV"),
    ],
)
def test_missing_light_comes_from_the_setting_that_has_room(facts: dict[str, float], advice: str) -> None:
    assert f"; {advice}, or open the shadows" in only({"brightness": 30}, {"brightness": luma_at(-2.0)}, **facts)


def test_too_much_light_shortens_the_exposure() -> None:
    text = only({"brightness": 30}, {"brightness": luma_at(1)}, exposure_s=1 / 60)
    assert "; use 1/125 s instead of 1/60 s, or lower the highlights" in text
    assert "lower the exposure by 1 EV" in only({"brightness": 30}, {"brightness": luma_at(1)}, exposure_s=1 / 8000)


@pytest.mark.parametrize(
    ("scene", "word"), [("human", "face"), ("indoor", "bounce"), ("night", "tripod"), ("other", "EV")]
)
def test_missing_light_depends_on_the_scene(scene: str, word: str) -> None:
    assert word in only({"brightness": 30}, {"brightness": luma_at(-3)}, scene)


@pytest.mark.parametrize(
    ("highlights", "shadows", "words"),
    [
        (0.1, 0.1, "more range than the camera holds: 10 % of pixels blown out and 10 % of pixels black"),
        (0.1, 0.04, "highlights lost: 10 % of pixels blown out"),
        (0.04, 0.1, "shadows lost: 10 % of pixels black"),
        (0.04, 0.04, "exposure is poor (30 of 100) though mean luma 45 % is ordinary"),
    ],
)
def test_the_right_amount_of_light_may_fall_badly(highlights: float, shadows: float, words: str) -> None:
    measured = {"clipped_highlights": highlights, "clipped_shadows": shadows}
    assert only({"brightness": 30}, measured).startswith(words)


# --- sharpness --------------------------------------------------------------------------------------------------------


def test_a_long_exposure_by_hand_is_camera_shake() -> None:
    text = only({"sharpness": 30}, exposure_s=1 / 15, focal_length_mm=50)
    assert text == "motion blur likely at 1/15 s, 50 mm (by hand at most 1/focal length); use 1/60 s or a tripod"
    # A written speed is rounded: 1/50 s and 1/45 s (0.15 stop) at 50 mm are within the rule, 1/40 s is not.
    assert "motion blur" not in only({"sharpness": 30}, exposure_s=1 / 45, focal_length_mm=50)
    assert "motion blur" in only({"sharpness": 30}, exposure_s=1 / 40, focal_length_mm=50)


def test_shake_names_the_setting_that_pays_for_the_shorter_exposure() -> None:
    shake = {"exposure_s": 1 / 15, "focal_length_mm": 50}  # two stops from 1/60 s
    assert "use 1/60 s (ISO 400 instead of 100) or a tripod" in only({"sharpness": 30}, iso=100, **shake)
    assert "use 1/60 s (f/4 instead of f/8) or a tripod" in only({"sharpness": 30}, iso=800, f_number=8, **shake)
    noisy = ask({"sharpness": 30, "noisiness": 30}, iso=100, **shake)
    assert "ISO 400" not in noisy[0].text  # noise would only grow


def test_a_phone_is_held_like_a_28_mm_lens() -> None:
    assert "motion blur likely at 1/8 s by hand; use 1/30 s" in only(
        {"sharpness": 30}, exposure_s=1 / 8, focal_length_mm=4.2
    )
    assert "motion blur" not in only({"sharpness": 30}, exposure_s=1 / 30, focal_length_mm=4.2)
    assert "motion blur" in only({"sharpness": 30}, exposure_s=1 / 8)  # focal length unknown


@pytest.mark.parametrize("scene", SCENES)
def test_people_and_animals_move(scene: str) -> None:
    text = only({"sharpness": 30}, scene=scene, exposure_s=1 / 60, focal_length_mm=35)
    assert ("a subject that moves; use 1/125 s or faster" in text) == (scene in {"human", "animal"})
    assert "moves" not in only({"sharpness": 30}, scene=scene, exposure_s=1 / 125, focal_length_mm=35)


def test_nobody_holds_a_second_by_hand() -> None:
    assert only({"sharpness": 30}, exposure_s=4).startswith("4 s shows every movement; use a firm tripod")


@pytest.mark.parametrize(
    ("f_number", "focal_length_mm", "words"),
    [
        (22, 50, "diffraction softens everything at f/22; use f/8 to f/11"),
        (16, 50, "though 1/500 s is short enough"),
        # 2 N c (m + 1) / m^2 = 2 * 1.8 * 0.03 mm * 1.05 * 400 = 45 mm
        (1.8, 50, "thin depth of field at f/1.8 (about 5 cm at head and shoulders)"),
        (2.8, 50, "thin depth of field at f/2.8 (about 7 cm at head and shoulders)"),
        (4, 50, "though 1/500 s is short enough; focus on the main subject"),
        (1.8, 4.2, "though 1/500 s is short enough; focus on the main subject (tap it) and wipe the lens"),
    ],
)
def test_with_a_fast_shutter_it_is_the_aperture_or_the_focus(
    f_number: float, focal_length_mm: float, words: str
) -> None:
    assert words in only({"sharpness": 30}, exposure_s=1 / 500, f_number=f_number, focal_length_mm=focal_length_mm)


@pytest.mark.parametrize(("scene", "focus"), [("human", "the eyes"), ("animal", "the eyes"), ("plant", "bloom")])
def test_where_to_focus_depends_on_the_scene(scene: str, focus: str) -> None:
    assert focus in only({"sharpness": 30}, scene=scene, exposure_s=1 / 500, f_number=1.8, focal_length_mm=85)
    assert focus in only({"sharpness": 30}, scene=scene)


def test_without_exif_blur_is_told_by_its_degree() -> None:
    assert only({"sharpness": 30}, {"sharpness": 12}) == (
        "sharpness is poor (30 of 100), Laplacian variance 12 (good photos: 175 and more); "
        "hold the camera steady or use a tripod, and focus on the main subject"
    )
    assert "Laplacian" not in only({"sharpness": 30})
    assert only({"sharpness": 45}).endswith("sharpen a little")
    assert ask({"sharpness": 45, "noisiness": 30})[0].text.endswith("sharpen a little after reducing the noise")


def test_a_small_photo_is_said_to_be_small() -> None:
    assert only({"sharpness": 30}, width=640, height=480).startswith("only 640 x 480 px leave little detail")
    assert "px" not in only({"sharpness": 30}, width=512, height=512)
    # One without detail even for its size is blurred.
    assert "hold the camera steady" in only({"sharpness": 30}, {"sharpness": 12}, width=640, height=480)


def test_structure_without_sharpness_is_noise_or_compression() -> None:
    low = {"sharpness": 30, "noisiness": 30}
    assert "noise or compression hides detail; mend that first" in ask(low)[0].text
    assert "hold the camera steady" in ask(low, {"sharpness": 12})[0].text
    assert "hold the camera steady" in ask(low, {"sharpness": math.nan})[0].text


# --- noise ------------------------------------------------------------------------------------------------------------


def test_high_iso_with_room_in_the_exposure() -> None:
    # From 1/500 s to 1/60 s at 50 mm are three whole stops: ISO 3200 / 8.
    text = only({"noisiness": 20}, {"noise": 7}, iso=3200, exposure_s=1 / 500, focal_length_mm=50)
    assert text == "noise at ISO 3200, sigma 7.0 of 255; 1/60 s would allow ISO 400; reduce the noise of this one"


@pytest.mark.parametrize(("scene", "advice"), [("human", "bring more light"), ("other", "a tripod")])
def test_high_iso_without_room_in_the_exposure(scene: str, advice: str) -> None:
    assert f"noise at ISO 3200; {advice}" in only({"noisiness": 20}, scene=scene, iso=3200)
    at_limit = {"iso": 3200, "exposure_s": 1 / 125, "focal_length_mm": 125}
    assert f"noise at ISO 3200; {advice}" in only({"noisiness": 20}, scene=scene, **at_limit)


def test_missing_light_uses_up_the_room_of_the_exposure() -> None:
    shot = {"iso": 3200, "exposure_s": 1 / 500, "focal_length_mm": 50}
    noise = {s.topic: s for s in ask({"noisiness": 20, "brightness": 20}, {"brightness": luma_at(-2)}, **shot)}
    assert "1/250 s would allow ISO 1600" in noise["noisiness"].text  # one of three stops is left
    # A dark photo that is judged well exposed is meant to be dark.
    assert "1/60 s would allow ISO 400" in only({"noisiness": 20}, {"brightness": luma_at(-2)}, **shot)


@pytest.mark.parametrize(
    ("measured", "facts", "words"),
    [
        ({"noise": 7}, {}, "visible noise, sigma 7.0 of 255; use a lower ISO with a longer exposure"),
        ({"noise": math.nan}, {}, "visible noise; use a lower ISO"),
        ({"noise": 7}, {"iso": 200}, "noise at only ISO 200, sigma 7.0 of 255; reduce the noise"),
        ({"noise": 1}, {}, "cleanness is poor (20 of 100) without fine grain: blotches; save with less compression"),
        ({"noise": 1}, {"iso": 200}, "cleanness is poor (20 of 100) at only ISO 200 without fine grain"),
    ],
)
def test_noise_without_high_iso(measured: dict[str, float], facts: dict[str, float], words: str) -> None:
    assert only({"noisiness": 20}, measured, **facts).startswith(words)


def test_underexposure_is_a_cause_of_noise() -> None:
    found = ask({"noisiness": 20, "brightness": 20}, {"brightness": luma_at(-2), "noise": 7}, iso=100)
    assert "noise in an underexposed photo, sigma 7.0 of 255; expose more" in found[1].text


# --- contrast and colour ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "scene", "words"),
    [
        ({"contrast": 0.08}, "human", "flat tones: luma spread 8 % (good photos: 15 % and more); set the black and"),
        ({"contrast": 0.08}, "landscape", "flat as in haze: luma spread 8 %"),
        ({"contrast": 0.08, "clipped_shadows": 0.1}, "landscape", "flat tones"),  # haze has no black
        ({"contrast": 0.31}, "human", "hard light: luma spread 31 %; use softer light"),
        ({"contrast": 0.31, "clipped_shadows": 0.06}, "human", "hard light: luma spread 31 %, 6 % of pixels black;"),
        ({}, "human", "contrast is poor (30 of 100) though luma spread 21 % is ordinary"),
        ({"contrast": math.nan}, "human", "contrast is poor (30 of 100); set the black and white points"),
    ],
)
def test_contrast(measured: dict[str, float], scene: str, words: str) -> None:
    assert only({"contrast": 30}, measured, scene).startswith(words)


@pytest.mark.parametrize(
    ("colorfulness", "scene", "words"),
    [
        (12, "other", "pale colours: colourfulness 12 (moderate is 33); raise vibrance and check the white balance"),
        (12, "human", "pale colours: colourfulness 12 (moderate is 33); raise vibrance rather than saturation"),
        (12, "night", "pale colours: colourfulness 12 (moderate is 33); set the white balance for the lamps"),
        (12, "landscape", "pale colours: colourfulness 12 (moderate is 33); raise vibrance, or shoot in low sun"),
        (33, "other", "colour is poor (30 of 100); check the white balance"),
        (59, "other", "colour is poor (30 of 100) though strong (colourfulness 59); remove a colour cast"),
        (math.nan, "other", "colour is poor (30 of 100); check the white balance"),
    ],
)
def test_color(colorfulness: float, scene: str, words: str) -> None:
    assert only({"colorfulness": 30}, {"colorfulness": colorfulness}, scene).startswith(words)


def test_black_and_white_is_left_black_and_white() -> None:
    assert ask({"colorfulness": 0}, {"colorfulness": 0.0}) == []
    (suggestion,) = ask({"colorfulness": 0, "contrast": 30}, {"colorfulness": 0.05})
    assert suggestion.topic == "contrast"


# --- gains and ranking ------------------------------------------------------------------------------------------------


def test_a_good_photo_needs_nothing() -> None:
    assert ask({}) == []
    assert ask(dict.fromkeys(ATTRIBUTES, TARGET)) == []
    assert ask({"mos": 5}) == []  # nothing to say on quality without an aspect


@pytest.mark.parametrize("topic", MOS_PER_POINT)
def test_gain_is_the_coefficient_times_the_way_to_good(topic: str) -> None:
    (suggestion,) = ask({topic: 20})
    assert suggestion.gain == pytest.approx(MOS_PER_POINT[topic] * 40 * 9 / 100)


def test_a_gain_that_would_not_show_is_not_worth_a_line() -> None:
    points = MIN_GAIN / (MOS_PER_POINT["noisiness"] * 9 / 100)
    assert ask({"noisiness": TARGET - points + 0.1}) == []
    assert len(ask({"noisiness": TARGET - points - 0.1})) == 1


def test_the_three_largest_gains_in_their_order() -> None:
    # x 0.09: sharpness .611 * 5 = 3.1, exposure .153 * 30 = 4.6, contrast .125 * 50 = 6.3, noise .071 * 60 = 4.3
    # and colour .067 * 60 = 4.0.
    found = ask({"sharpness": 55, "brightness": 30, "contrast": 10, "noisiness": 0, "colorfulness": 0})
    assert [suggestion.topic for suggestion in found] == ["contrast", "brightness", "noisiness"]
    assert len(found) == MAX_SUGGESTIONS == 3


def test_black_and_white_makes_room_for_the_next() -> None:
    low = {"brightness": 20, "contrast": 10, "colorfulness": 0, "noisiness": 20}  # colour would be third
    assert [s.topic for s in ask(low)] == ["contrast", "brightness", "colorfulness"]
    assert [s.topic for s in ask(low, {"colorfulness": 0.0})] == ["contrast", "brightness", "noisiness"]


def test_contrast_and_color_that_follow_the_light_count_for_it() -> None:
    low = {"brightness": 20, "contrast": 30, "colorfulness": 30}
    dark = {"brightness": luma_at(-2.2)}
    # 2.2 stops are twice the sRGB values: spread 0.1 becomes 0.2, colourfulness 20 becomes 40, both ordinary.
    (suggestion,) = ask(low, dark | {"contrast": 0.1, "colorfulness": 20})
    assert suggestion.topic == "brightness"
    assert suggestion.gain == pytest.approx((0.153 * 40 + 0.125 * 30 + 0.067 * 30) * 0.09)
    # 0.05 and 10 become 0.1 and 20: flat and pale even with light.
    apart = ask(low, dark | {"contrast": 0.05, "colorfulness": 10})
    assert [s.topic for s in apart] == ["brightness", "contrast", "colorfulness"]
    # Nor does light explain them in a photo that has enough of it.
    enough = ask(low, {"brightness": luma_at(-0.9), "contrast": 0.1, "colorfulness": 20})
    assert [s.topic for s in enough] == ["brightness", "contrast", "colorfulness"]


def test_text_is_evidence_then_advice() -> None:
    assert Suggestion("contrast", "flat tones", "add an S-curve", 0.3).text == "flat tones; add an S-curve"


# --- anything at all --------------------------------------------------------------------------------------------------

_NUMBER = st.floats() | st.none() | st.integers() | st.sampled_from([10**400, "?"])
_PLAUSIBLE = st.floats(0, 100, width=32)
_FACT = _NUMBER | st.floats(1e-5, 5000)
_ANY_ATTRIBUTES = st.dictionaries(st.sampled_from(ATTRIBUTES), _NUMBER | _PLAUSIBLE)
_ANY_MEASURED = st.dictionaries(st.sampled_from(MEASUREMENTS), _NUMBER | _PLAUSIBLE | st.floats(0, 1, width=32))
_ANY_FACTS = st.dictionaries(st.sampled_from(FACTS.names), _FACT)


@given(_ANY_ATTRIBUTES, _ANY_MEASURED, _ANY_FACTS, st.sampled_from([*SCENES, "", "moon"]))
def test_whatever_is_known_of_a_photo(
    attributes: dict[str, Any], measured: dict[str, Any], facts: dict[str, Any], scene: str
) -> None:
    found = suggest(attributes, measured, facts, scene)
    assert found == suggest(attributes, measured, facts, scene)
    assert len(found) <= MAX_SUGGESTIONS
    assert [s.gain for s in found] == sorted((s.gain for s in found), reverse=True)
    assert len({s.topic for s in found}) == len(found)
    for suggestion in found:
        assert attributes[suggestion.topic] < TARGET
        assert MIN_GAIN <= suggestion.gain <= 9
        assert suggestion.evidence and suggestion.advice and suggestion.text.isprintable()
        assert "nan" not in suggestion.text and "inf " not in suggestion.text


@given(st.sampled_from(sorted(MOS_PER_POINT)), st.integers(0, 59), st.integers(0, 59))
def test_the_worse_attribute_has_more_to_gain(topic: str, worse: int, better: int) -> None:
    worse, better = min(worse, better), max(worse, better)
    gains = [sum(s.gain for s in ask({topic: value})) for value in (worse, better)]
    assert gains[0] >= gains[1]


_FLOAT32 = st.floats(width=32) | st.floats(0, 100, width=32) | st.floats(0, 1, width=32)
_ROW = st.tuples(
    st.fixed_dictionaries(dict.fromkeys(ATTRIBUTES, _FLOAT32)),
    st.fixed_dictionaries(dict.fromkeys(MEASURED, _FLOAT32)),
    st.fixed_dictionaries(dict.fromkeys(EXIF, _FLOAT32 | st.floats(0, 5000, width=32))),
    st.sampled_from([*SCENES, "moon"]),
)


@given(st.lists(_ROW))
def test_many_at_once_are_told_what_each_is_told(rows: list[Any]) -> None:
    """NaN in a column is what None, or no key, is of one photo."""
    attributes, measured, exif = (
        {name: np.array([row[part][name] for row in rows], np.float32) for name in names}
        for part, names in enumerate((ATTRIBUTES, MEASURED, EXIF))
    )
    alone = [[suggestion.text for suggestion in suggest(*row)] for row in rows]
    assert suggest_all(attributes, measured, exif, [row[3] for row in rows]) == alone


def test_many_at_once_find_something() -> None:
    dark = ORDINARY | {"brightness": luma_at(-1.0)}
    expected = [s.text for s in suggest(GOOD | {"brightness": 30.0}, dark, NO_EXIF, "human")]
    columns = (GOOD | {"brightness": 30.0}, dark, dict.fromkeys(EXIF, np.nan) | {"width": 4000, "height": 3000})
    found = suggest_all(*({name: np.array([value, np.nan]) for name, value in part.items()} for part in columns),
                        ["human", "human"])  # fmt: skip
    assert found == [expected, []]
    assert "1 stop underexposed" in expected[0]
