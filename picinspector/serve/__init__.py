"""The service: score one photo now, over HTTP, with the stages and the models of the batch job.

::

    client -- HTTP --> gate (token, sizes, time) -> front (FastAPI, in this process)
           -- Ray Serve handle --> replicas: decode (processes) -> batch -> Encode [-> Caption] -> Score

Why uvicorn answers here and not Ray Serve's own HTTP proxy (2.60): the proxy puts every piece of a body on an unbounded
queue at once, also while the request waits for a replica, so no limit of ours could keep a body out of memory; a header
lets clients set their own time-out; and it answers `/-/routes` to anybody. Behind a handle Ray Serve does what it is
good at: replicas, their scaling, batches, and turning away what would wait too long.

Photos travel to replicas in gRPC messages and not through Ray's object store, which may spill to disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
import uvicorn
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from picinspector import logs, runs
from picinspector.bundle import Bundle, open_bundle
from picinspector.errors import PicInspectorError, UsageError
from picinspector.serve.front import Judge, Ready, make_app
from picinspector.serve.gate import Rules, busy, is_loopback
from picinspector.serve.replica import Replica

_DEPLOYMENT = "Replica"
#: On the CPU a batch of more makes nobody's photo faster.
_CPU_BATCH = 16
#: What `/v1/ready` found is true for so long: it asks the cluster, and anybody may ask it.
_READY_S = 1.0


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


def run(settings: Settings, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; requests under way are finished first.

    Args:
        settings: see `Settings`.
        on_ready: told the URL once photos can be judged.

    Raises:
        PicInspectorError: it cannot start.
    """
    if settings.rules.token is None and not settings.public and not is_loopback(settings.host):
        raise UsageError(
            f"--host {settings.host} is reached from other machines, and there is no token: set PICINSPECTOR_TOKEN, "
            "give --token-file, or say --allow-public-without-token"
        )
    bundle = _open(settings)
    with contextlib.closing(_bind(settings.host, settings.port)) as listener:
        # Ray starts its workers with the least of priorities, which on a busy machine turns 0.1 s into seconds.
        os.environ.setdefault("RAY_worker_niceness", "0")
        runs.connect(settings.address)
        try:
            handle = _deploy(settings, bundle)
            app = make_app(settings.rules, bundle, _judge(handle), _ready(settings.name))
            port = listener.getsockname()[1]
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            on_ready(f"http://{host}:{port}")
            _answer(app, listener, settings.rules.timeout_s)
            handle.shutdown()  # else its router, asking on, would start a Ray anew
        finally:
            if _on_a_cluster(settings):  # a Ray of our own ends with us
                with contextlib.suppress(RayError):
                    serve.delete(settings.name)
            ray.shutdown()


def _open(settings: Settings) -> Bundle:
    bundle = open_bundle(settings.bundle)
    for piece in bundle.pieces:  # damage is told here, and not by a replica
        bundle.piece(piece)
    if settings.captions and not bundle.has("captioner"):
        raise UsageError(f"bundle {bundle.name} has no captioner; leave out --captions all")
    return bundle


def _bind(host: str, port: int) -> socket.socket:
    """A socket with its address, before anything that takes long; it does not listen yet, so nobody waits at it."""
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}, port {port} ({error.strerror}); give another --host or --port"
        ) from (error)


def _deploy(settings: Settings, bundle: Bundle) -> Any:
    """The handle of the replicas, once there are as many as shall be at least."""
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # what fails is raised as well
    serve.start(proxy_location="Disabled", logging_config=quiet)
    try:
        handle = serve.run(
            _bind_replicas(settings, bundle), name=settings.name, route_prefix=None, logging_config=quiet
        )
    except RuntimeError as error:
        raise PicInspectorError(f"the replicas do not start: {str(error).strip().splitlines()[-1]}") from error
    return _by_message(handle)


def _by_message(handle: Any) -> Any:
    return handle.options(method_name="judge", _by_reference=False)


def _bind_replicas(settings: Settings, bundle: Bundle) -> Any:
    """The replicas as the cluster can have them: a Ray Serve application."""
    pools, cluster = runs.size_pools(1, None, settings.gpus, None), ray.cluster_resources()
    low, high = settings.replicas or (1, pools.encoders)
    cpus, all_cpus = pools.cpus, int(cluster.get("CPU", 1))
    if pools.gpus:
        decoders, fitting = max(1, all_cpus // high - 1), int(cluster.get("GPU", 0) / pools.gpus)
    else:
        decoders = cpus = max(1, min(cpus, all_cpus // high))
        fitting = all_cpus // cpus
    if low > fitting and not _on_a_cluster(settings):  # which could grow
        raise UsageError(
            f"{low} replicas do not fit this machine, {fitting} do; lower --replicas or --gpus-per-replica"
        )
    batch = pools.batch_size if pools.gpus else _CPU_BATCH
    fingerprints = {"encoder": bundle.encoder_fingerprint, "scorer": bundle.scorer_fingerprint}
    deployment = serve.deployment(
        Replica,
        name=_DEPLOYMENT,
        ray_actor_options={"num_cpus": cpus, "num_gpus": pools.gpus},
        max_ongoing_requests=2 * batch,  # one batch with the models, one with the decoders
        max_queued_requests=settings.queue,
        autoscaling_config={"min_replicas": low, "max_replicas": high, "target_ongoing_requests": batch},
        graceful_shutdown_timeout_s=settings.rules.timeout_s,
    )
    return deployment.bind(
        bundle=settings.bundle,
        fingerprints=fingerprints | ({"caption": bundle.caption_fingerprint} if settings.captions else {}),
        limits=settings.rules.limits,
        captions=settings.captions,
        threads=None if pools.gpus else cpus,
        decoders=decoders,
        batch_size=batch,
        timeout_s=settings.rules.timeout_s,
    )


def _on_a_cluster(settings: Settings) -> bool:
    return bool(settings.address or os.environ.get("RAY_ADDRESS"))


def _judge(handle: Any) -> Judge:
    async def judge(data: bytes, name: str) -> dict[str, Any]:
        response = handle.remote(data, name)
        try:
            row: dict[str, Any] = await response
        except asyncio.CancelledError:  # nobody waits for it any more
            response.cancel()
            raise
        except BackPressureError:
            raise busy("too many photos are waiting; come again") from None
        except (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError) as error:
            logs.event("replica_lost", level=logging.WARNING, error=type(error).__name__)
            raise busy("the replica that had the photo is gone; come again") from None
        return row

    return judge


def _ready(name: str) -> Ready:
    asked_at, found = float("-inf"), False

    def ask() -> bool:
        application = serve.status().applications.get(name)
        deployment = application.deployments.get(_DEPLOYMENT) if application is not None else None
        return deployment is not None and deployment.replica_states.get("RUNNING", 0) > 0

    async def ready() -> bool:
        nonlocal asked_at, found
        if time.monotonic() - asked_at > _READY_S:
            asked_at = time.monotonic()
            try:
                found = await asyncio.wait_for(asyncio.to_thread(ask), 5.0)
            except (RayError, TimeoutError):
                found = False
        return found

    return ready


def _answer(app: Any, listener: socket.socket, timeout_s: float) -> None:
    """HTTP until a signal; then what is under way is finished."""
    uvicorn_log = logging.getLogger("uvicorn.error")
    uvicorn_log.handlers, uvicorn_log.propagate = logging.getLogger("picinspector").handlers, False
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=True,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=int(timeout_s) + 5,
    )
    with _ended_by_signals():
        uvicorn.Server(config).run(sockets=[listener])


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """To be asked to end is no failure: uvicorn raises the signal again when all is answered, and that ends well."""
    before = {name: signal.signal(name, lambda *_: None) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def token_from(path: str | None) -> str | None:
    """The token: of a file, else of `PICINSPECTOR_TOKEN`; None where there is neither.

    Raises:
        UsageError: the file cannot be read, or the token is too short to be one or no ASCII.
    """
    if path is not None:
        try:
            with open(path, encoding="utf-8") as file:  # noqa: PTH123
                token = file.read().strip()
        except (OSError, UnicodeError) as error:
            raise UsageError(f"--token-file {path}: cannot be read ({error})") from error
    else:
        token = os.environ.get("PICINSPECTOR_TOKEN", "").strip()
        if not token:
            return None
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError("the token must be 16 or more letters, digits and signs without spaces; openssl rand -hex 32")
    return token
