"""A real Ray head with the job API, to submit jobs to as a user does."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@dataclass(frozen=True)
class Head:
    """A Ray head of its own, with two CPUs and none to spare."""

    jobs_url: str
    environment: dict[str, str]

    def submit(self, *command: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- command`, from the repository as it is."""
        ray = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", self.jobs_url]
        deadline = time.monotonic() + 90
        while True:
            done = subprocess.run(
                [*ray, "--working-dir", ".", "--", *command],
                cwd=REPOSITORY, env=self.environment, timeout=timeout_s, capture_output=True, text=True, check=False,
            )  # fmt: skip
            # A head answers before its job agent is up, and says so.
            if "No available agent" not in done.stdout + done.stderr or time.monotonic() > deadline:
                return done
            time.sleep(1)


@contextlib.contextmanager
def start(log: Path) -> Iterator[Head]:
    """A Ray head that writes to `log`, until the block ends."""
    port, dashboard = free_port(), free_port()
    # Tokens are for clusters others can reach; this one listens on loopback.
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment.pop("RAY_ADDRESS", None)
    # A job connects to the Ray that was started last below this folder, and other tests start theirs. Its name is
    # short because sockets lie in it.
    environment["RAY_TMPDIR"] = folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
             f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--num-cpus=2",
             # The job agent keeps to its default port, which the Ray of the other tests holds, unless told.
             f"--dashboard-agent-listen-port={free_port()}",
             "--object-store-memory=500000000"],
            env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{dashboard}"
        _wait_for(f"{url}/api/version", process, log)
        yield Head(url, environment)
    finally:
        process.terminate()  # `ray stop` would end every Ray on this machine
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its agents stay behind otherwise
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.5)
    raise RuntimeError(f"the Ray head did not start; its log ends: {log.read_text()[-2000:]}")
