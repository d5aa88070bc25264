"""CLIP through open_clip: image embeddings, and text embeddings for zero-shot scoring.

A CLIP folder is what open_clip calls a local dir: `open_clip_config.json` (architecture and preprocessing) beside one
safetensors file. The `openai` weights of ViT-L/14 are published in this format, and so is the builtin tower.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import open_clip
import torch
from safetensors import SafetensorError

import picinspector.towers  # noqa: F401  open_clip finds the builtin tower once timm knows it
from picinspector.device import pick_device, pick_dtype, to_embeddings, to_input
from picinspector.errors import BundleError
from picinspector.fold import fold_batch_norm, fuse_relu6
from picinspector.preprocess import clip_preprocess


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
        self._preprocess = clip_preprocess(folder)
        self.crop = self._preprocess.crop
        model = _load(folder)
        self.dim = int(open_clip.get_model_config(_local_dir(folder))["embed_dim"])
        tower = fold_batch_norm(cast(torch.nn.Module, model.visual).eval())
        self._tower = _to(tower, self.device, self.dtype)
        if self.device.type == "cpu":
            fuse_relu6(self._tower)

    @torch.inference_mode()
    def encode(self, crops: np.ndarray) -> np.ndarray:
        """Uint8 sRGB crops (B, S, S, 3) to L2-normalised float16 embeddings (B, D)."""
        features = self._tower(to_input(crops, self._preprocess, self.device, self.dtype))
        return to_embeddings(features[0] if isinstance(features, tuple) else features)


@torch.inference_mode()
def encode_texts(folder: str | os.PathLike[str], texts: Sequence[str]) -> np.ndarray:
    """L2-normalised float32 embeddings (N, D) of texts, by the model's own tokenizer and text tower on the CPU."""
    model = _load(folder).eval()
    tokens = open_clip.get_tokenizer(_local_dir(folder))(list(texts))
    features: torch.Tensor = model.encode_text(tokens, normalize=True)  # type: ignore[operator]
    return np.asarray(features.float().numpy())


def _to(tower: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The tower on a device, in a precision, convolutions channels-last; modules that say so stay in float32."""
    exact = {name: part for name, part in tower.named_modules() if getattr(part, "keep_float32", False)}
    kept = {name: {key: value.clone() for key, value in part.state_dict().items()} for name, part in exact.items()}
    tower = tower.to(device, dtype).to(memory_format=torch.channels_last)
    for name, part in exact.items():
        part.float().load_state_dict(kept[name])
    return tower


def _local_dir(folder: str | os.PathLike[str]) -> str:
    return f"local-dir:{os.fspath(folder)}"


def _load(folder: str | os.PathLike[str]) -> torch.nn.Module:
    # open_clip would fall back to a pickled checkpoint or to random weights; neither may happen silently.
    weights = sorted(Path(folder).glob("*.safetensors"))
    if len(weights) != 1:
        raise BundleError(f"{folder}: expected one .safetensors file, found {len(weights)}; fetch the bundle again")
    if pickled := sorted(path.name for suffix in ("bin", "pt", "pth") for path in Path(folder).glob(f"*.{suffix}")):
        raise BundleError(f"{folder}: {pickled[0]} may be a pickle, which is never loaded; remove it")
    try:
        model: torch.nn.Module = open_clip.create_model(_local_dir(folder), require_pretrained=True)
    except (RuntimeError, ValueError, TypeError, KeyError, FileNotFoundError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BundleError(f"{folder}: open_clip cannot load it: {reason}") from error
    return model
