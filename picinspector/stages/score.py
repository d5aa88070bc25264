"""Third stage: quality, attributes, scene and suggestions from stored embeddings, on the CPU."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from picinspector import schema
from picinspector.attributes import AttributeHead
from picinspector.bundle import Bundle, open_bundle
from picinspector.feedback import EXIF, MEASURED, suggest_all
from picinspector.scorer import Scored, Scorer, to_array
from picinspector.stages import Report, describe_batch
from picinspector.wording import Facts, check, compose
from picinspector.zeroshot import ZeroShot

#: Columns a scores row takes over as they are.
_CARRIED = (*schema.MANIFEST.names, "error_kind", "error_message")
#: What suggestions, and the words for a photo, are made from beside the attributes.
_FACTS = (*schema.FACTS.names, *schema.MEASUREMENT_FIELDS.names)


def score_columns(bundle: Bundle) -> list[str]:
    """Columns of the embeddings table that scoring with this bundle reads; captions where there are any."""
    if bundle.has("scorer"):
        scorer, head = Scorer(bundle.piece("scorer")), AttributeHead(bundle.piece("attributes"))
        features = (*scorer.features, *head.features, *_FACTS)
    else:
        features = ZeroShot.features
    return [*_CARRIED, *schema.CAPTION.names, *dict.fromkeys(features)]


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
        self._columns = [name for name in score_columns(opened) if name not in (*_CARRIED, *schema.CAPTION.names)]
        self._kind, self._fingerprint = opened.scorer_kind, opened.scorer_fingerprint
        self._report = report

    def __call__(self, embeddings: pa.Table) -> pa.Table:
        """Rows of the embeddings table (at least `score_columns`) to rows of `schema.SCORES`."""
        started = time.perf_counter()
        good = pc.is_null(embeddings.column("error_kind"))
        valid = embeddings.filter(good)
        # Cast once for scorer and head: both compute in float32.
        wanted = [name for name in self._columns if name not in schema.FACTS.names]
        features = {name: to_array(valid.column(name)).astype(np.float32, copy=False) for name in wanted}
        columns = {name: embeddings.column(name) for name in _CARRIED}
        if valid.num_rows:
            predicted = self._predict(features)
            if self._head is not None:
                predicted |= _in_words(valid, predicted)
            elif "caption" in valid.column_names:  # an untrained head cannot tell whether a caption is right
                predicted |= {name: valid.column(name).combine_chunks() for name in schema.CAPTION.names}
            columns |= {name: _place(column, good) for name, column in predicted.items()}
        columns["scorer_kind"] = pa.repeat(self._kind, embeddings.num_rows)
        columns["scorer_fingerprint"] = pa.repeat(self._fingerprint, embeddings.num_rows)
        arrays = [columns.get(part.name, pa.nulls(embeddings.num_rows, part.type)) for part in schema.SCORES]
        rows = pa.table(arrays, schema=schema.SCORES)
        if self._report is not None:
            self._report(describe_batch("score", rows.num_rows, {}, started))  # its errors all arose before it
        return rows

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


def _in_words(rows: pa.Table, predicted: Mapping[str, pa.Array]) -> dict[str, pa.Array]:
    """Suggestions; and the captions, those replaced that contradict what these heads see."""
    attributes = {name: predicted[f"attribute_{name}"].to_numpy() for name in schema.ATTRIBUTES}
    measured = {name: to_array(rows.column(f"measured_{name}")) for name in MEASURED}
    exif = {name: to_array(rows.column(name)) for name in EXIF}
    suggestions = suggest_all(attributes, measured, exif, predicted["scene"].to_pylist())
    columns = {"suggestions": pa.array(suggestions, schema.SCORES.field("suggestions").type)}
    if "caption" in rows.column_names:
        texts, sources = (rows.column(name).to_pylist() for name in schema.CAPTION.names)
        scenes = {name: predicted[f"scene_{name}"].to_numpy() for name in schema.SCENES}
        for row in (row for row, text in enumerate(texts) if text is not None):
            seen = Facts(_at(row, attributes), _at(row, scenes), float(measured["brightness"][row]))
            if check(texts[row], seen).contradictions:
                texts[row], sources[row] = compose(seen), "composed"
        columns |= {"caption": pa.array(texts, pa.string()), "caption_source": pa.array(sources, pa.string())}
    return columns


def _at(row: int, columns: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(values[row]) for name, values in columns.items()}


def _place(values: pa.Array, good: pa.ChunkedArray) -> pa.Array:
    """Values to where `good` is true, nulls elsewhere."""
    positions = np.cumsum(np.asarray(good)) - 1
    return values.take(pa.array(positions, pa.int64(), mask=~np.asarray(good)))
