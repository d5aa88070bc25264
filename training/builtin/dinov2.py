"""Train the builtin `Dinov2Model` from scratch, by distillation, without any photo's own MOS.

The student sees the native 448 px and must give, from its L2-normalised class token: lite0's stage statistics
(as principal components), the pixel measurements, the strength of each degradation, and the attribute and scene
targets. The MOS in these targets is predicted out of fold, by a regression that never saw that photo's label, so the
embedding holds no photo's own label and a scorer may be fitted on it.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from picinspector.device import pick_device, pick_dtype, to_input
from training.attribute_head import AttributeHead, masked_losses
from training.builtin.cache import Rows, read
from training.builtin.labels import KINDS
from training.builtin.lite0 import PREPROCESS, SIDE_PX

#: 64 large patches: noise and slight blur are in their pixels, and a CPU embeds 300 photos a second.
WIDTH, DEPTH, PATCH_PX = 192, 4, 56
_HIDDEN = 128
#: transformers names tensors otherwise inside than in published files (5.23, `conversion_mapping.py`).
_PUBLISHED = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
_COMPONENTS = 256
_BATCH = 64
_PEAK_LR, _WEIGHT_DECAY = 1.5e-3, 0.05


class Student(nn.Module):
    """The backbone with the heads it is trained through; only backbone and attribute head are kept."""

    def __init__(self, patches: np.ndarray) -> None:
        super().__init__()
        config = Dinov2Config(
            hidden_size=WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=WIDTH // 64,
            image_size=SIDE_PX,
            patch_size=PATCH_PX,
        )
        self.backbone = Dinov2Model(config)
        _init_patch_embedding(self.backbone.embeddings.patch_embeddings.projection, patches)
        self.attributes = AttributeHead(WIDTH, _HIDDEN)
        self.distil = nn.Linear(WIDTH, _COMPONENTS + 7 + len(KINDS))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) -> attributes 0-100 (B, 6), scene logits (B, 9), distilled (B, 256 + 7 + 7)."""
        z = nn.functional.normalize(self.backbone(pixel_values=pixels).pooler_output.float(), dim=-1)
        z = z * math.sqrt(WIDTH)  # an L2-normalised vector has entries of about 1 / sqrt(D); layers want about 1
        return *self.attributes(z), self.distil(z)


def train(cache: Path, folder: Path, attributes: np.ndarray, scenes: np.ndarray, epochs: int, seed: int = 0) -> None:
    """Train on every train photo and its degraded copy; write a transformers folder (fp16).

    Args:
        attributes: targets 0-100 (N, 6) for the N rows of the cache.
        scenes: soft targets (N, 9).
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    rows = Rows.load(cache)
    crops = read(cache, "crops")
    use = np.flatnonzero(~rows.test)
    device, dtype = pick_device(), pick_dtype(pick_device())
    distilled = torch.from_numpy(_distillation_targets(cache, rows, use))
    attributes_t, scenes_t = torch.from_numpy(attributes).float(), torch.from_numpy(scenes).float()
    student = Student(np.asarray(crops[np.sort(rng.choice(use, 192, replace=False))])).to(device).train()
    decay = [p for p in student.parameters() if p.ndim > 1]
    rest = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": _WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_PEAK_LR, betas=(0.9, 0.98))
    steps = epochs * (len(use) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LR, total_steps=steps, pct_start=0.1)
    started, step = time.monotonic(), 0
    for epoch in range(epochs):
        order = rng.permutation(use)[: len(use) // _BATCH * _BATCH].reshape(-1, _BATCH)
        losses = []
        for batch in np.sort(order, axis=1):
            pixels = to_input(crops[batch], PREPROCESS, device, torch.float32)
            if rng.random() < 0.5:
                pixels = pixels.flip(3)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                predicted, logits, features = student(pixels)
            parts = _losses(predicted, logits, features, attributes_t[batch], scenes_t[batch], distilled[batch])
            optimizer.zero_grad(set_to_none=True)
            sum(parts).backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append([part.item() for part in parts])
            step += 1
            if step % 20 == 0:
                rate = step * _BATCH / (time.monotonic() - started)
                mean = np.round(np.mean(losses[-20:], axis=0), 3)
                print(f"dinov2: step {step} of {steps}, {rate:.0f} photos/s, losses {mean}", flush=True)
        _write(student, folder)
        print(f"dinov2: epoch {epoch + 1} of {epochs} written", flush=True)


def _losses(predicted, logits, features, attributes, scenes, distilled):  # type: ignore[no-untyped-def]
    device = predicted.device
    regression, scene = masked_losses(predicted, logits, attributes.to(device), scenes.to(device))
    return regression, 0.3 * scene, 2.0 * nn.functional.mse_loss(features.float(), distilled.to(device))


def _distillation_targets(cache: Path, rows: Rows, use: np.ndarray) -> np.ndarray:
    """Principal components of the statistics, measurements, severity per kind: float32 (N, 270), unit-ish."""
    stats = read(cache, "statistics").astype(np.float32)
    stats = (stats - stats[use].mean(0)) / (stats[use].std(0) + 1e-3)
    _, _, vectors = torch.pca_lowrank(torch.from_numpy(stats[use[::4]]), q=_COMPONENTS, center=False)
    components = stats @ vectors.numpy()  # (N, 256), largest first
    components /= np.sqrt(components[use].std(0) * components[use].std(0)[0])  # large ones matter more
    measured = np.log1p(np.asarray(read(cache, "measured")))
    measured = (measured - measured[use].mean(0)) / measured[use].std(0)
    severity = np.zeros((len(rows.kind), len(KINDS)), dtype=np.float32)
    faulty = rows.kind >= 0
    severity[faulty, rows.kind[faulty]] = 4.0 * rows.severity[faulty]
    return np.concatenate([components, measured, severity], axis=1).astype(np.float32)


def _init_patch_embedding(projection: nn.Conv2d, crops: np.ndarray) -> None:
    """Start from principal components of real patches, whitened, half of them; high DCT frequencies for the others.

    Blur and noise live in frequencies that principal components leave out and that training finds slowly.
    """
    pixels = to_input(crops, PREPROCESS, torch.device("cpu"), torch.float32)
    patches = nn.functional.unfold(pixels, PATCH_PX, stride=PATCH_PX).transpose(1, 2).flatten(0, 1)  # (P, 3 * 56 * 56)
    centred = patches - patches.mean(0)
    _, _, components = torch.pca_lowrank(centred, q=WIDTH // 2, center=False)
    position = torch.arange(PATCH_PX)
    dct = torch.cos(math.pi / PATCH_PX * torch.outer(torch.arange(PATCH_PX).float(), position + 0.5))
    high = torch.randint(PATCH_PX // 8, PATCH_PX, (WIDTH - WIDTH // 2, 2))
    waves = torch.einsum("ky,kx->kyx", dct[high[:, 0]], dct[high[:, 1]])
    weights = torch.cat([components.T, waves.unsqueeze(1).expand(-1, 3, -1, -1).flatten(1)])  # (192, 3 * 56 * 56)
    weights = weights / (centred @ weights.T).std(0, keepdim=True).T
    with torch.no_grad():
        projection.weight.copy_(weights.view_as(projection.weight))
        projection.bias.copy_(-(weights @ patches.mean(0)))


def publish(name: str) -> str:
    """The name of a tensor in a file: as `facebook/dinov2-base` has it, which every version of transformers reads."""
    for inside, published in _PUBLISHED.items():
        name = name.replace(inside, published)
    return name


def _write(student: Student, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    student.backbone.config.save_pretrained(folder)
    tensors = {publish(n): v.detach().half().cpu().contiguous() for n, v in student.backbone.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    crop, side = PREPROCESS.crop, SIDE_PX
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": crop.resize_px},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": PREPROCESS.mean,
        "image_std": PREPROCESS.std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", "utf-8")
