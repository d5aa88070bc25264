"""What a run says while it works: stages, metrics, events; and that no secret is in any of it."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from urllib.parse import unquote

import fsspec
import pyarrow as pa
import pytest
import ray
from fsspec.implementations.memory import MemoryFileSystem

from picinspector import logs, progress, redaction, schema, storage
from picinspector.cli import main
from picinspector.manifest import list_library
from picinspector.photo import Limits
from picinspector.redaction import redact, scrub
from picinspector.stages import Batch, count_kinds, describe_batch, peak_memory_bytes
from picinspector.stages.read import read_photos
from picinspector.storage import StorageOptions
from tests.s3_server import S3Server
from tests.test_pipeline import make_library

SECRET = "SEKRET-9f8e7d6c5b4a"


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """What one test hides or logs must not matter to another."""
    logger = logging.getLogger("picinspector")
    kept = (set(redaction._hidden), logger.handlers, logger.level, logger.propagate)
    yield
    redaction._hidden.clear()
    redaction._hidden.update(kept[0])
    logger.handlers, logger.level, logger.propagate = kept[1], kept[2], kept[3]
    logs.set_run(None)


@pytest.fixture
def as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICINSPECTOR_LOG", "json")


def batch(
    stage: str,
    rows: int,
    busy_s: float,
    worker: str = "a:1",
    errors: dict[str, int] | None = None,
    memory: int = 1,
    device: int | None = None,
) -> Batch:
    return Batch(stage, rows, errors or {}, busy_s, worker, memory, device)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# --- stages -----------------------------------------------------------------------------------------------------------


def test_a_stage_adds_up() -> None:
    stage = progress._Stage()
    stage.add(batch("encode", 10, 2.0, "a:1", memory=500, device=7, errors={"internal": 1}), now=10.0)
    stage.add(batch("encode", 40, 4.0, "b:1", memory=300, device=9, errors={"internal": 1, "corrupt": 2}), now=20.0)
    assert stage.rate() == 4.0, "40 rows in the 10 s after the first batch"
    assert stage.record("encode") == {
        "rows": 50,
        "busy_s": 6.0,
        "span_s": 12.0,  # from 8, when the first batch began
        "photos_per_busy_s": 8.333,
        "workers": 2,
        "peak_memory_bytes": 500,
        "errors_by_kind": {"internal": 2, "corrupt": 2},
        "peak_device_bytes": 9,
        "use": 0.25,  # 6 of 2 x 12 s
    }
    read = stage.record("read")
    assert "use" not in read and read["fetch_s"] == 0.0
    assert progress._Stage().rate() == 0


def test_reading_says_what_it_waited_for_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(uris: Sequence[str], *_: object) -> list[bytes]:
        time.sleep(0.3)
        return [b"not a photo"] * len(uris)

    monkeypatch.setattr("picinspector.stages.read.fetch", fetch)
    (tmp_path / "a.jpg").write_bytes(b"not a photo")
    batches: list[Batch] = []
    files = pa.concat_tables(list_library(str(tmp_path)))
    read_photos(files, {}, Limits(), report=batches.append)
    assert 0.3 <= batches[0].fetch_s <= batches[0].busy_s


def test_a_batch_describes_its_process() -> None:
    hoard = b"x" * 50_000_000
    started = time.perf_counter() - 3.0
    described = describe_batch("read", 4, count_kinds(pa.chunked_array([["empty", None, "corrupt", "empty"]])), started)
    assert described[:3] == ("read", 4, {"empty": 2, "corrupt": 1})
    assert 3.0 <= described.busy_s < 60.0
    assert len(hoard) < described.memory_bytes < 64e9, "bytes, not KiB"
    assert described.memory_bytes <= peak_memory_bytes()
    assert json.loads(json.dumps(described._asdict())) == described._asdict()


def test_a_device_is_asked_for_its_peak_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def device(started: bool) -> int | None:
        cuda = SimpleNamespace(is_initialized=lambda: started, max_memory_allocated=lambda: 3_000_000)
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        return describe_batch("encode", 1, {}, time.perf_counter()).device_bytes

    assert device(started=True) == 3_000_000 and device(started=False) is None
    monkeypatch.delitem(sys.modules, "torch")
    assert describe_batch("read", 1, {}, time.perf_counter()).device_bytes is None
    assert "torch" not in sys.modules, "a reader does without"


@ray.remote(num_cpus=0)
def send(report: progress.Reporter, batches: list[Batch]) -> None:
    for item in batches:
        report(item)


def metrics() -> dict[str, float]:
    """What the node's Prometheus endpoint says of ours: series (labels that are Ray's own left out) to value."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("ray_picinspector_"):
            name, _, rest = line.partition("{")
            labels, _, value = rest.rpartition("} ")
            own = [part for part in labels.split(",") if part.startswith(("stage=", "kind=", "le="))]
            series = f"{name.removeprefix('ray_picinspector_')}{{{','.join(own)}}}"
            found[series] = found.get(series, 0.0) + float(value)
    return found


@pytest.mark.usefixtures("local_ray")
def test_reports_reach_the_record_and_rays_metrics() -> None:
    before = metrics()
    reads = [batch("read", 64, 0.5, f"a:{number}", errors={"empty": 3}) for number in range(2)]
    with progress.progress("embed", 200, show=False) as report:  # 72 of which never come
        ray.get(send.remote(report, [*reads, batch("encode", 100, 20.0, device=5), batch("encode", 28, 1.0, device=6)]))
    stages = report.stages()
    assert json.loads(json.dumps(stages)) == stages
    assert {name: (stage["rows"], stage["busy_s"], stage["workers"]) for name, stage in stages.items()} == {
        "read": (128, 1.0, 2),
        "encode": (128, 21.0, 1),
    }
    assert stages["read"]["errors_by_kind"] == {"empty": 6} and stages["encode"]["peak_device_bytes"] == 6
    assert report.rate > 0, "of encode, the last stage"

    expected = {
        'photos_total{stage="read"}': 128,
        'photos_total{stage="encode"}': 128,
        'errors_total{kind="empty"}': 6,
        'batch_seconds_count{stage="encode"}': 2,
        'batch_seconds_bucket{le="1.0",stage="encode"}': 1,
        'batch_seconds_bucket{le="30.0",stage="encode"}': 2,
        "photos_to_do{}": 72,
    }
    deadline = time.monotonic() + 30
    while (gained := gain(before, expected)) != expected and time.monotonic() < deadline:
        time.sleep(0.5)
    assert gained == expected


def gain(before: Mapping[str, float], series: Mapping[str, float]) -> dict[str, float]:
    """How much these series grew; they begin with a worker, and stay when it is gone."""
    after = metrics()
    return {name: after.get(name, 0.0) - before.get(name, 0.0) for name in series}


@pytest.mark.usefixtures("local_ray")
def test_a_tally_that_is_lost_takes_nothing_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    with progress.progress("score", 10, show=True) as report:
        ray.get(send.remote(report, [batch("score", 5, 0.1)]))
        ray.kill(report._actor)
        ray.get(send.remote(report, [batch("score", 5, 0.1)]))  # a worker that reports does not fail
        report(batch("score", 5, 0.1))
    assert report.rate == 0 and report.stages() == {}
    assert "warning: tally lost: stage=score reason=ActorDiedError" in capsys.readouterr().err


@pytest.mark.usefixtures("local_ray")
def test_progress_is_json_where_the_log_is(
    as_json: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LOG_S", 0.2)
    logs.configure()
    logs.set_run("run-1")
    with progress.progress("score", 10, show=True) as report:
        ray.get(send.remote(report, [batch("score", 5, 0.1, errors={"internal": 1})]))
        time.sleep(1.0)
    events = lines(capsys.readouterr().err)
    assert {event["event"] for event in events} == {"progress", "stage_finished"}
    assert all(event["run_id"] == "run-1" and event["level"] == "info" for event in events)
    shown = [event for event in events if event["event"] == "progress"]
    assert len(shown) > 2
    assert (shown[-1]["stage"], shown[-1]["done"], shown[-1]["total"], shown[-1]["errors"]) == ("score", 5, 10, 1)
    finished = next(event for event in events if event["event"] == "stage_finished")
    assert finished["stages"]["score"]["rows"] == 5


# --- the log ----------------------------------------------------------------------------------------------------------


def test_a_person_sees_warnings_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PICINSPECTOR_LOG", raising=False)
    logs.configure()
    logs.configure()  # twice is once
    logs.set_run("run-1")
    logs.event("planned", listed=5)
    logs.event("drift", level=logging.WARNING, psi=0.31, scene="night sky\n", table=None)
    assert capsys.readouterr().err == 'picinspector: warning: drift: run_id=run-1 psi=0.31 scene="night sky\\n"\n'


def test_a_program_gets_json(as_json: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    logs.event("planned", listed=5, by_kind={"new": 2}, path=Path("/a"))
    logs.set_run("run-1")
    logs.event("drift", level=logging.WARNING, psi=0.31)
    try:
        raise OSError(f"refused\nsecret={SECRET}")
    except OSError:
        logging.getLogger("picinspector.other").exception("odd %s", "s3://b/a?X-Amz-Signature=abc")
    planned, drift, other = lines(capsys.readouterr().err)
    assert planned.pop("ts").endswith("+00:00")
    assert planned == {
        "level": "info", "event": "planned", "run_id": None, "listed": 5, "by_kind": {"new": 2}, "path": "/a"
    }  # fmt: skip
    assert (drift["level"], drift["event"], drift["run_id"], drift["psi"]) == ("warning", "drift", "run-1", 0.31)
    assert (other["level"], other["event"]) == ("error", "log")
    assert other["message"] == "odd s3://b/a?… OSError('refused\\nsecret=…')"


def test_complaints_are_json_too(as_json: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["score", "https://user:pw@host/a.txt?sig=abc", "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    *_, event = lines(shown.err)
    assert (event["event"], event["level"], event["exit_code"]) == ("failed", "error", 2)
    assert shown.out == "" and "pw@" not in shown.err and "abc" not in shown.err


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        f"{{'key': 'me', 'secret': '{SECRET}', 'client_kwargs': {{'region_name': 'x'}}}}",
        f'{{"aws_session_token": "{SECRET} and more", "a": 1}}',
        f"S3FileSystem(key='me', secret='{SECRET}')",
        f"aws_secret_access_key={SECRET}",
        f"https://h/a.jpg?X-Amz-Credential=me&X-Amz-Signature={SECRET}",
        f"X-Amz-Security-Token={SECRET}&x=1",
        f"GET /a HTTP/1.1\r\nAuthorization: AWS4-HMAC-SHA256 Credential=me, Signature={SECRET}\r\nHost: h",
        f"headers {{'Authorization': 'Bearer {SECRET}', 'Host': 'h'}}",
        f"sent Bearer {SECRET} to h",
        f"https://me:{SECRET}@host/a.jpg",
        f"DefaultEndpointsProtocol=https;AccountKey={SECRET};EndpointSuffix=x",
        f"password='{SECRET} with blanks'",
    ],
)
def test_what_looks_like_a_secret_goes(text: str) -> None:
    assert SECRET not in redact(text)
    assert SECRET not in storage.to_photo_error(OSError(text)).message


@pytest.mark.parametrize(
    "text",
    [
        "NoSuchKey: Key=photos/cat.jpg {'Key': 'photos/cat.jpg'} key=photos/cat.jpg",
        "ExpiredToken: The provided token has expired",
        "tokens_in=512 monkey=1 signature of the file is unknown",
        "/photos/what?.jpg and s3://bucket/key.jpg and C:\\secret\\a.jpg",
        "the bearer of photos",
    ],
)
def test_what_does_not_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("piece", ["a", "token", "'secret': '", "key=", "authorization:", "bearer ", "a://b"])
def test_a_long_text_takes_no_long_time(piece: str) -> None:
    """Up to 1.7 s on two busy cores; with patterns that look back from each character it was minutes."""
    started = time.process_time()
    redact(piece * (100_000 // len(piece)))
    assert time.process_time() - started < 10


def test_values_of_options_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    redaction.hide({"key": "AKEYOFMINE", "client_kwargs": {"aws_secret_access_key": "s3cr/et+xx"}, "token": "test"})
    redaction.hide({"endpoint_url": "https://storage.example", "anon": False})
    text = "AKEYOFMINE s3cr/et+xx s3cr%2Fet%2Bxx a test at https://storage.example"
    assert redact(text) == "… … … a test at https://storage.example"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert redact(f"it is {SECRET}.") == "it is …."


def test_data_is_scrubbed() -> None:
    given = {"rows": 5, "options": {"secret": "x", "token": None}, "urls": ["https://h/a?b=c"], "tokens_in": 7}
    assert scrub(given) == {
        "rows": 5, "options": {"secret": "…", "token": None}, "urls": ["https://h/a?…"], "tokens_in": 7
    }  # fmt: skip


@pytest.mark.usefixtures("local_ray")
def test_a_whole_run_leaks_nothing(
    as_json: None,
    s3_server: S3Server,
    s3_bucket: str,
    tiny: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Options with keys, a signed URL and a failing run: not in logs of ours or Ray's, nor in anything stored."""
    make_library(tmp_path / "photos", 12)
    client = s3_server.client()
    for photo in (tmp_path / "photos").rglob("*.jpg"):
        client.upload_file(str(photo), s3_bucket, f"photos/{photo.name}")
    client.put_object(Bucket=s3_bucket, Key="photos/broken.jpg", Body=b"")
    signed = client.generate_presigned_url("get_object", Params={"Bucket": s3_bucket, "Key": "photos/001.jpg"})
    signature = re.search(r"Signature=([^&]+)", signed)
    assert signature is not None

    def score(library: str, out: str, **changes: str) -> int:
        options = json.dumps(s3_server.storage_options | changes)
        return main(["score", library, "--out", out, "--bundle", str(tiny), "--storage-options", options])

    out = f"s3://{s3_bucket}/out"
    assert score(f"s3://{s3_bucket}/photos", out) == 0
    assert score(f"s3://{s3_bucket}/photos", f"s3://{s3_bucket}/other", secret=SECRET) == 2
    (tmp_path / "list.txt").write_text(signed)
    assert score(str(tmp_path / "list.txt"), out) == 2
    assert score(signed, out) == 2

    shown = capfd.readouterr()
    events = lines(shown.err)
    said = [event["event"] for event in events if event["event"] != "progress"]
    told = ["lease_taken", "run_started", "planned", "stage_finished", "stage_finished", "committed"]
    assert said[: len(told)] == told and said[-1] == "failed"
    assert len({event["run_id"] for event in events[1 : events.index(committed(events))]}) == 1
    texts = {"stdout": shown.out.encode(), "stderr": shown.err.encode()}
    listed = client.list_objects_v2(Bucket=s3_bucket, Prefix="out/")["Contents"]
    for item in listed:
        texts[item["Key"]] = client.get_object(Bucket=s3_bucket, Key=item["Key"])["Body"].read()
    check_record(next(json.loads(text) for name, text in texts.items() if name.endswith("run.json")), photos=13)
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    files = [path for path in session.rglob("*") if path.is_file()]
    texts |= {str(path): path.read_bytes() for path in files}
    assert any(b"read_photos" in texts[str(path)] for path in files), "Ray's own logs tell of the run"
    secrets = (s3_server.secret_key, s3_server.access_key, SECRET, signature[1], unquote(signature[1]))
    leaks = [(name, secret) for name, text in texts.items() for secret in secrets if secret.encode() in text]
    assert not leaks


def committed(events: list[dict[str, Any]]) -> dict[str, Any]:
    return next(event for event in events if event["event"] == "committed")


def check_record(record: dict[str, Any], photos: int) -> None:
    """What a run's record says of its stages."""
    stages = record["stages"]
    assert {name: stage["rows"] for name, stage in stages.items()} == dict.fromkeys(("read", "encode", "score"), photos)
    assert [stage["errors_by_kind"] for stage in stages.values()] == [{"empty": 1}, {}, {}]
    assert 0 < stages["encode"]["use"] <= 1 and stages["encode"]["workers"] == 1
    for stage in stages.values():
        assert stage["busy_s"] > 0 and 50e6 < stage["peak_memory_bytes"] < 64e9
    assert 50e6 < record["peak_memory_bytes"] < 64e9


@pytest.mark.parametrize("name", ["", "botocore", "s3fs", "aiohttp", "fsspec"])
def test_clients_that_are_told_to_talk_do_not_tell_the_key(
    name: str, s3_server: S3Server, s3_bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody here sets them to DEBUG. Who does so sees request headers: signatures, but not what they are made with."""
    s3_server.client().put_object(Bucket=s3_bucket, Key="a.jpg", Body=b"photo")
    fsspec.filesystem("s3", **s3_server.storage_options).clear_instance_cache()
    with caplog.at_level(logging.DEBUG, logger=name or None):
        assert storage.fetch([f"s3://{s3_bucket}/a.jpg"], s3_server.storage_options) == [b"photo"]
    if name in ("", "botocore"):
        assert "Signature" in caplog.text, "the client talked"
    assert s3_server.secret_key not in caplog.text


class Leaky(MemoryFileSystem):
    """A store whose errors tell everything."""

    protocol = "leaky"
    store: ClassVar[dict[str, Any]] = {}

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        raise OSError(f"no luck with {SECRET} at https://me:pw@host{path}?X-Amz-Signature=abc123")


def test_an_exceptions_text_takes_no_secret_into_a_table() -> None:
    fsspec.register_implementation("leaky", Leaky, clobber=True)
    row: dict[str, Any] = dict.fromkeys(schema.MANIFEST.names) | {"image_id": "1", "uri": "leaky://b/a.jpg"}
    manifest = pa.Table.from_pylist([row], schema=schema.MANIFEST)
    photos = read_photos(manifest, {}, Limits(), StorageOptions({"secret": SECRET}))
    (message,) = photos.column("error_message").to_pylist()
    assert "no luck" in message
    assert not any(secret in message for secret in (SECRET, "pw@", "abc123"))
