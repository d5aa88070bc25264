"""The multi-task head as a torch module, for training; `picinspector.attributes` applies the same with NumPy."""

from __future__ import annotations

import torch
from torch import nn

from picinspector.schema import ATTRIBUTES, SCENES


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
