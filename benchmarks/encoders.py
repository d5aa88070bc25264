"""How much of the machine the encoders use: their FLOP/s over the best matrix product of the same run.

::

    python -m benchmarks.encoders [--rounds 5]

CLIP ViT-L/14 and DINOv2-base with random weights, in the precision that `picinspector.device` picks, fed as the encode
stage feeds them: on a CPU each core with crops of its own, on a GPU whole batches. FLOPs are those that torch counts in
one call (`torch.utils.flop_counter`). The product is of two square matrices with all threads.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import full_size, ratios
from picinspector.clip import ClipEncoder
from picinspector.device import Cores, pick_device, pick_dtype
from picinspector.dinov2 import Dinov2Encoder

#: Sides of the square matrices; the best of them is what the machine can do.
_SIDES = (1024, 2048, 4096)
_TARGET = 0.80


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="where the models are made, and kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(full_size.make((arguments.scratch or Path(temporary)) / "full"), arguments.rounds)


def measure(bundle: Path, rounds: int) -> list[ratios.Row]:
    """Print and return each encoder's share of the best product."""
    encoders = load(bundle)
    contenders = {"product": best_product} | {name: flops_of(encoder) for name, encoder in encoders.items()}
    for contender in contenders.values():
        contender()
    measured = ratios.take_turns(contenders, rounds)
    rows = [
        ratios.Row(
            f"{name} over the best product",
            ratios.over(measured, name, "product"),
            _TARGET,
            figures=f"{statistics.median(measured[name]):.3f} of {statistics.median(measured['product']):.3f} TFLOP/s",
        )
        for name in encoders
    ]
    ratios.show(f"encoders, {str(pick_dtype(pick_device())).removeprefix('torch.')}, {rounds} rounds", rows)
    return rows


def load(bundle: Path) -> dict[str, Any]:
    """Both encoders of a full-size bundle, by name."""
    return {"CLIP ViT-L/14": ClipEncoder(bundle / "clip"), "DINOv2-base": Dinov2Encoder(bundle / "dinov2")}


def best_product() -> float:
    """TFLOP/s of the best square matrix product in the encoders' precision."""
    device = pick_device()
    best = 0.0
    for side in _SIDES:
        a, b = (torch.randn(side, side, device=device).to(pick_dtype(device)) for _ in range(2))
        times = max(1, round((4e13 if device.type == "cuda" else 2.5e11) / (2 * side**3)))
        _synchronize()
        started = time.perf_counter()
        for _ in range(times):
            torch.mm(a, b)
        _synchronize()
        best = max(best, 2 * side**3 * times / (time.perf_counter() - started) / 1e12)
    return best


def tflop(encoder: Any) -> float:
    """Of one photo."""
    crop = np.zeros((1, *2 * (encoder.crop.crop_px,), 3), np.uint8)
    # The fused attention of `nn.MultiheadAttention` hides its products from the counter.
    torch.backends.mha.set_fastpath_enabled(False)
    with FlopCounterMode(display=False) as counter:
        encoder.encode(crop)
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops() / 1e12


def flops_of(encoder: Any) -> Callable[[], float]:
    """What measures an encoder's TFLOP/s."""
    on_gpu = encoder.device.type == "cuda"
    photos = 1024 if on_gpu else 32
    crops = np.random.default_rng(0).integers(0, 256, (photos, *2 * (encoder.crop.crop_px,), 3), dtype=np.uint8)
    work = tflop(encoder) * photos
    cores = None if on_gpu else Cores()

    def run() -> float:
        started = time.perf_counter()
        if cores is not None:
            cores.map([(encoder.encode, crops)])
        else:
            for start in range(0, photos, 128):
                encoder.encode(crops[start : start + 128])
        return work / (time.perf_counter() - started)

    return run


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
