"""A cluster that rests: nodes come for a run and go after it, by Ray's own autoscaler with processes for machines."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.util.state import list_nodes

from tests import ray_head
from tests.ray_head import Head
from tests.test_pipeline import make_library, rows_of

#: Seconds are enough on an idle machine.
TIMEOUT_S = 300.0
STORE_BYTES = 150 * 1024**2


@pytest.fixture(scope="module")
def resting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head without CPUs, for which up to two CPU nodes may come, and one with a GPU by name."""
    kinds: dict[str, tuple[dict[str, float], int]] = {"cpu": ({"CPU": 4}, 2), "gpu": ({"CPU": 1, "GPU": 1}, 1)}
    node_types = {
        name: {"resources": has | {"object_store_memory": STORE_BYTES}, "max_workers": most, "node_config": {}}
        for name, (has, most) in kinds.items()
    }
    with ray_head.start(tmp_path_factory.mktemp("resting") / "log", node_types) as head:
        yield head


def wait_for_rest(head: Head) -> None:
    """Until no node lives but the head."""
    end = time.monotonic() + TIMEOUT_S
    while len(alive := [node for node in list_nodes(head.jobs_url) if node.state == "ALIVE"]) != 1:
        assert time.monotonic() < end, f"still there: {[node.resources_total for node in alive]}"
        time.sleep(0.5)


def score(head: Head, root: Path, tiny: Path, *options: str) -> dict[str, Any]:
    """The record of a job that scored a library of 12 photos, begun at rest and followed by rest."""
    make_library(root / "library", 12)
    wait_for_rest(head)
    command = ["jobs/score.py", f"{root}/library", "--out", f"{root}/dest", "--bundle", str(tiny), *options]
    done = head.submit("python", *command, timeout_s=TIMEOUT_S)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    wait_for_rest(head)
    assert len(rows_of(root / "dest", "scores", "uri")) == 12
    record: dict[str, Any] = json.loads(next((root / "dest" / "runs").glob("*/run.json")).read_text("utf-8"))
    return record


def test_cpu_nodes_come_for_a_run_and_go_after_it(resting: Head, tiny: Path, tmp_path: Path) -> None:
    record = score(resting, tmp_path, tiny, "--encoders", "1", "--gpus-per-encoder", "0")
    assert record["counts"]["scored"] == 12
    assert record["environment"]["cluster"]["cpus"] in (4, 8) and record["environment"]["cluster"]["gpus"] == 0
    assert record["pools"]["cpus"] == 2, "as large as the nodes allow, which nobody knew before"


@pytest.mark.slow
def test_a_node_with_a_gpu_comes_for_the_encoder(resting: Head, tiny: Path, tmp_path: Path) -> None:
    record = score(resting, tmp_path, tiny, "--encoders", "1", "--gpus-per-encoder", "1")
    assert record["counts"]["scored"] == 12
    assert record["pools"]["gpus"] == 1 and record["environment"]["cluster"]["gpus"] == 1
