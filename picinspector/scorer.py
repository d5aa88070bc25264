"""The scorer: a LightGBM regression from stored embeddings to `predicted_mos` and `quality_score`.

A scorer folder holds `scorer.json` (what the model eats and the scale of its labels) and the model as LightGBM text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np

from picinspector.errors import BundleError

SPEC = "scorer.json"


class Scorer:
    """A trained LightGBM scorer.

    Attributes:
        features: columns of the embeddings table that make the feature matrix, in order.
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
            self._label_min, self._label_max = float(spec["label_min"]), float(spec["label_max"])
            model = path.with_name(spec["model"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{path}: not a readable scorer spec ({error!r}); train or fetch it again") from error
        if not self._label_max > self._label_min:
            raise BundleError(f"{path}: label_max {self._label_max} must be above label_min {self._label_min}")
        try:
            self._booster = lightgbm.Booster(model_file=os.fspath(model))
        except lightgbm.basic.LightGBMError as error:
            raise BundleError(f"{model}: LightGBM cannot load it: {error}; train or fetch it again") from error
        if self._booster.num_feature() != self._num_features:
            raise BundleError(
                f"{model} takes {self._booster.num_feature()} features but {SPEC} says {self._num_features}: "
                "they are from different trainings; train or fetch the scorer again"
            )

    def predict(self, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Score N photos.

        Args:
            columns: name -> (N,) or (N, D) for every name in `features`.

        Returns:
            `predicted_mos` (N,) float32 in the training scale, `quality_score` (N,) float32 in 1-10.

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
        predicted = np.asarray(self._booster.predict(matrix, num_threads=1), dtype=np.float32)
        return predicted, to_quality_score(predicted, self._label_min, self._label_max)


def feature_matrix(columns: Mapping[str, np.ndarray], features: tuple[str, ...]) -> np.ndarray:
    """Columns side by side: float32 (N, F)."""
    parts = [np.asarray(columns[name], dtype=np.float32) for name in features]
    return np.concatenate([part[:, None] if part.ndim == 1 else part for part in parts], axis=1)


def to_quality_score(mos: np.ndarray, label_min: float, label_max: float) -> np.ndarray:
    """A mean opinion score in its own scale to the 1-10 of `quality_score`, linear and clipped."""
    unit = np.clip((mos - label_min) / (label_max - label_min), 0.0, 1.0)
    return (1.0 + 9.0 * unit).astype(np.float32)
