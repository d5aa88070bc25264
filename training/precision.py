"""How far bfloat16 and float32 differ: hosts of a cluster may run in either."""

from __future__ import annotations

import numpy as np
import torch

from jobs.demo import real_photos
from picinspector.bundle import Bundle
from picinspector.degrade import DEGRADATIONS
from training.judge import BATCH, Judge
from training.ladders import png


def evaluate_precision(bundle: Bundle) -> dict[str, object]:
    """How far bfloat16 and float32 differ on the demo's photos and their gross degradations.

    Returns:
        median and maximum over the photos: 1 - cosine of the embeddings, and absolute differences of `quality_score`
        (1-10) and of the attribute (0-100) that differs most.
    """
    images = [
        image for photo in real_photos().values() for image in (photo, *(f(photo, 1.0) for f in DEGRADATIONS.values()))
    ]
    photos = [png(image) for image in images]
    half, full = Judge(bundle, torch.bfloat16), Judge(bundle, torch.float32)
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, len(photos), BATCH):
        batch = photos[start : start + BATCH]
        a, b = half.embed(batch), full.embed(batch)
        part = {name: 1.0 - _cosine(a[name], b[name]) for name in ("clip_embedding", "dinov2_embedding")}
        judged_a, judged_b = half.score(a), full.score(b)
        part["quality_score"] = np.abs(judged_a.quality - judged_b.quality)
        part["attributes"] = np.abs(judged_a.attributes - judged_b.attributes).max(1)
        parts.append(part)
    result: dict[str, object] = {"photos": len(photos)}
    for name in parts[0]:
        differences = np.concatenate([part[name] for part in parts])
        result[name] = {"median": float(np.median(differences)), "max": float(differences.max())}
    return result


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
