"""Ratings that photographers gave: `xmp:Rating` in sidecars and in the photos themselves.

XMP Specification Part 1 (ISO 16684-1), `Rating` of the namespace `http://ns.adobe.com/xap/1.0/`: 1 to 5 stars, -1
rejected, 0 or absent not rated. A regular expression reads it, as attribute or as element: no XML parser is fed what
strangers wrote, and entities are not expanded.
"""

from __future__ import annotations

import codecs
import posixpath
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from picinspector.errors import PhotoError, StorageError
from picinspector.storage import fetch, open_filesystem, redact, to_photo_error, to_uri

REJECTED = -1.0
#: Our own namespace: what we wrote into a sidecar is remembered there, so that it is never taken for a person's.
NAMESPACE = "http://picinspector.org/ns/1.0/"

_PACKET = re.compile(rb"<[\w.-]+:(?:xmpmeta|xapmeta|RDF)\b.*?</[\w.-]+:RDF\s*>", re.DOTALL)
_COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)
_PREFIX = rb"""\bxmlns:([\w.-]+)\s*=\s*["']%s["']"""
_RATING = (re.compile(_PREFIX % rb"http://ns\.adobe\.com/xap/1\.0/"), b"Rating")
_WRITTEN = (re.compile(_PREFIX % re.escape(NAMESPACE.encode())), b"WrittenRating")
_VALUE = rb"""(?:\s*=\s*["']\s*|\s*>\s*)([-+]?\d+(?:\.\d+)?)\s*["'<]"""

#: Photos read at once, and what is read of a JPEG, whose packet comes before its pixels; others may end with it.
_PHOTOS_AT_ONCE = 32
_JPEG_BYTES = 1024**2
_JPEG = (".jpg", ".jpeg", ".jpe")


def find_rating(data: bytes) -> float | None:
    """The rating in a sidecar or in a photo's bytes: 1 to 5, -1 for rejected, 0 for taken back; None without one.

    Packets that a container stores compressed (zTXt of PNG) are not seen.
    """
    return _find(data, *_RATING)


def find_written_rating(data: bytes) -> float | None:
    """The rating that we last wrote into a sidecar; None if we wrote none, or a person's has taken its place."""
    return _find(data, *_WRITTEN)


def find_persons_rating(data: bytes) -> float | None:
    """As `find_rating`, but None for one that we wrote."""
    value = find_rating(data)
    return None if value == find_written_rating(data) else value


def _find(data: bytes, prefixes: re.Pattern[bytes], name: bytes) -> float | None:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = data.decode("utf-16", errors="replace").encode()
    for packet in _PACKET.findall(data):
        text = _COMMENT.sub(b"", packet)
        for prefix in prefixes.findall(text):
            found = re.search(rb"[\s<]" + re.escape(prefix) + b":" + name + _VALUE, text)
            # Other programs write 0-99 into fields of the same name; outside of its range it is no xmp:Rating.
            if found and -1 <= (value := float(found[1])) <= 5:
                return value
    return None


def read_ratings(uris: Sequence[str], options: Mapping[str, Any] | None = None) -> tuple[dict[str, float], int]:
    """The ratings that people gave these photos; a sidecar (`photo.xmp`, `photo.jpg.xmp`) speaks before the photo.

    A rating that we wrote ourselves is none: nobody learns a person's taste from our own scores.

    Args:
        uris: paths or fsspec URLs.
        options: fsspec storage options.

    Returns:
        uri -> rating (1 to 5, -1 rejected) of those that have one; how many photos could not be read.

    Raises:
        StorageError: a folder of them cannot be listed.
    """
    sidecars, unlisted = list_sidecars(uris, options)
    for error in unlisted.values():
        raise error
    beside = {uri: next(iter(beside_photo(uri, sidecars)), None) for uri in uris}
    wanted = sorted({path for path in beside.values() if path})
    of_sidecar = {
        path: None if isinstance(data, PhotoError) else find_persons_rating(data)
        for path, data in zip(wanted, fetch(wanted, options), strict=True)
    }
    ratings, unreadable = {}, 0
    inside = []
    for uri, path in beside.items():
        value = of_sidecar[path] if path else None
        if value is None:
            inside.append(uri)
        elif value:  # stars taken back beside the photo may still be in it
            ratings[uri] = value
    for uri, rating in read_embedded(inside, options).items():
        if isinstance(rating, PhotoError):
            unreadable += 1
        elif rating:
            ratings[uri] = rating
    return ratings, unreadable


def read_embedded(
    uris: Sequence[str], options: Mapping[str, Any] | None = None
) -> dict[str, float | PhotoError | None]:
    """uri -> the rating inside of a photo, as `find_rating`, or why it could not be read."""
    found: dict[str, float | PhotoError | None] = {}
    for suffixed, limit in ((True, _JPEG_BYTES), (False, 512 * 1024**2)):
        photos = [uri for uri in uris if uri.lower().endswith(_JPEG) == suffixed]
        for start in range(0, len(photos), _PHOTOS_AT_ONCE):
            batch = photos[start : start + _PHOTOS_AT_ONCE]
            for uri, data in zip(batch, fetch(batch, options, limit), strict=True):
                found[uri] = data if isinstance(data, PhotoError) else find_rating(data)
    return found


def list_sidecars(
    uris: Sequence[str], options: Mapping[str, Any] | None = None
) -> tuple[dict[str, str], dict[str, StorageError]]:
    """URI without `.xmp` -> URI, of every sidecar beside these photos; folder -> why it could not be listed.

    Each folder is listed once. Web servers cannot be listed.
    """
    folders = sorted({posixpath.dirname(uri) for uri in uris if not uri.startswith(("http://", "https://"))})

    def sidecars(folder: str) -> list[str] | StorageError:
        try:
            return [path for path in _list_folder(folder, options) if path.lower().endswith(".xmp")]
        except StorageError as error:
            return error

    with ThreadPoolExecutor(16) as pool:
        listed = dict(zip(folders, pool.map(sidecars, folders), strict=True))
    found = (path for paths in listed.values() if not isinstance(paths, StorageError) for path in paths)
    unlisted = {folder: paths for folder, paths in listed.items() if isinstance(paths, StorageError)}
    return {path[: -len(".xmp")]: path for path in found}, unlisted


def beside_photo(uri: str, sidecars: Mapping[str, str]) -> list[str]:
    """The sidecars of a photo among those that `list_sidecars` found: `photo.jpg.xmp` before `photo.xmp`."""
    found = (sidecars.get(uri), sidecars.get(posixpath.splitext(uri)[0]))
    return list(dict.fromkeys(path for path in found if path))


def _list_folder(folder: str, options: Mapping[str, Any] | None) -> list[str]:
    filesystem, path = open_filesystem(folder, options)
    filesystem.invalidate_cache()  # other programs write there
    try:
        return [to_uri(filesystem, name) for name in filesystem.ls(path, detail=False)]
    except FileNotFoundError:
        return []  # moved away since it was scored
    except Exception as error:  # any storage library's own type
        reason = to_photo_error(error).message
        raise StorageError(f"cannot list {redact(folder)}: {reason}; check the credentials") from error
