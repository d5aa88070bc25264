"""The grammar of quality terms: what is written is read back, and what is false is found."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from picinspector import wording
from picinspector.schema import ATTRIBUTES, SCENES
from picinspector.wording import Facts, check, compose, defects, grade, is_fluent, parse, strengths, tell

values = st.floats(0, 100)
facts_strategy = st.builds(
    lambda attributes, scene, sure, luma: Facts(
        dict(zip(ATTRIBUTES, attributes, strict=True)),
        {name: sure if name == scene else (1 - sure) / 8 for name in SCENES},
        luma,
    ),
    st.tuples(*[values] * 6),
    st.sampled_from(SCENES),
    st.floats(0.2, 1.0),
    st.floats(0, 1),
)


def facts(luma: float = 0.2, scene: str = "night", **attributes: float) -> Facts:
    """Everything in the middle but what is named."""
    return Facts(
        {name: attributes.get(name, 50.0) for name in ATTRIBUTES},
        {name: 0.92 if name == scene else 0.01 for name in SCENES},
        luma,
    )


@pytest.mark.parametrize(
    ("value", "expected"), [(0, 0), (19.9, 0), (20, 1), (40, 2), (60, 3), (79.9, 3), (80, 4), (100, 4)]
)
def test_a_grade_is_a_fifth_of_the_scale(value: float, expected: int) -> None:
    assert grade(value) == expected


@pytest.mark.parametrize("key", wording._CLAUSES, ids=str)
def test_each_clause_says_its_own_grade_and_nothing_else(key: tuple[str, int, str]) -> None:
    aspect, value, side = key
    for clause in wording._CLAUSES[key]:
        [statement] = parse(clause.format(p="the photo"))
        assert (statement.aspect, statement.side) == (aspect, side), clause
        assert statement.low <= 20 * value and statement.high >= 20 * (value + 1), clause
        assert statement.high - statement.low <= 40, f"{clause}: says nearly nothing"


def test_each_grade_of_each_aspect_can_be_said_in_several_ways() -> None:
    for aspect in ATTRIBUTES[1:]:
        sides = dict.fromkeys(range(3), ("dark", "bright", "")) if aspect == "brightness" else {}
        for value in range(5):
            for side in sides.get(value, ("",)):
                assert len(wording._CLAUSES[aspect, value, side]) >= 3


@pytest.mark.parametrize("scene", SCENES)
def test_scenes_are_read_back(scene: str) -> None:
    for phrase in wording._SCENE_PHRASES[scene]:
        assert parse(f"A photo of {phrase}, of fair quality.")[0].scene == scene


@pytest.mark.parametrize(
    ("text", "aspect", "low", "high"),
    [
        ("The image is not sharp.", "sharpness", 0, 40),
        ("It is very sharp.", "sharpness", 80, 100),
        ("It looks sharp, but grainy.", "sharpness", 60, 100),
        ("There is no visible noise.", "noisiness", 60, 100),
        ("There is visible noise.", "noisiness", 0, 40),
        ("It is badly blurred.", "sharpness", 0, 20),
        ("The photo is too dark.", "brightness", 0, 40),
        ("The photo lacks contrast.", "contrast", 0, 40),
        ("Vivid colors throughout.", "colorfulness", 60, 100),
    ],
)
def test_terms_in_a_model_s_own_words(text: str, aspect: str, low: float, high: float) -> None:
    found = {statement.aspect: statement for statement in parse(text)}[aspect]
    assert (found.low, found.high) == (low, high)


@pytest.mark.parametrize(
    "text",
    [
        "The photo is not overexposed and isn't hazy.",
        "The photo isn\u2019t blurry.",
        "It doesn't look sharp.",
        "It is far from noisy.",
        "There is no motion blur.",
        "Neither blurry nor noisy.",
        "It is never blurry.",
        "It is not underexposed or overexposed.",
        "There is hardly any visible noise.",
        "It cannot be called very sharp.",
    ],
)
def test_a_negated_term_is_not_taken_at_its_word(text: str) -> None:
    assert parse(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "A flattering, sharpened, cleaned copy of the noisiest.",
        "A man in a clean white shirt holds a sharp knife on a crisp autumn day.",
        "A flat roof, dull weather.",
        "The background is blurred, as it should be.",
    ],
)
def test_words_about_the_subject_are_no_terms(text: str) -> None:
    assert parse(text) == []


def test_a_negation_ends_where_another_term_begins() -> None:
    found = parse("The subject lacks sharpness and the colours are pale.")
    assert [statement.aspect for statement in found] == ["sharpness", "colorfulness"]


def test_all_that_is_said_counts_and_one_true_scene_is_enough() -> None:
    both = check("It is very sharp. Overall it is blurry.", facts(sharpness=90))
    assert len(both.contradictions) == 1
    assert not check("A person walks through the city.", facts(scene="cityscape")).contradictions
    assert check("A person walks through the city.", facts(scene="plant")).contradictions


def test_where_luma_does_not_tell_no_side_is_named() -> None:
    seen = facts(luma=0.46, brightness=15)
    assert all(not statement.side for seed in range(50) for statement in parse(compose(seen, seed)))
    assert "(" not in tell(seen)


def test_a_contradiction_is_more_than_a_grade_off() -> None:
    sharp = "The photo is sharp."  # 60 to 100
    assert check(sharp, facts(sharpness=61)).right
    assert check(sharp, facts(sharpness=50)).right  # half a grade of tolerance
    off = check(sharp, facts(sharpness=45))
    assert off.wrong and not off.contradictions
    assert check(sharp, facts(sharpness=29)).contradictions  # the example of the design


def test_an_exposure_on_the_wrong_side_is_a_contradiction() -> None:
    dark = "The photo is too dark."
    assert not check(dark, facts(luma=0.1, brightness=20)).contradictions
    assert check(dark, facts(luma=0.8, brightness=20)).contradictions


def test_a_clear_defect_must_be_named() -> None:
    found = check("This photo is of fair quality.", facts(mos=50, sharpness=10, contrast=35))
    assert found.missed == ["sharpness"]  # a contrast of 35 is poor, and not clearly so
    assert found.accuracy == 0.5
    assert check("", facts()).accuracy == 0.0


def test_only_the_three_worst_defects_are_due() -> None:
    seen = facts(brightness=5, sharpness=4, noisiness=3, contrast=2, colorfulness=1)
    assert defects(seen) == ["colorfulness", "contrast", "noisiness"]
    assert strengths(facts(brightness=70, sharpness=90)) == ["sharpness", "brightness"]


@given(facts_strategy, st.integers(0, 2**31))
def test_what_is_composed_is_true_fluent_and_complete(seen: Facts, seed: int) -> None:
    for text in (compose(seen), compose(seen, seed)):
        found = check(text, seen)
        assert found.accuracy == 1.0, text
        assert not found.contradictions
        assert is_fluent(text), text


@given(facts_strategy)
def test_the_same_seed_gives_the_same_text(seen: Facts) -> None:
    assert compose(seen, 7) == compose(seen, 7)


def test_there_is_variety() -> None:
    assert len({compose(facts(sharpness=10, noisiness=90), seed) for seed in range(200)}) > 100


def test_a_scene_that_is_not_sure_is_not_named() -> None:
    unsure = Facts(dict.fromkeys(ATTRIBUTES, 50.0), dict.fromkeys(SCENES, 1 / 9), 0.4)
    assert all(statement.aspect != "scene" for statement in parse(compose(unsure)))


def test_the_prompt_tells_every_aspect_and_which_way_the_exposure_is_wrong() -> None:
    assert tell(facts(brightness=10, sharpness=95, luma=0.9)) == (
        "scene night, overall fair, exposure bad (bright), sharpness excellent, cleanness fair, "
        "contrast fair, colour fair"
    )


@pytest.mark.parametrize(
    ("text", "fluent"),
    [
        ("It is sharp.", True),
        ("It is sharp. It is clean. It is bright.", True),
        ("Taken at f/2.8 and 1.5 m. It is sharp.", True),
        ("One. Two. Three. Four.", False),
        ("It is sharp", False),
        ("", False),
        ("the photo is sharp and the photo is sharp and.", False),
    ],
)
def test_fluent(text: str, fluent: bool) -> None:
    assert is_fluent(text) is fluent


@given(st.text())
def test_any_text_can_be_held_against_facts(text: str) -> None:
    found = check(text, facts())
    assert 0.0 <= found.accuracy <= 1.0
    is_fluent(text)
