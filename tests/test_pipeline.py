"""The whole pipeline on a real local Ray: rows in = rows out, whatever is in the library."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from PIL import Image

from picinspector import pipeline, runs, tables
from picinspector.bundle import seal
from picinspector.cli import main
from picinspector.errors import BundleError, StorageError, TableError, UsageError
from picinspector.manifest import list_library
from picinspector.rank import Ranking, rank
from picinspector.stages.single import judge
from picinspector.storage import StorageOptions
from tests.awkward import Case, make_corpus
from tests.bundles import TINY_CLIP, tiny_bundle, write_clip
from tests.s3_server import S3Server

pytestmark = pytest.mark.usefixtures("local_ray")


def options(bundle: Path, **changes: Any) -> pipeline.Options:
    return pipeline.Options(bundle=str(bundle), show_progress=False, **changes)


def make_library(folder: Path, photos: int, seed: int = 0) -> None:
    """Photos of smoothed noise of assorted sizes, in a nested folder."""
    rng = np.random.default_rng(seed)
    (folder / "nested").mkdir(parents=True)
    for index in range(photos):
        side = int(rng.integers(40, 200))
        pixels = rng.integers(0, 255, (side, side + index % 7, 3), np.uint8)
        Image.fromarray(pixels).resize((160, 120)).save(folder / ("nested" if index % 2 else ".") / f"{index:03}.jpg")


def rows_of(dest: Path, table: str, columns: str = "*") -> list[dict[str, Any]]:
    """Every row of a table, as a user's DuckDB reads it."""
    rows: list[dict[str, Any]] = (
        duckdb.sql(f"SELECT {columns} FROM '{dest}/{table}/**/*.parquet'").to_arrow_table().to_pylist()
    )
    return rows


@dataclass(frozen=True)
class Scored:
    """A library with awkward and broken files in it, and the run that scored it."""

    library: Path
    dest: Path
    cases: list[Case]
    record: dict[str, Any]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, tiny: Path, local_ray: None) -> Scored:
    root = tmp_path_factory.mktemp("scored")
    make_library(root / "library", 60)
    cases = make_corpus(root / "library" / "awkward")
    record = pipeline.score(str(root / "library"), str(root / "dest"), options(tiny))
    return Scored(root / "library", root / "dest", cases, record)


def test_every_row_is_accounted_for(scored: Scored) -> None:
    expected = {uri for table in list_library(str(scored.library)) for uri in table.column("uri").to_pylist()}
    for name in ("embeddings", "scores"):
        rows = rows_of(scored.dest, name, "uri, image_id, error_kind, error_message")
        assert len(rows) == len(expected) == scored.record["counts"]["to_do"]
        assert {row["uri"] for row in rows} == expected
        assert len({row["image_id"] for row in rows}) == len(rows)
        kinds = {row["uri"]: row["error_kind"] for row in rows}
        for case in scored.cases:
            if str(case.path) in kinds:
                assert kinds[str(case.path)] == (None if case.expect == "scored" else case.expect), case.name
    scores = rows_of(scored.dest, "scores")
    assert all((row["quality_score"] is None) == (row["error_kind"] is not None) for row in scores)
    assert all(1 <= row["quality_score"] <= 10 for row in scores if row["error_kind"] is None)
    failed = [row for row in scores if row["error_kind"]]
    counts = scored.record["counts"]
    assert counts["failed"] == len(failed) == sum(counts["errors_by_kind"].values()) > 5
    assert all(row["error_message"] for row in failed)


def test_the_batch_job_and_a_single_photo_agree(scored: Scored, tiny: Path) -> None:
    rows = [row for row in rows_of(scored.dest, "scores") if row["error_kind"] is None]
    for row in rows[::20]:
        alone = judge(row["uri"], str(tiny))
        assert alone["quality_score"] == pytest.approx(row["quality_score"], abs=1e-3)
        assert alone["attributes"]["sharpness"] == pytest.approx(row["attribute_sharpness"], abs=0.05)
        assert alone["scene"] == row["scene"]


def test_rescoring_with_other_encoders_is_refused(scored: Scored, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    tiny_bundle(folder)
    shutil.rmtree(folder / "clip")
    write_clip(folder / "clip", TINY_CLIP, seed=1)
    seal(folder, "other", "1")
    with pytest.raises(UsageError, match="photos were embedded by other encoders"):
        pipeline.rescore(str(scored.dest), options(folder))


@pytest.mark.usefixtures("light_encoder")
def test_night_after_night(tmp_path: Path, tiny: Path) -> None:
    library, dest = tmp_path / "library", tmp_path / "dest"
    make_library(library, 6)
    (library / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    original, stamp = (library / "000.jpg").read_bytes(), (library / "000.jpg").stat().st_mtime_ns
    first = pipeline.score(str(library), str(dest), options(tiny))
    size = sum(path.stat().st_size for path in library.rglob("*.jpg"))
    assert first["counts"] == {
        "listed": 7, "listed_bytes": size, "to_do": 7, "to_do_bytes": size, "new": 7, "changed": 0, "stale": 0,
        "retried": 0, "unmodified": 0, "gone": 0, "returned": 0, "left_for_later": 0, "scored": 6, "failed": 1,
        "failed_transient": 0, "errors_by_kind": {"corrupt": 1}, "captions_by_source": {}, "unread_by_kind": {},
    }  # fmt: skip
    again = pipeline.score(str(library), str(dest), options(tiny))
    assert (again["counts"]["to_do"], again["counts"]["unmodified"]) == (0, 7)

    Image.new("RGB", (90, 90), "red").save(library / "000.jpg")  # changed: its old row is superseded
    Image.new("RGB", (90, 90), "blue").save(library / "new.jpg")
    third = pipeline.score(str(library), str(dest), options(tiny))
    assert (third["counts"]["to_do"], third["counts"]["unmodified"]) == (2, 6)
    latest = tables.Destination(dest).latest("scores", ["uri", "run_id"]).to_pylist()
    assert len(latest) == 8
    by_name = {Path(row["uri"]).name: row["run_id"] for row in latest}
    assert by_name["000.jpg"] == by_name["new.jpg"] == third["run_id"]
    assert by_name["001.jpg"] == first["run_id"]

    # Put back as it was: the newest row of a photo counts, not whether its version was ever seen.
    (library / "000.jpg").write_bytes(original)
    os.utime(library / "000.jpg", ns=(stamp, stamp))
    fourth = pipeline.score(str(library), str(dest), options(tiny))
    assert fourth["counts"]["to_do"] == 1
    rows = [row["run_id"] for row in rows_of(dest, "scores", "uri, run_id") if row["uri"].endswith("/000.jpg")]
    assert sorted(rows) == [first["run_id"], third["run_id"], fourth["run_id"]]
    newest = [
        row["run_id"]
        for row in rank(tables.Destination(dest), Ranking(100)).to_pylist()
        if row["uri"].endswith("/000.jpg")
    ]
    assert newest == [fourth["run_id"]]

    before = {row["uri"]: row["quality_score"] for row in rank(tables.Destination(dest), Ranking(100)).to_pylist()}
    library.rename(tmp_path / "elsewhere")  # rescoring reads no photo
    other = tiny_bundle(tmp_path / "other", scorer_seed=1).folder
    record = pipeline.rescore(str(dest), options(other))
    assert record["counts"]["to_do"] == 8  # the latest row of each photo, not every row ever written
    assert record["counts"]["errors_by_kind"] == first["counts"]["errors_by_kind"]
    after = rank(tables.Destination(dest), Ranking(100)).to_pylist()
    assert {row["uri"] for row in after} == set(before)
    assert {row["run_id"] for row in after} == {record["run_id"]}
    assert any(abs(row["quality_score"] - before[row["uri"]]) > 0.01 for row in after)
    assert pipeline.rescore(str(dest), options(other))["counts"]["to_do"] == 0  # done already

    (tmp_path / "elsewhere").rename(library)
    Image.new("RGB", (90, 90), "red").save(library / "nested" / "late.jpg")
    with pytest.raises(UsageError, match="no photos there"):
        pipeline.plan_score(str(tmp_path / "other"), str(dest), options(other))
    with pytest.raises(UsageError, match="8 photos were scored by another scorer"):
        pipeline.score(str(library), str(dest), options(tiny))  # one ranking, one scorer
    assert pipeline.plan_score(str(library), str(dest), options(other))["to_do"] == 1


@pytest.mark.usefixtures("light_encoder")
def test_what_was_not_committed_is_not_there(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, dest = tmp_path / "library", tmp_path / "dest"
    make_library(library, 4)

    def crash(*_: Any) -> None:
        raise TableError("the disk went away")

    with monkeypatch.context() as patch:
        patch.setattr(tables.Destination, "commit", crash)
        with pytest.raises(TableError):
            pipeline.score(str(library), str(dest), options(tiny))
    assert len(rows_of(dest, "scores")) == 4  # its files lie there ...
    with pytest.raises(UsageError, match="no committed scores"):  # ... and readers do not honour them
        rank(tables.Destination(str(dest)), Ranking(5)).to_pylist()
    record = pipeline.score(str(library), str(dest), options(tiny))
    assert record["counts"]["to_do"] == 4
    assert len(rank(tables.Destination(str(dest)), Ranking(50)).to_pylist()) == 4


@pytest.mark.usefixtures("light_encoder")
def test_dry_run_and_limit(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library, dest = tmp_path / "library", tmp_path / "dest"
    make_library(library, 5)
    size = sum(path.stat().st_size for path in library.rglob("*.jpg"))
    arguments = ["score", str(library), "--out", str(dest), "--bundle", str(tiny), "--json", "-q"]
    assert main([*arguments, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["listed"], plan["to_do"], plan["to_do_bytes"]) == (5, 5, size)
    assert not dest.exists()
    assert main([*arguments, "--limit", "2"]) == 0
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert (counts["scored"], counts["unmodified"], counts["listed"]) == (2, 0, 5)
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["scored"] == 3


@pytest.mark.usefixtures("light_encoder")
def test_transient_failures_are_named_and_tried_again(tmp_path: Path, tiny: Path) -> None:
    # A port nobody listens on: refused connections are transient, a file that is not there is not.
    (tmp_path / "list.csv").write_text("uri\nhttp://127.0.0.1:9/a.jpg\nmissing.jpg\n")
    dest = tmp_path / "dest"
    record = pipeline.score(str(tmp_path / "list.csv"), str(dest), options(tiny))
    assert record["counts"]["errors_by_kind"] == {"connection": 1, "not_found": 1}
    assert (runs.exit_code(record), record["outcome"]) == (3, "transient_failures")
    again = pipeline.score(str(tmp_path / "list.csv"), str(dest), options(tiny))
    assert again["counts"]["to_do"] == again["counts"]["retried"] == 1  # that may pass
    assert again["counts"]["errors_by_kind"] == {"connection": 1}
    every = pipeline.score(str(tmp_path / "list.csv"), str(dest), options(tiny, retry_failed="all"))
    assert every["counts"]["errors_by_kind"] == {"connection": 1, "not_found": 1}
    assert pipeline.plan_score(str(tmp_path / "list.csv"), str(dest), options(tiny, retry_failed="none"))["to_do"] == 0


def test_against_s3(scored: Scored, tiny: Path, s3_server: S3Server, s3_bucket: str) -> None:
    client: Any = s3_server.client()
    for path in scored.library.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), s3_bucket, f"photos/{path.relative_to(scored.library)}")
    chosen = options(tiny, storage_options=s3_server.storage_options)
    url = f"s3://{s3_bucket}/out/scores-of-2026"
    record = pipeline.score(f"s3://{s3_bucket}/photos", url, chosen)
    assert record["counts"] == scored.record["counts"]

    mine = {
        row["uri"].removeprefix(f"s3://{s3_bucket}/photos/"): row["quality_score"]
        for row in rank(tables.Destination(url, s3_server.storage_options), Ranking(1000)).to_pylist()
    }
    theirs = {
        str(Path(row["uri"]).relative_to(scored.library)): row["quality_score"]
        for row in rank(tables.Destination(scored.dest), Ranking(1000)).to_pylist()
    }
    assert mine == pytest.approx(theirs, abs=1e-3)
    again = pipeline.plan_score(f"s3://{s3_bucket}/photos/", url, chosen)
    assert again["to_do"] == 0
    keys = [item["Key"] for item in client.list_objects_v2(Bucket=s3_bucket, Prefix="out/")["Contents"]]
    secret = str(s3_server.storage_options["secret"])
    for key in keys:
        assert secret.encode() not in client.get_object(Bucket=s3_bucket, Key=key)["Body"].read(), key


@pytest.mark.usefixtures("light_encoder")
def test_an_interrupted_run_is_finished_by_the_same_command(tmp_path: Path, tiny: Path) -> None:
    library, dest = tmp_path / "library", tmp_path / "dest"
    make_library(library, 30)
    command = [sys.executable, "-m", "picinspector", "score", str(library), "--out", str(dest), "--bundle", str(tiny)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen([*command, "-q"], env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and not list(dest.glob("runs/*/plan.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(5)  # into Ray's start, or the work itself
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted; nothing is lost" in errors
    with pytest.raises(UsageError, match="no committed scores"):
        rank(tables.Destination(dest), Ranking(5)).to_pylist()
    [planned] = tables.Destination(dest).uncommitted()
    record = pipeline.score(str(library), str(dest), options(tiny))
    assert (record["run_id"], record["times_resumed"], record["counts"]["scored"]) == (planned, 1, 30)
    assert len(rank(tables.Destination(dest), Ranking(100)).to_pylist()) == 30


def test_secrets_stay_out_of_rays_metadata() -> None:
    from ray.data._internal.metadata_exporter import sanitize_for_struct

    hidden = StorageOptions({"key": "AKIA123", "secret": "SEKRET-123456"})
    chosen = options(Path("bundle"), storage_options={"secret": "SEKRET-123456"})
    shown = f"{sanitize_for_struct({'storage_options': hidden})} {hidden!r} {chosen!r}"
    assert "SEKRET" not in shown
    assert hidden.reveal()["secret"] == "SEKRET-123456"


def test_mistakes_are_told_in_one_line(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    out = ["--out", str(tmp_path / "dest"), "-q", "--bundle", str(tiny)]
    nobody = '{"anon": true, "endpoint_url": "http://127.0.0.1:9"}'
    for arguments, words in (
        (["score", str(tmp_path / "nowhere"), *out], "cannot list"),
        (["score", str(tmp_path / "empty"), *out], "no photos there"),
        (["score", str(tmp_path / "empty"), *out[:-1], "nothing"], "no bundle at"),
        (["score", str(tmp_path / "empty"), *out, "--storage-options", "{"], "not JSON"),
        (["score", "s3://x/y", *out, "--storage-options", nobody], "cannot list"),
        (["score", "no-such-protocol://x", *out], "cannot open"),
        (["score", str(tmp_path / "empty"), *out[2:], "--out", "/proc/nothing"], "cannot write"),
        (["top", str(tmp_path / "dest")], "no committed scores"),
        (["rescore", str(tmp_path / "dest"), *out[3:]], "no committed embeddings"),
    ):  # fmt: skip
        assert main(arguments) == 2, arguments
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1, lines
        assert words in lines[0]


def test_a_bundle_that_breaks_on_a_worker_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / "library"
    make_library(library, 2)
    bundle = tiny_bundle(tmp_path / "bundle").folder
    weights = bundle / "dinov2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert main(["score", str(library), "--out", str(tmp_path / "dest"), "--bundle", str(bundle), "-q"]) == 2
    assert "model.safetensors is damaged" in capsys.readouterr().err
    with pytest.raises(BundleError):
        pipeline.score(str(library), str(tmp_path / "dest"), options(bundle))


def test_interruption_has_its_own_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "score", interrupt)
    assert main(["score", str(tmp_path), "--out", str(tmp_path / "dest")]) == 130


def test_a_crash_has_its_own_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def crash(*_: Any) -> None:
        raise RuntimeError("boom\nand more")

    monkeypatch.setattr(pipeline, "score", crash)
    assert main(["score", str(tmp_path), "--out", str(tmp_path / "dest")]) == 1


def test_unwritable_destination(tmp_path: Path, tiny: Path) -> None:
    make_library(tmp_path / "library", 1)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        pipeline.score(str(tmp_path / "library"), str(tmp_path / "file"), options(tiny))
