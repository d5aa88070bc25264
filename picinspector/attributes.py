"""The attribute head: six quality attributes and nine scenes from the DINOv2 embedding.

An attributes folder holds `head.json` (sizes and label names) and `head.safetensors`. The head is a shared hidden layer
with two outputs (trained by `training/fit_attributes.py`), applied with NumPy: a CPU worker need not load torch for it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from scipy.special import erf

from picinspector.errors import BundleError
from picinspector.schema import ATTRIBUTES, SCENES

SPEC = "head.json"
WEIGHTS = "head.safetensors"


class AttributeHead:
    """A trained head.

    Attributes:
        features: the column of the embeddings table it reads.
    """

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
            self._dim, hidden = int(spec["input_dim"]), int(spec["hidden_dim"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{path}: not a readable head spec ({error!r}); train or fetch it again") from error
        if names != (ATTRIBUTES, SCENES):
            raise BundleError(f"{path}: trained for {names}, expected {(ATTRIBUTES, SCENES)}; train it again")
        shapes = {"trunk": (hidden, self._dim), "regression": (len(ATTRIBUTES), hidden), "scene": (len(SCENES), hidden)}
        try:
            tensors = {name: value.astype(np.float32) for name, value in load_file(path.with_name(WEIGHTS)).items()}
        except (OSError, SafetensorError) as error:
            raise BundleError(
                f"{path.with_name(WEIGHTS)}: cannot be read ({error}); train or fetch it again"
            ) from error
        for name, shape in shapes.items():
            found = tensors[f"{name}.weight"].shape if f"{name}.weight" in tensors else None
            if found != shape or tensors.get(f"{name}.bias", np.empty(0)).shape != shape[:1]:
                raise BundleError(f"{path.with_name(WEIGHTS)}: {name} is {found}, {SPEC} says {shape}; train it again")
        self._tensors = tensors

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
        # An L2-normalised vector has entries of about 1/sqrt(D); the layer was trained on entries of about 1.
        hidden = self._linear("trunk", embedding.astype(np.float32) * np.float32(self._dim**0.5))
        hidden = 0.5 * hidden * (1.0 + erf(hidden / np.float32(2**0.5)))  # GELU
        attributes = 100.0 / (1.0 + np.exp(-self._linear("regression", hidden)))
        logits = self._linear("scene", hidden)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return attributes.astype(np.float32), (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)

    def _linear(self, name: str, inputs: np.ndarray) -> np.ndarray:
        return np.asarray(inputs @ self._tensors[f"{name}.weight"].T + self._tensors[f"{name}.bias"])
