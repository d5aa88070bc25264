"""Scored photos in order: the best and the worst, by what, of which; and those that failed.

Percentiles are of the newest committed rows of all scored photos: the share of them that a photo is at least as good
as, 0-100, ties counted in. A mix weighs percentiles, not values: nobody has to know that scores end at 10 and
attributes at 100.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import duckdb
import pyarrow as pa

from picinspector import schema
from picinspector.errors import UsageError
from picinspector.manifest import is_list
from picinspector.plan import libraries_of
from picinspector.tables import Destination, database

#: What photos can be ranked by.
MEASURES = ("quality_score", *schema.ATTRIBUTES)

_WHERE = "write it like \"scene = 'night' AND quality_score < 4\""
_BY = f"one of {', '.join(MEASURES)}, or a mix like quality_score=2,sharpness=1"
#: The folder or prefix a photo lies in.
_ALBUM = "regexp_replace(uri, '/[^/]*$', '')"


@dataclass(frozen=True, slots=True)
class Choice:
    """Which scored photos; all of them where nothing is given.

    Attributes:
        best, worst: so many with the highest, or lowest, `quality_score`.
        where: an SQL condition over the columns of the scores table, in DuckDB's dialect; best and worst are of those.
    """

    best: int | None = None
    worst: int | None = None
    where: str | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """An order, and how far down it to go.

    Attributes:
        count: photos at most, of each album or scene with `per`; None is all.
        worst: begin at the other end.
        by: one of `MEASURES`, or a mix of them: `quality_score=2,sharpness=1` is the mean of their percentiles with
            these weights, 0-100. A negative weight prefers what is low.
        scene: only photos of this one.
        where: as in `Choice`; `album`, `value` and the percentiles may be used too.
        per: rank the photos of each album (the folder or prefix they lie in) or scene by themselves.
    """

    count: int | None = 20
    worst: bool = False
    by: str = "quality_score"
    scene: str | None = None
    where: str | None = None
    per: Literal["album", "scene"] | None = None


def choose(dest: Destination, choice: Choice, columns: Sequence[str] = tuple(schema.SCORES.names)) -> pa.Table:
    """Columns of the newest committed scores row of each photo chosen, best first (with `worst`: worst first).

    Photos without a score are left out.

    Raises:
        UsageError: best and worst were both given, the condition is no SQL over this table, or nothing is scored here.
    """
    if choice.best is not None and choice.worst is not None:
        raise UsageError("give best or worst, not both")
    count = choice.best if choice.best is not None else choice.worst
    with _scored(dest, schema.SCORES.names) as rows, _asking(choice.where):
        rows = _filter(rows, choice.where)
        rows = rows.order("quality_score" + (" ASC, uri" if choice.worst is not None else " DESC, uri"))
        rows = rows.limit(count) if count is not None else rows
        return rows.project(", ".join(f'"{name}"' for name in columns)).to_arrow_table()


def rank(dest: Destination, ranking: Ranking = Ranking(), columns: Sequence[str] = ()) -> pa.Table:
    """The photos of a ranking, in its order: with `per` by album or scene, then by rank.

    Args:
        dest: where they were scored.
        ranking: see there.
        columns: of the scores table, besides those that come anyway.

    Returns:
        `rank`, from 1; `uri`, `image_id`, `album`, `scene`; `value`, what `by` comes to; `library_percentile` and
        `scene_percentile` of it; `quality_score`, the attributes, `scorer_kind`, `run_id`; `columns`.

    Raises:
        UsageError: an unknown measure or scene, the condition is no SQL over this table, or nothing is scored here.
    """
    _check_scene(ranking.scene)
    value, order = value_of(ranking.by), "ASC" if ranking.worst else "DESC"
    attributes = [f"attribute_{name}" for name in schema.ATTRIBUTES]
    given = ["uri", "image_id", "album", "scene", "value", "library_percentile", "scene_percentile", "quality_score"]
    wanted = [*dict.fromkeys([*given, *attributes, "scorer_kind", "run_id", *columns])]
    with _scored(dest, [*schema.SCORES.names, "run_id"]) as rows, _asking(ranking.where):
        rows = rows.project(f"*, {_ALBUM} AS album, {value} AS value").filter("value IS NOT NULL AND NOT isnan(value)")
        rows = rows.project(
            "*, 100 * cume_dist() OVER (ORDER BY value) AS library_percentile, "
            "100 * cume_dist() OVER (PARTITION BY scene ORDER BY value) AS scene_percentile"
        )
        if ranking.scene is not None:
            rows = rows.filter(f"scene = '{ranking.scene}'")
        by = f"PARTITION BY {ranking.per} " if ranking.per else ""
        rows = _filter(rows, ranking.where).project(
            f"row_number() OVER ({by}ORDER BY value {order}, uri) AS rank, " + ", ".join(f'"{name}"' for name in wanted)
        )
        rows = rows.filter(f"rank <= {ranking.count}") if ranking.count is not None else rows
        return rows.order(f"{ranking.per}, rank" if ranking.per else "rank").to_arrow_table()


def value_of(by: str) -> str:
    """`Ranking.by` as SQL over the scores table.

    Raises:
        UsageError: it names no measure, or its weights are no numbers.
    """
    if by in MEASURES:
        return _column(by)
    terms, total = [], 0.0
    for part in by.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*=\s*([-+]?\d*\.?\d+)\s*", part)
        if found is None or found[1] not in MEASURES:
            raise UsageError(f"--by {by}: {part.strip()!r} is no measure; give {_BY}")
        column = _column(found[1])
        terms.append(
            f"CASE WHEN {column} IS NOT NULL THEN {float(found[2])!r} * 100 * cume_dist() OVER (ORDER BY {column}) END"
        )
        total += abs(float(found[2]))
    if not math.isfinite(total):
        raise UsageError(f"--by {by}: a weight is too large; give {_BY}")
    if not total:
        raise UsageError(f"--by {by}: all weights are 0; give {_BY}")
    return f"({' + '.join(terms)}) / {total!r}"


def failures(dest: Destination) -> list[dict[str, Any]]:
    """The photos without a score and why, by kind: uri, error_kind, error_message, run_id.

    Raises:
        UsageError: nothing has been scored into this destination.
    """
    columns = ["uri", "error_kind", "error_message", "run_id"]
    with database() as connection:
        dest.load_latest(connection, "latest", "scores", columns)
        rows = connection.sql("SELECT * FROM latest WHERE error_kind IS NOT NULL ORDER BY error_kind, uri")
        found: list[dict[str, Any]] = rows.to_arrow_table().to_pylist()
    return found


def outermost(dest: Destination) -> list[str]:
    """URIs whose common parent is that of the library, or of all photos where a list named them.

    Raises:
        UsageError: nothing has been scored into this destination.
    """
    libraries = libraries_of(dest)
    if libraries and not any(is_list(library) for library in libraries):
        return [f"{library.rstrip('/')}/*" for library in sorted(libraries)]
    with database() as connection:
        dest.load_latest(connection, "latest", "scores", ["uri"])
        found = connection.execute("SELECT min(uri), max(uri) FROM latest").fetchone() or ()
    return [str(uri) for uri in found if uri is not None]


def _column(measure: str) -> str:
    return measure if measure == "quality_score" else f"attribute_{measure}"


def _check_scene(scene: str | None) -> None:
    if scene is not None and scene not in schema.SCENES:
        raise UsageError(f"--scene {scene}: no such scene; give one of {', '.join(schema.SCENES)}")


@contextlib.contextmanager
def _scored(dest: Destination, columns: Sequence[str]) -> Iterator[duckdb.DuckDBPyRelation]:
    with database() as connection:
        dest.load_latest(connection, "latest", "scores", columns)
        connection.execute("SET enable_external_access = false")  # a condition is the user's: this table, no files
        yield connection.table("latest").filter("quality_score IS NOT NULL AND NOT isnan(quality_score)")


def _filter(rows: duckdb.DuckDBPyRelation, where: str | None) -> duckdb.DuckDBPyRelation:
    if where is not None and not where.strip():
        raise UsageError(f"--where is empty; leave it out, or {_WHERE}")
    return rows.filter(where) if where is not None else rows  # one expression, or it is refused


@contextlib.contextmanager
def _asking(where: str | None) -> Iterator[None]:
    try:
        yield
    except duckdb.Error as error:
        if where is None:
            raise
        reason = str(error).splitlines()[0]
        raise UsageError(f"--where {where!r} is no condition over the scores ({reason}); {_WHERE}") from error
