"""A library's manifest: every photo of a prefix, a folder or a list, streamed as Arrow tables.

Prefixes are listed level by level until there are enough of them to work on in parallel, then each to its bottom.
Pages go through a bounded queue, so that memory stays constant however many photos there are.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from picinspector.errors import StorageError, UsageError
from picinspector.photo import PHOTO_SUFFIXES, RAW_SUFFIXES
from picinspector.schema import MANIFEST
from picinspector.storage import is_local, is_signed, local_path, open_filesystem, redact, stat, to_photo_error, to_uri

SUFFIXES = PHOTO_SUFFIXES | RAW_SUFFIXES
_LIST_SUFFIXES = (".parquet", ".csv", ".txt")
_WORKERS = 16
_MANY_CHILDREN = 1000
#: Rows of one table yielded; also about the rows of a manifest shard.
_BATCH_ROWS = 10_000


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
            pages = _walk_parallel(path, lambda prefix, deep: _list_s3(filesystem, prefix, deep))
        else:
            pages = _walk_parallel(path, lambda prefix, deep: _list_any(filesystem, prefix, deep))
        yield from _rebatch(_to_rows(filesystem, page, suffixes) for page in pages)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot list {redact(text)}: {to_photo_error(error).message}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("botocore", "aiobotocore", "aiohttp"):
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
                table = pa.csv.read_csv(file)
            else:
                lines = file.read().decode("utf-8-sig").splitlines()
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
    with ThreadPoolExecutor(_WORKERS * 2) as pool:
        return _table(list(pool.map(lambda uri: _stat(uri, options), uris)))


def _absolute(uri: str, base: str) -> str:
    """One name for each file: a photo listed as `a.jpg`, `./a.jpg` and `file:///.../a.jpg` is one photo."""
    if "://" not in uri and not is_local(base) and not os.path.isabs(uri):  # noqa: PTH117
        return f"{base}/{uri}"
    if not is_local(uri):
        return uri
    path = local_path(uri) if "://" in uri else os.path.abspath(os.path.join(base, uri))  # noqa: PTH100, PTH118
    return to_uri(fsspec.filesystem("file"), path)


def _stat(uri: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    name = to_uri(fsspec.filesystem("file"), local_path(uri)) if is_local(uri) else uri
    return _row(name, stat(uri, options))


# --- prefixes ---------------------------------------------------------------------------------------------------------

_Page = tuple[list[dict[str, Any]], list[str]]  # files as fsspec's info dicts, sub-prefixes


def _walk_local(folder: str) -> Iterator[list[dict[str, Any]]]:
    if os.path.isfile(folder):  # noqa: PTH113
        yield [_stat_local(folder, os.stat(folder))]  # noqa: PTH116
        return
    folders = [folder]
    while folders:
        files = []
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.is_file():
                        files.append(_stat_local(entry.path, entry.stat()))
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ELOOP):  # gone since, or a link to itself: no file
                        raise
                if len(files) == _BATCH_ROWS:
                    yield files
                    files = []
        yield files


def _stat_local(path: str, stat: os.stat_result) -> dict[str, Any]:
    return {"name": path, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _walk_parallel(root: str, list_page: Any) -> Iterator[list[dict[str, Any]]]:
    """List prefixes in a pool of threads. `list_page(prefix, deep)` yields pages; deep goes to the bottom by itself."""
    pages: queue.Queue[list[dict[str, Any]] | BaseException | None] = queue.Queue(maxsize=64)
    stop = threading.Event()
    pending = 1
    lock = threading.Lock()

    def put(item: list[dict[str, Any]] | BaseException | None) -> None:
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
                above = prefix.rstrip("/") + "/"
                for files, _ in list_page(prefix, True):
                    put([info for info in files if "/" in info["name"].removeprefix(above)])
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


def _list_s3(filesystem: Any, prefix: str, deep: bool) -> Iterator[_Page]:
    """Pages of one S3 prefix. s3fs's own listing would hold the whole of it in memory, and in its cache."""
    bucket, _, key = prefix.partition("/")
    if key and not key.endswith("/"):
        if _is_s3_object(filesystem, prefix):
            yield [filesystem.info(prefix)], []
            return
        key += "/"
    request: dict[str, Any] = {"Bucket": bucket, "Prefix": key} | ({} if deep else {"Delimiter": "/"})
    while True:
        page = filesystem.call_s3("list_objects_v2", **request)
        files = [
            {"name": f"{bucket}/{item['Key']}", **{key: item[key] for key in ("Size", "ETag", "LastModified")}}
            for item in page.get("Contents", ())
            if not item["Key"].endswith("/")
        ]
        yield files, [f"{bucket}/{item['Prefix']}" for item in page.get("CommonPrefixes", ())]
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _is_s3_object(filesystem: Any, path: str) -> bool:
    try:
        return bool(filesystem.isfile(path))
    except FileNotFoundError:
        return False


def _list_any(filesystem: fsspec.AbstractFileSystem, prefix: str, deep: bool) -> Iterator[_Page]:
    if deep:
        yield list(filesystem.find(prefix, detail=True).values()), []
        return
    entries = filesystem.ls(prefix, detail=True)
    files = [entry for entry in entries if entry["type"] == "file"]
    yield files, [entry["name"] for entry in entries if entry["type"] == "directory"]


# --- rows -------------------------------------------------------------------------------------------------------------


def _to_rows(
    filesystem: fsspec.AbstractFileSystem, files: Sequence[dict[str, Any]], suffixes: frozenset[str]
) -> list[dict[str, Any]]:
    rows = []
    for info in files:
        name = info["name"].rsplit("/", 1)[-1]
        # `._x.jpg` is a Mac's side file beside x.jpg, not a photo.
        if os.path.splitext(name)[1].lower() in suffixes and not name.startswith("._"):  # noqa: PTH122
            rows.append(_row(to_uri(filesystem, info["name"]), info))
    return rows


def _row(uri: str, info: Mapping[str, Any]) -> dict[str, Any]:
    size = info.get("size", info.get("Size"))
    modified = info.get("time") or info.get("LastModified") or info.get("last_modified") or info.get("mtime")
    if modified is None and (text := info.get("Last-Modified")):  # a web server's header
        modified = parsedate_to_datetime(text)
    if (nanoseconds := info.get("mtime_ns")) is None and isinstance(modified, int | float):
        nanoseconds = int(modified * 1e9)
    if nanoseconds is not None:
        modified = datetime.fromtimestamp(nanoseconds // 10**9, UTC) + timedelta(
            microseconds=nanoseconds // 1000 % 10**6
        )
    etag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    if nanoseconds is None and isinstance(modified, datetime):
        nanoseconds = int(modified.timestamp() * 1e9)
    if etag is None and nanoseconds is not None:
        etag = f"{size}-{nanoseconds}"
    etag = str(etag).strip('"') if etag is not None else None
    return {
        "image_id": image_id(uri, etag),
        "uri": uri,
        "etag": etag,
        "size_bytes": size,
        "last_modified": modified if isinstance(modified, datetime) else None,
    }


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=MANIFEST)


def _rebatch(pages: Iterator[list[dict[str, Any]]]) -> Iterator[pa.Table]:
    rows: list[dict[str, Any]] = []
    for page in pages:
        rows += page
        if len(rows) >= _BATCH_ROWS:
            yield _table(rows)
            rows = []
    if rows:
        yield _table(rows)
