"""Photo libraries to measure on: real photographs from the wheels of scikit-image and scikit-learn, made large.

A camera's file is mostly detail and noise, and so costs its decoder what it costs. Photos that are only enlarged are
smooth and compress to a tenth. Here each picture is a mosaic of pieces at their own scale, mirrored and turned, with
the noise of a sensor over it: about 1.8 bits a pixel at quality 90, 4:2:0, as phones and cameras write them.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from jobs.demo import real_photos

#: By name: width and height of 12 and 2 megapixels.
SIZES = {"12mp": (4000, 3000), "2mp": (1632, 1224)}
#: Pictures that differ; a library of more repeats them under other names.
_DISTINCT = 24
_QUALITY, _NOISE_SIGMA, _ENLARGED = 90, 3.0, 2.0


def make(folder: Path, photos: int, size: str, seed: int = 0) -> Path:
    """Write so many JPEGs of `SIZES[size]`; the same seed gives the same files. A folder that is there is kept.

    Returns:
        the folder.
    """
    if folder.is_dir() and len(list(folder.glob("*.jpg"))) >= photos:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    sources = [cv2.resize(photo, None, fx=_ENLARGED, fy=_ENLARGED) for photo in real_photos().values()]
    for number in range(photos):
        path = folder / f"{number:06}.jpg"
        if number < _DISTINCT:
            Image.fromarray(_mosaic(sources, *SIZES[size], random)).save(path, quality=_QUALITY, subsampling=2)
        else:
            path.hardlink_to(folder / f"{number % _DISTINCT:06}.jpg")
    return folder


def _mosaic(sources: list[np.ndarray], width: int, height: int, random: np.random.Generator) -> np.ndarray:
    """Pieces of the sources side by side, in uint8 (height, width, 3)."""
    picture = np.empty((height, width, 3), np.int16)
    side = 640
    for top in range(0, height, side):
        for left in range(0, width, side):
            source = sources[random.integers(len(sources))]
            y, x = (int(random.integers(max(1, length - side))) for length in source.shape[:2])
            piece = np.rot90(source[y : y + side, x : x + side], int(random.integers(4)))
            piece = cv2.resize(piece, (side, side))[: height - top, : width - left]
            picture[top : top + side, left : left + side] = piece
    noise = random.normal(0.0, _NOISE_SIGMA, (height, width, 1))
    return np.clip(picture + noise, 0, 255).astype(np.uint8)
