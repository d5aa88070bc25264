"""A real S3 server for the tests: Ceph radosgw over one monitor and one in-memory OSD, all on loopback.

Where Ceph is not installed, moto's server stands in, with keys checked; `start()` yields an `S3Server` either way.
`python -m tests.s3_server` starts one by hand, prints how to reach it and stops it at Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests import services

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "ceph", "ceph-authtool", "monmaptool", "radosgw-admin")
DEBIAN_PACKAGES = "radosgw ceph-mon ceph-osd ceph-common"

#: Without these, newer AWS clients send checksums in a trailer that radosgw 16 answers with 411, ask a cloud's metadata
#: service for credentials that a test must not have, and read the developer's own keys.
ENVIRONMENT = {
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}

#: Bound of every single step of the start. Measured on two cores: 1.3 s for all of it, against 11 s with the monitor's
#: own pace of one change a second (`paxos propose interval`), and 130 MB for the three daemons.
STEP_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class S3Server:
    """Where the server is and the keys that it accepts."""

    endpoint_url: str
    access_key: str
    secret_key: str
    kind: str
    region: str = "us-east-1"
    #: Take the front of the server off the network at once, and put it back on the same port; nothing stored is lost.
    stop: Callable[[], object] = field(default=lambda: None, repr=False, compare=False)
    restart: Callable[[], object] = field(default=lambda: None, repr=False, compare=False)

    @property
    def storage_options(self) -> dict[str, Any]:
        """Keyword arguments of `s3fs.S3FileSystem` and `fsspec.filesystem("s3", ...)`."""
        return {
            "key": self.access_key,
            "secret": self.secret_key,
            "client_kwargs": {"endpoint_url": self.endpoint_url, "region_name": self.region},
        }

    @property
    def environment(self) -> dict[str, str]:
        """What a child process, or Ray's workers, need to reach the server with no other setting."""
        return {
            **ENVIRONMENT,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
        }

    def client(self, service: str = "s3") -> Any:
        """A boto3 client. Make buckets with it: s3fs's mkdir sends a location that radosgw refuses."""
        return boto3.client(
            service,
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            config=Config(
                s3={"addressing_style": "path"},
                retries={"max_attempts": 1},
                connect_timeout=5,
                read_timeout=30,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def make_bucket(self) -> str:
        """Make an empty bucket with a name nobody else has."""
        bucket = f"photos-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=bucket)
        return bucket


@contextlib.contextmanager
def start() -> Iterator[S3Server]:
    """Start radosgw, or moto's server where Ceph is not installed; stop it on leaving.

    Raises:
        RuntimeError: it did not come up in time (the message holds the tail of its log), or
            PICINSPECTOR_REQUIRE_SERVICES=1 and Ceph is not installed.
    """
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        services.record_stand_in(
            "S3", "moto (mock)", f"for the real one, apt-get install --no-install-recommends {DEBIAN_PACKAGES}"
        )
        with _moto() as server:
            yield server
        return
    with _ceph() as server:
        services.record_real("S3", server.kind)
        yield server


# --- Ceph ---


@contextlib.contextmanager
def _ceph() -> Iterator[S3Server]:
    folder = Path(tempfile.mkdtemp(prefix="picinspector-ceph-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        v2_port, v1_port, s3_port = _free_ports(3)
        access_key, secret_key = f"TEST{secrets.token_hex(8).upper()}", secrets.token_hex(20)
        conf = _write_ceph_conf(folder, v2_port, v1_port, s3_port)
        _make_ceph_keys_and_monitor(folder, conf, v2_port, v1_port)

        stack.enter_context(_daemon(folder, "mon", ["ceph-mon", "-f", "-c", conf, "-i", "a"]))
        osd_uuid = str(uuid.uuid4())
        _run(folder, ["ceph", "-c", conf, "--connect-timeout", "20", "osd", "new", osd_uuid, "0"])
        _run(folder, ["ceph-osd", "-c", conf, "--mkfs", "-i", "0", "--osd-uuid", osd_uuid])
        stack.enter_context(_daemon(folder, "osd", ["ceph-osd", "-f", "-c", conf, "-i", "0"]))
        # The user is made before the gateway starts: both create the zone's pools, and at once they collide.
        _run(
            folder,
            [
                *(
                    "radosgw-admin",
                    "-c",
                    conf,
                    "-n",
                    "client.rgw",
                    "user",
                    "create",
                    "--uid=test",
                    "--display-name=test",
                ),
                *(f"--access-key={access_key}", f"--secret-key={secret_key}", "--max-buckets=0"),
            ],
        )
        # The kernel ends a daemon with the thread that started it, and whoever restarts this one may be passing.
        starter = stack.enter_context(ThreadPoolExecutor(1))
        gateway = stack.enter_context(contextlib.ExitStack())

        def start_gateway() -> None:
            gateway.close()
            process = gateway.enter_context(_daemon(folder, "rgw", ["radosgw", "-f", "-c", conf, "-n", "client.rgw"]))
            _wait_until_it_answers(server, process, folder)

        url, kind = f"http://127.0.0.1:{s3_port}", f"Ceph radosgw {_ceph_version()}"

        def restart() -> None:
            starter.submit(start_gateway).result()

        server = S3Server(url, access_key, secret_key, kind, stop=gateway.close, restart=restart)
        restart()
        yield server


def _write_ceph_conf(folder: Path, v2_port: int, v1_port: int, s3_port: int) -> str:
    """Write ceph.conf: one copy of everything, in memory, as few placement groups and threads as will do.

    cephx stays on: without it radosgw 16 ends with error -13.
    """
    conf = folder / "ceph.conf"
    conf.write_text(
        f"""[global]
fsid = {uuid.uuid4()}
mon initial members = a
mon host = [v2:127.0.0.1:{v2_port},v1:127.0.0.1:{v1_port}]
public network = 127.0.0.0/8
ms bind ipv6 = false
keyring = {folder}/keyring
run dir = {folder}
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
log file = {folder}/$name.log
log to stderr = false
debug rocksdb = 0/0
mon cluster log file = {folder}/cluster.log
crash dir = {folder}
max open files = 0
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
paxos propose interval = 0.02
paxos min wait = 0.01
[mon.a]
mon data = {folder}/mon
mon data avail crit = 1
mon data avail warn = 2
[osd.0]
osd data = {folder}/osd
osd objectstore = memstore
osd class update on start = false
osd crush update on start = true
memstore device bytes = 4294967296
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{s3_port}
rgw data = {folder}/rgw
rgw run sync thread = false
rgw enable gc threads = false
rgw enable lc threads = false
rgw enable quota threads = false
rgw thread pool size = 64
"""
    )
    return str(conf)


def _make_ceph_keys_and_monitor(folder: Path, conf: str, v2_port: int, v1_port: int) -> None:
    """Make the keyring and the monitor's store.

    The monitor imports every key of the keyring it is made with, so no daemon has to be registered afterwards: each
    call of the `ceph` command costs most of a second.
    """
    keyring = str(folder / "keyring")
    for sub_folder in ("mon", "osd", "rgw"):
        (folder / sub_folder).mkdir()
    everything = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"]
    _run(folder, ["ceph-authtool", "-C", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"])
    for name, caps in (
        ("client.admin", everything),
        ("client.rgw", everything),
        ("osd.0", ["--cap", "mon", "allow profile osd", "--cap", "osd", "allow *"]),
    ):
        _run(folder, ["ceph-authtool", keyring, "--gen-key", "-n", name, *caps])
    monmap = str(folder / "monmap")
    address = f"[v2:127.0.0.1:{v2_port},v1:127.0.0.1:{v1_port}]"
    fsid = re.search(r"fsid = (\S+)", Path(conf).read_text())
    assert fsid is not None
    _run(folder, ["monmaptool", "--create", "--fsid", fsid[1], "--addv", "a", address, monmap])
    _run(folder, ["ceph-mon", "-c", conf, "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring])


def _wait_until_it_answers(server: S3Server, gateway: subprocess.Popen[bytes], folder: Path) -> None:
    client = server.client()
    deadline = time.monotonic() + STEP_TIMEOUT_S
    while True:
        try:
            client.list_buckets()
            return
        except (ClientError, BotoCoreError) as error:
            if gateway.poll() is not None:
                raise RuntimeError(f"radosgw ended with {gateway.returncode}: {_log_tail(folder)}") from error
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"radosgw silent after {STEP_TIMEOUT_S:.0f} s: {error}: {_log_tail(folder)}"
                ) from error
            time.sleep(0.1)


@contextlib.contextmanager
def _daemon(folder: Path, name: str, command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    # The kernel ends the daemon with us, should we be killed before we can.
    guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    with (folder / f"{name}.out").open("wb") as out:
        process = subprocess.Popen([*guard, *command], stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        yield process
    finally:
        # Nothing that a daemon holds is worth an orderly end: all of it is in memory or in the folder to be removed.
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=STEP_TIMEOUT_S)


def _run(folder: Path, command: Sequence[str]) -> None:
    try:
        subprocess.run(
            command, check=True, timeout=STEP_TIMEOUT_S, stdin=subprocess.DEVNULL, capture_output=True, cwd=folder
        )
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace")[-1000:]
        raise RuntimeError(f"{' '.join(command)} ended with {error.returncode}: {said} {_log_tail(folder)}") from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{' '.join(command)} took over {STEP_TIMEOUT_S:.0f} s: {_log_tail(folder)}") from error


def _log_tail(folder: Path) -> str:
    logs = sorted(path for pattern in ("*.out", "*.log") for path in folder.glob(pattern))
    tails = (f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs if log.stat().st_size)
    return "\n".join(["logs:", *tails])


def _ceph_version() -> str:
    said = subprocess.run(["radosgw", "--version"], check=True, timeout=STEP_TIMEOUT_S, capture_output=True, text=True)
    found = re.search(r"version (\S+)", said.stdout)
    return found[1] if found else "of unknown version"


def _free_ports(count: int) -> list[int]:
    """Ports nobody listens on. All are held until the last is known, so that no two are the same."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [int(held.getsockname()[1]) for held in sockets]


# --- moto ---


@contextlib.contextmanager
def _moto() -> Iterator[S3Server]:
    import logging

    import requests
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        endpoint_url = f"http://{host}:{port}"
        iam = S3Server(endpoint_url, "anyone", "anything", "moto").client("iam")
        iam.create_user(UserName="test")
        everything = '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"*","Resource":"*"}]}'
        iam.put_user_policy(UserName="test", PolicyName="everything", PolicyDocument=everything)
        key = iam.create_access_key(UserName="test")["AccessKey"]
        # From here on moto checks keys, as a server does.
        requests.post(f"{endpoint_url}/moto-api/reset-auth", data=b"0", timeout=STEP_TIMEOUT_S).raise_for_status()

        def restart() -> None:
            nonlocal moto
            moto = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
            moto.start()

        keys = key["AccessKeyId"], key["SecretAccessKey"]
        yield S3Server(endpoint_url, *keys, "moto (mock)", stop=lambda: moto.stop(), restart=restart)
    finally:
        moto.stop()


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    with start() as running:
        for name, value in {**running.environment, "S3_BUCKET": running.make_bucket()}.items():
            print(f"export {name}={value}", flush=True)  # noqa: T201
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
