"""Several machines on this one: kernel namespaces, each with a cable to a switch.

A machine has its own network, processes, host name and shared memory. Of this computer's files it sees all, read-only,
as a node sees the image it is started from; but /tmp is a disk of its own, with nothing on it but what it is given. So
nothing passes between machines but what goes over the network, and no machine reaches further than this computer::

    this computer (10.x.y.1) --- switch --- head (10.x.y.2)
                                        --- cpu-1 (10.x.y.3)

The kernel takes machines, switch and cables down with the processes they are made of, and those with this one, however
it ends. Where namespaces cannot be had, the stand-in has processes on loopback that share this computer's disk.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests import services
from tests.ray_head import free_port

PROGRAMS = {"ip": "iproute2", "nsenter": "util-linux", "setpriv": "util-linux", "unshare": "util-linux"}
#: A process may have several switches at once, each with a cable to this computer.
_CABLES = itertools.count(1)
_UNSHARE = ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
#: What has to work for a machine to be made: files, a switch, a cable.
_PROBE = """set -e
mount -n -t tmpfs tmpfs /dev/shm
mount -n -o remount,bind,ro /
ip link add switch type bridge
ip link add cable type veth peer name end"""
#: $1... are paths that it is given, up to `--`; behind it is the command. Mounts are not noted in /run/mount (-n):
#: that is this computer's. The new /tmp is made in another place, so that what lies in the old one can be put into it.
_MACHINE = """set -eu
mount -n -t tmpfs -o mode=1777 tmpfs /dev/shm
while [ "$1" != -- ]; do
  place="/dev/shm${1#/tmp}"
  if [ -d "$1" ]; then mkdir -p "$place"; else mkdir -p "${place%/*}"; : > "$place"; fi
  mount -n -o bind,ro "$1" "$place"
  shift
done
shift
mount -n --move /dev/shm /tmp
mount -n -t tmpfs -o mode=1777 tmpfs /dev/shm
echo "$MACHINE" > /proc/sys/kernel/hostname
printf '127.0.0.1 localhost\\n%s %s\\n' "$ADDRESS" "$MACHINE" > /tmp/hosts
mount -n --bind /tmp/hosts /etc/hosts
mount -n --bind /dev/null /etc/resolv.conf
mount -n -o remount,bind,ro /
read -r _
ip link set lo up
ip address add "$ADDRESS/24" dev eth0
ip link set eth0 up
ip route add default via "$GATEWAY"
"$@"
exit $?"""


@dataclass
class Machine:
    """One that runs a command as long as it is on.

    Attributes:
        name: also its host name.
        address: where the others reach it.
        log: what its command says.
        process: ends with it.
    """

    name: str
    address: str
    log: Path
    process: subprocess.Popen[bytes] = field(repr=False)
    port: str = field(repr=False)
    _loopback: bool = field(default=False, repr=False)

    def kill(self) -> None:
        """End all that it runs, at once."""
        for pid in self._inside():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait(60)

    def _inside(self) -> list[int]:
        """Its first process, with which the kernel ends all others; of a stand-in all."""
        with contextlib.suppress(psutil.NoSuchProcess):
            outer = psutil.Process(self.process.pid)
            inner = [child.pid for child in outer.children(recursive=self._loopback)]
            return [*inner, outer.pid] if self._loopback else inner
        return []


class Lab:
    """Machines in namespaces.

    Attributes:
        address: of this computer, to the machines.
        given: what they see of this computer's /tmp.
        isolated: whether each has a network and a disk of its own.
    """

    isolated = True

    def __init__(self, folder: Path, given: Sequence[Path] = ()) -> None:
        self.given = [path for path in given if path.is_relative_to("/tmp")]
        self._folder, self._stack = folder, contextlib.ExitStack()
        network = _free_network()
        self._addresses = map(str, network.hosts())
        self._numbers = itertools.count(1)
        self.address = next(self._addresses)

    def __enter__(self) -> Lab:
        with contextlib.ExitStack() as stack:
            log = self._folder / "switch.log"
            switch = stack.enter_context(_process(["unshare", "--net", "--fork", "--kill-child", "cat"], log, {}))
            self._switch = _first_child(switch, log)
            self._at_switch("ip", "link", "add", "switch", "type", "bridge")
            self._at_switch("ip", "link", "set", "switch", "up")
            cable = f"pic{os.getpid()}-{next(_CABLES)}"
            _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "uplink", "netns", str(self._switch))
            stack.callback(subprocess.run, ["ip", "link", "delete", cable], capture_output=True, check=False)
            _run("ip", "address", "add", f"{self.address}/24", "dev", cable)
            _run("ip", "link", "set", cable, "up")
            self._at_switch("ip", "link", "set", "uplink", "master", "switch", "up")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def boot(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Machine:
        """Turn a machine on; `{address}` in the words of its command becomes its own."""
        address, log = next(self._addresses), self._folder / f"{name}.log"
        words = [word.replace("{address}", address) for word in command]
        variables = {"MACHINE": name, "ADDRESS": address, "GATEWAY": self.address, "HOME": "/tmp", **environment}
        shell = [*_UNSHARE, "bash", "-c", _MACHINE, name, *map(str, self.given), "--", *words]
        process = self._stack.enter_context(_process(shell, log, variables))
        machine = Machine(name, address, log, process, f"port{next(self._numbers)}")
        self._stack.callback(machine.kill)
        first = _first_child(process, log)
        self._at_switch(*f"ip link add {machine.port} type veth peer name eth0 netns {first}".split())
        self._at_switch("ip", "link", "set", machine.port, "master", "switch", "up")
        assert process.stdin is not None
        process.stdin.write(b"plugged in\n")
        process.stdin.close()
        return machine

    def pull_cable(self, machine: Machine) -> None:
        """From now on nothing reaches it, and nobody is told."""
        self._at_switch("ip", "link", "set", machine.port, "down")

    def _at_switch(self, *command: str) -> None:
        _run("nsenter", f"--net=/proc/{self._switch}/ns/net", *command)


class Loopback(Lab):
    """The stand-in: processes on this computer. A machine without its cable is one that stands still."""

    isolated = False

    def __init__(self, folder: Path) -> None:
        self.given, self.address = [], "127.0.0.1"
        self._folder, self._stack = folder, contextlib.ExitStack()

    def __enter__(self) -> Loopback:
        return self

    def boot(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Machine:
        log, words = self._folder / f"{name}.log", [word.replace("{address}", self.address) for word in command]
        disk = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pic", dir="/tmp"))  # sockets: a short name
        if words[:2] == ["ray", "start"]:  # else two would want the same port, or the same names of sockets
            words += [f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={disk}"]
        variables = {**environment, "HOME": disk}
        process = self._stack.enter_context(_process(words, log, variables))
        machine = Machine(name, self.address, log, process, "", _loopback=True)
        self._stack.callback(machine.kill)
        return machine

    def pull_cable(self, machine: Machine) -> None:
        for pid in machine._inside():
            os.kill(pid, signal.SIGSTOP)


@contextlib.contextmanager
def lab(folder: Path, given: Sequence[Path] = ()) -> Iterator[Lab]:
    """A switch without machines yet; or the stand-in.

    Args:
        folder: for the logs.
        given: files and folders that machines see where they are here. All that is not below /tmp they see anyway.

    Raises:
        RuntimeError: PICINSPECTOR_REQUIRE_SERVICES=1, and a program is not installed. Where the system forbids
            namespaces, the stand-in is all that can be had.
    """
    stand_in = "processes on loopback"
    if missing := sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None}):
        services.record_stand_in("machines", stand_in, f"for namespaces, apt-get install {' '.join(missing)}")
        made: Lab = Loopback(folder)
    else:
        probe = subprocess.run([*_UNSHARE, "bash", "-c", _PROBE], capture_output=True, text=True, check=False)
        if probe.returncode:
            services.record_refused("machines", stand_in, " ".join(probe.stderr.split()))
            made = Loopback(folder)
        else:
            services.record_real("machines", "namespaces")
            made = Lab(folder, given)
    with made as started:
        yield started


def _free_network() -> ipaddress.IPv4Network:
    """A private /24 that nothing here has an address in or a route to."""
    routes: list[dict[str, Any]] = json.loads(_run("ip", "-json", "-4", "route", "show", "table", "all"))
    taken = [ipaddress.IPv4Network(route["dst"]) for route in routes if route["dst"] != "default"]
    networks = list(ipaddress.IPv4Network("10.0.0.0/8").subnets(new_prefix=24))
    start = os.getpid() * 257 % len(networks)  # two that start at once are far from each other
    for network in networks[start:] + networks[:start]:
        if not any(network.overlaps(other) for other in taken):
            return network
    raise RuntimeError("all of 10.0.0.0/8 is routed somewhere: no network is left for the machines")


@contextlib.contextmanager
def _process(command: Sequence[str], log: Path, variables: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """One that the kernel ends with this process, out of reach of the terminal's Ctrl-C."""
    environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **variables}
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command] if shutil.which("setpriv") else list(command),
            stdin=subprocess.PIPE, stdout=out, stderr=out, env=environment, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait(60)
        if process.stdin is not None:
            process.stdin.close()


def _first_child(process: subprocess.Popen[bytes], log: Path) -> int:
    """The process that `unshare` starts in what it made."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if children := psutil.Process(process.pid).children():
            return children[0].pid
        time.sleep(0.01)
    raise RuntimeError(f"no namespace was made: {log.read_text('utf-8', 'replace')}")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
