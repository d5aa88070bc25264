"""A library's manifest: every photo of a prefix, a folder or a list, streamed as Arrow tables.

Prefixes are listed level by level until there are enough of them to work on in parallel, then each to its bottom.
Pages go through a bounded queue, so that memory stays constant however many photos there are.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any
from urllib.parse import unquote_plus
from xml.etree import ElementTree

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from picinspector.errors import StorageError, UsageError
from picinspector.photo import PHOTO_SUFFIXES, RAW_SUFFIXES
from picinspector.schema import MANIFEST
from picinspector.storage import (
    head_s3,
    is_local,
    is_signed,
    is_storage_error,
    local_path,
    open_filesystem,
    redact,
    stat,
    to_photo_error,
    to_uri,
)

SUFFIXES = PHOTO_SUFFIXES | RAW_SUFFIXES
_LIST_SUFFIXES = (".parquet", ".csv", ".txt")
_WORKERS = 16
_MANY_CHILDREN = 1000
#: Rows of one table yielded; also about the rows of a manifest shard.
_BATCH_ROWS = 10_000
_MODIFIED = MANIFEST.field("last_modified").type
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_US, _LAST_US = (
    (year - _EPOCH) // timedelta(microseconds=1)
    for year in (datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC))
)


def image_id(uri: str, etag: str | None) -> str:
    """Identity of an image: 32 hex digits of BLAKE2b over its URI and etag. A changed object is a new image."""
    return hashlib.blake2b(f"{uri}\0{etag or ''}".encode(), digest_size=16).hexdigest()


def list_library(
    library: str | os.PathLike[str],
    options: Mapping[str, Any] | None = None,
    suffixes: frozenset[str] = SUFFIXES,
) -> Iterator[pa.Table]:
    """Every photo of a library, each once, as tables of `schema.MANIFEST` in no particular order.

    Args:
        library: a prefix or folder; or a Parquet, CSV (column `uri`) or text file (a line each) naming photos; or one
            photo. Names in a list may be relative to the list; lines of a text file that start with # are comments.
        options: fsspec storage options.
        suffixes: file name extensions that count as photos, lower case with the dot. Lists are taken whole.

    Raises:
        StorageError: the library is not there or cannot be listed.
        UsageError: a list without a `uri` column, or with signed URLs in it.
    """
    text = os.fspath(library)
    filesystem, path = open_filesystem(text, options)
    if is_list(text):
        yield from _from_list(filesystem, path, text, options)
        return
    if text.startswith(("http://", "https://")):
        if os.path.splitext(text)[1].lower() in suffixes and not is_signed(text):  # noqa: PTH122
            yield stat_uris([text], options)
            return
        raise UsageError(
            f"{redact(text)}: a web server cannot be listed; give a photo, or a .csv, .parquet or .txt list"
        )
    try:
        if is_local(text):
            pages = _walk_local(path)
        elif hasattr(filesystem, "call_s3"):
            lister = _S3Lister(filesystem)
            pages = _walk_parallel(path, lister.list_pages)
        else:
            pages = _walk_parallel(path, lambda prefix, deep: _list_any(filesystem, prefix, deep))
        yield from _to_tables(pages, partial(to_uri, filesystem), suffixes)
    except Exception as error:
        if not is_storage_error(error) and not isinstance(error, ValueError):
            raise
        raise StorageError(f"cannot list {redact(text)}: {to_photo_error(error).message}") from error


def is_list(library: str) -> bool:
    """True if a library is a list of photos in a file, whose members are where the list says."""
    listed = library.lower().endswith(_LIST_SUFFIXES)
    return listed and (not is_local(library) or os.path.isfile(local_path(library)))  # noqa: PTH113


# --- lists ------------------------------------------------------------------------------------------------------------


def _from_list(
    filesystem: fsspec.AbstractFileSystem, path: str, text: str, options: Mapping[str, Any] | None
) -> Iterator[pa.Table]:
    try:
        with filesystem.open(path, "rb") as file:
            if text.lower().endswith(".parquet"):
                table = pa.parquet.read_table(file)
            elif text.lower().endswith(".csv"):
                table = pa.csv.read_csv(file, parse_options=pa.csv.ParseOptions(newlines_in_values=True))
            else:
                lines = file.read().decode("utf-8-sig").split("\n")  # splitlines knows nine more ends of a line
                table = pa.table({"uri": [line.strip() for line in lines if line.strip() and not line.startswith("#")]})
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StorageError(f"cannot read the list {redact(text)}: {to_photo_error(error).message}") from error
    if "uri" not in table.column_names:
        raise UsageError(f"{redact(text)}: the list needs a column `uri`, it has {table.column_names}")
    base = os.path.dirname(path) if is_local(text) else text.rsplit("/", 1)[0]  # noqa: PTH120
    uris: dict[str, None] = {}  # ordered and distinct: a photo named twice is one photo
    for number, uri in enumerate(table.column("uri").to_pylist(), 1):
        if not isinstance(uri, str) or not uri:
            raise UsageError(f"{redact(text)}: entry {number} of column `uri` is {uri!r}, expected a URI or a path")
        if is_signed(uri):
            raise UsageError(
                f"{redact(text)}: entry {number} is a signed URL, and signatures must not be stored in tables; "
                "list plain URLs and give credentials through the environment or --storage-options"
            )
        uris[_absolute(uri, base)] = None
    names = list(uris)
    for start in range(0, len(names), _BATCH_ROWS):
        yield stat_uris(names[start : start + _BATCH_ROWS], options)


def stat_uris(uris: Sequence[str], options: Mapping[str, Any] | None = None) -> pa.Table:
    """Manifest rows of these photos, asked of their stores concurrently. A photo that is not there has no etag."""
    names = [_one_name(uri) for uri in uris]
    files = _Files()
    with ThreadPoolExecutor(_WORKERS * 2) as pool:
        for name, info in zip(names, pool.map(lambda uri: stat(uri, options), uris), strict=True):
            files.add(name, info)
    return _table(names, files)


def _absolute(uri: str, base: str) -> str:
    """The URI of a list's entry: relative ones belong beside the list."""
    if "://" not in uri and not is_local(base) and not os.path.isabs(uri):  # noqa: PTH117
        while uri.startswith("./"):
            uri = uri[2:].lstrip("/")
        return f"{base}/{uri}"
    return _one_name(os.path.join(base, uri) if "://" not in uri and is_local(base) else uri)  # noqa: PTH118


def _one_name(uri: str) -> str:
    """One name for each file: a photo listed as `a.jpg`, `./a.jpg` and `file:///.../a.jpg` is one photo."""
    if is_local(uri):
        return to_uri(fsspec.filesystem("file"), local_path(uri))
    return f"s3://{uri[6:]}" if uri.startswith("s3a://") else uri


# --- prefixes ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Files:
    """Files of a listing, column by column: making a manifest of columns is twice as quick as of rows.

    Attributes:
        paths: as their filesystem has them.
        etags, sizes: version tags without quotes; bytes.
        modified_us: microseconds since 1970, UTC.
    """

    paths: list[str] = field(default_factory=list)
    etags: list[str | None] = field(default_factory=list)
    sizes: list[int | None] = field(default_factory=list)
    modified_us: list[int | None] = field(default_factory=list)

    def add(self, path: str, info: Mapping[str, Any]) -> None:
        """Add a file as fsspec's info, or `stat`, describes it."""
        etag, size, modified_us = _facts(info)
        self.paths.append(path)
        self.etags.append(etag)
        self.sizes.append(size)
        self.modified_us.append(modified_us)

    def take(self, indices: Sequence[int]) -> _Files:
        """Some of them."""
        return _Files(
            [self.paths[index] for index in indices],
            [self.etags[index] for index in indices],
            [self.sizes[index] for index in indices],
            [self.modified_us[index] for index in indices],
        )

    def extend(self, others: _Files) -> None:
        """Add others."""
        self.paths += others.paths
        self.etags += others.etags
        self.sizes += others.sizes
        self.modified_us += others.modified_us


_Page = tuple[_Files, list[str]]  # files, sub-prefixes


def _walk_local(folder: str) -> Iterator[_Files]:
    files = _Files()
    if os.path.isfile(folder):  # noqa: PTH113
        _add_local(files, folder, os.stat(folder))  # noqa: PTH116
        yield files
        return
    folders = [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.is_file():
                        _add_local(files, entry.path, entry.stat())
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ELOOP):  # gone since, or a link to itself: no file
                        raise
                if len(files.paths) == _BATCH_ROWS:
                    yield files
                    files = _Files()
    yield files


def _add_local(files: _Files, path: str, found: os.stat_result) -> None:
    files.paths.append(path)
    files.etags.append(f"{found.st_size}-{found.st_mtime_ns}")
    files.sizes.append(found.st_size)
    files.modified_us.append(found.st_mtime_ns // 1000)


def _walk_parallel(root: str, list_page: Any) -> Iterator[_Files]:
    """List prefixes in a pool of threads. `list_page(prefix, deep)` yields pages; deep goes to the bottom by itself."""
    pages: queue.Queue[_Files | BaseException | None] = queue.Queue(maxsize=64)
    stop = threading.Event()
    pending = 1
    lock = threading.Lock()

    def put(item: _Files | BaseException | None) -> None:
        while not stop.is_set():
            try:
                pages.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def work(prefix: str) -> None:
        nonlocal pending
        children: list[str] = []
        try:
            # Enough prefixes in flight: the rest is cheaper listed flat, one request per 1000 keys.
            with lock:
                deep = pending >= 4 * _WORKERS
            for files, prefixes in list_page(prefix, deep):
                if stop.is_set():
                    return
                children += prefixes
                put(files)
            if len(children) > _MANY_CHILDREN:  # a folder a photo: one request each would take all night
                above = len(prefix) if prefix.endswith("/") else len(prefix) + 1
                for files, _ in list_page(prefix, True):
                    put(files.take([i for i, path in enumerate(files.paths) if "/" in path[above:]]))
                children = []
            with lock:
                pending += len(children)
            for child in children:
                pool.submit(work, child)
        except BaseException as error:  # handed to the reader, which raises it
            put(error)
        finally:
            with lock:
                pending -= 1
                last = pending == 0
            if last:
                put(None)

    with ThreadPoolExecutor(_WORKERS) as pool:
        pool.submit(work, root)
        try:
            while (item := pages.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


class _S3Lister:
    """Pages of S3 prefixes. s3fs's own listing would hold the whole of one in memory, and in its cache.

    botocore takes 60 us to parse an entry, half of them for its date; a library of ten million would be listed in ten
    minutes of CPU. So the entries are taken out of each answer before botocore parses it, on a connection of our own.
    """

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = type(filesystem)(skip_instance_cache=True, **filesystem.storage_options)
        self._filesystem.s3.meta.events.register("before-parse.s3.ListObjectsV2", _take_entries)

    def list_pages(self, prefix: str, deep: bool) -> Iterator[_Page]:
        """Pages of one prefix, to its bottom or with its sub-prefixes; of one object, if it is none."""
        bucket, _, key = prefix.partition("/")
        if key and not key.endswith("/"):
            if found := self._find_object(prefix):
                files = _Files()
                files.add(prefix, found)
                yield files, []
                return
            key += "/"
        request: dict[str, Any] = {"Bucket": bucket, "Prefix": key} | ({} if deep else {"Delimiter": "/"})
        while True:
            page = self._filesystem.call_s3("list_objects_v2", **request)
            files = page["Files"]
            files.paths = [f"{bucket}/{name}" for name in files.paths]
            yield files, [f"{bucket}/{item['Prefix']}" for item in page.get("CommonPrefixes", ())]
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def _find_object(self, path: str) -> dict[str, Any] | None:
        # Who may list `photos/` need not be allowed to ask for `photos`.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            return head_s3(self._filesystem, path)
        return None


def _take_entries(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Move the entries of an answer, as `_Files` with keys for paths, to where botocore passes them on unseen."""
    from botocore.parsers import ResponseParserError

    if response_dict["status_code"] != 200:
        return
    try:
        root = ElementTree.fromstring(response_dict["body"])
    except ElementTree.ParseError as error:  # cut short; s3fs tries it again under this name
        raise ResponseParserError(f"not a listing: {error}") from error
    prefix = root.tag.removesuffix("ListBucketResult")  # the namespace, which some servers leave out
    fields = [f"{prefix}{name}" for name in ("Key", "ETag", "Size", "LastModified")]
    encoded = root.findtext(f"{prefix}EncodingType") == "url"
    files, times = _Files(), []
    for entry in root.findall(f"{prefix}Contents"):
        key, etag, size, modified = map(entry.findtext, fields)
        key = unquote_plus(key or "") if encoded else key or ""
        if not key.endswith("/"):
            files.paths.append(key)
            files.etags.append(etag.strip('"') if etag else None)
            files.sizes.append(int(size) if size else None)
            times.append(modified)
        root.remove(entry)
    microseconds = pa.array(times, pa.string()).cast(_MODIFIED).cast(pa.int64())
    files.modified_us = microseconds.to_pylist()
    customized_response_dict["Files"] = files
    response_dict["body"] = ElementTree.tostring(root)


def _list_any(filesystem: fsspec.AbstractFileSystem, prefix: str, deep: bool) -> Iterator[_Page]:
    found = filesystem.find(prefix, detail=True).values() if deep else filesystem.ls(prefix, detail=True)
    files, prefixes = _Files(), []
    for entry in found:
        if entry["type"] == "file":
            files.add(entry["name"], entry)
        elif entry["type"] == "directory" and not deep:
            prefixes.append(entry["name"])
    yield files, prefixes


# --- rows -------------------------------------------------------------------------------------------------------------


def _facts(info: Mapping[str, Any]) -> tuple[str | None, int | None, int | None]:
    """Etag, size in bytes and microseconds since 1970 of a file, from fsspec's info or `stat`."""
    size = info.get("size", info.get("Size"))
    modified = info.get("time") or info.get("LastModified") or info.get("last_modified") or info.get("mtime")
    if modified is None and (text := info.get("Last-Modified")):  # a web server's header
        modified = parsedate_to_datetime(text)
    if (nanoseconds := info.get("mtime_ns")) is None and isinstance(modified, int | float):
        nanoseconds = int(modified * 1e9)
    etag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    if nanoseconds is None and isinstance(modified, datetime):
        nanoseconds = int(modified.timestamp() * 1e9)
    if etag is None and nanoseconds is not None:
        etag = f"{size}-{nanoseconds}"
    modified_us = nanoseconds // 1000 if nanoseconds is not None else None
    if isinstance(modified, datetime) and "mtime_ns" not in info:  # all its digits, which a float has not
        aware = modified if modified.tzinfo else modified.replace(tzinfo=UTC)
        modified_us = (aware - _EPOCH) // timedelta(microseconds=1)
    return str(etag).strip('"') if etag is not None else None, size, modified_us


def _to_tables(pages: Iterable[_Files], to_name: Callable[[str], str], suffixes: frozenset[str]) -> Iterator[pa.Table]:
    """The photos among these files as tables of `_BATCH_ROWS` rows or a page more."""
    photos = _Files()
    for page in pages:
        photos.extend(page.take([i for i, path in enumerate(page.paths) if _is_photo(path, suffixes)]))
        if len(photos.paths) >= _BATCH_ROWS:
            yield _table(list(map(to_name, photos.paths)), photos)
            photos = _Files()
    if photos.paths:
        yield _table(list(map(to_name, photos.paths)), photos)


def _is_photo(path: str, suffixes: frozenset[str]) -> bool:
    name = path.rpartition("/")[2]
    if name.startswith("._"):  # a Mac's side file beside the photo
        return False
    name = name.lstrip(".")  # `.jpg` is a name, not an extension
    return name[name.rfind(".") :].lower() in suffixes


def _table(uris: Sequence[str], files: _Files) -> pa.Table:
    """Manifest rows of files of these URIs. Times outside of the years 1 to 9999, which few readers take, are null."""
    times = [time if time is not None and _FIRST_US <= time <= _LAST_US else None for time in files.modified_us]
    columns = {
        "image_id": [image_id(uri, etag) for uri, etag in zip(uris, files.etags, strict=True)],
        "uri": uris,
        "etag": files.etags,
        "size_bytes": files.sizes,
        "last_modified": pa.array(times, pa.int64()).cast(_MODIFIED),
    }
    return pa.table(columns, schema=MANIFEST)
