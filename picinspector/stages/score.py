"""Third stage: quality, attributes and scene from stored embeddings, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from picinspector import schema
from picinspector.attributes import AttributeHead
from picinspector.bundle import Bundle, open_bundle
from picinspector.scorer import Scored, Scorer, to_array
from picinspector.stages import Report
from picinspector.zeroshot import ZeroShot

#: Columns a scores row takes over as they are.
_CARRIED = (*schema.MANIFEST.names, "error_kind", "error_message")


def score_columns(bundle: Bundle) -> list[str]:
    """Columns of the embeddings table that scoring with this bundle reads."""
    if bundle.has("scorer"):
        features = (*Scorer(bundle.piece("scorer")).features, *AttributeHead(bundle.piece("attributes")).features)
    else:
        features = ZeroShot.features
    return [*_CARRIED, *dict.fromkeys(features)]


class Score:
    """Quality, attributes and scene from stored embeddings, on the CPU. One instance an actor."""

    def __init__(self, bundle: str, report: Report | None = None, fingerprint: str | None = None) -> None:
        """Load the scorer and the attribute head, or the zero-shot prompts where the bundle has no scorer.

        Args:
            bundle: name or folder of the bundle on this machine.
            report: called after each batch.
            fingerprint: what the driver's bundle has; another one here is another bundle.

        Raises:
            BundleError: the bundle cannot be used, or is another than the driver's.
        """
        opened = open_bundle(bundle)
        opened.expect(scorer=fingerprint)
        self._scorer = Scorer(opened.piece("scorer")) if opened.has("scorer") else None
        self._head = AttributeHead(opened.piece("attributes")) if opened.has("scorer") else None
        self._zero_shot = None if opened.has("scorer") else ZeroShot(opened.piece("zero_shot"))
        self._columns = score_columns(opened)
        self._kind, self._fingerprint = opened.scorer_kind, opened.scorer_fingerprint
        self._report = report

    def __call__(self, embeddings: pa.Table) -> pa.Table:
        """Rows of the embeddings table (at least `score_columns`) to rows of `schema.SCORES`."""
        good = pc.is_null(embeddings.column("error_kind"))
        valid = embeddings.filter(good)
        features = {name: to_array(valid.column(name)) for name in self._columns if name not in _CARRIED}
        columns = {name: embeddings.column(name) for name in _CARRIED}
        if valid.num_rows:
            columns |= {name: _place(column, good) for name, column in self._predict(features).items()}
        columns["scorer_kind"] = pa.repeat(self._kind, embeddings.num_rows)
        columns["scorer_fingerprint"] = pa.repeat(self._fingerprint, embeddings.num_rows)
        if self._report is not None:
            self._report(embeddings.num_rows, embeddings.num_rows - valid.num_rows)
        arrays = [columns.get(part.name, pa.nulls(embeddings.num_rows, part.type)) for part in schema.SCORES]
        return pa.table(arrays, schema=schema.SCORES)

    def _predict(self, features: Mapping[str, np.ndarray]) -> dict[str, pa.Array]:
        if self._scorer is not None and self._head is not None:
            scored = self._scorer.predict(features)
            attributes, scenes = self._head.predict(features)
        else:
            assert self._zero_shot is not None
            quality, attributes, scenes = self._zero_shot.predict(features["clip_embedding"])
            scored = Scored(None, quality)  # no training, no training scale
        names = np.asarray(schema.SCENES, dtype=object)[scenes.argmax(axis=1)]
        return {
            **{name: pa.array(values, pa.float32()) for name, values in scored._asdict().items() if values is not None},
            **{f"attribute_{name}": pa.array(attributes[:, i]) for i, name in enumerate(schema.ATTRIBUTES)},
            "scene": pa.array(names, pa.string()),
            **{f"scene_{name}": pa.array(scenes[:, i]) for i, name in enumerate(schema.SCENES)},
        }


def _place(values: pa.Array, good: pa.ChunkedArray) -> pa.Array:
    """Values to where `good` is true, nulls elsewhere."""
    positions = np.cumsum(np.asarray(good)) - 1
    return values.take(pa.array(positions, pa.int64(), mask=~np.asarray(good)))
