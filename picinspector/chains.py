"""The Ray Data chains: what a planned run still lacks of a table, worked out and written, until the table is whole.

::

    manifest -> read_photos (CPU tasks) -> Encode (actor pool) [-> Caption (actor pool)] -> embeddings
    stored embeddings -> read_again (CPU tasks) -> Caption (actor pool)                  -> embeddings
    stored embeddings -> Score (CPU actor pool)                                          -> scores
    stored rows                                                                          -> the same, in fewer files
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import ray
import ray.data

from picinspector import ledger, logs, runs, schema
from picinspector.bundle import Bundle
from picinspector.errors import StorageError, TableError
from picinspector.progress import Reporter, progress
from picinspector.stages.read import caption_crop, crops_of, read_photos
from picinspector.stages.score import Score, score_columns
from picinspector.storage import StorageOptions, is_storage_error, redact
from picinspector.tables import Destination, TableName, database

#: Rows of one file of embeddings, where there are as many: about 30 MB. What a crash costs is a file at most, so on the
#: CPU, where that many take minutes, files are smaller; `prune` puts them together.
_ROWS_PER_FILE, _ROWS_PER_FILE_ON_CPU = 8192, 1024
_SCORED_ROWS_PER_FILE = 65_536
_SCORE_BATCH = 4096
#: Columns of either table whose values repeat. Of an embedding, whose numbers hardly do, a dictionary costs five times
#: the time to read and twice the time to write, for 6 % less space (measured).
_REPEATED = [
    *("format", "camera", "lens", "iso", "exposure_s", "f_number", "focal_length_mm", "width", "height"),
    *("encoder_fingerprint", "scorer_fingerprint", "scorer_kind", "caption", "caption_source", "caption_error"),
    *("caption_fingerprint", "scene", "suggestions.list.element", "error_kind", "error_message"),
]
#: The checksums are what lets `verify` tell a page that went bad from one that is only unusual.
PARQUET: Mapping[str, Any] = {"write_page_checksum": True, "use_dictionary": _REPEATED}
#: The disk is full or may not be written.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class Work:
    """A planned run.

    Attributes:
        dest: where its tables go.
        record: its record, to which the chains add `seconds`, `stages` and rates.
        options: with which it works.
    """

    dest: Destination
    record: dict[str, Any]
    options: runs.Options

    @property
    def run_id(self) -> str:
        """Of the run."""
        return str(self.record["run_id"])

    @property
    def total(self) -> int:
        """Rows of its manifest."""
        return int(self.record["counts"]["to_do"])


def embed(work: Work, bundle: Bundle) -> None:
    """Photos of the manifest to the embeddings table."""
    from picinspector.stages.encode import Encode

    options = work.options
    column = next(iter(caption_crop(bundle))) if options.captions else None

    def chain(shards: list[str], rows: int, report: Reporter) -> None:
        pools = _pools(work, rows, options.captions)
        crops = crops_of(bundle, options.captions)
        photos = _read(_manifest(work.dest, shards), pools, read_photos, crops, work, report)
        embedded = photos.map_batches(
            Encode,
            fn_constructor_kwargs={
                "bundle": options.bundle,
                "threads": None if pools.gpus else pools.cpus,
                "report": report,
                "fingerprint": bundle.encoder_fingerprint,
                "keep": column,
            },
            batch_size=pools.batch_size,
            batch_format="pyarrow",
            compute=_pool(pools.encoders, pools.at_once),
            num_cpus=pools.cpus,
            num_gpus=pools.gpus,
        )
        if column is not None:
            embedded = _describe(embedded, column, pools, work, bundle, report)
        _write(embedded, work, "embeddings", _embedding_rows(pools))

    _until_whole(work, "embeddings", "embed", chain, last="encode" if column is None else "caption")


def caption(work: Work, bundle: Bundle) -> None:
    """Stored rows of the manifest, their photos read again, to new rows with captions."""
    from picinspector.stages.caption import read_again  # loads torch

    crops = caption_crop(bundle)

    def chain(shards: list[str], rows: int, report: Reporter) -> None:
        pools = _pools(work, rows, captions=True)
        for stored in _stored(work, "embeddings", shards, None, "source_run_id"):
            fresh = stored.map_batches(_with_caption_columns, batch_size=None, batch_format="pyarrow")
            photos = _read(fresh, pools, read_again, crops, work, report)
            described = _describe(photos, next(iter(crops)), pools, work, bundle, report)
            _write(described, work, "embeddings", _embedding_rows(pools))

    _until_whole(work, "embeddings", "caption", chain)


def score(work: Work, bundle: Bundle, source: str | None = None) -> None:
    """Embeddings, this run's own or those that a column of its manifest, `source`, names, to the scores table."""

    def chain(shards: list[str], rows: int, report: Reporter) -> None:
        for stored in _stored(work, "embeddings", shards, score_columns(bundle), source):
            scored = stored.map_batches(
                Score,
                fn_constructor_kwargs={
                    "bundle": work.options.bundle,
                    "report": report,
                    "fingerprint": bundle.scorer_fingerprint,
                },
                batch_size=_SCORE_BATCH,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=runs.size_scorers(-(-rows // _SCORE_BATCH))),
                num_cpus=1,
            )
            _write(scored, work, "scores", _SCORED_ROWS_PER_FILE)

    _until_whole(work, "scores", "score", chain)


def copy(work: Work) -> None:
    """Stored rows of both tables, as they are, to this run: few large files in place of many small ones."""

    def chain_of(table: TableName, rows_per_file: int) -> Callable[[list[str], int, Reporter], None]:
        def chain(shards: list[str], rows: int, report: Reporter) -> None:
            for stored in _stored(work, table, shards, None, f"{table}_run_id"):
                _write(stored, work, table, rows_per_file)

        return chain

    _until_whole(work, "embeddings", "copy_embeddings", chain_of("embeddings", _ROWS_PER_FILE))
    _until_whole(work, "scores", "copy_scores", chain_of("scores", _SCORED_ROWS_PER_FILE))


# --- a table until it is whole ----------------------------------------------------------------------------------------


def _until_whole(
    work: Work,
    table: TableName,
    step: str,
    chain: Callable[[list[str], int, Reporter], None],
    last: str | None = None,
) -> None:
    """Do what is left of a table and check that each row of the manifest is there once.

    A second time, where rows are doubled: a worker of a driver that was killed may have been writing until just now.
    """
    dest, record, started = work.dest, work.record, time.monotonic()
    for attempt in (1, 2):
        shards, rows = ledger.left(dest, table, work.run_id)
        if rows < work.total:
            logs.event("resumed", table=table, written=work.total - rows, left=rows)
            record.setdefault("found_written", {}).setdefault(table, work.total - rows)
        if rows:
            runs.connect(work.options.address)
            with (
                progress(step, rows, work.options.show_progress, last) as report,
                _storage_errors(dest),
                runs.limited(work.options.max_cpus),
            ):
                chain(shards, rows, report)
            record["stages"] |= report.stages()
            record[f"{step}_photos_per_s"] = round(report.rate, 3)
        try:
            ledger.check_rows(dest, table, work.run_id, work.total)
        except TableError:
            if attempt == 2:
                raise
        else:
            break
    record["seconds"][step] = time.monotonic() - started


class _storage_errors:  # noqa: N801  (a context manager that is used like a function)
    """Say in one line what a full disk, or a store that refuses or went away, makes Ray say in many."""

    def __init__(self, dest: Destination) -> None:
        self._dest = dest

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        seen: BaseException | None = error
        while seen is not None:
            cause = getattr(seen, "cause", None) or seen
            if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
                raise StorageError(
                    f"cannot write to {self._dest.url}: {cause.strerror}; make room there and run the same command "
                    "again: what is written stays"
                ) from error
            if isinstance(cause, Exception) and is_storage_error(cause):
                reason = f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else 'no message'}"
                if self._dest.local and isinstance(cause, FileNotFoundError) and len(ray.nodes()) > 1:
                    raise StorageError(
                        f"{self._dest.url} is a folder that not all nodes of the cluster have ({reason}); use a store "
                        "such as s3://, or a disk that they share"
                    ) from error
                raise StorageError(
                    f"cannot read or write {self._dest.url}: {redact(reason)}; run the same command again: what is "
                    "written stays"
                ) from error
            seen = seen.__cause__


# --- pieces of chains -------------------------------------------------------------------------------------------------


def _pools(work: Work, rows: int, captions: bool) -> runs.Pools:
    options = work.options
    pools = runs.size_pools(
        rows, options.encoders, options.gpus_per_encoder, options.batch_size, captions, options.max_cpus
    )
    work.record["pools"] = pools.describe()
    return pools


def _embedding_rows(pools: runs.Pools) -> int:
    return _ROWS_PER_FILE if pools.gpus else _ROWS_PER_FILE_ON_CPU


def _manifest(dest: Destination, shards: list[str]) -> ray.data.Dataset:
    return ray.data.read_parquet(shards, filesystem=dest.filesystem, partitioning=None)


def _read(
    rows: ray.data.Dataset, pools: runs.Pools, stage: Any, crops: Mapping[str, Any], work: Work, report: Reporter
) -> ray.data.Dataset:
    """Rows that name photos through the stage that reads them."""
    return rows.repartition(target_num_rows_per_block=pools.block_rows).map_batches(
        stage,
        fn_kwargs={
            "crops": crops,
            "limits": work.options.limits,
            "storage_options": StorageOptions(work.options.storage_options),
            "is_retry": runs.is_retry,
            "report": report,
        },
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=pools.readers),
        num_cpus=1,
    )


def _pool(actors: int, at_once: int) -> ray.data.ActorPoolStrategy:
    """Photos wait for the first actor only; the others may want nodes that never come."""
    return ray.data.ActorPoolStrategy(min_size=1, initial_size=at_once, max_size=actors)


def _describe(
    rows: ray.data.Dataset, column: str, pools: runs.Pools, work: Work, bundle: Bundle, report: Reporter
) -> ray.data.Dataset:
    """Rows with a column of crops through the captioner."""
    from picinspector.stages.caption import Caption  # loads torch

    return rows.map_batches(
        Caption,
        fn_constructor_kwargs={
            "bundle": work.options.bundle,
            "column": column,
            "threads": None if pools.gpus else pools.cpus,
            "report": report,
            "fingerprint": bundle.caption_fingerprint,
        },
        batch_size=pools.batch_size,
        batch_format="pyarrow",
        compute=_pool(pools.captioners, pools.at_once),
        num_cpus=pools.cpus,
        num_gpus=pools.gpus,
    )


def _write(rows: ray.data.Dataset, work: Work, table: TableName, rows_per_file: int) -> None:
    folder = work.dest.table_path(table, work.run_id)
    least = min(rows_per_file, work.total)
    rows.write_parquet(folder, filesystem=work.dest.writer, min_rows_per_file=least, **PARQUET)


def _stored(
    work: Work, table: TableName, shards: list[str], columns: Sequence[str] | None, source: str | None = None
) -> Iterator[ray.data.Dataset]:
    """Stored rows as datasets of one schema each.

    Args:
        work: whose rows.
        table: of which table.
        shards: those of its manifest that are wanted.
        columns: those of them that are there; None reads all.
        source: the column of its manifest that names the run of each row; None where they are this run's own.
    """
    run_ids, filters = _choose(work, table, shards, source)
    for found, files in work.dest.of_one_schema(table, run_ids):
        names = [name for name in columns if name in found.names] if columns is not None else found.names
        rows = ray.data.read_parquet(
            files,
            filesystem=work.dest.filesystem,
            columns=[*names, "run_id"] if filters else names,
            partitioning=ray.data.datasource.Partitioning("hive") if filters else None,
        )
        if filters:
            rows = rows.map_batches(_keep, fn_args=(filters,), batch_size=None, batch_format="pyarrow")
        yield rows


#: Sorted image ids of one run, in Ray's object store, and whether they are those to keep or those to leave out.
_Filter = tuple[bool, Any]


def _choose(
    work: Work, table: TableName, shards: list[str], source: str | None
) -> tuple[list[str], dict[str, _Filter]]:
    """The runs whose rows these shards want, and what to filter by where they do not want all rows of a run.

    Of the wanted and the unwanted ids whichever are fewer: after a year of nights most of a run is still wanted.
    """
    dest, filters = work.dest, {}  # type: Destination, dict[str, _Filter]
    run = f"'{work.run_id}'" if source is None else source
    with database(shards=_open(dest, shards)) as connection:
        wanted = dict(connection.execute(f"SELECT {run} AS run, count(*) FROM shards GROUP BY 1 ORDER BY 1").fetchall())
        for run_id, count in wanted.items():
            stored = sum(dest.rows_in(dest.files_of(table, [run_id])))
            if count == stored:
                continue
            keep, query = 2 * count <= stored, f"SELECT image_id FROM shards WHERE {run} = '{run_id}'"
            if not keep:
                connection.register("stored", dest.scan(table, [run_id], ["image_id"]))
                query = f"SELECT image_id FROM stored ANTI JOIN ({query}) USING (image_id)"
            ids = _ids(connection.sql(query).to_arrow_table().column("image_id"))
            filters[run_id] = (keep, ray.put(np.sort(ids)))
    return list(wanted), filters


def _open(dest: Destination, shards: list[str]) -> pa.dataset.Dataset:
    return pa.dataset.dataset(shards, filesystem=dest.filesystem, format="parquet")


def _keep(rows: pa.Table, filters: Mapping[str, _Filter]) -> pa.Table:
    ids, run_ids = _ids(rows.column("image_id")), rows.column("run_id").cast(pa.string())
    kept = np.ones(rows.num_rows, dtype=bool)
    for run_id in pc.unique(run_ids).to_pylist():
        if run_id in filters:
            keep, listed = filters[run_id][0], ray.get(filters[run_id][1])
            mine = np.asarray(pc.equal(run_ids, run_id))
            kept[mine] = _is_in(ids[mine], listed) == keep
    return rows.filter(pa.array(kept)).drop_columns(["run_id"])


def _ids(column: pa.ChunkedArray) -> np.ndarray:
    """Image ids as bytes, (N,) of S32: they sort, and travel to the workers without a copy."""
    fixed = column.cast(pa.binary()).cast(pa.binary(32)).combine_chunks()
    chunks = fixed.chunks if isinstance(fixed, pa.ChunkedArray) else [fixed]
    parts = [np.frombuffer(part.buffers()[1], "S32")[part.offset : part.offset + len(part)] for part in chunks]
    return np.concatenate([np.empty(0, "S32"), *parts])


def _is_in(ids: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """Which ids are among the sorted ones."""
    if not len(listed):
        return np.zeros(len(ids), dtype=bool)
    found = np.searchsorted(listed, ids)
    return np.asarray(listed[np.minimum(found, len(listed) - 1)] == ids)


def _with_caption_columns(rows: pa.Table) -> pa.Table:
    """Rows of any version of the embeddings table as this version has them, without captions."""
    widths = (rows.schema.field(f"{name}_embedding").type.list_size for name in ("clip", "dinov2"))
    wanted = schema.embeddings(*widths)
    fresh = {*schema.CAPTION.names, "caption_error", "caption_fingerprint"}
    columns = [pa.nulls(rows.num_rows, part.type) if part.name in fresh else rows.column(part.name) for part in wanted]
    return pa.table(columns, schema=wanted)
