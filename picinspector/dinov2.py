"""DINOv2 through transformers: image embeddings for the attribute head.

A DINOv2 folder is a Hugging Face model folder: `config.json`, `model.safetensors`, `preprocessor_config.json`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from transformers import Dinov2Model

from picinspector.device import pick_device, pick_dtype, to_embeddings, to_input
from picinspector.errors import BundleError
from picinspector.photo import CropSpec

CONFIG = "preprocessor_config.json"

# Pillow's resampling numbers, which transformers stores.
_RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}


class Dinov2Encoder:
    """A `Dinov2Model`; the embedding is its pooled output: the class token after the last layer norm.

    Attributes:
        crop: the crop to pass to `encode`, from the model's own preprocessing config.
        dim: width of the embedding.
    """

    def __init__(
        self, folder: str | os.PathLike[str], device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Load the model onto `device` (default: the GPU if there is one) in `dtype` (default: what it is fast in).

        Raises:
            BundleError: the folder lacks a file, or its files do not fit together.
        """
        self.device = device or pick_device()
        self.dtype = dtype or pick_dtype(self.device)
        config = read_preprocess(folder)
        self.crop = crop_spec(config)
        self._mean, self._std = config["image_mean"], config["image_std"]
        try:
            model = Dinov2Model.from_pretrained(
                os.fspath(folder), local_files_only=True, use_safetensors=True, dtype=self.dtype
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise BundleError(f"{folder}: transformers cannot load it: {reason}") from error
        self.dim = int(model.config.hidden_size)
        self._model = cast(torch.nn.Module, model).to(self.device).eval()

    @torch.inference_mode()
    def encode(self, crops: np.ndarray) -> np.ndarray:
        """Uint8 sRGB crops (B, S, S, 3) to L2-normalised float16 embeddings (B, D)."""
        pixels = to_input(crops, self._mean, self._std, self.device, self.dtype)
        return to_embeddings(self._model(pixel_values=pixels).pooler_output)


def read_preprocess(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The preprocessing that travels with the weights.

    Raises:
        BundleError: no readable config in the folder.
    """
    path = Path(folder) / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: not a readable preprocessor config ({error}); fetch the bundle again") from error
    return config


def crop_spec(config: dict[str, Any]) -> CropSpec:
    """What `photo.decode` must cut so that transformers' image processor would have given the same pixels.

    Raises:
        BundleError: a preprocessing this program does not do.
    """
    try:
        resize_px = int(config["size"]["shortest_edge"])
        crop = config["crop_size"]
        resample = cast(Literal["lanczos", "bilinear", "bicubic"], _RESAMPLE[config["resample"]])
        if crop["height"] != crop["width"] or abs(config.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
            raise ValueError("the crop is not square or the pixels are not scaled by 1/255")
        return CropSpec(resize_px, int(crop["height"]), resample)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{CONFIG}: cannot be followed ({error!r}); expected a BitImageProcessor config") from error
