"""What two runs say of the same photos: hand-made tables, figures that a person can derive, and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp, spearmanr

from picinspector import schema
from picinspector.cli import main
from picinspector.drift import SCENE_PHOTOS, compare, ks, psi, run_pair, warnings
from picinspector.errors import UsageError
from picinspector.tables import Destination

A, B, C = "20260101T000000.000Z-aaaaaa", "20260102T000000.000Z-bbbbbb", "20260103T000000.000Z-cccccc"


def row(uri: str, quality: float | None, **changes: Any) -> dict[str, Any]:
    """A scores row; the attributes are ten times the quality."""
    values: dict[str, Any] = {"image_id": f"{uri}@1", "uri": uri, "scorer_fingerprint": "f", "scorer_kind": "lightgbm"}
    if quality is None:
        values["error_kind"] = "truncated"
    else:
        values |= {"quality_score": quality, "scene": "night"}
        values |= {f"attribute_{name}": quality * 10 for name in schema.ATTRIBUTES}
    return values | changes


def write(dest: Destination, run_id: str, rows: Iterable[dict[str, Any]], kind: str = "score") -> None:
    """A committed run with these scores."""
    table = pa.Table.from_pylist(list(rows), schema=schema.SCORES)
    if table.num_rows:
        dest.write_parquet(f"{dest.table_path('scores', run_id)}/0.parquet", table)
    dest.commit({"run_id": run_id, "kind": kind, "counts": {"to_do": table.num_rows}})


@pytest.fixture
def dest(tmp_path: Path) -> Destination:
    return Destination(tmp_path / "tables [1]")


def test_each_photo_is_met_in_the_state_as_of_each_run(dest: Destination) -> None:
    write(dest, A, [row("/still", 5), row("/rose", 2), row("/fell", 9), row("/new-bytes", 4), row("/broke", 6)])
    write(dest, B, [row("/rose", 4), row("/fell", 8.75, scorer_fingerprint="g"), row("/came", 7), row("/never", None),
                    row("/new-bytes", 4, image_id="/new-bytes@2"), row("/broke", None)])  # fmt: skip
    report = compare(dest, A, B)
    assert report["counts"] == {
        "a": 5, "b": 7, "both": 5, "only_a": 0, "only_b": 2, "changed": 1, "other_scorer": 1, "unchanged": 1,
        "compared": 4, "failed_a": 0, "failed_b": 2,
    }  # fmt: skip
    assert report["moved"]["mean"] == pytest.approx((0 + 2 - 0.25 + 0) / 4)
    assert report["moved"]["mean_abs"] == pytest.approx(2.25 / 4)
    assert report["moved"]["quantiles"]["0.5"] == 0
    assert report["moved"]["share_moved"] == 0.25, "only /rose moved by more than half a point"
    assert report["moved"]["srcc"] == pytest.approx(spearmanr([5, 2, 9, 4], [5, 4, 8.75, 4]).statistic)
    expected = {"uri": "/rose", "scene": "night", "quality_score_a": 2, "quality_score_b": 4, "change": 2}
    assert report["risers"] == [expected]
    assert [(found["uri"], found["change"]) for found in report["fallers"]] == [("/fell", -0.25)]
    [night] = report["scenes"]
    assert (night["photos_a"], night["photos_b"], night["share_b"], night["shift"]) == (5, 5, 1.0, None)
    json.dumps(report, allow_nan=False)


def test_what_came_after_b_is_not_looked_at(dest: Destination) -> None:
    write(dest, A, [row("/a", 5)])
    write(dest, B, [row("/a", 6)])
    write(dest, C, [row("/a", 1)])
    assert compare(dest, A, B)["moved"]["mean"] == 1
    assert compare(dest, A, C)["moved"]["mean"] == -4
    assert compare(dest, C, A)["moved"]["mean"] == 4, "any order"
    same = compare(dest, B, B)
    assert (same["counts"]["unchanged"], same["risers"], same["shift"]["quality_score"]["psi"]) == (1, [], 0.0)


def test_a_photo_that_is_gone_is_in_neither_state(dest: Destination) -> None:
    write(dest, A, [row("/stays", 5), row("/leaves", 6)])
    mark = {"image_id": ["/leaves@1"], "uri": ["/leaves"], "gone": [True], "scorer_fingerprint": ["f"]}
    dest.write_parquet(f"{dest.table_path('gone', B)}/0.parquet", pa.table(mark))
    write(dest, B, [row("/stays", 7)])
    counts = compare(dest, A, B)["counts"]
    assert (counts["a"], counts["b"], counts["only_a"]) == (2, 1, 1)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_psi_by_hand() -> None:
    """Ten deciles of 0-999; half of the lowest decile moves to the highest: 2 bins of 0.1 become 0.05 and 0.15."""
    before = np.arange(1000.0)
    after = np.where(before < 50, before + 950, before)
    index, by_chance = psi(before, after)
    assert index == pytest.approx(0.05 * math.log(2) + 0.05 * math.log(1.5))
    assert by_chance == pytest.approx(16.919 * (2 / 1000), rel=1e-4), "chi-square's 95 % quantile of 9 degrees"
    assert psi(before, before)[0] == 0


def test_psi_of_constants() -> None:
    """Nothing in common: 1 becomes the least there is and the other way round, the two terms alike."""
    for photos, least in ((50, 0.01), (50_000, 1e-4)):  # half a photo of 50
        for other in (4.0, 6.0):
            index, _ = psi(np.full(photos, 5.0), np.full(photos, other))
            assert index == pytest.approx(2 * (1 - least) * -math.log(least))
    assert psi(np.full(50, 5.0), np.full(50, 5.0)) == (0.0, 0.0)


def test_psi_stays_below_what_it_reaches_by_chance() -> None:
    """In about 95 of 100 pairs of samples of one distribution, with a dozen photos as with 20,000."""
    rng = np.random.default_rng(0)
    for photos in (12, 200, 20_000):
        pairs = [psi(rng.normal(size=photos), rng.normal(size=photos)) for _ in range(300)]
        below = np.mean([index < by_chance for index, by_chance in pairs])
        assert below > 0.9, (photos, below)
        assert below < 0.99 or photos < 100, "with a dozen photos in ten bins it is cautious"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(1, 10, width=32), min_size=1, max_size=60),
    st.lists(st.floats(1, 10, width=32), min_size=1, max_size=60),
)
def test_psi_of_anything(before: list[float], after: list[float]) -> None:
    index, by_chance = psi(np.array(before, np.float32), np.array(after, np.float32))
    assert np.isfinite(index)
    assert index >= 0
    assert by_chance >= 0
    assert psi(np.array(before, np.float32), np.array(before, np.float32))[0] == 0


@pytest.mark.parametrize(("before", "after"), [(4000, 3000), (3, 5), (1, 1)])
def test_ks_as_scipy_has_it(before: int, after: int) -> None:
    rng = np.random.default_rng(before)
    a, b = rng.normal(5, 1, before).round(1), rng.normal(5.05, 1, after).round(1)
    expected = ks_2samp(a, b, method="exact" if before == 1 else "asymp")
    distance, p = ks(a, b)
    assert distance == pytest.approx(expected.statistic, abs=1e-12)
    if before > 1000:
        assert p == pytest.approx(expected.pvalue, rel=0.05)


@pytest.fixture
def shifted(dest: Destination) -> Destination:
    """Photos 0-999 of two scenes and a few of a third: nights lose two points, the rest stays."""
    rng = np.random.default_rng(1)
    quality = np.clip(rng.normal(6, 1, 1000), 3, 10)
    scenes = ["night"] * 500 + ["plant"] * (500 - SCENE_PHOTOS // 2) + ["human"] * (SCENE_PHOTOS // 2)
    photos = [(f"/{number}.jpg", float(quality[number]), scene) for number, scene in enumerate(scenes)]
    write(dest, A, [row(uri, value, scene=scene) for uri, value, scene in photos])
    write(dest, B, [row(uri, value - 2 * (scene == "night"), scene=scene) for uri, value, scene in photos])
    return dest


def test_a_shift_of_one_scene(shifted: Destination) -> None:
    report = compare(shifted, A, B)
    scenes = {found["scene"]: found for found in report["scenes"]}
    assert scenes["night"]["mean_change"] == pytest.approx(-2, abs=1e-5)
    assert scenes["night"]["shift"]["quality_score"]["psi"] > 1
    assert scenes["night"]["shift"]["quality_score"]["ks"] > 0.6
    assert scenes["night"]["shift"]["quality_score"]["ks_p"] < 1e-9
    assert scenes["plant"]["shift"]["attribute_mos"]["psi"] == 0
    assert scenes["plant"]["shift"]["attribute_mos"]["ks_p"] == 1
    assert scenes["human"]["shift"] is None, "too few"
    assert report["scene_psi"] == 0
    assert report["moved"]["share_moved"] == 0.5
    lines = warnings(report)
    assert [line for line in lines if "plant" in line or "human" in line or "\n" in line] == []
    assert sum("of scene night shifted: PSI" in line for line in lines) == 7, "quality_score and the six attributes"
    assert warnings(report, 1000) == []


def test_photos_that_change_their_scene_are_followed_by_the_first(dest: Destination) -> None:
    names = [f"/{number}" for number in range(200)]
    write(dest, A, [row(name, 5 + number / 100, scene="night") for number, name in enumerate(names)])
    write(dest, B, [row(name, 6 + number / 100, scene="human") for number, name in enumerate(names)])
    report = compare(dest, A, B)
    human, night = report["scenes"]
    assert (night["photos_a"], night["photos_b"], night["mean_change"]) == (200, 0, pytest.approx(1))
    assert (human["photos_a"], human["photos_b"], human["mean_change"], human["shift"]) == (0, 200, None, None)
    assert night["shift"]["quality_score"]["photos_b"] == 200
    least = 0.5 / 200
    assert report["scene_psi"] == pytest.approx(2 * (1 - least) * -math.log(least))
    assert f"the distribution over scenes shifted: PSI {report['scene_psi']:.2f} (limit 0.25)" in warnings(report)


def test_a_few_photos_do_not_raise_a_warning_by_chance(dest: Destination) -> None:
    rng = np.random.default_rng(2)
    write(dest, A, [row(f"/{number}", value) for number, value in enumerate(rng.uniform(1, 10, 12))])
    write(dest, B, [row(f"/{number}", value) for number, value in enumerate(rng.uniform(1, 10, 12))])
    report = compare(dest, A, B)
    assert report["shift"]["quality_score"]["psi"] > 0.25
    assert warnings(report) == []


def test_nothing_in_common_and_nothing_scored(dest: Destination) -> None:
    write(dest, A, [row("/a", 5), row("/b", 6)])
    write(dest, B, [row("/a", None), row("/b", None)])
    report = compare(dest, A, B)
    assert report["moved"] == dict.fromkeys(("mean", "mean_abs", "quantiles", "share_moved", "srcc"))
    assert report["shift"]["quality_score"]["psi"] is None
    assert report["shift"]["quality_score"]["mean_a"] == 5.5
    assert "no photo has a score in both" in report["notes"][0]
    assert warnings(report) == []
    json.dumps(report, allow_nan=False)
    assert compare(dest, B, B)["scenes"] == []


def test_constant_scores_have_no_order(dest: Destination) -> None:
    write(dest, A, [row("/a", 5), row("/b", 5)])
    write(dest, B, [row("/a", 6), row("/b", 7)])
    moved = compare(dest, A, B)["moved"]
    assert (moved["srcc"], moved["mean"]) == (None, 1.5)


def test_a_scorer_of_another_kind_is_noted(dest: Destination) -> None:
    write(dest, A, [row("/a", 5, scorer_kind="zero_shot")])
    write(dest, B, [row("/a", 6)])
    [note] = compare(dest, A, B)["notes"]
    assert note.startswith("scored by zero_shot in A and by lightgbm in B")
    assert compare(dest, A, A)["notes"] == []


def test_numbers_that_are_none_count_as_no_score(dest: Destination) -> None:
    write(dest, A, [row("/a", 5), row("/b", 5)])
    write(dest, B, [row("/a", math.nan), row("/b", 4)])
    report = compare(dest, A, B)
    assert (report["counts"]["compared"], report["counts"]["failed_b"]) == (1, 1)
    assert [found["uri"] for found in report["fallers"]] == ["/b"]
    assert report["risers"] == []


# --- which runs -------------------------------------------------------------------------------------------------------


def test_the_two_newest_runs_that_scored(dest: Destination) -> None:
    with pytest.raises(UsageError, match="0 committed runs wrote scores here"):
        run_pair(dest)
    for run_id, rows, kind in (("r1", 2, "score"), ("r2", 0, "score"), ("r3", 1, "rescore"), ("r4", 2, "caption")):
        write(dest, run_id, [row(f"/{number}", 5) for number in range(rows)], kind)
    write(dest, "r5", [])
    dest.write_parquet(f"{dest.table_path('scores', 'r6')}/0.parquet", pa.table({"uri": ["/uncommitted"]}))
    assert run_pair(dest) == ("r3", "r4")
    write(dest, "r2.fold", [row("/0", 5)], "fold")  # what was before is no state any more
    assert run_pair(dest) == ("r3", "r4")
    with pytest.raises(UsageError, match="no committed run begins with 'r1'"):
        run_pair(dest, ["r1", "r4"])


def test_runs_by_their_beginnings(dest: Destination) -> None:
    with pytest.raises(UsageError, match="no committed runs here; run `picinspector score` into it first"):
        run_pair(dest, ["x", "y"])
    for run_id in (A, B, "20260102"):
        write(dest, run_id, [])
    assert run_pair(dest, ["20260101", "20260102T"]) == (A, B)
    assert run_pair(dest, [B, "20260102"]) == (B, "20260102"), "a whole id is no beginning"
    for given_, words in (
        ("2026", "3 committed runs begin"),
        ("1999", "no committed run begins"),
        ("", "3 committed runs begin"),
    ):
        with pytest.raises(UsageError, match=f"{words} with {given_!r}; the newest are {B}") as caught:
            run_pair(dest, [A, given_])
        assert "\n" not in str(caught.value)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(shifted: Destination, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", shifted.root, "-n", "2"]) == 0
    text = capsys.readouterr().out
    assert "1,000 photos in both: 500 unchanged" in text
    assert "too few photos to tell: human (50)" in text
    assert "fell most" in text
    assert "rose most" not in text
    assert text.count(".jpg") == 2
    assert "quality_score of scene night shifted" in text
    assert main(["diff", shifted.root, "--runs", "20260101", "20260102", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {**compare(shifted, A, B), "warnings": warnings(compare(shifted, A, B))}


def test_the_command_can_fail_over_a_shift(shifted: Destination, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", shifted.root, "--fail-over", "0.25"]) == 4
    assert "limit 0.25" in capsys.readouterr().out
    assert main(["diff", shifted.root, "--fail-over", "50"]) == 0
    assert "no distribution shifted by more than the limit" in capsys.readouterr().out
    assert main(["diff", shifted.root, "--runs", "20260101", "20260101", "--fail-over", "0"]) == 0
    assert main(["diff", shifted.root, "--runs", "1999", "20260101"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_file_names_do_not_reach_the_terminal_raw(dest: Destination, capsys: pytest.CaptureFixture[str]) -> None:
    write(dest, A, [row("/evil\n\x1b[31m.jpg", 5), row("/b", 5)])
    write(dest, B, [row("/evil\n\x1b[31m.jpg", 7), row("/b", 5)])
    assert main(["diff", dest.root]) == 0
    assert "\x1b" not in capsys.readouterr().out
