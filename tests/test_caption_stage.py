"""The caption stage: what contradicts the heads is not said, and every photo keeps its row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from picinspector import bundle as bundles
from picinspector import schema
from picinspector.bundle import open_bundle
from picinspector.captioner import Captioner
from picinspector.errors import UsageError
from picinspector.manifest import stat_uris
from picinspector.photo import Limits
from picinspector.stages import Batch
from picinspector.stages import caption as stage
from picinspector.stages.caption import Caption, describe, read_again
from picinspector.stages.encode import Encode, within_memory
from picinspector.stages.read import caption_crop, crops_of, read_photos
from picinspector.stages.score import Score
from picinspector.wording import Facts, check, compose, parse
from tests.bundles import tiny_bundle
from tests.poison import small
from training.ladders import png

SOFT = Facts(
    {"mos": 30.0, "brightness": 70.0, "colorfulness": 50.0, "contrast": 50.0, "noisiness": 70.0, "sharpness": 15.0},
    {name: 0.92 if name == "plant" else 0.01 for name in schema.SCENES},
    0.4,
)
TRUE, FALSE = "It is badly blurred.", "It is very sharp."


class Scripted:
    """A captioner that says what it is told to, first by greedy search and then with beams."""

    def __init__(self, greedy: list[str], beams: str) -> None:
        self.greedy, self.beams, self.asked = greedy, beams, []

    def caption(self, crops: np.ndarray, facts: Any = None, beams: int = 1) -> list[str]:
        self.asked.append((len(crops), facts, beams))
        return self.greedy[: len(crops)] if beams == 1 else [self.beams] * len(crops)


@pytest.fixture
def folder(captioned_bundle: Path) -> Path:
    return captioned_bundle


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    uris = []
    for index in range(5):
        path = tmp_path / f"{index}.png"
        path.write_bytes(png(rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)) if index != 2 else b"no photo")
        uris.append(str(path))
    return uris


def embedded(folder: Path, photos: list[str]) -> pa.Table:
    bundle = open_bundle(folder)
    [column] = caption_crop(bundle)
    read = read_photos(stat_uris(photos), crops_of(bundle, captions=True), Limits())
    return Encode(str(folder), keep=column)(read)


def test_a_true_caption_is_kept_and_a_false_one_is_not() -> None:
    crops = np.zeros((3, 4, 4, 3), np.uint8)
    model = Scripted([TRUE, FALSE, "no sentence"], beams=TRUE)
    assert describe(model, crops, [SOFT] * 3) == ([TRUE] * 3, ["model", "model_retry", "model_retry"])
    assert [(count, beams) for count, _, beams in model.asked] == [(3, 1), (2, 4)]
    assert all("sharpness bad" in line for _, facts, _ in model.asked for line in facts)


def test_what_is_false_twice_is_composed() -> None:
    model = Scripted([FALSE], beams=FALSE)
    [text], [source] = describe(model, np.zeros((1, 4, 4, 3), np.uint8), [SOFT])
    assert (text, source) == (compose(SOFT), "composed")
    assert check(text, SOFT).accuracy == 1.0


def test_without_a_trained_head_nothing_is_told_or_checked() -> None:
    model = Scripted([FALSE], beams=TRUE)
    assert describe(model, np.zeros((1, 4, 4, 3), np.uint8), None) == ([FALSE], ["model"])
    assert model.asked == [(1, None, 1)]


def test_every_row_keeps_its_place(folder: Path, photos: list[str]) -> None:
    rows = embedded(folder, photos)
    [column] = caption_crop(open_bundle(folder))
    assert rows.column_names[-1] == column
    reports: list[Batch] = []
    done = Caption(str(folder), column, report=reports.append)(rows)
    assert done.schema.equals(schema.embeddings(32, 48))
    assert done.column("uri").to_pylist() == photos
    assert [batch[:3] for batch in reports] == [("caption", 5, {})], "the error arose before"
    for row in done.to_pylist():
        if row["error_kind"] is not None:
            assert row["caption"] is row["caption_source"] is row["caption_fingerprint"] is None
        else:
            assert parse(row["caption"]) and row["caption_source"] in schema.CAPTION_SOURCES
            assert row["caption_fingerprint"] == open_bundle(folder).caption_fingerprint
    assert done.drop_columns(["caption", "caption_source", "caption_fingerprint"]).equals(
        rows.drop_columns(["caption", "caption_source", "caption_fingerprint", column])
    )


def test_each_photo_has_the_words_of_its_own_crop_and_facts(
    folder: Path, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captioner that repeats what it was shown and told: rows around a failed photo must not slip."""

    def repeat(self: Any, crops: np.ndarray, facts: Any = None, beams: int = 1) -> list[str]:
        return [f"Pixels {crop.sum()} and {fact}." for crop, fact in zip(crops, facts, strict=True)]

    monkeypatch.setattr(Captioner, "caption", repeat)
    monkeypatch.setattr(stage, "tell", lambda facts: f"sharpness {facts.attributes['sharpness']:.5f}")
    rows = embedded(folder, photos)
    [column] = caption_crop(open_bundle(folder))
    said = Caption(str(folder), column)(rows).column("caption").to_pylist()
    alone = [Caption(str(folder), column)(rows.slice(row, 1)).column("caption")[0].as_py() for row in range(5)]
    assert said == alone and said[2] is None
    for row in (0, 1, 3, 4):
        pixels = np.frombuffer(rows.column(column)[row].as_py(), np.uint8)
        assert f"Pixels {pixels.sum()} and sharpness" in said[row]
    assert len({text.split("sharpness")[1] for text in said if text}) == 4  # facts differ as well


def test_a_batch_without_one_good_photo(folder: Path, photos: list[str]) -> None:
    [column] = caption_crop(open_bundle(folder))
    done = Caption(str(folder), column)(embedded(folder, [photos[2]]))
    assert done.num_rows == 1 and done.column("caption").null_count == 1


def test_a_photo_that_is_gone_is_described_from_its_facts(folder: Path, photos: list[str]) -> None:
    stored = Encode(str(folder))(read_photos(stat_uris(photos), crops_of(open_bundle(folder)), Limits()))
    Path(photos[1]).unlink()
    Path(photos[3]).write_bytes(Path(photos[4]).read_bytes())
    crops = caption_crop(open_bundle(folder))
    done = Caption(str(folder), *crops)(read_again(stored, crops, Limits())).to_pylist()
    assert [row["caption_source"] for row in done][1:3] == ["unread", None]
    assert done[1]["caption_error"].startswith("not_found: ")
    assert done[3]["caption_error"].startswith("changed: ") and done[3]["caption_source"] == "unread"
    assert [row["caption_error"] is None for row in done] == [True, False, True, False, True]
    assert done[2]["error_kind"] == "unknown_format"


def test_another_captioner_on_a_node_ends_the_run(folder: Path) -> None:
    with pytest.raises(bundles.BundleError, match="fingerprint"):
        Caption(str(folder), "captioner_crop", fingerprint="0" * 16)


def test_scoring_with_other_heads_takes_back_what_they_deny(folder: Path, photos: list[str], tmp_path: Path) -> None:
    """A rescore reads no photo: a caption that no longer holds is composed anew."""
    [column] = caption_crop(open_bundle(folder))
    rows = Caption(str(folder), column)(embedded(folder, photos))
    other = tmp_path / "other"
    tiny_bundle(other, scorer_seed=5)
    heads = Score(str(other))
    scored = heads(rows).to_pylist()
    for word, value in (("very sharp", 0), ("badly blurred", 100)):
        said = pa.array([f"The photo is {word}." if row["caption"] else None for row in rows.to_pylist()])
        index = rows.schema.get_field_index("caption")
        again = heads(rows.set_column(index, rows.schema.field(index), said)).to_pylist()
        for before, after in zip(scored, again, strict=True):
            if before["error_kind"] is not None:
                assert after["caption"] is None
                continue
            # A contradiction is more than 20 points off the 80-100 of the one and the 0-20 of the other.
            denied = before["attribute_sharpness"] < 60 if value == 0 else before["attribute_sharpness"] > 40
            assert (after["caption_source"] == "composed") or not denied
            assert (word in after["caption"]) != denied


def test_the_caption_travels_to_the_scores(folder: Path, photos: list[str]) -> None:
    [column] = caption_crop(open_bundle(folder))
    rows = Caption(str(folder), column)(embedded(folder, photos))
    scores = Score(str(folder))(rows)
    assert scores.column("caption").to_pylist() == rows.column("caption").to_pylist()
    assert pc.count(scores.column("suggestions")).as_py() == 4
    assert all(len(row) <= 3 for row in scores.column("suggestions").drop_null().to_pylist())


def test_a_batch_that_is_too_much_for_the_device_is_halved_once(
    folder: Path, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five photos one is none: four at once, then two and two."""
    [column] = caption_crop(open_bundle(folder))
    read = read_photos(stat_uris(photos), crops_of(open_bundle(folder), captions=True), Limits())
    encode, describe_all = Encode(str(folder), keep=column), Caption(str(folder), column)
    whole = encode(read)
    captioned = describe_all(whole)
    clip, captioner = encode._encoders[0], describe_all._captioner
    with monkeypatch.context() as patch:
        patch.setattr(clip, "encode", small(clip.encode, 2))
        patch.setattr(captioner, "caption", small(captioner.caption, 2))
        halved = encode(read)
        assert describe_all(whole).equals(captioned), "the same photo, the same words"
    assert halved.drop_columns(["clip_embedding"]).equals(whole.drop_columns(["clip_embedding"]))
    both = [np.array(rows.column("clip_embedding").drop_null().to_pylist()) for rows in (whole, halved)]
    assert (both[0] * both[1]).sum(axis=1) == pytest.approx(1.0, abs=2e-3), "cosine of each with itself"
    with monkeypatch.context() as patch:
        patch.setattr(clip, "encode", small(clip.encode, 1))
        patch.setattr(captioner, "caption", small(captioner.caption, 1))
        with pytest.raises(UsageError, match=r"memory with 4 photos at once, and with 2: lower --batch-size") as caught:
            encode(read)
        assert "\n" not in str(caught.value) and "Tried to allocate 2 photos" in str(caught.value)
        with pytest.raises(UsageError, match="let no other model share its GPU"):
            describe_all(whole)


def test_one_photo_that_is_too_much_for_the_device_is_not_tried_without_end() -> None:
    asked = []

    def work(part: slice) -> None:
        asked.append(part)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(UsageError, match="buy more memory"):
        within_memory(work, 1, "buy more memory")
    assert len(asked) == 2
