"""Which of the scored photos: the best, the worst, those for which a condition holds, those that failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from picinspector import schema
from picinspector.errors import UsageError
from picinspector.tables import Destination, database


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


def choose(dest: Destination, choice: Choice, columns: Sequence[str] = tuple(schema.SCORES.names)) -> pa.Table:
    """Columns of the newest committed scores row of each photo chosen, best first (with `worst`: worst first).

    Photos without a score are left out.

    Raises:
        UsageError: best and worst were both given, the condition is no SQL over this table, or nothing is scored here.
    """
    if choice.best is not None and choice.worst is not None:
        raise UsageError("give best or worst, not both")
    if choice.where is not None and not choice.where.strip():
        raise UsageError("--where is empty; leave it out, or write it like \"scene = 'night' AND quality_score < 4\"")
    count = choice.best if choice.best is not None else choice.worst
    with database() as connection:
        dest.load_latest(connection, "latest", "scores", schema.SCORES.names)
        connection.execute("SET enable_external_access = false")  # the condition is the user's: this table, no files
        rows = connection.table("latest").filter("quality_score IS NOT NULL")
        try:
            if choice.where is not None:
                rows = rows.filter(choice.where)  # one expression, or it is refused
            rows = rows.order("quality_score" + (" ASC, uri" if choice.worst is not None else " DESC, uri"))
            rows = rows.limit(count) if count is not None else rows
            return rows.project(", ".join(f'"{name}"' for name in columns)).to_arrow_table()
        except duckdb.Error as error:
            reason = str(error).splitlines()[0]
            raise UsageError(
                f"--where {choice.where!r} is no condition over the scores ({reason}); write it like "
                "\"scene = 'night' AND quality_score < 4\""
            ) from error


def best(dest: Destination, count: int) -> list[dict[str, Any]]:
    """The photos with the highest `quality_score`, best first: uri, quality_score, scene, scorer_kind, run_id.

    Raises:
        UsageError: nothing has been scored into this destination.
    """
    columns = ["uri", "quality_score", "scene", "scorer_kind", "run_id"]
    return _rows(dest, columns, f"WHERE quality_score IS NOT NULL ORDER BY quality_score DESC, uri LIMIT {int(count)}")


def failures(dest: Destination) -> list[dict[str, Any]]:
    """The photos without a score and why, by kind: uri, error_kind, error_message, run_id.

    Raises:
        UsageError: nothing has been scored into this destination.
    """
    columns = ["uri", "error_kind", "error_message", "run_id"]
    return _rows(dest, columns, "WHERE error_kind IS NOT NULL ORDER BY error_kind, uri")


def _rows(dest: Destination, columns: Sequence[str], clauses: str) -> list[dict[str, Any]]:
    with database() as connection:
        dest.load_latest(connection, "latest", "scores", columns)
        found: list[dict[str, Any]] = connection.sql(f"SELECT * FROM latest {clauses}").to_arrow_table().to_pylist()
    return found
