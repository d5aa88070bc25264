"""What a trained scorer is reported with: figures, plots, a card."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from picinspector.conformal import Intervals
from picinspector.metrics import BINS, agreement, bin_of, bootstrap, per_bin
from picinspector.recipe import STEPS, Fit, Recipe


def describe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, as JSON has them."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return plain


def figures(mos: np.ndarray, labels: np.ndarray, fitted: Fit, intervals: Intervals, seed: int) -> dict[str, Any]:
    """Every figure of one split, on the 1-10 scale: agreement, its bootstrap, by bin, and the intervals'.

    Args:
        mos: (N,) predicted, in the labels' scale.
        labels: (N,).
        fitted: knows the scales.
        intervals: around what the model gives.
        seed: of the bootstrap.
    """
    quality, truth = fitted.to_quality(mos), fitted.to_quality(labels)
    low, high = (fitted.to_quality(fitted.to_mos(bound)) for bound in intervals.around(fitted.from_mos(mos)))
    inside = (low - 1e-6 <= truth) & (truth <= high + 1e-6)
    bins = bin_of(truth)
    return {
        **rounded(agreement(quality, truth)),
        "bootstrap_95": {
            name: [_round(low), _round(high)] for name, (low, high) in bootstrap(quality, truth, seed=seed).items()
        },
        "per_bin": [
            rounded(row) | {"interval_coverage": _round(inside[bins == index].mean()) if row["photos"] else None}
            for index, row in enumerate(per_bin(quality, truth))
        ],
        "interval": {
            "aim": intervals.coverage,
            "coverage": _round(inside.mean()),
            "mean_width": _round((high - low).mean()),
        },
    }


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers to four places; null for what is undefined, which JSON cannot write."""
    return {name: _round(value) if isinstance(value, float) else value for name, value in values.items()}


def rmse_per_bin(predicted_quality: np.ndarray, label_quality: np.ndarray) -> dict[str, float | None]:
    """Bin -> RMSE on 1-10."""
    return {row["bin"]: _round(row["rmse"]) for row in per_bin(predicted_quality, label_quality)}


def _round(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None


def summary(metrics: dict[str, Any]) -> str:
    """The figures for a terminal."""
    lines = [f"{'split':<12}{'photos':>8}{'plcc':>8}{'srcc':>8}{'rmse':>8}{'r2':>8}{'interval':>10}{'width':>8}"]
    for name, found in metrics["splits"].items():
        values = "".join(f"{_text(found[figure]):>8}" for figure in ("plcc", "srcc", "rmse", "r2"))
        interval = found["interval"]
        lines.append(
            f"{name:<12}{found['photos']:>8}{values}{_text(interval['coverage']):>10}{_text(interval['mean_width']):>8}"
        )
    return "\n".join(lines)


def write(
    out: Path,
    metrics: dict[str, Any],
    fitted: Fit,
    intervals: Intervals,
    split: str,
    mos: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Write metrics.json, card.md, and the plots of one split.

    Args:
        out: folder.
        metrics: all that is reported.
        fitted, intervals: the scorer.
        split: which one is drawn.
        mos, labels: (N,) its predictions and labels, in the labels' scale.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", "utf-8")
    (out / "card.md").write_text(card(metrics, split), "utf-8")
    quality, truth = fitted.to_quality(mos), fitted.to_quality(labels)
    bounds = [fitted.to_quality(fitted.to_mos(bound)) for bound in intervals.around(fitted.from_mos(mos))]
    _plot(out, split, quality, truth, bounds, metrics["splits"][split])


def card(metrics: dict[str, Any], drawn: str) -> str:
    """What was trained, on what, how well, in Markdown."""
    low, high = metrics["label_range"]
    recipe = metrics["recipe"]
    lines = [
        "# Scorer",
        "",
        f"LightGBM on {', '.join(f'`{name}`' for name in metrics['features'])}: {metrics['rounds']} rounds, "
        f"{metrics['workers']} worker(s), seed {recipe['seed']}. "
        f"Labels of {Path(metrics['labels']).name}, {low:g} to {high:g}, which is 1 to 10 below.",
        "",
        "| split | photos | PLCC | SRCC | RMSE (1-10) | R2 | inside the interval | mean width |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in metrics["splits"].items():
        spans = {figure: _span(found["bootstrap_95"][figure]) for figure in ("plcc", "srcc", "rmse", "r2")}
        values = " | ".join(f"{_text(found[figure])} {spans[figure]}" for figure in spans)
        interval = found["interval"]
        inside = f"{_percent(interval['coverage'])} of {_percent(interval['aim'])}"
        lines.append(f"| {name} | {found['photos']} | {values} | {inside} | {_text(interval['mean_width'])} |")
    lines += [
        "",
        "In brackets: 95 % bootstrap intervals over photos. No logistic fit. Validation photos chose the rounds, the "
        "sampling and the parameters, calibration photos set the intervals"
        + (" (by the model before its refit on all of them)" if metrics["refit"] else "")
        + "; test photos, where there are any, did nothing.",
        "",
        f"## Errors by bin of the label ({drawn})",
        "",
        "| bin | photos | bias | MAE | RMSE | inside the interval |",
        "|---|---|---|---|---|---|",
    ]
    for row in metrics["splits"][drawn]["per_bin"]:
        values = " | ".join(_text(row[figure]) for figure in ("bias", "mae", "rmse"))
        lines.append(f"| {row['bin']} | {row['photos']} | {values} | {_percent(row['interval_coverage'])} |")
    steps = ", ".join(f"{step.replace('_', ' ')} {'on' if recipe[step] else 'off'}" for step in STEPS)
    factors = ", ".join(f"{name} {factor:.2f}" for name, factor in metrics["factors"].items())
    lines += ["", f"## Recipe\n\n{steps}. Photos of each bin seen for their error: {factors}."]
    lines += ["", f"LightGBM: `{json.dumps(recipe['params'])}`"]
    if metrics["trials"]:
        lines.append(
            f"\nThe best of {len(metrics['trials'])} trials by the mean of PLCC and SRCC on validation photos."
        )
    if metrics["ablation"]:
        lines += ["", "## Each step left out (validation)", ""]
        lines += [
            f"| recipe | PLCC | SRCC | RMSE | R2 | {' | '.join(f'RMSE {name}' for name in BINS)} |",
            "|---" * 9 + "|",
        ]
        for row in metrics["ablation"]:
            values = [row[figure] for figure in ("plcc", "srcc", "rmse", "r2")] + list(row["rmse_per_bin"].values())
            lines.append(f"| {row['recipe'].replace('_', ' ')} | {' | '.join(_text(value) for value in values)} |")
    if metrics["seeds"]:
        lines += ["", "## Seeds", "", "| seed | split | PLCC | SRCC | RMSE | R2 |", "|---|---|---|---|---|---|"]
        for row in metrics["seeds"]:
            for split in (name for name in ("validation", "test") if name in row):
                values = " | ".join(_text(row[split][figure]) for figure in ("plcc", "srcc", "rmse", "r2"))
                lines.append(f"| {row['seed']} | {split} | {values} |")
    lines += ["", "![scatter](scatter.png) ![errors by bin](bins.png) ![calibration](calibration.png)", ""]
    return "\n".join(lines)


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _span(bounds: list[float | None]) -> str:
    return f"({_text(bounds[0])}, {_text(bounds[1])})"


def _plot(
    out: Path, split: str, quality: np.ndarray, truth: np.ndarray, bounds: list[np.ndarray], found: dict[str, Any]
) -> None:
    """scatter.png, bins.png, calibration.png."""
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(quality, truth, s=4, alpha=0.4)
    axes.plot([1, 10], [1, 10], color="black", linewidth=0.8)
    axes.set(xlim=(1, 10), ylim=(1, 10), xlabel="quality_score", ylabel="label, 1-10")
    axes.set_title(f"{split}: PLCC {_text(found['plcc'])}, SRCC {_text(found['srcc'])}")
    figure.savefig(out / "scatter.png", dpi=110)

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    rows, places = found["per_bin"], np.arange(len(BINS))
    for offset, name in ((-0.2, "rmse"), (0.2, "bias")):
        axes.bar(places + offset, [row[name] or 0.0 for row in rows], 0.4, label=name)
    axes.set_xticks(places, [f"{row['bin']}\n{row['photos']} photos" for row in rows])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(ylabel="on 1-10", title=f"{split}: errors by bin of the label")
    axes.legend()
    figure.savefig(out / "bins.png", dpi=110)

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    tenths = [part for part in np.array_split(np.argsort(quality), 10) if len(part)]
    centre = [quality[part].mean() for part in tenths]
    axes.plot([1, 10], [1, 10], color="black", linewidth=0.8)
    axes.fill_between(
        centre, *[[bound[part].mean() for part in tenths] for bound in bounds], alpha=0.2, label="interval"
    )
    axes.plot(centre, [truth[part].mean() for part in tenths], marker="o", label="mean label")
    axes.set(xlim=(1, 10), ylim=(1, 10), xlabel="mean quality_score of a tenth", ylabel="label, 1-10")
    coverage = f"{_percent(found['interval']['coverage'])} inside, {_percent(found['interval']['aim'])} aimed at"
    axes.set_title(f"{split}: calibration; {coverage}")
    axes.legend()
    figure.savefig(out / "calibration.png", dpi=110)
