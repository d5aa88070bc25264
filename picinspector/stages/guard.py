"""Calls that may kill their process: made in a child process, or under a watch that ends this one if they hang.

A codec that crashes takes its process along, and a worker that decodes 64 photos cannot say which one it died of. So a
batch is decoded as it is, at no cost; if its worker died, Ray tries again, and then every photo gets a child process to
die in. The child lives on from photo to photo: a batch whose worker somebody killed pays for one start.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from picinspector import machine
from picinspector.errors import ErrorKind, PhotoError

_Answer = TypeVar("_Answer")

#: For one photo. The largest that are let in (300 megapixels) take seconds.
TIMEOUT_S = 120.0
#: By the clock a call may take so many times as long: a machine may be busy with other things, or stand still.
PATIENCE = 5.0
#: How it ends then: by either timer.
_TOO_LONG = (-signal.SIGPROF, -signal.SIGALRM)
#: A child may have been killed for what others did (the kernel's out-of-memory killer chooses by size).
_ATTEMPTS = 2


class Guard(Generic[_Answer]):
    """A function called in a child process, one call after the other."""

    def __init__(
        self,
        function: Callable[..., _Answer],
        timeout_s: float = TIMEOUT_S,
        memory_bytes: int | None = None,
        prepare: Callable[[], None] | None = None,
        patience: float = PATIENCE,
    ) -> None:
        """Starts nothing yet.

        Args:
            function: of a module, by whose name the child imports it. Arguments and answers are pickled.
            timeout_s: processor time after which a call dies; see `deadline`.
            memory_bytes: address space that the child may add to what its modules take; half of this machine's memory
                if None.
            prepare: called once in each child, before its memory is bounded: to load what the function needs.
            patience: how many times `timeout_s` a call may take by the clock.
        """
        self._function, self._prepare, self._timeout_s, self._patience = function, prepare, timeout_s, patience
        self._memory_bytes = memory_bytes if memory_bytes is not None else machine.memory_bytes() // 2
        # Not forked: this process has threads, and a lock that one of them holds would stay shut in the child.
        self._context = multiprocessing.get_context("spawn")
        self._child: tuple[multiprocessing.process.BaseProcess, Connection] | None = None

    def __enter__(self) -> Guard[_Answer]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._child is not None:
            self._end()

    def __call__(self, *arguments: Any) -> _Answer:
        """What the function answers, and what it raises.

        Raises:
            PhotoError: `crashed`: a child died of this call, and so did the next one; or the call took too long.
            OSError: no child can be started at all, for which no photo is to blame.
        """
        fate = ""
        for _ in range(_ATTEMPTS):
            connection = self._start() if self._child is None else self._child[1]
            try:
                connection.send(arguments)
                answer, error = connection.recv()
            except (EOFError, ConnectionError):
                exit_code = self._end()
                fate = self._fate(exit_code)
                if exit_code in _TOO_LONG:  # of which nobody else is to blame
                    break
                continue
            if error is not None:
                raise error
            return answer  # type: ignore[no-any-return]
        raise PhotoError(ErrorKind.CRASHED, fate)

    def _start(self) -> Connection:
        ours, theirs = self._context.Pipe()
        arguments = (theirs, self._function, self._prepare, self._timeout_s, self._patience, self._memory_bytes)
        child = self._context.Process(target=_serve, args=arguments, daemon=True)
        child.start()
        theirs.close()  # else the end of the child would not end the connection
        self._child = (child, ours)
        try:
            ours.recv()
        except EOFError:
            raise OSError(f"no process to decode photos in could be started: exit code {self._end()}") from None
        return ours

    def _end(self) -> int:
        """End the child if it is still there, and say its exit code."""
        assert self._child is not None
        child, connection = self._child
        self._child = None
        connection.close()  # a child that waits for the next call ends by itself
        child.join(timeout=5.0)
        if child.exitcode is None:
            child.kill()
            child.join()
        code = child.exitcode
        child.close()
        assert code is not None
        return code

    def _fate(self, exit_code: int) -> str:
        if exit_code in _TOO_LONG:
            return f"decoding it takes longer than {self._timeout_s:g} s"
        cause = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
        return f"decoding it kills its process ({cause})"


def _serve(
    connection: Connection,
    function: Callable[..., Any],
    prepare: Callable[[], None] | None,
    timeout_s: float,
    patience: float,
    memory_bytes: int,
) -> None:
    """The child: answers calls until nobody makes any more."""
    for timer in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(timer, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if prepare is not None:
        prepare()
    with contextlib.suppress(ValueError, OSError):  # the system has a lower limit, or cannot limit it at all
        # torch alone maps gigabytes of libraries, which cost nothing until they are used.
        limit = _address_space_bytes() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    connection.send(None)  # alive
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            arguments = connection.recv()
            answer, failure = None, None
            with deadline(timeout_s, patience):
                try:
                    answer = function(*arguments)
                except Exception as error:  # raised again where the call was made
                    failure = error
            connection.send((answer, failure))


@contextlib.contextmanager
def deadline(seconds: float, patience: float = PATIENCE) -> Iterator[None]:
    """End this process by a signal if the body takes longer, also in C code that never comes back.

    Args:
        seconds: of processor time.
        patience: how many times as long it may take by the clock.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, patience * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text("ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
