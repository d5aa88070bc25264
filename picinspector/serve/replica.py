"""What runs on a replica: the stages of the batch job, each batch made of the requests that came together."""

from __future__ import annotations

import asyncio
import hashlib
import io
import math
import os
import queue
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from ray import serve

from picinspector import resize, schema
from picinspector.bundle import open_bundle
from picinspector.errors import PhotoError
from picinspector.manifest import image_id
from picinspector.photo import Limits
from picinspector.serve.problems import ReplicaError, cause_of
from picinspector.stages.guard import Guard
from picinspector.stages.read import caption_crop, crops_of, read_photo, to_table
from picinspector.wording import Facts, compose

#: How long the first photo of a batch waits for others: those that waited for the models all come at once.
_WAIT_S = 0.003


class Replica:
    """Judges photos: decodes each in a process of its own, encodes and scores what came together in one batch."""

    def __init__(
        self,
        bundle: str,
        fingerprints: Mapping[str, str],
        limits: Limits,
        captions: bool,
        threads: int | None,
        decoders: int,
        batch_size: int,
        timeout_s: float,
    ) -> None:
        """Load the models, start the decoders, and judge one photo, so that the first of a client waits for nothing.

        Args:
            bundle: name or folder of the bundle on this machine.
            fingerprints: of the driver's bundle, arguments of `Bundle.expect`.
            limits: of one photo.
            captions: whether the bundle's captioner describes the photos; else they are described from the facts.
            threads: of the encoders on the CPU; None on a GPU.
            decoders: processes that decode. A photo that kills its own, hangs in it or fills its memory takes nothing
                else along.
            batch_size: photos of one encoder call, at most.
            timeout_s: of a request. Decoding may take a third of it in processor time, and half of it by the clock: the
                photo that hangs in its decoder is named before the request's time is up.

        Raises:
            BundleError: the bundle cannot be used, or is another than the driver's.
        """
        from picinspector.stages.encode import Encode
        from picinspector.stages.score import Score

        opened = open_bundle(bundle)
        opened.expect(**fingerprints)
        folder, column = os.fspath(opened.folder), next(iter(caption_crop(opened))) if captions else None
        self._crops, self._limits, self._trained = crops_of(opened, captions), limits, opened.has("scorer")
        self._stages: list[Any] = [Encode(folder, threads, keep=column)]
        if column is not None:
            from picinspector.stages.caption import Caption

            self._stages.append(Caption(folder, column))
        self._stages.append(Score(folder))
        self._guards: queue.SimpleQueue[Guard[dict[str, Any]]] = queue.SimpleQueue()
        for _ in range(decoders):
            self._guards.put(Guard(read_photo, timeout_s / 3, prepare=_prepare, patience=1.5))
        self._decoders = ThreadPoolExecutor(decoders, "decode")
        self._models, self._free = ThreadPoolExecutor(1, "judge"), asyncio.Event()
        self._free.set()
        self._judge_together.set_max_batch_size(batch_size)
        self._timeout_s, self._busy_since, self._is_doubtful = timeout_s, math.inf, False
        seen = list(self._decoders.map(self._decode, [_sample()] * decoders, ["warm.png"] * decoders))
        self._seen_sample = seen[:1]
        self._judge(self._seen_sample)

    async def judge(self, data: bytes, name: str) -> dict[str, Any]:
        """Everything that a run would find out about one photo.

        Args:
            data: the whole file.
            name: what to call it; its extension tells camera raw from TIFF.

        Returns:
            a row of `schema.SCORES`, with `facts` and `measurements`.
        """
        try:
            return await self._judge_one(data, name)
        except Exception as error:  # what the log has to say of it is known here only
            raise ReplicaError(*cause_of(error)) from None

    async def check_health(self) -> None:
        """Asked by Ray Serve, every ten seconds: whoever fails three times in a row is replaced.

        A device may be lost to its process, which then fails with every batch, and models may hang.

        Raises:
            RuntimeError: a batch takes longer than anybody waits for it.
            Exception: a batch has failed, and so does now a photo with which all was well.
        """
        if time.monotonic() - self._busy_since > self._timeout_s:
            raise RuntimeError(f"the models have not answered for {self._timeout_s:g} s")
        if self._is_doubtful:
            await asyncio.get_running_loop().run_in_executor(self._models, self._judge, self._seen_sample)
            self._is_doubtful = False

    async def _judge_one(self, data: bytes, name: str) -> dict[str, Any]:
        seen = await asyncio.get_running_loop().run_in_executor(self._decoders, self._decode, data, name)
        # Ray Serve closes a batch when its wait is over, also while the models are busy with another. Held back until
        # they are free, all that has come becomes one batch: on two cores a photo by itself takes 70 ms of them, among
        # 16 it takes 43 (measured, builtin bundle).
        await self._free.wait()
        row: dict[str, Any] = await self._judge_together(seen)
        return row

    @serve.batch(batch_wait_timeout_s=_WAIT_S)  # type: ignore[untyped-decorator]
    async def _judge_together(self, seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self._free.clear()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._models, self._judge_watched, seen)
        finally:
            self._free.set()

    def _decode(self, data: bytes, name: str) -> dict[str, Any]:
        """A row of the manifest and what `read_photo` says of it."""
        guard = self._guards.get()
        try:
            seen = guard(data, self._crops, self._limits, os.path.splitext(name)[1])  # noqa: PTH122
        except PhotoError as error:
            seen = {"error_kind": error.kind.value, "error_message": error.message}
        finally:
            self._guards.put(guard)
        etag = seen.get("content_hash") or hashlib.sha256(data).hexdigest()[:32]
        return {"image_id": image_id(name, etag), "uri": name, "etag": etag, "size_bytes": len(data), **seen}

    def _judge_watched(self, seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The same, and `check_health` is told of it."""
        self._busy_since = time.monotonic()
        try:
            return self._judge(seen)
        except Exception:
            self._is_doubtful = True
            raise
        finally:
            self._busy_since = math.inf

    def _judge(self, seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
        manifest = pa.Table.from_pylist([_only(row, schema.MANIFEST.names) for row in seen], schema=schema.MANIFEST)
        photos = rows = to_table(manifest, seen, tuple(self._crops))
        for stage in self._stages:
            rows = stage(rows)
        known = photos.select([*schema.FACTS.names, *schema.MEASUREMENT_FIELDS.names]).to_pylist()
        return [self._describe(*both) for both in zip(rows.to_pylist(), known, strict=True)]

    def _describe(self, row: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
        """The row of one photo with what else is known of it; and in words, where nobody has said them."""
        if row["caption"] is None and row["error_kind"] is None and self._trained:
            attributes = {name: row[f"attribute_{name}"] for name in schema.ATTRIBUTES}
            scenes = {name: row[f"scene_{name}"] for name in schema.SCENES}
            facts = Facts(attributes, scenes, known["measured_brightness"])
            row |= {"caption": compose(facts), "caption_source": "composed"}
        measured = {name: known[f"measured_{name}"] for name in schema.MEASUREMENTS}
        return row | {"facts": _only(known, schema.FACTS.names), "measurements": measured}


def _only(row: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: row.get(name) for name in names}


def _prepare() -> None:
    """In a decoder, once."""
    resize.load()
    import cv2
    import torch

    # Each photo has one core, as in a run; the others are decoding other photos.
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _sample() -> bytes:
    """A photo to start with: noise, 640 x 480 px, PNG."""
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()
