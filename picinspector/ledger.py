"""Rows in = rows out: what a run has written of its manifest, what is left, and that nothing is lost or doubled."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

from picinspector.atomic import PART_SUFFIX
from picinspector.errors import TableError
from picinspector.tables import Destination, TableName, database

_SHARD_ROWS = 100_000


def check_manifest(dest: Destination, run_id: str, expected: int) -> None:
    """Assert that a run's manifest names each image once.

    Raises:
        TableError: it does not.
    """
    _check(f"the manifest of run {run_id}", dest.scan_manifest(run_id), expected)


def check_rows(dest: Destination, table: TableName, run_id: str, expected: int) -> None:
    """Assert that a run's table holds exactly the images of its manifest, each once.

    Raises:
        TableError: rows were lost or doubled.
    """
    _check(f"{table} of run {run_id}", dest.scan(table, [run_id], ["image_id"]), expected)
    if not expected:
        return
    with database(source=dest.scan(table, [run_id], ["image_id"]), manifest=dest.scan_manifest(run_id)) as connection:
        lost = connection.sql("SELECT count(*) FROM manifest ANTI JOIN source USING (image_id)").fetchall()[0][0]
    if lost:
        raise TableError(f"{table} of run {run_id} lacks {lost} photos of its manifest; run the same command again")


def _check(what: str, source: pa.dataset.Scanner | None, expected: int) -> None:
    rows = distinct = 0
    if source is not None:
        with database(source=source) as connection:
            count = "SELECT count(*), count(DISTINCT image_id) FROM source"
            rows, distinct = connection.sql(count).fetchall()[0]
    if not rows == distinct == expected:
        raise TableError(
            f"{what} has {rows} rows, {distinct} distinct, for {expected} photos; the run was not committed: "
            "run the same command again, and report this if it repeats"
        )


def sources(dest: Destination, run_id: str, column: str) -> set[str]:
    """The runs whose rows a run's manifest names in a column."""
    with database(manifest=dest.scan_manifest(run_id, [column])) as connection:
        return {str(row[0]) for row in connection.execute(f"SELECT DISTINCT {column} FROM manifest").fetchall()}


def left(dest: Destination, table: TableName, run_id: str) -> tuple[list[str], int]:
    """What a run has still to write of a table, after a crash or from the start.

    Files that are damaged are removed; of those with rows in common, which a worker that outlived its driver leaves,
    all but the oldest. What is not in another is done again.

    Returns:
        Parquet files with the rows of the manifest that are not written yet, and how many they are.
    """
    manifest = dest.files(dest.manifest_path(run_id))
    if not _mend(dest, table, run_id):
        return manifest, sum(dest.rows_in(manifest))
    folder = f"{dest.run_path(run_id)}/left-{table}"
    dest.delete(folder)  # of an earlier attempt
    files, rows = [], 0
    for number, shard in enumerate(_missing(dest, table, run_id)):
        files.append(f"{folder}/shard-{number:06d}.parquet")
        dest.write_parquet(files[-1], shard)
        rows += shard.num_rows
    return files, rows


def _missing(dest: Destination, table: TableName, run_id: str) -> Iterator[pa.Table]:
    files = dest.files(dest.manifest_path(run_id))
    manifest = pa.dataset.dataset(files, filesystem=dest.filesystem, format="parquet")
    written = dest.scan(table, [run_id], ["image_id"])
    with database(manifest=manifest, written=written) as connection:
        rows = connection.sql("SELECT manifest.* FROM manifest ANTI JOIN written USING (image_id)")
        for batch in rows.to_arrow_reader(_SHARD_ROWS):
            yield pa.Table.from_batches([batch]).cast(manifest.schema)


def _mend(dest: Destination, table: TableName, run_id: str) -> bool:
    """Remove the files of an uncommitted run that cannot stay; True if any are left."""
    folder = dest.table_path(table, run_id)
    for path in dest.listed(folder):
        if path.endswith(PART_SUFFIX):
            dest.delete(path)
    for file in dest.damaged(dest.files(folder)):
        dest.delete(file)
    files = dest.files(folder)
    if not files:
        return False
    spare = _spare(dest, files)
    for file in spare:
        dest.delete(file)
    return len(spare) < len(files)


def _spare(dest: Destination, files: list[str]) -> set[str]:
    """Of files with rows in common all but the oldest."""
    dataset = pa.dataset.dataset(files, filesystem=dest.filesystem, format="parquet")
    with database(source=dataset.scanner(columns=["image_id", "__filename"])) as connection:
        groups = connection.sql(
            "SELECT DISTINCT files FROM (SELECT list_sort(list(__filename)) AS files FROM source "
            "GROUP BY image_id HAVING count(*) > 1)"
        ).fetchall()
    written = {file: dest.filesystem.modified(file) for (group,) in groups for file in group}
    spare: set[str] = set()
    for file in sorted(written, key=lambda file: written[file], reverse=True):  # the newest goes first
        if any(file in group and len({*group} - spare) > 1 for (group,) in groups):
            spare.add(file)
    return spare
