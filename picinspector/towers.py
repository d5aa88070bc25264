"""The image tower of the builtin bundle, as a timm model: importing this module makes open_clip find it.

EfficientNet-lite0 looked at in all its stages. The mean and the standard deviation of every channel of every stage say
what a photo shows and in what state (Gatys et al. 2016 call such statistics style; perceptual distances live there,
Zhang et al. 2018). Two projections of them are the embedding, joined by one coordinate: the quality that a Gaussian
process regression (Rasmussen & Williams 2006, 2.2) reads off them. Fitted by `training/builtin/tower.py`; open_clip
folders name it as `timm_model_name`.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import register_model
from torch import nn

NAME = "picinspector_lite0"
#: Channels of the maps looked at: the seven stages, and the last convolution.
STAGE_CHANNELS = (16, 24, 40, 80, 112, 192, 320, 1280)
STATISTICS = 2 * sum(STAGE_CHANNELS)
#: Width of the two projections, and the number of photos that the regression remembers.
QUALITY_DIM, CONTENT_DIM, SUPPORT = 447, 320, 14_900
EMBED_DIM = QUALITY_DIM + CONTENT_DIM + 1
#: Length of one standard deviation of predicted quality, where both projections have length 1: far above the
#: rounding of float16, and small enough to leave distances to the projections.
_QUALITY_STEP = 0.3
#: Standardised statistics beyond are outliers: a black frame has no place 30 deviations away from everything.
_CLAMP = 5.0


class StageStatistics(nn.Module):
    """EfficientNet-lite0 up to its last convolution, pooled after every stage."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = timm.create_model("tf_efficientnet_lite0", num_classes=0, global_pool="")

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised (B, 3, H, W) -> float32 (B, 4128): mean, then standard deviation, of one map after another."""
        x = self.net.bn1(self.net.conv_stem(pixels))
        maps = [x := stage(x) for stage in self.net.blocks]
        maps.append(self.net.bn2(self.net.conv_head(x)))
        return torch.cat([part for one in maps for part in _mean_std(one)], dim=1)


class QualityHead(nn.Module):
    """Statistics to the embedding. Always float32: bfloat16 would round what thousands of small terms add up to.

    Attributes:
        mean, scale: (4128,) standardise the statistics.
        quality: (447, 4128), to the space in which the kernel's distance is the Euclidean one.
        content: (320, 4128), principal components of the last stages.
        support: (14900, 447) photos in the quality space.
        weights: (14900,) of the kernel regression; its output has mean 0 and standard deviation 1 over photos.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    quality: torch.Tensor
    content: torch.Tensor
    support: torch.Tensor
    weights: torch.Tensor
    keep_float32 = True  # asks `picinspector.clip` not to cast it with the rest

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(STATISTICS))
        self.register_buffer("scale", torch.ones(STATISTICS))
        self.register_buffer("quality", torch.zeros(QUALITY_DIM, STATISTICS))
        self.register_buffer("content", torch.zeros(CONTENT_DIM, STATISTICS))
        self.register_buffer("support", torch.zeros(SUPPORT, QUALITY_DIM))
        self.register_buffer("weights", torch.zeros(SUPPORT))

    def project(self, statistics: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 4128) -> (B, 447) in the quality space, (B, 320) in the content space."""
        x = ((statistics - self.mean) * self.scale).clamp(-_CLAMP, _CLAMP)
        return x @ self.quality.T, x @ self.content.T

    def predict(self, quality: torch.Tensor) -> torch.Tensor:
        """(B, 447) in the quality space -> quality (B,) in standard deviations."""
        return kernel(quality, self.support) @ self.weights

    def join(self, quality: torch.Tensor, content: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """Both projections and the predicted quality (B,) -> embeddings (B, 768), not normalised."""
        unit = nn.functional.normalize
        return torch.cat([unit(quality), unit(content), _QUALITY_STEP * predicted[:, None]], dim=1)

    def forward(self, statistics: torch.Tensor) -> torch.Tensor:
        """(B, 4128) -> (B, 768)."""
        quality, content = self.project(statistics)
        return self.join(quality, content, self.predict(quality))


class QualityTower(nn.Module):
    """Pixels to the embedding; the tower that open_clip builds."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = StageStatistics()
        self.head = QualityHead()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised (B, 3, H, W) -> float32 (B, 768)."""
        embeddings: torch.Tensor = self.head(self.statistics(pixels))
        return embeddings


def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The Gaussian kernel exp(-|a - b|^2) of (A, D) and (B, D): (A, B). The projection holds the length scales."""
    # The norm of the many rows: squaring them first would fill another 26 MB at every call.
    squares = a.square().sum(1)[:, None] + torch.linalg.vector_norm(b, dim=1).square() - 2.0 * a @ b.T
    return torch.exp(-squares.clamp_min(0.0))


def _mean_std(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Over the positions of (B, C, H, W): float32 (B, C) each.

    By rows of channels, as channels-last maps lie in memory: on a CPU four times as fast as `torch.std_mean`.
    """
    rows = maps.permute(0, 2, 3, 1).flatten(1, 2).to(torch.float32, copy=True)  # (B, H * W, C)
    mean = rows.mean(1)
    rows -= mean[:, None]
    return mean, (rows.square_().sum(1) / (rows.shape[1] - 1)).sqrt()


@register_model
def picinspector_lite0(pretrained: bool = False, num_classes: int = EMBED_DIM, **_: Any) -> QualityTower:
    """The builtin tower, for timm's `create_model`.

    Raises:
        ValueError: pretrained weights or another width asked for; the bundle brings the weights.
    """
    if pretrained or num_classes != EMBED_DIM:
        raise ValueError(f"{NAME} has no pretrained weights of its own and embeds in {EMBED_DIM}, not {num_classes}")
    return QualityTower()
