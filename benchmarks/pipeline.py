"""How much of the encoders' own speed the whole job keeps: `python -m benchmarks.pipeline [FOLDER]`.

One run, same photos, same models, same batch size and threads:

- memory: the encoders alone, fed crops that already lie in memory;
- read: fetch, decode, measure and crop alone, one process;
- job: `pipeline.score` into a fresh destination; its embed stage, without and with start-up.

Figures are ratios: they carry over to other machines, photos a second do not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import pyarrow as pa

from jobs.demo import build_library
from picinspector import pipeline
from picinspector.bundle import open_bundle
from picinspector.manifest import list_library
from picinspector.photo import Limits
from picinspector.stages.encode import Encode
from picinspector.stages.read import crops_of, read_photos


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="photos to use; default the demo's, copied until there are enough")
    parser.add_argument("--photos", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--bundle", default="builtin")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="of the memory measurement; the median counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.folder) if arguments.folder else _demo_photos(Path(scratch), arguments.photos)
        measure(folder, Path(scratch), arguments.photos, arguments.bundle, arguments.batch_size, arguments.rounds)


def measure(folder: Path, scratch: Path, photos: int, bundle: str, batch_size: int, rounds: int) -> None:
    """Print memory, read and job speed, and the ratios."""
    cores = len(os.sched_getaffinity(0))
    manifest = pa.concat_tables(list_library(str(folder))).slice(0, photos)
    started = time.perf_counter()
    cropped = read_photos(manifest.slice(0, min(photos, 256)), crops_of(open_bundle(bundle)), Limits())
    read = cropped.num_rows / (time.perf_counter() - started)

    encode = Encode(bundle, threads=cores)
    batches = [cropped.slice(start, batch_size) for start in range(0, cropped.num_rows, batch_size)]
    encode(batches[0])  # the first call allocates
    speeds = []
    for _ in range(rounds):
        started = time.perf_counter()
        for batch in batches:
            encode(batch)
        speeds.append(cropped.num_rows / (time.perf_counter() - started))
    memory = statistics.median(speeds)

    options = pipeline.Options(bundle=bundle, limit=photos, batch_size=batch_size, show_progress=False)
    record = pipeline.score(str(folder), str(scratch / "tables"), options)
    count, steady = record["counts"]["to_do"], record["embed_photos_per_s"]
    whole = count / record["seconds"]["embed"]
    print(f"{count} photos, bundle {bundle}, batch {batch_size}, {cores} cores")
    print(f"memory  {memory:7.1f} photos/s  encoders fed from memory (median of {rounds})")
    print(f"read    {read:7.1f} photos/s  fetch, decode, measure, crop in one process")
    print(f"job     {steady:7.1f} photos/s  ratio to memory {steady / memory:.2f}  (first batch to last)")
    print(f"job     {whole:7.1f} photos/s  ratio to memory {whole / memory:.2f}  (start-up and writing included)")


def _demo_photos(scratch: Path, photos: int) -> Path:
    build_library(scratch / "demo")
    shutil.rmtree(scratch / "demo" / "broken")
    originals = sorted((scratch / "demo").rglob("*.jpg"))
    library = scratch / "library"
    library.mkdir()
    for index in range(photos):
        original = originals[index % len(originals)]
        shutil.copyfile(original, library / f"{index:05}-{original.parent.name}-{original.name}")
    return library


if __name__ == "__main__":
    main()
