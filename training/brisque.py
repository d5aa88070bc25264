"""BRISQUE's 36 natural scene statistics (Mittal, Moorthy and Bovik, IEEE TIP 21(12), 2012), for a baseline.

Luminance is normalised by its local mean and deviation (section III-A). Undistorted photos then follow a generalised
Gaussian, and products of neighbours an asymmetric one; distortion moves the fitted parameters. At each of two scales:
shape and variance of the values (table I, f1-f2), and shape, mean, left and right variance of the products in four
directions (f3-f18). Unlike the authors' release, products do not wrap around the border.
"""

from __future__ import annotations

import cv2
import numpy as np
from scipy.special import gamma

NUM_FEATURES = 36

# Section III-A: a 7 x 7 Gaussian window cut at three standard deviations.
_WINDOW_PX, _WINDOW_SIGMA = 7, 7 / 6
_STABILISER = 1.0  # C of eq. 1, for luminance 0-255
_ROUNDING = 1e-4  # of single precision at luminance 255: what a flat picture leaves
# The authors' range for shapes; beyond it the ratio of moments hardly moves.
_SHAPES = np.arange(0.2, 10.0, 0.001)
_RATIOS = gamma(2 / _SHAPES) ** 2 / (gamma(1 / _SHAPES) * gamma(3 / _SHAPES))  # rises with the shape


def brisque_features(image: np.ndarray) -> np.ndarray:
    """The 36 features of one picture.

    Args:
        image: uint8 sRGB (H, W, 3), at least 16 pixels a side.

    Returns:
        float32 (36,): 18 at full size, then 18 at half. NaN where nothing varies.
    """
    luma = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2GRAY)  # (H, W), Rec. 601, 0-255
    half = cv2.resize(luma, (luma.shape[1] // 2, luma.shape[0] // 2), interpolation=cv2.INTER_AREA)
    return np.concatenate([_scale_features(luma), _scale_features(half)]).astype(np.float32)


def mscn(luma: np.ndarray) -> np.ndarray:
    """Mean-subtracted, contrast-normalised coefficients (eq. 1-3) of luminance 0-255: float32 (H, W)."""

    def local_mean(values: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(values, (_WINDOW_PX, _WINDOW_PX), _WINDOW_SIGMA, borderType=cv2.BORDER_REPLICATE)

    luma = luma.astype(np.float32)
    mean = local_mean(luma)
    deviation = np.sqrt(np.abs(local_mean(luma * luma) - mean * mean))
    coefficients = (luma - mean) / (deviation + _STABILISER)
    return np.where(np.abs(coefficients) < _ROUNDING, np.float32(0), coefficients)


def fit_ggd(values: np.ndarray) -> tuple[float, float]:
    """Shape and variance of a zero-mean generalised Gaussian by moments (Sharifi and Leon-Garcia 1995).

    Shape 2 is a Gaussian, 1 a Laplacian. NaN where all values are 0.
    """
    values = values.astype(np.float64)
    variance = float(np.mean(values * values))
    if variance == 0.0:
        return np.nan, np.nan
    return _shape(float(np.mean(np.abs(values))) ** 2 / variance), variance


def fit_aggd(values: np.ndarray) -> tuple[float, float, float, float]:
    """Shape, mean, left and right variance of an asymmetric generalised Gaussian by moments (Lasmar et al. 2009).

    NaN where all values are 0.
    """
    values = values.astype(np.float64)
    squares = values * values
    if not squares.any():
        return np.nan, np.nan, np.nan, np.nan
    left_variance = _mean(squares[values < 0])
    right_variance = _mean(squares[values > 0])
    left, right = left_variance**0.5, right_variance**0.5
    ratio = float(np.mean(np.abs(values))) ** 2 / float(np.mean(squares))
    # The estimator of Lasmar et al. with gamma = left / right, written so that neither may be a divisor.
    shape = _shape(ratio * (left**3 + right**3) * (left + right) / (left**2 + right**2) ** 2)
    mean = (right - left) * gamma(2 / shape) / np.sqrt(gamma(1 / shape) * gamma(3 / shape))  # eq. 9 and 12
    return shape, float(mean), left_variance, right_variance


def _scale_features(luma: np.ndarray) -> np.ndarray:
    coefficients = mscn(luma)
    products = (
        coefficients[:, :-1] * coefficients[:, 1:],  # eq. 7: horizontal
        coefficients[:-1] * coefficients[1:],  # vertical
        coefficients[:-1, :-1] * coefficients[1:, 1:],  # main diagonal
        coefficients[:-1, 1:] * coefficients[1:, :-1],  # the other diagonal
    )
    return np.array([*fit_ggd(coefficients), *(number for product in products for number in fit_aggd(product))])


def _shape(ratio: float) -> float:
    """The shape whose squared mean magnitude is this share of its variance; clipped to the range of `_SHAPES`."""
    return float(np.interp(ratio, _RATIOS, _SHAPES))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0
