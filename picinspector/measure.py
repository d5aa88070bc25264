"""Pixel measurements in their field definitions, taken on the working image so that cameras compare."""

from __future__ import annotations

import cv2
import numpy as np

#: Of Immerkaer's mask, which is its outer product with itself.
_SECOND_DIFFERENCE = np.array([1, -2, 1], dtype=np.float32)


def measure(working: np.ndarray) -> dict[str, float]:
    """All of `schema.MEASUREMENTS` for one picture.

    Args:
        working: uint8 sRGB (H, W, 3), `Photo.working`.

    Returns:
        name -> value, units as in `schema.MEASUREMENT_FIELDS`.
    """
    luma = cv2.cvtColor(working, cv2.COLOR_RGB2GRAY)  # (H, W), Rec. 601, 0-255
    mean, deviation = _mean_std(luma)
    red, green, blue = cv2.split(working)
    brightest = cv2.max(cv2.max(red, green), blue)
    return {
        "sharpness": sharpness(luma),
        "noise": noise(luma),
        "brightness": mean / 255.0,
        "contrast": deviation / 255.0,
        "colorfulness": colorfulness(working),
        "clipped_highlights": float(np.count_nonzero(brightest >= 254)) / brightest.size,
        "clipped_shadows": float(np.count_nonzero(brightest <= 1)) / brightest.size,
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
    response = cv2.sepFilter2D(luma, cv2.CV_16S, _SECOND_DIFFERENCE, _SECOND_DIFFERENCE)[1:-1, 1:-1]
    return float(np.sqrt(np.pi / 2) / 6 * cv2.norm(response, cv2.NORM_L1) / response.size)


def colorfulness(pixels: np.ndarray) -> float:
    """Colourfulness M3 (Hasler and Suesstrunk 2003, eq. 10) of uint8 sRGB (H, W, 3)."""
    red, green, blue = cv2.split(pixels)
    red_green = cv2.subtract(red, green, dtype=cv2.CV_16S)
    # Twice yb = (R + G) / 2 - B, which is an integer.
    yellow_blue = cv2.addWeighted(cv2.add(red, green, dtype=cv2.CV_16S), 1, blue, -2, 0, dtype=cv2.CV_16S)
    (mean_rg, std_rg), (mean_yb, std_yb) = _mean_std(red_green), _mean_std(yellow_blue)
    return float(np.hypot(std_rg, std_yb / 2) + 0.3 * np.hypot(mean_rg, mean_yb / 2))
