"""The forest against LightGBM itself: equal to the last bit, or left to LightGBM."""

from __future__ import annotations

from typing import Any

import lightgbm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picinspector.forest import Forest


def train(rounds: int = 20, rows: int = 3000, features: int = 6, **params: Any) -> tuple[lightgbm.Booster, np.ndarray]:
    """A small model, and the float32 rows it was trained on: whole numbers, zeros and fine ones."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(rows, features)).astype(np.float32)
    matrix[:, 0] = np.round(4 * matrix[:, 0])
    matrix[:, 1] *= matrix[:, 1] > 0
    labels = matrix[:, 0] + np.sin(3 * matrix[:, 1]) * matrix[:, 2] + 0.1 * rng.normal(size=rows)
    settings_ = {"objective": "regression", "num_leaves": 15, "verbose": -1, "num_threads": 1, "seed": 0} | params
    return lightgbm.train(settings_, lightgbm.Dataset(matrix, labels), rounds), matrix


@pytest.mark.parametrize("leaves", [2, 7, 15, 16, 17, 32])
def test_it_predicts_what_lightgbm_predicts(leaves: int) -> None:
    booster, matrix = train(num_leaves=leaves)
    forest = Forest.of(booster)
    assert forest is not None
    expected = booster.predict(matrix)
    assert np.ptp(expected) > 0.5
    assert np.array_equal(forest.predict(matrix), expected)
    assert {tree["num_leaves"] for tree in booster.dump_model()["tree_info"]} == {leaves}


def test_values_at_the_thresholds_go_where_lightgbm_sends_them() -> None:
    """Thresholds are float64: each of them rounded both ways, and its neighbours."""
    booster, matrix = train()
    nodes, rows = [tree["tree_structure"] for tree in booster.dump_model()["tree_info"]], []
    while nodes:
        node = nodes.pop()
        if "threshold" in node:
            nodes += [node["left_child"], node["right_child"]]
            at = np.float32(node["threshold"])
            for value in (at, np.nextafter(at, np.float32(-9)), np.nextafter(at, np.float32(9))):
                rows.append(matrix[len(rows) % len(matrix)].copy())
                rows[-1][node["split_feature"]] = value
    at_the_edge = np.array(rows)
    forest = Forest.of(booster)
    assert forest is not None and len(rows) > 500
    assert np.array_equal(forest.predict(at_the_edge), booster.predict(at_the_edge))


@pytest.mark.parametrize("rows", [0, 1, 4095, 4096, 4097, 9000])
def test_any_number_of_rows(rows: int) -> None:
    booster, matrix = train(rounds=3)
    many = np.resize(matrix, (rows, matrix.shape[1]))
    forest = Forest.of(booster)
    assert forest is not None
    assert np.array_equal(forest.predict(many), booster.predict(many) if rows else np.zeros(0))


_FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=6, max_size=6), min_size=1)
)
def test_any_finite_row(rows: list[list[float]]) -> None:
    matrix = np.array(rows, np.float32)
    assert np.array_equal(FOREST.predict(matrix), BOOSTER.predict(matrix))


BOOSTER = train()[0]
_FOREST = Forest.of(BOOSTER)
assert _FOREST is not None
FOREST = _FOREST


def test_a_model_without_a_split_is_a_constant() -> None:
    booster, matrix = train(rounds=2, min_data_in_leaf=5000)
    forest = Forest.of(booster)
    assert forest is not None
    assert forest.predict(matrix[:3]).tolist() == booster.predict(matrix[:3]).tolist()


@pytest.mark.parametrize(
    "params",
    [
        {"num_leaves": 33},
        {"objective": "poisson"},
        {"reg_sqrt": True},
        {"boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.5},
        {"linear_tree": True},
        {"zero_as_missing": True},
        {"categorical_feature": [0]},
    ],
    ids=lambda params: next(iter(params)) if "boosting" not in params else "random_forest",
)
def test_other_models_are_left_to_lightgbm(params: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    matrix = np.abs(rng.normal(size=(3000, 6))).astype(np.float32)
    matrix[:, 0] = rng.integers(0, 5, 3000)
    labels = 3 + matrix[:, 0] % 3 + matrix[:, 1]
    defaults = {"objective": "regression", "num_leaves": 15, "verbose": -1, "num_threads": 1, "min_data_in_leaf": 5}
    categories = params.get("categorical_feature", "auto")
    data = lightgbm.Dataset(matrix, labels, categorical_feature=categories)
    booster = lightgbm.train({k: v for k, v in (defaults | params).items() if k != "categorical_feature"}, data, 10)
    assert Forest.of(booster) is None
