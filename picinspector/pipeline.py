"""The jobs as Ray Data chains: a library in, committed tables out.

::

    list -> anti-join with what is committed -> manifest
    manifest   -> read_photos (CPU tasks) -> Encode (actor pool) [-> Caption (actor pool)] -> embeddings
    embeddings -> Score (CPU actor pool)  -> scores
    rows checked against the manifest -> run.json: committed
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from picinspector import runs, schema
from picinspector.bundle import Bundle, open_bundle
from picinspector.errors import FINAL_KINDS, UsageError
from picinspector.manifest import list_library
from picinspector.photo import Limits
from picinspector.progress import progress
from picinspector.stages.read import caption_crop, crops_of, read_photos
from picinspector.stages.score import Score, score_columns
from picinspector.storage import StorageOptions, redact
from picinspector.tables import Choice, Destination, choose

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
        captions: whether `score` describes the photos it embeds.
        encoders, gpus_per_encoder, batch_size: see `runs.Pools`.
        address: the Ray cluster; None takes `RAY_ADDRESS`, else starts Ray on this machine.
        show_progress: one progress line on stderr.
    """

    bundle: str = "builtin"
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    limit: int | None = None
    limits: Limits = field(default_factory=Limits)
    captions: bool = False
    encoders: int | None = None
    gpus_per_encoder: float | None = None
    batch_size: int | None = None
    address: str | None = None
    show_progress: bool = True


def plan_score(library: str, destination: str, options: Options = Options()) -> dict[str, Any]:
    """What `score` would do, as counts; starts no cluster and writes nothing."""
    bundle = open_bundle(options.bundle)
    dest = Destination(destination, options.storage_options)
    listing, to_do, size = _Listing(library, dest, bundle, options), 0, 0
    for table in listing.to_do():
        to_do += table.num_rows
        size += pc.sum(table.column("size_bytes"), min_count=0).as_py()
    return {
        "library": redact(library),
        "destination": dest.url,
        "bundle": f"{bundle.name} {bundle.version}",
        "scorer_kind": bundle.scorer_kind,
        "listed": listing.listed,
        "listed_bytes": listing.listed_bytes,
        "unchanged": listing.listed - listing.new,
        "to_do": to_do,
        "to_do_bytes": size,
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
    bundle, dest, record = _begin("score", destination, options, library)
    if options.captions:
        _need_captioner(bundle)
    started, run_id, seconds = time.monotonic(), record["run_id"], record["seconds"]
    listing = _Listing(library, dest, bundle, options)
    total = dest.write_manifest(run_id, listing.to_do())
    record["counts"] |= {"listed": listing.listed, "unchanged": listing.listed - listing.new, "to_do": total}
    seconds["list"] = time.monotonic() - started
    if total:
        dest.check_manifest(run_id, total)
        runs.connect(options.address)
        pools = _size_pools(total, options, options.captions)
        record["pools"] = asdict(pools)
        seconds["embed"], record["embed_photos_per_s"] = _embed(dest, run_id, bundle, options, pools, total)
        seconds["score"], record["score_photos_per_s"] = _score(dest, run_id, bundle, options, total)
    seconds["total"] = time.monotonic() - started
    _commit(dest, record)
    return record


def rescore(destination: str, options: Options = Options()) -> dict[str, Any]:
    """Score the stored embeddings whose latest score is another scorer's than `options.bundle`'s. Reads no photo.

    Returns:
        the run record, committed to the destination.

    Raises:
        PicInspectorError: nothing was committed; running the same command again is safe.
    """
    bundle, dest, record = _begin("rescore", destination, options, None)
    started, run_id, seconds = time.monotonic(), record["run_id"], record["seconds"]
    listed, stale = _stale(dest, bundle)
    total = dest.write_manifest(run_id, iter([stale.select(schema.MANIFEST.names)]))
    record["counts"] |= {"listed": listed, "unchanged": listed - total, "to_do": total}
    seconds["list"] = time.monotonic() - started
    if total:
        runs.connect(options.address)
        rows = stale.select(["run_id", "image_id"])
        seconds["score"], record["score_photos_per_s"] = _score(dest, run_id, bundle, options, total, rows)
    seconds["total"] = time.monotonic() - started
    _commit(dest, record)
    return record


def caption(destination: str, choice: Choice, options: Options = Options()) -> dict[str, Any]:
    """Describe photos that are scored already: their pixels are read once more, their embeddings are not made again.

    The rows chosen are written anew, with their captions, to both tables; those that this captioner has described
    already are left as they are.

    Args:
        destination: where `score` wrote.
        choice: which of its photos.
        options: `limit` is of no use here: `choice` has one.

    Returns:
        the run record, committed to the destination.

    Raises:
        PicInspectorError: nothing was committed; running the same command again is safe.
    """
    bundle, dest, record = _begin("caption", destination, options, None)
    _need_captioner(bundle)
    started, run_id, seconds = time.monotonic(), record["run_id"], record["seconds"]
    listed, stale = _stale(dest, bundle)
    if stale.num_rows:
        raise UsageError(
            f"{dest.url}: {stale.num_rows} photos have no score of bundle {bundle.name} {bundle.version}, and captions "
            "are held against its heads; run `picinspector rescore` with this bundle first"
        )
    rows = _chosen(dest, choose(dest, choice, ["image_id"]), bundle)
    total = dest.write_manifest(run_id, iter([rows.select(schema.MANIFEST.names)] if rows.num_rows else []))
    record["counts"] |= {"listed": listed, "unchanged": listed - total, "to_do": total}
    seconds["list"] = time.monotonic() - started
    if total:
        runs.connect(options.address)
        pools = _size_pools(total, options, captions=True)
        record["pools"] = asdict(pools)
        keys = rows.select(["run_id", "image_id"])
        seconds["caption"], record["caption_photos_per_s"] = _caption(dest, run_id, bundle, options, pools, total, keys)
        seconds["score"], record["score_photos_per_s"] = _score(dest, run_id, bundle, options, total)
    seconds["total"] = time.monotonic() - started
    _commit(dest, record)
    return record


def _commit(dest: Destination, record: dict[str, Any]) -> None:
    run_id = record["run_id"]
    unread: dict[str, int] = {}
    if record["kind"] == "caption":
        for error, count in dest.tally("embeddings", "caption_error", run_id).items():
            kind = error.partition(":")[0]
            unread[kind] = unread.get(kind, 0) + count
    errors, sources = dest.tally("scores", "error_kind", run_id), dest.tally("scores", "caption_source", run_id)
    dest.commit(runs.finish_record(record, errors, sources, unread))


def _need_captioner(bundle: Bundle) -> None:
    if not bundle.has("captioner"):
        raise UsageError(f"bundle {bundle.name} {bundle.version} has no captioner; use another, or --captions none")


def _size_pools(total: int, options: Options, captions: bool) -> runs.Pools:
    return runs.size_pools(total, options.encoders, options.gpus_per_encoder, options.batch_size, captions)


def _begin(
    kind: str, destination: str, options: Options, library: str | None
) -> tuple[Bundle, Destination, dict[str, Any]]:
    bundle = open_bundle(options.bundle)
    for piece in bundle.pieces:  # a damaged bundle fails here, before anything is written, and not on a worker
        bundle.piece(piece)
    score_columns(bundle)
    dest = Destination(destination, options.storage_options)
    dest.check_writable()
    return bundle, dest, runs.new_record(kind, bundle, dest.url, library)


# --- the chains -------------------------------------------------------------------------------------------------------


def _embed(
    dest: Destination, run_id: str, bundle: Bundle, options: Options, pools: runs.Pools, total: int
) -> tuple[float, float]:
    """Manifest to embeddings table, checked; returns seconds and photos a second."""
    from picinspector.stages.encode import Encode  # loads torch, which nothing else on the driver needs

    started = time.monotonic()
    column = next(iter(caption_crop(bundle))) if options.captions else None
    with progress("embed", total, options.show_progress) as report:
        rows = (
            ray.data.read_parquet(dest.files(dest.manifest_path(run_id)), filesystem=dest.filesystem, partitioning=None)
            .repartition(target_num_rows_per_block=pools.block_rows)
            .map_batches(
                read_photos,
                fn_kwargs={
                    "crops": crops_of(bundle, options.captions),
                    "limits": options.limits,
                    "storage_options": StorageOptions(options.storage_options),
                    "is_retry": runs.is_retry,
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
                    "report": report if column is None else None,  # a photo is done when it is past the last stage
                    "fingerprint": bundle.encoder_fingerprint,
                    "keep": column,
                },
                batch_size=pools.batch_size,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=pools.encoders),
                num_cpus=pools.cpus,
                num_gpus=pools.gpus,
            )
        )
        if column is not None:
            rows = _add_captions(rows, column, bundle, options, pools, report)
        rows.write_parquet(
            dest.table_path("embeddings", run_id),
            filesystem=dest.filesystem,
            min_rows_per_file=min(_ROWS_PER_FILE, total),
        )
    dest.check_rows("embeddings", run_id, total)
    return time.monotonic() - started, round(report.rate, 3)


def _caption(
    dest: Destination, run_id: str, bundle: Bundle, options: Options, pools: runs.Pools, total: int, keys: pa.Table
) -> tuple[float, float]:
    """Stored embeddings (run_id, image_id) to new rows with captions, checked; returns seconds and photos a second."""
    from picinspector.stages.caption import read_again  # loads torch

    started, crops = time.monotonic(), caption_crop(bundle)
    with progress("caption", total, options.show_progress) as report:
        for _, rows in _stored(dest, keys, None):
            read = (
                rows.map_batches(_with_caption_columns, batch_size=None, batch_format="pyarrow")
                .repartition(target_num_rows_per_block=pools.block_rows)
                .map_batches(
                    read_again,
                    fn_kwargs={
                        "crops": crops,
                        "limits": options.limits,
                        "storage_options": StorageOptions(options.storage_options),
                        "is_retry": runs.is_retry,
                    },
                    batch_size=None,
                    batch_format="pyarrow",
                    compute=ray.data.TaskPoolStrategy(size=pools.readers),
                    num_cpus=1,
                )
            )
            _add_captions(read, next(iter(crops)), bundle, options, pools, report).write_parquet(
                dest.table_path("embeddings", run_id),
                filesystem=dest.filesystem,
                min_rows_per_file=min(_ROWS_PER_FILE, total),
            )
    dest.check_rows("embeddings", run_id, total)
    return time.monotonic() - started, round(report.rate, 3)


def _add_captions(
    rows: ray.data.Dataset, column: str, bundle: Bundle, options: Options, pools: runs.Pools, report: Any
) -> ray.data.Dataset:
    from picinspector.stages.caption import Caption  # loads torch

    return rows.map_batches(
        Caption,
        fn_constructor_kwargs={
            "bundle": options.bundle,
            "column": column,
            "threads": None if pools.gpus else pools.cpus,
            "report": report,
            "fingerprint": bundle.caption_fingerprint,
        },
        batch_size=pools.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=pools.captioners),
        num_cpus=pools.cpus,
        num_gpus=pools.gpus,
    )


def _score(
    dest: Destination, run_id: str, bundle: Bundle, options: Options, total: int, stale: pa.Table | None = None
) -> tuple[float, float]:
    """Embeddings to scores table, checked; returns seconds and photos a second.

    Of this run's embeddings; or, where `stale` (run_id, image_id) is given, of those rows of earlier runs.
    """
    started = time.monotonic()
    keys = stale if stale is not None else pa.table({"run_id": [run_id]})
    with progress("score", total, options.show_progress) as report:
        for _, rows in _stored(dest, keys, score_columns(bundle)):
            rows.map_batches(
                Score,
                fn_constructor_kwargs={
                    "bundle": options.bundle,
                    "report": report,
                    "fingerprint": bundle.scorer_fingerprint,
                },
                batch_size=_SCORE_BATCH,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=4),
                num_cpus=1,
            ).write_parquet(
                dest.table_path("scores", run_id),
                filesystem=dest.filesystem,
                min_rows_per_file=min(_ROWS_PER_FILE * 8, total),
            )
    dest.check_rows("scores", run_id, total)
    return time.monotonic() - started, round(report.rate, 3)


def _stored(
    dest: Destination, keys: pa.Table, columns: Sequence[str] | None
) -> Iterator[tuple[pa.Schema, ray.data.Dataset]]:
    """Stored embeddings as datasets of one schema each.

    Args:
        dest: where they are.
        keys: `run_id`, `image_id` of the rows; without `image_id` all rows of those runs.
        columns: those of them that are there; None reads all.
    """
    for found, run_ids in dest.runs_of_one_schema(sorted(set(keys.column("run_id").to_pylist()))):
        names = [name for name in columns if name in found.names] if columns is not None else found.names
        chosen = "image_id" in keys.column_names
        rows = ray.data.read_parquet(
            [file for run_id in run_ids for file in dest.files(dest.table_path("embeddings", run_id))],
            filesystem=dest.filesystem,
            columns=[*names, "run_id"] if chosen else names,
            partitioning=ray.data.datasource.Partitioning("hive") if chosen else None,
        )
        if chosen:
            wanted = ray.put(_row_keys(keys).combine_chunks())
            rows = rows.map_batches(_keep_rows, fn_args=(wanted,), batch_size=None, batch_format="pyarrow")
        yield found, rows


def _keep_rows(rows: pa.Table, keys: ray.ObjectRef) -> pa.Table:
    return rows.filter(pc.is_in(_row_keys(rows), value_set=ray.get(keys))).drop_columns(["run_id"])


def _with_caption_columns(rows: pa.Table) -> pa.Table:
    """Rows of any version of the embeddings table as this version has them, without captions."""
    widths = (rows.schema.field(f"{name}_embedding").type.list_size for name in ("clip", "dinov2"))
    wanted = schema.embeddings(*widths)
    fresh = {*schema.CAPTION.names, "caption_error", "caption_fingerprint"}
    columns = [pa.nulls(rows.num_rows, part.type) if part.name in fresh else rows.column(part.name) for part in wanted]
    return pa.table(columns, schema=wanted)


def _row_keys(rows: pa.Table) -> pa.ChunkedArray:
    """One text for each row: an image may have rows in several runs."""
    return pc.binary_join_element_wise(rows.column("run_id").cast(pa.string()), rows.column("image_id"), "/")


# --- what there is to do ----------------------------------------------------------------------------------------------


@dataclass
class _Listing:
    """A library against what is committed, as one stream.

    Attributes:
        listed, listed_bytes: photos in the library; known once `to_do` is exhausted.
        new: photos of them to do, whatever the limit.
    """

    library: str
    dest: Destination
    bundle: Bundle
    options: Options
    listed: int = 0
    listed_bytes: int = 0
    new: int = 0
    _failure: Exception | None = None

    def to_do(self) -> Iterator[pa.Table]:
        """Manifest rows that no committed run has done with these encoders, at most `options.limit`, as shards.

        Raises:
            UsageError: there are no photos; or what is done already was scored by another scorer.
        """
        done = _done(self.dest, self.bundle)
        limit = self.options.limit
        with duckdb.connect() as connection:
            # DuckDB takes a stream for one row and would build its hash table on the library instead of on `done`.
            connection.execute("SET disabled_optimizers = 'build_side_probe_side,join_order'")
            connection.register("listing", pa.RecordBatchReader.from_batches(schema.MANIFEST, self._batches()))
            connection.register("done", done)
            rows = connection.sql("SELECT * FROM listing ANTI JOIN done USING (image_id)")
            for batch in rows.to_arrow_reader(_MANIFEST_SHARD_ROWS):
                table = pa.Table.from_batches([batch]).cast(schema.MANIFEST)
                if limit is not None:
                    table = table.slice(0, max(0, limit - self.new))
                self.new += batch.num_rows
                if table.num_rows:
                    yield table
        if self._failure is not None:
            raise self._failure
        if not self.listed:
            raise UsageError(f"{redact(self.library)}: no photos there; looked for the file names of photos")

    def _batches(self) -> Iterator[pa.RecordBatch]:
        try:
            for table in list_library(self.library, self.options.storage_options):
                self.listed += table.num_rows
                self.listed_bytes += pc.sum(table.column("size_bytes"), min_count=0).as_py()
                yield from table.to_batches()
        except Exception as error:  # DuckDB would make a text of its own of it; kept here, raised above
            self._failure = error


def _done(dest: Destination, bundle: Bundle) -> pa.Table:
    """Ids of images whose newest row needs nothing: these encoders made it, or its bytes are past help.

    Raises:
        UsageError: they were scored by another scorer, and one ranking must have one scorer.
    """
    if not dest.has("embeddings"):
        return pa.table({"image_id": pa.array([], pa.string())})
    final = ", ".join(f"'{kind}'" for kind in FINAL_KINDS)
    embeddings = dest.latest("embeddings", ["image_id", "encoder_fingerprint", "error_kind"])
    scores = dest.latest("scores", ["image_id", "scorer_fingerprint"])
    with duckdb.connect() as connection:
        connection.register("embeddings", embeddings)
        connection.register("scores", scores)
        connection.execute(
            "CREATE TABLE done AS SELECT image_id FROM embeddings "
            f"WHERE encoder_fingerprint = '{bundle.encoder_fingerprint}' "
            f"AND (error_kind IS NULL OR error_kind IN ({final}))"
        )
        other = connection.execute(
            "SELECT count(*) FROM done JOIN scores USING (image_id) "
            f"WHERE scorer_fingerprint <> '{bundle.scorer_fingerprint}'"
        ).fetchall()[0][0]
        if other:
            raise UsageError(
                f"{dest.url}: {other} photos were scored by another scorer than that of bundle {bundle.name} "
                f"{bundle.version}, and one ranking must have one; run `picinspector rescore` with this bundle first"
            )
        return connection.sql("SELECT image_id FROM done").to_arrow_table()


def _chosen(dest: Destination, images: pa.Table, bundle: Bundle) -> pa.Table:
    """Manifest columns and `run_id` of the newest embeddings rows of these images that lack this bundle's caption."""
    columns = [*schema.MANIFEST.names, "run_id", "error_kind"]
    marks = ["caption_fingerprint", "caption_error"]
    try:
        latest = dest.latest("embeddings", [*columns, *marks])
    except UsageError:  # all rows are an older version's: nothing is captioned
        latest = dest.latest("embeddings", columns)
        for name in marks:
            latest = latest.append_column(name, pa.nulls(latest.num_rows, pa.string()))
    mine = pc.is_in(latest.column("image_id"), value_set=images.column("image_id").combine_chunks())
    same = pc.fill_null(pc.equal(latest.column("caption_fingerprint"), bundle.caption_fingerprint), False)
    done = pc.and_(same, pc.is_null(latest.column("caption_error")))
    return latest.filter(pc.and_(pc.and_(mine, pc.is_null(latest.column("error_kind"))), pc.invert(done)))


def _stale(dest: Destination, bundle: Bundle) -> tuple[int, pa.Table]:
    """How many photos the destination has, and the newest embeddings rows that this scorer has not scored.

    Raises:
        UsageError: nothing is there, or other encoders made it.
    """
    columns = [*schema.MANIFEST.names, "run_id", "encoder_fingerprint", "error_kind"]
    latest = dest.latest("embeddings", columns)
    good = latest.filter(pc.is_null(latest.column("error_kind")))
    other = pc.not_equal(good.column("encoder_fingerprint"), bundle.encoder_fingerprint)
    if count := pc.sum(other, min_count=0).as_py():
        raise UsageError(
            f"{dest.url}: {count} of {good.num_rows} photos were embedded by other encoders than those of bundle "
            f"{bundle.name} {bundle.version}; run `picinspector score` with this bundle first"
        )
    scores = dest.latest("scores", ["image_id", "scorer_fingerprint"])
    same = scores.filter(pc.equal(scores.column("scorer_fingerprint"), bundle.scorer_fingerprint)).column("image_id")
    return latest.num_rows, latest.filter(pc.invert(pc.is_in(latest.column("image_id"), value_set=same)))
