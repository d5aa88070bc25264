"""Fetching from the open web: what is let through, what is refused, and what a hostile server can do. Real sockets."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from picinspector import web
from picinspector.errors import ErrorKind, PhotoError, UsageError
from picinspector.web import fetch_url, is_public, is_web_url

BODY = bytes(range(256)) * 40


@dataclass
class Server:
    """A server that sends back exactly the bytes it is told to, and keeps the requests it got."""

    port: int
    requests: list[str] = field(default_factory=list)
    answers: dict[str, bytes | Callable[[socket.socket], None]] = field(default_factory=dict)

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def redirect(self, path: str, location: str, status: int = 302) -> None:
        self.answers[path] = f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


def ok(body: bytes = BODY, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", *(headers or (f"Content-Length: {len(body)}",))]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@contextmanager
def serving(context: ssl.SSLContext | None = None) -> Iterator[Server]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(listener.getsockname()[1])

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                if context is not None:
                    connection = context.wrap_socket(connection, server_side=True)
                request = b""
                while b"\r\n\r\n" not in request and (got := connection.recv(65536)):
                    request += got
                server.requests.append(request.decode("latin-1"))
                path = server.requests[-1].split(" ")[1] if request else ""
                reply = server.answers.get(path, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                if callable(reply):
                    reply(connection)
                else:
                    connection.sendall(reply)
            except OSError:
                pass  # the client hung up, as it may
            finally:
                connection.close()

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield server
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        running.answers["/a.jpg"] = ok()
        yield running


def names(monkeypatch: pytest.MonkeyPatch, table: dict[str, list[str]], calls: list[str] | None = None) -> None:
    """A resolver that knows these names, and addresses as they are."""
    real = socket.getaddrinfo

    def resolve(host: str, port: int, *rest: object, **more: object) -> list[object]:
        if calls is not None:
            calls.append(host)
        found = []
        for address in table.get(host, [host]):
            found += real(address, port, type=socket.SOCK_STREAM)  # numeric: asks no name server
        return found

    monkeypatch.setattr(web.socket, "getaddrinfo", resolve)


def failure(url: str, **options: object) -> PhotoError:
    with pytest.raises(PhotoError) as caught:
        fetch_url(url, allow_private=True, **options)  # type: ignore[arg-type]
    return caught.value


def refusal(url: str, allow_private: bool = False) -> str:
    with pytest.raises(UsageError) as caught:
        fetch_url(url, allow_private=allow_private)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is let through ----------------------------------------------------------------------------------------------


def test_a_photo_is_fetched_without_cookies_credentials_proxy_or_compression(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    server.answers["/a%20b.jpg?x=1"] = ok()
    assert fetch_url(server.url("/a b.jpg?x=1#part"), allow_private=True) == BODY
    [request] = server.requests
    lines = request.lower().splitlines()
    assert lines[0] == "get /a%20b.jpg?x=1 http/1.1"
    assert f"host: 127.0.0.1:{server.port}" in lines
    assert "accept-encoding: identity" in lines
    assert not [line for line in lines if line.startswith(("cookie", "authorization", "referer", "proxy"))]


def test_redirects_are_followed_relative_ones_too_five_at_most(server: Server) -> None:
    for step in range(5):
        server.redirect(
            f"/{step}", f"{step + 1}" if step % 2 else server.url(f"/{step + 1}"), (301, 302, 303, 307)[step % 4]
        )
    server.answers["/5"] = ok()
    assert fetch_url(server.url("/0"), allow_private=True) == BODY
    server.redirect("/start", "/0")
    assert "more than 5 redirects" in failure(server.url("/start")).message


def test_a_chunked_body_and_one_that_ends_with_the_connection(server: Server) -> None:
    server.answers["/chunks"] = ok(b"3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n", "Transfer-Encoding: chunked")
    server.answers["/closed"] = ok(BODY, "Connection: close")
    assert fetch_url(server.url("/chunks"), allow_private=True) == b"abcdefg"
    assert fetch_url(server.url("/closed"), allow_private=True) == BODY


def test_the_next_address_is_tried_where_the_first_does_not_answer(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    names(monkeypatch, {"two.example": ["::1", "127.0.0.1"]})  # nobody listens at ::1
    assert fetch_url(server.url("/a.jpg", "two.example"), allow_private=True) == BODY
    assert f"host: two.example:{server.port}" in server.requests[0].lower()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("http://x", True), ("HTTPS://x", True), ("s3://x", False), ("/http://x", False), ("file:///x", False)],
)
def test_what_is_a_web_url(text: str, expected: bool) -> None:
    assert is_web_url(text) is expected


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "0.0.0.0", "255.255.255.255"),
        *("169.254.169.254", "100.64.0.1", "224.0.1.1", "240.0.0.1", "192.0.2.1", "198.18.0.1", "192.0.0.192"),
        "168.63.129.16",
        *("::", "::1", "fe80::1", "fe80::1%1", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1", "fec0::1"),
        *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::808:808"),
        *("64:ff9b:1::1", "2002:7f00:1::", "2001::1", "100::1", "3fff::1"),
    ],
)
def test_special_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "100.128.0.1", "2606:4700:4700::1111", "2a00:1450::1"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "2130706433", "0177.0.0.1", "0x7f.1", "127.1", "0", "%31%32%37.0.0.1"],
)
def test_loopback_is_refused_however_it_is_written(server: Server, host: str) -> None:
    assert "private, local or reserved address" in refusal(server.url("/a.jpg", host))
    assert server.requests == []


@pytest.mark.parametrize("host", ["[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:0:0:1]", "[::]"])
def test_loopback_is_refused_as_ipv6(server: Server, host: str) -> None:
    assert "private, local or reserved address" in refusal(server.url("/a.jpg", host))
    assert server.requests == []


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["169.254.169.254"], ["::1"], ["64:ff9b::7f00:1"]]
)
def test_a_name_with_any_private_address_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    names(monkeypatch, {"innocent.example": addresses})
    monkeypatch.setattr(web.socket, "create_connection", lambda *_: pytest.fail("connected"))
    assert "innocent.example" in refusal(server.url("/a.jpg", "innocent.example"))


def test_the_address_that_was_checked_is_the_one_connected_to(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: the name is public when it is checked, and would be loopback when it is looked up again."""
    asked: list[str] = []
    connected: list[tuple[str, int]] = []
    names(monkeypatch, {"rebind.example": ["8.8.8.8"]}, asked)

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        connected.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(web.socket, "create_connection", connect)
    with pytest.raises(PhotoError):
        fetch_url(server.url("/a.jpg", "rebind.example"))
    assert (asked, connected) == (["rebind.example"], [("8.8.8.8", server.port)])


def test_a_redirect_to_a_private_address_is_refused_where_the_first_hop_was_public(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server plays a public host; what it sends us to is loopback."""
    names(monkeypatch, {"public.example": ["8.8.8.8"]})
    real = socket.create_connection
    monkeypatch.setattr(
        web.socket, "create_connection", lambda address, timeout: real(("127.0.0.1", address[1]), timeout)
    )
    server.redirect("/away", server.url("/a.jpg?secret=1"))
    message = refusal(server.url("/away", "public.example"))
    assert "127.0.0.1" in message and "private" in message and "secret" not in message
    assert len(server.requests) == 1


# --- URLs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://x/y", "gopher://127.0.0.1:6379/_x", "data:,x", "javascript:1"]
)
def test_redirects_to_other_schemes_are_refused(server: Server, location: str) -> None:
    server.redirect("/away", location)
    assert "only http and https" in refusal(server.url("/away"), allow_private=True)


@pytest.mark.parametrize("location", ["http://user:pw@127.0.0.1/x", "//user@127.0.0.1/x"])
def test_redirects_with_credentials_are_refused(server: Server, location: str) -> None:
    server.redirect("/away", location)
    message = refusal(server.url("/away"), allow_private=True)
    assert "user or password" in message and "pw" not in message.replace("password", "")


@pytest.mark.parametrize("location", ["http://[::1", "http://127.0.0.1:99999/", "http://[fe80::1%25lo]/"])
def test_redirects_to_what_is_no_url_are_refused(server: Server, location: str) -> None:
    server.redirect("/away", location)
    refusal(server.url("/away"), allow_private=True)


@pytest.mark.parametrize(
    "url",
    [
        *("", "photo.jpg", "file:///etc/passwd", "s3://bucket/x", "http://", "http:///x.jpg", "http://h:99999/"),
        *("http://user:secret@example.com/", "http://exa mple.com/", "http://[::1/", "http://[fe80::1%25eth0]/"),
        *("http://h\x00/", "http://127。0。0。1/", f"http://{'a' * 64}.example/", "http://a..b/", "http://.example/"),
    ],
)
def test_what_may_not_be_fetched_is_refused_in_one_line(url: str) -> None:
    message = refusal(url, allow_private=True)
    assert message.isprintable() and "secret" not in message


def test_no_header_can_be_smuggled_in(server: Server) -> None:
    server.answers["/x%0D%0AX-Evil:%201"] = ok()
    assert fetch_url(server.url("/x\r\nX-Evil: 1"), allow_private=True) == BODY
    assert "x-evil" not in [line.split(":")[0].lower() for line in server.requests[0].splitlines()[1:]]


# --- hostile servers --------------------------------------------------------------------------------------------------


def test_a_loop_of_redirects_ends(server: Server) -> None:
    server.redirect("/loop", "/loop")
    assert "redirects" in failure(server.url("/loop")).message
    assert len(server.requests) == 6


def test_too_large_is_refused_at_once_where_the_server_says_so(server: Server) -> None:
    server.answers["/big"] = ok(b"x", "Content-Length: 5000000000")
    assert failure(server.url("/big"), max_bytes=1000).kind is ErrorKind.TOO_MANY_BYTES


@pytest.mark.parametrize(
    "header", ["Connection: close", "Transfer-Encoding: chunked", "Content-Length: -5", "Content-Length: x"]
)
def test_too_large_is_cut_off_where_it_does_not(server: Server, header: str) -> None:
    sent = 0

    def flood(connection: socket.socket) -> None:
        nonlocal sent
        connection.sendall(ok(b"", header))
        part = b"x" * 65536
        if "chunked" in header:
            part = b"10000\r\n" + part + b"\r\n"
        while sent < 500_000_000:
            connection.sendall(part)
            sent += len(part)

    server.answers["/flood"] = flood
    assert failure(server.url("/flood"), max_bytes=100_000).kind is ErrorKind.TOO_MANY_BYTES
    assert sent < 50_000_000  # what fits into the buffers between


def test_the_limit_itself_is_allowed(server: Server) -> None:
    assert fetch_url(server.url("/a.jpg"), max_bytes=len(BODY), allow_private=True) == BODY
    assert failure(server.url("/a.jpg"), max_bytes=len(BODY) - 1).kind is ErrorKind.TOO_MANY_BYTES


@pytest.mark.parametrize(
    "reply",
    [
        ok(BODY, f"Content-Length: {len(BODY) + 1}"),
        ok(b"100\r\nabc", "Transfer-Encoding: chunked"),
        ok(b"zz\r\nabc", "Transfer-Encoding: chunked"),
        ok(BODY, "Content-Length: 5", "Content-Length: 6"),
        b"",
        b"\x16\x03\x01 not HTTP at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
    ids=["short", "short-chunk", "bad-chunk", "two-lengths", "nothing", "no-http", "many-headers", "long-header"],
)
def test_a_broken_answer_is_an_error_of_the_connection(server: Server, reply: bytes) -> None:
    server.answers["/broken"] = reply
    assert failure(server.url("/broken")).kind is ErrorKind.CONNECTION


def test_less_is_promised_than_sent(server: Server) -> None:
    server.answers["/more"] = ok(BODY, "Content-Length: 10")
    assert fetch_url(server.url("/more"), allow_private=True) == BODY[:10]  # the rest is no part of the answer


def test_compression_is_refused(server: Server) -> None:
    server.answers["/zip"] = ok(BODY, f"Content-Length: {len(BODY)}", "Content-Encoding: gzip")
    assert "compressed" in failure(server.url("/zip")).message


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, "not_found"),
        (403, "access_denied"),
        (429, "throttled"),
        (500, "connection"),
        (206, "storage"),
        (302, "storage"),
    ],
)
def test_a_status_is_an_error_of_its_kind_and_no_text_of_the_server_is_repeated(
    server: Server, status: int, kind: str
) -> None:
    server.answers["/no?token=secret"] = f"HTTP/1.1 {status} \x1b[31mEvil\r\nContent-Length: 0\r\n\r\n".encode()
    error = failure(server.url("/no?token=secret"))
    assert (error.kind, str(status) in error.message) == (kind, True)
    assert "Evil" not in error.message and "secret" not in error.message


def _drip(first: bytes) -> Callable[[socket.socket], None]:
    def reply(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(b"x")
            time.sleep(0.05)

    return reply


@pytest.mark.parametrize(
    "first",
    [b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nX-Slow: ", ok(b"", "Content-Length: 9999"), ok(b"", "Connection: close")],
    ids=["status", "header", "body", "endless-body"],
)
def test_bytes_that_drip_are_cut_off_at_the_deadline(server: Server, first: bytes) -> None:
    """Each byte comes well before the socket's own time-out."""
    server.answers["/drip"] = _drip(first)
    start = time.monotonic()
    assert failure(server.url("/drip"), timeout_s=0.6).kind is ErrorKind.TIMEOUT
    assert 0.5 < time.monotonic() - start < 10  # the machine may be busy; without the cut it would be minutes


def test_silence_ends_at_the_reading_time_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_READ_S", 0.3)
    server.answers["/silent"] = lambda connection: time.sleep(5)
    start = time.monotonic()
    assert failure(server.url("/silent")).kind is ErrorKind.TIMEOUT
    assert time.monotonic() - start < 5


def test_a_slow_name_server_does_not_hold_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.socket, "getaddrinfo", lambda *_, **__: time.sleep(2) or [])
    start = time.monotonic()
    assert failure("http://slow.example/", timeout_s=0.3).kind is ErrorKind.TIMEOUT
    assert time.monotonic() - start < 5


def test_a_name_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_name(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(web.socket, "getaddrinfo", no_name)
    assert failure("http://nowhere.example/").kind is ErrorKind.NOT_FOUND


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert failure(f"http://127.0.0.1:{port}/").kind is ErrorKind.CONNECTION


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for photos.example, and its key, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "photos.example")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("photos.example")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serving(context) as running:
        running.answers["/a.jpg"] = ok()
        running.answers["/drip"] = _drip(ok(b"", "Connection: close"))
        yield running


def test_https_verifies_the_name_that_was_asked_for_not_the_address(
    tls_server: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names(monkeypatch, {"photos.example": ["127.0.0.1"], "other.example": ["127.0.0.1"]})
    url = f"https://photos.example:{tls_server.port}"
    assert "not trusted" in failure(f"{url}/a.jpg").message
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert fetch_url(f"{url}/a.jpg", allow_private=True) == BODY
    assert f"host: photos.example:{tls_server.port}" in tls_server.requests[-1].lower()
    assert "not trusted" in failure(f"https://other.example:{tls_server.port}/a.jpg").message
    assert failure(f"{url}/drip", timeout_s=0.8).kind is ErrorKind.TIMEOUT


def test_a_handshake_that_stands_still_ends(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    names(monkeypatch, {"photos.example": ["127.0.0.1"]})
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts, and never speaks
        port = listener.getsockname()[1]
        assert failure(f"https://photos.example:{port}/", timeout_s=0.4).kind is ErrorKind.TIMEOUT
    assert time.monotonic() - start < 5
