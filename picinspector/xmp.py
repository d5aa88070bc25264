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

_PACKET = re.compile(rb"<[\w.-]+:(?:xmpmeta|xapmeta|RDF)\b.*?</[\w.-]+:RDF\s*>", re.DOTALL)
_COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)
_PREFIX = re.compile(rb"""\bxmlns:([\w.-]+)\s*=\s*["']http://ns\.adobe\.com/xap/1\.0/["']""")
_VALUE = rb"""(?:\s*=\s*["']\s*|\s*>\s*)([-+]?\d+(?:\.\d+)?)\s*["'<]"""

#: Photos read at once, and what is read of a JPEG, whose packet comes before its pixels; others may end with it.
_PHOTOS_AT_ONCE = 32
_JPEG_BYTES = 1024**2
_JPEG = (".jpg", ".jpeg", ".jpe")


def find_rating(data: bytes) -> float | None:
    """The rating in a sidecar or in a photo's bytes: 1 to 5, -1 for rejected, 0 for taken back; None without one.

    Packets that a container stores compressed (zTXt of PNG) are not seen.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = data.decode("utf-16", errors="replace").encode()
    for packet in _PACKET.findall(data):
        text = _COMMENT.sub(b"", packet)
        for prefix in _PREFIX.findall(text):
            found = re.search(rb"[\s<]" + re.escape(prefix) + rb":Rating" + _VALUE, text)
            # Other programs write 0-99 into fields of the same name; outside of its range it is no xmp:Rating.
            if found and -1 <= (value := float(found[1])) <= 5:
                return value
    return None


def read_ratings(uris: Sequence[str], options: Mapping[str, Any] | None = None) -> tuple[dict[str, float], int]:
    """The ratings of these photos; a sidecar (`photo.xmp`, `photo.jpg.xmp`) speaks before the photo.

    Args:
        uris: paths or fsspec URLs.
        options: fsspec storage options.

    Returns:
        uri -> rating (1 to 5, -1 rejected) of those that have one; how many photos could not be read.

    Raises:
        StorageError: a folder of them cannot be listed.
    """
    sidecars = _list_sidecars(uris, options)
    beside = {uri: sidecars.get(uri) or sidecars.get(posixpath.splitext(uri)[0]) for uri in uris}
    wanted = sorted({path for path in beside.values() if path})
    of_sidecar = {
        path: None if isinstance(data, PhotoError) else find_rating(data)
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
    for suffixed, limit in ((True, _JPEG_BYTES), (False, 512 * 1024**2)):
        photos = [uri for uri in inside if uri.lower().endswith(_JPEG) == suffixed]
        for start in range(0, len(photos), _PHOTOS_AT_ONCE):
            batch = photos[start : start + _PHOTOS_AT_ONCE]
            for uri, data in zip(batch, fetch(batch, options, limit), strict=True):
                if isinstance(data, PhotoError):
                    unreadable += 1
                elif value := find_rating(data):
                    ratings[uri] = value
    return ratings, unreadable


def _list_sidecars(uris: Sequence[str], options: Mapping[str, Any] | None) -> dict[str, str]:
    """URI without `.xmp` -> URI, of every sidecar beside these photos. Web servers cannot be listed."""
    folders = sorted({posixpath.dirname(uri) for uri in uris if not uri.startswith(("http://", "https://"))})
    with ThreadPoolExecutor(16) as pool:
        listed = pool.map(lambda folder: _list_folder(folder, options), folders)
        paths = [path for folder in listed for path in folder if path.lower().endswith(".xmp")]
    return {path[: -len(".xmp")]: path for path in paths}


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
