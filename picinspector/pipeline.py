"""The jobs: what there is to do, planned and written down, worked out by the chains, checked and committed.

::

    finish the run that was cut short, if it was this command's
    list -> hold against what is committed -> manifest, plan.json
    chains: embed, caption, score, until each table is whole
    run.json: committed
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from picinspector import chains, lease, ledger, logs, plan, runs
from picinspector.bundle import Bundle, open_bundle
from picinspector.choice import Choice, choose
from picinspector.errors import UsageError
from picinspector.runs import Options as Options  # callers of the jobs fill it in
from picinspector.stages.score import score_columns
from picinspector.storage import is_local, local_path, redact
from picinspector.tables import Destination


def plan_score(library: str, destination: str, options: Options = Options()) -> dict[str, Any]:
    """What `score` would do, as counts; starts no cluster and writes nothing."""
    bundle = open_bundle(options.bundle)
    dest = Destination(destination, options.storage_options)
    drawn = _draw_up(library, dest, bundle, options)
    for _ in drawn.shards():
        pass
    return {
        "library": _name(library),
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
    with _session(destination, options) as session:
        return session.score(library)


def rescore(destination: str, options: Options = Options()) -> dict[str, Any]:
    """Score the stored embeddings whose latest score is another scorer's than `options.bundle`'s. Reads no photo.

    Returns:
        the run record, committed to the destination.

    Raises:
        PicInspectorError: nothing was committed; running the same command again is safe.
    """
    with _session(destination, options) as session:
        return session.rescore()


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
    with _session(destination, options) as session:
        return session.caption(choice)


# --- a session --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _session(destination: str, options: Options) -> Iterator[_Session]:
    """A destination for oneself, and a bundle that is whole."""
    bundle = open_bundle(options.bundle)
    for piece in bundle.pieces:  # a damaged bundle fails here, before anything is written, and not on a worker
        bundle.piece(piece)
    score_columns(bundle)
    dest = Destination(destination, options.storage_options)
    dest.check_writable()
    with lease.hold(dest.writer, dest.root, dest.url, dest.local) as held:
        yield _Session(bundle, dest, options, held)


@dataclass(frozen=True)
class _Session:
    """One command at work on a destination."""

    bundle: Bundle
    dest: Destination
    options: Options
    lease: lease.Lease

    def score(self, library: str) -> dict[str, Any]:
        """`pipeline.score`."""
        if self.options.captions:
            self._need_captioner()
        options, name = self.options, _name(library)
        job = {"captions": options.captions, "limits": asdict(options.limits), "limit": options.limit}
        job |= {"retry_failed": options.retry_failed}
        finished = self._finish("score", job, name)
        with self._planning("score", job, name) as record:
            drawn = _draw_up(library, self.dest, self.bundle, options)
            self.dest.write_manifest(record["run_id"], drawn.shards())
            record["counts"] |= drawn.counts
            if drawn.marks:
                folder = self.dest.table_path("gone", record["run_id"])
                self.dest.write_parquet(f"{folder}/0.parquet", pa.concat_tables(drawn.marks))
        if finished is not None and not drawn.counts["to_do"] and not drawn.marks:
            self.dest.delete(self.dest.run_path(record["run_id"]))
            return finished
        return self._carry_out(record)

    def rescore(self) -> dict[str, Any]:
        """`pipeline.rescore`."""
        finished = self._finish("rescore", {}, None)
        with self._planning("rescore", {}, None) as record:
            counts: dict[str, int] = record["counts"]
            total = self.dest.write_manifest(record["run_id"], plan.stale(self.dest, self.bundle, counts))
            counts |= {"unmodified": counts["listed"] - total, "to_do": total}
        if finished is not None and not total:
            self.dest.delete(self.dest.run_path(record["run_id"]))
            return finished
        return self._carry_out(record)

    def caption(self, choice: Choice) -> dict[str, Any]:
        """`pipeline.caption`."""
        self._need_captioner()
        job = {"choice": asdict(choice), "limits": asdict(self.options.limits)}
        finished = self._finish("caption", job, None)
        with self._planning("caption", job, None) as record:
            counts: dict[str, int] = record["counts"]
            if count := sum(shard.num_rows for shard in plan.stale(self.dest, self.bundle, counts)):
                raise UsageError(
                    f"{self.dest.url}: {count} photos have no score of {self._bundle_name()}, and captions are held "
                    "against its heads; run `picinspector rescore` with this bundle first"
                )
            rows = plan.uncaptioned(self.dest, choose(self.dest, choice, ["image_id"]), self.bundle)
            total = self.dest.write_manifest(record["run_id"], [rows] if rows.num_rows else [])
            counts |= {"unmodified": counts["listed"] - total, "to_do": total}
        if finished is not None and not total:
            self.dest.delete(self.dest.run_path(record["run_id"]))
            return finished
        return self._carry_out(record)

    def _need_captioner(self) -> None:
        if not self.bundle.has("captioner"):
            raise UsageError(f"{self._bundle_name()} has no captioner; use another, or --captions none")

    def _bundle_name(self) -> str:
        return f"bundle {self.bundle.name} {self.bundle.version}"

    @contextlib.contextmanager
    def _planning(self, kind: str, job: dict[str, Any], library: str | None) -> Iterator[dict[str, Any]]:
        """A new run's record, to be filled in with what there is to do; written at the end of the block."""
        started = time.monotonic()
        record = runs.new_record(self.dest.new_run_id(), kind, self.bundle, self.dest.url, library)
        logs.set_run(record["run_id"])
        logs.event("run_started", kind=kind, library=library, destination=self.dest.url)
        record["job"] = self._job(kind, job, library)
        try:
            yield record
            if record["counts"]["to_do"]:
                ledger.check_manifest(self.dest, record["run_id"], record["counts"]["to_do"])
        except BaseException:
            with contextlib.suppress(Exception):  # tidiness: nobody would look at it, or resume it
                self.dest.delete(self.dest.run_path(record["run_id"]))
                self.dest.delete(self.dest.table_path("gone", record["run_id"]))
            raise
        record["seconds"]["list"] = time.monotonic() - started
        self.dest.plan(record)
        logs.event("planned", **record["counts"])

    def _job(self, kind: str, job: dict[str, Any], library: str | None) -> dict[str, Any]:
        """What makes a command the same command: it may finish a run that was cut short."""
        bundle = {name: getattr(self.bundle, f"{name}_fingerprint") for name in ("encoder", "scorer")}
        if self.bundle.has("captioner"):
            bundle["caption"] = self.bundle.caption_fingerprint
        return {"kind": kind, "library": library, "bundle": bundle, **job}

    def _finish(self, kind: str, job: dict[str, Any], library: str | None) -> dict[str, Any] | None:
        """Finish the run that was cut short, if it was this command's; its record, else None."""
        record = self.dest.cut_short()
        if record is None or record.get("job") != self._job(kind, job, library):
            return None
        logs.set_run(record["run_id"])
        record["times_resumed"] = record.get("times_resumed", 0) + 1
        self.dest.plan(record)
        return self._carry_out(record)

    def _carry_out(self, record: dict[str, Any]) -> dict[str, Any]:
        """Work out a planned run's tables and commit it."""
        started = time.monotonic()
        steps, source = _STEPS[record["kind"]]
        work = chains.Work(self.dest, record, self.bundle, self.options, source)
        if work.total:
            for step in steps:
                step(work)
        record["seconds"]["total"] = record["seconds"]["list"] + time.monotonic() - started
        self._commit(record)
        return record

    def _commit(self, record: dict[str, Any]) -> None:
        run_id, unread = record["run_id"], {}  # type: str, dict[str, int]
        if record["kind"] == "caption":
            for error, count in self.dest.tally("embeddings", "caption_error", run_id).items():
                kind = error.partition(":")[0]
                unread[kind] = unread.get(kind, 0) + count
        errors = self.dest.tally("scores", "error_kind", run_id)
        sources = self.dest.tally("scores", "caption_source", run_id)
        runs.finish_record(record, errors, sources, unread)
        self.lease.check()
        self.dest.commit(record)
        logs.event("committed", outcome=record["outcome"], **record["counts"])


_STEPS: dict[str, tuple[tuple[Callable[[chains.Work], None], ...], str | None]] = {
    "score": ((chains.embed, chains.score), None),
    "rescore": ((chains.score,), "source_run_id"),
    "caption": ((chains.caption, chains.score), "source_run_id"),
}


def _name(library: str) -> str:
    """A library's name for records: the same wherever the command is run, and without secrets."""
    return os.path.abspath(local_path(library)) if is_local(library) else redact(library)  # noqa: PTH100


def _draw_up(library: str, dest: Destination, bundle: Bundle, options: Options) -> plan.Plan:
    return plan.draw_up(library, dest, bundle, options.storage_options, options.retry_failed, options.limit)
