"""Step 4: the LightGBM scorer on what the embeddings table stores."""

from __future__ import annotations

import json
from pathlib import Path

import lightgbm
import numpy as np

from picinspector.schema import MEASUREMENTS
from picinspector.scorer import feature_matrix
from training.labels import degraded_mos
from training.prepare import Rows, read

_MEASURED = tuple(f"measured_{name}" for name in MEASUREMENTS)
FEATURES = ("clip_embedding", *_MEASURED)

# Ordinary values for wide dense features; not tuned.
_PARAMS = {
    "objective": "l2",
    "learning_rate": 0.05,
    "num_leaves": 31,
    "min_data_in_leaf": 25,
    "feature_fraction": 0.1,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
    "verbose": -1,
    "deterministic": True,
    "force_row_wise": True,
}
_ROUNDS = 700
_DEGRADED_WEIGHT = 0.5  # a rule made these labels, people the others


def columns(cache: Path) -> dict[str, np.ndarray]:
    """The columns of the embeddings table a scorer may use, for all rows of the cache."""
    table = {"clip_embedding": np.asarray(read(cache, "clip"))}
    table |= dict(zip(_MEASURED, np.asarray(read(cache, "measured")).T, strict=True))
    return table


def fit(matrix: np.ndarray, rows: Rows, use: np.ndarray, seed: int, rounds: int = _ROUNDS) -> lightgbm.Booster:
    """Fit on the rows `use`: people's labels for photos, the rule's labels for degraded copies."""
    labels = degraded_mos(rows.mos, rows.kind, rows.severity)
    weights = np.where(rows.kind[use] >= 0, _DEGRADED_WEIGHT, 1.0)
    data = lightgbm.Dataset(matrix[use], labels[use], weight=weights)
    return lightgbm.train(_PARAMS | {"seed": seed}, data, rounds)


def write(cache: Path, folder: Path, seed: int = 0) -> None:
    """Fit on the whole train split and write a scorer folder."""
    rows = Rows.load(cache)
    folder.mkdir(parents=True, exist_ok=True)
    matrix = feature_matrix(columns(cache), FEATURES)
    fit(matrix, rows, np.flatnonzero(~rows.test), seed).save_model(folder / "model.txt")
    spec = {
        "kind": "lightgbm",
        "features": FEATURES,
        "num_features": matrix.shape[1],
        "label_min": 0.0,
        "label_max": 1.0,
        "model": "model.txt",
    }
    (folder / "scorer.json").write_text(json.dumps(spec, indent=2) + "\n", "utf-8")
