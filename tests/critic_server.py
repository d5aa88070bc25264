"""A chat-completions endpoint on loopback that misbehaves as it is told.

Each photo is known by its mean colour, so that a script says which photo meets which trouble, whatever the order:
`CriticServer({"red": ["500", "ok"]})` fails the first request with a red photo and answers the next. The last step of a
script repeats; photos without a script are answered.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 200, 30),
    "blue": (30, 30, 200),
    "yellow": (200, 200, 30),
    "cyan": (30, 200, 200),
    "magenta": (200, 30, 200),
    "white": (240, 240, 240),
    "grey": (120, 120, 120),
    "black": (10, 10, 10),
}

CRITIQUE: dict[str, Any] = {
    "description": "A plain field of colour.",
    "strengths": ["Even light."],
    "problems": ["Nothing to look at.", "No contrast."],
    "suggestions": ["Put a subject into it."],
    "score": 3.5,
}
USAGE = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}


@dataclass(frozen=True)
class Request:
    """What the server was sent."""

    colour: str
    headers: Message
    body: Mapping[str, Any]
    jpeg: bytes
    path: str
    at: float = field(default_factory=time.monotonic)


def completion(content: Any, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion with this text, or with this object as JSON."""
    text = content if isinstance(content, str) or content is None else json.dumps(content)
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text, **message}}
    return {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": USAGE}


def hostile(text: str) -> str:
    """A text with an escape sequence, a bell, reversal, a zero-width space, NUL and a line break in it."""
    return f"\x1b[31m{text}\x07 \u202egnp.exe\u200b\x00\nend\x9b2J"


class CriticServer:
    """The endpoint, running until it is closed."""

    def __init__(self, scripts: Mapping[str, Sequence[str]] | None = None) -> None:
        self.scripts = {colour: list(steps) for colour, steps in (scripts or {}).items()}
        self.requests: list[Request] = []
        self.default = "ok"
        self._lock, self._closing, outer = threading.Lock(), threading.Event(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with contextlib.suppress(ConnectionError):  # the client may be gone, which is what some tests are about
                    outer._answer(self, body)

            def log_message(self, format: str, *arguments: Any) -> None:
                """Nothing: pytest's output is for the tests."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def asked(self, colour: str) -> list[Request]:
        """The requests with a photo of this colour."""
        return [request for request in self.requests if request.colour == colour]

    def _answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        [url] = [part["image_url"]["url"] for part in body["messages"][1]["content"] if part["type"] == "image_url"]
        jpeg = base64.b64decode(url.partition(",")[2])
        mean = np.asarray(Image.open(io.BytesIO(jpeg))).reshape(-1, 3).mean(axis=0)
        colour = min(COLOURS, key=lambda name: float(np.abs(mean - COLOURS[name]).sum()))
        with self._lock:
            self.requests.append(Request(colour, handler.headers, body, jpeg, handler.path))
            steps = self.scripts.get(colour, [self.default])
            step = steps.pop(0) if len(steps) > 1 else steps[0]
        echo = {"message": f"{handler.headers['Authorization']} sent {url}", "code": handler.headers["Authorization"]}
        getattr(self, f"_{step.replace('-', '_')}", self._status(step))(handler, echo)

    def _send(self, handler: BaseHTTPRequestHandler, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _status(self, step: str) -> Any:
        """For steps that are a number: that status, with an error that echoes all it was sent."""
        return lambda handler, echo: self._send(handler, {"error": echo}, int(step))

    # --- steps: what may happen to a request --------------------------------------------------------------------------

    def _ok(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        self._send(handler, completion(CRITIQUE))

    def _slow(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        self._closing.wait(30)

    def _lag(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        self._closing.wait(0.3)
        self._send(handler, completion(CRITIQUE))

    def _drip(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        """A byte every 50 ms: no single read is ever late."""
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        while not self._closing.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    def _retry_after(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        self._send(handler, {"error": echo}, 429, Retry_After="1")

    def _no_quota(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        self._send(handler, {"error": echo | {"code": "insufficient_quota"}}, 429)

    def _policy(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        self._send(handler, {"error": echo | {"code": "content_policy_violation"}}, 400)

    def _elsewhere(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        self._send(handler, b"", 307, Location=f"{self.url}/elsewhere")

    def _reset(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        """Half an answer, then RST instead of the rest."""
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "5000")
        handler.end_headers()
        handler.wfile.write(b'{"choices": [')
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Both files hold the socket open; only the last close resets it.
        handler.rfile.close()
        handler.connection.close()
        handler.close_connection = True
        raise ConnectionResetError

    def _no_json(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        self._send(handler, b"<html>It works!</html>")

    def _prose(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        self._send(handler, completion(f"What a lovely photo! {echo['message']}"))

    def _wrong_schema(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        self._send(handler, completion(CRITIQUE | {"score": 11}))

    def _extra_field(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        self._send(handler, completion(CRITIQUE | {echo["code"]: 1}))

    def _echo(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        self._send(handler, completion(CRITIQUE | {"description": echo["message"][:500]}))

    def _refusal(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        self._send(handler, completion(None, refusal=f"I cannot. {echo['message']}"))

    def _filter(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        self._send(handler, completion("", finish_reason="content_filter"))

    def _cut(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        self._send(handler, completion(json.dumps(CRITIQUE)[:40], finish_reason="length"))

    def _no_choices(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        self._send(handler, completion("") | {"choices": []})

    def _huge(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        """Announced without a length, 64 MB if one listens to the end."""
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        for _ in range(1024):
            handler.wfile.write(b" " * 65536)

    def _bomb(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        import gzip

        self._send(handler, gzip.compress(b" " * 10_000_000), Content_Encoding="gzip")

    def _deep(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        self._send(handler, b"[" * 100_000)

    def _control(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        texts = {name: [hostile("x")] for name in ("strengths", "problems", "suggestions")}
        self._send(handler, completion(CRITIQUE | texts | {"description": hostile("A photo")}))

    def _no_usage(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        self._send(handler, completion(CRITIQUE) | {"usage": None})

    def _negative_usage(self, handler: BaseHTTPRequestHandler, echo: Any) -> None:
        usage = {"prompt_tokens": -(10**9), "completion_tokens": 1}
        self._send(handler, completion(CRITIQUE) | {"usage": usage})


@contextlib.contextmanager
def serve(scripts: Mapping[str, Sequence[str]] | None = None) -> Iterator[CriticServer]:
    """A running server."""
    server = CriticServer(scripts)
    try:
        yield server
    finally:
        server.close()
