"""Copies, links and lists of chosen photos: nothing lost, nothing overwritten, nothing outside of the target."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import re
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picinspector import actions, export
from picinspector.actions import Action
from picinspector.errors import StorageError, UsageError
from picinspector.manifest import list_library
from tests.fault_proxy import Fault, FaultProxy
from tests.s3_server import S3Server
from tests.test_odd_names import KEYS, LOCAL, fill_bucket, make_folder


def run(planned: list[Action]) -> list[Action]:
    return list(actions.carry_out(planned))


def states(done: list[Action]) -> list[str]:
    return [action.state for action in done]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def objects_of(server: S3Server, bucket: str, prefix: str = "") -> dict[str, bytes]:
    client = server.client()
    listed = client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
    return {item["Key"]: client.get_object(Bucket=bucket, Key=item["Key"])["Body"].read() for item in listed}


def write(path: Path, content: bytes = b"photo") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uris", "names"),
    [
        (["/p/a.jpg"], ["a.jpg"]),
        (["/p/a/x.jpg", "/p/b/x.jpg"], ["a/x.jpg", "b/x.jpg"]),
        (["/p/a/x.jpg", "/p/a/y.jpg"], ["x.jpg", "y.jpg"]),
        (["/p/a/x.jpg", "/p/ab/x.jpg"], ["a/x.jpg", "ab/x.jpg"]),
        (["/p/x.jpg", "/p/x.jpg/x.jpg"], ["x.jpg", "x.jpg/x.jpg"]),
        (["s3://one/p/x.jpg", "s3://two/p/x.jpg"], ["one/p/x.jpg", "two/p/x.jpg"]),
        (["s3://one/p/x.jpg", "s3a://one/p/y.jpg"], ["x.jpg", "y.jpg"]),
        (["s3://p/x.jpg", "/p/x.jpg"], ["s3/p/x.jpg", "file/p/x.jpg"]),
        (["s3://b/p/../x.jpg", "s3://b/p/../../y.jpg"], ["x.jpg", "%2E%2E/y.jpg"]),
        (["s3://b/../../x.jpg", "s3://b/y.jpg"], ["%2E%2E/%2E%2E/x.jpg", "y.jpg"]),
        (["s3://b//etc/x.jpg", "s3://b/./x.jpg"], ["%2F/etc/x.jpg", "%2E/x.jpg"]),
        (["s3://b/50%.jpg", "s3://b/a b#?c\n.jpg"], ["50%.jpg", "a b#?c\n.jpg"]),
        (["file:///p/a%20b.jpg", "/p/c.jpg"], ["a b.jpg", "c.jpg"]),
        ([], []),
    ],
)
def test_relative_names(uris: list[str], names: list[str]) -> None:
    assert export.relative_names(uris) == names


def test_names_do_not_depend_on_what_else_is_chosen() -> None:
    among = ["/p/a/x.jpg", "/p/z/x.jpg"]
    assert export.relative_names(["/p/b/x.jpg"], among) == ["b/x.jpg"]
    assert export.relative_names(["/p/b/x.jpg", "/p/c/x.jpg"], among) == ["b/x.jpg", "c/x.jpg"]


@given(st.lists(st.text("./a%\0\n", max_size=8), min_size=1, max_size=5))
def test_no_name_leads_out_of_its_folder(keys: list[str]) -> None:
    for name in export.relative_names([f"s3://bucket/{key}" for key in keys]):
        assert os.path.normpath(f"/target/{name}") == f"/target/{name}"  # nothing that a path could take another way


@pytest.mark.parametrize(
    ("target", "library", "within"),
    [
        ("/p/best", "/p", True),
        ("/p", "/p/", True),
        ("/pbest", "/p", False),
        ("/x", "/", True),
        ("s3://b/p/best/", "s3a://b/p", True),
        ("s3://b/best", "s3://b/p/", False),
        ("/b/p/best", "s3://b/p", False),
    ],
)
def test_lies_within(target: str, library: str, within: bool) -> None:
    assert export.lies_within(target, library) is within


# --- copies -----------------------------------------------------------------------------------------------------------


def test_a_local_copy(tmp_path: Path) -> None:
    uris = [write(tmp_path / "in/a/x.jpg", b"one"), write(tmp_path / "in/b/x.jpg", b"two")]
    os.utime(uris[0], ns=(0, 1_600_000_000_123_456_789))
    target = tmp_path / "out"
    planned = export.plan_copy(uris, str(target))
    assert not target.exists()  # a plan changes nothing
    assert [actions.describe(action) for action in planned] == [
        f"copy {tmp_path}/in/a/x.jpg -> {target}/a/x.jpg",
        f"copy {tmp_path}/in/b/x.jpg -> {target}/b/x.jpg",
    ]
    assert states(run(planned)) == ["done", "done"]
    assert files_of(target) == {"a/x.jpg": b"one", "b/x.jpg": b"two"}
    assert (target / "a/x.jpg").stat().st_mtime_ns == 1_600_000_000_123_456_789
    assert files_of(tmp_path / "in") == {"a/x.jpg": b"one", "b/x.jpg": b"two"}
    (target / "b/x.jpg").unlink()  # a rerun does what is missing
    assert actions.count(run(export.plan_copy(uris, str(target)))) == {
        "todo": 0,
        "done": 1,
        "already": 1,
        "refused": 0,
    }


def test_another_file_at_the_target_stays(tmp_path: Path) -> None:
    uris = [write(tmp_path / f"in/{name}.jpg", b"photo") for name in "abcd"]
    target = tmp_path / "out"
    write(target / "a.jpg", b"other")  # of the same size
    write(target / "b.jpg", b"longer than it")
    write(target / "c.jpg", b"photo")  # the same bytes, copied by somebody
    os.utime(target / "b.jpg", ns=(0, Path(uris[1]).stat().st_mtime_ns))  # its time alone proves nothing
    (target / "d.jpg").mkdir()
    done = run(export.plan_copy(uris, str(target)))
    assert states(done) == ["refused", "refused", "already", "refused"]
    assert done[0].note == (
        f"{target}/a.jpg (5 bytes) is another file than {uris[0]} (5 bytes); move it away or give another target"
    )
    assert files_of(target) == {"a.jpg": b"other", "b.jpg": b"longer than it", "c.jpg": b"photo"}


def test_a_file_that_appears_after_planning_stays(tmp_path: Path) -> None:
    planned = export.plan_copy([write(tmp_path / "in/a.jpg")], str(tmp_path / "out"))
    write(tmp_path / "out/a.jpg", b"somebody's")
    assert states(run(planned)) == ["refused"]
    assert files_of(tmp_path / "out") == {"a.jpg": b"somebody's"}


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_appears_while_the_photo_is_read_stays(
    hard_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = [write(tmp_path / f"in/{name}.jpg") for name in ("appears", "same", "new")]
    appearing = {uris[0]: b"somebody's", uris[1]: b"photo"}
    planned = export.plan_copy(uris, str(tmp_path / "out"))
    fetch = export.fetch

    def read(asked: list[str], *rest: Any) -> Any:
        for uri in set(asked) & set(appearing):
            write(tmp_path / "out" / Path(uri).name, appearing.pop(uri))
        return fetch(asked, *rest)

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")  # of FAT

    monkeypatch.setattr(export, "fetch", read)
    if not hard_links:
        monkeypatch.setattr(os, "link", refuse)
    done = run(planned)
    assert states(done) == ["refused", "already", "done"]
    assert "is another file than" in done[0].note
    assert files_of(tmp_path / "out") == {"appears.jpg": b"somebody's", "same.jpg": b"photo", "new.jpg": b"photo"}


def test_a_link_to_nothing_is_not_followed_out_of_the_target(tmp_path: Path) -> None:
    planned = export.plan_copy([write(tmp_path / "in/a.jpg")], str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    [action] = run(planned)
    assert (action.state, action.note) == ("refused", f"something else is at {tmp_path}/out/a.jpg; move it away")
    assert not (tmp_path / "elsewhere.jpg").exists()


def test_a_photo_replaced_since_it_was_scored_goes_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before planning, between that and the copy, and while it is read."""
    names = ("kept", "before", "after", "while", "unknown")
    photos = {name: write(tmp_path / f"in/{name}.jpg", b"scored") for name in names}
    listed = pa.concat_tables(list_library(tmp_path / "in"))
    tables = dict(zip(listed["uri"].to_pylist(), listed["etag"].to_pylist(), strict=True))
    etags = [None if name == "unknown" else tables[uri] for name, uri in photos.items()]

    def replace(name: str) -> None:
        write(Path(photos[name]), b"edited")
        os.utime(photos[name], ns=(0, 1_700_000_000_000_000_000))

    replace("before")
    replace("unknown")
    copies = export.plan_copy(list(photos.values()), str(tmp_path / "copies"), etags=etags)
    links = export.plan_links(list(photos.values()), str(tmp_path / "links"), "hard", etags=etags)
    assert states(copies) == states(links) == ["todo", "refused", "todo", "todo", "todo"]
    replace("after")
    assert states(run(links)) == ["done", "refused", "refused", "done", "done"]
    fetch = export.fetch

    def read(asked: list[str], *rest: Any) -> Any:
        if asked == [photos["while"]]:
            replace("while")
        return fetch(asked, *rest)

    monkeypatch.setattr(export, "fetch", read)
    done = run(copies)
    assert states(done) == ["done", "refused", "refused", "refused", "done"]
    reason = "it has changed since it was scored; score the library again"
    assert [action.note for action in done] == ["", reason, reason, reason, ""]
    assert files_of(tmp_path / "copies") == {"kept.jpg": b"scored", "unknown.jpg": b"edited"}


def test_an_object_replaced_since_it_was_scored_goes_nowhere(
    tmp_path: Path, s3_server: S3Server, s3_bucket: str
) -> None:
    client, options = s3_server.client(), s3_server.storage_options
    names = ("kept", "before", "after")
    for name in names:
        client.put_object(Bucket=s3_bucket, Key=f"p/{name}.jpg", Body=b"scored")
    listed = pa.concat_tables(list_library(f"s3://{s3_bucket}/p", options))
    tables = dict(zip(listed["uri"].to_pylist(), listed["etag"].to_pylist(), strict=True))
    uris = [f"s3://{s3_bucket}/p/{name}.jpg" for name in names]
    etags = [tables[uri] for uri in uris]
    client.put_object(Bucket=s3_bucket, Key="p/before.jpg", Body=b"edited")
    folders = [str(tmp_path / "out"), f"s3://{s3_bucket}/best"]
    planned = [export.plan_copy(uris, folder, options, etags=etags) for folder in folders]
    assert [states(plan) for plan in planned] == [["todo", "refused", "todo"]] * 2
    client.put_object(Bucket=s3_bucket, Key="p/after.jpg", Body=b"edited")
    for plan in planned:
        done = run(plan)
        assert states(done) == ["done", "refused", "refused"]
        assert {action.note for action in done[1:]} == {"it has changed since it was scored; score the library again"}
    assert files_of(tmp_path / "out") == {"kept.jpg": b"scored"}
    assert objects_of(s3_server, s3_bucket, "best/") == {"best/kept.jpg": b"scored"}


def test_onto_itself(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.jpg")
    assert states(run(export.plan_copy([uri], str(tmp_path)))) == ["already"]
    assert files_of(tmp_path) == {"a.jpg": b"photo"}


def test_a_photo_that_is_gone_stops_no_other(tmp_path: Path) -> None:
    uris = [f"{tmp_path}/in/gone.jpg", write(tmp_path / "in/a.jpg")]
    gone, copied = run(export.plan_copy(uris, str(tmp_path / "out")))
    assert (gone.state, copied.state) == ("refused", "done")
    assert gone.note == f"{uris[0]} is not there any more"


def test_a_target_that_cannot_be(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.jpg")
    with pytest.raises(UsageError, match="is a file; give a folder"):
        export.plan_copy([uri], uri)
    for target in ("https://example.org/out", "s3://key:secret@bucket/out"):
        with pytest.raises(UsageError, match="cannot copy to") as caught:
            export.plan_copy([uri], target)
        assert "secret" not in str(caught.value)


def test_a_file_that_is_a_folder_to_another(tmp_path: Path, s3_server: S3Server, s3_bucket: str) -> None:
    for key in ("p/x.jpg", "p/x.jpg/y.jpg"):
        s3_server.client().put_object(Bucket=s3_bucket, Key=key, Body=key.encode())
    uris = [f"s3://{s3_bucket}/p/x.jpg/y.jpg", f"s3://{s3_bucket}/p/x.jpg"]
    deeper, file = run(export.plan_copy(uris, str(tmp_path), s3_server.storage_options))
    assert (deeper.state, deeper.note) == ("refused", f"it needs a folder where {uris[1]} is a file")
    assert (file.state, files_of(tmp_path)) == ("done", {"x.jpg": b"p/x.jpg"})


def test_names_that_meet_are_refused(tmp_path: Path, s3_server: S3Server, s3_bucket: str) -> None:
    for key in ("a/../x.jpg", "a/%2E%2E/x.jpg"):
        s3_server.client().put_object(Bucket=s3_bucket, Key=key, Body=key.encode())
    uris = [f"s3://{s3_bucket}/a/../x.jpg", f"s3://{s3_bucket}/a/%2E%2E/x.jpg"]
    first, second = run(export.plan_copy(uris, str(tmp_path / "out"), s3_server.storage_options))
    assert (first.state, second.state) == ("done", "refused")
    assert second.note == f"its name there is that of {uris[0]}"
    assert files_of(tmp_path) == {"out/%2E%2E/x.jpg": b"a/../x.jpg"}


def test_from_prefix_to_prefix_the_store_copies(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No object's bytes pass through this process, whatever its key, and between two buckets neither."""
    photos = fill_bucket(s3_server, s3_bucket)
    s3_server.client().put_object(Bucket=s3_bucket, Key="photos/a/x.jpg", Body=b"x", ContentType="image/x-own")
    uris = [*photos, f"s3://{s3_bucket}/photos/a/x.jpg"]
    other = s3_server.make_bucket()
    monkeypatch.setattr(export, "fetch", None)
    monkeypatch.setattr(export, "write_file", None)
    with FaultProxy(s3_server.endpoint_url) as proxy:
        done = run(export.plan_copy(uris, f"s3://{other}/best/", proxy.storage_options(s3_server)))
        assert not [line for line in proxy.asked if line.startswith("GET ") and ".jpg" in line]
        assert sum(line.startswith(f"PUT /{other}/best/") for line in proxy.asked) == len(uris)
    refused = {action.source: action.note for action in done if action.state != "done"}
    assert refused == {}
    copied = objects_of(s3_server, other)
    assert len(copied) == len(uris)
    assert all(key.startswith("best/") and not {"", ".", ".."} & set(key.split("/")) for key in copied)
    assert set(copied.values()) == {*photos.values(), b"x"}
    head = s3_server.client().head_object(Bucket=other, Key="best/a/x.jpg")
    assert head["ContentType"] == "image/x-own"
    again = run(export.plan_copy(uris, f"s3://{other}/best", s3_server.storage_options))
    assert actions.count(again)["already"] == len(uris)
    assert objects_of(s3_server, s3_bucket).keys() == {uri.split("/", 3)[3] for uri in uris}


def test_an_object_that_appears_while_the_photo_is_read_stays(
    tmp_path: Path, s3_server: S3Server, s3_bucket: str
) -> None:
    client = s3_server.client()

    def appear() -> None:
        client.put_object(Bucket=s3_bucket, Key="best/a.jpg", Body=b"somebody's")

    faults = [Fault("none", r"^PUT .*/best/a\.jpg", action=appear), Fault("NotImplemented", r"^PUT .*/b\.jpg", times=1)]
    uris = [write(tmp_path / "a.jpg"), write(tmp_path / "b.jpg")]
    with FaultProxy(s3_server.endpoint_url, faults) as proxy:
        stays, copied = run(export.plan_copy(uris, f"s3://{s3_bucket}/best", proxy.storage_options(s3_server)))
        assert proxy.befallen["NotImplemented"] == 1  # a store that knows no such condition is asked without
    assert (stays.state, copied.state) == ("refused", "done")
    assert "is another file than" in stays.note
    assert objects_of(s3_server, s3_bucket) == {"best/a.jpg": b"somebody's", "best/b.jpg": b"photo"}


def test_the_store_is_told_under_which_conditions_it_may_copy(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ceph 16 does not heed them, so that its answers are made up: what a store that does would give."""
    from s3fs import S3FileSystem

    client = s3_server.client()
    for name in ("appears", "changes", "new"):
        client.put_object(Bucket=s3_bucket, Key=f"p/{name}.jpg", Body=b"photo")
    asked, call = {}, S3FileSystem.call_s3

    def listen(self: Any, method: str, **request: Any) -> Any:
        if method == "copy_object":
            asked[request["Key"]] = {name: request.get(name) for name in ("IfNoneMatch", "CopySourceIfMatch")}
        return call(self, method, **request)

    def appear() -> None:
        client.put_object(Bucket=s3_bucket, Key="best/appears.jpg", Body=b"somebody's")

    def change() -> None:
        client.put_object(Bucket=s3_bucket, Key="p/changes.jpg", Body=b"edited")

    monkeypatch.setattr(S3FileSystem, "call_s3", listen)
    faults = [
        Fault("PreconditionFailed", r"^PUT .*/best/appears\.jpg", action=appear),
        Fault("PreconditionFailed", r"^PUT .*/best/changes\.jpg", action=change),
    ]
    uris = [f"s3://{s3_bucket}/p/{name}.jpg" for name in ("appears", "changes", "new")]
    with FaultProxy(s3_server.endpoint_url, faults) as proxy:
        done = run(export.plan_copy(uris, f"s3://{s3_bucket}/best", proxy.storage_options(s3_server)))
    assert states(done) == ["refused", "refused", "done"]
    assert "is another file than" in done[0].note
    assert done[1].note == "it has changed since it was scored; score the library again"
    conditions = {"IfNoneMatch": "*", "CopySourceIfMatch": f'"{hashlib.md5(b"photo").hexdigest()}"'}
    assert asked == {f"best/{name}.jpg": conditions for name in ("appears", "changes", "new")}


def put_in_parts(server: S3Server, bucket: str, key: str, parts: list[bytes], **said: Any) -> str:
    """Upload an object in parts; its etag."""
    client = server.client()
    upload = {"Bucket": bucket, "Key": key}
    upload["UploadId"] = client.create_multipart_upload(**upload, **said)["UploadId"]
    sent = [
        {"PartNumber": number, "ETag": client.upload_part(**upload, PartNumber=number, Body=part)["ETag"]}
        for number, part in enumerate(parts, 1)
    ]
    client.complete_multipart_upload(**upload, MultipartUpload={"Parts": sent})
    return str(client.head_object(Bucket=bucket, Key=key)["ETag"]).strip('"')


def test_a_copy_of_an_object_in_parts_is_known_without_reading_it(s3_server: S3Server, s3_bucket: str) -> None:
    """Its etag may be another than the original's: AWS makes it anew; Ceph does not, which is made up for here."""
    client = s3_server.client()
    said = {"ContentType": "image/x-own", "CacheControl": "max-age=3", "Metadata": {"own": "1"}}
    etag = put_in_parts(s3_server, s3_bucket, "p/a.jpg", [b"a" * 5 * 1024**2, b"b"], **said)
    uri, target = f"s3://{s3_bucket}/p/a.jpg", f"s3://{s3_bucket}/best"
    assert states(run(export.plan_copy([uri], target, s3_server.storage_options))) == ["done"]
    head = client.head_object(Bucket=s3_bucket, Key="best/a.jpg")
    assert head["Metadata"] == {"own": "1", "picinspector-source-etag": etag}
    assert (head["ContentType"], head["CacheControl"]) == ("image/x-own", "max-age=3")
    other = put_in_parts(s3_server, s3_bucket, "best/a.jpg", [b"a" * 5 * 1024**2 + b"b"], Metadata=head["Metadata"])
    assert other != etag
    with FaultProxy(s3_server.endpoint_url) as proxy:
        planned = export.plan_copy([uri], target, proxy.storage_options(s3_server))
        assert states(planned) == ["already"]
        assert not [line for line in proxy.asked if line.startswith("GET ") and ".jpg" in line]
        changed = put_in_parts(s3_server, s3_bucket, "p/a.jpg", [b"a" * 5 * 1024**2, b"c"])
        assert changed != etag
        assert states(export.plan_copy([uri], target, proxy.storage_options(s3_server))) == ["refused"]  # it was read


def test_few_originals_are_read_at_a_time_to_compare_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = [write(tmp_path / f"in/{number}.jpg") for number in range(40)]
    for uri in uris:
        write(tmp_path / "out" / Path(uri).name)
    reading, most, lock, fetch = 0, 0, threading.Lock(), export.fetch

    def read(asked: list[str], *rest: Any) -> Any:
        nonlocal reading, most
        with lock:
            reading += 1
            most = max(most, reading)
        time.sleep(0.01)  # for the others to come in, where nothing holds them
        with lock:
            reading -= 1
        return fetch(asked, *rest)

    monkeypatch.setattr(export, "fetch", read)
    assert actions.count(export.plan_copy(uris, str(tmp_path / "out")))["already"] == 40
    assert 1 <= most <= 4


def test_from_a_folder_to_a_bucket_and_back(tmp_path: Path, s3_server: S3Server, s3_bucket: str) -> None:
    photos, options = make_folder(tmp_path / "in"), s3_server.storage_options
    rows = [uri for table in list_library(tmp_path / "in") for uri in table["uri"].to_pylist()]
    done = run(export.plan_copy(rows, f"s3://{s3_bucket}/best", options))
    refused = Counter(action.note for action in done if action.state == "refused")
    assert refused == {
        "its name is not UTF-8, and an object's must be": 4,
        "its key there would have more than 1024 bytes": 1,
    }
    copied = objects_of(s3_server, s3_bucket)
    assert copied == {f"best/{name}": photos[f"{tmp_path}/in/{name}"] for name in LOCAL if f"best/{name}" in copied}
    assert len(copied) == len(photos) - 5
    assert s3_server.client().head_object(Bucket=s3_bucket, Key="best/50%.jpg")["ContentType"] == "image/jpeg"
    again = run(export.plan_copy(rows, f"s3://{s3_bucket}/best", options))
    assert actions.count(again)["already"] == len(copied)

    back = export.plan_copy([f"s3://{s3_bucket}/{key}" for key in copied], str(tmp_path / "back"), options)
    assert not [action for action in run(back) if action.state != "done" and "too long" not in action.note]
    found = files_of(tmp_path / "back")
    assert found == {name: copied[f"best/{name}"] for name in found}
    assert len(found) >= len(copied) - 2
    assert {path.name for path in tmp_path.iterdir()} == {"in", "back"}
    assert not list(tmp_path.rglob("*.part"))
    write(tmp_path / "back/50%.jpg", b"x" * len(found["50%.jpg"]))  # the same size, another time
    notes = [action.note for action in export.plan_copy(rows, str(tmp_path / "back"), options) if action.note]
    assert len([note for note in notes if "is another file than" in note]) == 1


def test_keys_that_would_lead_out_of_a_folder(tmp_path: Path, s3_server: S3Server, s3_bucket: str) -> None:
    fill_bucket(s3_server, s3_bucket)
    photos = [f"s3://{s3_bucket}/photos/{key}" for key in KEYS if len(key.encode()) < 240]
    s3_server.client().put_object(Bucket=s3_bucket, Key="photos/../../../evil.jpg", Body=b"evil")
    done = run(
        export.plan_copy(
            [*photos, f"s3://{s3_bucket}/photos/../../../evil.jpg"], f"{tmp_path}/a/b/out", s3_server.storage_options
        )
    )
    assert {action.note for action in done if action.state != "done"} == set()
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"b"}
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == {"out"}
    assert (tmp_path / "a/b/out/%2E%2E/%2E%2E/%2E%2E/evil.jpg").read_bytes() == b"evil"
    assert len(files_of(tmp_path)) == len(done)


def test_a_bucket_that_is_not_there_or_not_ours(s3_server: S3Server, s3_bucket: str, tmp_path: Path) -> None:
    uris = [write(tmp_path / "a.jpg"), write(tmp_path / "b.jpg")]
    with pytest.raises(StorageError, match="there is no bucket no-such-bucket; make it"):
        export.plan_copy(uris, "s3://no-such-bucket/best", s3_server.storage_options)
    with FaultProxy(s3_server.endpoint_url, [Fault("AccessDenied", r"^PUT .*/a\.jpg")]) as proxy:
        denied, done = run(export.plan_copy(uris, f"s3://{s3_bucket}/best", proxy.storage_options(s3_server)))
    assert (denied.state, done.state) == ("refused", "done")
    assert "PermissionError" in denied.note
    assert objects_of(s3_server, s3_bucket) == {"best/b.jpg": b"photo"}


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hard", "symbolic"])
def test_links(kind: Any, tmp_path: Path) -> None:
    make_folder(tmp_path / "in")
    uris = [uri for table in list_library(tmp_path / "in") for uri in table["uri"].to_pylist()]
    folder = tmp_path / "out"
    planned = export.plan_links(uris, str(folder), kind)
    assert not folder.exists()
    done = run(planned)
    assert actions.count(done)["done"] == len(uris)
    for name in LOCAL:
        link = folder / name
        assert link.samefile(tmp_path / "in" / name)
        assert link.is_symlink() == (kind == "symbolic")
    assert actions.count(run(export.plan_links(uris, str(folder), kind)))["already"] == len(uris)
    other: Any = "hard" if kind == "symbolic" else "symbolic"
    assert actions.count(run(export.plan_links(uris, str(folder), other)))["refused"] == len(uris)


def test_links_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = [write(tmp_path / "in/a.jpg"), write(tmp_path / "in/b.jpg"), f"{tmp_path}/in/gone.jpg"]
    write(tmp_path / "out/a.jpg", b"somebody's")
    (tmp_path / "out/b.jpg").symlink_to(tmp_path / "nowhere")
    for kind in ("hard", "symbolic"):
        done = run(export.plan_links(uris, str(tmp_path / "out"), kind))  # type: ignore[arg-type]
        assert states(done) == ["refused"] * 3
        assert done[0].note == (
            f"{tmp_path}/out/a.jpg is there and is no {kind} link to {uris[0]}; move it away or give another folder"
        )
        assert "not there any more" in done[2].note
    assert (tmp_path / "out/a.jpg").read_bytes() == b"somebody's"
    with pytest.raises(UsageError, match=r"only local photos can be linked, and s3://b/a.jpg is not; copy them"):
        export.plan_links(["s3://b/a.jpg"], str(tmp_path / "out"), "hard")
    with pytest.raises(UsageError, match="links need a local folder"):
        export.plan_links(uris, "s3://b/out", "symbolic")
    with pytest.raises(UsageError, match="is a file; give a folder"):
        export.plan_links(uris, uris[0], "symbolic")

    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    [action] = run(export.plan_links(uris[:1], str(tmp_path / "far"), "hard"))
    assert action.note == f"{tmp_path}/far/a.jpg is on another device; use symbolic links or copy"


# --- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["txt", "csv", "parquet"])
def test_a_list_is_read_back_by_score(suffix: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "in")
    write(tmp_path / "in/ends with a blank.jpg ")
    uris = [uri for table in list_library(tmp_path / "in") for uri in table["uri"].to_pylist()]
    uris.append(f"{tmp_path}/in/ends with a blank.jpg ")
    export.write_list(uris, f"{tmp_path}/best.{suffix}")
    found = pa.concat_tables(list_library(tmp_path / f"best.{suffix}"))
    assert found["uri"].to_pylist() == uris
    assert None not in found["etag"].to_pylist()


def test_a_list_in_a_bucket(s3_server: S3Server, s3_bucket: str) -> None:
    photos, options = list(fill_bucket(s3_server, s3_bucket)), s3_server.storage_options
    one_line = [uri for uri in photos if "\n" not in uri]
    export.write_list(one_line, f"s3://{s3_bucket}/best.txt", options)
    export.write_list(photos, f"s3://{s3_bucket}/best.csv", options)
    for name, uris in (("best.txt", one_line), ("best.csv", photos)):
        found = pa.concat_tables(list_library(f"s3://{s3_bucket}/{name}", options))
        assert found["uri"].to_pylist() == uris
        assert None not in found["etag"].to_pylist()
    with pytest.raises(UsageError, match=r"new\\nline.jpg' cannot stand in a line of text; write .* as .csv"):
        export.write_list(photos, f"s3://{s3_bucket}/best.txt", options)


def test_a_list_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"best.json: a list is a .txt, .csv or .parquet file"):
        export.write_list(["/a.jpg"], str(tmp_path / "best.json"))
    with pytest.raises(UsageError, match=r"best.xlsx: a table is a .parquet or .csv file"):
        export.write_table(pa.table({"a": [1]}), str(tmp_path / "best.xlsx"))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*folder.txt: IsADirectoryError") as caught:
        export.write_list(["/a.jpg"], str(tmp_path / "folder.txt"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="cannot write"):
        export.write_list(["/a.jpg"], "https://example.org/best.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.txt"]


def test_tables(tmp_path: Path, s3_server: S3Server, s3_bucket: str) -> None:
    table = pa.table(
        {
            "uri": ['/a "b", c\n.jpg', "/b.jpg"],
            "quality_score": pa.array([7.5, None], pa.float32()),
            "suggestions": pa.array([["one", 'a "two", ü'], None], pa.list_(pa.string())),
            "embedding": pa.array([[0.5, 1.0], [0.0, 2.0]], pa.list_(pa.float16(), 2)),
            "half": pa.array([0.5, 1.5], pa.float16()),
            "last_modified": pa.array([datetime(2026, 1, 2, tzinfo=UTC), None], pa.timestamp("us", tz="UTC")),
        }
    )
    export.write_table(table, str(tmp_path / "out/best.parquet"))
    assert pq.read_table(tmp_path / "out/best.parquet").equals(table)
    export.write_table(table, f"s3://{s3_bucket}/best.CSV", s3_server.storage_options)
    text = objects_of(s3_server, s3_bucket)["best.CSV"].decode()
    first, second = csv.DictReader(text.splitlines(keepends=True))
    assert (first["uri"], first["quality_score"], first["half"]) == ('/a "b", c\n.jpg', "7.5", "0.5")
    assert json.loads(first["suggestions"]) == ["one", 'a "two", ü']
    assert json.loads(first["embedding"]) == [0.5, 1.0]
    assert first["last_modified"].startswith("2026-01-02 00:00:00")
    assert (second["quality_score"], second["suggestions"], second["last_modified"]) == ("", "", "")


# --- actions ----------------------------------------------------------------------------------------------------------


def test_an_action_is_one_line_whatever_its_names() -> None:
    action = Action("copy", "/a\n\x1b[2J\u202e.jpg", "s3://b/é 写真 .jpg", "why", "refused")
    assert actions.describe(action) == "refused: copy /a\\n\\x1b[2J\\u202e.jpg -> s3://b/é 写真 .jpg (why)"


def test_a_mistake_of_ours_is_not_an_outcome() -> None:
    def mistake() -> Any:
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        list(actions.carry_out([Action("copy", "/a", "/b", perform=mistake)]))


def test_only_what_is_to_do_is_done() -> None:
    def never() -> Any:
        raise AssertionError

    kept = [Action("copy", "/a", "/b", state=state, perform=never) for state in ("already", "refused", "done")]
    assert list(actions.carry_out(kept)) == kept
    assert actions.count(kept) == {"todo": 0, "done": 1, "already": 1, "refused": 1}


def test_no_message_breaks_a_line(tmp_path: Path) -> None:
    done = run(export.plan_copy([f"{tmp_path}/new\nline/a.jpg"], str(tmp_path / "out")))
    assert not [action for action in done if re.search(r"[\r\n]", actions.describe(action))]
