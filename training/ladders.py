"""Degradation ladders: does each attribute follow its own fault, and does it move more than the others?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from scipy.stats import spearmanr

from picinspector.degrade import DEGRADATIONS
from picinspector.metrics import bootstrap
from picinspector.schema import ATTRIBUTES
from training.judge import Judge

STEPS = 8
#: The attribute that each fault should take down.
LADDERS = {
    "blur": "sharpness",
    "noise": "noisiness",
    "underexpose": "brightness",
    "overexpose": "brightness",
    "low_contrast": "contrast",
    "desaturate": "colorfulness",
}


def climb(judge: Judge, photos: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, Any]:
    """Degrade photos in eight steps from severity 0 to 1 and judge every step.

    Args:
        judge: of the bundle.
        photos: name -> uint8 sRGB (H, W, 3), never trained on.
        seed: of the bootstrap over photos.

    Returns:
        `pairs`, `win_rate`, `lost`: the photo against its own severity 1, by quality; `ladders`: fault -> what
        `ladder` gives; `attributes`: attribute -> `srcc` over all its ladders, `leads` in all of them; `curves`:
        fault -> attribute -> mean at each step.
    """
    steps = np.linspace(0.0, 1.0, STEPS)
    judged = judge.judge(
        png(degrade(image, float(severity)))
        for degrade in DEGRADATIONS.values()
        for image in photos.values()
        for severity in steps
    )
    quality = judged.quality.reshape(len(DEGRADATIONS), len(photos), STEPS)
    attributes = judged.attributes.reshape(*quality.shape, len(ATTRIBUTES))
    lost, ladders, curves = [], {}, {}
    for row, kind in enumerate(DEGRADATIONS):
        won = quality[row, :, 0] > quality[row, :, -1]
        lost += [f"{name} {kind}" for name, has_won in zip(photos, won, strict=True) if not has_won]
        if kind in LADDERS:
            ladders[kind] = ladder(attributes[row], LADDERS[kind], seed)
            curves[kind] = dict(zip(ATTRIBUTES, attributes[row].mean(axis=0).T.round(2).tolist(), strict=True))
    pairs = len(photos) * len(DEGRADATIONS)
    return {
        "photos": len(photos),
        "pairs": pairs,
        "win_rate": 1.0 - len(lost) / pairs,
        "lost": lost,
        "ladders": ladders,
        "attributes": {name: _summary(name, ladders) for name in dict.fromkeys(LADDERS.values())},
        "curves": curves,
    }


def ladder(attributes: np.ndarray, name: str, seed: int = 0) -> dict[str, Any]:
    """How one attribute follows its own fault.

    Args:
        attributes: (photos, steps, 6) from the clean photo to severity 1.
        name: the fault's own attribute.

    Returns:
        `srcc` with cleanliness, the mean over photos (a photo whose attribute does not move counts 0), and
        `srcc_interval`, its 95 % bootstrap interval; `clean` and `gross`, its means at both ends; `fall`: the mean fall
        of every attribute; `leads`: it falls more than any of the other four moves, `mos` apart; `leads_share`: share
        of the photos where it does.
    """
    index = ATTRIBUTES.index(name)
    own = attributes[:, :, index]  # (photos, steps)
    srcc = np.array([_srcc(run) for run in own])
    fall = attributes[:, 0] - attributes[:, -1]  # (photos, 6)
    others = [i for i, other in enumerate(ATTRIBUTES) if other not in (name, "mos")]
    clean, gross = own.mean(axis=0)[[0, -1]].round(1).tolist()
    mean_fall = fall.mean(axis=0)
    return {
        "attribute": name,
        "clean": clean,
        "gross": gross,
        "srcc": float(srcc.mean()),
        "srcc_interval": bootstrap(srcc, srcc, seed=seed, figures=lambda s, _: {"srcc": float(s.mean())})["srcc"],
        "fall": dict(zip(ATTRIBUTES, mean_fall.round(1).tolist(), strict=True)),
        "leads": bool(mean_fall[index] > np.abs(mean_fall[others]).max()),
        "leads_share": float((fall[:, index] > np.abs(fall[:, others]).max(axis=1)).mean()),
    }


def png(image: np.ndarray) -> bytes:
    """Uint8 sRGB (H, W, 3) as a file that loses nothing."""
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def _srcc(run: np.ndarray) -> float:
    return float(spearmanr(run, -np.arange(len(run))).statistic) if np.ptp(run) > 0 else 0.0


def _summary(name: str, ladders: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    mine = [result for result in ladders.values() if result["attribute"] == name]
    return {
        "srcc": float(np.mean([result["srcc"] for result in mine])),
        "leads": all(result["leads"] for result in mine),
    }
