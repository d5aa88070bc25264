"""A bundle as large as the published one, with random weights: CLIP ViT-L/14, DINOv2-base, heads that fit them.

Speed does not ask what the weights say. Nothing of it is fetched.
"""

from __future__ import annotations

from pathlib import Path

import open_clip

from picinspector import bundle
from tests.bundles import DINOV2_BASE, halve, write_attributes, write_clip, write_dinov2, write_scorer

CLIP = "ViT-L-14-quickgelu"


def make(folder: Path) -> Path:
    """The folder of the bundle, 0.8 GB; one that is there is kept."""
    if (folder / bundle.MANIFEST).exists():
        return folder
    write_clip(folder / "clip", open_clip.get_model_config(CLIP))
    write_dinov2(folder / "dinov2", DINOV2_BASE, resize_px=256, crop_px=224)
    halve(folder / "clip" / "open_clip_model.safetensors")
    halve(folder / "dinov2" / "model.safetensors")
    write_scorer(folder / "scorer", {"clip_embedding": 768})
    write_attributes(folder / "attributes", {"dinov2_embedding": 768})
    return bundle.seal(folder, "full-size", "0.0.1").folder
