"""Train the multi-task head: six attributes and nine scenes, on stored embeddings or with DINOv2 end to end.

    python -m training.train_attributes --labels labels.parquet --embeddings tables --out FOLDER
    python -m training.train_attributes --labels labels.parquet --bundle builtin --finetune-blocks 2 --out FOLDER

Labels: a CSV, Parquet or Excel table of `uri`, any of mos, brightness, colorfulness, contrast, noisiness, sharpness
(0-100, high is good), `scene` (a name) or `scene_*` (shares), and, where there is one, `split` and `group`; cells may
be empty. Runs on this machine, or where `ray job submit` sends it; there FOLDER must be one that every node sees, or a
prefix of object storage.

FOLDER gets `attributes/` and, after fine-tuning, `dinov2/`: pieces of a bundle; `metrics.json`, `card.md` and plots.
The same command goes on where an earlier one was stopped, and by itself where a node was lost; `progress.jsonl` has a
line for each epoch done.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import ray
import ray.train
import torch
from safetensors.torch import load_file

from picinspector import runs
from picinspector.attributes import AttributeHead, input_matrix
from picinspector.bundle import open_bundle
from picinspector.errors import PicInspectorError, UsageError
from picinspector.preprocess import DINOV2_CONFIG, dinov2_preprocess
from picinspector.storage import StorageOptions, redact
from training import attribute_head as twin
from training.attribute_data import (
    HEAVY_TAILED,
    MEASURED,
    Targets,
    assign_splits,
    attach,
    crop_pixels,
    read_crops,
    read_embeddings,
    read_facts,
    read_targets,
    training_rows,
)
from training.attribute_loop import Plan, load_backbone, train_worker
from training.attribute_report import figures_of, plot_confusion, plot_history, plot_scatter, write_card
from training.checkpoints import MODEL, fit, history_of, known_workers, scale, show_card
from training.claims import check_folder, claim, known_settings
from training.datasets import SPLITS
from training.folders import Folder
from training.sheets import read_whole

#: Photos of one read task, and crops of one encoder call.
_BLOCK_ROWS, _ENCODE_ROWS = 64, 32
#: Written when all crops are there.
_CUT = "crops.json"


@dataclass(frozen=True)
class Settings:
    """What to train; the command line's options under the same names.

    Attributes:
        labels, out: the table, and the folder to fill; paths or URLs.
        embeddings: a destination or Parquet folder; None with `bundle`.
        bundle: name or folder of a bundle, or a transformers folder, whose DINOv2 is fine-tuned.
        mos_scale: the labels' worst and best MOS.
        features: the head's inputs. With `bundle`: `dinov2_embedding`, then any `measured_*`.
    """

    labels: str | os.PathLike[str]
    out: str | os.PathLike[str]
    embeddings: str | None = None
    bundle: str | None = None
    finetune_blocks: int = 0
    mos_scale: tuple[float, float] = (0.0, 100.0)
    features: tuple[str, ...] = ("dinov2_embedding", *MEASURED)
    hidden_dim: int = 128
    epochs: int = 30
    batch_size: int = 256
    lr: float = 3e-3
    backbone_lr: float = 2e-5
    weight_decay: float = 1e-3
    dropout: float = 0.1
    scene_share: float = twin.SCENE_SHARE
    seed: int = 0
    workers: int | None = None
    cpus_per_worker: int | None = None
    gpus_per_worker: float | None = None
    bootstrap: int = 1000

    @property
    def log1p(self) -> tuple[str, ...]:
        """The features that go in as logarithms."""
        return tuple(name for name in self.features if name in HEAVY_TAILED)


@dataclass(frozen=True)
class Prepared:
    """Labels and inputs, matched.

    Attributes:
        rows: of the labels table (N,), those that can be used.
        targets: their labels.
        splits: their splits.
        columns: what is stored of their features, name -> (N,) or (N, D).
        left_out: labelled photos without embeddings, or unreadable.
    """

    rows: np.ndarray
    targets: Targets
    splits: np.ndarray
    columns: dict[str, np.ndarray]
    left_out: int


def train(
    settings: Settings, storage_options: Mapping[str, Any] | None = None, stop_after_epoch: int | None = None
) -> dict[str, Any] | None:
    """Train, or go on training, and write the pieces and the report.

    Args:
        stop_after_epoch: end after this many epochs, without a report; calling again goes on.

    Returns:
        the content of `metrics.json`; None where it stopped before.

    Raises:
        UsageError: labels, features or folders do not fit; the message names which.
    """
    backbone = _check(settings)
    targets = read_targets(settings.labels, settings.mos_scale, storage_options)
    out = Folder(settings.out, storage_options)
    known = known_settings(out)
    runs.connect(dashboard=True)
    scaling = scale(known_workers(known, settings.workers), settings.cpus_per_worker, settings.gpus_per_worker)
    said = _said(settings, scaling.num_workers, storage_options)
    check_folder(out, said)
    # Claimed when the data are known to fit: a mistake leaves no folder behind.
    prepared = _from_embeddings(settings, targets, storage_options) if backbone is None else None
    with claim(out, said) as held:
        if prepared is None:
            assert backbone is not None
            prepared = _from_photos(out, settings, targets, backbone, StorageOptions(storage_options))
        stored = tuple(name for name in settings.features if name in prepared.columns)
        inputs = np.empty((len(prepared.rows), 0), np.float32)
        if stored:
            inputs = input_matrix(prepared.columns, stored, settings.log1p)
        table = training_rows(prepared.rows, prepared.targets, prepared.splits.tolist(), inputs)
        plan = _plan(settings, backbone, inputs[prepared.splits == "train"], out, stop_after_epoch)
        newest, best = _fit(plan, table, out, scaling)
        if stop_after_epoch is not None and stop_after_epoch < settings.epochs:
            return None
        held.check()
        with best.as_directory() as checkpoint:
            _write_pieces(Path(checkpoint), plan, settings, out.here)
        columns = dict(prepared.columns)
        if backbone:
            out.push("dinov2")
            columns["dinov2_embedding"] = _encode(out, prepared.rows, scaling)
        metrics = _report(out.here, settings, prepared, columns, history_of(newest), int(history_of(best)[-1]["epoch"]))
        out.push()
        return metrics


def _check(settings: Settings) -> Path | None:
    """The backbone to fine-tune, or None; what contradicts itself is refused."""
    if (settings.embeddings is None) == (settings.bundle is None):
        raise UsageError("give either --embeddings or --bundle with --finetune-blocks")
    if settings.bundle is None:
        return None
    if settings.finetune_blocks < 1:
        raise UsageError(f"--finetune-blocks {settings.finetune_blocks}: expected 1 or more with --bundle")
    wrong = [name for name in settings.features[1:] if name not in MEASURED]
    if settings.features[:1] != ("dinov2_embedding",) or wrong:
        raise UsageError(
            f"--features {' '.join(settings.features)}: with --bundle it is dinov2_embedding, then any of "
            f"{' '.join(MEASURED)}"
        )
    folder = Path(settings.bundle)
    if not (folder / DINOV2_CONFIG).is_file():
        folder = open_bundle(settings.bundle).piece("dinov2")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if settings.finetune_blocks > config["num_hidden_layers"]:
        raise UsageError(
            f"--finetune-blocks {settings.finetune_blocks}: {folder} has {config['num_hidden_layers']} blocks"
        )
    return folder.absolute()


def _said(settings: Settings, workers: int, options: Mapping[str, Any] | None) -> dict[str, str]:
    """What makes a training the same one."""
    said = {
        name: redact(str(value))
        for name, value in dataclasses.asdict(settings).items()
        if name not in ("out", "bootstrap", "cpus_per_worker", "gpus_per_worker")
    }
    labels = hashlib.sha256(read_whole(settings.labels, options)).hexdigest()
    return said | {"labels": labels, "workers": str(workers)}  # another number deals the photos out otherwise


# --- data -------------------------------------------------------------------------------------------------------------


def _from_embeddings(settings: Settings, targets: Targets, options: Mapping[str, Any] | None) -> Prepared:
    assert settings.embeddings is not None
    rows, columns, phash = read_embeddings(settings.embeddings, targets, settings.features, options)
    kept = targets.take(rows)
    splits = assign_splits(kept, phash, settings.embeddings, settings.seed)
    return Prepared(rows, kept, np.array(splits), columns, len(targets.uris) - len(rows))


def _from_photos(
    out: Folder, settings: Settings, targets: Targets, backbone: Path, options: StorageOptions
) -> Prepared:
    """Cut every photo's crop once, into `out/crops`."""
    if not out.has(_CUT):
        out.delete("crops")
        photos = pa.table({"row": pa.array(range(len(targets.uris)), pa.int64()), "uri": targets.uris})
        blocks = [photos.slice(start, _BLOCK_ROWS) for start in range(0, photos.num_rows, _BLOCK_ROWS)]
        ray.data.from_arrow(blocks).map_batches(
            read_crops,
            batch_format="pyarrow",
            batch_size=_BLOCK_ROWS // 4,
            fn_kwargs={"crop": dinov2_preprocess(backbone).crop, "options": options},
        ).write_parquet(out.path("crops"), filesystem=out.filesystem)
        (out.here / _CUT).write_text(json.dumps({"photos": photos.num_rows}) + "\n", "utf-8")
        out.push(_CUT)
    crops = pa.dataset.dataset(out.path("crops"), filesystem=out.filesystem, format="parquet")
    rows, columns, phash = read_facts(crops, targets)
    kept = targets.take(rows)
    splits = assign_splits(kept, phash, str(out), settings.seed)
    measured = {name: columns[name] for name in settings.features if name in columns}
    return Prepared(rows, kept, np.array(splits), measured, len(targets.uris) - len(rows))


def _read_crops(out: Folder) -> ray.data.Dataset:
    return ray.data.read_parquet(out.path("crops"), filesystem=out.filesystem, columns=["row", "crop"])


def _plan(settings: Settings, backbone: Path | None, inputs: np.ndarray, out: Folder, stop: int | None) -> Plan:
    """The plan of the workers; the inputs' statistics are those of the train split."""
    standardise = twin.Standardise(inputs.shape[1])
    if inputs.shape[1]:
        standardise.fit(inputs)
    mean, scale = standardise.mean.numpy(), standardise.scale.numpy()
    if backbone is not None:
        width = int(json.loads((backbone / "config.json").read_text("utf-8"))["hidden_size"])
        # The entries of an L2-normalised vector, whose statistics move while the backbone learns.
        mean = np.concatenate([np.zeros(width, np.float32), mean])
        scale = np.concatenate([np.full(width, width**-0.5, np.float32), scale])
    names = {field.name for field in dataclasses.fields(Plan)} & {field.name for field in dataclasses.fields(Settings)}
    return Plan(
        input_mean=mean,
        input_scale=scale,
        backbone=str(backbone) if backbone else None,
        stop_after_epoch=stop,
        out=out,
        **{name: getattr(settings, name) for name in names - {"out"}},
    )


# --- training ---------------------------------------------------------------------------------------------------------


def _fit(
    plan: Plan, table: pa.Table, out: Folder, scaling: ray.train.ScalingConfig
) -> tuple[ray.train.Checkpoint, ...]:
    """Run the workers; the newest checkpoint and that with the least validation loss."""
    parts = {name: table.filter(pa.compute.equal(table.column("split"), name)) for name in ("train", "validation")}
    rows = parts["train"].num_rows
    if rows < scaling.num_workers:
        raise UsageError(f"--workers {scaling.num_workers}: there are {rows} photos to train on; use fewer workers")
    if plan.backbone is None:
        datasets = {name: ray.data.from_arrow(part) for name, part in parts.items()}
    else:
        datasets = {
            name: _read_crops(out).map_batches(attach, batch_format="pyarrow", batch_size=_BLOCK_ROWS, fn_args=(part,))
            for name, part in parts.items()
        }
    return fit(
        train_worker,
        plan,
        scaling,
        out,
        "lower --lr or --backbone-lr",
        datasets=datasets,
        # In order, so that a seed gives each worker the same photos again.
        dataset_config=ray.train.DataConfig(
            datasets_to_split=["train"], execution_options=ray.data.ExecutionOptions(preserve_order=True)
        ),
    )


def _write_pieces(checkpoint: Path, plan: Plan, settings: Settings, out: Path) -> None:
    """Write `attributes/` and, where it learnt, `dinov2/`."""
    tensors = load_file(checkpoint / MODEL)
    head = twin.AttributeHead(len(plan.input_mean), plan.hidden_dim)
    head.load_state_dict(
        {name.removeprefix("head."): value for name, value in tensors.items() if name.startswith("head.")}
    )
    twin.write_head(head, settings.features, settings.log1p, out / "attributes")
    if plan.backbone is not None:
        model = load_backbone(plan.backbone, plan.finetune_blocks)
        prefix = "backbone."
        model.load_state_dict({name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)})
        # Not the state_dict: transformers publishes its tensors under other names than it uses inside.
        model.half().save_pretrained(out / "dinov2")
        shutil.copyfile(Path(plan.backbone) / DINOV2_CONFIG, out / "dinov2" / DINOV2_CONFIG)


class EncodeCrops:
    """The Ray Data stage that embeds crops with the fine-tuned model, as a run will."""

    def __init__(self, out: Folder) -> None:
        with out:
            from picinspector.dinov2 import Dinov2Encoder

            self._encoder = Dinov2Encoder(out.pull("dinov2") / "dinov2")

    def __call__(self, batch: pa.Table) -> pa.Table:
        """`row`, `crop` to `row`, `embedding`; rows without a crop are left out."""
        good = batch.filter(pa.compute.is_valid(batch.column("crop")))
        embedding = np.empty((0, self._encoder.dim), np.float16)
        if good.num_rows:
            embedding = self._encoder.encode(crop_pixels(good.column("crop"), self._encoder.crop.crop_px))
        flat = pa.array(embedding.reshape(-1), pa.float16())
        vectors = pa.FixedSizeListArray.from_arrays(flat, self._encoder.dim)
        return pa.table({"row": good.column("row"), "embedding": vectors})


def _encode(out: Folder, rows: np.ndarray, scaling: ray.train.ScalingConfig) -> np.ndarray:
    """The fine-tuned embeddings of these rows: float16 (N, D)."""
    gpus = scaling.num_gpus_per_worker
    encoded = _read_crops(out).map_batches(
        EncodeCrops,
        fn_constructor_args=(out,),
        batch_format="pyarrow",
        batch_size=_ENCODE_ROWS,
        num_gpus=gpus,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=scaling.num_workers if gpus else 1),
    )
    table = pa.concat_tables(encoded.iter_batches(batch_size=None, batch_format="pyarrow")).sort_by("row")
    if table.column("row").to_pylist() != rows.tolist():
        raise RuntimeError(f"{table.num_rows} crops were encoded for {len(rows)} photos")
    vectors = table.column("embedding").combine_chunks()
    return np.asarray(vectors.flatten().to_numpy(zero_copy_only=False)).reshape(len(rows), -1)


# --- report -----------------------------------------------------------------------------------------------------------


def _report(
    out: Path,
    settings: Settings,
    prepared: Prepared,
    columns: Mapping[str, np.ndarray],
    history: list[dict[str, float]],
    best_epoch: int,
) -> dict[str, Any]:
    """Measure the files that were written, on every split."""
    predicted, probabilities = AttributeHead(out / "attributes").predict(columns)
    labels, scenes = prepared.targets.attributes, prepared.targets.scenes
    mine = {split: prepared.splits == split for split in SPLITS if split in prepared.splits}
    figures = {
        split: figures_of(predicted[rows], probabilities[rows], labels[rows], scenes[rows], settings.bootstrap)
        for split, rows in mine.items()
    }
    counts = {split: int((prepared.splits == split).sum()) for split in SPLITS}
    metrics = {
        "settings": _public(settings),
        "features": settings.features,
        "photos": counts | {"left_out": prepared.left_out},
        "best_epoch": best_epoch,
        "history": history,
        "splits": figures,
        "versions": {"torch": torch.__version__, "ray": ray.__version__},
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", "utf-8")
    shown = "test" if "test" in mine else "validation"
    for index, name in enumerate(twin.ATTRIBUTES):
        rows = mine[shown] & ~np.isnan(labels[:, index])
        if rows.any():
            plot_scatter(predicted[rows, index], labels[rows, index], name, out / f"scatter_{name}.png")
    if "scene" in figures[shown]:
        plot_confusion(np.array(figures[shown]["scene"]["confusion"]), out / "scene_confusion.png")
    plot_history(history, out / "history.png")
    write_card(out / "card.md", metrics)
    return metrics


def _public(settings: Settings) -> dict[str, Any]:
    """The settings for a report that others read: of files and folders their names only, not where they lie here."""
    values = dataclasses.asdict(settings)
    places = ("labels", "out", "embeddings", "bundle")
    return values | {name: Path(values[name]).name for name in places if values[name] is not None}


# --- command line -----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> tuple[Settings, argparse.Namespace]:
    """The settings a command line asks for, and the options that are no settings of the training."""
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", required=True, help="CSV, Parquet or Excel table: a file or s3://...")
    parser.add_argument("--out", required=True, help="new folder, on a cluster one that every node sees; or s3://...")
    parser.add_argument("--embeddings", help="where `picinspector score` wrote, or Parquet: train the head on it")
    parser.add_argument("--bundle", help="name or folder of a bundle, or a DINOv2 folder: train it end to end")
    parser.add_argument("--finetune-blocks", type=int, default=0, help="how many of its last blocks learn")
    parser.add_argument("--mos-scale", type=float, nargs=2, default=(0.0, 100.0), metavar=("WORST", "BEST"))
    parser.add_argument("--features", nargs="+", default=defaults["features"], help="columns the head reads")
    parser.add_argument("--workers", type=int, help="default: one a GPU, else one")
    parser.add_argument("--cpus-per-worker", type=int, help="what each holds, and its threads; default 1")
    parser.add_argument("--gpus-per-worker", type=float, help="may be a fraction; default: one where there are any")
    numbers = {
        "hidden-dim": int,
        "epochs": int,
        "batch-size": int,
        "lr": float,
        "backbone-lr": float,
    }
    numbers |= {"weight-decay": float, "dropout": float, "scene-share": float, "seed": int, "bootstrap": int}
    for name, kind in numbers.items():
        default = defaults[name.replace("-", "_")]
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"default {default}")
    parser.add_argument("--storage-options", type=json.loads, help="JSON for fsspec")
    parser.add_argument("--stop-after-epoch", type=int, help="stop early; the command without it goes on")
    args = parser.parse_args(arguments)
    values = {name: getattr(args, name) for name in defaults}
    values |= {"mos_scale": tuple(args.mos_scale), "features": tuple(args.features)}
    return Settings(**values), args


def main() -> None:
    """Parse the command line, train, and print the card."""
    settings, args = parse()
    try:
        metrics = train(settings, args.storage_options, args.stop_after_epoch)
        if metrics is None:
            done = f"stopped after epoch {args.stop_after_epoch} of {settings.epochs}"
            print(f"{redact(str(settings.out))}: {done}", file=sys.stderr)
        else:
            show_card(settings.out, args.storage_options)
    except PicInspectorError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
