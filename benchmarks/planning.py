"""The bookkeeping of a nightly run, without photos and without Ray: what is to do, of a library of millions?

::

    python -m benchmarks.planning --rows 1000000 10000000

For each number of photos it makes up a destination (one large run, and thirty nights that changed 0.5 % each) and a
listing in which 0.5 % changed once more, as many came and as many left, and measures in a process of its own: planning
that night, planning a rescore of everything, and checking rows in = rows out. Photos are rows without embeddings:
columns that are not asked for are not read.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from picinspector import ledger, schema
from picinspector.bundle import Bundle, open_bundle
from picinspector.plan import Plan, stale
from picinspector.tables import Destination

NIGHTS, SHARE = 30, 0.005
#: As `chains` writes embeddings on a cluster with GPUs, or `prune` compacts them.
ROWS_PER_FILE = 8192
#: As `manifest.list_library` yields them.
LISTED_ROWS = 10_000

_PHOTO = (
    "md5(number || '/' || version) AS image_id, "
    "'s3://a-bucket-of-ours/photos/2026/' || lpad((number // 1000)::VARCHAR, 5, '0') || "
    "'/IMG_' || number || '.jpg' AS uri, "
    "md5(version || '/' || number) AS etag, 2000000 + number AS size_bytes, "
    "make_timestamptz((1767225600000000 + number)::BIGINT) AS last_modified"
)


def make_destination(dest: Destination, photos: int, bundle: Bundle) -> None:
    """One run with all photos, and thirty that each did another 0.5 % of them again."""
    changed = int(photos * SHARE)
    for night in range(NIGHTS + 1):
        run_id = dest.new_run_id()
        numbers = f"range({photos})" if not night else f"range({(night - 1) * changed}, {night * changed})"
        rows = f"SELECT {_PHOTO} FROM (SELECT range AS number, {night} AS version FROM {numbers})"
        for table, mark in (("embeddings", "encoder"), ("scores", "scorer")):
            fingerprint = getattr(bundle, f"{mark}_fingerprint")
            # One in 300 has failed for good.
            query = (
                f"SELECT *, '{fingerprint}' AS {mark}_fingerprint, "
                f"if(size_bytes % 300 = 0, 'corrupt', NULL) AS error_kind FROM ({rows})"
            )
            write(query, Path(dest.table_path(table, run_id)))  # type: ignore[arg-type]
        write(rows, Path(dest.manifest_path(run_id)), 100_000)
        bundle_record = {"scorer_fingerprint": bundle.scorer_fingerprint}
        counts = {"to_do": photos if not night else changed}
        dest.commit({"run_id": run_id, "kind": "score", "bundle": bundle_record, "counts": counts})


def make_listing(path: Path, photos: int) -> None:
    """The library tonight: 0.5 % have changed, 0.5 % are gone, 0.5 % are new."""
    changed, nights = int(photos * SHARE), NIGHTS * int(photos * SHARE)
    version = f"if(range < {nights}, range // {max(1, changed)} + 1, if(range < {nights + changed}, 99, 0))"
    rows = (
        f"SELECT {_PHOTO} FROM (SELECT range AS number, {version} AS version FROM range({changed}, {photos + changed}))"
    )
    duckdb.sql(f"COPY ({rows}) TO '{path}' (FORMAT parquet, ROW_GROUP_SIZE 100000)")


def write(query: str, folder: Path, rows_per_file: int = ROWS_PER_FILE) -> None:
    """A query's rows as files of so many."""
    folder.mkdir(parents=True)
    for number, batch in enumerate(duckdb.sql(query).to_arrow_reader(rows_per_file)):
        pq.write_table(pa.Table.from_batches([batch]), folder / f"{number:06d}.parquet")


def measure(step: str, folder: Path) -> dict[str, float]:
    """One step in this process: seconds, and the most memory it took beyond what importing took."""
    bundle, dest = open_bundle("builtin"), Destination(folder / "dest")
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    counts: dict[str, int] = {}
    if step == "plan":
        plan = Plan(listing(folder / "listing.parquet"), dest, bundle, "starts_with(uri, 's3://a-bucket-of-ours/')")
        rows = sum(shard.num_rows for shard in plan.shards())
        counts = plan.counts
    elif step == "plan_rescore":
        rows = sum(shard.num_rows for shard in stale(dest, other_scorer(bundle), counts))
    else:
        [first, *_] = dest.runs()
        rows = first["counts"]["to_do"]
        ledger.check_rows(dest, "embeddings", first["run_id"], rows)
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"rows": rows, "seconds": seconds, "peak_gb": peak / 1024**2, "import_gb": before / 1024**2, **counts}


def other_scorer(bundle: Bundle) -> Bundle:
    """The same encoders with a scorer of other bytes."""
    files = {name: ("0" * 64 if name.startswith("scorer/") else hash_) for name, hash_ in bundle.files.items()}
    return replace(bundle, files=files)


def listing(path: Path) -> Iterator[pa.Table]:
    """Tables as `list_library` yields them."""
    for batch in pq.ParquetFile(path).iter_batches(LISTED_ROWS):
        yield pa.Table.from_batches([batch]).cast(schema.MANIFEST)


def main() -> None:
    """Measure each step for each size, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, help="where the made-up destinations go; default a temporary one")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(measure(arguments.step, arguments.folder)))
        return
    print(f"{'photos':>12}  {'step':<13} {'to do':>10} {'seconds':>8} {'us/photo':>8} {'peak GB':>8}")
    for photos in arguments.rows:
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="planning-") as name:
            folder = Path(name)
            make_destination(Destination(folder / "dest"), photos, open_bundle("builtin"))
            make_listing(folder / "listing.parquet", photos)
            for step in ("plan", "plan_rescore", "check_rows"):
                command = [sys.executable, "-m", "benchmarks.planning", "--step", step, "--folder", name]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                each = found["seconds"] / photos * 1e6
                print(
                    f"{photos:>12,}  {step:<13} {found['rows']:>10,} {found['seconds']:>8.1f} {each:>8.2f} "
                    f"{found['peak_gb']:>8.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
