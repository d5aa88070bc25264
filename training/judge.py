"""A bundle's whole way from the bytes of photos to scores, in this process and without Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from picinspector import schema
from picinspector.bundle import Bundle
from picinspector.clip import ClipEncoder
from picinspector.dinov2 import Dinov2Encoder
from picinspector.errors import PhotoError, UsageError
from picinspector.measure import measure
from picinspector.photo import decode
from picinspector.schema import ATTRIBUTES, SCENES
from picinspector.stages.score import Score
from picinspector.storage import fetch
from training.datasets import LabelledPhoto

BATCH = 16


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a bundle says of N photos.

    Attributes:
        quality: `quality_score` 1-10, (N,).
        low, high: the interval around it, (N,); None where the scorer gives none.
        attributes: 0-100, (N, 6), in the order of `schema.ATTRIBUTES`.
        scenes: probabilities, (N, 9), in the order of `schema.SCENES`.
    """

    quality: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    attributes: np.ndarray
    scenes: np.ndarray

    def part(self, rows: np.ndarray | slice) -> Judgement:
        """The same of some of the photos."""
        low = self.low[rows] if self.low is not None else None
        high = self.high[rows] if self.high is not None else None
        return Judgement(self.quality[rows], low, high, self.attributes[rows], self.scenes[rows])


class Judge:
    """The encoders and the scorer of one bundle, and a memory of the photos it has seen.

    Attributes:
        dtype: what the encoders run in.
    """

    def __init__(self, bundle: Bundle, dtype: torch.dtype | None = None, cache: Path | None = None) -> None:
        """Load all pieces; the encoders in `dtype` (default: what the device is fast in).

        Args:
            bundle: with a scorer or with zero-shot prompts.
            cache: folder for the embeddings, so that the same photos and encoders need no second pass.
        """
        self._clip = ClipEncoder(bundle.piece("clip"), dtype=dtype)
        self._dinov2 = Dinov2Encoder(bundle.piece("dinov2"), dtype=dtype)
        self._score = Score(str(bundle.folder))
        self.dtype = self._clip.dtype
        name = f"embeddings-{bundle.encoder_fingerprint}-{str(self.dtype).removeprefix('torch.')}.parquet"
        self._cache = cache / name if cache is not None else None
        # SHA-256 of a file's bytes -> its row of the embeddings table.
        self._known: dict[str, dict[str, np.ndarray]] = _read_rows(self._cache)

    def judge(self, photos: Iterable[bytes]) -> Judgement:
        """Scores of encoded photos, one at least.

        Raises:
            UsageError: one of them cannot be decoded.
        """
        return self.score(self.embed_all(enumerate(photos, 1)))

    def judge_labelled(self, photos: Sequence[LabelledPhoto]) -> Judgement:
        """Scores of labelled photos, wherever they are.

        Raises:
            UsageError: one of them cannot be read; the message names it.
        """
        return self.score(self.embed_all(_read(photos)))

    def embed_all(self, photos: Iterable[tuple[object, bytes]]) -> dict[str, np.ndarray]:
        """`embed` of any number of (name, encoded photo), those left out that were seen before."""
        keys: list[str] = []
        waiting: dict[str, tuple[object, bytes]] = {}
        before = len(self._known)
        try:
            for name, data in photos:
                keys.append(hashlib.sha256(data).hexdigest())
                if keys[-1] not in self._known:
                    waiting[keys[-1]] = (name, data)
                if len(waiting) == BATCH:
                    self._remember(waiting)
            self._remember(waiting)
        finally:
            if self._cache is not None and len(self._known) > before:
                _write_rows(self._cache, self._known)
        rows = [self._known[key] for key in keys]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def embed(self, batch: list[bytes]) -> dict[str, np.ndarray]:
        """The columns of the embeddings table that scorers read, of one batch of encoded photos.

        Returns:
            measured_*: float32 (B,); clip_embedding, dinov2_embedding: float16 (B, D).
        """
        photos = [decode(data, [self._clip.crop, self._dinov2.crop]) for data in batch]
        measured = [measure(photo.working) for photo in photos]
        columns = {f"measured_{name}": np.array([m[name] for m in measured], np.float32) for name in measured[0]}
        columns["clip_embedding"] = self._clip.encode(np.stack([photo.crops[0] for photo in photos]))
        columns["dinov2_embedding"] = self._dinov2.encode(np.stack([photo.crops[1] for photo in photos]))
        return columns

    def score(self, columns: Mapping[str, np.ndarray]) -> Judgement:
        """Scores from embeddings, by the stage that a run uses."""
        table = _to_arrow(columns)
        for name in ("image_id", "uri", "etag", "error_kind", "error_message"):
            table = table.append_column(name, pa.nulls(table.num_rows, pa.string()))
        for part in schema.FACTS:  # the pixels are judged here, not the camera
            table = table.append_column(part, pa.nulls(table.num_rows, part.type))
        table = table.append_column("size_bytes", pa.nulls(table.num_rows, pa.int64()))
        table = table.append_column("last_modified", pa.nulls(table.num_rows, pa.timestamp("us", tz="UTC")))
        scores = self._score(table)

        def column(name: str) -> np.ndarray:
            return np.asarray(scores.column(name).to_numpy(), dtype=np.float64)

        has_interval = scores.column("quality_low").null_count == 0
        return Judgement(
            quality=column("quality_score"),
            low=column("quality_low") if has_interval else None,
            high=column("quality_high") if has_interval else None,
            attributes=np.stack([column(f"attribute_{name}") for name in ATTRIBUTES], axis=1),
            scenes=np.stack([column(f"scene_{name}") for name in SCENES], axis=1),
        )

    def _remember(self, waiting: dict[str, tuple[object, bytes]]) -> None:
        if not waiting:
            return
        try:
            columns = self.embed([data for _, data in waiting.values()])
        except PhotoError as error:
            raise UsageError(f"{_culprit(waiting.values())}: {error.message}; take it out of the labels") from error
        for row, key in enumerate(waiting):
            self._known[key] = {name: values[row] for name, values in columns.items()}
        waiting.clear()


def _read(photos: Sequence[LabelledPhoto]) -> Iterator[tuple[str, bytes]]:
    for start in range(0, len(photos), BATCH):
        uris = [photo.uri for photo in photos[start : start + BATCH]]
        for uri, data in zip(uris, fetch(uris), strict=True):
            if isinstance(data, PhotoError):
                raise UsageError(f"{uri}: {data.message}; take it out of the labels")
            yield uri, data


def _culprit(photos: Iterable[tuple[object, bytes]]) -> object:
    for name, data in photos:
        try:
            decode(data, [])
        except PhotoError:
            return name
    return "a photo"


def _to_arrow(columns: Mapping[str, np.ndarray]) -> pa.Table:
    arrays = {}
    for name, values in columns.items():
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        arrays[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.table(arrays)


def _write_rows(path: Path, known: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    rows = list(known.values())
    table = _to_arrow({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    pq.write_table(table.append_column("sha256", pa.array(known)), temporary)
    temporary.replace(path)


def _read_rows(path: Path | None) -> dict[str, dict[str, np.ndarray]]:
    if path is None or not path.is_file():
        return {}
    table = pq.read_table(path)
    columns = {}
    for name in table.column_names[:-1]:
        column = table.column(name).combine_chunks()
        is_list = pa.types.is_fixed_size_list(column.type)
        values = (column.flatten() if is_list else column).to_numpy(zero_copy_only=False)
        columns[name] = values.reshape(table.num_rows, -1) if is_list else values
    keys = table.column("sha256").to_pylist()
    return {key: {name: values[row] for name, values in columns.items()} for row, key in enumerate(keys)}
