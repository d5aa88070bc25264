"""From embeddings to scores: each model against its reference, and broken rows in every place of a batch."""

from __future__ import annotations

import functools
import io
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import lightgbm
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from safetensors.numpy import save_file

from picinspector import schema
from picinspector.attributes import AttributeHead
from picinspector.bundle import open_bundle
from picinspector.clip import ClipEncoder
from picinspector.errors import BundleError, ErrorKind
from picinspector.manifest import list_library, stat_uris
from picinspector.photo import Limits, decode
from picinspector.scorer import Scorer, feature_matrix, to_quality_score
from picinspector.stages import Batch
from picinspector.stages.encode import Encode
from picinspector.stages.read import crops_of, read_photos
from picinspector.stages.score import Score, score_columns
from picinspector.stages.single import judge
from picinspector.zeroshot import ZeroShot
from tests.bundles import tiny_bundle, write_scorer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with tiny random models."""
    return tiny_bundle(tmp_path_factory.mktemp("scoring") / "tiny").folder


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mos", "low", "high", "expected"),
    [
        (0.0, 0.0, 1.0, 1.0),
        (1.0, 0.0, 1.0, 10.0),
        (0.5, 0.0, 1.0, 5.5),
        (1 / 3, 0.0, 1.0, 4.0),
        (3.0, 1.0, 5.0, 5.5),
        (2.0, 1.0, 5.0, 3.25),
        (-4.0, 0.0, 1.0, 1.0),
        (100.5, 0.0, 100.0, 10.0),
        (-5.0, -10.0, 0.0, 5.5),
    ],
)
def test_quality_score_is_linear_in_the_scale_of_the_labels(
    mos: float, low: float, high: float, expected: float
) -> None:
    found = to_quality_score(np.array([mos]), low, high)
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx([expected], abs=1e-5)


def test_features_are_side_by_side_in_the_order_of_the_spec() -> None:
    columns = {"a": np.array([1, 2], np.float32), "b": np.array([[3, 4], [5, 6]], np.float16), "c": np.array([9, 9])}
    assert feature_matrix(columns, ("b", "a")).tolist() == [[3, 4, 1], [5, 6, 2]]
    assert feature_matrix(columns, ("a", "b")).tolist() == [[1, 3, 4], [2, 5, 6]]
    assert feature_matrix(columns, ("a",)).dtype == np.float32


def test_the_scorer_gives_what_lightgbm_gives(tmp_path: Path) -> None:
    write_scorer(tmp_path, {"clip_embedding": 32, "measured_sharpness": 1})
    rng = np.random.default_rng(0)
    columns = {
        "clip_embedding": rng.normal(size=(50, 32)).astype(np.float16),
        "measured_sharpness": rng.normal(size=50).astype(np.float32),
        "of_no_use": np.zeros(50),
    }
    matrix = np.hstack([columns["clip_embedding"], columns["measured_sharpness"][:, None]]).astype(np.float64)
    reference = lightgbm.Booster(model_file=str(tmp_path / "model.txt")).predict(matrix)
    assert np.ptp(reference) > 0.2
    predicted, quality, low, high = Scorer(tmp_path).predict(columns)
    assert predicted.dtype == quality.dtype == low.dtype == high.dtype == np.float32
    assert np.allclose(predicted, reference, atol=1e-6)
    assert np.allclose(quality, 1 + 9 * np.clip(reference, 0, 1), atol=1e-5)
    # Its intervals: a quarter below and an eighth above up to 0.5, an eighth below and a quarter above from there on.
    below = reference < 0.5
    assert 5 < below.sum() < 45
    assert np.allclose(low, 1 + 9 * np.clip(reference - np.where(below, 0.25, 0.125), 0, 1), atol=1e-5)
    assert np.allclose(high, 1 + 9 * np.clip(reference + np.where(below, 0.125, 0.25), 0, 1), atol=1e-5)


def test_a_scorer_speaks_the_scale_of_its_labels(tmp_path: Path) -> None:
    """One model of unit labels, under a scale of 1-5, with and without an interval, and as what predicts the MOS."""
    write_scorer(tmp_path, {"measured_sharpness": 1})
    path, columns = tmp_path / "scorer.json", {"measured_sharpness": np.linspace(-2, 2, 30)}
    spec = json.loads(path.read_text("utf-8"))
    unit, quality, low, _ = Scorer(tmp_path).predict(columns)

    path.write_text(json.dumps(spec | {"label_min": 1.0, "label_max": 5.0}))
    scaled = Scorer(tmp_path).predict(columns)
    assert np.allclose(scaled.predicted_mos, 1 + 4 * unit, atol=1e-5)
    assert np.allclose(scaled.quality_score, quality, atol=1e-5)
    assert np.allclose(scaled.quality_low, low, atol=1e-5)

    del spec["interval"], spec["output"]  # what the first bundles were written as
    path.write_text(json.dumps(spec | {"label_min": -1.0, "label_max": 1.0}))
    plain = Scorer(tmp_path).predict(columns)
    assert np.allclose(plain.predicted_mos, unit, atol=1e-6)
    assert np.allclose(plain.quality_score, 1 + 9 * np.clip((unit + 1) / 2, 0, 1), atol=1e-5)
    assert plain.quality_low is None and plain.quality_high is None


def test_the_builtin_scorer_loads() -> None:
    scorer = Scorer(open_bundle("builtin").piece("scorer"))
    widths = {"clip_embedding": open_clip_width(open_bundle("builtin").piece("clip"))}
    columns = {name: np.zeros((2, widths[name]) if name in widths else 2) for name in scorer.features}
    assert np.isfinite(scorer.predict(columns).quality_score).all()


def open_clip_width(folder: Path) -> int:
    return int(json.loads((folder / "open_clip_config.json").read_text("utf-8"))["model_cfg"]["embed_dim"])


def prompts(folder: Path) -> Path:
    """Toy prompts: the good prompt of attribute i is axis 2 i, the bad one 2 i + 1, scene j is axis 12 + j."""
    axes = np.eye(21, dtype=np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {"antonyms": axes[:12].reshape(6, 2, 21).copy(), "scenes": axes[12:].copy()}, folder / "prompts.safetensors"
    )
    return folder


def test_zero_shot_by_hand(tmp_path: Path) -> None:
    photos = np.zeros((3, 21), np.float16)
    photos[0, [0, 12]] = 0.75  # the good prompt of `mos`, scene `animal`
    photos[1, [1, 20]] = 0.75  # the bad one, scene `other`
    photos[2, [4, 17]] = 0.0625, 0.03125  # 100 / 16 = 6.25 nearer to colorful than to dull; night by 100 / 32 = 3.125
    quality, attributes, scenes = ZeroShot(prompts(tmp_path)).predict(photos)
    assert quality.dtype == attributes.dtype == scenes.dtype == np.float32
    assert quality.tolist() == pytest.approx([10.0, 1.0, 5.5], abs=1e-5)
    colorful = 100 / (1 + np.exp(-6.25))
    assert attributes[0].tolist() == pytest.approx([100, 50, 50, 50, 50, 50], abs=1e-3)
    assert attributes[1].tolist() == pytest.approx([0, 50, 50, 50, 50, 50], abs=1e-3)
    assert attributes[2].tolist() == pytest.approx([50, 50, colorful, 50, 50, 50], abs=1e-3)
    assert scenes.argmax(axis=1).tolist() == [schema.SCENES.index(name) for name in ("animal", "other", "night")]
    night = np.exp(3.125) / (np.exp(3.125) + 8)
    assert scenes[2].tolist() == pytest.approx([(1 - night) / 8] * 5 + [night] + [(1 - night) / 8] * 3, abs=1e-5)
    with pytest.raises(BundleError, match=r"prompts are 21 wide, these CLIP embeddings 20: score with"):
        ZeroShot(tmp_path).predict(photos[:, :20])
    with pytest.raises(BundleError, match="not readable"):
        ZeroShot(tmp_path / "gone")


# --- stages -----------------------------------------------------------------------------------------------------------

_BROKEN = {
    "gone": (None, ErrorKind.NOT_FOUND),
    "empty": (b"", ErrorKind.EMPTY),
    "words": (b"these are words, not a photo", ErrorKind.UNKNOWN_FORMAT),
}


@functools.cache
def photo_bytes(number: int) -> bytes:
    """A PNG of coloured squares, nothing like any other number's."""
    file, squares = io.BytesIO(), np.random.default_rng(number).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    Image.fromarray(squares).resize((90 + 10 * number, 100), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def make_manifest(folder: Path, pattern: str) -> tuple[pa.Table, list[str | None]]:
    """Photos where the pattern has a dot, and broken files of three kinds where it has an x."""
    uris, expected = [], []
    for number, mark in enumerate(pattern):
        path = folder / f"{number}.png"
        content, kind = (photo_bytes(number), None) if mark == "." else list(_BROKEN.values())[number % 3]
        if content is not None:
            path.write_bytes(content)
        uris.append(str(path))
        expected.append(kind and kind.value)
    return stat_uris(uris), expected


def has_values(table: pa.Table, names: list[str]) -> list[bool]:
    """For each row whether all of these columns have a value; fails where only some do."""
    filled = [[value is not None for value in table.column(name).to_pylist()] for name in names]
    by_row = list(zip(*filled, strict=True))
    assert all(len(set(row)) == 1 for row in by_row), "a row has all of its values or none"
    return [row[0] for row in by_row]


MEASURED = [*schema.MEASUREMENT_FIELDS.names, "width", "height", "format", "phash"]
EMBEDDED = ["clip_embedding", "dinov2_embedding"]
SCORED = [name for name in schema.SCORES.names if name.startswith(("attribute_", "scene")) or name == "quality_score"]
SCORED += ["predicted_mos", "quality_low", "quality_high"]


@pytest.mark.parametrize("pattern", ["......", "x.....", ".....x", "..xx..", "x.x.x.", "xxxxxx", ".", "x", ""])
@pytest.mark.parametrize("chunks", [1, 3])
def test_rows_in_are_rows_out(folder: Path, tmp_path: Path, pattern: str, chunks: int) -> None:
    manifest, expected = make_manifest(tmp_path, pattern)
    bundle, good = open_bundle(folder), [kind is None for kind in expected]
    reported: list[Batch] = []

    read = in_chunks(read_photos(manifest, crops_of(bundle), Limits(), report=reported.append), chunks)
    embedded = Encode(str(folder), threads=1, report=reported.append)(read)
    scored = Score(str(folder), report=reported.append)(in_chunks(embedded, chunks))

    assert embedded.schema.equals(schema.embeddings(32, 48), check_metadata=True)
    assert scored.schema.equals(schema.SCORES, check_metadata=True)
    for table in (embedded, scored):
        table.validate(full=True)
        assert table.select(schema.MANIFEST.names).equals(manifest)
        assert table.column("error_kind").to_pylist() == expected
        assert has_values(table, ["error_message"]) == [not ok for ok in good]
    assert has_values(embedded, MEASURED + EMBEDDED) == good
    assert has_values(scored, SCORED) == good
    assert [(batch.stage, batch.rows) for batch in reported] == [
        (stage, len(pattern)) for stage in ("read", "encode", "score")
    ]
    errors = dict(Counter(kind for kind in expected if kind is not None))
    assert [batch.errors for batch in reported] == [errors, {}, {}], "an error counts where it arises"
    assert scored.column("scorer_kind").to_pylist() == ["lightgbm"] * len(pattern)
    assert embedded.column("encoder_fingerprint").to_pylist() == [bundle.encoder_fingerprint] * len(pattern)
    assert scored.column("scorer_fingerprint").to_pylist() == [bundle.scorer_fingerprint] * len(pattern)

    # Each value is its own photo's: the same as when that photo goes alone.
    encoder = ClipEncoder(bundle.piece("clip"))
    vectors = np.array([row for row in embedded.column("clip_embedding").to_pylist() if row is not None], np.float64)
    if len(vectors):
        crops = [decode(photo_bytes(int(number)), [encoder.crop]).crops[0] for number in np.flatnonzero(good)]
        alone = np.concatenate([encoder.encode(crop[None]) for crop in crops]).astype(np.float64)
        cosines = vectors @ alone.T
        assert cosines.diagonal() == pytest.approx(1, abs=2e-3)
        assert cosines.argmax(axis=1).tolist() == list(range(len(vectors))), "no photo has its neighbour's vector"


def in_chunks(table: pa.Table, count: int) -> pa.Table:
    """The same rows in as many chunks a column, which start inside of shared buffers."""
    edges = np.linspace(0, table.num_rows, count + 1).astype(int)
    return pa.concat_tables([table.slice(a, b - a) for a, b in pairwise(edges)])


def test_scores_are_those_of_the_models(folder: Path, tmp_path: Path) -> None:
    """The stage puts each output of scorer and head into the column of its name."""
    manifest, _ = make_manifest(tmp_path, ".x..")
    embedded = Encode(str(folder))(read_photos(manifest, crops_of(open_bundle(folder)), Limits()))
    rows = [row for row in embedded.to_pylist() if row["error_kind"] is None]
    read = (*EMBEDDED, "measured_sharpness", "measured_noise")
    columns = {name: np.array([row[name] for row in rows], np.float32) for name in read}
    predicted, quality, low, high = Scorer(folder / "scorer").predict(columns)
    attributes, scenes = AttributeHead(folder / "attributes").predict(columns)

    # Only the columns that are asked for, as a rescore reads them.
    asked = score_columns(open_bundle(folder))
    spoken_of = {*schema.FACTS.names, *schema.MEASUREMENT_FIELDS.names, *schema.CAPTION.names}
    assert set(asked) == {*schema.MANIFEST.names, *read, *spoken_of, "error_kind", "error_message"}
    scored = [row for row in Score(str(folder))(embedded.select(asked)).to_pylist() if row["error_kind"] is None]
    assert [row["quality_low"] for row in scored] == pytest.approx(low.tolist(), abs=1e-5)
    assert [row["quality_high"] for row in scored] == pytest.approx(high.tolist(), abs=1e-5)
    for row, mos, score, attribute, scene in zip(scored, predicted, quality, attributes, scenes, strict=True):
        assert (row["predicted_mos"], row["quality_score"]) == pytest.approx((float(mos), float(score)), abs=1e-5)
        assert [row[f"attribute_{name}"] for name in schema.ATTRIBUTES] == pytest.approx(attribute.tolist(), abs=1e-3)
        assert [row[f"scene_{name}"] for name in schema.SCENES] == pytest.approx(scene.tolist(), abs=1e-5)
        assert row["scene"] == schema.SCENES[int(scene.argmax())]


def test_a_photo_over_the_limit_is_not_even_fetched(folder: Path, tmp_path: Path) -> None:
    manifest, _ = make_manifest(tmp_path, "..")
    sizes = manifest.column("size_bytes").to_pylist()
    (tmp_path / "0.png").unlink()  # were it fetched, it would be not found
    limit = Limits(max_bytes=min(sizes) - 1)
    found = read_photos(manifest, crops_of(open_bundle(folder)), limit)
    assert found.column("error_kind").to_pylist() == ["too_many_bytes"] * 2
    assert found.column("error_message")[0].as_py() == f"{sizes[0]} bytes, the limit is {limit.max_bytes}"


def test_one_photo_in_this_process_gets_the_values_of_a_run(folder: Path, tmp_path: Path) -> None:
    make_manifest(tmp_path, ".x")
    [manifest] = list_library(tmp_path / "0.png")
    bundle = open_bundle(folder)
    [row] = Score(str(folder))(Encode(str(folder))(read_photos(manifest, crops_of(bundle), Limits()))).to_pylist()
    found = judge(str(tmp_path / "0.png"), str(folder))
    assert (found["uri"], found["quality_score"], found["scene"]) == (row["uri"], row["quality_score"], row["scene"])
    assert found["attributes"] == {name: row[f"attribute_{name}"] for name in schema.ATTRIBUTES}
    assert found["scenes"] == {name: row[f"scene_{name}"] for name in schema.SCENES}
    assert (found["facts"]["width"], found["facts"]["height"], found["facts"]["format"]) == (90, 100, "PNG")
    assert set(found["measurements"]) == set(schema.MEASUREMENTS)
    assert found["error_kind"] is None

    broken = judge(str(tmp_path / "1.png"), str(folder))
    assert (broken["error_kind"], broken["quality_score"], broken["scene"]) == ("empty", None, None)
    assert set(broken["attributes"].values()) == set(broken["measurements"].values()) == {None}
