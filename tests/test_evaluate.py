"""Evaluation: figures that a person can derive, the judge against the production path, and a whole run."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from jobs.demo import real_photos
from picinspector.bundle import open_bundle
from picinspector.conformal import Intervals
from picinspector.errors import UsageError
from picinspector.schema import ATTRIBUTES, SCENES
from picinspector.stages import single
from tests.bundles import tiny_bundle
from training import baselines, evaluate, figures, ladders, precision
from training.datasets import LabelledPhoto
from training.figures import evaluate_scenes, read_scenes
from training.judge import Judge, Judgement
from training.report import to_markdown


def evaluate_labels(*arguments: Any) -> dict[str, Any]:
    return figures.evaluate_labels(*arguments, resamples=50)


def judgement(quality: Iterable[float], low: Any = None, high: Any = None, scenes: Any = None) -> Judgement:
    values = np.array(list(quality), dtype=np.float64)
    attributes = np.tile(np.arange(6.0) * 10, (len(values), 1))
    attributes[:, 0] = (values - 1) / 9 * 100
    probabilities = np.eye(9)[np.zeros(len(values), int) if scenes is None else scenes]
    return Judgement(values, low, high, attributes, probabilities)


def labelled(mos: Iterable[float], **fields: Any) -> list[LabelledPhoto]:
    photos = []
    for row, value in enumerate(mos):
        own = {name: values[row] for name, values in fields.items()}
        photos.append(LabelledPhoto(f"/photos/{row}.jpg", float(value), **own))
    return photos


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_are_brought_to_the_scale_of_quality() -> None:
    result = evaluate_labels(judgement([1, 5.5, 10]), labelled([0, 50, 100]), (0.0, 100.0))
    whole = result["quality"]["all"]
    assert (whole["photos"], whole["rmse"], whole["rmse_unit"]) == (3, 0.0, 0.0)
    assert whole["plcc"] == whole["srcc"] == whole["r2"] == pytest.approx(1.0)
    off_by_one = evaluate_labels(judgement([2, 6.5, 9]), labelled([0, 50, 100]), (0.0, 100.0))["quality"]["all"]
    assert off_by_one["rmse"] == pytest.approx(1.0) and off_by_one["rmse_unit"] == pytest.approx(1 / 9)


def test_parts_are_left_out_and_told_apart() -> None:
    rng = np.random.default_rng(0)
    mos = rng.uniform(0, 1, 40)
    quality = 1 + 9 * mos
    quality[20:] = 11 - quality[20:]  # the second half is judged the wrong way round
    photos = labelled(mos, subset=["a"] * 20 + ["b"] * 20)
    scenes = np.repeat([3, 5], 20)
    twins = frozenset(f"{row}.jpg" for row in range(20, 40))
    result = evaluate_labels(judgement(quality, scenes=scenes), photos, (0.0, 1.0), twins)["quality"]
    assert result["without near-duplicates"]["srcc"] == pytest.approx(1.0)
    assert result["without near-duplicates"]["photos"] == 20
    assert result["subset a"]["srcc"] == result["predicted scene indoor"]["srcc"] == pytest.approx(1.0)
    assert result["subset b"]["srcc"] == result["predicted scene night"]["srcc"] == pytest.approx(-1.0)
    assert "predicted scene animal" not in result  # nothing was taken for one
    assert -1.0 < result["all"]["srcc"] < 1.0
    low, high = result["all"]["interval"]["srcc"]
    assert low < result["all"]["srcc"] < high


def test_coverage_is_the_share_of_labels_inside() -> None:
    low, high = np.array([1.0, 4.0, 8.0, 1.0]), np.array([2.0, 5.0, 10.0, 3.0])
    photos = labelled([1.5, 4.0, 7.0, 3.5])  # inside, on the bound, below, above
    result = evaluate_labels(judgement([1.5, 4.5, 9, 2], low, high), photos, (1.0, 10.0))["coverage"]
    assert result["coverage"] == 0.5
    assert result["width"] == pytest.approx((1 + 1 + 2 + 2) / 4)
    rows = {row["bin"]: row for row in result["bins"]}
    assert (rows["low"]["coverage"], rows["low"]["photos"]) == (1.0, 1)
    assert rows["mid"]["coverage"] == 0.5 and rows["high"]["coverage"] == 0.0
    assert rows["top"]["photos"] == 0 and np.isnan(rows["top"]["coverage"])


def test_without_intervals_there_is_no_coverage() -> None:
    result = evaluate_labels(judgement([1, 5, 10]), labelled([0, 0.5, 1]), (0.0, 1.0))
    assert result["coverage"] is None and result["attributes"] is None


def test_attributes_are_compared_with_spaq_and_with_the_photos_own_ratings() -> None:
    mos = np.linspace(0, 1, 12)
    judged = judgement(1 + 9 * mos)
    judged.attributes[:, ATTRIBUTES.index("sharpness")] = np.linspace(20, 64, 12)
    photos = labelled(mos, attributes=[{"sharpness": 90 - 5.0 * row} for row in range(12)])
    result = evaluate_labels(judged, photos, (0.0, 1.0))
    scale = result["attribute_scale"]["sharpness"]
    assert (scale["mean"], scale["spaq_mean"], scale["spaq_sd"]) == (pytest.approx(42.0), 47.0, 24.2)
    assert scale["sd"] == pytest.approx(4 * np.arange(12).std(ddof=1))
    assert list(result["attributes"]) == ["sharpness"]
    assert result["attributes"]["sharpness"]["srcc"] == pytest.approx(-1.0)


# --- scenes -----------------------------------------------------------------------------------------------------------


def test_scene_figures_of_a_confusion_matrix_made_by_hand() -> None:
    predicted = [0, 0, 0, 1, 1, 8]
    labels = ["animal", "animal", "cityscape", "cityscape", "animal", "other"]
    result = evaluate_scenes(np.eye(9)[predicted], labels)
    assert result["accuracy"] == pytest.approx(4 / 6)
    assert result["confusion"][0][:2] == [2, 1] and result["confusion"][1][:2] == [1, 1]
    assert result["per_scene"]["animal"] == {
        "photos": 3,
        "recall": pytest.approx(2 / 3),
        "precision": pytest.approx(2 / 3),
    }
    # F1: animal 2/3, cityscape 1/2, other 1; scenes without a label do not count.
    assert result["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert result["interval"][0] < result["accuracy"] < result["interval"][1]


@pytest.mark.parametrize(
    ("line", "complaint"), [("9.jpg,animal", "9.jpg is not among"), ("1.jpg,beach", "'beach'"), ("1.jpg,", "no scene")]
)
def test_a_wrong_scene_label_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    (tmp_path / "scenes.csv").write_text(f"file,scene\n{line}\n")
    with pytest.raises(UsageError, match=re.escape(complaint)):
        read_scenes(tmp_path / "scenes.csv", labelled([0, 1]))


# --- ladders ----------------------------------------------------------------------------------------------------------


def test_a_ladder_that_leads_and_one_that_does_not() -> None:
    steps = np.linspace(0, 1, ladders.STEPS)
    runs = np.full((2, ladders.STEPS, 6), 50.0)
    runs[:, :, ATTRIBUTES.index("sharpness")] -= 30 * steps
    runs[:, :, ATTRIBUTES.index("mos")] -= 45 * steps  # does not count: quality falls with every fault
    runs[0, :, ATTRIBUTES.index("contrast")] += 40 * steps  # in one of the two photos it moves further, upwards
    result = ladders.ladder(runs, "sharpness")
    assert result["srcc"] == pytest.approx(1.0)
    assert (result["clean"], result["gross"]) == (50.0, 20.0)
    assert result["fall"]["contrast"] == -20.0 and result["fall"]["sharpness"] == 30.0
    assert result["leads"] and result["leads_share"] == 0.5
    runs[1, :, ATTRIBUTES.index("contrast")] += 40 * steps
    assert not ladders.ladder(runs, "sharpness")["leads"]


def test_an_attribute_that_does_not_move_counts_nothing() -> None:
    runs = np.full((2, ladders.STEPS, 6), 50.0)
    runs[0, :, ATTRIBUTES.index("noisiness")] -= np.arange(ladders.STEPS)
    result = ladders.ladder(runs, "noisiness")
    assert result["srcc"] == pytest.approx(0.5)
    assert result["srcc_interval"] == (0.0, pytest.approx(1.0))


class Meter:
    """A judge that measures: luma for brightness and for quality, Laplacian for sharpness; the rest stays."""

    def judge(self, photos: Iterable[bytes]) -> Judgement:
        rows = []
        for data in photos:
            luma = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE).astype(np.float64)
            rows.append((luma.mean() / 2.55, min(100.0, float(np.abs(cv2.Laplacian(luma, cv2.CV_64F)).mean()))))
        attributes = np.full((len(rows), 6), 50.0)
        attributes[:, [ATTRIBUTES.index("brightness"), ATTRIBUTES.index("sharpness")]] = rows
        quality = 1 + attributes[:, ATTRIBUTES.index("brightness")] * 0.09
        return Judgement(quality, None, None, attributes, np.full((len(rows), 9), 1 / 9))


def test_ladders_of_a_real_photo_by_a_judge_that_measures() -> None:
    photo = cv2.resize(real_photos()["coffee"], (96, 64), interpolation=cv2.INTER_AREA)
    result = ladders.climb(Meter(), {"coffee": photo})  # type: ignore[arg-type]
    # The first step blurs by a tenth of a pixel of this small photo: nothing changes.
    assert result["ladders"]["blur"]["srcc"] > 0.95 and result["ladders"]["blur"]["leads"]
    assert result["ladders"]["underexpose"]["srcc"] == pytest.approx(1.0)
    assert result["ladders"]["overexpose"]["srcc"] == pytest.approx(-1.0)  # luma is not quality of exposure
    assert result["attributes"]["brightness"]["srcc"] == pytest.approx(0.0)
    assert not result["attributes"]["brightness"]["leads"]
    assert "coffee overexpose" in result["lost"] and "coffee underexpose" not in result["lost"]
    assert result["win_rate"] == pytest.approx(1 - len(result["lost"]) / result["pairs"])


# --- judge ------------------------------------------------------------------------------------------------------------


def write_photos(folder: Path, count: int = 3) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    coffee, paths = real_photos()["coffee"], []
    for row in range(count):
        paths.append(folder / f"{row}.jpg")
        Image.fromarray(coffee[row * 12 : row * 12 + 160, row * 15 : row * 15 + 200]).save(paths[-1])
    return paths


def test_the_judge_says_what_a_run_says(tiny: Path, tmp_path: Path) -> None:
    paths = write_photos(tmp_path)
    judged = Judge(open_bundle(tiny)).judge(path.read_bytes() for path in paths)
    assert judged.attributes.shape == (3, 6)
    for row, path in enumerate(paths):
        expected = single.judge(str(path), str(tiny))
        assert judged.quality[row] == pytest.approx(expected["quality_score"], abs=0.05)  # batches round differently
        assert judged.attributes[row] == pytest.approx(list(expected["attributes"].values()), abs=0.5)
        assert SCENES[judged.scenes[row].argmax()] == expected["scene"]


def test_embeddings_are_kept_for_the_same_bytes_and_encoders(tiny: Path, tmp_path: Path) -> None:
    data = [path.read_bytes() for path in write_photos(tmp_path)]
    first = Judge(open_bundle(tiny), cache=tmp_path / "out")
    before = first.judge([*data, data[0]])
    assert before.quality[3] == before.quality[0]

    second = Judge(open_bundle(tiny), cache=tmp_path / "out")
    second.embed = lambda batch: pytest.fail("embedded a second time")  # type: ignore[method-assign]
    again = second.judge(reversed(data))
    np.testing.assert_array_equal(again.quality, before.quality[2::-1])
    # Products of other shapes are summed in another order: the last bits of float32 may differ.
    np.testing.assert_allclose(again.attributes, before.attributes[2::-1], rtol=1e-6)
    with pytest.raises(pytest.fail.Exception):
        second.judge([_jpeg(np.zeros((64, 64, 3), np.uint8))])


def test_another_scorer_uses_the_embeddings_and_other_encoders_do_not(tiny: Path, tmp_path: Path) -> None:
    data = [path.read_bytes() for path in write_photos(tmp_path)]
    Judge(open_bundle(tiny), cache=tmp_path / "out").judge(data)
    (kept,) = (tmp_path / "out").glob("embeddings-*.parquet")
    assert open_bundle(tiny).encoder_fingerprint in kept.name
    other = tiny_bundle(tmp_path / "other", scorer_seed=1)
    assert other.encoder_fingerprint == open_bundle(tiny).encoder_fingerprint
    judge = Judge(other, cache=tmp_path / "out")
    judge.embed = lambda batch: pytest.fail("embedded a second time")  # type: ignore[method-assign]
    assert len(judge.judge(data).quality) == 3


def test_precision_of_models_that_round_is_small_and_not_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coffee = cv2.resize(real_photos()["coffee"], (96, 64), interpolation=cv2.INTER_AREA)
    monkeypatch.setattr(precision, "real_photos", lambda: {"coffee": coffee})
    result = precision.evaluate_precision(open_bundle(tiny))
    assert result["photos"] == 8
    assert 0.0 < result["clip_embedding"]["median"] <= result["clip_embedding"]["max"] < 0.01  # type: ignore[index]
    assert set(result) == {"photos", "clip_embedding", "dinov2_embedding", "quality_score", "attributes"}


def _jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


# --- baselines --------------------------------------------------------------------------------------------------------


def test_the_ridge_finds_a_line_and_chooses_its_strength_on_train_alone() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 20)).astype(np.float16)
    y = x.astype(np.float64) @ np.linspace(-1, 1, 20) + 3
    predicted, strength = baselines.fit_ridge(x[:200], y[:200], x[200:])
    assert np.corrcoef(predicted, y[200:])[0, 1] > 0.995
    assert strength == min(baselines._STRENGTHS)  # no noise: the weakest is best
    again, _ = baselines.fit_ridge(x[:200], y[:200], x[200:250])
    np.testing.assert_allclose(again, predicted[:50], rtol=1e-4, atol=1e-4)  # other test rows change nothing


def test_the_trees_find_a_step_and_are_the_same_twice() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(600, 5)).astype(np.float32)
    x[::7, 1] = np.nan  # a flat photo has no BRISQUE features
    y = (x[:, 0] > 0.5).astype(np.float64)
    predicted = baselines.fit_lightgbm(x[:400], y[:400], x[400:], seed=1)
    assert np.mean((predicted > 0.5) == (y[400:] > 0.5)) > 0.95
    np.testing.assert_array_equal(predicted, baselines.fit_lightgbm(x[:400], y[:400], x[400:], seed=1))


def test_features_are_computed_once(tmp_path: Path) -> None:
    photos = labelled([0, 1])
    calls = []

    def compute() -> np.ndarray:
        calls.append(1)
        return np.arange(4.0).reshape(2, 2)

    for _ in range(2):
        assert baselines.cached(compute, photos, "pixels", tmp_path).tolist() == [[0, 1], [2, 3]]
    assert len(calls) == 1
    baselines.cached(compute, photos[:1], "pixels", tmp_path)  # other photos
    assert len(calls) == 2


def test_features_of_another_shape_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 7)))
    with pytest.raises(UsageError, match="shape"):
        baselines.read_lite0(tmp_path / "x.npy", 3)


def test_pixel_features_are_measurements_and_brisque(tmp_path: Path) -> None:
    photos = [LabelledPhoto(str(path), 0.5) for path in write_photos(tmp_path, 2)]
    assert baselines.pixel_features(photos).shape == (2, 43)


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def biq2021(tmp_path: Path) -> Path:
    """Thirty tiny photos in BIQ2021's layout, 16 of them test."""
    folder = tmp_path / "biq2021"
    write_photos(folder / "Images", 30)
    lists = {"Train": range(14), "Test": range(14, 30)}
    for name, rows in lists.items():
        lines = [f"{row}.jpg,{(row % 10) / 10}" for row in rows]
        (folder / f"{name} (Images and MOS).csv").write_text("\n".join(["Image Name,MOS", *lines]) + "\n")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    small = {"coffee": cv2.resize(real_photos()["coffee"], (96, 64), interpolation=cv2.INTER_AREA)}
    monkeypatch.setattr(evaluate, "real_photos", lambda: dict(small))
    monkeypatch.setattr(sys, "argv", ["evaluate", "--resamples", "20", *map(str, arguments)])
    evaluate.main()
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_a_run_writes_card_metrics_and_plots(
    tiny: Path,
    biq2021: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    (tmp_path / "twins.json").write_text(json.dumps({"pairs": [{"test": "20.jpg", "train": "0.jpg"}]}))
    (tmp_path / "scenes.csv").write_text("file,scene\n14.jpg,still_life\n1.jpg,indoor\n")
    np.save(tmp_path / "lite0.npy", np.random.default_rng(0).normal(size=(30, baselines.LITE0_FEATURES)))
    result = run(
        monkeypatch,
        capsys,
        *("--bundle", tiny, "--biq2021", biq2021, "--out", out, "--near-duplicates", tmp_path / "twins.json"),
        *("--scenes", tmp_path / "scenes.csv", "--ladder-photos", 1),
        *("--baselines", "--lite0-features", tmp_path / "lite0.npy"),
    )
    assert result["set"] == {"name": "BIQ2021, official test split", "photos": 16, "mos_range": [0.0, 1.0]}
    assert result["quality"]["without near-duplicates"]["photos"] == 15
    assert result["degradations"]["photos"] == 2 and result["degradations"]["pairs"] == 14
    assert result["scene_labels"]["photos"] == 2 and result["scene_labels"]["train_photos"] == 1
    assert len(result["baselines"]) == 2 and result["baselines"].popitem()[1]["train_photos"] == 14
    assert {row["name"] for row in result["published"]} >= {"BRISQUE", "DeepEns"}
    assert json.loads((out / "metrics.json").read_text())["quality"] == result["quality"]

    card = (out / "README.md").read_text()
    plots = set(re.findall(r"\]\((\w+\.png)\)", card))
    assert plots == {"scatter.png", "calibration.png", "bins.png", "ladders.png", "scenes.png"}
    for name in plots:
        assert Image.open(out / name).size[0] > 300
    assert f"{result['quality']['all']['srcc']:.3f} [" in card
    assert not re.search(r"\bnan\b", card)

    # The same again: no photo is embedded, and every figure is the same.
    monkeypatch.setattr(Judge, "embed", lambda self, batch: pytest.fail("embedded a second time"))
    again = run(monkeypatch, capsys, "--bundle", tiny, "--biq2021", biq2021, "--out", out, "--ladder-photos", 1,
                "--near-duplicates", tmp_path / "twins.json")  # fmt: skip
    assert again["quality"] == result["quality"] and again["degradations"] == result["degradations"]


def test_a_run_on_a_table_of_labels_with_a_scale_of_its_own(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_photos(tmp_path / "photos", 12)
    lines = [f"photos/{path.name},{row * 5},{'test' if row else 'train'}" for row, path in enumerate(paths)]
    (tmp_path / "labels.csv").write_text("\n".join(["uri,mos,split", *lines]) + "\n")
    result = run(monkeypatch, capsys, "--bundle", tiny, "--labels", tmp_path / "labels.csv", "--mos-range", 0, 100,
                 "--ladder-photos", 0)  # fmt: skip
    assert result["set"] == {"name": "labels, test split", "photos": 11, "mos_range": [0.0, 100.0]}
    assert result["quality"]["all"]["photos"] == 11
    limited = run(monkeypatch, capsys, "--bundle", tiny, "--labels", tmp_path / "labels.csv", "--limit", 4,
                  "--ladder-photos", 0)  # fmt: skip
    assert limited["set"]["photos"] == 4 and limited["set"]["mos_range"] == [0.0, 1.0]  # that of the scorer's training


def test_intervals_of_the_scorer_are_checked_and_shown(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with-intervals"
    tiny_bundle(folder)
    spec = json.loads((folder / "scorer" / "scorer.json").read_text())
    spec["interval"] = Intervals(0.9, (), (-10.0,), (10.0,)).to_json()  # the whole scale
    (folder / "scorer" / "scorer.json").write_text(json.dumps(spec))
    from picinspector.bundle import seal

    judge = Judge(seal(folder, "tiny", "0.0.2"))
    judged = judge.judge(path.read_bytes() for path in write_photos(tmp_path / "photos", 3))
    result = evaluate_labels(judged, labelled([0.1, 0.5, 0.9]), (0.0, 1.0))
    assert result["coverage"]["coverage"] == 1.0 and result["coverage"]["width"] == pytest.approx(9.0)
    shown = {"set": {"name": "x", "photos": 3, "mos_range": [0, 1]}, **result}
    bundle = dict.fromkeys(("name", "version", "scorer_kind", "scorer_fingerprint", "encoder_fingerprint", "precision"))
    degradations = ladders.climb(Meter(), {"coffee": real_photos()["coffee"][:64, :96]})  # type: ignore[arg-type]
    card = to_markdown({"bundle": bundle, "seed": 0, "degradations": degradations, **shown})
    assert "| all | 3 | 1.000 | 9.00 |" in card


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--near-duplicates", "nothing.json"), "nothing.json"),
        (("--baselines",), "--biq2021"),
        (("--labels", "nothing.csv"), "nothing.csv is missing"),
        (("--labels", "bad.csv", "--ladder-photos", "0"), "bad.jpg"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tiny: Path,
    arguments: tuple[str, ...],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.csv").write_text("uri,mos\nbad.jpg,1\n")
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff no more")
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, capsys, "--bundle", tiny, *arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
