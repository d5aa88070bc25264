"""Groups among photos written by hand: every tie, kind, rank and reason can be derived from the rows."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picinspector import groups, neighbours, schema
from picinspector.cli import main
from picinspector.errors import StorageError, UsageError
from picinspector.groups import Ties
from picinspector.tables import Destination

RUN, LATER = "20260101T000000.000Z-aaaaaa", "20260102T000000.000Z-bbbbbb"
NOON = datetime(2026, 1, 1, 12)


def photo(name: str, quality: float = 5.0, **changes: Any) -> dict[str, Any]:
    """A photo like no other, by its own hash; 12 megapixels."""
    values: dict[str, Any] = {
        "image_id": f"{name}@1", "uri": f"/lib/{name}.jpg", "quality_score": quality, "content_hash": name,
        "phash": int(np.random.default_rng(list(name.encode())).integers(0, 2**64, dtype=np.uint64)),
        "width": 4000, "height": 3000, "captured_at": None, "camera": None, "scorer_kind": "lightgbm",
        **{f"attribute_{attribute}": 50.0 for attribute in schema.ATTRIBUTES},
    }  # fmt: skip
    return values | changes


def table(rows: list[dict[str, Any]]) -> pa.Table:
    facts = [field for field in schema.FACTS if field.name in rows[0]]
    judged = [schema.SCORES.field(name) for name in rows[0] if name in schema.SCORES.names]
    return pa.Table.from_pylist(rows, schema=pa.schema([*judged, *facts]))


def unit(*rows: list[float]) -> np.ndarray:
    matrix = np.array(rows, np.float64)
    return (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float16)


def apart(count: int) -> np.ndarray:
    return np.eye(count, dtype=np.float16)


def find(rows: list[dict[str, Any]], vectors: np.ndarray, ties: Ties = Ties()) -> dict[str, dict[str, Any]]:
    found = groups.find(table(rows), vectors, ties)
    assert found.schema.equals(schema.GROUPS) and found.column("uri").to_pylist() == [row["uri"] for row in rows]
    return {Path(row["uri"]).stem: row for row in found.to_pylist()}


def test_a_photo_like_no_other_is_its_own_best() -> None:
    found = find([photo("a"), photo("b")], apart(2))
    assert found["a"] == {
        "image_id": "a@1", "uri": "/lib/a.jpg", "group_id": "a@1", "group_kind": "single", "group_size": 1,
        "rank_in_group": 1, "is_best": True, "reason": None,
    }  # fmt: skip


def test_the_same_bytes_are_exact_copies_and_the_shortest_name_stays() -> None:
    rows = [photo("copy of a", content_hash="x"), photo("a", content_hash="x"), photo("c", content_hash=None),
            photo("d", content_hash=None)]  # fmt: skip
    found = find(rows, apart(4))
    assert [found[name]["group_kind"] for name in ("a", "copy of a", "c", "d")] == [
        "exact",
        "exact",
        "single",
        "single",
    ]
    assert found["a"]["is_best"] and found["a"]["reason"] == "One of 2 identical files"
    assert found["copy of a"]["rank_in_group"] == 2 and found["copy of a"]["reason"] == "same file as the pick"


def test_near_duplicates_need_both_the_embedding_and_the_hash() -> None:
    alike = unit([1, 0.1], [1, 0.12], [1, 0.11], [0, 1])
    rows = [photo("a", phash=0b0), photo("b", phash=0b111), photo("c", phash=2**40 - 1), photo("d", phash=0b1)]
    found = find(rows, alike)
    assert found["a"]["group_id"] == found["b"]["group_id"] == "a@1"
    assert found["a"]["group_kind"] == "near"
    assert found["c"]["group_kind"] == "single", "another picture by its hash"
    assert found["d"]["group_kind"] == "single", "another picture by its embedding"
    assert find(rows, alike, Ties(near_bits=2))["a"]["group_kind"] == "single"


def test_a_burst_is_one_camera_s_seconds_that_look_alike() -> None:
    def at(seconds: float, camera: str | None = "X") -> dict[str, Any]:
        return {"captured_at": NOON + timedelta(seconds=seconds), "camera": camera}

    rows = [
        photo("0", **at(0)), photo("1", **at(2.5)), photo("2", **at(5)), photo("late", **at(9)),
        photo("other camera", **at(1, "Y")), photo("no camera", **at(1, None)), photo("other sight", **at(1)),
    ]  # fmt: skip
    vectors = unit([1, 0], [1, 0.2], [1, 0.4], [1, 0.4], [1, 0], [1, 0], [0, 1])
    found = find(rows, vectors)
    assert {name for name, row in found.items() if row["group_kind"] == "burst"} == {"0", "1", "2"}
    assert {found[name]["group_id"] for name in "012"} == {"0@1"}, "a chain"
    assert find(rows, vectors, Ties(burst_s=0))["0"]["group_kind"] == "single"


def test_the_loosest_tie_that_is_needed_names_the_group() -> None:
    moment = {"captured_at": NOON, "camera": "X"}
    rows = [photo("a", content_hash="x", phash=0, **moment), photo("b", content_hash="x", phash=0, **moment),
            photo("c", phash=1, **moment), photo("d", **moment)]  # fmt: skip
    vectors = unit([1, 0], [1, 0], [1, 0.1], [1, 0.5])
    assert {row["group_kind"] for row in find(rows, vectors).values()} == {"burst"}
    assert {row["group_kind"] for row in find(rows[:3], vectors[:3]).values()} == {"near"}
    assert {row["group_kind"] for row in find(rows[:2], vectors[:2]).values()} == {"exact"}


def test_the_pick_and_the_reasons() -> None:
    near = {"phash": 7}
    rows = [
        photo("best", 7.0, attribute_sharpness=80.0, attribute_noisiness=52.0, **near),
        photo("soft", 6.0, attribute_sharpness=60.0, attribute_noisiness=45.0, **near),
        photo("twin", 7.0, attribute_sharpness=80.0, attribute_noisiness=52.0, content_hash="best", **near),
    ]
    found = find(rows, unit([1, 0], [1, 0.1], [1, 0]))
    assert [found[name]["rank_in_group"] for name in ("best", "twin", "soft")] == [1, 2, 3]
    assert found["soft"]["reason"] == "less sharp (-20), noisier (-7), scores 1.00 lower"
    assert found["twin"]["reason"] == "same file as the pick"
    assert found["best"]["reason"] == "Sharpest, cleanest, highest score (7.00, next 6.00), of 3", (
        "its twin is no rival"
    )
    pair = find(rows[:2], unit([1, 0], [1, 0.1]))
    assert pair["best"]["reason"] == "Sharpest, cleanest, highest score (7.00, next 6.00), of 2"


def test_of_those_that_score_alike_the_largest_is_the_pick() -> None:
    rows = [photo("small", 6.1, width=400, height=300, phash=3), photo("large", 6.0, phash=3),
            photo("poor", 5.0, width=8000, phash=3)]  # fmt: skip
    found = find(rows, unit([1, 0], [1, 0.1], [1, 0.05]))
    assert [found[name]["rank_in_group"] for name in ("large", "small", "poor")] == [1, 2, 3]
    assert found["large"]["reason"] == "Largest (12 MP) of those that score alike, of 3"
    assert found["small"]["reason"].startswith("smaller (0.12 of 12 MP)")


def test_equals_are_not_told_apart_by_a_score_that_is_the_same() -> None:
    rows = [photo("small", 5.0, width=400, height=300, phash=3), photo("large", 5.0, phash=3)]
    vectors = unit([1, 0], [1, 0.1])
    assert find(rows, vectors)["large"]["reason"] == "Largest (12 MP) of those that score alike, of 2"
    rows = [photo("a", 5.0, phash=3), photo("b", 5.0, phash=3)]
    assert find(rows, vectors)["a"]["reason"] == "As good as the next (5.00), of 2"


def test_zero_shot_brightness_is_no_reason() -> None:
    rows = [photo("a", 6.0, phash=3, attribute_brightness=95.0), photo("b", 5.0, phash=3)]
    vectors = unit([1, 0], [1, 0.1])
    assert find(rows, vectors)["a"]["reason"] == "Best exposed, highest score (6.00, next 5.00), of 2"
    assert find(rows, vectors)["b"]["reason"] == "worse exposed (-45), scores 1.00 lower"
    rows = [row | {"scorer_kind": "zero_shot"} for row in rows]
    assert find(rows, vectors)["a"]["reason"] == "Highest score (6.00, next 5.00), of 2"
    assert find(rows, vectors)["b"]["reason"] == "scores 1.00 lower"


def test_a_series_that_turns_away_from_its_best_is_several_groups() -> None:
    """A time-lapse that pans by 10 degrees a frame: cosines of .985 to the next, .64 to the fifth, .5 to the sixth."""
    rows = [
        photo(f"{frame:02}", 9.0 if frame == 10 else 5.0, captured_at=NOON + timedelta(seconds=2 * frame), camera="X")
        for frame in range(19)
    ]
    angles = np.radians([10 * frame for frame in range(19)])
    found = find(rows, unit(*np.stack([np.cos(angles), np.sin(angles)], axis=1)))
    members: dict[str, list[int]] = {}
    for name, row in found.items():
        members.setdefault(row["group_id"], []).append(int(name))
    assert members == {"05@1": [*range(5, 16)], "00@1": [*range(5)], "16@1": [16, 17, 18]}
    assert {row["group_kind"] for row in found.values()} == {"burst"}


def test_the_pick_is_the_one_that_the_others_look_like() -> None:
    """The 9.0 draws the best three of its side; of the rest the best by score leads, not the larger one beside it."""
    rows = [
        photo(name, quality, captured_at=NOON + timedelta(seconds=2 * at), camera="X", **size)
        for at, (name, quality, size) in enumerate([
            ("0", 9.0, {}), ("30", 5.0, {}), ("55", 8.7, {"width": 8000}), ("75", 5.0, {}), ("95", 8.8, {}),
            ("120", 5.0, {}), ("144", 5.0, {}),
        ])
    ]  # fmt: skip
    angles = np.radians([int(Path(row["uri"]).stem) for row in rows])
    found = find(rows, unit(*np.stack([np.cos(angles), np.sin(angles)], axis=1)))
    picks = {row["group_id"]: name for name, row in found.items() if row["is_best"]}
    for name, row in found.items():
        turned = abs(int(name) - int(picks[row["group_id"]]))
        assert np.cos(np.radians(turned)) >= 0.6, (name, picks[row["group_id"]])
    assert sorted(picks.values()) == ["0", "95"]


def test_frames_of_a_burst_with_a_loose_tie_stay_together() -> None:
    rows = [photo(name, captured_at=NOON + timedelta(seconds=at), camera="X") for at, name in enumerate("abc")]
    vectors = unit([1, 0, 0], [0.55, 0.835, 0], [0.55, 0.297, 0.781])
    assert {row["group_size"] for row in find(rows, vectors, Ties(burst_similarity=0.5)).values()} == {3}


@pytest.mark.parametrize("without", [[0], [1], [2], [0, 1, 2]])
def test_copies_stay_together_whatever_their_embeddings(without: list[int]) -> None:
    rows = [photo("a", 9.0, content_hash="x"), photo("b", content_hash="x"), photo("c", content_hash="x")]
    vectors = unit([1, 0], [1, 0], [1, 0])
    vectors[without] = 0
    assert {row["group_size"] for row in find(rows, vectors).values()} == {3}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([4.0, 4.1, 6.0])), min_size=1, max_size=12))
def test_every_photo_is_in_one_group_with_one_pick(drawn: list[tuple[int, float]]) -> None:
    rows = [photo(f"p{i}", quality, content_hash=f"h{content}") for i, (content, quality) in enumerate(drawn)]
    found = groups.find(table(rows), apart(len(rows))).to_pylist()
    by_group: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        by_group.setdefault(row["group_id"], []).append(row)
    assert len(by_group) == len({content for content, _ in drawn})
    for members in by_group.values():
        assert sorted(row["rank_in_group"] for row in members) == list(range(1, len(members) + 1))
        assert {row["group_size"] for row in members} == {len(members)}
        assert min(row["image_id"] for row in members) == members[0]["group_id"]
        assert all(row["is_best"] == (row["rank_in_group"] == 1) for row in members)
    again = groups.find(table(rows[::-1]), apart(len(rows))).to_pylist()
    assert sorted(again, key=lambda row: row["uri"]) == sorted(found, key=lambda row: row["uri"]), (
        "whatever their order"
    )


def test_the_index_finds_what_comparing_all_pairs_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    scenes = rng.normal(size=(1500, 64))
    frames = np.repeat(scenes, 3, axis=0) + 0.25 * rng.normal(size=(4500, 64))
    vectors = unit(*frames)
    vectors[7] = 0  # a photo without an embedding
    every, cosine = neighbours.alike(vectors, 0.8)
    assert 3000 < len(every) <= 4500 and (cosine >= 0.8).all()
    monkeypatch.setattr(neighbours, "EXACT_ROWS", 0)
    found, _ = neighbours.alike(vectors, 0.8)
    pairs = {tuple(pair) for pair in every.tolist()}
    assert {tuple(pair) for pair in found.tolist()} <= pairs
    assert len(found) >= 0.98 * len(every)
    assert 7 not in found
    assert np.array_equal(neighbours.alike(vectors, 0.8)[0], found), "the same again"
    odd = neighbours.alike(vectors, 0.8, lambda left, right: (left + right) % 2 == 1)[0]
    assert np.array_equal(odd, found[found.sum(axis=1) % 2 == 1]), "those that are confirmed"


# --- a destination ----------------------------------------------------------------------------------------------------


def commit(dest: Destination, run_id: str, rows: list[dict[str, Any]], vectors: np.ndarray) -> None:
    seen = [row | {"encoder_fingerprint": "e"} for row in rows]
    wide = schema.embeddings(vectors.shape[1], 2)
    embeddings = pa.Table.from_pylist(
        [
            {name: row.get(name) for name in wide.names} | {"clip_embedding": list(vectors[i])}
            for i, row in enumerate(seen)
        ],
        schema=wide,
    )
    scores = pa.Table.from_pylist(
        [{name: row.get(name) for name in schema.SCORES.names} | {"scorer_fingerprint": "s"} for row in rows],
        schema=schema.SCORES,
    )
    dest.write_parquet(f"{dest.table_path('embeddings', run_id)}/0.parquet", embeddings)
    dest.write_parquet(f"{dest.table_path('scores', run_id)}/0.parquet", scores)
    dest.commit({"run_id": run_id, "kind": "score", "counts": {"to_do": len(rows)}})


@pytest.fixture
def dest(tmp_path: Path) -> Destination:
    dest = Destination(tmp_path / "tables")
    rows = [photo("a", 7, content_hash="x", scene="night"), photo("b", 7, content_hash="x", scene="night"),
            photo("c", scene="night"), photo("d", quality=None)]  # fmt: skip
    commit(dest, RUN, rows, apart(4))
    return dest


def test_groups_of_a_destination_are_made_anew_when_a_run_was_committed(dest: Destination, capsys: Any) -> None:
    assert groups.load(dest) is None
    assert main(["groups", dest.url, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["photos"], said["superfluous"], said["largest"], said["as_of"]) == (3, 1, 2, RUN)
    assert said["groups"] == {"exact": 1, "near": 0, "burst": 0}
    found = groups.load(dest)
    assert found is not None and found.column("uri").to_pylist() == ["/lib/a.jpg", "/lib/b.jpg", "/lib/c.jpg"]
    assert groups.current(dest).equals(found)
    commit(dest, LATER, [photo("c", 8, content_hash="x", image_id="c@2")], apart(4)[:1])
    assert {row["group_kind"] for row in groups.current(dest).to_pylist()} == {"exact"}
    best = [row["uri"] for row in groups.current(dest).to_pylist() if row["is_best"]]
    assert best == ["/lib/c.jpg"], "the newest row of it counts"


def test_groups_keep_the_ties_they_were_made_with(dest: Destination, capsys: Any) -> None:
    near = [photo("e", phash=0, scene="night"), photo("f", phash=0b11, scene="night")]
    commit(dest, LATER, near, unit([0, 0, 1, 0.1], [0, 0, 1, 0.2]))
    assert main(["groups", dest.url, "--near-bits", "1"]) == 0
    assert groups.describe(groups.current(dest))["groups"]["near"] == 0
    assert main(["select", dest.url, "--best", "9"]) == 0
    assert groups.describe(groups.load(dest))["ties"]["near_bits"] == 1
    assert groups.describe(groups.current(dest, Ties(), keep=False))["groups"]["near"] == 1
    assert groups.describe(groups.load(dest))["groups"]["near"] == 0, "not kept"
    for options in (["--near-similarity", "-1"], ["--burst-seconds", "inf"], ["--near-bits", "65"]):
        assert main(["groups", dest.url, *options]) == 2
        assert "Invalid value for" in capsys.readouterr().err


def test_tables_without_what_always_was_are_refused(tmp_path: Path) -> None:
    dest = Destination(tmp_path / "tables")
    commit(dest, RUN, [photo("a"), photo("b")], apart(2))
    [file] = dest.files(dest.table_path("embeddings", RUN))
    dest.write_parquet(file, pa.parquet.read_table(file).drop_columns(["phash"]))
    with pytest.raises(UsageError, match="an older version wrote these tables, without phash: score them again"):
        groups.make(dest)


def test_tables_without_hashes_of_the_content_have_no_exact_copies(tmp_path: Path) -> None:
    dest = Destination(tmp_path / "tables")
    commit(dest, RUN, [photo("a", content_hash="x"), photo("b", content_hash="x")], apart(2))
    [file] = dest.files(dest.table_path("embeddings", RUN))
    dest.write_parquet(file, pa.parquet.read_table(file).drop_columns(["content_hash"]))
    assert groups.describe(groups.make(dest))["groups"]["exact"] == 0


def test_two_bundles_embeddings_are_not_compared(dest: Destination) -> None:
    commit(dest, LATER, [photo("e")], apart(9)[:1])
    with pytest.raises(UsageError, match="embeddings of 4 and of 9 numbers, from two bundles"):
        groups.make(dest)


def test_a_damaged_file_says_how_to_mend_it(dest: Destination) -> None:
    groups.save(dest, groups.make(dest))
    Path(f"{dest.root}/groups/groups.parquet").write_bytes(b"PAR1")
    with pytest.raises(StorageError, match=r"groups\.parquet is damaged; delete it and run the same command again"):
        groups.load(dest)
    groups.save(dest, groups.make(dest))
    file = Path(f"{dest.root}/groups/groups.parquet")
    content, column = bytearray(file.read_bytes()), pa.parquet.read_metadata(file).row_group(0).column(4)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start + column.total_compressed_size - 1] ^= 1  # in a page of numbers: only its checksum tells
    file.write_bytes(content)
    with pytest.raises(StorageError, match=r"groups\.parquet is damaged"):
        groups.load(dest)
