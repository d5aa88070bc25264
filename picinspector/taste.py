"""Learning one person's taste from few stars.

Hundreds of stars are few for trees over a thousand features. So a ridge regression learns from the stars first, which
needs few; it rates a sample of the unrated photos of the library; and LightGBM learns from all these estimates
(distillation on unlabelled data: Bucila, Caruana & Niculescu-Mizil 2006). LightGBM on the stars alone is tried beside
it: more stars, or a taste that a few features tell, suit it better.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from picinspector.recipe import Fit, Recipe, fit, split_folds

#: Of the cross-validation.
FOLDS = 5
#: Penalties of the ridge regression that are tried, for features whose squares sum to about 1.
_PENALTIES = np.logspace(-3, 2, 16)
#: Standard deviations from which a measurement counts no more: one burnt photo is not to rule the regression.
_OUTLIER = 3.0

#: LightGBM on stars: small trees, or a hundred photos are learnt by heart.
_FEW_PARAMS = {"num_leaves": 7, "learning_rate": 0.05, "feature_fraction": 0.1, "lambda_l2": 5.0}
_FEW_ROUNDS = 200
#: LightGBM on estimates, which have no noise: as closely as trees can.
_DISTIL_PARAMS = {
    "num_leaves": 15,
    "learning_rate": 0.1,
    "min_data_in_leaf": 10,
    "feature_fraction": 0.1,
    "lambda_l2": 1.0,
}
_DISTIL_ROUNDS = 400
#: Numbers in a matrix below which LightGBM's threads wait for each other longer than they work.
_SMALL = 500_000


@dataclass(frozen=True)
class Photos:
    """Photos of a library: first the N rated, then M unrated ones.

    Attributes:
        features: columns of the feature matrix, in order; `widths` of each.
        matrix: float32 (N + M, F).
        ratings: float64 (N,).
        groups: int64 (N,), the same for rated photos of the same content (`duplicates.content_groups`).
        default: float32 (N + M,), the `quality_score` of the bundle's own scorer.
    """

    features: tuple[str, ...]
    widths: tuple[int, ...]
    matrix: np.ndarray
    ratings: np.ndarray
    groups: np.ndarray
    default: np.ndarray


def _directly(photos: Photos, rows: np.ndarray, recipe: Recipe) -> Fit:
    """LightGBM by the recipe on the stars of these rated photos alone."""
    few = {**recipe.params, **_FEW_PARAMS, "min_data_in_leaf": int(np.clip(len(rows) // 20, 3, 20))}
    few_rounds = replace(recipe, params=few, rounds=_FEW_ROUNDS)
    return _fit(photos.matrix[rows], photos.ratings[rows], few_rounds, photos.groups[rows])


def _distilled(photos: Photos, rows: np.ndarray, recipe: Recipe) -> Fit:
    """LightGBM on what a ridge regression on the stars makes of these rated photos and of the unrated ones."""
    seen = np.concatenate([rows, np.arange(len(photos.ratings), len(photos.matrix))])
    # Estimates are no votes: nothing about their extremes wants repeating.
    plain = recipe.without("oversample_extremes", "weight_extremes", "error_guided")
    exact = replace(plain, params={**recipe.params, **_DISTIL_PARAMS}, rounds=_DISTIL_ROUNDS)
    return _fit(photos.matrix[seen], _ridge(photos, rows)[seen], exact)


def _fit(matrix: np.ndarray, labels: np.ndarray, recipe: Recipe, groups: np.ndarray | None = None) -> Fit:
    return fit(matrix, labels, recipe, num_threads=1 if matrix.size < _SMALL else 0, groups=groups)


#: What they are called in reports.
WAYS = {"ridge estimates": _distilled, "stars alone": _directly}


def out_of_fold(photos: Photos, way: str, recipe: Recipe) -> np.ndarray:
    """The rating of each rated photo by a model that has seen the stars of no photo of its group: float64 (N,)."""
    count = len(photos.ratings)
    fold, predicted = split_folds(count, FOLDS, recipe.seed, photos.groups), np.zeros(count)
    for index in range(FOLDS):
        fitted = WAYS[way](photos, np.flatnonzero(fold != index), recipe)
        predicted[fold == index] = fitted.predict(photos.matrix[:count][fold == index])
    return predicted


def _ridge(photos: Photos, rows: np.ndarray) -> np.ndarray:
    """Ridge regression on the stars of these rated photos: an estimate for all, float64 (N + M,).

    The embedding, the measurements and the default scorer's opinion have equal say, however many numbers each is. The
    penalty is the one with the least error on groups left out one at a time, in the exact form: of the hat matrix H,
    (I - H_gg)^-1 times a group's residuals (PRESS, Allen 1974, with more than one row).
    """
    edges = np.cumsum((0, *photos.widths))
    wide = [photos.matrix[:, a:b] for a, b in pairwise(edges) if b - a > 1]
    single = photos.matrix[:, [edge for edge, width in zip(edges, photos.widths, strict=False) if width == 1]]
    blocks = [_standard(block) for block in (*wide, single, photos.default[:, None])]
    features = np.hstack([block / np.sqrt(max(1.0, np.square(block).sum(axis=1).mean())) for block in blocks])
    features -= features[rows].mean(axis=0)  # so that their mean and the stars' need no penalty
    stars = photos.ratings[rows]
    left, sizes, right = np.linalg.svd(features[rows], full_matrices=False)
    along = left.T @ (stars - stars.mean())
    names, counts = np.unique(photos.groups[rows], return_counts=True)
    several = [np.flatnonzero(photos.groups[rows] == name) for name in names[counts > 1]]
    errors = []
    for penalty in _PENALTIES:
        shrunk = sizes**2 / (sizes**2 + penalty)
        residual = stars - stars.mean() - left @ (shrunk * along)
        left_out = residual / (1 - 1 / len(rows) - np.square(left) @ shrunk)
        for group in several:
            hat = 1 / len(rows) + (left[group] * shrunk) @ left[group].T
            left_out[group] = np.linalg.solve(np.eye(len(group)) - hat, residual[group])
        errors.append(np.square(left_out).mean())
    penalty = _PENALTIES[int(np.argmin(errors))]
    weights = right.T @ (sizes / (sizes**2 + penalty) * along)
    return np.asarray(stars.mean() + features @ weights, dtype=np.float64)


def _standard(block: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and deviation 1, outliers pulled in; constant columns become 0. float64."""
    centred = block.astype(np.float64) - block.mean(axis=0, dtype=np.float64)
    deviation = centred.std(axis=0)
    standard: np.ndarray = np.clip(centred / np.where(deviation > 1e-9, deviation, np.inf), -_OUTLIER, _OUTLIER)
    return standard
