"""Training a captioner on a real local Ray: small from nothing, LoRA, resumed; and the figures it is judged by."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from picinspector.captioner import Captioner, load_captioner
from picinspector.errors import UsageError
from picinspector.schema import ATTRIBUTES, SCENES
from picinspector.wording import Facts, compose
from tests.s3_server import S3Server
from training import captioner_model
from training.caption_data import fill, from_texts
from training.caption_report import baselines, text_figures
from training.captioner_loop import Captions, _batch, _mirror
from training.captioner_model import PREPROCESS, SPECIAL_TOKENS
from training.datasets import LabelledPhoto
from training.folders import Folder
from training.ladders import png
from training.train_captioner import Settings, train

FACTS = Facts(
    {"mos": 30.0, "brightness": 70.0, "colorfulness": 50.0, "contrast": 50.0, "noisiness": 70.0, "sharpness": 15.0},
    {name: 0.92 if name == "plant" else 0.01 for name in SCENES},
    0.4,
)


def make_data(folder: Path, photos: int = 24, text: str | None = None) -> Path:
    """A folder as `training.caption_data` writes it: noise, and facts drawn at random, or a person's text."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    side = PREPROCESS.crop.crop_px
    np.save(folder / "crops.npy", rng.integers(0, 256, (photos, side, side, 3), dtype=np.uint8))
    columns = {f"attribute_{name}": rng.uniform(0, 100, photos) for name in ATTRIBUTES}
    columns |= dict(zip((f"scene_{name}" for name in SCENES), rng.dirichlet([0.1] * 9, photos).T, strict=True))
    columns |= {"measured_brightness": rng.uniform(0, 1, photos), "row": np.arange(photos)}
    columns["split"] = np.where(np.arange(photos) % 4 == 3, "validation", "train")
    if text is not None:
        columns["text"] = np.full(photos, text, dtype=object)
    pq.write_table(pa.table(columns), folder / "facts.parquet")
    return folder


@pytest.fixture(scope="module")
def untrained() -> tuple[Any, Any]:
    """A small captioner with random weights, and its tokenizer: two seconds to make."""
    return captioner_model.small()


@pytest.fixture
def begun(untrained: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings begin with `untrained`; it babbles up to the limit of tokens, which is lower than otherwise."""
    monkeypatch.setattr(captioner_model, "small", lambda _: copy.deepcopy(untrained))
    monkeypatch.setattr(captioner_model, "MAX_NEW_TOKENS", 8)


def toy(tmp_path: Path, **changes: object) -> Settings:
    settings = Settings(
        data=tmp_path / "data", out=tmp_path / "out", small=True, steps=4, look_steps=2, batch_size=4,
        look_batch_size=4, checkpoint_steps=2, photos=4, workers=1,
    )  # fmt: skip
    return dataclasses.replace(settings, **changes)  # type: ignore[arg-type]


def test_a_small_one_is_trained_and_one_that_was_stopped_ends_the_same(
    local_ray: None, begun: None, tmp_path: Path, s3_server: S3Server
) -> None:
    """The first here, the other from and to a bucket."""
    make_data(tmp_path / "data")
    metrics = train(toy(tmp_path))
    assert metrics is not None
    assert [line["step"] for line in metrics["history"]] == [2, 4]
    assert set(metrics["validation"]["baselines"]) == {
        "fixed",
        "facts in a fixed wording",
        "facts in another wording",
    }
    assert {"card.md", "metrics.json", "loss.png", "captioner"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert len(Captioner(tmp_path / "out" / "captioner").caption(np.zeros((2, 224, 224, 3), np.uint8))) == 2

    bucket, options = f"s3://{s3_server.make_bucket()}", s3_server.storage_options
    for name in ("facts.parquet", "crops.npy"):
        s3_server.client().upload_file(str(tmp_path / "data" / name), bucket.removeprefix("s3://"), f"data/{name}")
    stopped = toy(tmp_path, data=f"{bucket}/data", out=f"{bucket}/stopped")
    assert train(stopped, options, stop_after_step=2) is None
    resumed = train(stopped, options)
    assert resumed is not None
    out = Folder(stopped.out, options)
    there = out.pull("captioner", "progress.jsonl")
    assert len(Captioner(there / "captioner").caption(np.zeros((1, 224, 224, 3), np.uint8))) == 1
    assert len((there / "progress.jsonl").read_text().splitlines()) == 2
    for ours, theirs in zip(resumed["history"], metrics["history"], strict=True):
        assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-4)
    with pytest.raises(UsageError, match="another steps"):
        train(dataclasses.replace(stopped, steps=8), options)


def test_lora_learns_a_person_s_own_words(local_ray: None, untrained: tuple[Any, Any], tmp_path: Path) -> None:
    """One sentence for every photo is soon learnt; the base's own weights stay as they were."""
    make_data(tmp_path / "data", text="Lovely light!")
    captioner_model.write(*untrained, PREPROCESS, tmp_path / "base", torch.float32)
    settings = toy(
        tmp_path, small=False, base=str(tmp_path / "base"), lora_rank=8, steps=60, look_steps=0, checkpoint_steps=60,
        lr=3e-2, workers=2, batch_size=8,
    )  # fmt: skip
    metrics = train(settings)
    assert metrics is not None
    piece = tmp_path / "out" / "captioner"
    assert (piece / "adapter" / "adapter_model.safetensors").is_file()
    assert (piece / "model.safetensors").read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()
    assert str(tmp_path) not in (piece / "adapter" / "adapter_config.json").read_text()
    assert "fact_accuracy" not in metrics["validation"]
    assert metrics["validation"]["rougeL"] > 0.9
    tuned, _ = load_captioner(piece, torch.device("cpu"), torch.float32)
    plain, _ = load_captioner(tmp_path / "base", torch.device("cpu"), torch.float32)
    same = [torch.equal(tuned.state_dict()[name], value) for name, value in plain.state_dict().items()]
    assert 0 < same.count(False) < len(same) / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "builtin"}, "without --base"),
        ({"small": False}, "give --small"),
        ({"data": Path("nowhere")}, "no facts.parquet"),
        ({"small": False, "base": "BASE", "lora_rank": 4}, "--look-steps 2: an adapter leaves the vision alone"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(
    tmp_path: Path, untrained: tuple[Any, Any], changes: dict[str, object], message: str
) -> None:
    make_data(tmp_path / "data", photos=4)
    if changes.get("base") == "BASE":
        captioner_model.write(*untrained, PREPROCESS, tmp_path / "base", torch.float32)
        changes = changes | {"base": str(tmp_path / "base")}
    with pytest.raises(UsageError, match=message) as error:
        train(toy(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_labels_are_the_answer_s_tokens_alone(untrained: tuple[Any, Any], tmp_path: Path) -> None:
    data = Captions(make_data(tmp_path / "data"))
    model, tokenizer = untrained
    rows = np.array([0, 5])
    batch = _batch(data, tokenizer, model.config, rows, rows, np.array([True, False]))
    for index, row in enumerate(rows.tolist()):
        labels, tokens = batch["labels"][index], batch["input_ids"][index]
        kept = labels != -100
        assert torch.equal(labels[kept], tokens[kept])
        assert tokenizer.decode(labels[kept]) == f" {data.text(row, row)}<end_of_utterance>"
        assert batch["attention_mask"][index].sum() == len(tokens) - (tokens == tokenizer.pad_token_id).sum()
    assert "Facts:" in tokenizer.decode(batch["input_ids"][0]) and "Facts:" not in tokenizer.decode(
        batch["input_ids"][1]
    )


def test_quadrants_are_mirrored_each_in_its_place() -> None:
    pixels = torch.arange(8.0).reshape(1, 1, 1, 8)
    assert _mirror(pixels, 2).flatten().tolist() == [3, 2, 1, 0, 7, 6, 5, 4]
    assert _mirror(pixels, 1).flatten().tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


def test_the_small_captioner_s_vocabulary_writes_any_text(untrained: tuple[Any, Any]) -> None:
    _, tokenizer = untrained
    assert tokenizer.convert_ids_to_tokens(range(6)) == list(SPECIAL_TOKENS)
    for text in (compose(FACTS), "Ein völlig anderer Satz — 写真。"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    words = tokenizer(compose(FACTS, 3), add_special_tokens=False).input_ids
    assert len(words) < 1.6 * len(compose(FACTS, 3).split())


def test_data_are_filled_from_photos(tmp_path: Path, tiny: Path) -> None:
    rng = np.random.default_rng(0)
    photos = []
    for number in range(12):
        path = tmp_path / f"{number}.png"
        path.write_bytes(png(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)))
        photos.append(LabelledPhoto(str(path), 0.5, "test" if number == 0 else "train"))
    fill(photos, str(tiny), PREPROCESS.crop, tmp_path / "data", copies=1, seed=0)
    table = pq.read_table(tmp_path / "data" / "facts.parquet").to_pandas()
    assert len(table) == 22 and str(tmp_path / "0.png") not in set(table.uri)
    assert (table.groupby("uri").split.nunique() == 1).all()  # a copy is never apart from its photo
    assert (table.kind == "").sum() == 11 and set(table.split) == {"train", "validation"}
    crops = np.load(tmp_path / "data" / "crops.npy")
    first = table[table.uri == photos[1].uri].sort_values("row")
    assert not np.array_equal(crops[first.row.iloc[0]], crops[first.row.iloc[1]])
    data = Captions(tmp_path / "data")
    assert len(data) == 22 and data.seen(np.array([0])).shape == (1, 16)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_person_s_texts_are_read(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(png(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)))
    rows = [{"uri": f"{number}.png", "text": f'Number {number},\n "well" lit.'} for number in range(12)]
    path = tmp_path / f"texts.{suffix}"
    if suffix == "csv":
        lines = [f'{row["uri"]},"Number {n}, ""well"" lit."' for n, row in enumerate(rows)]
        path.write_text("\n".join(["uri,text", *lines]))
    elif suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    from_texts(path, PREPROCESS.crop, tmp_path / "data")
    data = Captions(tmp_path / "data")
    assert data.text(3, 0) == 'Number 3, "well" lit.' and data.facts == [None] * 12
    assert sorted(set(data.split)) == ["train", "validation"]
    assert data.question(0, told=True) == data.question(0, told=False)  # there is nothing to tell


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("uri,caption\na.png,x", "no column text"),
        ("uri,text\na.png,", "no text for"),
        ("uri,text\na.png,x", "take it out of"),
        ("", "cannot be read as a table"),
    ],
)
def test_texts_that_cannot_be_used_are_told_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        from_texts(tmp_path / "t.csv", PREPROCESS.crop, tmp_path / "data")
    assert "\n" not in str(error.value)


def test_figures_of_a_perfect_and_of_a_wrong_text() -> None:
    truth = compose(FACTS, 1)
    perfect = text_figures([truth], [truth], [FACTS])
    assert perfect["rougeL"] == perfect["rouge1"] == perfect["fact_accuracy"] == 1.0 and perfect["contradicted"] == 0
    wrong = text_figures(["It is very sharp."], [truth], [FACTS])
    assert wrong["fact_accuracy"] == 0.0 and wrong["contradicted"] == 1.0
    # ROUGE-L by hand: "a b c" against "a x c": two words in common order, of three each.
    assert text_figures(["red green blue"], ["red black blue"], [None])["rougeL"] == pytest.approx(2 / 3)
    named = baselines([truth], [FACTS])
    assert named["facts in another wording"]["fact_accuracy"] == 1.0
    assert json.loads(json.dumps(named)) == named
