"""Pixel measurements in their field definitions, taken on the working image so that cameras compare."""

from __future__ import annotations

import cv2
import numpy as np

_IMMERKAER = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=np.float32)
#: rg = R - G and yb = (R + G) / 2 - B.
_OPPONENTS = np.array([[1, -1, 0], [0.5, 0.5, -1]], dtype=np.float32)


def measure(working: np.ndarray) -> dict[str, float]:
    """All of `schema.MEASUREMENTS` for one picture.

    Args:
        working: uint8 sRGB (H, W, 3), `Photo.working`.

    Returns:
        name -> value, units as in `schema.MEASUREMENT_FIELDS`.
    """
    luma = cv2.cvtColor(working, cv2.COLOR_RGB2GRAY)  # (H, W), Rec. 601, 0-255
    mean, deviation = _mean_std(luma)
    brightest = cv2.max(cv2.max(working[..., 0], working[..., 1]), working[..., 2])
    return {
        "sharpness": sharpness(luma),
        "noise": noise(luma),
        "brightness": mean / 255.0,
        "contrast": deviation / 255.0,
        "colorfulness": colorfulness(working),
        "clipped_highlights": float((brightest >= 254).mean()),
        "clipped_shadows": float((brightest <= 1).mean()),
    }


def _mean_std(values: np.ndarray) -> tuple[float, float]:
    mean, deviation = cv2.meanStdDev(values)
    return float(mean[0, 0]), float(deviation[0, 0])


def sharpness(luma: np.ndarray) -> float:
    """Variance of the 4-neighbour Laplacian of uint8 luma. Noise raises it too.

    LAPV of Pertuz et al. 2013 ("Analysis of focus measure operators for shape-from-focus"), after Pech-Pacheco et al.
    2000.
    """
    return _mean_std(cv2.Laplacian(luma, cv2.CV_16S, ksize=1))[1] ** 2


def noise(luma: np.ndarray) -> float:
    """Noise sigma of uint8 luma (Immerkaer 1996, eq. 4). Fine texture raises it too. 0 below 3 x 3 pixels."""
    height, width = luma.shape
    if height < 3 or width < 3:
        return 0.0
    response = np.abs(cv2.filter2D(luma, cv2.CV_32F, _IMMERKAER)[1:-1, 1:-1])
    return float(np.sqrt(np.pi / 2) / 6 * cv2.mean(response)[0])


def colorfulness(pixels: np.ndarray) -> float:
    """Colourfulness M3 (Hasler and Suesstrunk 2003, eq. 10) of uint8 sRGB (H, W, 3)."""
    opponents = cv2.transform(pixels.astype(np.float32), _OPPONENTS)  # (H, W, 2)
    mean, deviation = cv2.meanStdDev(opponents)
    return float(np.hypot(*deviation[:, 0]) + 0.3 * np.hypot(*mean[:, 0]))
