"""How well predictions agree with people: the figures of the image-quality literature, their uncertainty, and by bin.

Everything is NumPy in, plain numbers out. No logistic fit comes before any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import rankdata

#: The origin's four bins of quality on 1-10.
BINS: tuple[str, ...] = ("low", "mid", "high", "top")
#: Where they meet. The outer two are the origin's extremes (<= 2.5 and >= 8.5, each of which belongs to its extreme);
#: the origin leaves the inner one open: the middle of the scale, which makes mid and high equally wide.
BIN_EDGES: tuple[float, float, float] = (2.5, 5.5, 8.5)


def agreement(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How well N predictions agree with N labels.

    Args:
        predicted, labels: (N,) in the same scale, finite.

    Returns:
        `photos` N; `plcc` Pearson's and `srcc` Spearman's correlation, -1 to 1; `rmse` in the scale given; `r2` the
        share of the labels' variance that is explained, at most 1. NaN where one is undefined: correlations of fewer
        than two photos or of constants, `r2` of constant labels.
    """
    predicted, labels = np.asarray(predicted, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    residual = _sum_of_squares(labels - predicted)
    varied = len(labels) > 0 and np.ptp(labels) > 0
    return {
        "photos": len(labels),
        "plcc": _correlation(predicted, labels),
        "srcc": _correlation(rankdata(predicted), rankdata(labels)),
        "rmse": float(np.sqrt(residual / len(labels))) if len(labels) else np.nan,
        "r2": 1.0 - residual / _sum_of_squares(labels - labels.mean()) if varied else np.nan,
    }


def bootstrap(
    predicted: np.ndarray,
    labels: np.ndarray,
    repeats: int = 1000,
    seed: int = 0,
    coverage: float = 0.95,
    figures: Callable[[np.ndarray, np.ndarray], dict[str, float]] = agreement,
    groups: np.ndarray | None = None,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap over photos (Efron 1979): between which values each figure would lie for other photos.

    Args:
        predicted, labels: (N,).
        repeats: resamples of N photos, with replacement.
        coverage: share of the resamples inside, 0-1.
        figures: what is computed of each resample.
        groups: (N,); whole groups are drawn instead, as takes of one scene tell little that is new (Davison & Hinkley
            1997, section 3.8).

    Returns:
        figure -> (low, high), without `photos`. Resamples where a figure is undefined are left out of it.
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    rng, drawn = np.random.default_rng(seed), []
    takes = None if groups is None else [np.flatnonzero(groups == group) for group in np.unique(groups)]
    count = len(labels) if takes is None else len(takes)
    for _ in range(repeats):
        sample = rng.integers(0, count, count) if count else np.zeros(0, dtype=np.int64)
        if takes:
            sample = np.concatenate([takes[index] for index in sample])
        drawn.append(figures(predicted[sample], labels[sample]))
    tails = [(1 - coverage) / 2, (1 + coverage) / 2]
    intervals = {}
    for name in (name for name in drawn[0] if name != "photos"):
        values = np.array([figure[name] for figure in drawn])
        values = values[np.isfinite(values)]
        low, high = np.quantile(values, tails) if len(values) else (np.nan, np.nan)
        intervals[name] = (float(low), float(high))
    return intervals


def bin_of(quality: np.ndarray) -> np.ndarray:
    """The index into `BINS` of each quality on 1-10: int64 (N,)."""
    low, middle, high = BIN_EDGES
    return np.select([quality <= low, quality < middle, quality < high], [0, 1, 2], default=3).astype(np.int64)


def per_bin(predicted_quality: np.ndarray, label_quality: np.ndarray) -> list[dict[str, Any]]:
    """The error in each bin of what people said.

    Args:
        predicted_quality, label_quality: (N,) on 1-10.

    Returns:
        for each of `BINS`: `bin`, `photos`, `bias` (mean of predicted minus label), `mae`, `rmse`; NaN in an empty one.
    """
    errors, bins = (
        np.asarray(predicted_quality, np.float64) - np.asarray(label_quality, np.float64),
        bin_of(label_quality),
    )
    rows = []
    for index, name in enumerate(BINS):
        inside = errors[bins == index]
        row: dict[str, Any] = {"bin": name, "photos": len(inside), "bias": np.nan, "mae": np.nan, "rmse": np.nan}
        if len(inside):
            row |= {"bias": float(inside.mean()), "mae": float(np.abs(inside).mean())}
            row["rmse"] = float(np.sqrt(_sum_of_squares(inside) / len(inside)))
        rows.append(row)
    return rows


def _sum_of_squares(values: np.ndarray) -> float:
    return float(np.dot(values, values))


def _correlation(left: np.ndarray, right: np.ndarray) -> float:
    if len(left) < 2 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return float("nan")
    return float(np.corrcoef(left, right)[0, 1])
