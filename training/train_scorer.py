"""Train a scorer from embeddings and labels, on one machine or a cluster. docs/training-scorer.md explains it.

    python -m training.train_scorer --embeddings tables --labels labels.parquet --out scorer
    ray job submit --working-dir . -- python -m training.train_scorer \\
        --embeddings s3://... --labels s3://... --out s3://...

::

    embeddings + labels -> join by uri (Ray Data) -> splits
    search      Ray Tune + Optuna, on validation
    fit         the recipe, on workers of Ray Train's LightGBMTrainer
    calibrate   intervals, on rows that nothing else used
    report      scorer/, metrics.json, plots, card.md
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np

from picinspector import runs
from picinspector.conformal import Intervals, calibrate
from picinspector.errors import PicInspectorError, UsageError
from picinspector.lease import Lease
from picinspector.metrics import agreement
from picinspector.recipe import STEPS, Fit, Recipe, Rows, fit_with
from picinspector.scorer import write_scorer
from picinspector.storage import redact
from training import scorer_report
from training.claims import claim
from training.folders import Folder
from training.scorer_data import Labelled, load
from training.scorer_search import search
from training.scorer_workers import Workers

#: LightGBM's names for what has options of its own.
_OWN_OPTIONS = {
    **dict.fromkeys(("num_iterations", "num_iteration", "n_iter", "num_tree", "num_trees", "num_round"), "--rounds"),
    **dict.fromkeys(("num_rounds", "nrounds", "num_boost_round", "n_estimators", "max_iter"), "--rounds"),
    **dict.fromkeys(("early_stopping_round", "early_stopping_rounds", "early_stopping"), "--patience"),
    "n_iter_no_change": "--patience",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.train_scorer", description=(__doc__ or "").split("\n")[0])
    data = parser.add_argument_group("data")
    data.add_argument("--embeddings", required=True, help="a destination of `picinspector score`, or Parquet files")
    data.add_argument("--labels", required=True, help="CSV or Parquet: uri, mos[, split][, weight][, group]")
    data.add_argument("--features", nargs="+", help="columns to learn from; default clip_embedding and measured_*")
    data.add_argument("--label-range", nargs=2, type=float, metavar=("MIN", "MAX"), help="default: of the train labels")
    data.add_argument("--storage-options", type=json.loads, help="fsspec options of all three, as JSON")
    recipe = parser.add_argument_group("recipe; every step is on by default")
    for step in STEPS:
        recipe.add_argument(f"--no-{step.replace('_', '-')}", dest=step, action="store_false")
    recipe.add_argument("--copies", type=int, default=Recipe.copies, help="how many times extremes go in")
    recipe.add_argument("--extreme-weight", type=float, default=Recipe.extreme_weight)
    recipe.add_argument("--rounds", type=int, default=Recipe.rounds, help="boosting rounds at most")
    recipe.add_argument("--patience", type=int, default=Recipe.patience)
    recipe.add_argument("--param", nargs="*", default=[], metavar="NAME=VALUE", help="LightGBM parameters")
    recipe.add_argument("--coverage", type=float, default=0.9, help="of the intervals")
    recipe.add_argument("--refit", action="store_true", help="at last, fit on train, validation and calibration rows")
    run = parser.add_argument_group("run")
    run.add_argument("--trials", type=int, default=0, help="hyper-parameter trials; 0 searches nothing")
    run.add_argument("--search-minutes", type=float, help="end the search after this long")
    run.add_argument("--search-rows", type=int, default=50_000, help="train rows of a trial at most")
    run.add_argument("--ablate", action="store_true", help="train without each step too")
    run.add_argument(
        "--seeds", type=int, default=1, help="train this often, with --seed and the next; the first is kept"
    )
    run.add_argument("--seed", type=int, default=0)
    run.add_argument(
        "--workers", type=int, default=1, help="processes that train one model together; 0 trains in this one"
    )
    run.add_argument("--cpus-per-worker", type=int, default=1)
    run.add_argument(
        "--checkpoint-rounds", type=_at_least_one, default=500, help="boosting rounds from one checkpoint to the next"
    )
    run.add_argument("--address", help="Ray cluster; default RAY_ADDRESS, else Ray on this machine")
    parser.add_argument(
        "--out",
        required=True,
        help="folder, on a cluster one that every node sees, or s3://...: for scorer/, metrics.json, plots and card.md",
    )
    return parser.parse_args(arguments)


def _at_least_one(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("expected 1 or more")
    return int(text)


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that the command line asks for."""
    params = dict(Recipe().params)
    for text in args.param:
        name, separator, value = text.partition("=")
        if not separator:
            raise UsageError(f"--param {text}: write NAME=VALUE, like num_leaves=63")
        if name in _OWN_OPTIONS:
            raise UsageError(f"--param {text}: give {_OWN_OPTIONS[name]}")
        try:
            params[name] = float(value) if not value.lstrip("-").isdigit() else int(value)
        except ValueError:
            params[name] = value
    return Recipe(
        label_range=tuple(args.label_range) if args.label_range else None,
        copies=args.copies,
        extreme_weight=args.extreme_weight,
        rounds=args.rounds,
        patience=args.patience,
        params=params,
        seed=args.seed,
        **{step: getattr(args, step) for step in STEPS},
    )


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, from the arguments to the files; returns what metrics.json holds.

    Raises:
        UsageError: the data cannot be used; says which file or column.
    """
    started = time.monotonic()
    recipe = recipe_of(args)
    out = Folder(args.out, args.storage_options)
    runs.connect(args.address, dashboard=True)
    data = load(args.embeddings, args.labels, args.features, args.storage_options, args.seed)
    print(data.summary, flush=True)
    with claim(out) as held:
        return _train(args, recipe, data, out, held, started)


def _train(
    args: argparse.Namespace, recipe: Recipe, data: Labelled, out: Folder, held: Lease, started: float
) -> dict[str, Any]:
    # One scale for all that follows: the refit must not find another one.
    train_labels = data.labels[data.rows("train")]
    label_range = recipe.label_range or (float(train_labels.min()), float(train_labels.max()))
    if not label_range[1] > label_range[0]:
        raise UsageError(f"{args.labels}: all train labels are {label_range[0]:g}: there is nothing to learn")
    recipe = replace(recipe, label_range=label_range)

    trials: list[dict[str, Any]] = []
    if args.trials:
        recipe, trials = search(data, recipe, args.trials, args.search_minutes, args.search_rows)
        print(f"search: {len(trials)} trials, best {trials[0]['objective']:.4f} with {dict(recipe.params)}", flush=True)

    workers = Workers(data, args.workers, args.cpus_per_worker, out, args.checkpoint_rounds)
    fitted = fit(data, workers, recipe)
    held_out = {split: fitted.predict(data.matrix(split)) for split in ("validation", "calibration")}
    intervals = _calibrated(fitted, held_out["calibration"], data.labels[data.rows("calibration")], args.coverage)
    ablation = ablate(data, workers, recipe, fitted) if args.ablate else []
    final = refit(data, workers, recipe, fitted) if args.refit else fitted
    write_scorer(
        out.here / "scorer", final.booster, data.features, *label_range, scaled=final.scaled, intervals=intervals
    )

    metrics = {
        "labels": redact(args.labels),
        "embeddings": redact(str(args.embeddings)),
        "photos": data.counts,
        "not_found": data.missing,
        "features": list(data.features),
        "label_range": list(label_range),
        "recipe": scorer_report.describe(recipe),
        "rounds": final.rounds,
        "refit": args.refit,
        "factors": dict(zip(scorer_report.BINS, fitted.factors, strict=True)),
        "workers": args.workers,
        "seconds": 0.0,
        "trials": trials,
        "ablation": ablation,
        # Figures of train rows say how far the model has them by heart. Validation rows chose the rounds, the sampling
        # and the parameters, calibration rows the intervals: by the model before any refit.
        "splits": {
            split: scorer_report.figures(predicted, data.labels[data.rows(split)], final, intervals, args.seed)
            for split, predicted in held_out.items()
        },
        "seeds": [],
    }
    if args.seeds > 1:
        metrics["seeds"] = repeat(data, workers, recipe, args.seeds, args.refit, fitted, final)
    if len(data.rows("test")):
        predicted = final.predict(data.matrix("test"))
        truth = data.labels[data.rows("test")]
        metrics["splits"]["test"] = scorer_report.figures(predicted, truth, final, intervals, args.seed)
        shown = ("test", predicted, truth)
    else:
        shown = ("validation", held_out["validation"], data.labels[data.rows("validation")])
    metrics["seconds"] = round(time.monotonic() - started, 1)
    scorer_report.write(out.here, metrics, final, intervals, *shown)
    held.check()
    out.push()
    return metrics


def fit(data: Labelled, workers: Workers, recipe: Recipe, splits: tuple[str, ...] = ("train",)) -> Fit:
    """Fit the recipe on the workers; validation rows stop it and guide it."""

    def boost(rows: Rows, recipe: Recipe) -> Any:
        return workers.boost(splits, rows, recipe)

    def held_out(first: Fit) -> tuple[np.ndarray, np.ndarray]:
        return first.predict(data.matrix("validation")), data.labels[data.rows("validation")]

    rows = data.rows(*splits)
    return fit_with(boost, data.labels[rows], recipe, data.weights[rows], held_out)


def refit(data: Labelled, workers: Workers, recipe: Recipe, fitted: Fit) -> Fit:
    """Fit on train, validation and calibration rows, with what the validation rows have decided.

    The rounds grow with the rows, as the same number of rounds learns less from more of them.
    """
    splits = ("train", "validation", "calibration")
    rows = data.rows(*splits)
    rounds = round(fitted.rounds * len(rows) / len(data.rows("train")))
    known = replace(recipe.without("early_stopping"), rounds=rounds)

    def boost(rows: Rows, recipe: Recipe) -> Any:
        return workers.boost(splits, rows, recipe)

    return fit_with(boost, data.labels[rows], known, data.weights[rows], None, fitted.factors)


def repeat(
    data: Labelled, workers: Workers, recipe: Recipe, seeds: int, refitted: bool, fitted: Fit, final: Fit
) -> list[dict[str, Any]]:
    """The same training with other seeds: their figures on validation and, where there is one, test."""
    found = []
    for seed in range(recipe.seed, recipe.seed + seeds):
        first, last = fitted, final
        if seed != recipe.seed:
            other = replace(recipe, seed=seed)
            first = fit(data, workers, other)
            last = refit(data, workers, other, first) if refitted else first
        row: dict[str, Any] = {"seed": seed, "validation": _agreement(data, first, "validation")}
        if len(data.rows("test")):
            row["test"] = _agreement(data, last, "test")
        found.append(row)
    return found


def ablate(data: Labelled, workers: Workers, recipe: Recipe, full: Fit) -> list[dict[str, Any]]:
    """Each step of the recipe left out, all of them, none of them: figures on validation, never on test."""
    used = [step for step in STEPS if getattr(recipe, step)]
    variants = {
        "full": None,
        **{f"without {step}": recipe.without(step) for step in used},
        "plain": recipe.without(*used),
    }
    found = []
    for name, variant in variants.items():
        fitted = full if variant is None else fit(data, workers, variant)
        row = {"recipe": name, "rounds": fitted.rounds, **_agreement(data, fitted, "validation")}
        found.append(row | {"rmse_per_bin": _rmse_per_bin(data, fitted)})
        print(f"ablation: {name:<28} plcc {row['plcc']:.4f} srcc {row['srcc']:.4f} rmse {row['rmse']:.4f}", flush=True)
    return found


def _agreement(data: Labelled, fitted: Fit, split: str) -> dict[str, float]:
    labels = fitted.to_quality(data.labels[data.rows(split)])
    return scorer_report.rounded(agreement(fitted.to_quality(fitted.predict(data.matrix(split))), labels))


def _rmse_per_bin(data: Labelled, fitted: Fit) -> dict[str, float]:
    predicted, labels = fitted.predict(data.matrix("validation")), data.labels[data.rows("validation")]
    return scorer_report.rmse_per_bin(fitted.to_quality(predicted), fitted.to_quality(labels))


def _calibrated(fitted: Fit, predicted: np.ndarray, labels: np.ndarray, coverage: float) -> Intervals:
    """Intervals in the scale that the model speaks, which is what `scorer.json` holds."""
    return calibrate(fitted.from_mos(predicted), fitted.from_mos(labels), coverage)


def main() -> None:
    """Parse, train, print."""
    args = parse()
    try:
        metrics = train(args)
    except PicInspectorError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(scorer_report.summary(metrics))
    print(f"{redact(args.out)}: scorer/, metrics.json, card.md, plots; {metrics['seconds']:.0f} s")


if __name__ == "__main__":
    main()
