"""A bundle on BIQ2021's test split, and against controlled degradations of photos never trained on.

    python -m training.evaluate --bundle builtin --biq2021 FOLDER [--near-duplicates FILE]
    python -m training.evaluate --bundle builtin --precision

PLCC and RMSE are of `predicted_mos` as it is: no logistic fit came first. The second form only measures how far
bfloat16 and float32 differ. Both print JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr

from jobs.demo import real_photos
from picinspector.attributes import AttributeHead
from picinspector.bundle import Bundle, open_bundle
from picinspector.clip import ClipEncoder
from picinspector.degrade import DEGRADATIONS
from picinspector.dinov2 import Dinov2Encoder
from picinspector.measure import measure
from picinspector.photo import decode
from picinspector.schema import ATTRIBUTES
from picinspector.scorer import Scorer
from training.datasets import read_biq2021

_BATCH = 16
_STEPS = 8
#: The attribute each fault should take down.
LADDERS = {
    "blur": "sharpness",
    "noise": "noisiness",
    "underexpose": "brightness",
    "overexpose": "brightness",
    "low_contrast": "contrast",
    "desaturate": "colorfulness",
}


class Judge:
    """A bundle's whole way from the bytes of photos to scores, without Ray."""

    def __init__(self, bundle: Bundle, dtype: torch.dtype | None = None) -> None:
        """Load all four pieces; the encoders in `dtype` (default: what the device is fast in)."""
        self.clip = ClipEncoder(bundle.piece("clip"), dtype=dtype)
        self.dinov2 = Dinov2Encoder(bundle.piece("dinov2"), dtype=dtype)
        self.scorer = Scorer(bundle.piece("scorer"))
        self.attributes = AttributeHead(bundle.piece("attributes"))

    def judge(self, photos: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predicted MOS (N,), attributes 0-100 (N, 6) and scene probabilities (N, 9) of encoded photos."""
        parts = [self.score(self.embed(batch)) for batch in _batched(photos)]
        mos, attributes, scenes = zip(*parts, strict=True)
        return np.concatenate(mos), np.concatenate(attributes), np.concatenate(scenes)

    def embed(self, batch: list[bytes]) -> dict[str, np.ndarray]:
        """The columns of the embeddings table that the heads read, of one batch of encoded photos."""
        photos = [decode(data, [self.clip.crop, self.dinov2.crop]) for data in batch]
        measured = [measure(photo.working) for photo in photos]
        columns = {f"measured_{name}": np.array([m[name] for m in measured], np.float32) for name in measured[0]}
        columns["clip_embedding"] = self.clip.encode(np.stack([photo.crops[0] for photo in photos]))
        columns["dinov2_embedding"] = self.dinov2.encode(np.stack([photo.crops[1] for photo in photos]))
        return columns

    def score(self, columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predicted MOS (B,), attributes 0-100 (B, 6) and scene probabilities (B, 9) from embeddings."""
        mos = self.scorer.predict(columns).predicted_mos
        return mos, *self.attributes.predict(columns)


def agreement(predicted: np.ndarray, mos: np.ndarray) -> dict[str, float]:
    """PLCC, SRCC and RMSE."""
    return {
        "photos": len(mos),
        "plcc": float(pearsonr(predicted, mos).statistic),
        "srcc": float(spearmanr(predicted, mos).statistic),
        "rmse": float(np.sqrt(np.mean((predicted - mos) ** 2))),
    }


def evaluate_biq2021(judge: Judge, dataset: Path, near_duplicates: Path | None) -> dict[str, dict[str, float]]:
    """Agreement with people on the official test split: all, without near-duplicates of train photos, per subset.

    All of these for `predicted_mos`; the last entry is the `mos` attribute on all of it.
    """
    photos = [photo for photo in read_biq2021(dataset) if photo.split == "test"]
    predicted, attributes, _ = judge.judge(photo.path.read_bytes() for photo in photos)
    mos = np.array([photo.mos for photo in photos])
    names = np.array([photo.path.name.lower() for photo in photos])
    result = {"test": agreement(predicted, mos)}
    if near_duplicates is not None:
        known = {pair["test"].lower() for pair in json.loads(near_duplicates.read_text("utf-8"))["pairs"]}
        fresh = np.array([name not in known for name in names])
        result["test without near-duplicates"] = agreement(predicted[fresh], mos[fresh])
    for subset in ("ss01", "ss02", "ss03"):
        mine = np.char.startswith(names, subset)
        result[f"test {subset}"] = agreement(predicted[mine], mos[mine])
    result["test, mos attribute"] = agreement(attributes[:, ATTRIBUTES.index("mos")] / 100.0, mos)
    return result


def evaluate_degradations(judge: Judge) -> dict[str, object]:
    """The demo's pristine photos against gross degradation (severity 1), and ladders of eight steps.

    Returns:
        win rate of the pristine photo by predicted MOS, the pairs lost, and per ladder, as means over the photos: the
        fault's own attribute at the clean and the gross end, its SRCC with cleanliness, and the fall of each attribute.
    """
    photos = real_photos()
    steps = np.linspace(0.0, 1.0, _STEPS)
    lost = []
    ladders: dict[str, object] = {}
    for kind, degrade in DEGRADATIONS.items():
        runs = []
        for name, image in photos.items():
            mos, attributes, _ = judge.judge(_png(degrade(image, float(severity))) for severity in steps)
            if mos[-1] >= mos[0]:
                lost.append(f"{name} {kind}")
            runs.append(attributes)
        if kind in LADDERS:
            ladders[kind] = _ladder(np.stack(runs).astype(np.float64), LADDERS[kind], steps)
    pairs = len(photos) * len(DEGRADATIONS)
    return {"pairs": pairs, "win_rate": 1.0 - len(lost) / pairs, "lost": lost, "ladders": ladders}


def _ladder(attributes: np.ndarray, name: str, steps: np.ndarray) -> dict[str, object]:
    own = attributes[:, :, ATTRIBUTES.index(name)]  # (photos, steps)
    clean, gross = own.mean(0)[[0, -1]].round(1).tolist()
    srcc = float(np.mean([spearmanr(run, -steps).statistic for run in own]))
    fall = (attributes[:, 0] - attributes[:, -1]).mean(0).round(1).tolist()
    return {
        "attribute": name,
        "clean": clean,
        "gross": gross,
        "srcc": srcc,
        "fall": dict(zip(ATTRIBUTES, fall, strict=True)),
    }


def evaluate_precision(bundle: Bundle) -> dict[str, object]:
    """How far bfloat16 and float32 differ on the demo's photos and their gross degradations.

    Returns:
        median and maximum over the photos: 1 - cosine of the embeddings, and absolute differences of `predicted_mos`
        (0-1) and of the attribute (0-100) that differs most.
    """
    degradations = DEGRADATIONS.values()
    photos = [
        _png(image) for photo in real_photos().values() for image in (photo, *(f(photo, 1.0) for f in degradations))
    ]
    half, full = Judge(bundle, torch.bfloat16), Judge(bundle, torch.float32)
    parts: list[dict[str, np.ndarray]] = []
    for batch in _batched(photos):
        a, b = half.embed(batch), full.embed(batch)
        part = {name: 1.0 - _cosine(a[name], b[name]) for name in ("clip_embedding", "dinov2_embedding")}
        (mos_a, attributes_a, _), (mos_b, attributes_b, _) = half.score(a), full.score(b)
        part["predicted_mos"] = np.abs(mos_a - mos_b)
        part["attributes"] = np.abs(attributes_a - attributes_b).max(1)
        parts.append(part)
    result: dict[str, object] = {"photos": len(photos)}
    for name in parts[0]:
        differences = np.concatenate([part[name] for part in parts])
        result[name] = {"median": float(np.median(differences)), "max": float(differences.max())}
    return result


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def _batched(photos: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch = []
    for data in photos:
        batch.append(data)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="builtin", help="`builtin` or a bundle's folder")
    parser.add_argument("--biq2021", type=Path, help="folder of a BIQ2021 checkout; without it only degradations")
    parser.add_argument("--near-duplicates", type=Path, help="JSON list of test photos that have a twin in train")
    parser.add_argument("--precision", action="store_true", help="only the differences of bfloat16 and float32")
    args = parser.parse_args()
    if args.precision:
        print(json.dumps(evaluate_precision(open_bundle(args.bundle)), indent=2))
        return
    judge = Judge(open_bundle(args.bundle))
    result: dict[str, object] = {"degradations": evaluate_degradations(judge)}
    if args.biq2021 is not None:
        result |= evaluate_biq2021(judge, args.biq2021, args.near_duplicates)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
