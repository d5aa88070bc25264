"""Photos from the open web: one guarded GET.

A URL may come from a stranger, and this machine may reach what strangers may not (server-side request forgery, CWE-918;
OWASP SSRF Prevention Cheat Sheet). So a name is resolved once, every address it has must be public, and the connection
goes to the very address that was checked: a name that answers differently the second time (DNS rebinding) gains
nothing. Each redirect is a new URL and passes the same checks. No proxy, no cookies, no credentials, no compression.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urljoin

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, LocationParseError
from urllib3.response import HTTPResponse
from urllib3.util import Url, parse_url

from picinspector import __version__
from picinspector.errors import ErrorKind, PhotoError, UsageError
from picinspector.storage import redact
from picinspector.text import one_line

#: What one photo may take of memory here; camera JPEG and HEIF files are well below.
MAX_BYTES = 128 * 1024**2
#: For everything from the first name to the last byte.
TIMEOUT_S = 30.0
_CONNECT_S = 5.0
_READ_S = 10.0
_MAX_REDIRECTS = 5
_CHUNK = 64 * 1024
_PORTS = {"http": 80, "https": 443}
_HEADERS = {
    "User-Agent": f"picinspector/{__version__}",
    "Accept": "image/*, */*;q=0.5",
    "Accept-Encoding": "identity",  # an encoding could blow a few bytes up to any size
    "Connection": "close",
}
_KINDS = {401: ErrorKind.ACCESS_DENIED, 403: ErrorKind.ACCESS_DENIED, 404: ErrorKind.NOT_FOUND}
_KINDS |= {410: ErrorKind.NOT_FOUND, 408: ErrorKind.TIMEOUT, 504: ErrorKind.TIMEOUT}
_KINDS |= {429: ErrorKind.THROTTLED, 503: ErrorKind.THROTTLED}

#: Global unicast (RFC 4291). Outside lie the addresses that carry an IPv4 one: ::ffff:0:0/96, NAT64's 64:ff9b::/96.
_IPV6_GLOBAL = ipaddress.IPv6Network("2000::/3")
#: What Python's `is_global` lets through, in all its versions or in some.
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's platform channel: looks public, and answers virtual machines only
        "192.0.0.0/24",  # IETF protocol assignments (RFC 6890); Oracle Cloud's metadata
        "192.88.99.0/24",  # relays of 6to4 (RFC 7526)
        "2001::/23",  # IETF protocol assignments (RFC 2928), Teredo, which carries an IPv4 address
        "2002::/16",  # 6to4, which carries one too
        "3fff::/20",  # documentation (RFC 9637)
    )
)


def is_web_url(text: str) -> bool:
    """True for what `fetch_url` is for: http(s) URLs."""
    return re.match(r"https?://", text, re.IGNORECASE) is not None


def fetch_url(url: str, max_bytes: int = MAX_BYTES, timeout_s: float = TIMEOUT_S, allow_private: bool = False) -> bytes:
    """The body that a GET of an http(s) URL gives, redirects followed (5 at most).

    Args:
        url: without user and password.
        max_bytes: a longer body is refused, told or not told beforehand.
        timeout_s: for all of it together, however slowly the bytes come.
        allow_private: let through addresses that are not public: loopback, private, link-local and other special ones.

    Raises:
        UsageError: the URL, or one it redirects to, is none that may be fetched.
        PhotoError: it may, and that failed: `not_found`, `access_denied`, `timeout`, `connection`, `throttled`,
            `too_many_bytes`, `storage`.
    """
    deadline = time.monotonic() + timeout_s
    try:
        for _ in range(_MAX_REDIRECTS + 1):
            target = _parse(url)
            answer = _get(target, max_bytes, deadline, allow_private)
            if isinstance(answer, bytes):
                return answer
            url = _join(target, answer.location)
    except (HTTPError, http.client.HTTPException, OSError) as error:
        raise _to_photo_error(error, deadline) from error
    raise PhotoError(ErrorKind.STORAGE, f"more than {_MAX_REDIRECTS} redirects")


@dataclass(frozen=True, slots=True)
class _Redirect:
    """Where an answer sends us."""

    location: str


def is_public(address: str) -> bool:
    """True if an IP address, as text, belongs to the open internet.

    Private, loopback, link-local, carrier-grade NAT, multicast, reserved and documentation addresses do not (IANA's
    special-purpose registries), nor do IPv6 addresses that carry an IPv4 address.
    """
    ip = ipaddress.ip_address(address)
    if not ip.is_global or ip.is_multicast or ip.is_reserved or any(ip in network for network in _NOT_PUBLIC):
        return False
    return ip.version == 4 or ip in _IPV6_GLOBAL


# --- one hop ----------------------------------------------------------------------------------------------------------


def _parse(url: str) -> Url:
    try:
        target = parse_url(url)  # one parser for what is checked and what is asked: no two readings of one URL
    except LocationParseError as error:
        raise UsageError(f"{_show(url)}: not a URL; expected one like https://example.com/photo.jpg") from error
    if target.scheme not in _PORTS:
        raise UsageError(f"{_show(url)}: only http and https URLs are fetched")
    if target.auth is not None:
        raise UsageError(f"{_show(url)}: a URL with a user or password in it is not fetched; leave them out")
    if not target.host or "%" in target.host:  # a zone: an interface of this machine
        raise UsageError(f"{_show(url)}: the URL names no host that could be reached from here")
    return target


def _join(target: Url, location: str) -> str:
    try:
        return urljoin(target.url, location)
    except ValueError as error:
        raise UsageError(f"{_show(target.url)}: redirects to what is not a URL") from error


def _get(target: Url, max_bytes: int, deadline: float, allow_private: bool) -> bytes | _Redirect:
    host, port = (target.host or "").strip("[]"), target.port or _PORTS[str(target.scheme)]
    addresses = _resolve(host, port, deadline)
    if not allow_private and not all(is_public(address) for address in addresses):
        raise UsageError(
            f"{_show(target.url)}: leads to a private, local or reserved address, which is not fetched from "
            "(--allow-private lets it)"
        )
    sock = _connect(addresses, port, deadline)
    with _cut_off(sock, deadline):
        if target.scheme == "https":
            sock.settimeout(_left_s(deadline, _CONNECT_S))
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host.rstrip("."))
        kind = HTTPSConnection if target.scheme == "https" else HTTPConnection
        connection = kind(host, port, timeout=_left_s(deadline, _READ_S))
        connection.sock = sock  # connected already: it will look up no name
        with contextlib.closing(connection):
            connection.request("GET", target.request_uri, headers=_HEADERS, preload_content=False, decode_content=False)
            answer = _read(connection.getresponse(), max_bytes)
    # Cut off, a body of unknown length looks like one that ended.
    _left_s(deadline)
    return answer


def _read(response: HTTPResponse, max_bytes: int) -> bytes | _Redirect:
    location = response.get_redirect_location()
    if location:
        return _Redirect(location)
    if response.status != 200:
        kind = _KINDS.get(response.status, ErrorKind.CONNECTION if response.status >= 500 else ErrorKind.STORAGE)
        raise PhotoError(kind, f"the server answered {response.status}, expected 200")
    if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        raise PhotoError(ErrorKind.STORAGE, "the server sent it compressed, though asked not to")
    too_many = PhotoError(ErrorKind.TOO_MANY_BYTES, f"more than {max_bytes} bytes, the limit")
    if (response.length_remaining or 0) > max_bytes:
        raise too_many
    body = bytearray()
    while chunk := response.read(_CHUNK):
        body += chunk
        if len(body) > max_bytes:
            raise too_many
    return bytes(body)


# --- names, sockets, time ---------------------------------------------------------------------------------------------


def _resolve(host: str, port: int, deadline: float) -> list[str]:
    """Addresses of a host in the resolver's order. In a thread, for the system's resolver takes no time-out."""
    answers: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put(list(dict.fromkeys(str(entry[4][0]) for entry in found)))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=_left_s(deadline, _CONNECT_S))
    except queue.Empty:
        raise TimeoutError("no answer from the name server") from None
    if isinstance(answer, UnicodeError):  # a label that is empty or too long
        raise UsageError(f"{host!r} is not the name of a host") from answer
    if isinstance(answer, Exception):
        raise answer
    return answer


def _connect(addresses: list[str], port: int, deadline: float) -> socket.socket:
    """Connected to the first of the addresses that answers."""
    failure: OSError = OSError("the name has no address")
    for address in addresses:
        try:
            return socket.create_connection((address, port), _left_s(deadline, _CONNECT_S))
        except OSError as error:
            failure = error
    raise failure


@contextlib.contextmanager
def _cut_off(sock: socket.socket, deadline: float) -> Iterator[None]:
    """Close the connection at the deadline, whatever is under way: a socket's own time-out begins anew at each byte."""
    handle = sock.dup()  # TLS takes the socket over; this one stays with the connection

    def cut() -> None:
        with contextlib.suppress(OSError):
            handle.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(_left_s(deadline), cut)
    timer.daemon = True
    timer.start()
    try:
        with sock:
            yield
    finally:
        timer.cancel()
        timer.join()  # else it might hold a number that another file has by then
        handle.close()


def _left_s(deadline: float, at_most_s: float = float("inf")) -> float:
    """Seconds to the deadline. Raises TimeoutError where none are left."""
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("time is up")
    return min(left_s, at_most_s)


# --- words ------------------------------------------------------------------------------------------------------------


def _to_photo_error(error: Exception, deadline: float) -> PhotoError:
    """A connection that failed as a photo's error. What the other side sent is not repeated."""
    timed_out = isinstance(error, TimeoutError) or isinstance(error.__cause__, TimeoutError)
    if timed_out or time.monotonic() >= deadline:
        return PhotoError(ErrorKind.TIMEOUT, "took too long")
    if isinstance(error, socket.gaierror):
        kind = ErrorKind.NOT_FOUND if error.errno == socket.EAI_NONAME else ErrorKind.CONNECTION
        return PhotoError(kind, f"no address for the name of its host ({error.strerror})")
    if isinstance(error, ssl.SSLCertVerificationError):
        return PhotoError(ErrorKind.STORAGE, f"the certificate of its host is not trusted: {error.verify_message}")
    reason = getattr(error, "strerror", None) or type(error).__name__
    return PhotoError(ErrorKind.CONNECTION, f"the connection failed ({reason})")


def _show(url: str) -> str:
    """A URL for a message: short, printable, without query and password."""
    shown = redact(url.partition("#")[0])
    return one_line(shown[:200])
