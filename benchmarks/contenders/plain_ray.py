"""Plain Ray Data after its guides to images and to batch inference: read, transform, an actor a model, write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import ray
from PIL import Image
from torchvision import transforms

from benchmarks.contenders import BATCH_SIZE, CLIP_FOLDER, DINOV2_FOLDER, run
from picinspector.clip import ClipEncoder
from picinspector.dinov2 import Dinov2Encoder


def preprocess(row: dict[str, Any]) -> dict[str, Any]:
    """A photo's pixels (H, W, 3) to the crop that both models take, uint8 (S, S, 3)."""
    return {"path": row["path"], "crop": np.asarray(_transform(Image.fromarray(row["image"])))}


_transform = transforms.Compose(
    [transforms.Resize(448, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(448)]
)


class Clip:
    """A batch's crops to `clip_embedding`."""

    def __init__(self) -> None:
        self._encoder = ClipEncoder(CLIP_FOLDER)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`path` and `crop` to the same and the embedding."""
        batch["clip_embedding"] = self._encoder.encode(batch["crop"])
        return batch


class Dinov2:
    """A batch's crops, which end here, to `dinov2_embedding`."""

    def __init__(self) -> None:
        self._encoder = Dinov2Encoder(DINOV2_FOLDER)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All columns to the same without `crop`, and the embedding."""
        batch["dinov2_embedding"] = self._encoder.encode(batch.pop("crop"))
        return batch


def work(library: Path, out: Path) -> int:
    """Embed a library on a local Ray."""
    # Actors hold CPUs as long as the job lasts; of two, little would be left to read with. As many as `ours`.
    ray.init(address="local", num_cpus=len(os.sched_getaffinity(0)) + 4, include_dashboard=False)
    # Tasks of eight photos each read and transform in one, so that whole photos stay out of the object store. Ray's own
    # choice for fewer than 200 files does not, and neither would it with models that ask for the same CPUs as a task.
    blocks = max(1, len(list(library.iterdir())) // 8)
    photos = ray.data.read_images(str(library), mode="RGB", include_paths=True, override_num_blocks=blocks)
    photos = photos.map(preprocess)
    pool = ray.data.ActorPoolStrategy(size=1)
    for model in (Clip, Dinov2):
        photos = photos.map_batches(model, batch_size=BATCH_SIZE, num_cpus=0.5, compute=pool)
    photos.write_parquet(str(out))
    return int(pyarrow.dataset.dataset(out).count_rows())


if __name__ == "__main__":
    run(work)
