"""Folders of trainings: the same verbs on this machine and on a real S3 server."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from picinspector.errors import StorageError, UsageError
from tests.s3_server import S3Server
from training.datasets import absolute_uri
from training.folders import Folder
from training.sheets import Sheet


@pytest.fixture(params=["here", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty one, on this machine or in a bucket."""
    if request.param == "here":
        return Folder(tmp_path / "out")
    server: S3Server = request.getfixturevalue("s3_server")
    return Folder(f"s3://{server.make_bucket()}/a/out", server.storage_options)


def test_what_one_process_pushes_another_pulls(folder: Folder) -> None:
    assert folder.is_empty() and not folder.has("a.txt")
    (folder.here / "piece" / "deep").mkdir(parents=True)
    (folder.here / "a.txt").write_text("a")
    (folder.here / "piece" / "b.txt").write_text("b")
    (folder.here / "piece" / "deep" / "c.txt").write_text("c")
    folder.push("piece")
    other = pickle.loads(pickle.dumps(folder))  # as Ray sends it
    assert other.has("piece/deep/c.txt") and not other.is_empty()
    assert other.has("a.txt") == folder.local
    assert (other.pull("piece", "nothing") / "piece" / "deep" / "c.txt").read_text() == "c"
    assert (other.under("piece").pull() / "b.txt").read_text() == "b"

    folder.push()
    assert (other.pull("a.txt") / "a.txt").read_text() == "a"
    (folder.here / "a.txt").write_text("another")
    folder.push("a.txt")
    assert (other.pull("a.txt") / "a.txt").read_text() == "another"
    folder.delete("piece")
    folder.delete("piece")  # which is not there any more
    assert not other.has("piece") and other.has("a.txt")


def test_a_store_that_refuses_is_told_in_one_line_without_keys(s3_server: S3Server) -> None:
    wrong = s3_server.storage_options | {"secret": "not-the-secret-of-anybody"}
    folder = Folder(f"s3://{s3_server.make_bucket()}/out", wrong)
    with pytest.raises(
        StorageError, match=r"cannot read or write s3://.*; check the path and the credentials"
    ) as caught:
        folder.is_empty()
    assert "\n" not in str(caught.value) and "not-the-secret" not in str(caught.value) + repr(folder)


def test_a_table_in_a_bucket_is_read_and_its_uris_start_there(s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket()
    s3_server.client().put_object(Bucket=bucket, Key="a/labels.csv", Body=b"uri,mos\nx.jpg,1\n")
    url = f"s3://{bucket}/a/labels.csv"
    sheet = Sheet(url, s3_server.storage_options)
    assert sheet.numbers("mos") == [1.0]
    assert [absolute_uri(uri, url) for uri in sheet.texts("uri")] == [f"s3://{bucket}/a/x.jpg"]
    assert absolute_uri("/p/x.jpg", url) == "/p/x.jpg"
    with pytest.raises(UsageError, match=f"s3://{bucket}/no.csv cannot be read: "):
        Sheet(f"s3://{bucket}/no.csv", s3_server.storage_options)
