"""What each worker of `train_captioner` runs: next-token loss of captions, under Ray Train."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray.train
import ray.train.torch
import torch
from torch import nn

from picinspector.captioner import answer, load_captioner, prompt
from picinspector.device import pick_dtype, to_input
from picinspector.preprocess import captioner_preprocess
from picinspector.schema import ATTRIBUTES, SCENES
from picinspector.wording import Facts, compose, tell
from training.captioner_model import QUESTION, QUESTION_WITH_FACTS
from training.checkpoints import restore, save
from training.folders import Folder

_RISING = 0.05
_IGNORED = -100
#: Weight of the scene in the reader's loss; a cross-entropy starts at 2, the rest at 0.4.
_SCENE_SHARE = 0.15
#: Photos of the validation split that a checkpoint is judged by, at most.
_VALIDATION_PHOTOS = 512


@dataclass(frozen=True)
class Plan:
    """What a worker needs to know, the same on all.

    Attributes:
        base: captioner folder to begin with.
        data: folder of `training.caption_data`.
        steps: optimiser steps.
        batch_size: of all workers together.
        lr, vision_lr: peaks for the decoder and connector, or LoRA matrices, and for the vision transformer; 0 freezes
            it.
        lora_rank: of the adapter on the decoder's query and value projections; 0 trains the whole decoder.
        look_steps: of the steps, the first so many, in which vision and connector learn alone, by what a small network
            reads of the facts from the image tokens: next-token loss alone teaches a small captioner to write long
            before it teaches it to look.
        look_batch_size: of all workers together, in those.
        look_share: weight of that loss in the other steps.
        told_share: share of the samples whose prompt holds the facts, as the caption stage gives them.
        threads: of a worker on the CPU.
        checkpoint_steps: steps from one checkpoint, and validation, to the next.
        stop_after_step: end at the first checkpoint at or after this step, as an interruption would.
        out: where the first worker keeps `progress.jsonl`, a line for each checkpoint.
    """

    base: Folder
    data: Folder
    steps: int
    batch_size: int
    lr: float
    vision_lr: float
    lora_rank: int
    look_steps: int
    look_batch_size: int
    look_share: float
    told_share: float
    weight_decay: float
    checkpoint_steps: int
    seed: int
    threads: int
    out: Folder
    stop_after_step: int | None = None


class Captions:
    """Photos and what may be said of them, from a folder of `training.caption_data`.

    Attributes:
        side_px: side of the crops.
        split: (N,) of `train` and `validation`.
        facts: of each photo; None where a person wrote the text.
    """

    def __init__(self, data: str | Path) -> None:
        table = pq.read_table(Path(data) / "facts.parquet")
        self._crops: np.ndarray = np.load(Path(data) / "crops.npy", mmap_mode="r")
        self._rows = table.column("row").to_numpy()
        self.side_px = int(self._crops.shape[1])
        self.split = np.array(table.column("split").to_pylist())
        columns = table.to_pydict()
        self._texts: list[str | None] = columns.get("text", [None] * table.num_rows)
        self.facts = [None if self._texts[row] is not None else _facts(columns, row) for row in range(table.num_rows)]

    def crops(self, rows: np.ndarray) -> np.ndarray:
        """The crops of these photos: uint8 (B, S, S, 3)."""
        return np.asarray(self._crops[self._rows[rows]])

    def seen(self, rows: np.ndarray) -> np.ndarray:
        """What the reader must find: attributes and luma, centred and of about unit scale, scenes: float32 (B, 16)."""
        found = [self.facts[row] for row in rows.tolist()]
        return np.array(
            [
                [*((value - 50) / 20 for value in fact.attributes.values()), (fact.luma - 0.45) * 5,
                 *fact.scenes.values()]
                for fact in found if fact is not None
            ], dtype=np.float32,
        )  # fmt: skip

    def text(self, row: int, seed: int) -> str:
        """What a person wrote, or a text composed from the facts in a wording drawn by `seed`."""
        text, facts = self._texts[row], self.facts[row]
        if text is not None or facts is None:
            return text or ""
        return compose(facts, seed)

    def question(self, row: int, told: bool) -> str:
        """What to ask of a photo, with its facts or without."""
        facts = self.facts[row]
        return QUESTION_WITH_FACTS.format(facts=tell(facts)) if told and facts is not None else QUESTION

    def __len__(self) -> int:
        return len(self.split)


def _facts(columns: dict[str, list[Any]], row: int) -> Facts:
    return Facts(
        {name: columns[f"attribute_{name}"][row] for name in ATTRIBUTES},
        {name: columns[f"scene_{name}"][row] for name in SCENES},
        columns["measured_brightness"][row],
    )


def learn(model: nn.Module, plan: Plan) -> nn.Module:
    """The model with what shall learn marked: an adapter and the connector, or everything; the vision as planned."""
    if plan.lora_rank:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=plan.lora_rank,
            lora_alpha=2 * plan.lora_rank,
            target_modules=r".*text_model.*\.(q_proj|v_proj)",  # Hu et al. 2021 (LoRA), section 4.2
            modules_to_save=["connector"],
        )
        return get_peft_model(model, lora)  # type: ignore[no-any-return, arg-type]
    for name, value in model.named_parameters():
        value.requires_grad_("vision_model" not in name or plan.vision_lr > 0)
    return model


class Learner(nn.Module):
    """A captioner, and beside it a network that reads facts from its image tokens, dropped after training."""

    def __init__(self, captioner: nn.Module, looks: bool) -> None:
        super().__init__()
        self.captioner = captioner
        self.reader: nn.Module | None = None
        if looks:
            config = captioner.config
            side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
            width = config.text_config.hidden_size
            outputs = len(ATTRIBUTES) + 1 + len(SCENES)
            self.reader = nn.Sequential(
                nn.GELU(), nn.Flatten(), nn.Linear(side**2 * width, width), nn.GELU(), nn.Linear(width, outputs)
            )

    def forward(
        self, pixels: torch.Tensor, seen: torch.Tensor | None, share: float, tokens: dict[str, torch.Tensor] | None
    ) -> torch.Tensor:
        """The loss of a batch.

        Args:
            pixels: (B, 3, S, S).
            seen: (B, 16) from `Captions.seen`; None leaves the reader out.
            share: weight of the reader's loss.
            tokens: what `_batch` gives; None for the reader's loss alone.
        """
        if seen is None or self.reader is None:
            return self.captioner(pixel_values=pixels.unsqueeze(1), **(tokens or {})).loss
        image = self.captioner.model.get_image_features(pixels.unsqueeze(1))
        read = self.reader(torch.stack(list(image.pooler_output)))  # (B, 16)
        numbers = len(ATTRIBUTES) + 1
        loss = nn.functional.smooth_l1_loss(read[:, :numbers].float(), seen[:, :numbers])
        loss = share * (loss + _SCENE_SHARE * nn.functional.cross_entropy(read[:, numbers:].float(), seen[:, numbers:]))
        if tokens is None:
            return loss
        return loss + self.captioner(mm_encoder_outputs={"image": image}, **tokens).loss


def train_worker(config: dict[str, Plan]) -> str | None:
    """Train by `config["plan"]`; goes on from the run's newest checkpoint.

    Returns:
        where it diverged, if it did.
    """
    plan = config["plan"]
    with plan.base, plan.data, plan.out:
        return _train(plan)


def _train(plan: Plan) -> str | None:
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(plan.threads)
    torch.manual_seed(plan.seed)
    folder = plan.base.pull()
    base, tokenizer = load_captioner(folder, torch.device("cpu"), torch.float32)
    network = learn(base, plan).to(device)
    how, data = captioner_preprocess(folder), Captions(plan.data.pull("facts.parquet", "crops.npy"))
    learner = Learner(network, looks=not plan.lora_rank and all(fact is not None for fact in data.facts)).to(device)
    # Not every step uses every part: the first ones leave the decoder out.
    model = ray.train.torch.prepare_model(learner, parallel_strategy_kwargs={"find_unused_parameters": True})

    learning = {name: value for name, value in learner.named_parameters() if value.requires_grad}
    groups = [
        {"params": [v for n, v in learning.items() if ("vision_model" in n) == vision and (v.ndim > 1) == wide],
         "lr": plan.vision_lr if vision else plan.lr, "weight_decay": plan.weight_decay if wide else 0.0}
        for vision in (False, True) for wide in (False, True)
    ]  # fmt: skip
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    peaks = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peaks, total_steps=plan.steps, pct_start=_RISING, cycle_momentum=False
    )
    history = restore(lambda saved: load_weights(learning, saved), optimizer, schedule, device)
    dtype = pick_dtype(device)

    parts = 2 if how.crop.mode == "foveated" else 1

    def loss_of(rows: np.ndarray, seeds: np.ndarray, told: np.ndarray | None) -> torch.Tensor:
        """Of a step; one of the first ones where `told` is None."""
        tokens = None
        if told is not None:
            batch = _batch(data, tokenizer, base.config, rows, seeds, told)
            tokens = {name: value.to(device) for name, value in batch.items()}
        pixels = to_input(data.crops(rows), how, device, torch.float32)
        mirrored = torch.from_numpy(seeds % 2 == 0).to(device)
        pixels = torch.where(mirrored[:, None, None, None], _mirror(pixels, parts), pixels)
        seen = torch.from_numpy(data.seen(rows)).to(device) if learner.reader is not None else None
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss: torch.Tensor = model(pixels, seen, plan.look_share if tokens is not None else 1.0, tokens)
        return loss

    def validation_loss(rows: np.ndarray) -> torch.Tensor:
        batch = _batch(data, tokenizer, base.config, rows, rows, rows % 2 == 0)  # half of the photos told, half not
        tokens = {name: value.to(device) for name, value in batch.items()}
        pixels = to_input(data.crops(rows), how, device, torch.float32)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss: torch.Tensor = learner(pixels, None, 0.0, tokens)
        return loss

    train = np.flatnonzero(data.split == "train")
    validation = np.flatnonzero(data.split == "validation")
    validation = np.sort(np.random.default_rng(plan.seed).permutation(validation)[:_VALIDATION_PHOTOS])
    batch_size = max(1, plan.batch_size // world)
    look_size = max(1, plan.look_batch_size // world)
    first = int(history[-1]["step"]) if history else 0
    losses: list[float] = []
    started, photos = time.monotonic(), 0
    for step in range(first, plan.steps):
        # Drawn from the step's own seed, a resumed step is the one that was interrupted.
        rng = np.random.default_rng((plan.seed, step, rank))
        looks = step < plan.look_steps
        size = look_size if looks else batch_size
        rows, seeds = np.sort(rng.choice(train, size)), rng.integers(0, 2**31, size)
        learner.train()
        loss = loss_of(rows, seeds, None if looks else rng.random(size) < plan.told_share)
        photos += size * world
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(list(learning.values()), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        done = step + 1
        if done % plan.checkpoint_steps and done != plan.steps:
            continue
        if not all(bool(value.isfinite().all()) for value in learning.values()):  # the same on all workers
            return f"weights that are not finite before step {done}"
        if rank:
            ray.train.report({})  # the first worker speaks for all
        else:
            learner.eval()
            line = {"step": done, "train_loss": float(np.mean(losses))}
            line["photos_per_s"] = photos / (time.monotonic() - started)
            line["validation_loss"] = _validate(validation_loss, validation, batch_size)
            history.append(line)
            save(learning, optimizer, schedule, history, plan.out)
        losses = []
        if plan.stop_after_step is not None and done >= plan.stop_after_step:
            break
    return None


def _mirror(pixels: torch.Tensor, parts: int) -> torch.Tensor:
    """Pixels (B, 3, S, S) mirrored left to right within each of `parts` columns."""
    folded = pixels.unflatten(3, (parts, -1))
    return folded.flip(4).flatten(3)


@torch.no_grad()
def _validate(loss_of: Any, rows: np.ndarray, batch_size: int) -> float:
    """Mean loss of photos that are not trained on, each with one fixed wording."""
    sums = 0.0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        sums += len(part) * float(loss_of(part))
    return sums / max(1, len(rows))


def _batch(
    data: Captions, tokenizer: Any, config: Any, rows: np.ndarray, seeds: np.ndarray, told: np.ndarray
) -> dict[str, torch.Tensor]:
    """Tokens (B, L), padded on the right; labels are the answers' tokens, `_IGNORED` elsewhere."""
    parts = []
    for row, seed, is_told in zip(rows.tolist(), seeds.tolist(), told.tolist(), strict=True):
        asked = tokenizer(prompt(data.question(row, is_told), config), add_special_tokens=False).input_ids
        said = tokenizer(answer(data.text(row, seed)), add_special_tokens=False).input_ids
        parts.append((asked, said))
    length = max(len(asked) + len(said) for asked, said in parts)
    tokens = torch.full((len(parts), length), tokenizer.pad_token_id)
    labels = torch.full((len(parts), length), _IGNORED)
    mask = torch.zeros((len(parts), length), dtype=torch.long)
    for index, (asked, said) in enumerate(parts):
        end = len(asked) + len(said)
        tokens[index, :end] = torch.tensor(asked + said)
        labels[index, len(asked) : end] = torch.tensor(said)
        mask[index, :end] = 1
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask}


def load_weights(learning: Mapping[str, nn.Parameter], saved: Mapping[str, torch.Tensor]) -> None:
    """Put a checkpoint's weights into what learns."""
    with torch.no_grad():
        for name, value in learning.items():
            value.copy_(saved[name])
