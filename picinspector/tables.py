"""The destination: where tables and run records lie, which runs are committed, and the latest row of each photo.

::

    <dest>/runs/<run_id>/run.json            written last: the commit
    <dest>/runs/<run_id>/manifest/*.parquet  what the run had to do
    <dest>/embeddings/run_id=<run_id>/*.parquet
    <dest>/scores/run_id=<run_id>/*.parquet
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import duckdb
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

from picinspector import schema
from picinspector.errors import StorageError, TableError, UsageError
from picinspector.storage import is_local, open_filesystem, redact, to_photo_error

TableName = Literal["embeddings", "scores"]

_BY_RUN = pa.dataset.partitioning(pa.schema([("run_id", pa.string())]), flavor="hive")


def new_run_id() -> str:
    """A run id that sorts by time: `20261122T160512.031Z-3f9a1c`."""
    now = datetime.now(UTC)
    return f"{now:%Y%m%dT%H%M%S}.{now.microsecond // 1000:03}Z-{secrets.token_hex(3)}"


class Destination:
    """A prefix or folder that holds the tables of one library.

    Attributes:
        url: as given, without secrets, absolute; for messages and records.
        filesystem: the fsspec filesystem it is on.
        root: its path on that filesystem.
    """

    def __init__(self, url: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> None:
        self.filesystem, root = open_filesystem(url, options)
        self.root = root.rstrip("/")
        self._local = is_local(os.fspath(url))
        self.url = self.root if self._local else redact(os.fspath(url))

    def table_path(self, table: TableName, run_id: str) -> str:
        """Folder of one run's rows of a table."""
        return f"{self.root}/{table}/run_id={run_id}"

    def manifest_path(self, run_id: str) -> str:
        """Folder of one run's manifest."""
        return f"{self.root}/runs/{run_id}/manifest"

    def check_writable(self) -> None:
        """Write a small file, always the same one: the right to delete is not needed.

        Raises:
            StorageError: that failed.
        """
        try:
            self._make_folder(f"{self.root}/runs")
            self.filesystem.pipe_file(f"{self.root}/runs/.writable", b"picinspector")
        except Exception as error:  # any storage library's own type; all mean the same to the user
            reason = to_photo_error(error).message
            raise StorageError(f"cannot write to {self.url}: {reason}; check the path and the credentials") from error

    def _make_folder(self, path: str) -> None:
        if self._local:  # object stores have no folders, and would make a bucket of a misspelt name
            self.filesystem.makedirs(path, exist_ok=True)

    # --- runs ---------------------------------------------------------------------------------------------------------

    def commit(self, record: Mapping[str, Any]) -> None:
        """Write the run record: from now on readers honour the run."""
        path = f"{self.root}/runs/{record['run_id']}/run.json"
        content = json.dumps(record, indent=2, default=str).encode()
        self._make_folder(os.path.dirname(path))  # noqa: PTH120
        if self._local:
            # A rename is atomic; object stores publish whole objects by themselves.
            self.filesystem.pipe_file(f"{path}.tmp", content)
            self.filesystem.mv(f"{path}.tmp", path)
        else:
            self.filesystem.pipe_file(path, content)

    def runs(self) -> list[dict[str, Any]]:
        """Run records of all committed runs, oldest first."""
        paths = [f"{folder}/run.json" for folder in self._list(f"{self.root}/runs")]
        with ThreadPoolExecutor(16) as pool:
            records = [record for record in pool.map(self._read_record, paths) if record is not None]
        return sorted(records, key=lambda record: record["run_id"])

    def _read_record(self, path: str) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = json.loads(self.filesystem.cat_file(path))
            return record
        except (FileNotFoundError, NotADirectoryError):
            return None  # never committed
        except ValueError as error:
            advice = "remove that run's folder, or restore the file"
            raise StorageError(f"{redact(path)} is damaged: {error}; {advice}") from error
        except Exception as error:  # taken for uncommitted, it would have a whole library scored again
            reason = to_photo_error(error).message
            raise StorageError(f"cannot read {redact(path)}: {reason}; run the same command again") from error

    # --- tables -------------------------------------------------------------------------------------------------------

    def write_manifest(self, run_id: str, tables: Iterable[pa.Table]) -> int:
        """Write the manifest shards of a run; returns the number of rows."""
        folder, rows = self.manifest_path(run_id), 0
        for index, table in enumerate(tables):
            self._make_folder(folder)  # not before there is something to do: a mistake leaves no folder behind
            with self.filesystem.open(f"{folder}/shard-{index:06d}.parquet", "wb") as file:
                pa.parquet.write_table(table, file)
            rows += table.num_rows
        return rows

    def files(self, folder: str) -> list[str]:
        """Parquet files below a folder, sorted; none if it is not there."""
        return sorted(path for path in self._list(folder) if path.endswith(".parquet"))

    def _list(self, folder: str) -> list[str]:
        # Other processes write here: a cached listing would show yesterday's runs. No glob: a path may hold `[` or `*`.
        self.filesystem.invalidate_cache()
        try:
            paths: list[str] = self.filesystem.ls(folder, detail=False)
        except FileNotFoundError:
            return []
        return [path.rstrip("/") for path in paths]

    def scan(self, table: TableName, run_ids: Sequence[str], columns: Sequence[str]) -> pa.dataset.Scanner | None:
        """Columns of one table's rows of these runs, streamed; None where they wrote no file of it.

        `run_id` may be among the columns. Register it with DuckDB, which cannot take the float16 of the others.
        """
        files = [file for run_id in run_ids for file in self.files(self.table_path(table, run_id))]
        if not files:
            return None
        dataset = pa.dataset.dataset(
            files,
            schema=self._fields(files, columns),
            filesystem=self.filesystem,
            format="parquet",
            partitioning=_BY_RUN,
            partition_base_dir=self.root,
        )
        return dataset.scanner(columns=list(columns))

    def _fields(self, files: Sequence[str], columns: Sequence[str]) -> pa.Schema:
        """The fields of the newest file, and columns only older ones have; rows of files without one are null there.

        Raises:
            UsageError: no file has one of them.
        """
        fields = {field.name: field for field in (*self._schema(files[-1]), pa.field("run_id", pa.string()))}
        for file in reversed(files[:-1]):
            if fields.keys() >= set(columns):
                break
            found = self._schema(file)
            fields |= {name: found.field(name) for name in columns if name not in fields and name in found.names}
        if missing := sorted(set(columns) - fields.keys()):
            raise UsageError(f"{self.url}: an older version wrote these tables, without {missing[0]}: score them again")
        return pa.schema(list(fields.values()))

    def _schema(self, file: str) -> pa.Schema:
        with self.filesystem.open(file, "rb") as opened:
            return pa.parquet.read_schema(opened)

    def latest(self, table: TableName, columns: Sequence[str]) -> pa.Table:
        """The newest committed row of each photo.

        Args:
            table: which table.
            columns: what to read of it; `uri` and `run_id` need not be among them.

        Raises:
            UsageError: no committed run has written this table here.
        """
        wanted = [*dict.fromkeys([*columns, "uri", "run_id"])]
        source = self.scan(table, [record["run_id"] for record in self.runs()], wanted)
        if source is None:
            raise UsageError(f"{self.url}: no committed {table} here; run `picinspector score` into it first")
        names = ", ".join(f'"{name}"' for name in columns)
        with duckdb.connect() as connection:
            connection.register("source", source)
            rows = connection.sql(
                f"SELECT {names} FROM source QUALIFY row_number() OVER (PARTITION BY uri ORDER BY run_id DESC) = 1"
            )
            return rows.to_arrow_table()

    def has(self, table: TableName) -> bool:
        """True if a committed run has written this table here."""
        return any(self.files(self.table_path(table, record["run_id"])) for record in self.runs())

    def runs_of_one_schema(self, run_ids: Sequence[str]) -> list[tuple[pa.Schema, list[str]]]:
        """These runs in groups with one schema of embeddings each, which is what one reader takes.

        Encoders differ in width, and older versions wrote fewer columns.
        """
        groups: dict[pa.Schema, list[str]] = {}
        for run_id in run_ids:
            found = self._schema(self.files(self.table_path("embeddings", run_id))[0]).remove_metadata()
            groups.setdefault(found, []).append(run_id)
        return list(groups.items())

    def tally(self, table: TableName, column: str, run_id: str) -> dict[str, int]:
        """How many photos of a run have which value in a column of a table, most first; nulls are not counted."""
        source = self.scan(table, [run_id], [column])
        if source is None:
            return {}
        with duckdb.connect() as connection:
            connection.register("source", source)
            rows = connection.sql(
                f"SELECT {column}, count(*) FROM source WHERE {column} IS NOT NULL GROUP BY 1 ORDER BY 2 DESC, 1"
            ).fetchall()
        return {str(value): int(count) for value, count in rows}

    def check_manifest(self, run_id: str, expected: int) -> None:
        """Assert that a run's manifest names each image once.

        Raises:
            TableError: it does not.
        """
        self._check_rows(f"the manifest of run {run_id}", self._scan(self.manifest_path(run_id)), expected)

    def check_rows(self, table: TableName, run_id: str, expected: int) -> None:
        """Assert that a run's table holds exactly the images of its manifest, each once.

        Raises:
            TableError: rows were lost or doubled.
        """
        self._check_rows(f"{table} of run {run_id}", self.scan(table, [run_id], ["image_id"]), expected)
        if not expected:
            return
        with duckdb.connect() as connection:
            connection.register("source", self.scan(table, [run_id], ["image_id"]))
            connection.register("manifest", self._scan(self.manifest_path(run_id)))
            lost = connection.sql("SELECT count(*) FROM manifest ANTI JOIN source USING (image_id)").fetchall()[0][0]
        if lost:
            raise TableError(f"{table} of run {run_id} lacks {lost} photos of its manifest; run the same command again")

    def _scan(self, folder: str) -> pa.dataset.Scanner | None:
        files = self.files(folder)
        if not files:
            return None
        return pa.dataset.dataset(files, filesystem=self.filesystem, format="parquet").scanner(columns=["image_id"])

    def _check_rows(self, what: str, source: pa.dataset.Scanner | None, expected: int) -> None:
        rows = distinct = 0
        if source is not None:
            with duckdb.connect() as connection:
                connection.register("source", source)
                count = "SELECT count(*), count(DISTINCT image_id) FROM source"
                rows, distinct = connection.sql(count).fetchall()[0]
        if not rows == distinct == expected:
            raise TableError(
                f"{what} has {rows} rows, {distinct} distinct, for {expected} photos; the run was not committed: "
                "run the same command again, and report this if it repeats"
            )


@dataclass(frozen=True, slots=True)
class Choice:
    """Which scored photos; all of them where nothing is given.

    Attributes:
        best, worst: so many with the highest, or lowest, `quality_score`.
        where: an SQL condition over the columns of the scores table, in DuckDB's dialect; best and worst are of those.
    """

    best: int | None = None
    worst: int | None = None
    where: str | None = None


def choose(dest: Destination, choice: Choice, columns: Sequence[str] = tuple(schema.SCORES.names)) -> pa.Table:
    """Columns of the newest committed scores row of each photo chosen, best first (with `worst`: worst first).

    Photos without a score are left out.

    Raises:
        UsageError: best and worst were both given, the condition is no SQL over this table, or nothing is scored here.
    """
    if choice.best is not None and choice.worst is not None:
        raise UsageError("give best or worst, not both")
    if choice.where is not None and not choice.where.strip():
        raise UsageError("--where is empty; leave it out, or write it like \"scene = 'night' AND quality_score < 4\"")
    latest = dest.latest("scores", schema.SCORES.names)
    count = choice.best if choice.best is not None else choice.worst
    with duckdb.connect(config={"enable_external_access": False}) as connection:  # of the user: this table, no files
        connection.register("latest", latest)
        rows = connection.table("latest").filter("quality_score IS NOT NULL")
        try:
            if choice.where is not None:
                rows = rows.filter(choice.where)  # one expression, or it is refused
            rows = rows.order("quality_score" + (" ASC, uri" if choice.worst is not None else " DESC, uri"))
            rows = rows.limit(count) if count is not None else rows
            return rows.project(", ".join(f'"{name}"' for name in columns)).to_arrow_table()
        except duckdb.Error as error:
            reason = str(error).splitlines()[0]
            raise UsageError(
                f"--where {choice.where!r} is no condition over the scores ({reason}); write it like "
                "\"scene = 'night' AND quality_score < 4\""
            ) from error


def best(dest: Destination, count: int) -> list[dict[str, Any]]:
    """The photos with the highest `quality_score`, best first: uri, quality_score, scene, scorer_kind, run_id.

    Raises:
        UsageError: nothing has been scored into this destination.
    """
    latest = dest.latest("scores", ["uri", "quality_score", "scene", "scorer_kind", "run_id"])
    return _rows(latest, f"WHERE quality_score IS NOT NULL ORDER BY quality_score DESC, uri LIMIT {int(count)}")


def failures(dest: Destination) -> list[dict[str, Any]]:
    """The photos without a score and why, by kind: uri, error_kind, error_message, run_id.

    Raises:
        UsageError: nothing has been scored into this destination.
    """
    latest = dest.latest("scores", ["uri", "error_kind", "error_message", "run_id"])
    return _rows(latest, "WHERE error_kind IS NOT NULL ORDER BY error_kind, uri")


def _rows(latest: pa.Table, clauses: str) -> list[dict[str, Any]]:
    with duckdb.connect() as connection:
        connection.register("latest", latest)
        found: list[dict[str, Any]] = connection.sql(f"SELECT * FROM latest {clauses}").to_arrow_table().to_pylist()
    return found
