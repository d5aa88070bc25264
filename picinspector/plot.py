"""One judged photo as a picture: the photo, its score, a radar chart of the six attributes, and what was said of it."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.projections.polar import PolarAxes

from picinspector.schema import ATTRIBUTES, labels_of
from picinspector.text import one_line
from picinspector.wording import GRADES

SIZE_PX = (1320, 825)
_DPI = 110
#: Okabe & Ito (2008), blue: told apart from the greys around it in every kind of colour blindness.
_BLUE = "#0072B2"
_INK, _MUTED, _FAINT = "#1a1a1a", "#5f6368", "#dadce0"
#: Names and captions are shown as they are: a dollar sign begins no formula in them.
_PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False}
_NAME_CHARACTERS = 64
#: Lines of text that fit below, at this many characters of an average width.
_LINES, _LINE_CHARACTERS = 8, 150


def draw(row: Mapping[str, Any], pixels: np.ndarray) -> bytes:
    """The picture as a PNG of `SIZE_PX`.

    Args:
        row: from `stages.single.judge`, of a photo without an error.
        pixels: of the photo, uint8 sRGB (H, W, 3), upright.
    """
    width, height = (side / _DPI for side in SIZE_PX)
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    _photo(figure.add_axes((0.025, 0.27, 0.53, 0.66)), pixels, str(row["uri"]))
    _headline(figure, row)
    _scale(figure.add_axes((0.615, 0.805, 0.345, 0.05)), row)
    radar = figure.add_axes((0.655, 0.29, 0.265, 0.424), projection="polar")
    assert isinstance(radar, PolarAxes)
    _radar(radar, [row["attributes"][name] for name in ATTRIBUTES], list(labels_of(row["scorer_kind"]).values()))
    _words(figure, row)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a name in a script the font lacks
        figure.savefig(content, format="png", dpi=_DPI)
    return content.getvalue()


def _photo(axes: Axes, pixels: np.ndarray, uri: str) -> None:
    axes.imshow(pixels, interpolation="antialiased")
    axes.set_axis_off()
    axes.set_anchor("W")
    name = one_line(uri.rstrip("/").rpartition("/")[2] or uri)
    if len(name) > _NAME_CHARACTERS:
        name = f"{name[: _NAME_CHARACTERS // 2 - 1]}…{name[-_NAME_CHARACTERS // 2 :]}"
    axes.set_title(name, loc="left", fontsize=11, color=_MUTED, pad=10, **_PLAIN)


def _headline(figure: Figure, row: Mapping[str, Any]) -> None:
    """The score, large, and the scene."""
    score = figure.text(0.615, 0.885, f"{row['quality_score']:.1f}", fontsize=40, color=_INK, weight="bold")
    right = score.get_window_extent().x1 / SIZE_PX[0]
    figure.text(right + 0.008, 0.885, "of 10", fontsize=14, color=_MUTED)
    scene = f"{row['scene'].replace('_', ' ')}  {row['scene_probability']:.0%}"
    figure.text(0.96, 0.917, "scene", fontsize=10, color=_MUTED, ha="right")
    figure.text(0.96, 0.885, scene, fontsize=14, color=_INK, ha="right", **_PLAIN)


def _scale(axes: Axes, row: Mapping[str, Any]) -> None:
    """1 to 10 as a line, the interval a thick part of it, the score a dot."""
    axes.set(xlim=(0.85, 10.15), ylim=(-1, 1))
    axes.set_axis_off()
    axes.plot([1, 10], [0, 0], color=_FAINT, linewidth=6, solid_capstyle="round", zorder=1)
    low, high = row.get("quality_low"), row.get("quality_high")
    if low is not None and high is not None:
        axes.plot([low, high], [0, 0], color=_BLUE, alpha=0.45, linewidth=6, solid_capstyle="round", zorder=2)
        axes.text(
            min(max((low + high) / 2, 2.6), 8.4), -1.15, f"likely {low:.1f} to {high:.1f}", fontsize=9.5, color=_MUTED,
            ha="center", va="top",
        )  # fmt: skip
    axes.plot([row["quality_score"]], [0], "o", markersize=11, color=_BLUE, markeredgecolor="white", zorder=3)
    for value in (1, 10):
        axes.text(value, -1.15, str(value), fontsize=9.5, color=_MUTED, ha="center", va="top")


def _radar(axes: PolarAxes, values: Sequence[float], labels: Sequence[str]) -> None:
    """The six attributes clockwise from the top; a ring for each grade."""
    angles = [2 * math.pi * index / len(values) for index in range(len(values))]
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(0, 100)
    axes.spines["polar"].set_visible(False)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    closed = [*angles, angles[0]]
    for index, grade in enumerate(GRADES):
        ring = 100 * (index + 1) / len(GRADES)
        axes.plot(closed, [ring] * len(closed), color=_FAINT, linewidth=0.9, zorder=1)
        axes.annotate(
            grade, (0, ring - 10), (4, 0), textcoords="offset points", fontsize=7.5, color=_MUTED, va="center",
            zorder=4, path_effects=[withStroke(linewidth=2, foreground="white", alpha=0.8)],
        )  # fmt: skip
    for angle in angles:
        axes.plot([angle, angle], [0, 100], color=_FAINT, linewidth=0.9, zorder=1)
    shown = [*values, values[0]]
    axes.fill(closed, shown, color=_BLUE, alpha=0.18, zorder=2)
    axes.plot(closed, shown, color=_BLUE, linewidth=2.2, zorder=3, solid_joinstyle="round", clip_on=False)
    axes.plot(angles, values, "o", color=_BLUE, markersize=5, zorder=5, clip_on=False)
    for angle, value, label in zip(angles, values, labels, strict=True):
        across = math.sin(angle)
        side = "center" if abs(across) < 0.1 else "left" if across > 0 else "right"
        above = "bottom" if math.cos(angle) > 0.9 else "top" if math.cos(angle) < -0.9 else "center"
        axes.text(angle, 108, f"{label}\n{value:.0f}", fontsize=10.5, color=_INK, ha=side, va=above, **_PLAIN)


def _words(figure: Figure, row: Mapping[str, Any]) -> None:
    """The caption, and the suggestions, as many as fit."""
    caption = textwrap.wrap(one_line(row["caption"] or ""), _LINE_CHARACTERS - 20)
    y, left = 0.215, _LINES
    for line in caption[:left]:
        figure.text(0.025, y, line, fontsize=12.5, color=_INK, va="top", **_PLAIN)
        y, left = y - 0.032, left - 1
    y -= 0.012
    for suggestion in row["suggestions"]:
        lines = textwrap.wrap(one_line(suggestion["text"]), _LINE_CHARACTERS)
        if len(lines) > left:
            break
        figure.text(0.025, y, "→", fontsize=10.5, color=_BLUE, va="top")
        for line in lines:
            figure.text(0.045, y, line, fontsize=10.5, color=_MUTED, va="top", **_PLAIN)
            y, left = y - 0.028, left - 1
