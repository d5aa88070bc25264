"""Bundles with random weights in the published checkpoint formats, at any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import open_clip
import torch
from safetensors.torch import load_file, save_file
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from picinspector import bundle, scorer
from picinspector.conformal import Intervals
from training import captioner_model
from training.attribute_head import AttributeHead, write_head

TINY_CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
TINY_DINOV2: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 56,
    "patch_size": 14,
}

DINOV2_BASE: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 518,
    "patch_size": 14,
}


def write_clip(folder: Path, config: dict[str, Any], seed: int = 0) -> None:
    """An open_clip folder: what the hub publishes as `open_clip_config.json` and `open_clip_model.safetensors`."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    preprocess = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    preprocess |= {"size": config["vision_cfg"]["image_size"], "interpolation": "bicubic", "resize_mode": "shortest"}
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()},
              folder / "open_clip_model.safetensors")  # fmt: skip


def write_dinov2(folder: Path, config: dict[str, Any], resize_px: int, crop_px: int, seed: int = 0) -> None:
    """A transformers folder: `config.json`, `model.safetensors`, `preprocessor_config.json`."""
    torch.manual_seed(seed)
    Dinov2Model(Dinov2Config(**config)).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": resize_px},
        crop_size={"height": crop_px, "width": crop_px},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=3,
    ).save_pretrained(folder)


def write_scorer(folder: Path, features: dict[str, int], seed: int = 0) -> None:
    """A LightGBM model of random labels over these columns (name -> width)."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(400, sum(features.values())))
    labels = 1 / (1 + np.exp(-matrix[:, 0] - matrix[:, -1]))
    parameters = {"num_leaves": 7, "verbose": -1, "num_threads": 1, "seed": seed}
    booster = lightgbm.train(parameters, lightgbm.Dataset(matrix, labels), 20)
    intervals = Intervals(0.9, (0.5,), low=(-0.25, -0.125), high=(0.125, 0.25))
    scorer.write_scorer(folder, booster, tuple(features), 0.0, 1.0, scaled=True, intervals=intervals)


def write_attributes(folder: Path, features: dict[str, int], hidden_dim: int = 16, seed: int = 0) -> None:
    """An attribute head with random weights over these columns (name -> width)."""
    torch.manual_seed(seed)
    head = AttributeHead(sum(features.values()), hidden_dim)
    widths = np.repeat(list(features.values()), list(features.values()))
    head.input.scale.copy_(torch.from_numpy(widths**-0.5))  # what the entries of an L2-normalised vector are like
    write_head(head, list(features), [name for name in features if name == "measured_noise"], folder)


def write_captioner(folder: Path, seed: int = 0, max_new_tokens: int = 8) -> None:
    """A small captioner with random weights, which babbles."""
    model, tokenizer = captioner_model.small(seed)
    captioner_model.write(model, tokenizer, captioner_model.PREPROCESS, folder)
    spec = json.loads((folder / "captioner.json").read_text())
    (folder / "captioner.json").write_text(json.dumps(spec | {"max_new_tokens": max_new_tokens}))


def halve(weights: Path) -> None:
    """To float16, as half the bytes do: every loader here widens them again."""
    save_file({name: value.half() for name, value in load_file(weights).items()}, weights)


def tiny_bundle(folder: Path, scorer_seed: int = 0) -> bundle.Bundle:
    """A whole bundle that encodes hundreds of photos a second."""
    write_clip(folder / "clip", TINY_CLIP)
    write_dinov2(folder / "dinov2", TINY_DINOV2, resize_px=64, crop_px=56)
    write_scorer(folder / "scorer", {"clip_embedding": 32, "measured_sharpness": 1}, scorer_seed)
    write_attributes(folder / "attributes", {"dinov2_embedding": 48, "measured_noise": 1}, seed=scorer_seed)
    return bundle.seal(folder, "tiny", "0.0.1")
