"""CLIP through open_clip: image embeddings, and text embeddings for zero-shot scoring.

A CLIP folder is what open_clip calls a local dir: `open_clip_config.json` (architecture and preprocessing) beside one
safetensors file. The `openai` weights of ViT-L/14 are published in this format, and so is the builtin tower.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from picinspector.device import pick_device, pick_dtype, to_embeddings, to_input
from picinspector.errors import BundleError
from picinspector.photo import CropSpec

CONFIG = "open_clip_config.json"


class ClipEncoder:
    """The image tower of any open_clip model.

    Attributes:
        crop: the crop to pass to `encode`, from the model's own preprocessing config.
        dim: width of the embedding.
    """

    def __init__(
        self, folder: str | os.PathLike[str], device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Load the tower onto `device` (default: the GPU if there is one) in `dtype` (default: what it is fast in).

        Raises:
            BundleError: the folder lacks the config or the safetensors file, or they do not fit together.
        """
        self.device = device or pick_device()
        self.dtype = dtype or pick_dtype(self.device)
        preprocess = read_preprocess(folder)
        self.crop = crop_spec(preprocess)
        self._mean, self._std = preprocess.mean, preprocess.std
        model = _load(folder)
        self.dim = int(open_clip.get_model_config(_local_dir(folder))["embed_dim"])
        self._tower = model.visual.to(self.device, self.dtype).eval()

    @torch.inference_mode()
    def encode(self, crops: np.ndarray) -> np.ndarray:
        """Uint8 sRGB crops (B, S, S, 3) to L2-normalised float16 embeddings (B, D)."""
        features = self._tower(to_input(crops, self._mean, self._std, self.device, self.dtype))
        return to_embeddings(features[0] if isinstance(features, tuple) else features)


@torch.inference_mode()
def encode_texts(folder: str | os.PathLike[str], texts: Sequence[str]) -> np.ndarray:
    """L2-normalised float32 embeddings (N, D) of texts, by the model's own tokenizer and text tower on the CPU."""
    model = _load(folder).eval()
    tokens = open_clip.get_tokenizer(_local_dir(folder))(list(texts))
    features = model.encode_text(tokens, normalize=True)
    return np.asarray(features.float().numpy())


def read_preprocess(folder: str | os.PathLike[str]) -> PreprocessCfg:
    """The preprocessing that travels with the weights, open_clip's defaults filled in.

    Raises:
        BundleError: no readable config in the folder.
    """
    path = Path(folder) / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), config.get("preprocess_cfg", {})))
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(f"{path}: not a readable open_clip config ({error}); fetch the bundle again") from error


def crop_spec(preprocess: PreprocessCfg) -> CropSpec:
    """What `photo.decode` must cut so that open_clip's own transform would have given the same pixels.

    Raises:
        BundleError: a preprocessing this program does not do.
    """
    sizes = {preprocess.size} if isinstance(preprocess.size, int) else set(preprocess.size)
    mode, resample = preprocess.resize_mode, preprocess.interpolation
    if len(sizes) != 1 or mode not in ("shortest", "squash") or resample not in ("bicubic", "bilinear"):
        raise BundleError(
            f"open_clip preprocessing size={preprocess.size} resize_mode={mode} interpolation={resample} is not "
            "supported: use a square input, shortest or squash, bicubic or bilinear"
        )
    side = sizes.pop()
    return CropSpec(side, side, resample, mode)


def _local_dir(folder: str | os.PathLike[str]) -> str:
    return f"local-dir:{os.fspath(folder)}"


def _load(folder: str | os.PathLike[str]) -> torch.nn.Module:
    # open_clip would fall back to a pickled checkpoint or to random weights; neither may happen silently.
    weights = sorted(Path(folder).glob("*.safetensors"))
    if len(weights) != 1:
        raise BundleError(f"{folder}: expected one .safetensors file, found {len(weights)}; fetch the bundle again")
    try:
        model: torch.nn.Module = open_clip.create_model(_local_dir(folder), require_pretrained=True)
    except (RuntimeError, ValueError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BundleError(f"{folder}: open_clip cannot load it: {reason}") from error
    return model
