"""Bundles: opened, checked and sealed; nothing damaged, pickled or half there gets as far as a score."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file

from picinspector import bundle, schema
from picinspector.attributes import AttributeHead
from picinspector.bundle import Bundle, fetch_full, fetched_folder, open_bundle, seal
from picinspector.captioner import Captioner
from picinspector.clip import ClipEncoder, encode_texts
from picinspector.dinov2 import Dinov2Encoder
from picinspector.errors import BundleError
from picinspector.photo import CropSpec
from picinspector.preprocess import captioner_preprocess, clip_preprocess, dinov2_preprocess
from picinspector.scorer import Scorer
from picinspector.stages.score import Score, score_columns
from tests.bundles import (
    TINY_CLIP,
    TINY_DINOV2,
    tiny_bundle,
    write_attributes,
    write_captioner,
    write_clip,
    write_dinov2,
    write_scorer,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny").folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A bundle of this test's own, to break."""
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def refusal(action: Callable[[], object]) -> str:
    """The message of a BundleError, which must be one line."""
    with pytest.raises(BundleError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, **values: object) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# --- open, verify, seal -----------------------------------------------------------------------------------------------


def test_a_sealed_bundle_opens_as_it_was_sealed(folder: Path) -> None:
    opened = open_bundle(folder)
    assert (opened.name, opened.version, opened.scorer_kind) == ("tiny", "0.0.1", "lightgbm")
    assert opened.pieces == ["clip", "dinov2", "scorer", "attributes"]
    assert "bundle.json" not in opened.files
    assert sorted(opened.files) == sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "bundle.json"
    )
    opened.verify()
    assert open_bundle(str(folder)).piece("clip") == folder / "clip"
    assert refusal(lambda: opened.piece("zero_shot")).startswith(
        f"bundle tiny at {folder} has no zero_shot; it holds ["
    )


@pytest.mark.parametrize("piece", ["clip", "dinov2", "scorer", "attributes"])
def test_damage_is_found_before_it_is_loaded(folder: Path, piece: str) -> None:
    opened = open_bundle(folder)
    path = max((folder / piece).iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for action in (lambda: opened.piece(piece), opened.verify):
        assert f"{path} is damaged: SHA-256 " in refusal(action)
    for other in set(opened.pieces) - {piece}:
        opened.piece(other)

    path.unlink()
    for action in (lambda: opened.piece(piece), opened.verify):
        assert refusal(action) == f"{path}: cannot be read (No such file or directory); fetch the bundle again"


def test_a_stranger_is_found(folder: Path) -> None:
    (folder / "clip" / "open_clip_pytorch_model.bin").write_bytes(b"x")
    message = refusal(open_bundle(folder).verify)
    assert message == f"{folder}: clip/open_clip_pytorch_model.bin is not named in bundle.json; remove it"


def test_what_is_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICINSPECTOR_CACHE", str(tmp_path / "cache"))
    assert "give `builtin`, `full` or a bundle's folder" in refusal(lambda: open_bundle(tmp_path / "gone"))
    assert "picinspector bundle fetch full" in refusal(lambda: open_bundle("full"))
    assert fetched_folder().parent == tmp_path / "cache"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not a readable bundle description"),
        ("[]", "not a readable bundle description"),
        ('{"format": 1, "name": "x", "version": "1"}', "not a readable bundle description"),
        ('{"name": "x", "version": "1", "files": {}}', "not a readable bundle description"),
        ('{"format": 2, "name": "x", "version": "1", "files": {}}', "format 2, this version reads 1; upgrade"),
        ('{"format": 1, "name": "x", "version": "1", "files": {"scorer/a": "0"}}', "needs clip and dinov2"),
        ('{"format": 1, "name": "x", "version": "1", "files": {"clip/a": "0", "dinov2/a": "0"}}', "or zero_shot"),
        (
            '{"format": 1, "name": "x", "version": "1", "files": {"clip/a": "0", "dinov2/a": "0", "scorer/a": "0"}}',
            "needs scorer and attributes, or zero_shot",
        ),
    ],
)
def test_an_unusable_description(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "bundle.json").write_text(content)
    assert reason in refusal(lambda: open_bundle(tmp_path))


# --- fingerprints -----------------------------------------------------------------------------------------------------


def fingerprints(opened: Bundle) -> tuple[str, str]:
    return opened.encoder_fingerprint, opened.scorer_fingerprint


def test_fingerprints_change_with_what_determines_the_values(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoders, scorer = fingerprints(open_bundle(folder))
    assert len(encoders) == len(scorer) == 16
    assert encoders != scorer

    (folder / "README.md").write_text("another card")
    assert fingerprints(seal(folder, "another name", "2.0")) == (encoders, scorer)
    moved = folder.with_name("moved")
    folder.rename(moved)
    assert fingerprints(open_bundle(moved)) == (encoders, scorer)

    write_scorer(moved / "scorer", {"clip_embedding": 32}, seed=1)
    same_encoders, new_scorer = fingerprints(seal(moved, "tiny", "0.0.2"))
    assert same_encoders == encoders, "a new scorer must not make a library be embedded again"
    assert new_scorer != scorer
    write_attributes(moved / "attributes", {"dinov2_embedding": 48}, seed=1)
    same_encoders, new_head = fingerprints(seal(moved, "tiny", "0.0.3"))
    assert same_encoders == encoders
    assert new_head not in (scorer, new_scorer)

    edit(moved / "dinov2" / "preprocessor_config.json", resample=2)
    new_encoders, last = fingerprints(seal(moved, "tiny", "0.0.4"))
    assert new_encoders != encoders
    assert last != new_head, "scores of other embeddings are other scores"

    monkeypatch.setattr(bundle, "SCORE_VERSION", bundle.SCORE_VERSION + 1)
    assert open_bundle(moved).encoder_fingerprint == new_encoders
    assert open_bundle(moved).scorer_fingerprint != last
    monkeypatch.setattr(bundle, "ENCODE_VERSION", bundle.ENCODE_VERSION + 1)
    assert open_bundle(moved).encoder_fingerprint != new_encoders


# --- weights ----------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickled_checkpoint_is_never_loaded(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb)
    assert mark.exists(), "the bomb works"
    mark.unlink()

    (folder / "clip" / "open_clip_model.safetensors").unlink()
    (folder / "clip" / "open_clip_pytorch_model.bin").write_bytes(bomb)
    (folder / "dinov2" / "model.safetensors").unlink()
    (folder / "dinov2" / "pytorch_model.bin").write_bytes(bomb)
    seal(folder, "tiny", "0.0.1").verify()
    for action in (lambda: ClipEncoder(folder / "clip"), lambda: encode_texts(folder / "clip", ["a"])):
        assert "expected one .safetensors file, found 0" in refusal(action)
    assert "model.safetensors" in refusal(lambda: Dinov2Encoder(folder / "dinov2"))

    # Safetensors of a name that open_clip likes less than the pickle beside them.
    write_clip(tmp_path / "clip", TINY_CLIP)
    (tmp_path / "clip" / "open_clip_model.safetensors").rename(tmp_path / "clip" / "weights.safetensors")
    (tmp_path / "clip" / "open_clip_pytorch_model.bin").write_bytes(bomb)
    assert "never loaded; remove it" in refusal(lambda: ClipEncoder(tmp_path / "clip"))
    assert not mark.exists()


def test_weights_that_do_not_fit_their_config_are_never_filled_with_random_numbers(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip", TINY_CLIP)
    write_dinov2(tmp_path / "dinov2", TINY_DINOV2, resize_px=64, crop_px=56)
    edit(tmp_path / "dinov2" / "config.json", num_hidden_layers=3)
    assert "the weights lack encoder.layer.2." in refusal(lambda: Dinov2Encoder(tmp_path / "dinov2"))
    edit(tmp_path / "dinov2" / "config.json", num_hidden_layers=2, hidden_size=96)
    refusal(lambda: Dinov2Encoder(tmp_path / "dinov2"))

    weights = tmp_path / "clip" / "open_clip_model.safetensors"
    tensors = load_torch(weights)
    save_file({name: value for name, value in tensors.items() if name != "visual.proj"}, weights)
    assert "visual.proj" in refusal(lambda: ClipEncoder(tmp_path / "clip"))
    save_file({**tensors, "visual.proj": torch.zeros(64, 31)}, weights)
    assert "visual.proj" in refusal(lambda: ClipEncoder(tmp_path / "clip"))
    weights.write_bytes(b"not safetensors")
    refusal(lambda: ClipEncoder(tmp_path / "clip"))
    (tmp_path / "dinov2" / "model.safetensors").write_bytes(b"not safetensors")
    edit(tmp_path / "dinov2" / "config.json", hidden_size=48)
    refusal(lambda: Dinov2Encoder(tmp_path / "dinov2"))


def test_preprocessing_is_read_from_the_configs(folder: Path) -> None:
    config = folder / "clip" / "open_clip_config.json"
    assert clip_preprocess(folder / "clip").crop == CropSpec(64, 64, "bicubic", "shortest")
    edit(config, preprocess_cfg={"interpolation": "bilinear", "resize_mode": "squash", "mean": [0, 0, 0], "size": 99})
    found = clip_preprocess(folder / "clip")
    assert found.crop == CropSpec(64, 64, "bilinear", "squash"), "the tower's size overrules the preprocessing's"
    assert (found.mean, found.std) == ((0, 0, 0), (0.26862954, 0.26130258, 0.27577711))
    assert dinov2_preprocess(folder / "dinov2").mean == (0.485, 0.456, 0.406)
    edit(folder / "dinov2" / "preprocessor_config.json", resample=2, crop_size={"height": 28, "width": 28})
    found = dinov2_preprocess(folder / "dinov2")
    assert (found.crop.resize_px, found.crop.crop_px, found.crop.resample) == (64, 28, "bilinear")


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("clip/open_clip_config.json", {"preprocess_cfg": {"resize_mode": "longest"}}),
        ("clip/open_clip_config.json", {"preprocess_cfg": {"interpolation": "random"}}),
        ("clip/open_clip_config.json", {"model_cfg": None}),
        ("clip/open_clip_config.json", {"model_cfg": {"vision_cfg": {"image_size": [224, 112]}}}),
        ("dinov2/preprocessor_config.json", {"crop_size": {"height": 224, "width": 112}}),
        ("dinov2/preprocessor_config.json", {"size": {"height": 224, "width": 224}}),
        ("dinov2/preprocessor_config.json", {"rescale_factor": 1 / 127.5}),
        ("dinov2/preprocessor_config.json", {"resample": 0}),
    ],
)
def test_preprocessing_that_cannot_be_followed_is_refused(folder: Path, path: str, values: dict[str, object]) -> None:
    edit(folder / path, **values)
    read = clip_preprocess if path.startswith("clip") else dinov2_preprocess
    assert str(folder / path) in refusal(lambda: read((folder / path).parent))


# --- scorer and head --------------------------------------------------------------------------------------------------


def test_a_scorer_of_another_width_is_refused_with_advice(folder: Path) -> None:
    scorer = Scorer(folder / "scorer")
    wide = {"clip_embedding": np.zeros((3, 40), np.float16), "measured_sharpness": np.zeros(3, np.float32)}
    assert refusal(lambda: scorer.predict(wide)) == (
        "the scorer was trained on 33 features, these embeddings give 41 "
        "{'clip_embedding': 40, 'measured_sharpness': 1}: "
        "score with the bundle that embedded the library, or embed it again with this one"
    )
    edit(folder / "scorer" / "scorer.json", num_features=32)
    assert "takes 33 features but scorer.json says 32" in refusal(lambda: Scorer(folder / "scorer"))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"features": None}, "not a readable scorer spec"),
        ({"num_features": "many"}, "not a readable scorer spec"),
        ({"model": "../model.txt"}, "not a readable scorer spec"),
        ({"model": 5}, "not a readable scorer spec"),
        ({"label_min": 5, "label_max": 5}, "label_max 5.0 must be above label_min 5.0"),
        ({"model": "gone.txt"}, "LightGBM cannot load it"),
        ({"model": "scorer.json"}, "LightGBM cannot load it"),
    ],
)
def test_an_unusable_scorer(folder: Path, values: dict[str, object], reason: str) -> None:
    edit(folder / "scorer" / "scorer.json", **values)
    assert reason in refusal(lambda: Scorer(folder / "scorer"))


def test_an_unusable_attribute_head(folder: Path) -> None:
    path = folder / "attributes"
    wide = {"dinov2_embedding": np.zeros((2, 47), np.float16), "measured_noise": np.zeros(2, np.float32)}
    assert refusal(lambda: AttributeHead(path).predict(wide)) == (
        "the attribute head was trained on 49 features, these embeddings give 48 "
        "{'dinov2_embedding': 47, 'measured_noise': 1}: "
        "score with the bundle that embedded the library, or embed it again with this one"
    )
    edit(path / "head.json", hidden_dim=8)
    assert "trunk.weight is (16, 49), head.json says (8, 49)" in refusal(lambda: AttributeHead(path))
    edit(path / "head.json", hidden_dim=16, scenes=[*schema.SCENES[1:], schema.SCENES[0]])
    assert "trained for" in refusal(lambda: AttributeHead(path))
    edit(path / "head.json", scenes=schema.SCENES)
    tensors = load_torch(path / "head.safetensors")
    save_file({name: value for name, value in tensors.items() if name != "scene.bias"}, path / "head.safetensors")
    assert "scene.bias is None, head.json says (9,)" in refusal(lambda: AttributeHead(path))
    (path / "head.safetensors").write_bytes(b"not safetensors")
    assert "cannot be read" in refusal(lambda: AttributeHead(path))
    (path / "head.json").write_text("[]")
    assert "not a readable head spec" in refusal(lambda: AttributeHead(path))


# --- the full bundle --------------------------------------------------------------------------------------------------


def test_the_full_bundle_from_local_folders_scores_zero_shot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICINSPECTOR_CACHE", str(tmp_path / "cache"))
    write_clip(tmp_path / "c", TINY_CLIP)
    write_dinov2(tmp_path / "d", TINY_DINOV2, resize_px=64, crop_px=56)
    (tmp_path / "c" / "open_clip_pytorch_model.bin").write_bytes(b"published beside it, and not wanted")
    full = fetch_full(clip=tmp_path / "c", dinov2=tmp_path / "d", captions=False)
    full.verify()
    assert full.folder == fetched_folder() == open_bundle("full").folder
    assert (full.name, full.pieces, full.scorer_kind) == ("full", ["clip", "dinov2", "zero_shot"], "zero_shot")
    assert not [path for path in full.files if path.endswith(".bin")]
    assert score_columns(full)[-1] == "clip_embedding"

    prompts = load_file(full.folder / "zero_shot" / "prompts.safetensors")
    assert {name: value.shape for name, value in prompts.items()} == {"antonyms": (6, 2, 32), "scenes": (9, 32)}
    embedded = encode_texts(full.folder / "clip", ["Good photo.", "Blurry photo.", "a photo taken at night."])
    ours = np.stack([prompts["antonyms"][0, 0], prompts["antonyms"][5, 1], prompts["scenes"][5]])
    assert np.allclose(ours, embedded, atol=1e-6)
    assert np.linalg.norm(ours, axis=1) == pytest.approx([1, 1, 1], abs=1e-5)

    # A photo that looks like what the good prompts say and one like what the bad ones say.
    vectors = np.stack([prompts["antonyms"][0, 0], prompts["antonyms"][0, 1]]).astype(np.float16)
    rows = pa.Table.from_pylist([{"image_id": name, "uri": f"/{name}.jpg"} for name in "ab"], schema=schema.MANIFEST)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 32)
    for name in ("error_kind", "error_message"):
        rows = rows.append_column(name, pa.nulls(2, pa.string()))
    good, bad = Score(str(full.folder))(rows.append_column("clip_embedding", column)).to_pylist()
    assert good["scorer_kind"] == bad["scorer_kind"] == "zero_shot"
    assert good["predicted_mos"] is bad["predicted_mos"] is None
    assert 1 <= bad["quality_score"] < 5.5 < good["quality_score"] <= 10
    assert good["attribute_mos"] == pytest.approx((good["quality_score"] - 1) / 9 * 100, rel=1e-5)
    assert sum(good[f"scene_{name}"] for name in schema.SCENES) == pytest.approx(1, abs=1e-5)
    assert good["scorer_fingerprint"] == full.scorer_fingerprint


def test_fetching_replaces_a_bundle_and_nothing_else(tmp_path: Path) -> None:
    write_clip(tmp_path / "c", TINY_CLIP)
    write_dinov2(tmp_path / "d", TINY_DINOV2, resize_px=64, crop_px=56)
    first = fetch_full(tmp_path / "full", tmp_path / "c", tmp_path / "d", captions=False)
    write_clip(tmp_path / "c2", TINY_CLIP, seed=1)
    second = fetch_full(tmp_path / "full", tmp_path / "c2", tmp_path / "d", captions=False)
    second.verify()
    assert second.encoder_fingerprint != first.encoder_fingerprint

    (tmp_path / "c2" / "open_clip_model.safetensors").unlink()
    message = refusal(lambda: fetch_full(tmp_path / "full", tmp_path / "c2", tmp_path / "d"))
    assert message.startswith(f"{tmp_path}/c2/open_clip_model.safetensors is missing; expected [")
    open_bundle(tmp_path / "full").verify()

    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "only-copy.jpg").write_bytes(b"x")
    assert "is not a bundle" in refusal(lambda: fetch_full(photos, tmp_path / "c", tmp_path / "d"))
    assert (photos / "only-copy.jpg").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "c2", "d", "full", "photos"], "nothing half made"


def test_the_full_bundle_has_the_published_captioner(tmp_path: Path) -> None:
    write_clip(tmp_path / "c", TINY_CLIP)
    write_dinov2(tmp_path / "d", TINY_DINOV2, resize_px=64, crop_px=56)
    write_captioner(tmp_path / "s")
    (tmp_path / "s" / "captioner.json").unlink()  # ours, not published
    full = fetch_full(tmp_path / "full", tmp_path / "c", tmp_path / "d", tmp_path / "s")
    full.verify()
    assert full.pieces == ["clip", "dinov2", "zero_shot", "captioner"]
    assert captioner_preprocess(full.folder / "captioner").crop == CropSpec(224, 224, "bicubic", "squash")
    assert len(Captioner(full.piece("captioner")).caption(np.zeros((1, 224, 224, 3), np.uint8))) == 1


def test_without_a_network_there_is_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*args: object, **keywords: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    message = refusal(lambda: fetch_full(tmp_path / "full"))
    assert "bundle fetch full --clip FOLDER --dinov2 FOLDER --captioner FOLDER" in message
    assert list(tmp_path.iterdir()) == []
