"""What a report says: figures over all photos, and the few photos that are shown, both from the tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import duckdb
import pyarrow as pa

from picinspector import schema
from picinspector.errors import ErrorKind
from picinspector.feedback import MOS_PER_POINT, TARGET, Suggestion, suggest
from picinspector.groups import load as load_groups
from picinspector.selection import load as load_selection
from picinspector.tables import Destination, database

#: Bars of the histogram: quarters of a point from 1 to 10.
BINS, BIN_WIDTH = 36, 0.25
#: Photos of a group that are shown, the pick first.
GROUP_MEMBERS = 12
#: Photos of an error kind that are named.
ERROR_EXAMPLES = 8
#: Of those that could gain most by their attributes alone, so many times more are looked at as are shown: the
#: suggestions of a photo take the three largest gains only, and leave out what no advice would change.
_CANDIDATES = 10

_FACTS = tuple(name for name in schema.FACTS.names if name not in ("content_hash", "phash"))
_ATTRIBUTES = tuple(f"attribute_{name}" for name in schema.ATTRIBUTES)
_NO_SELECTION = pa.schema([("image_id", pa.string()), ("rank", pa.int64())])
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True, slots=True)
class Sections:
    """How many photos of which kind are shown.

    Attributes:
        photos: in all, at most. What the others leave is spread evenly over the ranking.
        best, worst: by `quality_score`.
        selected: of the selection that `curate` made, in its order; a quarter of `photos` at most.
        borderline: closest to the score above which there are as many photos as were selected; without a selection,
            to the median.
        improvable: with the largest gain that their suggestions promise.
        groups: groups of more than one photo, the largest first. Their members take half of `photos` at most.
    """

    photos: int = 2000
    selected: int = 500
    best: int = 60
    worst: int = 60
    borderline: int = 60
    improvable: int = 60
    groups: int = 200


@dataclass(slots=True)
class Digest:
    """What the page shows.

    Attributes:
        summary: figures over all photos: see `_summary`.
        photos: a row each, by what it was chosen for; see `_photo`.
        views: for `selected`, `best`, `worst`, `borderline`, `improvable` the places in `photos`, in the view's order.
        groups: group_id, kind, size, and the places of the members that are shown, the pick first.
        errors: by kind, most first: kind, count, transient, examples (uri, message).
        runs: records of the committed runs, newest first, and how many rows of the ranking each gave.
    """

    summary: dict[str, Any]
    photos: list[dict[str, Any]] = field(default_factory=list)
    views: dict[str, list[int]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)


def digest(dest: Destination, sections: Sections = Sections()) -> Digest:
    """Read the newest committed rows of a destination, and choose what to show.

    Raises:
        UsageError: nothing is scored here, or an older version wrote the tables.
    """
    with database() as connection:
        dest.load_latest(connection, "scores", "scores", [*schema.SCORES.names, "run_id"])
        dest.load_latest(connection, "facts", "embeddings", ["image_id", *_FACTS, *schema.MEASUREMENT_FIELDS.names])
        connection.register("known_groups", load_groups(dest) or schema.GROUPS.empty_table())
        selection = load_selection(dest) or _NO_SELECTION.empty_table()
        as_of = (selection.schema.metadata or {}).get(b"as_of", b"").decode()
        connection.register("known_selection", selection.select(_NO_SELECTION.names))
        _rank(connection)
        found = Digest(_summary(connection))
        found.summary["selection_is_old"] = bool(as_of) and as_of != dest.newest()
        found.errors = _errors(connection)
        found.runs = _runs(dest, connection)
        _choose(connection, found, sections)
    return found


def _rank(connection: duckdb.DuckDBPyConnection) -> None:
    """Make the table `ranked`: one narrow row for each photo with a score, `place` 0 is the best."""
    # What its suggestions promise at most: every attribute raised to `TARGET`. `feedback` has the exact figure.
    zero_shot = "scorer_kind = 'zero_shot'"
    gains = " + ".join(
        f"greatest(0, {TARGET} - coalesce(attribute_{name}, {TARGET})) * {weight}"
        for name, weight in MOS_PER_POINT.items()
    )
    connection.execute(f"""
        CREATE TABLE ranked AS SELECT scores.image_id, scores.uri, quality_score, scene,
            row_number() OVER (ORDER BY quality_score DESC, scores.uri) - 1 AS place,
            100 * cume_dist() OVER (ORDER BY quality_score) AS percentile,
            100 * cume_dist() OVER (PARTITION BY scene ORDER BY quality_score) AS scene_percentile,
            CASE WHEN {zero_shot} THEN 0 ELSE {gains} END AS most_gain,
            group_kind, group_id, group_size, rank_in_group, reason, known_selection.rank AS selected
        FROM scores LEFT JOIN known_groups USING (image_id) LEFT JOIN known_selection USING (image_id)
        WHERE quality_score IS NOT NULL AND NOT isnan(quality_score)
    """)


# --- figures over all photos ------------------------------------------------------------------------------------------


def _summary(connection: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """Counts, quantiles, the histogram and the scenes."""
    rows = _rows(connection, f"""
        SELECT count(*) AS scored, quantile_cont(quality_score, {list(_QUANTILES)}) AS quantiles,
            count(*) FILTER (WHERE group_size > 1) AS grouped, count(group_id) AS group_known,
            count(DISTINCT CASE WHEN group_size > 1 THEN group_id END) AS groups,
            count(*) FILTER (WHERE group_size > 1 AND rank_in_group > 1) AS not_picked,
            count(selected) AS selected
        FROM ranked
    """)  # fmt: skip
    facts = _rows(
        connection,
        """
        SELECT count(*) AS photos, count(error_kind) AS failed, coalesce(sum(size_bytes), 0)::BIGINT AS size_bytes,
            count(quality_low) FILTER (WHERE error_kind IS NULL) AS with_interval,
            count(caption) AS captions FROM scores
    """,
    )
    bins = _rows(
        connection,
        f"""
        SELECT least({BINS - 1}, greatest(0, floor((quality_score - 1) / {BIN_WIDTH})))::INT AS bin, count(*) AS count
        FROM ranked GROUP BY 1
    """,
    )
    counts = {row["bin"]: row["count"] for row in bins}
    kinds = _rows(
        connection,
        """
        SELECT scorer_kind, count(*) AS count FROM scores WHERE error_kind IS NULL GROUP BY 1 ORDER BY 2 DESC, 1
    """,
    )
    kind = kinds[0]["scorer_kind"] if kinds else ""
    return {
        **rows[0],
        **facts[0],
        "histogram": [counts.get(bin, 0) for bin in range(BINS)],
        "scenes": _rows(connection, """
            SELECT scene, count(*) AS count, median(quality_score)::DOUBLE AS median FROM ranked
            WHERE scene IS NOT NULL GROUP BY 1 ORDER BY 2 DESC, 1
        """),
        "attributes": _attributes(connection, kind),
        "group_kinds": _rows(connection, """
            SELECT group_kind AS kind, count(DISTINCT group_id) AS groups, count(*) AS photos FROM ranked
            WHERE group_size > 1 GROUP BY 1 ORDER BY 1
        """),
        "scorer_kind": kind,
        "scorer_kinds": {row["scorer_kind"]: row["count"] for row in kinds},
        "labels": schema.labels_of(kind),
        "scorer_fingerprints": [row["scorer_fingerprint"] for row in _rows(connection, """
            SELECT DISTINCT scorer_fingerprint FROM scores WHERE error_kind IS NULL ORDER BY 1
        """)],
    }  # fmt: skip


def _attributes(connection: duckdb.DuckDBPyConnection, scorer_kind: str) -> list[dict[str, Any]]:
    """Quantiles of each attribute over all photos."""
    parts = ", ".join(f"quantile_cont({name}, {list(_QUANTILES)}) AS {name}" for name in _ATTRIBUTES)
    [row] = _rows(connection, f"SELECT {parts} FROM scores WHERE error_kind IS NULL")
    return [
        {"name": name, "label": label, "quantiles": row[f"attribute_{name}"]}
        for name, label in schema.labels_of(scorer_kind).items()
        if row[f"attribute_{name}"] is not None
    ]


def _errors(connection: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    kinds = _rows(
        connection,
        """
        SELECT error_kind AS kind, count(*) AS count FROM scores WHERE error_kind IS NOT NULL
        GROUP BY 1 ORDER BY 2 DESC, 1
    """,
    )
    examples = _rows(
        connection,
        f"""
        SELECT error_kind, uri, error_message AS message FROM scores WHERE error_kind IS NOT NULL
        QUALIFY row_number() OVER (PARTITION BY error_kind ORDER BY uri) <= {ERROR_EXAMPLES} ORDER BY error_kind, uri
    """,
    )
    known = {kind.value: kind.transient for kind in ErrorKind}
    return [
        {
            **kind,
            "transient": known.get(kind["kind"], False),
            "examples": [row for row in examples if row["error_kind"] == kind["kind"]],
        }
        for kind in kinds
    ]


def _runs(dest: Destination, connection: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    rows = _rows(connection, "SELECT run_id, count(*) AS count FROM scores GROUP BY 1")
    counts = {row["run_id"]: row["count"] for row in rows}
    return [{**record, "rows_shown": counts.get(record["run_id"], 0)} for record in reversed(dest.runs())]


# --- the photos that are shown ----------------------------------------------------------------------------------------


def _choose(connection: duckdb.DuckDBPyConnection, found: Digest, sections: Sections) -> None:
    """Fill `photos`, `views` and `groups`."""
    summary, cap = found.summary, max(0, sections.photos)
    median = summary["quantiles"][2] if summary["scored"] else None
    summary["cut"] = _cut(connection, summary["selected"]) if summary["selected"] else median
    each = max(1, cap // 8)  # of four views: half of the page at most
    chosen: dict[str, None] = {}  # uris, in the order of what they were chosen for
    views = {
        "selected": _uris(
            connection, "WHERE selected IS NOT NULL ORDER BY selected", min(sections.selected, max(1, cap // 4))
        ),
        "best": _uris(connection, "ORDER BY place", min(sections.best, each)),
        "worst": _uris(connection, "ORDER BY place DESC", min(sections.worst, each)),
        "borderline": _uris(
            connection, f"ORDER BY abs(quality_score - {summary['cut'] or 0.0}), place", min(sections.borderline, each)
        ),
        "improvable": _improvable(connection, min(sections.improvable, each)),
    }
    for uris in views.values():
        chosen |= dict.fromkeys(uris)
    chosen = dict.fromkeys([*chosen][:cap])
    groups = _groups(connection, sections.groups, min(cap // 2, cap - len(chosen)))
    for group in groups:
        chosen |= dict.fromkeys(group["uris"])
    spread = _spread(connection, chosen, cap - len(chosen))
    chosen |= dict.fromkeys(spread)
    place = {uri: index for index, uri in enumerate(chosen)}
    found.photos = _photos(connection, [*chosen])
    found.views = {name: [place[uri] for uri in uris if uri in place] for name, uris in views.items()}
    found.groups = [
        {"id": group["group_id"], "kind": group["group_kind"], "size": group["group_size"],
         "members": [place[uri] for uri in group["uris"]]}
        for group in groups
    ]  # fmt: skip
    for index, group in enumerate(found.groups):
        for member in group["members"]:
            found.photos[member]["group"] = index
    summary["spread"] = len(spread)


def _cut(connection: duckdb.DuckDBPyConnection, selected: int) -> float:
    [row] = _rows(connection, f"SELECT quality_score FROM ranked WHERE place = {selected - 1}")
    return float(row["quality_score"])


def _uris(connection: duckdb.DuckDBPyConnection, order: str, count: int) -> list[str]:
    return [row["uri"] for row in _rows(connection, f"SELECT uri FROM ranked {order} LIMIT {max(0, count)}")]


def _improvable(connection: duckdb.DuckDBPyConnection, count: int) -> list[str]:
    """Those whose suggestions promise most, the largest gain first."""
    rows = _rows(
        connection,
        f"""
        SELECT scores.*, facts.* EXCLUDE (image_id) FROM (
            SELECT uri FROM ranked WHERE most_gain > 0 ORDER BY most_gain DESC, uri LIMIT {max(0, count) * _CANDIDATES}
        ) JOIN scores USING (uri) LEFT JOIN facts ON facts.image_id = scores.image_id
    """,
    )
    gains = {row["uri"]: sum(suggestion.gain for suggestion in _suggestions(row)) for row in rows}
    return [uri for uri in sorted(gains, key=lambda uri: (-gains[uri], uri)) if gains[uri] > 0][:count]


def _groups(connection: duckdb.DuckDBPyConnection, count: int, members: int) -> list[dict[str, Any]]:
    """The largest groups with the uris of their first members; not more than `members` photos in all."""
    rows = _rows(
        connection,
        f"""
        WITH largest AS (
            SELECT group_id, max(group_size) AS size FROM ranked WHERE group_size > 1 GROUP BY 1
            ORDER BY 2 DESC, 1 LIMIT {max(0, count)}
        )
        SELECT group_id, group_kind, group_size, uri FROM ranked JOIN largest USING (group_id)
        WHERE rank_in_group <= {GROUP_MEMBERS} ORDER BY size DESC, group_id, rank_in_group, uri
    """,
    )
    groups: dict[str, dict[str, Any]] = {}
    for row in rows:
        groups.setdefault(row["group_id"], {**row, "uris": []})["uris"].append(row["uri"])
    whole, left = [], members
    for group in groups.values():
        left -= len(group["uris"])
        if left < 0:
            break
        whole.append(group)
    return whole


def _spread(connection: duckdb.DuckDBPyConnection, chosen: Iterable[str], count: int) -> list[str]:
    """So many of the others, at even steps of the ranking."""
    if count <= 0:
        return []
    taken = pa.table({"uri": pa.array([*chosen], pa.string())})
    connection.register("taken", taken)
    found = _rows(
        connection,
        f"""
        WITH others AS (
            SELECT uri, row_number() OVER (ORDER BY place) - 1 AS step, count(*) OVER () AS others
            FROM ranked ANTI JOIN taken USING (uri)
        )
        SELECT uri FROM others
        WHERE others <= {count} OR step * {count} // others <> (step - 1) * {count} // others OR step = 0
        ORDER BY step LIMIT {count}
    """,
    )
    connection.unregister("taken")
    return [row["uri"] for row in found]


def _photos(connection: duckdb.DuckDBPyConnection, uris: Sequence[str]) -> list[dict[str, Any]]:
    """What is shown of each of these photos, in their order."""
    connection.register("wanted", pa.table({"uri": pa.array(uris, pa.string()), "place_shown": range(len(uris))}))
    rows = _rows(
        connection,
        """
        SELECT scores.*, facts.* EXCLUDE (image_id), percentile, scene_percentile, ranked.place, group_kind, group_id,
            group_size, rank_in_group, reason, selected
        FROM wanted JOIN scores USING (uri) JOIN ranked USING (uri)
        LEFT JOIN facts ON facts.image_id = scores.image_id ORDER BY place_shown
    """,
    )
    connection.unregister("wanted")
    return [_photo(row) for row in rows]


def _photo(row: Mapping[str, Any]) -> dict[str, Any]:
    """One photo as the page has it: columns of the tables, and what follows from them."""
    gains = {suggestion.text: suggestion for suggestion in _suggestions(row)}
    suggestions = [
        {"text": text, "gain": gains[text].gain if text in gains else None} for text in row["suggestions"] or ()
    ]
    names = ("uri", "etag", "size_bytes", "quality_score", "quality_low", "quality_high", "percentile", "place")
    return {
        **{name: row[name] for name in (*names, "scene_percentile", "scene", "caption", "caption_source", *_FACTS)},
        "attributes": [row[name] for name in _ATTRIBUTES],
        "scene_probability": row[f"scene_{row['scene']}"] if row["scene"] in schema.SCENES else None,
        "suggestions": suggestions,
        "gain": sum(suggestion.gain for suggestion in gains.values()),  # by today's rules, as `improvable` is
        "group": None,
        "selected": row["selected"],
        "rank_in_group": row["rank_in_group"] if (row["group_size"] or 0) > 1 else None,
        "reason": row["reason"],
    }


def _suggestions(row: Mapping[str, Any]) -> list[Suggestion]:
    """What `feedback` says of a photo, with the gains that the tables do not hold."""
    if row["scorer_kind"] == "zero_shot":  # its attributes are not those that `feedback` knows
        return []
    attributes = {name: row[f"attribute_{name}"] for name in schema.ATTRIBUTES}
    measured = {name: row[f"measured_{name}"] for name in schema.MEASUREMENTS}
    return suggest(attributes, measured, row, row["scene"] or "")


def _rows(connection: duckdb.DuckDBPyConnection, query: str) -> list[dict[str, Any]]:
    """Rows of a query as plain data; numbers that are none (NaN, infinite) as None."""
    rows: list[dict[str, Any]] = connection.sql(query).to_arrow_table().to_pylist()
    return [{name: _known(value) for name, value in row.items()} for row in rows]


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
