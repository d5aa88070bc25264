"""What every request passes before the application sees it: who may ask, how much they may send, for how long.

An ASGI middleware, because a body has to be counted while it comes: by the time that a framework has parsed it, it is
in memory. It writes the access log and keeps the metrics too, so that no request escapes them.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from picinspector import logs
from picinspector.errors import ErrorKind
from picinspector.serve.load import Load
from picinspector.serve.problems import RequestError, busy, cause_of, failed, too_large
from picinspector.serve.settings import Rules, is_loopback

#: Photos in memory at once, as bodies or fetched, in photos of the largest size.
_HELD_PHOTOS = 16
#: Anybody may ask these: whether it lives, and the page, which holds nothing and where the token is typed.
_OPEN = frozenset({"/", "/v1/health", "/v1/ready"})
_SCORING = frozenset({"/v1/score", "/v1/score/batch"})
_PATHS = _OPEN | _SCORING | {"/v1/models", "/metrics", "/openapi.json"}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
#: In the log and the metrics only: the client left before it had an answer. nginx has made it a custom.
_LEFT = 499
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


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
    """The middleware. It tells the application a request's `deadline`, and `hold`, in the request's state."""

    def __init__(self, app: ASGIApp, rules: Rules, load: Load, metrics: Metrics) -> None:
        self._app, self._rules, self._load, self._metrics = app, rules, load, metrics
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
        started, status, body = time.perf_counter(), 0, _Body(self, scope, receive)
        scope.setdefault("state", {}).update(deadline=body.deadline, hold=body.hold)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                body.is_answered = True
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if status == 503:
                    await body.drain()
                if not body.is_whole:  # else what nobody wants would still be read
                    headers["connection"] = "close"
            await send(message)

        self._metrics.open.inc()
        try:
            self._admit(scope)
            await self._app(scope, body.receive, answer)
        except RequestError as refusal:
            await refusal.to_response()(scope, receive, answer)
        except asyncio.CancelledError:
            if not body.is_left:
                raise
            status = _LEFT
        except Exception as error:
            kind, at = cause_of(error)
            logs.event("request_failed", level=logging.ERROR, error=kind, at=at)
            if status == 0:
                await failed().to_response()(scope, receive, answer)
        finally:
            body.end()
            self._metrics.open.dec()
            self._record(scope, status, body.received_bytes, time.perf_counter() - started)

    def _admit(self, scope: Scope) -> None:
        headers, scores = Headers(scope=scope), scope["path"] in _SCORING and scope["method"] == "POST"
        if self._rules.local_only:
            if not is_loopback(_without_port(headers.get("host", ""))):
                raise RequestError(421, "misdirected", "this service answers to localhost only")
            if scores and _is_from_elsewhere(headers):
                raise RequestError(403, "cross_origin", "this service answers to no other page than its own")
        if self._token is not None and scope["path"] not in _OPEN:
            scheme, _, token = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode("latin-1"), self._token):
                challenge = {"www-authenticate": "Bearer"}
                raise RequestError(401, "unauthorized", "a bearer token is needed, and it must be right", challenge)
        told, limit_bytes = headers.get("content-length", ""), self._rules.body_bytes(scope["path"])
        if told.isdecimal() and int(told) > limit_bytes:
            raise too_large("the request", limit_bytes)
        if scores and self._load.is_full:  # before its body is held and parsed in vain
            raise busy("too many photos are waiting; come again")

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
    """The body of one request, counted as it comes; and whether its client is still there after it.

    Attributes:
        deadline: of the whole request, by the loop's clock.
        received_bytes: so far.
        is_whole: nothing of it is still to come.
        is_answered: the answer has begun.
        is_left: the client left without one, and the request's task was cancelled.
    """

    def __init__(self, gate: Gate, scope: Scope, receive: Receive) -> None:
        self._gate, self._receive, headers = gate, receive, Headers(scope=scope)
        self._limit_bytes = gate._rules.body_bytes(scope["path"])
        self.deadline = asyncio.get_running_loop().time() + gate._rules.timeout_s
        self.received_bytes = self._held_bytes = 0
        self.is_whole = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
        self.is_answered = self.is_left = False
        self._waits_for_leave = headers.get("expect", "").lower() == "100-continue"
        self._task = asyncio.current_task()
        self._watch: asyncio.Task[None] | None = None

    async def receive(self) -> Message:
        """The next message.

        Raises:
            RequestError: it is too much, too late, or the last before the body is whole.
        """
        if self._watch is not None:  # there was a last one
            await asyncio.wait([self._watch])
            return {"type": "http.disconnect"}
        message = await self._next()
        self.hold(len(message.get("body", b"")))
        if self.is_whole:
            self._watch = asyncio.create_task(self._leave())
        return message

    def hold(self, count: int) -> None:
        """Count so many bytes, of the body or for its sake, as in memory until the answer.

        Raises:
            RequestError: with all others it is too much.
        """
        self._held_bytes += count
        self._gate._hold(count)

    async def drain(self) -> None:
        """Read what is still to come, and keep nothing.

        Whoever is to come again must hear it: a connection that is closed on bytes that nobody has read takes the
        answer along (RFC 9112, 9.6).
        """
        self._gate._hold(-self._held_bytes)
        self._held_bytes = 0
        if self._waits_for_leave and not self.received_bytes:  # to send it, and will not
            return
        while not self.is_whole:
            try:
                await self._next()
            except RequestError:
                return

    def end(self) -> None:
        """Let go of all."""
        self._gate._hold(-self._held_bytes)
        if self._watch is not None:
            self._watch.cancel()

    async def _next(self) -> Message:
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self._receive()
        except TimeoutError:
            text = f"the request was not whole within {self._gate._rules.timeout_s:g} s"
            raise RequestError(408, ErrorKind.TIMEOUT.value, text) from None
        if message["type"] == "http.disconnect":
            raise RequestError(400, "incomplete", "the connection ended before the request was whole")
        self.received_bytes += len(message.get("body", b""))
        if self.received_bytes > self._limit_bytes:
            raise too_large("the request", self._limit_bytes)
        self.is_whole = not message.get("more_body", False)
        return message

    async def _leave(self) -> None:
        """After a whole body comes only that the client is gone, or has its answer."""
        await self._receive()
        if not self.is_answered and self._task is not None:
            self.is_left = True
            self._task.cancel()


def _is_from_elsewhere(headers: Headers) -> bool:
    """Whether a browser sends this for a page of another origin, which may not read the answer but can ask."""
    origin, host = headers.get("origin"), headers.get("host", "")
    if origin is not None:
        return origin not in (f"http://{host}", f"https://{host}")
    return headers.get("sec-fetch-site", "none") not in ("none", "same-origin")


def _without_port(host: str) -> str:
    return host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
