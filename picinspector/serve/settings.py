"""What the service is told: who may ask, how much a request may cost, and how the service runs."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field

from picinspector.errors import UsageError
from picinspector.photo import Limits

#: Beside the photos of a body: boundaries, names, braces.
_OVERHEAD_BYTES = 64 * 1024
#: A batch may be so many times as large as its largest photo.
_BATCH_PHOTOS = 8


@dataclass(frozen=True)
class Rules:
    """What a request may cost, and who may send one.

    Attributes:
        token: that every request has to bear, but for health, readiness and the page; None lets everybody in.
        limits: of one photo.
        timeout_s: from the last byte of a request's head to the answer.
        local_only: answer only to the names of this machine, and to no other page than the service's own. A page from
            elsewhere can point a name of its own at 127.0.0.1 (DNS rebinding), but it cannot change what the browser
            says the name is, nor where the page is from.
        allow_private: fetch URLs from addresses that are not public too.
    """

    token: str | None = field(default=None, repr=False)
    limits: Limits = field(default_factory=lambda: Limits(max_bytes=32 * 1024**2, max_pixels=100_000_000))
    timeout_s: float = 30.0
    local_only: bool = False
    allow_private: bool = False

    def body_bytes(self, path: str) -> int:
        """The longest body of a request for this path."""
        photos_bytes = {"/v1/score": self.limits.max_bytes * 4 // 3, "/v1/score/batch": self.batch_bytes}  # base64
        return photos_bytes.get(path, 0) + _OVERHEAD_BYTES

    @property
    def batch_bytes(self) -> int:
        """Of the photos of one batch together."""
        return _BATCH_PHOTOS * self.limits.max_bytes


@dataclass(frozen=True)
class Settings:
    """How the service runs.

    Attributes:
        bundle: name or folder of the bundle, the same on every node.
        host, port: where it listens; port 0 takes a free one.
        rules: who may ask, and how much.
        public: listen on an interface that others reach although there is no token.
        captions: let the bundle's captioner describe the photos.
        replicas: how many at least and at most; None works it out from the cluster.
        gpus: of each replica, may be a fraction; None takes one where the cluster has any.
        queue: photos that may wait for a replica; more are turned away.
        name: of the application on the cluster, one for each service on it.
        address: the Ray cluster; None takes `RAY_ADDRESS`, else starts Ray on this machine.
    """

    bundle: str = "builtin"
    host: str = "127.0.0.1"
    port: int = 8000
    rules: Rules = field(default_factory=Rules)
    public: bool = False
    captions: bool = False
    replicas: tuple[int, int] | None = None
    gpus: float | None = None
    queue: int = 64
    name: str = "picinspector"
    address: str | None = None

    @property
    def on_a_cluster(self) -> bool:
        """Whether the replicas run on a Ray that is there already."""
        return bool(self.address or os.environ.get("RAY_ADDRESS"))


def is_loopback(host: str) -> bool:
    """True for the names and addresses under which only this machine reaches itself."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_from(path: str | None) -> str | None:
    """The token: of a file, else of `PICINSPECTOR_TOKEN`; None where there is neither.

    The variable is gone then: Ray's workers, and the processes that decode what strangers send, would inherit it.

    Raises:
        UsageError: the file cannot be read, or the token is too short to be one or no ASCII.
    """
    token = os.environ.pop("PICINSPECTOR_TOKEN", "").strip()
    if path is not None:
        try:
            with open(path, encoding="utf-8") as file:  # noqa: PTH123
                token = file.read().strip()
        except (OSError, UnicodeError) as error:
            raise UsageError(f"--token-file {path}: cannot be read ({error})") from error
    elif not token:
        return None
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError("the token must be 16 or more letters, digits and signs without spaces; openssl rand -hex 32")
    return token
