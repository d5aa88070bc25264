"""One run on a Ray cluster: connecting, sizing the pools, watching progress, and the run record."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import ray

import picinspector

#: Logical CPUs a local Ray gets beyond the cores. Actors hold CPUs for as long as they live; without spare ones the
#: reading and writing tasks around them would wait for ever on a small machine.
_SPARE_CPUS = 4

#: For a Ray started here; the cluster's own settings hold elsewhere.
_RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Below fatal, Ray's C++ side talks to developers of Ray, past logging and into the progress line.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # More workers than this at once bring a warning, on stdout of all places; a pipeline of three pools needs them.
    "RAY_worker_maximum_startup_concurrency": "16",
    # Eight processes to read the footers of a handful of files cost two cores seven seconds.
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
}

_PACKAGES = ("ray", "torch", "open_clip_torch", "transformers", "lightgbm", "pyarrow", "fsspec", "s3fs", "pillow")


def connect(address: str | None = None) -> None:
    """Connect to the cluster at `address` or in `RAY_ADDRESS`, else start Ray on this machine. Idempotent."""
    if ray.is_initialized():
        return
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    with _silent_stderr():
        if address or os.environ.get("RAY_ADDRESS"):
            ray.init(address=address or os.environ["RAY_ADDRESS"], **quiet)
        else:
            ray.init(address="local", num_cpus=_cores() + _SPARE_CPUS, include_dashboard=False, **quiet)
    # Ray Data logs every failure as a stack trace; it is raised as well, and the command line says it in one line.
    level = logging.INFO if os.environ.get("PICINSPECTOR_DEBUG") else logging.CRITICAL
    logging.getLogger("ray.data").setLevel(level)
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks", category=UserWarning)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # one line of our own; Ray's dashboard has the details
    context.print_on_execution_start = False


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what C++ code writes to stderr: Ray announces each setting above there. Its failures are exceptions."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Pools:
    """How a run uses the cluster.

    Attributes:
        encoders: actors in the encode pool, at most; the pool starts with one and grows.
        gpus: GPUs of each, may be a fraction; 0 encodes on the CPU.
        cpus: logical CPUs of each, and on the CPU its torch threads.
        batch_size: photos of one encoder call.
        block_rows: photos of one read task.
        readers: read tasks at once, at most.
    """

    encoders: int
    gpus: float
    cpus: int
    batch_size: int
    block_rows: int
    readers: int


def size_pools(
    rows: int, encoders: int | None = None, gpus_per_encoder: float | None = None, batch_size: int | None = None
) -> Pools:
    """Pools for this many photos on the connected cluster, as large as its autoscaler may make it.

    What is given is taken, the rest worked out.

    With GPUs: one encoder a GPU, the CPUs read. Without: encoders of up to eight threads on three quarters of the
    cores, because encoding costs several times what decoding does. Reading happens in blocks of 64 photos, about 25 MB
    of crops: small enough to start encoding early and to lose little with a node.
    """
    grown = _grown_resources()
    resources = grown or ray.cluster_resources()
    logical, all_gpus = int(resources.get("CPU", 0)), resources.get("GPU", 0.0)
    one_node = grown is None and len(ray.nodes()) == 1
    cores = min(logical, _cores()) if one_node else logical  # this machine's Ray counts more CPUs than it has
    gpus = gpus_per_encoder if gpus_per_encoder is not None else (1.0 if all_gpus else 0.0)
    if gpus:
        cpus, fitting = 1, int(max(all_gpus, gpus) / gpus)
    else:
        cpus = max(1, min(8, cores))
        fitting = max(1, int(cores * 0.75) // cpus)
    batch = batch_size or (128 if gpus else 32)
    readers = max(1, cores - (0 if gpus or one_node else fitting * cpus))
    even = -(-rows // max(1, 2 * readers))
    return Pools(encoders or fitting, gpus, cpus, batch, max(8, min(max(64, batch), even)), readers)


def _grown_resources() -> dict[str, float] | None:
    """What the cluster may grow to; None where no autoscaler says. A cluster that rests has no workers to count."""
    # Not public, but what Ray Data itself asks; there is no other way to know.
    grown = ray._private.state.state.get_max_resources_from_cluster_config()
    return {name: float(amount) for name, amount in grown.items()} if grown else None


# --- progress ---------------------------------------------------------------------------------------------------------


class _Tally:
    """Counts over all workers: what they report goes here, the driver's progress line reads it."""

    def __init__(self) -> None:
        self.done = self.errors = self.first_done = 0
        self.first_at = self.last_at = 0.0

    def add(self, done: int, errors: int) -> None:
        self.done += done
        self.errors += errors
        self.last_at = time.monotonic()
        if not self.first_at:
            self.first_at, self.first_done = self.last_at, done

    def read(self) -> tuple[int, int, float]:
        """Rows done, rows with errors, rows a second between the first batch and the last: start-up is not speed."""
        span = self.last_at - self.first_at
        return self.done, self.errors, (self.done - self.first_done) / span if span > 0 else 0.0


class Reporter:
    """A `stages.Report` that travels to the workers.

    Attributes:
        rate: rows a second between the first batch and the last; known once the work is over.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self.rate = 0.0

    def __call__(self, done: int, errors: int) -> None:
        """Add to the tally; does not wait."""
        self._actor.add.remote(done, errors)


@contextlib.contextmanager
def progress(verb: str, total: int, show: bool) -> Iterator[Reporter]:
    """Keep one progress line on stderr while the body runs: photos done, rate, errors, time left."""
    # On the driver's own node: a tally on a spot worker would take the count with it.
    node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), True)
    actor = ray.remote(num_cpus=0)(_Tally).options(scheduling_strategy=node).remote()
    finished, reporter = threading.Event(), Reporter(actor)
    line = threading.Thread(target=_keep_line, args=(verb, total, actor, finished), daemon=True)
    if show:
        line.start()
    try:
        yield reporter
        reporter.rate = ray.get(actor.read.remote())[2]
    finally:
        finished.set()
        if show:
            line.join(timeout=10)
        ray.kill(actor)


def _keep_line(verb: str, total: int, actor: Any, finished: threading.Event) -> None:
    terminal = sys.stderr.isatty()
    while True:
        last = finished.wait(0.5 if terminal else 10.0)
        try:
            done, errors, rate = ray.get(actor.read.remote(), timeout=5)
        except Exception:  # the cluster is going down; the run itself will say why
            return
        left = f", {_duration((total - done) / rate)} left" if rate and not last else ""
        speed = f", {rate:,.1f}/s" if rate else ""
        text = f"{verb}: {done:,} of {total:,} photos{speed}, {errors:,} errors{left}"
        sys.stderr.write(f"\r\x1b[K{text}" if terminal else f"{text}\n")
        if last:
            sys.stderr.write("\n" if terminal else "")
        sys.stderr.flush()
        if last:
            return


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


# --- the record -------------------------------------------------------------------------------------------------------


def describe_environment() -> dict[str, Any]:
    """Versions and cluster size, for the run record."""
    resources = ray.cluster_resources() if ray.is_initialized() else {}
    return {
        "picinspector": picinspector.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "cluster": {
            "nodes": len(ray.nodes()) if ray.is_initialized() else 0,
            "cpus": resources.get("CPU", 0),
            "gpus": resources.get("GPU", 0),
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def now() -> str:
    """The time as run records hold it: ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
