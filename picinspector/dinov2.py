"""DINOv2 through transformers: image embeddings for the attribute head.

A DINOv2 folder is a Hugging Face model folder: `config.json`, `model.safetensors`, `preprocessor_config.json`.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import Dinov2Model
from transformers.utils import logging as transformers_logging

from picinspector.device import pick_device, pick_dtype, to_embeddings, to_input
from picinspector.errors import BundleError
from picinspector.preprocess import dinov2_preprocess

# A bar for every actor that loads weights would bury the one progress line.
transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


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
        self._preprocess = dinov2_preprocess(folder)
        self.crop = self._preprocess.crop
        try:
            loaded: Any = Dinov2Model.from_pretrained(
                os.fspath(folder),
                local_files_only=True,
                use_safetensors=True,
                dtype=self.dtype,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise BundleError(f"{folder}: transformers cannot load it: {reason}") from error
        model, loading = loaded
        if missing := sorted(loading["missing_keys"]):  # transformers would fill them with random numbers
            raise BundleError(f"{folder}: the weights lack {missing[0]}, which config.json asks for; fetch it again")
        self.dim = int(model.config.hidden_size)
        self._model: torch.nn.Module = model.to(self.device).eval()

    @torch.inference_mode()
    def encode(self, crops: np.ndarray) -> np.ndarray:
        """Uint8 sRGB crops (B, S, S, 3) to L2-normalised float16 embeddings (B, D)."""
        pixels = to_input(crops, self._preprocess, self.device, self.dtype)
        return to_embeddings(self._model(pixel_values=pixels).pooler_output)
