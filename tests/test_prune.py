"""Retention: what newer rows have superseded goes, and every state since the cutoff stays as it was."""

from __future__ import annotations

import os
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from picinspector import pipeline, prune, schema
from picinspector.manifest import image_id
from picinspector.rank import Ranking, rank
from picinspector.tables import Destination, TableName

DIM = 4


def night_id(night: int) -> str:
    return f"2026{night // 28 + 1:02}{night % 28 + 1:02}T030000.000Z-abcdef"


def after(night: int) -> datetime:
    """Noon of the day of that night."""
    return datetime(2026, night // 28 + 1, night % 28 + 1, 12, tzinfo=UTC)


def write(dest: Destination, night: int, library: dict[str, str], gone: dict[str, bool] | None = None) -> str:
    """A committed run that did these photos (uri -> etag) and marked those images."""
    run_id = night_id(night)
    rows = [
        {
            "image_id": image_id(uri, etag), "uri": uri, "etag": etag, "quality_score": float(night % 10),
            "scene": "night", "scorer_kind": "lightgbm", "scorer_fingerprint": "s", "encoder_fingerprint": "e",
            "clip_embedding": [np.float16(night / 8)] * DIM, "dinov2_embedding": [np.float16(1)] * DIM,
        }
        for uri, etag in library.items()
    ]  # fmt: skip
    if rows:
        for table, fields in (("embeddings", schema.embeddings(DIM, DIM)), ("scores", schema.SCORES)):
            path = f"{dest.table_path(table, run_id)}/0.parquet"  # type: ignore[arg-type]
            dest.write_parquet(path, pa.Table.from_pylist(rows, schema=fields))
        dest.write_manifest(run_id, [pa.Table.from_pylist(rows, schema=schema.MANIFEST)])
    if gone:
        marks = [{"image_id": image, "gone": is_gone, "scorer_fingerprint": "s"} for image, is_gone in gone.items()]
        dest.write_parquet(
            f"{dest.table_path('gone', run_id)}/0.parquet", pa.Table.from_pylist(marks, schema=schema.GONE)
        )
    bundle = {
        "encoder_fingerprint": "e",
        "scorer_fingerprint": "s",
        "scorer_kind": "lightgbm",
        "name": "b",
        "version": "1",
    }
    dest.commit({"run_id": run_id, "kind": "score", "bundle": bundle, "counts": {"to_do": len(rows)}})
    return run_id


def state(dest: Destination, as_of: str | None = None) -> dict[str, list[tuple[Any, ...]]]:
    columns = {"embeddings": ["uri", "image_id"], "scores": ["uri", "image_id", "quality_score"]}
    return {
        table: sorted(tuple(row.values()) for row in dest.latest(table, names, as_of).to_pylist())  # type: ignore[arg-type]
        for table, names in columns.items()
    }


def copy(dest: Destination, found: prune.Survey) -> None:
    """What the chain does on Ray, in a line of pyarrow."""
    manifest = pa.concat_tables([prune.FOLD.empty_table(), *prune.fold(dest, found)])
    for table in ("embeddings", "scores"):
        wanted = {(row[f"{table}_run_id"], row["image_id"]) for row in manifest.to_pylist()}
        parts = []
        for run_id in {run for run, _ in wanted}:
            rows = ds.dataset(dest.files_of(table, [run_id])).to_table()  # type: ignore[arg-type]
            parts.append(
                rows.filter(pa.array([(run_id, image) in wanted for image in rows.column("image_id").to_pylist()]))
            )
        if parts:
            dest.write_parquet(f"{dest.table_path(table, found.fold_id)}/0.parquet", pa.concat_tables(parts))  # type: ignore[arg-type]
    if (marks := prune.fold_marks(dest, found)) is not None:
        dest.write_parquet(f"{dest.table_path('gone', found.fold_id)}/0.parquet", marks)
    dest.commit({"run_id": found.fold_id, "kind": "fold", "bundle": None, "counts": {"to_do": manifest.num_rows}})


@pytest.mark.parametrize("seed", range(30))
def test_every_state_since_the_cutoff_stays(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random nights: photos come, change, leave and come back; then all of it is pruned at a random cutoff, twice."""
    dest, dice, uris = Destination(tmp_path / "dest"), random.Random(seed), [f"/{letter}" for letter in "abcdefgh"]
    there: dict[str, str] = {}
    away: dict[str, str] = {}
    nights = dice.randint(6, 12)
    for night in range(nights):
        done, marks = {}, {}
        for uri in dice.sample(uris, dice.randint(1, 4)):
            chance = dice.random()
            if uri in there and chance < 0.4:
                marks[image_id(uri, there[uri])] = True
                away[uri] = there.pop(uri)
            elif uri in away and chance < 0.7:
                marks[image_id(uri, away[uri])] = False
                there[uri] = away.pop(uri)
            elif (uri in away and chance < 0.85) or (uri in there and chance < 0.6):  # the same image, done again
                done[uri] = there[uri] = away.pop(uri, there.get(uri, ""))
            else:
                done[uri] = there[uri] = str(night)
                away.pop(uri, None)
        write(dest, night, done, marks)
    assert {row[0] for row in state(dest)["scores"]} == there.keys()
    cut = dice.randint(1, nights - 1)
    monkeypatch.setattr(prune, "_SMALL_FILE_ROWS", dice.choice([2, 3, 4, 4096]))  # some runs count as large
    monkeypatch.setattr(prune, "_FEW_FILES", dice.choice([1, 8]))
    monkeypatch.setattr(prune, "_DEAD_SHARE", dice.choice([0.3, 0.6, 2.0]))
    kept = [night_id(night) for night in range(cut, nights)]  # states after the cutoff, and the one as of the cutoff
    before = {run_id: state(dest, run_id) for run_id in kept}
    as_of_cut = state(dest, night_id(cut - 1))
    for _ in range(2):
        found = prune.survey(dest, after(cut - 1))
        assert found is not None
        if found.to_fold:
            copy(dest, found)
            found = prune.survey(dest, after(cut - 1))
            assert found is not None
        for run in found.superseded:
            prune.remove(dest, run.run_id)
        assert {run_id: state(dest, run_id) for run_id in kept} == before
        assert state(dest, f"{night_id(cut - 1)}.fold.fold") == as_of_cut
    left = prune.survey(dest, after(cut - 1))
    assert left is not None and not left.superseded


def test_folding_on_ray(tmp_path: Path, local_ray: None) -> None:
    dest = Destination(tmp_path / "dest")
    library = {f"/{number:02}": "0" for number in range(40)}
    write(dest, 0, library)
    for night in range(1, 9):
        changed = {f"/{number:02}": str(night) for number in range(night, night + 5)}
        library |= changed
        write(dest, night, changed, {image_id("/39", "0"): True} if night == 2 else None)
    write(dest, 40, {"/new": "1"})
    dest.plan({"run_id": night_id(10), "kind": "score"})  # never committed: not ours to touch
    dest.write_parquet(f"{dest.table_path('scores', night_id(10))}/0.parquet", pa.table({"image_id": ["x"]}))
    before, newest = state(dest), rank(dest, Ranking(5)).to_pylist()
    options = pipeline.Options(show_progress=False)
    days = (datetime.now(UTC) - after(20)).total_seconds() / 86400
    plan = pipeline.prune(dest.root, options, days, dry_run=True)
    assert (plan["runs_folded"], plan["files_folded"], plan["runs_removed"]) == (9, 18, 9)
    assert len(dest.runs()) == 10  # a dry run does nothing
    report = pipeline.prune(dest.root, options, days)
    assert report == plan
    assert state(dest) == before
    assert [row["uri"] for row in rank(dest, Ranking(5)).to_pylist()] == [row["uri"] for row in newest]
    assert [record["kind"] for record in dest.runs()] == ["fold", "score"]
    [fold, _] = dest.runs()
    assert fold["counts"]["to_do"] == 40
    rows = ds.dataset(dest.files_of("embeddings", [fold["run_id"]])).to_table()
    assert rows.schema.remove_metadata() == schema.embeddings(DIM, DIM).remove_metadata()
    assert rows.column("clip_embedding").null_count == 0
    assert dest.uncommitted() == [night_id(10)]
    assert dest.files_of("scores", [night_id(10)])
    again = pipeline.prune(dest.root, options, days)
    assert set(again.values()) == {0}


def test_a_fold_that_was_cut_short_is_taken_up_again(
    tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = Destination(tmp_path / "dest")
    for night in range(6):
        write(dest, night, {f"/{number}": str(night) for number in range(night, 8)})
    before, options = state(dest), pipeline.Options(show_progress=False)

    def crash(*_: Any) -> None:
        raise OSError("pulled the plug")

    for name in ("plan", "commit"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="plug"):
            patch.setattr(Destination, name, crash)
            pipeline.prune(dest.root, options, 0.0)
        assert state(dest) == before
    with monkeypatch.context() as patch, pytest.raises(OSError, match="plug"):
        patch.setattr(prune, "remove", crash)
        pipeline.prune(dest.root, options, 0.0)
    assert state(dest) == before
    [first, *_] = [record["run_id"] for record in dest.runs()]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="plug"):
        patch.setattr(Destination, "delete", crash)
        prune.remove(dest, first)
    os.unlink(f"{dest.run_path(first)}/run.json")  # noqa: PTH108
    assert dest.uncommitted() == [first]
    pipeline.prune(dest.root, options, 0.0)
    assert state(dest) == before
    assert dest.uncommitted() == []
    assert not dest.files_of("embeddings", [first])
    kinds = [record["kind"] for record in dest.runs()]
    assert kinds.count("fold") == 1 and len(kinds) <= 2


@pytest.mark.parametrize("table", ["embeddings", "scores"])
def test_a_large_run_is_left_alone(tmp_path: Path, table: TableName, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody copies ten million embeddings because of a few thousand that changed."""
    monkeypatch.setattr(prune, "_SMALL_FILE_ROWS", 20)
    dest = Destination(tmp_path / "dest")
    write(dest, 0, {f"/{number}": "0" for number in range(40)})
    for night in range(1, 9):
        write(dest, night, {f"/{night}": "1"})
    found = prune.survey(dest, after(20))
    assert found is not None
    assert [run.run_id for run in found.to_fold] == [night_id(night) for night in range(1, 9)]
    assert night_id(0) not in {run.run_id for run in found.superseded}
    assert {row["uri"] for shard in prune.fold(dest, found) for row in shard.to_pylist()} == {
        f"/{night}" for night in range(1, 9)
    }


def test_nothing_to_prune(tmp_path: Path) -> None:
    dest = Destination(tmp_path / "dest")
    assert prune.survey(dest, after(3)) is None
    write(dest, 5, {"/a": "1"})
    assert prune.survey(dest, after(3)) is None
    found = prune.survey(dest, after(6))
    assert found is not None and not found.to_fold and not found.superseded
