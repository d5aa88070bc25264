"""Runs on a real S3 server behind a proxy that spoils requests, and one that goes away: no row is lost or doubled."""

from __future__ import annotations

import io
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from picinspector import pipeline, storage, tables
from picinspector.cli import main
from picinspector.errors import ErrorKind, PhotoError, PicInspectorError, StorageError
from picinspector.manifest import list_library
from picinspector.storage import fetch
from tests.fault_proxy import Fault, FaultProxy
from tests.s3_server import S3Server

#: What befalls whom. `once` and `twice` are over within the three attempts of a fetch, the others are not.
PASSING = {
    "slow-down-twice": Fault("SlowDown", r"^GET .*/slow-down-twice\.jpg", times=2),
    "internal-error-twice": Fault("InternalError", r"^GET .*/internal-error-twice\.jpg", times=2),
    "reset-mid-body-twice": Fault("reset", r"^GET .*/reset-mid-body-twice\.jpg", times=2),
    "refused-twice": Fault("refuse", r"^GET .*/refused-twice\.jpg", times=2),
    "cut-twice": Fault("long", r"^GET .*/cut-twice\.jpg", times=2),
    "short-length-twice": Fault("short", r"^GET .*/short-length-twice\.jpg", times=2),
    "hangs-once": Fault("hang", r"^GET .*/hangs-once\.jpg", times=1),
    "slow-body": Fault("slow", r"^GET .*/slow-body\.jpg"),
}
LASTING = {
    "slow-down": (Fault("SlowDown", r"^GET .*/slow-down\.jpg"), "throttled"),
    "internal-error": (Fault("InternalError", r"^GET .*/internal-error\.jpg"), "connection"),
    "reset-mid-body": (Fault("reset", r"^GET .*/reset-mid-body\.jpg"), "connection"),
    "cut": (Fault("long", r"^GET .*/cut\.jpg"), "connection"),
    "short-length": (Fault("short", r"^GET .*/short-length\.jpg"), "connection"),
    "hangs": (Fault("hang", r"^GET .*/hangs\.jpg"), "timeout"),
    "expired-token": (Fault("ExpiredToken", r"^GET .*/expired-token\.jpg"), "credentials"),
    "unknown-key": (Fault("InvalidAccessKeyId", r"^GET .*/unknown-key\.jpg"), "credentials"),
    "clock-skew": (Fault("RequestTimeTooSkewed", r"^GET .*/clock-skew\.jpg"), "credentials"),
}  # fmt: skip
#: Two seconds of silence end a request, and botocore leaves trying again to us.
IMPATIENT: dict[str, Any] = {"read_timeout": 2, "connect_timeout": 2, "retries": {"max_attempts": 0}}


def jpeg(seed: int) -> bytes:
    """A photo of smoothed noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (60, 80, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((160, 120)).save(buffer, "JPEG")
    return buffer.getvalue()


def put_photos(server: S3Server, bucket: str, names: list[str]) -> None:
    client = server.client()
    for seed, name in enumerate(names):
        client.put_object(Bucket=bucket, Key=f"photos/{name}.jpg", Body=jpeg(seed))


def options(bundle: Path, storage_options: dict[str, Any]) -> pipeline.Options:
    return pipeline.Options(bundle=str(bundle), show_progress=False, storage_options=storage_options)


def rows_of(server: S3Server, bucket: str, table: str, run_id: str) -> list[dict[str, Any]]:
    """A run's rows of a table as they lie in the bucket, by name of the photo: uri, image_id, error_kind."""
    store = fsspec.filesystem("s3", skip_instance_cache=True, **server.storage_options)
    rows = []
    for path in store.find(f"{bucket}/out/{table}/run_id={run_id}"):
        with store.open(path, "rb") as file:
            rows += pq.read_table(file, columns=["uri", "image_id", "error_kind", "error_message"]).to_pylist()
    return rows


def check_run(server: S3Server, bucket: str, record: dict[str, Any], expected: set[str]) -> dict[str, Any]:
    """Each expected photo has one row in both tables of a run, the same in both; name -> its error kind."""
    for table in ("embeddings", "scores"):
        rows = rows_of(server, bucket, table, record["run_id"])
        assert sorted(map(name_of, rows)) == sorted(expected)
        assert len({row["image_id"] for row in rows}) == len(rows) == record["counts"]["to_do"]
    kinds = {name_of(row): row["error_kind"] for row in rows}
    assert dict(Counter(kind for kind in kinds.values() if kind)) == record["counts"]["errors_by_kind"]
    return kinds


def name_of(row: dict[str, Any]) -> str:
    return str(row["uri"]).rsplit("/", 1)[1].removesuffix(".jpg")


def latest(server: S3Server, bucket: str) -> dict[str, dict[str, Any]]:
    """Name -> the newest committed scores row of a photo; fails where one has two."""
    dest = tables.Destination(f"s3://{bucket}/out", server.storage_options)
    rows = dest.latest("scores", ["uri", "image_id", "error_kind", "quality_score"]).to_pylist()
    assert len({row["uri"] for row in rows}) == len(rows)
    return {name_of(row): row for row in rows}


@pytest.mark.usefixtures("local_ray", "light_encoder")
def test_every_fault_of_reading_is_survived_or_a_row_and_healed_by_the_next_run(
    s3_server: S3Server, s3_bucket: str, tiny: Path
) -> None:
    client = s3_server.client()
    whole, gone = ["fine-1", "fine-2", *PASSING], ["denied", "replaced", "deleted"]
    put_photos(s3_server, s3_bucket, [*whole, *LASTING, *gone])
    client.put_object(Bucket=s3_bucket, Key="photos/empty.jpg", Body=b"")
    faults = [*PASSING.values(), *(fault for fault, _ in LASTING.values())]
    denied = Fault("AccessDenied", r"^GET .*/denied\.jpg")

    def replace() -> None:
        client.put_object(Bucket=s3_bucket, Key="photos/replaced.jpg", Body=jpeg(1000))

    def delete() -> None:
        client.delete_object(Bucket=s3_bucket, Key="photos/deleted.jpg")

    faults += [denied, Fault("none", r"^GET .*/replaced\.jpg", times=1, action=replace)]
    faults += [Fault("none", r"^GET .*/deleted\.jpg", times=1, action=delete)]
    everything = {*whole, *LASTING, *gone, "empty"}
    with FaultProxy(s3_server.endpoint_url, faults) as proxy:
        chosen = options(tiny, proxy.storage_options(s3_server, **IMPATIENT))
        library, url = f"s3://{s3_bucket}/photos", f"s3://{s3_bucket}/out"
        first = pipeline.score(library, url, chosen)

        expected = dict.fromkeys(whole) | {name: kind for name, (_, kind) in LASTING.items()}
        expected |= {"denied": "access_denied", "replaced": "changed", "deleted": "not_found", "empty": "empty"}
        assert check_run(s3_server, s3_bucket, first, everything) == expected
        for name in ("denied", "replaced", "deleted", "expired-token", "unknown-key", "clock-skew", "slow-body"):
            assert proxy.asked[f"GET /{s3_bucket}/photos/{name}.jpg"] == 1, name  # no use within seconds
        for name in [*PASSING, "slow-down", "reset-mid-body", "cut", "short-length", "hangs"]:
            # aiohttp itself repeats a request once whose kept-alive connection was dropped before the answer.
            wanted = {"slow-body": [1], "hangs-once": [2], "refused-twice": [3, 4]}.get(name, [3])
            assert proxy.asked[f"GET /{s3_bucket}/photos/{name}.jpg"] in wanted, name
        assert not any("empty.jpg" in line for line in proxy.asked)
        before = latest(s3_server, s3_bucket)

        proxy.faults = [denied]
        second = pipeline.score(library, url, chosen)
        healed = {*LASTING, "replaced"}
        again = {name_of(row) for row in rows_of(s3_server, s3_bucket, "scores", second["run_id"])}
        assert again == healed
        assert set(check_run(s3_server, s3_bucket, second, healed).values()) == {None}
        now = latest(s3_server, s3_bucket)
        left = {name: row["error_kind"] for name, row in now.items() if row["error_kind"]}
        assert left == {"denied": "access_denied", "empty": "empty"}
        assert now.keys() == everything - {"deleted"}
        # New pixels have a new identity; the same pixels keep theirs.
        assert [name for name in healed if now[name]["image_id"] != before[name]["image_id"]] == ["replaced"]
        assert pipeline.plan_score(library, url, chosen)["to_do"] == 0


@pytest.mark.usefixtures("local_ray", "light_encoder")
def test_a_destination_that_falters_is_written_all_the_same(s3_server: S3Server, s3_bucket: str, tiny: Path) -> None:
    """Throttled, failing and broken requests of all kinds, drawn by a seed; the clients' own attempts get through."""
    names = [f"photo-{number}" for number in range(12)]
    put_photos(s3_server, s3_bucket, names)
    kinds = [("SlowDown", 0.3), ("InternalError", 0.2), ("refuse", 0.2), ("reset", 0.2)]
    faults = [Fault(kind, r"^(PUT|POST|GET|HEAD) ", times=2, probability=chance) for kind, chance in kinds]
    with FaultProxy(s3_server.endpoint_url, faults, seed=5) as proxy:
        chosen = options(tiny, proxy.storage_options(s3_server))
        record = pipeline.score(f"s3://{s3_bucket}/photos", f"s3://{s3_bucket}/out", chosen)
        assert {"SlowDown", "InternalError", "refuse"} <= proxy.befallen.keys()
    assert set(check_run(s3_server, s3_bucket, record, set(names)).values()) == {None}


@pytest.mark.usefixtures("local_ray", "light_encoder")
def test_a_destination_that_refuses_ends_the_run_and_the_same_command_finishes(
    s3_server: S3Server, s3_bucket: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the tables or the record cannot be written; a person sees one line of it."""
    names = ["a", "b", "c"]
    put_photos(s3_server, s3_bucket, names)
    with FaultProxy(s3_server.endpoint_url) as proxy:
        given = json.dumps(proxy.storage_options(s3_server, **IMPATIENT))
        command = ["score", f"s3://{s3_bucket}/photos", "--out", f"s3://{s3_bucket}/out", "--bundle", str(tiny)]
        command += ["--storage-options", given, "-q"]
        for where in ("embeddings", "run.json"):
            proxy.faults = [Fault("AccessDenied", rf"^(PUT|POST) .*/{where}")]
            assert main(command) in (1, 2)
            said = capsys.readouterr().err.strip().splitlines()
            assert "by the test" in said[-1]
            assert "Traceback" not in "".join(said)
            assert proxy.befallen["AccessDenied"] >= 1
            proxy.befallen.clear()
        proxy.faults = []
        assert main(command) == 0
    rows = latest(s3_server, s3_bucket)
    assert rows.keys() == set(names)
    assert all(row["error_kind"] is None for row in rows.values())


@pytest.mark.usefixtures("local_ray", "light_encoder")
def test_the_server_goes_away_amid_a_run_and_comes_back(s3_server: S3Server, s3_bucket: str, tiny: Path) -> None:
    names = [f"photo-{number}" for number in range(12)]
    put_photos(s3_server, s3_bucket, names)
    back = threading.Timer(2, s3_server.restart)

    def go_away() -> None:
        s3_server.stop()
        back.start()

    library, url = f"s3://{s3_bucket}/photos", f"s3://{s3_bucket}/out"
    with FaultProxy(s3_server.endpoint_url, [Fault("none", r"^GET .*/photo-7\.jpg", times=1, action=go_away)]) as proxy:
        chosen = options(tiny, proxy.storage_options(s3_server))
        try:
            record = pipeline.score(library, url, chosen)
            assert record["counts"]["to_do"] == len(names)
        except PicInspectorError as error:  # on a slow machine it may take longer than the clients wait
            assert "\n" not in str(error)
        back.join(60)
        assert proxy.befallen["none"] == 1
        pipeline.score(library, url, chosen)
    rows = latest(s3_server, s3_bucket)
    assert rows.keys() == set(names)
    assert all(row["error_kind"] is None for row in rows.values())


# --- without a run ----------------------------------------------------------------------------------------------------


@pytest.fixture
def photo(s3_server: S3Server, s3_bucket: str) -> Iterator[str]:
    put_photos(s3_server, s3_bucket, ["a"])
    return f"s3://{s3_bucket}/photos/a.jpg"


def test_a_body_that_never_ends_is_a_time_out(s3_server: S3Server, photo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes keep coming, so no time-out of a socket fires; all attempts have one bound together."""
    monkeypatch.setattr(storage, "_TIMEOUT_S", 3.0)  # a loaded machine needs over half a second to connect
    with FaultProxy(s3_server.endpoint_url, [Fault("slow", "^GET ", seconds=1.0)]) as proxy:
        started = time.monotonic()
        [error] = fetch([photo], proxy.storage_options(s3_server, **IMPATIENT))
        assert isinstance(error, PhotoError)
        assert (error.kind, proxy.befallen["slow"]) == (ErrorKind.TIMEOUT, 1)
        assert 2.9 < time.monotonic() - started < 9


@pytest.mark.parametrize("kind", ["SlowDown", "InternalError", "refuse", "reset", "long"])
def test_a_listing_is_tried_again(s3_server: S3Server, photo: str, kind: str) -> None:
    faults = [Fault(kind, r"^GET .*list-type=2", times=2)]
    with FaultProxy(s3_server.endpoint_url, faults) as proxy:
        library = photo.rsplit("/", 1)[0]
        [table] = list_library(library, proxy.storage_options(s3_server, **IMPATIENT | {"retries": {}}))
        assert table.column("uri").to_pylist() == [photo]
        assert proxy.befallen[kind] >= 2


@pytest.mark.parametrize("kind", ["SlowDown", "AccessDenied", "ExpiredToken", "refuse", "reset"])
def test_a_listing_that_cannot_be_had_is_one_line(s3_server: S3Server, photo: str, kind: str) -> None:
    with FaultProxy(s3_server.endpoint_url, [Fault(kind, "^(GET|HEAD) ")]) as proxy:
        with pytest.raises(StorageError, match=r"^cannot list s3://") as caught:
            list(list_library(photo.rsplit("/", 1)[0], proxy.storage_options(s3_server, **IMPATIENT)))
        assert "\n" not in str(caught.value)
