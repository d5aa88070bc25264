"""First stage: fetch a batch of photos concurrently, decode each once, measure it, cut a crop for each encoder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pyarrow as pa

from picinspector import resize, schema
from picinspector.bundle import Bundle
from picinspector.errors import ErrorKind, PhotoError
from picinspector.measure import measure
from picinspector.photo import CropSpec, Limits, decode
from picinspector.preprocess import captioner_preprocess, clip_preprocess, dinov2_preprocess
from picinspector.stages import CROP_COLUMNS, Report, count_kinds, describe_batch
from picinspector.stages.guard import TIMEOUT_S, Guard, deadline
from picinspector.storage import UNKNOWN_BYTES, StorageOptions, fetch

#: Encoded bytes one task holds at a time: 64 camera raws of 30 MB would be 2 GB a task.
_WINDOW_BYTES = 256 * 1024**2


def crops_of(bundle: Bundle, captions: bool = False) -> dict[str, CropSpec]:
    """The crops a bundle's models want, by the column they travel in, one of `CROP_COLUMNS`.

    Args:
        bundle: a captioner that wants the same crop as DINOv2 shares its column.
        captions: whether the captioner's is wanted.
    """
    specs = (clip_preprocess(bundle.folder / "clip").crop, dinov2_preprocess(bundle.folder / "dinov2").crop)
    crops = dict(zip(CROP_COLUMNS, specs, strict=False))
    return crops | caption_crop(bundle) if captions else crops


def caption_crop(bundle: Bundle) -> dict[str, CropSpec]:
    """The captioner's crop and the one column it travels in."""
    spec = captioner_preprocess(bundle.folder / "captioner").crop
    shared = dinov2_preprocess(bundle.folder / "dinov2").crop == spec
    return {CROP_COLUMNS[1] if shared else CROP_COLUMNS[2]: spec}


def read_photos(
    manifest: pa.Table,
    crops: Mapping[str, CropSpec],
    limits: Limits,
    storage_options: StorageOptions | None = None,
    is_retry: Callable[[], bool] | None = None,
    report: Report | None = None,
) -> pa.Table:
    """Fetch and decode a batch: manifest columns in; facts, measurements, crops and errors beside them out.

    Bytes and full-size pixels end here. A crop is a binary value of S * S * 3 bytes, null where the row has an error.

    Args:
        manifest: `schema.MANIFEST`.
        crops: by column, from `crops_of`.
        limits: what a photo may cost.
        storage_options: of the library.
        is_retry: asked in a worker that may die of a photo, and is replaced then: whether that may have happened. If
            so, each photo is decoded in a child process, and the one that kills it becomes `crashed`. A photo that
            hangs ends the worker. None in a process that must live.
        report: called after the batch.
    """
    started = time.perf_counter()
    resize.load()
    options = storage_options.reveal() if storage_options is not None else None
    uris: list[str] = manifest.column("uri").to_pylist()
    sizes: list[int | None] = manifest.column("size_bytes").to_pylist()
    etags: list[str | None] = manifest.column("etag").to_pylist()
    rows: list[dict[str, Any]] = []
    fetch_s = 0.0
    with Guard(read_photo, prepare=resize.load) if is_retry is not None and is_retry() else nullcontext() as guard:
        for window in _windows(sizes, limits.max_bytes):
            asked = time.perf_counter()
            fetched = _fetch(uris[window], etags[window], sizes[window], options, limits)
            fetch_s += time.perf_counter() - asked
            for position, uri in enumerate(uris[window]):
                photo = (fetched[position], crops, limits, os.path.splitext(uri)[1])  # noqa: PTH122
                if guard is not None:
                    rows.append(_read_guarded(guard, *photo))
                else:
                    with deadline(TIMEOUT_S) if is_retry is not None else nullcontext():
                        rows.append(read_photo(*photo))
                del photo
                fetched[position] = b""  # each file's bytes go as soon as its pixels are here
    photos = to_table(manifest, rows, tuple(crops))
    if report is not None:
        errors = count_kinds(photos.column("error_kind"))
        report(describe_batch("read", photos.num_rows, errors, started, fetch_s))
    return photos


def to_table(manifest: pa.Table, rows: Sequence[Mapping[str, Any]], crops: Sequence[str]) -> pa.Table:
    """Manifest rows and what `read_photo` says of each, as `read_photos` gives them, with these columns of crops."""
    columns = {name: manifest.column(name) for name in schema.MANIFEST.names}
    for part in (*schema.FACTS, *schema.MEASUREMENT_FIELDS):
        columns[part.name] = pa.array([row.get(part.name) for row in rows], part.type)
    for name in crops:
        columns[name] = pa.array([row.get(name) for row in rows], pa.large_binary())
    for name in ("error_kind", "error_message"):
        columns[name] = pa.array([row.get(name) for row in rows], pa.string())
    return pa.table(columns)


def _windows(sizes: Sequence[int | None], max_bytes: int) -> Iterator[slice]:
    """Stretches of a batch whose files fit `_WINDOW_BYTES` together; a larger file is alone in its own."""
    start = total = 0
    for index, size in enumerate(sizes):
        bytes_ = min(size if size is not None else UNKNOWN_BYTES, max_bytes)
        if index > start and total + bytes_ > _WINDOW_BYTES:
            yield slice(start, index)
            start, total = index, 0
        total += bytes_
    if start < len(sizes):
        yield slice(start, len(sizes))


def _fetch(
    uris: Sequence[str],
    etags: Sequence[str | None],
    sizes: Sequence[int | None],
    options: Mapping[str, Any] | None,
    limits: Limits,
) -> list[bytes | PhotoError]:
    # An empty file is known by its listing: a library may have a million of them.
    files: list[bytes | PhotoError] = [
        PhotoError(ErrorKind.TOO_MANY_BYTES, f"{size} bytes, the limit is {limits.max_bytes}") if size else b""
        for size in sizes
    ]
    wanted = [index for index, size in enumerate(sizes) if size is None or 0 < size <= limits.max_bytes]
    fetched = fetch(
        [uris[i] for i in wanted], options, limits.max_bytes, [etags[i] for i in wanted], [sizes[i] for i in wanted]
    )
    for index, data in zip(wanted, fetched, strict=True):
        files[index] = data
    return files


def _read_guarded(
    guard: Guard[dict[str, Any]],
    data: bytes | PhotoError,
    crops: Mapping[str, CropSpec],
    limits: Limits,
    suffix: str,
) -> dict[str, Any]:
    if isinstance(data, bytes):
        try:
            return guard(data, crops, limits, suffix)
        except PhotoError as error:
            data = error
    return read_photo(data, crops, limits, suffix)


def read_photo(data: bytes | PhotoError, crops: Mapping[str, CropSpec], limits: Limits, suffix: str) -> dict[str, Any]:
    """Decode and measure one file: columns by name, those of its error alone where it has one."""
    try:
        if isinstance(data, PhotoError):
            raise data
        photo = decode(data, list(crops.values()), limits, suffix)
    except PhotoError as error:
        return {"error_kind": error.kind.value, "error_message": error.message}
    measured = {f"measured_{name}": value for name, value in measure(photo.working).items()}
    pixels = {name: crop.tobytes() for name, crop in zip(crops, photo.crops, strict=True)}
    return {**photo.facts, **measured, **pixels}
