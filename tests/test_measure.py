"""`measure.measure`: values that a person can derive with a pencil."""

from __future__ import annotations

import math

import numpy as np
import pytest
import skimage.data

from picinspector.measure import measure
from picinspector.schema import MEASUREMENTS


def flat(rgb: tuple[int, int, int], height: int = 64, width: int = 96) -> np.ndarray:
    return np.broadcast_to(np.array(rgb, np.uint8), (height, width, 3)).copy()


def halves(left: tuple[int, int, int], right: tuple[int, int, int], side_px: int = 64) -> np.ndarray:
    return np.hstack([flat(left, side_px, side_px // 2), flat(right, side_px, side_px // 2)])


def grey(luma: np.ndarray) -> np.ndarray:
    return np.repeat(luma.round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def checkerboard(dark: int, light: int, side_px: int = 64) -> np.ndarray:
    rows, columns = np.indices((side_px, side_px))
    return grey(np.where((rows + columns) % 2, light, dark))


def test_every_measurement_is_there_and_is_a_plain_float() -> None:
    values = measure(flat((10, 20, 30)))
    assert tuple(values) == MEASUREMENTS
    assert all(type(value) is float for value in values.values())


def test_black() -> None:
    expected = dict.fromkeys(MEASUREMENTS, 0.0) | {"clipped_shadows": 1.0}
    assert measure(flat((0, 0, 0))) == pytest.approx(expected, abs=1e-9)


def test_white() -> None:
    expected = dict.fromkeys(MEASUREMENTS, 0.0) | {"brightness": 1.0, "clipped_highlights": 1.0}
    assert measure(flat((255, 255, 255))) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("rgb", "luma"), [((255, 0, 0), 76), ((0, 255, 0), 150), ((0, 0, 255), 29), ((100, 100, 100), 100)]
)
def test_brightness_is_rec_601_luma(rgb: tuple[int, int, int], luma: int) -> None:
    """0.299 * 255 = 76.2, 0.587 * 255 = 149.7, 0.114 * 255 = 29.1."""
    assert measure(flat(rgb))["brightness"] == pytest.approx(luma / 255, abs=1e-6)


def test_brightness_and_contrast_of_two_halves() -> None:
    """Half at 50, half at 200: mean 125, and every pixel is 75 from it."""
    values = measure(halves((50, 50, 50), (200, 200, 200)))
    assert values["brightness"] == pytest.approx(125 / 255)
    assert values["contrast"] == pytest.approx(75 / 255)


def test_contrast_is_half_at_most() -> None:
    """Half black, half white: the largest standard deviation there is."""
    assert measure(halves((0, 0, 0), (255, 255, 255)))["contrast"] == pytest.approx(0.5)


def test_sharpness_of_a_checkerboard() -> None:
    """All four neighbours have the other value: the Laplacian is +-4 (light - dark), so its variance is 16 * 40 ** 2.

    The picture has as many pixels of either, and a reflected border keeps the pattern.
    """
    assert measure(checkerboard(100, 140))["sharpness"] == pytest.approx(16 * 40**2)


def test_sharpness_of_one_dot() -> None:
    """A dot of 50 on black: the Laplacian is -200 there, 50 at four neighbours, 0 elsewhere; their sum is 0."""
    luma = np.zeros((64, 64))
    luma[30, 30] = 50
    assert measure(grey(luma))["sharpness"] == pytest.approx((200**2 + 4 * 50**2) / 64**2)


def test_a_slope_is_not_sharp_and_not_noisy() -> None:
    """Second differences of a plane are 0; only the reflected border of the Laplacian sees the slope."""
    rows, columns = np.indices((60, 60))
    values = measure(grey(10.0 + rows + 2 * columns))
    assert values["noise"] == 0
    # Reflected, the step across an edge counts twice: +-4 along two edges, +-2 along the others; in the corners, where
    # they add up, (4 + 2) ** 2 and (4 - 2) ** 2 make up for each other.
    assert values["sharpness"] == pytest.approx((2 * 60 * 4.0**2 + 2 * 60 * 2.0**2) / 60**2)


def test_noise_of_a_checkerboard() -> None:
    """Immerkaer's mask on it: 4 + 4 * 2 + 4 * 1 = 16 where signs agree, so |response| = 16 * 20 around the mean."""
    assert measure(checkerboard(100, 140))["noise"] == pytest.approx(math.sqrt(math.pi / 2) / 6 * 16 * 20, rel=1e-5)


@pytest.mark.parametrize("sigma", [2.0, 5.0, 10.0, 20.0])
def test_noise_is_the_sigma_of_gaussian_noise(sigma: float) -> None:
    luma = 128 + np.random.default_rng(3).normal(0, sigma, (512, 512))
    assert measure(grey(luma))["noise"] == pytest.approx(sigma, rel=0.03)


def test_noise_is_not_much_fooled_by_an_edge() -> None:
    luma = np.full((512, 512), 60.0)
    luma[:, 256:] = 200
    luma += np.random.default_rng(4).normal(0, 5, luma.shape)
    assert measure(grey(luma))["noise"] == pytest.approx(5, rel=0.1)


def test_colorfulness_of_grey_is_none() -> None:
    assert measure(checkerboard(20, 220))["colorfulness"] == pytest.approx(0, abs=1e-4)


def test_colorfulness_of_one_colour() -> None:
    """Red everywhere: rg = 255, yb = 127.5, no spread: 0.3 * |mean|."""
    assert measure(flat((255, 0, 0)))["colorfulness"] == pytest.approx(0.3 * math.hypot(255, 127.5), rel=1e-5)


def test_colorfulness_of_two_colours() -> None:
    """Half red, half blue.

    rg is 255 and 0: mean 127.5, deviation 127.5. yb is 127.5 and -255: mean -63.75, deviation 191.25.
    """
    expected = math.hypot(127.5, 191.25) + 0.3 * math.hypot(127.5, 63.75)
    assert measure(halves((255, 0, 0), (0, 0, 255)))["colorfulness"] == pytest.approx(expected, rel=1e-5)


def test_clipping_counts_pixels() -> None:
    picture = flat((128, 128, 128), 10, 10)
    picture[0, :5] = (254, 100, 100)  # one channel is enough for a highlight
    picture[1, :4] = (253, 253, 253)
    picture[2, :3] = (1, 0, 1)
    picture[3, :2] = (0, 0, 2)  # every channel has to be dark for a shadow
    values = measure(picture)
    assert values["clipped_highlights"] == pytest.approx(0.05)
    assert values["clipped_shadows"] == pytest.approx(0.03)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4000), (4000, 1), (2, 2), (3, 3), (2, 512)])
def test_any_size_has_finite_values(height: int, width: int) -> None:
    picture = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert all(math.isfinite(value) and value >= 0 for value in measure(picture).values())


def test_a_photo_and_its_faults_are_ordered_as_a_person_would() -> None:
    photo = skimage.data.astronaut()
    blurred = photo.reshape(64, 8, 64, 8, 3).mean(axis=(1, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    noisy = (photo + np.random.default_rng(6).normal(0, 15, photo.shape)).clip(0, 255).astype(np.uint8)
    dark, dull = (photo // 4), (photo // 4 + 96)
    good = measure(photo)
    assert measure(blurred)["sharpness"] < good["sharpness"]
    assert measure(noisy)["noise"] > good["noise"] + 5
    assert measure(dark)["brightness"] < good["brightness"] / 3
    assert measure(dull)["contrast"] < good["contrast"] / 3
    assert measure(grey(photo.mean(axis=2)))["colorfulness"] < 1 < good["colorfulness"]


def test_the_input_is_left_alone() -> None:
    picture = skimage.data.astronaut()
    before = picture.copy()
    measure(picture)
    assert np.array_equal(picture, before)


def test_a_read_only_and_a_strided_picture_will_do() -> None:
    """`np.asarray` of a Pillow image is read-only, and a crop of it is not contiguous."""
    picture = skimage.data.astronaut()
    picture.flags.writeable = False
    assert measure(picture[10:300, 20:400]) == measure(picture[10:300, 20:400].copy())
