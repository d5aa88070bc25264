"""The destination: only committed rows count, the latest of each photo, none lost or doubled, for any reader."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from picinspector import schema
from picinspector.errors import StorageError, TableError, UsageError
from picinspector.ledger import check_manifest, check_rows
from picinspector.manifest import image_id
from picinspector.rank import Ranking, rank
from picinspector.tables import Destination, TableName, new_run_id
from tests.s3_server import S3Server

CLIP_DIM, DINOV2_DIM = 4, 3


def score_rows(qualities: dict[str, float | None]) -> pa.Table:
    """Rows of the scores table: uri -> quality_score, None for a broken photo."""
    rows = [
        {
            "image_id": image_id(uri, "1"),
            "uri": uri,
            "etag": "1",
            "quality_score": quality,
            "scene": None if quality is None else "night",
            "scorer_kind": "lightgbm",
            "scorer_fingerprint": "f",
            "error_kind": "truncated" if quality is None else None,
        }
        for uri, quality in qualities.items()
    ]
    return pa.Table.from_pylist(rows, schema=schema.SCORES)


def embedding_rows(uris: Sequence[str]) -> pa.Table:
    """Rows of the embeddings table: row i is filled with i / 8, every third one is broken."""
    rows: list[dict[str, Any]] = []
    for number, uri in enumerate(uris):
        row = {"image_id": image_id(uri, "1"), "uri": uri, "etag": "1", "encoder_fingerprint": "f"}
        good = {"clip_embedding": [np.float16(number / 8)] * CLIP_DIM, "dinov2_embedding": [np.float16(1)] * DINOV2_DIM}
        rows.append({**row, **({"error_kind": "corrupt"} if number % 3 == 2 else good)})
    return pa.Table.from_pylist(rows, schema=schema.embeddings(CLIP_DIM, DINOV2_DIM))


def write(dest: Destination, table: TableName, run_id: str, *parts: pa.Table) -> None:
    """One file a part, as a run writes them."""
    folder = dest.table_path(table, run_id)
    dest.filesystem.makedirs(folder, exist_ok=True)
    for number, part in enumerate(parts):
        with dest.filesystem.open(f"{folder}/{number:06d}.parquet", "wb") as file:
            pq.write_table(part, file)


def commit(dest: Destination, run_id: str) -> None:
    dest.commit({"run_id": run_id, "counts": {"to_do": 1}})


@pytest.fixture
def dest(tmp_path: Path) -> Destination:
    """A destination whose name a glob would stumble over, with spaces and characters that URLs quote."""
    return Destination(tmp_path / "out [1] 50% #a*?")


# --- runs -------------------------------------------------------------------------------------------------------------


def test_run_ids_sort_by_time() -> None:
    first = new_run_id()
    assert len({new_run_id() for _ in range(50)}) == 50
    time.sleep(0.002)
    assert first < new_run_id()
    assert re.fullmatch(r"\d{8}T\d{6}\.\d{3}Z-[0-9a-f]{6}", first)


def test_a_run_counts_from_its_commit_on(dest: Destination, tmp_path: Path) -> None:
    assert dest.runs() == []
    dest.write_manifest("r1", [pa.Table.from_pylist([], schema=schema.MANIFEST)])
    write(dest, "scores", "r1", score_rows({"/a.jpg": 5.0}))
    assert dest.runs() == []
    with pytest.raises(UsageError, match="no committed scores here; run `picinspector score` into it first"):
        dest.latest("scores", ["uri"])

    commit(dest, "r2")
    commit(dest, "r1")
    (Path(dest.root) / "runs" / ".DS_Store").touch()
    assert [record["run_id"] for record in dest.runs()] == ["r1", "r2"]
    assert dest.latest("scores", ["uri", "run_id"]).to_pylist() == [{"uri": "/a.jpg", "run_id": "r1"}]
    text = (Path(dest.root) / "runs" / "r1" / "run.json").read_text()
    assert json.loads(text) == {"run_id": "r1", "counts": {"to_do": 1}}
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


def test_writing_a_manifest(dest: Destination) -> None:
    photos = [{"image_id": str(number), "uri": f"/{number}.jpg"} for number in range(5)]
    tables = [pa.Table.from_pylist(photos[:3], schema=schema.MANIFEST)]
    tables.append(pa.Table.from_pylist(photos[3:], schema=schema.MANIFEST))
    assert dest.write_manifest("r1", iter(tables)) == 5
    files = dest.files(dest.manifest_path("r1"))
    assert [file.rsplit("/", 1)[1] for file in files] == ["shard-000000.parquet", "shard-000001.parquet"]
    assert pa.concat_tables([pq.read_table(file) for file in files]).equals(pa.concat_tables(tables))
    assert dest.files(dest.manifest_path("r2")) == []


def test_a_destination_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for url in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match="; check the path and the credentials") as caught:
            Destination(url).check_writable()
        assert "\n" not in str(caught.value)
    fresh = Destination(tmp_path / "new" / "folder")
    fresh.check_writable()
    fresh.check_writable()
    assert [path.name for path in (tmp_path / "new" / "folder" / "runs").iterdir()] == [".writable"]
    assert fresh.runs() == []


def test_an_unreadable_run_record_stops_the_run(dest: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken for uncommitted, it would have a whole library scored again."""
    commit(dest, "r1")

    def throttled(*args: Any, **keywords: Any) -> bytes:
        raise OSError(16, "Please reduce your request rate")

    monkeypatch.setattr(type(dest.filesystem), "cat_file", throttled)
    with pytest.raises(StorageError, match=r"r1/run\.json: .*reduce your request rate"):
        dest.runs()


# --- rows -------------------------------------------------------------------------------------------------------------


def test_the_latest_committed_row_of_each_photo(dest: Destination) -> None:
    write(dest, "scores", "r1", score_rows({"/a.jpg": 1.0, "/b.jpg": 2.0}), score_rows({"/c.jpg": 3.0, "/d.jpg": 4.0}))
    write(dest, "scores", "r2", score_rows({"/b.jpg": 9.0, "/c.jpg": None}))
    write(dest, "scores", "r3", score_rows({"/a.jpg": 10.0, "/d.jpg": 10.0, "/e.jpg": 10.0}))
    commit(dest, "r1")
    commit(dest, "r2")
    commit(dest, "r4")  # committed, with nothing to do

    def latest() -> dict[str, tuple[float | None, str]]:
        rows = dest.latest("scores", ["uri", "quality_score", "run_id"]).to_pylist()
        assert len(rows) == len({row["uri"] for row in rows})
        return {row["uri"]: (row["quality_score"], row["run_id"]) for row in rows}

    before = {"/a.jpg": (1.0, "r1"), "/b.jpg": (9.0, "r2"), "/c.jpg": (None, "r2"), "/d.jpg": (4.0, "r1")}
    assert latest() == before
    commit(dest, "r3")
    ten = (10.0, "r3")
    assert latest() == before | {"/a.jpg": ten, "/d.jpg": ten, "/e.jpg": ten}
    assert dest.latest("scores", ["quality_score"]).column_names == ["quality_score"]

    found = rank(dest, Ranking(3)).to_pylist()
    assert [(row["uri"], row["quality_score"]) for row in found] == [("/a.jpg", 10), ("/d.jpg", 10), ("/e.jpg", 10)]
    assert [row["uri"] for row in rank(dest, Ranking(99)).to_pylist()] == ["/a.jpg", "/d.jpg", "/e.jpg", "/b.jpg"], (
        "a broken photo has no rank"
    )
    assert (found[0]["scene"], found[0]["scorer_kind"]) == ("night", "lightgbm")


def test_runs_of_encoders_of_different_widths_live_side_by_side(dest: Destination) -> None:
    write(dest, "embeddings", "r1", embedding_rows(["/a.jpg", "/b.jpg"]))
    wide = pa.Table.from_pylist(
        [{"image_id": "x", "uri": "/a.jpg", "encoder_fingerprint": "g", "clip_embedding": [np.float16(1)] * 9}],
        schema=schema.embeddings(9, 9),
    )
    write(dest, "embeddings", "r2", wide)
    commit(dest, "r1")
    commit(dest, "r2")
    found = {row["uri"]: row for row in dest.latest("embeddings", ["uri", "run_id", "encoder_fingerprint"]).to_pylist()}
    assert {uri: row["encoder_fingerprint"] for uri, row in found.items()} == {"/a.jpg": "g", "/b.jpg": "f"}


@pytest.mark.parametrize("table", ["embeddings", "scores"])
def test_lost_and_doubled_rows_are_found(dest: Destination, table: TableName) -> None:
    uris = [f"/{number}.jpg" for number in range(6)]
    rows = embedding_rows(uris) if table == "embeddings" else score_rows(dict.fromkeys(uris, 5.0))
    write(dest, table, "whole", rows.slice(0, 4), rows.slice(4))
    write(dest, table, "lost", rows.slice(0, 5))
    write(dest, table, "doubled", rows, rows.slice(2, 1))
    write(dest, table, "exchanged", rows.slice(0, 5), rows.slice(4, 1))  # as many rows as photos, one of them twice

    manifest = rows.select(schema.MANIFEST.names)
    dest.write_manifest("whole", [manifest])
    check_manifest(dest, "whole", 6)
    check_rows(dest, table, "whole", 6)
    check_rows(dest, table, "nothing", 0)
    write(dest, table, "strangers", rows.slice(0, 5), rows.slice(5).set_column(0, "image_id", pa.array(["another"])))
    dest.write_manifest("strangers", [manifest])
    with pytest.raises(TableError, match="lacks 1 photos of its manifest"):
        check_rows(dest, table, "strangers", 6)
    dest.write_manifest("twice", [manifest, manifest.slice(0, 1)])
    with pytest.raises(TableError, match="manifest of run twice has 7 rows, 6 distinct"):
        check_manifest(dest, "twice", 7)
    for run_id, counts in {
        "lost": "5 rows, 5",
        "doubled": "7 rows, 6",
        "exchanged": "6 rows, 5",
        "none": "0 rows, 0",
    }.items():
        with pytest.raises(TableError, match=f"{table} of run {run_id} has {counts} distinct, for 6 photos"):
            check_rows(dest, table, run_id, 6)


# --- readers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A destination with two runs of both tables."""
    dest = Destination(tmp_path / "out")
    for run_id in ("r1", "r2"):
        write(dest, "scores", run_id, score_rows({"/a.jpg": 7.5, "/b.jpg": None}))
        write(dest, "embeddings", run_id, embedding_rows(["/a.jpg", "/b.jpg", "/c.jpg"]))
        commit(dest, run_id)
    return tmp_path / "out"


ROWS = [(uri, quality, run_id) for run_id in ("r1", "r2") for uri, quality in (("/a.jpg", 7.5), ("/b.jpg", None))]
VECTORS = [[0.0] * CLIP_DIM, [0.125] * CLIP_DIM, None] * 2


def test_an_embedding_is_a_fixed_size_list_of_halffloat_in_parquet(written: Path) -> None:
    [path] = (written / "embeddings" / "run_id=r1").iterdir()
    found = pq.read_schema(path)
    assert found.field("clip_embedding").type == pa.list_(pa.float16(), CLIP_DIM)
    assert found.field("dinov2_embedding").type == pa.list_(pa.float16(), DINOV2_DIM)
    assert "run_id" not in found.names, "the partition, and no column: readers would see it twice"
    assert found.field("clip_embedding").metadata[b"description"] == b"CLIP image embedding, L2-normalised"
    leaf = next(
        c for c in map(pq.ParquetFile(path).schema.column, range(len(found))) if c.path.startswith("clip_embedding.")
    )
    assert str(leaf.logical_type) == "Float16", "and a half in the file's own terms, for readers without Arrow"
    assert leaf.length == 2


def test_duckdb_reads_both_tables(written: Path) -> None:
    query = f"SELECT uri, quality_score, run_id FROM '{written}/scores/**/*.parquet' ORDER BY run_id, uri"
    assert duckdb.sql(query).fetchall() == ROWS
    query = f"SELECT clip_embedding FROM '{written}/embeddings/**/*.parquet' ORDER BY run_id, uri"
    assert [vector and list(vector) for (vector,) in duckdb.sql(query).fetchall()] == VECTORS
    # Vector queries want the width: DuckDB's list_dot_product refuses a column with broken photos, arrays take it.
    vector = f"clip_embedding::FLOAT[{CLIP_DIM}]"
    query = (
        f"SELECT array_dot_product({vector}, {vector}) FROM '{written}/embeddings/**/*.parquet' ORDER BY run_id, uri"
    )
    assert duckdb.sql(query).fetchall() == [(0.0,), (CLIP_DIM * 0.125**2,), (None,)] * 2


def test_pandas_reads_both_tables(written: Path) -> None:
    scores = pd.read_parquet(written / "scores").sort_values(["run_id", "uri"])
    assert [(uri, None if np.isnan(quality) else quality, run_id) for uri, quality, run_id in
            scores[["uri", "quality_score", "run_id"]].itertuples(index=False)] == ROWS  # fmt: skip
    vectors = pd.read_parquet(written / "embeddings").sort_values(["run_id", "uri"])["clip_embedding"]
    assert [None if vector is None else vector.tolist() for vector in vectors] == VECTORS
    assert vectors.iloc[0].dtype == np.float16


def test_polars_reads_both_tables(written: Path) -> None:
    scores = pl.read_parquet(written / "scores").sort("run_id", "uri")
    assert scores.select("uri", "quality_score", "run_id").rows() == ROWS
    embeddings = pl.scan_parquet(written / "embeddings").sort("run_id", "uri").collect()
    assert embeddings.schema["clip_embedding"] == pl.Array(pl.Float16, CLIP_DIM)
    assert embeddings["clip_embedding"].to_list() == VECTORS


def test_pyarrow_reads_both_tables(written: Path) -> None:
    scores = (
        ds.dataset(written / "scores", partitioning="hive")
        .to_table()
        .sort_by([("run_id", "ascending"), ("uri", "ascending")])
    )
    assert [tuple(row.values()) for row in scores.select(["uri", "quality_score", "run_id"]).to_pylist()] == ROWS
    found = ds.dataset(written / "embeddings", partitioning="hive").to_table(filter=ds.field("run_id") == "r2")
    assert found.column("clip_embedding").to_pylist() == VECTORS[:3]
    assert found.column("clip_embedding").combine_chunks().flatten().to_numpy().dtype == np.float16


# --- object stores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/a b/[1] 50%+"])
def test_a_destination_on_s3(s3_server: S3Server, s3_bucket: str, prefix: str) -> None:
    url, options = f"s3://{s3_bucket}{prefix}", s3_server.storage_options
    dest, reader = Destination(url, options), Destination(url, options)
    dest.check_writable()
    assert reader.runs() == []
    assert reader.files(reader.table_path("scores", "r1")) == []

    # Others write by clients of their own, so that no cache of this process's filesystem hears of it.
    other = Destination(url, options)
    other.filesystem = fsspec.filesystem("s3", skip_instance_cache=True, **options)
    write(other, "scores", "r1", score_rows({"/a.jpg": 5.0, "/b.jpg": None}))
    other.write_manifest("r1", [score_rows({"/a.jpg": 5.0, "/b.jpg": None}).select(schema.MANIFEST.names)])
    check_rows(reader, "scores", "r1", 2)
    assert reader.runs() == []
    commit(other, "r1")
    assert [record["run_id"] for record in reader.runs()] == ["r1"]
    write(other, "scores", "r2", score_rows({"/a.jpg": 6.0}))
    commit(other, "r2")
    assert [(row["uri"], row["quality_score"], row["run_id"]) for row in rank(reader, Ranking(9)).to_pylist()] == [
        ("/a.jpg", 6.0, "r2")
    ]

    keys = [item["Key"] for item in s3_server.client().list_objects_v2(Bucket=s3_bucket)["Contents"]]
    assert sorted(key.removeprefix(prefix[1:]).lstrip("/") for key in keys) == [
        "runs/.writable",
        "runs/r1/manifest/shard-000000.parquet",
        "runs/r1/run.json",
        "runs/r2/run.json",
        "scores/run_id=r1/000000.parquet",
        "scores/run_id=r2/000000.parquet",
    ]


def test_a_commit_on_s3_is_one_object_and_removes_nothing(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that may not delete can commit."""
    dest = Destination(f"s3://{s3_bucket}/out", s3_server.storage_options)

    def refuse(*args: Any, **keywords: Any) -> None:
        raise PermissionError("AccessDenied: DeleteObject")

    monkeypatch.setattr(type(dest.filesystem), "mv", refuse)
    monkeypatch.setattr(type(dest.filesystem), "rm", refuse)
    commit(dest, "r1")
    assert [record["run_id"] for record in dest.runs()] == ["r1"]


def test_messages_of_a_destination_hold_no_secret(s3_server: S3Server, s3_bucket: str) -> None:
    options = {**s3_server.storage_options, "secret": "very-wrong"}
    with pytest.raises(StorageError, match=f"cannot write to s3://{s3_bucket}/out: PermissionError") as caught:
        Destination(f"s3://{s3_bucket}/out", options).check_writable()
    assert "very-wrong" not in str(caught.value)
    assert Destination("memory://user:secret@x/out").url == "memory://x/out"
