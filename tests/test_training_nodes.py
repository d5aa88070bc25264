"""Trainings as submitted jobs on a cluster of several machines, with everything in object storage, that lose a node."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from picinspector.attributes import AttributeHead
from picinspector.captioner import Captioner
from picinspector.scorer import Scorer
from tests.fault_proxy import Fault
from tests.s3_server import S3Server
from tests.several_nodes import Cluster, Hold
from tests.test_train_attributes import toy
from tests.test_train_captioner import make_data
from tests.test_train_scorer import FEATURES, write_inputs
from training.folders import Folder

#: Two workers that fill two nodes; whatever GPUs there are do not count.
APART = ["--workers", "2", "--cpus-per-worker", "2"]
ON_CPUS = [*APART, "--gpus-per-worker", "0"]


@pytest.fixture
def bucket(cluster: Cluster, s3_server: S3Server, s3_bucket: str) -> Iterator[Folder]:
    """An empty one on a cluster with two CPU nodes; after the test nothing happens to requests any more."""
    cluster.add(*["cpu"] * (2 - sum(name.startswith("cpu") for name in cluster.alive())))
    yield Folder(f"s3://{s3_bucket}", s3_server.storage_options)
    cluster.store.faults = []


def upload(bucket: Folder, folder: Path) -> None:
    """Put the files of a folder into the bucket, under their own names."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    there = [bucket.path(path.relative_to(folder).as_posix()) for path in files]
    bucket.filesystem.put([str(path) for path in files], there)


def asked(cluster: Cluster, pattern: str) -> list[tuple[str, str]]:
    """What was asked of the store that begins like this, and by whom."""
    found = [(line, names) for line, names in cluster.store.askers.items() if re.match(pattern, line)]
    return [(line, node) for line, names in found for node in names]


class HoldOne(Hold):
    """Holds one of the requests that come here; the others go on."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._left = number

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            super().__call__()


def lose_a_node(cluster: Cluster, job: str, held: str, number: int, cable: bool) -> None:
    """When one request has come, the node of the worker that did not send it goes, and another comes.

    Args:
        cluster: the cluster.
        job: that trains.
        held: how the lines of such requests begin, as a pattern.
        number: which of them it is.
        cable: the node falls silent instead of dying.
    """
    hold = HoldOne(number)
    cluster.store.faults = [Fault("none", held, action=hold)]
    cluster.wait_for(job, hold.reached.is_set)
    first = asked(cluster, held)[-1][1]
    names = {node["node_id"]: node["node_name"] for node in cluster.listed("nodes")}
    alive = [actor for actor in cluster.listed("actors") if actor["state"] == "ALIVE"]
    workers = {names[actor["node_id"]] for actor in alive if "TrainWorker" in actor["class_name"]}
    [other] = workers - {first}
    (cluster.pull_cable if cable else cluster.kill)(other)
    hold.go.set()
    cluster.add("cpu")


def checkpoints(cluster: Cluster, bucket: Folder, file: str) -> set[str]:
    """Of which checkpoints this file was ever written."""
    return {line for line, _ in asked(cluster, f"PUT /{bucket.path('out/checkpoints')}/.*/{file}$")}


def finish(cluster: Cluster, job: str) -> str:
    """What a job said that has to end well."""
    code, said = cluster.wait(job)
    assert code == 0, said[-3000:]
    return said


@pytest.mark.slow
def test_an_attribute_head_whose_node_falls_silent(cluster: Cluster, bucket: Folder, tmp_path: Path) -> None:
    settings = toy(tmp_path)
    upload(bucket, tmp_path)
    where = ["--labels", f"{bucket}/labels.parquet", "--embeddings", f"{bucket}/embeddings", "--out", f"{bucket}/out"]
    small = ["--features", *settings.features, "--hidden-dim", "8", "--epochs", "6", "--bootstrap", "20"]
    job = cluster.submit("python", "-m", "training.train_attributes", *where, *small, *ON_CPUS)
    progress = f"^PUT /{bucket.path('out/progress.jsonl')}"
    lose_a_node(cluster, job, progress, 2, cable=True)
    assert "Photos: " in finish(cluster, job)

    # The one that was under way may have got as far as its checkpoint.
    assert len(checkpoints(cluster, bucket, "model.safetensors")) in (6, 7), "no epoch but one was done twice"
    out = bucket.under("out")
    with out:
        metrics = json.loads((out.pull() / "metrics.json").read_text("utf-8"))
        assert [line["epoch"] for line in metrics["history"]] == [1, 2, 3, 4, 5, 6]
        assert AttributeHead(out.here / "attributes").features == settings.features
        assert (out.here / "card.md").is_file()


def test_a_scorer_whose_node_dies(cluster: Cluster, bucket: Folder, tmp_path: Path) -> None:
    upload(bucket, write_inputs(tmp_path))
    where = ["--embeddings", f"{bucket}/embeddings", "--labels", f"{bucket}/labels.csv", "--out", f"{bucket}/out"]
    small = [
        "--no-error-guided",
        "--no-early-stopping",
        "--rounds",
        "30",
        "--param",
        "num_leaves=7",
        "learning_rate=0.3",
        "feature_fraction=0.5",
    ]
    told = [*where, "--features", *FEATURES, *small, "--checkpoint-rounds", "3", *APART]
    job = cluster.submit("python", "-m", "training.train_scorer", *told)
    lose_a_node(cluster, job, f"^PUT /{bucket.path('out/checkpoints')}/.*/begun.json", 6, cable=False)
    finish(cluster, job)

    # Nine of them make a model; the one that was under way is made again, and perhaps another: not the first five.
    assert 10 <= len(checkpoints(cluster, bucket, "begun.json")) <= 12
    assert len(checkpoints(cluster, bucket, "model.txt")) == 1
    out = bucket.under("out")
    with out:
        metrics: dict[str, Any] = json.loads((out.pull() / "metrics.json").read_text("utf-8"))
        assert metrics["rounds"] == 30 and metrics["splits"]["test"]["plcc"] > 0.8
        assert Scorer(out.here / "scorer").label_max == metrics["label_range"][1]


@pytest.mark.slow
def test_a_captioner_whose_node_dies_and_whose_job_is_stopped(
    cluster: Cluster, bucket: Folder, captioned_bundle: Path, tmp_path: Path
) -> None:
    make_data(tmp_path / "data", photos=8)
    upload(bucket, tmp_path)
    where = ["--data", f"{bucket}/data", "--base", str(captioned_bundle), "--out", f"{bucket}/out"]
    small = ["--lora-rank", "2", "--steps", "5", "--batch-size", "2", "--checkpoint-steps", "1", "--photos", "2"]
    command = ["python", "-m", "training.train_captioner", *where, *small, *ON_CPUS]
    job = cluster.submit(*command)
    progress = f"^PUT /{bucket.path('out/progress.jsonl')}"
    lose_a_node(cluster, job, progress, 2, cable=False)
    hold = HoldOne(2)
    cluster.store.faults = [Fault("none", progress, action=hold)]
    cluster.wait_for(job, hold.reached.is_set)
    cluster.stop(job)
    hold.go.set()
    finish(cluster, cluster.submit(*command))

    # One, if the job was stopped before its controller had noted the newest.
    assert len(checkpoints(cluster, bucket, "model.safetensors")) in (5, 6), "no step but one was done twice"
    out = bucket.under("out")
    with out:
        metrics = json.loads((out.pull() / "metrics.json").read_text("utf-8"))
        assert [line["step"] for line in metrics["history"]] == [1, 2, 3, 4, 5]
        assert (out.here / "captioner" / "adapter" / "adapter_model.safetensors").is_file()
        assert Captioner(out.here / "captioner")
