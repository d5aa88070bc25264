"""The encoders give what open_clip and transformers give: the same pixels, the same embeddings.

At full size (ViT-L/14, DINOv2-base) with random weights in the published checkpoint formats. Photos are PNGs, so that
no DCT-scaled decode comes between.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import skimage.data
import torch
from open_clip.transform import image_transform
from PIL import Image
from transformers import BitImageProcessor, BitImageProcessorPil, Dinov2Model

from picinspector.clip import ClipEncoder
from picinspector.dinov2 import Dinov2Encoder
from picinspector.photo import CropSpec, decode
from picinspector.preprocess import clip_preprocess, dinov2_preprocess
from tests.bundles import TINY_CLIP, TINY_DINOV2, write_clip, write_dinov2

CPU = torch.device("cpu")

#: Square, 3:2, portrait, odd sides, 3:1, smaller than the crop, 4:1.
SIZES = [(512, 512), (768, 512), (333, 517), (517, 333), (301, 97), (90, 121), (1023, 769), (900, 225)]
#: DINOv2's resized side is odd here, and the centre of an odd margin is a matter of rounding.
ODD_MARGINS = [(640, 427), (427, 640), (611, 400)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Photo files: a square one and a landscape one with odd sides."""
    folder = tmp_path_factory.mktemp("photos")
    Image.fromarray(skimage.data.astronaut()).save(folder / "astronaut.png")
    Image.fromarray(skimage.data.chelsea()[:299, :451]).save(folder / "chelsea.png")
    return sorted(folder.iterdir())


def crops(paths: list[Path], spec: CropSpec) -> np.ndarray:
    return np.stack([decode(path.read_bytes(), [spec]).crops[0] for path in paths])


def cosine(ours: np.ndarray, theirs: torch.Tensor) -> np.ndarray:
    a, b = ours.astype(np.float64), theirs.double().numpy()
    return np.asarray((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


@torch.inference_mode()
def test_clip_embeds_as_open_clip_does_at_full_size(full_size: Path, files: list[Path]) -> None:
    folder = full_size / "clip"
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    theirs = model.eval().encode_image(torch.stack([transform(Image.open(path)) for path in files]))
    assert cosine(theirs[:1].numpy(), theirs[1:])[0] < 0.99, (
        "two photos are told apart: the bound below means something"
    )
    del model

    single = ClipEncoder(folder, CPU, torch.float32)
    ours = single.encode(crops(files, single.crop))
    assert (single.dim, ours.shape, ours.dtype) == (768, (2, 768), np.float16)
    assert cosine(ours, theirs).min() >= 0.9999
    assert np.linalg.norm(ours.astype(np.float64), axis=1) == pytest.approx([1, 1], abs=1e-3)
    del single

    half = ClipEncoder(folder, CPU, torch.bfloat16)
    assert cosine(half.encode(crops(files, half.crop)), theirs).min() >= 0.999


@torch.inference_mode()
def test_dinov2_embeds_as_transformers_does_at_full_size(full_size: Path, files: list[Path]) -> None:
    folder = full_size / "dinov2"
    model = Dinov2Model.from_pretrained(folder, dtype=torch.float32).eval()
    photos = [Image.open(path) for path in files]
    theirs = []
    for processor in (BitImageProcessor, BitImageProcessorPil):
        pixels = processor.from_pretrained(folder)(images=photos, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (2, 3, 224, 224)
        theirs.append(model(pixel_values=pixels).pooler_output)
    assert cosine(theirs[0][:1].numpy(), theirs[0][1:])[0] < 0.99, "two photos are told apart"
    del model

    single = Dinov2Encoder(folder, CPU, torch.float32)
    half = Dinov2Encoder(folder, CPU, torch.bfloat16)
    for encoder, least in ((single, 0.9999), (half, 0.999)):
        ours = encoder.encode(crops(files, encoder.crop))
        assert (encoder.dim, ours.shape, ours.dtype) == (768, (2, 768), np.float16)
        for reference in theirs:
            assert cosine(ours, reference).min() >= least


# --- pixels -----------------------------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(skimage.data.astronaut()).resize((width, height)).save(file, "PNG")
    return file.getvalue()


def difference(data: bytes, spec: CropSpec, theirs: np.ndarray) -> float:
    """Largest difference of a channel, in 1/255, between our crop and theirs (3, S, S) in 0-1."""
    ours = decode(data, [spec]).crops[0].astype(np.float64)
    apart = np.abs(theirs.transpose(1, 2, 0) * 255.0 - ours)
    assert apart.mean() < 0.25, "a fraction of pixels that were rounded otherwise"
    return float(apart.max())


#: Filters in integers, as both torch and Pillow have them, round between their two passes: one pixel in 3,000 is off
#: by more than 1/255.
ROUNDING = 5.01


@pytest.mark.parametrize(("width", "height"), SIZES + ODD_MARGINS)
@pytest.mark.parametrize("preprocess", [{}, {"interpolation": "bilinear"}, {"resize_mode": "squash"}])
def test_clip_crops_are_open_clips_own_pixels(
    tmp_path: Path, width: int, height: int, preprocess: dict[str, str]
) -> None:
    config = {"model_cfg": {"vision_cfg": {"image_size": 224}}, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    unit: dict[str, Any] = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    transform = image_transform(224, is_train=False, **unit, **preprocess)
    data = png(width, height)
    assert difference(data, clip_preprocess(tmp_path).crop, transform(Image.open(io.BytesIO(data))).numpy()) <= ROUNDING


def dinov2_differences(folder: Path, width: int, height: int) -> tuple[float, float]:
    """Against the processor over Pillow and the one over torchvision."""
    given = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3}
    BitImageProcessor(**given, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    data, spec = png(width, height), dinov2_preprocess(folder).crop
    photo, found = Image.open(io.BytesIO(data)), []
    for processor in (BitImageProcessorPil, BitImageProcessor):
        pixels = processor(**given, do_normalize=False)(images=photo, return_tensors="np")["pixel_values"][0]
        found.append(difference(data, spec, np.asarray(pixels)))
    return found[0], found[1]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_dinov2_crops_are_the_processors_own_pixels(tmp_path: Path, width: int, height: int) -> None:
    pil, torchvision = dinov2_differences(tmp_path, width, height)
    assert max(pil, torchvision) <= ROUNDING


@pytest.mark.parametrize(("width", "height"), ODD_MARGINS)
def test_dinov2_crops_are_centred_as_the_processor_centres_them(tmp_path: Path, width: int, height: int) -> None:
    pil, torchvision = dinov2_differences(tmp_path, width, height)
    assert max(pil, torchvision) <= ROUNDING


def test_normalisation_is_the_one_in_the_config(tmp_path: Path) -> None:
    """What reaches the tower is (pixel / 255 - mean) / std: checked by swapping the tower for a mean over pixels."""
    write_clip(tmp_path / "clip", TINY_CLIP)
    encoder = ClipEncoder(tmp_path / "clip", CPU, torch.float32)
    seen = []
    encoder._tower.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    encoder.encode(np.full((1, 64, 64, 3), (0, 51, 255), np.uint8))
    expected = [(0.0 - 0.48145466) / 0.26862954, (0.2 - 0.4578275) / 0.26130258, (1.0 - 0.40821073) / 0.27577711]
    assert seen[0].shape == (1, 3, 64, 64)
    assert seen[0][0, :, 31, 7].tolist() == pytest.approx(expected, abs=1e-5)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_does_not_depend_on_its_batch(tmp_path: Path, dtype: torch.dtype) -> None:
    write_clip(tmp_path / "clip", TINY_CLIP)
    write_dinov2(tmp_path / "dinov2", TINY_DINOV2, resize_px=64, crop_px=56)
    least = 0.99999 if dtype == torch.float32 else 0.999
    for encoder in (ClipEncoder(tmp_path / "clip", CPU, dtype), Dinov2Encoder(tmp_path / "dinov2", CPU, dtype)):
        rng, side = np.random.default_rng(0), encoder.crop.crop_px
        photos = rng.integers(0, 256, (9, side, side, 3), dtype=np.uint8)
        photos[3], photos[4] = 0, 255  # a black and a white one are neighbours that would show in shared statistics
        alone = np.concatenate([encoder.encode(photos[i : i + 1]) for i in range(9)]).astype(np.float64)
        assert (alone @ alone.T - np.eye(9)).max() < 0.999, "the photos are told apart"
        for order in (range(9), [8, 3, 0, 5], [4, 4, 4, 1], rng.permutation(9)):
            together = encoder.encode(photos[list(order)])
            assert cosine(together, torch.from_numpy(alone[list(order)])).min() >= least
            if dtype == torch.float32:
                assert np.abs(together - alone[list(order)]).max() <= 2**-11, "a float16 step between 1/2 and 1"


def test_a_read_only_array_is_encoded(tmp_path: Path) -> None:
    """Arrow hands out its buffers read-only."""
    write_clip(tmp_path / "clip", TINY_CLIP)
    encoder = ClipEncoder(tmp_path / "clip", CPU, torch.float32)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    frozen = np.frombuffer(pixels.tobytes(), np.uint8).reshape(pixels.shape)
    assert np.array_equal(encoder.encode(frozen), encoder.encode(pixels))
