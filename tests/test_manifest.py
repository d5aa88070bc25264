"""Listing: every photo once, whatever holds it, streamed; and what is wrong with a library said in one line."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from picinspector import manifest
from picinspector.errors import PicInspectorError, StorageError, UsageError
from picinspector.manifest import image_id, list_library, stat_uris
from picinspector.schema import MANIFEST
from picinspector.storage import fetch
from tests.s3_server import S3Server


def rows(library: Any, options: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """uri -> row; fails where a uri or an image_id comes twice or a table has another schema."""
    tables = list(list_library(library, options))
    assert all(table.schema.equals(MANIFEST) for table in tables)
    found = [row for table in tables for row in table.to_pylist()]
    assert len({row["uri"] for row in found}) == len({row["image_id"] for row in found}) == len(found)
    return {row["uri"]: row for row in found}


def touch(folder: Path, *names: str) -> list[str]:
    """Make small files; their paths, sorted."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode("utf-8", "surrogateescape"))
    return sorted(str(folder / name) for name in names)


def refusal(library: Any, kind: type[PicInspectorError], options: dict[str, Any] | None = None) -> str:
    """The message of the error that listing ends in, which must be one line and hold the library's name."""
    with pytest.raises(kind) as caught:
        list(list_library(library, options))
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    assert str(library).rsplit("/", 1)[-1].split("?")[0] in message
    return message


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_to_its_bottom_by_extension(tmp_path: Path) -> None:
    photos = touch(
        tmp_path, "a.jpg", "B.JPG", "c.JpEg", "d.png", "e.webp", "f.heic", "g.HEIF", "h.avif", "i.tif", "j.tiff",
        "k.bmp", "l.gif", "m.CR2", "n.dng", "deep/er/still/o.jpg", ".hidden/p.jpg", ".q.jpg", "x.tar.jpg",
        "two words/50% #1+?.jpg", "größe/写真.jpg", "s.jpg.d/t.jpg",
    )  # fmt: skip
    touch(
        tmp_path, "._a.jpg", "deep/._o.jpg", "notes.txt", "list.csv", "jpg", ".jpg", "a.jpg.bak", "a.xmp", "video.mp4"
    )
    (tmp_path / "empty").mkdir()
    assert sorted(rows(tmp_path)) == photos
    assert sorted(rows(f"{tmp_path}/")) == sorted(rows(tmp_path.as_uri())) == photos


def test_what_a_row_says_of_a_local_photo(tmp_path: Path) -> None:
    [path] = touch(tmp_path, "a.jpg")
    os.utime(path, ns=(0, 1_700_000_000_123_456_789))
    [row] = rows(tmp_path).values()
    assert row == {
        "image_id": image_id(path, "5-1700000000123456789"),
        "uri": path,
        "etag": "5-1700000000123456789",
        "size_bytes": 5,
        "last_modified": datetime(2023, 11, 14, 22, 13, 20, 123456, tzinfo=UTC),
    }


def test_image_ids_are_hashes_of_uri_and_etag() -> None:
    # printf '/a.jpg\0001' | b2sum -l 128
    assert image_id("/a.jpg", "1") == "7e1daed470b94a86e502e5bf96bc717d"
    ids = {image_id("/a.jpg", "1"), image_id("/a.jpg", "2"), image_id("/b.jpg", "1"), image_id("/a.jpg", None)}
    ids |= {image_id("/a.jpg1", ""), image_id("/a.jpg", "12"), image_id("/a.jpg1", "2")}
    assert len(ids) == 7


def test_a_rewritten_photo_is_a_new_image(tmp_path: Path) -> None:
    [path] = touch(tmp_path, "a.jpg")
    first = rows(tmp_path)[path]
    assert rows(tmp_path)[path] == first
    # Same size, one nanosecond later: a float would not tell them apart.
    stat = os.stat(path)  # noqa: PTH116
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert rows(tmp_path)[path]["image_id"] != first["image_id"]


def test_the_same_photo_is_the_same_image_however_it_is_named(tmp_path: Path) -> None:
    """By its folder, by itself, in a list, and one at a time: else every way of naming would score it again."""
    [path] = touch(tmp_path, "a.jpg")
    os.utime(path, ns=(0, 1_700_000_000_123_456_789))
    by_folder = rows(tmp_path)[path]
    (tmp_path / "list.txt").write_text("a.jpg\n")
    assert rows(path)[path] == rows(tmp_path / "list.txt")[path] == stat_uris([path]).to_pylist()[0] == by_folder


def test_symbolic_links(tmp_path: Path) -> None:
    """A link to a photo is one; a link to a folder is not followed, which could go round in circles."""
    library, elsewhere = tmp_path / "library", tmp_path / "elsewhere"
    touch(elsewhere, "far.jpg")
    photos = touch(library, "a.jpg")
    (library / "link.jpg").symlink_to(elsewhere / "far.jpg")
    (library / "broken.jpg").symlink_to(elsewhere / "gone.jpg")
    (library / "loop.jpg").symlink_to(library / "loop.jpg")
    (library / "folder").symlink_to(elsewhere)
    (library / "round").symlink_to(library)
    found = rows(library)
    assert sorted(found) == [*photos, str(library / "link.jpg")]
    assert found[str(library / "link.jpg")]["size_bytes"] == len("far.jpg")


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    touch(tmp_path, os.fsdecode(b"caf\xe9.jpg"), "b.jpg")
    found = rows(tmp_path)
    assert sorted(found) == [str(tmp_path / "b.jpg"), f"{tmp_path.as_uri()}/caf%E9.jpg"]
    assert fetch([f"{tmp_path.as_uri()}/caf%E9.jpg"]) == [b"caf\xe9.jpg"]


def test_one_photo_and_the_folder_of_none(tmp_path: Path) -> None:
    photos = touch(tmp_path, "a.jpg", "b.jpg")
    assert list(rows(photos[0])) == [photos[0]]
    (tmp_path / "empty").mkdir()
    assert rows(tmp_path / "empty") == {}


def test_other_extensions_on_request(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.fits")
    [table] = list_library(tmp_path, suffixes=frozenset({".fits"}))
    assert table.column("uri").to_pylist() == [str(tmp_path / "b.fits")]


def test_a_library_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone", StorageError).startswith(f"cannot list {tmp_path}/gone: FileNotFoundError")
    assert refusal(tmp_path / "gone.csv", StorageError).startswith(f"cannot list {tmp_path}/gone.csv: ")
    refusal("memory://gone/library", StorageError)
    refusal("gopher://host/library", StorageError)


# --- lists ------------------------------------------------------------------------------------------------------------


def write_list(path: Path, uris: list[str]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"other": list(range(len(uris))), "uri": uris}), path)
    elif path.suffix == ".csv":
        path.write_text("".join(f'{number},"{uri}"\n' for number, uri in [("other", "uri"), *enumerate(uris)]))
    else:
        path.write_text("\ufeff# photos\n\n" + "\r\n".join(uris))
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".txt"])
def test_lists(tmp_path: Path, suffix: str) -> None:
    """Relative names belong to the list's folder, absolute ones to none; a photo named twice is one photo."""
    photos = touch(tmp_path / "lists", "a.jpg", "sub/b c#1.jpg") + touch(tmp_path, "a-name", "up.jpg")
    names = ["a.jpg", "sub/b c#1.jpg", str(tmp_path / "a-name"), "../up.jpg", "a.jpg", "./a.jpg", "sub/../a.jpg"]
    path = write_list(tmp_path / "lists" / f"list{suffix}", [*names, photos[0]])
    found = rows(path)
    assert list(found) == photos
    assert rows(path.as_uri()) == found
    assert all(row["etag"].startswith(f"{row['size_bytes']}-") for row in found.values())


def test_a_list_relative_to_the_working_folder_and_to_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = touch(tmp_path, "a.jpg")
    write_list(tmp_path / "list.txt", ["a.jpg"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(rows("list.txt")) == list(rows("./list.txt")) == list(rows("~/list.txt")) == photos


def test_a_manifest_of_ours_is_a_list(tmp_path: Path) -> None:
    photos = touch(tmp_path / "photos", "a.jpg", "b.jpg")
    pq.write_table(pa.concat_tables(list_library(tmp_path / "photos")), tmp_path / "manifest.parquet")
    assert sorted(rows(tmp_path / "manifest.parquet")) == photos


def test_a_listed_photo_that_is_missing_stays_as_a_row(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    found = rows(write_list(tmp_path / "list.csv", ["gone.jpg", "a.jpg", "gopher://host/b.jpg", "http://[bad/c.jpg"]))
    gone = str(tmp_path / "gone.jpg")
    assert list(found) == [gone, str(tmp_path / "a.jpg"), "gopher://host/b.jpg", "http://[bad/c.jpg"]
    nothing = {"etag": None, "size_bytes": None, "last_modified": None}
    assert found[gone] == {"image_id": image_id(gone, None), "uri": gone, **nothing}


def test_lists_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "names.csv").write_text("path,size\na.jpg,1\n")
    assert "needs a column `uri`, it has ['path', 'size']" in refusal(tmp_path / "names.csv", UsageError)
    pq.write_table(pa.table({"uri": ["a.jpg", None]}), tmp_path / "null.parquet")
    assert "entry 2 of column `uri` is None" in refusal(tmp_path / "null.parquet", UsageError)
    (tmp_path / "numbers.csv").write_text("uri\n1\n2\n")
    assert "entry 1 of column `uri` is 1, expected" in refusal(tmp_path / "numbers.csv", UsageError)
    for broken in ("broken.parquet", "broken.csv", "broken.txt"):
        (tmp_path / broken).write_bytes(b"uri,b\n\xff\xfe,1,2,3\n\xe9")
        assert refusal(tmp_path / broken, StorageError).startswith("cannot read the list ")


@pytest.mark.parametrize(
    "uri", ["https://h/a.jpg?X-Amz-Signature=s3cr3t", "https://me:s3cr3t@h/a.jpg", "https://[h/a.jpg?sig=s3cr3t"]
)
def test_signed_urls_never_get_into_a_table(tmp_path: Path, uri: str) -> None:
    message = refusal(write_list(tmp_path / "list.txt", ["a.jpg", uri]), UsageError)
    assert "entry 2 is a signed URL" in message
    assert "s3cr3t" not in message


# --- the web ----------------------------------------------------------------------------------------------------------


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The URL under which `tmp_path` is served."""
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join(10)


@pytest.mark.parametrize("url", ["https://example.org/photos/", "http://127.0.0.1:1/a?sig=s3cr3t", "https://h"])
def test_a_web_folder_is_refused_with_advice(url: str) -> None:
    with pytest.raises(UsageError, match="a web server cannot be listed; give a photo, or a") as caught:
        list(list_library(url))
    assert "s3cr3t" not in str(caught.value)


def test_one_photo_on_the_web(tmp_path: Path, web: str) -> None:
    touch(tmp_path, "a.jpg")
    assert list(rows(f"{web}/a.jpg")) == [f"{web}/a.jpg"]
    assert rows(f"{web}/a.jpg")[f"{web}/a.jpg"]["size_bytes"] == (tmp_path / "a.jpg").stat().st_size


def test_a_list_on_the_web_names_photos_beside_it_and_elsewhere(tmp_path: Path, web: str) -> None:
    touch(tmp_path, "a.jpg", "sub/b.jpg")
    os.utime(tmp_path / "a.jpg", (0, 1_700_000_000))
    write_list(tmp_path / "list.txt", ["a.jpg", f"{web}/sub/b.jpg", "gone.jpg"])
    found = rows(f"{web}/list.txt")
    assert list(found) == [f"{web}/a.jpg", f"{web}/sub/b.jpg", f"{web}/gone.jpg"]
    # No etag from this server, so it is size and time, which it gives to the second.
    first = found[f"{web}/a.jpg"]
    assert (first["etag"], first["size_bytes"]) == ("5-1700000000000000000", 5)
    assert first["last_modified"] == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert found[f"{web}/gone.jpg"]["etag"] is None
    assert refusal(f"{web}/gone.txt", StorageError).startswith(f"cannot read the list {web}/gone.txt: ")


# --- object stores ----------------------------------------------------------------------------------------------------


def put(server: S3Server, bucket: str, keys: list[str], body: bytes = b"x") -> None:
    client = server.client()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: client.put_object(Bucket=bucket, Key=key, Body=body), keys))


def test_a_large_prefix_is_listed_as_it_was_put(s3_server: S3Server, s3_bucket: str) -> None:
    """More keys than a page of 1000 holds: flat in one prefix, and over nested ones."""
    flat = [f"library/flat/{number:05d}.jpg" for number in range(1203)]
    nested = [
        f"library/{year}/{month:02d}/{name}.JPG" for year in (2024, 2025) for month in range(1, 8) for name in "abc"
    ]
    odd = ["library/two words/50%+#1.jpg", "library/größe/写真.png", "library//double.jpg", "library/top.jpg"]
    others = ["library2/a.jpg", "library.jpg", "other/a.jpg"]
    put(s3_server, s3_bucket, [*flat, *nested, *odd, *others, "library/a.txt", "library/._a.jpg", "library/flat/"])

    found = rows(f"s3://{s3_bucket}/library", s3_server.storage_options)
    assert sorted(found) == sorted(f"s3://{s3_bucket}/{key}" for key in [*flat, *nested, *odd])
    assert rows(f"s3://{s3_bucket}/library/", s3_server.storage_options) == found
    assert len(rows(f"s3://{s3_bucket}", s3_server.storage_options)) == len(found) + len(others)


def test_deep_listings_page_too(s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one worker every prefix beyond the fourth goes to its bottom by itself, pages and all."""
    monkeypatch.setattr(manifest, "_WORKERS", 1)
    keys = [f"{top}/{sub}/{number}.jpg" for top in "abcdef" for sub in ("x", "y") for number in range(3)]
    keys += [f"f/z/{number}.jpg" for number in range(1100)]
    put(s3_server, s3_bucket, keys)
    found = rows(f"s3://{s3_bucket}", s3_server.storage_options)
    assert sorted(found) == sorted(f"s3://{s3_bucket}/{key}" for key in keys)


def test_what_a_row_says_of_an_object(s3_server: S3Server, s3_bucket: str) -> None:
    """The etag of a small object is its MD5; a new body is a new image, the same body again is not."""
    uri, options = f"s3://{s3_bucket}/a/b.jpg", s3_server.storage_options
    put(s3_server, s3_bucket, ["a/b.jpg"], b"hello")
    row = rows(f"s3://{s3_bucket}/a", options)[uri]
    assert (row["etag"], row["size_bytes"]) == ("5d41402abc4b2a76b9719d911017c592", 5)
    assert row["image_id"] == image_id(uri, "5d41402abc4b2a76b9719d911017c592")
    assert abs((row["last_modified"] - datetime.now(UTC)).total_seconds()) < 300
    # Listed as a prefix, as a single object, and in a list: the same image.
    assert rows(uri, options)[uri]["image_id"] == row["image_id"]
    s3_server.client().put_object(Bucket=s3_bucket, Key="a/list.txt", Body=b"b.jpg\n/nowhere/local.jpg\n")
    assert rows(f"s3://{s3_bucket}/a/list.txt", options)[uri]["image_id"] == row["image_id"]

    put(s3_server, s3_bucket, ["a/b.jpg"], b"world")
    assert rows(f"s3://{s3_bucket}/a", options)[uri]["image_id"] != row["image_id"]
    put(s3_server, s3_bucket, ["a/b.jpg"], b"hello")
    assert rows(f"s3://{s3_bucket}/a", options)[uri]["image_id"] == row["image_id"]


def test_an_object_store_that_says_no(s3_server: S3Server, s3_bucket: str) -> None:
    options = s3_server.storage_options
    assert "no-such-bucket" in refusal("s3://no-such-bucket-here/a", StorageError, options)
    message = refusal(f"s3://{s3_bucket}/a", StorageError, {**options, "secret": "very-wrong"})
    assert "very-wrong" not in message
    assert rows(f"s3://{s3_bucket}/nothing/here", options) == {}


def test_any_other_filesystem() -> None:
    memory = fsspec.filesystem("memory")
    names = [f"/any/{top}/{sub}/{number}.jpg" for top in "abc" for sub in "xy" for number in range(3)]
    for name in [*names, "/any/top.jpg", "/any/a/notes.txt"]:
        memory.pipe_file(name, b"x")
    found = rows("memory://any")
    assert sorted(found) == sorted(f"memory://{name}" for name in [*names, "/any/top.jpg"])
    assert fetch(list(found)) == [b"x"] * len(found)


# --- streaming --------------------------------------------------------------------------------------------------------


def test_tables_come_in_bounded_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_BATCH_ROWS", 10)
    photos = touch(tmp_path, *(f"{number}.jpg" for number in range(57)), *(f"sub/{number}.jpg" for number in range(8)))
    sizes = [table.num_rows for table in list_library(tmp_path)]
    assert sum(sizes) == len(photos)
    assert max(sizes) < 20
    write_list(tmp_path / "list.txt", photos)
    assert [table.num_rows for table in list_library(tmp_path / "list.txt")] == [10] * 6 + [5]


def test_a_listing_is_only_as_far_ahead_as_its_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store without end, read by hand: constant memory means the listing waits for its reader, and stops with it."""
    monkeypatch.setattr(manifest, "_BATCH_ROWS", 1)
    asked = 0
    lock = threading.Lock()

    def endless(prefix: str, deep: bool) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
        nonlocal asked
        while True:
            with lock:
                asked += 1
                number = asked
            yield [{"name": f"{number}.jpg"}], []

    before = threading.active_count()
    pages = manifest._walk_parallel("", endless)
    assert [next(pages)[0]["name"] for _ in range(3)] == ["1.jpg", "2.jpg", "3.jpg"]
    for _ in range(100):
        seen = asked
        threading.Event().wait(0.02)
        if asked == seen:
            break
    assert asked <= 3 + 64 + 1
    pages.close()
    assert threading.active_count() == before


def test_a_failure_deep_in_a_listing_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_broken(prefix: str, deep: bool) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
        if prefix == "7":
            raise PermissionError("not that one")
        yield [{"name": f"{prefix}.jpg"}], [str(number) for number in range(20)] if prefix == "" else []

    with pytest.raises(PermissionError, match="not that one"):
        list(manifest._walk_parallel("", half_broken))
