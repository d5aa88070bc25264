"""The same work by several tools: both encoders of the builtin bundle over a folder of JPEGs, to a Parquet table.

Each module is what a competent user of its tool would write, and runs as `python -m benchmarks.contenders.NAME LIBRARY
OUT`. It answers with one line of JSON: photos done, and seconds from the first work to the table written. The clock
starts when the process has imported what it needs; a cluster's start, models' loading and workers' imports are inside.

The table has the file's name or path and both embeddings. `ours` also measures, hashes, reads EXIF, scores, and checks
and commits its tables; the others are spared that. What is no part of a tool is the same for all: the encoders
(`picinspector.clip`, `picinspector.dinov2`, in the precision they choose), 32 photos a batch, and one crop for both
encoders, which in this bundle ask for the same one. Only `one_by_one` works as the origin did.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from picinspector.bundle import open_bundle

BATCH_SIZE = 32
_BUNDLE = open_bundle("builtin")
CLIP_FOLDER, DINOV2_FOLDER = _BUNDLE.folder / "clip", _BUNDLE.folder / "dinov2"


def run(work: Callable[[Path, Path], int]) -> None:
    """Time a contender's work, from the folders of the command line, and print what it did.

    Args:
        work: is given the library and a folder for the table; returns how many photos it did.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("library", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    started = time.perf_counter()
    photos = work(arguments.library.resolve(), arguments.out.resolve())
    print(json.dumps({"photos": photos, "seconds": time.perf_counter() - started}))
