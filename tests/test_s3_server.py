"""The S3 server of the tests behaves as one, seen through the two clients that the package uses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import s3fs
from botocore.exceptions import ClientError

from tests import services
from tests.s3_server import S3Server

CONTENT = bytes(range(256)) * 64


def arrow_filesystem(server: S3Server, access_key: str | None = None) -> pafs.S3FileSystem:
    return pafs.S3FileSystem(
        access_key=access_key or server.access_key,
        secret_key=server.secret_key,
        endpoint_override=server.endpoint_url,
        region=server.region,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1),
    )


def test_s3fs_puts_gets_lists_and_reads_a_range(s3_server: S3Server, s3_bucket: str) -> None:
    store = fsspec.filesystem("s3", skip_instance_cache=True, **s3_server.storage_options)
    store.pipe_file(f"{s3_bucket}/a/one.jpg", CONTENT)
    store.pipe_file(f"{s3_bucket}/b/two words+%#é.jpg", b"two")

    assert store.cat_file(f"{s3_bucket}/a/one.jpg") == CONTENT
    assert store.cat_file(f"{s3_bucket}/a/one.jpg", start=250, end=260) == CONTENT[250:260]
    assert store.find(s3_bucket) == [f"{s3_bucket}/a/one.jpg", f"{s3_bucket}/b/two words+%#é.jpg"]
    assert store.info(f"{s3_bucket}/a/one.jpg")["size"] == len(CONTENT)
    with pytest.raises(FileNotFoundError):
        store.cat_file(f"{s3_bucket}/missing.jpg")


def test_pyarrow_puts_gets_lists_and_reads_a_range(s3_server: S3Server, s3_bucket: str) -> None:
    store = arrow_filesystem(s3_server)
    with store.open_output_stream(f"{s3_bucket}/a/one.jpg") as stream:
        stream.write(CONTENT)

    with store.open_input_file(f"{s3_bucket}/a/one.jpg") as file:
        assert file.size() == len(CONTENT)
        assert file.read_at(10, 250) == CONTENT[250:260]
    listed = store.get_file_info(pafs.FileSelector(s3_bucket, recursive=True))
    assert [info.path for info in listed if info.is_file] == [f"{s3_bucket}/a/one.jpg"]


def test_a_parquet_file_larger_than_one_part_goes_both_ways(s3_server: S3Server, s3_bucket: str) -> None:
    store = arrow_filesystem(s3_server)
    table = pa.table({"row": pa.array(range(2_000_000), pa.int64())})  # 16 MB: S3's multipart starts at 5 MiB
    pq.write_table(table, f"{s3_bucket}/t.parquet", filesystem=store, compression="none", use_dictionary=False)
    assert store.get_file_info(f"{s3_bucket}/t.parquet").size > 15_000_000
    assert pq.read_table(f"{s3_bucket}/t.parquet", filesystem=store).equals(table)


def test_a_wrong_key_is_refused_by_both(s3_server: S3Server, s3_bucket: str) -> None:
    s3_server.client().put_object(Bucket=s3_bucket, Key="one.jpg", Body=b"one")
    wrong_secret = S3Server(s3_server.endpoint_url, s3_server.access_key, "wrong", s3_server.kind)
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        wrong_secret.client().list_objects_v2(Bucket=s3_bucket)
    with pytest.raises(PermissionError):
        s3fs.S3FileSystem(skip_instance_cache=True, **wrong_secret.storage_options).cat_file(f"{s3_bucket}/one.jpg")
    with pytest.raises(OSError, match=r"ACCESS_DENIED|INVALID_ACCESS_KEY|403|Forbidden"):
        arrow_filesystem(s3_server, access_key="NOBODY").open_input_file(f"{s3_bucket}/one.jpg").read()


def test_a_conditional_write_loses_to_what_is_there(s3_server: S3Server, s3_bucket: str) -> None:
    client = s3_server.client()
    client.put_object(Bucket=s3_bucket, Key="lock", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=s3_bucket, Key="lock", Body=b"second", IfNoneMatch="*")
    assert client.get_object(Bucket=s3_bucket, Key="lock")["Body"].read() == b"first"


def test_the_environment_alone_is_enough_for_a_child_process(s3_server: S3Server, s3_bucket: str) -> None:
    code = f"import fsspec; fsspec.filesystem('s3').pipe_file('{s3_bucket}/child.jpg', b'written by a child')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ, **s3_server.environment})
    assert s3_server.client().get_object(Bucket=s3_bucket, Key="child.jpg")["Body"].read() == b"written by a child"


def test_the_run_names_what_stood_behind_s3(s3_server: S3Server) -> None:
    assert any(line.startswith("services: S3 = ") and s3_server.kind in line for line in services.USED)


def test_ci_takes_no_mock_for_the_server(tmp_path: Path) -> None:
    """With no Ceph on PATH: refused where services are required."""
    code = "from tests import s3_server\nwith s3_server.start() as server: print(server.kind)"
    for required, expected_code, expected_text in (
        ("1", 1, "there is no real S3: for the real one, apt-get"),
        ("0", 0, "moto (mock)"),
    ):
        child = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PATH": str(tmp_path), "PICINSPECTOR_REQUIRE_SERVICES": required},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert child.returncode == expected_code, child.stderr
        assert expected_text in child.stdout + child.stderr
