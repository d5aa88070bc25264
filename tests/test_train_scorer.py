"""The training job: data joined and split, one model from several workers, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from picinspector.errors import UsageError
from picinspector.metrics import agreement
from picinspector.recipe import prepare
from picinspector.scorer import Scorer
from tests.s3_server import S3Server
from training import train_scorer
from training.folders import Folder
from training.scorer_data import Labelled, load
from training.scorer_workers import Workers

COUNT = 700
FEATURES = ("clip_embedding", "measured_sharpness")
SMALL = ["--workers", "0", "--rounds", "60", "--patience", "10", "--param", "num_leaves=7", "feature_fraction=0.5"]


def photos() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(COUNT, 12))
    embedding /= np.linalg.norm(embedding, axis=1)[:, None]
    sharpness = rng.uniform(size=COUNT)
    mos = np.clip(50 + 60 * embedding[:, 0] + 40 * (sharpness - 0.5) + rng.normal(size=COUNT) * 4, 0, 100)
    phash = rng.integers(0, 2**64, COUNT, dtype=np.uint64)
    return {"embedding": embedding.astype(np.float16), "sharpness": sharpness, "mos": mos, "phash": phash}


def write_inputs(folder: Path) -> Path:
    """`embeddings/` in two files, `labels.csv` in another order, with a photo that has no embedding."""
    made = photos()
    table = pa.table(
        {
            "uri": [f"/p/{number}.jpg" for number in range(COUNT)],
            "clip_embedding": pa.FixedSizeListArray.from_arrays(pa.array(made["embedding"].ravel()), 12),
            "measured_sharpness": pa.array(made["sharpness"], pa.float32()),
            "phash": made["phash"],
        }
    )
    (folder / "embeddings").mkdir()
    pq.write_table(table.slice(0, 300), folder / "embeddings/0.parquet")
    pq.write_table(table.slice(300), folder / "embeddings/1.parquet")
    lines = [f"/p/{number}.jpg,{made['mos'][number]:.4f}" for number in reversed(range(COUNT))]
    (folder / "labels.csv").write_text("\n".join(["uri,mos", *lines, "/p/gone.jpg,3"]) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("scorer"))


@pytest.fixture(scope="module")
def data(folder: Path, local_ray: None) -> Labelled:
    return load(str(folder / "embeddings"), str(folder / "labels.csv"), list(FEATURES))


def test_each_photo_meets_its_own_label(data: Labelled) -> None:
    made = photos()
    assert data.missing == 1 and sum(data.counts.values()) == len(data.labels) == COUNT
    assert data.labels.tolist() == pytest.approx(made["mos"][::-1].tolist(), abs=1e-3)
    whole = data.matrix("train", "validation", "calibration", "test")
    assert np.allclose(whole[:, :12], made["embedding"][::-1]) and np.allclose(whole[:, 12], made["sharpness"][::-1])
    assert np.allclose(data.matrix("test"), whole[data.rows("test")])
    shares = {name: count / COUNT for name, count in data.counts.items()}
    assert shares == pytest.approx({"train": 0.7, "validation": 1 / 15, "calibration": 1 / 30, "test": 0.2}, abs=0.005)


def test_several_workers_train_one_model(data: Labelled, tmp_path: Path, s3_server: S3Server) -> None:
    """Two processes that each hold half of the photos: twice the same, and as good as one process."""
    recipe = train_scorer.recipe_of(arguments(Path(), Path(), "--rounds", "40"))
    rows = prepare(data.labels[data.rows("train")], recipe)
    bucket = Folder(f"s3://{s3_server.make_bucket()}/out", s3_server.storage_options)
    first, second = (Workers(data, 2, 1, out, 15).boost(("train",), rows, recipe) for out in (Folder(tmp_path), bucket))
    assert first.model_to_string() == second.model_to_string()
    written = bucket.filesystem.find(bucket.path(""))
    assert any(path.endswith("model.txt") for path in written)
    secret = s3_server.secret_key.encode()
    assert not [path for path in written if secret in bucket.filesystem.cat_file(path)], "no key is written down"
    truth = data.labels[data.rows("test")]
    found = agreement(np.asarray(first.predict(data.matrix("test"))), truth)["plcc"]
    alone = Workers(data, 0, 1, Folder(tmp_path)).boost(("train",), rows, recipe)
    assert found > 0.9 and found == pytest.approx(
        agreement(np.asarray(alone.predict(data.matrix("test"))), truth)["plcc"], abs=0.02
    )


def arguments(folder: Path, out: Path, *more: str) -> Any:
    where = ["--embeddings", str(folder / "embeddings"), "--labels", str(folder / "labels.csv"), "--out", str(out)]
    return train_scorer.parse([*where, "--features", *FEATURES, *SMALL, *more])


def test_the_job_searches_ablates_and_leaves_a_scorer_with_its_figures(
    folder: Path, tmp_path: Path, local_ray: None
) -> None:
    more = ["--trials", "2", "--no-error-guided", "--no-weight-extremes", "--no-scale-labels", "--ablate", "--refit"]
    metrics = train_scorer.train(arguments(folder, tmp_path / "out", *more, "--label-range", "0", "100"))
    assert json.loads((tmp_path / "out/metrics.json").read_text("utf-8")) == metrics
    assert len(metrics["trials"]) == 2
    assert metrics["trials"][0]["objective"] >= metrics["trials"][1]["objective"]
    assert {name: metrics["recipe"]["params"][name] for name in metrics["trials"][0]["params"]} == metrics["trials"][0][
        "params"
    ]
    rows = {row["recipe"]: row for row in metrics["ablation"]}
    assert set(rows) == {"full", "without oversample_extremes", "without early_stopping", "plain"}
    assert rows["full"]["plcc"] == metrics["splits"]["validation"]["plcc"]

    # The folder is what a bundle's scorer/ is, and says of the test photos what the figures say.
    scorer, made = Scorer(tmp_path / "out/scorer"), photos()
    data = load(str(folder / "embeddings"), str(folder / "labels.csv"), list(FEATURES))
    test = COUNT - 1 - data.rows("test")
    columns = {"clip_embedding": made["embedding"][test], "measured_sharpness": made["sharpness"][test]}
    scored, truth = scorer.predict(columns), 1 + 9 * made["mos"][test] / 100
    found = metrics["splits"]["test"]
    assert agreement(scored.quality_score, truth) == pytest.approx(
        {name: found[name] for name in agreement(truth, truth)}, abs=2e-3
    )
    assert found["plcc"] > 0.9 and found["bootstrap_95"]["plcc"][0] < found["plcc"] < found["bootstrap_95"]["plcc"][1]
    inside = (scored.quality_low <= truth) & (truth <= scored.quality_high)
    assert inside.mean() == pytest.approx(found["interval"]["coverage"], abs=0.02) and inside.mean() > 0.8
    assert sum(row["photos"] for row in found["per_bin"]) == found["photos"] == len(test)
    assert scorer.label_max == 100 and np.ptp(scored.predicted_mos) > 30
    assert lightgbm.Booster(model_file=str(tmp_path / "out/scorer/model.txt")).num_feature() == 13
    card = (tmp_path / "out/card.md").read_text("utf-8")
    assert "| test | 140 |" in card and "| without early stopping |" in card
    for name in ("scatter", "bins", "calibration"):
        assert (tmp_path / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_splits_of_the_labels_are_kept(folder: Path, tmp_path: Path, local_ray: None) -> None:
    parts = ["test"] * 100 + ["validation"] * 150 + ["train"] * 450
    lines = [f"/p/{number}.jpg,{number},{part}" for number, part in enumerate(parts)]
    (tmp_path / "l.csv").write_text("\n".join(["uri,mos,split", *lines]) + "\n", "utf-8")
    data = load(str(folder / "embeddings"), str(tmp_path / "l.csv"), ["measured_sharpness"])
    assert data.counts == {"train": 450, "validation": 100, "calibration": 50, "test": 100}
    assert (data.split[:100] == "test").all() and (data.split[250:] == "train").all()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("uri,score\n/p/1.jpg,2\n", "has no column 'mos'"),
        ("uri,mos\n/p/1.jpg,2\n/p/1.jpg,3\n", "/p/1.jpg is there twice"),
        ("uri,mos,split\n/p/1.jpg,2,dev\n", "row 1 of column 'split' is 'dev'"),
        ("uri,mos,weight\n/p/1.jpg,2,0\n", "row 1 of column 'weight' is 0.0, not above 0"),
        ("uri,mos\n/q/1.jpg,2\n", "none of its 1 photos is in"),
        ("uri,mos\n/p/1.jpg,2\n/p/2.jpg,3\n", "at least"),
    ],
)
def test_labels_that_cannot_be_used_are_named(
    folder: Path, tmp_path: Path, local_ray: None, text: str, complaint: str
) -> None:
    (tmp_path / "l.csv").write_text(text, "utf-8")
    with pytest.raises(UsageError) as caught:
        load(str(folder / "embeddings"), str(tmp_path / "l.csv"), ["measured_sharpness"])
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_embeddings_that_cannot_be_used_are_named(folder: Path, tmp_path: Path, local_ray: None) -> None:
    with pytest.raises(UsageError, match="no Parquet files there"):
        load(str(tmp_path), str(folder / "labels.csv"))
    with pytest.raises(UsageError, match="has no column 'measured_noise'"):
        load(str(folder / "embeddings"), str(folder / "labels.csv"), ["measured_noise"])
    with pytest.raises(UsageError, match="--param leaves: write NAME=VALUE"):
        train_scorer.recipe_of(arguments(folder, tmp_path, "--param", "leaves"))
