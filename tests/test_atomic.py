"""Local files appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from picinspector.atomic import WholeFileSystem

TABLE = pa.table({"number": list(range(1000))})


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_file_is_there_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with WholeFileSystem().open(str(path), "wb") as file:
        file.write(b"{")
        assert not path.exists()
        file.write(b"}")
    assert path.read_bytes() == b"{}"
    assert names(tmp_path) == ["a.json"]


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), WholeFileSystem().open(str(path), "wb") as file:
        file.write(b"ne")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.json"]


def test_pyarrow_writes_whole_files_through_it(tmp_path: Path) -> None:
    pa.dataset.write_dataset(TABLE, str(tmp_path / "t"), format="parquet", filesystem=WholeFileSystem())
    [path] = (tmp_path / "t").iterdir()
    assert pq.read_table(path).equals(TABLE)

    def break_off() -> object:
        yield TABLE.to_batches()[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pa.dataset.write_dataset(
            break_off(), str(tmp_path / "u"), schema=TABLE.schema, format="parquet", filesystem=WholeFileSystem()
        )
    assert not [path for path in (tmp_path / "u").rglob("*") if path.is_file()]


def test_a_writer_that_is_killed_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    program = (
        "import os, sys; from picinspector.atomic import WholeFileSystem\n"
        "file = WholeFileSystem().open(sys.argv[1], 'wb'); file.write(b'x' * 100_000); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.parquet")], check=False).returncode == -9
    [left] = names(tmp_path)
    assert left.startswith("a.parquet.") and left.endswith(".part")


def test_a_full_disk_is_an_error_and_no_file(tmp_path: Path) -> None:
    """On a file system of 256 kB of its own, which takes the rights of root, as the tests' services do."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=True)
    try:
        big = pa.table({"bytes": [os.urandom(1000) for _ in range(2000)]})
        with pytest.raises(OSError, match="No space left on device"):
            pa.dataset.write_dataset(big, str(disk / "t"), format="parquet", filesystem=WholeFileSystem())
        assert list((disk / "t").glob("*.parquet")) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
