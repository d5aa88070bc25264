"""`photo.decode`: every awkward file comes out upright, in sRGB and whole, or as a `PhotoError`, and nothing else."""

from __future__ import annotations

import hashlib
import io
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import skimage.data
import torchvision.transforms as T  # noqa: N812 (torchvision's own documentation calls it T)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from benchmarks import fuzz as fuzz_corpus
from benchmarks.fuzz import decode_all, mutants
from picinspector import schema
from picinspector.errors import ErrorKind, PhotoError
from picinspector.measure import measure
from picinspector.photo import WORKING_PX, CropSpec, Limits, Photo, _count_markers, _open, decode
from picinspector.resize import load
from picinspector.stages.guard import Guard
from tests import poison
from tests.awkward import CAMERA_FACTS, QUADRANTS, Case, camera_exif, dng, encode, hazards, make_corpus, png, quadrants

SQUASH = CropSpec(64, 64, "bilinear", "squash")
CENTRE = CropSpec(96, 80)
FUZZ_LIMITS = Limits(max_pixels=1_000_000)  # a changed header may claim any size, and Pillow sets the memory aside


@pytest.fixture(scope="module")
def corpus() -> list[Case]:
    return CORPUS


# Hypothesis draws from it, so it cannot be a fixture.
with tempfile.TemporaryDirectory() as _folder:
    CORPUS = make_corpus(Path(_folder))
    DATA = {case.name: case.path.read_bytes() for case in CORPUS}


def decode_or_error(case: Case, crops: tuple[CropSpec, ...] = (SQUASH, CENTRE)) -> Photo | PhotoError:
    try:
        return decode(DATA[case.name], crops)
    except PhotoError as error:
        return error


def refused(data: bytes, limits: Limits = Limits()) -> PhotoError:
    with pytest.raises(PhotoError) as caught:
        decode(data, [CENTRE], limits)
    return caught.value


def photograph(width: int, height: int) -> np.ndarray:
    """A real photo's pixels, uint8 (height, width, 3)."""
    return np.asarray(Image.fromarray(skimage.data.astronaut()).resize((width, height), Image.Resampling.LANCZOS))


# --- the corpus -------------------------------------------------------------------------------------------------------


def test_the_corpus_is_the_same_every_time_and_large_enough(tmp_path: Path, corpus: list[Case]) -> None:
    again = {case.name: case.path.read_bytes() for case in make_corpus(tmp_path)}
    assert again == DATA
    assert len(again) == len(corpus) >= 50
    assert sum(case.expect != "scored" for case in corpus) >= 10


def test_every_awkward_file_is_scored_or_refused_as_it_must_be(corpus: list[Case]) -> None:
    wrong = []
    for case in corpus:
        result = decode_or_error(case)
        became = result.kind if isinstance(result, PhotoError) else "scored"
        if became != case.expect:
            wrong.append(f"{case.name} ({case.note}): {case.expect} expected, {became}: {result if became else ''}")
    assert not wrong, "\n".join(wrong)


def test_sizes_are_upright_and_formats_are_of_the_content(corpus: list[Case]) -> None:
    for case in corpus:
        photo = decode_or_error(case)
        if isinstance(photo, Photo):
            found = (photo.facts["width"], photo.facts["height"], photo.facts["format"])
            assert found == (case.width, case.height, case.format), case.name


def test_the_right_colours_are_in_the_right_places(corpus: list[Case]) -> None:
    """Orientation, mirroring, CMYK, ICC, alpha, bit depth and first frame, in what is measured and what is encoded."""
    wrong, probed = [], 0
    for case in corpus:
        photo = decode_or_error(case)
        if isinstance(photo, PhotoError):
            continue
        for what, pixels in (("working", photo.working), ("crop", photo.crops[0])):
            height, width = pixels.shape[:2]
            for probe in case.probes:
                found = pixels[int(probe.y * height), int(probe.x * width)]
                probed += 1
                if np.abs(found.astype(int) - probe.rgb).max() > probe.tolerance:
                    wrong.append(
                        f"{case.name} {what} at ({probe.x}, {probe.y}): {probe.rgb} expected, {found.tolist()}"
                    )
    assert not wrong, "\n".join(wrong)
    assert probed > 350


def test_shapes_and_types_are_as_promised(corpus: list[Case]) -> None:
    for case in corpus:
        photo = decode_or_error(case)
        if isinstance(photo, PhotoError):
            assert "\n" not in photo.message and 5 < len(photo.message) <= 500
            continue
        check_shapes(photo, (SQUASH, CENTRE))
        assert case.width is not None and case.height is not None
        assert min(photo.working.shape[:2]) == min(WORKING_PX, case.width, case.height), "shrunk, never enlarged"


def check_shapes(photo: Photo, crops: tuple[CropSpec, ...]) -> None:
    assert photo.working.dtype == np.uint8 and photo.working.ndim == 3 and photo.working.shape[2] == 3
    assert 1 <= min(photo.working.shape[:2]) <= WORKING_PX
    assert [crop.shape for crop in photo.crops] == [(spec.crop_px, spec.crop_px, 3) for spec in crops]
    assert all(crop.dtype == np.uint8 for crop in photo.crops)
    assert list(photo.facts) == schema.FACTS.names
    pa.Table.from_pylist([photo.facts], schema=schema.FACTS)  # raises where a fact does not fit its column


def test_nothing_is_printed(corpus: list[Case], capfd: pytest.CaptureFixture[str]) -> None:
    """Image libraries in C like to write to stderr; a job over a million photos must not."""
    for case in corpus:
        decode_or_error(case)
    assert capfd.readouterr() == ("", "")


# --- facts ------------------------------------------------------------------------------------------------------------


def test_exif_facts_are_read() -> None:
    facts = decode(DATA["camera.jpg"], []).facts
    found = {name: facts[name] for name in CAMERA_FACTS} | {"captured_at": facts["captured_at"].isoformat()}
    assert found == pytest.approx(CAMERA_FACTS)


def test_a_photo_without_exif_has_nulls_for_facts() -> None:
    facts = decode(DATA["photo.bmp"], []).facts
    known = [name for name, value in facts.items() if value is not None]
    assert known == ["width", "height", "format", "content_hash", "phash"]
    assert facts["content_hash"] == hashlib.sha256(DATA["photo.bmp"]).hexdigest()[:32]


@pytest.mark.parametrize("format_name", ["PNG", "WEBP", "HEIF", "AVIF", "TIFF"])
def test_exif_facts_are_read_from_other_containers(format_name: str) -> None:
    facts = decode(encode(quadrants(), format_name, exif=camera_exif().tobytes()), []).facts
    assert facts["camera"] == CAMERA_FACTS["camera"]
    assert facts["iso"] == CAMERA_FACTS["iso"]


def test_phash_is_near_for_the_same_photo_and_far_for_another() -> None:
    def phash(data: bytes) -> int:
        return int(decode(data, []).facts["phash"])

    good = phash(encode(photograph(800, 600), "JPEG", quality=95))
    worse = phash(encode(photograph(400, 300), "JPEG", quality=40))
    other = phash(encode(skimage.data.coffee(), "JPEG", quality=95))
    assert (good ^ worse).bit_count() <= 6
    assert (good ^ other).bit_count() >= 16


# --- pixels -----------------------------------------------------------------------------------------------------------


def test_dct_scaled_decoding_is_close_to_full_decoding() -> None:
    """Half of a 2200 px side leaves twice the 512 px needed."""
    data = encode(photograph(3000, 2200), "JPEG", quality=92)
    photo = decode(data, [CropSpec(224, 224)])
    full = Image.open(io.BytesIO(data)).convert("RGB")
    expected = np.asarray(T.CenterCrop(224)(T.Resize(224, T.InterpolationMode.BICUBIC)(full)))
    difference = np.abs(photo.crops[0].astype(int) - expected)
    assert difference.mean() < 1.0
    assert np.quantile(difference, 0.999) <= 12
    assert (photo.facts["width"], photo.facts["height"]) == (3000, 2200)


def test_dct_scaling_covers_the_largest_crop() -> None:
    """A crop of 1,500 px of a 3000 x 2200 photo: any scale would give 1,100 rows or fewer, and a blurred crop."""
    data = encode(photograph(3000, 2200), "JPEG", quality=95)
    crop = decode(data, [CropSpec(1500, 1500)]).crops[0]
    full = Image.open(io.BytesIO(data)).convert("RGB")
    expected = np.asarray(T.CenterCrop(1500)(T.Resize(1500, T.InterpolationMode.BICUBIC)(full)))
    difference = np.abs(crop.astype(int) - expected)
    assert difference.max() <= 2 and difference.mean() < 0.05


@pytest.mark.parametrize(("width", "height"), [(640, 480), (481, 640), (301, 299), (224, 1000)])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_crops_equal_torchvisions(width: int, height: int, resample: Any) -> None:
    """The transform that both encoders were trained with: Resize and CenterCrop on the shorter side."""
    pixels = photograph(width, height)
    crop = decode(encode(pixels, "PNG"), [CropSpec(224, 224, resample)]).crops[0]
    mode = T.InterpolationMode(resample)
    expected = T.CenterCrop(224)(T.Resize(224, mode)(Image.fromarray(pixels)))
    difference = np.abs(crop.astype(int) - np.asarray(expected))
    # Of a long photo only the middle is resized, which may shift it by a part of a pixel.
    if max(width, height) > 4 * min(width, height):
        assert difference.mean() < 1
    else:
        assert difference.max() <= 2 and difference.mean() < 0.05


def test_a_shrunk_png_is_close_to_the_whole_one() -> None:
    pixels = photograph(2600, 2400)
    crop = decode(encode(pixels, "BMP"), [CropSpec(224, 224)]).crops[0]
    expected = np.asarray(T.CenterCrop(224)(T.Resize(224, T.InterpolationMode.BICUBIC)(Image.fromarray(pixels))))
    assert np.abs(crop.astype(int) - expected).mean() < 1.0


def test_measurements_depend_little_on_resolution_and_format() -> None:
    """4104 px has room for a scale of 1/4 with twice the working side left, 4088 px only for 1/2 (BMP: 1/3)."""
    noise = np.random.default_rng(7).standard_normal((4104, 4104), dtype=np.float32)
    noisy = photograph(4104, 4104)[..., 1] + 25 * noise  # grey: a third of the time
    whole = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    trimmed = whole.crop((8, 8, 4096, 4096))
    files = [encode(whole, "JPEG", quality=92), encode(trimmed, "JPEG", quality=92), encode(trimmed, "BMP")]
    found = [measure(decode(data, []).working) for data in files]
    for name in ("sharpness", "noise"):
        values = [measured[name] for measured in found]
        assert max(values) / min(values) < 1.08, (name, values)


def float_tiff(values: np.ndarray) -> bytes:
    return encode(Image.fromarray(values.astype(np.float32)), "TIFF")


@pytest.mark.parametrize(("grey", "highlight", "expected"), [(0.5, 1.2, 128), (0.5, 1.0, 128), (128.0, 250.0, 128)])
def test_float_pixels_are_0_to_1_unless_most_are_beyond(grey: float, highlight: float, expected: int) -> None:
    """One pixel above 1, as sharpening leaves them, does not make a picture of 0 to 255."""
    values = np.full((64, 64), grey)
    values[20, 30] = highlight
    working = decode(float_tiff(values), []).working
    assert (working[0, 0] == expected).all()
    assert (working[20, 30] == (250 if highlight > 2 else 255)).all()


def test_decoding_twice_gives_the_same() -> None:
    first, second = (decode(DATA["orientation_8_large.jpg"], [CENTRE]) for _ in range(2))
    assert first.facts == second.facts
    assert np.array_equal(first.working, second.working)
    assert np.array_equal(first.crops[0], second.crops[0])


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_camera_raw_is_developed_upright(orientation: int) -> None:
    """LibRaw chooses the brightness itself: a colour may be off by that, but not be another colour."""
    photo = decode(dng(orientation), [SQUASH], suffix=".DNG")
    assert (photo.facts["width"], photo.facts["height"], photo.facts["format"]) == (320, 240, "RAW")
    assert photo.facts["camera"] == "Acme One"
    found = [photo.crops[0][row, column].astype(int) for row in (16, 48) for column in (16, 48)]
    assert np.abs(np.array(found) - QUADRANTS).max() <= 45


def test_damaged_camera_raw_is_a_photo_error() -> None:
    data = dng(1)
    for cut in (1, 8, 100, 2048, len(data) // 2):
        with pytest.raises(PhotoError):
            decode(data[:cut], [], suffix=".dng")
    with pytest.raises(PhotoError) as caught:
        decode(data, [], Limits(max_pixels=320 * 240 - 1), suffix=".dng")
    assert caught.value.kind == ErrorKind.TOO_MANY_PIXELS


def test_camera_raw_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rawpy", None)  # importing it fails
    with pytest.raises(PhotoError, match=r"pip install 'picinspector\[raw\]'") as caught:
        decode(dng(1), [], suffix=".dng")
    assert caught.value.kind == ErrorKind.NO_DECODER


# --- limits and damage ------------------------------------------------------------------------------------------------


def claims(format_name: str) -> bytes:
    """A small file whose header says 30,000 x 30,000 pixels."""
    side = 30_000
    if format_name == "PNG":
        return png(side, side, 8, 2, b"")
    data = bytearray(encode(quadrants(16, 16), format_name))
    if format_name == "JPEG":
        struct.pack_into(">2H", data, data.index(b"\xff\xc0") + 5, side, side)
    elif format_name == "BMP":
        struct.pack_into("<2i", data, 18, side, side)
    elif format_name == "GIF":
        struct.pack_into("<2H", data, 6, side, side)
    elif format_name == "TIFF":
        directory = struct.unpack_from("<I", data, 4)[0]
        for entry in range(directory + 2, directory + 2 + 12 * struct.unpack_from("<H", data, directory)[0], 12):
            if struct.unpack_from("<H", data, entry)[0] in (256, 257):
                struct.pack_into("<HII", data, entry + 2, 4, 1, side)
    return bytes(data)


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "BMP", "GIF", "TIFF"])
def test_too_many_pixels_are_refused_from_the_header(format_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: ImageFile.ImageFile) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    error = refused(claims(format_name))
    assert error.kind == ErrorKind.TOO_MANY_PIXELS
    assert "30000x30000" in error.message and "300" in error.message


def test_the_limits_themselves_are_allowed() -> None:
    data = DATA["photo.bmp"]
    decode(data, [], Limits(max_bytes=len(data), max_pixels=320 * 240))
    assert refused(data, Limits(max_bytes=len(data) - 1)).kind == ErrorKind.TOO_MANY_BYTES
    assert refused(data, Limits(max_pixels=320 * 240 - 1)).kind == ErrorKind.TOO_MANY_PIXELS


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "HEIF", "AVIF", "TIFF", "BMP"])
def test_no_part_of_a_photo_passes_for_the_whole(format_name: str) -> None:
    """Cut anywhere up to the last 1 %: never half a picture. (Behind that, some formats keep what is not pixels.)"""
    data = encode(photograph(400, 300), format_name)
    for cut in np.linspace(1, int(len(data) * 0.99), 60).astype(int):
        kind = refused(data[:cut]).kind
        assert kind in {ErrorKind.TRUNCATED, ErrorKind.CORRUPT, ErrorKind.UNKNOWN_FORMAT}, cut


@pytest.mark.parametrize("scale", [1, 8])
def test_no_part_of_a_jpeg_passes_for_the_whole_at_any_scale(scale: int) -> None:
    pixels = photograph(520 * scale, 520 * scale)
    for progressive in (False, True):
        data = encode(pixels, "JPEG", quality=85, progressive=progressive)
        for share in (0.1, 0.5, 0.9, 0.99):
            assert refused(data[: int(len(data) * share)]).kind == ErrorKind.TRUNCATED, share


# --- Hypothesis -------------------------------------------------------------------------------------------------------

# A thousandth of a second each; 20,000 changed files were tried when this was written.
fuzz = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def photo_or_photo_error(data: bytes, suffix: str = "") -> None:
    try:
        photo = decode(data, [CENTRE, SQUASH], FUZZ_LIMITS, suffix)
    except PhotoError as error:
        assert "\n" not in error.message
    else:
        check_shapes(photo, (CENTRE, SQUASH))


MAGIC = [
    b"",
    b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
    b"\xff\xd8\xff\xe1\x00\x40Exif\x00\x00II*\x00",
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    b"GIF89a",
    b"BM",
    b"II*\x00\x08\x00\x00\x00",
    b"MM\x00*\x00\x00\x00\x08",
    b"RIFF\x40\x00\x00\x00WEBPVP8 ",
    b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic",
    b"\x00\x00\x00\x1cftypavif\x00\x00\x00\x00avifmif1miaf",
]


@fuzz
@given(st.sampled_from(MAGIC), st.binary(max_size=600), st.sampled_from(["", ".jpg", ".nef", ".DNG"]))
def test_arbitrary_bytes_raise_nothing_but_a_photo_error(magic: bytes, data: bytes, suffix: str) -> None:
    photo_or_photo_error(magic + data, suffix)


SMALL = sorted(name for name, data in DATA.items() if len(data) < 60_000)


@settings(fuzz, max_examples=1500)
@given(
    st.sampled_from(SMALL),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12),
    # Most of what a decoder can trip over is written in the first bytes.
    st.sampled_from([32, 128, 1024, 10**9]),
    st.floats(0.5, 1),
)
def test_a_changed_file_raises_nothing_but_a_photo_error(
    name: str, changes: list[tuple[float, int]], reach: int, keep: float
) -> None:
    data = bytearray(DATA[name])
    for place, value in changes:
        if data:
            data[int(place * min(reach, len(data)))] = value
    photo_or_photo_error(bytes(data[: int(len(data) * keep)]))


@fuzz
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20))
def test_a_damaged_exif_block_never_costs_the_photo(changes: list[tuple[float, int]]) -> None:
    """The pixels are whole. Whatever EXIF says, the photo is decoded (perhaps turned: that is what EXIF is for)."""
    data = bytearray(DATA["camera.jpg"])
    start = data.index(b"Exif\x00\x00") + 6
    length = struct.unpack_from(">H", data, start - 8)[0] - 8
    for place, value in changes:
        data[start + int(place * length)] = value
    photo = decode(bytes(data), [CENTRE, SQUASH])
    check_shapes(photo, (CENTRE, SQUASH))
    assert {photo.facts["width"], photo.facts["height"]} == {320, 240}


# --- hazards ----------------------------------------------------------------------------------------------------------


def test_no_hazard_takes_long_or_much_memory(capfd: pytest.CaptureFixture[str]) -> None:
    """Bombs, loops, a film's worth of frames: at most seconds each, in processes that may not take much."""
    files = iter(hazards().items())
    outcomes = {outcome.name: outcome for outcome in decode_all(files, workers=2)}
    assert not [outcome for outcome in outcomes.values() if outcome.bad]
    assert outcomes.keys() == hazards().keys()
    assert max(outcome.memory_bytes for outcome in outcomes.values()) < 1024**3
    verdicts = {name: outcome.verdict for name, outcome in outcomes.items() if outcome.verdict != "scored"}
    assert verdicts == {"bomb_in_text.png": "corrupt", "bomb_in_icc.png": "corrupt", "scans.jpg": "corrupt"}
    capfd.readouterr()  # libtiff writes to stderr


def test_a_jpeg_may_have_as_many_scans_as_progressive_ones_have_and_a_film_behind_it() -> None:
    data = encode(photograph(200, 100), "JPEG", progressive=True)
    assert data.count(b"\xff\xda") > 5
    film = np.random.default_rng(0).bytes(1000) + b"\xff\xda" * 1000
    assert decode(data + film, [CENTRE]).facts["width"] == 200
    last = data[data.rindex(b"\xff\xda") : -2]
    decode(data[:-2] + 50 * last + data[-2:], [CENTRE])
    assert "more than 100 scans" in refused(data[:-2] + 100 * last + data[-2:]).message


def test_a_slice_of_the_fuzz_corpus_ends_in_verdicts(capfd: pytest.CaptureFixture[str]) -> None:
    """`python -m benchmarks.fuzz` decodes all of it."""
    files = list(mutants(seed=1, files=150))
    assert files == list(mutants(seed=1, files=150)) and len(files) == 150
    outcomes = list(decode_all(iter(files), workers=2))
    assert sorted(outcome.name for outcome in outcomes) == sorted(name for name, _ in files)
    assert not [outcome for outcome in outcomes if outcome.bad]
    assert {"scored", "truncated", "corrupt"} <= {outcome.verdict for outcome in outcomes}
    capfd.readouterr()


def test_what_kills_or_hangs_is_seen_by_the_fuzz(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report cannot be good because nothing is looked at."""
    monkeypatch.setattr(fuzz_corpus, "TIMEOUT_S", 2.0)
    monkeypatch.setattr(fuzz_corpus, "examine", poison.examine)
    files = {act: poison.poison(act) for act in ("segfault", "spin", "sleep 0")}
    assert {o.name: o.verdict for o in decode_all(iter(files.items()), 1)} == {
        "segfault": "crash",
        "spin": "hang",
        "sleep 0": "scored",
    }


def lossless_jpeg(side_px: int) -> bytes:
    """Three channels of one grey, by predictor 1 with one Huffman code, of length 1: no difference (T.81, annex H)."""
    size = side_px.to_bytes(2, "big")
    frame = b"\xff\xc3\x00\x11\x08" + size + size + b"\x03\x01\x11\x00\x02\x11\x00\x03\x11\x00"
    table = b"\xff\xc4\x00\x14\x00\x01" + b"\x00" * 15 + b"\x00"
    scan = b"\xff\xda\x00\x0c\x03\x01\x00\x02\x00\x03\x00\x01\x00\x00"
    return b"\xff\xd8" + frame + table + scan + b"\x00" * (side_px * side_px * 3 // 8 + 1) + b"\xff\xd9"


def test_a_lossless_jpeg_does_not_go_past_its_array() -> None:
    """libjpeg-turbo scales none: simplejpeg would have it write in full into an array of a quarter."""
    data = lossless_jpeg(2101)
    with Guard(decode, memory_bytes=2 * 1024**3, prepare=load) as guard:
        try:
            working = guard(data, [], Limits()).working
        except PhotoError as error:
            assert error.kind != ErrorKind.CRASHED, error.message
        else:
            assert working.shape == (512, 512, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "form", [{}, {"progressive": True}, {"subsampling": 0}], ids=["baseline", "progressive", "444"]
)
def test_sound_jpegs_have_pillows_pixels(orientation: int, form: dict[str, Any]) -> None:
    """Whichever decoder it is, and whether it scales; 2096 px is just enough for half."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photograph(2210, 2096), "JPEG", quality=90, exif=exif, **form)
    with Image.open(io.BytesIO(data)) as image:
        image.draft(None, (1024, 1024))
        expected = np.asarray(ImageOps.exif_transpose(image))
    pixels, facts = _open(data, Limits(), 512)
    assert np.array_equal(pixels, expected)
    assert (facts["height"], facts["width"]) == ((2096, 2210) if orientation < 5 else (2210, 2096))


def test_a_file_of_nothing_but_markers_costs_little() -> None:
    assert _count_markers(b"\xff" * (3 * 1024**2 + 1))[0xFF] == 3 * 1024**2
    assert _count_markers(b"\xff\xda" * 700_000)[0xDA] == 700_000, "pairs across slices count once"
    assert not _count_markers(b"").any() and not _count_markers(b"\xff").any()
