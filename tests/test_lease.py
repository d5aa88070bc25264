"""One run at a time into a destination, whoever dies, in a folder and in a store."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from picinspector import lease
from picinspector.errors import StorageError, UsageError
from picinspector.storage import open_filesystem
from tests.s3_server import S3Server

TTL_S = 2.0


@contextlib.contextmanager
def hold(url: str, options: dict[str, Any] | None = None, ttl_s: float = TTL_S) -> Iterator[lease.Lease]:
    """A lease in an S3 folder, by a client of its own as another process has."""
    filesystem, root = open_filesystem(url, options and {**options, "skip_instance_cache": True})
    with lease.hold(filesystem, root, url, local=False, ttl_s=ttl_s) as held:
        yield held


@pytest.fixture
def url(s3_bucket: str) -> str:
    return f"s3://{s3_bucket}/out"


def test_a_folder_is_for_one(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    program = (
        "import sys, time; from picinspector import lease\n"
        "with lease.hold(None, sys.argv[1], 'there', local=True): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with (
            pytest.raises(UsageError, match=f"there: another run is at work there .process {other.pid} on "),
            lease.hold(None, str(tmp_path), "there", local=True),
        ):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait(10)
        with lease.hold(None, str(tmp_path), "there", local=True) as held:  # it died with its process, at once
            held.check()
    finally:
        other.kill()


def test_a_store_is_for_one(s3_server: S3Server, url: str) -> None:
    options = s3_server.storage_options
    with hold(url, options) as first:
        started = time.monotonic()
        with (
            pytest.raises(UsageError, match=f"another run is at work there .process {os.getpid()} on"),
            hold(url, options),
        ):
            pass
        assert time.monotonic() - started < TTL_S  # it was seen to be alive
        first.check()
    with hold(url, options) as second:  # released: at once
        second.check()


def test_a_silent_holder_is_superseded_and_must_not_commit(
    s3_server: S3Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = s3_server.storage_options
    with monkeypatch.context() as patch:
        patch.setattr(lease._StoreLease, "_keep", lambda self: None)  # as if it hung
        silent = hold(url, options)
        first = silent.__enter__()
        first.check()
    started = time.monotonic()
    with hold(url, options) as second:
        assert TTL_S <= time.monotonic() - started < 3 * TTL_S
        second.check()
        with pytest.raises(StorageError, match=r"lost its lease \(another run has taken it over\)"):
            first.check()
        silent.__exit__(None, None, None)  # and does not release what is another's
        second.check()


def test_of_many_at_once_one_has_it(s3_server: S3Server, url: str) -> None:
    options, held, refused, gate = s3_server.storage_options, [], [], threading.Barrier(6)

    def work() -> None:
        gate.wait()
        try:
            with hold(url, options, ttl_s=6.0) as mine:
                held.append(mine)
                time.sleep(3)
                mine.check()
        except UsageError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(held), len(refused)) == (1, 5)


def test_who_cannot_write_is_told(s3_server: S3Server) -> None:
    with (
        pytest.raises(StorageError, match="cannot write a lease into"),
        hold("s3://no-such-bucket/out", s3_server.storage_options),
    ):
        pass
