"""Whether a destination is whole: records, files, rows and values of its committed runs, held against each other.

Everything is streamed: one batch of one file is in memory, and DuckDB holds the ids, and spills. What is broken is a
problem; what a crash may leave behind, and no reader looks at, is a notice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from picinspector.atomic import PART_SUFFIX
from picinspector.contract import Values, schema_complaints
from picinspector.errors import StorageError
from picinspector.storage import redact, to_photo_error
from picinspector.tables import Destination, database

_BATCH_ROWS = 4096
#: What is loaded of each row, and which column of each table is its `label`.
_LOADED = ("image_id", "uri", "error_kind", "label")
_LABELS = {"embeddings": "encoder_fingerprint", "scores": "scorer_fingerprint", "gone": "gone"}
#: Kinds of runs whose rows are made with the models of their record.
_MADE_BY = ("score", "rescore", "caption")
#: Tables that runs of a kind write; of other kinds both.
_WRITTEN_BY: dict[str, tuple[str, ...]] = {"rescore": ("scores",)}


class Kind(StrEnum):
    """What is wrong, most severe first."""

    RECORD = "record"
    UNREADABLE = "unreadable"
    MISSING = "missing"
    DOUBLED = "doubled"
    FOREIGN = "foreign"
    SCHEMA = "schema"
    FINGERPRINT = "fingerprint"
    VALUES = "values"
    COUNTS = "counts"
    #: Of notices.
    LEFTOVER = "leftover"


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        kind: of which kind.
        message: one line for a person.
        run_id: of which run; None where it is of none.
    """

    kind: Kind
    message: str
    run_id: str | None = None


@dataclass
class Report:
    """What a destination is like.

    Attributes:
        destination: without secrets.
        quick: whether only footers and ids were read.
        problems: what is broken, most severe first; readers may get wrong answers.
        notices: what nobody reads.
        runs: committed runs looked at.
        files, size_bytes: Parquet files looked at.
        rows: rows of embeddings and scores.
        seconds: it took.
    """

    destination: str
    quick: bool
    problems: list[Finding] = field(default_factory=list)
    notices: list[Finding] = field(default_factory=list)
    runs: int = 0
    files: int = 0
    size_bytes: int = 0
    rows: int = 0
    seconds: float = 0.0

    @property
    def whole(self) -> bool:
        """True if nothing is broken."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {"whole": self.whole, **asdict(self)}


def verify(dest: Destination, quick: bool = False) -> Report:
    """Hold the committed runs of a destination against their records, their manifests and the schema.

    Args:
        dest: the tables.
        quick: read no more than records, footers, ids, errors and fingerprints; else all columns of all rows.

    Raises:
        StorageError: the destination cannot be read for a reason that may pass, or there are no runs.
    """
    started, report = time.monotonic(), Report(dest.url, quick)
    with database() as connection:
        check = _Check(dest, quick, report, _listing(dest), connection)
        records = check.records()
        for run_id, record in records.items():
            check.run(run_id, record)
        check.latest()
        check.leftovers(set(records))
    severity = list(Kind)
    # What no run can be blamed for follows from what one can.
    report.problems.sort(
        key=lambda found: (severity.index(found.kind), found.run_id is None, found.run_id or "", found.message)
    )
    report.notices.sort(key=lambda found: found.message)
    report.runs, report.seconds = len(records), round(time.monotonic() - started, 3)
    return report


def _listing(dest: Destination) -> dict[str, dict[str, int]]:
    """Folder -> file name -> bytes, of all that is in a destination."""
    dest.filesystem.invalidate_cache()
    try:
        found = dest.filesystem.find(dest.root, detail=True)
    except Exception as error:
        raise _unreachable(dest.url, error) from error
    folders: dict[str, dict[str, int]] = {}
    for path, facts in found.items():
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, {})[name] = int(facts.get("size") or 0)
    return folders


def _unreachable(path: str, error: Exception) -> StorageError:
    reason = to_photo_error(error).message
    return StorageError(f"cannot read {redact(path)}: {reason}; check the path and the credentials, or try again")


# --- a destination ----------------------------------------------------------------------------------------------------


@dataclass
class _Check:
    """One pass over a destination, whose findings go into its report."""

    dest: Destination
    quick: bool
    report: Report
    folders: dict[str, dict[str, int]]
    connection: duckdb.DuckDBPyConnection

    def __post_init__(self) -> None:
        for table in ("embeddings", "scores"):
            self.connection.execute(f"CREATE TABLE all_{table} (uri UHUGEINT, image_id VARCHAR, run_id VARCHAR)")

    def problem(self, kind: Kind, message: str, run_id: str | None = None) -> None:
        self.report.problems.append(Finding(kind, redact(message), run_id))

    def notice(self, message: str, run_id: str | None = None) -> None:
        self.report.notices.append(Finding(Kind.LEFTOVER, redact(message), run_id))

    def records(self) -> dict[str, dict[str, Any]]:
        """Run id -> record of the committed runs whose record can be read, oldest first."""
        records = {}
        for run_id in self._run_ids():
            path = f"{self.dest.run_path(run_id)}/run.json"
            if "run.json" not in self.folders.get(self.dest.run_path(run_id), {}):
                self.notice(f"run {run_id} was not committed: it is at work, or was cut short", run_id)
                continue
            try:
                record = json.loads(self.dest.filesystem.cat_file(path))
                stated = record["run_id"]
            except (ValueError, KeyError, TypeError) as error:
                self.problem(Kind.RECORD, f"{path} is damaged: {error!r}", run_id)
                continue
            except Exception as error:
                raise _unreachable(path, error) from error
            if stated == run_id:
                records[run_id] = record
            else:
                self.problem(Kind.RECORD, f"{path} is the record of run {stated}", run_id)
        if not records and not self.report.problems and not self.report.notices:
            raise StorageError(f"{self.dest.url}: no runs here; give the folder or prefix that `score --out` wrote to")
        return records

    def _run_ids(self) -> list[str]:
        runs = f"{self.dest.root}/runs/"
        return sorted({folder[len(runs) :].split("/")[0] for folder in self.folders if folder.startswith(runs)})

    def run(self, run_id: str, record: dict[str, Any]) -> None:
        """All tables of one committed run."""
        kind, run = record.get("kind", ""), _Run(self, self.connection, run_id, record)
        rows = run.load("manifest", self.dest.manifest_path(run_id))
        total = record.get("counts", {}).get("to_do", rows)
        if rows != total:
            words = f"{run.name('manifest')} has {rows:,} {_rows(rows)} for {total:,} photos of its record"
            run.problem(Kind.MISSING if rows < total else Kind.DOUBLED, words)
        for table in ("embeddings", "scores"):
            folder = self.dest.table_path(table, run_id)
            if table not in _WRITTEN_BY.get(kind, ("embeddings", "scores")):
                if self.folders.get(folder):
                    run.problem(Kind.FOREIGN, f"{run.name(table)}: a run of kind {kind} writes none")
                continue
            found = run.load(table, folder)
            self.report.rows += found
            if rows == total:  # of a broken manifest nothing follows for the rows
                run.hold_against_manifest(table)
            if table == "scores" and found == total:
                run.check_errors()
            if kind in _MADE_BY:  # others copy rows, which bring the fingerprints of where they are from
                run.check_fingerprints(table)
            self.connection.execute(
                f"INSERT INTO all_{table} SELECT md5_number(uri), image_id, $1 FROM {table}", [run_id]
            )
        run.load("gone", self.dest.table_path("gone", run_id))
        run.check_marks()
        run.close()

    def latest(self) -> None:
        """The newest row of a photo in one table is of an image that the other table has too."""
        for table, other in (("scores", "embeddings"), ("embeddings", "scores")):
            [[count, example]] = self.connection.sql(
                "SELECT count(*), min(image_id) FROM "
                f"(SELECT arg_max(image_id, run_id) AS image_id FROM all_{table} GROUP BY uri) "
                f"ANTI JOIN all_{other} USING (image_id)"
            ).fetchall()
            if count:
                words = f"{table} have {count:,} photos that {other} have in no committed run, like image {example}"
                self.problem(Kind.MISSING, words)

    def leftovers(self, committed: set[str]) -> None:
        """Notices of files in no run's folder."""
        run_ids = {*committed, *self._run_ids()}
        for folder, names in self.folders.items():
            table, _, name = folder[len(self.dest.root) + 1 :].partition("/")
            if table == "runs":
                for file in names:
                    if file.endswith((PART_SUFFIX, ".tmp")):
                        self.notice(f"{folder}/{file} is an unfinished file, and nobody reads it")
            elif table in _LABELS:
                run_id = name.removeprefix("run_id=")
                if not name.startswith("run_id=") or "/" in name:
                    self.notice(f"{folder} holds {len(names)} files that are in no run's folder")
                elif run_id not in run_ids:
                    self.notice(f"{folder}: there is no run of that id, and nobody reads it", run_id)


@dataclass
class _Run:
    """One committed run, whose tables are loaded into DuckDB one after the other: the columns `_LOADED` of each."""

    check: _Check
    connection: duckdb.DuckDBPyConnection
    run_id: str
    record: dict[str, Any]
    _failure: StorageError | None = None

    def name(self, table: str) -> str:
        """What to call a table of this run."""
        return {"manifest": "the manifest", "gone": "the marks"}.get(table, table) + f" of run {self.run_id}"

    def problem(self, kind: Kind, message: str) -> None:
        self.check.problem(kind, message, self.run_id)

    def load(self, table: str, folder: str) -> int:
        """Make the DuckDB table of all rows that can be read, and check each file, batch and id; returns the rows."""
        files = []
        for file in sorted(self.check.folders.get(folder, {})):
            if file.endswith(".parquet"):
                files.append(f"{folder}/{file}")
            else:
                kind = "an unfinished file" if file.endswith(PART_SUFFIX) else "no Parquet file"
                self.check.notice(f"{folder}/{file} is {kind}, and nobody reads it", self.run_id)
        values = Values(table)
        columns = pa.schema([(name, pa.string()) for name in _LOADED])
        self.connection.register(
            "rows", pa.RecordBatchReader.from_batches(columns, self._batches(table, files, values))
        )
        self.connection.execute(f"CREATE TABLE {table} AS SELECT * FROM rows")
        self.connection.unregister("rows")
        if self._failure is not None:
            raise self._failure
        for complaint, count in values.wrong.items():
            self.problem(Kind.VALUES, f"{self.name(table)}: {count:,} {_rows(count)} {complaint}")
        [[rows]] = self._ask(f"SELECT count(*) FROM {table}")
        self._complain(
            Kind.DOUBLED,
            f"(SELECT any_value(coalesce(uri, image_id)) AS uri FROM {table} GROUP BY image_id HAVING count(*) > 1)",
            f"{self.name(table)}: {{}} photos more than once",
        )
        return int(rows)

    def _batches(self, table: str, files: Sequence[str], values: Values) -> Iterator[pa.RecordBatch]:
        label, seen = _LABELS.get(table, ""), set[str]()
        for file in files:
            try:
                with self.check.dest.filesystem.open(file, "rb") as opened:
                    parquet = pq.ParquetFile(opened, pre_buffer=True, page_checksum_verification=True)
                    found = parquet.schema_arrow
                    complaints = schema_complaints(found, table)
                    for complaint in complaints:
                        if complaint not in seen:
                            self.problem(Kind.SCHEMA, f"{self.name(table)}: {complaint}, in {_name(file)}")
                    seen.update(complaints)
                    names = [name for name in ("image_id", "uri", "error_kind", label) if name in found.names]
                    for batch in parquet.iter_batches(_BATCH_ROWS, columns=names if self.check.quick else None):
                        if not self.check.quick and not complaints:
                            values.look_at(batch)
                        yield _loaded(batch, label)
                self.check.report.files += 1
                folder, _, name = file.rpartition("/")
                self.check.report.size_bytes += self.check.folders[folder][name]
            except Exception as error:
                failure = to_photo_error(error)
                if failure.kind.transient:  # DuckDB would make a text of its own of it; kept here, raised above
                    self._failure = _unreachable(file, error)
                    return
                self.problem(Kind.UNREADABLE, f"{file} cannot be read: {failure.message}")

    def close(self) -> None:
        """Forget the run's rows."""
        for table in ("manifest", *_LABELS):
            self.connection.execute(f"DROP TABLE IF EXISTS {table}")

    def hold_against_manifest(self, table: str) -> None:
        """Each photo of the manifest once, and no other."""
        what = self.name(table)
        for kind, rows, words in (
            (Kind.MISSING, f"manifest ANTI JOIN {table} USING (image_id)", "lack {} photos of the manifest"),
            (Kind.FOREIGN, f"{table} ANTI JOIN manifest USING (image_id)", "have {} photos that it does not name"),
            (
                Kind.FOREIGN,
                f"(SELECT {table}.uri FROM {table} JOIN manifest USING (image_id) WHERE {table}.uri <> manifest.uri)",
                "have {} photos with another uri than the manifest",
            ),
        ):
            self._complain(kind, rows, f"{what} {words}")

    def check_fingerprints(self, table: str) -> None:
        """Those of the rows against that of the run's bundle."""
        name = _LABELS[table]
        expected = self.record.get("bundle", {}).get(name)
        query = f"SELECT label, count(*) FROM {table} WHERE label IS DISTINCT FROM $1 GROUP BY label ORDER BY label"
        for found, count in self.connection.execute(query, [expected]).fetchall():
            words = f"{count:,} {_rows(count)} with {name} {found}; that of the run is {expected}"
            self.problem(Kind.FINGERPRINT, f"{self.name(table)}: {words}")

    def check_errors(self) -> None:
        """Errors of both tables against each other, and against the record."""
        tables = {name for (name,) in self._ask("SELECT table_name FROM duckdb_tables()")}
        if "embeddings" in tables:
            self._complain(
                Kind.VALUES,
                "(SELECT scores.uri FROM scores JOIN embeddings USING (image_id) "
                "WHERE scores.error_kind IS DISTINCT FROM embeddings.error_kind)",
                f"scores and embeddings of run {self.run_id} differ in the error of {{}} photos",
            )
        found = dict(self._ask("SELECT error_kind, count(*) FROM scores WHERE error_kind IS NOT NULL GROUP BY 1"))
        stated = self.record.get("counts", {}).get("errors_by_kind", found)
        if stated != found:
            there, said = (
                ", ".join(f"{number:,} {kind}" for kind, number in sorted(counts.items())) or "none"
                for counts in (found, stated)
            )
            self.problem(Kind.COUNTS, f"{self.name('scores')} have errors: {there}; run.json says {said}")

    def check_marks(self) -> None:
        """The photos that this run found gone, or back, against the record."""
        found = dict(self._ask("SELECT label, count(*) FROM gone GROUP BY label"))
        for name, label in (("gone", "true"), ("returned", "false")):
            count = found.get(label, 0)
            stated = self.record.get("counts", {}).get(name, count)
            if stated != count:
                words = f"{count:,} photos {name}; run.json says {stated:,}"
                self.problem(Kind.COUNTS, f"{self.name('gone')} have {words}")

    def _complain(self, kind: Kind, rows: str, words: str) -> None:
        """Of a query that gives the `uri` of photos with something wrong."""
        [[count, example]] = self._ask(f"SELECT count(*), min(uri) FROM {rows}")
        if count:
            self.problem(kind, f"{words.format(f'{count:,}')}, like {example!a}")

    def _ask(self, query: str) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = self.connection.sql(query).fetchall()
        return rows


def _loaded(batch: pa.RecordBatch, label: str) -> pa.RecordBatch:
    found = dict(zip(batch.schema.names, batch.columns, strict=True))
    columns = {"image_id": "image_id", "uri": "uri", "error_kind": "error_kind", "label": label}
    nulls = pa.nulls(batch.num_rows, pa.string())
    return pa.record_batch({name: found.get(column, nulls).cast(pa.string()) for name, column in columns.items()})


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _rows(count: int) -> str:
    return "row" if count == 1 else "rows"
