"""What an export does, file by file: the list that is shown before it is done is the list that is done."""

from __future__ import annotations

import errno
import mimetypes
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from picinspector.atomic import WholeFileSystem
from picinspector.errors import PhotoError, PicInspectorError
from picinspector.storage import is_local, is_storage_error, open_filesystem, to_photo_error
from picinspector.text import escaped

#: `already`: it is as it should be; `refused`: it cannot or must not be done, for the reason in the note.
State = Literal["todo", "done", "already", "refused"]
STATES: tuple[State, ...] = ("todo", "done", "already", "refused")

#: Each may hold one photo in memory.
_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Action:
    """One file to be made or changed.

    Attributes:
        kind: `copy`, `hard link`, `symbolic link`, `new sidecar`, `changed sidecar`.
        source: URI of the photo.
        target: path or URL of the file.
        note: what a person should know of it; the reason where it was refused.
        state: of planning (`todo`, `already`, `refused`) or of what became of it.
        perform: does it and gives the state and the note; storage errors are raised.
    """

    kind: str
    source: str
    target: str
    note: str = ""
    state: State = "todo"
    perform: Callable[[], tuple[State, str]] | None = field(default=None, repr=False, compare=False)


def carry_out(actions: Sequence[Action]) -> Iterator[Action]:
    """Do what is `todo`, several at once; each action comes back in order, as soon as it is done, with its new state.

    What storage refuses is that action's outcome and stops no other.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(_do, actions)


def count(actions: Iterable[Action]) -> dict[State, int]:
    """How many there are of each state."""
    found = Counter(action.state for action in actions)
    return {state: found[state] for state in STATES}


def describe(action: Action) -> str:
    """An action as one line, whatever is in the names: what cannot be printed is escaped."""
    state = "" if action.state == "todo" else f"{action.state}: "
    note = f" ({action.note})" if action.note else ""
    return escaped(f"{state}{action.kind} {action.source} -> {action.target}{note}")


def reason_of(error: Exception) -> str:
    """One line for an error of storage or one of ours.

    Raises:
        Exception: the error itself, if it is neither.
    """
    if isinstance(error, PicInspectorError):
        return str(error)
    if isinstance(error, PhotoError) or is_storage_error(error):
        return to_photo_error(error).message
    raise error


def write_file(uri: str, content: bytes, options: Mapping[str, Any] | None = None) -> None:
    """Write a file that is there whole or not at all. The permissions of a local file that it replaces stay.

    Raises:
        Exception: any storage library's own.
    """
    filesystem, path = open_filesystem(uri, options)
    if is_local(uri):
        path = os.path.realpath(path)  # a link stays a link
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        if os.path.isdir(path):  # noqa: PTH112
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        mode = os.stat(path).st_mode if os.path.exists(path) else None  # noqa: PTH110, PTH116
        WholeFileSystem().pipe_file(path, content)
        if mode is not None:
            os.chmod(path, mode)  # noqa: PTH101
    elif hasattr(filesystem, "call_s3"):  # s3fs's own call reads `?versionId=` in keys as a word of its own
        bucket, key = filesystem._find_bucket_key(path)
        kind = mimetypes.guess_type(f"name{os.path.splitext(key)[1]}")[0] or "application/octet-stream"  # noqa: PTH122
        filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=content, ContentType=kind)
        filesystem.invalidate_cache()
    else:
        filesystem.pipe_file(path, content)


def _do(action: Action) -> Action:
    if action.state != "todo" or action.perform is None:
        return action
    try:
        state, note = action.perform()
    except Exception as error:  # the row boundary: what storage raises is this file's outcome
        state, note = "refused", reason_of(error)
    return replace(action, state=state, note=note)
