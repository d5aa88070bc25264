"""Sizing the pools for the cluster at hand, without a cluster."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from picinspector import runs
from picinspector.runs import Pools


def cluster(
    monkeypatch: pytest.MonkeyPatch,
    now: dict[str, float],
    nodes: int,
    cores: int = 16,
    grown: dict[str, float] | None = None,
) -> None:
    """Pretend to be connected to a cluster with these resources, seen from a machine with so many cores."""
    patches: dict[str, Any] = {"cluster_resources": lambda: now, "nodes": lambda: [{}] * nodes}
    for name, value in patches.items():
        monkeypatch.setattr(ray, name, value)
    monkeypatch.setattr(runs, "_cores", lambda: cores)
    monkeypatch.setattr(runs, "_grown_resources", lambda: grown)


def test_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {"CPU": 6.0}, nodes=1, cores=2)  # a local Ray has four spare logical CPUs
    pools = runs.size_pools(1000)
    assert pools == Pools(encoders=1, gpus=0.0, cpus=2, batch_size=32, block_rows=64, readers=2)
    assert pools.encoders * pools.cpus + 1 < 6  # room for reading and writing beside the actors


def test_a_small_library_still_keeps_every_reader_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {"CPU": 20.0}, nodes=1, cores=16)
    assert runs.size_pools(1000).block_rows == 32  # 16 readers, two blocks each
    assert runs.size_pools(3).block_rows == 8


def test_a_gpu_cluster_has_an_encoder_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {"CPU": 96.0, "GPU": 4.0}, nodes=8, cores=4)
    pools = runs.size_pools(1_000_000)
    assert (pools.encoders, pools.gpus, pools.cpus, pools.readers) == (4, 1.0, 1, 96)
    assert pools.batch_size == pools.block_rows == 128
    assert runs.size_pools(1000, gpus_per_encoder=0.5).encoders == 8
    assert runs.size_pools(1000, gpus_per_encoder=0).gpus == 0


def test_a_cpu_cluster_encodes_on_three_quarters(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {"CPU": 64.0}, nodes=4, cores=2)
    pools = runs.size_pools(1_000_000)
    assert (pools.encoders, pools.cpus, pools.readers) == (6, 8, 16)


def test_a_resting_cluster_is_sized_by_what_it_may_become(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {}, nodes=1, cores=4, grown={"CPU": 160.0, "GPU": 4.0})
    pools = runs.size_pools(1_000_000)
    assert (pools.encoders, pools.gpus, pools.readers) == (4, 1.0, 160)


def test_what_is_given_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {"CPU": 64.0, "GPU": 1.0}, nodes=2)
    pools = runs.size_pools(1_000_000, encoders=3, gpus_per_encoder=0.25, batch_size=256)
    assert (pools.encoders, pools.gpus, pools.batch_size, pools.block_rows) == (3, 0.25, 256, 256)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (61, "1m01s"), (3661, "1h01m")])
def test_time_left_in_words(seconds: float, text: str) -> None:
    assert runs._duration(seconds) == text
