"""The service: score one photo now, over HTTP, with the stages and the models of the batch job.

::

    client -- HTTP --> server (uvicorn: heads, connections) -> gate (token, sizes, time, load) -> front (FastAPI)
           -- Ray Serve handle --> replicas: decode (processes) -> batch -> Encode [-> Caption] -> Score

Why uvicorn answers here and not Ray Serve's own HTTP proxy (2.60): the proxy puts every piece of a body on an unbounded
queue at once, also while the request waits for a replica, so no limit of ours could keep a body out of memory; a header
lets clients set their own time-out; and it answers `/-/routes` to anybody. Behind a handle Ray Serve does what it is
good at: replicas, their scaling, batches, and turning away what would wait too long.

Photos travel to replicas in gRPC messages and not through Ray's object store, which may spill to disk.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable

import ray
from ray import serve
from ray.exceptions import RayError

from picinspector import runs
from picinspector.bundle import Bundle, open_bundle
from picinspector.errors import UsageError
from picinspector.serve import cluster, server
from picinspector.serve.front import make_app
from picinspector.serve.settings import Settings, is_loopback


def run(settings: Settings, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; requests under way are finished first.

    Args:
        settings: see `Settings`.
        on_ready: told the URL once photos can be judged.

    Raises:
        PicInspectorError: it cannot start.
    """
    rules = settings.rules
    if rules.token is None and not settings.public and not is_loopback(settings.host):
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
            handle, capacity = cluster.start(settings, bundle)
            judge, ready = cluster.judge_with(handle), cluster.readiness_of(settings.name)
            app = make_app(rules, bundle, judge, ready, capacity)
            port = listener.getsockname()[1]
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            server.answer(app, listener, rules.timeout_s, lambda: on_ready(f"http://{host}:{port}"))
            handle.shutdown()  # else its router, asking on, would start a Ray anew
        finally:
            if settings.on_a_cluster:  # a Ray of our own ends with us
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
