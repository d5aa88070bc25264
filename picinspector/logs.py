"""The structured log: one event a line on stderr, as text or as JSON, with nothing secret in it.

`PICINSPECTOR_LOG=json` gives a line of JSON for each event (`ts`, `level`, `event`, `run_id` and the event's fields).
Otherwise only warnings are shown, as text, because the progress line and the result are what a person wants to see.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from picinspector.redaction import redact, scrub

_LOGGER = logging.getLogger("picinspector")
_run_id: str | None = None


def configure() -> None:
    """Send the log to stderr in the form the environment asks for. Idempotent; without it Python's defaults hold."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if is_json() else _Text())
    _LOGGER.handlers = [handler]
    _LOGGER.setLevel(logging.INFO if is_json() else logging.WARNING)
    _LOGGER.propagate = False


def is_json() -> bool:
    """Whether the environment asks for JSON."""
    return os.environ.get("PICINSPECTOR_LOG", "").lower() == "json"


def set_run(run_id: str | None) -> None:
    """Put this run's id on the events that follow."""
    global _run_id
    _run_id = run_id


def event(name: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log that something happened.

    Args:
        name: what, in snake case: `run_started`, `planned`, `resumed`, `stage_finished`, `committed`, `drift`, ...
        level: of `logging`; warnings are shown to people as well.
        fields: JSON-able facts; texts are redacted, values under names such as `secret` or `token` left out.
    """
    if _LOGGER.isEnabledFor(level):
        clean = scrub({"run_id": _run_id} | fields)
        _LOGGER.log(level, "%s", _text(name, clean), extra={"event": name, "fields": clean})


def _text(name: str, fields: Mapping[str, Any]) -> str:
    shown = (f"{key}={_value(value)}" for key, value in fields.items() if value is not None)
    return " ".join([name.replace("_", " ") + ":", *shown])


def _value(value: Any) -> str:
    plain = isinstance(value, str) and value.isprintable() and " " not in value
    return str(value) if plain else json.dumps(value, ensure_ascii=False, default=str)


class _Text(logging.Formatter):
    """`picinspector: warning: drift: run_id=... psi=0.31`, on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of text."""
        return f"picinspector: {record.levelname.lower()}: {_message(record)}"


class _Json(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        line: dict[str, Any] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        if hasattr(record, "fields"):
            line |= {"event": record.__dict__["event"], **record.__dict__["fields"]}
        else:
            line |= {"event": "log", "run_id": _run_id, "message": _message(record)}
        return json.dumps(line, ensure_ascii=False, default=str)


def _message(record: logging.LogRecord) -> str:
    text = record.getMessage()
    if record.exc_info:
        text += f": {record.exc_info[1]!r}"
    return " ".join(redact(text).split())
