"""Daft after its guides to classes, batches and memory: download, a batch method to crop, a class a model, write."""

from __future__ import annotations

import io
from pathlib import Path

import daft
import numpy as np
import pyarrow.dataset
from daft import DataType, Series, col
from PIL import Image
from torchvision import transforms

from benchmarks.contenders import BATCH_SIZE, CLIP_FOLDER, DINOV2_FOLDER, run
from picinspector.clip import ClipEncoder
from picinspector.dinov2 import Dinov2Encoder

_DECODE_BATCH = 8
_EMBEDDING = DataType.list(DataType.float32())


@daft.cls(max_concurrency=1)
class Clip:
    """Crops to CLIP embeddings."""

    def __init__(self) -> None:
        self._encoder = ClipEncoder(CLIP_FOLDER)

    @daft.method.batch(return_dtype=_EMBEDDING, batch_size=BATCH_SIZE)
    def encode(self, crops: Series) -> list[np.ndarray]:
        """A batch's embeddings."""
        return list(self._encoder.encode(np.stack(crops.to_pylist())).astype(np.float32))


@daft.cls(max_concurrency=1)
class Dinov2:
    """Crops to DINOv2 embeddings."""

    def __init__(self) -> None:
        self._encoder = Dinov2Encoder(DINOV2_FOLDER)

    @daft.method.batch(return_dtype=_EMBEDDING, batch_size=BATCH_SIZE)
    def encode(self, crops: Series) -> list[np.ndarray]:
        """A batch's embeddings."""
        return list(self._encoder.encode(np.stack(crops.to_pylist())).astype(np.float32))


@daft.func.batch(return_dtype=DataType.tensor(DataType.uint8(), (448, 448, 3)))
def crop(photos: Series) -> list[np.ndarray]:
    """Encoded photos to the crops that both models take.

    Daft's own `decode_image`, `crop` and `resize` took a fifth longer here, and blur more than the models' transforms.
    """
    images = (Image.open(io.BytesIO(data)).convert("RGB") for data in photos.to_pylist())
    return [np.asarray(_transform(image)) for image in images]


_transform = transforms.Compose(
    [transforms.Resize(448, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(448)]
)


def work(library: Path, out: Path) -> int:
    """Embed a library on Daft's own engine."""
    # Small batches in front of what grows: photos of 36 MB. The guide to memory says so.
    photos = daft.from_glob_path(f"{library}/**/*.jpg").select("path").into_batches(_DECODE_BATCH)
    photos = photos.select("path", crop(col("path").download()).alias("crop"))
    embeddings = {"clip_embedding": Clip().encode(col("crop")), "dinov2_embedding": Dinov2().encode(col("crop"))}
    photos.with_columns(embeddings).exclude("crop").write_parquet(str(out))
    return int(pyarrow.dataset.dataset(out).count_rows())


if __name__ == "__main__":
    run(work)
