"""The torch twin of `picinspector.attributes.AttributeHead`, and fitting it in one process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from picinspector.attributes import SPEC, WEIGHTS, input_matrix
from picinspector.schema import ATTRIBUTES, SCENES

#: Points of 100 that count as one in the regression loss, and what the scene's cross-entropy counts beside it.
_ATTRIBUTE_UNIT, SCENE_SHARE = 20.0, 0.3
_LR, _BATCH = 3e-3, 256


class Standardise(nn.Module):
    """Inputs to mean 0, sd 1, by statistics that travel with the weights."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(input_dim))
        self.register_buffer("scale", torch.ones(input_dim))

    def fit(self, inputs: np.ndarray) -> None:
        """Take mean and standard deviation of inputs (N, F); a constant column keeps scale 1."""
        scale = inputs.std(axis=0, dtype=np.float64)
        self.mean.copy_(torch.from_numpy(inputs.mean(axis=0, dtype=np.float64)))
        self.scale.copy_(torch.from_numpy(np.where(scale > 1e-6, scale, 1.0)))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(B, F) -> (B, F)."""
        return (inputs - self.mean) / self.scale


class AttributeHead(nn.Module):
    """What `picinspector.attributes` computes without torch, with gradients.

    A shared hidden layer with two outputs: regression of the attributes, classification of the scene.
    """

    def __init__(self, input_dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.input = Standardise(input_dim)
        self.trunk = nn.Linear(input_dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)
        self.regression = nn.Linear(hidden_dim, len(ATTRIBUTES))
        self.scene = nn.Linear(hidden_dim, len(SCENES))

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `input_matrix` gives (B, F) -> attributes 0-100 (B, 6), scene logits (B, 9)."""
        hidden = self.dropout(nn.functional.gelu(self.trunk(self.input(inputs))))
        return 100.0 * torch.sigmoid(self.regression(hidden)), self.scene(hidden)


def write_head(head: AttributeHead, features: Sequence[str], log1p: Sequence[str], folder: Path) -> None:
    """Write an attributes folder: `head.json` and `head.safetensors`.

    Args:
        head: trained on `input_matrix(columns, features, log1p)`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in head.state_dict().items()}
    save_file(tensors, folder / WEIGHTS)
    hidden_dim, input_dim = head.trunk.weight.shape
    spec = {
        "features": list(features),
        "log1p": list(log1p),
        "input_dim": input_dim,
        "hidden_dim": hidden_dim,
        "attributes": ATTRIBUTES,
        "scenes": SCENES,
    }
    (folder / SPEC).write_text(json.dumps(spec, indent=2) + "\n", "utf-8")


def masked_losses(
    predicted: torch.Tensor,
    logits: torch.Tensor,
    attributes: torch.Tensor,
    scenes: torch.Tensor,
    attribute_weight: torch.Tensor | None = None,
    scene_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The regression loss and the scene loss of a batch, each a weighted mean over what is known; 0 if nothing is.

    Args:
        predicted: attributes 0-100 (B, 6).
        logits: of the scenes (B, 9).
        attributes: targets 0-100 (B, 6), NaN where unknown.
        scenes: target distributions (B, 9), a row of NaN where unknown.
        attribute_weight: (B, 6), default 1.
        scene_weight: (B,), default 1.

    Returns:
        mean squared error in units of 20 points, and soft cross-entropy in nats; both float32 scalars.
    """
    known = ~attributes.isnan()
    errors = (predicted.float() - attributes.nan_to_num()) / _ATTRIBUTE_UNIT
    weight = known.float() if attribute_weight is None else known * attribute_weight
    regression = (weight * errors.square()).sum() / weight.sum().clamp_min(1e-9)
    labelled = ~scenes.isnan().any(dim=1)
    cross_entropy = -(scenes.nan_to_num() * logits.float().log_softmax(dim=1)).sum(dim=1)
    weight = labelled.float() if scene_weight is None else labelled * scene_weight
    return regression, (weight * cross_entropy).sum() / weight.sum().clamp_min(1e-9)


def fit_head(
    columns: Mapping[str, np.ndarray],
    attributes: np.ndarray,
    scenes: np.ndarray,
    *,
    log1p: Sequence[str] = (),
    attribute_weight: np.ndarray | None = None,
    scene_weight: np.ndarray | None = None,
    hidden_dim: int = 128,
    epochs: int = 30,
    seed: int = 0,
    batch_size: int = _BATCH,
    lr: float = _LR,
    weight_decay: float = 1e-3,
    dropout: float = 0.0,
    scene_share: float = SCENE_SHARE,
    validation: tuple[Mapping[str, np.ndarray], np.ndarray, np.ndarray] | None = None,
) -> AttributeHead:
    """Fit a head with minibatch AdamW and a one-cycle schedule; the same seed gives the same head.

    Args:
        columns: name -> (N,) or (N, D); the head reads all of them, in this order.
        attributes: targets 0-100 (N, 6), NaN where unknown.
        scenes: target distributions (N, 9), a row of NaN where unknown; a hand label is a row with a single 1.
        log1p: columns that go in as log(1 + x).
        attribute_weight: (N, 6) or (N, 1), default 1.
        scene_weight: (N,), default 1.
        scene_share: what the scene's loss counts beside the attributes'.
        validation: columns, attributes and scenes of other photos: the epoch with the least loss on them is kept.
            Without it, the last.

    Returns:
        the head on the CPU, in eval mode; `write_head(head, tuple(columns), log1p, folder)` writes it.
    """
    features = tuple(columns)
    torch.manual_seed(seed)
    inputs = input_matrix(columns, features, log1p)
    head = AttributeHead(inputs.shape[1], hidden_dim, dropout)
    head.input.fit(inputs)
    x, y, scene = (torch.from_numpy(np.asarray(part, dtype=np.float32)) for part in (inputs, attributes, scenes))
    given = np.ones((len(x), 1)) if attribute_weight is None else attribute_weight
    weight = torch.from_numpy(np.broadcast_to(given, y.shape).astype(np.float32))
    scene_w = torch.from_numpy(np.asarray(np.ones(len(x)) if scene_weight is None else scene_weight, dtype=np.float32))
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    steps = epochs * -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    best, least = {name: value.clone() for name, value in head.state_dict().items()}, float("inf")
    for _ in range(epochs):
        head.train()
        for batch in torch.randperm(len(x)).split(batch_size):
            predicted, logits = head(x[batch])
            parts = masked_losses(predicted, logits, y[batch], scene[batch], weight[batch], scene_w[batch])
            optimizer.zero_grad()
            (parts[0] + scene_share * parts[1]).backward()
            optimizer.step()
            schedule.step()
        head.eval()
        if validation is not None:
            loss = _loss(head, input_matrix(validation[0], features, log1p), validation[1], validation[2], scene_share)
            if loss < least:
                best, least = {name: value.clone() for name, value in head.state_dict().items()}, loss
    if validation is not None:
        head.load_state_dict(best)
    return head


@torch.no_grad()
def _loss(
    head: AttributeHead, inputs: np.ndarray, attributes: np.ndarray, scenes: np.ndarray, scene_share: float
) -> float:
    y, scene = (torch.from_numpy(np.asarray(part, dtype=np.float32)) for part in (attributes, scenes))
    regression, classification = masked_losses(*head(torch.from_numpy(inputs)), y, scene)
    return float(regression + scene_share * classification)
