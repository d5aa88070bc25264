"""Folders that trainings read from and leave things in: of this machine, or prefixes of object storage."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pyarrow.fs

from picinspector.errors import StorageError
from picinspector.storage import StorageOptions, is_local, is_storage_error, open_filesystem, redact, to_photo_error

#: Of copies, with the process that made each; what a process left behind that was killed goes with the next one.
_COPY = "picinspector-copy-"


class Folder:
    """A folder that every node of a cluster reaches, and where this process works on its files.

    Of a folder of this machine both are the same. Of a prefix (`s3://...`) each object has a copy of its own, empty at
    first and gone with it: `pull` fetches files into it, `push` sends them. Travels to Ray's workers without the copy.
    They are killed when they are done, so there it belongs in a `with` block, or the copy stays until the next one.

    Attributes:
        local: whether it is a folder of this machine.
    """

    def __init__(self, url: str | os.PathLike[str], options: Mapping[str, Any] | StorageOptions | None = None) -> None:
        """A folder that need not be there yet.

        Args:
            url: absolute, or starting at the working folder; or any fsspec URL.
            options: fsspec options of the store.

        Raises:
            StorageError: there is no such kind of store.
        """
        self._options = options if isinstance(options, StorageOptions) else StorageOptions(options)
        self._url, self.local = os.fspath(url), is_local(os.fspath(url))
        self.filesystem, root = open_filesystem(self._url, self._options.reveal())
        self._root = root.rstrip("/")
        self._copy: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._copy is not None:
            self._copy.cleanup()
            self._copy = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Folder, (self._root if self.local else self._url, self._options)

    def __repr__(self) -> str:
        return f"Folder({str(self)!r})"

    def __str__(self) -> str:
        """For people: without secrets."""
        return self._root if self.local else redact(self._url)

    def under(self, name: str) -> Folder:
        """A folder in it."""
        return Folder(f"{(self._root if self.local else self._url).rstrip('/')}/{name}", self._options)

    def path(self, name: str) -> str:
        """Of something in it, on `filesystem`."""
        return f"{self._root}/{name}"

    @property
    def here(self) -> Path:
        """Where this process works on its files."""
        if self.local:
            return Path(self._root)
        if self._copy is None:
            _sweep()
            self._copy = tempfile.TemporaryDirectory(prefix=f"{_COPY}{os.getpid()}-")
        return Path(self._copy.name)

    @property
    def for_ray(self) -> dict[str, Any]:
        """`storage_path` and `storage_filesystem` of a Ray `RunConfig`."""
        filesystem = None if self.local else pyarrow.fs.PyFileSystem(_WithoutFolders(self.filesystem))
        return {"storage_path": self._root, "storage_filesystem": filesystem}

    def has(self, name: str) -> bool:
        """Whether there is a file or folder of this name."""
        with self._told():
            return bool(self.filesystem.exists(self.path(name)))

    def names(self) -> set[str]:
        """Of what is in it; none where it is not there."""
        with self._told():
            try:
                paths = self.filesystem.ls(self._root, detail=False)
            except FileNotFoundError:
                return set()
        # A store may have an object for the folder itself.
        return {path.rstrip("/").rpartition("/")[2] for path in paths if path.rstrip("/") != self._root}

    def is_empty(self, besides: Collection[str] = ()) -> bool:
        """Whether nothing is in it, besides these names, or it is not there."""
        return not self.names().difference(besides)

    def pull(self, *names: str) -> Path:
        """`here`, with these files and folders in it, as far as they are there; with all, if none is named."""
        if not self.local:
            with self._told():
                for name in names or ("",):
                    found = self.filesystem.find(self.path(name).rstrip("/"))
                    targets = [str(self.here / path[len(self._root) + 1 :]) for path in found]
                    for target in targets:
                        Path(target).parent.mkdir(parents=True, exist_ok=True)
                    self.filesystem.get(found, targets)
        return self.here

    def push(self, *names: str) -> None:
        """Make these files and folders of `here` those of the folder; all of them, if none is named."""
        if not self.local:
            paths = [self.here / name for name in names] or [self.here]
            files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
            files = [file for file in files if file.is_file()]
            with self._told():
                self.filesystem.put(
                    [str(file) for file in files],
                    [self.path(file.relative_to(self.here).as_posix()) for file in files],
                )

    def delete(self, name: str) -> None:
        """Delete a folder in it, here and there, if there is one."""
        with self._told():
            if self.filesystem.exists(self.path(name)):
                self.filesystem.rm(self.path(name), recursive=True)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Say in one line what the store says in many; look anew, as other processes write too."""
        self.filesystem.invalidate_cache()
        try:
            yield
        except Exception as error:
            if not is_storage_error(error):
                raise
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageError(f"no room for a copy of {self} in {tempfile.gettempdir()}; make room") from error
            reason = to_photo_error(error).message
            if isinstance(error, FileNotFoundError):
                reason = "there is no such bucket or file"
            raise StorageError(f"cannot read or write {self}: {reason}; check the path and the credentials") from error


class _WithoutFolders(pyarrow.fs.FSSpecHandler):  # type: ignore[misc]
    """A store as it is: s3fs would make a bucket where it is asked for a folder in one that it may not look for."""

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing: there are no folders in a store."""


def _sweep() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_COPY}*"):
        pid = path.name.removeprefix(_COPY).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
