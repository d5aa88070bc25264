"""The scorer: a LightGBM regression from stored embeddings to `predicted_mos` and `quality_score`.

A scorer folder holds the model as LightGBM text and `scorer.json`::

    kind                  lightgbm
    model                 file name of the model
    features              columns of the embeddings table, in order; num_features: their widths together
    label_min, label_max  the scale of the labels, which becomes 1-10
    output                unit: the model predicts 0-1 of that scale; mos (default): in that scale
    interval              optional: `conformal.Intervals` around what the model predicts, in its scale
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightgbm
import numpy as np
import pyarrow as pa

from picinspector.conformal import Intervals
from picinspector.errors import BundleError
from picinspector.forest import Forest

SPEC = "scorer.json"
_MODEL = "model.txt"


class Scored(NamedTuple):
    """What a scorer says of N photos, each float32 (N,).

    Attributes:
        predicted_mos: in the training scale; None where nothing was trained.
        quality_score: 1-10.
        quality_low, quality_high: 1-10, where the label lies with the interval's coverage; None without an interval.
    """

    predicted_mos: np.ndarray | None
    quality_score: np.ndarray
    quality_low: np.ndarray | None = None
    quality_high: np.ndarray | None = None


class Scorer:
    """A trained LightGBM scorer.

    Attributes:
        features: columns of the embeddings table that make the feature matrix, in order.
        intervals: around what the model predicts; None where none was calibrated.
        label_min, label_max: the scale of the labels.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Load the model and check it against its own feature spec.

        Raises:
            BundleError: a file is missing or unreadable, or the model and the spec disagree.
        """
        path = Path(folder) / SPEC
        try:
            spec: dict[str, Any] = json.loads(path.read_text("utf-8"))
            self.features = tuple(str(name) for name in spec["features"])
            self._num_features = int(spec["num_features"])
            self.label_min, self.label_max = float(spec["label_min"]), float(spec["label_max"])
            self.intervals = Intervals.from_json(spec["interval"]) if spec.get("interval") else None
            self._scaled = {"unit": True, "mos": False}[spec.get("output", "mos")]
            model = path.with_name(spec["model"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{path}: not a readable scorer spec ({error!r}); train or fetch it again") from error
        if not self.label_max > self.label_min:
            raise BundleError(f"{path}: label_max {self.label_max} must be above label_min {self.label_min}")
        try:
            self._booster = lightgbm.Booster(model_file=os.fspath(model))
        except lightgbm.basic.LightGBMError as error:
            raise BundleError(f"{model}: LightGBM cannot load it: {error}; train or fetch it again") from error
        if self._booster.num_feature() != self._num_features:
            raise BundleError(
                f"{model} takes {self._booster.num_feature()} features but {SPEC} says {self._num_features}: "
                "they are from different trainings; train or fetch the scorer again"
            )

    def predict(self, columns: Mapping[str, np.ndarray]) -> Scored:
        """Score N photos.

        Args:
            columns: name -> (N,) or (N, D) for every name in `features`.

        Raises:
            BundleError: the columns are not as wide as what the model was trained on.
        """
        matrix = feature_matrix(columns, self.features)
        if matrix.shape[1] != self._num_features:
            widths = {name: np.atleast_2d(columns[name].T).shape[0] for name in self.features}
            raise BundleError(
                f"the scorer was trained on {self._num_features} features, these embeddings give {matrix.shape[1]} "
                f"{widths}: score with the bundle that embedded the library, or embed it again with this one"
            )
        output = self._output(matrix)
        mos = self._to_mos(output).astype(np.float32)
        if self.intervals is None:
            return Scored(mos, self._to_quality(mos))
        low, high = self.intervals.around(output)
        return Scored(
            mos, self._to_quality(mos), self._to_quality(self._to_mos(low)), self._to_quality(self._to_mos(high))
        )

    def _output(self, matrix: np.ndarray) -> np.ndarray:
        if self._forest is not None and np.isfinite(matrix).all():
            return self._forest.predict(matrix)
        return np.asarray(self._booster.predict(matrix, num_threads=1), dtype=np.float64)

    @functools.cached_property
    def _forest(self) -> Forest | None:  # of no use to who only asks for the features, and 0.2 s to make
        return Forest.of(self._booster)

    def _to_mos(self, output: np.ndarray) -> np.ndarray:
        return self.label_min + output * (self.label_max - self.label_min) if self._scaled else output

    def _to_quality(self, mos: np.ndarray) -> np.ndarray:
        return to_quality_score(mos, self.label_min, self.label_max)


def write_scorer(
    folder: str | os.PathLike[str],
    booster: lightgbm.Booster,
    features: tuple[str, ...],
    label_min: float,
    label_max: float,
    scaled: bool,
    intervals: Intervals | None = None,
) -> None:
    """Write a scorer folder, which `Scorer` reads.

    Args:
        folder: made if it is not there; a scorer in it is replaced.
        booster: the model; cut to its best iteration where it stopped early.
        features: columns that make its feature matrix, in order.
        label_min, label_max: the scale of the labels.
        scaled: True where the model predicts 0-1 of that scale.
        intervals: around what the model predicts, in its scale.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    booster.save_model(root / _MODEL)
    spec: dict[str, Any] = {
        "kind": "lightgbm",
        "model": _MODEL,
        "features": list(features),
        "num_features": booster.num_feature(),
        "label_min": label_min,
        "label_max": label_max,
        "output": "unit" if scaled else "mos",
    }
    if intervals is not None:
        spec["interval"] = intervals.to_json()
    (root / SPEC).write_text(json.dumps(spec, indent=2) + "\n", "utf-8")


def to_array(column: pa.ChunkedArray) -> np.ndarray:
    """A float column as (N,), a fixed-size list column without nulls as (N, D)."""
    if not pa.types.is_fixed_size_list(column.type):
        return np.asarray(column.to_numpy())
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat).reshape(len(column), column.type.list_size)


def feature_matrix(columns: Mapping[str, np.ndarray], features: tuple[str, ...]) -> np.ndarray:
    """Columns side by side: float32 (N, F)."""
    parts = [np.asarray(columns[name], dtype=np.float32) for name in features]
    return np.concatenate([part[:, None] if part.ndim == 1 else part for part in parts], axis=1)


def to_quality_score(mos: np.ndarray, label_min: float, label_max: float) -> np.ndarray:
    """A mean opinion score in its own scale to the 1-10 of `quality_score`, linear and clipped."""
    unit = np.clip((mos - label_min) / (label_max - label_min), 0.0, 1.0)
    return (1.0 + 9.0 * unit).astype(np.float32)
