"""Retention: rows that newer ones have superseded, the folders of runs that have no others, and many small files.

Only what is settled is looked at: the runs up to the last one before a cutoff. What counts there is the newest row of
each photo as of that last run, so that every state since then stays as it was. Runs of small files or of mostly
superseded rows are folded: their newest rows are copied into one run, whose id sorts right after that of the last
settled one, and before every later one. Then each settled run without a newest row, in any table, is removed. Photos
that are gone keep their rows. What was never committed is not touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import pyarrow as pa

from picinspector import schema
from picinspector.tables import GONE, Destination, TableName, database, time_of

#: A run with fewer rows a file is folded, if there are several files of that kind in all ...
_SMALL_FILE_ROWS = 4096
#: ... and one of which this share is superseded.
_DEAD_SHARE = 0.25
#: Copying fewer of them wins nothing.
_FEW_FILES = 8
_SHARD_ROWS = 100_000
_REMOVED = "removed.json"
_TABLES: tuple[TableName, ...] = ("embeddings", "scores", "gone")

#: What a run that folds has to do: which row of each table to copy.
FOLD = schema.MANIFEST.append(pa.field("embeddings_run_id", pa.string(), False)).append(
    pa.field("scores_run_id", pa.string(), False)
)


@dataclass(frozen=True, slots=True)
class RunState:
    """One settled run.

    Attributes:
        run_id: its id.
        rows, newest: of all its tables: how many, and how many of them are the newest of their photo.
        dead_share: of its embeddings, or of its scores where it has no embeddings, those that are not.
        files: of its embeddings and scores.
        size_bytes: of all its tables.
    """

    run_id: str
    rows: int = 0
    newest: int = 0
    dead_share: float = 0.0
    files: int = 0
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Survey:
    """The settled part of a destination.

    Attributes:
        runs: its runs, oldest first.
        last: the id of the newest run of all, settled or not, which stays.
    """

    runs: tuple[RunState, ...]
    last: str

    @property
    def superseded(self) -> list[RunState]:
        """Runs that no state since the cutoff needs."""
        return [run for run in self.runs if not run.newest and run.run_id != self.last]

    @property
    def to_fold(self) -> list[RunState]:
        """Runs whose newest rows belong into fewer files, or away from their dead."""
        alive = [run for run in self.runs if run.newest and run.files]
        small = [run for run in alive if run.rows < _SMALL_FILE_ROWS * run.files]
        if sum(run.files for run in small) < _FEW_FILES:
            small = []
        return [run for run in alive if run in small or run.dead_share >= _DEAD_SHARE]

    @property
    def after_folding(self) -> list[RunState]:
        """Runs that will be superseded once folding is done."""
        return [*self.superseded, *(run for run in self.to_fold if run.run_id != self.fold_id)]

    @property
    def fold_id(self) -> str:
        """The id of the run that folds: right behind the last settled run, before all that came later."""
        return f"{self.runs[-1].run_id}.fold"

    @property
    def fold_job(self) -> dict[str, Any]:
        """What the run that folds is to do: by it one that was cut short is known again."""
        return {"kind": "fold", "runs": [run.run_id for run in self.to_fold], "of": [run.run_id for run in self.runs]}


def survey(dest: Destination, cutoff: datetime) -> Survey | None:
    """Look at the runs that began before `cutoff`; None if there are none."""
    committed = [record["run_id"] for record in dest.runs()]
    settled = [run_id for run_id in committed if (began := time_of(run_id)) is not None and began < cutoff]
    if not settled:
        return None
    states = {run_id: RunState(run_id) for run_id in settled}
    for table in _TABLES:
        for run_id, newest, rows in _newest_by_run(dest, table, settled):
            state = states[run_id]
            dead = (
                1 - newest / rows
                if table == "embeddings" or (table == "scores" and not state.rows)
                else state.dead_share
            )
            states[run_id] = replace(state, rows=state.rows + rows, newest=state.newest + newest, dead_share=dead)
        for path in dest.files_of(table, settled):
            run_id = path.rsplit("/", 2)[-2].removeprefix("run_id=")
            state, counted = states[run_id], table != "gone"
            size = state.size_bytes + int(dest.filesystem.size(path) or 0)
            states[run_id] = replace(state, files=state.files + counted, size_bytes=size)
    return Survey(tuple(states.values()), committed[-1])


def _newest_by_run(dest: Destination, table: TableName, run_ids: Sequence[str]) -> list[tuple[str, int, int]]:
    """Of each run that wrote a table: its id, how many of its rows are the newest of their photo, how many it has."""
    key = "image_id" if table == "gone" else "uri"
    source = dest.scan(table, run_ids, [key, "run_id"])
    if source is None:
        return []
    with database(source=source) as connection:
        rows = connection.sql(
            f"SELECT run_id, count(*) FILTER (run_id = newest), count(*) FROM (SELECT run_id::VARCHAR AS run_id, "
            f"max(run_id::VARCHAR) OVER (PARTITION BY md5_number({key})) AS newest FROM source) GROUP BY 1"
        ).fetchall()
    return [(str(run_id), int(newest), int(total)) for run_id, newest, total in rows]


def fold(dest: Destination, found: Survey) -> Iterator[pa.Table]:
    """Rows of `FOLD`: the photos with a newest row in a run to fold, and where their newest rows are."""
    settled = [run.run_id for run in found.runs]
    folded = pa.table({"run_id": [run.run_id for run in found.to_fold]})
    embeddings = dest.scan("embeddings", settled, [*schema.MANIFEST.names, "run_id"])
    scores = dest.scan("scores", settled, ["image_id", "uri", "run_id"])
    names = ", ".join(f"row.{name}" for name in schema.MANIFEST.names)
    row = ", ".join(f"'{name}': {name}" for name in (*schema.MANIFEST.names, "run_id"))
    with database(embeddings=embeddings, scores=scores, folded=folded) as connection:
        connection.execute(
            f"CREATE TABLE newest AS SELECT arg_max({{{row}}}, run_id::VARCHAR) AS row "
            "FROM embeddings GROUP BY md5_number(uri)"
        )
        connection.execute(
            "CREATE TABLE scored AS SELECT arg_max(image_id, run_id::VARCHAR) AS image_id, "
            "max(run_id::VARCHAR) AS run_id FROM scores GROUP BY md5_number(uri)"
        )
        rows = connection.sql(
            f"SELECT {names}, row.run_id::VARCHAR AS embeddings_run_id, scored.run_id AS scores_run_id "
            "FROM newest JOIN scored ON row.image_id = scored.image_id "
            "WHERE row.run_id::VARCHAR IN (FROM folded) OR scored.run_id IN (FROM folded)"
        )
        for batch in rows.to_arrow_reader(_SHARD_ROWS):
            if batch.num_rows:
                yield pa.Table.from_batches([batch]).cast(FOLD)


def fold_marks(dest: Destination, found: Survey) -> pa.Table | None:
    """Marks for the run that folds: of photos whose row or newest mark it takes over, whether they are gone.

    A row that moves behind its mark would come back otherwise, and one that is there beside an old mark would vanish.
    """
    settled, folded = [run.run_id for run in found.runs], pa.table({"run_id": [run.run_id for run in found.to_fold]})
    marks = dest.marks(settled)
    if marks is None:
        return None
    rows = dest.scan("embeddings", settled, ["uri", "image_id", "run_id"])
    scores = dest.scan("scores", settled, ["uri", "run_id"])
    with database(rows=rows, scores=scores, marks=marks, folded=folded) as connection:
        taken = connection.sql(
            "WITH newest AS (SELECT md5_number(uri) AS key, arg_max(image_id, run_id::VARCHAR) AS image_id, "
            "max(run_id::VARCHAR) AS run_id FROM rows GROUP BY 1), "
            "scored AS (SELECT md5_number(uri) AS key, max(run_id::VARCHAR) AS scored_in FROM scores GROUP BY 1) "
            f"SELECT newest.image_id, {GONE.format('newest')} AS gone, marks.scorer_fingerprint "
            "FROM newest JOIN scored USING (key) JOIN marks ON newest.image_id = marks.image_id "
            "WHERE newest.run_id IN (FROM folded) OR scored_in IN (FROM folded) OR marks.run_id IN (FROM folded)"
        ).to_arrow_table()
    return taken.cast(schema.GONE) if taken.num_rows else None


def remove(dest: Destination, run_id: str) -> None:
    """Remove a superseded run: uncommit it, under a mark by which `half_removed` finds it, then all it wrote."""
    dest.write_json(f"{dest.run_path(run_id)}/{_REMOVED}", {"run_id": run_id})
    for name in ("run.json", "plan.json"):
        dest.delete(f"{dest.run_path(run_id)}/{name}")
    for table in _TABLES:
        dest.delete(dest.table_path(table, run_id))
    dest.delete(dest.run_path(run_id))


def half_removed(dest: Destination) -> list[str]:
    """Runs whose removal was cut short."""
    return [run_id for run_id in dest.uncommitted() if dest.filesystem.exists(f"{dest.run_path(run_id)}/{_REMOVED}")]


def abandoned_folds(dest: Destination, found: Survey) -> list[str]:
    """Folds that were cut short and are not the one to do now: they hold copies, as large as the embeddings."""
    ids = [run_id for run_id in dest.uncommitted() if run_id.endswith(".fold")]
    plans = {run_id: dest.planned(run_id) for run_id in ids}
    return [run_id for run_id, plan in plans.items() if plan is None or plan["job"] != found.fold_job]


def describe(folded: Sequence[RunState], removed: Sequence[RunState]) -> dict[str, Any]:
    """What pruning did, or would do, for a person and a record. Bytes are those of the runs removed, not net."""
    return {
        "runs_folded": len(folded),
        "files_folded": sum(run.files for run in folded),
        "runs_removed": len(removed),
        "bytes_removed": sum(run.size_bytes for run in removed),
    }
