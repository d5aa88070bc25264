"""What Ray Data maps over batches: Arrow table in, Arrow table out. Nothing here knows Ray.

::

    manifest rows --read_photos--> facts, measurements, crops --Encode--> embeddings rows --Score--> scores rows

A row that fails keeps its identity, gets `error_kind` and `error_message`, and travels on with nulls.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from picinspector import schema
from picinspector.attributes import AttributePredictor
from picinspector.bundle import Bundle, open_bundle
from picinspector.clip import ClipEncoder
from picinspector.clip import crop_spec as clip_crop_spec
from picinspector.clip import read_preprocess as read_clip_preprocess
from picinspector.dinov2 import Dinov2Encoder
from picinspector.dinov2 import crop_spec as dinov2_crop_spec
from picinspector.dinov2 import read_preprocess as read_dinov2_preprocess
from picinspector.errors import ErrorKind, PhotoError
from picinspector.measure import measure
from picinspector.photo import CropSpec, Limits, Photo, decode
from picinspector.scorer import Scorer
from picinspector.storage import fetch
from picinspector.zeroshot import ZeroShot

#: Told how many rows were finished and how many of them have an error.
Report = Callable[[int, int], None]

#: Columns between `read_photos` and `Encode`: raw uint8 crops, in the order of `crops_of`.
_CROPS = ("clip_crop", "dinov2_crop")


class Encoder(Protocol):
    """What `Encode` asks of an encoder; `ClipEncoder` and `Dinov2Encoder` both are."""

    crop: CropSpec
    dim: int

    def encode(self, crops: np.ndarray) -> np.ndarray:
        """Uint8 (B, S, S, 3) to L2-normalised float16 (B, D)."""
        ...


def crops_of(bundle: Bundle) -> tuple[CropSpec, CropSpec]:
    """The crops a bundle's two encoders want, read from their configs without loading weights."""
    clip = clip_crop_spec(read_clip_preprocess(bundle.folder / "clip"))
    return clip, dinov2_crop_spec(read_dinov2_preprocess(bundle.folder / "dinov2"))


# --- 1. fetch, decode, measure, crop ----------------------------------------------------------------------------------


def read_photos(
    manifest: pa.Table,
    crops: Sequence[CropSpec],
    limits: Limits,
    storage_options: Mapping[str, Any] | None = None,
) -> pa.Table:
    """Fetch and decode a batch: manifest columns in; facts, measurements, crops and errors beside them out.

    Bytes and full-size pixels end here. A crop is a binary value of S * S * 3 bytes, null where the row has an error.
    """
    rows = [_read(photo, crops) for photo in _photos(manifest, crops, limits, storage_options)]
    columns = {name: manifest.column(name) for name in schema.MANIFEST.names}
    for part in (*schema.FACTS, *schema.MEASUREMENT_FIELDS):
        columns[part.name] = pa.array([row.get(part.name) for row in rows], part.type)
    for name in _CROPS:
        columns[name] = pa.array([row.get(name) for row in rows], pa.large_binary())
    for name in ("error_kind", "error_message"):
        columns[name] = pa.array([row.get(name) for row in rows], pa.string())
    return pa.table(columns)


def _photos(
    manifest: pa.Table, crops: Sequence[CropSpec], limits: Limits, storage_options: Mapping[str, Any] | None
) -> list[Photo | PhotoError]:
    uris: list[str] = manifest.column("uri").to_pylist()
    sizes: list[int | None] = manifest.column("size_bytes").to_pylist()
    photos: dict[int, Photo | PhotoError] = {
        index: PhotoError(ErrorKind.TOO_MANY_BYTES, f"{size} bytes, the limit is {limits.max_bytes}")
        for index, size in enumerate(sizes)
        if size is not None and size > limits.max_bytes
    }
    wanted = [index for index in range(len(uris)) if index not in photos]
    fetched = fetch([uris[index] for index in wanted], storage_options, limits.max_bytes)
    for position, index in enumerate(wanted):
        photos[index] = _decode(fetched[position], crops, limits, os.path.splitext(uris[index])[1])  # noqa: PTH122
        fetched[position] = b""  # each file's bytes go as soon as its pixels are here
    return [photos[index] for index in range(len(uris))]


def _decode(data: bytes | PhotoError, crops: Sequence[CropSpec], limits: Limits, suffix: str) -> Photo | PhotoError:
    if isinstance(data, PhotoError):
        return data
    try:
        return decode(data, crops, limits, suffix)
    except PhotoError as error:
        return error


def _read(photo: Photo | PhotoError, crops: Sequence[CropSpec]) -> dict[str, Any]:
    if isinstance(photo, PhotoError):
        return {"error_kind": photo.kind.value, "error_message": photo.message}
    measured = {f"measured_{name}": value for name, value in measure(photo.working).items()}
    pixels = {name: crop.tobytes() for name, crop in zip(_CROPS, photo.crops, strict=True)}
    return {**photo.facts, **measured, **pixels}


# --- 2. encode --------------------------------------------------------------------------------------------------------


class Encode:
    """Both encoders on one device: crops in, embeddings out. One instance an actor."""

    def __init__(self, bundle: str, run_id: str, threads: int | None = None, report: Report | None = None) -> None:
        """Load the encoders.

        Args:
            bundle: name or folder of the bundle on this machine.
            run_id: written into every row.
            threads: for the CPU; None leaves torch's own choice.
            report: called after each batch.
        """
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        opened = open_bundle(bundle)
        self._encoders: tuple[Encoder, Encoder] = (
            ClipEncoder(opened.piece("clip")),
            Dinov2Encoder(opened.piece("dinov2")),
        )
        self._schema = schema.embeddings(*(encoder.dim for encoder in self._encoders))
        self._run_id, self._fingerprint, self._report = run_id, opened.encoder_fingerprint, report

    def __call__(self, photos: pa.Table) -> pa.Table:
        """A table from `read_photos` to rows of `schema.embeddings`."""
        good = pc.is_null(photos.column("error_kind"))
        columns: dict[str, Any] = {name: photos.column(name) for name in photos.column_names if name not in _CROPS}
        for name, target, encoder in zip(
            _CROPS, ("clip_embedding", "dinov2_embedding"), self._encoders, strict=True
        ):
            crops = _pixels(photos.column(name), encoder.crop.crop_px)
            values = encoder.encode(crops) if len(crops) else np.empty((0, encoder.dim), np.float16)
            columns[target] = _scatter(values, good)
        columns["run_id"] = pa.repeat(self._run_id, photos.num_rows)
        columns["encoder_fingerprint"] = pa.repeat(self._fingerprint, photos.num_rows)
        if self._report is not None:
            self._report(photos.num_rows, photos.num_rows - pc.sum(good, min_count=0).as_py())
        return pa.table([columns[name] for name in self._schema.names], schema=self._schema)


def _pixels(column: pa.ChunkedArray, side_px: int) -> np.ndarray:
    """The valid crops of a binary column as uint8 (N, S, S, 3); without a copy where the column is one chunk."""
    chunks = []
    for chunk in column.chunks:
        valid = chunk.drop_null()
        if len(valid):
            start, stop = valid.offset, valid.offset + len(valid)
            offsets = np.frombuffer(valid.buffers()[1], np.int64)[start : stop + 1]
            values = np.frombuffer(valid.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
            chunks.append(values.reshape(-1, side_px, side_px, 3))
    if not chunks:
        return np.empty((0, side_px, side_px, 3), np.uint8)
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def _scatter(values: np.ndarray, good: pa.ChunkedArray) -> pa.Array:
    """Rows of float16 (N, D) to where `good` is true, nulls elsewhere: fixed_size_list<halffloat>[D]."""
    mask = np.asarray(good)
    full = np.zeros((len(mask), values.shape[1]), np.float16)
    full[mask] = values
    flat = pa.array(full.reshape(-1), pa.float16())
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=pa.array(~mask))


# --- 3. score ---------------------------------------------------------------------------------------------------------

#: Columns a scores row takes over as they are.
_CARRIED = (*schema.MANIFEST.names, "error_kind", "error_message")


def score_columns(bundle: Bundle) -> list[str]:
    """Columns of the embeddings table that scoring with this bundle reads."""
    if bundle.has("scorer"):
        features = (*Scorer(bundle.piece("scorer")).features, *AttributePredictor.features)
    else:
        features = ZeroShot.features
    return [*_CARRIED, *dict.fromkeys(features)]


class Score:
    """Quality, attributes and scene from stored embeddings, on the CPU. One instance an actor."""

    def __init__(self, bundle: str, run_id: str, report: Report | None = None) -> None:
        """Load the scorer and the attribute head, or the zero-shot prompts where the bundle has no scorer."""
        opened = open_bundle(bundle)
        self._scorer = Scorer(opened.piece("scorer")) if opened.has("scorer") else None
        self._head = AttributePredictor(opened.piece("attributes")) if opened.has("scorer") else None
        self._zero_shot = None if opened.has("scorer") else ZeroShot(opened.piece("zero_shot"))
        self._columns = score_columns(opened)
        self._kind, self._fingerprint = opened.scorer_kind, opened.scorer_fingerprint
        self._run_id, self._report = run_id, report

    def __call__(self, embeddings: pa.Table) -> pa.Table:
        """Rows of the embeddings table (at least `score_columns`) to rows of `schema.SCORES`."""
        good = pc.is_null(embeddings.column("error_kind"))
        valid = embeddings.filter(good)
        features = {name: _matrix(valid.column(name)) for name in self._columns if name not in _CARRIED}
        values = self._predict(features)
        placed = {name: _place(column, good) for name, column in values.items()}
        columns = {name: embeddings.column(name) for name in _CARRIED} | placed
        for name, text in (
            ("run_id", self._run_id),
            ("scorer_kind", self._kind),
            ("scorer_fingerprint", self._fingerprint),
        ):
            columns[name] = pa.repeat(text, embeddings.num_rows)
        if self._report is not None:
            self._report(embeddings.num_rows, embeddings.num_rows - valid.num_rows)
        return pa.table([columns[name] for name in schema.SCORES.names], schema=schema.SCORES)

    def _predict(self, features: Mapping[str, np.ndarray]) -> dict[str, pa.Array]:
        if self._scorer is not None and self._head is not None:
            predicted, quality = self._scorer.predict(features)
            attributes, scenes = self._head.predict(features["dinov2_embedding"])
            mos = pa.array(predicted, pa.float32())
        else:
            assert self._zero_shot is not None
            quality, attributes, scenes = self._zero_shot.predict(features["clip_embedding"])
            mos = pa.nulls(len(quality), pa.float32())  # no training, no training scale
        names = np.asarray(schema.SCENES, dtype=object)[scenes.argmax(axis=1)]
        return {
            "quality_score": pa.array(quality, pa.float32()),
            "predicted_mos": mos,
            **{f"attribute_{name}": pa.array(attributes[:, i]) for i, name in enumerate(schema.ATTRIBUTES)},
            "scene": pa.array(names, pa.string()),
            **{f"scene_{name}": pa.array(scenes[:, i]) for i, name in enumerate(schema.SCENES)},
        }


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A float column as (N,), a fixed-size list column without nulls as (N, D)."""
    if not pa.types.is_fixed_size_list(column.type):
        return column.to_numpy()
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat).reshape(len(column), column.type.list_size)


def _place(values: pa.Array, good: pa.ChunkedArray) -> pa.Array:
    """Values to where `good` is true, nulls elsewhere."""
    positions = np.cumsum(np.asarray(good)) - 1
    return values.take(pa.array(positions, pa.int64(), mask=~np.asarray(good)))
