"""Fetching: order kept, failures as values, transient ones tried again, and no secret in any message."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.parse import quote

import aiohttp
import botocore.exceptions
import fsspec
import pytest
from botocore.exceptions import ClientError
from fsspec.implementations.memory import MemoryFileSystem
from s3fs.errors import translate_boto_error

from picinspector import storage
from picinspector.errors import ErrorKind, PhotoError, StorageError
from picinspector.storage import fetch, is_signed, local_path, open_filesystem, redact, to_photo_error, to_uri
from tests.s3_server import S3Server


def kinds(results: list[bytes | PhotoError]) -> list[bytes | ErrorKind]:
    """Bytes as they are, errors as their kind."""
    return [result.kind if isinstance(result, PhotoError) else result for result in results]


# --- classification ---------------------------------------------------------------------------------------------------


def s3_error(code: str, status: int, message: str = "a message") -> Exception:
    """What s3fs raises when the store answers with this code."""
    response = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: Exception = translate_boto_error(ClientError(response, "GetObject"))
    return error


def http_error(status: int) -> aiohttp.ClientResponseError:
    request: Any = SimpleNamespace(real_url="http://host/a.jpg")
    return aiohttp.ClientResponseError(request, (), status=status, message="a message")


RESET = OSError(104, "Connection reset by peer")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (s3_error("SlowDown", 503, "Please reduce your request rate."), ErrorKind.THROTTLED),
        (s3_error("ServiceUnavailable", 503), ErrorKind.THROTTLED),
        (s3_error("503", 503), ErrorKind.THROTTLED),
        (s3_error("RequestTimeout", 400), ErrorKind.TIMEOUT),
        (s3_error("InternalError", 500, "We encountered an internal error. Please try again."), ErrorKind.CONNECTION),
        (s3_error("502", 502), ErrorKind.CONNECTION),
        (s3_error("504", 504), ErrorKind.TIMEOUT),
        (s3_error("NoSuchKey", 404), ErrorKind.NOT_FOUND),
        (s3_error("NoSuchBucket", 404), ErrorKind.NOT_FOUND),
        (s3_error("AccessDenied", 403), ErrorKind.ACCESS_DENIED),
        (s3_error("403", 403), ErrorKind.ACCESS_DENIED),
        (s3_error("ExpiredToken", 400), ErrorKind.CREDENTIALS),
        (s3_error("InvalidAccessKeyId", 403), ErrorKind.CREDENTIALS),
        (s3_error("SignatureDoesNotMatch", 403), ErrorKind.CREDENTIALS),
        (s3_error("RequestTimeTooSkewed", 403), ErrorKind.CREDENTIALS),
        (s3_error("TokenRefreshRequired", 400), ErrorKind.CREDENTIALS),
        (s3_error("InvalidToken", 400), ErrorKind.CREDENTIALS),
        (s3_error("InvalidObjectState", 403), ErrorKind.ACCESS_DENIED),
        (s3_error("InvalidArgument", 400), ErrorKind.STORAGE),
        (botocore.exceptions.NoCredentialsError(), ErrorKind.CREDENTIALS),
        (botocore.exceptions.PartialCredentialsError(provider="env", cred_var="secret"), ErrorKind.CREDENTIALS),
        (botocore.exceptions.SSOTokenLoadError(error_msg="expired"), ErrorKind.CREDENTIALS),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"), ErrorKind.CONNECTION),
        (botocore.exceptions.ConnectionClosedError(endpoint_url="http://x"), ErrorKind.CONNECTION),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"), ErrorKind.TIMEOUT),
        (botocore.exceptions.ConnectTimeoutError(endpoint_url="http://x"), ErrorKind.TIMEOUT),
        (botocore.exceptions.ResponseStreamingError(error="broken"), ErrorKind.CONNECTION),
        (botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2), ErrorKind.CONNECTION),
        (http_error(401), ErrorKind.ACCESS_DENIED),
        (http_error(403), ErrorKind.ACCESS_DENIED),
        (http_error(404), ErrorKind.NOT_FOUND),
        (http_error(408), ErrorKind.TIMEOUT),
        (http_error(410), ErrorKind.STORAGE),
        (http_error(429), ErrorKind.THROTTLED),
        (http_error(500), ErrorKind.CONNECTION),
        (http_error(503), ErrorKind.THROTTLED),
        (http_error(504), ErrorKind.TIMEOUT),
        (aiohttp.ServerDisconnectedError(), ErrorKind.CONNECTION),
        (aiohttp.ClientPayloadError("cut short"), ErrorKind.CONNECTION),
        (aiohttp.ClientOSError(*RESET.args), ErrorKind.CONNECTION),
        (aiohttp.ServerTimeoutError(), ErrorKind.TIMEOUT),
        (TimeoutError(), ErrorKind.TIMEOUT),
        (ConnectionResetError(*RESET.args), ErrorKind.CONNECTION),
        (BrokenPipeError(32, "Broken pipe"), ErrorKind.CONNECTION),
        (FileNotFoundError(2, "No such file", "/photos/throttled/slow down.jpg"), ErrorKind.NOT_FOUND),
        (PermissionError(13, "Permission denied", "/photos/too many requests.jpg"), ErrorKind.ACCESS_DENIED),
        (IsADirectoryError(21, "Is a directory"), ErrorKind.STORAGE),
        (OSError(5, "Input/output error"), ErrorKind.STORAGE),
        (ValueError("what is this"), ErrorKind.STORAGE),
    ],
    ids=lambda value: value.value if isinstance(value, ErrorKind) else f"{type(value).__name__}-{value}"[:60],
)
def test_an_error_of_a_storage_library_gets_its_kind(error: Exception, kind: ErrorKind) -> None:
    found = to_photo_error(error)
    assert found.kind == kind
    assert "\n" not in found.message


def test_exactly_the_passing_faults_are_transient() -> None:
    transient = {ErrorKind.THROTTLED, ErrorKind.TIMEOUT, ErrorKind.CONNECTION}
    transient |= {ErrorKind.CREDENTIALS, ErrorKind.CHANGED}
    transient |= {ErrorKind.RATE_LIMITED, ErrorKind.SERVER_ERROR}  # of a critic
    assert {kind for kind in ErrorKind if kind.transient} == transient


# --- a web server with faults -----------------------------------------------------------------------------------------


class FaultyServer(ThreadingHTTPServer):
    """Serves `files`; answers a path's first requests with its `faults`: a status, `reset`, `cut` or `hang`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FaultyHandler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[int | str]] = {}
        self.asked: Counter[str] = Counter()
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that give up are what the tests are about."""


class FaultyHandler(BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path
        self.server.asked[path] += 1
        faults = self.server.faults.get(path, [])
        fault = faults.pop(0) if faults else None
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif fault == "hang":
            self.server.released.wait(30)
            self.close_connection = True
        elif fault == "cut":
            self._answer(200, b"half", {"Content-Length": "1000"})
            self.close_connection = True
        elif isinstance(fault, int):
            self._answer(fault)
        elif path not in self.server.files:
            self._answer(404)
        else:
            self._range(self.server.files[path])

    def _range(self, content: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None:
            self._answer(200, content)
        elif int(wanted[1]) >= len(content):
            self._answer(416)
        else:
            self._answer(206, content[int(wanted[1]) : int(wanted[2]) + 1])

    def _answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr(storage, "_BACKOFF_S", 0.01)
    with FaultyServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join(10)


@pytest.mark.parametrize(
    "faults", [[503], [503, 429], [500, 502], ["reset", "reset"], ["cut"], [408, "reset"]], ids=lambda f: f"{f}"
)
def test_a_fault_that_passes_costs_nothing_but_time(web: FaultyServer, faults: list[int | str]) -> None:
    web.files["/a.jpg"], expected = b"a photo", 1 + len(faults)
    web.faults["/a.jpg"] = list(faults)
    assert kinds(fetch([f"{web.url}/a.jpg"])) == [b"a photo"]
    # aiohttp repeats a request itself when a kept-alive connection was dropped, so resets may show more often.
    assert web.asked["/a.jpg"] == expected or "reset" in faults


@pytest.mark.parametrize(
    ("fault", "kind", "attempts"),
    [
        (503, ErrorKind.THROTTLED, 3),
        (500, ErrorKind.CONNECTION, 3),
        ("cut", ErrorKind.CONNECTION, 3),
        (403, ErrorKind.ACCESS_DENIED, 1),
        (404, ErrorKind.NOT_FOUND, 1),
        (410, ErrorKind.STORAGE, 1),
    ],
)
def test_attempts_are_bounded_and_only_made_where_they_help(
    web: FaultyServer, fault: int | str, kind: ErrorKind, attempts: int
) -> None:
    web.faults["/a.jpg"] = [fault] * 50
    assert kinds(fetch([f"{web.url}/a.jpg"])) == [kind]
    assert web.asked["/a.jpg"] == attempts


def test_a_server_that_hangs_is_a_time_out(web: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_TIMEOUT_S", 0.3)
    web.files["/a.jpg"] = web.files["/b.jpg"] = b"a photo"
    web.faults["/a.jpg"] = ["hang"] * 50
    started = time.monotonic()
    assert kinds(fetch([f"{web.url}/a.jpg", f"{web.url}/b.jpg"])) == [ErrorKind.TIMEOUT, b"a photo"]
    assert 0.3 <= time.monotonic() - started < 10


def test_nobody_listens() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    [error] = fetch([f"http://127.0.0.1:{port}/a.jpg?X-Amz-Signature=abcdef"])
    assert isinstance(error, PhotoError)
    assert error.kind == ErrorKind.CONNECTION
    assert "abcdef" not in error.message


def test_others_of_the_batch_arrive_in_order(web: FaultyServer, tmp_path: Path) -> None:
    """Eighty photos of three stores, more than are in flight at once, every fourth one failing in its own way."""
    memory = fsspec.filesystem("memory")
    uris, expected = [], []
    for number in range(80):
        content = f"photo {number}".encode()
        place = number % 3
        if place == 0:
            (tmp_path / f"{number}.jpg").write_bytes(content)
            uris.append(str(tmp_path / f"{number}.jpg"))
        elif place == 1:
            web.files[f"/{number}.jpg"] = content
            uris.append(f"{web.url}/{number}.jpg")
        else:
            memory.pipe_file(f"/order/{number}.jpg", content)
            uris.append(f"memory://order/{number}.jpg")
        expected.append(content)
    for number in range(0, 80, 4):
        uris[number] = uris[number].replace(".jpg", "-gone.jpg")
        expected[number] = ErrorKind.NOT_FOUND
    assert kinds(fetch(uris)) == expected


def test_no_photos_at_all() -> None:
    assert fetch([]) == []


def test_an_unknown_protocol_is_each_photos_error() -> None:
    results = fetch(["gopher://host/a.jpg", "gopher://host/b.jpg"])
    assert kinds(results) == [ErrorKind.STORAGE] * 2
    with pytest.raises(StorageError, match=r"^cannot open gopher://host/a\.jpg: ") as caught:
        open_filesystem("gopher://host/a.jpg")
    assert "\n" not in str(caught.value)


class FlakyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A filesystem without async that is throttled twice a file."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    asked: ClassVar[Counter[str]] = Counter()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("flaky://").lstrip("/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self.asked[path] += 1
        if self.asked[path] <= 2:
            raise OSError(16, "Please reduce your request rate")
        content: bytes = super().cat_file(path, start, end, **kwargs)
        return content


def test_a_filesystem_without_async_is_tried_again_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_BACKOFF_S", 0.01)
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem().pipe_file("/a.jpg", b"a photo")
    assert kinds(fetch(["flaky://a.jpg", "flaky://gone.jpg"])) == [b"a photo", ErrorKind.NOT_FOUND]
    assert set(FlakyFileSystem.asked.values()) == {3}


# --- size -------------------------------------------------------------------------------------------------------------


def test_no_more_than_the_limit_and_one_byte_is_read(web: FaultyServer, tmp_path: Path) -> None:
    content = bytes(range(256)) * 40
    (tmp_path / "a.jpg").write_bytes(content)
    web.files["/a.jpg"] = content
    fsspec.filesystem("memory").pipe_file("/limit/a.jpg", content)
    uris = [str(tmp_path / "a.jpg"), f"{web.url}/a.jpg", "memory://limit/a.jpg"]
    assert fetch(uris, max_bytes=1000) == [content[:1001]] * 3
    assert fetch(uris, max_bytes=len(content)) == [content] * 3


def test_an_empty_file_has_no_bytes_and_is_no_fault(web: FaultyServer, tmp_path: Path) -> None:
    """A web server refuses any range of an empty file, with 416."""
    (tmp_path / "a.jpg").touch()
    web.files["/a.jpg"] = b""
    assert fetch([str(tmp_path / "a.jpg"), f"{web.url}/a.jpg"]) == [b"", b""]
    assert web.asked["/a.jpg"] == 1


# --- versions ---------------------------------------------------------------------------------------------------------


def test_a_local_file_that_was_replaced_is_not_the_one_that_was_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{name}.jpg" for name in "abcd"]
    for path in paths:
        path.write_bytes(b"a photo")
        os.utime(path, ns=(0, 1_700_000_000_123_456_789))
    etags = ["7-1700000000123456789"] * 4
    assert fetch([str(path) for path in paths], etags=etags) == [b"a photo"] * 4
    paths[0].write_bytes(b"other!!")
    paths[1].write_bytes(b"")
    paths[2].unlink()
    expected = [ErrorKind.CHANGED, ErrorKind.CHANGED, ErrorKind.NOT_FOUND, b"a photo"]
    assert kinds(fetch([str(path) for path in paths], etags=etags)) == expected
    assert fetch([str(paths[0])]) == [b"other!!"]  # to whom no version matters

    class Replaced:
        """A file that is written to while it is read."""

        def __init__(self, path: str, mode: str) -> None:
            self._file = Path(path).open(mode)  # noqa: SIM115

        def __enter__(self) -> Replaced:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def fileno(self) -> int:
            return self._file.fileno()

        def read(self, count: int) -> Any:
            content = self._file.read(count)
            paths[3].write_bytes(b"a phot")
            return content

    monkeypatch.setattr(storage, "open", Replaced, raising=False)
    assert kinds(fetch([str(paths[3])], etags=etags[:1])) == [ErrorKind.CHANGED]


def test_an_object_that_was_replaced_is_not_the_one_that_was_listed(s3_server: S3Server, s3_bucket: str) -> None:
    client, names = s3_server.client(), ["same", "touched", "other", "shorter", "emptied"]
    for name in names:
        client.put_object(Bucket=s3_bucket, Key=name, Body=b"a photo")
    for name, body in (("touched", b"a photo"), ("other", b"A photo"), ("shorter", b"a"), ("emptied", b"")):
        client.put_object(Bucket=s3_bucket, Key=name, Body=body)
    uris = [f"s3://{s3_bucket}/{name}" for name in names]
    etag = "39b3b1e0a2a9b7f8d3e2f4a5b6c7d8e9"
    told = client.head_object(Bucket=s3_bucket, Key="same")["ETag"].strip('"')
    found = fetch(uris, s3_server.storage_options, etags=[told] * 5, sizes=[7] * 5)
    assert kinds(found) == [b"a photo", b"a photo", ErrorKind.CHANGED, ErrorKind.CHANGED, ErrorKind.CHANGED]
    assert kinds(fetch(uris[:1], s3_server.storage_options, etags=[etag], sizes=[7])) == [ErrorKind.CHANGED]
    # A limit below the size is no short body.
    assert fetch(uris[:1], s3_server.storage_options, 3, etags=[told], sizes=[7]) == [b"a ph"]


def test_stores_without_versions_are_held_to_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_BACKOFF_S", 0.01)
    fsspec.filesystem("memory").pipe_file("/size/a.jpg", b"a photo")
    found = [fetch(["memory://size/a.jpg"], sizes=[size])[0] for size in (7, 6, 8, None)]
    assert kinds(found) == [b"a photo", ErrorKind.CHANGED, ErrorKind.CONNECTION, b"a photo"]


# --- names ------------------------------------------------------------------------------------------------------------

NAMES = ["plain.jpg", "two words.jpg", "50%.jpg", "100%25.jpg", "a#b.jpg", "a?b=c.jpg", "a+b&c.jpg", "[1].jpg"]
NAMES += ["größe 写真.jpg"]


@pytest.mark.parametrize("name", NAMES)
def test_any_local_name_is_found_by_path_and_by_url(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(name.encode())
    assert fetch([str(path), path.as_uri()]) == [name.encode()] * 2
    assert local_path(path.as_uri()) == str(path)
    assert to_uri(fsspec.filesystem("file"), str(path)) == str(path)


def test_a_local_name_that_is_not_utf_8_goes_into_tables_as_a_url(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    Path(os.fsdecode(path)).write_bytes(b"latin")
    uri = to_uri(fsspec.filesystem("file"), os.fsdecode(path))
    assert uri == f"{tmp_path.as_uri()}/caf%E9.jpg"
    assert fetch([uri]) == [b"latin"]


def test_home_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("a.jpg") == local_path("~/a.jpg") == local_path("./b/../a.jpg") == str(tmp_path / "a.jpg")


def test_any_web_name_is_found(web: FaultyServer) -> None:
    web.files[f"/{quote('größe 50%.jpg')}"] = b"a photo"
    assert fetch([f"{web.url}/{quote('größe 50%.jpg')}"]) == [b"a photo"]


def test_any_s3_key_is_found(s3_server: S3Server, s3_bucket: str) -> None:
    client, keys = s3_server.client(), [name for name in NAMES if "?" not in name]
    keys += ["a b/c d.jpg", "a//b.jpg", "~x/./y.jpg"]
    for key in keys:
        client.put_object(Bucket=s3_bucket, Key=key, Body=key.encode())
    uris = [f"s3://{s3_bucket}/{key}" for key in keys]
    assert fetch(uris, s3_server.storage_options) == [key.encode() for key in keys]


def test_s3_failures_are_values(s3_server: S3Server, s3_bucket: str) -> None:
    client = s3_server.client()
    client.put_object(Bucket=s3_bucket, Key="a.jpg", Body=b"0123456789")
    client.put_object(Bucket=s3_bucket, Key="empty.jpg", Body=b"")
    uris = [f"s3://{s3_bucket}/{name}.jpg" for name in ("gone", "a", "empty")]
    uris.append("s3://no-such-bucket-here/a.jpg")
    expected = [ErrorKind.NOT_FOUND, b"0123456789", b"", ErrorKind.NOT_FOUND]
    assert kinds(fetch(uris, s3_server.storage_options)) == expected
    assert fetch([uris[1]], s3_server.storage_options, max_bytes=4) == [b"01234"]
    wrong = {**s3_server.storage_options, "secret": "very-wrong-secret"}
    [error] = fetch([uris[1]], wrong)
    assert isinstance(error, PhotoError)
    assert error.kind == ErrorKind.CREDENTIALS
    assert "very-wrong-secret" not in error.message


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/a b.jpg", "s3://bucket/a b.jpg"),
        ("https://user:secret@host/a.jpg", "https://host/a.jpg"),
        ("see https://h/a.jpg?X-Amz-Signature=secret&x=1 there", "see https://h/a.jpg?… there"),
        ("403, message='Forbidden', url='http://h/a.jpg?sig=secret'", "403, message='Forbidden', url='http://h/a.jpg?…'"),
        ("ftp://u:secret@h/a and http://u:secret@h/b?k=secret", "ftp://h/a and http://h/b?…"),
        ("/home/me/what?.jpg", "/home/me/what?.jpg"),
        ("mail me@example.org", "mail me@example.org"),
    ],
)  # fmt: skip
def test_messages_hold_no_secret(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert "secret" not in to_photo_error(OSError(text)).message


@pytest.mark.parametrize(
    ("uri", "signed"),
    [
        ("https://h/a.jpg?X-Amz-Signature=abc", True),
        ("https://h/a.jpg?x=1&x-goog-signature=abc", True),
        ("https://account.blob.core.windows.net/c/a.jpg?sv=2022&sig=abc", True),
        ("https://h/a.jpg?AWSAccessKeyId=abc", True),
        ("https://h/a.jpg?access_token=abc", True),
        ("https://user:password@h/a.jpg", True),
        ("s3://KEY:SECRET@bucket/a.jpg", True),
        ("https://[h/a.jpg?sig=abc", True),
        ("https://h/a.jpg", False),
        ("https://h/a.jpg?width=100&format=jpg", False),
        ("https://h/@me/a.jpg", False),
        ("s3://bucket/me@home.jpg", False),
        ("https://[h/a.jpg", False),
        ("/photos/a.jpg?sig=abc", False),
        ("a.jpg", False),
        ("file:///photos/a%3Fsig=abc.jpg", False),
    ],
)
def test_signed_urls_are_told_from_plain_ones(uri: str, signed: bool) -> None:
    assert is_signed(uri) is signed
