"""BRISQUE's features against distributions whose parameters are known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from scipy.stats import gennorm

from jobs.demo import real_photos
from training.brisque import NUM_FEATURES, brisque_features, fit_aggd, fit_ggd, mscn


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0, 4.0])
def test_a_generalised_gaussian_gets_its_own_parameters(shape: float) -> None:
    values = gennorm.rvs(shape, scale=3.0, size=200_000, random_state=0)
    fitted, variance = fit_ggd(values)
    assert fitted == pytest.approx(shape, rel=0.02)
    assert variance == pytest.approx(9.0 * gennorm.var(shape), rel=0.03)


@pytest.mark.parametrize(("shape", "left", "right"), [(1.0, 1.0, 2.0), (2.0, 1.0, 0.5), (2.0, 1.0, 1.0)])
def test_an_asymmetric_one_gets_its_own_parameters(shape: float, left: float, right: float) -> None:
    rng = np.random.default_rng(0)
    magnitude = np.abs(gennorm.rvs(shape, size=400_000, random_state=1))
    # Lasmar et al. 2009, eq. 9: each side has a share of the mass that is proportional to its scale.
    values = np.where(rng.random(400_000) < left / (left + right), -left, right) * magnitude
    fitted, mean, left_variance, right_variance = fit_aggd(values)
    assert fitted == pytest.approx(shape, rel=0.02)
    assert mean == pytest.approx(values.mean(), abs=0.02)
    assert left_variance == pytest.approx(left**2 * gennorm.var(shape), rel=0.03)
    assert right_variance == pytest.approx(right**2 * gennorm.var(shape), rel=0.03)


def test_values_of_one_sign_are_fitted_too() -> None:
    shape, mean, left_variance, right_variance = fit_aggd(np.array([1.0, 2.0, 3.0]))
    assert (left_variance, right_variance) == (0.0, pytest.approx(14 / 3))
    assert shape > 0 and mean > 0


def test_normalised_coefficients_of_a_step() -> None:
    """Far from the edge nothing varies: 0. Where it is, each side lies on its own side of the local mean."""
    luma = np.zeros((32, 32), np.float32)
    luma[:, 16:] = 200.0
    coefficients = mscn(luma)
    assert np.all(coefficients[:, :10] == 0) and np.allclose(coefficients[:, 22:], 0, atol=1e-3)
    assert coefficients[16, 15] < -0.5 and coefficients[16, 16] > 0.5


def test_a_brighter_photo_with_more_contrast_has_nearly_the_same_features() -> None:
    """Division by the local deviation takes scale and offset away, but for the stabilising constant."""
    photo = real_photos()["astronaut"].astype(np.float32)
    low, high = (50 + 0.25 * photo), (20 + 0.75 * photo)
    a, b = (brisque_features(np.round(picture).astype(np.uint8)) for picture in (low, high))
    noise = brisque_features(np.random.default_rng(0).integers(0, 256, photo.shape, dtype=np.uint8))
    assert np.abs(a - b).max() < 0.5 * np.abs(a - noise).max()


def test_a_mirror_image_exchanges_the_diagonals_and_nothing_else() -> None:
    photo = real_photos()["coffee"]
    plain, mirrored = brisque_features(photo), brisque_features(np.ascontiguousarray(photo[:, ::-1]))
    assert plain.shape == (NUM_FEATURES,) and np.isfinite(plain).all()
    order = [*range(10), *range(14, 18), *range(10, 14)]
    np.testing.assert_allclose(mirrored[:18], plain[order], rtol=1e-3, atol=1e-4)


def test_neighbours_are_unrelated_in_white_noise_and_alike_after_blur() -> None:
    """The mean product of neighbours over the variance is their correlation."""
    noise = np.random.default_rng(0).normal(128, 20, (256, 256, 1)).clip(0, 255).astype(np.uint8).repeat(3, axis=2)
    blurred = cv2.GaussianBlur(noise, (0, 0), 2)
    features, smooth = brisque_features(noise), brisque_features(blurred)
    horizontal, vertical = 3, 7
    for index in (horizontal, vertical):
        # Not 0: with window weights of .117 and .081 (centre, neighbour), subtracting the local mean leaves -.14.
        assert -0.2 < features[index] / features[1] < 0.0
        assert smooth[index] / smooth[1] > 0.5


def test_a_flat_picture_has_no_distribution() -> None:
    assert np.isnan(brisque_features(np.full((64, 64, 3), 90, np.uint8))).all()
