"""What every request passes before the application sees it: who may ask, how much they may send, for how long.

An ASGI middleware, because a body has to be counted while it comes: by the time that a framework has parsed it, it is
in memory. It writes the access log and keeps the metrics too, so that no request escapes them.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from picinspector import logs
from picinspector.errors import ErrorKind
from picinspector.photo import Limits
from picinspector.serve.answers import Problem

#: Beside the photos of a body: boundaries, names, braces.
_OVERHEAD_BYTES = 64 * 1024
#: A batch may be so many times as large as its largest photo.
_BATCH_PHOTOS = 8
#: Bodies in memory at once, in photos of the largest size.
_HELD_PHOTOS = 16
_RETRY_AFTER_S = 2
#: Anybody may ask these: whether it lives, and the page, which holds nothing and where the token is typed.
_OPEN = frozenset({"/", "/v1/health", "/v1/ready"})
_PATHS = _OPEN | {"/v1/score", "/v1/score/batch", "/v1/models", "/metrics", "/openapi.json"}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


@dataclass(frozen=True)
class Rules:
    """What a request may cost, and who may send one.

    Attributes:
        token: that every request has to bear, but for health, readiness and the page; None lets everybody in.
        limits: of one photo.
        timeout_s: from the first byte of a request to the answer.
        local_only: answer only to the names of this machine. A page from elsewhere can point a name of its own at
            127.0.0.1 (DNS rebinding), but it cannot change what the browser says the name is.
        allow_private: fetch URLs from addresses that are not public too.
    """

    token: str | None = field(default=None, repr=False)
    limits: Limits = field(default_factory=lambda: Limits(max_bytes=32 * 1024**2, max_pixels=100_000_000))
    timeout_s: float = 30.0
    local_only: bool = False
    allow_private: bool = False

    def body_bytes(self, path: str) -> int:
        """The longest body of a request for this path."""
        photos_bytes = {"/v1/score": self.limits.max_bytes * 4 // 3, "/v1/score/batch": self.batch_bytes}  # base64
        return photos_bytes.get(path, 0) + _OVERHEAD_BYTES

    @property
    def batch_bytes(self) -> int:
        """Of the photos of one batch together."""
        return _BATCH_PHOTOS * self.limits.max_bytes


class RequestError(Exception):
    """A request that gets a problem for an answer.

    Attributes:
        status: of HTTP.
        problem: the body.
        headers: beside the usual ones.
    """

    def __init__(self, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.problem = Problem(error_kind=kind, error_message=message)

    def to_response(self) -> Response:
        """What the client gets."""
        return Response(self.problem.model_dump_json(), self.status, self.headers, "application/json")


def busy(message: str) -> RequestError:
    """Come again: 503 with Retry-After."""
    return RequestError(503, "busy", message, {"retry-after": str(_RETRY_AFTER_S)})


def failed() -> RequestError:
    """The service has a fault; which, is in its log."""
    return RequestError(500, ErrorKind.INTERNAL.value, "the service failed; its log says where")


def too_large(what: str, limit_bytes: int) -> RequestError:
    """413; the connection ends, else the rest would still be read, though thrown away."""
    message = f"{what} is larger than {limit_bytes} bytes, the limit"
    return RequestError(413, ErrorKind.TOO_MANY_BYTES.value, message, {"connection": "close"})


def is_loopback(host: str) -> bool:
    """True for the names and addresses under which only this machine reaches itself."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Metrics:
    """What Prometheus is told."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "picinspector_requests", "Requests answered.", ["method", "path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "picinspector_request_seconds", "From the first byte to the last.", ["path"], registry=self.registry,
            buckets=(0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
        )  # fmt: skip
        self.photos = Counter(
            "picinspector_photos", "Photos judged, by error kind; ok without one.", ["outcome"], registry=self.registry
        )
        self.open = Gauge("picinspector_requests_open", "Requests being answered.", registry=self.registry)
        self.held = Gauge("picinspector_held_bytes", "Bytes of bodies in memory.", registry=self.registry)


class Gate:
    """The middleware."""

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics) -> None:
        self._app, self._rules, self._metrics = app, rules, metrics
        self._token = rules.token.encode() if rules.token is not None else None
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through to the application, or refuse it."""
        if scope["type"] == "http":
            await self._pass(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        else:
            await send({"type": "websocket.close"})

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, status, body = time.perf_counter(), 0, _Body(self, scope["path"], receive)
        scope.setdefault("state", {})["deadline"] = body.deadline

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        self._metrics.open.inc()
        try:
            self._admit(scope)
            await self._app(scope, body.receive, answer)
        except RequestError as refusal:
            await refusal.to_response()(scope, receive, answer)
        except Exception as error:
            logs.event("request_failed", level=logging.ERROR, error=type(error).__name__, at=_where(error))
            if status == 0:
                await failed().to_response()(scope, receive, answer)
        finally:
            self._hold(-body.received_bytes)
            self._metrics.open.dec()
            self._record(scope, status, body.received_bytes, time.perf_counter() - started)

    def _admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._rules.local_only and not is_loopback(_without_port(headers.get("host", ""))):
            raise RequestError(421, "misdirected", "this service answers to localhost only", {"connection": "close"})
        if self._token is not None and scope["path"] not in _OPEN:
            scheme, _, token = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode("latin-1"), self._token):
                challenge = {"www-authenticate": "Bearer", "connection": "close"}
                raise RequestError(401, "unauthorized", "a bearer token is needed, and it must be right", challenge)
        told, limit_bytes = headers.get("content-length", ""), self._rules.body_bytes(scope["path"])
        if told.isdecimal() and int(told) > limit_bytes:
            raise too_large("the request", limit_bytes)

    def _hold(self, count: int) -> None:
        self._held_bytes += count
        self._metrics.held.set(self._held_bytes)
        if count > 0 and self._held_bytes > _HELD_PHOTOS * self._rules.limits.max_bytes:
            raise busy("too many photos at once; come again")

    def _record(self, scope: Scope, status: int, received_bytes: int, seconds: float) -> None:
        # A path that is none of ours may hold anything.
        path = scope["path"] if scope["path"] in _PATHS else "other"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.requests.labels(method, path, str(status)).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        logs.event("request", method=method, path=path, status=status, ms=round(1000 * seconds, 1),
                   bytes=received_bytes)  # fmt: skip


class _Body:
    """The body of one request, counted as it comes."""

    def __init__(self, gate: Gate, path: str, receive: Receive) -> None:
        self._gate, self._receive = gate, receive
        self._limit_bytes = gate._rules.body_bytes(path)
        self.deadline = asyncio.get_running_loop().time() + gate._rules.timeout_s
        self.received_bytes = 0
        self._whole = False

    async def receive(self) -> Message:
        """The next message.

        Raises:
            RequestError: it is too much, too late, or the last before the body is whole.
        """
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self._receive()
        except TimeoutError:
            text = f"the request was not whole within {self._gate._rules.timeout_s:g} s"
            raise RequestError(408, ErrorKind.TIMEOUT.value, text, {"connection": "close"}) from None
        if message["type"] == "http.disconnect":
            raise RequestError(400, "incomplete", "the connection ended before the request was whole")
        count = len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        self.received_bytes += count
        if self.received_bytes > self._limit_bytes:
            self.received_bytes -= count  # it goes at once
            raise too_large("the request", self._limit_bytes)
        self._gate._hold(count)
        return message


def _without_port(host: str) -> str:
    return host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]


def _where(error: BaseException) -> str:
    trace: Any = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_qualname}:{trace.tb_lineno}" if trace is not None else ""
