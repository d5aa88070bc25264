"""Tables that people hand out with their photos: CSV, Excel or Parquet, read whole and taken apart by column name."""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from picinspector.errors import PhotoError, UsageError
from picinspector.storage import fetch, is_local, local_path, redact

#: Of a table in object storage.
_MAX_BYTES = 2 * 1024**3


class Sheet:
    """A CSV, Excel or Parquet file by column name, rows whose first column is empty left out."""

    def __init__(self, path: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> None:
        """Read the whole file, from a folder or with fsspec options from object storage."""
        self.path = redact(os.fspath(path))
        readers = {".xlsx": _read_xlsx, ".parquet": _read_parquet, ".csv": _read_csv}
        suffix = os.path.splitext(_name(os.fspath(path)))[1].lower()  # noqa: PTH122
        content = read_whole(path, options)
        if suffix not in readers:
            raise UsageError(f"{self.path}: expected a .csv, .parquet or .xlsx file")
        self.columns, self._rows = readers[suffix](self.path, content)

    def values(self, name: str) -> list[Any]:
        """One column as it is."""
        if name not in self.columns:
            named = [column for column in self.columns if column]
            raise UsageError(f"{self.path} has no column {name!r}; it has {named}")
        index = self.columns.index(name)
        return [row[index] for row in self._rows]

    def texts(self, name: str) -> list[str]:
        """A column of texts, none empty."""
        texts = [str(value).strip() if value is not None else "" for value in self.values(name)]
        if "" in texts:
            raise UsageError(f"{self.path}: row {texts.index('') + 1} of column {name!r} is empty")
        return texts

    def numbers(self, name: str, empty_ok: bool = False) -> list[float]:
        """A column of finite numbers; NaN for empty cells where those are allowed."""
        numbers = []
        for row, value in enumerate(self.values(name), 1):
            if empty_ok and (value is None or value == "" or value != value):
                numbers.append(math.nan)
                continue
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise UsageError(f"{self.path}: row {row} of column {name!r} is {value!r}, expected a number")
            numbers.append(number)
        return numbers

    def choices(self, name: str, among: Sequence[str] = ()) -> list[str | None]:
        """A column of texts that may be absent or empty, each one of `among`, where that is given."""
        if name not in self.columns:
            return [None] * len(self._rows)
        texts = [None if value is None or value == "" else str(value) for value in self.values(name)]
        wrong = [(row, text) for row, text in enumerate(texts, 1) if among and text is not None and text not in among]
        if wrong:
            row, text = wrong[0]
            raise UsageError(f"{self.path}: row {row} of column {name!r} is {text!r}, expected one of {list(among)}")
        return texts

    def rows(self) -> list[Sequence[Any]]:
        """All rows, cells in the order of `columns`."""
        return self._rows


def read_whole(path: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> bytes:
    """A file, from a folder or with fsspec options from object storage.

    Raises:
        UsageError: it is not there, or cannot be read.
    """
    if is_local(os.fspath(path)):
        file = Path(local_path(os.fspath(path)))
        if not file.is_file():
            raise UsageError(f"{os.fspath(path)} is missing")
        return file.read_bytes()
    [content] = fetch([os.fspath(path)], options, _MAX_BYTES)
    if isinstance(content, PhotoError):
        raise UsageError(f"{redact(os.fspath(path))} cannot be read: {content.message}")
    if len(content) > _MAX_BYTES:
        raise UsageError(f"{redact(os.fspath(path))} is larger than {_MAX_BYTES} bytes; write it as Parquet")
    return content


def local_folder(text: str) -> Path:
    """For argparse: a path on this machine, as an URL would become a strange one of a folder here."""
    if not is_local(text):
        raise argparse.ArgumentTypeError(f"{text} is no path of this machine; write to one, and copy it there")
    return Path(local_path(text))


def _name(url: str) -> str:
    """Without the query of a web address; in a key a `?` is a sign like any other."""
    return urlsplit(url).path if url.startswith(("http://", "https://")) else url


def _read_csv(path: str, content: bytes) -> tuple[list[str], list[Sequence[Any]]]:
    try:
        lines = io.StringIO(content.decode("utf-8-sig"), newline="")
        rows = [row for row in csv.reader(lines) if any(cell.strip() for cell in row)]
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason}); export it again") from error
    return _headed(path, rows)


def _read_xlsx(path: str, content: bytes) -> tuple[list[str], list[Sequence[Any]]]:
    from zipfile import BadZipFile

    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        book = load_workbook(io.BytesIO(content), read_only=True, data_only=True)
    except (BadZipFile, InvalidFileException, KeyError, OSError) as error:
        raise UsageError(f"{path} is not a readable Excel workbook ({error}); download it again") from error
    # SPAQ's EXIF workbook has processed tags on further sheets; the others have one sheet.
    sheet = book["Source EXIF tags"] if "Source EXIF tags" in book.sheetnames else book.worksheets[0]
    rows = [row for row in sheet.iter_rows(values_only=True) if any(cell is not None for cell in row)]
    book.close()
    return _headed(path, rows)


def _read_parquet(path: str, content: bytes) -> tuple[list[str], list[Sequence[Any]]]:
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{path} is not a readable Parquet file ({error}); write it again") from error
    return table.column_names, list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def _headed(path: str, rows: Sequence[Sequence[Any]]) -> tuple[list[str], list[Sequence[Any]]]:
    if len(rows) < 2:
        raise UsageError(f"{path} has no rows below its header")
    columns = [str(name).strip() if name is not None else "" for name in rows[0]]
    # A spreadsheet ends a row at its last filled cell.
    return columns, [[*row, *[None] * (len(columns) - len(row))] for row in rows[1:]]
