"""What Ray Data maps over batches: Arrow table in, Arrow table out. Nothing here knows Ray.

::

    manifest rows --read.read_photos--> facts, measurements, crops --encode.Encode--> embeddings
    embeddings    --caption.Caption, where asked for--> embeddings with captions --score.Score--> scores

A row that fails keeps its identity, gets `error_kind` and `error_message`, and travels on with nulls. Each stage is a
module of its own because its workers load what it needs and no more: readers load no models, scorers not even torch.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

#: Columns between read and encode: the raw uint8 crop of each encoder, and of the captioner where it wants another.
CROP_COLUMNS = ("clip_crop", "dinov2_crop", "captioner_crop")


class Batch(NamedTuple):
    """What a stage did with one batch.

    Attributes:
        stage: `read`, `encode`, `caption` or `score`.
        rows: of the batch, those with errors too.
        errors: rows whose error arose in this stage, by kind.
        busy_s: seconds the stage took for it.
        worker: the process, as `host:pid`.
        memory_bytes: the most resident memory that process has had, with what it shares with others.
        device_bytes: the most memory it has had on its GPU; None without one.
        fetch_s: of `busy_s`, what it waited for storage.
    """

    stage: str
    rows: int
    errors: dict[str, int]
    busy_s: float
    worker: str
    memory_bytes: int
    device_bytes: int | None
    fetch_s: float = 0.0


#: Told of each batch once it is done.
Report = Callable[[Batch], None]


def describe_batch(stage: str, rows: int, errors: Mapping[str, int], started: float, fetch_s: float = 0.0) -> Batch:
    """The `Batch` that ends now in this process and began at `started`, of `time.perf_counter`."""
    return Batch(
        stage=stage,
        rows=rows,
        errors=dict(errors),
        busy_s=time.perf_counter() - started,
        worker=f"{socket.gethostname()}:{os.getpid()}",
        memory_bytes=peak_memory_bytes(),
        device_bytes=_peak_device_bytes(),
        fetch_s=fetch_s,
    )


def count_kinds(kinds: Any) -> Counter[str]:
    """How many rows have which error, from a column of error kinds with nulls."""
    return Counter(kinds.drop_null().to_pylist())


def peak_memory_bytes() -> int:
    """The most resident memory this process has had, in bytes."""
    try:
        # Not getrusage: a process starts there with what the one it was forked from had.
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:  # noqa: PTH123
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # no Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere: getrusage(2) of both


def _peak_device_bytes() -> int | None:
    torch = sys.modules.get("torch")  # a scorer has not loaded it, and need not
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated())
