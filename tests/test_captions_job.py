"""Captions on a real local Ray: while scoring, and afterwards for a choice of photos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from picinspector import pipeline, schema
from picinspector.cli import main
from picinspector.errors import UsageError
from picinspector.rank import Choice, Ranking, choose, rank
from picinspector.tables import Destination
from tests.light_encoder import Encode
from tests.test_pipeline import make_library, options

pytestmark = pytest.mark.usefixtures("local_ray")

NEW_COLUMNS = {*schema.CAPTION.names, "caption_error", "caption_fingerprint", "suggestions"}


def latest(dest: Path, table: Any = "scores", *columns: str) -> dict[str, dict[str, Any]]:
    """The newest committed row of each photo, by the name of its file."""
    rows = Destination(dest).latest(table, ["uri", *columns]).to_pylist()
    return {Path(row["uri"]).name: row for row in rows}


def vectors(dest: Path) -> dict[str, list[float]]:
    """The newest embedding of each photo; DuckDB cannot take float16 from Arrow."""
    newest: dict[str, list[float]] = {}
    for file in sorted((dest / "embeddings").rglob("*.parquet")):  # run ids sort by time
        rows = pq.read_table(file, columns=["uri", "clip_embedding"], partitioning=None).to_pylist()
        newest |= {row["uri"]: row["clip_embedding"] for row in rows}
    return newest


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, local_ray: None, captioned_bundle: Path) -> Path:
    """Twelve photos and a broken one, scored without captions."""
    root = tmp_path_factory.mktemp("captions")
    make_library(root / "library", 12)
    (root / "library" / "broken.jpg").write_bytes(b"no photo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("picinspector.stages.encode.Encode", Encode)
        pipeline.score(str(root / "library"), str(root / "dest"), options(captioned_bundle))
    return root


def test_every_photo_is_described_as_it_is_scored(tmp_path: Path, captioned_bundle: Path) -> None:
    make_library(tmp_path / "library", 6)
    (tmp_path / "library" / "broken.jpg").write_bytes(b"no photo")
    chosen = options(captioned_bundle, captions=True)
    record = pipeline.score(str(tmp_path / "library"), str(tmp_path / "dest"), chosen)
    rows = latest(tmp_path / "dest", "scores", "caption", "caption_source", "suggestions", "error_kind")
    assert len(rows) == 7
    broken = rows.pop("broken.jpg")
    assert broken["error_kind"] == "unknown_format" and broken["caption"] is broken["suggestions"] is None
    assert all(row["caption"] and row["caption_source"] in schema.CAPTION_SOURCES for row in rows.values())
    assert all(isinstance(row["suggestions"], list) for row in rows.values())
    assert sum(record["counts"]["captions_by_source"].values()) == 6
    again = pipeline.score(str(tmp_path / "library"), str(tmp_path / "dest"), chosen)
    assert again["counts"]["to_do"] == 0


def test_the_best_are_described_afterwards(scored: Path, captioned_bundle: Path, capsys: Any) -> None:
    dest = scored / "dest"
    before, ranking = vectors(dest), rank(Destination(dest), Ranking(12)).to_pylist()
    gone = Path(ranking[1]["uri"])
    gone.rename(gone.with_suffix(".gone"))
    try:
        code = main(["caption", str(dest), "--best", "3", "--bundle", str(captioned_bundle), "--json", "--quiet"])
    finally:
        gone.with_suffix(".gone").rename(gone)
    record = json.loads(capsys.readouterr().out)
    assert code == 0 and record["counts"]["unread_by_kind"] == {"not_found": 1}
    assert record["kind"] == "caption"
    assert record["counts"]["to_do"] == record["counts"]["scored"] == 3
    assert sum(record["counts"]["captions_by_source"].values()) == 3

    captions = latest(dest, "scores", "caption", "caption_source")
    assert [name for name, row in captions.items() if row["caption"]] == [
        name for name in captions if name in {Path(row["uri"]).name for row in ranking[:3]}
    ]
    assert captions[gone.name]["caption_source"] == "unread"
    errors = latest(dest, "embeddings", "caption_error")
    assert errors[gone.name]["caption_error"].startswith("not_found")
    assert sum(row["caption_error"] is not None for row in errors.values()) == 1
    assert vectors(dest) == before
    again = pipeline.caption(str(dest), Choice(best=3), options(captioned_bundle))
    assert again["counts"]["to_do"] == again["counts"]["captions_by_source"].get("unread", 0) + 1 == 1
    assert [(row["uri"], row["quality_score"]) for row in rank(Destination(dest), Ranking(12)).to_pylist()] == [
        (row["uri"], row["quality_score"]) for row in ranking
    ]


def test_a_choice_in_sql(scored: Path, tmp_path: Path) -> None:
    dest = Destination(scored / "dest")
    everything = choose(dest, Choice()).to_pylist()
    assert len(everything) == 12
    scores = [row["quality_score"] for row in everything]
    assert scores == sorted(scores, reverse=True)
    worst = choose(dest, Choice(worst=2)).column("uri").to_pylist()
    assert worst == [row["uri"] for row in sorted(everything, key=lambda row: (row["quality_score"], row["uri"]))][:2]
    middle = sorted(scores)[6]
    assert choose(dest, Choice(where=f"quality_score > {middle}")).num_rows == sum(score > middle for score in scores)
    lowest = choose(dest, Choice(worst=2, where=f"quality_score > {middle}")).column("quality_score").to_pylist()
    assert lowest == sorted(score for score in scores if score > middle)[:2]
    with pytest.raises(UsageError, match="best or worst, not both"):
        choose(dest, Choice(best=1, worst=1))
    with pytest.raises(UsageError, match="--where is empty"):
        choose(dest, Choice(where=" "))
    secret, target = tmp_path / "secret.csv", tmp_path / "target.csv"
    secret.write_text("uri\nx\n")
    for wrong in (
        "quality",
        "true); DROP VIEW latest; --",
        "false) OR (true",
        "true) UNION ALL SELECT * FROM latest --",
        f"uri IN (SELECT uri FROM read_csv('{secret}'))",
        f"true); COPY latest TO '{target}'; --",
    ):
        with pytest.raises(UsageError, match="is no condition over the scores") as error:
            choose(dest, Choice(where=wrong))
        assert "\n" not in str(error.value)
    assert not target.exists()


def test_a_bundle_without_a_captioner_says_so(scored: Path, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no captioner"):
        pipeline.caption(str(scored / "dest"), Choice(best=1), options(tiny))
    with pytest.raises(UsageError, match="has no captioner"):
        pipeline.score(str(scored / "library"), str(tmp_path / "new"), options(tiny, captions=True))
    assert not (tmp_path / "new" / "embeddings").exists()


@pytest.mark.usefixtures("light_encoder")
def test_tables_of_an_older_version_are_read_and_described(tmp_path: Path, captioned_bundle: Path) -> None:
    make_library(tmp_path / "library", 4)
    dest = tmp_path / "dest"
    pipeline.score(str(tmp_path / "library"), str(dest), options(captioned_bundle))
    for file in dest.rglob("*.parquet"):
        table = pq.read_table(file, partitioning=None)
        pq.write_table(table.drop_columns([name for name in table.column_names if name in NEW_COLUMNS]), file)
    assert len(rank(Destination(dest), Ranking(10)).to_pylist()) == 4
    assert choose(Destination(dest), Choice(best=1), ["caption", "suggestions"]).to_pylist() == [
        {"caption": None, "suggestions": None}
    ]

    record = pipeline.rescore(str(dest), options(captioned_bundle))
    assert record["counts"]["to_do"] == 0  # the same scorer has scored them
    for file in (dest / "scores").rglob("*.parquet"):
        table = pq.read_table(file, partitioning=None)
        index = table.schema.get_field_index("scorer_fingerprint")
        pq.write_table(table.set_column(index, table.schema.field(index), [["older"] * table.num_rows]), file)
    assert pipeline.rescore(str(dest), options(captioned_bundle))["counts"]["scored"] == 4
    record = pipeline.caption(str(dest), Choice(worst=1), options(captioned_bundle))
    assert record["counts"]["scored"] == 1
    assert sum(row["caption"] is not None for row in latest(dest, "scores", "caption").values()) == 1
