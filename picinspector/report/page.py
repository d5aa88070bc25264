"""The page: what was found, and the thumbnails, in one HTML file that asks nobody for anything.

What comes from a file name, EXIF, a caption or an error is not trusted. Jinja escapes what is text, its `tojson` what
is data. The script makes text nodes only. By the page's Content-Security-Policy no script runs and no style applies but
the two whose hashes it names.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import posixpath
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from picinspector import __version__, schema
from picinspector.report.digest import BIN_WIDTH, BINS, GROUP_MEMBERS, Digest
from picinspector.report.thumbnails import Thumbnails
from picinspector.text import one_line

#: Thumbnails of one JSON block: a browser parses a block when the first of them comes near the screen.
CHUNK = 50
#: Runs that are listed, the newest.
RUNS = 20
#: Of a name; its path is shown in full in the photo's panel.
_NAME_CHARACTERS = 100

VIEWS = {
    "selected": "Selected",
    "best": "Best",
    "worst": "Worst",
    "borderline": "Borderline",
    "improvable": "Most improvable",
    "groups": "Groups",
    "all": "All shown",
    "errors": "Errors",
    "runs": "Provenance",
}
_GROUP_KINDS = {"exact": "exact copies", "near": "near-duplicates", "burst": "burst"}


def render(title: str, found: Digest, thumbnails: Thumbnails) -> bytes:
    """The page, UTF-8."""
    style, script = _source("page.css"), _source("page.js")
    content = _template().render(
        title=one_line(title),
        policy=policy(style, script),
        style=Markup(style),
        script=Markup(script),
        version=__version__,
        summary=found.summary,
        views=_views(found),
        histogram=_histogram(found.summary),
        attributes=found.summary["attributes"],
        shown=len(found.photos),
        thumbnails=thumbnails,
        errors=found.errors,
        runs=[_run(record) for record in found.runs[:RUNS]],
        older_runs=max(0, len(found.runs) - RUNS),
        library=_library(found.runs),
        data=_data(found, thumbnails),
        chunks=[thumbnails.images[start : start + CHUNK] for start in range(0, len(thumbnails.images), CHUNK)],
    )
    return content.encode("utf-8", "replace")


def policy(style: str, script: str) -> str:
    """The Content-Security-Policy: pictures that are data, this style, this script, and nothing else."""
    return (
        f"default-src 'none'; img-src data:; style-src '{_sha256(style)}'; script-src '{_sha256(script)}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _sha256(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _source(name: str) -> str:
    return resources.files("picinspector.report").joinpath(name).read_text("utf-8")


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "one_line": one_line, "number": _number, "words": _words, "megabytes": _megabytes, "percent": _percent
    }  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.from_string(_source("page.html"))


# --- words and figures ------------------------------------------------------------------------------------------------


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _words(name: str | None) -> str:
    return one_line(name or "unknown").replace("_", " ")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 or share == 0 else "< 1 %"


def _megabytes(size_bytes: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= size:
            return f"{size_bytes / size:,.1f} {unit}"
    return f"{size_bytes / 1e3:,.0f} kB"


def _views(found: Digest) -> list[dict[str, Any]]:
    """The views that have something to show, with a count each."""
    counts: dict[str, int] = {
        **{name: len(indices) for name, indices in found.views.items()},
        "groups": len(found.groups),
        "all": len(found.photos),
        "errors": found.summary["failed"],
        "runs": len(found.runs),
    }
    return [{"name": name, "label": label, "count": counts[name]} for name, label in VIEWS.items() if counts[name]]


def _leads(found: Digest) -> dict[str, str]:
    """A sentence above each view: what it holds."""
    summary = found.summary
    cut = _number(summary["cut"], 2)
    middle = f"the median, {cut}"
    if summary["selected"]:
        middle = f"{cut}, above which there are as many photos as were selected"
    groups = "All groups"
    if len(found.groups) < summary["groups"]:
        groups = f"The {len(found.groups):,} largest of {summary['groups']:,} groups"
    shown = len(found.views["selected"])
    more = f" The first {shown:,} of {summary['selected']:,}." if shown < summary["selected"] else ""
    older = " Chosen before the last run: curate again." if summary["selection_is_old"] else ""
    return {
        "selected": f"The photos to keep, in the order in which they were chosen.{more}{older}",
        "best": "The highest quality scores of the library.",
        "worst": "The lowest quality scores of the library, the worst first.",
        "borderline": f"Closest to {middle}: whether these are in or out is a matter of taste. Look at them yourself.",
        "improvable": "Where the suggestions promise the largest gain: points of quality score, were what they name "
        "good. An estimate from rated photos, no promise for one.",
        "groups": f"Photos of one moment, the pick first, and why. {groups}, of each up to {GROUP_MEMBERS} photos.",
        "all": _selection(found),
    }


def _selection(found: Digest) -> str:
    summary, shown = found.summary, len(found.photos)
    if shown == summary["scored"]:
        return f"All {shown:,} photos that have a score."
    spread = f", and {summary['spread']:,} at even steps of the ranking" if summary["spread"] else ""
    return f"{shown:,} of {summary['scored']:,} scored photos: those of the other views{spread}."


def _histogram(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The bars, in a box of 100 x 36 per cent; and in words."""
    counts: Sequence[int] = summary["histogram"]
    most = max(counts, default=0)
    bars = [
        {
            "low": 1 + at * BIN_WIDTH,
            "x": 100 * at / BINS,
            "height": round(100 * count / most, 2) if most else 0,
            "count": count,
        }
        for at, count in enumerate(counts)
    ]
    if not summary["scored"]:
        return {"bars": [], "text": "No photo has a quality score.", "rows": [], "median": None}
    at = counts.index(most)
    low, median, high = (summary["quantiles"][place] for place in (1, 2, 3))
    text = (
        f"Histogram of {summary['scored']:,} quality scores from 1 to 10. The median is {median:.1f}; half of the "
        f"photos lie between {low:.1f} and {high:.1f}. The tallest bar holds {most:,} photos, from "
        f"{1 + at * BIN_WIDTH:.2f} to {1 + (at + 1) * BIN_WIDTH:.2f}."
    )
    per_point = round(1 / BIN_WIDTH)
    rows = [
        {"low": 1 + point, "count": sum(counts[point * per_point : (point + 1) * per_point])}
        for point in range(BINS // per_point)
    ]
    return {"bars": bars, "text": text, "rows": rows, "median": 100 * (median - 1) / 9}


def _library(runs: Sequence[Mapping[str, Any]]) -> str:
    return next((str(record["library"]) for record in runs if record.get("library")), "")


def _run(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run record what is listed; whatever an older version left out is a dash."""
    bundle, counts, environment = (record.get(name) or {} for name in ("bundle", "counts", "environment"))
    return {
        "id": str(record["run_id"]),
        "kind": str(record.get("kind") or "–"),
        "started": str(record.get("started_at") or "–")[:16].replace("T", " "),
        "bundle": " ".join(str(bundle[name]) for name in ("name", "version") if bundle.get(name)) or "–",
        "scorer_kind": str(bundle.get("scorer_kind") or "–"),
        "encoder_fingerprint": str(bundle.get("encoder_fingerprint") or "–"),
        "scorer_fingerprint": str(bundle.get("scorer_fingerprint") or "–"),
        "scored": counts.get("scored"),
        "failed": counts.get("failed"),
        "rows": record["rows_shown"],
        "versions": ", ".join(
            f"{name} {value}" for name, value in environment.items() if isinstance(value, str) and value
        ),
    }


# --- the photos, as data ----------------------------------------------------------------------------------------------


def _data(found: Digest, thumbnails: Thumbnails) -> dict[str, Any]:
    return {
        "labels": [found.summary["labels"][name] for name in schema.ATTRIBUTES],
        "attributes": list(schema.ATTRIBUTES),
        "leads": _leads(found),
        "views": found.views,
        "chunk": CHUNK,
        "total": found.summary["scored"],
        "selected": found.summary["selected"],
        "groups": [
            {"kind": _GROUP_KINDS.get(group["kind"], _words(group["kind"])), "size": group["size"],
             "members": group["members"]}
            for group in found.groups
        ],
        "photos": [
            _photo(photo, reason) for photo, reason in zip(found.photos, thumbnails.reasons, strict=True)
        ],
    }  # fmt: skip


def _photo(photo: Mapping[str, Any], no_thumbnail: str | None) -> dict[str, Any]:
    """What the script knows of a photo. Texts are as they are to be shown."""
    uri = str(photo["uri"])
    return {
        "name": _name(uri),
        "path": one_line(uri),
        "ratio": round(photo["width"] / photo["height"], 3) if photo["width"] and photo["height"] else 1.5,
        "quality": _rounded(photo["quality_score"], 3),
        "low": _rounded(photo["quality_low"], 2),
        "high": _rounded(photo["quality_high"], 2),
        "rank": photo["place"] + 1,
        "percentile": _rounded(photo["percentile"], 1),
        "scene": _words(photo["scene"]),
        "sceneProbability": _rounded(photo["scene_probability"], 3),
        "scenePercentile": _rounded(photo["scene_percentile"], 1),
        "attributes": [_rounded(value, 1) for value in photo["attributes"]],
        "caption": one_line(photo["caption"] or ""),
        "captionSource": _words(photo["caption_source"]) if photo["caption_source"] else "",
        "suggestions": [
            {"text": one_line(suggestion["text"]), "gain": _rounded(suggestion["gain"], 2)}
            for suggestion in photo["suggestions"]
        ],
        "gain": _rounded(photo["gain"], 2),
        "facts": _facts(photo),
        "taken": photo["captured_at"].isoformat() if photo["captured_at"] else "",
        "bytes": photo["size_bytes"] or 0,
        "group": photo["group"],
        "selected": photo["selected"],
        "rankInGroup": photo["rank_in_group"],
        "reason": one_line(photo["reason"] or ""),
        "missing": one_line(no_thumbnail) if no_thumbnail else "",
    }


def _name(uri: str) -> str:
    """The last part of a URI; without its middle where it is very long."""
    name, half = one_line(posixpath.basename(uri.rstrip("/")) or uri), _NAME_CHARACTERS // 2
    return name if len(name) <= _NAME_CHARACTERS else f"{name[:half]}…{name[-half:]}"


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, digits)


def _facts(photo: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the camera and the file say, as names and values."""
    taken: datetime | None = photo["captured_at"]
    exposure = [
        _speed(photo["exposure_s"]),
        f"f/{photo['f_number']:.3g}" if photo["f_number"] else "",
        f"ISO {photo['iso']}" if photo["iso"] else "",
        f"{photo['focal_length_mm']:.3g} mm" if photo["focal_length_mm"] else "",
    ]
    width, height = photo["width"], photo["height"]
    size = [
        f"{width:,} × {height:,} px ({width * height / 1e6:.1f} MP)" if width and height else "",
        one_line(photo["format"] or ""),
        _megabytes(photo["size_bytes"]) if photo["size_bytes"] else "",
    ]
    facts = {
        "taken": taken.strftime("%Y-%m-%d %H:%M:%S") if taken else "",
        "camera": one_line(photo["camera"] or ""),
        "lens": one_line(photo["lens"] or ""),
        "exposure": " · ".join(part for part in exposure if part),
        "file": " · ".join(part for part in size if part),
    }
    return [(name, value) for name, value in facts.items() if value]


def _speed(exposure_s: float | None) -> str:
    if not exposure_s:
        return ""
    return f"1/{1 / exposure_s:.0f} s" if exposure_s < 0.3 else f"{exposure_s:.3g} s"
