"""The card of an evaluation: metrics.json, a Markdown page and its plots."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from picinspector.schema import SCENES
from training import plots
from training.judge import Judgement
from training.ladders import LADDERS

CARD = "README.md"
METRICS = "metrics.json"


def write(out: Path, result: Mapping[str, Any], judged: Judgement | None, label: np.ndarray) -> None:
    """Write `metrics.json`, `README.md` and the plots it shows.

    Args:
        out: folder; made if it is not there.
        result: what `evaluate.evaluate` gives.
        judged: of the labelled photos; None where there were none.
        label: their labels on 1-10, (N,).
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / METRICS).write_text(json.dumps(plain(result), indent=2) + "\n", "utf-8")
    if judged is not None:
        plots.scatter(judged.quality, label, out / "scatter.png")
        plots.calibration(judged.quality, label, out / "calibration.png")
        plots.bins(result["bins"], out / "bins.png")
    plots.ladders(result["degradations"]["curves"], LADDERS, out / "ladders.png")
    if "scene_labels" in result:
        plots.confusion(result["scene_labels"]["confusion"], SCENES, out / "scenes.png")
    (out / CARD).write_text(to_markdown(result), "utf-8")


def plain(value: Any) -> Any:
    """The same with null for NaN, which JSON does not have, and lists for tuples."""
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_markdown(result: Mapping[str, Any]) -> str:
    """The card as a Markdown page."""
    bundle = result["bundle"]
    parts = [
        f"# Evaluation of {bundle['name']} {bundle['version']}",
        f"Printed by `python -m training.evaluate`; scorer `{bundle['scorer_kind']}` {bundle['scorer_fingerprint']}, "
        f"encoders {bundle['encoder_fingerprint']} in {bundle['precision']}; seed {result['seed']}.",
    ]
    if "set" in result:
        parts += _labels(result)
    parts += _degradations(result["degradations"])
    if "scene_labels" in result:
        parts += _scenes(result["scene_labels"])
    return "\n\n".join(parts) + "\n"


def _labels(result: Mapping[str, Any]) -> list[str]:
    labelled = result["set"]
    low, high = labelled["mos_range"]
    parts = [
        f"## Agreement with people: {labelled['name']}",
        f"`quality_score` against MOS, both on 1-10 (MOS {low:g} is 1, {high:g} is 10); no logistic fit came first. In "
        "brackets 95 % bootstrap intervals over the photos. RMSE is in points of 1-10, then of 0-1.",
        _table(
            ("", "photos", "PLCC", "SRCC", "R2", "RMSE", "of 0-1"),
            [_agreement(name, row) for name, row in result["quality"].items()],
        ),
    ]
    if "baselines" in result:
        parts += _baselines(result)
    parts += [
        "![scatter](scatter.png) ![calibration](calibration.png)",
        "### By bin of the label",
        _table(
            ("bin", "photos", "bias", "MAE", "RMSE"),
            [
                (row["bin"], row["photos"], *(_number(row[k], 2) for k in ("bias", "mae", "rmse")))
                for row in result["bins"]
            ],
        ),
        "![bins](bins.png)",
    ]
    if result["coverage"] is not None:
        whole = result["coverage"]
        rows = [{"bin": "all", "photos": labelled["photos"], **whole}, *whole["bins"]]
        parts += [
            "### Intervals: share of labels inside, and mean width in points of 1-10",
            _table(
                ("bin of the label", "photos", "inside", "width"),
                [(r["bin"], r["photos"], _number(r["coverage"], 3), _number(r["width"], 2)) for r in rows],
            ),
        ]
    parts += [
        "### Scale of the attributes, and that of SPAQ's labels (11,125 photos)",
        _table(
            ("attribute", "mean", "sd", "SPAQ mean", "SPAQ sd"),
            [
                (name, *(_number(row[k], 1) for k in ("mean", "sd", "spaq_mean", "spaq_sd")))
                for name, row in result["attribute_scale"].items()
            ],
        ),
    ]
    if result["attributes"] is not None:
        parts += [
            "### Attributes against people's ratings, 0-100",
            _table(
                ("attribute", "photos", "PLCC", "SRCC", "R2", "RMSE"),
                [_agreement(name, row)[:6] for name, row in result["attributes"].items()],
            ),
        ]
    return parts


def _baselines(result: Mapping[str, Any]) -> list[str]:
    bundle, quality = result["bundle"], result["quality"]
    rows = [_compared(f"**{bundle['name']} {bundle['version']}**", quality["all"], "this bundle")]
    for name, row in result["baselines"].items():
        rows.append(_compared(name, row, f"fitted here on {row['train_photos']:,} train photos; {row['note']}"))
    rows += [
        (row["name"], _number(row["plcc"], 4), _number(row["srcc"], 4), "", f"as published: {row['source']}")
        for row in result["published"]
    ]
    without = "without near-duplicates"
    if without in quality:
        rows.append(_compared(f"{bundle['name']}, {without}", quality[without], "this bundle"))
        rows += [
            _compared(f"{name}, {without}", row[without], "as above")
            for name, row in result["baselines"].items()
            if without in row
        ]
    return ["### Beside others", _table(("", "PLCC", "SRCC", "RMSE of 0-1", "source"), rows)]


def _compared(name: str, row: Mapping[str, Any], note: str) -> tuple[str, ...]:
    return name, _with_interval(row, "plcc"), _with_interval(row, "srcc"), _number(row["rmse_unit"], 3), note


def _degradations(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for kind, row in result["ladders"].items():
        low, high = row["srcc_interval"]
        others = {name: fall for name, fall in row["fall"].items() if name not in (row["attribute"], "mos")}
        rival = max(others, key=lambda name, others=others: abs(others[name]))
        rows.append(
            (
                kind,
                row["attribute"],
                _number(row["clean"], 1),
                _number(row["gross"], 1),
                f"{_number(row['srcc'], 3)} [{_number(low, 3)}, {_number(high, 3)}]",
                _number(row["fall"][row["attribute"]], 1),
                f"{rival} {_number(others[rival], 1)}",
                f"{'yes' if row['leads'] else 'no'} ({row['leads_share']:.0%} of photos)",
            )
        )
    lost = f" Lost: {', '.join(result['lost'])}." if result["lost"] else ""
    return [
        "## Degradation ladders",
        f"{result['photos']} photos never trained on, each fault in eight steps from severity 0 to 1. By "
        f"`quality_score` the photo ranks above its own severity 1 in {result['win_rate']:.1%} of {result['pairs']} "
        f"pairs.{lost} Means over the photos; SRCC is that of the fault's own attribute with cleanliness. It leads "
        "where it falls further than any of the other four attributes moves.",
        _table(("fault", "attribute", "clean", "gross", "SRCC", "falls by", "next", "leads"), rows),
        _table(
            ("attribute", "SRCC over its ladders", "leads in all"),
            [
                (name, _number(row["srcc"], 3), "yes" if row["leads"] else "no")
                for name, row in result["attributes"].items()
            ],
        ),
        "![ladders](ladders.png)",
    ]


def _scenes(result: Mapping[str, Any]) -> list[str]:
    low, high = result["interval"]
    train = result["train_photos"]
    origin = "none of them in the dataset's train split" if train == 0 else f"{train} of them in its train split"
    return [
        "## Scenes",
        f"{result['photos']} photos labelled by eye, {origin}: accuracy {_number(result['accuracy'], 3)} "
        f"[{_number(low, 3)}, {_number(high, 3)}], macro-F1 {_number(result['macro_f1'], 3)}.",
        _table(
            ("scene", "photos", "recall", "precision"),
            [
                (name, row["photos"], _number(row["recall"], 2), _number(row["precision"], 2))
                for name, row in result["per_scene"].items()
            ],
        ),
        "![confusion of the scenes](scenes.png)",
    ]


def _agreement(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    correlations = (_with_interval(row, figure) for figure in ("plcc", "srcc", "r2"))
    unit = _number(row["rmse_unit"], 3) if "rmse_unit" in row else ""
    return name, str(row["photos"]), *correlations, _number(row["rmse"], 2), unit


def _with_interval(row: Mapping[str, Any], figure: str) -> str:
    low, high = row["interval"][figure]
    return f"{_number(row[figure], 3)} [{_number(low, 3)}, {_number(high, 3)}]"


def _number(value: float | None, places: int) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{places}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
