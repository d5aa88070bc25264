"""Where the encoders run and in which precision, and how pixels get there."""

from __future__ import annotations

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
    scale = torch.tensor([255.0 * s for s in how.std], device=device)
    shift = torch.tensor([m / s for m, s in zip(how.mean, how.std, strict=True)], device=device)
    return batch.float().div_(scale).sub_(shift).to(dtype).permute(0, 3, 1, 2)


def to_embeddings(features: torch.Tensor) -> np.ndarray:
    """(B, D) of any float dtype to L2-normalised float16 (B, D)."""
    return torch.nn.functional.normalize(features.float(), dim=-1).half().cpu().numpy()
