"""`picinspector serve` as people start it: a process of its own, with its own Ray, on a free port."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: Models load, Ray starts; on a busy machine each takes its time.
_START_S = 400.0


@dataclass(frozen=True)
class Service:
    """A running service."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def end(self, timeout_s: float = 120.0) -> int:
        """Ask it to end, as an operator does; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@contextlib.contextmanager
def start(log: Path, *arguments: str, **environment: str) -> Iterator[Service]:
    """Start it, wait until it can judge photos, end it.

    Args:
        log: where its stderr goes.
        arguments: of `picinspector serve`.
        environment: variables beside this process's.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PICINSPECTOR_TOKEN")}
    command = [sys.executable, "-m", "picinspector", "serve", "--port", "0", *arguments]
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=inherited | environment)
    try:
        yield Service(_wait(process, log), process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"listening on (http://\S+)", log.read_text("utf-8", "replace")):
            return found[1]
        time.sleep(0.1)
    raise AssertionError(f"the service does not start: {log.read_text('utf-8', 'replace')[-3000:]}")
