"""What the attribute head is trained on: labels from a table, inputs from stored embeddings or from the photos.

Training rows are an Arrow table: `row` (of the labels), `split`, and float32 vectors `inputs`, `attributes` (NaN where
unknown), `scenes` (all NaN where unknown). With photos, their crops lie beside it as Parquet, by `row`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet

from picinspector.duplicates import content_groups
from picinspector.errors import PhotoError, UsageError
from picinspector.measure import measure
from picinspector.photo import CropSpec, Limits, decode
from picinspector.schema import ATTRIBUTES, MEASUREMENTS, SCENES
from picinspector.storage import StorageOptions, fetch, redact
from picinspector.tables import Destination
from training.datasets import SPLITS, absolute_uri
from training.sheets import Sheet
from training.splits import cut_validation, split_by_content

MEASURED = tuple(f"measured_{name}" for name in MEASUREMENTS)
#: Measurements whose values span orders of magnitude.
HEAVY_TAILED = ("measured_sharpness", "measured_noise", "measured_colorfulness")
_SCENE_COLUMNS = {f"scene_{name}": index for index, name in enumerate(SCENES)}


@dataclass(frozen=True, slots=True)
class Targets:
    """What people said of N photos.

    Attributes:
        uris: as in the embeddings table: absolute paths or fsspec URLs.
        attributes: 0-100 (N, 6), NaN where nobody said.
        scenes: distributions (N, 9), a row of NaN where nobody said.
        splits: one of `datasets.SPLITS`, or None.
        groups: photos that must stay in one split have the same name, or None.
    """

    uris: list[str]
    attributes: np.ndarray
    scenes: np.ndarray
    splits: Sequence[str | None]
    groups: Sequence[str | None]

    def take(self, rows: Sequence[int]) -> Targets:
        """The targets of these rows."""
        return Targets(
            [self.uris[row] for row in rows],
            self.attributes[rows],
            self.scenes[rows],
            [self.splits[row] for row in rows],
            [self.groups[row] for row in rows],
        )


def read_targets(
    path: str | os.PathLike[str],
    mos_scale: tuple[float, float] = (0.0, 100.0),
    options: Mapping[str, Any] | None = None,
) -> Targets:
    """Read a CSV, Parquet or Excel table of `uri` and any of the attributes, `scene` or `scene_*`, `split`, `group`.

    Cells may be empty: a photo may have only a scene, or only some attributes. A relative `uri` starts at the table's
    folder. Where a row has both, its `scene_*` shares win over its `scene`.

    Args:
        path: of the table; a URL where it is in object storage.
        mos_scale: the worst and the best `mos`; brought to 0-100. The other attributes are on 0-100.
        options: fsspec options.

    Raises:
        UsageError: a column is missing or a value is out of range; the message names file, column and row.
    """
    table = Sheet(path, options)
    rated = [name for name in ATTRIBUTES if name in table.columns]
    shares = [name for name in _SCENE_COLUMNS if name in table.columns]
    if not rated and not shares and "scene" not in table.columns:
        raise UsageError(
            f"{table.path} has no column to learn from: expected any of {list(ATTRIBUTES)}, 'scene', 'scene_*'"
        )
    uris = [absolute_uri(uri, path) for uri in table.texts("uri")]
    if len(set(uris)) < len(uris):
        double = next(uri for index, uri in enumerate(uris) if uri in uris[:index])
        raise UsageError(f"{table.path}: column 'uri' has {double} twice; keep one row a photo")
    attributes = np.full((len(uris), len(ATTRIBUTES)), np.nan)
    for name in rated:
        values = np.array(table.numbers(name, empty_ok=True))
        low, high = mos_scale if name == "mos" else (0.0, 100.0)
        _check_range(table.path, name, values, low, high)
        attributes[:, ATTRIBUTES.index(name)] = 100.0 * (values - low) / (high - low)
    scenes = _read_scenes(table, shares)
    return Targets(uris, attributes, scenes, table.choices("split", SPLITS), table.choices("group"))


def _check_range(path: str, name: str, values: np.ndarray, low: float, high: float) -> None:
    outside = np.flatnonzero((values < low) | (values > high))
    advice = "give its scale: --mos-scale WORST BEST" if name == "mos" else "bring it to 0-100"
    if len(outside):
        row = int(outside[0])
        raise UsageError(
            f"{path}: row {row + 1} of column {name!r} is {values[row]:g}, expected {low:g}-{high:g}; {advice}"
        )
    known = values[~np.isnan(values)]
    if len(known) and high - low > 2 and known.max() <= 1:
        raise UsageError(f"{path}: column {name!r} is 0-1 throughout, expected {low:g}-{high:g}; {advice}")


def _read_scenes(table: Sheet, shares: Sequence[str]) -> np.ndarray:
    named = table.choices("scene", SCENES)
    scenes = np.full((len(named), len(SCENES)), np.nan)
    for name in shares:
        scenes[:, _SCENE_COLUMNS[name]] = table.numbers(name, empty_ok=True)
    given = ~np.isnan(scenes).all(axis=1)
    scenes[given] = np.nan_to_num(scenes[given])
    wrong = np.flatnonzero(given & ((np.abs(scenes.sum(axis=1) - 1.0) > 0.01) | (scenes < 0).any(axis=1)))
    if len(wrong):
        row = int(wrong[0])
        raise UsageError(
            f"{table.path}: row {row + 1} of columns 'scene_*' is {scenes[row].tolist()}, "
            "expected shares of at least 0 that sum to 1"
        )
    for row, name in enumerate(named):
        if name is not None and not given[row]:
            scenes[row] = np.eye(len(SCENES))[SCENES.index(name)]
    return scenes


def assign_splits(targets: Targets, phash: np.ndarray | None, where: str, seed: int) -> list[str]:
    """The split of every photo: its own where the labels have one, the others by content; never without validation.

    Args:
        phash: uint64 (N,); None where there are no hashes.
        where: what to name in the error if hashes would be needed.

    Raises:
        UsageError: hashes are needed and absent, or train or validation ends up empty.
    """
    if phash is not None:
        groups = content_groups(phash, targets.groups)
        splits = cut_validation(split_by_content(groups, targets.splits, seed=seed), groups, seed=seed)
    else:
        splits = [split for split in targets.splits if split is not None]
        if len(splits) < len(targets.uris) or "validation" not in splits:
            raise UsageError(
                f"{where} has no column 'phash' to split by: give each label a `split` ({', '.join(SPLITS)})"
            )
    for name in ("train", "validation"):
        if name not in splits:
            raise UsageError(f"{len(splits)} labelled photos leave none for {name}: label more, or give them a `split`")
    return splits


# --- stored embeddings ------------------------------------------------------------------------------------------------


def read_embeddings(
    source: str, targets: Targets, features: Sequence[str], options: Mapping[str, Any] | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray | None]:
    """The stored columns of the labelled photos.

    Args:
        source: a destination of `picinspector score` (each photo's newest committed row), or a Parquet file or folder
            with `uri` and the features.
        features: columns to read.
        options: fsspec options.

    Returns:
        rows of `targets` that are stored without an error, the columns name -> (M,) or (M, D) in their order, and
        their `phash` uint64 (M,), None where the source has none.

    Raises:
        UsageError: a column is missing, or none of the photos is stored.
    """
    table = _read_stored(source, features, targets.uris, options)
    row_of = {uri: row for row, uri in enumerate(table.column("uri").to_pylist())}
    if len(row_of) < table.num_rows:
        raise UsageError(
            f"{redact(source)}: photos are there more than once; give the destination, or one run's folder"
        )
    complete = np.logical_and.reduce([_filled(table.column(name)) for name in features])
    rows = [row for row, uri in enumerate(targets.uris) if uri in row_of and complete[row_of[uri]]]
    if not rows:
        raise UsageError(
            f"none of the {len(targets.uris)} labelled photos has embeddings in {source}, {targets.uris[0]} for one: "
            "score them first, and name them in the labels as the embeddings do (column 'uri')"
        )
    table = table.take(pa.array([row_of[targets.uris[row]] for row in rows]))
    phash = None
    if "phash" in table.column_names and table.column("phash").null_count == 0:
        phash = table.column("phash").to_numpy().astype(np.uint64)
    return np.array(rows), {name: _matrix(table.column(name), source, name) for name in features}, phash


def _read_stored(
    source: str, features: Sequence[str], uris: Sequence[str], options: Mapping[str, Any] | None
) -> pa.Table:
    """Rows of these photos: `uri`, the features and, where there is one, `phash`."""
    destination = Destination(source, options)
    if not destination.filesystem.isfile(destination.root) and destination.has("embeddings"):
        return _read_destination(destination, features, uris)
    try:
        dataset = pa.dataset.dataset(destination.root, filesystem=destination.filesystem, format="parquet")
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{source}: no committed embeddings and no readable Parquet here ({reason})") from error
    _check_columns(source, ["uri", *features], dataset.schema.names)
    optional = [name for name in ("phash",) if name in dataset.schema.names]
    return dataset.to_table(columns=["uri", *optional, *features], filter=pc.field("uri").isin(uris))


def _read_destination(destination: Destination, features: Sequence[str], uris: Sequence[str]) -> pa.Table:
    newest = destination.latest("embeddings", ["uri", "run_id", "encoder_fingerprint"])
    newest = newest.filter(pc.is_in(newest.column("uri"), pa.array(uris, pa.string())))
    if len(newest.column("encoder_fingerprint").unique()) > 1:
        raise UsageError(
            f"{destination.url} has the labelled photos' embeddings from more than one bundle: "
            "score them all with one, into a destination of their own"
        )
    run_ids = newest.column("run_id").unique().to_pylist()
    source = destination.scan("embeddings", run_ids, ["uri", "run_id"])
    if source is None:
        return pa.table({name: pa.array([], pa.string()) for name in ("uri", *features)})
    _check_columns(destination.url, features, source.dataset_schema.names)
    source = destination.scan("embeddings", run_ids, ["uri", "run_id", "phash", *features])
    assert source is not None
    wanted = pa.array(newest.column("uri").to_pylist(), pa.string())
    parts = [batch.filter(pc.is_in(batch.column("uri"), wanted)) for batch in source.to_batches()]
    table = pa.Table.from_batches(parts, source.projected_schema)
    run_of = dict(zip(newest.column("uri").to_pylist(), newest.column("run_id").to_pylist(), strict=True))
    rows = zip(table.column("uri").to_pylist(), table.column("run_id").to_pylist(), strict=True)
    return table.filter(pa.array([run_of[uri] == run_id for uri, run_id in rows], pa.bool_()))


def _check_columns(source: str, wanted: Sequence[str], names: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise UsageError(f"{source} has no column {missing[0]!r}; it has {list(names)}")


def _filled(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(pc.is_valid(column))


def _matrix(column: pa.ChunkedArray, source: str, name: str) -> np.ndarray:
    """A column of numbers as (N,), one of equally long vectors as (N, D)."""
    values = column.combine_chunks()
    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        if not pa.types.is_fixed_size_list(values.type):
            return np.asarray(values.to_numpy(zero_copy_only=False))
        return np.asarray(values.flatten().to_numpy(zero_copy_only=False)).reshape(len(values), -1)
    lengths = set(pc.list_value_length(values).to_pylist())
    if len(lengths) != 1:
        raise UsageError(f"{source}: the vectors of column {name!r} are {sorted(lengths)} long, expected one length")
    return np.asarray(values.flatten().to_numpy(zero_copy_only=False)).reshape(len(values), -1)


# --- photos -----------------------------------------------------------------------------------------------------------


def read_crops(batch: pa.Table, crop: CropSpec, options: StorageOptions) -> pa.Table:
    """The Ray Data stage: `row`, `uri` in; `row`, `phash`, `measured_*`, `crop`, `error_message` out.

    A crop is the S * S * 3 uint8 values of the backbone's input; null, as the rest, where the photo cannot be read.
    """
    uris = batch.column("uri").to_pylist()
    rows = []
    for uri, data in zip(uris, fetch(uris, options.reveal()), strict=True):
        try:
            if isinstance(data, PhotoError):
                raise data
            photo = decode(data, [crop], Limits(), os.path.splitext(uri)[1])  # noqa: PTH122
        except PhotoError as error:
            rows.append({"error_message": error.message})
            continue
        measured = {f"measured_{name}": value for name, value in measure(photo.working).items()}
        rows.append({"phash": photo.facts["phash"], "crop": photo.crops[0].tobytes(), **measured})
    kinds = {"phash": pa.uint64(), **dict.fromkeys(MEASURED, pa.float32()), "error_message": pa.string()}
    columns = {name: pa.array([row.get(name) for row in rows], kind) for name, kind in kinds.items()}
    crops = pa.array([row.get("crop") for row in rows], pa.binary(crop.crop_px**2 * 3))
    return pa.table({"row": batch.column("row"), **columns, "crop": crops})


def read_facts(crops: pa.dataset.Dataset, targets: Targets) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """What `read_embeddings` returns, of the crops that were cut: the columns are the measurements.

    Raises:
        UsageError: no photo could be read.
    """
    table = crops.to_table(columns=["row", "phash", "error_message", *MEASURED])
    good = table.filter(pc.is_null(table.column("error_message"))).sort_by("row")
    if not good.num_rows:
        failed = table.sort_by("row").slice(0, 1).to_pylist()[0]
        raise UsageError(
            f"none of the labelled photos can be read; {targets.uris[failed['row']]}: {failed['error_message']}"
        )
    columns = {name: good.column(name).to_numpy() for name in MEASURED}
    return good.column("row").to_numpy(), columns, good.column("phash").to_numpy()


def crop_pixels(column: pa.ChunkedArray, side_px: int) -> np.ndarray:
    """Crops of `read_crops` without nulls, as uint8 (N, S, S, 3)."""
    width, parts = side_px * side_px * 3, []
    for chunk in column.chunks:
        pixels = np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width)
        parts.append(pixels.reshape(-1, side_px, side_px, 3))
    return np.concatenate(parts) if parts else np.empty((0, side_px, side_px, 3), np.uint8)


# --- training rows ----------------------------------------------------------------------------------------------------


def training_rows(rows: np.ndarray, targets: Targets, splits: Sequence[str], inputs: np.ndarray) -> pa.Table:
    """The table that workers read.

    Args:
        rows: of the labels (N,).
        inputs: (N, F), the head's stored inputs; no column where F is 0.
    """
    columns = {"row": pa.array(rows, pa.int64()), "split": pa.array(splits, pa.string())}
    columns |= {"attributes": _vectors(targets.attributes), "scenes": _vectors(targets.scenes)}
    if inputs.shape[1]:  # Arrow has no rows of nothing
        columns["inputs"] = _vectors(inputs)
    return pa.table(columns)


def attach(crops: pa.Table, rows: pa.Table) -> pa.Table:
    """Training rows with their crops: those rows of `crops` (row, crop) that `rows` has, in the order of `crops`."""
    positions = pc.index_in(crops.column("row"), rows.column("row").combine_chunks())
    there = pc.is_valid(positions)
    mine = rows.take(positions.filter(there))
    return mine.append_column("crop", crops.column("crop").filter(there))


def vectors_of(column: pa.ChunkedArray) -> np.ndarray:
    """A column of `training_rows` as float32 (N, F)."""
    array = column.combine_chunks()
    return np.asarray(array.flatten().to_numpy(zero_copy_only=False)).reshape(len(array), array.type.list_size)


def _vectors(matrix: np.ndarray) -> pa.FixedSizeListArray:
    flat = pa.array(np.ascontiguousarray(matrix, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])
