"""About fifty awkward photo files, made from nothing: what a real library holds besides good JPEGs.

`make_corpus(folder)` writes them and says of each what must become of it. `python -m tests.awkward FOLDER` does it by
hand. Most files show the same picture, four flat quadrants (`QUADRANTS`), so that a photo that was turned, mirrored,
inverted or read in the wrong colours is seen in four probed pixels.
"""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pillow_heif
from PIL import ExifTags, Image, ImageCms

from picinspector.errors import ErrorKind

RGB = tuple[int, int, int]

WIDTH, HEIGHT = 320, 240
#: Upright colours: top left, top right, bottom left, bottom right. Far apart, and none is another's mirror or inverse.
QUADRANTS: tuple[RGB, RGB, RGB, RGB] = ((200, 60, 40), (40, 150, 60), (50, 70, 190), (220, 200, 60))
WHITE: RGB = (255, 255, 255)
_CENTRES = ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75))


@dataclass(frozen=True)
class Probe:
    """The colour expected at a place of the upright photo.

    Attributes:
        x, y: place as a share of width and height, 0-1.
        rgb: sRGB, 0-255.
        tolerance: largest difference of any channel.
    """

    x: float
    y: float
    rgb: RGB
    tolerance: int


@dataclass(frozen=True)
class Case:
    """One file and what must become of it.

    Attributes:
        name: path below the corpus folder.
        path: where it was written.
        expect: "scored", or the error that its row must carry.
        note: what is awkward about it.
        format: the `format` fact, where it is scored.
        width, height: the upright size, where it is scored.
        probes: colours to be found; empty where the file does not say what it shows.
    """

    name: str
    path: Path
    expect: Literal["scored"] | ErrorKind
    note: str
    format: str | None = None
    width: int | None = None
    height: int | None = None
    probes: tuple[Probe, ...] = ()


def make_corpus(folder: Path) -> list[Case]:
    """Write every awkward file below `folder` (made where missing) and describe each."""
    corpus = _Corpus(folder)
    for add in (_orientations, _colours, _depths_and_alpha, _containers, _sizes_and_names, _damage):
        add(corpus)
    return corpus.cases


def quadrants(width: int = WIDTH, height: int = HEIGHT, colours: tuple[RGB, RGB, RGB, RGB] = QUADRANTS) -> np.ndarray:
    """The picture that most files show: uint8 (H, W, 3)."""
    pixels = np.empty((height, width, 3), np.uint8)
    rows, columns = (slice(height // 2), slice(height // 2, None)), (slice(width // 2), slice(width // 2, None))
    for index, colour in enumerate(colours):
        pixels[rows[index // 2], columns[index % 2]] = colour
    return pixels


def as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels a camera stores for an upright picture under an EXIF orientation.

    Written down from the table in Exif 3.0, section 4.6.5.1.6, which says for each value which visual side the stored
    row 0 and column 0 are; not from any library's list of turns.
    """
    stored: Callable[[np.ndarray], np.ndarray] = {
        1: lambda a: a,  # row 0: top, column 0: left
        2: lambda a: a[:, ::-1],  # top, right
        3: lambda a: a[::-1, ::-1],  # bottom, right
        4: lambda a: a[::-1],  # bottom, left
        5: lambda a: a.swapaxes(0, 1),  # left, top
        6: lambda a: a[:, ::-1].swapaxes(0, 1),  # right, top
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),  # right, bottom
        8: lambda a: a[::-1].swapaxes(0, 1),  # left, bottom
    }[orientation]
    return np.ascontiguousarray(stored(upright))


def encode(pixels: np.ndarray | Image.Image, format_name: str, **settings: Any) -> bytes:
    """A picture as the bytes of a file."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format_name, **settings)
    return buffer.getvalue()


def swapped_primaries_profile() -> bytes:
    """An ICC profile like sRGB's but with red and blue exchanged: who ignores it sees the wrong colours at once."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = struct.pack(">6H", 2024, 1, 1, 0, 0, 0)  # its time of making, else no two corpora are the same
    count = struct.unpack_from(">I", profile, 128)[0]
    exchange = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ", b"rTRC": b"bTRC", b"bTRC": b"rTRC"}
    for offset in range(132, 132 + 12 * count, 12):
        tag = bytes(profile[offset : offset + 4])
        profile[offset : offset + 4] = exchange.get(tag, tag)
    for encoding in ("ascii", "utf-16-be"):
        profile = bytearray(bytes(profile).replace("sRGB".encode(encoding), "swap".encode(encoding)))
    return bytes(profile)


def camera_exif() -> Image.Exif:
    """What a camera writes: every tag that becomes a fact, with the values `CAMERA_FACTS` names."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "NIKON CORPORATION"
    exif[ExifTags.Base.Model] = "NIKON Z 6"
    shot = exif.get_ifd(ExifTags.IFD.Exif)
    shot[ExifTags.Base.DateTimeOriginal] = "2023:06:17 18:30:05"
    shot[ExifTags.Base.SubsecTimeOriginal] = "25"
    shot[ExifTags.Base.LensModel] = "NIKKOR Z 24-70mm f/4 S"
    shot[ExifTags.Base.ISOSpeedRatings] = 640
    shot[ExifTags.Base.ExposureTime] = 1 / 250
    shot[ExifTags.Base.FNumber] = 4.0
    shot[ExifTags.Base.FocalLength] = 35.0
    return exif


#: The facts of a photo with `camera_exif`; `captured_at` in ISO 8601.
CAMERA_FACTS: dict[str, Any] = {
    "camera": "NIKON Z 6",
    "lens": "NIKKOR Z 24-70mm f/4 S",
    "captured_at": "2023-06-17T18:30:05.250000",
    "iso": 640,
    "exposure_s": 1 / 250,
    "f_number": 4.0,
    "focal_length_mm": 35.0,
}


def png(width: int, height: int, bit_depth: int, colour_type: int, packed: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG put together by hand: header, `more` chunks (name, content), one IDAT holding `packed`, end."""
    header = struct.pack(">2I5B", width, height, bit_depth, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", packed), (b"IEND", b"")]
    body = (struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def dng(orientation: int) -> bytes:
    """A camera raw file of the quadrants: a Bayer mosaic (RGGB, 16 bits, linear light), as small a DNG as LibRaw reads.

    Tags as in the DNG specification 1.4, chapter 4. Not in the corpus: reading it takes the `raw` extra.
    """
    srgb = as_stored(quadrants(), orientation) / 255.0
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    height, width = linear.shape[:2]
    rows, columns = np.indices((height, width))
    mosaic = np.take_along_axis(linear, (rows % 2 + columns % 2)[..., None], axis=2)
    pixels = (mosaic * 65535).astype("<u2").tobytes()
    xyz_to_srgb = (32406, -15372, -4986, -9689, 18758, 415, 557, -2040, 10570)  # in 1/10,000
    byte, text, short, long, rational, signed_rational = (1, "B"), (2, "B"), (3, "H"), (4, "I"), (5, "I"), (10, "i")
    values_at = 2048  # behind the directory; the pixels are behind the values, at twice that
    directory: dict[int, tuple[tuple[int, str], tuple[int, ...]]] = {
        254: (long, (0,)),  # NewSubfileType: the picture itself
        256: (long, (width,)),
        257: (long, (height,)),
        258: (short, (16,)),  # BitsPerSample
        259: (short, (1,)),  # Compression: none
        262: (short, (32803,)),  # PhotometricInterpretation: colour filter array
        271: (text, tuple(b"Acme\0")),
        272: (text, tuple(b"Acme One\0")),
        273: (long, (2 * values_at,)),  # StripOffsets
        274: (short, (orientation,)),
        277: (short, (1,)),  # SamplesPerPixel
        278: (long, (height,)),  # RowsPerStrip
        279: (long, (len(pixels),)),  # StripByteCounts
        284: (short, (1,)),  # PlanarConfiguration
        33421: (short, (2, 2)),  # CFARepeatPatternDim
        33422: (byte, (0, 1, 1, 2)),  # CFAPattern: red green, green blue
        50706: (byte, (1, 4, 0, 0)),  # DNGVersion
        50708: (text, tuple(b"Acme One\0")),  # UniqueCameraModel
        50714: (short, (0,)),  # BlackLevel
        50717: (long, (65535,)),  # WhiteLevel
        50721: (signed_rational, tuple(n for value in xyz_to_srgb for n in (value, 10_000))),  # ColorMatrix1
        50728: (rational, (1, 1, 1, 1, 1, 1)),  # AsShotNeutral
        50778: (short, (21,)),  # CalibrationIlluminant1: D65
    }
    entries, values = b"", b""
    for tag, ((kind, code), numbers) in sorted(directory.items()):
        content = struct.pack(f"<{len(numbers)}{code}", *numbers)
        count = len(numbers) // 2 if kind in (5, 10) else len(numbers)
        inline = content.ljust(4, b"\0") if len(content) <= 4 else struct.pack("<I", values_at + len(values))
        values += b"" if len(content) <= 4 else content + b"\0" * (len(content) % 2)
        entries += struct.pack("<HHI", tag, kind, count) + inline
    head = b"II*\0" + struct.pack("<IH", 8, len(directory)) + entries
    return head.ljust(values_at, b"\0") + values.ljust(values_at, b"\0") + pixels


def hazards(scale: int = 1) -> dict[str, bytes]:
    """Small files that may cost a decoder far more than their size; `scale` times as much of it. Not in the corpus.

    What becomes of them is for the decoder to say, but it must say it soon, and without much memory.
    """
    bits = Image.new("1", (8000, 2000 * scale))
    small = encode(quadrants(64, 48), "JPEG", quality=92)
    profile = swapped_primaries_profile()
    tags = struct.pack(">I", 0xFFFFFFFF)
    loop = encode(quadrants(64, 48), "TIFF")
    directory = struct.unpack_from("<I", loop, 4)[0]
    behind = directory + 2 + 12 * struct.unpack_from("<H", loop, directory)[0]
    looped = loop[:behind] + loop[4:8] + loop[behind + 4 :]
    # An IFD whose one entry, the pointer to the EXIF IFD, points at itself; as does its next IFD.
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 0x8769, 4, 1, 8, 8)
    entries = b"".join(struct.pack("<HHII", tag, 2, 0x7FFFFFFF, 8) for tag in range(5000))
    full = b"II*\0\x08\0\0\0" + struct.pack("<H", 5000) + entries + bytes(4)
    zeros = zlib.compress(bytes(64 * 1024**2 * scale), 9)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in quadrants(64, 48)))
    frame = b"\x2c" + struct.pack("<4HB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    gif = encode(Image.fromarray(quadrants(64, 48)), "GIF")
    return {
        "bomb.png": encode(bits, "PNG", compress_level=9),
        "bomb.tif": encode(bits, "TIFF", compression="tiff_adobe_deflate"),
        "bomb.gif": encode(bits.convert("P"), "GIF"),
        "bomb_in_text.png": png(64, 48, 8, 2, rows, (b"zTXt", b"note\0\0" + zeros)),
        "bomb_in_icc.png": png(64, 48, 8, 2, rows, (b"iCCP", b"icc\0\0" + zeros)),
        "scans.jpg": _many_scans(4000, 4000, 3000 * scale),
        "frames.gif": gif[:-1] + frame * (20_000 * scale) + b";",
        "frames.png": png(64, 48, 8, 2, rows, *[(b"tEXt", b"n\0v")] * (20_000 * scale)),
        "ifd_loop.tif": looped,
        "exif_loop.jpg": _with_segment(small, b"\xff\xe1", exif),
        "exif_counts.png": png(64, 48, 8, 2, rows, (b"eXIf", full)),
        "icc_tags.jpg": _with_segment(small, b"\xff\xe2", b"ICC_PROFILE\0\1\1" + profile[:128] + tags + profile[132:]),
        "icc_cut.jpg": _with_segment(small, b"\xff\xe2", b"ICC_PROFILE\0\1\1" + profile[: len(profile) // 2]),
    }


def _many_scans(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again: each is a walk over all coefficients."""
    data = bytearray(encode(quadrants(16, 16), "JPEG", progressive=True))
    struct.pack_into(">2H", data, data.index(b"\xff\xc2") + 5, height, width)
    last = bytes(data[data.rindex(b"\xff\xda") : -2])
    return bytes(data[:-2]) + last * scans + b"\xff\xd9"


def _with_segment(data: bytes, marker: bytes, content: bytes) -> bytes:
    return data[:2] + marker + struct.pack(">H", len(content) + 2) + content + data[2:]


class _Corpus:
    """The files written so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cases: list[Case] = []

    def scored(
        self,
        name: str,
        data: bytes,
        note: str,
        format_name: str,
        colours: tuple[RGB, ...] | None = QUADRANTS,
        *,
        size: tuple[int, int] = (WIDTH, HEIGHT),
        tolerance: int = 6,
    ) -> None:
        """Add a file that must be scored and show `colours` in its quadrants. JPEG moves a flat colour by 2 or 3."""
        probes = tuple(Probe(x, y, rgb, tolerance) for (x, y), rgb in zip(_CENTRES, colours or (), strict=False))
        self.cases.append(Case(name, self._write(name, data), "scored", note, format_name, *size, probes))

    def refused(self, name: str, data: bytes, note: str, kind: ErrorKind) -> None:
        """Add a file whose row must carry this error."""
        self.cases.append(Case(name, self._write(name, data), kind, note))

    def _write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path


def _oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def _orientations(corpus: _Corpus) -> None:
    for value in range(1, 9):
        data = encode(as_stored(quadrants(), value), "JPEG", quality=92, exif=_oriented(value))
        corpus.scored(f"orientation_{value}.jpg", data, f"EXIF orientation {value}", "JPEG")
    turned = as_stored(quadrants(), 6)
    for name, format_name, settings in (
        ("orientation_6.png", "PNG", {}),
        ("orientation_6.webp", "WEBP", {"quality": 92}),
        ("orientation_6.avif", "AVIF", {"quality": 90}),
        # Pillow turns a TIFF by itself, and no other format.
        ("orientation_6_raw.tif", "TIFF", {}),
        ("orientation_6_lzw.tif", "TIFF", {"compression": "tiff_lzw"}),
    ):
        data = encode(turned, format_name, exif=_oriented(6), **settings)
        corpus.scored(name, data, f"EXIF orientation 6 in {format_name}", format_name)
    # A HEIC says twice how it is turned, in `irot` and in EXIF: turning it twice is the usual mistake.
    # As bytes: given an `Image.Exif`, pillow-heif writes no irot.
    data = encode(turned, "HEIF", quality=92, exif=_oriented(6).tobytes())
    corpus.scored("orientation_6.heic", data, "turned by irot, and EXIF", "HEIF")
    # Unlike the others this one is decoded at a reduced DCT scale.
    data = encode(as_stored(quadrants(3000, 2000), 8), "JPEG", quality=90, exif=_oriented(8))
    corpus.scored("orientation_8_large.jpg", data, "6 megapixels, on its side", "JPEG", size=(3000, 2000))


def _colours(corpus: _Corpus) -> None:
    upright = quadrants()
    profile = swapped_primaries_profile()
    greys = _greys()
    inks = Image.fromarray(upright).convert("CMYK")  # c = 255 - r, m = 255 - g, y = 255 - b, k = 0
    cmyk = encode(inks, "JPEG", quality=95)
    corpus.scored("cmyk_adobe.jpg", cmyk, "CMYK, inks inverted as Adobe writes them", "JPEG")
    corpus.scored("cmyk_ycck.jpg", _ycck(inks), "CMYK stored as YCCK, as Photoshop writes it", "JPEG")
    corpus.scored(
        "cmyk_no_marker.jpg",
        _without_segment(cmyk, b"\xff\xee"),
        "CMYK with nothing that says which way the inks run",
        "JPEG",
        None,
    )
    corpus.scored("cmyk.tif", encode(inks, "TIFF", compression="tiff_lzw"), "CMYK, inks not inverted", "TIFF")
    corpus.scored("grey.jpg", encode(_grey_image(), "JPEG", quality=92), "one channel", "JPEG", greys)
    exchanged = encode(upright[..., ::-1].copy(), "JPEG", quality=92, icc_profile=profile)
    corpus.scored("icc_swapped.jpg", exchanged, "an ICC profile with red and blue exchanged", "JPEG", tolerance=8)
    data = encode(upright, "JPEG", quality=92, icc_profile=b"no profile at all" * 20)
    corpus.scored("icc_broken.jpg", data, "an ICC profile of nonsense: taken for sRGB", "JPEG")
    data = encode(_grey_image(), "JPEG", quality=92, icc_profile=profile)
    corpus.scored("icc_of_rgb_in_grey.jpg", data, "an ICC profile for another colour space", "JPEG", greys)
    data = encode(upright, "JPEG", quality=92, progressive=True)
    corpus.scored("progressive.jpg", data, "progressive", "JPEG")
    data = encode(upright, "JPEG", quality=92, exif=camera_exif())
    corpus.scored("camera.jpg", data, "every EXIF fact", "JPEG")


def _depths_and_alpha(corpus: _Corpus) -> None:
    upright = quadrants()
    deep = upright.astype(np.uint16) * 257  # 255 -> 65535
    corpus.scored("grey16.png", encode(deep[..., 1].copy(), "PNG"), "16-bit grey", "PNG", _green_as_grey(), tolerance=1)
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in deep)
    data = png(WIDTH, HEIGHT, 16, 2, zlib.compress(rows))
    corpus.scored("rgb16.png", data, "16-bit RGB", "PNG", tolerance=1)
    tiff16 = cv2.imencode(".tiff", deep[..., ::-1])[1].tobytes()
    corpus.scored("rgb16.tif", tiff16, "16-bit RGB", "TIFF", tolerance=1)

    three = QUADRANTS[:3]
    palette = Image.fromarray(_quadrant_numbers(), "P")
    palette.putpalette([channel for colour in QUADRANTS for channel in colour])
    data = encode(palette, "PNG", transparency=3)
    corpus.scored("palette.png", data, "palette, one colour of it transparent", "PNG", (*three, WHITE), tolerance=0)
    alpha = np.choose(_quadrant_numbers(), (255, 128, 255, 0)).astype(np.uint8)
    rgba = np.dstack([upright, alpha])
    half: RGB = tuple(round((channel * 128 + 255 * 127) / 255) for channel in QUADRANTS[1])  # type: ignore[assignment]
    over_white = (QUADRANTS[0], half, QUADRANTS[2], WHITE)
    corpus.scored("rgba.png", encode(rgba, "PNG"), "alpha", "PNG", over_white, tolerance=1)
    corpus.scored("rgba.webp", encode(rgba, "WEBP", lossless=True), "alpha", "WEBP", over_white, tolerance=1)
    grey_alpha = np.dstack([upright[..., 1], alpha])
    data = encode(Image.fromarray(grey_alpha, "LA"), "PNG")
    shades = _green_as_grey()
    over_white = (shades[0], (half[1],) * 3, shades[2], WHITE)
    corpus.scored("grey_alpha.png", data, "grey with alpha", "PNG", over_white, tolerance=1)
    bits = Image.fromarray(np.isin(_quadrant_numbers(), (0, 3)))
    black: RGB = (0, 0, 0)
    data = encode(bits, "PNG")
    corpus.scored("one_bit.png", data, "one bit a pixel", "PNG", (WHITE, black, black, WHITE), tolerance=0)


def _containers(corpus: _Corpus) -> None:
    upright = Image.fromarray(quadrants())
    second = Image.new("RGB", upright.size, "black")
    for name, format_name, tolerance in (
        ("animated.gif", "GIF", 6),
        ("animated.webp", "WEBP", 6),
        ("animated.png", "PNG", 0),
    ):
        data = encode(upright, format_name, save_all=True, append_images=[second], duration=100)
        corpus.scored(name, data, "animated: the first frame counts", format_name, tolerance=tolerance)
    transparent = Image.fromarray(_quadrant_numbers(), "P")
    transparent.putpalette([channel for colour in QUADRANTS for channel in colour])
    data = encode(transparent, "GIF", transparency=3)
    corpus.scored("transparent.gif", data, "transparency", "GIF", (*QUADRANTS[:3], WHITE), tolerance=0)
    corpus.scored("photo.heic", encode(upright, "HEIF", quality=92), "HEIC", "HEIF")
    corpus.scored("photo.avif", encode(upright, "AVIF", quality=90), "AVIF", "AVIF")
    corpus.scored("photo.bmp", encode(upright, "BMP"), "BMP", "BMP", tolerance=0)
    pages = encode(upright, "TIFF", save_all=True, append_images=[second], compression="tiff_deflate")
    corpus.scored("pages.tif", pages, "two pages: the first counts", "TIFF", tolerance=0)
    stereo = encode(upright, "MPO", quality=92, save_all=True, append_images=[second])
    corpus.scored("stereo.jpg", stereo, "two JPEGs in one (MPO), as phones write", "JPEG")


def _sizes_and_names(corpus: _Corpus) -> None:
    red = QUADRANTS[0]
    dot = encode(np.full((1, 1, 3), red, np.uint8), "PNG")
    corpus.scored("one_pixel.png", dot, "one pixel", "PNG", (red,) * 4, size=(1, 1), tolerance=0)
    thread = encode(np.full((4000, 1, 3), red, np.uint8), "PNG")
    corpus.scored("thread.png", thread, "1 x 4000 pixels", "PNG", (red,) * 4, size=(1, 4000), tolerance=0)
    data = encode(quadrants(), "JPEG", quality=92)
    corpus.scored("UPPER.JPG", data, "extension in capitals", "JPEG")
    corpus.scored("really_a_png.jpg", encode(quadrants(), "PNG"), "a PNG by content", "PNG", tolerance=0)
    corpus.scored("spaces and (brackets) [1].jpg", data, "a name that a glob would misread", "JPEG")
    corpus.scored("Été 写真/100% #1 + ü.jpg", data, "a name that a URL would misread", "JPEG")
    corpus.scored("trailing.jpg", data + b"\x00garbage" * 500, "4 kB of garbage after the end", "JPEG")


def _damage(corpus: _Corpus) -> None:
    # Noise over the quadrants, so that half of the file is half of the picture.
    noise = np.random.default_rng(7).integers(-20, 20, (HEIGHT, WIDTH, 3))
    busy = (quadrants() + noise).clip(0, 255).astype(np.uint8)
    for name, data in (
        ("truncated.jpg", encode(busy, "JPEG", quality=92)),
        ("truncated_progressive.jpg", encode(busy, "JPEG", quality=92, progressive=True)),
        ("truncated.png", encode(busy, "PNG")),
        ("truncated_raw.tif", encode(busy, "TIFF")),
        ("truncated.bmp", encode(busy, "BMP")),
        ("truncated.gif", encode(busy, "GIF")),
    ):
        corpus.refused(name, data[: len(data) // 2], "half of the file", ErrorKind.TRUNCATED)
    # Their decoders only say that the data are invalid.
    for name, data in (
        ("truncated.webp", encode(busy, "WEBP", quality=92)),
        ("truncated.heic", encode(busy, "HEIF", quality=92)),
        ("truncated.avif", encode(busy, "AVIF", quality=90)),
    ):
        corpus.refused(name, data[: len(data) // 2], "half of the file", ErrorKind.CORRUPT)
    corpus.refused("empty.jpg", b"", "no byte at all", ErrorKind.EMPTY)
    corpus.refused("text.jpg", b"this is a text, not a photo\n" * 40, "a text", ErrorKind.UNKNOWN_FORMAT)
    corpus.refused("start_only.jpg", b"\xff\xd8\xff\xe0", "four bytes of a JPEG", ErrorKind.CORRUPT)
    bomb = png(30_000, 30_000, 8, 2, zlib.compress(b"\x00" * 1000))
    corpus.refused("bomb.png", bomb, "200 bytes that claim 900 megapixels", ErrorKind.TOO_MANY_PIXELS)
    flipped = bytearray(encode(busy, "PNG"))
    flipped[flipped.index(b"IDAT") + 4] ^= 0xFF
    corpus.refused("flipped_byte.png", bytes(flipped), "the first byte of the pixels changed", ErrorKind.CORRUPT)
    corpus.scored("exif_broken.jpg", _with_broken_exif(), "an EXIF block of nonsense in a good JPEG", "JPEG")


def _quadrant_numbers() -> np.ndarray:
    numbers = quadrants(colours=((0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3)))
    return np.ascontiguousarray(numbers[..., 0])


def _grey_image() -> Image.Image:
    return Image.fromarray(quadrants()).convert("L")


def _greys() -> tuple[RGB, ...]:
    """Rec. 601 luma of the quadrants, which is what `convert("L")` stores."""
    lumas = [round(0.299 * r + 0.587 * g + 0.114 * b) for r, g, b in QUADRANTS]
    return tuple((luma, luma, luma) for luma in lumas)


def _green_as_grey() -> tuple[RGB, ...]:
    return tuple((green, green, green) for _, green, _ in QUADRANTS)


def _ycck(inks: Image.Image) -> bytes:
    """A YCCK JPEG, which no encoder at hand writes: a CMYK JPEG of the YCCK values, with Adobe's marker saying 2.

    libjpeg reads YCCK as C = 255 - R(Y, Cb, Cr), and Adobe's inks are stored inverted, so R, G, B are the inks
    themselves. Pillow inverts all it stores as CMYK, hence `255 -`.
    """
    cyan, magenta, yellow, black = inks.split()
    luma, blue, red = Image.merge("RGB", (cyan, magenta, yellow)).convert("YCbCr").split()
    inverted = [Image.fromarray(255 - np.asarray(channel)) for channel in (luma, blue, red)]
    data = bytearray(encode(Image.merge("CMYK", (*inverted, black)), "JPEG", quality=95))
    marker = data.index(b"\xff\xee")
    assert data[marker + 4 : marker + 9] == b"Adobe"
    data[marker + 15] = 2
    return bytes(data)


def _without_segment(data: bytes, marker: bytes) -> bytes:
    start = data.index(marker)
    return data[:start] + data[start + 2 + struct.unpack_from(">H", data, start + 2)[0] :]


def _with_broken_exif() -> bytes:
    data = encode(quadrants(), "JPEG", quality=92, exif=camera_exif())
    start = data.index(b"Exif\x00\x00") + 6
    length = struct.unpack_from(">H", data, start - 8)[0] - 8
    # A TIFF header that is right, then an IFD of 65,535 entries that point everywhere.
    nonsense = b"II*\x00\x08\x00\x00\x00" + b"\xff" * (length - 8)
    return data[:start] + nonsense + data[start + length :]


pillow_heif.register_heif_opener()

if __name__ == "__main__":
    for case in make_corpus(Path(sys.argv[1])):
        print(f"{case.expect:16} {case.name:32} {case.note}")  # noqa: T201
