"""The service's HTTP side over a real socket, with a stand-in for the replicas: limits, token, time, what leaks."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.server
import json
import logging
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from picinspector import schema
from picinspector.bundle import open_bundle
from picinspector.errors import UsageError
from picinspector.photo import Limits
from picinspector.serve import run
from picinspector.serve.answers import Facts, Measurements, Photo, Photos, Reference
from picinspector.serve.front import make_app
from picinspector.serve.load import Capacity
from picinspector.serve.problems import ReplicaError, RequestError, busy
from picinspector.serve.server import make_server
from picinspector.serve.settings import Rules, Settings, is_loopback, token_from

TOKEN = "a-token-that-is-long-enough"
LIMITS = Limits(max_bytes=200_000, max_pixels=1_000_000)
RULES = Rules(limits=LIMITS, timeout_s=5.0)
ROOMY = Capacity(workers=100, places=200)


def answer(name: str = "", **values: Any) -> dict[str, Any]:
    """A row as a replica gives it."""
    row = dict.fromkeys(schema.SCORES.names) | {"image_id": "0" * 32, "uri": name, "scorer_fingerprint": "f"}
    row |= {"facts": dict.fromkeys(schema.FACTS.names), "measurements": dict.fromkeys(schema.MEASUREMENTS)}
    return row | {"quality_score": 7.5} | values


class Replicas:
    """Answers at once, by the first bytes of a photo. `wait` waits for `go`, `slow` for ever."""

    def __init__(self) -> None:
        self.seen: list[tuple[bytes, str]] = []
        self.cancelled: list[bytes] = []
        self.go = threading.Event()

    async def judge(self, data: bytes, name: str) -> dict[str, Any]:
        self.seen.append((data, name))
        try:
            while data.startswith(b"slow") or (data.startswith(b"wait") and not self.go.is_set()):
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled.append(data)
            raise
        if data.startswith(b"bug"):
            raise ValueError("secret inner workings")
        if data.startswith(b"fault"):
            raise ReplicaError("OutOfMemoryError", "Encode._encode:99")
        if data.startswith(b"busy") or (data.startswith(b"twice busy") and self.seen.count((data, name)) < 3):
            raise busy("too many photos are waiting; come again")
        if data.startswith(b"bad"):
            return answer(name, error_kind="truncated", error_message="it ends early", quality_score=None)
        if data.startswith(b"bomb"):
            return answer(name, error_kind="too_many_pixels", error_message="900 megapixels", quality_score=None)
        return answer(name)


@contextlib.contextmanager
def served(
    rules: Rules = RULES, ready: bool = True, replicas: Replicas | None = None, capacity: Capacity = ROOMY
) -> Iterator[tuple[httpx2.Client, Replicas]]:
    """The application behind its server, as `serve.run` starts it."""
    replicas = replicas or Replicas()

    async def is_ready() -> bool:
        return ready

    server = make_server(make_app(rules, open_bundle(), replicas.judge, is_ready, capacity), rules.timeout_s)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    with httpx2.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=30) as client:
        try:
            while not server.started:
                time.sleep(0.01)
            yield client, replicas
        finally:
            server.should_exit = True
            thread.join()
            listener.close()


@pytest.fixture(autouse=True)
def _logger_as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that other tests ran in this one have set it up to write to a stderr that is gone."""
    logger = logging.getLogger("picinspector")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[httpx2.Client, Replicas]]:
    with served() as started:
        yield started


@pytest.fixture
def client(service: tuple[httpx2.Client, Replicas]) -> httpx2.Client:
    service[1].seen.clear()
    return service[0]


def problem(response: httpx2.Response) -> tuple[int, str]:
    """Status and kind; every refusal has the same form, on one line."""
    said = response.json()
    assert said.keys() == {"error_kind", "error_message"}
    assert said["error_message"]
    assert "\n" not in said["error_message"]
    assert "Traceback" not in response.text
    return response.status_code, said["error_kind"]


def upload(client: httpx2.Client, data: bytes, name: str = "a.jpg", **more: Any) -> httpx2.Response:
    return client.post("/v1/score", files={"photo": (name, data)}, **more)


def wait_until(found: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.01)


def logged(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    return [record.__dict__["fields"] for record in caplog.records if record.__dict__.get("event") == event]


def metric(client: httpx2.Client, name: str) -> float:
    return float(re.findall(rf"^{name} (\S+)$", client.get("/metrics").text, re.MULTILINE)[0])


# --- what is answered -------------------------------------------------------------------------------------------------


def test_the_answer_has_the_fields_of_the_tables() -> None:
    assert list(Photo.model_fields) == [*schema.SCORES.names, "facts", "measurements"]
    assert list(Facts.model_fields) == schema.FACTS.names
    assert list(Measurements.model_fields) == list(schema.MEASUREMENTS)
    assert list(Photos.model_fields) == ["photos"]


def test_the_openapi_names_them(client: httpx2.Client) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert list(schemas["Photo"]["properties"]) == [*schema.SCORES.names, "facts", "measurements"]
    assert (
        schemas["Photo"]["properties"]["quality_score"]["description"] == "perceived quality, 1 (bad) to 10 (excellent)"
    )
    assert set(schemas["Reference"]["properties"]) == {"url", "base64", "name"}


def test_a_photo_comes_as_a_form_or_as_base64(client: httpx2.Client, service: tuple[httpx2.Client, Replicas]) -> None:
    assert upload(client, b"data", "my photo.jpg").json()["quality_score"] == 7.5
    body = {"base64": base64.b64encode(b"other").decode(), "name": "b.dng"}
    assert client.post("/v1/score", json=body).json()["uri"] == "b.dng"
    assert service[1].seen == [(b"data", "my photo.jpg"), (b"other", "b.dng")]


def test_a_batch_keeps_its_order_and_its_failures(client: httpx2.Client) -> None:
    parts = [("photo", (f"{n}.jpg", b"bad" if n == 3 else b"good")) for n in range(64)]
    response = client.post("/v1/score/batch", files=parts)
    photos = response.json()["photos"]
    assert [photo["uri"] for photo in photos] == [f"{n}.jpg" for n in range(64)]
    assert [photo["error_kind"] for photo in photos if photo["error_kind"]] == ["truncated"]
    assert photos[3]["error_message"] == "it ends early"


def test_health_readiness_models_and_metrics(client: httpx2.Client) -> None:
    assert client.get("/v1/health").json() == {"status": "ok"}
    assert client.get("/v1/ready").json() == {"status": "ok"}
    models, bundle = client.get("/v1/models").json(), open_bundle()
    assert (models["name"], models["scorer_fingerprint"]) == (bundle.name, bundle.scorer_fingerprint)
    assert models["card"].startswith("# The builtin bundle")
    upload(client, b"bad")
    text = client.get("/metrics").text
    assert 'picinspector_requests_total{method="POST",path="/v1/score",status="422"}' in text
    assert 'picinspector_photos_total{outcome="truncated"}' in text
    assert "picinspector_held_bytes 0.0" in text


def test_not_ready_without_replicas() -> None:
    with served(ready=False) as (client, _):
        assert client.get("/v1/health").status_code == 200
        assert client.get("/v1/ready").status_code == 503


# --- photos that cannot be judged -------------------------------------------------------------------------------------


def test_errors_of_photos(client: httpx2.Client) -> None:
    assert problem(upload(client, b"bad")) == (422, "truncated")
    assert problem(upload(client, b"bomb")) == (413, "too_many_pixels")
    response = upload(client, b"busy")
    assert problem(response) == (503, "busy")
    assert int(response.headers["retry-after"]) > 0


def test_a_photo_of_a_batch_waits_where_there_is_no_room_for_it(
    client: httpx2.Client, service: tuple[httpx2.Client, Replicas]
) -> None:
    parts = [("photo", (name, name.encode())) for name in ("good", "twice busy", "bad")]
    photos = client.post("/v1/score/batch", files=parts).json()["photos"]
    assert [photo["error_kind"] for photo in photos] == [None, None, "truncated"]
    assert [name for _, name in service[1].seen].count("twice busy") == 3
    with served(replace(RULES, timeout_s=1.0)) as (impatient, _):
        response = impatient.post("/v1/score/batch", files=[("photo", b"good"), ("photo", b"busy")])
    assert problem(response) == (503, "busy")


@pytest.mark.parametrize("path", ["/v1/score", "/v1/score/batch"])
@pytest.mark.parametrize(
    ("photo", "error", "at"),
    [(b"bug", "ValueError", "Replicas.judge:"), (b"fault", "OutOfMemoryError", "Encode._encode:99")],
)
def test_a_bug_tells_the_client_nothing_and_the_log_where(
    client: httpx2.Client, caplog: pytest.LogCaptureFixture, path: str, photo: bytes, error: str, at: str
) -> None:
    with caplog.at_level(logging.INFO, "picinspector"):
        response = client.post(path, files={"photo": ("holiday.jpg", photo)})
        wait_until(lambda: logged(caplog, "request_failed"))
    assert problem(response) == (500, "internal")
    assert "secret" not in response.text
    [failure] = logged(caplog, "request_failed")
    assert failure["error"] == error
    assert failure["at"].startswith(at)
    assert "secret" not in caplog.text
    assert "holiday" not in caplog.text


def test_requests_that_are_none(client: httpx2.Client, service: tuple[httpx2.Client, Replicas]) -> None:
    invalid = (422, "invalid_request")
    assert problem(client.post("/v1/score", content=b"x")) == (415, "unsupported_media_type")
    assert problem(client.post("/v1/score", content=b"x", headers={"content-type": "image/jpeg"}))[0] == 415
    assert problem(client.post("/v1/score", content=b"{}", headers={"content-type": "text/plain"}))[0] == 415
    assert problem(client.post("/v1/score/batch", json={"base64": "AA=="}))[0] == 415
    for body in (
        {},
        {"url": "http://example.com", "base64": "AA=="},
        {"base64": "?"},
        {"base64": 1},
        {"file": "/etc"},
        [],
    ):
        assert problem(client.post("/v1/score", json=body)) == invalid, body
    nested = b"[" * 100_000
    assert problem(client.post("/v1/score", content=nested, headers={"content-type": "application/json"})) == invalid
    assert problem(client.post("/v1/score", files={"picture": b"x"})) == invalid
    assert problem(client.post("/v1/score", files=[("photo", b"x"), ("photo", b"y")])) == invalid
    assert problem(client.post("/v1/score", data={"photo": "x"}, files={"photo": b"y"})) == invalid
    assert problem(client.post("/v1/score/batch", files=[("photo", b"x")] * 100)) == invalid
    for kind in ("", "; boundary=", "; boundary=" + "b" * 500):
        headers = {"content-type": f"multipart/form-data{kind}"}
        assert problem(client.post("/v1/score", content=b"--b\r\n\r\nx", headers=headers)) == invalid, kind
    for charset in ("undefined", "idna"):
        headers = {"content-type": f"multipart/form-data; boundary=b; charset={charset}"}
        form = PART.replace(b"photo", b"\xff") + b"x\r\n--b--\r\n"
        assert problem(client.post("/v1/score", content=form, headers=headers)) == invalid, charset
    assert problem(client.get("/v1/score")) == (405, "method_not_allowed")
    assert problem(client.get("/secret/path")) == (404, "not_found")
    elsewhere = client.post("/v1/score/", headers={"host": "evil.example"}, files={"photo": b"x"})
    assert problem(elsewhere) == (404, "not_found"), "it is not sent on to what it says is this host"
    assert service[1].seen == []


@pytest.mark.parametrize(
    "body", [b'{"%s":0}' % b'":0,"'.join(b"%d" % n for n in range(5000)), b"[" * 5000 + b"]" * 5000]
)
def test_json_that_would_become_large_is_not_parsed(
    client: httpx2.Client, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.setattr(Reference, "model_validate_json", lambda _: pytest.fail("it was parsed"))
    response = client.post("/v1/score", content=body, headers={"content-type": "application/json"})
    assert problem(response) == (422, "invalid_request")


def test_json_with_faults_is_answered_with_a_few_of_them(client: httpx2.Client) -> None:
    body = {"k" * 60_000: 1} | {f"more {n}": n for n in range(1000)}
    said = client.post("/v1/score", json=body).json()["error_message"]
    assert said.count("Extra inputs") == 3
    assert len(said) < 300


def test_names_are_cut_and_harmless(client: httpx2.Client) -> None:
    said = upload(client, b"x", "a\r\nb" + "c" * 400 + ".jpg").json()["uri"]
    assert len(said) <= 255
    assert said.isprintable()


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_a_photo_that_is_too_large(client: httpx2.Client, service: tuple[httpx2.Client, Replicas]) -> None:
    assert upload(client, b"x" * LIMITS.max_bytes).status_code == 200
    large = b"x" * (LIMITS.max_bytes + 1)
    assert problem(upload(client, large)) == (413, "too_many_bytes")
    assert problem(client.post("/v1/score", json={"base64": base64.b64encode(large).decode()})) == (
        413,
        "too_many_bytes",
    )
    batch = [("photo", b"x"), ("photo", large)]
    assert problem(client.post("/v1/score/batch", files=batch)) == (413, "too_many_bytes")
    assert len(service[1].seen) == 1


def test_no_photo_goes_to_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starlette would put uploads of more than a megabyte into a temporary file."""
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", lambda _: pytest.fail("it went to disk"))
    large = b"x" * 3_000_000
    with served(replace(RULES, limits=Limits(max_bytes=4_000_000))) as (client, replicas):
        assert upload(client, large).status_code == 200
        assert client.post("/v1/score/batch", files=[("photo", large)] * 3).status_code == 200
        assert [data for data, _ in replicas.seen] == [large] * 4


class Raw:
    """A client without manners."""

    def __init__(self, client: httpx2.Client) -> None:
        self._socket = socket.create_connection((client.base_url.host, client.base_url.port), timeout=30)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, *parts: bytes) -> None:
        self._socket.sendall(b"".join(parts))

    def send_until_answered(self, part: bytes, most_bytes: int) -> int:
        """Send the same part again and again; bytes that were sent when the other side had enough."""
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < most_bytes:
                self._socket.settimeout(0)
                with contextlib.suppress(BlockingIOError):
                    if self._socket.recv(1, socket.MSG_PEEK) is not None:
                        break
                self._socket.settimeout(30)
                self._socket.sendall(part)
                sent += len(part)
        return sent

    def read_answer(self) -> bytes:
        """What comes next, of an answer that fits one piece."""
        self._socket.settimeout(30)
        return self._socket.recv(65536)

    def read(self) -> bytes:
        """All that comes until the connection ends."""
        self._socket.settimeout(30)
        found = b""
        with contextlib.suppress(ConnectionError):
            while part := self._socket.recv(65536):
                found += part
        return found


def head(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


FORM = "Content-Type: multipart/form-data; boundary=b"
PART = b'--b\r\nContent-Disposition: form-data; name="photo"; filename="a"\r\n\r\n'


def test_a_length_that_is_told_is_refused_before_the_body(client: httpx2.Client) -> None:
    with Raw(client) as raw:
        raw.send(head("/v1/score", FORM, "Content-Length: 1000000000"))
        assert raw.read().startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("path", ["/v1/score", "/v1/score/batch"])
def test_a_body_without_end_is_cut_off(client: httpx2.Client, path: str) -> None:
    limit, chunk = RULES.body_bytes(path), b"x" * 16384
    with Raw(client) as raw:
        raw.send(head(path, FORM, "Transfer-Encoding: chunked"))
        raw.send(f"{len(PART):x}\r\n".encode(), PART, b"\r\n")
        sent = raw.send_until_answered(b"4000\r\n" + chunk + b"\r\n", 100 * limit)
        assert raw.read().startswith(b"HTTP/1.1 413 ")
    assert sent < 3 * limit + 2**23, "beyond the limit there is what lies in the sockets' buffers"


def test_parts_without_end_are_cut_off(client: httpx2.Client) -> None:
    part = PART + b"\r\n"
    with Raw(client) as raw:
        raw.send(head("/v1/score/batch", FORM, "Transfer-Encoding: chunked"))
        raw.send_until_answered(f"{len(part):x}\r\n".encode() + part + b"\r\n", 2**24)
        assert raw.read().startswith(b"HTTP/1.1 422 ")


def test_many_bodies_at_once_are_too_many() -> None:
    """Each is within its limit, and none is whole: what is held is bounded all the same. One more is read and thrown
    away before it is refused: a connection that ends on bytes nobody has read takes the answer along."""
    with served(replace(RULES, timeout_s=60.0)) as (client, _), contextlib.ExitStack() as stack:
        for number in range(17):  # of sixteen that have 200000 bytes
            raw = stack.enter_context(Raw(client))
            raw.send(head("/v1/score", FORM, "Content-Length: 200000"), PART, b"x" * 180_000)
            wait_until(lambda number=number: metric(client, "picinspector_held_bytes") >= (number + 1) * 180_000)
        held_bytes = metric(client, "picinspector_held_bytes")
        response = upload(client, b"x" * 190_000)
        assert problem(response) == (503, "busy")
        assert "connection" not in response.headers
        assert metric(client, "picinspector_held_bytes") == held_bytes
        assert client.get("/v1/health").status_code == 200


@pytest.mark.parametrize("how", ["url", "base64"])
def test_what_a_request_brings_in_is_held_like_its_body(how: str) -> None:
    rules = replace(RULES, allow_private=True, timeout_s=60.0)
    with website() as site, served(rules) as (client, replicas):
        photo = {"url": f"{site}/wait"} if how == "url" else {"base64": base64.b64encode(b"wait" * 40_000).decode()}
        body = json.dumps(photo).encode()
        post = threading.Thread(
            target=client.post,
            args=("/v1/score",),
            kwargs={"content": body, "headers": {"content-type": "application/json"}},
        )
        post.start()
        wait_until(lambda: replicas.seen)
        assert metric(client, "picinspector_held_bytes") == len(body) + 160_000
        replicas.go.set()
        post.join()
        assert metric(client, "picinspector_held_bytes") == 0


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_body_that_does_not_come_and_an_answer_that_does_not() -> None:
    with served(replace(RULES, timeout_s=0.5)) as (client, _):
        with Raw(client) as raw:
            raw.send(head("/v1/score", FORM, "Content-Length: 1000"), PART)
            assert raw.read().startswith(b"HTTP/1.1 408 ")
        assert problem(upload(client, b"slow")) == (504, "timeout")
        assert problem(client.post("/v1/score/batch", files=[("photo", b"slow"), ("photo", b"x")])) == (504, "timeout")


def test_a_client_that_leaves_is_forgotten(
    client: httpx2.Client, service: tuple[httpx2.Client, Replicas], caplog: pytest.LogCaptureFixture
) -> None:
    """Before its photo is here, and while it is judged: nobody would read what comes of it."""
    with Raw(client) as raw:
        raw.send(head("/v1/score", FORM, "Content-Length: 1000"), PART)
        wait_until(lambda: metric(client, "picinspector_held_bytes") > 0)
    wait_until(lambda: metric(client, "picinspector_held_bytes") == 0)
    photo = PART + b"wait\r\n--b--\r\n"
    with caplog.at_level(logging.INFO, "picinspector"):
        with Raw(client) as raw:
            raw.send(head("/v1/score", FORM, f"Content-Length: {len(photo)}"), photo)
            wait_until(lambda: service[1].seen)
        wait_until(lambda: metric(client, "picinspector_requests_open") == 1)  # the one that asks
    assert service[1].cancelled == [b"wait"]
    assert {one["status"] for one in logged(caplog, "request") if one["path"] == "/v1/score"} == {499}


def test_what_is_still_to_come_of_a_request_is_not_waited_for(client: httpx2.Client) -> None:
    with Raw(client) as raw:
        raw.send(b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        said = raw.read()
    assert said.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nconnection: close\r\n" in said
    assert "connection" not in client.get("/v1/health").headers


# --- too much ---------------------------------------------------------------------------------------------------------


def test_what_finds_no_place_is_refused_before_it_is_parsed() -> None:
    """But read to its end: the answer would be lost with a connection that ends on bytes nobody has read."""
    rules = replace(RULES, timeout_s=60.0)
    with served(rules, capacity=Capacity(workers=1, places=2)) as (client, replicas):
        posts = [threading.Thread(target=upload, args=(client, b"wait %d" % n)) for n in range(2)]
        for post in posts:
            post.start()
        wait_until(lambda: len(replicas.seen) == 2)
        no_form = b"x" * 250_000
        for path in ("/v1/score", "/v1/score/batch"):
            response = client.post(path, content=no_form, headers={"content-type": FORM.partition(": ")[2]})
            assert problem(response) == (503, "busy")
            assert "connection" not in response.headers
            assert metric(client, "picinspector_held_bytes") < 1000, "that of the two"
        with Raw(client) as raw:  # it asks before it sends, and is spared it
            raw.send(head("/v1/score", FORM, "Content-Length: 1000", "Expect: 100-continue"))
            assert raw.read().startswith(b"HTTP/1.1 503 ")
        assert client.get("/v1/models").status_code == 200
        replicas.go.set()
        for post in posts:
            post.join()
        assert upload(client, b"good").status_code == 200
        assert len(replicas.seen) == 3


def test_who_still_waits_when_time_is_up_shall_come_again() -> None:
    """The one before it did not, and took too long by itself."""
    with served(replace(RULES, timeout_s=1.0), capacity=Capacity(workers=1, places=9)) as (client, replicas):
        for _ in range(3):  # that it takes a photo no time is seen by now
            upload(client, b"good")
        replicas.seen.clear()
        answers: list[tuple[int, str]] = []
        first = threading.Thread(target=lambda: answers.append(problem(upload(client, b"slow 1"))))
        first.start()
        wait_until(lambda: replicas.seen)
        response = upload(client, b"slow 2")
        assert problem(response) == (503, "busy")
        assert "waited" in response.json()["error_message"]
        first.join()
        assert answers == [(504, "timeout")]


# --- who may ask ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded() -> Iterator[httpx2.Client]:
    with served(replace(RULES, token=TOKEN)) as (client, _):
        yield client


@pytest.mark.parametrize("path", ["/v1/health", "/v1/ready", "/"])
def test_these_are_open(guarded: httpx2.Client, path: str) -> None:
    assert guarded.get(path).status_code == 200


@pytest.mark.parametrize("header", [None, "", "Bearer", "Basic " + TOKEN, "Bearer x" + TOKEN, "Bearer \xe9"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/nothing", "/v1/score", "//v1/health"])
def test_the_rest_needs_the_token(guarded: httpx2.Client, path: str, header: str | None) -> None:
    headers = [] if header is None else [(b"authorization", header.encode("latin-1"))]
    response = guarded.request("POST" if path == "/v1/score" else "GET", f"{guarded.base_url}{path}", headers=headers)
    assert problem(response) == (401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"


def test_the_token_opens(guarded: httpx2.Client) -> None:
    for scheme in ("Bearer", "bearer"):
        headers = {"authorization": f"{scheme} {TOKEN}"}
        assert guarded.get("/v1/models", headers=headers).status_code == 200
        assert upload(guarded, b"x", headers=headers).status_code == 200
    described = guarded.get("/openapi.json", headers=headers).json()
    assert described["components"]["securitySchemes"] == {"bearer": {"type": "http", "scheme": "bearer"}}
    assert described["paths"]["/v1/score"]["post"]["security"] == [{"bearer": []}]


def test_without_the_token_no_body_is_read(guarded: httpx2.Client) -> None:
    with Raw(guarded) as raw:
        raw.send(head("/v1/score", FORM, "Content-Length: 200000"), PART)
        assert raw.read().startswith(b"HTTP/1.1 401 ")


def test_only_names_of_this_machine() -> None:
    with served(replace(RULES, local_only=True)) as (client, _):
        for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 200, host
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
            assert problem(client.get("/v1/models", headers={"host": host})) == (421, "misdirected"), host


def test_only_pages_of_this_service() -> None:
    """A page from anywhere may send a form to any address, though it cannot read the answer."""
    with served(replace(RULES, local_only=True)) as (client, replicas):
        own = str(client.base_url).rstrip("/")
        for headers in ({}, {"origin": own}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}):
            assert upload(client, b"x", headers=headers).status_code == 200, headers
        others = [{"origin": origin} for origin in ("https://evil.example", "null", own + "0", "http://localhost")]
        for headers in (*others, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}):
            assert problem(upload(client, b"x", headers=headers)) == (403, "cross_origin"), headers
        assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200, "a link to it"
        assert len(replicas.seen) == 4


def test_it_does_not_start_where_others_may_come_without_a_token() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com"):
        with pytest.raises(UsageError, match="--allow-public-without-token"):
            run(Settings(host=host), print)
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1")))


def test_tokens(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PICINSPECTOR_TOKEN", raising=False)
    assert token_from(None) is None
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert token_from(str(tmp_path / "token")) == TOKEN
    monkeypatch.setenv("PICINSPECTOR_TOKEN", TOKEN[::-1])
    assert token_from(None) == TOKEN[::-1]
    assert "PICINSPECTOR_TOKEN" not in os.environ, "what Ray starts would inherit it"
    monkeypatch.setenv("PICINSPECTOR_TOKEN", TOKEN[::-1])
    assert token_from(str(tmp_path / "token")) == TOKEN
    assert "PICINSPECTOR_TOKEN" not in os.environ
    with pytest.raises(UsageError, match="cannot be read"):
        token_from(str(tmp_path / "nothing"))
    for bad in ("short", "ü" * 20, "with spaces in between it"):
        monkeypatch.setenv("PICINSPECTOR_TOKEN", bad)
        with pytest.raises(UsageError) as found:
            token_from(None)
        assert bad not in str(found.value)
    assert TOKEN not in repr(Settings(rules=Rules(token=TOKEN)))


def test_the_log_says_what_happened_and_no_secrets(guarded: httpx2.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "picinspector"):
        headers = {"authorization": f"Bearer {TOKEN}"}
        guarded.post("/v1/score?key=hidden", files={"photo": ("holiday.jpg", b"x" * 10)}, headers=headers)
        guarded.get("/hidden-path?hidden=1", headers=headers)
        wait_until(lambda: "other" in [one["path"] for one in logged(caplog, "request")])
    events = logged(caplog, "request")[-2:]
    assert [(one["method"], one["path"], one["status"]) for one in events] == [
        ("POST", "/v1/score", 200),
        ("GET", "other", 404),
    ]
    assert events[0]["bytes"] > 10
    assert events[0]["ms"] >= 0
    for secret in ("hidden", TOKEN, "holiday"):
        assert secret not in caplog.text + json.dumps(events)


# --- URLs -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def website() -> Iterator[str]:
    """A photo, but for: `/large`, `/wait` (of 160000 bytes), `/never`, and a status, which it answers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/never":
                time.sleep(2)
                return
            self.send_response(int(self.path[1:]) if self.path[1:].isdecimal() else 200)
            body = {"/large": b"x" * 300_000, "/wait": b"wait" * 40_000}.get(self.path, b"x" * 10)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/photo.jpg",
        "http://localhost:{port}/photo.jpg",
        "http://[::1]/",
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/",
        "http://0x7f000001/",
        "http://[::ffff:127.0.0.1]/",
        "file:///etc/passwd",
        "s3://bucket/photo.jpg",
        "gopher://127.0.0.1/",
        "http://user:password@example.com/",
        "/etc/passwd",
        "",
    ],
)
def test_addresses_that_are_not_fetched(client: httpx2.Client, url: str) -> None:
    with website() as site:
        response = client.post("/v1/score", json={"url": url.format(port=site.rpartition(":")[2])})
    assert problem(response) == (422, "invalid_request")
    assert "password" not in response.json()["error_message"].replace("user or password", "")


def test_a_photo_from_the_web() -> None:
    with website() as site, served(replace(RULES, allow_private=True)) as (client, replicas):
        response = client.post("/v1/score", json={"url": f"{site}/photo.jpg?sig=hidden"})
        assert response.json()["uri"] == f"{site}/photo.jpg"
        assert "hidden" not in response.text
        assert replicas.seen == [(b"x" * 10, f"{site}/photo.jpg")]
        assert problem(client.post("/v1/score", json={"url": f"{site}/large"})) == (413, "too_many_bytes")


def test_a_url_that_cannot_be_had() -> None:
    """What may pass by itself is told by a status that says so."""
    with website() as site, served(replace(RULES, allow_private=True, timeout_s=1.0)) as (client, _):

        def ask(url: str) -> httpx2.Response:
            return client.post("/v1/score", json={"url": url})

        assert problem(ask(f"{site}/404")) == (422, "not_found")
        assert problem(ask(f"{site}/403")) == (422, "access_denied")
        assert problem(ask(f"{site}/500")) == (502, "connection")
        assert problem(ask(f"{site}/429")) == (503, "throttled")
        assert ask(f"{site}/429").headers["retry-after"]
        assert problem(ask(f"{site}/never")) == (504, "timeout")
        with socket.create_server(("127.0.0.1", 0)) as nobody:
            port = nobody.getsockname()[1]
        assert problem(ask(f"http://127.0.0.1:{port}/")) == (502, "connection")


def test_headers_that_keep_browsers_careful(client: httpx2.Client) -> None:
    for path in ("/", "/v1/health", "/v1/models", "/nothing"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers


def test_errors_are_of_one_family() -> None:
    error = RequestError(503, "busy", "come again", {"retry-after": "2"})
    assert error.to_response().headers["retry-after"] == "2"
