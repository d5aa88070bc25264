"""The origin's way: one photo after another through each model's own transform and the model, in float32."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

import picinspector.towers  # noqa: F401  makes open_clip find the builtin tower
from benchmarks.contenders import CLIP_FOLDER, DINOV2_FOLDER, run


@torch.no_grad()
def work(library: Path, out: Path) -> int:
    """Embed a library."""
    clip, _, transform = open_clip.create_model_and_transforms(f"local-dir:{CLIP_FOLDER}")
    clip.eval()
    dinov2, processor = AutoModel.from_pretrained(DINOV2_FOLDER), AutoImageProcessor.from_pretrained(DINOV2_FOLDER)
    rows = []
    for path in sorted(library.glob("**/*.jpg")):
        photo = Image.open(path).convert("RGB")
        clip_embedding = clip.encode_image(transform(photo)[None], normalize=True)
        dinov2_embedding = dinov2(**processor(photo, return_tensors="pt")).pooler_output
        rows.append(
            {
                "path": str(path),
                "clip_embedding": clip_embedding[0].numpy(),
                "dinov2_embedding": torch.nn.functional.normalize(dinov2_embedding)[0].numpy(),
            }
        )
    out.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), out / "embeddings.parquet")
    return len(rows)


if __name__ == "__main__":
    run(work)
