"""What is kept of photos written by hand: the best, one of each group, no two alike, so many of a scene; and found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from picinspector import selection
from picinspector.cli import main
from picinspector.curate import marks
from picinspector.errors import UsageError
from picinspector.selection import Selection, select
from picinspector.tables import Destination
from picinspector.vectors import load
from tests.test_groups import LATER, RUN, apart, commit, photo, unit


def scored(name: str, quality: float, scene: str = "night", **changes: Any) -> dict[str, Any]:
    return photo(name, quality, scene=scene, scorer_kind="lightgbm", **changes)


@pytest.fixture
def dest(tmp_path: Path) -> Destination:
    """Two sights, three photos of each, of which two of the first are one file, and one by itself."""
    dest = Destination(tmp_path / "tables")
    rows = [
        scored("a", 9), scored("a copy", 9, content_hash="a"), scored("b", 8), scored("c", 7),
        scored("d", 6, "human"), scored("e", 5, "human"), scored("f", 4, "human"), photo("broken", None),
    ]  # fmt: skip
    vectors = unit(
        [1, 0, 0.1], [1, 0, 0.1], [1, 0, 0.12], [1, 0, 0.08], [0, 1, 0.1], [0, 1, 0.12], [0, 1, 0.11], [1, 1, 1]
    )
    commit(dest, RUN, rows, vectors)
    return dest


def names(found: pa.Table) -> list[str]:
    return [Path(uri).stem for uri in found.column("uri").to_pylist()]


def test_the_best_without_copies(dest: Destination) -> None:
    found = select(dest, Selection(best=3))
    assert names(found) == ["a", "b", "c"] and found.column("rank").to_pylist() == [1, 2, 3]
    assert found.column("group_size").to_pylist() == [2, 1, 1]
    assert names(select(dest, Selection(best=3, duplicates=True))) == ["a copy", "a", "b"], (
        "by name where they score alike"
    )
    assert len(names(select(dest))) == 6, "there are no more"


def test_a_filter_that_leaves_the_best_of_a_group_out_lets_the_next_one_stand_for_it(dest: Destination) -> None:
    assert names(select(dest, Selection(best=1, where="uri NOT LIKE '%/a.jpg'"))) == ["a copy"]
    assert names(select(dest, Selection(best=1, scene="human"))) == ["d"]


def test_diversity_takes_the_other_sight_second(dest: Destination) -> None:
    assert names(select(dest, Selection(best=2, diversity=0.5))) == ["a", "d"]
    assert names(select(dest, Selection(best=2, diversity=0.01))) == ["a", "b"]
    once = select(dest, Selection(best=5, diversity=0.7))
    assert once.equals(select(dest, Selection(best=5, diversity=0.7)))
    assert sorted(names(select(dest, Selection(best=6, diversity=1.0)))) == ["a", "b", "c", "d", "e", "f"]


def test_only_likeness_counts_to_the_end_of_the_scale(tmp_path: Path) -> None:
    """Of a hundred that are much alike and one that is not, the one comes second."""
    dest = Destination(tmp_path / "tables")
    rng = np.random.default_rng(0)
    rows = [scored(f"p{number:03}", 9 - number / 100) for number in range(100)] + [scored("outlier", 2)]
    alike = unit(*([1, 0, 0, 0] + 0.3 * rng.normal(size=(100, 4))))
    commit(dest, RUN, rows, np.concatenate([alike, unit([-1, 0, 0, 0])]))
    assert names(select(dest, Selection(best=2, diversity=1.0))) == ["p000", "outlier"]


def test_a_quota_is_filled_from_below_the_best_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_LEAST_POOL", 5)
    monkeypatch.setattr(selection, "_POOL", 1)
    dest = Destination(tmp_path / "tables")
    rows = [scored(f"n{number}", 9 - number / 10) for number in range(8)] + [scored("h", 2, "human")]
    commit(dest, RUN, rows, apart(9))
    assert names(select(dest, Selection(best=2, quotas={"human": 1, "*": 0}, diversity=0.5))) == ["h"]
    assert names(select(dest, Selection(best=2, quotas={"human": 1, "*": 0}))) == ["h"]


def test_diversity_by_hand(tmp_path: Path) -> None:
    """Unrelated photos are at right angles, so likeness is the cosine; b is 0.6 like a, c is 0."""
    dest = Destination(tmp_path / "tables")
    vectors = unit([1, 0, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1])
    commit(dest, RUN, [scored("a", 9), scored("b", 8), scored("c", 7), scored("d", 6)], vectors)
    # Percentiles are 100, 75, 50, 25. b: 0.75 (1 - d) - 0.6 d; c: 0.5 (1 - d). They are equal at d = 0.25 / 0.85.
    assert names(select(dest, Selection(best=2, diversity=0.28))) == ["a", "b"]
    assert names(select(dest, Selection(best=2, diversity=0.31))) == ["a", "c"]


def test_quotas(dest: Destination) -> None:
    assert names(select(dest, Selection(best=4, quotas={"night": 1}))) == ["a", "d", "e", "f"]
    assert names(select(dest, Selection(best=9, quotas={"*": 1}))) == ["a", "d"]
    assert names(select(dest, Selection(best=9, quotas={"human": 0, "*": 2}, diversity=0.5))) == ["a", "b"]
    with pytest.raises(UsageError, match=r"--quota moon=1: give SCENE=N, with a scene of animal"):
        select(dest, Selection(quotas={"moon": 1}))
    with pytest.raises(UsageError, match="--diversity 2: give a number from 0"):
        select(dest, Selection(diversity=2))


def test_sidecars_say_stars_by_percentile_and_label_rejects(dest: Destination) -> None:
    said = {Path(mark.uri).stem: mark for mark in marks(dest, Selection())}
    # Percentiles of seven photos, ties counted in: 100, 100, 71, 57, 43, 29, 14.
    assert {name: mark.rating for name, mark in said.items()} == {
        "a": 5, "a copy": 5, "b": 3, "c": 3, "d": 2, "e": 2, "f": 1
    }  # fmt: skip
    assert [name for name, mark in said.items() if mark.label] == ["a copy"]
    assert (said["d"].keywords, said["d"].quality_score) == (("human",), 6)
    assert not any(mark.label for mark in marks(dest, Selection(), None))
    assert not any(mark.label for mark in marks(dest, Selection(duplicates=True))), "the copy is kept too"


def test_embeddings_are_those_of_the_newest_row(dest: Destination) -> None:
    newer = unit([0, 0, 1])
    commit(dest, LATER, [scored("c", 7)], newer)
    rows = dest.latest("embeddings", ["image_id", "run_id"])
    photos = rows.rename_columns(["image_id", "embeddings_run_id"])
    found = dict(zip(photos.column("image_id").to_pylist(), load(dest, photos), strict=True))
    assert np.array_equal(found["c@1"], newer[0])
    assert found["a@1"][0] > 0.9


# --- commands ---------------------------------------------------------------------------------------------------------


def test_select_lists_links_and_marks_and_shows_it_first(tmp_path: Path, capsys: Any) -> None:
    library, dest = tmp_path / "photos", Destination(tmp_path / "tables")
    library.mkdir()
    rows = []
    for name, quality in (("a", 9.0), ("b", 8.0), ("c", 7.0)):
        (library / f"{name}.jpg").write_bytes(name.encode())
        rows.append(scored(name, quality, uri=str(library / f"{name}.jpg")))
    commit(dest, RUN, rows, apart(3))
    best, chosen = tmp_path / "best", tmp_path / "best.txt"
    command = ["select", dest.url, "--best", "2", "--link-to", str(best), "--xmp", "appended", "--list", str(chosen)]
    assert main([*command, "--dry-run", "-o", str(tmp_path / "chosen.csv")]) == 0
    said = capsys.readouterr()
    assert said.err.count("symbolic link") == 2 and said.err.count("new sidecar") == 3 and "dry run" in said.err
    assert f"write {chosen} (2 photos)" in said.err and "chosen.csv (2 photos)" in said.err
    assert not best.exists() and not chosen.exists() and not list(library.glob("*.xmp"))
    assert not Path(f"{dest.root}/groups").exists() and not (tmp_path / "chosen.csv").exists()
    assert main(command) == 0
    assert sorted(path.name for path in best.iterdir()) == ["a.jpg", "b.jpg"]
    assert (best / "a.jpg").resolve() == (library / "a.jpg").resolve()
    assert chosen.read_text().splitlines() == [str(library / "a.jpg"), str(library / "b.jpg")]
    assert sorted(path.name for path in library.glob("*.xmp")) == ["a.jpg.xmp", "b.jpg.xmp", "c.jpg.xmp"]
    capsys.readouterr()
    assert main(command) == 0
    assert "5 already" in capsys.readouterr().err, "a second time there is nothing to do"
    dest.commit({"run_id": LATER, "library": str(library), "counts": {"to_do": 0}})
    assert main(["select", dest.url, "--best", "1", "--copy-to", str(library / "best")]) == 0
    assert "lies in the library" in capsys.readouterr().err
    assert (library / "best" / "a.jpg").read_bytes() == b"a"
    for wrong, advice in {
        "--quota night": "write it like --quota landscape=50",
        "--quota night=²": "write it like --quota landscape=50",
        "--link hard": "say where to, with --link-to FOLDER",
        "--reject-label Blue": "say which, with --xmp appended",
        "--overwrite-ratings": "say which, with --xmp appended",
        "--list best.jpg --dry-run": "a list is a .txt, .csv or .parquet file",
        "--diversity 2": "Invalid value for '--diversity'",
        f"--by quality_score={'9' * 400}": "a weight is too large",
    }.items():
        assert main(["select", dest.url, *wrong.split()]) == 2, wrong
        assert advice in capsys.readouterr().err


def test_search_by_words_says_when_a_bundle_has_none(dest: Destination, capsys: Any) -> None:
    assert main(["search", dest.url, "night street with neon"]) == 2
    assert "has no text tower, so it cannot search by words" in capsys.readouterr().err
    assert main(["search", dest.url]) == 2
    assert "say what to look for" in capsys.readouterr().err


def test_curate_leaves_groups_a_selection_and_a_page(dest: Destination, tmp_path: Path, capsys: Any) -> None:
    page = tmp_path / "page.html"
    assert main(["curate", dest.url, "--best", "3", "-o", str(page), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["selected"], said["groups"]["superfluous"], said["report"]["unreadable"]) == (3, 1, 7)
    assert pyarrow.parquet.read_table(said["selection"]).num_rows == 3
    assert page.read_bytes().lower().startswith(b"<!doctype html>")
    main(["verify", dest.url, "--json"])  # these tables were written by hand: it finds much, but none of it here
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] and "groups" not in json.dumps(found["problems"])
