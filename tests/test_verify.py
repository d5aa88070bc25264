"""A destination that real runs wrote is whole; broken in each way a disk or a person can, it is told so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from picinspector import pipeline, prune
from picinspector.cli import main
from picinspector.errors import StorageError
from picinspector.rank import Choice
from picinspector.tables import Destination
from picinspector.verify import Kind, Report, verify
from tests.bundles import tiny_bundle
from tests.light_encoder import Encode
from tests.s3_server import S3Server
from tests.test_pipeline import make_library, options

#: Photos of the library, one of them broken; the first run does all of them.
PHOTOS = 12


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, captioned_bundle: Path, local_ray: None) -> Path:
    """Scored; again after a change, a loss and an addition; some captioned; rescored."""
    root = tmp_path_factory.mktemp("verify")
    library, dest, chosen = root / "library", root / "dest", options(captioned_bundle)
    make_library(library, PHOTOS - 1)
    (library / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("picinspector.stages.encode.Encode", Encode)
        pipeline.score(str(library), str(dest), chosen)
        (library / "000.jpg").write_bytes((library / "002.jpg").read_bytes())
        (library / "004.jpg").unlink()
        shutil.copy(library / "006.jpg", library / "added.jpg")
        pipeline.score(str(library), str(dest), chosen)
    pipeline.caption(str(dest), Choice(best=2), chosen)
    pipeline.rescore(str(dest), options(tiny_bundle(root / "other", scorer_seed=1).folder))
    return dest


@pytest.fixture
def dest(healthy: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(healthy, tmp_path / "dest"))


def runs(dest: Path) -> list[str]:
    return sorted(path.parent.name for path in (dest / "runs").glob("*/run.json"))


def files(dest: Path, table: str, run: int = 0) -> list[Path]:
    """Parquet files of a table, or `manifest`, of the n-th run."""
    run_id = runs(dest)[run]
    folder = dest / "runs" / run_id / "manifest" if table == "manifest" else dest / table / f"run_id={run_id}"
    return sorted(folder.glob("*.parquet"))


def rewrite(file: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(file, partitioning=None)), file)


def put(column: str, row: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    """A table with another value in one place."""

    def change(table: pa.Table) -> pa.Table:
        index = table.schema.get_field_index(column)
        values = table.column(column).to_pylist()
        values[row] = value
        return table.set_column(index, table.schema.field(column), pa.array(values, table.schema.field(column).type))

    return change


def good_row(file: Path) -> int:
    table = pq.read_table(file, columns=["error_kind"], partitioning=None)
    return int(pc.index(pc.is_null(table.column("error_kind")), True).as_py())


def check(dest: Path, quick: bool = False) -> Report:
    return verify(Destination(dest), quick)


def kinds(report: Report) -> set[Kind]:
    return {found.kind for found in report.problems}


def told(report: Report) -> str:
    assert all("\n" not in found.message for found in [*report.problems, *report.notices])
    return "\n".join(found.message for found in report.problems)


# --- whole ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False, True])
def test_a_healthy_destination_is_whole(healthy: Path, quick: bool) -> None:
    report = check(healthy, quick)
    assert told(report) == ""
    assert report.notices == []
    assert report.whole
    assert report.runs == 4
    rows = {table: sum(pq.read_metadata(file).num_rows for file in (healthy / table).rglob("*.parquet"))
            for table in ("embeddings", "scores")}  # fmt: skip
    assert report.rows == sum(rows.values())
    assert rows == {"embeddings": PHOTOS + 2 + 2, "scores": PHOTOS + 2 + 2 + PHOTOS}
    tables = [file for file in healthy.rglob("*.parquet") if "left-" not in str(file)]
    assert (report.files, report.size_bytes) == (len(tables), sum(file.stat().st_size for file in tables))


def test_a_destination_that_was_pruned_is_whole(
    dest: Path, captioned_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of several runs in one, with the fingerprints they came with."""
    monkeypatch.setattr(prune, "_FEW_FILES", 1)
    pipeline.prune(str(dest), options(captioned_bundle), keep_days=0)
    report = check(dest)
    assert (told(report), report.notices, report.runs) == ("", [], 1)
    assert report.rows == 2 * (PHOTOS + 1), "the newest of each photo, of the one that is gone too"


def test_the_command(healthy: Path, dest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(healthy)]) == 0
    assert ": whole; every value of " in capsys.readouterr().out
    assert main(["verify", str(healthy), "--quick", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["whole"], report["problems"], report["quick"]) == (True, [], True)
    files(dest, "scores")[0].unlink()
    assert main(["verify", str(dest)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("broken (missing): scores of run ")
    assert main(["verify", str(dest), "--json"]) == 1
    [problem, *_] = json.loads(capsys.readouterr().out)["problems"]
    assert (problem["kind"], problem["run_id"]) == ("missing", runs(dest)[0])


def test_no_destination_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StorageError, match="no runs here; give the folder or prefix"):
        check(tmp_path)
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("table", ["embeddings", "scores", "manifest"])
def test_a_deleted_file(dest: Path, table: str, quick: bool) -> None:
    files(dest, table)[0].unlink()
    report = check(dest, quick)
    assert kinds(report) >= {Kind.MISSING}
    assert report.problems[0].run_id == runs(dest)[0]
    expected = "has 0 rows for 12 photos" if table == "manifest" else f"{table} of run {runs(dest)[0]} lack"
    assert expected in report.problems[0].message


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("table", ["embeddings", "scores", "manifest"])
@pytest.mark.parametrize("keep", [0.0, 0.99])
def test_a_truncated_file(dest: Path, table: str, keep: float, quick: bool) -> None:
    file = files(dest, table)[0]
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    report = check(dest, quick)
    assert report.problems[0].kind is Kind.UNREADABLE
    assert f"{file} cannot be read" in report.problems[0].message


def test_flipped_bits_in_a_page(dest: Path) -> None:
    """Every column's pages have a checksum, which only a whole read looks at."""
    file = files(dest, "embeddings")[0]
    column = pq.read_metadata(file).row_group(0)
    chunk = next(c for c in map(column.column, range(column.num_columns)) if c.path_in_schema.startswith("measured_"))
    content = bytearray(file.read_bytes())
    content[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 2] ^= 0x10
    file.write_bytes(content)
    report = check(dest)
    assert report.problems[0].kind is Kind.UNREADABLE
    assert str(file) in report.problems[0].message
    assert check(dest, quick=True).whole


def test_a_file_twice(dest: Path) -> None:
    file = files(dest, "scores")[0]
    shutil.copy(file, file.with_name("again.parquet"))
    report = check(dest, quick=True)
    assert report.problems[0].kind is Kind.DOUBLED
    assert f"scores of run {runs(dest)[0]}: 12 photos more than once, like " in report.problems[0].message


def test_rows_of_another_run(dest: Path) -> None:
    shutil.copy(files(dest, "scores", 1)[0], files(dest, "scores", 0)[0].with_name("other.parquet"))
    report = check(dest)
    assert kinds(report) == {Kind.FOREIGN}
    assert "have 2 photos that it does not name" in told(report)


def test_a_table_that_a_rescore_does_not_write(dest: Path) -> None:
    folder = dest / "embeddings" / f"run_id={runs(dest)[3]}"
    folder.mkdir()
    shutil.copy(files(dest, "embeddings")[0], folder)
    assert "a run of kind rescore writes none" in told(check(dest))


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["embeddings", "scores"])
def test_a_lost_row(dest: Path, table: str) -> None:
    file = files(dest, table)[0]
    uri = pq.read_table(file, partitioning=None).column("uri")[0].as_py()
    rewrite(file, lambda rows: rows.slice(1))
    report = check(dest, quick=True)
    assert report.problems[0].kind is Kind.MISSING
    assert f"{table} of run {runs(dest)[0]} lack 1 photos of the manifest, like {uri!r}" in told(report)


def test_an_exchanged_row(dest: Path) -> None:
    rewrite(files(dest, "scores")[0], put("uri", 0, "/elsewhere.jpg"))
    assert "have 1 photos with another uri than the manifest, like '/elsewhere.jpg'" in told(check(dest, quick=True))
    rewrite(files(dest, "scores")[0], put("image_id", 0, "0" * 32))
    assert {Kind.MISSING, Kind.FOREIGN} <= kinds(check(dest, quick=True))


@pytest.mark.parametrize(("table", "column"), [("scores", "scorer_fingerprint"), ("embeddings", "encoder_fingerprint")])
def test_another_fingerprint(dest: Path, table: str, column: str) -> None:
    rewrite(files(dest, table, 1)[0], put(column, 0, "someone's"))
    report = check(dest, quick=True)
    assert kinds(report) == {Kind.FINGERPRINT}
    assert f"{table} of run {runs(dest)[1]}: 1 row with {column} someone's; that of the run is " in told(report)


@pytest.mark.parametrize(
    ("table", "column", "value", "words"),
    [
        ("scores", "quality_score", 11.0, "have a quality_score that is not within 1 and 10"),
        ("scores", "quality_score", float("nan"), "have a quality_score that is not within 1 and 10"),
        ("scores", "quality_score", None, "without an error have no quality_score"),
        ("scores", "attribute_mos", -1.0, "have a attribute_mos that is not within 0 and 100"),
        ("scores", "scene_night", 1.5, "have a scene_night that is not within 0 and 1"),
        ("scores", "scene", "opera", "have a scene of no known name"),
        ("embeddings", "clip_embedding", None, "without an error have no clip_embedding"),
        ("embeddings", "clip_embedding", [np.float16(1)] * 32, "have a clip_embedding that is not of length 1"),
        ("embeddings", "clip_embedding", [np.float16("inf")] * 32, "have a clip_embedding with numbers that are not"),
        ("embeddings", "dinov2_embedding", [np.float16(0)] * 48, "have a dinov2_embedding that is not of length 1"),
    ],
)
def test_values_that_cannot_be(dest: Path, table: str, column: str, value: Any, words: str) -> None:
    file = files(dest, table)[0]
    rewrite(file, put(column, good_row(file), value))
    report = check(dest)
    assert kinds(report) == {Kind.VALUES}
    assert f"{table} of run {runs(dest)[0]}: 1 row {words}" in told(report)
    assert check(dest, quick=True).whole, "which reads no values"


@pytest.mark.parametrize("table", ["scores", "embeddings"])
def test_an_error_beside_values(dest: Path, table: str) -> None:
    file = files(dest, table)[0]
    rewrite(file, put("error_kind", good_row(file), "corrupt"))
    report = check(dest)
    assert "1 row with an error have a " in told(report)
    assert f"scores and embeddings of run {runs(dest)[0]} differ in the error of 1 photos" in told(report)
    assert (Kind.COUNTS in kinds(report)) == (table == "scores"), "the record counts the errors of the scores"


# --- schema -----------------------------------------------------------------------------------------------------------


def test_older_and_newer_versions_may_lack_or_add_columns(dest: Path) -> None:
    file = files(dest, "embeddings")[0]
    rewrite(file, lambda rows: rows.drop_columns(["caption_error", "phash"]))
    rewrite(file, lambda rows: rows.append_column("mood", pa.array(["good"] * len(rows))))
    rewrite(files(dest, "manifest")[0], lambda rows: rows.append_column("why", pa.array(["new"] * len(rows))))
    assert told(check(dest)) == ""


@pytest.mark.parametrize(
    ("table", "change", "words"),
    [
        ("scores", lambda rows: rows.drop_columns(["scorer_fingerprint"]), "no column scorer_fingerprint, in"),
        ("scores", lambda rows: rows.drop_columns(["image_id"]), "no column image_id, in"),
        (
            "scores",
            lambda rows: rows.set_column(5, "quality_score", rows.column("quality_score").cast(pa.float64())),
            "column quality_score is double, not float, in",
        ),
        (
            "scores",
            lambda rows: rows.append_column(pa.field("mood", pa.string(), False), pa.array(["good"] * len(rows))),
            "column mood is unknown to this version, and required, in",
        ),
        (
            "embeddings",
            lambda rows: rows.append_column("run_id", pa.array(["r"] * len(rows))),
            "a column run_id, which is the folder's to say, in",
        ),
        (
            "embeddings",
            lambda rows: rows.set_column(
                rows.schema.get_field_index("clip_embedding"),
                "clip_embedding",
                rows.column("clip_embedding").cast(pa.list_(pa.float32(), 32)),
            ),
            "column clip_embedding is fixed_size_list<element: float>[32], not fixed_size_list",
        ),
    ],
)
def test_another_schema(dest: Path, table: str, change: Callable[[pa.Table], pa.Table], words: str) -> None:
    file = files(dest, table)[0]
    rewrite(file, change)
    for quick in (False, True):
        report = check(dest, quick)
        assert Kind.SCHEMA in kinds(report)
        assert words in told(report)
        assert Kind.UNREADABLE not in kinds(report)


# --- records ----------------------------------------------------------------------------------------------------------


def change_record(dest: Path, run: int, change: Callable[[dict[str, Any]], None]) -> None:
    path = dest / "runs" / runs(dest)[run] / "run.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("content", ["{", "", "[]", "null", "{}"])
def test_a_damaged_record(dest: Path, content: str) -> None:
    run_id = runs(dest)[1]
    (dest / "runs" / run_id / "run.json").write_text(content)
    report = check(dest)
    assert report.problems[0].kind is Kind.RECORD
    assert report.problems[0].run_id == run_id
    assert report.runs == 3


def test_a_record_of_another_run(dest: Path) -> None:
    change_record(dest, 1, lambda record: record.update(run_id="20200101T000000.000Z-000000"))
    assert check(dest).problems[0].message.endswith("run.json is the record of run 20200101T000000.000Z-000000")


def test_counts_of_a_record(dest: Path) -> None:
    change_record(dest, 0, lambda record: record["counts"]["errors_by_kind"].update(timeout=3))
    change_record(dest, 1, lambda record: record["counts"].update(gone=5))
    report = check(dest, quick=True)
    assert kinds(report) == {Kind.COUNTS}
    assert "run.json says 3 timeout, 1 " in told(report) or ", 3 timeout" in told(report)
    assert f"the marks of run {runs(dest)[1]} have 1 photos gone; run.json says 5" in told(report)
    change_record(dest, 2, lambda record: record["counts"].update(to_do=3))
    assert "has 2 rows for 3 photos of its record" in told(check(dest))


def test_lost_and_doubled_marks(dest: Path) -> None:
    file = files(dest, "gone", 1)[0]
    shutil.copy(file, file.with_name("again.parquet"))
    report = check(dest)
    assert kinds(report) == {Kind.DOUBLED, Kind.COUNTS}
    file.with_name("again.parquet").unlink()
    file.unlink()
    assert "have 0 photos gone; run.json says 1" in told(check(dest))


# --- leftovers --------------------------------------------------------------------------------------------------------


def test_a_run_without_its_record_is_a_notice(dest: Path) -> None:
    """It was never committed, as far as anybody can tell; unless other runs stand on it."""
    [*_, last] = runs(dest)
    (dest / "runs" / last / "run.json").unlink()
    report = check(dest)
    assert report.whole
    [notice] = report.notices
    assert (notice.run_id, notice.message) == (last, f"run {last} was not committed: it is at work, or was cut short")
    first = runs(dest)[0]
    (dest / "runs" / first / "run.json").unlink()
    (dest / "runs" / last / "run.json").write_text(json.dumps({"run_id": last, "kind": "rescore"}))
    report = check(dest)
    assert "scores have 9 photos that embeddings have in no committed run" in told(report)


def test_other_leftovers_are_notices(dest: Path) -> None:
    shutil.copytree(dest / "scores" / f"run_id={runs(dest)[0]}", dest / "scores" / "run_id=20190101T000000.000Z-000000")
    shutil.copy(files(dest, "scores")[0], dest / "scores" / "mine.parquet")
    (files(dest, "scores")[0].parent / "x.parquet.ab12.part").write_bytes(b"PAR1")
    (files(dest, "scores")[0].parent / "_SUCCESS").touch()
    (dest / "runs" / runs(dest)[0] / "run.json.ab12.part").write_text("{")
    report = check(dest)
    assert report.whole
    words = [
        "holds 1 files that are in no run's folder",
        "20190101T000000.000Z-000000: there is no run of that id",
        "run.json.ab12.part is an unfinished file",
        "_SUCCESS is no Parquet file",
        "x.parquet.ab12.part is an unfinished file",
    ]
    assert len(report.notices) == len(words)
    for part in words:
        assert sum(part in notice.message for notice in report.notices) == 1, part


def test_storage_that_fails_for_now_is_no_verdict(dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    destination = Destination(dest)
    opened = type(destination.filesystem).open

    def throttled(self: Any, path: str, *args: Any, **keywords: Any) -> Any:
        if path.endswith(".parquet") and "scores" in path:
            raise OSError(16, "Please reduce your request rate")
        return opened(self, path, *args, **keywords)

    monkeypatch.setattr(type(destination.filesystem), "open", throttled)
    with pytest.raises(StorageError, match=r"scores/.*reduce your request rate.*try again"):
        verify(destination)


def test_a_destination_on_s3(healthy: Path, s3_server: S3Server, s3_bucket: str) -> None:
    dest = Destination(f"s3://{s3_bucket}/a b/[1] 50%+", s3_server.storage_options)
    for path in healthy.rglob("*"):
        if path.is_file():
            dest.filesystem.put_file(str(path), f"{dest.root}/{path.relative_to(healthy)}")
    report = verify(dest)
    assert (told(report), report.notices, report.rows) == ("", [], check(healthy).rows)
    [file] = dest.files(dest.table_path("scores", runs(healthy)[3]))
    content = dest.filesystem.cat_file(file)
    dest.filesystem.pipe_file(file, content[: len(content) // 2])
    assert {Kind.UNREADABLE, Kind.MISSING} == kinds(verify(dest, quick=True))
    with pytest.raises(StorageError, match="check the path and the credentials"):
        verify(Destination(f"s3://{s3_bucket}/a b", {**s3_server.storage_options, "secret": "wrong"}))
