"""The attribute head: NumPy against its torch twin, the inputs it reads, and what fitting minimises."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from picinspector import schema
from picinspector.attributes import AttributeHead, input_matrix
from picinspector.bundle import open_bundle
from picinspector.errors import BundleError
from training import attribute_head as twin

FEATURES = {"dinov2_embedding": 48, "clip_embedding": 20, "measured_noise": 1, "measured_contrast": 1}
NAN = math.nan


def make_columns(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Columns as the embeddings table has them: L2-normalised float16, and measurements of very different sizes."""
    rng = np.random.default_rng(seed)
    columns = {}
    for name in ("dinov2_embedding", "clip_embedding"):
        vectors = rng.normal(size=(count, FEATURES[name]))
        columns[name] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    columns["measured_noise"] = np.exp(rng.normal(2, 2, count)).astype(np.float32)
    columns["measured_contrast"] = rng.uniform(0, 0.4, count).astype(np.float32)
    return columns


def make_targets(columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Attributes that follow log noise, contrast and an axis of DINOv2; a scene that follows an axis of CLIP."""
    clean = 60 - 8 * np.log1p(columns["measured_noise"])
    contrast = 20 + 150 * columns["measured_contrast"]
    other = 50 + 100 * columns["dinov2_embedding"][:, 0].astype(np.float64)
    attributes = np.stack([other, other, other, contrast, clean, other], axis=1).clip(1, 99)
    scenes = np.eye(9)[np.where(columns["clip_embedding"][:, 0] > 0, 4, 2)]
    return attributes, scenes


# --- NumPy and torch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log1p", [(), ("measured_noise",)])
@pytest.mark.parametrize("features", [("dinov2_embedding",), tuple(FEATURES), ("measured_contrast", "measured_noise")])
def test_the_head_gives_what_its_torch_twin_gives(
    tmp_path: Path, features: tuple[str, ...], log1p: tuple[str, ...]
) -> None:
    columns, log1p = make_columns(40), tuple(name for name in log1p if name in features)
    matrix = input_matrix(columns, features, log1p)
    torch.manual_seed(0)
    module = twin.AttributeHead(sum(FEATURES[name] for name in features), 16, dropout=0.5).eval()
    module.input.fit(matrix)
    twin.write_head(module, features, log1p, tmp_path)

    head = AttributeHead(tmp_path)
    assert head.features == features
    attributes, scenes = head.predict(columns)
    with torch.no_grad():
        reference, logits = module(torch.from_numpy(matrix))
    assert attributes.dtype == scenes.dtype == np.float32
    assert np.ptp(attributes, axis=0).min() > 1, "photos are told apart"
    assert np.allclose(attributes / 100, reference.numpy() / 100, atol=1e-5)
    assert np.allclose(scenes, torch.softmax(logits, dim=1).numpy(), atol=1e-5)


def test_heavy_tails_go_in_as_logarithms() -> None:
    columns = {"a": np.array([0.0, math.e - 1, math.e**3 - 1]), "b": np.array([[1, 2], [3, 4], [5, 6]], np.float16)}
    assert input_matrix(columns, ("b", "a"), ("a",)) == pytest.approx(np.array([[1, 2, 0], [3, 4, 1], [5, 6, 3]]))
    assert input_matrix(columns, ("a",), ()) == pytest.approx(columns["a"][:, None])


def test_inputs_are_standardised_by_stored_statistics() -> None:
    standardise = twin.Standardise(3)
    standardise.fit(np.array([[1.0, 5.0, 0.0], [3.0, 5.0, 0.1]], np.float32))
    assert standardise.mean.tolist() == pytest.approx([2, 5, 0.05])
    assert standardise.scale.tolist() == pytest.approx([1, 1, 0.05])  # a constant column is only centred
    assert standardise(torch.tensor([[4.0, 6.0, 0.0]])).tolist() == [pytest.approx([2, 1, -1])]


def test_a_spec_without_features_reads_dinov2_scaled_by_the_root_of_its_width(tmp_path: Path) -> None:
    """The spec of the first bundles."""
    rng = np.random.default_rng(0)
    weights = {"trunk": (2, 4), "regression": (6, 2), "scene": (9, 2)}
    tensors = {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in weights.items()}
    tensors |= {f"{name}.bias": np.zeros(shape[0], np.float32) for name, shape in weights.items()}
    save_file(tensors, tmp_path / "head.safetensors")
    spec = {"input_dim": 4, "hidden_dim": 2, "attributes": schema.ATTRIBUTES, "scenes": schema.SCENES}
    (tmp_path / "head.json").write_text(json.dumps(spec))
    head = AttributeHead(tmp_path)
    assert head.features == ("dinov2_embedding",)
    attributes, _ = head.predict({"dinov2_embedding": np.array([[0.5, 0.5, -0.5, 0.5]], np.float16)})
    hidden = tensors["trunk.weight"] @ [1, 1, -1, 1]  # times sqrt(4)
    gelu = [0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in hidden]
    assert attributes[0] == pytest.approx(100 / (1 + np.exp(-tensors["regression.weight"] @ gelu)), abs=1e-3)

    (tmp_path / "head.json").write_text(json.dumps(spec | {"features": ["dinov2_embedding"]}))
    with pytest.raises(BundleError, match=r"input.mean is None, head.json says \(4,\)"):
        AttributeHead(tmp_path)


def test_the_builtin_head_reads_columns_of_the_embeddings_table() -> None:
    head = AttributeHead(open_bundle("builtin").piece("attributes"))
    assert set(head.features) <= set(schema.embeddings(1, 1).names)


# --- losses -----------------------------------------------------------------------------------------------------------


def test_losses_are_means_over_what_is_known() -> None:
    predicted = torch.tensor([[50.0] * 6, [70.0] * 6, [10.0] * 6])
    logits = torch.zeros(3, 9)
    attributes = torch.tensor([[70.0, NAN, NAN, NAN, NAN, NAN], [NAN] * 5 + [30.0], [NAN] * 6])
    scenes = torch.full((3, 9), NAN)
    scenes[2] = torch.eye(9)[4]
    regression, scene = twin.masked_losses(predicted, logits, attributes, scenes)
    assert regression.item() == pytest.approx((1**2 + 2**2) / 2)  # 20 and 40 points off, in units of 20
    assert scene.item() == pytest.approx(math.log(9))  # nine equal logits

    weight = torch.ones(3, 6)
    weight[0] = 3.0
    assert twin.masked_losses(predicted, logits, attributes, scenes, weight)[0].item() == pytest.approx((3 + 4) / 4)


def test_a_soft_scene_costs_its_cross_entropy() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25] + [1e-9] * 6] * 2))
    scenes = torch.zeros(2, 9)
    scenes[0, :2] = torch.tensor([0.5, 0.5])
    scenes[1, 0] = 1.0
    unknown = torch.full((2, 6), NAN)
    regression, scene = twin.masked_losses(torch.zeros(2, 6), logits, unknown, scenes)
    half, quarter = math.log(2), math.log(4)
    assert regression.item() == 0
    assert scene.item() == pytest.approx(((half + quarter) / 2 + half) / 2, abs=1e-5)
    weights = torch.tensor([1.0, 3.0])
    _, weighted = twin.masked_losses(torch.zeros(2, 6), logits, unknown, scenes, scene_weight=weights)
    assert weighted.item() == pytest.approx(((half + quarter) / 2 + 3 * half) / 4, abs=1e-5)


def test_what_is_unknown_has_no_gradient() -> None:
    predicted, logits = torch.full((2, 6), 50.0, requires_grad=True), torch.zeros(2, 9, requires_grad=True)
    attributes = torch.tensor([[60.0, NAN, NAN, NAN, NAN, NAN], [NAN] * 6])
    scenes = torch.full((2, 9), NAN)
    sum(twin.masked_losses(predicted, logits, attributes, scenes)).backward()
    assert predicted.grad is not None and logits.grad is not None
    assert predicted.grad[0, 0].item() == pytest.approx(2 * (50 - 60) / 20**2)
    assert predicted.grad.flatten()[1:].abs().max().item() == 0
    assert logits.grad.abs().max().item() == 0


# --- fitting ----------------------------------------------------------------------------------------------------------


def fit(columns: dict[str, np.ndarray], seed: int = 0, **options: object) -> twin.AttributeHead:
    attributes, scenes = make_targets(columns)
    known = np.random.default_rng(1).random(attributes.shape) < 0.7
    attributes = np.where(known, attributes, NAN)
    scenes = np.where((np.arange(len(scenes)) % 2 == 0)[:, None], scenes, NAN)  # every other photo has no scene
    settings = {"hidden_dim": 32, "epochs": 40, "batch_size": 64, "log1p": ("measured_noise",)}
    return twin.fit_head(columns, attributes, scenes, seed=seed, **settings | options)  # type: ignore[arg-type]


def test_a_fitted_head_learns_from_partial_labels(tmp_path: Path) -> None:
    head = fit(make_columns(600))
    assert not head.training
    twin.write_head(head, tuple(FEATURES), ("measured_noise",), tmp_path)
    fresh = make_columns(200, seed=7)
    truth, scenes = make_targets(fresh)
    attributes, probabilities = AttributeHead(tmp_path).predict(fresh)
    correlations = [np.corrcoef(attributes[:, i], truth[:, i])[0, 1] for i in range(6)]
    assert min(correlations) > 0.8
    assert (probabilities.argmax(1) == scenes.argmax(1)).mean() > 0.8


def test_the_seed_decides() -> None:
    columns = make_columns(100)
    first, again, other = (fit(columns, seed, epochs=2, dropout=0.2) for seed in (0, 0, 1))
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.trunk.weight, other.trunk.weight)


def test_weights_tell_labels_apart(tmp_path: Path) -> None:
    """Two halves of the same photos with opposite labels: the fit follows the half that counts."""
    columns = {"measured_contrast": np.tile(np.linspace(0, 1, 100, dtype=np.float32), 2)}
    attributes = np.repeat([20.0, 80.0], 100)[:, None] * np.ones(6)
    scenes = np.eye(9)[np.repeat([0, 5], 100)]
    heavy = np.repeat([1.0, 0.01], 100)
    head = twin.fit_head(columns, attributes, scenes, attribute_weight=heavy[:, None], scene_weight=heavy[::-1].copy(),
                         hidden_dim=8, epochs=60, batch_size=16)  # fmt: skip
    twin.write_head(head, tuple(columns), (), tmp_path)
    found, probabilities = AttributeHead(tmp_path).predict(columns)
    assert found.max() < 30
    assert set(probabilities.argmax(1)) == {5}


def test_validation_keeps_the_best_epoch() -> None:
    """Labels of noise: what is learnt of them costs on other photos, so an early epoch is the best."""
    columns, other, rng = make_columns(60), make_columns(60, seed=1), np.random.default_rng(0)
    noise, noise_too = (rng.uniform(0, 100, (60, 6)) for _ in range(2))
    scenes = np.full((60, 9), NAN)
    options = {"hidden_dim": 64, "epochs": 60, "batch_size": 16, "seed": 0}
    kept = twin.fit_head(columns, noise, scenes, validation=(other, noise_too, scenes), **options)  # type: ignore[arg-type]
    last = twin.fit_head(columns, noise, scenes, **options)  # type: ignore[arg-type]
    matrix, target = torch.from_numpy(input_matrix(other, tuple(other), ())), torch.from_numpy(noise_too)
    with torch.no_grad():
        losses = [(head(matrix)[0] - target).square().mean().item() for head in (kept, last)]
    assert losses[0] < 0.8 * losses[1]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    twin.write_head(twin.AttributeHead(4, 2), ["dinov2_embedding"], [], tmp_path)
    tensors = load_file(tmp_path / "head.safetensors")
    save_file(tensors | {"input.scale": np.ones(3, np.float32)}, tmp_path / "head.safetensors")
    with pytest.raises(BundleError, match=r"head.safetensors: input.scale is \(3,\), head.json says \(4,\); train"):
        AttributeHead(tmp_path)
