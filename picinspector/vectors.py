"""Stored embeddings as matrices: of the newest row of each photo, in an order that is given."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from picinspector.errors import UsageError
from picinspector.tables import Destination

#: What photos are compared by. The builtin bundle's DINOv2 sees a few patches at native pixels, noise and blur, not
#: what is on a photo; its CLIP does, as that of other bundles.
COLUMN = "clip_embedding"


def stream(dest: Destination, photos: pa.Table, column: str = COLUMN) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The embeddings of some photos, as they lie.

    Args:
        dest: where they were scored.
        photos: `image_id` and `embeddings_run_id`, the run whose row of it counts.
        column: which embedding.

    Yields:
        positions in `photos`, int64 (B,), and float16 (B, D). A photo without an embedding is not among them.

    Raises:
        UsageError: the photos have embeddings of different widths: they were embedded with two bundles.
    """
    # One sorted list, not a hash table for each batch: a million photos lie in a thousand batches.
    ids = _keys(photos.column("image_id"))
    order = np.argsort(ids)
    ordered = ids[order]
    runs = photos.column("embeddings_run_id").combine_chunks()
    width = None
    for run_id in sorted(pc.unique(runs).drop_null().to_pylist()):
        scanner = dest.scan("embeddings", [run_id], ["image_id", column])
        if scanner is None:
            continue
        for batch in scanner.to_batches():
            wanted = _keys(batch.column(0))
            at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
            position = order[at]
            mine = (ordered[at] == wanted) & np.asarray(pc.equal(runs.take(pa.array(position)), run_id))
            mine &= np.asarray(pc.is_valid(batch.column(1)))
            if not mine.any():
                continue
            position, rows = position[mine], batch.column(1).filter(pa.array(mine))
            if width not in (None, rows.type.list_size):
                raise UsageError(
                    f"{dest.url}: its photos have {column}s of {width} and of {rows.type.list_size} numbers, from two "
                    "bundles; run `picinspector score` with one bundle over the whole library"
                )
            width = rows.type.list_size
            yield position, rows.flatten().to_numpy().reshape(-1, width)


def _keys(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    return np.asarray(ids.to_numpy(zero_copy_only=False), dtype=np.bytes_)


def load(dest: Destination, photos: pa.Table, column: str = COLUMN) -> np.ndarray:
    """As `stream`, all at once: float16 (N, D); a row of zeros for a photo without an embedding."""
    matrix = np.zeros((photos.num_rows, 0), np.float16)
    for position, rows in stream(dest, photos, column):
        if not matrix.shape[1]:
            matrix = np.zeros((photos.num_rows, rows.shape[1]), np.float16)
        matrix[position] = rows
    return matrix
