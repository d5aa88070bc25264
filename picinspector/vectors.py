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
    ids = photos.column("image_id").combine_chunks()
    runs = photos.column("embeddings_run_id").combine_chunks()
    width = None
    for run_id in sorted(pc.unique(runs).drop_null().to_pylist()):
        scanner = dest.scan("embeddings", [run_id], ["image_id", column])
        if scanner is None:
            continue
        for batch in scanner.to_batches():
            position = pc.index_in(batch.column(0), value_set=ids)
            mine = pc.fill_null(pc.equal(runs.take(position), run_id), False)
            keep = pc.and_(mine, pc.is_valid(batch.column(1)))
            position, rows = position.filter(keep), batch.column(1).filter(keep)
            if not len(rows):
                continue
            if width not in (None, rows.type.list_size):
                raise UsageError(
                    f"{dest.url}: its photos have {column}s of {width} and of {rows.type.list_size} numbers, from two "
                    "bundles; run `picinspector score` with one bundle over the whole library"
                )
            width = rows.type.list_size
            yield np.asarray(position).astype(np.int64), rows.flatten().to_numpy().reshape(-1, width)


def load(dest: Destination, photos: pa.Table, column: str = COLUMN) -> np.ndarray:
    """As `stream`, all at once: float16 (N, D); a row of zeros for a photo without an embedding."""
    matrix = np.zeros((photos.num_rows, 0), np.float16)
    for position, rows in stream(dest, photos, column):
        if not matrix.shape[1]:
            matrix = np.zeros((photos.num_rows, rows.shape[1]), np.float16)
        matrix[position] = rows
    return matrix
