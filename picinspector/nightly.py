"""Keeping a library's tables fresh, by a job that nobody watches.

::

    rescore, if the bundle has another scorer -> score what is new or changed -> compare with the state before
    -> warn of drift -> prune -> nights/<run_id>.json, and the hook

Each step commits for itself: whatever a night did not get to, the next does.
"""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from picinspector import drift, logs, pipeline
from picinspector.errors import UsageError
from picinspector.runs import Options
from picinspector.tables import Destination

#: A hook that hangs must not keep a cluster up.
_HOOK_TIMEOUT_S = 600.0


def run(
    library: str,
    destination: str,
    options: Options = Options(),
    keep_days: float = 30.0,
    drift_threshold: float = drift.PSI_THRESHOLD,
    hook: str | None = None,
) -> dict[str, Any]:
    """One night.

    Args:
        library: see `manifest.list_library`.
        destination: where its tables are.
        options: as of `pipeline.score`.
        keep_days: see `pipeline.prune`.
        drift_threshold: of the population stability index, beyond which the record warns.
        hook: a command, split as a shell splits words but without a shell, that gets the record as JSON on stdin.

    Returns:
        the night's record, also written to `<dest>/nights/<run_id>.json`: the records of the runs it made as `score`
        and `rescore` (None if there was no need), `drift` as of `drift.compare` (None without a state before),
        `warnings`, what `prune` did, `hook_exit_code`, `seconds`.

    Raises:
        PicInspectorError: a step failed; those before it are committed, and the same command goes on.
    """
    command = shlex.split(hook) if hook else None
    if hook is not None and not command:
        raise UsageError("--hook is empty; leave it out, or give a command")
    started = time.monotonic()
    with pipeline.session(destination, options) as session:
        dest = session.dest
        before = _last_run(dest)
        rescored = session.rescore() if session.has_another_scorer() else None
        scored = session.score(library)
        found = drift.compare(dest, before, _last_run(dest) or before) if before is not None else None
        warnings = drift.warnings(found, drift_threshold) if found is not None else []
        for line in warnings:
            logs.event("drift", level=logging.WARNING, warning=line)
        cutoff = datetime.now(UTC) - timedelta(days=keep_days)
        record: dict[str, Any] = {
            "run_id": scored["run_id"],
            "kind": "nightly",
            "library": scored["library"],
            "destination": dest.url,
            "rescore": rescored,
            "score": scored,
            "drift": found,
            "warnings": warnings,
            "prune": session.prune(cutoff),
            "seconds": round(time.monotonic() - started, 3),
            "hook_exit_code": None,
        }
        if command is not None:
            record["hook_exit_code"] = _call(command, record)
        dest.write_json(f"{dest.root}/nights/{record['run_id']}.json", record)
    return record


def _last_run(dest: Destination) -> str | None:
    """The newest committed run, if anything has been scored."""
    committed = dest.runs()
    return committed[-1]["run_id"] if dest.has("scores") else None


def _call(command: list[str], record: dict[str, Any]) -> int:
    """The hook's exit code; what it says goes nowhere, because it may hold what the command line held."""
    try:
        text = json.dumps(record, default=str)
        done = subprocess.run(
            command, input=text, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            timeout=_HOOK_TIMEOUT_S, check=False,
        )  # fmt: skip
        code = done.returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        logs.event("hook_failed", level=logging.WARNING, reason=type(error).__name__)
        return 127
    if code:
        logs.event("hook_failed", level=logging.WARNING, exit_code=code)
    return code
