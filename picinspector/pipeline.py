"""The jobs as Ray Data chains: a library in, committed tables out.

::

    list -> anti-join with what is committed -> manifest
    manifest   -> read_photos (CPU tasks) -> Encode (actor pool) -> embeddings
    embeddings -> Score (CPU actor pool)  -> scores
    rows checked against the manifest -> run.json: committed
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import duckdb
import pyarrow as pa
import ray
import ray.data

from picinspector import runs, schema
from picinspector.bundle import Bundle, open_bundle
from picinspector.errors import TRANSIENT_KINDS, UsageError
from picinspector.manifest import list_library
from picinspector.photo import Limits
from picinspector.stages.read import crops_of, read_photos
from picinspector.stages.score import Score, score_columns
from picinspector.storage import redact
from picinspector.tables import Destination, new_run_id

#: Rows of one Parquet file at least, where there are as many: about 30 MB of embeddings.
_ROWS_PER_FILE = 8192
_SCORE_BATCH = 4096
_MANIFEST_SHARD_ROWS = 100_000


@dataclass(frozen=True)
class Options:
    """What a run may be told; every default is worked out from the library and the cluster.

    Attributes:
        bundle: name or folder of the bundle, the same on every node.
        storage_options: fsspec options of the library and the destination.
        limit: photos to do at most.
        limits: what a photo may cost.
        encoders, gpus_per_encoder, batch_size: see `runs.Pools`.
        address: the Ray cluster; None takes `RAY_ADDRESS`, else starts Ray on this machine.
        show_progress: one progress line on stderr.
    """

    bundle: str = "builtin"
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    limit: int | None = None
    limits: Limits = field(default_factory=Limits)
    encoders: int | None = None
    gpus_per_encoder: float | None = None
    batch_size: int | None = None
    address: str | None = None
    show_progress: bool = True


@dataclass
class _Listing:
    """Counts of a listing while it streams by."""

    listed: int = 0
    listed_bytes: int = 0
    failure: Exception | None = None


def plan_score(library: str, destination: str, options: Options = Options()) -> dict[str, Any]:
    """What `score` would do, as counts; starts no cluster and writes nothing."""
    bundle = open_bundle(options.bundle)
    dest = Destination(destination, options.storage_options)
    listing, to_do, size = _Listing(), 0, 0
    for table in _to_do(library, dest, bundle, options, listing):
        to_do += table.num_rows
        size += table.column("size_bytes").drop_null().to_numpy().sum() if table.num_rows else 0
    _check_listed(library, listing)
    return {
        "library": redact(library),
        "destination": dest.url,
        "bundle": f"{bundle.name} {bundle.version}",
        "scorer_kind": bundle.scorer_kind,
        "listed": listing.listed,
        "listed_bytes": listing.listed_bytes,
        "unchanged": listing.listed - to_do if options.limit is None else None,
        "to_do": to_do,
        "to_do_bytes": int(size),
    }


def score(library: str, destination: str, options: Options = Options()) -> dict[str, Any]:
    """Embed and score every photo of a library that the destination does not have yet.

    Args:
        library: see `manifest.list_library`.
        destination: a prefix or folder; made if it is not there.
        options: see `Options`.

    Returns:
        the run record, committed to the destination.

    Raises:
        PicInspectorError: nothing was committed; running the same command again is safe.
    """
    bundle = open_bundle(options.bundle)
    for piece in bundle.pieces:  # a damaged bundle fails here, before anything is written, and not on a worker
        bundle.piece(piece)
    score_columns(bundle)
    dest = Destination(destination, options.storage_options)
    dest.check_writable()
    record = _new_record("score", bundle, dest, library)
    started, listing = time.monotonic(), _Listing()
    run_id = record["run_id"]
    total = dest.write_manifest(run_id, _sharded(_to_do(library, dest, bundle, options, listing)))
    _check_listed(library, listing)
    record["counts"] |= {"listed": listing.listed, "to_do": total}
    record["seconds"]["list"] = time.monotonic() - started
    if total:
        runs.connect(options.address)
        record["pools"] = _embed(dest, run_id, bundle, options, total, record)
        _score(dest, run_id, bundle, options, total, record)
    return _commit(dest, record, total, started)


def rescore(destination: str, options: Options = Options()) -> dict[str, Any]:
    """Score the stored embeddings of a destination again, with the scorer of `options.bundle`. Reads no photo.

    Returns:
        the run record, committed to the destination.

    Raises:
        PicInspectorError: nothing was committed; running the same command again is safe.
    """
    bundle = open_bundle(options.bundle)
    score_columns(bundle)
    dest = Destination(destination, options.storage_options)
    dest.check_writable()
    record = _new_record("rescore", bundle, dest, None)
    started = time.monotonic()
    latest = dest.latest("embeddings", [*schema.MANIFEST.names, "run_id", "encoder_fingerprint", "error_kind"])
    _check_encoders(latest, bundle, dest)
    if options.limit is not None:
        latest = latest.slice(0, options.limit)
    rows = latest.select(schema.MANIFEST.names)
    total = dest.write_manifest(record["run_id"], _sharded(iter([rows])))
    record["counts"] |= {"listed": total, "to_do": total}
    record["seconds"]["list"] = time.monotonic() - started
    if total:
        runs.connect(options.address)
        keep = latest.select(["image_id", "run_id"])
        _score(dest, record["run_id"], bundle, options, total, record, keep)
    return _commit(dest, record, total, started)


# --- the chains -------------------------------------------------------------------------------------------------------


def _embed(
    dest: Destination, run_id: str, bundle: Bundle, options: Options, total: int, record: dict[str, Any]
) -> dict[str, Any]:
    from picinspector.stages.encode import Encode  # loads torch, which nothing else on the driver needs

    pools = runs.size_pools(total, options.encoders, options.gpus_per_encoder, options.batch_size)
    started = time.monotonic()
    with runs.progress("embed", total, options.show_progress) as report:
        (
            ray.data.read_parquet(dest.files(dest.manifest_path(run_id)), filesystem=dest.filesystem, partitioning=None)
            .repartition(target_num_rows_per_block=pools.block_rows)
            .map_batches(
                read_photos,
                fn_kwargs={
                    "crops": crops_of(bundle),
                    "limits": options.limits,
                    "storage_options": options.storage_options,
                },
                batch_size=None,
                batch_format="pyarrow",
                compute=ray.data.TaskPoolStrategy(size=pools.readers),
                num_cpus=1,
            )
            .map_batches(
                Encode,
                fn_constructor_kwargs={
                    "bundle": options.bundle,
                    "threads": None if pools.gpus else pools.cpus,
                    "report": report,
                },
                batch_size=pools.batch_size,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=pools.encoders),
                num_cpus=pools.cpus,
                num_gpus=pools.gpus,
            )
            .write_parquet(
                dest.table_path("embeddings", run_id),
                filesystem=dest.filesystem,
                min_rows_per_file=min(_ROWS_PER_FILE, total),
            )
        )
    record["seconds"]["embed"] = time.monotonic() - started
    record["embed_photos_per_s"] = round(report.rate, 3)
    dest.check_rows("embeddings", run_id, total)
    return {"encoders": pools.encoders, "gpus": pools.gpus, "cpus": pools.cpus, "batch_size": pools.batch_size,
            "block_rows": pools.block_rows, "readers": pools.readers}  # fmt: skip


def _score(
    dest: Destination,
    run_id: str,
    bundle: Bundle,
    options: Options,
    total: int,
    record: dict[str, Any],
    keep: pa.Table | None = None,
) -> None:
    """Score this run's embeddings; or, where `keep` is given, the rows it names (image_id, run_id) of earlier runs."""
    started = time.monotonic()
    columns = score_columns(bundle)
    with runs.progress("score", total, options.show_progress) as report:
        for source_id in [run_id] if keep is None else sorted(set(keep.column("run_id").to_pylist())):
            rows = ray.data.read_parquet(
                dest.files(dest.table_path("embeddings", source_id)),
                filesystem=dest.filesystem,
                columns=columns,
                partitioning=None,
            )
            if keep is not None:
                wanted = keep.filter(pa.compute.equal(keep.column("run_id"), source_id)).column("image_id")
                rows = rows.map_batches(
                    _keep_rows, fn_args=(ray.put(wanted.combine_chunks()),), batch_size=None, batch_format="pyarrow"
                )
            rows.map_batches(
                Score,
                fn_constructor_kwargs={"bundle": options.bundle, "report": report},
                batch_size=_SCORE_BATCH,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=4),
                num_cpus=1,
            ).write_parquet(
                dest.table_path("scores", run_id),
                filesystem=dest.filesystem,
                min_rows_per_file=min(_ROWS_PER_FILE * 8, total),
            )
    record["seconds"]["score"] = time.monotonic() - started
    record["score_photos_per_s"] = round(report.rate, 3)
    dest.check_rows("scores", run_id, total)


def _keep_rows(rows: pa.Table, image_ids: Any) -> pa.Table:
    wanted = ray.get(image_ids) if isinstance(image_ids, ray.ObjectRef) else image_ids
    return rows.filter(pa.compute.is_in(rows.column("image_id"), value_set=wanted))


# --- what there is to do ----------------------------------------------------------------------------------------------


def _to_do(library: str, dest: Destination, bundle: Bundle, options: Options, listing: _Listing) -> Iterator[pa.Table]:
    """Manifest rows of a library that no committed run has done with these encoders; transient failures again."""

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            for table in list_library(library, options.storage_options):
                listing.listed += table.num_rows
                listing.listed_bytes += sum(table.column("size_bytes").drop_null().to_pylist())
                yield from table.to_batches()
        except Exception as error:  # DuckDB would turn it into a text of its own; kept here, raised below
            listing.failure = error

    stream = pa.RecordBatchReader.from_batches(schema.MANIFEST, batches())
    with duckdb.connect() as connection:
        connection.register("listing", stream)
        connection.register("done", _done(dest, bundle))
        limit = "" if options.limit is None else f"LIMIT {int(options.limit)}"
        rows = connection.sql(f"SELECT * FROM listing ANTI JOIN done USING (image_id) {limit}")
        for batch in rows.to_arrow_reader(_MANIFEST_SHARD_ROWS):
            yield pa.Table.from_batches([batch]).cast(schema.MANIFEST)
    if listing.failure is not None:
        raise listing.failure


def _done(dest: Destination, bundle: Bundle) -> pa.Table:
    columns = ["image_id", "encoder_fingerprint", "error_kind"]
    source = dest.scan("embeddings", [record["run_id"] for record in dest.runs()], columns)
    if source is None:
        return pa.table({"image_id": pa.array([], pa.string())})
    transient = ", ".join(f"'{kind}'" for kind in TRANSIENT_KINDS)
    with duckdb.connect() as connection:
        connection.register("source", source)
        return connection.sql(
            f"SELECT DISTINCT image_id FROM source "
            f"WHERE encoder_fingerprint = '{bundle.encoder_fingerprint}' "
            f"AND (error_kind IS NULL OR error_kind NOT IN ({transient}))"
        ).to_arrow_table()


def _sharded(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    for table in tables:
        for start in range(0, table.num_rows, _MANIFEST_SHARD_ROWS):
            yield table.slice(start, _MANIFEST_SHARD_ROWS)


def _check_listed(library: str, listing: _Listing) -> None:
    if not listing.listed:
        raise UsageError(f"{redact(library)}: no photos there; looked for photo file names, upper or lower case")


def _check_encoders(latest: pa.Table, bundle: Bundle, dest: Destination) -> None:
    good = latest.filter(pa.compute.is_null(latest.column("error_kind")))
    other = pa.compute.not_equal(good.column("encoder_fingerprint"), bundle.encoder_fingerprint)
    if count := pa.compute.sum(other).as_py():
        raise UsageError(
            f"{dest.url}: {count} of {good.num_rows} photos were embedded by other encoders than those of bundle "
            f"{bundle.name} {bundle.version}; run `picinspector score` with this bundle first"
        )


# --- the record -------------------------------------------------------------------------------------------------------


def _new_record(kind: str, bundle: Bundle, dest: Destination, library: str | None) -> dict[str, Any]:
    return {
        "run_id": new_run_id(),
        "kind": kind,
        "library": redact(library) if library is not None else None,
        "destination": dest.url,
        "bundle": {
            "name": bundle.name,
            "version": bundle.version,
            "encoder_fingerprint": bundle.encoder_fingerprint,
            "scorer_fingerprint": bundle.scorer_fingerprint,
            "scorer_kind": bundle.scorer_kind,
        },
        "started_at": runs.now(),
        "counts": {},
        "seconds": {},
    }


def _commit(dest: Destination, record: dict[str, Any], total: int, started: float) -> dict[str, Any]:
    errors = _errors_by_kind(dest, record["run_id"])
    failed, transient = sum(errors.values()), sum(errors.get(kind, 0) for kind in TRANSIENT_KINDS)
    elapsed = time.monotonic() - started
    record["counts"] |= {
        "unchanged": record["counts"]["listed"] - total,
        "scored": total - failed,
        "failed": failed,
        "failed_transient": transient,
        "errors_by_kind": errors,
    }
    record["seconds"] = {name: round(value, 3) for name, value in {**record["seconds"], "total": elapsed}.items()}
    record["photos_per_s"] = round(total / elapsed, 3)
    record["environment"] = runs.describe_environment()
    record["finished_at"] = runs.now()
    record["outcome"] = "transient_failures" if transient else "done"
    dest.commit(record)
    return record


def _errors_by_kind(dest: Destination, run_id: str) -> dict[str, int]:
    source = dest.scan("scores", [run_id], ["error_kind"])
    if source is None:
        return {}
    with duckdb.connect() as connection:
        connection.register("source", source)
        rows = connection.sql(
            "SELECT error_kind, count(*) FROM source WHERE error_kind IS NOT NULL GROUP BY 1 ORDER BY 2 DESC, 1"
        ).fetchall()
    return {str(kind): int(count) for kind, count in rows}


def exit_code(record: Mapping[str, Any]) -> int:
    """The process exit code that says how a committed run ended: 0 done, 3 transient failures remain."""
    return 3 if record["counts"]["failed_transient"] else 0
