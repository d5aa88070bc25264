"""How good a trained attribute head is: figures per output and split, plots, and the card of the bundle piece."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix, f1_score

from picinspector.metrics import agreement, bootstrap
from picinspector.schema import ATTRIBUTES, SCENES
from training.attribute_head import masked_losses


def figures_of(
    predicted: np.ndarray, probabilities: np.ndarray, attributes: np.ndarray, scenes: np.ndarray, repeats: int
) -> dict[str, Any]:
    """The figures of one split.

    Args:
        predicted, attributes: 0-100 (N, 6); labels are NaN where unknown.
        probabilities, scenes: (N, 9); labels are a row of NaN where unknown.
        repeats: of the bootstrap.

    Returns:
        per attribute that is labelled: `agreement`, `loss` (mean squared error in units of 20 points) and `interval`
        (95 % bootstrap); for the scene, where labelled: `accuracy`, `macro_f1` (both against the most frequent label,
        the F1 over the scenes that occur), `loss` (cross-entropy, nats), `interval` and `confusion` (rows labels).
    """
    result: dict[str, Any] = {"photos": len(predicted), "attributes": {}}
    for index, name in enumerate(ATTRIBUTES):
        known = ~np.isnan(attributes[:, index])
        if known.any():
            pair = predicted[known, index].astype(np.float64), attributes[known, index]
            loss = float(np.mean(((pair[0] - pair[1]) / 20.0) ** 2))
            intervals = bootstrap(*pair, repeats=repeats)
            result["attributes"][name] = {**agreement(*pair), "loss": loss, "interval": intervals}
    labelled = ~np.isnan(scenes).any(axis=1)
    if labelled.any():
        pair = probabilities[labelled].argmax(axis=1), scenes[labelled].argmax(axis=1)
        logits = torch.from_numpy(np.log(np.maximum(probabilities[labelled], 1e-12)))
        unknown = torch.full((len(logits), len(ATTRIBUTES)), torch.nan)
        _, loss = masked_losses(unknown, logits, unknown, torch.from_numpy(scenes[labelled]))
        intervals = bootstrap(*pair, repeats=repeats, figures=scene_agreement)
        confusion = confusion_matrix(pair[1], pair[0], labels=range(len(SCENES))).tolist()
        result["scene"] = {**scene_agreement(*pair), "loss": float(loss), "interval": intervals, "confusion": confusion}
    return result


def scene_agreement(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Photos, accuracy, and macro F1 over the scenes among the labels, of indices (N,) into `schema.SCENES`."""
    present = np.unique(labels)
    f1 = f1_score(labels, predicted, labels=present, average="macro", zero_division=0)
    return {"photos": len(labels), "accuracy": float(np.mean(predicted == labels)), "macro_f1": float(f1)}


# --- plots ------------------------------------------------------------------------------------------------------------


def plot_scatter(predicted: np.ndarray, labels: np.ndarray, name: str, path: Path) -> None:
    """One attribute, 0-100: labels across, predictions up."""
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(labels, predicted, s=6, alpha=0.4, linewidths=0)
    axes.plot([0, 100], [0, 100], color="grey", linewidth=0.8)
    axes.set(xlim=(0, 100), ylim=(0, 100), xlabel=f"{name}, people", ylabel=f"{name}, predicted", aspect="equal")
    figure.savefig(path, dpi=120)


def plot_confusion(confusion: np.ndarray, path: Path) -> None:
    """Scenes (9, 9): rows are the labels, each row as shares of its label; the numbers are photos."""
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(6.5, 6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(SCENES))
    axes.set_xticks(ticks, SCENES, rotation=45, ha="right")
    axes.set_yticks(ticks, SCENES)
    axes.set(xlabel="predicted", ylabel="people")
    for (row, column), count in np.ndenumerate(confusion):
        axes.text(
            column, row, str(count), ha="center", va="center", color="white" if shares[row, column] > 0.5 else "black"
        )
    figure.savefig(path, dpi=120)


def plot_history(history: list[dict[str, float]], path: Path) -> None:
    """Both losses by epoch, on the photos trained on and on validation."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    epochs = [line["epoch"] for line in history]
    for axes, part, unit in zip(
        figure.subplots(1, 2), ("attributes", "scene"), ("squared, 20 points", "nats"), strict=True
    ):
        for split in ("train", "validation"):
            axes.plot(epochs, [line[f"{split}_{part}"] for line in history], label=split)
        axes.set(title=f"{part} loss ({unit})", xlabel="epoch")
        axes.legend()
    figure.savefig(path, dpi=120)


# --- card -------------------------------------------------------------------------------------------------------------


def write_card(path: Path, metrics: Mapping[str, Any]) -> None:
    """A Markdown card: what was trained on what, and the figures of each split."""
    settings, counts = metrics["settings"], metrics["photos"]
    head = (
        f"a head of {settings['hidden_dim']} hidden units on {', '.join(f'`{name}`' for name in metrics['features'])}"
    )
    trained, left_out = head, f"; {counts['left_out']} labelled ones could not be used" if counts["left_out"] else ""
    if settings["finetune_blocks"]:
        blocks = "block" if settings["finetune_blocks"] == 1 else f"{settings['finetune_blocks']} blocks"
        trained = f"the last {blocks} of the DINOv2 of `{settings['bundle']}`, and {head}"
    lines = [
        "# Attribute head",
        "",
        f"Trained: {trained}. {settings['epochs']} epochs, seed {settings['seed']}.",
        f"Kept: epoch {metrics['best_epoch']}, the one with the least validation loss.",
        "The test split was read for this report only.",
        "",
        f"Photos: {counts['train']} train, {counts['validation']} validation, {counts['test']} test{left_out}.",
        "Split: the labels' own where they have one, else by perceptual hash, so that near-duplicates stay together.",
        "",
        "Figures of the files in this folder. No logistic fit came first; brackets: 95 % bootstrap over photos.",
        "",
        "| split | output | photos | PLCC | SRCC | RMSE | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for split, figures in metrics["splits"].items():
        for name, row in figures["attributes"].items():
            cells = [_cell(row, figure) for figure in ("plcc", "srcc", "rmse")]
            lines.append(f"| {split} | {name} | {row['photos']} | {' | '.join(cells)} | {row['loss']:.3f} |")
    scenes = {split: figures["scene"] for split, figures in metrics["splits"].items() if "scene" in figures}
    if scenes:
        lines += ["", "| split | output | photos | accuracy | macro F1 | loss |", "|---|---|---|---|---|---|"]
        for split, row in scenes.items():
            cells = [_cell(row, figure) for figure in ("accuracy", "macro_f1")]
            lines.append(f"| {split} | scene | {row['photos']} | {' | '.join(cells)} | {row['loss']:.3f} |")
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _cell(row: Mapping[str, Any], figure: str) -> str:
    low, high = row["interval"][figure]
    return f"{row[figure]:.3f} [{low:.3f}, {high:.3f}]"
