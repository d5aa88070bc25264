"""The report: one self-contained HTML page of a scored library, to look at, to filter and to share.

::

    digest      the tables to figures and to the few photos that are shown (DuckDB; no row of the others comes here)
    thumbnails  those photos, small, within a number of bytes
    page        both to one page: HTML, CSS and JavaScript of ours inline, data as JSON, nothing from elsewhere
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from picinspector.actions import write_file
from picinspector.errors import StorageError, UsageError
from picinspector.report import page, thumbnails
from picinspector.report.digest import Sections, digest
from picinspector.storage import is_local, is_storage_error, local_path, redact, to_photo_error
from picinspector.tables import Destination

_MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True)
class Options:
    """What a report shows.

    Attributes:
        sections: how many photos of which kind.
        max_megabytes: bound of the page, 10^6 bytes. Thumbnails are made smaller, then fewer, to keep it.
        thumbnail_px: longer side of a thumbnail at most; smaller where many are shown.
        title: of the page.
        storage_options: fsspec options to read the photos with, and to write the page.
        threads: that decode photos; None: one a core.
    """

    sections: Sections = field(default_factory=Sections)
    max_megabytes: float = 25.0
    thumbnail_px: int = 640
    title: str = "Photo report"
    storage_options: Mapping[str, Any] | None = None
    threads: int | None = None


def write(dest: Destination, out: str | os.PathLike[str], options: Options = Options()) -> dict[str, Any]:
    """Write the report of a destination as one HTML page; the same tables and photos give the same bytes.

    Args:
        dest: the tables; its `groups` table is shown where there is one.
        out: path or fsspec URL of the page, which appears whole or not at all. On S3 it gets the content type that its
            name tells: `.html` is shown by browsers.
        options: what it shows.

    Returns:
        `out`, `bytes`; `photos` in the library that are scored, `failed`, `shown` of them; `thumbnails` made,
        `unreadable` photos that could not be read again, `left_out` for the page's size; `thumbnail_px`; `groups`
        shown.

    Raises:
        UsageError: nothing is scored here, or even without thumbnails the page is larger than allowed.
        StorageError: the tables cannot be read, or the page cannot be written.
    """
    _check(os.fspath(out))
    found = digest(dest, options.sections)
    bound = int(options.max_megabytes * _MEGABYTE)
    bare = len(page.render(options.title, found, thumbnails.none_for(found.photos)))
    if bare > bound:
        raise UsageError(
            f"a report of {len(found.photos):,} photos takes {bare / _MEGABYTE:.1f} MB without thumbnails, and "
            f"{options.max_megabytes:g} MB are allowed: show fewer photos, or allow more"
        )
    made = thumbnails.make(
        found.photos,
        bound - bare,
        options.thumbnail_px,
        options.storage_options,
        options.threads or os.cpu_count() or 1,
    )
    content = page.render(options.title, found, made)
    _write(os.fspath(out), content, options.storage_options)
    return {
        "out": redact(os.fspath(out)),
        "bytes": len(content),
        "photos": found.summary["scored"],
        "failed": found.summary["failed"],
        "shown": len(found.photos),
        "thumbnails": made.count,
        "unreadable": made.unreadable,
        "left_out": made.left_out,
        "thumbnail_px": made.side_px,
        "groups": len(found.groups),
    }


def _check(out: str) -> None:
    """Find out before the work is done what is easily known."""
    if is_local(out) and os.path.isdir(local_path(out)):  # noqa: PTH112
        raise StorageError(f"cannot write {redact(out)}: it is a folder; name a file in it, like report.html")


def _write(out: str, content: bytes, storage_options: Mapping[str, Any] | None) -> None:
    try:
        write_file(out, content, storage_options)
    except Exception as error:
        if not is_storage_error(error):
            raise
        reason = to_photo_error(error).message
        raise StorageError(f"cannot write {redact(out)}: {reason}; name a file in a place you can write to") from error
