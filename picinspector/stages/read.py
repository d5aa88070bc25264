"""First stage: fetch a batch of photos concurrently, decode each once, measure it, cut a crop for each encoder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from picinspector import schema
from picinspector.bundle import Bundle
from picinspector.errors import ErrorKind, PhotoError
from picinspector.measure import measure
from picinspector.photo import CropSpec, Limits, Photo, decode
from picinspector.preprocess import clip_preprocess, dinov2_preprocess
from picinspector.stages import CROP_COLUMNS
from picinspector.storage import fetch


def crops_of(bundle: Bundle) -> tuple[CropSpec, CropSpec]:
    """The crops a bundle's two encoders want, in the order of `CROP_COLUMNS`."""
    return clip_preprocess(bundle.folder / "clip").crop, dinov2_preprocess(bundle.folder / "dinov2").crop


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
    for name in CROP_COLUMNS:
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
    pixels = {name: crop.tobytes() for name, crop in zip(CROP_COLUMNS, photo.crops, strict=True)}
    return {**photo.facts, **measured, **pixels}
