"""What a photographer can do about a photo: at most three suggestions, those first that would raise the score most.

An attribute (0-100, high is good) says whether something is wrong; the pixel measurements, the scene and the EXIF facts
say what, and what to do. An attribute of 60 or more ("good" in `wording.GRADES`) needs no suggestion. Where a fact is
missing or NaN the suggestion is made without it, in general words.

Figures called "measured" below come from three places: SPAQ's label and EXIF tables (Fang et al. 2020; 11,125 phone
photos, github.com/mattkyuan/image-quality-fusion, datasets/spaq/), the 10,000 train photos of BIQ2021 as
`picinspector.measure` sees them ("good photos" are the quarter with the highest MOS), and 4,959 copies of those with
one fault each of known strength (`picinspector.degrade`). No test photo was looked at.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from picinspector.wording import GRADES, MIDDLE_LUMA, grade

#: Lower end of the grade "good": what a suggestion aims at.
TARGET = 60.0
MAX_SUGGESTIONS = 3
#: Points of quality_score; less would not show where it is printed with one decimal.
MIN_GAIN = 0.05

#: Points of MOS (0-100) for a point of an attribute, the others unchanged: least squares over SPAQ's label table,
#: n = 11,125, R2 = .954, RMSE 4.5; standard errors .004 to .009. It is association among rated photos, not cause.
#:
#:     table = pandas.read_csv("mos_scores.csv")
#:     x = table[["Brightness", "Colorfulness", "Contrast", "Noisiness", "Sharpness"]]
#:     numpy.linalg.lstsq(numpy.c_[numpy.ones(len(x)), x], table["MOS"])
MOS_PER_POINT: Mapping[str, float] = MappingProxyType(
    {"brightness": 0.153, "colorfulness": 0.067, "contrast": 0.125, "noisiness": 0.071, "sharpness": 0.611}
)
_QUALITY_PER_MOS = 9.0 / 100.0  # quality_score 1-10 for MOS 0-100

# --- exposure ---
#: Median mean luma of the 61 night photos (scenes labelled by eye) in the upper half of MOS. Night may be this dark.
NIGHT_LUMA = 0.26
#: Below half a stop from the middle it is not the amount of light that is wrong. Halving and doubling the light of
#: photos moves the estimate by the right amount to within 0.13 stop (up to 4 stops less) and by too little where
#: pixels clip (0.24 stop at 1 to 1.5 stops more); how bright the subject itself is adds 1 stop of error (means).
_STOPS_OFF = 0.5
_MOST_STOPS = 4.0  # as far as that was measured
#: Share of pixels: one in ten good photos has more blown out, one in a hundred more black.
CLIPPED = 0.05

# --- sharpness ---
#: Focal length from which a lens is not that of a phone: 99.9 % of SPAQ's phones have under 6.5 mm, and there is no
#: rectilinear lens under 9 mm for 35 mm film. A phone's main camera sees as a lens of about 28 mm.
_LENS_MM, _PHONE_MM = 9.0, 28.0
#: Written speeds are rounded (1/60 s is 1/64 s, 1/15 s is 1/16 s): a sixth of a stop.
_ROUNDED = 2 ** (1 / 6)
#: Nobody holds a camera by hand for a second: a tripod was there.
_TRIPOD_S = 1.0
#: Longest exposure for a subject that moves. Of SPAQ's photos of people 8, 15 and 29 % are poor in sharpness (below 40)
#: at up to 1/500, 1/250 and 1/125 s; 42 % at 1/125 to 1/60 s.
_SUBJECT_S = 1 / 125
_MOVING = frozenset({"human", "animal"})
#: The Airy disk, 2.44 x 0.55 um x N, is as wide as the circle of confusion of 35 mm film, 0.03 mm, from N = 22 on.
DIFFRACTION_F_NUMBER = 22.0
#: Depth of field is 2 N c (m + 1) / m^2 with c = 0.03 mm; for head and shoulders (magnification m = 1/20) 25.2 mm x N:
#: 7 cm at f/2.8, less than from the tip of a nose to the ears.
SHALLOW_F_NUMBER = 2.8
_DEPTH_CM_PER_F = 2.52
#: Shorter side, px: pixel measurements are taken at 512 (`picinspector.photo`); a smaller photo has less than that.
_SMALL_PX = 512
#: Variance of the Laplacian that nine in ten good photos exceed.
_DETAIL = 175.0

# --- noise ---
#: Of SPAQ's photos 49 % are poor in noisiness (below 40) at ISO 900 to 1800, 22 % at ISO 60 to 110.
HIGH_ISO = 800.0
_BASE_ISO = 100.0
#: Noise sigma that one in ten good photos exceeds, by its texture; so do 95 % of photos with noise added at the least
#: of the severities, 0.15 and up.
_GRAIN = 4.3

# --- contrast ---
#: RMS contrast of good photos: one in ten has less, one in ten has more.
_FLAT, _HARSH = 0.15, 0.29

# --- colour: categories of M3 in Hasler and Suesstrunk (2003), table 2 ---
_MODERATE_COLOR, _QUITE_COLORFUL = 33.0, 59.0
#: Below this M3 a photo is black and white on purpose: 59 of 10,000 photos have less than 0.1 and 8 more less than 1,
#: which rounding in a JPEG may add. A toned print has more and is not recognised.
_MONOCHROME = 1.0

#: Whole stops as they are written on cameras.
_SPEEDS_S = (*(1 / d for d in (8000, 4000, 2000, 1000, 500, 250, 125, 60, 30, 15, 8, 4, 2)), 1.0, 2.0, 4.0, 8.0)
_F_NUMBERS = (1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0, 16.0, 22.0)


@dataclass(frozen=True, slots=True)
class Suggestion:
    """One thing to do about a photo.

    Attributes:
        topic: the attribute that it would raise, one of `schema.ATTRIBUTES`.
        evidence: what is wrong and how that is known.
        advice: what to do.
        gain: estimated points of quality_score (1-10) if the attribute became good (60). Darkness takes contrast and
            colour with it: where they would be ordinary with the missing light, their points are counted too.
    """

    topic: str
    evidence: str
    advice: str
    gain: float

    @property
    def text(self) -> str:
        """`evidence; advice`, one line."""
        return f"{self.evidence}; {self.advice}"


#: What of `schema.MEASUREMENTS` and of `schema.FACTS` is read, in the order of `_Photo`.
MEASURED = ("brightness", "clipped_highlights", "clipped_shadows", "contrast", "colorfulness", "noise", "sharpness")
EXIF = ("iso", "exposure_s", "f_number", "focal_length_mm", "width", "height")


class _Photo(NamedTuple):
    """What is known of a photo; None what is not."""

    attributes: dict[str, float]  # only those that are not good
    scene: str
    luma: float | None
    highlights: float
    shadows: float
    contrast: float | None
    colorfulness: float | None
    noise: float | None
    detail: float | None
    iso: float | None
    exposure_s: float | None
    f_number: float | None
    focal_mm: float | None
    width: float | None
    height: float | None
    stops: float  # off from right exposure, below 0 too dark; 0 where that is unknown

    @property
    def clipped(self) -> str:
        """Lost pixels in words, where there are many."""
        parts = [
            f"{_percent(share)} of pixels {word}"
            for share, word in ((self.highlights, "blown out"), (self.shadows, "black"))
            if share >= CLIPPED
        ]
        return " and ".join(parts)

    @property
    def missing_stops(self) -> float:
        """Light to make up for, 0 or more; a dark photo that is judged well exposed needs none."""
        return max(0.0, -self.stops) if "brightness" in self.attributes else 0.0

    @property
    def has_lens(self) -> bool:
        """Not a phone: the aperture can be chosen."""
        return self.focal_mm is not None and self.focal_mm >= _LENS_MM

    @property
    def longest_s(self) -> float:
        """Longest exposure by hand: 1 / focal length, the reciprocal rule of 35 mm film; less for what moves."""
        by_hand = 1.0 / (self.focal_mm if self.has_lens and self.focal_mm is not None else _PHONE_MM)
        return min(by_hand, _SUBJECT_S) if self.scene in _MOVING else by_hand

    @property
    def lacks_detail(self) -> bool | None:
        """Whether fine detail is low as measured; None where that is unknown."""
        return None if self.detail is None else round(self.detail) < _DETAIL

    def judged(self, attribute: str, name: str) -> str:
        """What the attribute says, where no measurement says more."""
        value = self.attributes[attribute]
        return f"{name} {GRADES[grade(value)]} ({value:.0f} of 100)"


def suggest(
    attributes: Mapping[str, float], measured: Mapping[str, float], facts: Mapping[str, Any], scene: str
) -> list[Suggestion]:
    """What would raise the quality score most.

    Args:
        attributes: 0-100 for `schema.ATTRIBUTES`, high is good, from a trained head.
        measured: `schema.MEASUREMENTS` in the units of `schema.MEASUREMENT_FIELDS`.
        facts: `schema.FACTS`: iso, exposure_s, f_number, focal_length_mm, width and height are read.
        scene: one of `schema.SCENES`; any other is treated as `other`.

    Returns:
        at most `MAX_SUGGESTIONS`, the largest gain first; empty where everything is good. In all arguments a value
        that is missing, None, NaN or infinite counts as unknown; an unknown attribute gets no suggestion.
    """
    low = {name: max(0.0, value) for name in MOS_PER_POINT if (value := _number(attributes.get(name))) is not None}
    low = {name: value for name, value in low.items() if value < TARGET}
    if not low:
        return []
    known = [*(_number(measured.get(name)) for name in MEASURED), *(_positive(facts.get(name)) for name in EXIF)]
    return [Suggestion(*found) for found in _suggest(_photo(low, scene, known))]


def suggest_all(
    attributes: Mapping[str, np.ndarray],
    measured: Mapping[str, np.ndarray],
    facts: Mapping[str, np.ndarray],
    scenes: Sequence[str],
) -> list[list[str]]:
    """The texts of `suggest` for N photos at once, in half of the time.

    Args:
        attributes, measured, facts: (N,) numbers for each of `MOS_PER_POINT`, `MEASURED` and `EXIF`, NaN where one is
            unknown.
        scenes: N of `schema.SCENES`.
    """
    # An unknown attribute is low in nothing.
    judged = [
        np.where(np.isfinite(values), np.maximum(0.0, values) + 0.0, np.inf).tolist()  # + 0.0: no -0.0 in words
        for values in (attributes[name] for name in MOS_PER_POINT)
    ]
    known = [
        *(_column(measured[name], np.isfinite) for name in MEASURED),
        *(_column(facts[name], lambda values: np.isfinite(values) & (values > 0.0)) for name in EXIF),
    ]
    texts = []
    for scene, values, photo in zip(scenes, zip(*judged, strict=True), zip(*known, strict=True), strict=True):
        low = {name: value for name, value in zip(MOS_PER_POINT, values, strict=True) if value < TARGET}
        found = _suggest(_photo(low, scene, photo)) if low else []
        texts.append([f"{evidence}; {advice}" for _, evidence, advice, _ in found])
    return texts


def _suggest(photo: _Photo) -> list[tuple[str, str, str, float]]:
    """Topic, evidence, advice and gain of each suggestion."""
    gains = {
        name: (TARGET - value) * MOS_PER_POINT[name] * _QUALITY_PER_MOS for name, value in photo.attributes.items()
    }
    for name in _follow_the_light(photo):
        gains["brightness"] += gains.pop(name)
    found: list[tuple[str, str, str, float]] = []
    for name in sorted(gains, key=gains.__getitem__, reverse=True):
        if gains[name] < MIN_GAIN or len(found) == MAX_SUGGESTIONS:
            break
        words = _RULES[name](photo)
        if words is not None:
            found.append((name, *words, gains[name]))
    return found


def stops_off(luma: float, scene: str = "other") -> float:
    """How many stops a photo is from right exposure, by its mean luma; below 0 is too dark.

    Both are turned into light by the sRGB curve (IEC 61966-2-1): log2 of photo / middle. The middle is
    `wording.MIDDLE_LUMA`, light 0.17, where captions too turn from dark to bright; 18 % grey is 0.08 stop above it. At
    night anything from `NIGHT_LUMA` to the middle is right.

    Args:
        luma: mean luma 0-1, sRGB; below 1/255 it counts as that, above 1 as 1.
        scene: one of `schema.SCENES`.
    """
    light = _light(min(1.0, max(1.0 / 255.0, luma)))
    darkest = _NIGHT_LIGHT if scene == "night" else _MIDDLE_LIGHT
    return min(0.0, math.log2(light / darkest)) + max(0.0, math.log2(light / _MIDDLE_LIGHT))


# --- the rules: evidence and advice on one attribute that is not good -------------------------------------------------


def _exposure(photo: _Photo) -> tuple[str, str]:
    if photo.luma is None:
        return photo.judged("brightness", "exposure is"), "check the histogram and correct the exposure"
    if abs(photo.stops) < _STOPS_OFF:
        return _uneven_light(photo)
    over, lost = photo.stops > 0.0, f", {photo.clipped}" if photo.clipped else ""
    if abs(photo.stops) > _MOST_STOPS:
        how_far, stops = "more than", _MOST_STOPS
    elif over and photo.highlights >= CLIPPED:  # what is blown out hides how far it is over
        how_far, stops = "at least", math.floor(2.0 * photo.stops) / 2.0
    else:
        how_far, stops = "about", round(2.0 * abs(photo.stops)) / 2.0
    amount = f"{how_far} {stops:g} {'stop' if stops == 1.0 else 'stops'} {'over' if over else 'under'}exposed"
    advice = _less_light(photo, stops) if over else _more_light(photo, stops)
    return f"{amount}: mean luma {_percent(photo.luma)}{lost}", advice


def _uneven_light(photo: _Photo) -> tuple[str, str]:
    """The amount of light is right on the whole."""
    mean = f"mean luma {_percent(photo.luma or 0.0)}"
    if photo.highlights >= CLIPPED and photo.shadows >= CLIPPED:
        return (
            f"more range than the camera holds: {photo.clipped}",
            "bracket the exposure, or fill the shadows with flash",
        )
    if photo.highlights >= CLIPPED:
        return (
            f"highlights lost: {photo.clipped}, {mean}",
            "expose for the highlights (about -2/3 EV), then open the shadows",
        )
    if photo.shadows >= CLIPPED:
        return f"shadows lost: {photo.clipped}, {mean}", "add fill light, or expose longer and lower the highlights"
    judged = photo.judged("brightness", "exposure is")
    at_night = " at night" if photo.scene == "night" else ""
    return f"{judged} though {mean} is ordinary{at_night}", "lighten the main subject, or turn it to softer light"


def _more_light(photo: _Photo, stops: float) -> str:
    if photo.highlights >= CLIPPED:
        return "light the subject (fill flash, reflector) or bracket the exposure: the background is bright already"
    whole, exposure_s = int(stops), photo.exposure_s
    if whole and exposure_s is not None and exposure_s * 2**whole <= photo.longest_s * _ROUNDED:
        how = f"use {_speed(_nearest(exposure_s * 2**whole, _SPEEDS_S))} instead of {_speed(exposure_s)}"
    elif whole and (setting := _more_sensitive(photo, whole)):
        how = f"use {setting}"
    else:
        how = _LIGHT.get(photo.scene, f"raise the exposure by {stops:g} EV")
    if photo.shadows >= CLIPPED:
        return f"{how}: what is black cannot be opened later"
    return f"{how}, or open the shadows"


def _less_light(photo: _Photo, stops: float) -> str:
    whole, exposure_s = int(stops), photo.exposure_s
    if whole and exposure_s is not None and exposure_s / 2**whole >= _SPEEDS_S[0]:
        how = f"use {_speed(_nearest(exposure_s / 2**whole, _SPEEDS_S))} instead of {_speed(exposure_s)}"
    else:
        how = f"lower the exposure by {stops:g} EV"
    if photo.highlights >= CLIPPED:
        return f"{how}: what is blown out cannot be brought back later"
    return f"{how}, or lower the highlights"


def _sharpness(photo: _Photo) -> tuple[str, str] | None:
    return _motion(photo) or _too_small(photo) or _aperture(photo) or _focus(photo)


def _motion(photo: _Photo) -> tuple[str, str] | None:
    """Blur by an exposure too long for a hand, or for what moves."""
    exposure_s, longest_s = photo.exposure_s, photo.longest_s
    if exposure_s is None or exposure_s <= longest_s * _ROUNDED:
        return None
    if exposure_s >= _TRIPOD_S:
        return (
            f"{_speed(exposure_s)} shows every movement",
            "use a firm tripod and the self-timer, or a shorter exposure",
        )
    safe = _SPEEDS_S[max(0, bisect_right(_SPEEDS_S, longest_s * _ROUNDED) - 1)]
    setting = _more_sensitive(photo, max(1, math.ceil(math.log2(exposure_s / safe / _ROUNDED))))
    use = f"use {_speed(safe)}{f' ({setting})' if setting else ''}"
    if photo.scene in _MOVING and longest_s == _SUBJECT_S:
        return f"{_speed(exposure_s)} is slow for a subject that moves", f"{use} or faster"
    if photo.has_lens:
        where = f"{_speed(exposure_s)}, {photo.focal_mm:.0f} mm"
        return f"motion blur likely at {where} (by hand at most 1/focal length)", f"{use} or a tripod"
    return f"motion blur likely at {_speed(exposure_s)} by hand", f"{use} or a tripod, or rest the camera"


def _too_small(photo: _Photo) -> tuple[str, str] | None:
    if photo.width is None or photo.height is None or min(photo.width, photo.height) >= _SMALL_PX:
        return None
    if photo.lacks_detail:  # even for its size: blurred
        return None
    size = f"only {photo.width:.0f} x {photo.height:.0f} px"
    return f"{size} leave little detail", "use the original file, or a larger size without digital zoom"


def _aperture(photo: _Photo) -> tuple[str, str] | None:
    """Blur by an aperture too small or too wide."""
    f_number = photo.f_number
    if f_number is None or not photo.has_lens:
        return None
    if f_number >= DIFFRACTION_F_NUMBER:
        return f"diffraction softens everything at f/{f_number:.3g}", "use f/8 to f/11"
    if f_number <= SHALLOW_F_NUMBER:
        depth = f"about {_DEPTH_CM_PER_F * f_number:.0f} cm at head and shoulders"
        focus = _FOCUS.get(photo.scene, "the main subject")
        return f"thin depth of field at f/{f_number:.3g} ({depth})", f"focus on {focus}, or stop down to f/5.6"
    return None


def _focus(photo: _Photo) -> tuple[str, str]:
    """What is left where no setting explains the blur."""
    focus = _FOCUS.get(photo.scene, "the main subject")
    if photo.exposure_s is not None:
        evidence = f"{photo.judged('sharpness', 'sharpness is')} though {_speed(photo.exposure_s)} is short enough"
        return evidence, f"focus on {focus}" + ("" if photo.has_lens else " (tap it) and wipe the lens")
    noisy = "noisiness" in photo.attributes
    evidence = photo.judged("sharpness", "sharpness is")
    if photo.lacks_detail:
        evidence += f", Laplacian variance {photo.detail:.0f} (good photos: {_DETAIL:.0f} and more)"
    if grade(photo.attributes["sharpness"]) >= 2:  # fair: mild blur is within reach of an editor
        return evidence, f"focus on {focus}; sharpen a little" + (" after reducing the noise" if noisy else "")
    if noisy and photo.lacks_detail is False:  # there is structure, but not the subject's
        return f"{evidence}: noise or compression hides detail", f"mend that first, then check the focus on {focus}"
    return evidence, f"hold the camera steady or use a tripod, and focus on {focus}"


def _noise(photo: _Photo) -> tuple[str, str]:
    grainy = photo.noise is not None and photo.noise >= _GRAIN
    sigma = f", sigma {photo.noise:.1f} of 255" if grainy else ""
    if photo.iso is not None and photo.iso >= HIGH_ISO:
        return f"noise at ISO {photo.iso:.0f}{sigma}", _lower_iso(photo)
    if photo.missing_stops >= 1.0:
        dark = f"noise in an underexposed photo{sigma}"
        return dark, "expose more rather than brighten later, and reduce the noise"
    at = f" at only ISO {photo.iso:.0f}" if photo.iso is not None else ""
    if photo.noise is not None and not grainy:
        judged = photo.judged("noisiness", "cleanness is")
        return f"{judged}{at} without fine grain: blotches", "save with less compression and milder noise reduction"
    if photo.iso is not None:
        return f"noise{at}{sigma}", "reduce the noise, and lift shadows and sharpen less"
    return f"visible noise{sigma}", "use a lower ISO with a longer exposure or more light, and reduce the noise"


def _lower_iso(photo: _Photo) -> str:
    """A longer exposure where a hand still holds it, after making up for missing light."""
    iso = photo.iso or HIGH_ISO
    room = 0.0
    if photo.exposure_s is not None:
        room = math.log2(photo.longest_s * _ROUNDED / photo.exposure_s) - photo.missing_stops
    stops = int(min(room, math.log2(iso / _BASE_ISO)))
    if stops >= 1:
        longer = _speed(_nearest((photo.exposure_s or 0.0) * 2**stops, _SPEEDS_S))
        return f"{longer} would allow ISO {iso / 2**stops:.0f}; reduce the noise of this one"
    if photo.scene in _MOVING:
        return "bring more light or open the aperture for a lower ISO; reduce the noise of this one"
    return "a tripod and a longer exposure allow a lower ISO; reduce the noise of this one"


def _contrast(photo: _Photo) -> tuple[str, str]:
    curve = "set the black and white points, or add a gentle S-curve"
    judged = photo.judged("contrast", "contrast is")
    if photo.contrast is None:
        return judged, curve
    spread = f"luma spread {_percent(photo.contrast)}"
    if round(photo.contrast, 2) < _FLAT:  # as it is printed
        flat = f"{spread} (good photos: {_percent(_FLAT)} and more)"
        if photo.scene in ("landscape", "cityscape") and photo.shadows < CLIPPED:
            return f"flat as in haze: {flat}", "remove haze and set the black point, or shoot in clear air and low sun"
        return f"flat tones: {flat}", curve
    if photo.contrast >= _HARSH or (photo.highlights >= CLIPPED and photo.shadows >= CLIPPED):
        clipped = f", {photo.clipped}" if photo.clipped else ""
        return (
            f"hard light: {spread}{clipped}",
            "use softer light or fill flash, open the shadows, lower the highlights",
        )
    return f"{judged} though {spread} is ordinary", "raise the contrast of the midtones"


def _color(photo: _Photo) -> tuple[str, str] | None:
    judged = photo.judged("colorfulness", "colour is")
    if photo.colorfulness is None:
        return judged, "check the white balance"
    if photo.colorfulness < _MONOCHROME:
        return None
    value = f"colourfulness {photo.colorfulness:.0f}"
    if round(photo.colorfulness) < _MODERATE_COLOR:
        return f"pale colours: {value} (moderate is {_MODERATE_COLOR:.0f})", _COLOR.get(photo.scene, _VIBRANCE)
    if photo.colorfulness >= _QUITE_COLORFUL:
        return f"{judged} though strong ({value})", "remove a colour cast by white balance, or lower the saturation"
    return judged, "check the white balance"


_RULES: Mapping[str, Callable[[_Photo], tuple[str, str] | None]] = {
    "brightness": _exposure,
    "sharpness": _sharpness,
    "noisiness": _noise,
    "contrast": _contrast,
    "colorfulness": _color,
}

_FOCUS = {"human": "the eyes", "animal": "the eyes", "plant": "the nearest bloom or leaf"}
_LIGHT = {
    "human": "light the face (window, reflector, fill flash)",
    "indoor": "use window light or bounce a flash off the ceiling",
    "night": "expose longer on a tripod",
    "landscape": "expose longer on a tripod",
    "cityscape": "expose longer on a tripod",
}
_VIBRANCE = "raise vibrance and check the white balance"
_COLOR = {
    "human": "raise vibrance rather than saturation, which spoils skin",
    "indoor": "set the white balance for the lamps, then raise vibrance",
    "night": "set the white balance for the lamps, then raise vibrance",
    "landscape": "raise vibrance, or shoot in low sun or with a polariser",
}


# --- parts ------------------------------------------------------------------------------------------------------------


def _photo(low: dict[str, float], scene: str, known: Iterable[float | None]) -> _Photo:
    """Of what is `known` by `MEASURED` and `EXIF`, in their order."""
    luma, highlights, shadows, *others = known
    stops = 0.0 if luma is None else stops_off(luma, scene)
    return _Photo._make((low, scene, luma, highlights or 0.0, shadows or 0.0, *others, stops))


def _follow_the_light(photo: _Photo) -> list[str]:
    """Those of contrast and colour that are low only because light is missing.

    Both measurements are proportional to sRGB values, and n stops are about 2 ** (n / 2.2) in those.
    """
    if photo.missing_stops < 1.0:
        return []
    brighter = 2.0 ** (min(photo.missing_stops, _MOST_STOPS) / 2.2)
    ordinary = {"contrast": (photo.contrast, _FLAT), "colorfulness": (photo.colorfulness, _MODERATE_COLOR)}
    return [
        name
        for name, (value, least) in ordinary.items()
        if name in photo.attributes and value is not None and value * brighter >= least
    ]


def _more_sensitive(photo: _Photo, stops: int) -> str:
    """Which ISO or aperture gives whole stops more; empty where neither does without harm."""
    noisy = "noisiness" in photo.attributes
    if photo.iso is not None and not noisy and photo.iso * 2**stops <= HIGH_ISO:
        return f"ISO {photo.iso * 2**stops:.0f} instead of {photo.iso:.0f}"
    if photo.has_lens and photo.f_number is not None and photo.f_number > SHALLOW_F_NUMBER:
        wider = _nearest(photo.f_number / 2 ** (stops / 2), _F_NUMBERS)
        if SHALLOW_F_NUMBER < wider < photo.f_number:
            return f"f/{wider:g} instead of f/{photo.f_number:.3g}"
    return ""


def _light(srgb: float) -> float:
    return srgb / 12.92 if srgb <= 0.04045 else float(((srgb + 0.055) / 1.055) ** 2.4)


_MIDDLE_LIGHT, _NIGHT_LIGHT = _light(MIDDLE_LUMA), _light(NIGHT_LUMA)


def _nearest(value: float, steps: tuple[float, ...]) -> float:
    """The step at the smallest ratio to a value above 0; steps ascend."""
    index = bisect_left(steps, value)
    if index in (0, len(steps)):
        return steps[0] if index == 0 else steps[-1]
    below, above = steps[index - 1], steps[index]
    return above if above / value < value / below else below


def _speed(exposure_s: float) -> str:
    if 1e-5 <= exposure_s < 0.3:
        return f"1/{1.0 / exposure_s:.0f} s"
    return f"{exposure_s:.2g} s"


def _percent(share: float) -> str:
    return f"{100.0 * share:.0f} %"


def _column(values: np.ndarray, is_known: Callable[[np.ndarray], np.ndarray]) -> list[float | None]:
    """Numbers as Python's; None where one is not known."""
    numbers: list[float | None] = np.asarray(values, np.float64).tolist()
    known = is_known(values)
    if known.all():
        return numbers
    return [number if is_ else None for number, is_ in zip(numbers, known.tolist(), strict=True)]


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # None, pandas.NA, text, an integer beyond floats
        return None
    return number if math.isfinite(number) else None


def _positive(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and number > 0.0 else None
