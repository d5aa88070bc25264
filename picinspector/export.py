"""Chosen photos into other hands: copied, linked, or named in a list. Originals are only ever read.

`plan_copy` and `plan_links` give the actions for `actions.carry_out`; `write_list` and `write_table` write one file.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from picinspector.actions import Action, State, create_file, put_new, reason_of, write_file
from picinspector.errors import ErrorKind, PhotoError, StorageError, UsageError
from picinspector.storage import (
    fetch,
    is_local,
    is_signed,
    local_path,
    open_filesystem,
    redact,
    to_photo_error,
    to_uri,
)

_LOOKS_AT_ONCE = 32
#: A photo and what may be its copy, both in memory.
_COMPARING = threading.Semaphore(4)
#: As `storage.fetch`: no photo that was scored is larger.
_MAX_BYTES = 512 * 1024**2
#: docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html
_MAX_KEY_BYTES = 1024
_WEB = ("http://", "https://")
_S3 = ("s3://", "s3a://")
#: Of a copy's metadata: the original's etag, where the copy may have another.
_SOURCE_ETAG = "picinspector-source-etag"
#: What S3 keeps with an object beside its metadata, and a copy with other metadata has to be given again
#: (docs.aws.amazon.com/AmazonS3/latest/userguide/UsingMetadata.html).
_HEADERS = ("CacheControl", "ContentDisposition", "ContentEncoding", "ContentLanguage", "ContentType", "Expires")
_CHANGED = "it has changed since it was scored; score the library again"
#: What a folder takes for its parent, for itself, or for no name at all. Other names are kept as they are.
_UNSAFE = {"": "%2F", ".": "%2E", "..": "%2E%2E"}


# --- names ------------------------------------------------------------------------------------------------------------


def relative_names(uris: Sequence[str], among: Sequence[str] = ()) -> list[str]:
    """A path for each of these photos below some other folder: what follows the common parent of them and `among`.

    Photos of several buckets have the bucket's name in front, of several kinds of store its protocol. No part is `..`,
    `.` or empty, so that no name leads out of a folder.
    """
    parts = [_parts(uri) for uri in uris]
    columns = zip(*(one[:-1] for one in (*parts, *map(_parts, among))), strict=False)
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return ["/".join(_UNSAFE.get(part, part).replace("\0", "%00") for part in one[common:]) for one in parts]


def lies_within(target: str, library: str) -> bool:
    """Whether what is copied or linked to `target` would be listed, and scored, with the library."""
    inside, outside = ([part for part in _parts(one) if part] for one in (target, library))
    return inside[: len(outside)] == outside


def _parts(uri: str) -> list[str]:
    """Protocol, bucket or host, and the path part by part."""
    if is_local(uri):
        return ["file", *local_path(uri).split("/")[1:]]
    protocol, _, rest = uri.partition("://")
    return ["s3" if protocol == "s3a" else protocol, *rest.split("/")]


def _targets(uris: Sequence[str], target: str, among: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """Photo -> where it goes, and why it cannot go there."""
    uris = list(dict.fromkeys(uris))
    local = is_local(target)
    root = local_path(target) if local else target.rstrip("/")
    names = dict(zip(uris, relative_names(uris, among), strict=True))
    taken: dict[str, str] = {}
    for uri, name in names.items():
        taken.setdefault(name, uri)
    found = {}
    for uri, name in names.items():
        path = f"{root.rstrip('/')}/{name}"
        above = [name[:at] for at, sign in enumerate(name) if sign == "/"] if local else []
        problem = None
        if taken[name] != uri:
            problem = f"its name there is that of {taken[name]}"
        elif blocking := next((taken[folder] for folder in above if folder in taken), None):
            problem = f"it needs a folder where {blocking} is a file"
        elif not local and not _is_utf8(name):
            problem = "its name is not UTF-8, and an object's must be"
        elif target.startswith(_S3) and len(path.split("/", 3)[3].encode()) > _MAX_KEY_BYTES:
            problem = f"its key there would have more than {_MAX_KEY_BYTES} bytes"
        found[uri] = (to_uri(fsspec.filesystem("file"), path) if local else path), problem
    return found


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- copies -----------------------------------------------------------------------------------------------------------


def plan_copy(
    uris: Sequence[str],
    target: str,
    options: Mapping[str, Any] | None = None,
    among: Sequence[str] = (),
    etags: Sequence[str | None] | None = None,
) -> list[Action]:
    """What to copy so that these photos are under another prefix or folder, by their `relative_names`.

    From S3 to S3 the store copies by itself; everything else passes through here, a photo at a time in each of a few
    threads. A local copy gets the time of its original.

    No file is overwritten: one of the same size is the photo's if its etag, time or else its bytes are the same, any
    other is a refusal. The bytes are read, a few at a time, where etags are no help: of objects uploaded in parts that
    this has not copied, of objects encrypted with keys of KMS, and between a folder and a store. A file that appears
    between the last look and the copy is safe too, but in stores that take no `If-None-Match` (`actions.create_file`).

    Args:
        uris: of the photos.
        target: a folder or a prefix; it need not be there, but its bucket.
        options: fsspec storage options, of both sides.
        among: see `relative_names`; with `rank.outermost` names stay the same when others are chosen.
        etags: of the photos, as the tables have them; one that has another by now is refused. Checked on S3 and local
            files, as in `storage.fetch`. A store that copies by itself is told too, and Ceph 16 does not heed it: there
            the version is that of a moment before.

    Raises:
        UsageError: the target cannot hold photos.
        StorageError: there is no such bucket, or its store cannot be reached.
    """
    _check_target(target, options)
    etag_of = dict(zip(uris, etags or [None] * len(uris), strict=True))

    def plan(uri: str, place: tuple[str, str | None]) -> Action:
        path, problem = place
        if problem is not None:
            return Action("copy", uri, path, problem, "refused")
        try:
            _, state, note = _compare(uri, path, etag_of[uri], options)
        except Exception as error:  # the row boundary: what storage raises is this photo's outcome
            return Action("copy", uri, path, reason_of(error), "refused")
        return Action("copy", uri, path, note, state, partial(_copy, uri, path, etag_of[uri], options))

    places = _targets(uris, target, among)
    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
        return list(pool.map(plan, places, places.values()))


def _check_target(target: str, options: Mapping[str, Any] | None) -> None:
    if target.startswith(_WEB) or is_signed(target):
        raise UsageError(f"cannot copy to {redact(target)}; give a folder or a prefix of an object store, without keys")
    filesystem, path = open_filesystem(target, options)
    if is_local(target):
        if os.path.exists(path) and not os.path.isdir(path):  # noqa: PTH110, PTH112
            raise UsageError(f"{path} is a file; give a folder")
        return
    if target.startswith(_S3):
        bucket = path.partition("/")[0]
        try:
            filesystem.call_s3("head_bucket", Bucket=bucket)
        except PermissionError:
            return  # who may write need not be allowed to list
        except FileNotFoundError as error:
            raise StorageError(f"there is no bucket {bucket}; make it, or give another target") from error
        except Exception as error:  # any storage library's own type
            raise StorageError(f"cannot reach {target}: {to_photo_error(error).message}") from error


@dataclass(frozen=True, slots=True)
class _File:
    """What a store knows of a file.

    Attributes:
        size_bytes: None if it does not say.
        etag: as the tables have it, of S3 and of local files.
        modified_ns: nanoseconds since 1970, of S3 and of local files.
        head: S3's answer.
    """

    size_bytes: int | None
    etag: str | None = None
    modified_ns: int | None = None
    head: Mapping[str, Any] | None = None


def _look(uri: str, options: Mapping[str, Any] | None) -> _File | None:
    """What is there of this name; None if nothing is."""
    filesystem, path = open_filesystem(uri, options)
    try:
        if is_local(uri):
            stat = os.stat(path)  # noqa: PTH116
            return _File(stat.st_size, _etag(stat), stat.st_mtime_ns)
        if uri.startswith(_S3):
            bucket, key = filesystem._find_bucket_key(uri.partition("://")[2])
            head = filesystem.call_s3("head_object", Bucket=bucket, Key=key)
            modified_ns = int(head["LastModified"].timestamp()) * 10**9
            return _File(head["ContentLength"], head["ETag"].strip('"'), modified_ns, head)
        return _File(filesystem.info(path).get("size"))
    except FileNotFoundError:
        return None


def _etag(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}"  # as `manifest` has it


def _compare(uri: str, target: str, etag: str | None, options: Mapping[str, Any] | None) -> tuple[_File, State, str]:
    """The original, and whether a copy is to be made, is there, or would overwrite something else."""
    original = _look(uri, options)
    if original is None:
        raise PhotoError(ErrorKind.NOT_FOUND, f"{uri} is not there any more")
    if etag is not None and original.etag not in (None, etag):
        raise PhotoError(ErrorKind.CHANGED, _CHANGED)
    there = _look(target, options)
    if there is None:
        return original, "todo", ""
    if _same(uri, original, target, there, options):
        return original, "already", ""
    return (
        original,
        "refused",
        f"{target} ({there.size_bytes} bytes) is another file than {uri} ({original.size_bytes} bytes); "
        "move it away or give another target",
    )


def _same(uri: str, original: _File, target: str, there: _File, options: Mapping[str, Any] | None) -> bool:
    if _parts(uri) == _parts(target):
        return True
    if original.size_bytes != there.size_bytes and original.size_bytes is not None:
        return False
    if is_local(target) and original.modified_ns is not None and original.modified_ns == there.modified_ns:
        return True  # as a copy of ours has it
    copied = (there.head or {}).get("Metadata", {}).get(_SOURCE_ETAG)
    if original.etag is not None and original.etag in (there.etag, copied):
        return True
    with _COMPARING:
        data = _read(uri, original.etag, options)
        if there.etag is not None and hashlib.md5(data, usedforsecurity=False).hexdigest() == there.etag:
            return True
        return data == _read(target, None, options)


def _read(uri: str, etag: str | None, options: Mapping[str, Any] | None) -> bytes:
    [data] = fetch([uri], options, _MAX_BYTES, [etag])
    if isinstance(data, PhotoError):
        raise PhotoError(data.kind, _CHANGED) if data.kind == ErrorKind.CHANGED else data
    if len(data) > _MAX_BYTES:
        raise PhotoError(ErrorKind.TOO_MANY_BYTES, f"{uri} has more than {_MAX_BYTES >> 20} MB")
    return data


def _copy(uri: str, target: str, etag: str | None, options: Mapping[str, Any] | None) -> tuple[State, str]:
    original, state, note = _compare(uri, target, etag, options)  # it may have appeared since it was planned
    if state != "todo":
        return state, note
    try:
        if uri.startswith(_S3) and target.startswith(_S3):
            _copy_within(uri, original, target, options)
        else:
            create_file(target, _read(uri, original.etag, options), options)
    except FileExistsError:  # since that look
        _, state, note = _compare(uri, target, original.etag, options)
        return ("refused", f"something else is at {target}; move it away") if state == "todo" else (state, note)
    if is_local(target) and original.modified_ns is not None:
        os.utime(local_path(target), ns=(original.modified_ns, original.modified_ns))
    return "done", ""


def _copy_within(uri: str, original: _File, target: str, options: Mapping[str, Any] | None) -> None:
    """Have the store copy this version. The copy of an object that was uploaded in parts remembers its etag."""
    filesystem, path = open_filesystem(target, options)
    bucket, key = filesystem._find_bucket_key(uri.partition("://")[2])
    head = original.head or {}
    request: dict[str, Any] = {"CopySource": {"Bucket": bucket, "Key": key}, "CopySourceIfMatch": head["ETag"]}
    metadata = head["Metadata"]
    # What comes as MissingMeta, or is not ASCII, could not be given again.
    if "-" in str(original.etag) and not head.get("MissingMeta") and str(metadata).isascii():
        request |= {name: head[name] for name in _HEADERS if name in head}
        request |= {"MetadataDirective": "REPLACE", "Metadata": metadata | {_SOURCE_ETAG: original.etag}}
    put_new(filesystem, "copy_object", path, **request)


# --- links ------------------------------------------------------------------------------------------------------------


def plan_links(
    uris: Sequence[str],
    folder: str,
    kind: Literal["hard", "symbolic"],
    among: Sequence[str] = (),
    etags: Sequence[str | None] | None = None,
) -> list[Action]:
    """What to link so that these local photos are in another folder too, by their `relative_names`.

    Args:
        uris: of the photos.
        folder: a local one; it need not be there.
        kind: hard links need the device of the originals.
        among, etags: as in `plan_copy`.

    Raises:
        UsageError: a photo or the folder is not local, or the folder is a file.
    """
    for uri in uris:
        if not is_local(uri):
            raise UsageError(f"only local photos can be linked, and {redact(uri)} is not; copy them instead")
    if not is_local(folder):
        raise UsageError(f"links need a local folder, and {redact(folder)} is not one")
    _check_target(folder, None)
    etag_of = dict(zip(uris, etags or [None] * len(uris), strict=True))
    actions = []
    for uri, (target, problem) in _targets(uris, folder, among).items():
        state: State = "refused"
        how = (local_path(uri), local_path(target), kind, etag_of[uri])
        if problem is None:
            state, problem = _compare_link(*how)
        actions.append(Action(f"{kind} link", uri, target, problem, state, partial(_link, *how)))
    return actions


def _compare_link(path: str, target: str, kind: str, etag: str | None) -> tuple[State, str]:
    try:
        original = os.stat(path)  # noqa: PTH116
    except OSError:
        return "refused", f"{path} is not there any more"
    if etag not in (None, _etag(original)):
        return "refused", _CHANGED
    if not os.path.lexists(target):
        return "todo", ""
    linked = os.path.islink(target)  # noqa: PTH114
    if linked == (kind == "symbolic") and os.path.exists(target) and os.path.samefile(path, target):  # noqa: PTH110, PTH121
        return "already", ""
    return "refused", f"{target} is there and is no {kind} link to {path}; move it away or give another folder"


def _link(path: str, target: str, kind: str, etag: str | None) -> tuple[State, str]:
    state, note = _compare_link(path, target, kind, etag)
    if state != "todo":
        return state, note
    os.makedirs(os.path.dirname(target), exist_ok=True)  # noqa: PTH103, PTH120
    try:
        if kind == "symbolic":
            os.symlink(path, target)  # noqa: PTH211
        else:
            os.link(os.path.realpath(path), target)
    except FileExistsError:  # since it was planned
        state, note = _compare_link(path, target, kind, etag)
        return ("refused", f"{target} is in the way") if state == "todo" else (state, note)
    except OSError as error:
        if kind == "hard" and error.errno in (errno.EXDEV, errno.EPERM, errno.ENOTSUP):
            reason = "another device" if error.errno == errno.EXDEV else "a file system without hard links"
            return "refused", f"{target} is on {reason}; use symbolic links or copy"
        raise
    return "done", ""


# --- lists ------------------------------------------------------------------------------------------------------------


def write_list(uris: Sequence[str], target: str, options: Mapping[str, Any] | None = None) -> None:
    """Write the photos' URIs, in this order, as a list that `picinspector score` reads.

    Args:
        uris: of the photos.
        target: path or URL of a .txt file (one per line), or of a .csv or .parquet file with a column `uri`.
        options: fsspec storage options.

    Raises:
        UsageError: another suffix; or an object's name that a line of text cannot hold.
        StorageError: it cannot be written.
    """
    check_suffix(target, lists=True)
    if not target.lower().endswith(".txt"):
        write_table(pa.table({"uri": pa.array(uris, pa.string())}), target, options)
        return
    lines = [_line(uri, target) for uri in uris]
    _write_output(target, "".join(f"{line}\n" for line in lines).encode(), options)


def check_suffix(target: str, lists: bool = False) -> None:
    """Raise UsageError if no table, or list, can be written under this name."""
    if not target.lower().endswith((".parquet", ".csv", *([".txt"] if lists else []))):
        kinds = "list is a .txt, .csv or .parquet" if lists else "table is a .parquet or .csv"
        raise UsageError(f"{redact(target)}: a {kinds} file")


def _line(uri: str, target: str) -> str:
    """A URI as readers of lines take it: they cut white space off the ends, and # begins a comment."""
    if uri == uri.strip() and not uri.startswith("#") and "\n" not in uri:
        return uri
    if not is_local(uri):
        raise UsageError(f"{uri!r} cannot stand in a line of text; write {redact(target)} as .csv or .parquet")
    return Path(local_path(uri)).as_uri()


def write_table(table: pa.Table, target: str, options: Mapping[str, Any] | None = None) -> None:
    """Write a table as its suffix says: .parquet, or .csv, where lists and structs are JSON text.

    Raises:
        UsageError: another suffix.
        StorageError: it cannot be written.
    """
    check_suffix(target)
    buffer = io.BytesIO()
    if target.lower().endswith(".parquet"):
        pa.parquet.write_table(table, buffer, write_page_checksum=True)
    else:
        pa.csv.write_csv(_flat(table), buffer)
    _write_output(target, buffer.getvalue(), options)


def _flat(table: pa.Table) -> pa.Table:
    for index, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            values = table.column(index).to_pylist()
            texts = [None if value is None else json.dumps(value, ensure_ascii=False, default=str) for value in values]
            table = table.set_column(index, field.name, pa.array(texts, pa.string()))
        elif pa.types.is_float16(field.type):
            table = table.set_column(index, field.name, table.column(index).cast(pa.float32()))
    return table


def _write_output(target: str, content: bytes, options: Mapping[str, Any] | None) -> None:
    if target.startswith(_WEB) or is_signed(target):
        raise UsageError(f"cannot write {redact(target)}; give a path or a URL of an object store, without keys")
    try:
        write_file(target, content, options)
    except Exception as error:  # storage's own types; anything else goes on
        raise StorageError(f"cannot write {redact(target)}: {reason_of(error)}") from error
