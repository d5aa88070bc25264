"""Thumbnails of the photos that are shown: read once more, small, as WebP, within a number of bytes."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from picinspector.errors import PhotoError
from picinspector.photo import thumbnail
from picinspector.storage import UNKNOWN_BYTES, fetch

#: Bytes of photos that are fetched at a time; they are dropped as soon as they are decoded.
_WINDOW_BYTES = 128 * 1024**2
#: libwebp's effort, 0 to 6. Measured on 40 photos of BIQ2021: 4 takes twice as long and saves 4 %.
_EFFORT = 2


class Level(NamedTuple):
    """Size and quality of thumbnails, and what one takes: the mean over 40 photos of BIQ2021."""

    side_px: int
    quality: int
    typical_bytes: int


LEVELS = (
    Level(640, 78, 25_000),
    Level(480, 76, 20_000),
    Level(400, 74, 15_000),
    Level(320, 72, 10_600),
    Level(256, 68, 7_400),
    Level(208, 60, 5_000),
    Level(160, 50, 3_000),
)
LEFT_OUT = "left out to keep this page small"


@dataclass(frozen=True, slots=True)
class Thumbnails:
    """Thumbnails, one entry for each photo.

    Attributes:
        images: base64 of a WebP picture; None where there is none.
        reasons: why there is none; None where there is one.
        side_px: longer side of the pictures, at most.
        unreadable: photos that could not be read or decoded.
        left_out: photos whose picture would have been too much.
    """

    images: list[str | None]
    reasons: list[str | None]
    side_px: int
    unreadable: int = 0
    left_out: int = 0

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(image is not None for image in self.images)


def none_for(photos: Sequence[Mapping[str, Any]]) -> Thumbnails:
    """No thumbnails, each for the longest reason there may be: what a page takes without them."""
    return Thumbnails([None] * len(photos), ["x" * _REASON_CHARACTERS] * len(photos), LEVELS[0].side_px)


_REASON_CHARACTERS = 120


def make(
    photos: Sequence[Mapping[str, Any]],
    max_bytes: int,
    side_px: int = LEVELS[0].side_px,
    options: Mapping[str, Any] | None = None,
    threads: int = 1,
) -> Thumbnails:
    """Thumbnails of photos, that come first those that matter most.

    The first level is chosen by what is typical; where it turns out too large, all are made smaller, a level at a time.
    Beyond the last level the last ones are left out.

    Args:
        photos: `uri`, and as the tables have them `etag` and `size_bytes`: a photo replaced since is not shown.
        max_bytes: of all pictures together, as base64.
        side_px: longer side at most.
        options: fsspec storage options.
        threads: that decode.
    """
    allowed = [level for level in LEVELS if level.side_px <= side_px] or [LEVELS[-1]._replace(side_px=side_px)]
    fitting = (at for at, level in enumerate(allowed) if _base64_bytes(level.typical_bytes) * len(photos) <= max_bytes)
    at = next(fitting, len(allowed) - 1)
    with ThreadPoolExecutor(threads) as pool:
        found = list(_read(photos, allowed[at], options, pool))
        pictures = [content for content in found if isinstance(content, bytes)]
        while sum(_base64_bytes(len(content)) for content in pictures) > max_bytes and at + 1 < len(allowed):
            at += 1
            pictures = list(pool.map(lambda content: _smaller(content, allowed[at]), pictures))  # noqa: B023
    images: list[str | None] = []
    reasons: list[str | None] = []
    left, smaller, left_out = max_bytes, iter(pictures), 0
    for content in found:
        if isinstance(content, PhotoError):
            images.append(None)
            reasons.append(f"{content.kind}: {content.message}"[:_REASON_CHARACTERS])
            continue
        text = base64.b64encode(next(smaller)).decode()
        left -= len(text)
        left_out += left < 0
        images.append(text if left >= 0 else None)
        reasons.append(None if left >= 0 else LEFT_OUT)
    unreadable = sum(isinstance(content, PhotoError) for content in found)
    return Thumbnails(images, reasons, allowed[at].side_px, unreadable, left_out)


def _base64_bytes(size: int) -> int:
    return 4 * -(-size // 3) + 3  # and what JSON puts around it


def _read(
    photos: Sequence[Mapping[str, Any]], level: Level, options: Mapping[str, Any] | None, pool: ThreadPoolExecutor
) -> Iterator[bytes | PhotoError]:
    for window in _windows(photos):
        uris = [photo["uri"] for photo in window]
        etags, sizes = ([photo[name] for photo in window] for name in ("etag", "size_bytes"))
        yield from pool.map(_picture, fetch(uris, options, etags=etags, sizes=sizes), uris, [level] * len(uris))


def _windows(photos: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Runs of photos that are fetched at once."""
    window: list[Mapping[str, Any]] = []
    size = 0
    for photo in photos:
        bytes_ = UNKNOWN_BYTES if photo["size_bytes"] is None else photo["size_bytes"]
        if window and size + bytes_ > _WINDOW_BYTES:
            yield window
            window, size = [], 0
        window.append(photo)
        size += bytes_
    if window:
        yield window


def _picture(content: bytes | PhotoError, uri: str, level: Level) -> bytes | PhotoError:
    """The thumbnail of a fetched photo; errors stay values, as `storage.fetch` has them."""
    if isinstance(content, PhotoError):
        return content
    try:
        pixels = thumbnail(content, level.side_px, suffix=os.path.splitext(uri)[1])  # noqa: PTH122
    except PhotoError as error:
        return error
    return _encode(pixels, level)


def _encode(pixels: np.ndarray, level: Level) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "WEBP", quality=level.quality, method=_EFFORT)
    return content.getvalue()


def _smaller(content: bytes, level: Level) -> bytes:
    """A thumbnail at a lower level, made from itself: the photo is not here any more."""
    image = Image.open(io.BytesIO(content), formats=("WEBP",))
    image.thumbnail((level.side_px, level.side_px), Image.Resampling.LANCZOS)
    return _encode(np.asarray(image.convert("RGB")), level)
