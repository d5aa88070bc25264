"""What each encoder wants its photos cut and normalised like, read from the config that travels with its weights.

Reading it needs neither open_clip nor transformers, so the workers that only cut crops never load them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from picinspector.errors import BundleError
from picinspector.photo import CropSpec

CLIP_CONFIG = "open_clip_config.json"
DINOV2_CONFIG = "preprocessor_config.json"
CAPTIONER_CONFIG, CAPTIONER_SPEC = "preprocessor_config.json", "captioner.json"

#: open_clip's defaults, where a config leaves them out (`open_clip.constants`).
_OPENAI_MEAN, _OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Pillow's resampling numbers, which transformers stores.
_RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True, slots=True)
class Preprocess:
    """One encoder's preprocessing.

    Attributes:
        crop: what `photo.decode` must cut.
        mean, std: per channel, of pixels scaled to 0-1.
    """

    crop: CropSpec
    mean: tuple[float, ...]
    std: tuple[float, ...]


def clip_preprocess(folder: str | os.PathLike[str]) -> Preprocess:
    """The preprocessing of an open_clip folder: the pixels open_clip's own inference transform would give.

    Raises:
        BundleError: no readable config in the folder, or one this program cannot follow.
    """
    path = Path(folder) / CLIP_CONFIG
    try:
        config = _read(path)
        given = {key: value for key, value in config.get("preprocess_cfg", {}).items() if value is not None}
        # open_clip itself lets the tower's input size overrule the preprocessing config's.
        side = _side(config["model_cfg"]["vision_cfg"].get("image_size", given.get("size", 224)))
        mode, resample = given.get("resize_mode", "shortest"), given.get("interpolation", "bicubic")
        if mode not in ("shortest", "squash") or resample not in ("bicubic", "bilinear"):
            raise ValueError(
                f"resize_mode={mode} interpolation={resample}: use shortest or squash, bicubic or bilinear"
            )
        mean, std = given.get("mean", _OPENAI_MEAN), given.get("std", _OPENAI_STD)
        return Preprocess(CropSpec(side, side, resample, mode), tuple(map(float, mean)), tuple(map(float, std)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BundleError(f"{path}: not an open_clip config to follow ({error!r}); fetch the bundle again") from error


def dinov2_preprocess(folder: str | os.PathLike[str]) -> Preprocess:
    """The preprocessing of a transformers folder: the pixels its `BitImageProcessor` would give.

    Raises:
        BundleError: no readable config in the folder, or one this program cannot follow.
    """
    path = Path(folder) / DINOV2_CONFIG
    try:
        config = _read(path)
        resize_px, crop_px = int(config["size"]["shortest_edge"]), config["crop_size"]
        resample = cast(Literal["lanczos", "bilinear", "bicubic"], _RESAMPLE[config["resample"]])
        if abs(config.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
            raise ValueError(f"rescale_factor={config['rescale_factor']}, expected 1/255")
        crop = CropSpec(resize_px, _side((crop_px["height"], crop_px["width"])), resample, odd_margin="floor")
        return Preprocess(crop, tuple(map(float, config["image_mean"])), tuple(map(float, config["image_std"])))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BundleError(f"{path}: not a BitImageProcessor config to follow ({error!r}); fetch again") from error


def captioner_preprocess(folder: str | os.PathLike[str]) -> Preprocess:
    """The preprocessing of a captioner folder: the one image that its `SmolVLMImageProcessor` gives without tiles.

    The whole photo is squashed to the square, as SmolVLM was trained, unless `captioner.json` says `"crop": "foveated"`
    and of how large a square, `"resize_px"`.

    Raises:
        BundleError: no readable config in the folder, or one this program cannot follow.
    """
    path = Path(folder) / CAPTIONER_CONFIG
    try:
        config, spec = _read(path), _read(Path(folder) / CAPTIONER_SPEC)
        side = int(config["max_image_size"]["longest_edge"])
        resample = cast(Literal["lanczos", "bilinear", "bicubic"], _RESAMPLE[config["resample"]])
        if spec["crop"] == "foveated":
            if side % 2 or not side <= int(spec["resize_px"]):
                raise ValueError(f"foveated from {spec['resize_px']} px to {side} px: expected an even, smaller side")
            crop = CropSpec(int(spec["resize_px"]), side, resample, "foveated", "floor")
        elif spec["crop"] == "squash":
            crop = CropSpec(side, side, resample, "squash")
        else:
            raise ValueError(f"crop={spec['crop']}: use foveated or squash")
        return Preprocess(crop, tuple(map(float, config["image_mean"])), tuple(map(float, config["image_std"])))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BundleError(f"{path}: not a captioner's config to follow ({error!r}); fetch again") from error


def _read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return config


def _side(size: Any) -> int:
    sides = {int(size)} if isinstance(size, int) else {int(side) for side in size}
    if len(sides) != 1:
        raise ValueError(f"input size {size}, expected a square")
    return sides.pop()
