"""The service as a whole, on a real Ray Serve: the same scores as a run, hostile photos, overload, the end."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs import demo
from picinspector import schema
from picinspector.bundle import open_bundle
from picinspector.photo import Limits
from picinspector.serve.problems import ReplicaError
from picinspector.serve.replica import Replica
from picinspector.serve.settings import Rules
from picinspector.tables import Destination
from tests import service
from tests.poison import HAZARDS, poison
from tests.test_serve_front import Replicas, problem, served

TOKEN = "a-token-that-is-long-enough"
HEADERS = {"authorization": f"Bearer {TOKEN}"}
MEGAPIXELS = 2.0
#: Of 103 files of the demo's library: sound photos of all subjects and faults of all kinds, and all that are broken.
CHOICE = ("*/pristine.jpg", "coffee/*-strong.jpg", "broken/*")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    whole, folder = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("library")
    demo.build_library(whole)
    for file in sorted({file for pattern in CHOICE for file in whole.glob(pattern)}):
        (folder / file.parent.name).mkdir(exist_ok=True)
        shutil.copy(file, folder / file.parent.name)
    return folder


@pytest.fixture(scope="module")
def scored(library: Path) -> dict[str, dict[str, Any]]:
    """What a run says of the library, by `<subject>/<file>`."""
    out = library.parent / "tables"
    command = [sys.executable, "-m", "picinspector", "score", str(library), "--out", str(out), "--quiet"]
    command += ["--max-megapixels", str(MEGAPIXELS)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = Destination(str(out)).latest("scores", schema.SCORES.names).to_pylist()
    return {"/".join(Path(row["uri"]).parts[-2:]): row for row in rows}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[service.Service]:
    log = tmp_path_factory.mktemp("service") / "log"
    arguments = ("--queue", "8", "--max-megapixels", str(MEGAPIXELS), "--max-megabytes", "8", "--timeout", "100")
    with service.start(log, *arguments, PICINSPECTOR_TOKEN=TOKEN, PICINSPECTOR_LOG="json") as started:
        yield started


@pytest.fixture(scope="module")
def client(running: service.Service) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=running.url, headers=HEADERS, timeout=120) as started:
        yield started


def upload(client: httpx2.Client, data: bytes, name: str = "a.jpg") -> httpx2.Response:
    return client.post("/v1/score", files={"photo": (name, data)})


def jpeg(width: int = 320, height: int = 240, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG")
    return buffer.getvalue()


def differences(answer: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Columns in which an answer is not what a run wrote, but for what the photo is called.

    Scores on 1-10 and probabilities to 0.001, attributes on 0-100 to 0.1: a batch's size moves sums of float32.
    """
    own = {"image_id", "uri", "etag", "last_modified", "caption", "caption_source"}  # a run was asked for no captions
    found = {}
    for name, value in row.items():
        expected: Any = value
        if isinstance(value, float):
            expected = pytest.approx(value, abs=0.1 if name.startswith("attribute_") else 1e-3, rel=0)
        if name not in own and answer[name] != expected:
            found[name] = (answer[name], value)
    return found


def test_a_photo_gets_the_scores_that_a_run_gives_it(
    scored: dict[str, dict[str, Any]], library: Path, client: httpx2.Client
) -> None:
    """One by one, and all together in one batch, in which each has other company."""
    files = {name: (library / name).read_bytes() for name in scored}
    batch = client.post("/v1/score/batch", files=[("photo", (name, data)) for name, data in files.items()])
    assert batch.status_code == 200
    together = {photo["uri"]: photo for photo in batch.json()["photos"]}
    assert together.keys() == scored.keys()
    assert {name: differences(photo, scored[name]) for name, photo in together.items()} == {name: {} for name in scored}
    assert sum(photo["error_kind"] is None for photo in together.values()) >= 14
    for name in list(files)[:5]:
        answer = upload(client, files[name], name).json()
        if scored[name]["error_kind"] is None:
            assert differences(answer, scored[name]) == {}, name
            assert answer["facts"]["content_hash"] == answer["etag"]
        else:
            assert answer["error_kind"] == scored[name]["error_kind"]


def test_it_says_what_it_sees(client: httpx2.Client, library: Path) -> None:
    data = (library / "coffee" / "pristine.jpg").read_bytes()
    answer = client.post("/v1/score", json={"base64": base64.b64encode(data).decode()}).json()
    assert answer["quality_low"] <= answer["quality_score"] <= answer["quality_high"]
    assert answer["caption"].startswith("This photo")
    assert answer["caption_source"] == "composed"
    assert answer["measurements"]["sharpness"] > 0
    assert (answer["facts"]["width"], answer["facts"]["format"]) == (600, "JPEG")


def test_the_rest_of_the_api(client: httpx2.Client, running: service.Service) -> None:
    with httpx2.Client(base_url=running.url) as stranger:
        assert stranger.get("/v1/health").status_code == 200
        assert stranger.get("/v1/ready").json() == {"status": "ok"}
        assert stranger.get("/v1/models").status_code == 401
        assert upload(stranger, jpeg()).status_code == 401
    assert client.get("/v1/models").json()["scorer_fingerprint"] == open_bundle().scorer_fingerprint
    assert client.post("/v1/score", json={"url": f"{running.url}/v1/health"}).status_code == 422, "that is loopback"


# --- hostile photos ---------------------------------------------------------------------------------------------------


def test_hostile_photos_are_named_and_nothing_else_happens(client: httpx2.Client, library: Path) -> None:
    whole = jpeg()
    hostile = {
        "empty": b"",
        "unknown_format": b"Dear diary",
        "truncated": whole[: len(whole) // 2],
        "too_many_pixels": (library / "broken" / "bomb.png").read_bytes(),
    }
    for kind, data in hostile.items():
        response = upload(client, data, "a.png")
        assert response.status_code == (413 if kind == "too_many_pixels" else 422)
        assert response.json()["error_kind"] == kind
        assert set(response.json()) == {"error_kind", "error_message"}
    assert upload(client, jpeg(2000, 1500)).status_code == 413, "three megapixels"
    assert upload(client, whole).status_code == 200


@settings(
    max_examples=40, deadline=None, phases=(Phase.generate,), derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.integers(0, 2**32 - 1), st.sampled_from(["bytes", "damaged", "headed"]))
def test_fuzzed_uploads(client: httpx2.Client, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(jpeg(64, 48, seed)) if kind == "damaged" else bytearray(rng.bytes(int(rng.integers(0, 5000))))
    if kind == "damaged":
        for place in rng.integers(0, len(data), 20):
            data[place] = int(rng.integers(0, 256))
    if kind == "headed":
        heads = (
            b"\xff\xd8\xff",
            b"\x89PNG\r\n\x1a\n",
            b"GIF89a",
            b"BM",
            b"II*\0",
            b"RIFF\0\0\0\0WEBP",
            b"\0\0\0 ftypheic",
        )
        data[:0] = heads[seed % len(heads)]
    response = upload(client, bytes(data), "a.jpg")
    assert response.status_code in {200, 413, 422}
    assert "Traceback" not in response.text


#: Of a request. Its photo may take four seconds of a processor, or six by the clock.
TIMEOUT_S = 12.0


@pytest.fixture(scope="module")
def replica(tiny: Path) -> Replica:
    """One in this process, where photos can be poison and models can be made to fail."""
    return Replica(
        bundle=str(tiny), fingerprints={}, limits=HAZARDS, captions=False, threads=1, decoders=2, batch_size=4,
        timeout_s=TIMEOUT_S,
    )  # fmt: skip


def test_a_photo_that_hangs_in_its_decoder_is_named_before_time_is_up(replica: Replica) -> None:
    class InProcess(Replicas):
        async def judge(self, data: bytes, name: str) -> dict[str, Any]:
            seen = await asyncio.to_thread(replica._decode, data, name)
            return replica._judge([seen])[0]

    answers: dict[str, tuple[int, str]] = {}
    with served(Rules(timeout_s=TIMEOUT_S), replicas=InProcess()) as (client, _):

        def ask(act: str) -> None:
            answers[act] = problem(upload(client, poison(act)))

        threads = [threading.Thread(target=ask, args=(act,)) for act in ("hang", "spin")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {"hang": (422, "crashed"), "spin": (422, "crashed")}


def test_a_photo_that_kills_its_decoder_takes_nothing_along(replica: Replica) -> None:
    seen = replica._decode(poison("segfault"), "a.png")
    assert (seen["error_kind"], len(seen["etag"])) == ("crashed", 32)
    good = replica._decode(jpeg(), "b.jpg")
    [bad, row] = replica._judge([seen, good])
    assert bad["quality_score"] is None
    assert 1 <= row["quality_score"] <= 10


def test_a_replica_whose_models_fail_for_good_is_found_out(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a device that is lost to its process. A batch that failed by itself is none."""

    def broken(_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    asyncio.run(replica.check_health())
    with monkeypatch.context() as lost:
        lost.setattr(replica, "_stages", [broken])
        asyncio.run(replica.check_health())  # it cannot know yet
        with pytest.raises(RuntimeError):
            replica._judge_watched(replica._seen_sample)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="CUDA"):
                asyncio.run(replica.check_health())
    asyncio.run(replica.check_health())


def test_a_replica_whose_models_hang_is_found_out(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    busy, go = threading.Event(), threading.Event()

    def hang(rows: object) -> object:
        busy.set()
        go.wait()
        raise RuntimeError("at last")

    def judge() -> None:
        with contextlib.suppress(RuntimeError):
            replica._judge_watched(replica._seen_sample)

    monkeypatch.setattr(replica, "_timeout_s", 0.0)
    asyncio.run(replica.check_health())
    with monkeypatch.context() as hanging:
        hanging.setattr(replica, "_stages", [hang])
        thread = threading.Thread(target=judge)
        thread.start()
        busy.wait()
        with pytest.raises(RuntimeError, match="have not answered"):
            asyncio.run(replica.check_health())
        go.set()
        thread.join()
    asyncio.run(replica.check_health())


def test_a_replica_tells_where_it_failed(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(replica, "_decode", broken)
    with pytest.raises(ReplicaError) as told:
        asyncio.run(replica.judge(b"", "a.jpg"))
    assert told.value.error == "ZeroDivisionError"
    assert "broken" in told.value.at


def test_another_bundle_than_the_drivers_is_refused(tiny: Path) -> None:
    from picinspector.errors import BundleError

    with pytest.raises(BundleError, match="install the same"):
        Replica(str(tiny), {"scorer": "another"}, Limits(), False, 1, 1, 4, 1.0)


# --- the OpenAPI ------------------------------------------------------------------------------------------------------


def test_the_service_does_as_its_openapi_says(running: service.Service) -> None:
    """Requests as the document has them, and those that break it: what comes back is what it promises.

    All of Schemathesis' checks but one: that what fits the document is accepted. Most bytes are no photo.
    """
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{running.url}/openapi.json"]
    command += ["--header", f"Authorization: {HEADERS['authorization']}", "--max-examples", "10", "--no-color"]
    command += [
        "--exclude-checks",
        "positive_data_acceptance",
        "--generation-deterministic",
        "--request-timeout",
        "100",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Tested: 5" in done.stdout


# --- too much, and the end --------------------------------------------------------------------------------------------


def test_overload_is_turned_away_and_nothing_fails(running: service.Service, client: httpx2.Client) -> None:
    """Of 120 at once 40 have a place (two batches and the queue); the others are told to come again."""

    async def flood() -> list[httpx2.Response]:
        pool = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=running.url, headers=HEADERS, timeout=200, limits=pool) as crowd:
            photos = [jpeg(seed=seed) for seed in range(120)]
            return await asyncio.gather(*(crowd.post("/v1/score", files={"photo": data}) for data in photos))

    answers = asyncio.run(flood())
    counts = Counter(answer.status_code for answer in answers)
    assert set(counts) == {200, 503}, counts
    assert counts[200] >= 32
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["error_kind"] == "busy"
            assert int(answer.headers["retry-after"]) >= 1
    assert upload(client, jpeg()).status_code == 200


def test_the_log_is_of_json_without_names_or_tokens(running: service.Service, client: httpx2.Client) -> None:
    form = {"content-type": "multipart/form-data; boundary=b"}
    assert client.post("/v1/score", content=b"this is none", headers=form).status_code == 422
    with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as raw:
        raw.sendall(b"nor is this HTTP\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400 ")
    upload(client, jpeg(), "holiday.jpg")
    deadline, requests = time.monotonic() + 60, [("POST", "/v1/score", 422), ("POST", "/v1/score", 200)]
    while True:  # the answer is out before its line
        text = running.log.read_text("utf-8")
        _, _, after = text.partition(f"listening on {running.url}\n")
        lines = [json.loads(line) for line in after.splitlines()]
        told = [(line["method"], line["path"], line["status"]) for line in lines if line["event"] == "request"]
        if told[-2:] == requests or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert told[-2:] == requests
    assert TOKEN not in text
    assert "holiday" not in text
    assert "Traceback" not in text
    assert not [line for line in lines if line["level"] == "error"]


def test_asked_to_end_it_finishes_what_it_has(running: service.Service, client: httpx2.Client) -> None:
    """The last test of this file: the service is gone after it."""
    answers: list[int] = []
    photos = [jpeg(1600, 1200, seed) for seed in range(8)]
    threads = [
        threading.Thread(target=lambda data=data: answers.append(upload(client, data).status_code)) for data in photos
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while "picinspector_requests_open 9.0" not in (client.get("/metrics").text) and time.monotonic() < deadline:
        time.sleep(0.01)
    before = len(answers)
    assert running.end() == 0
    for thread in threads:
        thread.join()
    assert answers == [200] * 8
    assert before < 8, "there was nothing to finish"
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{running.url}/v1/health")
