"""Counting rows while Ray Data works on them: the progress line on stderr, the run record's stages, Ray's metrics."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypedDict

import ray

from picinspector import logs
from picinspector.stages import Batch

#: A person's line is drawn anew this often on a terminal, and written this often where it is kept.
_TERMINAL_S, _LOG_S = 0.5, 10.0
#: How long the last reports may be under way: 4 ms on two idle cores, over a second where four processes want them.
#: Only a run that lost reports with a node waits as long.
_LATE_S = 5.0
#: Of the histogram of batches. Measured on two cores: 0.1 s to score 4096 rows, 7 s to read 64 photos; the rest is room
#: for large captioners and slow stores.
_BATCH_S = [0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
#: Stages whose actors hold a device as long as they live: of these the record says how busy they kept it.
_ON_DEVICE = frozenset({"encode", "caption"})


class Snapshot(TypedDict):
    """What the tally knows: rows past the last stage, errors of all, rows a second, and each stage as in the record."""

    done: int
    errors: int
    rate: float
    stages: dict[str, dict[str, Any]]


@dataclass
class _Stage:
    """One stage's sums. Times are the tally's clock, because the clocks of nodes differ."""

    rows: int = 0
    busy_s: float = 0.0
    fetch_s: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    workers: set[str] = field(default_factory=set)
    memory_bytes: int = 0
    device_bytes: int | None = None
    began_at: float = float("inf")
    first_at: float = 0.0
    first_rows: int = 0
    last_at: float = 0.0

    def add(self, batch: Batch, now: float) -> None:
        self.rows += batch.rows
        self.busy_s += batch.busy_s
        self.fetch_s += batch.fetch_s
        self.errors.update(batch.errors)
        self.workers.add(batch.worker)
        self.memory_bytes = max(self.memory_bytes, batch.memory_bytes)
        if batch.device_bytes is not None:
            self.device_bytes = max(self.device_bytes or 0, batch.device_bytes)
        self.began_at = min(self.began_at, now - batch.busy_s)
        if not self.first_at:
            self.first_at, self.first_rows = now, batch.rows
        self.last_at = now

    def rate(self) -> float:
        """Rows a second between the first batch and the last: start-up is not speed."""
        span = self.last_at - self.first_at
        return (self.rows - self.first_rows) / span if span > 0 else 0.0

    def record(self, name: str) -> dict[str, Any]:
        span = self.last_at - self.began_at
        record: dict[str, Any] = {
            "rows": self.rows,
            "busy_s": round(self.busy_s, 3),
            "span_s": round(span, 3),
            "photos_per_busy_s": round(self.rows / self.busy_s, 3) if self.busy_s else 0.0,
            "workers": len(self.workers),
            "peak_memory_bytes": self.memory_bytes,
            "errors_by_kind": dict(self.errors),
        }
        if name == "read":
            record["fetch_s"] = round(self.fetch_s, 3)
        if name in _ON_DEVICE:
            room = span * len(self.workers)
            record |= {"peak_device_bytes": self.device_bytes, "use": round(self.busy_s / room, 3) if room else 0.0}
        return record


class _Tally:
    """Sums over all workers, and the owner of the metrics: what the stages report goes here."""

    def __init__(self, total: int, last: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram  # in the actor's process alone, which exports them

        self._total, self._last = total, last
        self._stages: dict[str, _Stage] = {}
        self._photos = Counter("picinspector_photos_total", "Photos that went through a stage.", tag_keys=("stage",))
        self._errors = Counter("picinspector_errors_total", "Photos with an error, by its kind.", tag_keys=("kind",))
        self._seconds = Histogram(
            "picinspector_batch_seconds", "Time a stage took for a batch.", boundaries=_BATCH_S, tag_keys=("stage",)
        )
        self._to_do = Gauge("picinspector_photos_to_do", "Photos of this run that are not past the last stage yet.")
        self._to_do.set(total)

    def add(self, batch: Batch) -> None:
        stage = self._stages.setdefault(batch.stage, _Stage())
        stage.add(batch, time.monotonic())
        tags = {"stage": batch.stage}
        if batch.rows:
            self._photos.inc(batch.rows, tags)
        self._seconds.observe(batch.busy_s, tags)
        for kind, count in batch.errors.items():
            self._errors.inc(count, {"kind": kind})
        if batch.stage == self._last:
            self._to_do.set(max(0, self._total - stage.rows))

    def read(self) -> Snapshot:
        last = self._stages.get(self._last, _Stage())
        return {
            "done": last.rows,
            "errors": sum(stage.errors.total() for stage in self._stages.values()),
            "rate": last.rate(),
            "stages": {name: stage.record(name) for name, stage in self._stages.items()},
        }


class Reporter:
    """A `stages.Report` that travels to the workers.

    Attributes:
        rate: rows a second between the first batch and the last; known once the work is over.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._stages: dict[str, dict[str, Any]] = {}
        self.rate = 0.0

    def __call__(self, batch: Batch) -> None:
        """Add to the tally; does not wait, and does not mind whether it is still there."""
        self._actor.add.remote(batch)

    def stages(self) -> dict[str, dict[str, Any]]:
        """What each stage did, for the run record's `stages`; known once the work is over, {} where it got lost.

        By stage: `rows`; `busy_s`, the seconds its workers spent in it, waiting for storage included; `span_s`, from
        the begin of its first batch to the end of its last; `photos_per_busy_s`; `workers`, the processes;
        `peak_memory_bytes`, resident, of the largest of them, with what it shares with others; `errors_by_kind`, of
        errors that arose there. `read` also has `fetch_s`, what of `busy_s` it waited for storage. Stages that hold a
        device also have `peak_device_bytes`, null without a GPU, and `use`: `busy_s` as a share of `span_s` times
        `workers`. A batch that Ray did twice, because a node was lost, is counted twice.
        """
        return self._stages


@contextlib.contextmanager
def progress(verb: str, total: int, show: bool, last: str | None = None) -> Iterator[Reporter]:
    """Keep one progress line on stderr while the body runs: photos done, rate, errors, time left.

    Args:
        verb: what is being done, for the line.
        total: photos to do.
        show: whether to keep the line; it is a JSON event every 10 s where the log is JSON.
        last: the stage a photo is done after; without it `encode` where the verb is `embed`, else the verb.
    """
    # On the driver's own node: a tally on a spot worker would take the count with it.
    node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), True)
    last = last or ("encode" if verb == "embed" else verb)
    actor = ray.remote(num_cpus=0)(_Tally).options(scheduling_strategy=node).remote(total, last)
    finished, reporter = threading.Event(), Reporter(actor)
    line = threading.Thread(target=_keep_line, args=(verb, total, actor, finished), daemon=True)
    if show:
        line.start()
    try:
        yield reporter
        try:
            snapshot = _last_word(actor, total)
        except ray.exceptions.RayError as error:  # a count that got lost is no reason to lose the run
            logs.event("tally_lost", level=logging.WARNING, stage=verb, reason=type(error).__name__)
        else:
            reporter.rate, reporter._stages = snapshot["rate"], snapshot["stages"]
            logs.event("stage_finished", stage=verb, **_counts(snapshot), stages=snapshot["stages"])
    finally:
        finished.set()
        if show:
            line.join(timeout=10)
        ray.kill(actor)


def _last_word(actor: Any, total: int) -> Snapshot:
    """What the tally has once all is in, or nearly: reports do not wait, and may come after the rows they are of."""
    deadline = time.monotonic() + _LATE_S
    while True:
        snapshot: Snapshot = ray.get(actor.read.remote(), timeout=10)
        if snapshot["done"] >= total or time.monotonic() > deadline:
            return snapshot
        time.sleep(0.05)


def _counts(snapshot: Snapshot) -> dict[str, Any]:
    return {"done": snapshot["done"], "errors": snapshot["errors"], "photos_per_s": round(snapshot["rate"], 3)}


def _keep_line(verb: str, total: int, actor: Any, finished: threading.Event) -> None:
    as_json = logs.is_json()
    terminal = sys.stderr.isatty() and not as_json
    while True:
        last = finished.wait(_TERMINAL_S if terminal else _LOG_S)
        try:
            snapshot: Snapshot = ray.get(actor.read.remote(), timeout=5)
        except Exception:  # the cluster is going down; the run itself will say why
            return
        left_s = (total - snapshot["done"]) / snapshot["rate"] if snapshot["rate"] and not last else None
        if as_json:
            rounded = None if left_s is None else round(left_s)
            logs.event("progress", stage=verb, total=total, **_counts(snapshot), left_s=rounded)
        else:
            _draw(_line(verb, total, snapshot, left_s), terminal, last)
        if last:
            return


def _line(verb: str, total: int, snapshot: Snapshot, left_s: float | None) -> str:
    left = f", {_duration(left_s)} left" if left_s is not None else ""
    speed = f", {snapshot['rate']:,.1f}/s" if snapshot["rate"] else ""
    return f"{verb}: {snapshot['done']:,} of {total:,} photos{speed}, {snapshot['errors']:,} errors{left}"


def _draw(text: str, terminal: bool, last: bool) -> None:
    sys.stderr.write(f"\r\x1b[K{text}" if terminal else f"{text}\n")
    if last:
        sys.stderr.write("\n" if terminal else "")
    sys.stderr.flush()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
