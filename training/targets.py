"""Step 2: what the student and the attribute head learn, for every train photo and degraded copy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training.labels import attribute_targets
from training.prepare import Rows, read
from training.scenes import scene_targets

_FOLDS = 5
_RIDGE = 3000.0  # on standardised statistics; not tuned


def write(cache: Path, seed: int = 0) -> None:
    """Write `attributes.npy` float32 (N, 6) and `scenes.npy` float32 (N, 9) to the cache; NaN for the test split."""
    rows = Rows.load(cache)
    use = np.flatnonzero(~rows.test)
    source = rows.original[use]
    mos = out_of_fold_mos(cache, rows, seed)[source]
    measured = np.asarray(read(cache, "measured"))[source]
    attributes = np.full((len(rows.mos), 6), np.nan, dtype=np.float32)
    attributes[use] = attribute_targets(mos, measured, rows.kind[use], rows.severity[use])
    scenes = np.full((len(rows.mos), 9), np.nan, dtype=np.float32)
    scenes[use] = scene_targets(read(cache, "logits")[source].astype(np.float64), measured[:, 2])
    np.save(cache / "attributes.npy", attributes)
    np.save(cache / "scenes.npy", scenes)


def out_of_fold_mos(cache: Path, rows: Rows, seed: int) -> np.ndarray:
    """MOS (N,) of undegraded train photos, predicted by ridge regressions that did not see their label; NaN elsewhere.

    On the teacher's statistics of every stage, which say more than the CLIP tower's last map.
    """
    train = np.flatnonzero(~rows.test & (rows.kind < 0))
    x = read(cache, "teacher")[train].astype(np.float32)
    x = (x - x.mean(0)) / (x.std(0) + 1e-3)
    y = rows.mos[train]
    fold = np.random.default_rng(seed).permutation(len(train)) % _FOLDS
    grams = [x[fold == k].T @ x[fold == k] for k in range(_FOLDS)]  # (4128, 4128) each
    moments = [x[fold == k].T @ (y[fold == k] - y.mean()) for k in range(_FOLDS)]
    predicted = np.full(len(rows.mos), np.nan, dtype=np.float32)
    for k in range(_FOLDS):
        gram = sum(grams) - grams[k] + _RIDGE * np.eye(x.shape[1], dtype=np.float32)
        weights = np.linalg.solve(gram, sum(moments) - moments[k])
        predicted[train[fold == k]] = x[fold == k] @ weights + y.mean()
    return predicted
