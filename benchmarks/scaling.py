"""What the orchestration costs: `python -m benchmarks.scaling`.

The chain of `chains.embed` itself, planned, written and checked as a run, with its two stages substituted: reading
gives the same crops for every photo, and encoding waits so long for a batch as a device of a given speed would compute.
Workers then need no cores of their own, and 32 of them fit one machine whose Ray is told that it has the CPUs. The
output says which worker finished each batch when, so that speed is counted while all workers are at work: how long a
pool takes to grow is told apart.

Overhead is measured with one worker that waits for nothing: wall time a photo of everything around the models.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks import ratios
from picinspector import chains, runs, schema
from picinspector.bundle import open_bundle
from picinspector.stages import CROP_COLUMNS, Report, describe_batch
from picinspector.tables import Destination

#: Of linear; ms a photo.
LINEAR, OVERHEAD_MS = 0.95, 0.5
#: Bytes of the crops of a photo: 448 and 224 px, uint8, as the builtin bundle asks for.
CROP_BYTES = (448 * 448 * 3, 224 * 224 * 3)
_DIMS = (768, 192)


def read_photos(manifest: pa.Table, report: Report, **_: Any) -> pa.Table:
    """What the read stage gives, without a photo."""
    started, rows = time.perf_counter(), manifest.num_rows
    columns = {name: manifest.column(name) for name in schema.MANIFEST.names}
    columns |= {part.name: pa.nulls(rows, part.type) for part in (*schema.FACTS, *schema.MEASUREMENT_FIELDS)}
    for name, size in zip(CROP_COLUMNS, CROP_BYTES, strict=False):
        offsets = pa.py_buffer(np.arange(rows + 1, dtype=np.int64) * size)
        columns[name] = pa.Array.from_buffers(
            pa.large_binary(), rows, [None, offsets, pa.py_buffer(np.full(rows * size, 127, np.uint8))]
        )
    columns |= {name: pa.nulls(rows, pa.string()) for name in ("error_kind", "error_message")}
    report(describe_batch("read", rows, {}, started))
    return pa.table(columns)


class Encode:
    """Waits, and gives embeddings of zeros. `captured_at` and `camera` say when a batch was done, and by whom."""

    def __init__(self, report: Report, fingerprint: str, **_: Any) -> None:
        self._report, self._fingerprint, self._schema = report, fingerprint, schema.embeddings(*_DIMS)
        self._photo_s = float(os.environ["PICINSPECTOR_BENCH_PHOTO_S"])

    def __call__(self, photos: pa.Table) -> pa.Table:
        """Rows of `schema.embeddings`, after as many times the wait as there are photos."""
        started, rows = time.perf_counter(), photos.num_rows
        seen = sum(chunk.buffers()[2].size for name in CROP_COLUMNS[:2] for chunk in photos.column(name).chunks)
        assert seen >= rows * sum(CROP_BYTES)
        time.sleep(max(0.0, rows * self._photo_s - (time.perf_counter() - started)))
        columns: dict[str, Any] = {part.name: pa.nulls(rows, part.type) for part in self._schema}
        columns |= {name: photos.column(name) for name in photos.column_names if name not in CROP_COLUMNS}
        for name, width in zip(("clip_embedding", "dinov2_embedding"), _DIMS, strict=True):
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows * width, np.float16)), width)
        columns["encoder_fingerprint"] = pa.repeat(self._fingerprint, rows)
        columns["camera"] = pa.repeat(str(os.getpid()), rows)
        columns["captured_at"] = pa.repeat(pa.scalar(time.time_ns() // 1000, pa.timestamp("us")), rows)
        self._report(describe_batch("encode", rows, {}, started))
        return pa.table([columns[name] for name in self._schema.names], schema=self._schema)


def measure(workers: int, photo_s: float, photos: int, batch: int) -> dict[str, float]:
    """One run in this process: photos a second while all workers are at work, and how long until they were."""
    import picinspector.stages.encode

    os.environ["PICINSPECTOR_BENCH_PHOTO_S"] = str(photo_s)
    chains.read_photos = read_photos
    picinspector.stages.encode.Encode = Encode  # type: ignore[assignment,misc]
    # Each encoder holds as many as there are cores, of which two are counted. Ray Data keeps a sixth of all CPUs for
    # each of the stages around it.
    runs._SPARE_CPUS = 4 * workers + 16
    runs._cores = lambda: 2
    bundle = open_bundle("builtin")
    with tempfile.TemporaryDirectory() as folder:
        dest = Destination(folder)
        record = runs.new_record(dest.new_run_id(), "score", runs.describe_bundle(bundle), dest.url, "s3://made-up/")
        record["counts"] = {"to_do": dest.write_manifest(record["run_id"], [_manifest(photos)])}
        options = runs.Options(encoders=workers, batch_size=batch, show_progress=False)
        runs.connect()
        started = time.time()
        chains.embed(chains.Work(dest, record, options), bundle)
        table = pq.read_table(dest.table_path("embeddings", record["run_id"]), columns=["camera", "captured_at"])
    return {"record_per_s": record["embed_photos_per_s"], **_steady(table, started)}


def _manifest(photos: int) -> pa.Table:
    uris = [f"s3://made-up/{number:08}.jpg" for number in range(photos)]
    columns = {
        "image_id": pa.array([f"{number:032x}" for number in range(photos)]),
        "uri": pa.array(uris),
        "etag": pa.array([f"{number:032x}" for number in range(photos)]),
        "size_bytes": pa.array(np.full(photos, 2_000_000)),
        "last_modified": pa.array([datetime(2026, 1, 1, tzinfo=UTC)] * photos, schema.MANIFEST.field(4).type),
    }
    return pa.table(columns, schema=schema.MANIFEST)


def _steady(done: pa.Table, started: float) -> dict[str, float]:
    """Rows a second from when the last worker had finished its first batch until the first had finished its last."""
    at = np.asarray(done.column("captured_at").cast(pa.int64())) / 1e6
    by_worker = done.group_by("camera").aggregate([("captured_at", "min"), ("captured_at", "max")])
    first, last = (np.asarray(by_worker.column(f"captured_at_{end}").cast(pa.int64())) / 1e6 for end in ("min", "max"))
    begin, end = float(first.max()), float(last.min())
    rows = int(((at > begin) & (at <= end)).sum())
    return {
        "workers": by_worker.num_rows,
        "per_s": rows / (end - begin) if end > begin else 0.0,
        "window_s": end - begin,
        "all_up_after_s": begin - started,
        "first_after_s": float(first.min()) - started,
        "mean": pc.count(done.column("camera")).as_py() / (float(at.max()) - started),
    }


def main() -> None:
    """Measure each number of workers in a process of its own, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--photo-s", type=float, default=0.05, help="what a worker waits for a photo (default 0.05)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=30.0, help="of work for all workers, about (default 30)")
    parser.add_argument("--overhead-photos", type=int, default=8192)
    parser.add_argument("--step", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(measure(**arguments.step)))
        return

    def alone(workers: int, photo_s: float, photos: int) -> dict[str, float]:
        step = {"workers": workers, "photo_s": photo_s, "photos": photos, "batch": arguments.batch_size}
        answer = ratios.run_alone([sys.executable, "-m", "benchmarks.scaling", "--step", json.dumps(step)]).answer
        print(f"  {workers} workers, {photo_s} s: {answer}", file=sys.stderr, flush=True)
        return answer  # type: ignore[no-any-return]

    rows = []
    for workers in arguments.workers:
        per_s = 1.0 / arguments.photo_s
        # A pool grows while it works: a second a worker, half of them at work on the way.
        photos = int(per_s * workers * (arguments.seconds + 0.5 * workers))
        found = alone(workers, arguments.photo_s, photos)
        figures = (
            f"{found['per_s']:.0f} photos/s over {found['window_s']:.0f} s; "
            f"{found['workers']} came, all at work after {found['all_up_after_s']:.0f} s"
        )
        rows.append(ratios.Row(f"{workers} workers, to linear", [found["per_s"] / (per_s * workers)], LINEAR,
                               figures=figures))  # fmt: skip
    idle = [alone(1, 0.0, arguments.overhead_photos) for _ in range(3)]
    each = [1000.0 / found["per_s"] for found in idle]
    rows.append(ratios.Row(f"orchestration of a photo, to {OVERHEAD_MS} ms", [ms / OVERHEAD_MS for ms in each], 1.0,
                           True, f"{statistics.median(each):.2f} ms of wall time, both cores"))  # fmt: skip
    ratios.show(f"scaling: chains.embed, {arguments.photo_s} s of waiting a photo", rows)


if __name__ == "__main__":
    main()
