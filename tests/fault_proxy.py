"""A web proxy in front of a real S3 server that does to chosen requests what networks and overloaded stores do.

It passes requests on as they come, `Host` and all, for they are signed. The first fault whose pattern is found in a
request, as `GET /bucket/a key.jpg` (unquoted, with its query), happens to it::

    with FaultProxy(server.endpoint_url, [Fault("SlowDown", r"GET .*/a\\.jpg", times=2)]) as proxy:
        options = proxy.storage_options(server)

None of the ready-made ones fits: toxiproxy and its like know connections, not keys; mitmproxy is far larger than this.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Self
from urllib.parse import unquote

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from tests.s3_server import S3Server

#: S3's error codes and their status (docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html).
STATUS = {
    "SlowDown": 503,
    "InternalError": 500,
    "AccessDenied": 403,
    "ExpiredToken": 400,
    "InvalidAccessKeyId": 403,
    "RequestTimeTooSkewed": 403,
    "PreconditionFailed": 412,
    "NotImplemented": 501,
}
#: What may happen to a transfer instead.
TRANSFER = ("refuse", "reset", "short", "long", "slow", "late", "hang", "none")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to which requests.

    Attributes:
        kind: one of `STATUS`, which is answered without asking the server; or of `TRANSFER`: `refuse` closes the
            connection unanswered, `reset` resets it amid the body, `short` announces and sends half of the body, `long`
            announces more than there is, `slow` sends a tenth of the body every `seconds`, `late` asks the server
            after `seconds`, `hang` never answers, `none` passes the request on.
        pattern: a regular expression, looked for in method and path.
        times: the first so many requests of each method and path; None is all.
        probability: of each of those, drawn by the seed, the kind, method, path and number of the request.
        seconds: of `slow` and `late`.
        action: called, in a thread, before anything else happens.
    """

    kind: str
    pattern: str
    times: int | None = None
    probability: float = 1.0
    seconds: float = 0.05
    action: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        assert self.kind in STATUS or self.kind in TRANSFER, self.kind


class FaultProxy:
    """Listens on a port, of loopback unless told, while it is entered.

    Attributes:
        faults: may be replaced at any time.
        asked: how often each method and path was asked for.
        askers: of each those who asked, in their order, by what `AWS_SDK_UA_APP_ID` makes of them.
        befallen: how often each kind of fault happened.
    """

    def __init__(self, upstream: str, faults: Sequence[Fault] = (), seed: int = 0, address: str = "127.0.0.1") -> None:
        self.faults = list(faults)
        self.asked: Counter[str] = Counter()
        self.askers: dict[str, list[str]] = {}
        self.befallen: Counter[str] = Counter()
        self._upstream, self._seed, self._address = upstream, seed, address
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def storage_options(self, server: S3Server, **config: Any) -> dict[str, Any]:
        """Options of s3fs to reach the server through here; `config` goes to botocore."""
        return dataclasses.replace(server, endpoint_url=self.url).storage_options | {"config_kwargs": config}

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(
            auto_decompress=False, skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
        )
        self._released = asyncio.Event()
        self._runner = web.ServerRunner(web.Server(self._handle), shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._address, 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    async def _stop(self) -> None:
        self._released.set()
        await self._runner.cleanup()
        await self._session.close()

    def _choose(self, line: str) -> Fault | None:
        self.asked[line] += 1
        for fault in self.faults:
            if not re.search(fault.pattern, line):
                continue
            if fault.times is not None and self.asked[line] > fault.times:
                continue
            if random.Random(f"{self._seed} {fault.kind} {line} {self.asked[line]}").random() < fault.probability:
                self.befallen[fault.kind] += 1
                return fault
        return None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        body = await request.content.read()
        line = f"{request.method} {unquote(request.raw_path)}"
        if asker := re.search(r"\bapp/(\S+)", request.headers.get("User-Agent", "")):
            self.askers.setdefault(line, []).append(asker[1])
        fault = self._choose(line)
        if fault is not None and fault.action is not None:
            await asyncio.to_thread(fault.action)
        kind = fault.kind if fault is not None else "none"
        if kind in STATUS:
            return _refusal(kind)
        if kind == "refuse":
            return _cut(request, reset=True)
        if kind == "late" and fault is not None:
            await asyncio.sleep(fault.seconds)
        if kind == "hang":
            await self._released.wait()
            return _cut(request, reset=False)
        return await self._pass_on(request, body, fault or Fault("none", ""))

    async def _pass_on(self, request: web.BaseRequest, body: bytes, fault: Fault) -> web.StreamResponse:
        headers = CIMultiDict(request.headers)
        for name in ("Connection", "Expect", "Transfer-Encoding"):
            headers.popall(name, None)
        url = URL(self._upstream + request.raw_path, encoded=True)
        try:
            async with self._session.request(
                request.method, url, headers=headers, data=body or None, allow_redirects=False
            ) as answer:
                content = await answer.read()
        except aiohttp.ClientError:  # the server is down, and so are we to the client
            return _cut(request, reset=True)
        response = web.StreamResponse(status=answer.status, reason=answer.reason)
        for name, value in answer.headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "keep-alive"):
                response.headers.add(name, value)
        told = int(answer.headers.get("Content-Length", len(content)))
        half = len(content) // 2
        response.content_length = {"short": half, "long": told + 100}.get(fault.kind, told)
        await response.prepare(request)
        if fault.kind in ("reset", "short", "long"):
            await response.write(content if fault.kind == "long" else content[:half])
            return response if fault.kind == "short" else _cut(request, reset=fault.kind == "reset", response=response)
        step = max(1, len(content) // 10) if fault.kind == "slow" else len(content) or 1
        with contextlib.suppress(ConnectionError):  # a client that does not wait is what the tests are about
            for start in range(0, len(content), step):
                await response.write(content[start : start + step])
                await asyncio.sleep(fault.seconds if fault.kind == "slow" else 0)
            await response.write_eof()
        return response


def _refusal(code: str) -> web.Response:
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>by the test</Message></Error>'
    return web.Response(status=STATUS[code], text=body, content_type="application/xml")


def _cut(request: web.BaseRequest, reset: bool, response: web.StreamResponse | None = None) -> web.StreamResponse:
    """End the connection, with a reset or a plain end."""
    transport = request.transport
    if transport is not None:
        if reset:
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        else:
            transport.close()
    return response if response is not None else web.Response()
