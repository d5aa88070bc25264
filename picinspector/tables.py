"""The destination: where tables and run records lie, which runs are committed, and the latest row of each photo.

::

    <dest>/runs/<run_id>/plan.json           written when the manifest is whole: from now on the run can be resumed
    <dest>/runs/<run_id>/run.json            written last: the commit
    <dest>/runs/<run_id>/manifest/*.parquet  what the run had to do; `source_run_id` where it works on stored rows
    <dest>/embeddings/run_id=<run_id>/*.parquet
    <dest>/scores/run_id=<run_id>/*.parquet
    <dest>/gone/run_id=<run_id>/*.parquet    images that left the library, or came back, as this run saw it
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

from picinspector import schema
from picinspector.atomic import WholeFileSystem
from picinspector.errors import StorageError, UsageError
from picinspector.storage import is_local, is_storage_error, open_filesystem, redact, to_photo_error

TableName = Literal["embeddings", "scores", "gone"]

_Found = TypeVar("_Found")

_STAMP = "%Y%m%dT%H%M%S"
#: Of DuckDB, beyond which it spills: 10 million photos are planned with it, and a driver has other things to hold.
_QUERY_MEMORY = "1500MB"
_THREADS = 16


def new_run_id(newest: str | None = None) -> str:
    """A run id that sorts by time: `20261122T160512.031Z-3f9a1c`.

    Args:
        newest: the id it has to sort after: the newest row of a photo is the truth, whatever the clocks of two
            machines say.
    """
    now = datetime.now(UTC)
    if newest is not None and (last := time_of(newest)) is not None:
        now = max(now, last + timedelta(milliseconds=1))
    return f"{now:{_STAMP}}.{now.microsecond // 1000:03}Z-{secrets.token_hex(3)}"


def time_of(run_id: str) -> datetime | None:
    """When a run began, by its id; None if that is none of ours."""
    try:
        return datetime.strptime(run_id.partition("Z-")[0], f"{_STAMP}.%f").replace(tzinfo=UTC)
    except ValueError:
        return None


@contextlib.contextmanager
def database(**sources: Any) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB connection that sees these Arrow sources by name, and spills to a folder of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="picinspector-") as folder,
        duckdb.connect(f"{folder}/query.duckdb", config={"memory_limit": _QUERY_MEMORY}) as connection,
    ):
        connection.execute("SET preserve_insertion_order = false")
        for name, source in sources.items():
            if source is not None:
                connection.register(name, source)
        yield connection


class Destination:
    """A prefix or folder that holds the tables of one library.

    Attributes:
        url: as given, without secrets, absolute; for messages and records.
        filesystem: the fsspec filesystem it is on, to read.
        writer: the same, on which files appear whole or not at all.
        root: its path on that filesystem.
        local: whether it is a folder of this machine.
    """

    def __init__(self, url: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> None:
        self.local = is_local(os.fspath(url))
        if os.fspath(url).startswith(("s3://", "s3a://")):
            # s3fs reads 50 MB ahead of every column otherwise: planning would fetch the embeddings it does not look at.
            options = {**(options or {}), "default_cache_type": "none"}
        self.filesystem, root = open_filesystem(url, options)
        self.root = root.rstrip("/")
        self.writer = WholeFileSystem() if self.local else self.filesystem
        self.url = self.root if self.local else redact(os.fspath(url))
        self._given = self.root if self.local else os.fspath(url).rstrip("/")

    def url_of(self, name: str) -> str:
        """URL of a file in it, to open, not to show: it may hold a user's name and password, as the one given did."""
        return f"{self._given}/{name}"

    def table_path(self, table: TableName, run_id: str) -> str:
        """Folder of one run's rows of a table."""
        return f"{self.root}/{table}/run_id={run_id}"

    def manifest_path(self, run_id: str) -> str:
        """Folder of one run's manifest."""
        return f"{self.run_path(run_id)}/manifest"

    def run_path(self, run_id: str) -> str:
        """Folder of what a run says of itself."""
        return f"{self.root}/runs/{run_id}"

    def check_writable(self) -> None:
        """Write a small file, always the same one: the right to delete is not needed.

        Raises:
            StorageError: that failed.
        """
        try:
            self.make_folder(f"{self.root}/runs")
            self.writer.pipe_file(f"{self.root}/runs/.writable", b"picinspector")
        except Exception as error:  # any storage library's own type; all mean the same to the user
            reason = to_photo_error(error).message
            raise StorageError(f"cannot write to {self.url}: {reason}; check the path and the credentials") from error

    def make_folder(self, path: str) -> None:
        """Make a folder where there are folders: an object store would make a bucket of a misspelt name."""
        if self.local:
            self.filesystem.makedirs(path, exist_ok=True)

    # --- runs ---------------------------------------------------------------------------------------------------------

    def new_run_id(self) -> str:
        """An id that sorts after those of all runs here."""
        return new_run_id(max(self._run_ids(), default=None))

    def plan(self, record: Mapping[str, Any]) -> None:
        """Write what a run is going to do: its manifest is whole, and it can be resumed."""
        self.write_json(f"{self.run_path(record['run_id'])}/plan.json", record)

    def planned(self, run_id: str) -> dict[str, Any] | None:
        """What a run was going to do; None if it was not planned to the end."""
        return self._read_json(f"{self.run_path(run_id)}/plan.json")

    def commit(self, record: Mapping[str, Any]) -> None:
        """Write the run record: from now on readers honour the run."""
        self.write_json(f"{self.run_path(record['run_id'])}/run.json", record)

    def write_json(self, path: str, record: Mapping[str, Any]) -> None:
        """Write a record, whole or not at all."""
        with self._writing(path):
            self.make_folder(os.path.dirname(path))  # noqa: PTH120
            self.writer.pipe_file(path, json.dumps(record, indent=2, default=str).encode())

    def runs(self) -> list[dict[str, Any]]:
        """Run records of all committed runs, oldest first."""
        records = _in_threads(lambda run_id: self._read_json(f"{self.run_path(run_id)}/run.json"), self._run_ids())
        return [record for record in records if record is not None]

    def newest(self) -> str:
        """Id of the newest committed run; empty where there is none."""
        return max((record["run_id"] for record in self.runs()), default="")

    def uncommitted(self) -> list[str]:
        """Ids of runs that began here and were not committed, oldest first."""
        committed = {record["run_id"] for record in self.runs()}
        return [run_id for run_id in self._run_ids() if run_id not in committed]

    def scorers(self) -> set[str]:
        """Fingerprints of the scorers that wrote the committed runs here."""
        return {record["bundle"]["scorer_fingerprint"] for record in self.runs() if record.get("bundle")}

    def cut_short(self) -> dict[str, Any] | None:
        """The plan of the run to resume: the last one here, if it was planned and not committed.

        An older one is not resumed: what has been committed since may be newer than what it would write.
        """
        for run_id in reversed(self._run_ids()):
            if self._read_json(f"{self.run_path(run_id)}/run.json") is not None:
                return None
            if (plan := self.planned(run_id)) is not None:
                return plan
        return None

    def _run_ids(self) -> list[str]:
        names = (path.rsplit("/", 1)[-1] for path in self.listed(f"{self.root}/runs"))
        return sorted(name for name in names if not name.startswith("."))

    def _read_json(self, path: str) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = json.loads(self.filesystem.cat_file(path))
            return record
        except (FileNotFoundError, NotADirectoryError):
            return None  # never written
        except ValueError as error:
            advice = "remove that run's folder, or restore the file"
            raise StorageError(f"{redact(path)} is damaged: {error}; {advice}") from error
        except Exception as error:  # taken for uncommitted, it would have a whole library scored again
            reason = to_photo_error(error).message
            raise StorageError(f"cannot read {redact(path)}: {reason}; run the same command again") from error

    # --- files --------------------------------------------------------------------------------------------------------

    def write_parquet(self, path: str, table: pa.Table) -> None:
        """Write one Parquet file, and the folder it is in."""
        with self._writing(path):
            self.make_folder(os.path.dirname(path))  # noqa: PTH120
            with self.writer.open(path, "wb") as file:
                pa.parquet.write_table(table, file, write_page_checksum=True)

    def read_parquet(self, path: str) -> pa.Table | None:
        """A file that `write_parquet` wrote, whole; None where there is none.

        Raises:
            StorageError: it is damaged.
        """
        try:
            with self.filesystem.open(path, "rb") as file:
                return pa.parquet.read_table(file, page_checksum_verification=True)
        except FileNotFoundError:
            return None
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the storage, not of the file
                raise
            raise StorageError(f"{redact(path)} is damaged; delete it and run the same command again") from error

    @contextlib.contextmanager
    def _writing(self, path: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not is_storage_error(error):
                raise
            reason = to_photo_error(error).message
            raise StorageError(
                f"cannot write {redact(path)}: {reason}; mend that and run the same command again"
            ) from error

    def write_manifest(self, run_id: str, tables: Iterable[pa.Table]) -> int:
        """Write the manifest shards of a run; returns the number of rows."""
        rows = 0
        for index, table in enumerate(tables):
            self.write_parquet(f"{self.manifest_path(run_id)}/shard-{index:06d}.parquet", table)
            rows += table.num_rows
        return rows

    def files(self, folder: str) -> list[str]:
        """Parquet files in a folder, sorted; none if it is not there."""
        return sorted(path for path in self.listed(folder) if path.endswith(".parquet"))

    def files_of(self, table: TableName, run_ids: Sequence[str]) -> list[str]:
        """Parquet files of these runs' rows of a table, oldest run first."""
        if len(run_ids) == 1:
            return self.files(self.table_path(table, run_ids[0]))
        # One flat listing for all: a request for each of a year's runs would take longer than planning.
        self.filesystem.invalidate_cache()
        folders = {self.table_path(table, run_id): [] for run_id in sorted(run_ids)}  # type: dict[str, list[str]]
        for path in self.filesystem.find(f"{self.root}/{table}"):
            folder, _, name = path.rpartition("/")
            if name.endswith(".parquet") and folder in folders:
                folders[folder].append(path)
        return [path for paths in folders.values() for path in sorted(paths)]

    def delete(self, path: str) -> None:
        """Remove a file, or a folder with all in it; nothing where it is not there."""
        with contextlib.suppress(FileNotFoundError):
            if self.local:
                self.filesystem.rm(path, recursive=True)
                return
            self.filesystem.invalidate_cache()
            # By name: `rm` of some stores takes a `[` or a `*` in a path for a pattern.
            _in_threads(self.filesystem.rm_file, self.filesystem.find(path))

    def listed(self, folder: str) -> list[str]:
        """Paths of the files and folders in a folder; none if it is not there."""
        # Other processes write here: a cached listing would show yesterday's runs. No glob: a path may hold `[` or `*`.
        self.filesystem.invalidate_cache()
        try:
            paths: list[str] = self.filesystem.ls(folder, detail=False)
        except FileNotFoundError:
            return []
        return [path.rstrip("/") for path in paths]

    # --- rows ---------------------------------------------------------------------------------------------------------

    def scan(self, table: TableName, run_ids: Sequence[str], columns: Sequence[str]) -> pa.dataset.Scanner | None:
        """Columns of one table's rows of these runs, streamed; None where they wrote no file of it.

        `run_id` may be among the columns. Register it with DuckDB, which cannot take the float16 of the others.
        """
        files = self.files_of(table, run_ids)
        if not files:
            return None
        run = pa.field("run_id", pa.dictionary(pa.int32(), pa.string()))
        names = pa.array(sorted(run_ids))
        dataset = pa.dataset.dataset(
            files,
            schema=self._fields(table, files, columns, run),
            filesystem=self.filesystem,
            format="parquet",
            partitioning=pa.dataset.HivePartitioning(pa.schema([run]), dictionaries={"run_id": names}),
            partition_base_dir=self.root,
        )
        # Read ahead a little: the columns of sixteen files at once are gigabytes.
        return dataset.scanner(columns=list(columns), batch_readahead=4, fragment_readahead=2)

    def _fields(self, table: TableName, files: Sequence[str], columns: Sequence[str], run: pa.Field) -> pa.Schema:
        """The fields of the newest file, and those that only older files or only newer versions write: nulls elsewhere.

        Raises:
            UsageError: no file has one of them, and it cannot be null.
        """
        fields = {field.name: field for field in (*self._schema(files[-1]), run)}
        if not fields.keys() >= set(columns):
            one_of_each_run = list({os.path.dirname(file): file for file in files}.values())  # noqa: PTH120
            known = [*_in_threads(self._schema, one_of_each_run)][::-1]
            for found in [*known, schema.optional(table)]:
                fields |= {name: found.field(name) for name in columns if name not in fields and name in found.names}
        if missing := sorted(set(columns) - fields.keys()):
            raise UsageError(f"{self.url}: an older version wrote these tables, without {missing[0]}: score them again")
        return pa.schema(list(fields.values()))

    def _schema(self, file: str) -> pa.Schema:
        with self.filesystem.open(file, "rb") as opened:
            return pa.parquet.read_schema(opened)

    def scan_manifest(self, run_id: str, columns: Sequence[str] = ("image_id",)) -> pa.dataset.Scanner | None:
        """Columns of a run's manifest, streamed; None where it has none."""
        files = self.files(self.manifest_path(run_id))
        if not files:
            return None
        return pa.dataset.dataset(files, filesystem=self.filesystem, format="parquet").scanner(columns=list(columns))

    def latest(self, table: TableName, columns: Sequence[str], as_of: str | None = None) -> pa.Table:
        """The newest committed row of each photo that is not gone.

        Args:
            table: which table.
            columns: what to read of it; `uri` and `run_id` need not be among them.
            as_of: as it was when this run was committed.

        Raises:
            UsageError: no committed run has written this table here.
        """
        with database() as connection:
            self.load_latest(connection, "latest", table, columns, as_of)
            return connection.table("latest").to_arrow_table()

    def load_latest(
        self,
        connection: duckdb.DuckDBPyConnection,
        name: str,
        table: TableName,
        columns: Sequence[str],
        as_of: str | None = None,
    ) -> None:
        """`latest` as a table of this name in a `database`, on disk, however many photos there are."""
        run_ids = [record["run_id"] for record in self.runs() if as_of is None or record["run_id"] <= as_of]
        marks = self.marks(run_ids)
        needed = ["uri", "run_id", *(["image_id"] if marks is not None else [])]
        source = self.scan(table, run_ids, [*dict.fromkeys([*columns, *needed])])
        if source is None:
            raise UsageError(f"{self.url}: no committed {table} here; run `picinspector score` into it first")
        connection.register("source", source)
        names = ", ".join(
            "newest.run_id::VARCHAR AS run_id" if name == "run_id" else f'newest."{name}"' for name in columns
        )
        newest = "SELECT * FROM source QUALIFY row_number() OVER (PARTITION BY uri ORDER BY run_id::VARCHAR DESC) = 1"
        hidden = ""
        if marks is not None:
            connection.register("marks", marks)
            hidden = "LEFT JOIN marks USING (image_id) WHERE NOT " + GONE.format("newest")
        connection.execute(f"CREATE TABLE {name} AS SELECT {names} FROM ({newest}) newest {hidden}")
        connection.unregister("source")

    def marks(self, run_ids: Sequence[str]) -> pa.Table | None:
        """The newest mark of each image that left the library or came back: image_id, gone, scorer_fingerprint, run_id.

        None where no run made one. With DuckDB, `GONE` tells whether a row is hidden by its mark.
        """
        source = self.scan("gone", run_ids, ["image_id", "gone", "scorer_fingerprint", "run_id"])
        if source is None:
            return None
        with database(source=source) as connection:
            newest = "SELECT * FROM source QUALIFY row_number() OVER (PARTITION BY image_id ORDER BY run_id DESC) = 1"
            return _plain(connection.sql(newest).to_arrow_table())

    def has(self, table: TableName) -> bool:
        """True if a committed run has written this table here."""
        return bool(self.files_of(table, [record["run_id"] for record in self.runs()]))

    def rows_in(self, files: Sequence[str]) -> list[int]:
        """Rows of each of these Parquet files, by their footers."""

        def count(file: str) -> int:
            with self.filesystem.open(file, "rb") as opened:
                return int(pa.parquet.read_metadata(opened).num_rows)

        return _in_threads(count, files)

    def damaged(self, files: Sequence[str]) -> list[str]:
        """Those of these files that are no Parquet files, or not all of one."""

        def is_damaged(file: str) -> bool:
            try:
                with self.filesystem.open(file, "rb") as opened:
                    pa.parquet.read_metadata(opened)
            except pa.ArrowInvalid:  # what a store raises says nothing of the file
                return True
            return False

        return [file for file, bad in zip(files, _in_threads(is_damaged, files), strict=True) if bad]

    def of_one_schema(self, table: TableName, run_ids: Sequence[str]) -> list[tuple[pa.Schema, list[str]]]:
        """Files of these runs in groups with one schema each, which is what one reader takes.

        Encoders differ in width, and older versions wrote fewer columns.
        """
        files, groups = self.files_of(table, run_ids), {}  # type: list[str], dict[pa.Schema, list[str]]
        for file, found in zip(files, _in_threads(self._schema, files), strict=True):
            groups.setdefault(found.remove_metadata(), []).append(file)
        return list(groups.items())

    def tally(self, table: TableName, column: str, run_id: str) -> dict[str, int]:
        """How many photos of a run have which value in a column of a table, most first; nulls are not counted."""
        source = self.scan(table, [run_id], [column])
        if source is None:
            return {}
        with database(source=source) as connection:
            rows = connection.sql(
                f"SELECT {column}, count(*) FROM source WHERE {column} IS NOT NULL GROUP BY 1 ORDER BY 2 DESC, 1"
            ).fetchall()
        return {str(value): int(count) for value, count in rows}


#: SQL: whether a row is hidden by the newest mark of its image, joined from the left as `marks`. A row that a later run
#: made is that of a photo that came back.
GONE = "coalesce(marks.gone AND marks.run_id >= {}.run_id, false)"


def _plain(rows: pa.Table) -> pa.Table:
    """Run ids as strings, whatever they travelled as."""
    if "run_id" not in rows.column_names:
        return rows
    index = rows.schema.get_field_index("run_id")
    return rows.set_column(index, "run_id", rows.column(index).cast(pa.string()))


def _in_threads(work: Callable[[str], _Found], items: Sequence[str]) -> list[_Found]:
    if not items:
        return []
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, items))
