"""A torch DataLoader in clip-retrieval's manner: workers open, decode and transform; the main process encodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.contenders import BATCH_SIZE, CLIP_FOLDER, DINOV2_FOLDER, run
from picinspector.clip import ClipEncoder
from picinspector.dinov2 import Dinov2Encoder

_WORKERS = 2


class Photos(Dataset[tuple[str, torch.Tensor]]):
    """A folder's JPEGs: path, and the crop that both models take, uint8 (S, S, 3)."""

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.glob("**/*.jpg"))
        self._transform = transforms.Compose(
            [transforms.Resize(448, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(448)]
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor]:
        path = self._paths[index]
        crop = self._transform(Image.open(path).convert("RGB"))
        return str(path), torch.from_numpy(np.array(crop))


def work(library: Path, out: Path) -> int:
    """Embed a library."""
    encoders = {"clip_embedding": ClipEncoder(CLIP_FOLDER), "dinov2_embedding": Dinov2Encoder(DINOV2_FOLDER)}
    names: list[str] = []
    parts: dict[str, list[np.ndarray]] = {column: [] for column in encoders}
    for paths, crops in DataLoader(Photos(library), BATCH_SIZE, num_workers=_WORKERS, prefetch_factor=2):
        names += paths
        for column, encoder in encoders.items():
            parts[column].append(encoder.encode(crops.numpy()))
    columns = {column: list(np.concatenate(embeddings)) for column, embeddings in parts.items()}
    out.mkdir(parents=True)
    pq.write_table(pa.table({"path": names} | columns), out / "embeddings.parquet")
    return len(names)


if __name__ == "__main__":
    run(work)
