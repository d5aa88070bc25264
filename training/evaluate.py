"""A bundle on BIQ2021's test split, and against controlled degradations of photos never trained on.

    python -m training.evaluate --bundle builtin --biq2021 FOLDER [--near-duplicates FILE]

PLCC and RMSE are of `predicted_mos` as it is: no logistic fit came first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
from scipy.stats import pearsonr, spearmanr

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

    def __init__(self, bundle: Bundle) -> None:
        self.clip = ClipEncoder(bundle.piece("clip"))
        self.dinov2 = Dinov2Encoder(bundle.piece("dinov2"))
        self.scorer = Scorer(bundle.piece("scorer"))
        self.attributes = AttributeHead(bundle.piece("attributes"))

    def judge(self, photos: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predicted MOS (N,), attributes 0-100 (N, 6) and scene probabilities (N, 9) of encoded photos."""
        parts = [self._judge_batch(batch) for batch in _batched(photos)]
        mos, attributes, scenes = zip(*parts, strict=True)
        return np.concatenate(mos), np.concatenate(attributes), np.concatenate(scenes)

    def _judge_batch(self, batch: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        photos = [decode(data, [self.clip.crop, self.dinov2.crop]) for data in batch]
        measured = [measure(photo.working) for photo in photos]
        columns = {f"measured_{name}": np.array([m[name] for m in measured], np.float32) for name in measured[0]}
        columns["clip_embedding"] = self.clip.encode(np.stack([photo.crops[0] for photo in photos]))
        columns["dinov2_embedding"] = self.dinov2.encode(np.stack([photo.crops[1] for photo in photos]))
        mos, _ = self.scorer.predict(columns)
        return mos, *self.attributes.predict(columns["dinov2_embedding"])


def agreement(predicted: np.ndarray, mos: np.ndarray) -> dict[str, float]:
    """PLCC, SRCC and RMSE."""
    return {
        "photos": len(mos),
        "plcc": float(pearsonr(predicted, mos).statistic),
        "srcc": float(spearmanr(predicted, mos).statistic),
        "rmse": float(np.sqrt(np.mean((predicted - mos) ** 2))),
    }


def evaluate_biq2021(judge: Judge, dataset: Path, near_duplicates: Path | None) -> dict[str, dict[str, float]]:
    """Agreement on the official test split: all, without near-duplicates of train photos, and per subset."""
    photos = [photo for photo in read_biq2021(dataset) if photo.split == "test"]
    predicted, _, _ = judge.judge(photo.path.read_bytes() for photo in photos)
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
    return result


def evaluate_degradations(judge: Judge) -> dict[str, object]:
    """Pristine photos of the scikits against gross degradation (severity 1), and ladders of eight steps.

    Returns:
        win rate of the pristine photo by predicted MOS, the pairs lost, and per ladder the mean SRCC of the fault's own
        attribute with cleanliness, and how far each attribute falls from the first to the last step.
    """
    photos = pristine_photos()
    lost = []
    ladders: dict[str, object] = {}
    for kind, degrade in DEGRADATIONS.items():
        srccs, falls = [], []
        for name, image in photos.items():
            steps = np.linspace(0.0, 1.0, _STEPS)
            mos, attributes, _ = judge.judge(_png(degrade(image, float(severity))) for severity in steps)
            if mos[-1] >= mos[0]:
                lost.append(f"{name} {kind}")
            if kind in LADDERS:
                own = attributes[:, ATTRIBUTES.index(LADDERS[kind])]
                srccs.append(spearmanr(own, -steps).statistic)
                falls.append(attributes[0] - attributes[-1])
        if kind in LADDERS:
            fall = dict(zip(ATTRIBUTES, np.mean(falls, axis=0).round(1).tolist(), strict=True))
            ladders[kind] = {"attribute": LADDERS[kind], "srcc": float(np.mean(srccs)), "fall": fall}
    pairs = len(photos) * len(DEGRADATIONS)
    return {"pairs": pairs, "win_rate": 1.0 - len(lost) / pairs, "lost": lost, "ladders": ladders}


def pristine_photos() -> dict[str, np.ndarray]:
    """Real photos from installed wheels, uint8 RGB."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    names = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field")
    photos = {name: np.ascontiguousarray(getattr(data, name)()[..., :3]) for name in names}
    return photos | {name: np.ascontiguousarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}


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
    args = parser.parse_args()
    judge = Judge(open_bundle(args.bundle))
    result: dict[str, object] = {"degradations": evaluate_degradations(judge)}
    if args.biq2021 is not None:
        result |= evaluate_biq2021(judge, args.biq2021, args.near_duplicates)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
