"""uvicorn, with limits of its own: how large a request's head may be, how long it may take, how many connections.

All that the gate does begins when a head is whole, and no token is needed to send one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from picinspector import logs
from picinspector.serve.problems import RequestError, busy

#: Of a head. Browsers and proxies stay below 16 KB.
_HEAD_BYTES = 64 * 1024
_HEAD_LINES = 100
#: Till a head is whole, from the connection or, after an answer, from its first byte. Apache gives 20 s.
_HEAD_S = 10.0
#: One byte of a body may take so many of what is around it: lengths and ends of chunks. Chunks have 100 bytes or more.
_FRAMING = 1 / 8
_CONNECTIONS = 1000
_BACKLOG = 2048


def make_server(app: ASGIApp, timeout_s: float) -> uvicorn.Server:
    """What answers for the application.

    Args:
        app: the gate, with the application behind it.
        timeout_s: of a request.
    """
    config = uvicorn.Config(
        app,
        http=Protocol,
        log_config=None,
        log_level="error",  # it warns of what is no HTTP, and `Protocol` says that itself
        access_log=False,
        server_header=False,
        date_header=True,
        lifespan="off",
        ws="none",
        backlog=_BACKLOG,
        timeout_graceful_shutdown=int(timeout_s) + 5,
    )
    return uvicorn.Server(config)


def answer(app: ASGIApp, listener: socket.socket, timeout_s: float, on_listening: Callable[[], None]) -> None:
    """Answer until SIGTERM or SIGINT; then what is under way is finished.

    Args:
        app: the gate, with the application behind it.
        listener: bound to its address.
        timeout_s: of a request.
        on_listening: called once clients can connect.
    """
    for name in ("uvicorn.error", "asyncio", "concurrent.futures"):  # else plain text, between lines of JSON
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = logging.getLogger("picinspector").handlers, False
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it warns of every form that is none
    server = make_server(app, timeout_s)
    listener.listen(_BACKLOG)
    on_listening()
    with _ended_by_signals():
        server.run(sockets=[listener])


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """To be asked to end is no failure: uvicorn raises the signal again when all is answered, and that ends well."""
    before = {name: signal.signal(name, lambda *_: None) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


class _HeadError(Exception):
    """Raised in the parser, which ends with it."""


class Protocol(HttpToolsProtocol):
    """One connection.

    What is no body has a limit, too: the head itself, what is around the chunks of a body, trailers. The parser keeps
    an unfinished line, at a cost that grows with the square of its length.
    """

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._in_head, self._too_much = True, False
        self._timer: asyncio.TimerHandle | None = None
        # Requests that have begun; of the last one the lines and their bytes, bytes of its body, other bytes.
        self._begun = self._lines = self._line_bytes = self._body_bytes = self._other_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Give it time for a head, or turn it away."""
        super().connection_made(transport)
        if len(self.connections) > _CONNECTIONS:
            self._refuse(busy("too many connections; come again"))
        else:
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, and count what of it is no body."""
        if self._in_head:
            self._start_timer()
        idle, begun, body_bytes = self._in_head, self._begun, self._body_bytes
        super().data_received(data)
        if self._begun == begun:
            self._other_bytes += len(data) - (self._body_bytes - body_bytes)
        elif idle and self._begun == begun + 1:
            self._other_bytes = len(data) - self._body_bytes
        # Else it is of several requests, and nobody knows what of it is whose.
        if self._other_bytes > _HEAD_BYTES + _FRAMING * self._body_bytes and not self.transport.is_closing():
            self._refuse_head()

    def on_message_begin(self) -> None:
        """Count anew."""
        self._start_timer()
        self._begun += 1
        self._lines = self._line_bytes = self._body_bytes = self._other_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of it."""
        self._count_line(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A line; also a trailer."""
        self._lines += 1
        self._count_line(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """From here on the gate looks at the time."""
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Count it."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The next is a head."""
        self._in_head = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What ended the parser: it is no HTTP, or too much."""
        if self._too_much:
            self._refuse_head()
        else:
            self._refuse(RequestError(400, "invalid_request", "this is no HTTP"))

    def _count_line(self, count: int) -> None:
        self._line_bytes += count
        if self._lines > _HEAD_LINES or self._line_bytes > _HEAD_BYTES:
            self._too_much = True
            raise _HeadError

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(_HEAD_S, self._on_time)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_time(self) -> None:
        self._timer = None
        if self.cycle is not None and not self.cycle.response_complete:  # a client that asks before it is answered
            self._start_timer()
        else:
            self._refuse(RequestError(408, "timeout", f"the head of the request was not whole within {_HEAD_S:g} s"))

    def _refuse_head(self) -> None:
        text = f"the head of the request is larger than {_HEAD_BYTES} bytes, or has more than {_HEAD_LINES} lines"
        self._refuse(RequestError(431, "head_too_large", text))

    def _refuse(self, refusal: RequestError) -> None:
        """Answer without the application, and close."""
        response = refusal.to_response()
        logs.event("request_refused", status=refusal.status)
        lines = [*self.server_state.default_headers, *response.raw_headers, (b"connection", b"close")]
        head = b"".join(name + b": " + value + b"\r\n" for name, value in lines)
        self.transport.write(STATUS_LINE[refusal.status] + head + b"\r\n" + bytes(response.body))
        self.transport.close()
