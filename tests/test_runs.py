"""Sizing the pools for the cluster at hand, without a cluster."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from picinspector import progress, runs
from picinspector.errors import UsageError
from picinspector.runs import Pools


def cluster(monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, float], cores: int = 16, started: bool = False) -> None:
    """Pretend to be connected to these nodes, from a machine with so many cores."""
    alive: list[dict[str, Any]] = [{"Alive": True, "Resources": node} for node in nodes]
    dead = {"Alive": False, "Resources": {"CPU": 1000.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, dead])
    monkeypatch.setattr(runs, "_cores", lambda: cores)
    monkeypatch.setattr(runs, "_started_here", started)


def test_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {"CPU": 6.0}, cores=2, started=True)  # a local Ray has four spare logical CPUs
    assert runs.size_pools(1000) == Pools(encoders=1, gpus=0.0, cpus=2, batch_size=32, block_rows=64, readers=2)


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 8, 16])
def test_encoders_leave_room_to_read_and_write_beside_them(monkeypatch: pytest.MonkeyPatch, cpus: int) -> None:
    cluster(monkeypatch, {"CPU": float(cpus)}, cores=cpus)
    pools = runs.size_pools(1000)
    assert pools.cpus == max(1, min(8, cpus - 2))
    assert pools.readers is None


def test_a_small_library_still_keeps_every_reader_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {"CPU": 20.0}, cores=16, started=True)
    assert runs.size_pools(1000).block_rows == 32  # 16 readers, two blocks each
    assert runs.size_pools(3).block_rows == 8


def test_a_gpu_cluster_has_an_encoder_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, *[{"CPU": 16.0}] * 4, *[{"CPU": 8.0, "GPU": 1.0}] * 4, cores=4)
    pools = runs.size_pools(1_000_000)
    assert (pools.encoders, pools.gpus, pools.cpus, pools.readers) == (4, 1.0, 1, None)
    assert pools.batch_size == pools.block_rows == 128
    assert runs.size_pools(1000, gpus_per_encoder=0.5).encoders == 8
    assert runs.size_pools(1000, gpus_per_encoder=0).gpus == 0


def test_a_cpu_cluster_encodes_on_three_quarters(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, *[{"CPU": 16.0}] * 4, cores=2)
    assert (runs.size_pools(1_000_000).encoders, runs.size_pools(1_000_000).cpus) == (6, 8)


def test_an_encoder_fits_on_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, *[{"CPU": 4.0}] * 4, cores=2)
    assert (runs.size_pools(1_000_000).encoders, runs.size_pools(1_000_000).cpus) == (6, 2)


def test_a_resting_cluster_takes_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {}, cores=4)
    pools = runs.size_pools(1_000_000, encoders=4, gpus_per_encoder=1)
    assert (pools.encoders, pools.gpus, pools.readers) == (4, 1, None)


def test_what_is_given_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {"CPU": 32.0}, {"CPU": 32.0, "GPU": 1.0})
    pools = runs.size_pools(1_000_000, encoders=3, gpus_per_encoder=0.25, batch_size=256)
    assert (pools.encoders, pools.gpus, pools.batch_size, pools.block_rows) == (3, 0.25, 256, 256)


def test_captioners_have_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both pools hold what they have as long as the run lasts: together they must leave room to read."""
    cluster(monkeypatch, {"CPU": 6.0}, cores=2, started=True)
    here = runs.size_pools(1000, captions=True)
    assert (here.encoders, here.captioners, here.cpus) == (1, 1, 2)
    cluster(monkeypatch, *[{"CPU": 16.0}] * 10)
    many = runs.size_pools(10**6, captions=True)
    assert many.encoders == many.captioners and (many.encoders + many.captioners) * many.cpus <= 0.75 * 160
    cluster(monkeypatch, *[{"CPU": 8.0, "GPU": 1.0}] * 4)
    gpus = runs.size_pools(10**6, captions=True)
    assert (gpus.encoders, gpus.captioners, gpus.gpus) == (4, 4, 0.5)
    assert runs.size_pools(10**6).captioners == 0
    cluster(monkeypatch, {"CPU": 8.0, "GPU": 1.0})
    with pytest.raises(UsageError, match="lower --gpus-per-encoder"):
        runs.size_pools(1000, gpus_per_encoder=1, captions=True)
    cluster(monkeypatch, {"CPU": 2.0}, cores=2)
    with pytest.raises(UsageError, match="captions need one for the encoders"):
        runs.size_pools(1000, captions=True)
    assert runs.size_pools(1000).cpus == 1


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (61, "1m01s"), (3661, "1h01m")])
def test_time_left_in_words(seconds: float, text: str) -> None:
    assert progress._duration(seconds) == text
