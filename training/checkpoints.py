"""What the trainings with torch have in common: a folder for each, checkpoints to go on from, nodes that are lost."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint
from safetensors.torch import load_file, save_file

from picinspector.errors import UsageError
from training.folders import Folder

#: Files of a checkpoint; the last one holds a line for each that was made so far.
MODEL, OPTIMIZER, PROGRESS = "model.safetensors", "optimizer.pt", "progress.json"
#: Says which training a folder holds.
_SETTINGS = "settings.json"
#: Workers that die are started anew so often, on what nodes there are, and go on from the newest checkpoint. Nodes that
#: a cloud takes back with a warning do not count.
_FAILURES = ray.train.FailureConfig(max_failures=8)

#: A line of the history: what was measured at a checkpoint.
History = list[dict[str, float]]


# --- on the driver ----------------------------------------------------------------------------------------------------


def check_folder(out: Folder, said: Mapping[str, str]) -> None:
    """Refuse a folder that holds another training, or other things.

    Args:
        out: the folder.
        said: what makes a training the same one.
    """
    if out.has(_SETTINGS):
        known = json.loads((out.pull(_SETTINGS) / _SETTINGS).read_text("utf-8"))
        other = next((name for name in said if said[name] != known.get(name)), None)
        if other is not None:
            raise UsageError(
                f"{out} holds a training with another {other} ({known.get(other)}, now {said[other]}): "
                "repeat its command to go on with it, or give another --out"
            )
    elif not out.is_empty():
        raise UsageError(f"{out} is not empty and holds no training; give a new or an empty --out")


def claim(out: Folder, said: Mapping[str, str]) -> None:
    """Make the folder this training's own."""
    out.here.mkdir(parents=True, exist_ok=True)
    (out.here / _SETTINGS).write_text(json.dumps(said, indent=2) + "\n", "utf-8")
    out.push(_SETTINGS)


def scale(workers: int | None, cpus: int, gpus: float | None) -> ray.train.ScalingConfig:
    """How many workers, and what each holds.

    Args:
        workers: None takes one a GPU of the cluster, else one.
        cpus: of each.
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
    resources = {"CPU": float(cpus)} | ({"GPU": each} if each else {})
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
    """
    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"plan": plan},
        scaling_config=scaling,
        run_config=ray.train.RunConfig(
            name="checkpoints",
            **out.for_ray,
            failure_config=_FAILURES,
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="validation_loss", checkpoint_score_order="min"
            ),
        ),
        **data,
    )
    result = trainer.fit()
    if result.return_value is not None:
        raise UsageError(f"the training diverged: {result.return_value}; {advice}, and give another --out")
    return result.checkpoint, result.get_best_checkpoint("validation_loss", "min")


def history_of(checkpoint: Checkpoint) -> History:
    """The lines of all checkpoints up to this one."""
    with checkpoint.as_directory() as folder:
        return list(json.loads((Path(folder) / PROGRESS).read_text("utf-8")))


# --- on a worker ------------------------------------------------------------------------------------------------------


def save(tensors: Mapping[str, torch.Tensor], optimizer: Any, schedule: Any, history: History, out: Folder) -> None:
    """Report a checkpoint, and all lines of the history to `progress.jsonl` of a folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, folder / MODEL)
        torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, folder / OPTIMIZER)
        (folder / PROGRESS).write_text(json.dumps(history), "utf-8")
        ray.train.report(history[-1], checkpoint=Checkpoint.from_directory(folder))
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
