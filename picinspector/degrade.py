"""Controlled degradations of a photo: one fault each, from none (severity 0) to gross (severity 1).

For training with faults of known strength, for the demo and for evaluation ladders. Sizes are relative to the photo's
shorter side, so that a severity looks the same in a 512 px and in a 3000 px photo. Exposure and noise are made in
linear light, as in a camera; the rest works on the sRGB values, as an editor or a codec would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import cv2
import numpy as np

#: Shorter side at which noise grain is one pixel and JPEG blocks are eight.
REFERENCE_PX = 512

#: `f(image, severity, seed=0)`: uint8 sRGB (H, W, 3) to the same; severity 0-1; same arguments, same result.
Degradation = Callable[..., np.ndarray]

# Strength at severity 1, chosen by eye to be gross and yet leave the subject recognisable.
_BLUR_SIGMA = 6 / 512  # of the shorter side
_SHOT_VARIANCE, _READ_SIGMA = 0.06, 0.03  # of linear light 0-1: variance = shot * light + read ** 2
_UNDER_STOPS, _OVER_STOPS = 4.0, 3.0
_JPEG_BEST, _JPEG_WORST = 90, 5  # libjpeg quality
_CONTRAST_LOSS = 0.85

_BYTES = np.arange(256) / 255.0
_TO_LINEAR = np.where(_BYTES <= 0.04045, _BYTES / 12.92, ((_BYTES + 0.055) / 1.055) ** 2.4).astype(np.float32)


def blur(image: np.ndarray, severity: float, seed: int = 0) -> np.ndarray:
    """Gaussian blur (on sRGB values): sigma up to 6/512 of the shorter side."""
    if _is_none(image, severity):
        return image.copy()
    sigma_px = severity * _BLUR_SIGMA * min(image.shape[:2])
    return cv2.GaussianBlur(image, (0, 0), sigma_px, borderType=cv2.BORDER_REFLECT_101)


def noise(image: np.ndarray, severity: float, seed: int = 0) -> np.ndarray:
    """Sensor noise in linear light: shot noise, which grows with the light, over read noise (Foi et al. 2008, eq. 3).

    About 32/255 (standard deviation, sRGB) in a mid grey at severity 1. The grain is 1/512 of the shorter side.
    """
    if _is_none(image, severity):
        return image.copy()
    height, width = image.shape[:2]
    scale = max(1.0, min(height, width) / REFERENCE_PX)
    grain_size = (max(1, round(width / scale)), max(1, round(height / scale)))
    grain: np.ndarray = np.random.default_rng(seed).standard_normal((grain_size[1], grain_size[0], 3), dtype=np.float32)
    if grain_size != (width, height):
        grain = cv2.resize(grain, (width, height), interpolation=cv2.INTER_NEAREST)
    light = _TO_LINEAR[image]  # (H, W, 3), 0-1
    return _to_srgb(light + severity * np.sqrt(_SHOT_VARIANCE * light + _READ_SIGMA**2) * grain)


def underexpose(image: np.ndarray, severity: float, seed: int = 0) -> np.ndarray:
    """Too little light: up to 4 stops, in linear light."""
    if _is_none(image, severity):
        return image.copy()
    return _to_srgb(_TO_LINEAR[image] * 2.0 ** (-_UNDER_STOPS * severity))


def overexpose(image: np.ndarray, severity: float, seed: int = 0) -> np.ndarray:
    """Too much light: up to 3 stops, in linear light, clipped at white."""
    if _is_none(image, severity):
        return image.copy()
    return _to_srgb(_TO_LINEAR[image] * 2.0 ** (_OVER_STOPS * severity))


def jpeg(image: np.ndarray, severity: float, seed: int = 0) -> np.ndarray:
    """Heavy JPEG compression: libjpeg quality from 90 down to 5, in equal ratios.

    In a photo larger than 512 px the coding error of its 512 px version is enlarged and added, so that the blocks keep
    their share of the picture.
    """
    if _is_none(image, severity):
        return image.copy()
    quality = round(_JPEG_BEST * (_JPEG_WORST / _JPEG_BEST) ** severity)
    height, width = image.shape[:2]
    if min(height, width) <= REFERENCE_PX:
        return _jpeg_roundtrip(image, quality)
    scale = REFERENCE_PX / min(height, width)
    small = cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    error = _jpeg_roundtrip(small, quality).astype(np.float32) - small
    enlarged = cv2.resize(error, (width, height), interpolation=cv2.INTER_LINEAR)
    return _to_uint8(image + enlarged)


def low_contrast(image: np.ndarray, severity: float, seed: int = 0) -> np.ndarray:
    """Flat tones: values (sRGB) pulled towards the photo's mean by up to 85 %."""
    if _is_none(image, severity):
        return image.copy()
    mean = float(image.mean())
    return _to_uint8(mean + (1.0 - _CONTRAST_LOSS * severity) * (image.astype(np.float32) - mean))


def desaturate(image: np.ndarray, severity: float, seed: int = 0) -> np.ndarray:
    """Pale colours: values (sRGB) pulled towards their Rec. 601 luma, all the way at severity 1."""
    if _is_none(image, severity):
        return image.copy()
    luma = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., np.newaxis].astype(np.float32)  # (H, W, 1)
    return _to_uint8(luma + (1.0 - severity) * (image - luma))


#: Every degradation by name.
DEGRADATIONS: Mapping[str, Degradation] = MappingProxyType(
    {f.__name__: f for f in (blur, noise, underexpose, overexpose, jpeg, low_contrast, desaturate)}
)


def _is_none(image: np.ndarray, severity: float) -> bool:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} {image.shape}, expected uint8 (H, W, 3)")
    if not 0.0 <= severity <= 1.0:
        raise ValueError(f"severity is {severity}, expected 0 to 1")
    return severity == 0.0


def _jpeg_roundtrip(image: np.ndarray, quality: int) -> np.ndarray:
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    coded: np.ndarray = cv2.imdecode(data, cv2.IMREAD_COLOR)  # type: ignore[assignment]
    return cv2.cvtColor(coded, cv2.COLOR_BGR2RGB)


def _to_srgb(light: np.ndarray) -> np.ndarray:
    """Linear light (0-1, clipped) to uint8 sRGB (IEC 61966-2-1)."""
    light = np.clip(light, 0.0, 1.0)
    return _to_uint8(255.0 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055))


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)
