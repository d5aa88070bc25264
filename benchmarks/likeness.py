"""How alike are versions of a photo, and photos that have nothing in common: what `groups.Ties` was set by.

    python -m benchmarks.likeness FOLDER            # of 150 photos, by a seeded choice

The folder's photos should be of different things: any two of them count as unrelated.
"""

from __future__ import annotations

import argparse
import io
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageEnhance, ImageFilter

from picinspector import schema
from picinspector.bundle import open_bundle
from picinspector.groups import Ties
from picinspector.photo import Limits
from picinspector.stages.encode import Encode
from picinspector.stages.read import crops_of, read_photo, to_table

_ENCODERS = ("clip_embedding", "dinov2_embedding")
_BATCH = 32


def _framed(image: Image.Image, right: float = 0.0, down: float = 0.0) -> Image.Image:
    """What a camera sees that is turned a little: 88 % of each side, moved by these shares."""
    (width, height), rim = image.size, 0.06
    left, top = width * (rim + right), height * (rim + down)
    return image.crop((int(left), int(top), int(left + 0.88 * width), int(top + 0.88 * height)))


#: What each is compared with is `original`, but for the frames: those with `frame`.
VERSIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "original": lambda image: image,
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "25 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.25),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "frame": _framed,
    "frame moved 3 %": lambda image: _framed(image, 0.03, 0.02),
    "frame moved 6 %": lambda image: _framed(image, 0.06, 0.05),
    "frame turned 2 degrees": lambda image: _framed(image.rotate(2, Image.Resampling.BICUBIC)),
}


def embed(images: list[Image.Image]) -> pa.Table:
    """Rows of `schema.embeddings` of these, each saved as a JPEG, by the builtin bundle."""
    bundle = open_bundle("builtin")
    crops, encode = crops_of(bundle), Encode(os.fspath(bundle.folder))
    parts = []
    for start in range(0, len(images), _BATCH):
        photos = []
        for image in images[start : start + _BATCH]:
            file = io.BytesIO()
            image.save(file, "JPEG", quality=92)
            photos.append(read_photo(file.getvalue(), crops, Limits(), ".jpg"))
        rows = [{"image_id": "", "uri": str(number)} for number in range(len(photos))]
        manifest = pa.Table.from_pylist(rows, schema=schema.MANIFEST)
        parts.append(encode(to_table(manifest, photos, tuple(crops))))
    return pa.concat_tables(parts)


def main() -> None:
    """Embed, compare, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=150)
    arguments = parser.parse_args()
    files = sorted(path for path in arguments.folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    chosen = random.Random(0).sample(files, min(arguments.count, len(files)))
    images = [version(Image.open(file).convert("RGB")) for file in chosen for version in VERSIONS.values()]
    found = embed(images)
    # (photo, version, width) of each encoder; (photo, version) of the hashes
    shape = (len(chosen), len(VERSIONS))
    vectors = {
        name: found.column(name).combine_chunks().flatten().to_numpy().astype(np.float32).reshape(*shape, -1)
        for name in _ENCODERS
    }
    hashes = found.column("phash").to_numpy().reshape(shape)

    print("| cosine of unrelated photos | median | 999 of 1000 | most |\n|---|---|---|---|")
    for name, known in vectors.items():
        cosine = (known[:, 0] @ known[:, 0].T)[np.triu_indices(len(chosen), 1)]
        print(f"| {name} | {np.median(cosine):.2f} | {np.quantile(cosine, 0.999):.2f} | {cosine.max():.2f} |")
    bits = Ties().near_bits
    print(f"\n| version | CLIP: 1 of 20 is under, median | DINOv2 | hash within {bits} bits |\n|---|---|---|---|")
    for at, version in enumerate(VERSIONS):
        base = list(VERSIONS).index("frame") if version.startswith("frame ") else 0
        if at == base or version == "frame":
            continue
        figures = []
        for known in vectors.values():
            cosine = np.einsum("nd,nd->n", known[:, at], known[:, base])
            figures.append(f"{np.quantile(cosine, 0.05):.2f}, {np.median(cosine):.2f}")
        near = np.mean(np.bitwise_count(hashes[:, at] ^ hashes[:, base]) <= bits)
        print(f"| {version} | {' | '.join(figures)} | {near:.0%} |")


if __name__ == "__main__":
    main()
