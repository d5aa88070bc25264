"""Hyper-parameters of the scorer: Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) through Ray Tune."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from picinspector.metrics import agreement
from picinspector.recipe import PARAMS, Recipe, fit
from training.scorer_data import Labelled

#: What is searched, around what LightGBM's guide says matters for accuracy and against over-fitting.
SPACE: dict[str, Any] = {
    "learning_rate": tune.loguniform(0.02, 0.12),
    "num_leaves": tune.lograndint(7, 96),
    "min_data_in_leaf": tune.lograndint(5, 120),
    "feature_fraction": tune.loguniform(0.03, 0.5),
    "bagging_fraction": tune.uniform(0.5, 1.0),
    "lambda_l2": tune.loguniform(0.1, 100.0),
}
_CPUS_PER_TRIAL = 2


def search(
    data: Labelled, recipe: Recipe, trials: int, minutes: float | None, max_rows: int
) -> tuple[Recipe, list[dict[str, Any]]]:
    """The recipe with the parameters that did best on validation rows, and all trials, best first.

    A trial is one process; trials run beside each other on the cluster. The first has the recipe's own parameters. The
    same seed gives the same trials where they run one after the other.

    Args:
        data: train and validation rows are used, no others.
        recipe: everything but the searched parameters; error-guided sampling, which fits twice, is left out of trials.
        trials: how many.
        minutes: end after this long, whatever is done by then.
        max_rows: train rows of a trial at most, a seeded choice.
    """
    rows = data.rows("train")
    matrix = data.matrix("train")
    if len(rows) > max_rows:
        kept = np.sort(np.random.default_rng(recipe.seed).permutation(len(rows))[:max_rows])
        rows, matrix = rows[kept], matrix[kept]
    trainable = tune.with_parameters(
        _trial,
        recipe=recipe.without("error_guided"),
        train=(matrix, data.labels[rows], data.weights[rows]),
        validation=(data.matrix("validation"), data.labels[data.rows("validation")]),
    )
    start = {name: {**PARAMS, **recipe.params}[name] for name in SPACE}
    with tempfile.TemporaryDirectory(prefix="picinspector-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": _CPUS_PER_TRIAL}),
            param_space=SPACE,
            tune_config=tune.TuneConfig(
                metric="objective",
                mode="max",
                search_alg=OptunaSearch(points_to_evaluate=[start], seed=recipe.seed),
                num_samples=trials,
                time_budget_s=minutes * 60 if minutes else None,
                max_concurrent_trials=_concurrent(),
            ),
            # Not beside the checkpoints: Ray Tune writes down its settings, and with them the keys of the store.
            run_config=tune.RunConfig(
                storage_path=folder, verbose=0, failure_config=tune.FailureConfig(max_failures=2)
            ),
        )
        results = tuner.fit()
    done = [
        {
            "objective": round(result.metrics["objective"], 5),
            "rounds": result.metrics["rounds"],
            "params": result.config,
        }
        for result in results
        if not result.error and result.metrics and "objective" in result.metrics
    ]
    if not done:
        raise RuntimeError(f"no trial of the search ended: {results.errors[:1] or 'give it more --search-minutes'}")
    done.sort(key=lambda trial: -trial["objective"])
    return replace(recipe, params={**recipe.params, **done[0]["params"]}), done


def _trial(
    config: dict[str, Any], recipe: Recipe, train: tuple[np.ndarray, ...], validation: tuple[np.ndarray, np.ndarray]
) -> None:
    """Fit once; what counts is the mean of PLCC and SRCC, the two figures of the literature."""
    fitted = fit(
        train[0],
        train[1],
        replace(recipe, params={**recipe.params, **config}),
        train[2],
        validation,
        num_threads=_CPUS_PER_TRIAL,
    )
    found = agreement(fitted.predict(validation[0]), validation[1])
    objective = float(np.nan_to_num((found["plcc"] + found["srcc"]) / 2))  # a constant model agrees with nobody
    tune.report({"objective": objective, "rounds": fitted.rounds})


def _concurrent() -> int:
    """Trials at once. A Ray on one machine may count more CPUs than it has; a cluster's counts are what it was told."""
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    cores = min(nodes[0], os.cpu_count() or 1) if len(nodes) == 1 else sum(nodes)
    return max(1, int(cores) // _CPUS_PER_TRIAL)
