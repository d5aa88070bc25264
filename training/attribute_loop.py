"""What each worker of `train_attributes` runs: DINOv2 and the head, or the head alone, under Ray Train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray.train
import ray.train.torch
import torch
from torch import nn

from picinspector.device import pick_dtype, to_input
from picinspector.preprocess import dinov2_preprocess
from training.attribute_data import crop_pixels, vectors_of
from training.attribute_head import AttributeHead, masked_losses
from training.checkpoints import restore, save
from training.folders import Folder

if TYPE_CHECKING:
    from transformers import Dinov2Model

#: Share of the steps in which the learning rates rise: shorter than torch's default of 0.3, as for ViTs.
_RISING = 0.1


@dataclass(frozen=True)
class Plan:
    """What a worker needs to know, the same on all.

    Attributes:
        input_mean, input_scale: (F,) of the head's whole input.
        backbone: folder of the transformers model to fine-tune; None trains the head alone.
        finetune_blocks: how many of its last blocks learn.
        batch_size: of all workers together.
        lr, backbone_lr: peaks of the head's and the backbone's learning rate.
        stop_after_epoch: end after this many of the epochs, as an interruption would.
        out: where the first worker keeps `progress.jsonl`, a line for each epoch.
    """

    input_mean: np.ndarray
    input_scale: np.ndarray
    hidden_dim: int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    dropout: float
    scene_share: float
    seed: int
    out: Folder
    backbone: str | None = None
    finetune_blocks: int = 0
    backbone_lr: float = 0.0
    stop_after_epoch: int | None = None


class Network(nn.Module):
    """The head on stored inputs, or on a backbone's embedding with stored inputs behind it."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.backbone: Dinov2Model | None = None
        if plan.backbone is not None:
            self.backbone = load_backbone(plan.backbone, plan.finetune_blocks)
        self.head = AttributeHead(len(plan.input_mean), plan.hidden_dim, plan.dropout)
        self.head.input.mean.copy_(torch.from_numpy(plan.input_mean))
        self.head.input.scale.copy_(torch.from_numpy(plan.input_scale))

    def forward(self, inputs: torch.Tensor, pixels: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, F) and (B, 3, S, S) or None -> attributes 0-100 (B, 6), scene logits (B, 9)."""
        if self.backbone is not None:
            embedding = self.backbone(pixel_values=pixels).pooler_output.float()
            inputs = torch.cat([nn.functional.normalize(embedding, dim=-1), inputs], dim=1)
        with torch.autocast(inputs.device.type, enabled=False):  # tiny, and its targets are points of 100
            attributes, logits = self.head(inputs)
        return attributes, logits


def load_backbone(folder: str, finetune_blocks: int) -> Dinov2Model:
    """A `Dinov2Model` in float32 of which only the last blocks and the final norm learn."""
    from transformers import Dinov2Model  # seconds, which a head that learns from stored embeddings is spared

    model = Dinov2Model.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    model.requires_grad_(False)
    for block in model.encoder.layer[len(model.encoder.layer) - finetune_blocks :]:
        block.requires_grad_(True)
    model.layernorm.requires_grad_(True)
    return model


@dataclass(frozen=True)
class Shard:
    """A worker's part of a split, in memory: each epoch shuffles it anew without decoding or sending it again.

    Attributes:
        inputs, attributes, scenes: (N, F), (N, 6), (N, 9).
        crops: uint8 (N, S, S, 3), or None.
    """

    inputs: torch.Tensor
    attributes: torch.Tensor
    scenes: torch.Tensor
    crops: np.ndarray | None

    @classmethod
    def read(cls, name: str, side_px: int | None) -> Shard:
        """Read this worker's shard, in the order of `row`."""
        batches = ray.train.get_dataset_shard(name).iter_batches(batch_size=None, batch_format="pyarrow")
        table = pa.concat_tables(batches)
        order = np.argsort(table.column("row").to_numpy(), kind="stable")
        parts = {
            name: torch.from_numpy(vectors_of(table.column(name))[order])
            for name in ("inputs", "attributes", "scenes")
            if name in table.column_names
        }
        crops = crop_pixels(table.column("crop"), side_px)[order] if side_px is not None else None
        inputs = parts.get("inputs", torch.empty(len(order), 0))
        return cls(inputs, parts["attributes"], parts["scenes"], crops)

    def __len__(self) -> int:
        return len(self.inputs)


def train_worker(config: dict[str, Plan]) -> str | None:
    """Train by `config["plan"]`, with a checkpoint after each epoch; goes on from the run's newest checkpoint.

    Returns:
        where it diverged, if it did.
    """
    with config["plan"].out:
        return _train(config["plan"])


def _train(plan: Plan) -> str | None:
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.manual_seed(plan.seed)
    how = dinov2_preprocess(plan.backbone) if plan.backbone is not None else None
    side_px = how.crop.crop_px if how is not None else None
    shard = Shard.read("train", side_px)
    validation = Shard.read("validation", side_px) if rank == 0 else None

    network = Network(plan)
    model = ray.train.torch.prepare_model(network)
    learning = {name: value for name, value in network.named_parameters() if value.requires_grad}
    groups = [
        {"params": [value for name, value in learning.items() if name.startswith(part)], "lr": lr}
        for part, lr in (("head.", plan.lr), ("backbone.", plan.backbone_lr))
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=plan.weight_decay)
    batch_size = max(1, plan.batch_size // world)
    steps = plan.epochs * math.ceil(len(shard) / batch_size)
    peaks = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=_RISING)
    history = restore(network.load_state_dict, optimizer, schedule, device)

    def forward(part: Shard, rows: torch.Tensor, flip: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses of some rows."""
        pixels = None
        if part.crops is not None and how is not None:
            pixels = to_input(part.crops[rows.numpy()], how, device, torch.float32)
            if flip:
                mirrored = (torch.rand(len(rows)) < 0.5).to(device)
                pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
        dtype = pick_dtype(device)
        with torch.autocast(device.type, dtype=dtype, enabled=pixels is not None and dtype != torch.float32):
            predicted, logits = (model if flip else network)(part.inputs[rows].to(device), pixels)
        return masked_losses(predicted, logits, part.attributes[rows].to(device), part.scenes[rows].to(device))

    last = min(plan.epochs, plan.stop_after_epoch or plan.epochs)
    for epoch in range(len(history), last):
        # Drawn from the epoch's own seed, a resumed epoch is the one that was interrupted.
        torch.manual_seed(int(np.random.SeedSequence((plan.seed, epoch, rank)).generate_state(1)[0]))
        model.train()
        sums = torch.zeros(2)
        for rows in torch.randperm(len(shard)).split(batch_size):
            regression, scene = forward(shard, rows, flip=True)
            loss = regression + plan.scene_share * scene
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(list(learning.values()), 1.0)
            optimizer.step()
            schedule.step()
            sums += len(rows) * torch.stack([regression, scene]).detach().cpu()
        if not all(bool(value.isfinite().all()) for value in learning.values()):  # the same on all workers
            return f"weights that are not finite in epoch {epoch + 1}"
        train = (sums / len(shard)).tolist()
        line = {"epoch": epoch + 1, "train_attributes": train[0], "train_scene": train[1]}
        if validation is None:
            ray.train.report({})  # the first worker speaks for all
            continue
        model.eval()
        regression, scene = _validate(forward, validation, batch_size)
        line |= {"validation_attributes": regression, "validation_scene": scene}
        line["validation_loss"] = regression + plan.scene_share * scene
        history.append(line)
        save(network.state_dict(), optimizer, schedule, history, plan.out)
    return None


@torch.no_grad()
def _validate(forward: Any, part: Shard, batch_size: int) -> tuple[float, float]:
    """Both losses, each a mean over all that is known in the split, whatever batch it lies in."""
    known = (~part.attributes.isnan()).sum(dim=1), ~part.scenes.isnan().any(dim=1)
    sums = torch.zeros(2)
    for rows in torch.arange(len(part)).split(batch_size):
        counts = torch.stack([count[rows].sum() for count in known])
        sums += counts * torch.stack(forward(part, rows, False)).cpu()
    regression, scene = (sums / torch.stack([count.sum() for count in known]).clamp_min(1)).tolist()
    return regression, scene
