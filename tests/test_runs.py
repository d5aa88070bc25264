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


def test_a_resting_cpu_cluster_shows_how_large_its_nodes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {"node:__internal_head__": 1.0})
    asked: list[float] = []

    class Task:
        def remote(self) -> None:
            asked.append(1)
            cluster(monkeypatch, {"node:__internal_head__": 1.0}, {"CPU": 16.0})

    monkeypatch.setattr(ray, "remote", lambda num_cpus: lambda function: Task())
    monkeypatch.setattr(ray, "get", lambda ref: ref)
    pools = runs.size_pools(1_000_000, encoders=4, gpus_per_encoder=0)
    assert (pools.encoders, pools.cpus, pools.at_once) == (4, 8, 1) and asked == [1]
    assert runs.size_pools(1_000_000, captions=True).cpus == 7 and asked == [1], "asked where a node is up"


def test_captions_wait_for_the_nodes_that_an_autoscaler_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {"node:__internal_head__": 1.0})
    pools = runs.size_pools(10**6, encoders=4, gpus_per_encoder=1, captions=True)
    assert (pools.encoders, pools.captioners, pools.gpus, pools.at_once) == (4, 4, 1, 1)
    # One GPU is up: what was said of the others still holds.
    cluster(monkeypatch, {"node:__internal_head__": 1.0}, {"CPU": 8.0, "GPU": 1.0})
    assert runs.size_pools(10**6, encoders=4, gpus_per_encoder=1, captions=True) == pools


def test_a_limit_is_what_the_pools_are_sized_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing, reading, cutting and writing tables, and reading photos, take a CPU each beside the actors."""
    cluster(monkeypatch, *[{"CPU": 16.0}] * 4)
    assert (runs.size_pools(10**6).encoders, runs.size_pools(10**6).cpus) == (6, 8)
    for limit, encoders, cpus in [(5, 1, 1), (6, 1, 2), (8, 1, 4), (32, 2, 8), (48, 3, 8), (1000, 6, 8)]:
        pools = runs.size_pools(10**6, max_cpus=limit)
        assert (pools.encoders, pools.cpus, pools.at_once) == (encoders, cpus, encoders), limit
        described = runs.size_pools(10**6, captions=True, max_cpus=limit)
        assert 2 * described.cpus * described.at_once <= max(2, limit - 4)
    assert runs.size_pools(100).block_rows == 8 and runs.size_pools(400, max_cpus=5).block_rows == 40
    told = runs.size_pools(10**6, encoders=20, max_cpus=32)
    assert (told.encoders, told.at_once) == (20, 2), "Ray Data lets the others in as far as the limit goes"
    cluster(monkeypatch, *[{"CPU": 8.0, "GPU": 1.0}] * 8)
    assert runs.size_pools(10**6, max_cpus=8).encoders == 3


@pytest.mark.parametrize(("limit", "captions"), [(1, False), (4, False), (5, True)])
def test_a_limit_that_is_too_small_says_what_would_do(limit: int, captions: bool) -> None:
    with pytest.raises(UsageError, match=f"--max-cpus {limit}: .* at least") as caught:
        runs.Options(max_cpus=limit, captions=captions)
    assert str(limit + 1 if limit > 1 else 5) in str(caught.value) and "\n" not in str(caught.value)


def test_a_limit_ends_with_its_run() -> None:
    options = ray.data.DataContext.get_current().execution_options
    before = options.resource_limits
    with runs.limited(8):
        assert (options.resource_limits.cpu, options.resource_limits.gpu) == (7, float("inf"))
        with runs.limited(None):
            assert options.resource_limits.cpu == 7, "what a caller has set"
    assert options.resource_limits == before and before.cpu == float("inf")


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
