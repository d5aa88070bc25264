"""The builtin tower, folding, and what fits the tower's head."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from picinspector import towers
from picinspector.clip import _to
from picinspector.errors import UsageError
from picinspector.fold import fold_batch_norm
from picinspector.schema import SCENES
from training.attribute_head import AttributeHead
from training.builtin import scenes, tower
from training.builtin.calibrate import match_spaq
from training.builtin.labels import SPAQ_MEAN, SPAQ_SD


def with_random_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Batch norms that do something: a fresh one is the identity, and folding it wrongly would not show."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                tensor.data.uniform_(low, low + 1.0, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


@torch.inference_mode()
def test_folding_leaves_the_outputs() -> None:
    model = with_random_norms(timm.create_model("tf_efficientnet_lite0", num_classes=0))
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = model(pixels)
    assert expected.std() > 0.01
    folded = fold_batch_norm(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(pixels), expected, rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_folding_passes_over_a_norm_that_follows_no_convolution() -> None:
    model = with_random_norms(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)))
    pixels = torch.randn(2, 3, 8, 8)
    expected = model(pixels)
    torch.testing.assert_close(fold_batch_norm(model)(pixels), expected)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model) == 2


def test_the_kernel_is_one_at_home_and_falls_with_the_squared_distance() -> None:
    a, b = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(towers.kernel(a, b), torch.tensor([[1.0, np.exp(-2.0)]], dtype=torch.float32))


@torch.inference_mode()
def test_the_tower_embeds_and_keeps_its_head_exact() -> None:
    model = timm.create_model(towers.NAME)
    head, generator = model.head, torch.Generator().manual_seed(0)
    for name in ("quality", "content", "support", "weights"):
        getattr(head, name).normal_(generator=generator)
    exact = head.weights.clone()
    cast = _to(fold_batch_norm(model.eval()), torch.device("cpu"), torch.bfloat16)
    assert cast.statistics.net.conv_stem.weight.dtype == torch.bfloat16
    assert torch.equal(cast.head.weights, exact) and cast.head.weights.dtype == torch.float32
    embeddings = cast(torch.randn(2, 3, 64, 64, generator=generator).bfloat16())
    assert embeddings.shape == (2, towers.EMBED_DIM) and embeddings.dtype == torch.float32
    lengths = [part.norm(dim=1) for part in embeddings.split((towers.QUALITY_DIM, towers.CONTENT_DIM, 1), dim=1)]
    torch.testing.assert_close(torch.stack(lengths[:2]), torch.ones(2, 2))


def test_statistics_are_means_and_deviations_of_every_stage() -> None:
    model = towers.StageStatistics().eval()
    with torch.inference_mode():
        pixels = torch.randn(1, 3, 64, 64)
        stem = model.net.blocks[0](model.net.bn1(model.net.conv_stem(pixels)))
        found = model(pixels)
    assert found.shape == (1, towers.STATISTICS)
    torch.testing.assert_close(found[0, :16], stem.mean((2, 3))[0])
    torch.testing.assert_close(found[0, 16:32], stem.std((2, 3))[0])


@pytest.mark.parametrize("wanted", [{"pretrained": True}, {"num_classes": 10}])
def test_the_tower_has_no_other_width_and_no_weights_to_fetch(wanted: dict[str, object]) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        timm.create_model(towers.NAME, **wanted)


def test_the_regression_is_a_gaussian_process_and_never_sees_a_group_of_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, generator=generator), torch.randn(40, generator=generator)
    weights = torch.ones(40)
    weights[::2] = 0.5
    regression, rows = tower._Regression(x, y, weights, 0.3), np.arange(40)
    # A label of half the weight is one of twice the noise variance.
    exact = torch.linalg.solve(towers.kernel(x, x) + torch.diag(0.3 / weights), y)
    torch.testing.assert_close(regression.solve(rows), exact, atol=1e-4, rtol=1e-4)
    groups = rows // 2
    predicted = regression.out_of_fold(rows, groups, seed=0)
    changed = y.clone()
    changed[:2] += 100.0  # the labels of one group
    again = tower._Regression(x, changed, weights, 0.3).out_of_fold(rows, groups, seed=0)
    torch.testing.assert_close(again[:2], predicted[:2])
    assert (again[2:] - predicted[2:]).abs().max() > 1.0


def test_content_groups_join_takes_of_one_scene_and_leave_test_photos_alone() -> None:
    generator = np.random.default_rng(0)
    statistics = generator.normal(size=(40, towers.STATISTICS))
    statistics[1] = statistics[0] + 0.1 * generator.normal(size=towers.STATISTICS)
    statistics[39] = statistics[0]  # a test photo
    original = np.arange(40)
    original[38] = 5  # a degraded copy
    test = original == 39
    groups = tower.content_groups(statistics, original, test)
    assert groups[0] == groups[1] and groups[38] == groups[5] and groups[39] == 39
    assert len(set(groups)) == 38


def test_attributes_get_the_means_and_deviations_people_used() -> None:
    torch.manual_seed(0)
    columns = {"dinov2_embedding": np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)}
    head = AttributeHead(8, 16).eval()
    match_spaq(head, columns, ())
    with torch.inference_mode():
        attributes = head(torch.from_numpy(columns["dinov2_embedding"]))[0].numpy()
    np.testing.assert_allclose(attributes.mean(0), SPAQ_MEAN, atol=0.05)
    np.testing.assert_allclose(attributes.std(0), SPAQ_SD, atol=0.05)


def test_scene_labels_are_kept_and_spread_to_the_rest() -> None:
    generator = np.random.default_rng(0)
    truth = np.arange(900) % 9
    features = np.eye(9)[truth] * 3 + generator.normal(size=(900, 9))
    labels = np.where(np.arange(900) < 450, truth, -1)
    found = scenes.spread(features, labels)
    np.testing.assert_allclose(found.sum(1), 1.0, rtol=1e-5)
    assert (found[:450].argmax(1) == truth[:450]).all() and (found[:450].max(1) == 1.0).all()
    assert (found[450:].argmax(1) == truth[450:]).mean() > 0.8


def test_a_scene_label_for_no_photo_is_refused() -> None:
    with pytest.raises(UsageError, match="no photo"):
        scenes.read_labels(["nothing.jpg"])
    assert set(SCENES) >= {"animal", "other"}
