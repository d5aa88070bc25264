"""Embeddings joined with labels, split: what `train_scorer` learns from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

from picinspector import schema
from picinspector.duplicates import content_groups
from picinspector.errors import UsageError
from picinspector.recipe import split_folds
from picinspector.scorer import feature_matrix, to_array
from picinspector.tables import Destination
from training.datasets import SPLITS, absolute_uri
from training.sheets import Sheet
from training.splits import cut_validation, split_by_content

#: What a scorer learns from unless it is told: the quality embedding and what the pixels measure.
FEATURES = ("clip_embedding", *schema.MEASUREMENT_FIELDS.names)
#: Share of the train photos that becomes validation where the labels name none, and of validation photos one in how
#: many nothing but the intervals may see.
_VALIDATION_SHARE, _CALIBRATION_OF = 0.15, 3
_MIN_TRAIN, _MIN_HELD_OUT = 30, 20


@dataclass(frozen=True)
class Labelled:
    """Photos with features and labels. Row i of every array, and `row` = i in `features_of`, are one photo.

    Attributes:
        features: columns of the feature matrix, in order.
        features_of: `row` int64, `features` fixed-size list of F floats; in Ray's object store, in any order.
        labels: (N,) float64, MOS in their own scale.
        weights: (N,) float64.
        split: (N,) train, validation, calibration or test.
        missing: labelled photos that have no embedding.
        fingerprint: of all of that.
    """

    features: tuple[str, ...]
    features_of: ray.data.Dataset
    labels: np.ndarray
    weights: np.ndarray
    split: np.ndarray
    missing: int
    fingerprint: str

    def rows(self, *splits: str) -> np.ndarray:
        """Indices of the photos of these splits, ascending: int64."""
        return np.flatnonzero(np.isin(self.split, splits))

    def matrix(self, *splits: str) -> np.ndarray:
        """Their features, in the same order: float32 (M, F), here on the driver."""
        return gather(self.features_of.iter_batches(batch_size=None, batch_format="pyarrow"), self.rows(*splits))

    @property
    def counts(self) -> dict[str, int]:
        """Photos in each split."""
        return {name: int((self.split == name).sum()) for name in ("train", "validation", "calibration", "test")}

    @property
    def summary(self) -> str:
        """One line for a person."""
        parts = ", ".join(f"{count:,} {name}" for name, count in self.counts.items())
        lost = f"; {self.missing:,} labelled photos have no embedding" if self.missing else ""
        return f"{len(self.labels):,} photos: {parts}{lost}"


def load(
    embeddings: str,
    labels: str,
    features: list[str] | None = None,
    options: dict[str, Any] | None = None,
    seed: int = 0,
) -> Labelled:
    """Join a table of embeddings with a table of labels by uri, and split.

    Args:
        embeddings: a destination of `picinspector score` (the newest committed row of each photo), or a Parquet file
            or a folder of them with `uri` and the features.
        labels: CSV or Parquet with `uri` and `mos`; optionally `split` (train, validation, test), `weight`
            (a rule's label may count less than a person's) and `group` (photos of one content). A relative uri starts
            at the file's folder. Without `split`: 70 % train, 10 % validation, 20 % test, by group and, where the
            embeddings have `phash`, by near-duplicates. A third of what is validation
            becomes calibration.
        features: columns of the embeddings; default `FEATURES`.
        options: fsspec options of both.
        seed: of the splits.

    Raises:
        UsageError: a file, column or value is missing or wrong; says which.
    """
    table = _read_labels(labels, options)
    source = _open(embeddings, options)
    chosen = tuple(features or FEATURES)
    if unknown := [name for name in ("uri", *chosen) if name not in source.columns]:
        raise UsageError(f"{embeddings} has no column {unknown[0]!r}; it has {source.columns}")
    joined = (
        ray.data.read_parquet(
            source.files,
            filesystem=source.filesystem,
            columns=[name for name in ("uri", "run_id", "phash", *chosen) if name in source.columns],
            partitioning=None if source.latest is None else ray.data.datasource.Partitioning("hive"),
        )
        .map_batches(
            _join,
            fn_kwargs={
                "uris": ray.put(table.column("uri").combine_chunks()),
                "latest": None if source.latest is None else ray.put(source.latest),
                "features": chosen,
            },
            batch_size=None,
            batch_format="pyarrow",
        )
        .materialize()
    )
    batches = joined.iter_batches(batch_size=None, batch_format="pyarrow")
    parts = [batch.select(["row", "phash", "digest"]) for batch in batches if batch.num_rows]
    if not parts:
        raise UsageError(f"{labels}: none of its {table.num_rows} photos is in {embeddings}; do the uris agree?")
    found = pa.concat_tables(parts).sort_by("row")
    rows = found.column("row").to_numpy()
    if len(np.unique(rows)) != len(rows):
        twice = table.column("uri")[int(rows[:-1][np.diff(rows) == 0][0])].as_py()
        raise UsageError(f"{embeddings} has several rows of {twice}; give the folder of one run, or the destination")
    matched = table.take(pa.array(rows))
    phash = found.column("phash")
    split = _split(matched, None if phash.null_count else phash.to_numpy(), seed)
    for name, least in {"train": _MIN_TRAIN, "validation": _MIN_HELD_OUT, "calibration": _MIN_HELD_OUT}.items():
        if (count := int((split == name).sum())) < least:
            raise UsageError(f"{labels}: {count} photos for {name}, at least {least} are needed; label more")
    # From now on a photo's number is its place among those that were found.
    place = np.full(table.num_rows, -1)
    place[rows] = np.arange(len(rows))
    features_of = joined.map_batches(
        _renumber, fn_kwargs={"place": ray.put(place)}, batch_size=None, batch_format="pyarrow"
    ).materialize()
    mos, weight = (matched.column(name).to_numpy() for name in ("mos", "weight"))
    told = [
        repr(chosen).encode(),
        *found.column("digest").to_pylist(),
        mos.tobytes(),
        weight.tobytes(),
        split.tobytes(),
    ]
    fingerprint = hashlib.sha256(b"".join(told)).hexdigest()
    return Labelled(chosen, features_of, mos, weight, split, table.num_rows - len(rows), fingerprint)


def gather(batches: Any, rows: np.ndarray) -> np.ndarray:
    """Features of these rows (ascending) out of batches of `features_of`, in their order: float32 (M, F)."""
    matrix: np.ndarray | None = None
    filled = 0
    for batch in batches:
        values, numbers = to_array(batch.column("features")), batch.column("row").to_numpy()
        wanted = np.isin(numbers, rows)
        if matrix is None:
            matrix = np.empty((len(rows), values.shape[1]), dtype=np.float32)
        matrix[np.searchsorted(rows, numbers[wanted])] = values[wanted]
        filled += int(wanted.sum())
    if matrix is None or filled != len(rows):
        raise RuntimeError(f"{filled} of {len(rows)} rows of features arrived")
    return matrix


def _read_labels(labels: str, options: dict[str, Any] | None) -> pa.Table:
    sheet = Sheet(labels, options)
    path, uris = sheet.path, [absolute_uri(uri, labels) for uri in sheet.texts("uri")]
    if len(set(uris)) != len(uris):
        twice = next(uri for uri, following in zip(sorted(uris), sorted(uris)[1:], strict=False) if uri == following)
        raise UsageError(f"{path}: {twice} is there twice; give each photo one label")
    has = {name: name in sheet.columns for name in ("split", "weight", "group")}
    splits = [str(value).strip() if value else None for value in sheet.values("split")] if has["split"] else None
    for row, value in enumerate(splits or [], 1):
        if value is not None and value not in SPLITS:
            raise UsageError(f"{path}: row {row} of column 'split' is {value!r}, expected one of {SPLITS}")
    weights = sheet.numbers("weight") if has["weight"] else [1.0] * len(uris)
    if min(weights, default=1.0) <= 0:
        raise UsageError(f"{path}: row {int(np.argmin(weights)) + 1} of column 'weight' is {min(weights)}, not above 0")
    groups = sheet.choices("group")
    return pa.table(
        {
            "uri": pa.array(uris, pa.string()),
            "mos": pa.array(sheet.numbers("mos"), pa.float64()),
            "weight": pa.array(weights, pa.float64()),
            "split": pa.array(splits or [None] * len(uris), pa.string()),
            "group": pa.array(groups, pa.string()),
        }
    )


@dataclass(frozen=True)
class _Source:
    """Where embeddings are.

    Attributes:
        files, filesystem: the Parquet files.
        columns: what they have, with the partition's.
        latest: `run_id/uri` of the rows that count; None where all do.
    """

    files: list[str]
    filesystem: Any
    columns: list[str]
    latest: pa.Array | None


def _open(embeddings: str, options: dict[str, Any] | None) -> _Source:
    destination = Destination(embeddings, options)
    filesystem, latest = destination.filesystem, None
    if not embeddings.endswith(".parquet") and destination.has("embeddings"):
        newest = destination.latest("embeddings", ["uri", "run_id", "encoder_fingerprint", "error_kind"])
        newest = newest.filter(pc.is_null(newest.column("error_kind")))
        if len(encoders := pc.unique(newest.column("encoder_fingerprint"))) > 1:
            raise UsageError(f"{embeddings} has embeddings of {len(encoders)} bundles; run `picinspector score` again")
        run_ids = sorted(pc.unique(newest.column("run_id")).to_pylist())
        files = [file for run_id in run_ids for file in destination.files(destination.table_path("embeddings", run_id))]
        latest = _keys(newest).combine_chunks()
    else:
        path = destination.root
        files = [path] if path.endswith(".parquet") else sorted(filesystem.find(path))
        files = [file for file in files if file.endswith(".parquet") and filesystem.exists(file)]
    if not files:
        raise UsageError(f"{embeddings}: no Parquet files there; give what `picinspector score` wrote to")
    with filesystem.open(files[0], "rb") as file:
        columns = pq.read_schema(file).names
    return _Source(files, filesystem, columns if latest is None else [*columns, "run_id"], latest)


def _keys(rows: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(rows.column("run_id").cast(pa.string()), rows.column("uri"), "/")


def _join(rows: pa.Table, uris: ray.ObjectRef, latest: ray.ObjectRef | None, features: tuple[str, ...]) -> pa.Table:
    """Rows of embeddings to `row` (index into the labels), `phash`, `features` and their `digest`; others drop out."""
    if latest is not None:
        rows = rows.filter(pc.is_in(_keys(rows), value_set=ray.get(latest)))
    row = pc.index_in(rows.column("uri"), value_set=ray.get(uris))
    rows, row = rows.filter(pc.is_valid(row)), row.drop_null()
    for name in features:  # photos that could not be read
        rows, row = rows.filter(filled := pc.is_valid(rows.column(name))), row.filter(filled)
    matrix = feature_matrix({name: to_array(rows.column(name)) for name in features}, features)
    flat = pa.array(matrix.ravel(), pa.float32())
    phash = rows.column("phash") if "phash" in rows.column_names else pa.nulls(len(row), pa.uint64())
    return pa.table(
        {
            "row": row.cast(pa.int64()),
            "phash": phash,
            "features": pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1]),
            "digest": pa.array(
                [hashlib.blake2b(line.tobytes(), digest_size=8).digest() for line in matrix], pa.binary(8)
            ),
        }
    )


def _renumber(rows: pa.Table, place: ray.ObjectRef) -> pa.Table:
    numbers = pa.array(ray.get(place)[rows.column("row").to_numpy()], pa.int64())
    return pa.table({"row": numbers, "features": rows.column("features")})


def _split(matched: pa.Table, phash: np.ndarray | None, seed: int) -> np.ndarray:
    """A part for every photo, as `load` says."""
    known = matched.column("group").to_pylist()
    if phash is None:  # a hash of its own for each photo, far from all others
        phash = np.random.default_rng(0).integers(0, 2**64, matched.num_rows, dtype=np.uint64)
    groups = content_groups(phash, known)
    parts = split_by_content(groups, matched.column("split").to_pylist(), seed=seed)
    split = np.array(cut_validation(parts, groups, _VALIDATION_SHARE, seed), dtype=object)
    held_out = np.flatnonzero(split == "validation")
    fold = split_folds(len(held_out), _CALIBRATION_OF, seed, groups[held_out])
    split[held_out[fold == 0]] = "calibration"
    return split.astype(str)
