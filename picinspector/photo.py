"""One photo: from bytes to upright sRGB pixels, facts and small crops. The only file that knows Pillow's formats.

A photo is decoded once, and reduced at once by a whole factor that leaves twice the side needed: that of the working
image, or the largest that a crop is resized to. JPEGs leave the decoder so (DCT scales 1/2, 1/4, 1/8), other formats
are box-reduced: one rule, so that neither format nor resolution moves a measurement much. Measured for 224 px of
12-megapixel JPEGs, on two cores with Pillow: 86 ms and a mean error of 0.2/255, against 289 ms in full, and 66 ms and
0.6/255 for a rule of once the side needed.

A sound JPEG is decoded straight into an array (simplejpeg: the same libjpeg-turbo, the same pixels, 6 ms less for 12
megapixels); whatever it objects to is Pillow's to judge. Which of the odd scales between, as 3/8, would also do makes
no odds: their transforms are not vectorised.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import cv2
import imagehash
import numpy as np
import pillow_heif
import simplejpeg
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from picinspector.errors import ErrorKind, PhotoError
from picinspector.resize import Resample, resize

#: Measurements are taken at this shorter side so that cameras of any resolution compare.
WORKING_PX = 512

#: What Pillow may try. A short list keeps rarely exercised decoders away from untrusted bytes.
_FORMATS = ("JPEG", "PNG", "WEBP", "HEIF", "AVIF", "TIFF", "BMP", "DIB", "GIF")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"RIFF")

RAW_SUFFIXES = frozenset(
    {".3fr", ".arw", ".cr2", ".cr3", ".dng", ".erf", ".iiq", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw"}
)
PHOTO_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".apng", ".webp", ".heic", ".heif", ".avif", ".tif", ".tiff", ".bmp", ".gif"}
)

#: Of one JPEG. Progressive ones have about ten; each more is a walk over all coefficients for a handful of bytes, and a
#: small file could ask for hours of them. (Measured: 27 ms a scan of 289 megapixels that holds nothing.)
_MAX_SCANS = 100
#: Start of frame of JPEGs that are lossless, hierarchical or arithmetic-coded (ITU-T T.81, table B.1).
_RARE_FRAMES = [0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF]
#: Not a stuffed zero, not a restart, not a fill byte: where entropy-coded data end.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")

# Our own limit is checked on every header (`Limits.max_pixels`); Pillow's would refuse panoramas we mean to read.
Image.MAX_IMAGE_PIXELS = None
# Pillow loads its plugins on the first unrestricted open, and ours are all restricted.
Image.init()
# libheif turns and mirrors the picture itself and reports orientation 1.
pillow_heif.register_heif_opener()


@dataclass(frozen=True, slots=True)
class CropSpec:
    """The picture an encoder wants: the photo resized, then a square cut from its centre.

    Attributes:
        resize_px: side after resizing. `shortest`: the shorter side, aspect kept. `squash`: both sides.
        crop_px: side of the centre square, `<= resize_px`.
        resample: `bicubic`, `bilinear` or `lanczos`, antialiased.
        mode: `shortest`, `squash`, or `foveated`: as `shortest` to a square of `resize_px`, which is given as four
            quadrants of `crop_px`: the square reduced, and details of it at its own scale, from the centre, the upper
            left and the lower right. A small network sees the subject in one, noise and blur in the others.
        odd_margin: where the centre lies if the margins add up to an odd number: `round` (half to even) as torchvision
            and so open_clip have it, `floor` as transformers.
    """

    resize_px: int
    crop_px: int
    resample: Resample = "bicubic"
    mode: Literal["shortest", "squash", "foveated"] = "shortest"
    odd_margin: Literal["round", "floor"] = "round"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a photo may cost before it is refused."""

    max_bytes: int = 512 * 1024**2
    max_pixels: int = 300_000_000


@dataclass(frozen=True, slots=True)
class Photo:
    """A decoded photo.

    Attributes:
        facts: a value or None for every name in `schema.FACTS`.
        working: uint8 sRGB (H, W, 3), shorter side `WORKING_PX` or less (never upscaled).
        crops: one uint8 sRGB (S, S, 3) for each `CropSpec` asked for.
    """

    facts: dict[str, Any]
    working: np.ndarray
    crops: list[np.ndarray]


def decode(data: bytes, crops: Sequence[CropSpec], limits: Limits = Limits(), suffix: str = "") -> Photo:
    """Decode a photo upright, in sRGB, once.

    Args:
        data: the whole file.
        crops: what to cut for the encoders.
        limits: refused beyond these.
        suffix: the file name's extension; tells camera raw from TIFF, which look alike. Otherwise content decides.

    Raises:
        PhotoError: whatever is wrong with the bytes; never anything else.
    """
    with _photo_errors(data):
        pixels, facts = _read(data, limits, max([WORKING_PX, *(spec.resize_px for spec in crops)]), suffix)
        working = _working(pixels)
        facts |= {"content_hash": hashlib.sha256(data).hexdigest()[:32], "phash": _phash(working)}
        return Photo(facts, working, _cut(pixels, crops))


def thumbnail(data: bytes, side_px: int, limits: Limits = Limits(), suffix: str = "") -> np.ndarray:
    """A small picture to look at: uint8 sRGB (H, W, 3), upright, its longer side `side_px` or less.

    Decoded as in `decode`, a JPEG at the smallest DCT scale that suffices; reduced by area averages, without torch.

    Raises:
        PhotoError: whatever is wrong with the bytes; never anything else.
    """
    with _photo_errors(data):
        pixels, _ = _read(data, limits, max(1, side_px // 2), suffix)
        height, width = pixels.shape[:2]
        scale = side_px / max(height, width)
        if scale >= 1.0:
            return np.ascontiguousarray(pixels)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


@contextlib.contextmanager
def _photo_errors(data: bytes) -> Iterator[None]:
    """Whatever is raised inside becomes this photo's error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about metadata; it belongs to the photo, not in our log
            yield
    except PhotoError:
        raise
    except Exception as error:
        raise _as_photo_error(error, data) from error


def _read(data: bytes, limits: Limits, need_px: int, suffix: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Pixels, upright, of at least twice the side needed where the photo has them; and the facts."""
    if not data:
        raise PhotoError(ErrorKind.EMPTY, "the file is empty")
    if len(data) > limits.max_bytes:
        raise PhotoError(ErrorKind.TOO_MANY_BYTES, f"{len(data)} bytes, the limit is {limits.max_bytes}")
    return (_open_raw if suffix.lower() in RAW_SUFFIXES else _open)(data, limits, need_px)


def _as_photo_error(error: Exception, data: bytes) -> PhotoError:
    """Pillow and its codecs raise nearly anything on hostile bytes; here it becomes this photo's error."""
    text = str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        known = data.startswith(_MAGIC) or data[4:8] == b"ftyp"
        kind = ErrorKind.CORRUPT if known else ErrorKind.UNKNOWN_FORMAT
        return PhotoError(kind, "damaged header" if known else "not a photo format this program reads")
    if isinstance(error, MemoryError):
        return PhotoError(ErrorKind.INTERNAL, "out of memory while decoding")
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return PhotoError(ErrorKind.TRUNCATED, f"the file ends early: {text}")
    return PhotoError(ErrorKind.CORRUPT, f"cannot be decoded: {text}")


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise PhotoError(ErrorKind.CORRUPT, f"the header says {width}x{height} pixels")
    if width * height > limits.max_pixels:
        raise PhotoError(
            ErrorKind.TOO_MANY_PIXELS,
            f"{width}x{height} is {width * height / 1e6:.0f} megapixels, the limit is {limits.max_pixels / 1e6:.0f}",
        )


def _count_markers(data: bytes) -> np.ndarray:
    """How often each byte follows an 0xFF, (256,): markers, for in entropy-coded data a zero does, or a restart.

    Metadata may hold such pairs by chance. Four times as fast as `bytes.count` of one pair.
    """
    values, counts, step = np.frombuffer(data, np.uint8), np.zeros(256, np.int64), 1024**2
    for start in range(0, len(values) - 1, step):  # what is made of a file of nothing but 0xFF stays small
        part = values[start : start + step + 1]
        counts += np.bincount(part[1:][part[:-1] == 0xFF], minlength=256)
    return counts


def _check_scans(data: bytes, markers: np.ndarray) -> None:
    if markers[0xDA] <= _MAX_SCANS:  # nearly always; a film behind a phone's photo has some by chance
        return
    place, scans = 2, 0
    while found := _MARKER.search(data, place):
        marker, place = data[found.start() + 1], found.end()
        if marker == 0xD9:  # end of the picture
            return
        scans += marker == 0xDA
        if scans > _MAX_SCANS:
            raise PhotoError(ErrorKind.CORRUPT, f"a JPEG of more than {_MAX_SCANS} scans, which no camera writes")
        place += int.from_bytes(data[place : place + 2], "big")


def _open(data: bytes, limits: Limits, need_px: int) -> tuple[np.ndarray, dict[str, Any]]:
    image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
    width, height = image.size
    _check_pixels(width, height, limits)
    pixels = None
    if image.format in ("JPEG", "MPO"):
        markers = _count_markers(data)
        _check_scans(data, markers)
        if image.mode == "RGB" and not markers[_RARE_FRAMES].any():
            pixels = _decode_jpeg(data, image, need_px)
        image.draft(None, (2 * need_px, 2 * need_px))  # keeps at least these, as `_shrink` does
    if pixels is None:
        # Before the EXIF: Pillow looks for a PNG's behind the pixels, and where loading failed there, loading again
        # here would succeed with a black picture. Loading also turns a TIFF, and takes the orientation out of its EXIF.
        image.load()
    exif = _exif(image)
    if pixels is None:
        pixels = _to_pixels(image, need_px)
    orientation = exif.get(ExifTags.Base.Orientation) if image.format != "HEIF" else None
    if orientation in _SIDEWAYS:
        width, height = height, width
    return _upright(pixels, orientation), _facts(exif, image.format or "", width, height)


def _decode_jpeg(data: bytes, header: Image.Image, need_px: int) -> np.ndarray | None:
    """A sound JPEG, baseline or progressive, of three channels, to sRGB pixels as it lies; None: Pillow is to judge.

    Of other kinds never: a lossless one is decoded in full whatever scale was asked for, past the end of the array.
    """
    (width, height), factor = header.size, min(header.size) // (2 * need_px)
    scale = next(scale for scale in (8, 4, 2, 1) if scale <= max(1, factor))
    least = {"min_width": -(-width // scale), "min_height": -(-height // scale)} if scale > 1 else {}
    if min(-(-width // scale), -(-height // scale)) // (2 * need_px) >= 2:  # `_shrink` has work left
        return None
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != (height, width):
            return None  # the size that was checked is not the one that would be allocated
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, **least)
    except ValueError:  # strict: also what libjpeg only warns of, as an early end
        return None
    icc = header.info.get("icc_profile")
    transform = _icc_transform(icc, "RGB") if icc else None
    return pixels if transform is None else _apply(transform, Image.fromarray(pixels))


def _open_raw(data: bytes, limits: Limits, need_px: int) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        import rawpy
    except ImportError as error:
        message = "camera raw needs an extra package: pip install 'picinspector[raw]'"
        raise PhotoError(ErrorKind.NO_DECODER, message) from error
    try:
        with rawpy.imread(io.BytesIO(data)) as raw:
            height, width = raw.sizes.height, raw.sizes.width
            _check_pixels(width, height, limits)
            # Half size skips demosaicing; no camera has so few pixels that this goes below a crop.
            pixels = raw.postprocess(use_camera_wb=True, half_size=True, output_bps=8)
            if raw.sizes.flip in (5, 6):
                width, height = height, width
    except rawpy.LibRawError as error:
        raise PhotoError(ErrorKind.CORRUPT, f"camera raw cannot be decoded: {error}") from error
    exif = Image.Exif()
    try:
        exif.load(data)  # TIFF tags; opening it as a TIFF would also ask for pixels that Pillow understands
    except Exception:  # CR3 and RAF are not TIFF: the pixels count, the facts are a gift
        exif = Image.Exif()
    return _to_pixels(Image.fromarray(pixels), need_px), _facts(exif, "RAW", width, height)


# --- pixels -----------------------------------------------------------------------------------------------------------

#: By the orientation that EXIF tells: what makes it upright. 5 and 7 are mirrored as well.
_TURNS: dict[Any, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: cv2.flip(pixels, 1),
    3: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_180),
    4: lambda pixels: cv2.flip(pixels, 0),
    5: cv2.transpose,
    6: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE),
    7: lambda pixels: cv2.flip(cv2.transpose(pixels), -1),
    8: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
_SIDEWAYS = frozenset({5, 6, 7, 8})


def _upright(pixels: np.ndarray, orientation: Any) -> np.ndarray:
    return _TURNS[orientation](pixels) if orientation in _TURNS else pixels


def _to_pixels(image: Image.Image, need_px: int) -> np.ndarray:
    return np.array(_shrink(_to_srgb(image), need_px))


def _to_srgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to 8-bit sRGB: high bit depths scaled, alpha over white, the ICC profile applied."""
    icc = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_uint8(np.asarray(image)))
    elif image.mode == "1":
        image = image.convert("L")
    elif image.has_transparency_data or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        rgba = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(rgba, mask=rgba.getchannel("A"))
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")  # palette, YCbCr, LAB, HSV
    transform = _icc_transform(icc, image.mode) if icc else None
    if transform is not None:
        return Image.fromarray(_apply(transform, image))
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """Greyscale of a higher bit depth to 0-255, clipped. Integers are taken as 16-bit unless they go beyond.

    Floats are taken as 0-1, where a highlight may well exceed 1; as 0-255 where more than half of the pixels do.
    """
    if np.issubdtype(values.dtype, np.floating):
        values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
        top = 1.0 if values.size == 0 or np.median(values) <= 1.0 else 255.0
    else:
        top = 65535.0 if values.max(initial=0) <= 65535 else float(2**31 - 1)
    return np.clip(values * (255.0 / top) + 0.5, 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=32)
def _icc_transform(icc: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform to sRGB, or None where there is nothing to do or the profile is unusable (then sRGB is assumed)."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(profile).lower():
            return None
        return ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _apply(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> np.ndarray:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # only None in place
    return np.array(converted)


def _shrink(image: Image.Image, need_px: int) -> Image.Image:
    """Box-reduce by a whole factor that leaves twice the side needed: what DCT scaling does, for other formats."""
    factor = min(image.size) // (2 * need_px)
    return image.reduce(factor) if factor >= 2 else image


def _working(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    return resize(pixels, *_shortest_size((width, height), min(WORKING_PX, width, height)))


def _shortest_size(size: tuple[int, int], side_px: int) -> tuple[int, int]:
    # Truncation of the longer side as torchvision's Resize does it, so that crops match the models' own transforms.
    width, height = size
    if width <= height:
        return side_px, max(1, int(side_px * height / width))
    return max(1, int(side_px * width / height)), side_px


def _cut(pixels: np.ndarray, specs: Sequence[CropSpec]) -> list[np.ndarray]:
    """A crop for each spec; those that want the photo at the same size share the resizing."""
    height, width = pixels.shape[:2]
    resized: dict[tuple[int, int, Resample], np.ndarray] = {}

    def cut(spec: CropSpec) -> np.ndarray:
        square = (spec.resize_px, spec.resize_px)
        size = square if spec.mode == "squash" else _shortest_size((width, height), spec.resize_px)
        side = spec.resize_px if spec.mode == "foveated" else spec.crop_px
        centre = round if spec.odd_margin == "round" else math.floor
        left, top = centre((size[0] - side) / 2.0), centre((size[1] - side) / 2.0)
        if max(size) > 4 * spec.resize_px:
            crop = _crop_strip(pixels, size, (left, top), side, spec.resample)
        else:
            key = (*size, spec.resample)
            if key not in resized:
                resized[key] = resize(pixels, *key)
            crop = resized[key][top : top + side, left : left + side]
        return np.ascontiguousarray(foveate(crop, spec.crop_px) if spec.mode == "foveated" else crop)

    return [cut(spec) for spec in specs]


def _crop_strip(
    pixels: np.ndarray, size: tuple[int, int], corner: tuple[int, int], side_px: int, resample: Resample
) -> np.ndarray:
    """The square of this side at this corner of the photo resized to this size, without the rest of it.

    A 1 x 4000 strip must not become 224 x 896,000. The same picture, but for single pixels (3/255 seen), because Pillow
    keeps the box in single precision.
    """
    (height, width), (left, top) = pixels.shape[:2], corner
    x, y = width / size[0], height / size[1]
    box = (left * x, top * y, (left + side_px) * x, (top + side_px) * y)
    return np.array(Image.fromarray(pixels).resize((side_px, side_px), Image.Resampling[resample.upper()], box))


def foveate(square: np.ndarray, side_px: int) -> np.ndarray:
    """A square, reduced, beside three details of it (`CropSpec.mode`): uint8 (S, S, 3) to (side_px, side_px, 3)."""
    part, whole = side_px // 2, len(square)
    quadrants = [cv2.resize(square, (part, part), interpolation=cv2.INTER_AREA)]
    for middle in (whole // 2, whole // 4, whole - whole // 4):
        start = middle - part // 2
        quadrants.append(square[start : start + part, start : start + part])
    return np.concatenate([np.concatenate(quadrants[:2], axis=1), np.concatenate(quadrants[2:], axis=1)])


def _phash(working: np.ndarray) -> int:
    """64-bit DCT perceptual hash (imagehash's `phash`; Zauner 2010, section 3.2.1)."""
    bits = imagehash.phash(Image.fromarray(working)).hash.flatten()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


# --- facts ------------------------------------------------------------------------------------------------------------


def _exif(image: Image.Image) -> Image.Exif:
    try:
        return image.getexif()
    except Exception:  # a broken EXIF block is no reason to lose the picture
        return Image.Exif()


def _facts(exif: Image.Exif, format_name: str, width: int, height: int) -> dict[str, Any]:
    try:
        shot: dict[int, Any] = exif.get_ifd(ExifTags.IFD.Exif)
    except Exception:  # as above
        shot = {}
    tag = ExifTags.Base
    return {
        "width": width,
        "height": height,
        "format": "JPEG" if format_name == "MPO" else format_name,
        "captured_at": _value(_time, shot.get(tag.DateTimeOriginal), shot.get(tag.SubsecTimeOriginal)),
        "camera": _value(_camera, exif.get(tag.Make), exif.get(tag.Model)),
        "lens": _value(_text, shot.get(tag.LensModel)),
        "iso": _value(_iso, shot.get(tag.ISOSpeedRatings)),
        "exposure_s": _value(_positive, shot.get(tag.ExposureTime)),
        "f_number": _value(_positive, shot.get(tag.FNumber)),
        "focal_length_mm": _value(_positive, shot.get(tag.FocalLength)),
        "content_hash": None,
        "phash": None,
    }


def _value(parse: Callable[..., Any], *raw: Any) -> Any:
    """What a camera wrote, or None: EXIF holds anything, and no fact is worth a photo."""
    try:
        return parse(*raw)
    except (ValueError, TypeError, ArithmeticError, IndexError, UnicodeError):
        return None


def _text(raw: Any) -> str | None:
    text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
    if not isinstance(text, str):
        return None
    return " ".join(re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", " ", text).split())[:120] or None


def _camera(make: Any, model: Any) -> str | None:
    maker, name = _text(make), _text(model)
    if maker and name and name.lower().startswith(maker.split()[0].lower()):
        return name
    return " ".join(part for part in (maker, name) if part) or None


def _time(raw: Any, subsec: Any) -> datetime | None:
    text = _text(raw)
    if text is None:
        return None
    fraction = re.sub(r"\D", "", _text(subsec) or "")[:6].ljust(6, "0")
    return datetime.strptime(text[:19], "%Y:%m:%d %H:%M:%S").replace(microsecond=int(fraction))


def _iso(raw: Any) -> int | None:
    value = int(raw[0] if isinstance(raw, tuple | list) else raw)
    return value if 0 < value < 2**31 else None


def _positive(raw: Any) -> float | None:
    value = float(raw)
    return value if math.isfinite(value) and 0 < value < 1e9 else None
