"""What an export does, file by file: the list that is shown before it is done is the list that is done."""

from __future__ import annotations

import contextlib
import errno
import mimetypes
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from picinspector.atomic import PART_SUFFIX, WholeFileSystem
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
        filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=content, ContentType=_content_type(key))
        filesystem.invalidate_cache()
    else:
        filesystem.pipe_file(path, content)


def create_file(uri: str, content: bytes, options: Mapping[str, Any] | None = None) -> None:
    """Write a file that is there whole or not at all, where there is none of its name.

    Local file systems without hard links (FAT, some network shares) get an empty file first, which ours then replaces.
    S3 stores that know no conditional writes, and other stores, are only asked before.

    Raises:
        FileExistsError: there is one.
        Exception: any storage library's own.
    """
    filesystem, path = open_filesystem(uri, options)
    if is_local(uri):
        _create_local(path, content)
    elif hasattr(filesystem, "call_s3"):
        put_new(filesystem, "put_object", path, Body=content, ContentType=_content_type(path))
        filesystem.invalidate_cache()
    else:
        filesystem.pipe_file(path, content, mode="create")


def _create_local(path: str, content: bytes) -> None:
    folder = os.path.dirname(path)  # noqa: PTH120
    os.makedirs(folder, exist_ok=True)  # noqa: PTH103
    part = f"{folder}/{secrets.token_hex(8)}{PART_SUFFIX}"
    try:
        WholeFileSystem().pipe_file(part, content)
        try:
            os.link(part, path)
        except FileExistsError:
            raise
        except OSError:  # no hard links here; what else it may be, the next line meets too
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            os.replace(part, path)  # noqa: PTH105
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)  # noqa: PTH108


def put_new(filesystem: Any, method: str, path: str, **request: Any) -> None:
    """Call S3's `put_object` or `copy_object` for a key that must be new.

    Stores that refuse the condition itself are asked again without; others may overlook it (Ceph 16 that of copies).

    Raises:
        FileExistsError: there is one, or another condition of the request does not hold.
        Exception: any storage library's own.
    """
    bucket, key = filesystem._find_bucket_key(path)
    try:
        try:
            filesystem.call_s3(method, Bucket=bucket, Key=key, IfNoneMatch="*", **request)
        except OSError as error:
            if error.errno != errno.ENOSYS:  # S3's NotImplemented, as s3fs translates it
                raise
            filesystem.call_s3(method, Bucket=bucket, Key=key, **request)
    except OSError as error:
        response = getattr(error.__cause__, "response", {})
        if response.get("Error", {}).get("Code") in ("PreconditionFailed", "412"):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from error
        raise


def _content_type(path: str) -> str:
    return mimetypes.guess_type(f"name{os.path.splitext(path)[1]}")[0] or "application/octet-stream"  # noqa: PTH122


def _do(action: Action) -> Action:
    if action.state != "todo" or action.perform is None:
        return action
    try:
        state, note = action.perform()
    except Exception as error:  # the row boundary: what storage raises is this file's outcome
        state, note = "refused", reason_of(error)
    return replace(action, state=state, note=note)
