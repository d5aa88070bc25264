"""Two jobs on one cluster, each with a part of it: either does its work while the other is in the middle of its own."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb

from picinspector import nightly, pipeline, runs
from picinspector.stages import encode
from tests import light_encoder
from tests.poison import HAZARDS, poison
from tests.test_train_scorer import FEATURES, write_inputs

#: CPUs of the nodes, how many of all scoring may have, and how many the training needs: the rest.
NODES, LIMIT, WORKERS = (5, 3), 6, 2
#: Seconds are enough on an idle machine.
TIMEOUT_S = 200.0


def test_a_training_and_a_nightly_with_a_limit_do_not_wait_for_each_other(tmp_path: Path, tiny: Path) -> None:
    write_inputs(tmp_path)
    for library in ("limited", "greedy"):
        (tmp_path / library).mkdir()
        for index in range(16):
            (tmp_path / library / f"{index:02}.png").write_bytes(poison(f"hold {tmp_path / library}"))
    # In a process of its own: this one may be connected to a Ray already.
    command = [sys.executable, "-m", "tests.test_sharing", "share", str(tmp_path), str(tiny)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=2 * TIMEOUT_S)
    assert process.returncode == 0, process.stderr[-3000:]
    said = json.loads(process.stdout.splitlines()[-1])
    assert said["scored"] == {"limited": 16, "greedy": 16}
    assert said["training_went_on_while_scoring_was_held"] and said["scoring_ended_while_training_was_held"]
    metrics = json.loads((tmp_path / "trained" / "metrics.json").read_text("utf-8"))
    assert metrics["workers"] == WORKERS and len(metrics["seeds"]) == 2
    assert 2 < said["busiest"] <= LIMIT
    assert said["busiest_without_limit"] > sum(NODES) - WORKERS, "the training fits in without a limit: what is shown?"
    rows = f"SELECT count(DISTINCT uri), count(*) FROM '{tmp_path}/limited-tables/scores/**/*.parquet'"
    assert duckdb.sql(rows).fetchall() == [(16, 16)]


# --- in the process that has the cluster ------------------------------------------------------------------------------


def share(root: Path, tiny: Path) -> dict[str, Any]:
    """A nightly and a training that are held in turn, and what a run without a limit takes."""
    encode.Encode = light_encoder.Encode  # type: ignore[assignment,misc]
    with cluster() as address, ThreadPoolExecutor(1) as jobs, contextlib.ExitStack() as at_last:
        for held in ("limited", "greedy", "training"):
            at_last.callback((root / held / "go").touch)
        options = pipeline.Options(bundle=str(tiny), limits=HAZARDS, batch_size=8, address=address, show_progress=False)

        def start(
            job: Callable[..., dict[str, Any]], library: str, options: pipeline.Options
        ) -> Future[dict[str, Any]]:
            return jobs.submit(job, str(root / library), str(root / f"{library}-tables"), options)

        alone, beside = Watch(), Watch()
        night = start(nightly.run, "limited", replace(options, max_cpus=LIMIT))
        alone.until(waits(root / "limited"), night)
        training = start_training(address, root)
        at_last.callback(training.kill)
        beside.until(waits(root / "training", 2 * WORKERS), night)  # with the first model behind them
        training_went_on = not night.done()
        (root / "limited" / "go").touch()
        limited = night.result(TIMEOUT_S)["score"]
        scoring_ended = training.poll() is None
        (root / "training" / "go").touch()
        if training.wait(TIMEOUT_S):
            raise RuntimeError("the training failed")

        unlimited = Watch()
        run = start(pipeline.score, "greedy", options)
        unlimited.until(lambda: waits(root / "greedy")() and unlimited.busiest > sum(NODES) - WORKERS, run)
        (root / "greedy" / "go").touch()
        greedy = run.result(TIMEOUT_S)
    return {
        "scored": {"limited": limited["counts"]["scored"], "greedy": greedy["counts"]["scored"]},
        "training_went_on_while_scoring_was_held": training_went_on,
        "scoring_ended_while_training_was_held": scoring_ended,
        "busiest": alone.busiest,
        "busiest_without_limit": unlimited.busiest,
    }


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """The address of a head without CPUs and nodes that have some; this process is connected, and all of them free."""
    import ray
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 150 * 1024**2}
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
    try:
        for number, cpus in enumerate(NODES):
            started.add_node(num_cpus=cpus, resources={f"rack_{number}": 1}, **small)
        runs.connect(started.address)
        Watch().until(lambda: in_use() == 0)
        yield started.address
    finally:
        ray.shutdown()
        started.shutdown()


def in_use() -> float:
    """CPUs that somebody holds."""
    import ray

    return sum(NODES) - ray.available_resources().get("CPU", 0.0)


class Watch:
    """Waits, and looks at what is in use meanwhile.

    Attributes:
        busiest: the most CPUs at once.
    """

    def __init__(self) -> None:
        self.busiest = 0.0

    def until(self, what: Callable[[], object], *running: Future[Any]) -> None:
        """Wait for the first answer that is true, while these jobs go on."""
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end:
            self.busiest = max(self.busiest, in_use())
            if what():
                return
            for job in running:
                if job.done():
                    raise RuntimeError(f"ended too early: {job.result()}")
            time.sleep(0.02)
        raise TimeoutError(f"not seen within {TIMEOUT_S:g} s")


def waits(folder: Path, processes: int = 1) -> Callable[[], bool]:
    """Whether so many processes wait for a file `go`, or did."""
    log = folder / "held"
    return lambda: log.exists() and len(log.read_text().split()) >= processes


# --- in the training's process ----------------------------------------------------------------------------------------


def start_training(address: str, root: Path) -> subprocess.Popen[bytes]:
    """A training by several workers of two models, which waits where it would begin with the second."""
    (root / "training").mkdir()
    environment = os.environ | {"RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.test_sharing", "train", str(root), address],
        env=environment, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def train(root: Path, address: str) -> None:
    import ray
    from ray.train.v2.api import data_parallel_trainer as trainer

    from training import train_scorer

    # Ray Train ends by waiting 12 s for an actor that asks the dashboard, and this Ray has none.
    trainer.PlacementGroupCleanerCallback = functools.partial(trainer.PlacementGroupCleanerCallback, stop_timeout=0.1)
    ray.init(address, runtime_env={"worker_process_setup_hook": wait_to_learn(root / "training")}, log_to_driver=False)
    where = ["--embeddings", str(root / "embeddings"), "--labels", str(root / "labels.csv"), "--out", f"{root}/trained"]
    small = ["--no-error-guided", "--rounds", "20", "--param", "num_leaves=7", "feature_fraction=0.5"]
    train_scorer.train(
        train_scorer.parse([*where, "--features", *FEATURES, "--workers", str(WORKERS), "--seeds", "2", *small])
    )


def wait_to_learn(folder: Path) -> Callable[[], None]:
    """What a worker is set up with: LightGBM waits for a file `go`, unless it is one of the first to be called."""

    def set_up() -> None:
        import lightgbm

        learn = lightgbm.train

        def wait(*arguments: Any, **more: Any) -> Any:
            with (folder / "held").open("a") as log:
                log.write(f"{os.getpid()}\n")
            while len((folder / "held").read_text().split()) > WORKERS and not (folder / "go").exists():
                time.sleep(0.05)
            return learn(*arguments, **more)

        lightgbm.train = wait

    return set_up


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]), sys.argv[3])
    else:
        print(json.dumps(share(Path(sys.argv[2]), Path(sys.argv[3]))))  # noqa: T201
