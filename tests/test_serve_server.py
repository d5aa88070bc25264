"""What comes before the gate: heads without end, in size or in time, and connections without number."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import httpx2
import pytest

from picinspector.serve import server
from picinspector.serve.server import answer
from tests.test_serve_front import FORM, PART, Raw, Replicas, head, served, upload, wait_until

#: What lies in the sockets' buffers when the other side has enough.
BUFFERS = 2**23
GET = b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def client() -> Iterator[httpx2.Client]:
    with served() as (started, _):
        yield started


CHUNKED = head("/v1/score", FORM, "Transfer-Encoding: chunked")


@pytest.mark.parametrize(
    ("start", "part"),
    [
        (b"GET /", b"x" * 1000),
        (GET, b"X: y\r\n"),
        (GET + b"X: ", b"y" * 1000),
        (b"", b"\r\n"),
        (CHUNKED + b"1;", b"x" * 1000),
        (CHUNKED + b"%x\r\n" % len(PART) + PART + b"\r\n", b"1\r\nx\r\n" * 100),
        (CHUNKED + b"0\r\nX: ", b"y" * 1000),
        (CHUNKED + b"0\r\n", b"X: y\r\n"),
    ],
    ids=["path", "lines", "line", "nothing", "extension", "chunks", "trailer", "trailers"],
)
def test_a_head_without_end_is_cut_off(client: httpx2.Client, start: bytes, part: bytes) -> None:
    with Raw(client) as raw:
        raw.send(start)
        sent = raw.send_until_answered(part, 2**26)
        assert raw.read().startswith(b"HTTP/1.1 431 ")
    assert sent < 2**17 + BUFFERS
    assert client.get("/v1/health").status_code == 200


@pytest.mark.parametrize(
    "lines", [b"X: y\r\n" * 150, b"X: " + b"y" * 70_000 + b"\r\n", (b"X: " + b"y" * 900 + b"\r\n") * 90]
)
def test_a_whole_head_that_is_too_large_reaches_no_application(client: httpx2.Client, lines: bytes) -> None:
    with Raw(client) as raw:
        raw.send(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n", lines, b"\r\n")
        said = raw.read()
    assert said.startswith(b"HTTP/1.1 431 ")
    assert b'"error_kind":"head_too_large"' in said
    assert 'path="/v1/models"' not in client.get("/metrics").text


def test_what_fits_is_let_through(client: httpx2.Client) -> None:
    """One after the other on the same connection, and two in one piece; and a body in pieces of 100 bytes."""
    with Raw(client) as raw:
        for _ in range(3):
            raw.send(GET + b"X: " + b"y" * 60_000 + b"\r\n\r\n")
            raw.read_answer()
        raw.send((GET + b"\r\n") * 2)
        said = b""
        while said.count(b"HTTP/1.1 200 ") < 2:
            said += raw.read_answer()
    body = PART + b"x" * 190_000 + b"\r\n--b--\r\n"
    with Raw(client) as raw:
        raw.send(head("/v1/score", FORM, f"Content-Length: {len(body)}"), body)
        assert raw.read_answer().startswith(b"HTTP/1.1 200 ")
    headers = {"content-type": FORM.partition(": ")[2]}
    pieces = (body[at : at + 100] for at in range(0, len(body), 100))
    assert client.post("/v1/score", content=pieces, headers=headers).status_code == 200


def test_what_is_no_http(client: httpx2.Client) -> None:
    with Raw(client) as raw:
        raw.send(b"\x16\x03\x01\x02\x00\x01")  # TLS
        said = raw.read()
    assert said.startswith(b"HTTP/1.1 400 ")
    assert b'"error_kind":"invalid_request"' in said


def test_a_head_that_takes_too_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, or one after others; begun or not."""
    monkeypatch.setattr(server, "_HEAD_S", 1.0)
    with served() as (client, _), contextlib.ExitStack() as stack:
        late = []
        for start in (b"", b"GET /v1/hea", GET):
            late.append(stack.enter_context(Raw(client)))
            late[-1].send(start)
        answered = [stack.enter_context(Raw(client)) for _ in range(3)]
        for raw, start in zip(answered, (b"", GET, b"\r\n"), strict=True):
            raw.send(GET + b"\r\n")
            assert raw.read_answer().startswith(b"HTTP/1.1 200 ")
            raw.send(start)
        for raw in (*late, *answered[1:]):
            assert raw.read().startswith(b"HTTP/1.1 408 ")
        answered[0].send(GET + b"\r\n")
        assert answered[0].read_answer().startswith(b"HTTP/1.1 200 "), "between two requests there is more time"


def test_a_body_and_an_answer_may_take_longer_than_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_HEAD_S", 1.0)
    replicas = Replicas()
    with served(replicas=replicas) as (client, _), Raw(client) as raw:
        photo = PART + b"wait\r\n--b--\r\n"
        raw.send(head("/v1/score", FORM, f"Content-Length: {len(photo)}"), photo[:-1])
        with Raw(client) as other:
            assert other.read().startswith(b"HTTP/1.1 408 "), "so long it was"
        raw.send(photo[-1:], GET)  # and the next one begun already
        wait_until(lambda: replicas.seen)
        with Raw(client) as other:
            assert other.read().startswith(b"HTTP/1.1 408 ")
        replicas.go.set()
        assert raw.read_answer().startswith(b"HTTP/1.1 200 ")


def test_there_is_a_last_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_CONNECTIONS", 3)
    with served() as (client, _):
        assert upload(client, b"x").status_code == 200  # and the connection stays
        with Raw(client) as first, Raw(client) as second:
            for raw in (first, second):
                raw.send(GET + b"\r\n")
                assert raw.read_answer().startswith(b"HTTP/1.1 200 ")
            with Raw(client) as third:
                assert third.read().startswith(b"HTTP/1.1 503 ")
        assert upload(client, b"x").status_code == 200


def test_it_is_told_to_listen_when_it_does() -> None:
    """Whoever waits for that line connects at once."""

    class EnoughError(Exception):
        pass

    def connect() -> None:
        with socket.create_connection(listener.getsockname(), timeout=10):
            raise EnoughError

    async def nothing(*_: object) -> None:
        pass

    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        with pytest.raises(EnoughError):
            answer(nothing, listener, 1.0, connect)
