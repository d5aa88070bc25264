"""Readers of photo collections with human quality labels, and the one table that training reads.

    python -m training.datasets spaq FOLDER --out labels.parquet

Each reader takes the folder that the dataset's own download unpacks to:

``biq2021``  BIQ2021 (Ahmed and Asif 2022, github.com/nisarahmedrana/BIQ2021). MOS 0-1, official train and test::

    Images/ss01 (1).jpg                     names differ in case from the lists
    Train (Images and MOS).csv              Image Name, MOS
    Test (Images and MOS).csv

``spaq``  SPAQ (Fang et al., CVPR 2020, github.com/h4nwei/SPAQ). MOS, attributes and scenes; no official split::

    TestImage/00001.jpg
    Annotations/MOS and Image attribute scores.xlsx     Image name, MOS, Brightness, ..., Sharpness
    Annotations/Scene category labels.xlsx              Image name, Animal, ..., Others: fractions that sum to 1
    Annotations/EXIF_tags.xlsx                          optional; Image name, Focal length, ..., Time

  or CSV exports of the three, under their own names or as `mos_scores.csv`, `scene_labels.csv`, `exif_data.csv`,
  in `Annotations/` or beside it. All five attributes are judgements, 0-100 and HIGH IS GOOD: see `schema.ATTRIBUTES`.

``koniq10k``  KonIQ-10k (Hosu et al. 2020, database.mmsp-kn.de; the split from github.com/subpic/koniq). MOS 0-100::

    1024x768/10004473376.jpg                            or 512x384/
    koniq10k_distributions_sets.csv                     image_name, MOS, set (training, validation, test)
    koniq10k_scores_and_distributions.csv               instead: image_name, MOS_zscore; has no split

``ava``  AVA (Murray et al., CVPR 2012). MOS 1-10, the mean of about 200 ratings; official test list::

    images/953619.jpg                                   or image/
    AVA.txt                                             index, id, ten rating counts, two tags, challenge
    aesthetics_image_lists/generic_test.jpgl            ids of the test photos; the others are train

``table``  any CSV or Parquet file with columns `uri` and `mos`, and where it has them the others of `SCHEMA`; `scene`
  may stand for the nine `scene_*`. A relative `uri` starts at the table's folder.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from picinspector.errors import PicInspectorError, UsageError
from picinspector.schema import ATTRIBUTES, SCENES
from picinspector.storage import is_local, local_path
from training.sheets import Sheet, local_folder

#: What we call the parts of a split.
SPLITS = ("train", "validation", "test")

#: The attributes that people rated one by one: all but `mos`.
RATED = ATTRIBUTES[1:]

#: Mean and standard deviation of SPAQ's labels, 11,125 photos (its table of MOS and attribute scores, as published).
SPAQ_SCALE = {
    "mos": (50.3, 20.9),
    "brightness": (56.0, 16.8),
    "colorfulness": (60.5, 15.3),
    "contrast": (57.3, 16.2),
    "noisiness": (53.0, 18.4),
    "sharpness": (47.0, 24.2),
}

#: EXIF tags of SPAQ's table -> column of ours.
_EXIF = {
    "Focal length": "exif_focal_length_mm",
    "F-number": "exif_f_number",
    "Exposure time": "exif_exposure_s",
    "ISO": "exif_iso",
    "Brightness": "exif_brightness_ev",
    "Flash": "exif_flash",
}
#: The time of day as a point on a circle, so that 23:59 is near 0:00; SPAQ spreads it over two columns, one nameless.
_EXIF_TIME = ("exif_time_0", "exif_time_1")


def _field(name: str, kind: pa.DataType, text: str, nullable: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable, metadata={"description": text})


#: The labels table: one row a photo, null where nobody labelled it.
SCHEMA = pa.schema(
    [
        _field("uri", pa.string(), "as in the embeddings table: an absolute path or any fsspec URL", False),
        _field("mos", pa.float64(), "mean opinion score in the dataset's own scale", False),
        *[_field(name, pa.float64(), f"people's {name}, SPAQ's scale 0-100, high is good") for name in RATED],
        *[_field(f"scene_{name}", pa.float64(), f"share of labels {name}, 0-1; the nine sum to 1") for name in SCENES],
        *[_field(name, pa.float64(), "SPAQ's EXIF table") for name in (*_EXIF.values(), *_EXIF_TIME)],
        _field("split", pa.string(), "train, validation or test"),
        _field("group", pa.string(), "photos of one group show the same content and must stay in one split"),
        _field("subset", pa.string(), "part of the dataset that is reported on its own"),
    ]
)


@dataclass(frozen=True, slots=True)
class LabelledPhoto:
    """One photo and what people said of it.

    Attributes:
        uri: an absolute path, or any fsspec URL.
        mos: mean opinion score in the dataset's own scale.
        split: one of `SPLITS`; None where the dataset has no split of its own.
        attributes: name of `RATED` -> 0-100, high is good; empty where nobody rated them.
        scenes: name of `schema.SCENES` -> share 0-1; empty where nobody labelled it.
        exif: column of `SCHEMA` -> value.
        group: photos of one group must not be divided between splits.
        subset: part of the dataset that is reported on its own, as BIQ2021's ss01.
    """

    uri: str
    mos: float
    split: str | None = None
    attributes: Mapping[str, float] = field(default_factory=dict)
    scenes: Mapping[str, float] = field(default_factory=dict)
    exif: Mapping[str, float | None] = field(default_factory=dict)
    group: str | None = None
    subset: str | None = None

    @property
    def path(self) -> Path:
        """The file, where `uri` is a path."""
        return Path(self.uri)


# --- datasets ---------------------------------------------------------------------------------------------------------


def read_biq2021(folder: Path, allow_missing: bool = False) -> list[LabelledPhoto]:
    """BIQ2021: 10,000 train photos, then 2,000 test photos; MOS 0-1, subsets ss01 to ss03.

    Raises:
        UsageError: a file, a column or a photo is missing; the message names it.
    """
    on_disk = _Photos(folder, ("Images",))
    photos = []
    for split, name in (("train", "Train (Images and MOS).csv"), ("test", "Test (Images and MOS).csv")):
        table = Sheet(folder / name)
        for photo, mos in zip(table.texts("Image Name"), table.numbers("MOS"), strict=True):
            photos.append(LabelledPhoto(on_disk.find(photo), mos, split, subset=photo[:4].lower()))
    return on_disk.checked(photos, allow_missing)


def read_spaq(folder: Path, allow_missing: bool = False) -> list[LabelledPhoto]:
    """SPAQ: 11,125 photos with MOS, five attributes (0-100), nine scenes and EXIF; no split.

    Raises:
        UsageError: a file, a column or a photo is missing; the message names it.
    """
    on_disk = _Photos(folder, ("TestImage",))
    scores = Sheet(_spaq_file(folder, "MOS and Image attribute scores", "mos_scores"))
    # By name: taken by position, a loader that is about fills sharpness from the contrast column.
    attributes = {name: scores.numbers(name.capitalize()) for name in RATED}
    names, mos = scores.texts("Image name"), scores.numbers("MOS")
    scenes = _spaq_scenes(Sheet(_spaq_file(folder, "Scene category labels", "scene_labels")))
    exif_file = _spaq_file(folder, "EXIF_tags", "exif_data", optional=True)
    exif = _spaq_exif(Sheet(exif_file)) if exif_file else {}
    photos = []
    for row, name in enumerate(names):
        if name not in scenes:
            raise UsageError(f"SPAQ's scene labels do not list {name}: get the three annotation files of one release")
        rated = {attribute: values[row] for attribute, values in attributes.items()}
        uri = on_disk.find(name)
        photos.append(LabelledPhoto(uri, mos[row], None, rated, scenes[name], exif.get(name, {})))
    return on_disk.checked(photos, allow_missing)


def read_koniq10k(folder: Path, allow_missing: bool = False) -> list[LabelledPhoto]:
    """KonIQ-10k: 10,073 photos, MOS 0-100; the official split where the table has one.

    Raises:
        UsageError: a file, a column or a photo is missing, or a split is unknown; the message names it.
    """
    on_disk = _Photos(folder, ("1024x768", "512x384"))
    names = ("koniq10k_distributions_sets.csv", "koniq10k_scores_and_distributions.csv")
    found = [path for name in names for path in (folder / name, folder / "metadata" / name) if path.is_file()]
    if not found:
        raise UsageError(f"{folder / names[0]} is missing, and so is {names[1]}: get one from github.com/subpic/koniq")
    table = Sheet(found[0])
    # The second file has MOS on 1-5 and the 0-100 values of the first as MOS_zscore.
    mos = table.numbers("MOS_zscore" if "MOS_zscore" in table.columns or found[0].name == names[1] else "MOS")
    split_of = {"training": "train", "validation": "validation", "test": "test"}
    splits: list[str | None] = [None] * len(mos)
    if "set" in table.columns:
        unknown = sorted(set(table.texts("set")) - split_of.keys())
        if unknown:
            raise UsageError(f"{found[0]}: column 'set' has {unknown[0]!r}, expected one of {list(split_of)}")
        splits = [split_of[name] for name in table.texts("set")]
    rows = zip(table.texts("image_name"), mos, splits, strict=True)
    return on_disk.checked([LabelledPhoto(on_disk.find(name), m, split) for name, m, split in rows], allow_missing)


def read_ava(folder: Path, allow_missing: bool = False) -> list[LabelledPhoto]:
    """AVA: 255,530 photos, MOS 1-10 as the mean of the ratings, and the official test list.

    Some photos of the list are not in any download: `allow_missing` leaves them out.

    Raises:
        UsageError: a file or a photo is missing, or a line is not AVA's; the message names it.
    """
    on_disk = _Photos(folder, ("images", "image"))
    test = set(_lines(folder / "aesthetics_image_lists" / "generic_test.jpgl"))
    photos = []
    for number, line in enumerate(_lines(folder / "AVA.txt"), 1):
        values = line.split()
        if len(values) != 15 or not all(value.isdigit() for value in values):
            raise UsageError(f"{folder / 'AVA.txt'}: line {number} is not 15 whole numbers: {line[:60]!r}")
        counts = [int(value) for value in values[2:12]]
        if not sum(counts):
            raise UsageError(f"{folder / 'AVA.txt'}: line {number} has no ratings")
        mos = sum(rating * count for rating, count in enumerate(counts, 1)) / sum(counts)
        photos.append(LabelledPhoto(on_disk.find(f"{values[1]}.jpg"), mos, "test" if values[1] in test else "train"))
    return on_disk.checked(photos, allow_missing)


def read_labels(path: Path, allow_missing: bool = False) -> list[LabelledPhoto]:
    """Any CSV or Parquet table of (uri, mos[, attributes][, scene or scene_*][, split][, group][, subset]).

    Raises:
        UsageError: a column is missing, a value is no number, a split or a scene is unknown, or a local photo is
            missing; the message names it.
    """
    table = Sheet(path)
    mos = table.numbers("mos")
    attributes = {name: table.numbers(name, empty_ok=True) for name in RATED if name in table.columns}
    shares = {
        name: table.numbers(f"scene_{name}", empty_ok=True) for name in SCENES if f"scene_{name}" in table.columns
    }
    exif_names = [name for name in (*_EXIF.values(), *_EXIF_TIME) if name in table.columns]
    exif = {name: table.numbers(name, empty_ok=True) for name in exif_names}
    scene = table.choices("scene", SCENES)
    split, group, subset = table.choices("split", SPLITS), table.choices("group"), table.choices("subset")
    photos = []
    for row, uri in enumerate(table.texts("uri")):
        scenes = _present(shares, row) or ({scene[row]: 1.0} if scene[row] else {})
        photos.append(
            LabelledPhoto(
                uri=absolute_uri(uri, path),
                mos=mos[row],
                split=split[row],
                attributes=_present(attributes, row),
                scenes=scenes,
                exif=_present(exif, row),
                group=group[row],
                subset=subset[row],
            )
        )
    gone = {photo.uri for photo in photos if is_local(photo.uri) and not photo.path.is_file()}
    return _without(gone, photos, allow_missing)


def absolute_uri(uri: str, table: str | os.PathLike[str]) -> str:
    """The uri as manifests name it, so that labels and embeddings find each other.

    A relative path starts at the folder, or the prefix, of the table that holds it.
    """
    if not is_local(uri):
        return uri
    if "://" in uri:
        return local_path(uri)
    base = os.path.dirname(os.fspath(table))  # noqa: PTH120
    if is_local(base):
        return os.path.abspath(os.path.join(base, uri))  # noqa: PTH100, PTH118
    return uri if uri.startswith("/") else f"{base}/{uri}"


#: What the command line can read.
READERS: dict[str, Callable[[Path, bool], list[LabelledPhoto]]] = {
    "biq2021": read_biq2021,
    "spaq": read_spaq,
    "koniq10k": read_koniq10k,
    "ava": read_ava,
    "table": read_labels,
}

#: The worst and the best MOS of each dataset's scale.
SCALES = {"biq2021": (0.0, 1.0), "spaq": (0.0, 100.0), "koniq10k": (0.0, 100.0), "ava": (1.0, 10.0)}


# --- the labels table -------------------------------------------------------------------------------------------------


def to_table(photos: Iterable[LabelledPhoto]) -> pa.Table:
    """The labels table, `SCHEMA`; columns that hold nothing but nulls are left out."""
    rows = [
        {
            "uri": photo.uri,
            "mos": photo.mos,
            **photo.attributes,
            **{f"scene_{name}": share for name, share in photo.scenes.items()},
            **photo.exif,
            "split": photo.split,
            "group": photo.group,
            "subset": photo.subset,
        }
        for photo in photos
    ]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    empty = [name for name in table.column_names[2:] if table.column(name).null_count == table.num_rows]
    return table.drop_columns(empty)


def write_labels(photos: Iterable[LabelledPhoto], out: Path) -> None:
    """Write the labels table as Parquet: uri, mos, attributes, scene_*, exif_*, split, group, subset."""
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(to_table(photos), out)


# --- files ------------------------------------------------------------------------------------------------------------


class _Photos:
    """The photos of a folder, found without regard to case."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """Take the first of these subfolders that is there."""
        there = [folder / name for name in names if (folder / name).is_dir()]
        if not there:
            raise UsageError(f"{folder / names[0]} is missing: give the folder that holds it")
        self._folder = there[0].absolute()
        # Of two names that differ in case alone only the listed one is asked for, and it wins.
        self._names = {entry.name.lower(): entry.name for entry in os.scandir(self._folder)}
        self._gone: set[str] = set()

    def find(self, name: str) -> str:
        """Absolute path of a photo; remembers it as missing where it is not there."""
        found = self._names.get(name.lower())
        path = str(self._folder / (found or name))
        if found is None:
            self._gone.add(path)
        return path

    def checked(self, photos: list[LabelledPhoto], allow_missing: bool) -> list[LabelledPhoto]:
        """The photos that are there; an error unless all are or `allow_missing`."""
        return _without(self._gone, photos, allow_missing)


def _without(gone: set[str], photos: list[LabelledPhoto], allow_missing: bool) -> list[LabelledPhoto]:
    if gone and not allow_missing:
        rest = f" (and {len(gone) - 1} more)" if len(gone) > 1 else ""
        raise UsageError(f"{min(gone)} is missing{rest}: put it there, or leave such photos out with --allow-missing")
    left = [photo for photo in photos if photo.uri not in gone]
    if not left:
        raise UsageError("no labelled photo is on disk: check the folder")
    return left


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UsageError(f"{path} is missing")
    return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]


def _present(columns: Mapping[str, Sequence[float]], row: int) -> dict[str, float]:
    return {name: values[row] for name, values in columns.items() if not math.isnan(values[row])}


# --- SPAQ -------------------------------------------------------------------------------------------------------------

#: SPAQ's scene columns in the order of `schema.SCENES`.
_SPAQ_SCENES = dict(
    zip(
        SCENES,
        ("Animal", "Cityscape", "Human", "Indoor scene", "Landscape", "Night scene", "Plant", "Still-life", "Others"),
        strict=True,
    )
)
#: What SPAQ's EXIF table has where a camera wrote no exposure time: 11 days.
_NO_EXPOSURE_S = 1_000_000.0


def _spaq_file(folder: Path, official: str, export: str, optional: bool = False) -> Path | None:
    names = (f"{official}.xlsx", f"{official}.csv", f"{export}.csv")
    for place in (folder / "Annotations", folder / "annotations", folder):
        for name in names:
            if (place / name).is_file():
                return place / name
    if optional:
        return None
    raise UsageError(f"{folder / 'Annotations' / names[0]} is missing, and so are its CSV exports {list(names[1:])}")


def _spaq_scenes(table: Sheet) -> dict[str, dict[str, float]]:
    shares = {name: table.numbers(column) for name, column in _SPAQ_SCENES.items()}
    scenes = {}
    for row, photo in enumerate(table.texts("Image name")):
        mine = {name: values[row] for name, values in shares.items()}
        if abs(sum(mine.values()) - 1.0) > 0.01:
            raise UsageError(f"{table.path}: the scene fractions of {photo} sum to {sum(mine.values()):.3f}, not to 1")
        scenes[photo] = mine
    return scenes


def _spaq_exif(table: Sheet) -> dict[str, dict[str, float | None]]:
    columns = {ours: table.numbers(theirs, empty_ok=True) for theirs, ours in _EXIF.items()}
    if "Time" not in table.columns:
        raise UsageError(f"{table.path} has no column 'Time'; it has {table.columns}")
    first = table.columns.index("Time")
    for name, index in zip(_EXIF_TIME, (first, first + 1), strict=True):
        columns[name] = [_number_or_nan(row[index]) if index < len(row) else math.nan for row in table.rows()]
    exposure = columns["exif_exposure_s"]
    columns["exif_exposure_s"] = [math.nan if value >= _NO_EXPOSURE_S else value for value in exposure]
    return {photo: dict(_present(columns, row)) for row, photo in enumerate(table.texts("Image name"))}


def _number_or_nan(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


# --- command line -----------------------------------------------------------------------------------------------------


def _is_open(photos: list[LabelledPhoto]) -> bool:
    return {photo.split for photo in photos} != set(SPLITS)


def _split(photos: list[LabelledPhoto], seed: int) -> list[LabelledPhoto]:
    from picinspector.duplicates import content_groups
    from training.splits import cut_validation, hash_photos, split_by_content

    groups = content_groups(hash_photos([photo.uri for photo in photos]), [photo.group for photo in photos])
    splits = split_by_content(groups, [photo.split for photo in photos], seed=seed)
    splits = cut_validation(splits, groups, seed=seed)
    return [
        replace(photo, split=split, group=str(group))
        for photo, split, group in zip(photos, splits, groups, strict=True)
    ]


def main() -> None:
    """Parse the command line, read a dataset and write its labels table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=READERS)
    parser.add_argument("folder", type=Path, help="of the dataset; for `table` the CSV or Parquet file")
    parser.add_argument("--out", type=local_folder, required=True, help="labels table to write, Parquet")
    parser.add_argument("--allow-missing", action="store_true", help="leave out labelled photos that are not on disk")
    parser.add_argument(
        "--no-split",
        action="store_true",
        help="leave open what the official split does (all of SPAQ, the validation of BIQ2021 and AVA): filling it in "
        "reads every photo",
    )
    parser.add_argument("--seed", type=int, default=0, help="of that split")
    args = parser.parse_args()
    try:
        photos = READERS[args.dataset](args.folder, args.allow_missing)
        if not args.no_split and _is_open(photos):
            photos = _split(photos, args.seed)
        write_labels(photos, args.out)
    except PicInspectorError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    parts = {name: sum(photo.split == name for photo in photos) for name in (*SPLITS, None)}
    counts = ", ".join(f"{count} {name or 'without a split'}" for name, count in parts.items() if count)
    print(f"{args.out}: {len(photos)} photos, {counts}")


if __name__ == "__main__":
    main()
