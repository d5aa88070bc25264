"""The figures of a card: agreement with people's labels, intervals, attributes' scale, scenes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, f1_score

from picinspector.errors import UsageError
from picinspector.metrics import BINS, agreement, bin_of, bootstrap, per_bin
from picinspector.schema import ATTRIBUTES, SCENES
from picinspector.scorer import to_quality_score
from training.datasets import RATED, SPAQ_SCALE, LabelledPhoto
from training.judge import Judgement
from training.sheets import Sheet

#: Of each bootstrap.
RESAMPLES = 1000
#: Photos below which a correlation says nothing, and a part is left out of the tables.
_MIN_PHOTOS = 10


def evaluate_labels(
    judged: Judgement,
    photos: Sequence[LabelledPhoto],
    scale: tuple[float, float],
    near_duplicates: frozenset[str] = frozenset(),
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """How well the judgement of N photos agrees with people.

    Args:
        judged: of `photos`, in their order.
        photos: with labels.
        scale: the MOS that becomes quality 1 and the one that becomes 10.
        near_duplicates: lower-case file names of photos that have a twin in the training data.
        seed: of the bootstrap over photos.
        resamples: of it.

    Returns:
        `quality`: part -> `metrics.agreement` on 1-10, `rmse_unit` (of 0-1) and `interval`, 95 % bootstrap intervals;
        the parts are all, without near-duplicates, each subset, each predicted scene and the `mos` attribute. `bins`:
        `metrics.per_bin`. `coverage`, `attribute_scale`, `attributes` (where people rated them).
    """
    label = label_quality(photos, scale)
    fresh = np.array([photo.path.name.lower() not in near_duplicates for photo in photos])
    scene = judged.scenes.argmax(axis=1)
    everything = np.ones(len(photos), dtype=bool)
    parts: dict[str, np.ndarray] = {"all": everything}
    if not fresh.all():
        parts["without near-duplicates"] = fresh
    subsets = sorted({photo.subset for photo in photos if photo.subset})
    parts |= {f"subset {name}": np.array([photo.subset == name for photo in photos]) for name in subsets}
    parts |= {f"predicted scene {name}": scene == index for index, name in enumerate(SCENES)}
    quality = {
        name: agree(judged.quality[rows], label[rows], seed, resamples)
        for name, rows in parts.items()
        if name == "all" or rows.sum() >= _MIN_PHOTOS
    }
    mos_attribute = to_quality_score(judged.attributes[:, ATTRIBUTES.index("mos")], 0.0, 100.0)
    quality["mos attribute"] = agree(mos_attribute, label, seed, resamples)
    return {
        "quality": quality,
        "bins": per_bin(judged.quality, label),
        "coverage": coverage(judged, label),
        "attribute_scale": attribute_scale(judged.attributes),
        "attributes": attribute_agreement(judged.attributes, photos, seed, resamples),
    }


def label_quality(photos: Sequence[LabelledPhoto], scale: tuple[float, float]) -> np.ndarray:
    """The labels on the scale of `quality_score`, 1-10: (N,)."""
    return to_quality_score(np.array([photo.mos for photo in photos]), *scale).astype(np.float64)


def agree(predicted: np.ndarray, label: np.ndarray, seed: int, resamples: int = RESAMPLES) -> dict[str, Any]:
    """`metrics.agreement` on 1-10, its bootstrap intervals, and the RMSE of 0-1 that the literature reports."""
    figures: dict[str, Any] = dict(agreement(predicted, label))
    return figures | {"rmse_unit": figures["rmse"] / 9.0, "interval": bootstrap(predicted, label, resamples, seed)}


def coverage(judged: Judgement, label: np.ndarray) -> dict[str, Any] | None:
    """Share of labels inside `quality_low`-`quality_high` and the mean width, over all and per bin of the label.

    None where the scorer gives no interval. What the scorer promises holds over all photos, not in each bin of labels.
    """
    if judged.low is None or judged.high is None:
        return None
    # Labels and bounds are float32 on 1-10: a bound that is the label itself holds it.
    inside = (label >= judged.low - 1e-6) & (label <= judged.high + 1e-6)
    width, bins = judged.high - judged.low, bin_of(label)
    rows = [
        {
            "bin": name,
            "photos": int((bins == index).sum()),
            "coverage": _mean(inside[bins == index]),
            "width": _mean(width[bins == index]),
        }
        for index, name in enumerate(BINS)
    ]
    return {"coverage": _mean(inside), "width": _mean(width), "bins": rows}


def attribute_scale(attributes: np.ndarray) -> dict[str, dict[str, float]]:
    """Mean and sd of each attribute (N, 6) over these photos, beside those of SPAQ's labels (11,125 photos)."""
    return {
        name: {
            "mean": float(attributes[:, index].mean()),
            "sd": float(attributes[:, index].std(ddof=1)) if len(attributes) > 1 else math.nan,
            "spaq_mean": SPAQ_SCALE[name][0],
            "spaq_sd": SPAQ_SCALE[name][1],
        }
        for index, name in enumerate(ATTRIBUTES)
    }


def attribute_agreement(
    attributes: np.ndarray, photos: Sequence[LabelledPhoto], seed: int, resamples: int = RESAMPLES
) -> dict[str, dict[str, Any]] | None:
    """`agree` on 0-100 for every attribute that people rated; None where they rated none."""
    result = {}
    for name in RATED:
        rows = np.array([name in photo.attributes for photo in photos])
        if rows.sum() >= _MIN_PHOTOS:
            label = np.array([photo.attributes[name] for photo in photos if name in photo.attributes])
            predicted = attributes[rows, ATTRIBUTES.index(name)]
            result[name] = agreement(predicted, label) | {"interval": bootstrap(predicted, label, resamples, seed)}
    return result or None


def evaluate_scenes(probabilities: np.ndarray, scenes: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """How often the most probable scene is the one a person named.

    Args:
        probabilities: (N, 9) in the order of `schema.SCENES`.
        scenes: (N,) what the person named.
        seed: of the bootstrap over photos.

    Returns:
        `photos`, `accuracy` and its 95 % bootstrap `interval`, `macro_f1`, `per_scene` (photos, recall, precision),
        `confusion`: rows are the labels, columns the predictions, in the order of `schema.SCENES`.
    """
    label = np.array([SCENES.index(scene) for scene in scenes])
    predicted = probabilities.argmax(axis=1)
    interval = bootstrap(predicted, label, seed=seed, figures=lambda p, t: {"accuracy": float((p == t).mean())})
    matrix = confusion_matrix(label, predicted, labels=range(len(SCENES)))
    per_scene = {
        name: {
            "photos": int(matrix[index].sum()),
            "recall": _ratio(matrix[index, index], matrix[index].sum()),
            "precision": _ratio(matrix[index, index], matrix[:, index].sum()),
        }
        for index, name in enumerate(SCENES)
    }
    there = np.unique(label)  # a scene nobody labelled has no recall to average
    return {
        "photos": len(label),
        "accuracy": float((predicted == label).mean()),
        "interval": interval["accuracy"],
        "macro_f1": float(f1_score(label, predicted, labels=there, average="macro", zero_division=0.0)),
        "per_scene": per_scene,
        "confusion": matrix.tolist(),
    }


def read_scenes(path: Path, photos: Sequence[LabelledPhoto]) -> list[tuple[LabelledPhoto, str]]:
    """A CSV of (file, scene) with file names of these photos.

    Raises:
        UsageError: a column is missing, a file is not among the photos, or a scene is unknown; the message names it.
    """
    table = Sheet(path)
    by_name = {photo.path.name.lower(): photo for photo in photos}
    rows = []
    for file, scene in zip(table.texts("file"), table.choices("scene", SCENES), strict=True):
        if file.lower() not in by_name:
            raise UsageError(f"{path}: {file} is not among the photos of the dataset")
        if scene is None:
            raise UsageError(f"{path}: {file} has no scene")
        rows.append((by_name[file.lower()], scene))
    return rows


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _ratio(part: int, whole: int) -> float:
    return float(part / whole) if whole else math.nan
