"""Workers that die in the middle of a run: rows in = rows out, none doubled, and nobody blamed who did nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pytest

from picinspector import pipeline
from picinspector.cli import main
from picinspector.stages import encode
from tests import light_encoder
from tests.poison import HAZARDS, SmallDevice, poison

#: Seconds are enough on an idle machine.
TIMEOUT_S = 200.0


def make_library(folder: Path, acts: dict[int, str], photos: int = 24) -> None:
    """Photos by number, harmless but for the acts of some."""
    folder.mkdir(parents=True)
    for index in range(photos):
        (folder / f"{index:03}.png").write_bytes(poison(acts.get(index, "sleep 0")))


def score(root: Path, tiny: Path, address: str | None = None, encoders: int = 1) -> dict[str, Any]:
    # Small batches, so that a few photos are some blocks.
    sizes: dict[str, Any] = {"batch_size": 8, "encoders": encoders}
    chosen = pipeline.Options(bundle=str(tiny), limits=HAZARDS, address=address, show_progress=False, **sizes)
    return pipeline.score(str(root / "library"), str(root / "dest"), chosen)


def check_rows(root: Path, record: dict[str, Any]) -> dict[str, str | None]:
    """The error kinds by file name, after a look at both tables: each photo once."""
    names = sorted(path.name for path in (root / "library").iterdir())
    kinds: dict[str, str | None] = {}
    for table in ("embeddings", "scores"):
        files = f"{root}/dest/{table}/run_id={record['run_id']}/*.parquet"
        rows = duckdb.sql(f"SELECT uri, image_id, error_kind FROM '{files}'").fetchall()
        assert sorted(Path(uri).name for uri, _, _ in rows) == names
        assert len({image_id for _, image_id, _ in rows}) == len(names)
        kinds = {Path(uri).name: kind for uri, _, kind in rows}
    return kinds


def titled(title: str) -> list[int]:
    """This session's Ray workers that call themselves so."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).strip() == title:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


#: Behind it is ".__init__" while it loads the models, and ".submit" while it encodes.
ENCODER = "ray::MapWorker(MapBatches(Encode))"


class Run(threading.Thread):
    """A run in the background."""

    def __init__(self, root: Path, *arguments: Any) -> None:
        super().__init__(daemon=True)
        self._root, self._arguments = root, arguments
        self.record: dict[str, Any] = {}
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self.record = score(self._root, *self._arguments)
        except BaseException as error:  # shown where the test waits for it
            self.failure = error

    def __enter__(self) -> Run:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        (self._root / "go").touch()
        self.join(TIMEOUT_S)

    def wait_for(self, what: Callable[[], Any]) -> Any:
        """The first answer that is true while this goes on."""
        end = time.monotonic() + TIMEOUT_S
        while self.is_alive() and time.monotonic() < end:
            if found := what():
                return found
            time.sleep(0.05)
        raise TimeoutError(f"not seen before the run ended, or within {TIMEOUT_S:g} s") from self.failure

    def result(self) -> dict[str, Any]:
        self.join(TIMEOUT_S)
        assert not self.is_alive(), "the run hangs"
        if self.failure is not None:
            raise self.failure
        return self.record


def held(root: Path) -> list[int]:
    """Processes that came to the photo that waits."""
    log = root / "held"
    return [int(line) for line in log.read_text().split()] if log.exists() else []


@pytest.mark.usefixtures("local_ray", "light_encoder")
def test_photos_that_kill_their_worker_become_rows(tmp_path: Path, tiny: Path) -> None:
    guilty = {3: "segfault", 4: "abort", 5: "kill", 20: "segfault"}
    make_library(tmp_path / "library", guilty)
    record = score(tmp_path, tiny)
    kinds = check_rows(tmp_path, record)
    assert {int(name[:3]): kind for name, kind in kinds.items() if kind} == dict.fromkeys(guilty, "crashed")
    assert record["counts"]["errors_by_kind"] == {"crashed": 4}
    assert record["counts"]["scored"] == 20


@pytest.mark.usefixtures("local_ray", "light_encoder")
def test_a_reader_and_an_encoder_that_are_killed_cost_nobody_their_row(tmp_path: Path, tiny: Path) -> None:
    make_library(tmp_path / "library", {20: f"hold {tmp_path}"})
    with Run(tmp_path, tiny) as run:
        [reader] = run.wait_for(lambda: held(tmp_path))
        os.kill(reader, signal.SIGKILL)
        # Its batch was in the middle: it is tried again, and comes to the photo that waits once more.
        [_, child] = run.wait_for(lambda: held(tmp_path)[1:] and held(tmp_path))
        assert child != reader
        [encoder] = run.wait_for(lambda: titled(ENCODER))
        os.kill(encoder, signal.SIGKILL)
        run.wait_for(lambda: [pid for pid in titled(ENCODER) if pid != encoder])
        assert run.is_alive() and not (tmp_path / "go").exists()
    record = run.result()
    assert set(check_rows(tmp_path, record).values()) == {None}, "blamed for what others did"
    assert record["counts"]["scored"] == 24


@pytest.mark.usefixtures("local_ray")
def test_a_device_that_is_too_small_is_told_in_one_line(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_library(tmp_path / "library", {}, photos=8)
    to_tables = pipeline.score

    def on_small_device(library: str, destination: str, options: pipeline.Options) -> dict[str, Any]:
        return to_tables(library, destination, replace(options, bundle=SmallDevice(options.bundle, 2), limits=HAZARDS))

    monkeypatch.setattr(pipeline, "score", on_small_device)
    arguments = ["score", f"{tmp_path}/library", "--out", f"{tmp_path}/dest", "--bundle", str(tiny), "-q"]
    assert main([*arguments, "--batch-size", "8"]) == 2
    said = capsys.readouterr().err.strip()
    assert "with 8 photos at once, and with 4: lower --batch-size" in said and "\n" not in said
    assert main([*arguments, "--batch-size", "4"]) == 0, "the advice helps"


def test_a_node_that_is_lost_costs_nobody_their_row(tmp_path: Path, tiny: Path) -> None:
    make_library(tmp_path / "library", {20: f"hold {tmp_path}"})
    # In a process of its own: this one may be connected to a Ray already.
    command = [sys.executable, "-m", "tests.test_faults_workers", str(tmp_path), str(tiny)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=1.4 * TIMEOUT_S)
    assert process.returncode == 0, process.stderr[-3000:]
    record = json.loads(process.stdout.splitlines()[-1])
    assert record["environment"]["cluster"]["cpus"] == 6, "the node is still there"
    assert set(check_rows(tmp_path, record).values()) == {None}
    assert record["counts"]["scored"] == 24


def lose_a_node(root: Path, tiny: Path) -> dict[str, Any]:
    """The record of a run on two nodes, of which one is killed when the run is half done: that of the encoder."""
    import ray
    from ray.cluster_utils import Cluster

    encode.Encode = light_encoder.Encode  # type: ignore[assignment,misc]
    small = {"object_store_memory": 150 * 1024**2}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
    nodes = {
        node.all_processes["raylet"][0].process.pid: node
        for node in (cluster.add_node(num_cpus=6, **small) for _ in "AB")
    }
    try:
        with Run(root, tiny, cluster.address, 2) as run:
            run.wait_for(lambda: held(root))
            encoder = run.wait_for(lambda: titled(ENCODER))[0]
            [raylet] = {parent.pid for parent in psutil.Process(encoder).parents()} & nodes.keys()
            cluster.remove_node(nodes[raylet], allow_graceful=False)
            run.wait_for(lambda: [pid for pid in titled(ENCODER) if pid != encoder])
            assert run.is_alive() and not (root / "go").exists()
        return run.result()
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    print(json.dumps(lose_a_node(Path(sys.argv[1]), Path(sys.argv[2]))))  # noqa: T201
