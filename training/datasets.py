"""Readers of photo collections with human quality labels."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from picinspector.errors import UsageError

#: BIQ2021's own lists, and what we call the split.
_BIQ2021_LISTS = {"train": "Train (Images and MOS).csv", "test": "Test (Images and MOS).csv"}


@dataclass(frozen=True, slots=True)
class LabelledPhoto:
    """One photo and its mean opinion score.

    Attributes:
        path: the file.
        mos: in the dataset's own scale; BIQ2021: 0-1.
        split: the dataset's official split, `train` or `test`.
    """

    path: Path
    mos: float
    split: str


def read_biq2021(folder: Path) -> list[LabelledPhoto]:
    """BIQ2021 (Ahmed and Asif 2022, github.com/nisarahmedrana/BIQ2021): 10,000 train photos, then 2,000 test photos.

    Expects `Images/` and the two CSV files of the repository. File names differ in case from the lists.

    Raises:
        UsageError: a file, a column or a photo is missing; the message names it.
    """
    images = folder / "Images"
    if not images.is_dir():
        raise UsageError(f"{images} is missing: give the folder of a BIQ2021 checkout")
    by_name = {path.name.lower(): path for path in images.iterdir()}
    photos = []
    for split, list_name in _BIQ2021_LISTS.items():
        for name, mos in _read_columns(folder / list_name, ("Image Name", "MOS")):
            if name.lower() not in by_name:
                raise UsageError(f"{images / name} is missing: {list_name} lists it")
            photos.append(LabelledPhoto(by_name[name.lower()], float(mos), split))
    return photos


def _read_columns(path: Path, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The named columns of a CSV file, rows that are blank left out."""
    if not path.is_file():
        raise UsageError(f"{path} is missing")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise UsageError(f"{path} has no column {missing[0]!r}; it has {reader.fieldnames}")
        return [tuple(row[name] for name in columns) for row in reader if row[columns[0]]]
