"""The ratios that a change may break, in under five minutes: `make bench-quick`.

Each has a floor, what is held to be needed of it, and fails only where it falls short by more than the margin: a rented
machine moves a ratio of short measurements that much by itself. Not a test: run it on a machine that does nothing else.
"""

from __future__ import annotations

import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import lightgbm
import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from benchmarks import libraries, pipeline, ratios
from benchmarks.rescore import make_rows
from picinspector.attributes import AttributeHead
from picinspector.bundle import open_bundle
from picinspector.clip import ClipEncoder
from picinspector.device import Cores
from picinspector.manifest import list_library
from picinspector.photo import Limits
from picinspector.scorer import Scorer, feature_matrix, to_array
from picinspector.stages.read import crops_of, read_photos
from picinspector.stages.score import Score, score_columns

#: A fifth below its floor a ratio is broken.
_MARGIN = 0.2


def main() -> None:
    """Measure, print, and end with 1 where a ratio is broken."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        rows = [reading(scratch), encoding(scratch), scoring(), *whole(scratch)]
    ratios.show(f"bench-quick, margin {_MARGIN:.0%}", rows)
    print(f"\n{time.perf_counter() - started:.0f} s")
    broken = [row for row in rows if row.target is not None and row.median < row.target * (1 - _MARGIN)]
    for row in broken:
        print(f"broken: {row.what} is {row.median:.2f}, its floor {row.target:g}", file=sys.stderr)
    sys.exit(bool(broken))


def reading(scratch: Path) -> ratios.Row:
    """One process reads 12 megapixels: decode, measure, hash, cut; against Pillow's full decode and two resizes."""
    files = pa.concat_tables(list_library(str(libraries.make(scratch / "12mp", 12, "12mp"))))
    crops, torch_threads = crops_of(open_bundle("builtin")), torch.get_num_threads()

    def plain() -> None:
        for uri in files.column("uri").to_pylist():
            with Image.open(io.BytesIO(Path(uri).read_bytes())) as image:
                photo = image.convert("RGB")
            for side in (512, 448):
                photo.resize((side * photo.width // photo.height, side), Image.Resampling.BICUBIC)

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    measured = _rates({"ours": lambda: read_photos(files, crops, Limits()), "plain": plain}, files.num_rows)
    torch.set_num_threads(torch_threads)
    return ratios.Row("reading over Pillow, 12 megapixels", ratios.over(measured, "ours", "plain"), 3.5)


def encoding(scratch: Path) -> ratios.Row:
    """The builtin CLIP tower: crops for each core, against one call with all threads for a batch of 32."""
    encoder = ClipEncoder(open_bundle("builtin").piece("clip"))
    crops = np.random.default_rng(0).integers(0, 256, (32, *2 * (encoder.crop.crop_px,), 3), dtype=np.uint8)
    cores = Cores(ratios.cores())
    contenders = {"parts": lambda: cores.map([(encoder.encode, crops)]), "whole": lambda: encoder.encode(crops)}
    return ratios.Row(
        "encoding by parts over whole batches", ratios.over(_rates(contenders, 32), "parts", "whole"), 1.2
    )


def scoring() -> ratios.Row:
    """The whole score stage, words and all, against LightGBM alone on the same rows."""
    bundle = open_bundle("builtin")
    piece, stage = bundle.piece("scorer"), Score("builtin")
    scorer, booster = Scorer(piece), lightgbm.Booster(model_file=str(piece / "model.txt"))
    table = make_rows(0, 8192, AttributeHead(bundle.piece("attributes")), bundle).select(score_columns(bundle))
    matrix = feature_matrix({name: to_array(table.column(name)) for name in scorer.features}, scorer.features)
    contenders = {"stage": lambda: stage(table), "bare": lambda: booster.predict(matrix, num_threads=1)}
    measured = _rates(contenders, 8192, time.process_time)  # its products may take more threads than one
    return ratios.Row("score stage over bare LightGBM, CPU time", ratios.over(measured, "stage", "bare"), 0.4)


def whole(scratch: Path) -> list[ratios.Row]:
    """The job on 2 megapixels, against what its parts allow together on the same cores."""
    _, together, _ = pipeline.measure(None, "2mp", "builtin", scratch, 96, 384, rounds=1)
    return [ratios.Row("job over both its parts", together.ratios, 0.8, figures=together.figures)]


def _rates(
    contenders: Mapping[str, Callable[[], object]], units: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    def timed(work: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            started = clock()
            work()
            return units / (clock() - started)

        run()
        return run

    measured = ratios.take_turns({name: timed(work) for name, work in contenders.items()}, rounds=5)
    print({name: round(statistics.median(values), 1) for name, values in measured.items()}, file=sys.stderr)
    return measured


if __name__ == "__main__":
    main()
