"""A stand-in for `stages.encode.Encode`, for runs in which it does not matter what the encoders see.

A worker that imports torch, open_clip and transformers takes eight seconds of CPU before its first photo; this one
needs none of them.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import numpy as np
import pyarrow as pa

from picinspector import schema
from picinspector.bundle import open_bundle
from picinspector.stages import CROP_COLUMNS, Report, describe_batch


class Encode:
    """Embeddings as wide as the bundle's, drawn by a crop's hash: equal crops have equal ones."""

    def __init__(self, bundle: str, report: Report, fingerprint: str, **_: Any) -> None:
        opened = open_bundle(bundle)
        opened.expect(encoder=fingerprint)
        clip = json.loads((opened.piece("clip") / "open_clip_config.json").read_text("utf-8"))["model_cfg"]
        dinov2 = json.loads((opened.piece("dinov2") / "config.json").read_text("utf-8"))
        self._schema = schema.embeddings(clip["embed_dim"], dinov2["hidden_size"])
        self._fingerprint, self._report = fingerprint, report

    def __call__(self, photos: pa.Table) -> pa.Table:
        started = time.perf_counter()
        columns: dict[str, Any] = {part.name: pa.nulls(photos.num_rows, part.type) for part in self._schema}
        columns |= {name: photos.column(name) for name in photos.column_names if name not in CROP_COLUMNS}
        for crops, name in zip(CROP_COLUMNS, ("clip_embedding", "dinov2_embedding"), strict=False):
            field = self._schema.field(name)
            vectors = [draw(crop.as_buffer(), field.type.list_size) for crop in photos.column(crops)]
            columns[name] = pa.array(vectors, field.type)
        columns["encoder_fingerprint"] = pa.repeat(self._fingerprint, photos.num_rows)
        self._report(describe_batch("encode", photos.num_rows, {}, started))
        return pa.table([columns[name] for name in self._schema.names], schema=self._schema)


def draw(crop: bytes | None, width: int) -> np.ndarray | None:
    """An L2-normalised float16 (width,); None for no crop."""
    if crop is None:
        return None
    seed = int.from_bytes(hashlib.sha256(crop).digest()[:8], "big")
    vector = np.random.default_rng(seed).normal(size=width)
    return (vector / np.linalg.norm(vector)).astype(np.float16)
