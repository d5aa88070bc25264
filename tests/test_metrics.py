"""Figures of agreement: values that a person can derive, and SciPy as the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from picinspector.metrics import BINS, agreement, bin_of, bootstrap, per_bin


def test_agreement_of_four_photos_by_hand() -> None:
    # Errors 1, 0, 0, 1 of labels 1 2 3 4 (mean 2.5, sum of squares about it 5): RMSE sqrt(2/4), R2 1 - 2/5.
    found = agreement(np.array([2.0, 2.0, 3.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    # Both correlations: deviations -.5 -.5 .5 .5 (ranks 1.5 1.5 3.5 3.5) against -1.5 -.5 .5 1.5: 2 / sqrt(1 * 5).
    assert found == pytest.approx({"photos": 4, "plcc": 2 / 5**0.5, "srcc": 2 / 5**0.5, "rmse": 0.5**0.5, "r2": 0.6})


@pytest.mark.parametrize(
    ("predicted", "labels", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], {"plcc": 1, "srcc": 1, "rmse": 0, "r2": 1}),
        ([3, 2, 1], [1, 2, 3], {"plcc": -1, "srcc": -1, "rmse": (8 / 3) ** 0.5, "r2": -3}),
        ([1, 4, 9], [1, 2, 3], {"plcc": 8 / math.sqrt(2 * (98 / 3)), "srcc": 1, "rmse": (40 / 3) ** 0.5, "r2": -19}),
        ([2, 2, 2], [1, 2, 3], {"plcc": None, "srcc": None, "rmse": (2 / 3) ** 0.5, "r2": 0}),
        ([1, 2, 3], [2, 2, 2], {"plcc": None, "srcc": None, "rmse": (2 / 3) ** 0.5, "r2": None}),
        ([5], [7], {"plcc": None, "srcc": None, "rmse": 2, "r2": None}),
        ([], [], {"plcc": None, "srcc": None, "rmse": None, "r2": None}),
    ],
)
def test_agreement_where_it_is_perfect_reversed_or_undefined(
    predicted: list[float], labels: list[float], expected: dict[str, float | None]
) -> None:
    found = agreement(np.array(predicted, float), np.array(labels, float))
    assert found.pop("photos") == len(labels)
    assert {name: None if math.isnan(value) else value for name, value in found.items()} == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=3, max_size=40))
def test_correlations_are_those_of_scipy(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = np.array(pairs, dtype=np.float64).T
    found = agreement(predicted, labels)
    if np.ptp(predicted) and np.ptp(labels):
        assert found["plcc"] == pytest.approx(stats.pearsonr(predicted, labels).statistic, abs=1e-9)
        assert found["srcc"] == pytest.approx(stats.spearmanr(predicted, labels).statistic, abs=1e-9)
    else:
        assert math.isnan(found["plcc"]) and math.isnan(found["srcc"])


def test_bootstrap_covers_the_true_correlation_as_often_as_it_says() -> None:
    rng, inside, trials = np.random.default_rng(0), 0, 60
    for trial in range(trials):
        labels = rng.normal(size=150)
        low, high = bootstrap(labels + rng.normal(size=150), labels, repeats=150, seed=trial)["plcc"]
        inside += low <= 0.5**0.5 <= high  # of x and x + y, independent and equally wide
    assert 0.85 <= inside / trials <= 1.0


def test_bootstrap_is_seeded_narrows_with_photos_and_survives_constants() -> None:
    rng = np.random.default_rng(1)
    labels = rng.normal(size=800)
    predicted = labels + rng.normal(size=800)
    found = bootstrap(predicted, labels, repeats=100)
    assert found == bootstrap(predicted, labels, repeats=100)
    assert found != bootstrap(predicted, labels, repeats=100, seed=1)
    assert set(found) == {"plcc", "srcc", "rmse", "r2"}
    for name, value in agreement(predicted, labels).items():
        if name != "photos":
            assert found[name][0] < value < found[name][1]
    low, high = bootstrap(predicted[:50], labels[:50], repeats=100)["rmse"]
    assert high - low > 2 * (found["rmse"][1] - found["rmse"][0])  # 800 / 50 = 16 times fewer: about 4 times as wide

    constant = bootstrap(np.ones(5), np.array([1.0, 1, 1, 1, 3]), repeats=50)
    assert all(math.isnan(bound) for bound in constant["plcc"])
    assert constant["rmse"][0] == 0 and constant["r2"][1] < 0.01


def test_bootstrap_of_groups_draws_them_whole() -> None:
    rng = np.random.default_rng(2)
    labels, noise = rng.normal(size=60), rng.normal(size=60)
    one = bootstrap(labels + noise, labels, repeats=200)["plcc"]
    takes = bootstrap(
        np.tile(labels + noise, 9), np.tile(labels, 9), repeats=200, groups=np.tile(np.arange(60)[::-1], 9)
    )["plcc"]
    apart = bootstrap(np.tile(labels + noise, 9), np.tile(labels, 9), repeats=200)["plcc"]
    assert takes[1] - takes[0] == pytest.approx(one[1] - one[0], rel=0.3)  # nine takes of each say nothing new
    assert apart[1] - apart[0] < 0.6 * (one[1] - one[0])


def test_bins_take_their_extremes_in() -> None:
    quality = np.array([1, 2.5, 2.51, 5.49, 5.5, 8.49, 8.5, 10])
    assert [BINS[index] for index in bin_of(quality)] == ["low", "low", "mid", "mid", "high", "high", "top", "top"]


def test_errors_per_bin_by_hand() -> None:
    low, mid, high, top = per_bin(np.array([3.0, 1.0, 5.0, 7.0]), np.array([2.0, 2.0, 4.0, 9.0]))
    assert low == {"bin": "low", "photos": 2, "bias": 0.0, "mae": 1.0, "rmse": 1.0}
    assert mid == {"bin": "mid", "photos": 1, "bias": 1.0, "mae": 1.0, "rmse": 1.0}
    assert (high["photos"], math.isnan(high["bias"]), math.isnan(high["rmse"])) == (0, True, True)
    assert top == {"bin": "top", "photos": 1, "bias": -2.0, "mae": 2.0, "rmse": 2.0}
