"""The replicas: how many and how large this cluster can have them; started, asked, asked after."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

from picinspector import logs, machine, runs
from picinspector.bundle import Bundle
from picinspector.errors import PicInspectorError, UsageError
from picinspector.serve.front import Judge, Ready
from picinspector.serve.load import Capacity
from picinspector.serve.problems import busy
from picinspector.serve.replica import Replica
from picinspector.serve.settings import Settings

_DEPLOYMENT = "Replica"
#: On the CPU a batch of more makes nobody's photo faster.
_CPU_BATCH = 16
#: Of a node with GPUs that is not there yet, for each of them: the smallest that clouds have (AWS g4dn and g6, Google
#: g2, Azure NCasT4).
_CPUS_PER_GPU = 4
#: What `/v1/ready` found is true for so long: it asks the cluster, and anybody may ask it.
_READY_S = 1.0
#: What a call ends with when its replica does: it is shut down, or gone.
_GONE = (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)


@dataclass(frozen=True)
class Share:
    """What each replica has of its node.

    Attributes:
        cpus, gpus: kept for it.
        decoders: processes that decode; on a node with GPUs one CPU is left for what feeds them.
        fitting: replicas that fit the nodes there are.
    """

    cpus: int
    gpus: float
    decoders: int
    fitting: int


def share_of(nodes: Sequence[Mapping[str, float]], gpus: float, cpus: int, most: int) -> Share:
    """The same share on every node, for no replica knows yet where it will be.

    Args:
        nodes: the resources of each, as Ray names them.
        gpus: of a replica, 0 for none.
        cpus: of one without a GPU, at most.
        most: replicas there may be.
    """
    if not gpus:
        cpus = max(1, min(cpus, int(sum(node.get("CPU", 0) for node in nodes)) // most))
        return Share(cpus, 0.0, cpus, sum(int(node.get("CPU", 0)) // cpus for node in nodes))
    with_gpus = [(node.get("CPU", 0.0), int(node.get("GPU", 0.0) / gpus)) for node in nodes]
    shares = [int(cpus / fitting) for cpus, fitting in with_gpus if fitting] or [int(_CPUS_PER_GPU * gpus)]
    cpus = max(1, min(shares))
    return Share(cpus, gpus, max(1, cpus - 1), sum(fitting for _, fitting in with_gpus))


def start(settings: Settings, bundle: Bundle) -> tuple[Any, Capacity]:
    """The handle of the replicas, once there are as many as shall be at least; and what they take.

    Raises:
        UsageError: so many do not fit this machine.
        PicInspectorError: they do not start.
    """
    pools, nodes = runs.size_pools(1, None, settings.gpus, None), _nodes(settings)
    low, high = settings.replicas or (1, pools.encoders)
    share = share_of(nodes, pools.gpus, pools.cpus, high)
    if low > share.fitting and not settings.on_a_cluster:  # which could grow
        raise UsageError(
            f"{low} replicas do not fit this machine, {share.fitting} do; lower --replicas or --gpus-per-replica"
        )
    batch = pools.batch_size if share.gpus else _CPU_BATCH
    in_hand = 2 * batch  # one batch with the models, one with the decoders
    fingerprints = {"encoder": bundle.encoder_fingerprint, "scorer": bundle.scorer_fingerprint}
    deployment = serve.deployment(
        Replica,
        name=_DEPLOYMENT,
        ray_actor_options={"num_cpus": share.cpus, "num_gpus": share.gpus},
        max_ongoing_requests=in_hand,  # those that wait go to the first that has room; `Load` knows how many they are
        # A replica that was full Serve leaves alone for longer and longer, up to half a second of its own accord: with
        # 96 photos under way two cores judged 11 a second so, and judge 33 with this (measured, builtin bundle).
        request_router_config=RequestRouterConfig(initial_backoff_s=0.01, max_backoff_s=0.02),
        autoscaling_config={"min_replicas": low, "max_replicas": high, "target_ongoing_requests": batch},
        graceful_shutdown_timeout_s=settings.rules.timeout_s,
    )
    application = deployment.bind(
        bundle=settings.bundle,
        fingerprints=fingerprints | ({"caption": bundle.caption_fingerprint} if settings.captions else {}),
        limits=settings.rules.limits,
        captions=settings.captions,
        threads=None if share.gpus else share.cpus,
        decoders=share.decoders,
        batch_size=batch,
        timeout_s=settings.rules.timeout_s,
    )
    return _run(application, settings.name), Capacity(high * share.decoders, high * in_hand + settings.queue)


def _nodes(settings: Settings) -> list[dict[str, float]]:
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    if not settings.on_a_cluster:  # a Ray of our own counts more CPUs than there are
        nodes = [node | {"CPU": min(node.get("CPU", 0), machine.cores())} for node in nodes]
    return nodes


def _run(application: Any, name: str) -> Any:
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # what fails is raised as well
    serve.start(proxy_location="Disabled", logging_config=quiet)
    try:
        handle = serve.run(application, name=name, route_prefix=None, logging_config=quiet)
    except RuntimeError as error:
        raise PicInspectorError(f"the replicas do not start: {str(error).strip().splitlines()[-1]}") from error
    return handle.options(method_name="judge", _by_reference=False)


def judge_with(handle: Any) -> Judge:
    """Asks the replicas."""

    async def judge(data: bytes, name: str) -> dict[str, Any]:
        response = handle.remote(data, name)
        try:
            row: dict[str, Any] = await response
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or not task.cancelling():  # the replica's end cancelled it, and nobody here
                raise _lost(error) from None
            response.cancel()  # nobody waits for it any more
            raise
        except (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError) as error:
            raise _lost(error) from None
        except grpc.aio.AioRpcError as error:
            if error.code() not in _GONE:
                raise
            raise _lost(error) from None
        return row

    return judge


def _lost(error: BaseException) -> Exception:
    logs.event("replica_lost", level=logging.WARNING, error=type(error).__name__)
    return busy("the replica that had the photo is gone; come again")


def readiness_of(name: str) -> Ready:
    """Asks whether the application of this name has a replica."""
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
