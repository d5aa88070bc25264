"""The projection: sums that can be done by hand, whole jobs that were measured, and the tables of docs/scaling.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.projection import Cluster, project

REPOSITORY = Path(__file__).parent.parent
PAGE = (REPOSITORY / "docs" / "scaling.md").read_text("utf-8")


def test_by_hand() -> None:
    """A million photos of 12 megapixels on 100 cores: 0.08482 s of a core each."""
    found = project(1e6, Cluster(nodes=10, cores=10))
    assert found.hours["embed"] == pytest.approx(848.2 / 3600)
    assert found.hours["list"] == pytest.approx(1e6 / 20_800 / 3600)
    assert found.bottleneck == "embed: cores" and found.storage_gb == pytest.approx(2.25)
    assert found.run_hours == pytest.approx(sum(found.hours[step] for step in ("list", "plan", "embed", "score")))
    slow = project(1e6, Cluster(nodes=10, cores=10, gbit_per_s=1.0, price_per_hour=2.0))
    assert slow.bottleneck == "embed: network" and slow.hours["embed"] == pytest.approx(2160 / 3600)
    assert slow.price == pytest.approx(20 * slow.run_hours)
    gpus = project(1e6, Cluster(nodes=10, cores=10, gpus=2, gpu_photos_per_s=25.0), "full")
    assert gpus.bottleneck == "embed: GPUs" and gpus.hours["embed"] == pytest.approx(2000 / 3600)
    assert project(1e6, Cluster(nodes=1000, cores=100, gbit_per_s=100)).bottleneck == "list: one listing process"


@pytest.mark.parametrize(
    ("bundle", "measured"),
    [
        ("builtin", 15.9),  # benchmarks.peers, 300 photos, steady
        ("builtin", 22.6),  # the same, 120 photos
        ("full", 1.2),  # benchmarks.pipeline --bundle full-size
    ],
)
def test_two_cores_do_what_whole_jobs_were_measured_to_do(bundle: str, measured: float) -> None:
    promised = 1e6 / (3600 * project(1e6, Cluster(nodes=1, cores=2), bundle).hours["embed"])
    assert measured / 1.25 < promised < measured * 1.5


@pytest.mark.parametrize(
    "command", [line for line in PAGE.splitlines() if line.startswith("python -m benchmarks.projection")]
)
def test_the_tables_of_the_page_are_what_its_commands_print(command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command.split()[1:]], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() in PAGE


def test_gpus_want_a_measured_rate() -> None:
    command = [sys.executable, "-m", "benchmarks.projection", "--gpus", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "--gpus needs --gpu-photos-per-s" in done.stderr
