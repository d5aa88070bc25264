"""The recipe of the scorer's training: labels in 0-1, extremes seen more often, LightGBM.

The steps are the origin's, each of which can be left out: labels scaled by their range, photos of extreme quality
duplicated and weighted, the errors by bin of a first fit deciding what a second fit sees more often, early stopping on
validation rows. Functions of arrays; who trains (this process, or several with Ray Train) is the caller's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import lightgbm
import numpy as np

from picinspector.metrics import BINS, bin_of, per_bin
from picinspector.scorer import to_quality_score

#: The steps that a recipe can do without, by the names of `Recipe`'s fields.
STEPS: tuple[str, ...] = (
    "scale_labels",
    "oversample_extremes",
    "weight_extremes",
    "error_guided",
    "early_stopping",
)

#: Ordinary values for a thousand dense features and some thousand photos; `training.train_scorer --trials` searches.
PARAMS: dict[str, Any] = {
    "objective": "l2",
    "learning_rate": 0.05,
    "num_leaves": 31,
    "min_data_in_leaf": 25,
    "feature_fraction": 0.1,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "lambda_l2": 5.0,
}

#: The same numbers from the same rows, and one line of log less.
_REPEATABLE = {"verbose": -1, "deterministic": True, "force_row_wise": True}

#: A bin's error is worth acting on from this many validation photos.
_MIN_BIN_PHOTOS = 20
#: A bin is seen at most this many times as often as the rest, or a few photos would be the training.
_MAX_FACTOR = 3.0


@dataclass(frozen=True)
class Recipe:
    """How a scorer is trained.

    Attributes:
        label_range: the scale of the labels; None takes the least and greatest of the training labels (MinMaxScaler).
        scale_labels: learn labels scaled to 0-1 by that range, instead of as they are.
        oversample_extremes: let photos of the bins low and top go in `copies` times.
        weight_extremes: give photos of the bins low and top `extreme_weight` times the weight.
        error_guided: fit twice; what the second fit sees more often is decided by the first one's error per bin.
        early_stopping: stop once `patience` rounds brought nothing on validation rows.
        rounds: boosting rounds; with early stopping, at most.
        params: LightGBM's.
        seed: of everything random.
    """

    label_range: tuple[float, float] | None = None
    scale_labels: bool = True
    oversample_extremes: bool = True
    copies: int = 2
    weight_extremes: bool = True
    extreme_weight: float = 1.5
    error_guided: bool = True
    early_stopping: bool = True
    rounds: int = 1500
    patience: int = 50
    params: Mapping[str, Any] = field(default_factory=lambda: dict(PARAMS))
    seed: int = 0

    @property
    def lightgbm_params(self) -> dict[str, Any]:
        """All that LightGBM is told."""
        return {**_REPEATABLE, **self.params, "seed": self.seed}

    def without(self, *steps: str) -> Recipe:
        """This recipe without these of `STEPS`."""
        switches: dict[str, Any] = dict.fromkeys(steps, False)
        return replace(self, **switches)


@dataclass(frozen=True)
class Rows:
    """What N labelled photos come to under a recipe.

    Attributes:
        target: (N,) float64, what the model learns.
        weight: (N,) float64.
        repeats: (N,) int64, how many times each goes in; at least 1.
        label_min, label_max: the scale of the labels.
    """

    target: np.ndarray
    weight: np.ndarray
    repeats: np.ndarray
    label_min: float
    label_max: float

    @property
    def order(self) -> np.ndarray:
        """Indices of the photos as they go in: (sum of repeats,) int64."""
        return np.repeat(np.arange(len(self.repeats)), self.repeats)


@dataclass(frozen=True)
class Fit:
    """A trained model and the scale it speaks.

    Attributes:
        booster: the model.
        label_min, label_max: the scale of the labels.
        scaled: True where the model predicts in 0-1 of that scale.
        factors: how often the bins low, mid, high and top were seen, for their error.
        rounds: boosting rounds kept.
    """

    booster: lightgbm.Booster
    label_min: float
    label_max: float
    scaled: bool
    factors: tuple[float, ...]
    rounds: int

    def predict(self, matrix: np.ndarray) -> np.ndarray:
        """`predicted_mos` of N photos: (N, F) -> float64 (N,) in the labels' scale."""
        return self.to_mos(np.asarray(self.booster.predict(matrix)))

    def to_mos(self, output: np.ndarray) -> np.ndarray:
        """What the model gives, in the labels' scale."""
        return self.label_min + output * (self.label_max - self.label_min) if self.scaled else output

    def from_mos(self, mos: np.ndarray) -> np.ndarray:
        """What the model should give, for labels in their scale."""
        return (mos - self.label_min) / (self.label_max - self.label_min) if self.scaled else mos

    def to_quality(self, mos: np.ndarray) -> np.ndarray:
        """Labels or predictions on 1-10."""
        return to_quality_score(mos, self.label_min, self.label_max)


def find_range(labels: np.ndarray, recipe: Recipe) -> tuple[float, float]:
    """The recipe's label range, or that of these training labels.

    Raises:
        ValueError: all labels are the same.
    """
    low, high = recipe.label_range or (float(np.min(labels)), float(np.max(labels)))
    if not high > low:
        raise ValueError(f"all {len(labels)} labels are {low:g}: there is nothing to learn")
    return low, high


def prepare(
    labels: np.ndarray, recipe: Recipe, weights: np.ndarray | None = None, factors: Sequence[float] | None = None
) -> Rows:
    """What a fit is to see.

    Args:
        labels: (N,) of the training photos.
        recipe: which steps.
        weights: (N,) of the labels themselves: a rule's may count less than a person's. None: all 1.
        factors: (4,) how often each bin is seen, from `sampling_factors`. None: once.
    """
    labels = np.asarray(labels, dtype=np.float64)
    low, high = find_range(labels, recipe)
    bins = bin_of(to_quality_score(labels, low, high))
    extreme = (bins == 0) | (bins == len(BINS) - 1)
    weight = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=np.float64).copy()
    if recipe.weight_extremes:
        weight[extreme] *= recipe.extreme_weight
    wanted = np.ones(len(labels)) if factors is None else np.asarray(factors, dtype=np.float64)[bins]
    if recipe.oversample_extremes:
        wanted[extreme] *= recipe.copies
    # 1.3 times: each once, and three in ten of them twice.
    chance = np.random.default_rng(recipe.seed).random(len(labels))
    repeats = np.floor(wanted).astype(np.int64) + (chance < wanted % 1.0)
    target = (labels - low) / (high - low) if recipe.scale_labels else labels
    return Rows(target, weight, np.maximum(repeats, 1), low, high)


def sampling_factors(predicted_quality: np.ndarray, label_quality: np.ndarray) -> tuple[float, ...]:
    """How often the next fit should see each bin: its RMSE over that of the best bin, 1 to 3.

    Args:
        predicted_quality, label_quality: (N,) on 1-10, of rows that the first fit did not see.

    Returns:
        (4,) for `metrics.BINS`; 1 for a bin with too few photos to tell.
    """
    errors = [
        row["rmse"] if row["photos"] >= _MIN_BIN_PHOTOS else np.nan for row in per_bin(predicted_quality, label_quality)
    ]
    if np.isfinite(errors).sum() < 2:
        return (1.0,) * len(BINS)
    factors = np.nan_to_num(np.array(errors) / max(np.nanmin(errors), 1e-9), nan=1.0)
    return tuple(np.clip(factors, 1.0, _MAX_FACTOR).tolist())


#: Trains on rows as a recipe says; who writes one decides where.
Train = Callable[[Rows, Recipe], lightgbm.Booster]


def fit_with(
    train: Train,
    labels: np.ndarray,
    recipe: Recipe,
    weights: np.ndarray | None,
    held_out: Callable[[Fit], tuple[np.ndarray, np.ndarray]] | None,
    factors: Sequence[float] | None = None,
) -> Fit:
    """Fit by the recipe: once, or twice where errors guide.

    Args:
        train: trains a model.
        labels, weights: (N,), see `prepare`.
        recipe: which steps.
        held_out: given a first fit, predictions and labels (M,) in the labels' scale of rows it was not trained on;
            None fits once.
        factors: (4,) of the first fit, where they are known from another.
    """
    fitted = _fit_once(train, labels, recipe, weights, factors)
    if not recipe.error_guided or held_out is None:
        return fitted
    predicted, truth = held_out(fitted)
    factors = sampling_factors(fitted.to_quality(predicted), fitted.to_quality(truth))
    return fitted if max(factors) == 1.0 else _fit_once(train, labels, recipe, weights, factors)


def _fit_once(
    train: Train, labels: np.ndarray, recipe: Recipe, weights: np.ndarray | None, factors: Sequence[float] | None
) -> Fit:
    rows = prepare(labels, recipe, weights, factors)
    booster = train(rows, recipe)
    return Fit(
        booster, rows.label_min, rows.label_max, recipe.scale_labels, tuple(factors or (1.0,) * len(BINS)),
        booster.best_iteration if booster.best_iteration > 0 else booster.current_iteration(),
    )  # fmt: skip


def fit(
    matrix: np.ndarray,
    labels: np.ndarray,
    recipe: Recipe,
    weights: np.ndarray | None = None,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    folds: int = 5,
    num_threads: int = 0,
    groups: np.ndarray | None = None,
) -> Fit:
    """Fit in this process.

    Args:
        matrix: (N, F) features.
        labels, weights: (N,), see `prepare`.
        recipe: which steps.
        validation: (M, F) and (M,) for early stopping and for the errors by bin. None: no early stopping, and
            cross-validation on the training rows tells the errors.
        folds: of that cross-validation.
        num_threads: LightGBM's; 0 takes all cores.
        groups: (N,) photos of one are never on both sides of that cross-validation.
    """

    def train(rows: Rows, recipe: Recipe) -> lightgbm.Booster:
        return boost(matrix, rows, recipe, validation, {"num_threads": num_threads})

    def held_out(fitted: Fit) -> tuple[np.ndarray, np.ndarray]:
        if validation is not None:
            return fitted.predict(validation[0]), validation[1]
        plain = recipe.without("error_guided")
        return out_of_fold(matrix, labels, plain, weights, groups, folds, num_threads), labels

    return fit_with(train, labels, recipe, weights, held_out)


@dataclass(frozen=True)
class Begun:
    """A LightGBM training that is under way.

    Attributes:
        model: the trees so far, as LightGBM's text.
        rounds: how many rounds made them.
        losses: on the validation rows after each, where it stops early; less is better.
    """

    model: str
    rounds: int
    losses: Sequence[float]


def boost(
    matrix: np.ndarray,
    rows: Rows,
    recipe: Recipe,
    validation: tuple[np.ndarray, np.ndarray] | None,
    params: Mapping[str, Any] | None = None,
    begun: Begun | None = None,
    after_round: Callable[[Callable[[], Begun], int], None] | None = None,
) -> lightgbm.Booster:
    """One LightGBM training on rows that are prepared.

    Args:
        matrix: (N, F) features of the rows.
        rows: from `prepare`.
        recipe: rounds, patience, parameters, seed.
        validation: (M, F) and labels (M,) in the labels' scale; watched where the recipe stops early.
        params: go before the recipe's: threads, network.
        begun: go on from there. The bags of the rounds to come are drawn from another seed, so the model is as good
            as one trained in one piece, but not the same.
        after_round: called with what makes a `Begun` and the rounds that are done; not after the last.
    """
    order, all_params = rows.order, {**recipe.lightgbm_params, **(params or {})}
    if begun is not None:  # the seed's own bags are those of the first rounds
        all_params["seed"] = recipe.seed + 1_000_003 * begun.rounds
    data = lightgbm.Dataset(matrix[order], rows.target[order], weight=rows.weight[order], params=all_params)
    watched: dict[str, Any] = {}
    if validation is not None and recipe.early_stopping:
        truth = np.asarray(validation[1], dtype=np.float64)
        if recipe.scale_labels:
            truth = (truth - rows.label_min) / (rows.label_max - rows.label_min)
        watched["valid_sets"] = [lightgbm.Dataset(validation[0], truth, reference=data)]
    measured: dict[str, Any] = {}
    losses: list[float] = list(begun.losses) if begun is not None else []

    def watch(env: Any) -> None:
        for metrics in measured.values():  # of one dataset, if any
            losses.append(next(iter(metrics.values()))[-1])
        done = env.iteration + 1
        if after_round is not None and done < env.end_iteration:
            after_round(lambda: Begun(env.model.model_to_string(num_iteration=-1), done, tuple(losses)), done)
        # LightGBM's own early stopping forgets what it saw before a training was interrupted.
        best = int(np.argmin(np.nan_to_num(losses, nan=np.inf))) if measured else done
        if measured and (env.iteration - best >= recipe.patience or done == env.end_iteration):
            raise lightgbm.EarlyStopException(best, env.evaluation_result_list)

    watch.order = 30  # type: ignore[attr-defined]  # after what it looks at
    return lightgbm.train(
        all_params,
        data,
        recipe.rounds - (begun.rounds if begun is not None else 0),
        init_model=lightgbm.Booster(model_str=begun.model) if begun is not None else None,
        callbacks=[lightgbm.record_evaluation(measured), watch],
        **watched,
    )


def out_of_fold(
    matrix: np.ndarray,
    labels: np.ndarray,
    recipe: Recipe,
    weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    folds: int = 5,
    num_threads: int = 0,
) -> np.ndarray:
    """`predicted_mos` of each photo by a model that was trained without it (and its group): float64 (N,)."""
    # Each fold has the scale of all labels, or their predictions would not compare.
    recipe = replace(recipe, label_range=find_range(labels, recipe))
    fold, predicted = split_folds(len(labels), folds, recipe.seed, groups), np.zeros(len(labels))
    for index in range(folds):
        inside, outside = fold != index, fold == index
        kept, takes = (None if values is None else values[inside] for values in (weights, groups))
        fitted = fit(matrix[inside], labels[inside], recipe, kept, folds=folds, num_threads=num_threads, groups=takes)
        predicted[outside] = fitted.predict(matrix[outside])
    return predicted


def split_folds(rows: int, folds: int, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """A fold for each row, 0 to folds - 1, equally many; rows of one group share theirs: int64 (N,)."""
    rng = np.random.default_rng(seed)
    if groups is None:
        return rng.permutation(rows) % folds
    _, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    fold_of_group, filled = np.zeros(len(sizes), np.int64), np.zeros(folds, np.int64)
    for group in rng.permutation(len(sizes)):  # each into the emptiest fold
        fold_of_group[group] = filled.argmin()
        filled[fold_of_group[group]] += sizes[group]
    return fold_of_group[index.ravel()]
