"""How much of its parts' speed the whole job keeps.

::

    python -m benchmarks.pipeline [--bundle builtin|full-size] [--sizes 12mp 2mp] [--library FOLDER]

In turns, on the same cores, over the same photos:

- memory: the encoders alone, fed with crops that lie in memory, in batches as the job's;
- decode: fetch, decode, measure and crop alone, one process a core;
- job: `pipeline.score`, its embed step. Start-up is left out by running over few photos and over many and dividing the
  difference: what a long run does in the time between.

Memory and decode each have all cores to themselves, and the job has to do both on them. What it can reach at most is
therefore the rate whose time for a photo is the sum of theirs; the ratio to that is how well it overlaps, and what the
orchestration costs. With a GPU, or with readers on other machines, the lower of the two is the limit.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa

from benchmarks import full_size, libraries, ratios
from picinspector import pipeline, runs
from picinspector.bundle import open_bundle
from picinspector.manifest import list_library
from picinspector.photo import Limits
from picinspector.stages.encode import Encode
from picinspector.stages.read import crops_of, read_photos

#: Photos whose crops are kept in memory: as many as a few batches.
_KEPT = 64
#: Ray starts workers ahead, and ends a run's behind it, on the cores where the next contender is measured.
_SETTLE_S = 5.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="builtin", help="builtin, full-size (random weights), or a folder")
    parser.add_argument("--sizes", nargs="+", default=list(libraries.SIZES), choices=list(libraries.SIZES))
    parser.add_argument("--library", help="a folder of photos to use instead")
    parser.add_argument("--few", type=int, help="photos of the short run (default: 8 s worth of encoding)")
    parser.add_argument("--many", type=int, help="of the long one (default: 32 s worth)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where libraries are made, and kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.scratch or Path(temporary)
        bundle = str(full_size.make(scratch / "full")) if arguments.bundle == "full-size" else arguments.bundle
        for size in arguments.sizes if not arguments.library else ["library"]:
            folder = Path(arguments.library) if arguments.library else None
            measure(folder, size, bundle, scratch, arguments.few, arguments.many, arguments.rounds)


def measure(
    folder: Path | None, size: str, bundle: str, scratch: Path, few: int | None, many: int | None, rounds: int
) -> list[ratios.Row]:
    """Print the ratios over one library, and return them: to the lower, to both together, decode and memory."""
    cores = ratios.cores()
    runs.connect()
    time.sleep(2 * _SETTLE_S)
    pools = runs.size_pools(100_000)
    sample = folder or libraries.make(scratch / size, max(_KEPT, 2 * cores), size)
    files = pa.concat_tables(list_library(str(sample))).slice(0, _KEPT)
    memory = encoders_from_memory(files, bundle, pools.batch_size, pools.cpus)
    guess = memory()
    few, many = few or max(32, round(8 * guess)), many or max(128, round(32 * guess))
    library = folder or libraries.make(scratch / f"{size}-{many}", many, size)
    options = pipeline.Options(bundle=bundle, show_progress=False)
    with ProcessPoolExecutor(cores, get_context("spawn"), initializer=_one_thread) as readers:
        measured = ratios.take_turns(
            {
                "memory": memory,
                "decode": decode_alone(files, bundle, readers, cores),
                "job": job(paths(library), few, many, options, scratch),
            },
            rounds,
        )
    both = [1 / (1 / memory + 1 / read) for memory, read in zip(measured["memory"], measured["decode"], strict=True)]
    overlap = [rate / most for rate, most in zip(measured["job"], both, strict=True)]
    rates = ", ".join(f"{name} {statistics.median(values):.1f}/s" for name, values in measured.items())
    rows = [
        ratios.Row("job over the lower of memory and decode", ratios.over(measured, "job", "memory", "decode"), 0.90),
        ratios.Row("job over both on the same cores", overlap, figures=rates),
        ratios.Row("job over memory", ratios.over(measured, "job", "memory")),
    ]
    ratios.show(f"{size}, bundle {open_bundle(bundle).name}, {few} and {many} photos, {rounds} rounds", rows)
    return rows


def paths(library: Path) -> list[str]:
    """The files of a folder, sorted."""
    return sorted(str(path) for path in library.iterdir() if path.is_file())


def job(uris: Sequence[str], few: int, many: int, options: pipeline.Options, scratch: Path) -> Callable[[], float]:
    """What measures the job's embed step in photos a second, without its start: over many photos less over few."""

    def embed_s(photos: int) -> float:
        shutil.rmtree(scratch / "tables", ignore_errors=True)
        chosen = scratch / f"{photos}.txt"
        chosen.write_text("\n".join(uris[:photos]))
        record = pipeline.score(str(chosen), str(scratch / "tables"), options)
        if record["counts"]["scored"] != photos:
            raise RuntimeError(f"{photos} photos wanted: {record['counts']}")
        time.sleep(_SETTLE_S)
        return float(record["seconds"]["embed"])

    return lambda: (many - few) / (embed_s(many) - embed_s(few))


def encoders_from_memory(files: pa.Table, bundle: str, batch_size: int, threads: int) -> Callable[[], float]:
    """What measures the encoders fed with the crops of these files, in photos a second."""
    photos = read_photos(files, crops_of(open_bundle(bundle)), Limits())
    encode = Encode(bundle, threads)
    encode(photos.slice(0, batch_size))  # the first call allocates

    def run() -> float:
        started = time.perf_counter()
        for start in range(0, photos.num_rows, batch_size):
            encode(photos.slice(start, batch_size))
        return photos.num_rows / (time.perf_counter() - started)

    return run


def decode_alone(files: pa.Table, bundle: str, readers: ProcessPoolExecutor, cores: int) -> Callable[[], float]:
    """What measures reading these files on all cores, in photos a second."""
    crops = crops_of(open_bundle(bundle))
    parts = [files.slice(start, 8) for start in range(0, files.num_rows, 8)] * max(1, cores // 2)
    warm = [readers.submit(read_photos, files.slice(0, 1), crops, Limits()) for _ in range(4 * cores)]

    def run() -> float:
        for one in warm:
            one.result()
        started = time.perf_counter()
        done = [readers.submit(_count_read, part, crops) for part in parts]
        return sum(one.result() for one in done) / (time.perf_counter() - started)

    return run


def _count_read(files: pa.Table, crops: dict) -> int:  # type: ignore[type-arg]
    return read_photos(files, crops, Limits()).num_rows


def _one_thread() -> None:
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
