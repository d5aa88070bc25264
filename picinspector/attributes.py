"""The attribute head: six quality attributes and nine scenes from the DINOv2 embedding.

An attributes folder holds `head.json` (sizes and label names) and `head.safetensors`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from picinspector.errors import BundleError
from picinspector.schema import ATTRIBUTES, SCENES

SPEC = "head.json"
WEIGHTS = "head.safetensors"


class AttributeHead(nn.Module):
    """A shared hidden layer with two outputs: regression of the attributes, classification of the scene."""

    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        # An L2-normalised vector has entries of about 1/sqrt(D); the layer wants them of about 1.
        self.input_scale = float(input_dim) ** 0.5
        self.trunk = nn.Linear(input_dim, hidden_dim)
        self.regression = nn.Linear(hidden_dim, len(ATTRIBUTES))
        self.scene = nn.Linear(hidden_dim, len(SCENES))

    def forward(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """L2-normalised (B, D) -> attributes 0-100 (B, 6), scene logits (B, 9)."""
        hidden = nn.functional.gelu(self.trunk(embedding * self.input_scale))
        return 100.0 * torch.sigmoid(self.regression(hidden)), self.scene(hidden)


class AttributePredictor:
    """A trained head, ready to predict on the CPU."""

    features = ("dinov2_embedding",)

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Load the head and check it against the names this version writes.

        Raises:
            BundleError: a file is missing or unreadable, or it was trained for other attributes or scenes.
        """
        path = Path(folder) / SPEC
        try:
            spec: dict[str, Any] = json.loads(path.read_text("utf-8"))
            names = (tuple(spec["attributes"]), tuple(spec["scenes"]))
            self._dim = int(spec["input_dim"])
            self._head = AttributeHead(self._dim, int(spec["hidden_dim"])).eval()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{path}: not a readable head spec ({error!r}); train or fetch it again") from error
        if names != (ATTRIBUTES, SCENES):
            raise BundleError(f"{path}: trained for {names}, this version writes {(ATTRIBUTES, SCENES)}; train it again")
        try:
            self._head.load_state_dict(load_file(path.with_name(WEIGHTS)))
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise BundleError(f"{path.with_name(WEIGHTS)}: does not fit {SPEC}: {reason}") from error

    @torch.inference_mode()
    def predict(self, embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Judge N photos.

        Args:
            embedding: L2-normalised DINOv2 embeddings (N, D) of any float dtype.

        Returns:
            attributes 0-100 (N, 6) and scene probabilities (N, 9), float32, in the order of `schema`.

        Raises:
            BundleError: the embeddings are not as wide as what the head was trained on.
        """
        if embedding.shape[1] != self._dim:
            raise BundleError(
                f"the attribute head takes {self._dim}-wide DINOv2 embeddings, these are {embedding.shape[1]} wide: "
                "score with the bundle that embedded the library, or embed it again with this one"
            )
        attributes, logits = self._head(torch.from_numpy(embedding.astype(np.float32)))
        return attributes.numpy(), logits.softmax(dim=1).numpy()
