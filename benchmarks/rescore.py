"""What a rescore keeps of LightGBM's own speed: `python -m benchmarks.rescore`.

A destination of made-up embeddings is written as `chains` writes them: marginal distributions are those that the
builtin attribute head was trained on, so that the photos get grades, and with them suggestions, as real ones do. In
turns, each in a process of its own:

- bare: `lightgbm.Booster.predict` of the builtin scorer, the same rows as a float32 matrix in memory, all cores;
- cpu: a core's time for either, in one process, which other programs disturb least;
- job: `pipeline.rescore`, which reads the rows, also computes attributes, scenes and suggestions in words, and writes
  the scores. Its chain's rate from the first batch to the last, and the whole command with the start of Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import lightgbm
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import ratios
from picinspector import chains, pipeline, runs, schema
from picinspector.attributes import AttributeHead
from picinspector.bundle import Bundle, open_bundle
from picinspector.scorer import Scorer, feature_matrix, to_array
from picinspector.stages.score import Score, score_columns
from picinspector.tables import Destination

TARGET = 0.7
ROWS_PER_FILE = 8192
_OTHER_SCORER = "0" * 64


def make_destination(folder: Path, rows: int, bundle: Bundle) -> None:
    """One committed run of so many photos, scored by another scorer."""
    dest = Destination(folder)
    run_id, head = dest.new_run_id(), AttributeHead(bundle.piece("attributes"))
    for number, start in enumerate(range(0, rows, ROWS_PER_FILE)):
        table = make_rows(start, min(ROWS_PER_FILE, rows - start), head, bundle)
        path = f"{dest.table_path('embeddings', run_id)}/{number:06}.parquet"
        dest.make_folder(str(Path(path).parent))
        pq.write_table(table, path, **chains.PARQUET)
        dest.write_parquet(path.replace("/embeddings/", "/scores/"), _scored(table))
        dest.write_parquet(f"{dest.manifest_path(run_id)}/{number:06}.parquet", table.select(schema.MANIFEST.names))
    about = runs.describe_bundle(bundle) | {"scorer_fingerprint": _OTHER_SCORER}
    dest.commit(runs.new_record(run_id, "score", about, dest.url, "s3://made-up/") | {"counts": {"to_do": rows}})


def make_rows(start: int, rows: int, head: AttributeHead, bundle: Bundle) -> pa.Table:
    """Rows of the embeddings table, the same for the same `start`."""
    rng = np.random.default_rng(start)
    mean, scale = head._tensors["input.mean"], head._tensors["input.scale"]
    values = (mean + scale * rng.standard_normal((rows, len(mean)))).astype(np.float32)
    columns: dict[str, pa.Array] = {}
    width = {"dinov2_embedding": 192, "clip_embedding": 768}
    at = 0
    for name in head.features:
        part = values[:, at : at + width.get(name, 1)]
        at += part.shape[1]
        if name in width:
            part = part / np.linalg.norm(part, axis=1, keepdims=True)
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(part.astype(np.float16).ravel()), width[name])
        else:
            part = np.expm1(np.abs(part)) if name in head._log1p else np.clip(part, 0, 1)
            columns[name] = pa.array(part[:, 0].astype(np.float32))
    numbers = range(start, start + rows)
    exif = {
        "iso": rng.choice([50, 100, 400, 1600], rows),
        "exposure_s": rng.choice([1 / 1000, 1 / 250, 1 / 60, 1 / 15], rows),
        "f_number": rng.choice([1.8, 2.8, 5.6], rows),
        "focal_length_mm": rng.choice([4.2, 50.0, 85.0], rows),
        "width": np.full(rows, 4000),
        "height": np.full(rows, 3000),
    }
    columns |= {name: pa.array(part).cast(schema.FACTS.field(name).type) for name, part in exif.items()}
    columns |= {
        "image_id": pa.array([f"{number:032x}" for number in numbers]),
        "uri": pa.array([f"s3://made-up/{number // 1000:05}/IMG_{number:08}.jpg" for number in numbers]),
        "etag": pa.array([f"{number:032x}" for number in numbers]),
        "size_bytes": pa.array(rng.integers(1_000_000, 5_000_000, rows)),
        "last_modified": pa.array(
            [datetime(2026, 1, 1, tzinfo=UTC)] * rows, schema.MANIFEST.field("last_modified").type
        ),
        "encoder_fingerprint": pa.array([bundle.encoder_fingerprint] * rows),
    }
    fields = schema.embeddings(width["clip_embedding"], width["dinov2_embedding"])
    return pa.table([columns.get(part.name, pa.nulls(rows, part.type)) for part in fields], schema=fields)


def _scored(rows: pa.Table) -> pa.Table:
    columns = {name: rows.column(name) for name in schema.MANIFEST.names}
    columns["scorer_fingerprint"] = pa.array([_OTHER_SCORER] * rows.num_rows)
    arrays = [columns.get(part.name, pa.nulls(rows.num_rows, part.type)) for part in schema.SCORES]
    return pa.table(arrays, schema=schema.SCORES)


def bare(folder: Path) -> dict[str, float]:
    """LightGBM on the same rows: rows a second, the median of three."""
    piece = open_bundle("builtin").piece("scorer")
    scorer, dest = Scorer(piece), Destination(folder)
    tables = [pq.read_table(path) for path in dest.files_of("embeddings", [dest.runs()[0]["run_id"]])]
    matrix = np.concatenate(
        [
            feature_matrix({name: to_array(table.column(name)) for name in scorer.features}, scorer.features)
            for table in tables
        ]
    )
    booster = lightgbm.Booster(model_file=str(piece / "model.txt"))
    booster.predict(matrix[:4096], num_threads=ratios.cores())
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        booster.predict(matrix, num_threads=ratios.cores())
        seconds.append(time.perf_counter() - started)
    return {"rows_per_s": len(matrix) / statistics.median(seconds)}


def cpu(folder: Path) -> dict[str, float]:
    """Microseconds of CPU a row in one process: LightGBM alone; the stage; reading what the stage reads."""
    dest = Destination(folder)
    path, stage = dest.files_of("embeddings", [dest.runs()[0]["run_id"]])[0], Score("builtin")
    wanted, scorer = score_columns(open_bundle("builtin")), Scorer(open_bundle("builtin").piece("scorer"))
    rows = pq.read_table(path, columns=wanted).slice(0, 4096).combine_chunks()
    matrix = feature_matrix({name: to_array(rows.column(name)) for name in scorer.features}, scorer.features)
    works = {
        "bare": (lambda: scorer._booster.predict(matrix, num_threads=1), len(matrix)),
        "stage": (lambda: stage(rows), len(matrix)),
        "read": (lambda: pq.read_table(path, columns=wanted, use_threads=False), pq.read_metadata(path).num_rows),
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(7):
        for name, (work, count) in works.items():
            started = time.process_time()
            work()
            taken[name].append(1e6 * (time.process_time() - started) / count)
    return {name: statistics.median(values) for name, values in taken.items()}


def job(folder: Path) -> dict[str, float]:
    """A rescore of a copy of the destination."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        copy = Path(scratch) / "dest"
        shutil.copytree(folder, copy, copy_function=os.link)
        record = pipeline.rescore(str(copy), pipeline.Options(show_progress=False))
    stage = record["stages"]["score"]
    return {
        "rows_per_s": record["score_photos_per_s"],
        "whole_rows_per_s": record["counts"]["to_do"] / record["seconds"]["total"],
        "busy_us_per_row": 1e6 * stage["busy_s"] / stage["rows"],
        "workers": stage["workers"],
        **record["seconds"],
    }


def main() -> None:
    """Make the rows, let the contenders take turns, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the rows are made; default a temporary one")
    parser.add_argument("--step", choices=["bare", "cpu", "job"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps({"bare": bare, "cpu": cpu, "job": job}[arguments.step](arguments.folder)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch) / "rows"
        make_destination(folder, arguments.rows, open_bundle("builtin"))
        jobs: list[dict[str, float]] = []

        def alone(step: str) -> dict[str, float]:
            command = [sys.executable, "-m", "benchmarks.rescore", "--step", step, "--folder", str(folder)]
            finished = ratios.run_alone(command, {"OMP_NUM_THREADS": "1"} if step == "cpu" else None)
            return {**finished.answer, "command_s": finished.seconds}

        def run_job() -> float:
            jobs.append(alone("job"))
            return jobs[-1]["rows_per_s"]

        each = [alone("cpu") for _ in range(arguments.rounds)]
        measured = ratios.take_turns({"bare": lambda: alone("bare")["rows_per_s"], "job": run_job}, arguments.rounds)
    measured["chain"] = [found["whole_rows_per_s"] for found in jobs]
    measured["command"] = [arguments.rows / found["command_s"] for found in jobs]
    middle = {name: statistics.median(values) for name, values in measured.items()}
    busy = statistics.median(found["busy_us_per_row"] for found in jobs)
    own = statistics.median(found["score"] for found in jobs)
    ratios.show(
        f"rescore of {arguments.rows:,} rows, builtin bundle",
        [
            ratios.Row("rescore, first batch to last, to bare LightGBM", ratios.over(measured, "job", "bare"), TARGET,
                       figures=f"{middle['job']:,.0f} of {middle['bare']:,.0f} rows/s; stage {busy:.0f} us/row"),
            ratios.Row("planning, chain and commit, start of Ray included", ratios.over(measured, "chain", "bare"),
                       figures=f"{middle['chain']:,.0f} rows/s; the chain's step {own:.1f} s"),
            ratios.Row("CPU of bare LightGBM to that of the stage and its reading, one process",
                       [found["bare"] / (found["stage"] + found["read"]) for found in each], figures=", ".join(
                       f"{name} {statistics.median(found[name] for found in each):.1f} us/row"
                       for name in ("bare", "stage", "read"))),
            ratios.Row("the whole command", ratios.over(measured, "command", "bare"),
                       figures=f"{middle['command']:,.0f} rows/s"),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
