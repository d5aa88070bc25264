"""Scene labels for every photo, from some two thousand that were labelled by eye (`scene_labels.csv`)."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from picinspector.errors import UsageError
from picinspector.schema import SCENES

#: BIQ2021 train photos, labelled by eye for this project.
LABELS = Path(__file__).parent / "scene_labels.csv"
_INVERSE_PENALTY = 0.003  # on standardised features; a hundred times more or less was worse in cross-validation


def read_labels(names: list[str]) -> np.ndarray:
    """Index into `SCENES` of each photo (N,), -1 where nobody looked.

    Args:
        names: file names, in any case.

    Raises:
        UsageError: a label for no photo or for no scene.
    """
    row_of = {name.lower(): row for row, name in enumerate(names)}
    labels = np.full(len(names), -1)
    with LABELS.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["file"].lower() not in row_of or line["scene"] not in SCENES:
                raise UsageError(f"{LABELS}: no photo {line['file']!r}, or no scene {line['scene']!r}")
            labels[row_of[line["file"].lower()]] = SCENES.index(line["scene"])
    return labels


def spread(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Scene distributions float32 (N, 9): the label where there is one, elsewhere a logistic regression's.

    Args:
        features: (N, F).
        labels: (N,) from `read_labels`.
    """
    known = labels >= 0
    model = make_pipeline(StandardScaler(), LogisticRegression(C=_INVERSE_PENALTY, max_iter=500))
    model.fit(features[known], labels[known])
    scenes = model.predict_proba(features).astype(np.float32)
    scenes[known] = np.eye(len(SCENES), dtype=np.float32)[labels[known]]
    return scenes
