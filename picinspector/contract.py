"""What one file, and one batch of rows, of a table must be like, whatever the run and the version that wrote it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from picinspector import schema

#: How far from 1 the length of a unit vector may be in float16: each entry is rounded by up to 2**-11 of itself.
_LENGTH_TOLERANCE = 2e-3
_RANGES = {
    **dict.fromkeys(("quality_score", "quality_low", "quality_high"), (1.0, 10.0)),
    **{f"attribute_{name}": (0.0, 100.0) for name in schema.ATTRIBUTES},
    **{f"scene_{name}": (0.0, 1.0) for name in schema.SCENES},
}
#: Probabilities and ends of scales are computed in float32, and rounded.
_RANGE_TOLERANCE = 1e-4
#: Columns that a row with values has, and a row with an error has not.
_VALUES: dict[str, tuple[str, ...]] = {
    "embeddings": ("clip_embedding", "dinov2_embedding"),
    "scores": ("quality_score", *(f"attribute_{name}" for name in schema.ATTRIBUTES), "scene"),
}
_EMBEDDINGS = _VALUES["embeddings"]


def schema_complaints(found: pa.Schema, table: str) -> list[str]:
    """What readers of a table would stumble over: not columns that an older version lacked or a newer one added."""
    if table == "embeddings":
        widths = [_width(found, name) for name in _EMBEDDINGS]
        expected = schema.embeddings(*(width or 1 for width in widths))
    else:
        expected = {"manifest": schema.MANIFEST, "scores": schema.SCORES, "gone": schema.GONE}[table]
    complaints = []
    for part in expected:
        if part.name not in found.names:
            if not part.nullable:
                complaints.append(f"no column {part.name}")
        elif found.field(part.name).type != part.type:
            complaints.append(f"column {part.name} is {found.field(part.name).type}, not {part.type}")
    for part in found:
        if part.name == "run_id":
            complaints.append("a column run_id, which is the folder's to say")
        elif part.name not in expected.names and not part.nullable and table != "manifest":
            complaints.append(f"column {part.name} is unknown to this version, and required")
    return complaints


def _width(found: pa.Schema, name: str) -> int | None:
    kind = found.field(name).type if name in found.names else None
    return kind.list_size if kind is not None and pa.types.is_fixed_size_list(kind) else None


class Values:
    """Values of a table that cannot be, counted over its batches.

    Attributes:
        wrong: what is wrong with rows -> how many rows.
    """

    def __init__(self, table: str) -> None:
        self.wrong: Counter[str] = Counter()
        self._table = table

    def look_at(self, batch: pa.RecordBatch) -> None:
        """Count what is wrong with rows of a file that `schema_complaints` has nothing to say of."""
        if self._table not in _VALUES or "error_kind" not in batch.schema.names:
            return
        good = _mask(pc.is_null(batch.column("error_kind")))
        for name in _VALUES[self._table]:
            if name in batch.schema.names:
                null = _mask(pc.is_null(batch.column(name)))
                self._add(f"without an error have no {name}", good & null)
                self._add(f"with an error have a {name}", ~good & ~null)
        if self._table == "embeddings":
            for name in _EMBEDDINGS:
                if _width(batch.schema, name):
                    self._look_at_vectors(name, batch.column(name))
        for name, (low, high) in _RANGES.items():
            if self._table == "scores" and name in batch.schema.names:
                values = batch.column(name).drop_null().to_numpy(zero_copy_only=False)
                inside = (values >= low - _RANGE_TOLERANCE) & (values <= high + _RANGE_TOLERANCE)
                self._add(f"have a {name} that is not within {low:g} and {high:g}", ~inside)
        if self._table == "scores" and "scene" in batch.schema.names:
            known = pc.is_in(batch.column("scene").drop_null(), value_set=pa.array(schema.SCENES))
            self._add("have a scene of no known name", ~_mask(known))

    def _look_at_vectors(self, name: str, column: pa.Array) -> None:
        vectors = column.drop_null()
        if not len(vectors):
            return
        flat = vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(vectors), -1).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = np.sqrt(np.einsum("nd,nd->n", flat, flat))
        finite = np.isfinite(lengths)
        self._add(f"have a {name} with numbers that are not finite", ~finite)
        self._add(f"have a {name} that is not of length 1", finite & (np.abs(lengths - 1) > _LENGTH_TOLERANCE))

    def _add(self, complaint: str, wrong: np.ndarray) -> None:
        if count := int(wrong.sum()):
            self.wrong[complaint] += count


def _mask(values: pa.Array) -> np.ndarray:
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=bool)
