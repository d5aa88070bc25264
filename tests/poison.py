"""Photos that do something to the process that decodes them, by a codec of the tests' own.

Importing this module registers the codec in a process. It gets to Ray's workers and to the children of theirs with
`HAZARDS`: limits of a class of this module, which whoever unpickles them has to import.
"""

from __future__ import annotations

import ctypes
import io
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, PngImagePlugin

from benchmarks import fuzz
from picinspector.photo import Limits
from tests.awkward import encode, quadrants

_MAGIC = b"POISON:"


@dataclass(frozen=True, slots=True)
class _Hazards(Limits):
    """Ordinary limits."""


HAZARDS = _Hazards()


def poison(act: str) -> bytes:
    """A file that does this when it is decoded: `abort`, `segfault`, `kill`, `hang`, `spin`; or is a photo after.

    That is after `sleep 0.5`, or after `hold FOLDER`: it writes the process's id into a file of the folder, and waits
    until there is one named `go`.
    """
    return _MAGIC + act.encode() + b"\n" + encode(quadrants(64, 48), "PNG")


class SmallDevice(str):
    """The name of a bundle; in the process that it gets to, encoders have a device for so many photos at once."""

    rows: int

    def __new__(cls, bundle: str, rows: int) -> SmallDevice:
        name = super().__new__(cls, bundle)
        name.rows = rows
        return name

    def __reduce__(self) -> tuple[Any, ...]:
        return _shrink_device, (str(self), self.rows)


def _shrink_device(bundle: str, rows: int) -> str:
    """In the worker: the device is small from here on."""
    from picinspector.clip import ClipEncoder

    ClipEncoder.encode = small(ClipEncoder.encode, rows)  # type: ignore[method-assign]
    return bundle


def small(encode: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """An encoder's or a captioner's method, with memory for no more than so many photos."""
    import torch

    def within(*arguments: Any, **more: Any) -> Any:
        crops = next(argument for argument in arguments if isinstance(argument, np.ndarray))
        if len(crops) > rows:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {len(crops)} photos.\nMore.")
        return encode(*arguments, **more)

    return within


def examine(data: bytes, suffix: str) -> tuple[str, str, float, int]:
    """`fuzz.examine`, where this codec is."""
    return fuzz.examine(data, suffix)


def _accept(prefix: bytes) -> bool:
    return prefix.startswith(_MAGIC)


def _open(file: IO[bytes], name: str | bytes) -> PngImagePlugin.PngImageFile:
    act, _, amount = file.readline().removeprefix(_MAGIC).strip().partition(b" ")
    if act == b"abort":
        os.abort()
    elif act == b"segfault":
        ctypes.string_at(0)
    elif act == b"kill":  # what the kernel does to a process that takes all the memory
        os.kill(os.getpid(), signal.SIGKILL)
    elif act == b"hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        time.sleep(600)
    elif act == b"spin":
        while True:
            pass
    elif act == b"sleep":
        time.sleep(float(amount))
    elif act == b"hold":
        _hold(Path(os.fsdecode(amount)))
    return PngImagePlugin.PngImageFile(io.BytesIO(file.read()))


def _hold(folder: Path) -> None:
    with (folder / "held").open("a") as log:
        log.write(f"{os.getpid()}\n")
    for _ in range(4800):
        if (folder / "go").exists():
            return
        time.sleep(0.05)
    raise TimeoutError("nobody let this photo go on")


# Of the formats that `photo` lets Pillow try, the one that no file has: a bitmap without its header.
Image.register_open("DIB", _open, _accept)
