"""Measuring side by side: contenders take turns in one run, and what is kept are ratios of what they did in a round.

The speed of a machine drifts, most of all of a rented one. Two figures of the same minute share the drift, so the ratio
is taken within each round, and the median over the rounds is what counts.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

#: How often the memory of a contender's processes is summed.
_SAMPLE_S = 0.25


@dataclass(frozen=True, slots=True)
class Row:
    """One ratio, ready to be printed.

    Attributes:
        what: in words.
        ratios: one a round.
        target: to be reached by the median; None where there is none. With `at_most`, not to be exceeded.
        figures: what the ratio is of, by name: medians with their unit, which belong to this machine.
    """

    what: str
    ratios: Sequence[float]
    target: float | None = None
    at_most: bool = False
    figures: str = ""

    @property
    def median(self) -> float:
        """Over the rounds."""
        return statistics.median(self.ratios)

    def __str__(self) -> str:
        span = f" ({min(self.ratios):.2f}-{max(self.ratios):.2f})" if len(self.ratios) > 1 else ""
        target = "" if self.target is None else f"{'<=' if self.at_most else '>='} {self.target:g}"
        return f"| {self.what} | {self.median:.2f}{span} | {target} | {self.figures} |"


def take_turns(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Let every contender measure itself once a round, in an order that turns by one from round to round."""
    names, measured = list(contenders), {name: [] for name in contenders}  # type: list[str], dict[str, list[float]]
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            measured[name].append(contenders[name]())
            print(f"  round {turn + 1}: {name} {measured[name][-1]:.4g}", file=sys.stderr, flush=True)
    return measured


def over(measured: Mapping[str, Sequence[float]], above: str, *below: str) -> list[float]:
    """The ratio of each round: of one contender to another, or to the lowest of several."""
    rounds = zip(measured[above], *(measured[name] for name in below), strict=True)
    return [first / min(others) for first, *others in rounds]


def show(title: str, rows: Sequence[Row]) -> None:
    """Print the machine and a table of Markdown, as it stands in `benchmarks/README.md`."""
    print(f"\n{title}\n{machine()}\n\n| ratio | median (range) | target | of |\n|---|---|---|---|")
    for row in rows:
        print(row)


def machine() -> str:
    """The processor and what it can do, cores, memory, and the GPU where there is one."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [name for name in ("avx512_bf16", "amx_tile", "amx_bf16") if name in facts.get("flags", "").split()]
    memory = psutil.virtual_memory().total / 1e9
    name = facts.get("model name", platform.processor())
    return f"{cores()} cores of {name} ({', '.join(flags) or 'no bf16'}), {memory:.0f} GB{_gpu()}"


def _gpu() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True
        )
    except OSError:
        return ""
    return f", {done.stdout.strip().splitlines()[0]}" if done.returncode == 0 and done.stdout.strip() else ""


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Finished:
    """What a contender in a process of its own did.

    Attributes:
        answer: the JSON of the last line it wrote to stdout.
        seconds: from its start to its end.
        peak_bytes: the most memory that it and its children had at once: proportional set sizes, so that what
            processes share is counted once. Sampled four times a second.
    """

    answer: Any
    seconds: float
    peak_bytes: int


def run_alone(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Finished:
    """Run a contender in a process of its own, and see what it and its children take.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    started = time.perf_counter()
    with subprocess.Popen(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    ) as process:
        watch = _Watch(process.pid)
        watch.start()
        out, errors = process.communicate()
        seconds = time.perf_counter() - started
        watch.stop()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{errors[-3000:]}")
    return Finished(json.loads(out.strip().splitlines()[-1]), seconds, watch.peak_bytes)


class _Watch(threading.Thread):
    """Sums the memory of a process and all its descendants, also those whose parents ended."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root, self._known, self._done, self.peak_bytes = psutil.Process(pid), {}, threading.Event(), 0

    def run(self) -> None:
        while not self._done.wait(_SAMPLE_S):
            total = 0
            for process in [self._root, *self._known.values()]:
                try:
                    for child in process.children(recursive=True):
                        self._known.setdefault(child.pid, child)
                except psutil.Error:
                    continue
            for process in [self._root, *self._known.values()]:
                total += _proportional_bytes(process.pid)
            self.peak_bytes = max(self.peak_bytes, total)

    def stop(self) -> None:
        self._done.set()
        self.join()


def _proportional_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:  # it ended
        pass
    return 0
