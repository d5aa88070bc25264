"""What this process may use of its machine: a container is given less than there is, and the system tells both."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def cores() -> int:
    """CPUs to compute on: those that the process may run on, or as many as its quota comes to, at least one.

    `docker run --cpus 4` and a limit of Kubernetes are quotas: all CPUs are there, and the process is held up once it
    has had so much of their time.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(count, int(_quota())))


def _quota() -> float:
    """CPUs, by both versions of control groups (kernel: admin-guide/cgroup-v2, scheduler/sched-bwc)."""
    with contextlib.suppress(OSError, ValueError):  # not there; or "max"
        quota_us, period_us = (_CGROUP / "cpu.max").read_text("ascii").split()
        return int(quota_us) / int(period_us)
    with contextlib.suppress(OSError, ValueError):
        quota_us, period_us = ((_CGROUP / f"cpu/cpu.cfs_{name}_us").read_text("ascii") for name in ("quota", "period"))
        if int(quota_us) > 0:  # -1 is none
            return int(quota_us) / int(period_us)
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory that this machine has, or that its container may use."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (_CGROUP / "memory.max", _CGROUP / "memory" / "memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # not there; or "max"
            memory = min(memory, int(limit.read_text("ascii")))
    return memory
