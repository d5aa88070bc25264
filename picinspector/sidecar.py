"""XMP sidecars beside photos: which file each mark goes to, and writing it there.

`photo.jpg.xmp` (appended) is what darktable, digiKam and Immich read, `photo.xmp` (replaced) what Lightroom and Capture
One read. A sidecar of either style that is there already is edited; a photo never gets a second one.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from picinspector import xmp
from picinspector.actions import Action, State, write_file
from picinspector.errors import ErrorKind, PhotoError
from picinspector.photo import RAW_SUFFIXES
from picinspector.storage import fetch
from picinspector.xmp.document import MAX_BYTES, Mark, edit

__all__ = ["Mark", "Naming", "plan"]

Naming = Literal["appended", "replaced"]

#: Sidecars held in memory at once.
_BATCH = 256


@dataclass(frozen=True, slots=True)
class _Sidecar:
    """One file and the marks that it is for; the first counts.

    Attributes:
        uri: of the file.
        marks: of photos that share it.
        exists: whether it was listed.
        others: URIs of further sidecars of those photos, which stay as they are.
    """

    uri: str
    marks: tuple[Mark, ...]
    exists: bool
    others: tuple[str, ...]


def plan(
    marks: Sequence[Mark],
    naming: Naming,
    overwrite_ratings: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> list[Action]:
    """What to write so that these photos' sidecars say this; for `actions.carry_out`.

    A person's rating or label stays, in a sidecar or inside of the photo, and then ours is not written. Where photos
    share a sidecar (`a.jpg` and `a.raw` have `a.xmp`), the raw's mark counts. A rerun changes no byte.

    Args:
        marks: one for each photo.
        naming: of new sidecars.
        overwrite_ratings: a person's rating and label give way.
        storage_options: fsspec storage options.

    Returns:
        one action for each sidecar: to do, already as it should be, or refused (on the web, not readable).
    """
    web = [mark for mark in marks if mark.uri.startswith(("http://", "https://"))]
    marks = [mark for mark in marks if not mark.uri.startswith(("http://", "https://"))]
    refusal = "a web server takes no sidecars; copy the photo first"
    actions = [Action("new sidecar", mark.uri, _name(mark.uri, naming), refusal, "refused") for mark in web]
    sidecars, unlisted = xmp.list_sidecars([mark.uri for mark in marks], storage_options)
    reachable = []
    for mark in marks:
        if (error := unlisted.get(posixpath.dirname(mark.uri))) is not None:
            actions.append(Action("new sidecar", mark.uri, _name(mark.uri, naming), str(error), "refused"))
        else:
            reachable.append(mark)
    wanted = _assign(reachable, naming, sidecars)
    for start in range(0, len(wanted), _BATCH):
        actions += _plan(wanted[start : start + _BATCH], overwrite_ratings, storage_options)
    return actions


def _name(uri: str, naming: Naming) -> str:
    return f"{uri if naming == 'appended' else posixpath.splitext(uri)[0]}.xmp"


def _assign(marks: Sequence[Mark], naming: Naming, sidecars: Mapping[str, str]) -> list[_Sidecar]:
    """The sidecar of each mark: what is there, else a new one; of two that are there, the one of this naming."""
    shared: dict[str, list[Mark]] = {}
    others: dict[str, set[str]] = {}
    found = set()
    for mark in {mark.uri: mark for mark in marks}.values():
        there = xmp.beside_photo(mark.uri, sidecars)
        there = there if naming == "appended" else there[::-1]
        uri = there[0] if there else _name(mark.uri, naming)
        shared.setdefault(uri, []).append(mark)
        others.setdefault(uri, set()).update(there[1:])
        found.update(there[:1])

    def rank(mark: Mark) -> tuple[bool, str]:
        return posixpath.splitext(mark.uri)[1].lower() not in RAW_SUFFIXES, mark.uri

    return [
        _Sidecar(uri, tuple(sorted(sharing, key=rank)), uri in found, tuple(sorted(others[uri])))
        for uri, sharing in shared.items()
    ]


def _plan(sidecars: Sequence[_Sidecar], overwrite: bool, options: Mapping[str, Any] | None) -> Iterator[Action]:
    paths = [path for one in sidecars for path in ((one.uri,) * one.exists + one.others)]
    contents = dict(zip(paths, fetch(paths, options, MAX_BYTES), strict=True))
    # A photo is read only where a rating of ours would be new: reading them all is the cost of never overruling one.
    unread = [one for one in sidecars if not overwrite and one.marks[0].rating and not _rated(contents.get(one.uri))]
    embedded = xmp.read_embedded([mark.uri for one in unread for mark in one.marks], options)
    for one in sidecars:
        data = contents.get(one.uri)
        mark, kind = one.marks[0], "changed sidecar" if one.exists else "new sidecar"
        try:
            inside = [_or_raise(embedded[mark.uri]) for mark in one.marks if mark.uri in embedded]
            beside = [xmp.find_persons_rating(_or_raise(contents[uri])) for uri in one.others]
            rated = any(inside) or any(beside)
            edited = edit(None if data is None else _or_raise(data), mark, rated, overwrite)
        except PhotoError as error:
            yield Action(kind, mark.uri, one.uri, error.message, "refused")
            continue
        note = "; ".join([*edited.notes, *_sharing(one)])
        if edited.content is None:
            yield Action(kind, mark.uri, one.uri, note, "already")
        else:
            write = partial(_write, one.uri, mark, rated, overwrite, note, options)
            yield Action(kind, mark.uri, one.uri, note, perform=write)


def _write(
    uri: str, mark: Mark, rated_elsewhere: bool, overwrite: bool, note: str, options: Mapping[str, Any] | None
) -> tuple[State, str]:
    """Edit the sidecar as it is now: a program may have saved it since it was planned."""
    [data] = fetch([uri], options, MAX_BYTES)
    missing = isinstance(data, PhotoError) and data.kind == ErrorKind.NOT_FOUND
    content = edit(None if missing else _or_raise(data), mark, rated_elsewhere, overwrite).content
    if content is None:
        return "already", note
    write_file(uri, content, options)
    return "done", note


def _rated(data: bytes | PhotoError | None) -> bool:
    """Whether a sidecar decides about the rating by itself: it holds one, or held ours."""
    if not isinstance(data, bytes):
        return False
    return bool(xmp.find_rating(data)) or xmp.find_written_rating(data) is not None


def _or_raise(value: Any) -> Any:
    if isinstance(value, PhotoError):
        raise value
    return value


def _sharing(sidecar: _Sidecar) -> Iterator[str]:
    """What is to be said where marks differ that one sidecar cannot hold both."""
    first, *rest = sidecar.marks
    said = (first.rating, first.label, first.keywords)
    differing = [mark for mark in rest if (mark.rating, mark.label, mark.keywords) != said]
    if differing:
        names = ", ".join(posixpath.basename(mark.uri) for mark in differing)
        yield f"shared with {names}, whose marks differ: those of {posixpath.basename(first.uri)} count"
