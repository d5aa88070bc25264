"""One GPU, from local JPEGs to the table, CLIP ViT-L/14 and DINOv2-base: `python -m benchmarks.gpu`.

Wants a GPU and says so without one. Beside the best matrix product of the same run it is held against the floor that
NeMo Curator's nightly benchmark publishes for CLIP ViT-L/14 with an aesthetics head: 112 images/s a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import encoders, full_size, libraries, ratios
from benchmarks.pipeline import job, paths
from picinspector import pipeline, runs
from picinspector.tables import Destination

#: Images a second of one GPU (see above), and how many times that is wanted.
_FLOOR, _TIMES = 112.0, 5.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=8000, help="of the long run; the short one has a fifth")
    parser.add_argument("--size", default="2mp", choices=list(libraries.SIZES))
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128], help="one or more to try")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where models and photos are made, and kept")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: torch sees no GPU here; run it on a machine with one")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.scratch or Path(temporary)
        bundle = full_size.make(scratch / "full")
        encoders.measure(bundle, arguments.rounds)
        files = paths(
            libraries.make(scratch / f"{arguments.size}-{arguments.photos}", arguments.photos, arguments.size)
        )
        runs.connect()
        for batch_size in arguments.batch_size:
            options = pipeline.Options(bundle=str(bundle), batch_size=batch_size, show_progress=False)
            _measure(bundle, files, options, scratch, arguments.rounds)


def _measure(bundle: Path, files: list[str], options: pipeline.Options, scratch: Path, rounds: int) -> None:
    run = job(files, len(files) // 5, len(files), options, scratch)
    measured = ratios.take_turns({"product": encoders.best_product, "job": run}, rounds)
    busy = Destination(scratch / "tables").runs()[-1]["stages"]["encode"]["use"]
    tflop = sum(encoders.tflop(encoder) for encoder in encoders.load(bundle).values())
    rows = [
        ratios.Row(
            "FLOP/s of the job over the best product",
            [rate * tflop / best for rate, best in zip(measured["job"], measured["product"], strict=True)],
            0.40,
            figures=f"{statistics.median(measured['job']):.0f} photos/s, {tflop * 1000:.0f} GFLOP a photo",
        ),
        ratios.Row("encode stage busy (last run)", [busy], 0.90),
        ratios.Row(f"job over {_FLOOR:g} images/s", [rate / _FLOOR for rate in measured["job"]], _TIMES),
    ]
    ratios.show(f"one GPU, batch {options.batch_size}, {len(files)} photos, {rounds} rounds", rows)


if __name__ == "__main__":
    main()
