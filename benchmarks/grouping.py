"""Grouping of a million photos: time and memory of all of it, recall of the search for neighbours; made-up embeddings.

    python -m benchmarks.grouping                   # 50,000 for the recall; 125,000 to a million for the growth

Made up are moments: a direction of 32 latent ones, mapped to 768 numbers, and one to five frames near it, so that
photos have neighbours at every distance, as real ones have. They are written as a run on CPUs leaves them, in files of
1,024 rows. Each step runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import ratios
from picinspector import chains, groups, neighbours, schema
from picinspector.stages import peak_memory_bytes
from picinspector.tables import Destination

_WIDTH, _LATENT = 768, 32
_FILE_ROWS = 1024


def vectors(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings float16 (N, 768), L2-normalised, and the moment of each."""
    rng = np.random.default_rng(seed)
    moment = np.repeat(np.arange(count), rng.integers(1, 6, count))[:count]
    mixing = rng.normal(size=(_LATENT, _WIDTH)).astype(np.float32)
    made = np.empty((count, _WIDTH), np.float16)
    latent = rng.normal(size=(moment[-1] + 1, _LATENT)).astype(np.float32)
    for start in range(0, count, 50_000):
        part = latent[moment[start : start + 50_000]]
        # Frames of a moment differ by 0.1 to 0.6 of what moments differ by.
        spread = rng.uniform(0.1, 0.6, (len(part), 1)).astype(np.float32)
        frames = (part + spread * rng.normal(size=part.shape).astype(np.float32)) @ mixing
        frames += 0.5 * rng.normal(size=frames.shape).astype(np.float32)
        made[start : start + len(part)] = frames / np.linalg.norm(frames, axis=1, keepdims=True)
    return made, moment


def photos(moment: np.ndarray, seed: int = 0) -> pa.Table:
    """What else `groups.find` looks at: frames of a moment have hashes a few bits apart, and a third of them times."""
    count, rng = len(moment), np.random.default_rng([seed, 1])
    base = rng.integers(0, 2**64, moment[-1] + 1, dtype=np.uint64)
    flips = np.zeros(count, np.uint64)
    for _ in range(6):
        flips |= np.uint64(1) << rng.integers(0, 64, count, dtype=np.uint64)
    noon = np.datetime64(datetime(2026, 1, 1), "us")
    shot = noon + (moment * 60 + rng.integers(0, 3, count)) * np.timedelta64(timedelta(seconds=1))
    columns = {
        "image_id": pa.array([f"{row:032x}" for row in range(count)]),
        "uri": pa.array([f"s3://bucket/photos/{row // 1000:05d}/{row:09d}.jpg" for row in range(count)]),
        "content_hash": pa.array([f"{row - row % 50 % 2:032x}" for row in range(count)]),
        "phash": pa.array(base[moment] ^ flips),
        "width": pa.array(np.full(count, 4000, np.int32)),
        "height": pa.array(np.full(count, 3000, np.int32)),
        "captured_at": pa.array(shot, pa.timestamp("us"), mask=moment % 3 > 0),
        "camera": pa.array(np.where(moment % 2, "A", "B")),
        "quality_score": pa.array(rng.uniform(1, 10, count).astype(np.float32)),
        "scorer_kind": pa.array(np.full(count, "lightgbm")),
        **{f"attribute_{name}": pa.array(rng.uniform(0, 100, count).astype(np.float32)) for name in schema.ATTRIBUTES},
    }
    return pa.table(columns)


def write(count: int, folder: str) -> None:
    """A destination with one committed run of so many photos."""
    made, moment = vectors(count)
    table, dest = photos(moment), Destination(folder)
    run_id = dest.new_run_id()
    for name, full in (("embeddings", schema.embeddings(_WIDTH, 2)), ("scores", schema.SCORES)):
        dest.make_folder(dest.table_path(name, run_id))
        for start in range(0, count, _FILE_ROWS):
            part = table.slice(start, _FILE_ROWS)
            columns = {field.name: pa.nulls(part.num_rows, field.type) for field in full}
            columns |= {column: part.column(column) for column in part.column_names if column in columns}
            if name == "embeddings":
                flat = pa.array(made[start : start + _FILE_ROWS].reshape(-1))
                columns["clip_embedding"] = pa.FixedSizeListArray.from_arrays(flat, _WIDTH)
            marks = {"encoder_fingerprint", "scorer_fingerprint"} & set(columns)
            columns |= {mark: pa.array(np.full(part.num_rows, "f")) for mark in marks}
            path = f"{dest.table_path(name, run_id)}/{start:09}.parquet"
            pq.write_table(pa.table(columns).cast(full), path, **chains.PARQUET)
    dest.commit({"run_id": run_id, "kind": "score", "counts": {"to_do": count}})


def recall(count: int) -> dict[str, Any]:
    """What the index finds of what comparing all pairs does."""
    made, moment = vectors(count)
    ties, phash = groups.Ties(), photos(moment).column("phash").to_numpy()
    neighbours.EXACT_ROWS = 0
    found, _ = neighbours.alike(made, ties.near_similarity)
    neighbours.EXACT_ROWS = count
    every, cosine = neighbours.alike(made, ties.near_similarity)
    keys = [pairs[:, 0] * count + pairs[:, 1] for pairs in (found, every)]
    there = np.isin(keys[1], keys[0])
    confirmed = np.bitwise_count(phash[every[:, 0]] ^ phash[every[:, 1]]) <= ties.near_bits
    return {
        "count": count,
        "pairs": len(every),
        "recall": there.mean(),
        "recall_confirmed": there[confirmed].mean(),
        "recall_90": there[cosine >= 0.9].mean(),
    }


def group(folder: str) -> dict[str, Any]:
    """What `picinspector groups` does: the tables read, grouped, and the groups written."""
    dest, started = Destination(folder), time.perf_counter()
    made = groups.make(dest)
    groups.save(dest, made)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_gb": peak_memory_bytes() / 1e9, **groups.describe(made)}


def main() -> None:
    """Each size in its own process, and a table."""
    parser = argparse.ArgumentParser(description="Group made-up embeddings: time, memory, recall.")
    parser.add_argument("--photos", type=int, nargs="+", default=[125_000, 250_000, 500_000, 1_000_000])
    parser.add_argument("--recall-photos", type=int, default=50_000)
    parser.add_argument("--step", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        name, *given = arguments.step
        print(json.dumps({"write": write, "group": group, "recall": recall}[name](*given), default=float))
        return

    def alone(*given: Any) -> Any:
        command = [sys.executable, "-m", "benchmarks.grouping", "--step", json.dumps(given)]
        answer = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
        print(f"  {given[0]}: {answer}", file=sys.stderr, flush=True)
        return answer

    recalled, sizes = alone("recall", arguments.recall_photos), []
    for count in arguments.photos:
        with tempfile.TemporaryDirectory() as folder:
            alone("write", count, folder)
            sizes.append(alone("group", folder))
    print(f"\n{ratios.machine()}\n")
    print(f"recall against all {recalled['pairs']:,} pairs of {recalled['count']:,}: {recalled['recall']:.4f}")
    print(f"of those that the hash confirms: {recalled['recall_confirmed']:.4f}")
    print(f"of cosines over 0.9: {recalled['recall_90']:.4f}\n")
    print("| photos | s | us a photo | peak GB |\n|---|---|---|---|")
    for one in sizes:
        per_photo = 1e6 * one["seconds"] / one["photos"]
        print(f"| {one['photos']:,} | {one['seconds']:.0f} | {per_photo:.0f} | {one['peak_gb']:.1f} |")


if __name__ == "__main__":
    main()
