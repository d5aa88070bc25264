"""The plots of a card, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_DPI = 110
_QUALITY = (1.0, 10.0)
_CALIBRATION_BINS = 10


def scatter(predicted: np.ndarray, label: np.ndarray, path: Path) -> None:
    """Each photo's `quality_score` against its label, both (N,) on 1-10."""
    figure, axes = _square()
    axes.scatter(label, predicted, s=6, alpha=0.35, linewidths=0)
    _against_label(axes, "quality_score")
    _save(figure, path)


def calibration(predicted: np.ndarray, label: np.ndarray, path: Path) -> None:
    """Mean label of the photos of like `quality_score`: tenths of the photos by score, with standard errors."""
    figure, axes = _square()
    parts = [rows for rows in np.array_split(np.argsort(predicted), _CALIBRATION_BINS) if len(rows)]
    means = [(predicted[rows].mean(), label[rows].mean(), label[rows].std() / len(rows) ** 0.5) for rows in parts]
    x, y, error = np.array(means).T
    axes.errorbar(x, y, error, fmt="o-", markersize=4, capsize=2)
    axes.set(
        xlabel="quality_score, mean of a tenth", ylabel="label, mean and standard error", xlim=_QUALITY, ylim=_QUALITY
    )
    axes.axline((1, 1), slope=1, color="grey", linewidth=0.8)
    _save(figure, path)


def bins(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bias and RMSE of each bin of the label, from `metrics.per_bin`."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(rows))
    axes.bar(place - 0.2, [row["bias"] for row in rows], 0.4, label="bias")
    axes.bar(place + 0.2, [row["rmse"] for row in rows], 0.4, label="RMSE")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xticks(place, [f"{row['bin']}\n{row['photos']} photos" for row in rows])
    axes.set_ylabel("points of 1-10")
    axes.legend()
    _save(figure, path)


def ladders(curves: Mapping[str, Mapping[str, Sequence[float]]], own: Mapping[str, str], path: Path) -> None:
    """Mean of every attribute at each step of each ladder; the fault's own attribute is the thick line."""
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True).ravel()
    for axes, (kind, attributes) in zip(panels, curves.items(), strict=False):
        for name, values in attributes.items():
            axes.plot(np.linspace(0, 1, len(values)), values, linewidth=3 if name == own[kind] else 1, label=name)
        axes.set_title(f"{kind} ({own[kind]})", fontsize=9)
        axes.set_ylim(0, 100)
    figure.supxlabel("severity")
    figure.supylabel("attribute, 0-100")
    handles, names = panels[0].get_legend_handles_labels()
    legend = figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize=8)
    for line in legend.get_lines():
        line.set_linewidth(2)
    _save(figure, path)


def confusion(matrix: Sequence[Sequence[int]], names: Sequence[str], path: Path) -> None:
    """Counts (K, K): rows are labels, columns predictions; shaded by share of the row."""
    figure = Figure(figsize=(5.6, 5), layout="constrained")
    axes = figure.subplots()
    counts = np.asarray(matrix, dtype=np.float64)
    axes.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            ink = "white" if count > counts[row].sum() / 2 else "black"
            axes.text(column, row, f"{count:.0f}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="label")
    _save(figure, path)


def _square() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.4, 4.4), layout="constrained")
    return figure, figure.subplots()


def _against_label(axes: Axes, name: str) -> None:
    axes.axline((1, 1), slope=1, color="grey", linewidth=0.8)
    axes.set(xlabel="label, 1-10", ylabel=name, xlim=_QUALITY, ylim=_QUALITY, aspect="equal")


def _save(figure: Figure, path: Path) -> None:
    # No time stamp and no version: the same figures give the same file.
    figure.savefig(path, dpi=_DPI, metadata={"Software": None})
