"""What a container may use is found in the files that the kernel shows it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from picinspector import machine, runs

GIB = 1024**3


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a control group, on a machine of eight CPUs."""
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return tmp_path


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_cores(cgroup: Path, files: dict[str, str], cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for name, text in files.items():
        (cgroup / name).parent.mkdir(exist_ok=True)
        (cgroup / name).write_text(text)
    assert machine.cores() == cores
    assert runs._cores() == cores, "what Ray is started with"


def test_memory(cgroup: Path) -> None:
    of_the_machine = machine.memory_bytes()
    assert of_the_machine > GIB
    (cgroup / "memory.max").write_text("max\n")
    assert machine.memory_bytes() == of_the_machine
    (cgroup / "memory.max").write_text(f"{GIB}\n")
    assert machine.memory_bytes() == GIB
