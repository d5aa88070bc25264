"""Everything that can go wrong, in two families.

::

    PicInspectorError              the run cannot go on; one line, says what to do
    ├── UsageError                 an argument or a setting is wrong                     exit code 2
    ├── StorageError               a library or a destination cannot be reached          exit code 2
    ├── BundleError                a bundle is missing, damaged or does not fit          exit code 2
    └── TableError                 a table breaks its contract (rows lost or doubled)    exit code 1

    PhotoError                     one photo could not be used: becomes that row's error, never stops a library

`PhotoError` is a value as much as an exception: `storage.fetch` returns it in place of bytes.
"""

from __future__ import annotations

from enum import StrEnum


class PicInspectorError(Exception):
    """The run cannot go on. The message is one line and says what to do."""

    exit_code = 1


class UsageError(PicInspectorError):
    """An argument or a setting is wrong."""

    exit_code = 2


class StorageError(PicInspectorError):
    """A library or a destination cannot be reached."""

    exit_code = 2


class BundleError(PicInspectorError):
    """A bundle is missing, damaged, or does not fit what is asked of it."""

    exit_code = 2


class TableError(PicInspectorError):
    """A table breaks its contract: rows were lost or doubled, or its schema is not ours."""


class ErrorKind(StrEnum):
    """Why a photo has no values: the `error_kind` column of the tables."""

    NOT_FOUND = "not_found"
    #: This file is not for us; with `credentials` the keys are no good: unknown, expired, or by a clock that is wrong.
    ACCESS_DENIED = "access_denied"
    CREDENTIALS = "credentials"
    THROTTLED = "throttled"
    TIMEOUT = "timeout"
    CONNECTION = "connection"
    STORAGE = "storage"
    #: There is another version than the manifest names: replaced since the library was listed.
    CHANGED = "changed"
    TOO_MANY_BYTES = "too_many_bytes"
    EMPTY = "empty"
    UNKNOWN_FORMAT = "unknown_format"
    NO_DECODER = "no_decoder"
    TOO_MANY_PIXELS = "too_many_pixels"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    #: It kills the process that decodes it.
    CRASHED = "crashed"
    INTERNAL = "internal"
    # Of the remote critic, beside `timeout` and `connection`:
    RATE_LIMITED = "rate_limited"
    SERVER_ERROR = "server_error"
    REJECTED = "rejected"
    REFUSED = "refused"
    INVALID_ANSWER = "invalid_answer"
    COST_CEILING = "cost_ceiling"

    @property
    def transient(self) -> bool:
        """True where the same photo may well succeed in the next run.

        Not all of them within seconds: `storage` tries again what passes by itself, not `credentials` and `changed`.
        """
        passing = {ErrorKind.THROTTLED, ErrorKind.TIMEOUT, ErrorKind.CONNECTION}
        passing |= {ErrorKind.CREDENTIALS, ErrorKind.CHANGED}
        return self in passing | {ErrorKind.RATE_LIMITED, ErrorKind.SERVER_ERROR}

    @property
    def final(self) -> bool:
        """True where only other bytes could give another outcome; the rest is tried again by every run."""
        unreadable = {ErrorKind.EMPTY, ErrorKind.UNKNOWN_FORMAT, ErrorKind.TRUNCATED, ErrorKind.CORRUPT}
        return self in unreadable | {ErrorKind.CRASHED, ErrorKind.REFUSED}


TRANSIENT_KINDS: tuple[str, ...] = tuple(kind.value for kind in ErrorKind if kind.transient)
FINAL_KINDS: tuple[str, ...] = tuple(kind.value for kind in ErrorKind if kind.final)


class PhotoError(Exception):
    """One photo could not be used.

    Attributes:
        kind: the class of failure, for counting and for deciding on a retry.
        message: one line for a person; never holds a credential.
    """

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = " ".join(message.split())[:500]

    def __reduce__(self) -> tuple[type[PhotoError], tuple[ErrorKind, str]]:
        return PhotoError, (self.kind, self.message)
