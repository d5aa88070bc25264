"""Counting rows while Ray Data works on them, and the one progress line on stderr."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray


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
        with contextlib.suppress(ray.exceptions.RayError):  # a count that got lost is no reason to lose the run
            reporter.rate = ray.get(actor.read.remote(), timeout=10)[2]
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
