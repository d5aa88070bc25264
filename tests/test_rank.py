"""Rankings over tables written by hand: order, mixes, percentiles, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from picinspector import schema
from picinspector.cli import main
from picinspector.errors import UsageError
from picinspector.rank import Ranking, failures, outermost, rank
from picinspector.tables import Destination

RUN = "20260101T000000.000Z-aaaaaa"


def row(uri: str, quality: float | None, scene: str = "night", **attributes: float) -> dict[str, Any]:
    values: dict[str, Any] = {"image_id": f"{uri}@1", "uri": uri, "scorer_fingerprint": "f", "scorer_kind": "lightgbm"}
    if quality is None:
        return values | {"error_kind": "truncated", "error_message": "the file ends early"}
    values |= {f"attribute_{name}": 50.0 for name in schema.ATTRIBUTES}
    values |= {f"attribute_{name}": value for name, value in attributes.items()}
    return values | {"quality_score": quality, "scene": scene}


@pytest.fixture
def dest(tmp_path: Path) -> Destination:
    """Four photos in two albums, and a broken one."""
    rows = [
        row("/lib/a/1.jpg", 8, "night", sharpness=10),
        row("/lib/a/2.jpg", 6, "human", sharpness=40),
        row("/lib/b/3.jpg", 4, "night", sharpness=30),
        row("/lib/b/4.jpg", 2, "human", sharpness=20),
        row("/lib/b/5.jpg", None),
    ]
    dest = Destination(tmp_path / "tables")
    dest.write_parquet(f"{dest.table_path('scores', RUN)}/0.parquet", pa.Table.from_pylist(rows, schema=schema.SCORES))
    dest.commit({"run_id": RUN, "kind": "score", "counts": {"to_do": 5}})
    return dest


def names(found: pa.Table) -> list[str]:
    return [Path(uri).stem for uri in found.column("uri").to_pylist()]


def test_what_has_no_value_is_not_ranked(tmp_path: Path) -> None:
    """Not as the best, as SQL would have it: NaN is the largest number there, and null the last."""
    rows = [row("/lib/a.jpg", math.nan), row("/lib/b.jpg", 5), row("/lib/c.jpg", 4)]
    rows[1]["attribute_sharpness"], rows[1]["attribute_contrast"] = None, math.nan
    dest = Destination(tmp_path / "tables")
    dest.write_parquet(f"{dest.table_path('scores', RUN)}/0.parquet", pa.Table.from_pylist(rows, schema=schema.SCORES))
    dest.commit({"run_id": RUN, "kind": "score", "counts": {"to_do": 3}})
    assert names(rank(dest)) == ["b", "c"] and rank(dest).column("library_percentile").to_pylist() == [100, 50]
    assert names(rank(dest, Ranking(by="sharpness=1"))) == names(rank(dest, Ranking(by="sharpness"))) == ["c"]
    assert names(rank(dest, Ranking(by="contrast"))) == ["c"]


def test_names_of_copies_follow_the_library(dest: Destination) -> None:
    assert outermost(dest) == ["/lib/a/1.jpg", "/lib/b/5.jpg"], "the run says no library"
    for run, library in {"20260102T000000.000Z-b": "/lib/a", "20260103T000000.000Z-c": "s3://b/p/"}.items():
        dest.commit({"run_id": run, "kind": "score", "library": library, "counts": {"to_do": 0}})
    assert outermost(dest) == ["/lib/a/*", "s3://b/p/*"]
    folded = {"run_id": "20260103T000000.000Z-c.fold", "library": None, "libraries": ["/lib/a", "s3://b/p/", "s3://c"]}
    dest.commit({**folded, "counts": {"to_do": 0}})
    assert outermost(dest) == ["/lib/a/*", "s3://b/p/*", "s3://c/*"]
    dest.commit({"run_id": "20260104T000000.000Z-d", "library": "s3://b/list.csv", "counts": {"to_do": 0}})
    assert outermost(dest) == ["/lib/a/1.jpg", "/lib/b/5.jpg"], "a list's photos may be anywhere"


def test_percentiles_are_the_share_a_photo_is_at_least_as_good_as(dest: Destination) -> None:
    found = rank(dest).to_pylist()
    assert [row["rank"] for row in found] == [1, 2, 3, 4]
    assert [row["library_percentile"] for row in found] == [100, 75, 50, 25]
    assert [row["scene_percentile"] for row in found] == [100, 100, 50, 50]
    assert [row["album"] for row in found] == ["/lib/a", "/lib/a", "/lib/b", "/lib/b"]
    assert [row["value"] for row in found] == [8, 6, 4, 2]


def test_the_other_end_and_other_measures(dest: Destination) -> None:
    assert names(rank(dest, Ranking(worst=True))) == ["4", "3", "2", "1"]
    by_sharpness = rank(dest, Ranking(by="sharpness"))
    assert names(by_sharpness) == ["2", "3", "4", "1"]
    assert by_sharpness.column("library_percentile").to_pylist() == [100, 75, 50, 25], "of what it is ranked by"


def test_a_mix_weighs_percentiles(dest: Destination) -> None:
    found = rank(dest, Ranking(by="quality_score=1, sharpness=3")).to_pylist()
    # Percentiles of quality 100 75 50 25, of sharpness 25 100 75 50.
    assert {Path(row["uri"]).stem: row["value"] for row in found} == {
        "1": (100 + 3 * 25) / 4, "2": (75 + 3 * 100) / 4, "3": (50 + 3 * 75) / 4, "4": (25 + 3 * 50) / 4
    }  # fmt: skip
    assert names(rank(dest, Ranking(by="sharpness=-1"))) == ["1", "4", "3", "2"]


def test_filters_leave_percentiles_those_of_the_library(dest: Destination) -> None:
    night = rank(dest, Ranking(scene="night"))
    assert names(night) == ["1", "3"] and night.column("library_percentile").to_pylist() == [100, 50]
    assert night.column("rank").to_pylist() == [1, 2]
    assert names(rank(dest, Ranking(where="album = '/lib/b' AND library_percentile > 25"))) == ["3"]


def test_each_album_or_scene_by_itself(dest: Destination) -> None:
    assert names(rank(dest, Ranking(count=1, per="album"))) == ["1", "3"]
    found = rank(dest, Ranking(count=1, per="scene", worst=True))
    assert list(zip(found.column("scene").to_pylist(), names(found), strict=True)) == [("human", "4"), ("night", "3")]


@pytest.mark.parametrize(
    ("ranking", "message"),
    [
        (Ranking(by="beauty"), "'beauty' is no measure; give one of quality_score, mos"),
        (Ranking(by="quality_score=2,beauty=1"), "'beauty=1' is no measure"),
        (Ranking(by="sharpness="), "'sharpness=' is no measure"),
        (Ranking(by="sharpness=0"), "all weights are 0"),
        (Ranking(scene="moon"), "--scene moon: no such scene; give one of animal"),
        (Ranking(where=" "), "--where is empty"),
        (Ranking(where="beauty > 3"), "is no condition over the scores"),
        (Ranking(where="uri IN (SELECT content FROM read_text('/etc/hostname'))"), "is no condition over the scores"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(dest: Destination, ranking: Ranking, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        rank(dest, ranking)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_photos_without_a_score_have_no_rank_but_a_reason(dest: Destination) -> None:
    [broken] = failures(dest)
    assert (broken["uri"], broken["error_kind"]) == ("/lib/b/5.jpg", "truncated")


def test_top_and_bottom_print_what_is_asked_for(dest: Destination, tmp_path: Path, capsys: Any) -> None:
    assert main(["top", dest.url, "-n", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].split()[:2] == ["1", "8.00"] and lines[1].endswith("/lib/a/1.jpg")
    assert main(["bottom", dest.url, "--by", "sharpness", "--scene", "night", "--json"]) == 0
    assert [row["uri"] for row in json.loads(capsys.readouterr().out)] == ["/lib/a/1.jpg", "/lib/b/3.jpg"]
    assert main(["top", dest.url, "--per", "album", "-n", "1", "--csv"]) == 0
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["album"], row["rank"], row["uri"]) for row in found] == [
        ("/lib/a", "1", "/lib/a/1.jpg"), ("/lib/b", "1", "/lib/b/3.jpg")
    ]  # fmt: skip
    assert main(["top", dest.url, "--out", str(tmp_path / "best.parquet")]) == 0
    assert pa.parquet.read_table(tmp_path / "best.parquet").column("rank").to_pylist() == [1, 2, 3, 4]
    assert "4 photos" in capsys.readouterr().err


def test_a_name_cannot_forge_lines_or_cells(tmp_path: Path, capsys: Any) -> None:
    dest = Destination(tmp_path / "tables")
    rows = [row('/lib/a\n   1     9.99  night       /lib/forged,"x".jpg', 5)]
    dest.write_parquet(f"{dest.table_path('scores', RUN)}/0.parquet", pa.Table.from_pylist(rows, schema=schema.SCORES))
    dest.commit({"run_id": RUN, "kind": "score", "counts": {"to_do": 1}})
    assert main(["top", dest.url]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["top", dest.url, "--csv"]) == 0
    [found] = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert found["uri"] == rows[0]["uri"]
