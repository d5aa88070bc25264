"""Any fsspec URL: opening it, fetching photos from it concurrently, and keeping its secrets out of messages."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import re
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote_to_bytes, urlsplit

import fsspec
import fsspec.asyn
import fsspec.core

from picinspector.errors import ErrorKind, PhotoError, StorageError
from picinspector.redaction import hide
from picinspector.redaction import redact as redact

_Answer = TypeVar("_Answer")

#: Requests in flight for one batch: enough to hide object-store latency, few enough to share a node's network.
CONCURRENCY = 32
_ATTEMPTS = 3
_BACKOFF_S = 0.5
#: For one whole file: 100 MB over a link that 32 reads share. The clients' own time-outs end what stands still.
_TIMEOUT_S = 300.0

#: Query parameters that carry a signature or a key (AWS, Google, Azure, and the plain words).
_SECRET_PARAMETERS = frozenset(
    {"x-amz-signature", "x-amz-credential", "x-amz-security-token", "x-goog-signature", "x-goog-credential"}
    | {"signature", "sig", "awsaccesskeyid", "token", "access_token", "key", "api_key", "apikey"}
)


class StorageOptions:
    """fsspec options on their way to the workers, shown to nobody: Ray writes a stage's arguments into its metadata."""

    __slots__ = ("_options",)

    def __init__(self, options: Mapping[str, Any] | None) -> None:
        self._options = dict(options or {})

    def __repr__(self) -> str:
        return "StorageOptions(...)"

    def reveal(self) -> dict[str, Any]:
        """The options, for a filesystem."""
        return dict(self._options)


def open_filesystem(
    url: str | os.PathLike[str], options: Mapping[str, Any] | None = None
) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem behind a URL and the path in it.

    Args:
        url: any fsspec URL, or a local path.
        options: fsspec storage options of the object store. Local paths and http(s) go without, so that one set serves
            a library and a destination that lie in different places.

    Raises:
        StorageError: unknown protocol, or a package for it is not installed.
    """
    text = os.fspath(url)
    hide(options)  # before anything can fail and name them
    try:
        if is_local(text):
            return fsspec.filesystem("file"), local_path(text)
        web = text.startswith(("http://", "https://"))
        return fsspec.core.url_to_fs(text, **({} if web else options or {}))  # type: ignore[no-any-return]
    except (ValueError, ImportError, TypeError) as error:
        raise StorageError(f"cannot open {redact(text)}: {redact(str(error))}") from error


def is_local(url: str) -> bool:
    """True for a plain path and for `file://`."""
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path(url: str) -> str:
    """The absolute path of a local URL. `file://` URLs are percent-encoded, plain paths are taken as they are."""
    if "://" in url:
        return os.fsdecode(unquote_to_bytes(urlsplit(url).path))
    return os.path.abspath(os.path.expanduser(url))  # noqa: PTH100, PTH111  (strings throughout, as fsspec has them)


def to_uri(filesystem: fsspec.AbstractFileSystem, path: str) -> str:
    """How tables name a file: its URL; a plain absolute path where it is local (`file://` if its name is not UTF-8)."""
    if "file" not in _protocols(filesystem):
        return str(filesystem.unstrip_protocol(path))
    try:
        path.encode("utf-8")
        return path
    except UnicodeEncodeError:
        from pathlib import Path

        return Path(path).as_uri()


def _protocols(filesystem: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def is_signed(uri: str) -> bool:
    """True if a URI carries a signature, a key or a password, which must never reach a table."""
    if "://" not in uri or is_local(uri):
        return False
    address, _, query = uri.split("://", 1)[1].partition("?")  # urlsplit raises on what is no URL
    host = address.split("/", 1)[0]
    return "@" in host or any(key.lower() in _SECRET_PARAMETERS for key, _ in parse_qsl(query))


def fetch(
    uris: Sequence[str], options: Mapping[str, Any] | None = None, max_bytes: int = 512 * 1024**2
) -> list[bytes | PhotoError]:
    """Read whole files concurrently; a failure is that file's value, never an exception.

    Throttling, time-outs and resets are tried again, `_ATTEMPTS` times in all, with exponential backoff and jitter.

    Returns:
        one entry per URI, in order.
    """
    results: list[bytes | PhotoError] = [PhotoError(ErrorKind.INTERNAL, "not fetched")] * len(uris)
    local = [index for index, uri in enumerate(uris) if is_local(uri)]
    remote: dict[str, list[int]] = {}
    for index, uri in enumerate(uris):
        if not is_local(uri):
            remote.setdefault(uri.split("://", 1)[0], []).append(index)
    if local:
        with ThreadPoolExecutor(min(CONCURRENCY, len(local))) as pool:
            files = pool.map(lambda index: _attempt(lambda: _read_local(uris[index], max_bytes)), local)
            for index, content in zip(local, files, strict=True):
                results[index] = content
    for indices in remote.values():
        for index, content in zip(indices, _fetch_remote([uris[i] for i in indices], options, max_bytes), strict=True):
            results[index] = content
    return results


def _fetch_remote(
    uris: Sequence[str], options: Mapping[str, Any] | None, max_bytes: int
) -> Sequence[bytes | PhotoError]:
    try:
        filesystem, _ = open_filesystem(uris[0], options)
    except StorageError as error:
        return [PhotoError(ErrorKind.STORAGE, str(error))] * len(uris)
    paths = [str(filesystem._strip_protocol(uri)) for uri in uris]
    if isinstance(filesystem, fsspec.asyn.AsyncFileSystem) and not filesystem.asynchronous:
        fetched = fsspec.asyn.sync(filesystem.loop, _fetch_async, filesystem, paths, max_bytes)
        return list(fetched)
    with ThreadPoolExecutor(min(CONCURRENCY, len(paths))) as pool:
        read = pool.map(lambda path: _attempt(lambda: filesystem.cat_file(path, end=max_bytes + 1)), paths)
        return list(read)


async def _fetch_async(
    filesystem: fsspec.asyn.AsyncFileSystem, paths: Sequence[str], max_bytes: int
) -> list[bytes | PhotoError]:
    gate = asyncio.Semaphore(CONCURRENCY)

    async def one(path: str) -> bytes | PhotoError:
        async with gate:
            return await _attempt_async(lambda: _read_remote(filesystem, path, max_bytes))

    return await asyncio.gather(*(one(path) for path in paths))


async def _read_remote(filesystem: fsspec.asyn.AsyncFileSystem, path: str, max_bytes: int) -> bytes:
    # A range guards against a file far larger than its listing said; servers answer 416 to a range of nothing.
    try:
        content = await asyncio.wait_for(filesystem._cat_file(path, start=0, end=max_bytes + 1), _TIMEOUT_S)
    except Exception as error:
        if _status(error) != 416:
            raise
        return b""
    return bytes(content)


def stat(uri: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a store knows of a file (fsspec's info, `mtime_ns` where it is local); {} if it does not say.

    Transient failures are tried again as in `fetch`; what is wrong with a missing file, fetching it will say.
    """

    def ask() -> dict[str, Any]:
        filesystem, path = open_filesystem(uri, options)
        if is_local(uri):  # with the nanoseconds that a listing sees, and fsspec's info rounds
            found = os.stat(path)  # noqa: PTH116
            return {"name": path, "size": found.st_size, "mtime_ns": found.st_mtime_ns}
        return dict(filesystem.info(path))

    answer = _attempt(ask)
    return {} if isinstance(answer, PhotoError) else answer


def _read_local(uri: str, max_bytes: int) -> bytes:
    with open(local_path(uri), "rb") as file:  # noqa: PTH123
        return file.read(max_bytes + 1)


def _attempt(ask: Callable[[], _Answer]) -> _Answer | PhotoError:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return ask()
        except Exception as error:  # the row boundary: whatever storage raises is this photo's error
            failure = to_photo_error(error)
        if not failure.kind.transient or attempt == _ATTEMPTS:
            break
        time.sleep(_backoff_s(attempt))
    return failure


async def _attempt_async(read: Callable[[], Awaitable[bytes]]) -> bytes | PhotoError:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return await read()
        except Exception as error:  # the row boundary, as above
            failure = to_photo_error(error)
        if not failure.kind.transient or attempt == _ATTEMPTS:
            break
        await asyncio.sleep(_backoff_s(attempt))
    return failure


def _backoff_s(attempt: int) -> float:
    return _BACKOFF_S * 2.0 ** (attempt - 1) * random.uniform(0.5, 1.5)


_THROTTLED = re.compile(r"slow\s?down|reduce your request rate|throttl|too many requests|serviceunavailable", re.I)
#: Too many open files, a network file system that went away.
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ESTALE})
_BROKEN = ("Connect", "Disconnected", "Payload", "IncompleteRead", "ResponseStreaming")
_BY_STATUS = {401: ErrorKind.ACCESS_DENIED, 403: ErrorKind.ACCESS_DENIED, 404: ErrorKind.NOT_FOUND}
_BY_STATUS |= {408: ErrorKind.TIMEOUT, 429: ErrorKind.THROTTLED, 503: ErrorKind.THROTTLED, 504: ErrorKind.TIMEOUT}


def to_photo_error(error: Exception) -> PhotoError:
    """What a storage library raised, as a photo's error with a kind that tells transient from permanent."""
    return PhotoError(_kind(error), redact(f"{type(error).__name__}: {error}"))


def _kind(error: Exception) -> ErrorKind:
    # aiohttp's and botocore's errors share no base class with Python's.
    names, status = [base.__name__ for base in type(error).__mro__], _status(error)
    # Before any look at the message, which holds the file's name.
    if isinstance(error, FileNotFoundError):
        return ErrorKind.NOT_FOUND
    if isinstance(error, PermissionError) or names[0] in ("NoCredentialsError", "PartialCredentialsError"):
        return ErrorKind.ACCESS_DENIED
    if _THROTTLED.search(str(error)) or getattr(error, "errno", None) == errno.EBUSY:
        return ErrorKind.THROTTLED
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if isinstance(error, TimeoutError) or any("timeout" in name.lower() for name in names):
        return ErrorKind.TIMEOUT
    if getattr(error, "errno", None) in _PASSING or isinstance(error, socket.gaierror):
        return ErrorKind.CONNECTION
    if any(part in name for part in _BROKEN for name in names) or status >= 500:
        return ErrorKind.CONNECTION
    return ErrorKind.STORAGE


def _status(error: BaseException) -> int:
    """The HTTP status behind an error of aiohttp, of botocore, or that s3fs made of botocore's; 0 if there is none."""
    for origin in (error, error.__cause__):
        response = getattr(origin, "response", None)
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        for status in (getattr(origin, "status", None), metadata.get("HTTPStatusCode")):
            if isinstance(status, int):
                return status
    return 0
