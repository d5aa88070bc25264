"""The label rules of the builtin bundle: what a degraded copy is worth, and the proxies for attributes nobody rated.

BIQ2021 rates quality alone. The rules here are ours; the bundle's card says so.
"""

from __future__ import annotations

import numpy as np

from picinspector.degrade import DEGRADATIONS
from picinspector.schema import ATTRIBUTES, MEASUREMENTS
from training.datasets import SPAQ_SCALE

KINDS = tuple(DEGRADATIONS)

#: Share of its MOS that a photo loses at severity 1: gross faults leave a third, a lost colour seven tenths.
MOS_LOSS = {
    "blur": 0.70,
    "noise": 0.65,
    "underexpose": 0.65,
    "overexpose": 0.60,
    "jpeg": 0.65,
    "low_contrast": 0.60,
    "desaturate": 0.30,
}

#: Per attribute: SPAQ's mean and standard deviation, and its SRCC with MOS (Fang et al. 2020, MOS.xlsx).
SPAQ_MEAN, SPAQ_SD = np.array([SPAQ_SCALE[name] for name in ATTRIBUTES]).T
SPAQ_SRCC_WITH_MOS = np.array([1.0, 0.78, 0.84, 0.87, 0.89, 0.96])

#: Points (of 100) an attribute loses at severity 1. Rows: `KINDS`; columns: `ATTRIBUTES`
#: (mos, brightness, colorfulness, contrast, noisiness, sharpness). Mostly the attribute the fault is named after.
ATTRIBUTE_LOSS = {
    "blur": (35, 3, 5, 10, 3, 55),
    "noise": (35, 8, 10, 10, 60, 15),
    "underexpose": (35, 55, 20, 25, 12, 12),
    "overexpose": (35, 55, 20, 25, 6, 12),
    "jpeg": (35, 5, 10, 8, 30, 30),
    "low_contrast": (30, 12, 25, 60, 4, 15),
    "desaturate": (15, 3, 60, 6, 2, 2),
}


def degraded_mos(mos: np.ndarray, kind: np.ndarray, severity: np.ndarray) -> np.ndarray:
    """MOS (N,) of photos after a degradation; `kind` (N,) indexes `KINDS`, -1 for none."""
    loss = np.array([*MOS_LOSS.values(), 0.0])  # kind -1 is the last
    return mos * (1.0 - loss[kind] * severity)


def attribute_targets(mos: np.ndarray, measured: np.ndarray, kind: np.ndarray, severity: np.ndarray) -> np.ndarray:
    """Proxy attributes 0-100 (N, 6): SPAQ's mean, spread and correlation with MOS, the rest from a measurement.

    Args:
        mos: (N,) MOS of the undegraded photo, any scale.
        measured: (N, 7) `schema.MEASUREMENTS` of the undegraded photo.
        kind, severity: (N,) the degradation, -1 and 0 for none; its loss is taken off by `ATTRIBUTE_LOSS`.
    """
    value = dict(zip(MEASUREMENTS, measured.T, strict=True))
    clipped = value["clipped_highlights"] + value["clipped_shadows"]
    own = {
        "mos": mos,
        "brightness": -np.abs(value["brightness"] - 0.45) - 0.5 * clipped,
        "colorfulness": np.sqrt(value["colorfulness"]),
        "contrast": value["contrast"],
        "noisiness": -np.log1p(value["noise"]),
        "sharpness": np.log1p(value["sharpness"]),
    }
    z_own = np.stack([_standardise(own[name]) for name in ATTRIBUTES], axis=1)  # (N, 6)
    rho = SPAQ_SRCC_WITH_MOS
    z = rho * _standardise(mos)[:, None] + np.sqrt(1.0 - rho**2) * z_own
    loss = np.array([*ATTRIBUTE_LOSS.values(), (0,) * len(ATTRIBUTES)], dtype=np.float64)  # (8, 6)
    return np.clip(SPAQ_MEAN + SPAQ_SD * z - severity[:, None] * loss[kind], 1.0, 99.0)


def _standardise(values: np.ndarray) -> np.ndarray:
    """To mean 0, sd 1, in +-2.5: a few odd photos must not set the scale."""
    return np.clip((values - values.mean()) / max(float(values.std()), 1e-9), -2.5, 2.5)
