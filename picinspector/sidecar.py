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
from picinspector.actions import Action, State, create_file, write_file
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

    A person's rating or label stays, in a sidecar or inside of the photo, and then ours is not written; nor is a label
    where a person gave a rating. To see them every photo is read whose sidecar leaves that open, in a rerun too: the
    first megabyte of a JPEG, all of others.

    Where photos share a sidecar (`a.jpg` and `a.nef` have `a.xmp`), the raw's mark counts. Where the raw has no mark,
    `a.xmp` is its own: `a.jpg` gets `a.jpg.xmp`, or with `replaced` is refused, for who asks for that reads no other.
    A rating in `a.xmp` counts for both, which are one shot. A rerun changes no byte.

    Args:
        marks: one for each photo.
        naming: of new sidecars.
        overwrite_ratings: a person's rating and label give way.
        storage_options: fsspec storage options.

    Returns:
        one action for each sidecar: to do, already as it should be, or refused (on the web, not readable, a raw's).
    """
    web = [mark for mark in marks if mark.uri.startswith(("http://", "https://"))]
    marks = [mark for mark in marks if not mark.uri.startswith(("http://", "https://"))]
    refusal = "a web server takes no sidecars; copy the photo first"
    actions = [Action("new sidecar", mark.uri, _name(mark.uri, naming), refusal, "refused") for mark in web]
    sidecars, raws, unlisted = xmp.list_sidecars([mark.uri for mark in marks], storage_options)
    of_raws = _raws_alone(marks, raws)
    reachable = []
    for mark in marks:
        refusal = ""
        if (error := unlisted.get(posixpath.dirname(mark.uri))) is not None:
            refusal = str(error)
        elif naming == "replaced" and mark.uri in of_raws and mark.uri not in sidecars:
            names = (_name(mark.uri, "replaced"), of_raws[mark.uri], _name(mark.uri, "appended"))
            replaced, raw, appended = map(posixpath.basename, names)
            refusal = f"{replaced} is the sidecar of {raw}, which is not marked; mark that too, or write {appended}"
        if refusal:
            actions.append(Action("new sidecar", mark.uri, _name(mark.uri, naming), refusal, "refused"))
        else:
            reachable.append(mark)
    wanted = _assign(reachable, naming, sidecars, of_raws)
    for start in range(0, len(wanted), _BATCH):
        actions += _plan(wanted[start : start + _BATCH], overwrite_ratings, storage_options)
    return actions


def _raws_alone(marks: Sequence[Mark], raws: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Photo -> the raw file of its stem, for photos whose raw files have no mark."""
    marked = {mark.uri for mark in marks}
    beside = {mark.uri: raws.get(posixpath.splitext(mark.uri)[0], ()) for mark in marks}
    return {uri: found[0] for uri, found in beside.items() if found and marked.isdisjoint(found)}


def _name(uri: str, naming: Naming) -> str:
    return f"{uri if naming == 'appended' else posixpath.splitext(uri)[0]}.xmp"


def _assign(
    marks: Sequence[Mark], naming: Naming, sidecars: Mapping[str, str], of_raws: Mapping[str, str]
) -> list[_Sidecar]:
    """The sidecar of each mark: what is there, else a new one; of two that are there, the one of this naming."""
    shared: dict[str, list[Mark]] = {}
    others: dict[str, set[str]] = {}
    found = set()
    for mark in {mark.uri: mark for mark in marks}.values():
        there = xmp.beside_photo(mark.uri, sidecars)
        there = there if naming == "appended" else there[::-1]
        usable = [path for path in there if mark.uri not in of_raws or path == sidecars.get(mark.uri)]
        uri = usable[0] if usable else _name(mark.uri, "appended" if mark.uri in of_raws else naming)
        shared.setdefault(uri, []).append(mark)
        others.setdefault(uri, set()).update(path for path in there if path != uri)
        found.update(usable[:1])

    def rank(mark: Mark) -> tuple[bool, str]:
        return posixpath.splitext(mark.uri)[1].lower() not in RAW_SUFFIXES, mark.uri

    return [
        _Sidecar(uri, tuple(sorted(sharing, key=rank)), uri in found, tuple(sorted(others[uri])))
        for uri, sharing in shared.items()
    ]


def _plan(sidecars: Sequence[_Sidecar], overwrite: bool, options: Mapping[str, Any] | None) -> Iterator[Action]:
    paths = [path for one in sidecars for path in ((one.uri,) * one.exists + one.others)]
    contents = dict(zip(paths, fetch(paths, options, MAX_BYTES), strict=True))
    unread = [one for one in sidecars if not overwrite and _is_open(contents.get(one.uri), one.marks[0])]
    embedded = xmp.read_embedded([mark.uri for one in unread for mark in one.marks], options)
    for one in sidecars:
        data = contents.get(one.uri)
        mark, kind = one.marks[0], "changed sidecar" if one.exists else "new sidecar"
        try:
            # A program may have copied ours from the sidecar into the photo.
            ours = data if isinstance(data, bytes) else b""
            written = xmp.Found(xmp.find_written_rating(ours), xmp.find_written_label(ours))
            inside = [_or_raise(embedded[mark.uri]) for mark in one.marks if mark.uri in embedded]
            elsewhere = [
                xmp.Found(
                    found.rating if found.rating != written.rating else None,
                    found.label if found.label != written.label else None,
                )
                for found in inside
            ]
            for uri in one.others:
                beside = _or_raise(contents[uri])
                elsewhere.append(xmp.Found(xmp.find_persons_rating(beside), xmp.find_persons_label(beside)))
            how = (any(found.rating for found in elsewhere), any(found.label for found in elsewhere), overwrite)
            edited = edit(None if data is None else _or_raise(data), mark, *how)
        except PhotoError as error:
            yield Action(kind, mark.uri, one.uri, error.message, "refused")
            continue
        note = "; ".join([*edited.notes, *_sharing(one)])
        if edited.content is None:
            yield Action(kind, mark.uri, one.uri, note, "already")
        else:
            write = partial(_write, one.uri, mark, how, note, options)
            yield Action(kind, mark.uri, one.uri, note, perform=write)


def _write(
    uri: str, mark: Mark, how: tuple[bool, bool, bool], note: str, options: Mapping[str, Any] | None
) -> tuple[State, str]:
    """Edit the sidecar as it is now: a program may have saved it since it was planned."""
    [data] = fetch([uri], options, MAX_BYTES)
    missing = isinstance(data, PhotoError) and data.kind == ErrorKind.NOT_FOUND
    content = edit(None if missing else _or_raise(data), mark, *how).content
    if content is None:
        return "already", note
    (create_file if missing else write_file)(uri, content, options)
    return "done", note


def _is_open(data: bytes | PhotoError | None, mark: Mark) -> bool:
    """Whether what is in the photo matters to its mark: unless a person has said all in the sidecar already.

    Ours that a person took back are as good as a person's, and what a person rated gets no label of ours.
    """
    if not isinstance(data, bytes):
        return bool(mark.rating or mark.label)
    if xmp.find_persons_rating(data):
        return False
    rating_open = (xmp.find_rating(data) or None) == xmp.find_written_rating(data)
    label_open = xmp.find_label(data) == xmp.find_written_label(data)
    return bool((mark.rating and rating_open) or (mark.label and label_open))


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
