"""The attribute head: six quality attributes and nine scenes from stored columns.

An attributes folder holds `head.json` (columns it reads, sizes, label names) and `head.safetensors`. The head is a
shared hidden layer with two outputs (its torch twin is in `training/attribute_head.py`), applied with NumPy: a CPU
worker need not load torch for it. Technical quality lives in the native pixels, so a head may read pixel measurements
and the CLIP embedding beside the DINOv2 embedding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from scipy.special import erf

from picinspector.errors import BundleError
from picinspector.schema import ATTRIBUTES, SCENES
from picinspector.scorer import feature_matrix

SPEC = "head.json"
WEIGHTS = "head.safetensors"


class AttributeHead:
    """A trained head.

    Attributes:
        features: columns of the embeddings table it reads, in order.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Load the head and check it against the names this version writes.

        Raises:
            BundleError: a file is missing or unreadable, or it was trained for other attributes or scenes.
        """
        path = Path(folder) / SPEC
        try:
            spec: dict[str, Any] = json.loads(path.read_text("utf-8"))
            names = (tuple(spec["attributes"]), tuple(spec["scenes"]))
            self.features = tuple(str(name) for name in spec.get("features", ["dinov2_embedding"]))
            self._log1p = tuple(str(name) for name in spec.get("log1p", []))
            self._dim, hidden = int(spec["input_dim"]), int(spec["hidden_dim"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{path}: not a readable head spec ({error!r}); train or fetch it again") from error
        if names != (ATTRIBUTES, SCENES):
            raise BundleError(f"{path}: trained for {names}, expected {(ATTRIBUTES, SCENES)}; train it again")
        shapes = {"trunk": (hidden, self._dim), "regression": (len(ATTRIBUTES), hidden), "scene": (len(SCENES), hidden)}
        expected: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in shapes.items()}
        expected |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
        expected |= {"input.mean": (self._dim,), "input.scale": (self._dim,)}
        try:
            tensors = {name: value.astype(np.float32) for name, value in load_file(path.with_name(WEIGHTS)).items()}
        except (OSError, SafetensorError) as error:
            raise BundleError(
                f"{path.with_name(WEIGHTS)}: cannot be read ({error}); train or fetch it again"
            ) from error
        if "features" not in spec:
            # An L2-normalised vector has entries of about 1/sqrt(D); the layer was trained on entries of about 1.
            tensors.setdefault("input.mean", np.zeros(self._dim, np.float32))
            tensors.setdefault("input.scale", np.full(self._dim, self._dim**-0.5, np.float32))
        for name, shape in expected.items():
            found = tensors[name].shape if name in tensors else None
            if found != shape:
                raise BundleError(f"{path.with_name(WEIGHTS)}: {name} is {found}, {SPEC} says {shape}; train it again")
        self._tensors = tensors

    def predict(self, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Judge N photos.

        Args:
            columns: name -> (N,) or (N, D) of any float dtype for every name in `features`; embeddings L2-normalised.

        Returns:
            attributes 0-100 (N, 6) and scene probabilities (N, 9), float32, in the order of `schema`.

        Raises:
            BundleError: the columns are not as wide as what the head was trained on.
        """
        inputs = input_matrix(columns, self.features, self._log1p)
        if inputs.shape[1] != self._dim:
            widths = {name: np.atleast_2d(columns[name].T).shape[0] for name in self.features}
            raise BundleError(
                f"the attribute head was trained on {self._dim} features, these embeddings give {inputs.shape[1]} "
                f"{widths}: score with the bundle that embedded the library, or embed it again with this one"
            )
        hidden = self._linear("trunk", (inputs - self._tensors["input.mean"]) / self._tensors["input.scale"])
        hidden = 0.5 * hidden * (1.0 + erf(hidden / np.float32(2**0.5)))  # GELU
        attributes = 100.0 / (1.0 + np.exp(-self._linear("regression", hidden)))
        logits = self._linear("scene", hidden)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return attributes.astype(np.float32), (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)

    def _linear(self, name: str, inputs: np.ndarray) -> np.ndarray:
        return np.asarray(inputs @ self._tensors[f"{name}.weight"].T + self._tensors[f"{name}.bias"])


def input_matrix(columns: Mapping[str, np.ndarray], features: Sequence[str], log1p: Sequence[str]) -> np.ndarray:
    """What the head standardises: columns side by side, float32 (N, F).

    Args:
        columns: name -> (N,) or (N, D).
        features: which columns, in order.
        log1p: those of them whose values x >= 0 have a heavy tail and go in as log(1 + x).
    """
    heavy = {name: np.log1p(np.asarray(columns[name], dtype=np.float32)) for name in features if name in log1p}
    return feature_matrix({**columns, **heavy}, tuple(features))
