"""Jobs on a cluster of several machines that share nothing but the object store, as `cluster.yaml` makes it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from picinspector.tables import Destination
from tests.fault_proxy import Fault
from tests.s3_server import S3Server
from tests.several_nodes import TIMEOUT_S, Cluster, Hold, obey
from tests.test_faults_s3 import check_run, put_photos

NAMES = [f"{number:03}" for number in range(48)]


@pytest.fixture
def bucket(cluster: Cluster, s3_server: S3Server, s3_bucket: str) -> Iterator[str]:
    """A bucket with photos; after the test nothing happens to requests any more."""
    put_photos(s3_server, s3_bucket, NAMES)
    yield s3_bucket
    cluster.store.faults = []


def score(cluster: Cluster, bucket: str, bundle: Path, out: str | None = None) -> str:
    """Submit the job as README has it; its id."""
    where = [f"s3://{bucket}/photos", "--out", out or f"s3://{bucket}/out", "--bundle", str(bundle)]
    return cluster.submit("python", "jobs/score.py", *where, "--encoders", "1", "--gpus-per-encoder", "1")


def finish(cluster: Cluster, job: str, server: S3Server, bucket: str) -> dict[str, Any]:
    """The record of a run that ends well, with one row of each photo in both tables, and none that failed."""
    code, said = cluster.wait(job)
    assert code == 0, said[-3000:]
    runs = Destination(f"s3://{bucket}/out", server.storage_options).runs()
    [record] = [run for run in runs if run["counts"]["to_do"]]  # a run that was resumed is followed by an empty one
    assert check_run(server, bucket, record, set(NAMES)) == dict.fromkeys(NAMES)
    return record


def askers(cluster: Cluster, request: str) -> list[str]:
    """The nodes that asked the store for what begins like this, one a request."""
    asked = cluster.store.askers
    return [node for line in list(asked) if line.startswith(request) for node in asked[line]]


def test_only_who_has_the_token_gets_in(cluster: Cluster) -> None:
    """With it the other tests' jobs get in, and their nodes."""
    submit = ["job", "submit", "--address", cluster.url, "--", "true"]
    without = cluster.ray(*submit, RAY_AUTH_MODE="disabled")
    assert without.returncode != 0
    assert "Authentication required: Unauthorized: Missing authentication token" in without.stderr
    wrong = cluster.token.with_name("wrong")
    wrong.write_text("0" * 64)
    refused = cluster.ray(*submit, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert refused.returncode != 0
    assert "Authentication failed: Forbidden: Invalid authentication token" in refused.stderr
    with pytest.raises(RuntimeError, match="cpu-3 did not join") as error:
        cluster.add("cpu", RAY_AUTH_TOKEN_PATH=str(wrong), RAY_NUM_REDIS_GET_RETRIES="2")  # as many seconds
    assert "Authentication token is missing or incorrect" in str(error.value)
    assert set(cluster.alive()) == {"head", "cpu-1", "cpu-2", "gpu-1"}


def test_a_folder_that_only_the_head_has_is_told_in_one_line(
    cluster: Cluster, bucket: str, tiny: Path, tmp_path: Path
) -> None:
    code, said = cluster.wait(score(cluster, bucket, tiny, out=f"{tmp_path}/out"))
    if cluster.isolated:
        assert code == 2
        assert f"picinspector: {tmp_path}/out is a folder that not all nodes of the cluster have" in said
        assert "Traceback" not in said
    else:
        assert code == 0 and (tmp_path / "out" / "scores").is_dir()


def test_stages_run_where_their_resources_are_and_a_stopped_job_goes_on(
    cluster: Cluster, s3_server: S3Server, bucket: str, tiny: Path
) -> None:
    readers, hold = {"cpu-1", "cpu-2"}, Hold()

    def wait_for_both() -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not readers <= set(askers(cluster, f"GET /{bucket}/photos/")) and time.monotonic() < deadline:
            time.sleep(0.05)

    cluster.store.faults = [
        Fault("none", r"^GET /.*/photos/", action=wait_for_both),
        # Refused in the end: what comes of a worker that outlives its driver and writes after all is another test's.
        Fault("refuse", r"^PUT /.*/out/scores/", action=hold),
    ]
    job = score(cluster, bucket, tiny)
    cluster.wait_for(job, hold.reached.is_set)
    assert set(askers(cluster, f"GET /{bucket}/photos/")) == readers
    names = {node["node_id"]: node["node_name"] for node in cluster.listed("nodes")}
    encoders = [actor for actor in cluster.listed("actors") if actor["class_name"] == "MapWorker(MapBatches(Encode))"]
    assert {names[actor["node_id"]] for actor in encoders if actor["node_id"]} == {"gpu-1"}, "that ever started"
    assert set(askers(cluster, f"PUT /{bucket}/out/runs/")) == {"head"}, "there the driver runs"
    cluster.stop(job)
    hold.go.set()
    cluster.store.faults = []
    record = finish(cluster, score(cluster, bucket, tiny), s3_server, bucket)
    assert record["environment"]["cluster"] == {"nodes": 4, "cpus": 5, "gpus": 1}
    assert record["times_resumed"] == 1
    assert record["found_written"] == {"embeddings": len(NAMES)}
    assert len(askers(cluster, f"GET /{bucket}/photos/")) == len(NAMES), "no photo was read again"


def test_nodes_that_go_and_come_cost_nobody_their_row(
    cluster: Cluster, s3_server: S3Server, bucket: str, tiny: Path
) -> None:
    """One falls silent amid its work, another dies, a third takes over."""
    hold, held = Hold(), f"GET /{bucket}/photos/020.jpg"
    cluster.store.faults = [Fault("none", f"^{re.escape(held)}", action=hold)]
    job = score(cluster, bucket, tiny)
    cluster.wait_for(job, hold.reached.is_set)
    [silent] = askers(cluster, held)
    [other] = {"cpu-1", "cpu-2"} - {silent}
    for line in (f"pull {silent}", f"kill {other}", "add cpu"):
        assert "alive" in obey(cluster, line.split())
    [fresh] = set(cluster.nodes) - {"head", "cpu-1", "cpu-2", "cpu-3", "gpu-1"}
    cluster.wait_for(job, lambda: fresh in askers(cluster, held))
    hold.go.set()
    record = finish(cluster, job, s3_server, bucket)
    assert record["environment"]["cluster"] == {"nodes": 3, "cpus": 3, "gpus": 1}
    assert set(cluster.alive()) == {"head", "gpu-1", fresh}
