"""Scored libraries for tests of the report: tables as a run leaves them, and small JPEGs behind them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from picinspector import schema
from picinspector.tables import Destination

RUN = "20260101T000000.000Z-aaaaaa"
ENVIRONMENT = {"picinspector": "0.1.0", "ray": "2.60.0"}


def jpeg(path: Path, seed: int = 0, size: tuple[int, int] = (60, 40), noise: int = 0) -> Path:
    """A photo of one colour, or of noise up to this much around it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(40, 200, 3) + rng.integers(-noise, noise + 1, (size[1], size[0], 3))
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=90)
    return path


def row(uri: str | Path, quality: float | None, **changes: Any) -> dict[str, Any]:
    """A photo, as columns of both tables; every attribute is 80 unless told, so that nothing is suggested."""
    found = os.stat(uri) if os.path.exists(uri) else None  # noqa: PTH110, PTH116
    values: dict[str, Any] = {
        "image_id": f"{uri}@1",
        "uri": str(uri),
        "etag": f"{found.st_size}-{found.st_mtime_ns}" if found else None,
        "size_bytes": found.st_size if found else 1000,
        "scorer_fingerprint": "scorer-1",
        "encoder_fingerprint": "encoder-1",
        "scorer_kind": "lightgbm",
    }
    if quality is None:
        return values | {"error_kind": "truncated", "error_message": "the file ends early"} | changes
    values |= {"quality_score": quality, "scene": "night", "scene_night": 0.75, "width": 600, "height": 400}
    values |= {f"attribute_{name}": 80.0 for name in schema.ATTRIBUTES}
    values |= {f"scene_{name}": 0.25 / 8 for name in schema.SCENES if name != "night"}
    return values | {"captured_at": datetime(2026, 5, 1, 12)} | changes


def write(folder: Path, rows: Sequence[dict[str, Any]], record: dict[str, Any] | None = None) -> Destination:
    """A destination with one committed run of these rows."""
    dest = Destination(folder)
    for table, columns in (("scores", schema.SCORES), ("embeddings", schema.embeddings(2, 2))):
        known = [{name: value for name, value in row.items() if name in columns.names} for row in rows]
        path = f"{dest.root}/{table}/run_id={RUN}/0.parquet"
        dest.write_parquet(path, pa.Table.from_pylist(known, schema=columns))
    failed = sum(row.get("error_kind") is not None for row in rows)
    bundle = {"name": "builtin", "version": "0.3.0", "encoder_fingerprint": "encoder-1"}
    dest.commit(
        {
            "run_id": RUN,
            "kind": "score",
            "library": "/photos",
            "started_at": "2026-01-01T00:00:00.000+00:00",
            "bundle": bundle | {"scorer_fingerprint": "scorer-1", "scorer_kind": "lightgbm"},
            "counts": {"to_do": len(rows), "scored": len(rows) - failed, "failed": failed},
            "environment": ENVIRONMENT,
        }
        | (record or {})
    )
    return dest


def write_groups(dest: Destination, groups: Sequence[tuple[str, Sequence[tuple[dict[str, Any], str | None]]]]) -> None:
    """The groups table: each group's kind, and its photos with their reasons, the pick first."""
    rows = [
        {
            "image_id": photo["image_id"],
            "uri": photo["uri"],
            "group_id": min(member["image_id"] for member, _ in members),
            "group_kind": kind,
            "group_size": len(members),
            "rank_in_group": place + 1,
            "is_best": place == 0,
            "reason": reason,
        }
        for kind, members in groups
        for place, (photo, reason) in enumerate(members)
    ]
    dest.write_parquet(f"{dest.root}/groups/groups.parquet", pa.Table.from_pylist(rows, schema=schema.GROUPS))
