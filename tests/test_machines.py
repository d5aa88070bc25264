"""The machines of `tests.machines` share what they are said to share, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import machines, services
from tests.machines import Lab, Machine
from tests.ray_head import REPOSITORY

#: Says what it sees and writes where it can, then answers whoever connects.
PEER = """
import json, os, pathlib, socket, sys
seen = {"host": socket.gethostname(), "tmp": sorted(os.listdir("/tmp")), "processes": os.getpid()}
pathlib.Path("/tmp/mine").write_text("mine")
for name in ("checkout", "given"):
    try:
        (pathlib.Path(sys.argv[1 if name == "checkout" else 2]) / "touched-by-a-test").touch()
    except OSError as error:
        seen[name] = error.strerror
seen["given files"] = sorted(os.listdir(sys.argv[2]))
print(json.dumps(seen), flush=True)
server = socket.create_server(("", 9000))
while True:
    server.accept()[0].sendall(b"here")
"""
#: Connects to its argument.
CALL = "import socket, sys; print(socket.create_connection((sys.argv[1], 9000), 5).recv(4).decode(), flush=True)"


def said(machine: Machine) -> str:
    """The first line that its command prints."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (text := machine.log.read_text("utf-8")).endswith("\n"):
            return text
        time.sleep(0.02)
    raise TimeoutError(f"{machine.name} says nothing")


def test_machines_share_the_image_and_the_network_alone(tmp_path: Path) -> None:
    (given := tmp_path / "given").mkdir()
    (given / "bundle").touch()
    with machines.lab(tmp_path, [given, REPOSITORY, Path(sys.prefix)]) as lab:  # for a checkout below /tmp
        if not lab.isolated:
            assert any(line.startswith("services: machines = processes on loopback") for line in services.USED)
            return
        words = [sys.executable, "-c", PEER, str(REPOSITORY), str(given)]
        peers = [lab.boot(name, words, {}) for name in ("one", "two")]
        for peer in peers:
            seen = json.loads(said(peer))
            assert seen["host"] == peer.name and seen["processes"] < 100
            ways = {path.parts[2] for path in lab.given}
            assert seen["tmp"] == sorted({"hosts", *ways}), "its own disk, and the way to what it is given"
            assert seen["checkout"] == seen["given"] == "Read-only file system"
            assert seen["given files"] == ["bundle"]
        assert not Path("/tmp/mine").exists()
        assert call(lab, "three", peers[0]) == "here\n"
        lab.pull_cable(peers[0])
        answer = call(lab, "four", peers[0])
        assert "No route to host" in answer or "timed out" in answer, "neither a refusal nor a reset"
        assert call(lab, "five", peers[1]) == "here\n"


def call(lab: Lab, name: str, peer: Machine) -> str:
    """What another machine gets from it."""
    return said(lab.boot(name, [sys.executable, "-c", CALL, peer.address], {}))


def test_one_process_may_have_two_switches(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    with machines.lab(folders[0]) as one, machines.lab(folders[1]) as two:
        assert not one.isolated or one.address != two.address


@pytest.mark.parametrize("ends_by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_behind(tmp_path: Path, ends_by: signal.Signals) -> None:
    code = (
        "import pathlib, sys, time; from tests import machines\n"
        "with machines.lab(pathlib.Path(sys.argv[1])) as lab:\n"
        "    first = lab.boot('one', ['sleep', '1000'], {})\n"
        "    print(first.process.pid, flush=True); time.sleep(1000)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as owner:
        assert owner.stdout is not None
        process = psutil.Process(int(owner.stdout.readline()))
        family = [process, *process.children(recursive=True)]
        os.kill(owner.pid, ends_by)
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert not alive and len(gone) == len(family)
    deadline = time.monotonic() + 30  # the kernel takes networks down a little later
    while any(name.startswith(f"pic{owner.pid}-") for name in psutil.net_if_addrs()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
