"""One run at a time into a destination.

Locally a lock on a file, which the operating system takes back when its process dies. In a store a lease: an object
for each holder, `lease/000007.json`, made on the condition that there is none of that name (S3's `If-None-Match`), so
of two that take the same number one fails. Its holder writes it anew every few seconds. Who finds it unchanged for
`TTL_S` of their own clock takes the next number; whose number is no longer the last has lost the lease, and must not
commit. Clocks of two machines are never compared.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

from picinspector import logs
from picinspector.errors import StorageError, UsageError
from picinspector.storage import to_photo_error

#: How long a holder may be silent. It writes every `TTL_S / _BEATS`: some requests may fail or hang.
TTL_S = 60.0
_BEATS = 6


class Lease(Protocol):
    """Held from `hold` on."""

    def check(self) -> None:
        """Raise StorageError if somebody else has it by now: this run took too long to renew it."""
        ...


@contextlib.contextmanager
def hold(
    filesystem: Any, root: str, shown: str, local: bool, ttl_s: float = TTL_S, lock: str = "runs/.lock"
) -> Iterator[Lease]:
    """Have a destination for oneself while the body runs.

    Args:
        filesystem, root: where the destination is.
        shown: its name for messages.
        local: whether it is a folder of this machine.
        ttl_s: see `TTL_S`.
        lock: of a folder, the file in it that is locked.

    Raises:
        UsageError: another run is at work there.
        StorageError: the lease cannot be written; or, from `check`, was lost.
    """
    if local:
        with _lock(f"{root}/{lock}", shown) as locked:
            logs.event("lease_taken", destination=shown)
            yield locked
        return
    lease = _StoreLease(filesystem, f"{root}/lease", shown, ttl_s)
    lease.take()
    logs.event("lease_taken", destination=shown)
    try:
        yield lease
    finally:
        lease.release()


def _who() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


# --- on this machine --------------------------------------------------------------------------------------------------


class _Locked:
    def check(self) -> None:
        """A lock is not lost while its process lives."""


@contextlib.contextmanager
def _lock(path: str, shown: str) -> Iterator[_Locked]:
    import fcntl  # not everywhere, and only a folder needs it

    try:
        opened = open(path, "a+")  # noqa: PTH123, SIM115
    except OSError as error:
        raise StorageError(f"cannot open {path}: {error.strerror}; check whose it is") from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise StorageError(f"cannot lock {path}: {error.strerror}; check the file system") from error
            file.seek(0)
            raise UsageError(_busy(shown, file.read().strip() or "another process")) from None
        file.truncate(0)
        file.write(_who())
        file.flush()
        try:
            yield _Locked()
        finally:
            file.truncate(0)


def _busy(shown: str, who: str) -> str:
    return f"{shown}: another run is at work there ({who}); wait for it to end, or use another destination"


# --- in a store -------------------------------------------------------------------------------------------------------


class _StoreLease:
    def __init__(self, filesystem: Any, folder: str, shown: str, ttl_s: float) -> None:
        self._filesystem, self._folder, self._shown, self._ttl_s = filesystem, folder, shown, ttl_s
        self._number, self._beat, self._token = 0, 0, secrets.token_hex(8)
        self._renewed = time.monotonic()
        self._lost = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def take(self) -> None:
        """Wait until the last lease is released or silent for its time, then take the next number."""
        last = self._last()
        if last and (seen := self._read(last)) and not _released(seen):
            logs.event("lease_waited_for", destination=self._shown, ttl_s=self._ttl_s)
            deadline = time.monotonic() + self._ttl_s
            while time.monotonic() < deadline:
                time.sleep(min(1.0, self._ttl_s / 20))
                now = self._read(last)
                if _released(now):
                    break
                if now != seen:  # it lives
                    raise UsageError(_busy(self._shown, json.loads(now)["holder"]))
        self._number = last + 1
        if not self._write(create=True) or self._other() is not None:
            raise UsageError(_busy(self._shown, "it began just now"))
        for number in range(max(1, last - 1), last + 1):
            with contextlib.suppress(Exception):  # only tidiness
                self._filesystem.rm_file(self._path(number))
        self._thread.start()

    def release(self) -> None:
        self._stop.set()
        self._thread.join(timeout=self._ttl_s)
        if not self._lost:
            with contextlib.suppress(Exception):  # then it expires
                self._write(released=True)

    def check(self) -> None:
        """Raise StorageError if the lease is somebody else's by now, or may be."""
        self._lost = self._lost or self._other() or ""
        if self._lost:
            raise StorageError(f"{self._shown}: this run lost its lease ({self._lost}); run the same command again")

    def _keep(self) -> None:
        while not self._stop.wait(self._ttl_s / _BEATS):
            try:
                if self._last() == self._number:  # else it is no longer ours to write
                    self._write()
                self._lost = self._other() or ""
                if self._lost:
                    return
            except Exception as error:  # a hiccup of the store; for longer than the lease lasts it is another's
                if time.monotonic() - self._renewed > self._ttl_s:
                    self._lost = f"could not renew it: {to_photo_error(error).message}"
                    return

    def _other(self) -> str | None:
        """Why the lease is not ours: a higher number is there, or a store without conditions let two take this one."""
        last = self._last()
        mine = last == self._number and json.loads(self._read(last) or b"{}").get("token") == self._token
        return None if mine else "another run has taken it over"

    def _path(self, number: int) -> str:
        return f"{self._folder}/{number:06d}.json"

    def _last(self) -> int:
        self._filesystem.invalidate_cache()
        try:
            names = [path.rsplit("/", 1)[-1] for path in self._filesystem.ls(self._folder, detail=False)]
        except FileNotFoundError:
            return 0
        return max((int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()), default=0)

    def _read(self, number: int) -> bytes:
        try:
            return bytes(self._filesystem.cat_file(self._path(number)))
        except FileNotFoundError:
            return b""

    def _write(self, create: bool = False, released: bool = False) -> bool:
        """Write the lease; False if it was to be created and is there."""
        self._beat += 1
        lease = {"holder": _who(), "token": self._token, "beat": self._beat, "released": released}
        began = time.monotonic()
        try:
            mode = "create" if create else "overwrite"
            self._filesystem.pipe_file(self._path(self._number), json.dumps(lease).encode(), mode=mode)
        except Exception as error:
            if not create:
                raise
            if made := self._read(self._number):  # somebody's; or ours, if the answer to a first attempt was lost
                return bool(json.loads(made)["token"] == self._token)
            reason = to_photo_error(error).message
            raise StorageError(f"cannot write a lease into {self._shown}: {reason}; check the credentials") from error
        self._renewed = began
        return True


def _released(content: bytes) -> bool:
    return not content or bool(json.loads(content)["released"])
