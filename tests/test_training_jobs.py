"""The training jobs as submitted jobs: Ray Train on a real head, whose two CPUs are all that workers and data have."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

from picinspector.attributes import AttributeHead
from picinspector.metrics import agreement
from picinspector.scorer import Scorer
from tests.ray_head import Head
from tests.test_train_attributes import toy
from tests.test_train_scorer import FEATURES, photos, write_inputs


def test_a_scorer_is_trained_by_two_workers_of_a_submitted_job(head: Head, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    out = tmp_path / "out"
    where = ["--embeddings", str(tmp_path / "embeddings"), "--labels", str(tmp_path / "labels.csv"), "--out", str(out)]
    small = ["--no-error-guided", "--rounds", "40", "--param", "num_leaves=7", "feature_fraction=0.5"]
    done = head.submit(
        "python", "-m", "training.train_scorer", *where, "--features", *FEATURES, "--workers", "2", *small
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    metrics = json.loads((out / "metrics.json").read_text("utf-8"))
    assert metrics["workers"] == 2 and sum(metrics["photos"].values()) == 700
    assert (out / "card.md").is_file() and (out / "scatter.png").is_file()
    made = photos()
    columns = {"clip_embedding": made["embedding"], "measured_sharpness": made["sharpness"]}
    assert agreement(Scorer(out / "scorer").predict(columns).quality_score, made["mos"])["plcc"] > 0.9

    wrong = head.submit(
        "python", "-m", "training.train_scorer", *where[:2], "--labels", str(tmp_path / "no.csv"), *where[4:]
    )
    assert wrong.returncode != 0
    assert f"error: {tmp_path / 'no.csv'} is missing" in wrong.stdout


def test_an_attribute_head_is_trained_by_a_submitted_job(head: Head, tmp_path: Path) -> None:
    settings = toy(tmp_path)
    done = head.submit(
        *("python", "-m", "training.train_attributes", "--labels", str(settings.labels), "--out", str(settings.out)),
        *("--embeddings", str(settings.embeddings), "--features", *settings.features, "--workers", "2"),
        *("--hidden-dim", "32", "--epochs", "8", "--batch-size", "16", "--lr", "0.01", "--bootstrap", "20"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    metrics = json.loads((settings.out / "metrics.json").read_text("utf-8"))
    assert len(metrics["history"]) == 8 and metrics["settings"]["workers"] == 2
    assert (settings.out / "card.md").is_file() and (settings.out / "scene_confusion.png").is_file()
    table = pq.read_table(tmp_path / "embeddings")
    flat = table.column("dinov2_embedding").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    columns = {"dinov2_embedding": flat.reshape(-1, 16), "measured_noise": table.column("measured_noise").to_numpy()}
    attributes, _ = AttributeHead(settings.out / "attributes").predict(columns)
    labels = pq.read_table(settings.labels).column("noisiness").to_numpy()
    assert agreement(attributes[:, 4], labels)["plcc"] > 0.8
