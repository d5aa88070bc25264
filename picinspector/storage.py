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
from dataclasses import dataclass
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
#: Taken for files whose store does not tell their size, where what is held at a time is bounded.
UNKNOWN_BYTES = 16 * 1024**2
_ATTEMPTS = 3
_BACKOFF_S = 0.5
#: What passes by itself within seconds. Of the other transient kinds, the same request gets the same answer.
_RETRIED = frozenset({ErrorKind.THROTTLED, ErrorKind.TIMEOUT, ErrorKind.CONNECTION})
#: For one whole file and all attempts at it: 100 MB over a link that 32 reads share. What stands still, the clients'
#: own time-outs end sooner.
_TIMEOUT_S = 300.0
_S3 = ("s3://", "s3a://")

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
        if text.startswith(_S3):  # url_to_fs would read `::` and `?versionId=` in keys as words of its own
            return fsspec.filesystem("s3", **options or {}), text.split("://", 1)[1].rstrip("/")
        web = text.startswith(("http://", "https://"))
        return fsspec.core.url_to_fs(text, **({} if web else options or {}))  # type: ignore[no-any-return]
    except (ValueError, ImportError, TypeError) as error:
        raise StorageError(f"cannot open {redact(text)}: {redact(str(error))}") from error


def is_local(url: str) -> bool:
    """True for a plain path and for `file://`."""
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path(url: str) -> str:
    """The absolute path of a local URL. `file://` URLs are percent-encoded, plain paths are taken as they are."""
    path = os.fsdecode(unquote_to_bytes(urlsplit(url).path)) if "://" in url else os.path.expanduser(url)  # noqa: PTH111
    path = os.path.abspath(path)  # noqa: PTH100  (strings throughout, as fsspec has them)
    return path[1:] if path.startswith("//") else path  # POSIX leaves two slashes open, and Linux takes them for one


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
    if uri.startswith(_S3):
        return "@" in host  # a `?` is part of the key
    return "@" in host or any(key.lower() in _SECRET_PARAMETERS for key, _ in parse_qsl(query))


@dataclass(frozen=True, slots=True)
class _Version:
    """What the listing said of a file, as far as it did: the version that is to be read."""

    etag: str | None
    size_bytes: int | None

    def changed(self, found: str) -> PhotoError:
        """The error of a file that is another by now."""
        listed = self.etag or f"{self.size_bytes} bytes"
        return PhotoError(
            ErrorKind.CHANGED, f"replaced since it was listed ({found}, listed as {listed}); the next run reads it"
        )


def fetch(
    uris: Sequence[str],
    options: Mapping[str, Any] | None = None,
    max_bytes: int = 512 * 1024**2,
    etags: Sequence[str | None] | None = None,
    sizes: Sequence[int | None] | None = None,
) -> list[bytes | PhotoError]:
    """Read whole files concurrently; a failure is that file's value, never an exception.

    Throttling, time-outs and resets are tried again, `_ATTEMPTS` times in all, with exponential backoff and jitter. A
    body with fewer bytes than its store said is a failed transfer (`connection`) and tried again too.

    Args:
        uris: of the files.
        options: fsspec storage options.
        max_bytes: no more than one byte beyond it is read of a file.
        etags: of the manifest, one per URI. A file replaced since has the kind `changed`: other pixels must not get the
            identity of those listed. Checked on S3 and local files; elsewhere only a file that has grown is seen.
        sizes: of the manifest, in bytes, one per URI.

    Returns:
        one entry per URI, in order.
    """
    results: list[bytes | PhotoError] = [PhotoError(ErrorKind.INTERNAL, "not fetched")] * len(uris)
    versions = [
        _Version(etag, size)
        for etag, size in zip(etags or [None] * len(uris), sizes or [None] * len(uris), strict=True)
    ]
    local = [index for index, uri in enumerate(uris) if is_local(uri)]
    remote: dict[str, list[int]] = {}
    for index, uri in enumerate(uris):
        if not is_local(uri):
            remote.setdefault(uri.split("://", 1)[0], []).append(index)
    if local:
        with ThreadPoolExecutor(min(CONCURRENCY, len(local))) as pool:
            files = pool.map(lambda i: _attempt(lambda: _read_local(uris[i], max_bytes, versions[i])), local)
            for index, content in zip(local, files, strict=True):
                results[index] = content
    for indices in remote.values():
        fetched = _fetch_remote([uris[i] for i in indices], options, max_bytes, [versions[i] for i in indices])
        for index, content in zip(indices, fetched, strict=True):
            results[index] = content
    return results


def _fetch_remote(
    uris: Sequence[str], options: Mapping[str, Any] | None, max_bytes: int, versions: Sequence[_Version]
) -> Sequence[bytes | PhotoError]:
    try:
        filesystem, _ = open_filesystem(uris[0], options)
    except StorageError as error:
        return [PhotoError(ErrorKind.STORAGE, str(error))] * len(uris)
    if isinstance(filesystem, fsspec.asyn.AsyncFileSystem) and not filesystem.asynchronous:
        fetched = fsspec.asyn.sync(filesystem.loop, _fetch_async, filesystem, uris, max_bytes, versions)
        return list(fetched)

    def read(uri: str, version: _Version) -> bytes:
        content: bytes = filesystem.cat_file(str(filesystem._strip_protocol(uri)), end=max_bytes + 1)
        return _whole(content, version.size_bytes, max_bytes, version)

    with ThreadPoolExecutor(min(CONCURRENCY, len(uris))) as pool:
        return list(pool.map(lambda uri, version: _attempt(lambda: read(uri, version)), uris, versions))


async def _fetch_async(
    filesystem: fsspec.asyn.AsyncFileSystem, uris: Sequence[str], max_bytes: int, versions: Sequence[_Version]
) -> list[bytes | PhotoError]:
    gate = asyncio.Semaphore(CONCURRENCY)
    read = _read_s3 if uris[0].startswith(_S3) else _read_remote

    async def one(uri: str, version: _Version) -> bytes | PhotoError:
        async with gate:
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    return await _attempt_async(lambda: read(filesystem, uri, max_bytes, version))
            except TimeoutError:
                return PhotoError(ErrorKind.TIMEOUT, f"not here after {_TIMEOUT_S:.0f} s")

    return await asyncio.gather(*map(one, uris, versions))


async def _read_s3(filesystem: Any, uri: str, max_bytes: int, version: _Version) -> bytes:
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    bucket, key = filesystem._find_bucket_key(uri.split("://", 1)[1])
    # Not through s3fs's own call: that repeats five times what botocore has repeated five times, and loses `/` and
    # `?versionId=` at the ends of keys.
    await filesystem.set_session()
    ask = (await filesystem.get_s3(bucket)).get_object
    wanted = {"Bucket": bucket, "Key": key, "Range": f"bytes=0-{max_bytes}"}
    try:
        response = await ask(**filesystem._get_s3_method_kwargs(ask, wanted))
    except ClientError as error:
        if _status(error) != 416:  # the range of an empty object
            raise translate_boto_error(error, message=str(error)) from error
        if version.size_bytes:
            raise version.changed("now empty") from None
        return b""
    async with response["Body"] as body:
        etag = str(response.get("ETag", "")).strip('"')
        if version.etag is not None and etag != version.etag:
            raise version.changed(f"now {etag}")
        content: bytes = await body.read()
    told = str(response.get("ContentRange", "")).rpartition("/")[2] or response["ContentLength"]
    size = version.size_bytes if version.etag is not None else None  # a header may lie; the same etag has the same size
    return _whole(content, size if size is not None else int(told), max_bytes, version)


async def _read_remote(filesystem: fsspec.asyn.AsyncFileSystem, uri: str, max_bytes: int, version: _Version) -> bytes:
    path = str(filesystem._strip_protocol(uri))
    # A range guards against a file far larger than its listing said; servers answer 416 to a range of nothing.
    try:
        content = bytes(await filesystem._cat_file(path, start=0, end=max_bytes + 1))
    except Exception as error:
        if _status(error) != 416:
            raise
        return b""
    # Web servers need not tell the size that they will send; aiohttp holds them to what comes with the body.
    size = version.size_bytes if not uri.startswith(("http://", "https://")) else None
    return _whole(content, size, max_bytes, version)


def _whole(content: bytes, size_bytes: int | None, max_bytes: int, version: _Version) -> bytes:
    """The content, if it is all there is, up to one byte beyond `max_bytes`."""
    expected = min(size_bytes, max_bytes + 1) if size_bytes is not None else len(content)
    if len(content) > expected:
        raise version.changed(f"now more than {expected} bytes")
    if len(content) < expected:
        raise PhotoError(ErrorKind.CONNECTION, f"{len(content)} of {expected} bytes came")
    return content


def stat(uri: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a store knows of a file (fsspec's info, `mtime_ns` where it is local); {} if it does not say.

    Transient failures are tried again as in `fetch`; what is wrong with a missing file, fetching it will say.
    """

    def ask() -> dict[str, Any]:
        filesystem, path = open_filesystem(uri, options)
        if is_local(uri):  # with the nanoseconds that a listing sees, and fsspec's info rounds
            found = os.stat(path)  # noqa: PTH116
            return {"name": path, "size": found.st_size, "mtime_ns": found.st_mtime_ns}
        if uri.startswith(_S3):
            return head_s3(filesystem, uri.split("://", 1)[1])
        return dict(filesystem.info(path))

    answer = _attempt(ask)
    return {} if isinstance(answer, PhotoError) else answer


def head_s3(filesystem: Any, path: str) -> dict[str, Any]:
    """`name`, `Size`, `ETag` and `LastModified` of an object, as a listing has them.

    Raises:
        FileNotFoundError: there is none of this name.
    """
    bucket, key = filesystem._find_bucket_key(path)
    found = filesystem.call_s3("head_object", Bucket=bucket, Key=key)  # s3fs's info may come out of its cache
    return {"name": path, "Size": found["ContentLength"], "ETag": found["ETag"], "LastModified": found["LastModified"]}


def _read_local(uri: str, max_bytes: int, version: _Version) -> bytes:
    with open(local_path(uri), "rb") as file:  # noqa: PTH123
        _check_local(file.fileno(), version)
        content = file.read(max_bytes + 1)
        _check_local(file.fileno(), version)  # written to while it was read
    return content


def _check_local(descriptor: int, version: _Version) -> None:
    found = os.fstat(descriptor)
    etag = f"{found.st_size}-{found.st_mtime_ns}"
    if version.etag is not None and etag != version.etag:
        raise version.changed(f"now {etag}")


def _attempt(ask: Callable[[], _Answer]) -> _Answer | PhotoError:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return ask()
        except Exception as error:  # the row boundary: whatever storage raises is this photo's error
            failure = to_photo_error(error)
        if failure.kind not in _RETRIED or attempt == _ATTEMPTS:
            break
        time.sleep(_backoff_s(attempt))
    return failure


async def _attempt_async(read: Callable[[], Awaitable[bytes]]) -> bytes | PhotoError:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return await read()
        except Exception as error:  # the row boundary, as above
            failure = to_photo_error(error)
        if failure.kind not in _RETRIED or attempt == _ATTEMPTS:
            break
        await asyncio.sleep(_backoff_s(attempt))
    return failure


def _backoff_s(attempt: int) -> float:
    return _BACKOFF_S * 2.0 ** (attempt - 1) * random.uniform(0.5, 1.5)


_THROTTLED = re.compile(r"slow\s?down|reduce your request rate|throttl|too many requests|serviceunavailable", re.I)
#: Too many open files, a network file system that went away.
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ESTALE})
#: S3's codes for keys that are no good, whatever they are asked for.
_CREDENTIALS = frozenset(
    {"ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed", "TokenRefreshRequired"}
    | {"InvalidToken"}
)
#: botocore's errors for keys that it could not find, fetch or renew.
_NO_CREDENTIALS = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError", "SSOError"}
)
_BROKEN = ("Connect", "Disconnected", "Payload", "IncompleteRead", "ResponseStreaming")
_BY_STATUS = {401: ErrorKind.ACCESS_DENIED, 403: ErrorKind.ACCESS_DENIED, 404: ErrorKind.NOT_FOUND}
_BY_STATUS |= {408: ErrorKind.TIMEOUT, 429: ErrorKind.THROTTLED, 503: ErrorKind.THROTTLED, 504: ErrorKind.TIMEOUT}


def to_photo_error(error: Exception) -> PhotoError:
    """What a storage library raised, as a photo's error with a kind that tells transient from permanent."""
    if isinstance(error, PhotoError):
        return error
    return PhotoError(_kind(error), redact(f"{type(error).__name__}: {error}"))


def is_storage_error(error: BaseException) -> bool:
    """True if the operating system or a storage library raised it: clients of S3 and of the web have other roots."""
    package = type(error).__module__.partition(".")[0]
    return package in ("botocore", "aiobotocore", "aiohttp") or (isinstance(error, OSError) and package != "ray")


def _kind(error: Exception) -> ErrorKind:
    # aiohttp's and botocore's errors share no base class with Python's.
    names, status = [base.__name__ for base in type(error).__mro__], _status(error)
    if _s3_code(error) in _CREDENTIALS or _NO_CREDENTIALS.intersection(names):
        return ErrorKind.CREDENTIALS
    # Before any look at the message, which holds the file's name.
    if isinstance(error, FileNotFoundError):
        return ErrorKind.NOT_FOUND
    if isinstance(error, PermissionError):
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


def _s3_code(error: BaseException) -> str:
    """S3's own code behind an error of botocore, or one that s3fs made of botocore's; empty if there is none."""
    for origin in (error, error.__cause__):
        response = getattr(origin, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _status(error: BaseException) -> int:
    """The HTTP status behind an error of aiohttp, of botocore, or that s3fs made of botocore's; 0 if there is none."""
    for origin in (error, error.__cause__):
        response = getattr(origin, "response", None)
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        for status in (getattr(origin, "status", None), metadata.get("HTTPStatusCode")):
            if isinstance(status, int):
                return status
    return 0
