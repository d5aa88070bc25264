"""What the trainings with torch have in common: how many workers, and checkpoints that others go on from."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint
from safetensors.torch import load_file, save_file

from picinspector import logs
from picinspector.errors import StorageError, UsageError
from training.claims import FAILURES, carry_out
from training.folders import Folder

#: Files of a checkpoint; the last one holds a line for each that was made so far.
MODEL, OPTIMIZER, PROGRESS = "model.safetensors", "optimizer.pt", "progress.json"
_RUN = "checkpoints"

#: A line of the history: what was measured at a checkpoint.
History = list[dict[str, float]]


# --- on the driver ----------------------------------------------------------------------------------------------------


def known_workers(known: Mapping[str, str], workers: int | None) -> int | None:
    """How many workers a training was begun with, where nobody says now; None for a new one."""
    return workers or (int(known["workers"]) if known.get("workers", "").isdigit() else None)


def scale(workers: int | None, cpus: int | None, gpus: float | None) -> ray.train.ScalingConfig:
    """How many workers, and what each holds.

    Args:
        workers: None takes one a GPU of the cluster, else one.
        cpus: of each; None takes one.
        gpus: of each; None takes one where the cluster has any. Where they are not up yet, it has to be said.

    Raises:
        UsageError: there are fewer GPUs than workers, and nobody said that more will come.
    """
    there = float(ray.cluster_resources().get("GPU", 0))
    each = gpus if gpus is not None else min(1.0, there)
    count = workers or max(1, int(there / each) if each else 1)
    if gpus is None and each * count > there:
        raise UsageError(
            f"--workers {count}: the cluster has {there:g} GPUs, and each worker takes one; use fewer, or say with "
            "--gpus-per-worker what each takes: 0 trains on CPUs"
        )
    resources = {"CPU": float(cpus or 1)} | ({"GPU": each} if each else {})
    return ray.train.ScalingConfig(num_workers=count, use_gpu=each > 0, resources_per_worker=resources)


def fit(
    train_worker: Callable[[dict[str, Any]], str | None],
    plan: Any,
    scaling: ray.train.ScalingConfig,
    out: Folder,
    advice: str,
    **data: Any,
) -> tuple[Checkpoint, Checkpoint]:
    """Run the workers; the newest checkpoint and that with the least validation loss.

    Args:
        train_worker: what each runs, on `{"plan": plan}`; says why where the training diverged.
        plan: what it is told.
        scaling: of the workers.
        out: where the checkpoints go.
        advice: to who sees it diverge.
        data: `datasets` and `dataset_config` of Ray Train.

    Raises:
        UsageError: the training diverged.
        PicInspectorError: it fails for another reason.
    """

    def make() -> ray.train.torch.TorchTrainer:
        return ray.train.torch.TorchTrainer(
            train_worker,
            train_loop_config={"plan": plan},
            scaling_config=scaling,
            run_config=ray.train.RunConfig(
                name=_RUN,
                **out.for_ray,
                failure_config=FAILURES,
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=1, checkpoint_score_attribute="validation_loss", checkpoint_score_order="min"
                ),
            ),
            **data,
        )

    result = carry_out(make, out.under(_RUN))
    if result.return_value is not None:
        raise UsageError(f"the training diverged: {result.return_value}; {advice}, and give another --out")
    _show(history_of(result.checkpoint), out)
    return result.checkpoint, result.get_best_checkpoint("validation_loss", "min")


def history_of(checkpoint: Checkpoint) -> History:
    """The lines of all checkpoints up to this one."""
    with checkpoint.as_directory() as folder:
        return list(json.loads((Path(folder) / PROGRESS).read_text("utf-8")))


def show_card(out: str | os.PathLike[str], options: Mapping[str, Any] | None) -> None:
    """Print the card of a training that is done."""
    with Folder(out, options) as folder:
        print((folder.pull("card.md") / "card.md").read_text("utf-8"))


# --- on a worker ------------------------------------------------------------------------------------------------------


def save(tensors: Mapping[str, torch.Tensor], optimizer: Any, schedule: Any, history: History, out: Folder) -> None:
    """Report a checkpoint, and all lines of the history to `progress.jsonl` of a folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, folder / MODEL)
        torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, folder / OPTIMIZER)
        (folder / PROGRESS).write_text(json.dumps(history), "utf-8")
        ray.train.report(history[-1], checkpoint=Checkpoint.from_directory(folder))
    try:
        _show(history, out)
    except StorageError as error:  # it shows how far the training is, and the next one shows it too
        logs.event("progress_not_shown", level=logging.WARNING, reason=str(error))


def _show(history: History, out: Folder) -> None:
    lines = "".join(json.dumps(line) + "\n" for line in history)
    (out.here / "progress.jsonl").write_text(lines, "utf-8")
    out.push("progress.jsonl")


def restore(
    load: Callable[[dict[str, torch.Tensor]], object], optimizer: Any, schedule: Any, device: torch.device
) -> History:
    """Load the run's newest checkpoint, if there is one; the lines of its history."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as name:
        folder = Path(name)
        load(load_file(folder / MODEL, device=str(device)))
        state = torch.load(folder / OPTIMIZER, map_location=device, weights_only=True)
        history: History = json.loads((folder / PROGRESS).read_text("utf-8"))
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return history
