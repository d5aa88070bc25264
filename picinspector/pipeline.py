"""The jobs: what there is to do, planned and written down, worked out by the chains, checked and committed.

::

    finish the run that was cut short, if it was this command's
    list -> hold against what is committed -> manifest, plan.json
    chains: embed, caption, score, until each table is whole
    run.json: committed
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from picinspector import chains, lease, ledger, logs, plan, runs, schema
from picinspector import prune as retention
from picinspector.bundle import PIECES, Bundle, open_bundle
from picinspector.errors import UsageError
from picinspector.rank import Choice, choose
from picinspector.runs import Options as Options  # callers of the jobs fill it in
from picinspector.stages.score import score_columns
from picinspector.tables import Destination

#: What scoring stored embeddings loads.
_SCORING_PIECES = ("scorer", "attributes", "zero_shot")


def plan_score(library: str, destination: str, options: Options = Options()) -> dict[str, Any]:
    """What `score` would do, as counts; starts no cluster and writes nothing."""
    bundle = open_bundle(options.bundle)
    dest = Destination(destination, options.storage_options)
    drawn = plan.draw_up(library, dest, bundle, options.storage_options, options.retry_failed, options.limit)
    for _ in drawn.shards():
        pass
    return {
        "library": plan.library_name(library),
        "destination": dest.url,
        "bundle": f"{bundle.name} {bundle.version}",
        "scorer_kind": bundle.scorer_kind,
        **drawn.counts,
    }


def score(library: str, destination: str, options: Options = Options()) -> dict[str, Any]:
    """Embed and score every photo of a library that is new, changed, or stale by its encoders.

    A run of this command that was cut short is finished first. Photos that are gone from the library leave the latest
    view; their rows stay.

    Args:
        library: see `manifest.list_library`.
        destination: a prefix or folder; made if it is not there.
        options: see `Options`.

    Returns:
        the run record, committed to the destination; that of the run that was finished, if there was nothing else.

    Raises:
        PicInspectorError: nothing was committed; running the same command again is safe.
    """
    with session(destination, options) as work:
        return work.score(library)


def rescore(destination: str, options: Options = Options()) -> dict[str, Any]:
    """Score the stored embeddings whose latest score is another scorer's than `options.bundle`'s. Reads no photo.

    Returns:
        the run record, committed to the destination.

    Raises:
        PicInspectorError: nothing was committed; running the same command again is safe.
    """
    with session(destination, options, _SCORING_PIECES) as work:
        return work.rescore()


def caption(destination: str, choice: Choice, options: Options = Options()) -> dict[str, Any]:
    """Describe photos that are scored already: their pixels are read once more, their embeddings are not made again.

    The rows chosen are written anew, with their captions, to both tables; those that this captioner has described
    already are left as they are.

    Args:
        destination: where `score` wrote.
        choice: which of its photos.
        options: `limit` is of no use here: `choice` has one.

    Returns:
        the run record, committed to the destination.

    Raises:
        PicInspectorError: nothing was committed; running the same command again is safe.
    """
    with session(destination, options) as work:
        return work.caption(choice)


def prune(
    destination: str, options: Options = Options(), keep_days: float = 30.0, dry_run: bool = False
) -> dict[str, Any]:
    """Fold runs of small files or of superseded rows into one, and remove the runs that newer ones have superseded.

    Args:
        destination: where `score` wrote.
        options: of the cluster; no bundle is used.
        keep_days: every state of the last so many days stays: `diff` can look at it.
        dry_run: say what would be done; needs no lease and no cluster.

    Returns:
        counts, see `prune.describe`.

    Raises:
        PicInspectorError: nothing that is needed was removed; running the same command again is safe.
    """
    dest, cutoff = Destination(destination, options.storage_options), datetime.now(UTC) - timedelta(days=keep_days)
    if dry_run:
        found = retention.survey(dest, cutoff)
        return (
            retention.describe(found.to_fold, found.after_folding) if found is not None else retention.describe([], [])
        )
    with _only_here(dest) as held:
        return _prune(dest, options, cutoff, held)


# --- a session --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def session(destination: str, options: Options, pieces: Sequence[str] = PIECES) -> Iterator[Session]:
    """Have a destination for oneself, with a bundle of which these pieces are whole.

    Raises:
        PicInspectorError: the destination cannot be written, another run is at work there, or the bundle is damaged.
    """
    bundle = open_bundle(options.bundle)
    for piece in set(bundle.pieces) & set(pieces):  # damage is told here, before anything is written, not by a worker
        bundle.piece(piece)
    score_columns(bundle)
    dest = Destination(destination, options.storage_options)
    with _only_here(dest) as held:
        yield Session(bundle, dest, options, held)


@contextlib.contextmanager
def _only_here(dest: Destination) -> Iterator[lease.Lease]:
    dest.check_writable()
    with lease.hold(dest.writer, dest.root, dest.url, dest.local) as held:
        yield held


@dataclass(frozen=True)
class Session:
    """One command at work on a destination."""

    bundle: Bundle
    dest: Destination
    options: Options
    lease: lease.Lease

    def score(self, library: str) -> dict[str, Any]:
        """`pipeline.score`."""
        if self.options.captions:
            self._need_captioner()
        options = self.options
        job = {"captions": options.captions, "limits": asdict(options.limits), "limit": options.limit}

        def draw(record: dict[str, Any], again: bool) -> None:
            # What failed in the run that was just finished has had its try.
            retry: plan.Retry = "none" if again else options.retry_failed
            drawn = plan.draw_up(library, self.dest, self.bundle, options.storage_options, retry, options.limit)
            self.dest.write_manifest(record["run_id"], drawn.shards())
            record["counts"] |= drawn.counts
            # Without any mark an empty file, once: who reads the tables with SQL finds one to read.
            if drawn.marks or not self.dest.has("gone"):
                marks = pa.concat_tables([schema.GONE.empty_table(), *drawn.marks])
                self.dest.write_parquet(f"{self.dest.table_path('gone', record['run_id'])}/0.parquet", marks)

        once = options.limit is not None
        return self._run("score", job | {"retry_failed": options.retry_failed}, plan.library_name(library), draw, once)

    def rescore(self) -> dict[str, Any]:
        """`pipeline.rescore`."""

        def draw(record: dict[str, Any], _: bool) -> None:
            counts: dict[str, int] = record["counts"]
            total = self.dest.write_manifest(record["run_id"], plan.stale(self.dest, self.bundle, counts))
            counts |= {"unmodified": counts["listed"] - counts["other_encoders"] - total, "to_do": total}

        return self._run("rescore", {}, None, draw)

    def caption(self, choice: Choice) -> dict[str, Any]:
        """`pipeline.caption`."""
        self._need_captioner()

        def draw(record: dict[str, Any], _: bool) -> None:
            counts: dict[str, int] = record["counts"]
            if count := sum(shard.num_rows for shard in plan.stale(self.dest, self.bundle, counts)):
                raise UsageError(
                    f"{self.dest.url}: {count} photos have no score of {self._bundle_name()}, and captions are held "
                    "against its heads; run `picinspector rescore` with this bundle first"
                )
            rows = plan.uncaptioned(self.dest, choose(self.dest, choice, ["image_id"]), self.bundle)
            total = self.dest.write_manifest(record["run_id"], [rows] if rows.num_rows else [])
            counts |= {"unmodified": counts["listed"] - total, "to_do": total}

        return self._run("caption", {"choice": asdict(choice), "limits": asdict(self.options.limits)}, None, draw)

    def has_another_scorer(self) -> bool:
        """True if these encoders' photos were scored last by another scorer than the bundle's."""
        bundles = [record["bundle"] for record in self.dest.runs() if record.get("bundle")]
        if not bundles or bundles[-1]["encoder_fingerprint"] != self.bundle.encoder_fingerprint:
            return False
        return bool(bundles[-1]["scorer_fingerprint"] != self.bundle.scorer_fingerprint)

    def prune(self, cutoff: datetime) -> dict[str, Any]:
        """`pipeline.prune`."""
        return _prune(self.dest, self.options, cutoff, self.lease)

    def _need_captioner(self) -> None:
        if not self.bundle.has("captioner"):
            raise UsageError(f"{self._bundle_name()} has no captioner; use another, or --captions none")

    def _bundle_name(self) -> str:
        return f"bundle {self.bundle.name} {self.bundle.version}"

    def _run(
        self,
        kind: str,
        job: dict[str, Any],
        library: str | None,
        draw: Callable[[dict[str, Any], bool], None],
        once: bool = False,
    ) -> dict[str, Any]:
        """Finish the run that was cut short, if it was of this command; then plan one, and carry it out.

        Args:
            kind: of the run.
            job: what it was told, by which it is known again.
            library: its name, where it has one.
            draw: writes the manifest and fills in the record's counts; told whether a run was just finished.
            once: whether a run that was finished is all there is to do.
        """
        job = self._job(kind, job, library)
        finished = self._finish(job)
        if finished is not None and once:
            return finished
        record = self._plan(kind, job, library, draw, finished)
        self._carry_out(record)
        return finished if finished is not None and not record["counts"]["to_do"] else record

    def _job(self, kind: str, job: dict[str, Any], library: str | None) -> dict[str, Any]:
        """What makes a command the same command."""
        bundle = {name: getattr(self.bundle, f"{name}_fingerprint") for name in ("encoder", "scorer")}
        if self.bundle.has("captioner"):
            bundle["caption"] = self.bundle.caption_fingerprint
        return {"kind": kind, "library": library, "bundle": bundle, **job}

    def _finish(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """Finish the run that was cut short, if it was this job's and what it works on is still there."""
        record = self.dest.cut_short()
        if record is None or record.get("job") != job or not self._has_sources(record):
            return None
        logs.set_run(record["run_id"])
        record["times_resumed"] = record.get("times_resumed", 0) + 1
        self.dest.plan(record)
        self._carry_out(record)
        return record

    def _has_sources(self, record: dict[str, Any]) -> bool:
        if record["kind"] == "score" or not record["counts"]["to_do"]:
            return True
        committed = {run["run_id"] for run in self.dest.runs()}
        return ledger.sources(self.dest, record["run_id"], "source_run_id") <= committed

    def _plan(
        self,
        kind: str,
        job: dict[str, Any],
        library: str | None,
        draw: Callable[[dict[str, Any], bool], None],
        finished: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """A new run's record, planned and written down."""
        started, bundle = time.monotonic(), runs.describe_bundle(self.bundle)
        record = runs.new_record(self.dest.new_run_id(), kind, bundle, self.dest.url, library)
        logs.set_run(record["run_id"])
        logs.event("run_started", kind=kind, library=library, destination=self.dest.url)
        libraries = {*plan.libraries_of(self.dest), *([library] if library else [])}
        record |= {"job": job, "libraries": sorted(libraries)}
        if finished is not None:
            record["finished"] = {"run_id": finished["run_id"], "counts": finished["counts"]}
        try:
            draw(record, finished is not None)
            ledger.check_manifest(self.dest, record["run_id"], record["counts"]["to_do"])
        except BaseException:
            with contextlib.suppress(Exception):  # tidiness: nobody would look at it, or resume it
                self.dest.delete(self.dest.run_path(record["run_id"]))
                self.dest.delete(self.dest.table_path("gone", record["run_id"]))
            raise
        record["seconds"]["list"] = time.monotonic() - started
        self.dest.plan(record)
        logs.event("planned", **record["counts"])
        return record

    def _carry_out(self, record: dict[str, Any]) -> None:
        """Work out a planned run's tables and commit it."""
        work = chains.Work(self.dest, record, self.options)
        _work_out(work, [functools.partial(step, work, self.bundle) for step in _STEPS[record["kind"]]], self.lease)


#: Rescoring works on the stored rows that its manifest names; scoring after captions on those that the captions made.
_STEPS: dict[str, tuple[Callable[[chains.Work, Bundle], None], ...]] = {
    "score": (chains.embed, chains.score),
    "rescore": (functools.partial(chains.score, source="source_run_id"),),
    "caption": (chains.caption, chains.score),
}


def _work_out(work: chains.Work, steps: Sequence[Callable[[], None]], held: lease.Lease) -> None:
    """Do the steps of a planned run and commit it."""
    dest, record, started = work.dest, work.record, time.monotonic()
    if work.total:
        for step in steps:
            held.check()
            step()
    record["seconds"]["total"] = record["seconds"]["list"] + time.monotonic() - started
    run_id, unread = record["run_id"], {}  # type: str, dict[str, int]
    if record["kind"] == "caption":
        for error, count in dest.tally("embeddings", "caption_error", run_id).items():
            kind = error.partition(":")[0]
            unread[kind] = unread.get(kind, 0) + count
    errors = dest.tally("scores", "error_kind", run_id)
    runs.finish_record(record, errors, dest.tally("scores", "caption_source", run_id), unread)
    held.check()
    dest.commit(record)
    logs.event("committed", outcome=record["outcome"], **record["counts"])


def _prune(dest: Destination, options: Options, cutoff: datetime, held: lease.Lease) -> dict[str, Any]:
    for run_id in retention.half_removed(dest):
        retention.remove(dest, run_id)
    found = retention.survey(dest, cutoff)
    if found is None:
        return retention.describe([], [])
    folded = found.to_fold
    for run_id in retention.abandoned_folds(dest, found):
        retention.remove(dest, run_id)
    if folded:
        _fold(dest, options, found, held)
        found = retention.survey(dest, cutoff) or found
    for run in found.superseded:
        held.check()
        retention.remove(dest, run.run_id)
    report = retention.describe(folded, found.superseded)
    logs.event("pruned", **report)
    return report


def _fold(dest: Destination, options: Options, found: retention.Survey, held: lease.Lease) -> None:
    """Copy the newest rows of the runs to fold into one; again from where it was cut short."""
    record = dest.planned(found.fold_id)
    if record is None:
        [last] = [record for record in dest.runs() if record["run_id"] == found.runs[-1].run_id]
        record = runs.new_record(found.fold_id, "fold", last.get("bundle"), dest.url, None)
        record["seconds"]["list"] = 0.0
        record |= {"job": found.fold_job, "libraries": plan.libraries_of(dest)}
        record["counts"]["to_do"] = dest.write_manifest(found.fold_id, retention.fold(dest, found))
        if (marks := retention.fold_marks(dest, found)) is not None:
            dest.write_parquet(f"{dest.table_path('gone', found.fold_id)}/0.parquet", marks)
        dest.plan(record)
    work = chains.Work(dest, record, options)
    _work_out(work, [functools.partial(chains.copy, work)], held)
