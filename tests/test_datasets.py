"""Readers of labelled photos, on tiny copies of each dataset's published layout."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from picinspector.errors import UsageError
from training.datasets import (
    RATED,
    SCHEMA,
    LabelledPhoto,
    absolute_uri,
    read_ava,
    read_biq2021,
    read_koniq10k,
    read_labels,
    read_spaq,
    write_labels,
)
from training.sheets import Sheet

# The published tables' own names (github.com/mattkyuan/image-quality-fusion, github.com/subpic/koniq).
SPAQ_SCORES = ["Image name", "MOS", "Brightness", "Colorfulness", "Contrast", "Noisiness", "Sharpness"]
SPAQ_SCENES = ["Image name", "Animal", "Cityscape", "Human", "Indoor scene", "Landscape", "Night scene", "Plant",
               "Still-life", "Others"]  # fmt: skip
SPAQ_EXIF = ["Image name", "Focal length", "F-number", "Exposure time", "ISO", "Brightness", "Flash", "Time", None]


def photo(path: Path, seed: int = 0) -> Path:
    """A small photo of noise: another seed, another content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(path)
    return path


def workbook(path: Path, *sheets: tuple[str, list[list[object]]]) -> None:
    book = openpyxl.Workbook()
    book.remove(book.worksheets[0])
    for title, rows in sheets:
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)


def text(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


@pytest.fixture
def spaq(tmp_path: Path) -> Path:
    for name in ("00001.jpg", "00002.JPG"):
        photo(tmp_path / "TestImage" / name)
    annotations = tmp_path / "Annotations"
    scores = [SPAQ_SCORES, ["00001.jpg", 48.86, 1, 2, 3, 4, 5], ["00002.jpg", 62.5, 10, 20, 30, 40, 50]]
    workbook(annotations / "MOS and Image attribute scores.xlsx", ("Sheet1", scores))
    third = 0.333333
    scenes = [
        SPAQ_SCENES,
        ["00002.jpg", 0, 0, 0, 0, 1, 0, 0, 0, 0],
        ["00001.jpg", 0, third, 0, 0, 0, third, 0, third, 0],
    ]
    workbook(annotations / "Scene category labels.xlsx", ("Sheet1", scenes))
    exif = [
        SPAQ_EXIF,
        ["00001.jpg", 4.2, 1.7, 0.1, 200, -1.21, 0, -0.965926, -0.258819],
        ["00002.jpg", 4.04, 2.0, 1000000, 400, 3, 1, -1, 0],
    ]
    workbook(annotations / "EXIF_tags.xlsx", ("Processed", [["Image name", "x"], ["1", 2]]), ("Source EXIF tags", exif))
    return tmp_path


def test_spaq_has_each_attribute_from_its_own_column(spaq: Path) -> None:
    """A public loader fills sharpness from the contrast column; here every column has another value."""
    first, second = read_spaq(spaq)
    assert first.attributes == {"brightness": 1, "colorfulness": 2, "contrast": 3, "noisiness": 4, "sharpness": 5}
    assert second.attributes["sharpness"] == 50
    assert (first.mos, second.mos) == (48.86, 62.5)


def test_spaq_is_read_by_column_name_in_any_order(spaq: Path) -> None:
    order = ["Sharpness", "MOS", "Image name", "Contrast", "Noisiness", "Brightness", "Colorfulness"]
    row = dict(zip(SPAQ_SCORES, ["00001.jpg", 48.86, 1, 2, 3, 4, 5], strict=True))
    workbook(
        spaq / "Annotations" / "MOS and Image attribute scores.xlsx", ("S", [order, [row[name] for name in order]])
    )
    (only,) = read_spaq(spaq)
    assert [only.attributes[name] for name in RATED] == [1, 2, 3, 4, 5]


def test_spaq_scenes_and_exif_are_joined_by_name_and_photos_found_in_any_case(spaq: Path) -> None:
    first, second = read_spaq(spaq)
    assert first.scenes["night"] == first.scenes["still_life"] == pytest.approx(1 / 3, abs=1e-6)
    assert second.scenes["landscape"] == 1.0
    assert second.path == spaq / "TestImage" / "00002.JPG"
    assert first.exif["exif_focal_length_mm"] == 4.2
    assert (first.exif["exif_time_0"], first.exif["exif_time_1"]) == (-0.965926, -0.258819)
    assert "exif_exposure_s" not in second.exif  # 1,000,000 s stands for none
    assert first.split is None


def test_spaq_may_come_as_csv(spaq: Path) -> None:
    expected = read_spaq(spaq)
    names = {
        "MOS and Image attribute scores.xlsx": "mos_scores.csv",
        "Scene category labels.xlsx": "scene_labels.csv",
        "EXIF_tags.xlsx": "exif_data.csv",
    }
    for official, export in names.items():
        book = openpyxl.load_workbook(spaq / "Annotations" / official)
        rows = list(book.worksheets[-1].iter_rows(values_only=True))
        text(spaq / export, *[",".join("" if cell is None else str(cell) for cell in row) for row in rows])
        (spaq / "Annotations" / official).unlink()
    assert read_spaq(spaq) == expected


@pytest.fixture
def koniq(tmp_path: Path) -> Path:
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        photo(tmp_path / "1024x768" / name)
    text(
        tmp_path / "koniq10k_distributions_sets.csv",
        "image_name,c1,c2,c3,c4,c5,c_total,MOS,SD,set",
        "1.jpg,0.0,0.0,0.2,0.7,0.1,105,77.38,0.53,training",
        "2.jpg,0.0,0.1,0.4,0.5,0.0,96,68.73,0.58,test",
        "3.jpg,0.0,0.1,0.4,0.5,0.0,96,50.0,0.58,validation",
    )
    return tmp_path


def test_koniq10k_keeps_its_split(koniq: Path) -> None:
    photos = read_koniq10k(koniq)
    assert [(p.mos, p.split) for p in photos] == [(77.38, "train"), (68.73, "test"), (50.0, "validation")]


def test_koniq10k_takes_the_z_scores_where_mos_is_on_five_points(koniq: Path) -> None:
    (koniq / "koniq10k_distributions_sets.csv").unlink()
    text(
        koniq / "koniq10k_scores_and_distributions.csv",
        '"image_name","c1","c2","c3","c4","c5","c_total","MOS","SD","MOS_zscore"',
        '"1.jpg",0,0,25,73,7,105,3.828571,0.527278,77.38',
    )
    (only,) = read_koniq10k(koniq)
    assert (only.mos, only.split) == (77.38, None)


@pytest.fixture
def ava(tmp_path: Path) -> Path:
    for name in ("953619", "953958"):
        photo(tmp_path / "images" / f"{name}.jpg")
    text(tmp_path / "AVA.txt", "1 953619 0 1 0 0 0 0 0 0 0 1 1 22 1396", "2 953958 0 0 0 4 0 0 0 0 0 0 15 21 1396")
    text(tmp_path / "aesthetics_image_lists" / "generic_test.jpgl", "953958")
    return tmp_path


def test_ava_averages_the_ratings_and_keeps_the_official_test_list(ava: Path) -> None:
    first, second = read_ava(ava)
    assert (first.mos, first.split) == (6.0, "train")  # one 2 and one 10
    assert (second.mos, second.split) == (4.0, "test")  # four 4
    assert first.path == ava / "images" / "953619.jpg"


@pytest.fixture
def biq2021(tmp_path: Path) -> Path:
    photo(tmp_path / "Images" / "SS01 (1).jpg")
    photo(tmp_path / "Images" / "ss03 (2).jpg")
    text(tmp_path / "Train (Images and MOS).csv", "Image Name,MOS,,", "ss01 (1).jpg,0.25,,")
    text(tmp_path / "Test (Images and MOS).csv", "Image Name,MOS", "ss03 (2).jpg,0.75")
    return tmp_path


def test_biq2021_is_read_with_its_trailing_commas_and_odd_cases(biq2021: Path) -> None:
    first, second = read_biq2021(biq2021)
    assert (first.mos, first.split, first.subset) == (0.25, "train", "ss01")
    assert (second.mos, second.split, second.subset) == (0.75, "test", "ss03")
    assert first.path.name == "SS01 (1).jpg" and first.path.is_absolute()


def test_labels_survive_the_parquet(spaq: Path, tmp_path: Path) -> None:
    photos = read_spaq(spaq)
    write_labels(photos, tmp_path / "out" / "labels.parquet")
    assert read_labels(tmp_path / "out" / "labels.parquet") == photos
    table = pq.read_table(tmp_path / "out" / "labels.parquet")
    assert "split" not in table.column_names  # nobody made one
    assert set(table.column_names) <= set(SCHEMA.names)


def test_a_csv_of_ratings_needs_no_more_than_uri_and_mos(tmp_path: Path) -> None:
    photo(tmp_path / "a b.jpg")
    table = text(tmp_path / "ratings.csv", "mos,uri,scene,sharpness", "7,a b.jpg,night,", "5,s3://bucket/b.jpg,,30.5")
    first, second = read_labels(table)
    assert first == LabelledPhoto(str(tmp_path / "a b.jpg"), 7.0, scenes={"night": 1.0})
    assert second == LabelledPhoto("s3://bucket/b.jpg", 5.0, attributes={"sharpness": 30.5})


def test_a_parquet_of_labels_may_hold_nulls(tmp_path: Path) -> None:
    columns = {"uri": ["s3://b/1.jpg", "s3://b/2.jpg"], "mos": [1, 2], "split": ["train", None], "group": ["g", None]}
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    photos = read_labels(tmp_path / "labels.parquet")
    assert [(p.mos, p.split, p.group) for p in photos] == [(1.0, "train", "g"), (2.0, None, None)]


def break_photo(folder: Path) -> None:
    next(folder.glob("*mage*/*")).unlink()


@pytest.mark.parametrize(
    ("dataset", "read", "breakage", "complaint"),
    [
        ("spaq", read_spaq, lambda f: (f / "Annotations" / "Scene category labels.xlsx").unlink(), "Scene category"),
        ("spaq", read_spaq, lambda f: workbook(f / "Annotations" / "Scene category labels.xlsx",
            ("S", [SPAQ_SCENES[:-1], ["00001.jpg", 1, 0, 0, 0, 0, 0, 0, 0]])), "no column 'Others'"),
        ("spaq", read_spaq, lambda f: workbook(f / "Annotations" / "Scene category labels.xlsx",
            ("S", [SPAQ_SCENES, ["00001.jpg", 1, 1, 0, 0, 0, 0, 0, 0, 0]])), "sum to 2.000"),
        ("spaq", read_spaq, lambda f: (f / "Annotations" / "EXIF_tags.xlsx").write_bytes(b"PK"), "EXIF_tags.xlsx"),
        ("spaq", read_spaq, break_photo, "0000"),
        ("koniq", read_koniq10k, lambda f: (f / "koniq10k_distributions_sets.csv").unlink(), "koniq10k_distributions"),
        ("koniq", read_koniq10k, lambda f: text(f / "koniq10k_distributions_sets.csv", "image_name,MOS,set",
            "1.jpg,5,dev"), "'dev'"),
        ("koniq", read_koniq10k, lambda f: text(f / "koniq10k_distributions_sets.csv", "image_name,MOS", "1.jpg,high"),
            "row 1 of column 'MOS' is 'high'"),
        ("ava", read_ava, lambda f: (f / "AVA.txt").write_text("1 953619 3 4\n"), "line 1"),
        ("ava", read_ava, lambda f: (f / "aesthetics_image_lists" / "generic_test.jpgl").unlink(), "generic_test.jpgl"),
        ("ava", read_ava, break_photo, ".jpg is missing"),
        ("biq2021", read_biq2021, lambda f: text(f / "Test (Images and MOS).csv", "Name,MOS", "a.jpg,1"),
            "'Image Name'"),
        ("biq2021", read_biq2021, break_photo, ".jpg is missing"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_in_one_line(
    dataset: str,
    read: Callable[[Path], object],
    breakage: Callable[[Path], object],
    complaint: str,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(dataset)
    assert read(folder)
    breakage(folder)
    with pytest.raises(UsageError) as caught:
        read(folder)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (("uri,score", "s3://b/a.jpg,1"), "no column 'mos'"),
        (("uri,mos", "s3://b/a.jpg,"), "row 1 of column 'mos'"),
        (("uri,mos", "gone.jpg,1"), "gone.jpg is missing"),
        (("uri,mos,split", "s3://b/a.jpg,1,dev"), "'dev'"),
        (("uri,mos,scene", "s3://b/a.jpg,1,beach"), "'beach'"),
        (("uri,mos,sharpness", "s3://b/a.jpg,1,very"), "'very'"),
        (("uri,mos",), "no rows"),
    ],
)
def test_a_bad_table_is_named_in_one_line(tmp_path: Path, lines: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_labels(text(tmp_path / "labels.csv", *lines))
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_missing_photos_may_be_left_out(ava: Path) -> None:
    (ava / "images" / "953619.jpg").unlink()
    (left,) = read_ava(ava, allow_missing=True)
    assert left.path.name == "953958.jpg"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "training.datasets", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_writes_a_split_where_there_is_none(spaq: Path, tmp_path: Path) -> None:
    done = run("spaq", spaq, "--out", tmp_path / "labels.parquet")
    assert done.returncode == 0, done.stderr
    photos = read_labels(tmp_path / "labels.parquet")
    assert len({photo.group for photo in photos}) == 1  # both photos are the same picture
    assert len({photo.split for photo in photos}) == 1 and photos[0].split is not None


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    done = run("spaq", tmp_path, "--out", tmp_path / "labels.parquet")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "TestImage is missing" in done.stderr


def test_a_row_whose_first_cell_is_empty_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("mos,uri,group\n,a.jpg,\n3,b.jpg,g\n,,\n", "utf-8")
    sheet = Sheet(tmp_path / "l.csv")
    assert sheet.texts("uri") == ["a.jpg", "b.jpg"]
    assert sheet.choices("group") == [None, "g"]


def test_uris_are_those_of_a_manifest(tmp_path: Path) -> None:
    assert absolute_uri("../p/a.jpg", tmp_path / "labels" / "l.csv") == str(tmp_path / "p" / "a.jpg")
    assert absolute_uri(f"file://{tmp_path}/a.jpg", tmp_path / "x.csv") == f"{tmp_path}/a.jpg"
    assert absolute_uri("s3://bucket/a.jpg", tmp_path / "x.csv") == "s3://bucket/a.jpg"
