"""Second stage: both encoders on one device, crops in, embeddings out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from picinspector import schema
from picinspector.bundle import open_bundle
from picinspector.errors import UsageError
from picinspector.photo import CropSpec
from picinspector.stages import CROP_COLUMNS, Report, count_kinds, describe_batch

_Answer = TypeVar("_Answer")

_ADVICE = "lower --batch-size, or let fewer encoders share a GPU (--gpus-per-encoder 1)"


class Encoder(Protocol):
    """What `Encode` asks of an encoder; `ClipEncoder` and `Dinov2Encoder` both are."""

    crop: CropSpec
    dim: int

    def encode(self, crops: np.ndarray) -> np.ndarray:
        """Uint8 (B, S, S, 3) to L2-normalised float16 (B, D)."""
        ...


class Encode:
    """Both encoders on one device: crops in, embeddings out. One instance an actor."""

    def __init__(
        self,
        bundle: str,
        threads: int | None = None,
        report: Report | None = None,
        fingerprint: str | None = None,
        keep: str | None = None,
    ) -> None:
        """Load the encoders.

        Args:
            bundle: name or folder of the bundle on this machine.
            threads: on the CPU, each with crops of its own; None takes as many as torch would.
            report: called after each batch.
            fingerprint: what the driver's bundle has; another one here is another bundle.
            keep: the column of crops that goes on to the captioner.

        Raises:
            BundleError: the bundle cannot be used, or is another than the driver's.
            UsageError: in a call: the device's memory is too small for half of the batch.
        """
        # Here, so that the driver, which only names this class, need not spend five seconds on loading torch.
        from picinspector.clip import ClipEncoder
        from picinspector.device import Cores, pick_device
        from picinspector.dinov2 import Dinov2Encoder

        opened = open_bundle(bundle)
        opened.expect(encoder=fingerprint)
        self._encoders: tuple[Encoder, Encoder] = (
            ClipEncoder(opened.piece("clip")),
            Dinov2Encoder(opened.piece("dinov2")),
        )
        self._cores = Cores(threads) if pick_device().type == "cpu" else None
        self._schema = schema.embeddings(*(encoder.dim for encoder in self._encoders))
        self._fingerprint, self._report, self._keep = opened.encoder_fingerprint, report, keep

    def __call__(self, photos: pa.Table) -> pa.Table:
        """A table from `read_photos` to rows of `schema.embeddings`, without captions, and the crops to keep."""
        started = time.perf_counter()
        good = pc.is_null(photos.column("error_kind"))
        columns: dict[str, Any] = {
            name: photos.column(name) for name in photos.column_names if name not in CROP_COLUMNS
        }
        crops = [
            to_pixels(photos.column(name), encoder.crop.crop_px)
            for name, encoder in zip(CROP_COLUMNS, self._encoders, strict=False)
        ]
        for target, values in zip(("clip_embedding", "dinov2_embedding"), self._encode(crops), strict=True):
            columns[target] = _scatter(values, good)
        columns["encoder_fingerprint"] = pa.repeat(self._fingerprint, photos.num_rows)
        empty = {part.name: pa.nulls(photos.num_rows, part.type) for part in self._schema}  # no captions yet
        rows = pa.table([(empty | columns)[name] for name in self._schema.names], schema=self._schema)
        if self._report is not None:
            errors = count_kinds(rows.column("error_kind")) - count_kinds(photos.column("error_kind"))
            self._report(describe_batch("encode", rows.num_rows, errors, started))
        return rows if self._keep is None else rows.append_column(self._keep, photos.column(self._keep))

    def _encode(self, crops: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Each encoder's crops (B, S, S, 3) to float16 (B, D)."""
        if not len(crops[0]):
            return [np.empty((0, encoder.dim), np.float16) for encoder in self._encoders]

        def encode(rows: slice) -> list[np.ndarray]:
            calls = [(encoder.encode, own[rows]) for encoder, own in zip(self._encoders, crops, strict=True)]
            return self._cores.map(calls) if self._cores is not None else [call(own) for call, own in calls]

        return [np.concatenate(parts) for parts in zip(*within_memory(encode, len(crops[0]), _ADVICE), strict=True)]


def within_memory(work: Callable[[slice], _Answer], rows: int, advice: str) -> list[_Answer]:
    """What `work` gives for all rows of a batch; or for each half, where the device has no memory for all.

    Raises:
        UsageError: there is no memory for a half either.
    """
    import torch

    try:
        return [work(slice(0, rows))]
    except torch.OutOfMemoryError:
        pass  # the halves come behind this block: its exception holds on to what the device is full of
    half = -(-rows // 2)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        return [work(slice(0, half)), *([work(slice(half, rows))] if half < rows else [])]
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0][:200]
        raise UsageError(
            f"the device ran out of memory with {rows} photos at once, and with {half}: {advice} ({reason})"
        ) from None


def to_pixels(column: pa.ChunkedArray, side_px: int) -> np.ndarray:
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
