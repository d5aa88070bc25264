"""What there is to do: a library held against what a destination has committed of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from picinspector import schema
from picinspector.bundle import Bundle
from picinspector.errors import TRANSIENT_KINDS, UsageError
from picinspector.manifest import is_list, list_library
from picinspector.storage import is_local, local_path, open_filesystem, redact, to_uri
from picinspector.tables import GONE, Destination, database

#: Which failed photos are done again: those whose failure may pass by itself, all, or none.
Retry = Literal["transient", "all", "none"]

#: Rows of a manifest shard.
_SHARD_ROWS = 100_000

#: What a photo can be to a run, and whether it is work. `elsewhere`: of another library in the same destination.
_WORK = ("new", "changed", "stale", "retried")
_MARKED = ("gone", "returned")


@dataclass
class Plan:
    """A library against what is committed. Its counts are whole once `shards` is exhausted.

    Attributes:
        counts: listed, listed_bytes, to_do, to_do_bytes; of the photos to do new, changed (another etag), stale (other
            encoders) and retried (failed before); unmodified, of which returned (had left the library); gone, since the
            last run; left_for_later, by a limit.
        marks: images that left or came back, rows of `schema.GONE`.
    """

    listing: Iterator[pa.Table]
    dest: Destination
    bundle: Bundle
    inside: str
    retry: Retry = "transient"
    limit: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    marks: list[pa.Table] = field(default_factory=list)
    _failure: Exception | None = None

    def shards(self) -> Iterator[pa.Table]:
        """Manifest rows of what is to do, at most `limit`.

        The library is streamed past a hash table of the photos that are committed, 16 bytes of MD5 for a URI.

        Raises:
            UsageError: there are no photos; or those that need nothing were scored by another scorer.
        """
        names = ("to_do", "to_do_bytes", *_WORK, "unmodified", *_MARKED, "left_for_later")
        self.counts = dict.fromkeys(("listed", "listed_bytes", *names), 0)
        run_ids = [record["run_id"] for record in self.dest.runs()]
        with database() as connection:
            _remember(connection, self.dest, run_ids, self.bundle, self.inside, self.retry)
            # DuckDB takes a stream for one row and would build its hash table on the library instead.
            connection.execute("SET disabled_optimizers = 'build_side_probe_side,join_order'")
            connection.register("listing", pa.RecordBatchReader.from_batches(schema.MANIFEST, self._batches()))
            for batch in connection.sql(_COMPARE).to_arrow_reader(_SHARD_ROWS):
                yield from self._sort(pa.Table.from_batches([batch]))
            if self._failure is not None:
                raise self._failure
            if not self.counts["listed"]:
                raise UsageError("no photos there; looked for the file names of photos")
            work = sum(self.counts[name] for name in _WORK) + self.counts["left_for_later"]
            self.counts["unmodified"] = self.counts["listed"] - work
            self._check_scorer(connection, run_ids)

    def _sort(self, found: pa.Table) -> Iterator[pa.Table]:
        status = found.column("status")
        if (marked := found.filter(pc.is_in(status, pa.array(_MARKED)))).num_rows:
            gone = pc.equal(marked.column("status"), "gone")
            count = pc.sum(gone, min_count=0).as_py()
            self.counts["gone"] += count
            self.counts["returned"] += marked.num_rows - count
            fingerprint = pa.repeat(self.bundle.scorer_fingerprint, marked.num_rows)
            self.marks.append(pa.table([marked.column("known_id"), gone, fingerprint], schema=schema.GONE))
        work = found.filter(pc.is_in(status, pa.array(_WORK)))
        if self.limit is not None:
            taken = work.slice(0, max(0, self.limit - self.counts["to_do"]))
            self.counts["left_for_later"] += work.num_rows - taken.num_rows
            work = taken
        for row in pc.value_counts(work.column("status")).to_pylist():
            self.counts[row["values"]] += row["counts"]
        self.counts["to_do"] += work.num_rows
        self.counts["to_do_bytes"] += pc.sum(work.column("size_bytes"), min_count=0).as_py()
        if work.num_rows:
            yield work.select(schema.MANIFEST.names).cast(schema.MANIFEST)

    def _check_scorer(self, connection: duckdb.DuckDBPyConnection, run_ids: list[str]) -> None:
        """Raise UsageError if photos of these encoders have another scorer's scores, in whatever library they are."""
        if self.dest.scorers() <= {self.bundle.scorer_fingerprint}:
            return
        connection.register("scores", self.dest.scan("scores", run_ids, ["image_id", "scorer_fingerprint", "run_id"]))
        other = connection.execute(
            "SELECT count(*) FROM (SELECT image_id::UUID AS image, arg_max(scorer_fingerprint, run_id) AS scorer "
            "FROM scores GROUP BY 1) JOIN known USING (image) "
            f"WHERE current AND NOT gone AND scorer <> '{self.bundle.scorer_fingerprint}'"
        ).fetchall()[0][0]
        if other:
            raise UsageError(
                f"{self.dest.url}: {other} photos were scored by another scorer than that of bundle {self.bundle.name} "
                f"{self.bundle.version}, and one ranking must have one; run `picinspector rescore` with it first"
            )

    def _batches(self) -> Iterator[pa.RecordBatch]:
        try:
            for table in self.listing:
                self.counts["listed"] += table.num_rows
                self.counts["listed_bytes"] += pc.sum(table.column("size_bytes"), min_count=0).as_py()
                yield from table.to_batches()
        except Exception as error:  # DuckDB would make a text of its own of it; kept here, raised above
            self._failure = error


def draw_up(
    library: str,
    dest: Destination,
    bundle: Bundle,
    storage_options: Mapping[str, Any] | None = None,
    retry: Retry = "transient",
    limit: int | None = None,
) -> Plan:
    """List a library, and hold it against what is committed of it.

    Args:
        library: see `manifest.list_library`.
        dest: where its tables are.
        bundle: whose encoders and scorer count.
        storage_options: fsspec options of the library.
        retry: which failed photos to do again.
        limit: photos to do at most.
    """
    listing = list_library(library, storage_options)
    return Plan(listing, dest, bundle, _inside(library, dest, storage_options), retry, limit)


#: `known` are the committed photos that were not listed, or the version of them that is.
_COMPARE = """
SELECT image_id, uri, etag, size_bytes, last_modified, replace(known.image::VARCHAR, '-', '') AS known_id,
  CASE WHEN listed.key IS NULL THEN if(known.inside AND NOT known.gone, 'gone', 'elsewhere')
       WHEN known.key IS NULL THEN 'new'
       WHEN known.image <> listed.image THEN 'changed'
       WHEN NOT known.current THEN 'stale'
       WHEN known.failed THEN 'retried'
       WHEN known.gone THEN 'returned'
       ELSE 'unmodified' END AS status
FROM (SELECT *, md5_number(uri) AS key, image_id::UUID AS image FROM listing) AS listed
FULL JOIN known ON listed.key = known.key
WHERE status NOT IN ('unmodified', 'elsewhere')
"""


def _remember(
    connection: duckdb.DuckDBPyConnection,
    dest: Destination,
    run_ids: list[str],
    bundle: Bundle,
    inside: str,
    retry: Retry,
) -> None:
    """Make the table `known`: of each photo its newest committed image, and what that needs.

    `current`: these encoders made it, and where it had left the library, its scores are those of this scorer.
    """
    source = dest.scan("embeddings", run_ids, ["uri", "image_id", "encoder_fingerprint", "error_kind", "run_id"])
    kinds = {"transient": f"IN {TRANSIENT_KINDS}", "all": "IS NOT NULL", "none": "IN ('')"}[retry]
    if source is None:
        connection.execute(
            "CREATE TABLE known (key UHUGEINT, image UUID, inside BOOL, current BOOL, failed BOOL, gone BOOL)"
        )
        return
    marks = dest.marks(run_ids)
    connection.register("source", source)
    connection.register("marks", marks if marks is not None else _NO_MARKS)
    row = (
        f"{{'image': image_id::UUID, 'inside': {inside}, 'failed': coalesce(error_kind {kinds}, false), "
        f"'current': encoder_fingerprint = '{bundle.encoder_fingerprint}', 'run_id': run_id::VARCHAR}}"
    )
    connection.execute(
        "CREATE TABLE newest AS SELECT key, arg_max(row, row.run_id) AS row FROM "
        f"(SELECT md5_number(uri) AS key, {row} AS row FROM source) GROUP BY key"
    )
    same_scorer = f"coalesce(marks.scorer_fingerprint = '{bundle.scorer_fingerprint}', true)"
    connection.execute(
        "CREATE TABLE known AS SELECT key, row.image AS image, row.inside AS inside, row.failed AS failed, "
        f"{GONE.format('newest.row')} AS gone, row.current AND (NOT gone OR {same_scorer}) AS current "
        "FROM newest LEFT JOIN marks ON row.image = marks.image_id::UUID"
    )
    connection.execute("DROP TABLE newest")


_NO_MARKS = schema.GONE.append(pa.field("run_id", pa.string())).empty_table()


def _inside(library: str, dest: Destination, options: Mapping[str, Any] | None) -> str:
    """SQL: whether the photo of a committed row belongs to this library, so that it is gone where it is not listed.

    What lies under a prefix does. Of a list nobody can tell, unless nothing else was ever scored into the destination.
    """
    if is_list(library):
        return "true" if set(libraries_of(dest)) <= {library_name(library)} else "false"
    filesystem, path = open_filesystem(library, options)
    roots = {to_uri(filesystem, path).rstrip("/")}
    if is_local(library):
        roots.add(Path(os.fsdecode(path)).as_uri().rstrip("/"))  # of names that are not UTF-8
    tests = [f"uri = {_quote(root)} OR starts_with(uri, {_quote(root + '/')})" for root in sorted(roots)]
    return f"({' OR '.join(tests)})"


def library_name(library: str) -> str:
    """A library's name for records: the same wherever the command is run, and without secrets."""
    return os.path.abspath(local_path(library)) if is_local(library) else redact(library)  # noqa: PTH100


def libraries_of(dest: Destination) -> list[str]:
    """All libraries that were ever scored into a destination: each record has those of the records before it."""
    names: set[str] = set()
    for record in dest.runs():
        names |= {*record.get("libraries", ()), *([record["library"]] if record.get("library") else ())}
    return sorted(names)


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


# --- of what is stored ------------------------------------------------------------------------------------------------

#: The manifest of a run that works on stored embeddings: whose they are.
STORED = schema.MANIFEST.append(pa.field("source_run_id", pa.string(), False))


def stale(dest: Destination, bundle: Bundle, counts: dict[str, int]) -> Iterator[pa.Table]:
    """Rows of `STORED`: the newest embeddings of photos that are not gone and that this scorer has not scored.

    Args:
        dest: where they are.
        bundle: whose scorer counts.
        counts: gets `listed`, the photos there, and `other_encoders`, those of them that only `score` can bring up to
            date, before the first row comes.

    Raises:
        UsageError: nothing is there, or other encoders made all of it.
    """
    run_ids = [record["run_id"] for record in dest.runs()]
    keys = dest.scan("embeddings", run_ids, ["uri", "image_id", "encoder_fingerprint", "error_kind", "run_id"])
    if keys is None:
        raise UsageError(f"{dest.url}: no committed embeddings here; run `picinspector score` into it first")
    scores = dest.scan("scores", run_ids, ["image_id", "scorer_fingerprint", "run_id"])
    marks = dest.marks(run_ids)
    with database(keys=keys, scores=scores, marks=marks if marks is not None else _NO_MARKS) as connection:
        other = f"error_kind IS NULL AND encoder_fingerprint <> '{bundle.encoder_fingerprint}'"
        connection.execute(
            "CREATE TABLE newest AS SELECT row.* FROM (SELECT arg_max({'image': image_id::UUID, 'good': "
            f"error_kind IS NULL, 'other': {other}, 'run_id': run_id::VARCHAR}}, run_id::VARCHAR) AS row "
            "FROM keys GROUP BY md5_number(uri))"
        )
        connection.execute(
            "DELETE FROM newest USING marks WHERE image = marks.image_id::UUID AND " + GONE.format("newest")
        )
        counts["listed"], good, others = connection.execute(
            "SELECT count(*), count(*) FILTER (good), count(*) FILTER (other) FROM newest"
        ).fetchall()[0]
        counts["other_encoders"] = others
        if others and others == good:
            raise UsageError(
                f"{dest.url}: {others} of {good} photos were embedded by other encoders than those of bundle "
                f"{bundle.name} {bundle.version}; run `picinspector score` with this bundle first"
            )
        connection.execute("DELETE FROM newest WHERE other")
        connection.execute(
            "DELETE FROM newest WHERE image IN (SELECT image_id::UUID FROM scores GROUP BY 1 "
            f"HAVING arg_max(scorer_fingerprint, run_id::VARCHAR) = '{bundle.scorer_fingerprint}')"
        )
        connection.execute("SET disabled_optimizers = 'build_side_probe_side,join_order'")
        connection.register("rows", dest.scan("embeddings", run_ids, [*schema.MANIFEST.names, "run_id"]))
        names = ", ".join(f"rows.{name}" for name in schema.MANIFEST.names)
        todo = connection.sql(
            f"SELECT {names}, newest.run_id AS source_run_id FROM rows JOIN newest "
            "ON rows.image_id::UUID = newest.image AND rows.run_id::VARCHAR = newest.run_id"
        )
        for batch in todo.to_arrow_reader(_SHARD_ROWS):
            if batch.num_rows:
                yield pa.Table.from_batches([batch]).cast(STORED)


def uncaptioned(dest: Destination, images: pa.Table, bundle: Bundle) -> pa.Table:
    """Rows of `STORED`: the newest embeddings of these images (`image_id`) that lack this bundle's caption."""
    marks = ["caption_fingerprint", "caption_error"]
    latest = dest.latest("embeddings", [*schema.MANIFEST.names, "run_id", "error_kind", *marks])
    mine = pc.is_in(latest.column("image_id"), value_set=images.column("image_id").combine_chunks())
    same = pc.fill_null(pc.equal(latest.column("caption_fingerprint"), bundle.caption_fingerprint), False)
    done = pc.and_(same, pc.is_null(latest.column("caption_error")))
    rows = latest.filter(pc.and_(pc.and_(mine, pc.is_null(latest.column("error_kind"))), pc.invert(done)))
    return rows.select([*schema.MANIFEST.names, "run_id"]).rename_columns(STORED.names).cast(STORED)
