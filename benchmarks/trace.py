"""A picture of who works when: `python -m benchmarks.trace trace.png [--photos 400] [--ms 50]`.

The job over photos in a real S3 server, behind a proxy that holds each request back, with every batch of every worker
written down: what it waited for storage, what it decoded, what it encoded. Fetching overlaps with decoding where their
bars share the time, and both with encoding.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow as pa

from benchmarks import libraries
from benchmarks.pipeline import paths
from picinspector import chains, pipeline
from picinspector.stages import Batch, Report, encode, read
from tests import s3_server
from tests.fault_proxy import Fault, FaultProxy

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_FOLDER = "PICINSPECTOR_BENCH_TRACE"
_COLOURS = {"fetch": "#9ecae1", "decode": "#3182bd", "encode": "#e6550d"}


def read_photos(manifest: pa.Table, report: Report, **options: Any) -> pa.Table:
    """The read stage, which writes its batches down."""
    return read.read_photos(manifest, report=_both(report), **options)


class Encode(encode.Encode):
    """The encode stage, which writes its batches down."""

    def __init__(self, report: Report, **options: Any) -> None:
        super().__init__(report=_both(report), **options)


def _both(report: Report) -> Callable[[Batch], None]:
    return functools.partial(_write_down, report)


def _write_down(report: Report, batch: Batch) -> None:
    line = json.dumps([batch.stage, batch.worker, time.time(), batch.busy_s, batch.fetch_s])
    with Path(os.environ[_FOLDER], f"{os.getpid()}.jsonl").open("a") as file:
        file.write(line + "\n")
    report(batch)


def main() -> None:
    """Run, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--ms", type=float, default=50.0, help="that each request waits")
    parser.add_argument("--size", default="2mp", choices=list(libraries.SIZES))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, s3_server.start() as server:
        scratch = Path(temporary)
        files, bucket = (
            paths(libraries.make(scratch / "photos", arguments.photos, arguments.size)),
            server.make_bucket(),
        )
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda path: server.client().upload_file(path, bucket, f"photos/{Path(path).name}"), files))
        late = Fault("late", rf"GET /{bucket}/photos/", seconds=arguments.ms / 1000)
        with FaultProxy(server.endpoint_url, [late]) as proxy:
            batches = run(f"s3://{bucket}", proxy.storage_options(server), scratch)
    draw(
        batches, arguments.picture, f"{arguments.photos} photos ({arguments.size}) on S3, {arguments.ms:g} ms a request"
    )


def run(library: str, storage_options: Mapping[str, Any], scratch: Path) -> list[tuple[str, str, float, float, float]]:
    """Score a library; each batch as stage, worker, end by the clock, seconds, and of those what it waited."""
    (scratch / "batches").mkdir()
    os.environ[_FOLDER] = str(scratch / "batches")
    chains.read_photos, encode.Encode = read_photos, Encode  # type: ignore[assignment,misc]
    options = pipeline.Options(storage_options=storage_options, show_progress=False)
    pipeline.score(f"{library}/photos", f"{library}/tables", options)
    written = [line for path in (scratch / "batches").glob("*.jsonl") for line in path.read_text().splitlines()]
    return [tuple(json.loads(line)) for line in written]


def draw(batches: list[tuple[str, str, float, float, float]], picture: Path, title: str) -> None:
    """One line a worker, one bar a batch; of a reader's, what it waited for storage first."""
    workers = sorted({(stage != "read", worker) for stage, worker, *_ in batches})
    start = min(end - busy for _, _, end, busy, _ in batches)
    figure, axes = plt.subplots(figsize=(12, 1.2 + 0.5 * len(workers)))
    for stage, worker, end, busy, fetch in batches:
        line, begin = workers.index((stage != "read", worker)), end - busy - start
        if stage == "read":
            axes.broken_barh([(begin, fetch)], (line - 0.4, 0.8), color=_COLOURS["fetch"])
        kind = "decode" if stage == "read" else "encode"
        axes.broken_barh([(begin + fetch, busy - fetch)], (line - 0.4, 0.8), color=_COLOURS[kind], edgecolor="white")
    axes.set_yticks(
        range(len(workers)), [("encoder" if late else "reader") + f" {i}" for i, (late, _) in enumerate(workers)]
    )
    axes.set_xlabel("seconds")
    axes.set_title(title)
    axes.legend(
        [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in _COLOURS.values()], list(_COLOURS), loc="lower right"
    )
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
