"""Local files that appear whole or not at all, as objects in a store do by themselves."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from typing import Any

from fsspec.implementations.local import LocalFileSystem

#: What a file is called until it is whole; no reader of tables looks at such names.
PART_SUFFIX = ".part"
_PARQUET_END = b"PAR1"


class WholeFileSystem(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
    """fsspec's local file system, writing beside a file's place, flushing to the disk, and renaming.

    Its name must not be LocalFileSystem: pyarrow takes that for its own, which writes in place.
    """

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any) -> Any:
        if mode != "wb":
            return super()._open(path, mode, block_size, **kwargs)
        if self.auto_mkdir:
            self.makedirs(self._parent(path), exist_ok=True)
        return _WholeFile(str(path))


class _WholeFile(io.FileIO):
    """A file that takes its name when it is closed; one that an error leaves behind in a `with` block never does."""

    def __init__(self, path: str) -> None:
        self._path, self._part = path, f"{path}.{secrets.token_hex(4)}{PART_SUFFIX}"
        self._tail = b""
        super().__init__(self._part, "wb")

    def write(self, data: Any, /) -> int:
        """Write all of it: a raw file may take less."""
        view, done = memoryview(data).cast("B"), 0
        while done < len(view):
            done += super().write(view[done:]) or 0
        self._tail = (self._tail + bytes(view[-len(_PARQUET_END) :]))[-len(_PARQUET_END) :]
        return done

    def close(self) -> None:
        """Publish the file, unless it is a Parquet file that its writer gave up: that has no footer."""
        if self.closed:
            return
        whole = self._tail == _PARQUET_END or not self._path.endswith(".parquet")
        try:
            if whole:
                os.fsync(self.fileno())
        except OSError:
            whole = False
            raise
        finally:
            super().close()
            if whole:
                os.replace(self._part, self._path)  # noqa: PTH105
            else:
                self._discard()

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is not None:
            super().close()
            self._discard()
        self.close()

    def _discard(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._part)  # noqa: PTH108
