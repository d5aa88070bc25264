"""Training the attribute head: labels and their mistakes, both modes under Ray Train, resuming, and the report."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import save_file as save_torch

from picinspector.attributes import AttributeHead
from picinspector.dinov2 import Dinov2Encoder
from picinspector.errors import UsageError
from picinspector.schema import ATTRIBUTES, SCENES
from picinspector.tables import Destination
from tests.bundles import TINY_DINOV2, write_dinov2
from tests.s3_server import S3Server
from training import attribute_data as data
from training.attribute_loop import Network
from training.attribute_report import figures_of, scene_agreement
from training.checkpoints import MODEL, scale
from training.folders import Folder
from training.train_attributes import Settings, _plan, _write_pieces, main, parse, train

NAN = math.nan


def write_csv(path: Path, header: str, *rows: str) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_may_be_partial(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "labels.csv",
        "uri,mos,noisiness,scene,scene_night,scene_human,split,group",
        "a.jpg,50,,,,,train,x",
        "/b.jpg,,25.5,plant,,,,x",
        "s3://c/d.jpg,,,animal,0.25,0.75,test,",
    )
    found = data.read_targets(path)
    assert found.uris == [str(tmp_path / "a.jpg"), "/b.jpg", "s3://c/d.jpg"]
    assert found.attributes[0].tolist() == pytest.approx([50] + [NAN] * 5, nan_ok=True)
    assert found.attributes[1].tolist() == pytest.approx([NAN] * 4 + [25.5, NAN], nan_ok=True)
    assert np.isnan(found.scenes[0]).all()
    assert found.scenes[1].tolist() == np.eye(9)[SCENES.index("plant")].tolist()
    assert found.scenes[2].tolist() == [0, 0, 0.75, 0, 0, 0.25, 0, 0, 0]  # the shares, not the name
    assert (list(found.splits), list(found.groups)) == (["train", None, "test"], ["x", "x", None])


def test_mos_of_another_scale_is_brought_to_0_100(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "labels.csv", "uri,mos,contrast", "a,1,10", "b,5,20", "c,2,30")
    found = data.read_targets(path, mos_scale=(1.0, 5.0))
    assert found.attributes[:, 0].tolist() == [0, 100, 25]
    assert found.attributes[:, ATTRIBUTES.index("contrast")].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("file,mos", ["a,1"], "has no column 'uri'; it has ['file', 'mos']"),
        ("uri,quality", ["a,1"], "has no column to learn from: expected any of ['mos', 'brightness'"),
        ("uri,mos", ["a,50", "b,good"], "row 2 of column 'mos' is 'good', expected a number"),
        ("uri,mos", ["a,50", "b,101"], "row 2 of column 'mos' is 101, expected 0-100; give its scale: --mos-scale"),
        ("uri,mos", ["a,0.5", "b,0.9"], "column 'mos' is 0-1 throughout, expected 0-100; give its scale: --mos-scale"),
        ("uri,contrast", ["a,-1"], "row 1 of column 'contrast' is -1, expected 0-100; bring it to 0-100"),
        ("uri,scene", ["a,forest"], "row 1 of column 'scene' is 'forest', expected one of ['animal'"),
        ("uri,scene_night", ["a,0.5"], "row 1 of columns 'scene_*' is [0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0]"),
        ("uri,mos,split", ["a,50,dev"], "row 1 of column 'split' is 'dev', expected one of ['train'"),
        ("uri,mos", ["/a,50", "/a,60"], "column 'uri' has /a twice; keep one row a photo"),
    ],
)
def test_a_wrong_label_is_named(tmp_path: Path, header: str, rows: list[str], message: str) -> None:
    path = write_csv(tmp_path / "labels.csv", header, *rows)
    with pytest.raises(UsageError) as caught:
        data.read_targets(path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- embeddings -------------------------------------------------------------------------------------------------------


def toy(folder: Path, count: int = 240, split: bool = True) -> Settings:
    """Embeddings with an axis for each attribute and each of three scenes, labels that follow them, partly known."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(count, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    noise = np.exp(rng.normal(2, 1, count)).astype(np.float32)
    labels: dict[str, Any] = {"uri": [f"/photos/{row}.jpg" for row in range(count)]}
    for index, name in enumerate(ATTRIBUTES):
        labels[name] = np.clip(50 + 60 * vectors[:, index], 0, 100)
    labels["noisiness"] = np.clip(90 - 18 * np.log1p(noise), 0, 100)
    labels["scene"] = [SCENES[row % 9] if row % 9 < 3 else None for row in range(count)]
    labels["mos"] = [None if row % 4 == 0 else value for row, value in enumerate(labels["mos"])]
    vectors[:, 6:9] = 0.4 * np.eye(9)[np.arange(count) % 9, :3]
    if split:
        labels["split"] = [("train", "train", "train", "validation", "test")[row // 9 % 5] for row in range(count)]
    pq.write_table(pa.table(labels), folder / "labels.parquet")
    flat = pa.array(vectors.astype(np.float16).reshape(-1))
    columns = {
        "uri": labels["uri"],
        "phash": pa.array(rng.integers(0, 2**63, count), pa.uint64()),
        "dinov2_embedding": pa.FixedSizeListArray.from_arrays(flat, 16),
        "measured_noise": noise,
    }
    (folder / "embeddings").mkdir()
    pq.write_table(pa.table(columns), folder / "embeddings" / "part.parquet")
    return Settings(
        labels=folder / "labels.parquet",
        out=folder / "out",
        embeddings=str(folder / "embeddings"),
        features=("dinov2_embedding", "measured_noise"),
        hidden_dim=32,
        epochs=12,
        batch_size=16,
        lr=1e-2,
        bootstrap=20,
    )


def test_stored_columns_are_matched_by_uri(tmp_path: Path) -> None:
    table = pa.table(
        {
            "uri": ["/a", "/b", "/c", "/d"],
            "dinov2_embedding": pa.array([[1.0, 2], [3, 4], None, [5, 6]], pa.list_(pa.float16(), 2)),
            "measured_noise": pa.array([1, 2, 3, 4], pa.float32()),
        }
    )
    stored = tmp_path / "embeddings"
    stored.mkdir()
    pq.write_table(table, stored / "part.parquet")
    targets = data.read_targets(write_csv(tmp_path / "l.csv", "uri,mos", "/d,40", "/c,30", "/gone,0", "/a,10"))
    features = ("dinov2_embedding", "measured_noise")
    rows, columns, phash = data.read_embeddings(str(stored), targets, features)
    assert rows.tolist() == [0, 3]  # /c has an error, /gone was never embedded
    assert columns["dinov2_embedding"].tolist() == [[5, 6], [1, 2]]
    assert columns["measured_noise"].tolist() == [4, 1]
    assert phash is None
    with pytest.raises(UsageError, match="has no column 'clip_embedding'; it has"):
        data.read_embeddings(str(stored), targets, ["clip_embedding"])
    other = data.read_targets(write_csv(tmp_path / "l.csv", "uri,mos", "s3://d/a,10"))
    with pytest.raises(UsageError, match=r"none of the 1 labelled photos has embeddings in .*, s3://d/a for one"):
        data.read_embeddings(str(stored), other, features)
    alone, _, _ = data.read_embeddings(str(stored / "part.parquet"), targets, features)
    assert alone.tolist() == rows.tolist()
    for nothing in (tmp_path / "nowhere", tmp_path / "l.csv"):
        with pytest.raises(UsageError, match="no committed embeddings and no readable Parquet here"):
            data.read_embeddings(str(nothing), targets, features)


def test_of_a_destination_the_newest_rows_count(tmp_path: Path) -> None:
    """Two committed runs and one that crashed; then one by another bundle."""
    destination, targets = (
        Destination(tmp_path / "tables"),
        data.read_targets(write_csv(tmp_path / "l.csv", "uri,mos", "/b,40", "/a,30", "/gone,1")),
    )

    def write_run(run_id: str, uris: list[str], value: float, bundle: str = "x", commit: bool = True) -> None:
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.full(2 * len(uris), value, np.float16)), 2)
        columns = {"uri": uris, "phash": pa.array([7] * len(uris), pa.uint64()), "dinov2_embedding": vectors}
        columns |= {"clip_embedding": vectors, "encoder_fingerprint": [bundle] * len(uris)}
        folder = Path(destination.table_path("embeddings", run_id))
        folder.mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / "part.parquet")
        if commit:
            destination.commit({"run_id": run_id})

    write_run("1", ["/a", "/b", "/c"], 1)
    write_run("2", ["/b"], 2)
    write_run("3", ["/a", "/b"], 3, commit=False)
    rows, columns, phash = data.read_embeddings(str(tmp_path / "tables"), targets, ["dinov2_embedding"])
    assert rows.tolist() == [0, 1]
    assert columns["dinov2_embedding"].tolist() == [[2, 2], [1, 1]]
    assert phash is not None and phash.tolist() == [7, 7]
    with pytest.raises(UsageError, match="has no column 'measured_noise'; it has"):
        data.read_embeddings(str(tmp_path / "tables"), targets, ["dinov2_embedding", "measured_noise"])
    write_run("4", ["/c"], 4, bundle="y")  # nobody labelled it
    assert data.read_embeddings(str(tmp_path / "tables"), targets, ["dinov2_embedding"])[0].tolist() == [0, 1]
    write_run("5", ["/a"], 5, bundle="y")
    with pytest.raises(UsageError, match="embeddings from more than one bundle: score them all with one"):
        data.read_embeddings(str(tmp_path / "tables"), targets, ["dinov2_embedding"])


def test_photos_without_a_split_need_hashes(tmp_path: Path) -> None:
    targets = data.read_targets(write_csv(tmp_path / "l.csv", "uri,mos,split", "/a,40,train", "/b,30,", "/c,1,train"))
    with pytest.raises(UsageError, match="tables has no column 'phash' to split by: give each label a `split`"):
        data.assign_splits(targets, None, "tables", 0)
    hashes = np.array([0, 2**63 + 2**20 - 1, 1], np.uint64)
    with pytest.raises(UsageError, match="3 labelled photos leave none for train"):
        data.assign_splits(dataclasses.replace(targets, splits=["test"] * 3), hashes, "tables", 0)
    complete = dataclasses.replace(targets, splits=["train", "test", "validation"])
    assert data.assign_splits(complete, None, "tables", 0) == ["train", "test", "validation"]


def test_splits_are_made_by_content(tmp_path: Path) -> None:
    """Two photos each of 20 scenes, nearly the same hash: none is divided, and the seed deals them out."""
    rows = [f"/{number},50" for number in range(40)]
    targets = data.read_targets(write_csv(tmp_path / "l.csv", "uri,mos", *rows))
    hashes = np.repeat(np.random.default_rng(0).integers(0, 2**63, 20), 2).astype(np.uint64)
    hashes[::2] ^= np.uint64(1)
    splits = data.assign_splits(targets, hashes, "tables", 0)
    assert splits[::2] == splits[1::2]
    assert {name: splits.count(name) for name in set(splits)} == {"train": 28, "validation": 4, "test": 8}
    assert (
        data.assign_splits(targets, hashes, "tables", 0) == splits != data.assign_splits(targets, hashes, "tables", 1)
    )


def test_two_workers_train_a_head_and_resume(local_ray: None, tmp_path: Path) -> None:
    """What a training writes and has learnt; one that was stopped and went on has the same figures."""
    settings = dataclasses.replace(toy(tmp_path), workers=2)
    metrics = train(settings)
    assert metrics is not None
    out = settings.out
    head = AttributeHead(out / "attributes")
    assert head.features == settings.features
    assert json.loads((out / "attributes" / "head.json").read_text())["log1p"] == ["measured_noise"]

    counts = metrics["photos"]
    assert sum(counts[split] for split in ("train", "validation", "test")) == 240
    assert set(metrics["splits"]) == {"train", "validation", "test"}
    test = metrics["splits"]["test"]
    assert test["attributes"]["noisiness"]["plcc"] > 0.9
    assert test["scene"]["accuracy"] > 0.9
    assert test["attributes"]["mos"]["photos"] < test["attributes"]["contrast"]["photos"]  # every fourth is unknown
    low, high = test["attributes"]["noisiness"]["interval"]["srcc"]
    assert low <= test["attributes"]["noisiness"]["srcc"] <= high
    losses = [line["validation_loss"] for line in metrics["history"]]
    assert [line["epoch"] for line in metrics["history"]] == list(range(1, 13))
    assert losses[metrics["best_epoch"] - 1] == min(losses)
    assert json.loads((out / "metrics.json").read_text())["splits"].keys() == metrics["splits"].keys()
    images = {path.name for path in out.glob("*.png")}
    assert images == {"history.png", "scene_confusion.png", *(f"scatter_{name}.png" for name in ATTRIBUTES)}
    assert f"| test | noisiness | {test['attributes']['noisiness']['photos']} |" in (out / "card.md").read_text()

    stopped = dataclasses.replace(settings, out=tmp_path / "stopped")
    there = Folder(stopped.out)
    assert train(stopped, stop_after_epoch=5) is None
    assert len((there.pull("progress.jsonl") / "progress.jsonl").read_text().splitlines()) == 5
    assert not there.has("metrics.json")
    with pytest.raises(UsageError, match=r"holds a training with another epochs \(12, now 13\): repeat its command"):
        train(dataclasses.replace(stopped, epochs=13))
    resumed = train(stopped)
    assert resumed is not None
    assert len((there.pull() / "progress.jsonl").read_text().splitlines()) == 12, "no epoch was done twice"
    assert {path.name for path in there.here.glob("*.png")} == images
    assert AttributeHead(there.here / "attributes").features == settings.features
    assert [line["validation_loss"] for line in resumed["history"]] == pytest.approx(losses, abs=1e-6)
    assert figures(resumed) == figures(metrics)


def figures(metrics: dict[str, Any]) -> str:
    """All figures of a run to three decimals."""
    return json.dumps(json.loads(json.dumps(metrics["splits"]), parse_float=lambda text: round(float(text), 3)))


# --- photos -----------------------------------------------------------------------------------------------------------


def test_dinov2_is_fine_tuned_from_photos(local_ray: None, tmp_path: Path, s3_server: S3Server) -> None:
    """Brightness of plain photos, which a frozen random backbone hardly tells: to a bucket, and the pieces load."""
    options = s3_server.storage_options
    write_dinov2(tmp_path / "backbone", TINY_DINOV2, resize_px=64, crop_px=56)
    rng, rows = np.random.default_rng(0), []
    for number in range(60):
        level = int(rng.integers(20, 236))
        pixels = np.clip(rng.normal(level, 15, (60, 70, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{level / 2.55:.2f},{('train', 'train', 'validation', 'test')[number % 4]}")
    (tmp_path / "broken.png").write_bytes(b"no photo")
    labels = write_csv(tmp_path / "labels.csv", "uri,brightness,split", *rows, "broken.png,50,train")
    settings = Settings(
        labels=labels,
        out=f"s3://{s3_server.make_bucket()}/out",
        bundle=str(tmp_path / "backbone"),
        finetune_blocks=1,
        features=("dinov2_embedding", "measured_contrast"),
        hidden_dim=16,
        epochs=6,
        batch_size=8,
        lr=1e-2,
        backbone_lr=1e-3,
        bootstrap=20,
    )
    metrics = train(settings, options)
    assert metrics is not None
    folder = Folder(settings.out, options)
    out = folder.pull()
    assert metrics["photos"] == {"train": 30, "validation": 15, "test": 15, "left_out": 1}
    assert len(metrics["history"]) == 6
    assert metrics["splits"]["test"]["attributes"]["brightness"]["srcc"] > 0.8
    assert "scene" not in metrics["splits"]["test"]
    assert str(tmp_path) not in (out / "metrics.json").read_text() + (out / "card.md").read_text()

    before, after = (_tensors(folder) for folder in (tmp_path / "backbone", out / "dinov2"))
    changed = {name for name in before if not np.allclose(before[name], after[name], atol=1e-3)}
    assert changed and all(name.startswith(("encoder.layer.1.", "layernorm.")) for name in changed)
    assert {value.dtype for value in after.values()} == {np.dtype(np.float16)}
    encoder = Dinov2Encoder(out / "dinov2")
    assert encoder.crop.crop_px == 56
    embedding = encoder.encode(np.zeros((2, 56, 56, 3), np.uint8))
    columns = {"dinov2_embedding": embedding, "measured_contrast": np.zeros(2, np.float32)}
    attributes, _ = AttributeHead(out / "attributes").predict(columns)
    assert attributes[0, 1] < 35, "a black photo is badly exposed"


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def test_a_fine_tuned_model_is_written_under_the_published_names(tmp_path: Path) -> None:
    """transformers names tensors otherwise inside than in its files; another version reads the files only."""
    write_dinov2(tmp_path / "backbone", TINY_DINOV2, resize_px=64, crop_px=56)
    settings = Settings(labels=tmp_path, out=tmp_path, bundle="b", finetune_blocks=1, features=("dinov2_embedding",))
    plan = _plan(settings, tmp_path / "backbone", np.empty((5, 0), np.float32), Folder(tmp_path), None)
    network = Network(plan)
    learning = {name for name, value in network.named_parameters() if value.requires_grad}
    save_torch({name: value.contiguous() for name, value in network.state_dict().items()}, tmp_path / MODEL)
    _write_pieces(tmp_path, plan, settings, tmp_path / "out")
    before, after = (_tensors(folder) for folder in (tmp_path / "backbone", tmp_path / "out" / "dinov2"))
    assert before.keys() == after.keys()
    assert all(np.allclose(value, after[name], atol=1e-3) for name, value in before.items())
    assert {value.dtype for value in after.values()} == {np.dtype(np.float16)}
    crops = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), np.uint8)
    one, two = (Dinov2Encoder(tmp_path / folder).encode(crops) for folder in ("backbone", "out/dinov2"))
    assert (one.astype(np.float64) * two).sum(axis=1) == pytest.approx(1, abs=2e-3)
    backbone = {name for name in learning if name.startswith("backbone.")}
    assert backbone and all(name.startswith(("backbone.encoder.layer.1.", "backbone.layernorm.")) for name in backbone)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path, tiny: Path) -> None:
    labels = write_csv(tmp_path / "labels.csv", "uri,mos", "/a,50")
    base = Settings(labels=labels, out=tmp_path / "out")
    for change, message in [
        ({}, "give either --embeddings or --bundle"),
        ({"embeddings": "a", "bundle": "b"}, "give either --embeddings or --bundle"),
        ({"bundle": str(tiny)}, "--finetune-blocks 0: expected 1 or more"),
        ({"bundle": str(tiny), "finetune_blocks": 3}, "dinov2 has 2 blocks"),
        (
            {"bundle": str(tiny), "finetune_blocks": 1, "features": ("clip_embedding",)},
            "with --bundle it is dinov2_emb",
        ),
    ]:
        with pytest.raises(UsageError, match=message):
            train(dataclasses.replace(base, **change))
    assert not base.out.exists(), "a mistake leaves no folder behind"


@pytest.mark.parametrize(
    ("there", "asked", "count", "each"),
    [
        (0, (None, 1, None), 1, {"CPU": 1}),
        (0, (3, 2, None), 3, {"CPU": 2}),
        (4, (None, 1, None), 4, {"CPU": 1, "GPU": 1}),
        (4, (8, 1, 0.5), 8, {"CPU": 1, "GPU": 0.5}),
        (4, (6, 1, 0.0), 6, {"CPU": 1}),
        (0, (2, 1, 1.0), 2, {"CPU": 1, "GPU": 1}),  # an autoscaler brings them
    ],
)
def test_workers_take_what_the_cluster_has_or_what_they_are_told(
    monkeypatch: pytest.MonkeyPatch, there: float, asked: tuple[Any, ...], count: int, each: dict[str, float]
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": float(there)})
    found = scale(*asked)
    assert (found.num_workers, found.use_gpu, found.resources_per_worker) == (count, "GPU" in each, each)


def test_more_workers_than_gpus_are_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    with pytest.raises(
        UsageError, match=r"--workers 2: the cluster has 1 GPUs, .* --gpus-per-worker .* 0 trains on CPUs"
    ):
        scale(2, 1, None)


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    settings = toy(tmp_path)
    with pytest.raises(UsageError, match="is not empty and holds no training"):
        train(dataclasses.replace(settings, out=tmp_path))


def test_a_mistake_in_the_data_leaves_no_folder_behind(local_ray: None, tmp_path: Path) -> None:
    settings = dataclasses.replace(toy(tmp_path), features=("clip_embedding",))
    with pytest.raises(UsageError, match="has no column 'clip_embedding'"):
        train(settings)
    assert not settings.out.exists()


def test_the_command_says_errors_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--labels", str(tmp_path / "gone.csv"), "--out", str(tmp_path / "out"), "--embeddings", "tables"]
    monkeypatch.setattr("sys.argv", ["train_attributes", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'gone.csv'} is missing\n"


def test_options_have_the_names_and_defaults_of_settings() -> None:
    settings, _ = parse(["--labels", "l.csv", "--out", "o", "--embeddings", "e"])
    assert settings == Settings(labels="l.csv", out="o", embeddings="e")
    line = "--labels=l --out=o --bundle=b --finetune-blocks=2 --lr=0.5 --mos-scale 1 5 --features dinov2_embedding"
    settings, args = parse([*line.split(), "--stop-after-epoch=3"])
    assert (settings.mos_scale, settings.lr, settings.features) == ((1.0, 5.0), 0.5, ("dinov2_embedding",))
    assert args.stop_after_epoch == 3


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_of_outputs_by_hand() -> None:
    predicted, attributes = np.full((4, 6), 50.0), np.full((4, 6), NAN)
    predicted[:, 2], attributes[:, 2] = [10, 20, 30, 99], [20, 30, 40, NAN]
    probabilities = np.full((4, 9), 0.05)
    probabilities[:, [0, 0, 1, 2]] += 0
    probabilities[np.arange(4), [0, 0, 1, 2]] = 0.6
    scenes = np.eye(9)[[0, 1, 1, 0]]
    scenes[3] = NAN
    found = figures_of(predicted, probabilities, attributes, scenes, repeats=10)
    assert list(found["attributes"]) == ["colorfulness"]
    row = found["attributes"]["colorfulness"]
    assert (row["photos"], row["plcc"], row["srcc"], row["rmse"]) == pytest.approx((3, 1, 1, 10))
    assert row["loss"] == pytest.approx(0.25)
    scene = found["scene"]
    assert scene["accuracy"] == pytest.approx(2 / 3)
    assert scene["macro_f1"] == pytest.approx(2 / 3)  # both scenes: precision and recall 1/2 and 1, or 1 and 1/2
    assert scene["confusion"][1][:3] == [1, 1, 0]
    assert scene["loss"] == pytest.approx(-(math.log(0.6) + math.log(0.05) + math.log(0.6)) / 3, abs=1e-4)


def test_macro_f1_is_over_the_scenes_that_occur() -> None:
    found = scene_agreement(np.array([0, 0, 3]), np.array([0, 0, 0]))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["macro_f1"] == pytest.approx(0.8)  # of scene 0 alone: precision 1, recall 2/3
