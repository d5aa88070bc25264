"""A real Ray head with the job API, to submit jobs to as a user does."""

from __future__ import annotations

import contextlib
import json
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
from typing import Any

import psutil

REPOSITORY = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@dataclass(frozen=True)
class Head:
    """A Ray head of its own."""

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
def start(log: Path, node_types: dict[str, dict[str, Any]] | None = None) -> Iterator[Head]:
    """A Ray head that writes to `log`, until the block ends.

    Args:
        log: of the head.
        node_types: as in a cluster launcher's file: of the nodes that an autoscaler brings to a head without CPUs. None
            for a head alone, with two CPUs and none to spare.
    """
    port, dashboard = free_port(), free_port()
    # Tokens are for clusters others can reach; this one listens on loopback.
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment.pop("RAY_ADDRESS", None)
    # A job connects to the Ray that was started last below this folder, and other tests start theirs. Its name is
    # short because sockets lie in it.
    environment["RAY_TMPDIR"] = folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    more, object_store_bytes = ["--num-cpus=2"], 500_000_000
    if node_types is not None:
        config = Path(folder) / "autoscaling.json"
        config.write_text(json.dumps(_autoscaling(node_types, port)), "utf-8")
        more, object_store_bytes = ["--num-cpus=0", "--num-gpus=0", f"--autoscaling-config={config}"], 150_000_000
        environment |= _FOR_AUTOSCALING
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
             f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", *more,
             # The job agent keeps to its default port, which the Ray of the other tests holds, unless told.
             f"--dashboard-agent-listen-port={free_port()}",
             f"--object-store-memory={object_store_bytes}"],
            env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{dashboard}"
        _wait_for(f"{url}/api/version", process, log)
        yield Head(url, environment)
    finally:
        process.terminate()  # `ray stop` would end every Ray on this machine
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        for pid in psutil.pids():  # its agents stay behind otherwise, and the nodes that its autoscaler brought
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(pid) == process.pid:
                    os.kill(pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


#: What Ray's stand-in for a cloud knows its head by.
_HEAD_ID, _HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"
_FOR_AUTOSCALING = {
    "RAY_enable_autoscaler_v2": "1",  # as in deploy/
    "RAY_FAKE_CLUSTER": "1",
    "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
    "RAY_NODE_TYPE_NAME": _HEAD_TYPE,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}


def _autoscaling(node_types: dict[str, dict[str, Any]], port: int) -> dict[str, Any]:
    """The configuration of a cluster whose nodes are processes of this machine.

    `ray.cluster_utils.AutoscalingCluster` would do, but for its first step: it ends every Ray on the machine.
    """
    commands = [f"{whose}_{what}_commands" for whose in ("head", "worker") for what in ("setup", "start_ray")]
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    return {
        "cluster_name": "test",
        "max_workers": sum(kind["max_workers"] for kind in node_types.values()),
        "idle_timeout_minutes": 0.1,
        # Its own type, `fake_multinode`, wants a file that Ray's wheel lacks.
        "provider": {
            "type": "external",
            "module": provider,
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": _HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
        **{field: [] for field in ["setup_commands", *commands, "cluster_synced_files"]},
        "head_node_type": _HEAD_TYPE,
        "available_node_types": {_HEAD_TYPE: {"resources": {}, "node_config": {}, "max_workers": 0}, **node_types},
    }


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.5)
    raise RuntimeError(f"the Ray head did not start; its log ends: {log.read_text()[-2000:]}")
