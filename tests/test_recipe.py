"""The recipe's steps by hand, each switch, and intervals that hold what they promise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from picinspector.conformal import Intervals, calibrate
from picinspector.metrics import agreement
from picinspector.recipe import STEPS, Begun, Recipe, boost, fit, out_of_fold, prepare, sampling_factors, split_folds

PLAIN = Recipe().without(*STEPS)
SMALL = {"num_leaves": 7, "learning_rate": 0.1, "min_data_in_leaf": 10, "num_threads": 1}

# On 1-10 these labels of a 0-100 scale are 1, 2.5 (low), 5.5 (high), 8.5, 10 (top), 4 (mid).
LABELS = np.array([0.0, 100 / 6, 50.0, 500 / 6, 100.0, 100 / 3])


def test_each_step_does_what_it_says_and_nothing_else() -> None:
    plain = prepare(LABELS, PLAIN)
    assert plain.target.tolist() == LABELS.tolist()
    assert plain.weight.tolist() == [1] * 6 and plain.repeats.tolist() == [1] * 6
    assert (plain.label_min, plain.label_max) == (0, 100)

    scaled = prepare(LABELS, Recipe().without("oversample_extremes", "weight_extremes"))
    assert scaled.target.tolist() == pytest.approx([0, 1 / 6, 0.5, 5 / 6, 1, 1 / 3])
    assert scaled.weight.tolist() == [1] * 6 and scaled.repeats.tolist() == [1] * 6

    oversampled = prepare(LABELS, Recipe(copies=3).without("weight_extremes"))
    assert oversampled.repeats.tolist() == [3, 3, 1, 3, 3, 1]
    assert oversampled.order.tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 5]
    assert oversampled.weight.tolist() == [1] * 6

    weighted = prepare(LABELS, Recipe(extreme_weight=4.0).without("oversample_extremes"), weights=np.full(6, 0.5))
    assert weighted.weight.tolist() == [2, 2, 0.5, 2, 2, 0.5]
    assert weighted.repeats.tolist() == [1] * 6


def test_labels_are_scaled_by_the_given_range_or_by_their_own() -> None:
    assert prepare(np.array([2.0, 3, 4]), Recipe()).target.tolist() == [0, 0.5, 1]
    assert prepare(np.array([2.0, 3, 4]), Recipe(label_range=(1.0, 5.0))).target.tolist() == [0.25, 0.5, 0.75]
    with pytest.raises(ValueError, match="all 3 labels are 2"):
        prepare(np.array([2.0, 2, 2]), Recipe())


def test_sampling_factors_follow_the_error_of_each_bin() -> None:
    labels = np.repeat([2.0, 4.0, 7.0, 9.0], 20)
    errors = np.repeat([4.0, 1.0, 2.0, 10.0], 20)
    assert sampling_factors(labels + errors, labels) == (3, 1, 2, 3)  # no more than 3 times
    few = labels.copy()
    few[1:20] = 4.0  # one photo left in the bin low
    assert sampling_factors(few + errors, few)[0] == 1
    assert sampling_factors(labels[:20] + 1, labels[:20]) == (1, 1, 1, 1)


def test_a_factor_with_a_fraction_repeats_that_share_of_the_photos() -> None:
    labels = np.tile([4.0, 7.0], 2000)
    rows = prepare(labels, Recipe(label_range=(1.0, 10.0)), factors=(1, 1.3, 2.0, 1))
    assert set(rows.repeats[0::2].tolist()) == {1, 2}
    assert rows.repeats[0::2].mean() == pytest.approx(1.3, abs=0.03)
    assert set(rows.repeats[1::2].tolist()) == {2}
    assert (rows.repeats == prepare(labels, Recipe(label_range=(1.0, 10.0)), factors=(1, 1.3, 2.0, 1)).repeats).all()


def photos(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels on 0-100, whose noise is far greater for the good photos."""
    rng = np.random.default_rng(seed)
    matrix = rng.uniform(-1, 1, (count, 6)).astype(np.float32)
    clean = 50 + 30 * matrix[:, 0] + 15 * np.sign(matrix[:, 1])
    return matrix, clean + rng.normal(size=count) * np.where(clean > 50, 8, 1)


def test_a_fit_learns_stops_early_is_repeatable_and_speaks_the_scale_of_the_labels() -> None:
    (matrix, labels), validation, (new, truth) = photos(900, 0), photos(300, 1), photos(500, 2)
    recipe = Recipe(params=SMALL, rounds=400, patience=15)
    fitted = fit(matrix, labels, recipe, validation=validation)
    assert fitted.scaled and 10 < fitted.rounds < 400
    assert agreement(fitted.predict(new), truth)["r2"] > 0.9  # of 98 %: the noise is 5.7 of a spread of 24
    assert np.ptp(np.asarray(fitted.booster.predict(new))) < 1.2
    assert (fitted.predict(new) == fit(matrix, labels, recipe, validation=validation).predict(new)).all()

    unscaled = fit(matrix, labels, recipe.without("scale_labels"), validation=validation)
    assert agreement(unscaled.predict(new), truth)["r2"] > 0.9
    assert np.ptp(np.asarray(unscaled.booster.predict(new))) > 50
    assert fit(matrix, labels, recipe.without("early_stopping"), validation=validation).rounds == 400


@pytest.mark.parametrize("known", [True, False], ids=["validation", "cross-validation"])
def test_errors_guide_the_second_fit(known: bool) -> None:
    (matrix, labels), validation = photos(900, 0), photos(500, 1)
    recipe = Recipe(params=SMALL, rounds=60, label_range=(0.0, 100.0))
    fitted = fit(matrix, labels, recipe, validation=validation if known else None)
    low, mid, high, top = fitted.factors
    assert min(high, top) > 1.5 * min(low, mid), "the noise is in the upper half"
    assert fit(matrix, labels, recipe.without("error_guided"), validation=validation).factors == (1, 1, 1, 1)


def test_weights_of_the_labels_count() -> None:
    """Half the labels are upside down; the fit follows those that weigh."""
    matrix, labels = photos(800, 0)
    lying = np.arange(800) % 2 == 0
    told = np.where(lying, 100 - labels, labels)
    for liars, sign in ((0.01, 1), (100.0, -1)):
        weights = np.where(lying, liars, 1.0)
        fitted = fit(matrix, told, Recipe(params=SMALL, rounds=60).without("error_guided"), weights)
        assert sign * agreement(fitted.predict(matrix), labels)["plcc"] > 0.8


def test_out_of_fold_predictions_never_saw_their_photo() -> None:
    rng = np.random.default_rng(0)
    matrix, labels = rng.normal(size=(200, 5)), rng.normal(size=200)  # nothing to learn, all to memorise
    recipe = Recipe(params=SMALL | {"min_data_in_leaf": 1}, rounds=100).without("error_guided")
    assert agreement(fit(matrix, labels, recipe).predict(matrix), labels)["plcc"] > 0.9
    assert abs(agreement(out_of_fold(matrix, labels, recipe), labels)["plcc"]) < 0.25

    # Each photo twice: by photo a fold knows the answer, by group it does not.
    twice, both = np.repeat(matrix, 2, axis=0), np.repeat(labels, 2)
    assert agreement(out_of_fold(twice, both, recipe), both)["plcc"] > 0.5
    by_group = out_of_fold(twice, both, recipe, groups=np.repeat(np.arange(200), 2))
    assert abs(agreement(by_group, both)["plcc"]) < 0.25


def test_folds_are_even_seeded_and_keep_groups_whole() -> None:
    assert np.bincount(split_folds(103, 5, seed=0)).tolist() == [21, 21, 21, 20, 20]
    assert (split_folds(103, 5, 0) == split_folds(103, 5, 0)).all()
    assert (split_folds(103, 5, 0) != split_folds(103, 5, 1)).any()
    groups = np.repeat([f"scene {number}" for number in range(40)], 3)
    fold = split_folds(120, 4, 0, groups)
    assert np.bincount(fold).tolist() == [30] * 4
    assert all(len(set(fold[groups == name])) == 1 for name in groups)


# --- intervals --------------------------------------------------------------------------------------------------------


def test_an_interval_by_hand() -> None:
    # 19 errors of -9 to 9 and coverage 0.9: rank 20 * 0.05 = 1, the least and the greatest.
    errors = np.arange(-9.0, 10.0)
    found = calibrate(np.zeros(19), np.random.default_rng(0).permutation(errors), coverage=0.9)
    assert (found.edges, found.low, found.high) == ((), (-9,), (9,))
    # Coverage 0.8: rank 2 of either end.
    assert calibrate(np.zeros(19), errors, coverage=0.8).high == (8,)
    # 18 rows cannot promise 0.9.
    assert calibrate(np.zeros(18), errors[:18], coverage=0.9).low == (-np.inf,)
    low, high = found.around(np.array([1.0, 2.0]))
    assert (low.tolist(), high.tolist()) == ([-8, -7], [10, 11])
    # A model that is 100 too low everywhere: no interval leaves its own prediction out.
    assert calibrate(np.zeros(19), errors + 100).low == (0,)


def test_intervals_cover_what_they_promise_and_are_wide_where_the_errors_are() -> None:
    rng = np.random.default_rng(0)
    predicted = rng.uniform(0, 1, 6000)
    labels = predicted + rng.normal(size=6000) * (0.02 + 0.2 * predicted)
    found = calibrate(predicted[:3000], labels[:3000], coverage=0.9)
    assert len(found.low) == 5
    low, high = found.around(predicted[3000:])
    inside = (low <= labels[3000:]) & (labels[3000:] <= high)
    assert 0.88 <= inside.mean() <= 0.92
    for fifth in np.array_split(np.argsort(predicted[3000:]), 5):
        assert 0.86 <= inside[fifth].mean() <= 0.94
    widths = np.array(found.high) - np.array(found.low)
    assert (np.diff(widths) > 0).all() and widths[-1] > 3 * widths[0]


def test_intervals_survive_json() -> None:
    found = Intervals(0.9, (0.25, 0.5), (-np.inf, -0.125, -0.25), (0.5, 0.25, np.inf))
    assert Intervals.from_json(found.to_json()) == found
    assert found.to_json()["low"][0] is None
    with pytest.raises(ValueError, match="2 lows"):
        Intervals.from_json(found.to_json() | {"low": [0, 0]})


def test_a_training_that_was_interrupted_goes_on() -> None:
    """Without bags both parts draw nothing, so the model is that of one piece, and it stops in the same round."""
    rng = np.random.default_rng(0)
    matrix, truth = rng.normal(size=(400, 6)), rng.normal(size=400)
    labels = np.clip(50 + 15 * matrix[:, 0] + 15 * truth, 0, 100)
    recipe = Recipe(rounds=200, patience=15, params={**SMALL, "feature_fraction": 1.0, "bagging_fraction": 1.0})
    rows, validation = prepare(labels[:300], recipe), (matrix[300:], labels[300:])
    states: dict[int, Begun] = {}

    def keep(state: Callable[[], Begun], rounds: int) -> None:
        states[rounds] = state()

    whole = boost(matrix[:300], rows, recipe, validation, after_round=keep)
    assert 10 < whole.best_iteration < 170, "it stopped early"
    for rounds in (10, whole.best_iteration + 5):
        on = boost(matrix[:300], rows, recipe, validation, begun=states[rounds])
        assert on.best_iteration == whole.best_iteration
        assert np.asarray(on.predict(matrix)) == pytest.approx(np.asarray(whole.predict(matrix)), abs=1e-6)
        assert on.num_trees() == whole.num_trees()

    steady = recipe.without("early_stopping")
    boost(matrix[:300], rows, steady, validation, after_round=keep)
    assert max(states) == 199, "behind the last round there is nothing to go on to"
    half = boost(matrix[:300], rows, steady, validation, begun=states[10])
    assert half.num_trees() == 200
