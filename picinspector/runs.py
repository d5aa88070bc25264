"""One run on a Ray cluster: connecting, sizing the pools, and the run record."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import ray

import picinspector
from picinspector import machine
from picinspector.bundle import Bundle
from picinspector.errors import TRANSIENT_KINDS, UsageError
from picinspector.photo import Limits
from picinspector.plan import Retry
from picinspector.stages import peak_memory_bytes

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
    # Ray Train takes one checkpoint from its workers each time it asks how they are. With its own two seconds, which a
    # cluster needs to tell lost nodes from what they take along, a head with short epochs would mostly wait.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}

#: For the driver of a cluster. Ray Data starts 32 processes to read footers, however small the nodes and the table.
_CLUSTER_SETTINGS = {"RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "2"}

#: The fewest CPUs to limit a run to: one each to list the files of a table, read it, cut it into blocks, read photos
#: and encode them.
_LEAST_CPUS = 5

#: True where `connect` started Ray, whose logical CPUs outnumber the cores.
_started_here = False

_PACKAGES = ("ray", "torch", "open_clip_torch", "transformers", "lightgbm", "pyarrow", "fsspec", "s3fs", "pillow")


def connect(address: str | None = None, dashboard: bool = False) -> None:
    """Connect to the cluster at `address` or in `RAY_ADDRESS`, else start Ray on this machine. Idempotent.

    Args:
        address: of a cluster.
        dashboard: whether a Ray that is started here has its dashboard, on a loopback address, where that can be had.
            Ray Train asks it at the end of a training, and for 12 s where there is none.
    """
    global _started_here
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    with _silent_stderr():
        if address or os.environ.get("RAY_ADDRESS"):
            for name, value in _CLUSTER_SETTINGS.items():
                os.environ.setdefault(name, value)
            ray.init(address=address or os.environ["RAY_ADDRESS"], **quiet)
        else:
            _started_here = True
            for name, value in _RAY_SETTINGS.items():
                os.environ.setdefault(name, value)
            ray.init(
                address="local",
                num_cpus=_cores() + _SPARE_CPUS,
                include_dashboard=None if dashboard else False,
                **quiet,
            )
    # Ray Data logs every failure as a stack trace; it is raised as well, and the command line says it in one line.
    level = logging.INFO if os.environ.get("PICINSPECTOR_DEBUG") else logging.CRITICAL
    logging.getLogger("ray.data").setLevel(level)
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks", category=UserWarning)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # one line of our own; Ray's dashboard has the details
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # else what a stage raises is lost in one that does not say what it was


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


def is_retry() -> bool:
    """In a task: whether Ray tries it anew, because its worker died or what it gave was lost with a node."""
    return bool(ray._private.worker.global_worker.core_worker.get_current_task_attempt_number())  # no public way: 2.60


def size_scorers(batches: int) -> int:
    """Actors of the score pool for so many batches: four at most, and no more than cores where Ray was started here.

    Each takes seconds of CPU to start, in which one that is there scores tens of thousands of photos.
    """
    return max(1, min(4, batches, *([_cores()] if _started_here else [])))


def _cores() -> int:
    return machine.cores()


@dataclass(frozen=True)
class Options:
    """What a run may be told; every default is worked out from the library and the cluster.

    Attributes:
        bundle: name or folder of the bundle, the same on every node.
        storage_options: fsspec options of the library and the destination.
        limit: photos to do at most.
        retry_failed: which photos that failed before `score` does again.
        limits: what a photo may cost.
        captions: whether `score` describes the photos it embeds.
        encoders, gpus_per_encoder, batch_size: see `Pools`.
        max_cpus: logical CPUs the run holds at once, at most; None for all of the cluster.
        address: the Ray cluster; None takes `RAY_ADDRESS`, else starts Ray on this machine.
        show_progress: one progress line on stderr.
    """

    bundle: str = "builtin"
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    limit: int | None = None
    retry_failed: Retry = "transient"
    limits: Limits = field(default_factory=Limits)
    captions: bool = False
    encoders: int | None = None
    gpus_per_encoder: float | None = None
    batch_size: int | None = None
    max_cpus: int | None = None
    address: str | None = None
    show_progress: bool = True

    def __post_init__(self) -> None:
        least = _LEAST_CPUS + self.captions
        if self.max_cpus is not None and self.max_cpus < least:
            raise UsageError(
                f"--max-cpus {self.max_cpus}: a run{' with captions' if self.captions else ''} needs {least} at least, "
                "to read and to encode at once; give it more, or leave the option out"
            )


@contextlib.contextmanager
def limited(max_cpus: int | None) -> Iterator[None]:
    """Hold the datasets that are made in this block to so many CPUs: actors, and tasks that read, cut and write.

    Ray Data goes beyond its limit by the one task that lists the files of a table (2.60), and where its operations need
    more to begin with: `size_pools` sees to it that they do not.
    """
    options = ray.data.DataContext.get_current().execution_options
    before = options.resource_limits
    if max_cpus is not None:
        options.resource_limits = ray.data.ExecutionResources.for_limits(cpu=max_cpus - 1)
    try:
        yield
    finally:
        options.resource_limits = before


@dataclass(frozen=True, slots=True)
class Pools:
    """How a run uses the cluster.

    Attributes:
        encoders: actors in the encode pool, at most.
        gpus: GPUs of each, may be a fraction; 0 encodes on the CPU.
        cpus: logical CPUs of each, of captioners as well, and on the CPU their torch threads.
        batch_size: photos of one encoder call.
        block_rows: photos of one read task.
        readers: read tasks at once, at most; None lets Ray Data decide, which on two cores starts too many.
        captioners: actors in the caption pool, at most; 0 without captions. Each has the GPUs of an encoder.
        at_once: actors that a pool asks for at its start: no more than fit the cluster as it is, beside the other pool.
    """

    encoders: int
    gpus: float
    cpus: int
    batch_size: int
    block_rows: int
    readers: int | None
    captioners: int = 0
    at_once: int = 1

    def describe(self) -> dict[str, Any]:
        """For the run record."""
        return asdict(self)


def size_pools(
    rows: int,
    encoders: int | None = None,
    gpus_per_encoder: float | None = None,
    batch_size: int | None = None,
    captions: bool = False,
    max_cpus: int | None = None,
) -> Pools:
    """Pools for this many photos on the connected cluster; what is given is taken, the rest worked out.

    With GPUs: one encoder a GPU, the CPUs read. Without: encoders of up to eight threads on up to three quarters of the
    cores. Reading happens in blocks of 64 photos: small enough to start encoding early and to lose little with a node.
    Nobody can see what an autoscaler may still add: for a cluster that rests, `encoders` and `gpus_per_encoder` say it;
    how large its nodes are, the first one shows.
    With captions each GPU has one captioner beside its encoder, and on the CPU there are as many of both.
    What other jobs hold right now does not count, because they end: an actor that finds no room waits, and the first
    that does begins. A run that is to leave room, or to fit beside others, has `max_cpus`.
    """
    nodes = _nodes()
    if not gpus_per_encoder and not any(node.get("CPU") for node in nodes):
        ray.get(ray.remote(num_cpus=1)(_cores).remote())  # an autoscaler brings a node for it
        nodes = _nodes()
    logical = [int(node.get("CPU", 0)) for node in nodes]
    # A Ray on one machine may count more CPUs than it has; a cluster's counts are what it was told.
    cores = [min(logical[0], _cores())] if len(nodes) == 1 else logical
    all_gpus = sum(node.get("GPU", 0.0) for node in nodes)
    whole = 0.5 if captions else 1.0
    gpus = gpus_per_encoder if gpus_per_encoder is not None else (whole if all_gpus else 0.0)
    pools = 2 if captions else 1  # of actors that hold their CPUs and GPUs as long as the run lasts
    one, all_actors = _for_actors(max_cpus)
    if gpus:
        cpus, fitting = 1, max(1, int(min(all_gpus / gpus, all_actors) / pools))
        # Of a cluster that has one GPU now, `encoders` says whether more may come.
        if all_gpus and pools * gpus > all_gpus and (encoders is None or len(nodes) == 1):
            raise UsageError(
                f"{gpus} GPUs for an encoder{' and as many for a captioner' if captions else ''}: the cluster has "
                f"{all_gpus:g}; lower --gpus-per-encoder"
            )
    else:
        # Two CPUs of a node stay free for the tasks that read and write beside its actors.
        cpus = max(1, int(min(8, max(cores), (max(logical) - 2) / pools, one / pools)))
        fitting = max(1, int(min(sum(cores) * 0.75, all_actors) / (pools * cpus)))
    if captions and len(nodes) == 1 and 0 < logical[0] < pools * cpus + 1:
        raise UsageError(
            f"this Ray has {logical[0]} CPUs: captions need one for the encoders, one for the captioner and one to "
            "read photos; start it with more (ray start --num-cpus)"
        )
    batch = batch_size or (128 if gpus else 32)
    even = -(-rows // (2 * max(1, min(sum(cores), max_cpus or sum(cores)))))
    block = max(8, min(max(64, batch), even))
    actors = encoders or fitting
    readers = sum(cores) if _started_here else None
    at_once = min(actors, fitting)
    return Pools(actors, gpus, cpus, batch, block, readers, actors if captions else 0, at_once)


def _nodes() -> list[dict[str, float]]:
    """What each node that lives has, by resource."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _for_actors(max_cpus: int | None) -> tuple[float, float]:
    """CPUs of one actor of each pool, and of all actors at the start, at most, for a run to keep to its limit.

    Ray Data (2.60, `ReservationOpResourceAllocator`) promises each operation its part of half of the limit, and one CPU
    at least, whatever actors hold already. Four of the five or six have no actors: read, cut, read photos, write. Where
    nothing is left for writing, it has its turn when reading is done.
    """
    if max_cpus is None:
        return math.inf, math.inf
    limit = max_cpus - 1  # of `limited`
    return min(0.6 * limit, limit - 3), min(0.6 * limit, limit - 4)


# --- the record -------------------------------------------------------------------------------------------------------


def describe_environment() -> dict[str, Any]:
    """Versions and cluster size, for the run record."""
    resources = ray.cluster_resources() if ray.is_initialized() else {}
    return {
        "picinspector": picinspector.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "cluster": {
            "nodes": len(_nodes()) if ray.is_initialized() else 0,
            "cpus": resources.get("CPU", 0),
            "gpus": resources.get("GPU", 0),
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """Which models a run works with."""
    return {
        "name": bundle.name,
        "version": bundle.version,
        "encoder_fingerprint": bundle.encoder_fingerprint,
        "scorer_fingerprint": bundle.scorer_fingerprint,
        "scorer_kind": bundle.scorer_kind,
    }


def new_record(
    run_id: str, kind: str, bundle: dict[str, Any] | None, destination: str, library: str | None
) -> dict[str, Any]:
    """The record of a run that begins: who, what, with which models (`describe_bundle`)."""
    return {
        "run_id": run_id,
        "kind": kind,
        "library": library,
        "destination": destination,
        "bundle": bundle,
        "started_at": _now(),
        "counts": {},
        "seconds": {},
        "stages": {},
    }


def finish_record(
    record: dict[str, Any], errors_by_kind: Mapping[str, int], captions: Mapping[str, int], unread: Mapping[str, int]
) -> dict[str, Any]:
    """The record of a run whose tables are whole: counts, speed, environment, outcome.

    Args:
        record: from `new_record`.
        errors_by_kind: how many photos failed for which reason.
        captions: how many have a caption from which source.
        unread: how many photos a caption run could not read again, by error kind.
    """
    counts = record["counts"]
    failed = sum(errors_by_kind.values())
    # The others carry errors over from the run that read the photos: they have none of their own to try again.
    own = errors_by_kind if record["kind"] == "score" else unread
    passing = sum(own.get(kind, 0) for kind in TRANSIENT_KINDS)
    counts |= {"scored": counts["to_do"] - failed, "failed": failed, "failed_transient": passing}
    counts["errors_by_kind"] = dict(errors_by_kind)
    counts["captions_by_source"], counts["unread_by_kind"] = dict(captions), dict(unread)
    record["seconds"] = {name: round(value, 3) for name, value in record["seconds"].items()}
    record["photos_per_s"] = round(counts["to_do"] / max(record["seconds"]["total"], 1e-9), 3)
    record["peak_memory_bytes"] = peak_memory_bytes()  # of the driver; those of the workers are in `stages`
    record["environment"] = describe_environment()
    record["finished_at"] = _now()
    record["outcome"] = "transient_failures" if passing else "done"
    return record


def exit_code(record: Mapping[str, Any]) -> int:
    """The process exit code that says how a committed run ended: 0 done, 3 transient failures remain."""
    return 3 if record["counts"]["failed_transient"] else 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
