"""What the README tells people to type, typed; and what the demo promises, checked on its tables."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import demo
from picinspector import schema
from picinspector.rank import failures
from picinspector.tables import Destination

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text("utf-8")
CURATING = (REPOSITORY / "docs" / "curating.md").read_text("utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def everyday_commands() -> list[str]:
    """Commands of the README that need no cluster and no bucket; and all of docs/curating.md, its table's too."""
    lines = [line for block in [*blocks("sh"), *blocks("sh", CURATING)] for line in block.splitlines()]
    lines += re.findall(r"\| `([^`]+)` \|$", CURATING, re.MULTILINE)
    return [*dict.fromkeys(line for line in lines if line.startswith("picinspector "))]


@dataclass(frozen=True)
class Typed:
    """A folder in which the README's commands were run on the demo's library."""

    folder: Path
    outputs: dict[str, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Typed:
    folder = tmp_path_factory.mktemp("readme")
    demo.build_library(folder / "photos")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("RAY_ADDRESS", None)
    outputs = {
        command: subprocess.run(
            command, shell=True, cwd=folder, env=environment, timeout=600, capture_output=True, text=True, check=False
        )
        for command in everyday_commands()
    }
    return Typed(folder, outputs)


def test_everyday_commands_work_as_written(typed: Typed) -> None:
    assert len(typed.outputs) >= 30
    for command, done in typed.outputs.items():
        assert done.returncode == 0, (command, done.stderr[-2000:])
        assert "Traceback" not in done.stderr, command
    top = next(done.stdout for command, done in typed.outputs.items() if command.startswith("picinspector top"))
    assert len(top.strip().splitlines()) == 21


def test_the_python_block_works_as_written(typed: Typed) -> None:
    groups = pq.read_table(typed.folder / "tables" / "groups" / "groups.parquet").to_pylist()
    near = [row["group_size"] - 1 for row in groups if row["group_kind"] == "near" and row["is_best"]]
    assert near, "the demo's library is full of them"
    expected = {README: "quality_score", CURATING: rf"near\W+{len(near)}\W+{sum(near)}\b"}
    for page, block in [(one, block) for one in expected for block in blocks("python", one)]:
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=typed.folder, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert re.search(expected[page], done.stdout), done.stdout


def test_the_python_block_takes_the_newest_row_of_a_committed_run(tmp_path: Path) -> None:
    """Three runs over two photos and one that is gone: scored, scored again, and crashed before its commit."""
    dest = Destination(tmp_path / "tables")
    for run_id, quality in {"20260101T000000.000Z-a": 7.25, "20260102T000000.000Z-b": 5.5, "20260103T": 9.75}.items():
        rows: list[dict[str, object]] = [
            {"image_id": uri, "uri": uri, "quality_score": quality, "scene": "landscape", "scorer_fingerprint": "f"}
            for uri in ("/one.jpg", "/two.jpg", *(["/gone.jpg"] if quality == 7.25 else []))
        ]
        if quality == 5.5:
            rows[1]["scene"] = "night"  # no landscape any more, whatever the first run took it for
        folder = Path(dest.table_path("scores", run_id))
        folder.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema.SCORES), folder / "0.parquet")
        if quality != 9.75:
            dest.commit({"run_id": run_id, "counts": {"to_do": 2}})
    mark = {"image_id": "/gone.jpg", "gone": True, "scorer_fingerprint": "f"}
    marks = pa.Table.from_pylist([mark], schema=schema.GONE)
    dest.write_parquet(f"{dest.table_path('gone', '20260102T000000.000Z-b')}/0.parquet", marks)
    [block] = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"(/\w+\.jpg)\s*│\s*([\d.]+)", done.stdout) == [("/one.jpg", "5.5")], done.stdout


def test_files_and_targets_it_names_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text("utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"\b(?:jobs|docs)/\w+\.\w+|\bcluster\.yaml|\bCONTRIBUTING\.md", README):
        assert (REPOSITORY / path).is_file(), path


def test_every_column_of_scores_is_explained() -> None:
    short = {f"attribute_{name}": f"_{name}" for name in schema.ATTRIBUTES}
    for name in schema.SCORES.names:
        if not name.startswith("scene_"):
            assert f"`{name}`" in README or f"`{short.get(name, name)}`" in README, name


def test_pristine_photos_outrank_their_strong_degradations(typed: Typed) -> None:
    scores = demo.scores_by_name(Destination(typed.folder / "tables"))
    won, pairs = demo.pairs_won(scores)
    assert pairs == len(demo.real_photos()) * 7
    assert won / pairs >= 0.9, {name: score for name, score in scores.items() if "strong" in name or "pristine" in name}


def test_broken_files_are_named_with_their_reason(typed: Typed) -> None:
    kinds = {Path(row["uri"]).name: row["error_kind"] for row in failures(Destination(typed.folder / "tables"))}
    assert kinds == {
        "empty.jpg": "empty",
        "half.jpg": "truncated",
        "letter.jpg": "unknown_format",
        "bomb.png": "too_many_pixels",
    }


def test_the_gallery_shows_every_photo(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = []
    for index in range(7):
        Image.new("RGB", (300, 200), (index * 30, 0, 0)).save(tmp_path / f"{index}.png")
        rows.append({"uri": str(tmp_path / f"{index}.png"), "quality_score": 9.0 - index})
    demo.draw_gallery(rows, tmp_path / "gallery.png", columns=3)
    sheet = np.asarray(Image.open(tmp_path / "gallery.png"))
    assert sheet.shape[0] == 3 * sheet.shape[1] // 3 // 190 * 212
    assert abs(int(sheet[212 * 2 + 95, 92, 0]) - 180) < 6  # the seventh, first of the third line
