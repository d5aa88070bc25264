"""The service, next to the batch job: `python -m benchmarks.serving [--photos 200] [--rounds 3] [--soak 0]`.

Latency of one client that asks again as soon as it is answered; photos a second of 16 such clients, over those of the
job's embed step (start-up left out as in `benchmarks.pipeline`) in the same round; what happens when requests arrive at
1, 2 and 5 times that rate, however slowly they are answered; and the memory of all the service's processes before
and after. The client is on the same cores and its work counts against the service.

The clients are aiohttp's. What a package registry has of load generators (locust, wrk, hey) asks again only when it is
answered: a service that is slow is asked less, and its overload is not seen.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks import libraries, ratios
from benchmarks.pipeline import job, paths
from picinspector import pipeline, runs
from tests import service

_CLIENTS = 16
_OVERLOAD_S = 10.0

#: Status and seconds of one request.
Answer = tuple[int, float]


class Crowd:
    """Clients of one service, which send these photos in turn."""

    def __init__(self, url: str, photos: Sequence[bytes]) -> None:
        self._url, self._photos = url, itertools.cycle(photos)

    def closed_loop(self, clients: int, requests: int) -> tuple[list[Answer], float]:
        """So many clients, each with one request at a time; and the seconds that all took."""

        async def work(ask: Callable[[], Coroutine[Any, Any, Answer]]) -> list[Answer]:
            left = iter(range(requests))

            async def one() -> list[Answer]:
                return [await ask() for _ in left]

            return list(itertools.chain(*await asyncio.gather(*(one() for _ in range(clients)))))

        return self._run(work)

    def open_loop(self, rate: float, seconds: float) -> tuple[list[Answer], float]:
        """Requests that come at this rate, whether others are answered or not."""

        async def work(ask: Callable[[], Coroutine[Any, Any, Answer]]) -> list[Answer]:
            loop = asyncio.get_running_loop()
            started, tasks = loop.time(), []
            for number in range(int(rate * seconds)):
                await asyncio.sleep(max(0.0, started + number / rate - loop.time()))
                tasks.append(asyncio.create_task(ask()))
            return list(await asyncio.gather(*tasks))

        return self._run(work)

    def _run(self, work: Callable[..., Coroutine[Any, Any, list[Answer]]]) -> tuple[list[Answer], float]:
        async def run() -> tuple[list[Answer], float]:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

                async def ask() -> Answer:
                    form, started = aiohttp.FormData(), time.perf_counter()
                    form.add_field("photo", next(self._photos), filename="photo.jpg")
                    try:
                        async with session.post(f"{self._url}/v1/score", data=form) as response:
                            await response.read()
                            return response.status, time.perf_counter() - started
                    except aiohttp.ClientError:
                        return 0, time.perf_counter() - started

                started = time.perf_counter()
                return await work(ask), time.perf_counter() - started

        return asyncio.run(run())


def quantiles_ms(answers: Sequence[Answer]) -> str:
    """p50, p95 and p99 of those that were judged."""
    judged = sorted(seconds for status, seconds in answers if status == 200)
    if len(judged) < 2:
        return "none judged"
    cuts = statistics.quantiles(judged, n=100, method="inclusive")
    return ", ".join(f"p{q} {1000 * cuts[q - 1]:.0f} ms" for q in (50, 95, 99))


def memory_mb(pid: int) -> float:
    """Resident memory of a process and all it started, what they share counted once."""
    parent = psutil.Process(pid)
    total = 0
    for process in (parent, *parent.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue  # it has ended
    return total / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--size", default="2mp", choices=list(libraries.SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="requests between the two looks at memory")
    parser.add_argument("--scratch", type=Path, help="where the library is made, and kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.scratch or Path(temporary)
        name = f"{arguments.size}-{arguments.photos}"
        files = paths(libraries.make(scratch / name, arguments.photos, arguments.size))[: arguments.photos]
        with service.start(scratch / "service.log", RAY_worker_niceness="0") as running:
            measure(arguments, files, running, scratch)


def measure(arguments: argparse.Namespace, files: Sequence[str], running: service.Service, scratch: Path) -> None:
    """All of it, against a running service."""
    crowd = Crowd(running.url, [Path(path).read_bytes() for path in files])
    crowd.closed_loop(_CLIENTS, 4 * _CLIENTS)
    before_mb = memory_mb(running.process.pid)
    alone: list[Answer] = []
    together: list[Answer] = []

    def one_client() -> float:
        answers, seconds = crowd.closed_loop(1, len(files) // 2)
        alone.extend(answers)
        return len(answers) / seconds

    def many_clients() -> float:
        answers, seconds = crowd.closed_loop(_CLIENTS, len(files))
        together.extend(answers)
        return len(answers) / seconds

    runs.connect()
    batch = job(files, len(files) // 5, len(files), pipeline.Options(show_progress=False), scratch)
    contenders = {"one client": one_client, f"{_CLIENTS} clients": many_clients, "job": batch}
    measured = ratios.take_turns(contenders, arguments.rounds)
    rates = ", ".join(f"{name} {statistics.median(values):.1f}/s" for name, values in measured.items())
    row = ratios.Row(
        f"{_CLIENTS} clients over the job", ratios.over(measured, f"{_CLIENTS} clients", "job"), 0.80, figures=rates
    )
    ratios.show(f"serving, {arguments.size}, {len(files)} photos, {arguments.rounds} rounds", [row])
    print(f"\none client: {quantiles_ms(alone)}\n{_CLIENTS} clients: {quantiles_ms(together)}")
    capacity = statistics.median(measured[f"{_CLIENTS} clients"])
    print("\n| arrivals, of what 16 clients get | a second | answers | judged |\n|---|---|---|---|")
    for load in (1, 2, 5):
        answers, _ = crowd.open_loop(load * capacity, _OVERLOAD_S)
        counts = ", ".join(f"{count} x {status}" for status, count in sorted(Counter(s for s, _ in answers).items()))
        print(f"| {load} | {load * capacity:.1f} | {counts} | {quantiles_ms(answers)} |", flush=True)
    for done in range(0, arguments.soak, 1000):
        crowd.closed_loop(_CLIENTS, min(1000, arguments.soak - done))
        print(f"  {done + 1000} requests: {memory_mb(running.process.pid):.0f} MB", file=sys.stderr, flush=True)
    print(f"\nmemory: {before_mb:.0f} MB after 64 requests, {memory_mb(running.process.pid):.0f} MB at the end")


if __name__ == "__main__":
    main()
