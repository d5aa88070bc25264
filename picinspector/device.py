"""Where the encoders run and in which precision, how pixels get there, and how a CPU's cores share a batch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from picinspector.preprocess import Preprocess


def pick_device() -> torch.device:
    """The GPU this process may use, else the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it (GPUs from Ampere on, AVX512-BF16, AMX), float32 elsewhere."""
    if device.type == "cuda":
        # Emulated, as a T4 and a V100 do it, it is slower than float32.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # Private to torch, and the only place that knows; absent on other builds, where float32 is right.
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.bfloat16 if any(check is not None and check() for check in checks) else torch.float32


def to_input(pixels: np.ndarray, how: Preprocess, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Move uint8 crops to the device as they are and normalise there, in float32.

    Args:
        pixels: uint8 (B, H, W, 3), 0-255.
        how: the encoder's own normalisation.

    Returns:
        (B, 3, H, W) of `dtype`, channels-last in memory.
    """
    batch = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(device, non_blocking=True)
    width = batch.shape[2]
    # By whole lines: broadcasting along three channels would not be vectorised, and takes a CPU six times as long.
    scale = torch.tensor([255.0 * s for s in how.std] * width, device=device)
    shift = torch.tensor([m / s for m, s in zip(how.mean, how.std, strict=True)] * width, device=device)
    lines = batch.flatten(2).float().div_(scale).sub_(shift)
    return lines.to(dtype).view(batch.shape).permute(0, 3, 1, 2)


def to_embeddings(features: torch.Tensor) -> np.ndarray:
    """(B, D) of any float dtype to L2-normalised float16 (B, D)."""
    return torch.nn.functional.normalize(features.float(), dim=-1).half().cpu().numpy()


#: Crops of one call on a core. The maps of so few stay in its caches (EfficientNet-lite0 at 448 px, two cores: 39
#: photos/s with 4, 28 with 16), and a matrix of 4 x 257 rows keeps its multipliers as busy as one of 32 x 257.
_PART = 4


class Cores:
    """Encoders on the cores of a CPU: every core works on crops of its own, with one thread.

    Two threads in one operation wait for each other at its end, and for what else runs on their cores, hundreds of
    times a call. Measured on two cores (`make bench-quick`): 1.4 times the photos of two threads in a call.
    """

    def __init__(self, threads: int | None = None) -> None:
        """Start the threads; None takes one a core that this process may use."""
        count, outside = threads or len(os.sched_getaffinity(0)), torch.get_num_threads()
        self._pool = ThreadPoolExecutor(count, "encode", torch.set_num_threads, (1,))
        # Each thread has a number of its own, but torch keeps the last one told for those to come: tell it back.
        together = threading.Barrier(count)
        for started in [self._pool.submit(together.wait) for _ in range(count)]:
            started.result()
        torch.set_num_threads(outside)

    def map(self, calls: Sequence[tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]]) -> list[np.ndarray]:
        """What functions of rows of crops, each given with its crops (B, S, S, 3), return of them: (B, D) each. B >= 1.

        Raises:
            whatever one of them raises.
        """
        waiting = [
            [self._pool.submit(call, crops[start : start + _PART]) for start in range(0, len(crops), _PART)]
            for call, crops in calls
        ]
        return [np.concatenate([part.result() for part in parts]) for parts in waiting]
