"""Curating where photos, tables and report are all on a real S3 server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from picinspector.cli import main
from picinspector.tables import Destination
from tests.report_library import jpeg
from tests.s3_server import S3Server
from tests.test_groups import RUN, apart, commit
from tests.test_selection import scored


@pytest.fixture
def library(s3_server: S3Server, s3_bucket: str, tmp_path: Path) -> str:
    """Four photos in two folders, of which two are one file; scored into the bucket, by hand."""
    rows = []
    for name, quality in (("a/one", 8.0), ("a/two", 7.0), ("b/one", 6.0), ("b/copy", 6.0)):
        content = jpeg(tmp_path / "x.jpg", len(rows) if name != "b/copy" else 2).read_bytes()
        put = s3_server.client().put_object(Bucket=s3_bucket, Key=f"photos/{name}.jpg", Body=content)
        uri = f"s3://{s3_bucket}/photos/{name}.jpg"
        etag, kind = put["ETag"].strip('"'), "same" if quality == 6 else name
        rows.append(scored(name, quality, uri=uri, etag=etag, content_hash=kind, size_bytes=len(content)))
    commit(Destination(f"s3://{s3_bucket}/tables", s3_server.storage_options), RUN, rows, apart(4))
    return s3_bucket


def test_curate_select_and_search_on_s3(library: str, s3_server: S3Server, capsys: Any, tmp_path: Path) -> None:
    options = ["--storage-options", json.dumps(s3_server.storage_options)]
    tables, client = f"s3://{library}/tables", s3_server.client()
    assert main(["curate", tables, "--best", "3", "--json", *options]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["selected"], said["report"]["shown"], said["report"]["unreadable"]) == (3, 4, 0)
    assert said["report"]["out"] == f"s3://{library}/tables/report.html"
    page = client.get_object(Bucket=library, Key="tables/report.html")
    assert page["ContentType"].startswith("text/html") and page["Body"].read(15).lower() == b"<!doctype html>"

    command = ["select", tables, "--best", "3", "--copy-to", f"s3://{library}/best", "--xmp", "appended"]
    assert main([*command, "--list", str(tmp_path / "best.csv"), *options]) == 0
    keys = [found["Key"] for found in client.list_objects_v2(Bucket=library)["Contents"]]
    assert [key for key in keys if key.startswith("best/")] == ["best/a/one.jpg", "best/a/two.jpg", "best/b/one.jpg"]
    assert sum(key.startswith("photos/") and key.endswith(".jpg.xmp") for key in keys) == 4
    assert b'xmp:Label="Red"' in client.get_object(Bucket=library, Key="photos/b/copy.jpg.xmp")["Body"].read()
    capsys.readouterr()
    assert main([*command, *options]) == 0
    assert "7 already" in capsys.readouterr().err
