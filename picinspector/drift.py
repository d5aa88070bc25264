"""What two runs say of the same library: which photos moved, and how far the distributions shifted.

The state as of a run is the newest committed scores row of each photo up to that run. Photos are met by their uri; one
that is gone from the library is in neither state.

Shift is measured by two figures. The population stability index sums `(b - a) ln(b / a)` over the shares of the
photos in bins, which are the deciles of A; that it tells a shift from 0.25 on, and a slight one from 0.1, is a rule of
thumb (Lewis 1994, An Introduction to Credit Scoring; Siddiqi 2006, Credit Risk Scorecards). Few photos give a high
index by chance alone: `psi_by_chance` is what 95 % of samples of one distribution stay below, the quantile of
chi-square with bins - 1 degrees times (1/n + 1/m) (Yurdakul and Naranjo 2020, Journal of Risk Model Validation 14(4)).
The Kolmogorov-Smirnov statistic is the largest distance between the two cumulative distributions; its p-value, in
the limit of many, is that of independent samples, which the same photos twice are not: with them it is too cautious.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import kolmogorov
from scipy.stats import chi2

from picinspector import schema
from picinspector.errors import UsageError
from picinspector.metrics import agreement
from picinspector.tables import Destination, database

#: From where on the population stability index tells of a shift (Lewis 1994; Siddiqi 2006).
PSI_THRESHOLD = 0.25
#: Scenes with fewer photos, before or after, are not looked at alone: ten photos for each of the ten bins.
SCENE_PHOTOS = 100
#: On the scale of 1-10: a photo that moves by more has moved.
MOVED = 0.5

#: Kinds of runs that score photos; others copy the scores there are.
_SCORING = ("score", "rescore", "caption", "fold")
_VALUES = ("quality_score", *(f"attribute_{name}" for name in schema.ATTRIBUTES))
_COLUMNS = ("uri", "image_id", "scorer_fingerprint", "scorer_kind", "scene", *_VALUES)
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
#: The least share of a bin, beside half a photo, which keeps the logarithm finite: a decile that was emptied counts
#: 0.69 with many photos.
_LEAST_SHARE = 1e-4

#: Scenes as of A and as of B, and the photos that are followed from one to the other: by their scene as of A.
_SCENES = """
    WITH shares AS (
        SELECT scene, sum(in_a)::BIGINT AS photos_a, sum(in_b)::BIGINT AS photos_b
        FROM (SELECT scene_a AS scene, 1 AS in_a, 0 AS in_b FROM joined UNION ALL SELECT scene_b, 0, 1 FROM joined)
        WHERE scene IS NOT NULL GROUP BY scene
    ), followed AS (
        SELECT coalesce(scene_a, scene_b) AS scene, avg(change) AS mean_change,
            least(count(quality_score_a), count(quality_score_b)) AS fewest
        FROM joined GROUP BY ALL
    )
    SELECT scene, photos_a, photos_b, photos_a / nullif(sum(photos_a) OVER (), 0) AS share_a,
        photos_b / nullif(sum(photos_b) OVER (), 0) AS share_b, mean_change, coalesce(fewest, 0) AS fewest
    FROM shares LEFT JOIN followed USING (scene) ORDER BY scene
"""


def compare(dest: Destination, run_a: str, run_b: str, count: int = 10) -> dict[str, Any]:
    """What the scores as of run B say other than those as of run A.

    Args:
        dest: the tables.
        run_a, run_b: ids of committed runs, see `run_pair`.
        count: risers and fallers to name.

    Returns:
        what JSON can hold, None for a figure that is undefined:

        - `destination`, `run_a`, `run_b`, `notes` (what makes the two hard to compare, a line each);
        - `counts` of photos: `a`, `b` with a row as of either; `both`, `only_a`, `only_b`; of those in both `changed`
          (other bytes), `other_scorer`, `unchanged` (same bytes, scorer and score) and `compared` (with both scores);
          `failed_a`, `failed_b` (without a score);
        - `moved`: `mean`, `mean_abs`, `quantiles` of quality_score B - A, `share_moved` (by more than `MOVED`),
          `srcc` between the two orders;
        - `risers`, `fallers`: `uri`, `scene`, `quality_score_a`, `quality_score_b`, `change`, most changed first;
        - `shift`: for quality_score and each attribute `photos_a`, `photos_b`, `mean_a`, `mean_b`, `psi`,
          `psi_by_chance`, `ks`, `ks_p`, of all photos;
        - `scenes`: for each `scene`, `photos_a`, `photos_b`, `share_a`, `share_b`, `mean_change`, and `shift` of the
          photos with that scene as of A, or as of B where they are not in A; None with fewer than `SCENE_PHOTOS`;
        - `scene_psi`, `scene_psi_by_chance`: of the distribution over scenes.

    Raises:
        UsageError: nothing was scored up to one of the runs.
    """
    with database() as connection:
        for side, run_id in (("a", run_a), ("b", run_b)):
            dest.load_latest(connection, side, "scores", _COLUMNS, as_of=run_id)
        _join(connection)
        [counts] = _rows(
            connection,
            """
            SELECT count(image_a) AS a, count(image_b) AS b,
                count(*) FILTER (in_both) AS both, count(*) FILTER (image_b IS NULL) AS only_a,
                count(*) FILTER (image_a IS NULL) AS only_b,
                count(*) FILTER (in_both AND image_a <> image_b) AS changed,
                count(*) FILTER (in_both AND scorer_a <> scorer_b) AS other_scorer,
                count(*) FILTER (in_both AND image_a = image_b AND scorer_a = scorer_b
                    AND quality_score_a IS NOT DISTINCT FROM quality_score_b) AS unchanged,
                count(change) AS compared,
                count(image_a) - count(quality_score_a) AS failed_a, count(image_b) - count(quality_score_b) AS failed_b
            FROM (SELECT *, image_a IS NOT NULL AND image_b IS NOT NULL AS in_both FROM joined)
            """,
        )
        kinds = _rows(connection, "SELECT DISTINCT kind_a, kind_b FROM joined WHERE change IS NOT NULL ORDER BY ALL")
        return {
            "destination": dest.url,
            "run_a": run_a,
            "run_b": run_b,
            "notes": _notes(counts, kinds),
            "counts": counts,
            "risers": _movers(connection, "DESC", count),
            "fallers": _movers(connection, "ASC", count),
            **_figures(connection),
        }


def warnings(report: dict[str, Any], threshold: float = PSI_THRESHOLD) -> list[str]:
    """One line for each distribution that shifted by more than a population stability index, and more than by chance.

    Args:
        report: from `compare`.
        threshold: the index.
    """
    lines = []
    groups = [("all photos", report["shift"]), *((f"scene {row['scene']}", row["shift"]) for row in report["scenes"])]
    for where, shift in groups:
        for name, found in (shift or {}).items():
            if _beyond(found["psi"], found["psi_by_chance"], threshold):
                lines.append(
                    f"{name} of {where} shifted: PSI {found['psi']:.2f} (limit {threshold:g}), KS {found['ks']:.2f}, "
                    f"mean {found['mean_a']:.2f} to {found['mean_b']:.2f}, {found['photos_b']:,} photos"
                )
    if _beyond(report["scene_psi"], report["scene_psi_by_chance"], threshold):
        lines.append(f"the distribution over scenes shifted: PSI {report['scene_psi']:.2f} (limit {threshold:g})")
    return lines


def run_pair(dest: Destination, given: Sequence[str] = ()) -> tuple[str, str]:
    """The ids of two committed runs.

    Args:
        dest: the tables.
        given: the ids, or enough of their beginnings to tell them from others; nothing: the two newest that scored.

    Raises:
        UsageError: there are no such runs, or one beginning has several.
    """
    records = dest.runs()
    # What was settled before the last fold is folded: only from there on states are as they were.
    folded = max((record["run_id"] for record in records if record.get("kind") == "fold"), default="")
    records = [record for record in records if record["run_id"] >= folded]
    run_ids = [record["run_id"] for record in records]
    if given:
        first, second = (_find(dest, run_ids, text) for text in given)
        return first, second
    scored: list[str] = []
    for record in reversed(records):
        if record.get("kind") in _SCORING and dest.files(dest.table_path("scores", record["run_id"])):
            scored.insert(0, record["run_id"])
        if len(scored) == 2:
            return scored[0], scored[1]
    raise UsageError(f"{dest.url}: {len(scored)} committed runs wrote scores here, and two make a difference")


def _find(dest: Destination, run_ids: Sequence[str], text: str) -> str:
    exact = [run_id for run_id in run_ids if run_id == text]
    found = exact or [run_id for run_id in run_ids if run_id.startswith(text)]
    if len(found) == 1 and text:
        return found[0]
    if not run_ids:
        raise UsageError(f"{dest.url}: no committed runs here; run `picinspector score` into it first")
    what = f"{len(found)} committed runs begin" if found else "no committed run begins"
    raise UsageError(f"{dest.url}: {what} with {text!r}; the newest are {', '.join(reversed(run_ids[-10:]))}")


# --- two states -------------------------------------------------------------------------------------------------------


def _join(connection: duckdb.DuckDBPyConnection) -> None:
    """Table `joined` of `a` and `b`: a row a photo, with each value of both, null where it has none; `change`."""
    # NaN would be the largest number of all; a broken table is for `verify` to tell.
    sided = [f"{side}.{name}" for name in _VALUES for side in "ab"]
    values = ", ".join(f"CASE WHEN isfinite({name}) THEN {name} END AS {name[2:]}_{name[0]}" for name in sided)
    connection.execute(f"""
        CREATE TABLE joined AS
        SELECT *, quality_score_b - quality_score_a AS change FROM (
            SELECT coalesce(a.uri, b.uri) AS uri, a.image_id AS image_a, b.image_id AS image_b,
                a.scorer_fingerprint AS scorer_a, b.scorer_fingerprint AS scorer_b,
                a.scorer_kind AS kind_a, b.scorer_kind AS kind_b, a.scene AS scene_a, b.scene AS scene_b, {values}
            FROM a FULL JOIN b ON a.uri = b.uri
        )
    """)


def _rows(connection: duckdb.DuckDBPyConnection, query: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = connection.sql(query).to_arrow_table().to_pylist()
    return rows


def _movers(connection: duckdb.DuckDBPyConnection, order: str, count: int) -> list[dict[str, Any]]:
    sign = ">" if order == "DESC" else "<"
    return _rows(
        connection,
        "SELECT uri, coalesce(scene_b, scene_a) AS scene, quality_score_a, quality_score_b, change FROM joined "
        f"WHERE change {sign} 0 ORDER BY change {order}, uri LIMIT {int(count)}",
    )


def _notes(counts: dict[str, Any], kinds: list[dict[str, Any]]) -> list[str]:
    notes = []
    if not counts["compared"]:
        notes.append("no photo has a score in both: nothing can be said of what moved")
    mixed = sorted({(row["kind_a"], row["kind_b"]) for row in kinds if row["kind_a"] != row["kind_b"]})
    for before, after in mixed:
        brightness = "attribute_brightness is luminance where it is zero_shot"
        notes.append(f"scored by {before} in A and by {after} in B, which are two scales; {brightness}")
    return notes


# --- figures ----------------------------------------------------------------------------------------------------------


def _figures(connection: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """`moved`, `shift`, `scenes`, `scene_psi` and `scene_psi_by_chance`; one column at a time is in memory."""
    scenes = _rows(connection, _SCENES)
    figures: dict[str, Any] = {"moved": {}, "shift": {}, "scenes": scenes}
    for row in scenes:
        row["shift"] = {} if row.pop("fewest") >= SCENE_PHOTOS else None
    names = pa.array([row["scene"] for row in scenes], pa.string())
    for value in _VALUES:
        query = f"SELECT {value}_a, {value}_b, coalesce(scene_a, scene_b) FROM joined"
        column_a, column_b, column_scene = connection.sql(query).to_arrow_table().columns
        a, b = (column.to_numpy(zero_copy_only=False) for column in (column_a, column_b))  # null becomes NaN
        scene = pc.index_in(column_scene, value_set=names).fill_null(-1).to_numpy()
        figures["shift"][value] = _shift(a, b)
        if value == "quality_score":
            figures["moved"] = _moved(a, b)
        for code, row in enumerate(scenes):
            if row["shift"] is not None:
                row["shift"][value] = _shift(a[scene == code], b[scene == code])
    before, after = (np.array([row[name] for row in scenes]) for name in ("photos_a", "photos_b"))
    index, by_chance = _psi_of_counts(before, after) if before.any() and after.any() else (None, None)
    return figures | {"scene_psi": index, "scene_psi_by_chance": by_chance}


def psi(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Population stability index of two samples over the deciles of the first, and what it reaches by chance.

    A value that fills a decile or more has a bin of its own, so that constants which differ have nothing in common.

    Args:
        a, b: (N,) and (M,), finite, at least one value each.
    """
    edges, times = np.unique(np.quantile(a, np.linspace(0.1, 0.9, 9)), return_counts=True)
    edges = np.union1d(edges, np.nextafter(edges[times > 1], -np.inf))
    counts = (np.bincount(np.searchsorted(edges, side), minlength=len(edges) + 1) for side in (a, b))
    return _psi_of_counts(*counts)


def _psi_of_counts(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    filled = (a > 0) | (b > 0)
    a, b = a[filled], b[filled]
    share_a, share_b = (np.maximum(side, max(0.5, _LEAST_SHARE * side.sum())) / side.sum() for side in (a, b))
    index = float(np.sum((share_b - share_a) * np.log(share_b / share_a)))
    by_chance = float(chi2.ppf(0.95, len(a) - 1)) * (1 / a.sum() + 1 / b.sum()) if len(a) > 1 else 0.0
    return index, float(by_chance)


def ks(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Two-sample Kolmogorov-Smirnov statistic, 0-1, and its p-value in the limit of many photos.

    `scipy.stats.ks_2samp` gives the same statistic; its p-value costs a tenth of a second for each of 70 distributions,
    and warns of a few photos.

    Args:
        a, b: (N,) and (M,), finite, at least one value each.
    """
    a, b = np.sort(a), np.sort(b)
    steps = (np.searchsorted(a, side, "right") / len(a) - np.searchsorted(b, side, "right") / len(b) for side in (a, b))
    distance = max(float(np.abs(step).max()) for step in steps)
    return distance, float(kolmogorov(distance * np.sqrt(len(a) * len(b) / (len(a) + len(b)))))


def _shift(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """How far B's distribution is from A's; NaN are left out."""
    a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    shift: dict[str, Any] = {
        "photos_a": len(a),
        "photos_b": len(b),
        "mean_a": float(a.mean()) if len(a) else None,
        "mean_b": float(b.mean()) if len(b) else None,
    }
    if not len(a) or not len(b):
        return shift | dict.fromkeys(("psi", "psi_by_chance", "ks", "ks_p"))
    index, by_chance = psi(a, b)
    distance, p = ks(a, b)
    return shift | {"psi": index, "psi_by_chance": by_chance, "ks": distance, "ks_p": p}


def _moved(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    both = np.isfinite(a) & np.isfinite(b)
    if not both.any():
        return dict.fromkeys(("mean", "mean_abs", "quantiles", "share_moved", "srcc"))
    change = b[both] - a[both]
    srcc = agreement(b[both], a[both])["srcc"]
    return {
        "mean": float(change.mean()),
        "mean_abs": float(np.abs(change).mean()),
        "quantiles": {
            str(q): float(value) for q, value in zip(_QUANTILES, np.quantile(change, _QUANTILES), strict=True)
        },
        "share_moved": float((np.abs(change) > MOVED).mean()),
        "srcc": srcc if np.isfinite(srcc) else None,
    }


def _beyond(index: float | None, by_chance: float | None, threshold: float) -> bool:
    return index is not None and by_chance is not None and index > max(threshold, by_chance)
