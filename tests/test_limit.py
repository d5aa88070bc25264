"""What Ray Data's own allocator lets run, where the pools are sized for a limit: never more than the limit."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import ray
from ray.data import ExecutionResources
from ray.data._internal.execution.resource_manager import ReservationOpResourceAllocator

from picinspector import runs

LIMITS = [*range(6, 26), 32, 47, 64]
CPU_NODES = [[{"CPU": 4.0}] * 24, [{"CPU": 16.0}] * 6]


@dataclass(eq=False)
class Operation:
    """An operation of a chain, as the allocator sees it.

    Attributes:
        cpus: of each of its tasks or actors.
        actors: it has at most; None for tasks, of which there may be any number.
        running: tasks, or actors.
    """

    cpus: int
    actors: int | None = None
    running: int = 0
    over: bool = False

    metrics: ClassVar = SimpleNamespace(obj_store_mem_max_pending_output_per_task=0)

    def throttling_disabled(self) -> bool:
        return False

    def has_execution_finished(self) -> bool:
        return self.over

    has_completed = has_execution_finished

    def min_scheduling_resources(self) -> ExecutionResources:
        return ExecutionResources(cpu=self.cpus)

    def min_max_resource_requirements(self) -> tuple[ExecutionResources, ExecutionResources]:
        most = float("inf") if self.actors is None else self.cpus * self.actors
        return self.min_scheduling_resources(), ExecutionResources(cpu=most, object_store_memory=float("inf"))


def most_held(pools: runs.Pools, limit: int, rng: random.Random) -> int:
    """CPUs held at the worst moment of a run in which everything is begun as soon as the allocator lets it."""
    read, cut, photos, write = (Operation(1) for _ in range(4))
    encode = Operation(pools.cpus, pools.encoders, pools.at_once)
    describe = Operation(pools.cpus, pools.captioners, pools.at_once)
    chain = [read, cut, photos, encode, *([describe] if pools.captioners else []), write]
    manager = SimpleNamespace(
        _topology=dict.fromkeys(chain),
        get_op_usage=lambda operation, **_: ExecutionResources(cpu=operation.cpus * operation.running),
        get_mem_op_internal=lambda operation: 0,
        get_mem_op_outputs=lambda operation, **_: 0,
        _is_blocking_materializing_op=lambda operation: False,
    )
    ratio = ray.data.DataContext.get_current().op_resource_reservation_ratio
    allocator = ReservationOpResourceAllocator(manager, ratio, None, None)
    everything = ExecutionResources(cpu=limit, gpu=100, object_store_memory=1e9, memory=1e12)
    worst = 0
    for finished in (None, read, cut):
        if finished is not None:
            finished.running, finished.over = 0, True
            photos.running, write.running = rng.randint(0, photos.running), rng.randint(0, write.running)
        while True:
            worst = max(worst, sum(operation.cpus * operation.running for operation in chain))
            allocator.update_budgets(limits=everything)
            allowed = [
                operation
                for operation in chain
                if not operation.over
                and operation.running != operation.actors
                and operation.cpus <= allocator.get_budget(operation).cpu
            ]
            if not allowed:
                break
            rng.choice(allowed).running += 1
    return worst


@pytest.mark.parametrize("captions", [False, True])
@pytest.mark.parametrize("gpus", [None, 0.5])
def test_a_run_keeps_to_its_limit(monkeypatch: pytest.MonkeyPatch, captions: bool, gpus: float | None) -> None:
    rng = random.Random(0)
    for limit in LIMITS:
        for nodes in CPU_NODES:
            alive = [{"Alive": True, "Resources": node | ({"GPU": 1.0} if gpus else {})} for node in nodes]
            monkeypatch.setattr(ray, "nodes", lambda alive=alive: alive)
            pools = runs.size_pools(10**6, rng.choice([None, 20]), gpus, captions=captions, max_cpus=limit)
            # One is for the task that lists files, which no allocator counts.
            assert most_held(pools, limit - 1, rng) <= limit - 1, (limit, nodes[0], pools)
