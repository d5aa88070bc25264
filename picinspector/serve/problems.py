"""Requests that get a problem for an answer; and failures of the service itself, for its log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from picinspector.errors import ErrorKind
from picinspector.serve.answers import Problem

_RETRY_AFTER_S = 2


class RequestError(Exception):
    """A request that gets a problem for an answer.

    Attributes:
        status: of HTTP.
        problem: the body.
        headers: beside the usual ones.
    """

    def __init__(self, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.problem = Problem(error_kind=kind, error_message=message)

    def to_response(self) -> Response:
        """What the client gets."""
        return Response(self.problem.model_dump_json(), self.status, self.headers, "application/json")


def busy(message: str, kind: str = "busy") -> RequestError:
    """Come again: 503 with Retry-After."""
    return RequestError(503, kind, message, {"retry-after": str(_RETRY_AFTER_S)})


def failed() -> RequestError:
    """The service has a fault; which, is in its log."""
    return RequestError(500, ErrorKind.INTERNAL.value, "the service failed; its log says where")


def too_large(what: str, limit_bytes: int) -> RequestError:
    """413."""
    message = f"{what} is larger than {limit_bytes} bytes, the limit"
    return RequestError(413, ErrorKind.TOO_MANY_BYTES.value, message)


class ReplicaError(Exception):
    """A failure in a replica, where its traceback ended.

    Attributes:
        error: its type.
        at: where it was raised.
    """

    def __init__(self, error: str, at: str) -> None:
        super().__init__(error, at)  # what it is pickled by
        self.error, self.at = error, at


def cause_of(error: BaseException) -> tuple[str, str]:
    """What went wrong, by its type, and where. Not the message, which may hold anything. Of a group the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ReplicaError):
        return error.error, error.at
    trace: Any = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    at = f"{trace.tb_frame.f_code.co_qualname}:{trace.tb_lineno}" if trace is not None else ""
    return type(error).__name__, at
