"""How many photos are let in, what a replica gets of its node, and what becomes of a photo whose replica ends."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Generator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from grpc.aio import AioRpcError
from ray.exceptions import RayActorError

from picinspector.serve.cluster import Share, judge_with, share_of
from picinspector.serve.load import Capacity, Load, Place
from picinspector.serve.problems import ReplicaError, RequestError, cause_of
from picinspector.serve.settings import Settings

TIMEOUT_S = 30.0
#: Of one replica on two cores, as `serve.run` has it.
PLACES = 2 * 16 + Settings().queue


class Queue:
    """Workers that take photos in the order in which they came, by a clock of their own."""

    def __init__(self, workers: int, places: int = PLACES) -> None:
        self.now_s = 0.0
        self.load = Load(Capacity(workers, places), TIMEOUT_S, lambda: self.now_s)
        self.free_s = [0.0] * workers
        self.under_way: list[tuple[float, Place, ExitStack]] = []
        self.waited_s: list[float] = []

    def come(self, at_s: float, takes_s: float) -> bool:
        """One photo, which takes a worker so long; whether it was let in."""
        self.pass_until(at_s)
        if self.load.is_full:
            return False
        stack = ExitStack()
        place = stack.enter_context(self.load.photo())
        self.free_s.sort()
        self.free_s[0] = max(self.free_s[0], at_s) + takes_s
        self.under_way.append((self.free_s[0], place, stack))
        self.waited_s.append(self.free_s[0] - at_s)
        return True

    def pass_until(self, at_s: float) -> None:
        self.under_way.sort(key=lambda one: one[0])
        while self.under_way and self.under_way[0][0] <= at_s:
            self.now_s, place, stack = self.under_way.pop(0)
            place.passed()
            stack.close()
        self.now_s = at_s


@pytest.mark.parametrize(
    ("workers", "takes_s", "a_second"), [(2, 0.08, 127), (2, 2 / 3, 10), (2, 1.8, 3), (7, 0.5, 100)]
)
def test_who_is_let_in_is_answered_in_time_and_no_worker_rests(workers: int, takes_s: float, a_second: int) -> None:
    queue = Queue(workers)
    judged = sum(queue.come(number / a_second, takes_s) for number in range(300 * a_second))
    assert max(queue.waited_s) < TIMEOUT_S
    assert judged >= 0.95 * 300 * workers / takes_s


def test_many_that_come_at_once_to_begin_with() -> None:
    queue = Queue(workers=2)
    let_in = [queue.come(0.0, 2 / 3) for _ in range(200)]
    assert sum(let_in) == 30, "fifteen rounds of a second: half of the time"
    assert max(queue.waited_s) < TIMEOUT_S


def test_there_is_no_more_than_there_are_places() -> None:
    queue = Queue(workers=2)
    for number in range(40):
        assert queue.come(number * 0.1, 0.1)
    queue.pass_until(100.0)
    assert sum(queue.come(100.0, 0.01) for _ in range(500)) == PLACES == 96
    with pytest.raises(RequestError) as refused, queue.load.photo():
        pass
    assert refused.value.status == 503


def test_one_that_hangs_says_nothing_of_the_others() -> None:
    queue = Queue(workers=2)
    for number in range(40):
        assert queue.come(number * 0.1, 0.1 if number != 35 else 20.0)
    queue.pass_until(100.0)
    assert sum(queue.come(100.0, 0.1) for _ in range(500)) == PLACES


# --- replicas ---------------------------------------------------------------------------------------------------------

#: Of cluster.yaml: the head, four of its CPU nodes, one of its GPU nodes.
HEAD, CPU_NODE, GPU_NODE = {"CPU": 0.0}, {"CPU": 16.0}, {"CPU": 8.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("nodes", "gpus", "most", "share"),
    [
        ([HEAD, *4 * [CPU_NODE], GPU_NODE], 1.0, 1, Share(8, 1.0, 7, 1)),
        ([HEAD, *4 * [CPU_NODE], GPU_NODE], 0.5, 2, Share(4, 0.5, 3, 2)),
        ([GPU_NODE, {"CPU": 96.0, "GPU": 8.0}], 1.0, 9, Share(8, 1.0, 7, 9)),
        ([{"CPU": 4.0, "GPU": 8.0}], 1.0, 8, Share(1, 1.0, 1, 8)),
        ([HEAD], 1.0, 4, Share(4, 1.0, 3, 0)),
        ([{"CPU": 2.0}], 0.0, 1, Share(2, 0.0, 2, 1)),
        ([{"CPU": 16.0}], 0.0, 4, Share(4, 0.0, 4, 4)),
        ([{"CPU": 2.0}], 0.0, 4, Share(1, 0.0, 1, 2)),
        ([HEAD, *4 * [CPU_NODE]], 0.0, 6, Share(8, 0.0, 8, 8)),
    ],
)
def test_a_replica_gets_its_part_of_its_node(
    nodes: list[dict[str, float]], gpus: float, most: int, share: Share
) -> None:
    assert share_of(nodes, gpus, cpus=min(8, 2 if nodes == [{"CPU": 2.0}] else 8), most=most) == share


class Response:
    """Of a handle: what is awaited is an error, or nothing for ever."""

    def __init__(self, error: BaseException | None) -> None:
        self.error, self.is_cancelled = error, False

    def __await__(self) -> Generator[Any, None, dict[str, Any]]:
        if self.error is not None:
            raise self.error
        yield from asyncio.sleep(600).__await__()
        return {}

    def cancel(self) -> None:
        self.is_cancelled = True


class Handle:
    def __init__(self, error: BaseException | None) -> None:
        self.response = Response(error)

    def remote(self, data: bytes, name: str) -> Response:
        return self.response


def ended(code: grpc.StatusCode) -> AioRpcError:
    return AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())


@pytest.mark.parametrize(
    "error",
    [asyncio.CancelledError(), RayActorError(), *map(ended, (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE))],
    ids=repr,
)
def test_a_photo_whose_replica_ends_shall_come_again(error: BaseException) -> None:
    with pytest.raises(RequestError) as told:
        asyncio.run(judge_with(Handle(error))(b"", "a.jpg"))
    assert (told.value.status, told.value.problem.error_kind) == (503, "busy")


def test_other_failures_are_told_as_they_are() -> None:
    with pytest.raises(AioRpcError):
        asyncio.run(judge_with(Handle(ended(grpc.StatusCode.RESOURCE_EXHAUSTED)))(b"", "a.jpg"))


def test_a_call_that_nobody_waits_for_is_cancelled() -> None:
    handle = Handle(None)

    async def leave() -> None:
        async with asyncio.timeout(0.01):
            await judge_with(handle)(b"", "a.jpg")

    with pytest.raises(TimeoutError):
        asyncio.run(leave())
    assert handle.response.is_cancelled


def test_where_a_replica_failed_travels_with_its_error() -> None:
    sent = pickle.loads(pickle.dumps(ReplicaError("ValueError", "Encode._encode:7")))
    assert cause_of(sent) == ("ValueError", "Encode._encode:7")
    assert cause_of(ExceptionGroup("", [ExceptionGroup("", [sent])])) == ("ValueError", "Encode._encode:7")
    with pytest.raises(ZeroDivisionError) as caught:
        1 / 0  # noqa: B018
    kind, at = cause_of(caught.value)
    assert (kind, at.partition(":")[0]) == ("ZeroDivisionError", "test_where_a_replica_failed_travels_with_its_error")
