"""Names made by some camera, script or mistake: each photo is listed, read and scored once, by a URI that works."""

from __future__ import annotations

import csv
import io
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from picinspector import manifest, pipeline, tables
from picinspector.manifest import list_library, stat_uris
from picinspector.storage import fetch, is_signed
from tests.s3_server import S3Server

#: Good in a folder and in a bucket. `\u0085`, `\u2028` and `\x1c` end lines for Python's splitlines; a name in two
#: Unicode normal forms is two files.
NAMES = [
    *("two  words.jpg", " blank first.jpg", "50%.jpg", "100%25.jpg", "%2e%2e%2F.jpg", "a+b&c;d=e,f.jpg", "a#b.jpg"),
    *("#first.jpg", "a?b=c.jpg", "a?versionId=b.jpg", "a?token=b.jpg", "a::b.jpg", "user@host:b.jpg", "http:.jpg"),
    *("new\nline.jpg", "carriage\rreturn.jpg", "tab\tulator.jpg", "next\u0085line.jpg", "a\u2028b.jpg", "a\x1cb.jpg"),
    *("it's.jpg", 'say "cheese".jpg', "back\\slash.jpg", "`$(id)`.jpg", "$HOME.jpg", "{0} {a}.jpg", "<&amp;>.jpg"),
    *("[1].jpg", "*.jpg", "!.jpg", "|.jpg", "-rf.jpg", "run_id=1.jpg", "NULL.jpg", "..jpg.jpg", ".hidden.jpg"),
    *(
        "caf\u00e9.jpg",
        "cafe\u0301.jpg",
        "\u5199\u771f.jpg",
        "\U0001f4f7\U0001f469\u200d\U0001f467.jpg",
        "\u202egpj.jpg",
    ),
    *("~.jpg", "~root.jpg", "sub?folder/a.jpg", "sub#folder/a.jpg", "sub folder%/a.jpg", "x.jpg/x.jpg"),
]
LOCAL = [*NAMES, "n" * 251 + ".jpg", "/".join(["d" * 250] * 14) + "/deep.jpg"]
LOCAL += [os.fsdecode(name) for name in (b"caf\xe9.jpg", b"\xff\xfe\x80.jpg", b"dir\xe9/a b#.jpg", b"\xf0\x9f.jpg")]
KEYS = [*NAMES, "/leading.jpg", "//two.jpg", "a//double.jpg", "a//b//.//c.jpg", "./dot.jpg", "a/../up.jpg"]
KEYS += ["k" * (1024 - len("photos/") - 4) + ".jpg", "\u00e9" * 500 + ".jpg"]


def jpeg(seed: int) -> bytes:
    """A photo of one colour; no two seeds have the same bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (seed, 255 - seed, 99)).save(buffer, "JPEG", comment=str(seed).encode())
    return buffer.getvalue()


def make_folder(folder: Path) -> dict[str, bytes]:
    """Write a photo of each local name; path -> bytes."""
    photos = {f"{folder}/{name}": jpeg(seed) for seed, name in enumerate(LOCAL)}
    for path, content in photos.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)
    return photos


def fill_bucket(server: S3Server, bucket: str) -> dict[str, bytes]:
    """Put a photo of each key, under `photos/`; URI -> bytes."""
    client, photos = server.client(), {}
    for seed, key in enumerate(KEYS, 100):
        client.put_object(Bucket=bucket, Key=f"photos/{key}", Body=jpeg(seed))
        photos[f"s3://{bucket}/photos/{key}"] = jpeg(seed)
    return photos


def rows_of(library: Any, options: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """URI -> manifest row; fails where a URI or an id comes twice."""
    found = pa.concat_tables(list_library(library, options)).to_pylist()
    assert len({row["uri"] for row in found}) == len({row["image_id"] for row in found}) == len(found)
    return {row["uri"]: row for row in found}


def check_round_trip(rows: dict[str, dict[str, Any]], contents: set[bytes], options: dict[str, Any] | None) -> None:
    """The URIs that a listing gives fetch these bytes, in the version listed, and mean the same image by themselves."""
    uris = list(rows)
    fetched = fetch(
        uris, options, etags=[rows[uri]["etag"] for uri in uris], sizes=[rows[uri]["size_bytes"] for uri in uris]
    )
    assert {content for content in fetched if isinstance(content, bytes)} == contents, fetched
    assert len(fetched) == len(contents)
    for row in stat_uris(uris, options).to_pylist():
        # An object's headers give its time to the second.
        assert row | {"last_modified": None} == rows[row["uri"]] | {"last_modified": None}
    for uri in uris:
        uri.encode("utf-8")  # else no table could hold it
        assert not is_signed(uri), uri


def test_a_folder_of_odd_names(tmp_path: Path) -> None:
    photos = make_folder(tmp_path)
    check_round_trip(rows_of(tmp_path), set(photos.values()), None)


def test_a_bucket_of_odd_keys(s3_server: S3Server, s3_bucket: str) -> None:
    photos, options = fill_bucket(s3_server, s3_bucket), s3_server.storage_options
    found = rows_of(f"s3://{s3_bucket}/photos", options)
    assert found.keys() == photos.keys()
    check_round_trip(found, set(photos.values()), options)
    assert rows_of(f"s3://{s3_bucket}", options) == found
    for key in ("/leading.jpg", "a?versionId=b.jpg", "a::b.jpg", "new\nline.jpg"):  # each a library of one photo
        [alone] = rows_of(f"s3://{s3_bucket}/photos/{key}", options).values()
        assert alone["image_id"] == found[alone["uri"]]["image_id"]


def test_a_prefix_of_a_slash_with_many_folders(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listed again to the bottom, which must not bring the photos beside the folders a second time."""
    monkeypatch.setattr(manifest, "_MANY_CHILDREN", 2)
    client = s3_server.client()
    keys = ["/a.jpg", "//b.jpg", "/x/a.jpg", "/y/a.jpg", "/z/a.jpg"]
    for key in keys:
        client.put_object(Bucket=s3_bucket, Key=key, Body=key.encode())
    assert rows_of(f"s3://{s3_bucket}", s3_server.storage_options).keys() == {f"s3://{s3_bucket}/{key}" for key in keys}


def test_lists_of_odd_names(tmp_path: Path) -> None:
    """By path and by URL, in each kind of list that can hold the name; relative ones too."""
    photos = make_folder(tmp_path)
    expected = rows_of(tmp_path)
    uris = list(expected)
    urls = [Path(path).as_uri() for path in photos]
    readable = [path for path in photos if os.fsencode(path).isascii() or path in expected]
    assert len(readable) == len(photos) - 4
    relative = ["./" + os.path.relpath(path, tmp_path) for path in readable]
    for names in (uris, urls, [*readable, *urls], [*relative, *urls]):
        pq.write_table(pa.table({"uri": names}), tmp_path / "list.parquet")
        assert rows_of(tmp_path / "list.parquet") == expected
        with (tmp_path / "list.csv").open("w", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["uri"], *([name] for name in names)])
        assert rows_of(tmp_path / "list.csv") == expected
    (tmp_path / "list.txt").write_bytes("\n".join(uri for uri in uris if not {"\n", "\r"} & set(uri)).encode())
    assert rows_of(tmp_path / "list.txt").keys() == {uri for uri in expected if not {"\n", "\r"} & set(uri)}
    (tmp_path / "list.txt").write_text("\n".join(urls))
    assert rows_of(tmp_path / "list.txt") == expected


def test_one_photo_under_many_names_is_one_row(s3_server: S3Server, s3_bucket: str, tmp_path: Path) -> None:
    path, sub = tmp_path / "a b.jpg", tmp_path / "sub"
    path.write_bytes(jpeg(0))
    sub.mkdir()
    s3_server.client().put_object(Bucket=s3_bucket, Key="photos/a.jpg", Body=jpeg(1))
    uri = f"s3://{s3_bucket}/photos/a.jpg"
    names = [str(path), f"/{path}", f"//{path}", path.as_uri(), f"{sub.as_uri()}/%2E%2E/a%20b.jpg", "a b.jpg"]
    names += ["./a b.jpg", "sub/../a b.jpg", "././a b.jpg", str(path), uri, f"s3a://{s3_bucket}/photos/a.jpg", uri]
    pq.write_table(pa.table({"uri": names}), tmp_path / "list.parquet")
    found = rows_of(tmp_path / "list.parquet", s3_server.storage_options)
    assert found.keys() == {str(path), uri}
    [row] = rows_of(f"s3a://{s3_bucket}/photos", s3_server.storage_options).values()
    assert row["image_id"] == found[uri]["image_id"]
    s3_server.client().put_object(Bucket=s3_bucket, Key="photos/list.txt", Body=f"a.jpg\n./a.jpg\n{uri}\n".encode())
    assert rows_of(f"s3://{s3_bucket}/photos/list.txt", s3_server.storage_options) == {uri: found[uri]}


def test_clocks_that_are_wrong(tmp_path: Path) -> None:
    """Times of the future and before 1970 are times as others; what no calendar of four digits holds is null."""
    years = (1902, 1969, 1980, 2100, 2440)
    for year in years:
        (tmp_path / f"{year}.jpg").write_bytes(jpeg(1))
        moment = int((datetime(year, 7, 1, tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds())
        os.utime(tmp_path / f"{year}.jpg", ns=(0, moment * 10**9 + 123_456_789))
    found = rows_of(tmp_path)
    assert {row["last_modified"] for row in found.values()} == {
        datetime(year, 7, 1, 0, 0, 0, 123_456, tzinfo=UTC) for year in years
    }
    check = fetch(list(found), etags=[row["etag"] for row in found.values()])
    assert check == [jpeg(1)] * len(years)
    files = manifest._Files(["a", "b", "c"], ["1", "2", "3"], [1, 2, 3], [10**18, -(10**18), 0])
    times = manifest._table(["a", "b", "c"], files).column("last_modified").to_pylist()
    assert times == [None, None, datetime(1970, 1, 1, tzinfo=UTC)]


@pytest.mark.usefixtures("local_ray", "light_encoder")
def test_every_odd_name_is_scored_once(s3_server: S3Server, s3_bucket: str, tmp_path: Path, tiny: Path) -> None:
    """One run over a list of both libraries; its URIs, out of the tables, fetch the photos again."""
    local = make_folder(tmp_path / "photos")
    remote, options = fill_bucket(s3_server, s3_bucket), s3_server.storage_options
    expected = rows_of(tmp_path / "photos") | rows_of(f"s3://{s3_bucket}/photos", options)
    pq.write_table(pa.table({"uri": list(expected)}), tmp_path / "list.parquet")
    chosen = pipeline.Options(bundle=str(tiny), show_progress=False, storage_options=options)
    record = pipeline.score(str(tmp_path / "list.parquet"), str(tmp_path / "out"), chosen)
    assert record["counts"]["failed"] == 0
    assert record["counts"]["to_do"] == len(local) + len(remote)
    dest = tables.Destination(str(tmp_path / "out"))
    for table in ("embeddings", "scores"):
        rows = dest.latest(table, ["uri", "image_id", "etag", "size_bytes"]).to_pylist()
        assert sorted((row["uri"], row["image_id"]) for row in rows) == sorted(
            (uri, row["image_id"]) for uri, row in expected.items()
        )
    fetched = fetch([row["uri"] for row in rows], options, etags=[row["etag"] for row in rows])
    assert set(fetched) == {*local.values(), *remote.values()}
    again = pipeline.score(str(tmp_path / "list.parquet"), str(tmp_path / "out"), chosen)
    assert again["counts"]["to_do"] == 0
