"""Ratings and labels that photographers gave: `xmp:Rating` and `xmp:Label` in sidecars and in the photos themselves.

XMP Specification Part 1 (ISO 16684-1), namespace `http://ns.adobe.com/xap/1.0/`. `Rating`: 1 to 5 stars, -1 rejected,
0 or absent not rated. `Label`: a word or a colour. A regular expression reads them, as attribute or as element: no XML
parser is fed what strangers wrote, and entities of their own are not expanded.
"""

from __future__ import annotations

import codecs
import html
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from picinspector.errors import PhotoError, StorageError
from picinspector.photo import RAW_SUFFIXES
from picinspector.storage import fetch, open_filesystem, redact, to_photo_error, to_uri

REJECTED = -1.0
#: Our own namespace: what we wrote into a sidecar is remembered there, so that it is never taken for a person's.
NAMESPACE = "http://picinspector.org/ns/1.0/"

_PACKET = re.compile(rb"<[\w.-]+:(?:xmpmeta|xapmeta|RDF)\b.*?</[\w.-]+:RDF\s*>", re.DOTALL)
_COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)
_PREFIX = rb"""\bxmlns:([\w.-]+)\s*=\s*["']%s["']"""
_XMP = re.compile(_PREFIX % rb"http://ns\.adobe\.com/xap/1\.0/")
_OURS = re.compile(_PREFIX % re.escape(NAMESPACE.encode()))
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
_VALUE = rb"""(?:\s*=\s*(?:"([^"<]*)"|'([^'<]*)')|(?:\s[^<>]*)?>([^<]*)<)"""

_JPEG = (".jpg", ".jpeg", ".jpe")
_JPEG_BYTES = 1024**2
#: Whether it is a JPEG, whose packet comes before its pixels; how many are read at once, and how much of each. Others
#: may end with it.
_READS = ((True, 32, _JPEG_BYTES), (False, 8, 512 * 1024**2))
_BESIDE = RAW_SUFFIXES | {".xmp"}


class Found(NamedTuple):
    """What a person said of a photo: `find_persons_rating` and `find_persons_label`."""

    rating: float | None
    label: str | None


def find_rating(data: bytes) -> float | None:
    """The rating in a sidecar or in a photo's bytes: 1 to 5, -1 for rejected, 0 for taken back; None without one.

    Packets that a container stores compressed (zTXt of PNG) are not seen.
    """
    return _find_number(data, _XMP, b"Rating")


def find_written_rating(data: bytes) -> float | None:
    """The rating that we last wrote into a sidecar; None if we wrote none, or a person's has taken its place."""
    return _find_number(data, _OURS, b"WrittenRating")


def find_persons_rating(data: bytes) -> float | None:
    """As `find_rating`, but None for one that we wrote."""
    value = find_rating(data)
    return None if value == find_written_rating(data) else value


def find_label(data: bytes) -> str | None:
    """The label in a sidecar or in a photo's bytes; None without one, and for an empty one."""
    return next((text for text in _find(data, _XMP, b"Label") if text), None)


def find_written_label(data: bytes) -> str | None:
    """The label that we last wrote into a sidecar; None if we wrote none, or a person's has taken its place."""
    return next((text for text in _find(data, _OURS, b"WrittenLabel") if text), None)


def find_persons_label(data: bytes) -> str | None:
    """As `find_label`, but None for one that we wrote."""
    label = find_label(data)
    return None if label == find_written_label(data) else label


def _find_number(data: bytes, prefixes: re.Pattern[bytes], name: bytes) -> float | None:
    for text in _find(data, prefixes, name):
        # Other programs write 0-99 into fields of the same name; outside of its range it is no xmp:Rating.
        if _NUMBER.fullmatch(text) and -1 <= (value := float(text)) <= 5:
            return value
    return None


def _find(data: bytes, prefixes: re.Pattern[bytes], name: bytes) -> Iterator[str]:
    """The values of a property, in the order of the packets and of the prefixes that its namespace has in them."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = data.decode("utf-16", errors="replace").encode()
    for packet in _PACKET.findall(data):
        text = _COMMENT.sub(b"", packet)
        for prefix in prefixes.findall(text):
            found = re.search(rb"[\s<]" + re.escape(prefix) + b":" + name + _VALUE, text)
            if found:
                yield html.unescape(next(filter(None, found.groups()), b"").decode(errors="replace")).strip()


def read_ratings(uris: Sequence[str], options: Mapping[str, Any] | None = None) -> tuple[dict[str, float], int]:
    """The ratings that people gave these photos; a sidecar (`photo.jpg.xmp`, `photo.xmp`) speaks before the photo.

    A rating that we wrote ourselves is none: nobody learns a person's taste from our own scores.

    Args:
        uris: paths or fsspec URLs.
        options: fsspec storage options.

    Returns:
        uri -> rating (1 to 5, -1 rejected) of those that have one; how many photos could not be read.

    Raises:
        StorageError: a folder of them cannot be listed.
    """
    sidecars, _, unlisted = list_sidecars(uris, options)
    for error in unlisted.values():
        raise error
    beside = {uri: beside_photo(uri, sidecars) for uri in uris}
    wanted = sorted({path for paths in beside.values() for path in paths})
    # What cannot be read says nothing.
    contents = {
        path: b"" if isinstance(data, PhotoError) else data
        for path, data in zip(wanted, fetch(wanted, options), strict=True)
    }
    of_sidecar = {path: find_persons_rating(data) for path, data in contents.items()}
    ratings, unreadable = {}, 0
    inside = []
    for uri, paths in beside.items():
        value = next((of_sidecar[path] for path in paths if of_sidecar[path] is not None), None)
        if value is None:
            inside.append(uri)
        elif value:  # stars taken back beside the photo may still be in it
            ratings[uri] = value
    for uri, found in read_embedded(inside, options).items():
        if isinstance(found, PhotoError):
            unreadable += 1
        # A program may have copied ours from the sidecar into the photo.
        elif found.rating and found.rating not in {find_written_rating(contents[path]) for path in beside[uri]}:
            ratings[uri] = found.rating
    return ratings, unreadable


def read_embedded(uris: Sequence[str], options: Mapping[str, Any] | None = None) -> dict[str, Found | PhotoError]:
    """uri -> what a person said inside of a photo, or why it could not be read."""
    found: dict[str, Found | PhotoError] = {}
    for of_jpegs, at_once, max_bytes in _READS:
        photos = [uri for uri in uris if uri.lower().endswith(_JPEG) == of_jpegs]
        for start in range(0, len(photos), at_once):
            batch = photos[start : start + at_once]
            for uri, data in zip(batch, fetch(batch, options, max_bytes), strict=True):
                found[uri] = data if isinstance(data, PhotoError) else _of_person(data)
    return found


def _of_person(data: bytes) -> Found:
    return Found(find_persons_rating(data), find_persons_label(data))


def list_sidecars(
    uris: Sequence[str], options: Mapping[str, Any] | None = None
) -> tuple[dict[str, str], dict[str, list[str]], dict[str, StorageError]]:
    """What is beside these photos, each folder listed once. Web servers cannot be listed.

    Returns:
        URI without `.xmp` -> URI, of every sidecar; URI without its suffix -> URIs, of every raw file; folder -> why it
        could not be listed.
    """
    folders = sorted({posixpath.dirname(uri) for uri in uris if not uri.startswith(("http://", "https://"))})

    def listed(folder: str) -> list[tuple[str, str, str]] | StorageError:
        try:
            named = ((*posixpath.splitext(path), path) for path in _list_folder(folder, options))
            return [one for one in named if one[1].lower() in _BESIDE]
        except StorageError as error:
            return error

    with ThreadPoolExecutor(16) as pool:
        found = dict(zip(folders, pool.map(listed, folders), strict=True))
    sidecars: dict[str, str] = {}
    raws: dict[str, list[str]] = {}
    for one in found.values():
        for stem, suffix, path in [] if isinstance(one, StorageError) else one:
            if suffix.lower() == ".xmp":
                sidecars[stem] = path
            else:
                raws.setdefault(stem, []).append(path)
    return sidecars, raws, {folder: one for folder, one in found.items() if isinstance(one, StorageError)}


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
