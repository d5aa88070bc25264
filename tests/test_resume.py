"""Drivers killed at random moments, again and again: no row is lost or doubled, nothing written is done again."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from picinspector import chains, pipeline
from picinspector.errors import StorageError, UsageError
from picinspector.ledger import check_rows, left
from picinspector.stages import encode
from picinspector.tables import Destination
from tests import light_encoder

pytestmark = pytest.mark.usefixtures("local_ray", "light_encoder")

PHOTOS, ROWS_PER_FILE, KILLS = 96, 8, 20


def make_library(folder: Path, photos: int) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for index in range(photos):
        Image.fromarray(rng.integers(0, 255, (60, 80 + index % 5, 3), np.uint8)).save(folder / f"{index:03}.png")


def drive(library: str, dest: str, bundle: str, address: str) -> None:
    """A driver of its own, in a process of its own: small files, so that there is much to be cut short."""
    chains._ROWS_PER_FILE_ON_CPU = chains._SCORED_ROWS_PER_FILE = ROWS_PER_FILE
    encode.Encode = light_encoder.Encode  # type: ignore[assignment,misc]
    options = pipeline.Options(bundle=bundle, address=address, batch_size=ROWS_PER_FILE, show_progress=False)
    pipeline.score(library, dest, options)


def written(dest: Destination) -> dict[str, tuple[int, int]]:
    """Files of tables that are whole, with what changes when a file is written again, and their rows."""
    files = (path for table in ("embeddings", "scores") for path in Path(dest.root, table).rglob("*.parquet"))
    return {str(path): (path.stat().st_mtime_ns, pq.read_metadata(path).num_rows) for path in files}


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that have imported what a driver imports: a kill every few seconds would only hit imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_resume"])
    return context


def test_twenty_kills(tmp_path: Path, tiny: Path, processes: Any) -> None:
    """Each at a moment of its own: while it starts, lists or plans, or some files later; most hit a resumed run."""
    library, dest, dice = tmp_path / "library", Destination(tmp_path / "dest"), random.Random(0)
    make_library(library, PHOTOS)
    address = ray.get_runtime_context().gcs_address
    kills = hits = finished = 0
    while kills < KILLS:
        before = written(dest)
        driver = processes.Process(target=drive, args=(str(library), dest.root, str(tiny), address))
        driver.start()
        more = dice.choice([0, 0, 1, 1, 2, 4])
        deadline = time.monotonic() + 60
        while len(written(dest)) < len(before) + more and driver.exitcode is None and time.monotonic() < deadline:
            time.sleep(0.01)
        driver.join(dice.uniform(0.0, 0.5 if more else 5.0))
        if driver.exitcode is None:
            os.kill(driver.pid, signal.SIGKILL)
            driver.join(30)
            kills += 1
            hits += bool(before)
        else:
            assert driver.exitcode == 0
        if dest.runs():  # it was whole first: the turn of a fresh destination
            check_whole(dest)
            finished += 1
            dest = Destination(tmp_path / f"dest{finished}")
        else:
            assert before.items() <= written(dest).items()  # nothing that was written is written again
    assert hits >= KILLS // 4  # measured: 8
    record = pipeline.score(str(library), dest.root, pipeline.Options(bundle=str(tiny), show_progress=False))
    found = record.get("found_written", {})
    assert record["stages"].get("encode", {"rows": 0})["rows"] == PHOTOS - found.get("embeddings", 0)
    check_whole(dest)


def check_whole(dest: Destination) -> None:
    record = dest.runs()[0]
    assert (record["counts"]["to_do"], record["counts"]["scored"]) == (PHOTOS, PHOTOS)
    for table in ("embeddings", "scores"):
        check_rows(dest, table, record["run_id"], PHOTOS)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cut_short(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> tuple[Path, Path, str]:
    """A library, a whole destination of small files, and the id of its run, to be broken in copies."""
    root = tmp_path_factory.mktemp("cut_short")
    make_library(root / "library", 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chains, "_ROWS_PER_FILE_ON_CPU", ROWS_PER_FILE)
        patch.setattr(chains, "_SCORED_ROWS_PER_FILE", ROWS_PER_FILE)
        patch.setattr(encode, "Encode", light_encoder.Encode)
        options = pipeline.Options(bundle=str(tiny), batch_size=ROWS_PER_FILE, show_progress=False)
        record = pipeline.score(str(root / "library"), str(root / "dest"), options)
    assert len(Destination(root / "dest").files_of("embeddings", [record["run_id"]])) == 3
    return root / "library", root / "dest", record["run_id"]


def undo(cut_short: tuple[Path, Path, str], tmp_path: Path) -> tuple[Destination, list[str]]:
    """A copy that is not committed, and its files of embeddings."""
    shutil.copytree(cut_short[1], tmp_path / "dest")
    dest = Destination(tmp_path / "dest")
    os.unlink(f"{dest.run_path(cut_short[2])}/run.json")  # noqa: PTH108
    return dest, dest.files_of("embeddings", [cut_short[2]])


def test_what_is_left_after_damage(cut_short: tuple[Path, Path, str], tmp_path: Path) -> None:
    """A truncated file, a stray part of one, and rows that two files have are put right; the rest stays."""
    dest, files = undo(cut_short, tmp_path)
    run_id = cut_short[2]
    assert left(dest, "embeddings", run_id)[1] == 0
    Path(files[0]).write_bytes(Path(files[0]).read_bytes()[:-100])  # of a store that does not publish whole files
    Path(f"{files[1]}.0123.part").write_bytes(b"PAR1")
    shards, rows = left(dest, "embeddings", run_id)
    assert rows == ROWS_PER_FILE == sum(dest.rows_in(shards))
    assert dest.files_of("embeddings", [run_id]) == files[1:]
    assert not list(Path(dest.root).rglob("*.part"))
    # A worker that outlived its driver wrote rows that the new driver had done already.
    twin = Path(files[1]).with_name("twin.parquet")
    twin.write_bytes(Path(files[1]).read_bytes())
    assert left(dest, "embeddings", run_id)[1] == ROWS_PER_FILE
    assert dest.files_of("embeddings", [run_id]) == files[1:]
    both = pa.concat_tables([pq.read_table(file, partitioning=None).slice(0, 2) for file in files[1:]])
    pq.write_table(both, twin)  # of rows of several files
    assert left(dest, "embeddings", run_id)[1] == ROWS_PER_FILE
    assert dest.files_of("embeddings", [run_id]) == files[1:]


def test_only_what_is_missing_is_done(
    cut_short: tuple[Path, Path, str], tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, _, run_id = cut_short
    dest, files = undo(cut_short, tmp_path)
    os.unlink(files[1])  # noqa: PTH108
    [scores] = dest.files_of("scores", [run_id])
    pq.write_table(pq.read_table(scores, partitioning=None).slice(8), scores)
    kept = {file: os.stat(file).st_mtime_ns for file in files if file != files[1]}  # noqa: PTH116
    options = pipeline.Options(bundle=str(tiny), show_progress=False)
    record = pipeline.score(str(library), dest.root, options)
    assert record["run_id"] == run_id
    assert record["found_written"] == {"embeddings": 16, "scores": 16}
    assert (record["stages"]["encode"]["rows"], record["stages"]["score"]["rows"]) == (8, 8)
    assert {file: os.stat(file).st_mtime_ns for file in kept} == kept  # noqa: PTH116
    for table in ("embeddings", "scores"):
        check_rows(dest, table, run_id, 24)  # type: ignore[arg-type]


def test_another_command_leaves_it_alone(cut_short: tuple[Path, Path, str], tmp_path: Path, tiny: Path) -> None:
    library, _, run_id = cut_short
    dest, _ = undo(cut_short, tmp_path)
    options = pipeline.Options(bundle=str(tiny), limit=5, show_progress=False)
    record = pipeline.score(str(library), dest.root, options)
    assert (record["run_id"] > run_id, record["counts"]["to_do"]) == (True, 5)
    again = pipeline.score(str(library), dest.root, pipeline.Options(bundle=str(tiny), show_progress=False))
    assert again["counts"]["to_do"] == 19  # the one that was cut short is out of date, and is not taken up again
    assert run_id in dest.uncommitted()


def test_two_at_once(tmp_path: Path, cut_short: tuple[Path, Path, str], tiny: Path, processes: Any) -> None:
    library, _, _ = cut_short
    address = ray.get_runtime_context().gcs_address
    driver = processes.Process(target=drive, args=(str(library), str(tmp_path / "dest"), str(tiny), address))
    driver.start()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "dest").glob("runs/*/plan.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(UsageError, match="another run is at work there"):
        pipeline.score(str(library), str(tmp_path / "dest"), pipeline.Options(bundle=str(tiny), show_progress=False))
    driver.join(120)
    assert driver.exitcode == 0
    assert Destination(tmp_path / "dest").runs()[0]["counts"]["scored"] == 24


def test_a_full_disk_is_told_and_what_is_written_stays(
    tmp_path: Path, cut_short: tuple[Path, Path, str], tiny: Path
) -> None:
    """On a file system of its own, first too small for the tables, then made larger."""
    library, disk = cut_short[0], tmp_path / "disk"
    disk.mkdir()
    options = pipeline.Options(bundle=str(tiny), batch_size=ROWS_PER_FILE, show_progress=False)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)], check=True)
    try:
        with pytest.raises(StorageError, match="make room there and run the same command again"):
            pipeline.score(str(library), str(disk / "dest"), options)
        assert Destination(disk / "dest").runs() == []
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        record = pipeline.score(str(library), str(disk / "dest"), options)
        assert (record["times_resumed"], record["counts"]["scored"]) == (1, 24)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
