"""Step 4: the attribute head on the stored DINOv2 embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from picinspector.schema import ATTRIBUTES, SCENES

HIDDEN = 128
_EPOCHS, _BATCH, _LR, _WEIGHT_DECAY = 30, 256, 3e-3, 1e-3


class TrainableHead(nn.Module):
    """What `picinspector.attributes` computes without torch, with gradients.

    A shared hidden layer with two outputs: regression of the attributes, classification of the scene.
    """

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


def write(embedding: np.ndarray, attributes: np.ndarray, scenes: np.ndarray, folder: Path, seed: int = 0) -> None:
    """Fit and write an attributes folder.

    Args:
        embedding: L2-normalised float16 (N, D).
        attributes: targets 0-100 (N, 6).
        scenes: soft targets (N, 9).
    """
    torch.manual_seed(seed)
    x = torch.from_numpy(embedding.astype(np.float32))
    y, scene = torch.from_numpy(attributes).float(), torch.from_numpy(scenes).float()
    head = TrainableHead(x.shape[1], HIDDEN)
    optimizer = torch.optim.AdamW(head.parameters(), lr=_LR, weight_decay=_WEIGHT_DECAY)
    steps = _EPOCHS * -(-len(x) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=steps)
    for _ in range(_EPOCHS):
        for batch in torch.randperm(len(x)).split(_BATCH):
            predicted, logits = head(x[batch])
            loss = nn.functional.mse_loss(predicted / 20.0, y[batch] / 20.0)
            loss = loss + 0.3 * nn.functional.cross_entropy(logits, scene[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in head.state_dict().items()}, folder / "head.safetensors")
    spec = {"input_dim": x.shape[1], "hidden_dim": HIDDEN, "attributes": ATTRIBUTES, "scenes": SCENES}
    (folder / "head.json").write_text(json.dumps(spec, indent=2) + "\n", "utf-8")
