"""A Ray cluster of several machines on this one, started as `cluster.yaml` starts it: see `tests.machines`.

A head without CPUs, two CPU nodes, and one with a GPU by name only: there is no CUDA, so its encoder works on the CPU.
Every node asks for the token. They share the object store, and the image: this checkout, its virtual environment, and
the bundles that are given. `python -m tests.several_nodes` has one to try things on by hand.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests import s3_server
from tests.fault_proxy import FaultProxy
from tests.machines import Lab, Machine, lab
from tests.ray_head import REPOSITORY, free_port

#: A node is up in seconds, and a job through in half a minute, on an idle machine.
TIMEOUT_S = 300.0
#: What a node has, by its kind. As in `cluster.yaml` in small: the encoder takes all of the second.
KINDS = {"cpu": ["--num-cpus=2"], "gpu": ["--num-cpus=1", "--num-gpus=1"]}
#: How long a node may be silent. By Ray's own settings its head takes it for dead after a minute, and a driver waits up
#: to seven for what it has asked of a worker there: measured 138 s with the first three of these, 36 s with all.
_PATIENCE = {
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "15000",
}
_PROGRAMS = Path(sys.executable).parent


@dataclass
class Cluster:
    """A running cluster.

    Attributes:
        url: of the head's dashboard and job API.
        token: the file of the secret that nodes and clients share.
        store: what the nodes reach the object store through; sees who asks for what, as `cpu-1`.
        nodes: by name, those that were ever started.
    """

    token: Path
    store: FaultProxy
    _lab: Lab = field(repr=False)
    _variables: Mapping[str, str] = field(repr=False)
    url: str = ""
    nodes: dict[str, Machine] = field(default_factory=dict)
    _head: str = ""
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1), repr=False)

    @property
    def isolated(self) -> bool:
        """Whether the nodes share no disk: they do where there are no namespaces."""
        return self._lab.isolated

    # --- nodes ---

    def add(self, *kinds: str, **variables: str) -> list[Machine]:
        """Start nodes of these kinds, named `cpu-1` and so on, and wait until all have joined.

        Args:
            kinds: see `KINDS`.
            variables: of their environment, beside those that all have.

        Raises:
            RuntimeError: one did not; the message has what it said.
        """
        started = []
        for kind in kinds:
            name = f"{kind}-{sum(node.startswith(kind) for node in self.nodes) + 1}"
            command = ["ray", "start", "--block", f"--address={self._head}", *KINDS[kind]]
            started.append(self._start(name, command, variables))
        for machine in started:
            self._wait_until(machine, lambda machine=machine: self.alive().get(machine.name))  # type: ignore[misc]
        return started

    def start_head(self, port: int, dashboard_port: int) -> None:
        """Start the head, and wait until its dashboard answers."""
        command = ["ray", "start", "--block", "--head", "--num-cpus=0", "--num-gpus=0", f"--port={port}"]
        command += ["--dashboard-host={address}", f"--dashboard-port={dashboard_port}"]
        machine = self._start("head", command, {})
        self._head, self.url = f"{machine.address}:{port}", f"http://{machine.address}:{dashboard_port}"
        self._wait_until(machine, lambda: self.alive().get("head"))

    def pull_cable(self, name: str) -> None:
        """Take a node off the network; nobody is told."""
        self._lab.pull_cable(self.nodes[name])

    def kill(self, name: str) -> None:
        """End all that a node runs; unlike without its cable the others hear of it."""
        self.nodes[name].kill()

    def alive(self) -> dict[str, dict[str, Any]]:
        """The nodes that the head takes for alive, by name."""
        return {node["node_name"]: node for node in self.listed("nodes") if node["state"] == "ALIVE"}

    def _start(self, name: str, command: list[str], variables: Mapping[str, str]) -> Machine:
        # A resource of its own, so that whoever wants to can say where a job's driver runs (--entrypoint-resources).
        own = [f"--node-name={name}", f'--resources={{"{name}": 1}}', "--object-store-memory=150000000"]
        variables = {**self._variables, "AWS_SDK_UA_APP_ID": name, **variables}
        self.nodes[name] = self._lab.boot(name, [*command, *own], variables)
        return self.nodes[name]

    def _wait_until(self, machine: Machine, joined: Callable[[], object]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while machine.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(urllib.error.URLError, OSError):
                if joined():
                    return
            time.sleep(0.3)
        raise RuntimeError(f"{machine.name} did not join: {machine.log.read_text('utf-8', 'replace')[-3000:]}")

    # --- jobs ---

    def ray(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """`ray` on this computer, from the repository, as a user who has the token; `variables` beside it."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        environment["HOME"] = str(self.token.parent)  # theirs may have another cluster's token
        return subprocess.run(
            [str(_PROGRAMS / "ray"), *words], cwd=REPOSITORY, env=environment | variables,
            capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip

    def submit(self, *command: str) -> str:
        """`ray job submit --working-dir . -- command`; the submission's id.

        Raises:
            RuntimeError: it was refused.
        """
        job = f"job-{next(self._numbers)}"
        words = ["--address", self.url, "--working-dir", ".", "--no-wait", "--submission-id", job]
        deadline = time.monotonic() + TIMEOUT_S
        while (done := self.ray("job", "submit", *words, "--", *command)).returncode:
            said = done.stdout + done.stderr
            # A head answers before its job agent is up, and says so.
            if "No available agent" not in said or time.monotonic() > deadline:
                raise RuntimeError(f"the job was refused: {said}")
        return job

    def stop(self, job: str) -> None:
        """`ray job stop`."""
        done = self.ray("job", "stop", "--address", self.url, job)
        assert done.returncode == 0, done.stdout + done.stderr

    def wait(self, job: str) -> tuple[int | None, str]:
        """What a job ended with, None where it was stopped, and what it said."""
        status = self.wait_for(job, lambda: self._over(job))
        return status["driver_exit_code"], self.log(job)

    def wait_for(self, job: str, what: Callable[[], Any]) -> Any:
        """The first answer that is true while a job goes on.

        Raises:
            TimeoutError: there was none before the job ended, or in time.
        """
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            over = self._over(job)
            if found := what():
                return found
            if over:
                break
            time.sleep(0.2)
        raise TimeoutError(f"not seen before {job} ended, or within {TIMEOUT_S:g} s: {self.log(job)[-3000:]}")

    def log(self, job: str) -> str:
        """What a job has said so far."""
        return str(self.get(f"/api/jobs/{job}/logs")["logs"])

    def _over(self, job: str) -> dict[str, Any] | None:
        status: dict[str, Any] = self.get(f"/api/jobs/{job}")
        return status if status["status"] in ("SUCCEEDED", "FAILED", "STOPPED") else None

    # --- the dashboard's answers ---

    def listed(self, what: str) -> list[dict[str, Any]]:
        """`ray list nodes`, `actors` or `tasks`, without the seconds that the command takes."""
        answer = self.get(f"/api/v0/{what}?limit=1000&detail=1")
        rows: list[dict[str, Any]] = answer["data"]["result"]["result"]
        return rows

    def get(self, path: str) -> Any:
        """What the dashboard answers, with the token."""
        headers = {"Authorization": f"Bearer {self.token.read_text()}"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=30) as answer:
            return json.load(answer)


class Hold:
    """An action of a fault: requests that come to it wait until they may go on."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        self.go.wait(TIMEOUT_S)


@contextlib.contextmanager
def start(folder: Path, server: s3_server.S3Server, given: Sequence[Path] = ()) -> Iterator[Cluster]:
    """A head, two CPU nodes and a GPU node, until the block ends.

    Args:
        folder: for logs and tokens; what is in its `auth` all nodes see.
        server: the object store.
        given: files and folders that are part of the image, such as bundles.

    Raises:
        RuntimeError: it did not come up; the message has what the node said.
    """
    (auth := folder / "auth").mkdir()
    token = auth / "token"
    token.write_text(secrets.token_hex(32))
    image = [REPOSITORY, Path(sys.prefix), Path(sys.base_prefix), auth, *given]
    with (
        lab(folder, [path.resolve() for path in image]) as machines,
        FaultProxy(server.endpoint_url, address=machines.address) as store,
    ):
        variables = replace(server, endpoint_url=store.url).environment | {
            "PATH": f"{_PROGRAMS}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            # As in conftest.py, for a machine that has other things to do.
            "RAY_worker_niceness": "0",
            "OMP_WAIT_POLICY": "passive",
            # 32 processes to read the footers of a handful of files, each time, would take longer than the rest.
            "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
            "RAY_JOB_STOP_WAIT_TIME_S": "60",  # else a job on a busy machine leaves its lease to run out
            **_PATIENCE,
        }
        cluster = Cluster(token, store, machines, variables)
        cluster.start_head(*((6379, 8265) if machines.isolated else (free_port(), free_port())))
        cluster.add("cpu", "cpu", "gpu")
        yield cluster


# --- by hand ----------------------------------------------------------------------------------------------------------


def explain(cluster: Cluster, server: s3_server.S3Server, bucket: str) -> str:
    """What to type in another terminal, and in this one."""
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(cluster.token), **server.environment}
    job = f"python jobs/score.py s3://{bucket}/photos --out s3://{bucket}/out --encoders 1 --gpus-per-encoder 1"
    return f"""
The dashboard is at {cluster.url} and asks for the token: {cluster.token.read_text()}
In another terminal, with the virtual environment's programs on its PATH:

{chr(10).join(f"export {name}={value}" for name, value in variables.items())}
ray job submit --address {cluster.url} --working-dir . -- {job}
picinspector top s3://{bucket}/out

Here: `pull NAME` (its cable), `kill NAME`, `add cpu`, `add gpu`; Ctrl-D takes everything down.
What the nodes say is in {cluster.token.parent.parent}.
"""


def obey(cluster: Cluster, words: list[str]) -> str:
    """Do what a line says; the nodes that are alive after it, or what is wrong with it."""
    match words:
        case ["pull", name] if name in cluster.nodes:
            cluster.pull_cable(name)
        case ["kill", name] if name in cluster.nodes:
            cluster.kill(name)
        case ["add", kind] if kind in KINDS:
            cluster.add(kind)
        case []:
            pass
        case _:
            return f"not understood: {' '.join(words)}; nodes are {', '.join(cluster.nodes)}"
    return f"alive, for all the head knows: {', '.join(sorted(cluster.alive()))}"


def main() -> None:
    """A cluster, an object store, and some photos in it."""
    from tests.test_faults_s3 import put_photos

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # how a service manager says Ctrl-C
    os.environ.update(s3_server.ENVIRONMENT)
    with (
        contextlib.suppress(KeyboardInterrupt),
        tempfile.TemporaryDirectory(prefix="several-nodes-") as folder,
        s3_server.start() as server,
        start(Path(folder), server) as cluster,
    ):
        put_photos(server, bucket := server.make_bucket(), [f"{number:03}" for number in range(48)])
        print(explain(cluster, server, bucket), flush=True)  # noqa: T201
        for line in sys.stdin:
            print(obey(cluster, line.split()), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
