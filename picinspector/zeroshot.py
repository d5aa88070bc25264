"""Zero-shot judgement with antonym prompts, for bundles whose scorer has not been trained yet.

CLIP-IQA (Wang et al. 2023, arXiv:2207.12396): the probability of the good prompt in the softmax over a pair of opposite
prompts. Scenes: the softmax over one prompt a class (Radford et al. 2021). The prompts' embeddings are computed once,
when the bundle is put together, so that scoring needs no text tower.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from picinspector.errors import BundleError
from picinspector.schema import ATTRIBUTES, SCENES

PROMPTS = "prompts.safetensors"

#: Good prompt first. The quality pair and the attribute pairs are those of CLIP-IQA, section 3.2 and table 3. Its
#: "Bright photo." asks for luminance: here alone `brightness` is not the quality of the exposure, and an overexposed
#: photo may score high.
_ANTONYMS: dict[str, tuple[str, str]] = {
    "mos": ("Good photo.", "Bad photo."),
    "brightness": ("Bright photo.", "Dark photo."),
    "colorfulness": ("Colorful photo.", "Dull photo."),
    "contrast": ("High contrast photo.", "Low contrast photo."),
    "noisiness": ("Clean photo.", "Noisy photo."),
    "sharpness": ("Sharp photo.", "Blurry photo."),
}
_SCENE_PROMPTS: dict[str, str] = {
    "animal": "a photo of an animal.",
    "cityscape": "a photo of a city with buildings and streets.",
    "human": "a photo of a person.",
    "indoor": "a photo of an indoor scene, a room.",
    "landscape": "a photo of a landscape in nature.",
    "night": "a photo taken at night.",
    "plant": "a close-up photo of a plant or flower.",
    "still_life": "a still life photo of an object or food.",
    "other": "a photo of something else.",
}

#: CLIP's learnt temperature, where training clips it (Radford et al. 2021, section 2.5); the openai weights sit there.
_LOGIT_SCALE = 100.0


class ZeroShot:
    """Quality, attributes and scene from the CLIP embedding alone."""

    features = ("clip_embedding",)

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Load the prompts' embeddings.

        Raises:
            BundleError: they are missing or unreadable.
        """
        path = Path(folder) / PROMPTS
        try:
            prompts = load_file(path)
            self._antonyms, self._scenes = prompts["antonyms"], prompts["scenes"]  # (6, 2, D), (9, D)
        except Exception as error:  # safetensors raises its own, OSError and KeyError
            raise BundleError(f"{path}: not readable ({error!r}); run `picinspector bundle fetch` again") from error

    def predict(self, embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Judge N photos.

        Args:
            embedding: L2-normalised CLIP embeddings (N, D) of any float dtype.

        Returns:
            `quality_score` 1-10 (N,), attributes 0-100 (N, 6), scene probabilities (N, 9); float32.

        Raises:
            BundleError: the embeddings are not as wide as the prompts'.
        """
        width = self._scenes.shape[1]
        if embedding.shape[1] != width:
            raise BundleError(
                f"the zero-shot prompts are {width} wide, these CLIP embeddings {embedding.shape[1]}: "
                "score with the bundle that embedded the library, or embed it again with this one"
            )
        image = embedding.astype(np.float32)
        pairs = _softmax(_LOGIT_SCALE * np.einsum("nd,apd->nap", image, self._antonyms))[:, :, 0]  # (N, 6)
        scenes = _softmax(_LOGIT_SCALE * image @ self._scenes.T)
        quality = 1.0 + 9.0 * pairs[:, ATTRIBUTES.index("mos")]
        return quality.astype(np.float32), (100.0 * pairs).astype(np.float32), scenes.astype(np.float32)


def write_prompts(clip_folder: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Embed the prompts with a bundle's own text tower and store them for `ZeroShot`."""
    from picinspector.clip import encode_texts  # loads open_clip, which scoring with stored prompts does without

    pairs = [prompt for name in ATTRIBUTES for prompt in _ANTONYMS[name]]
    embedded = encode_texts(clip_folder, [*pairs, *(_SCENE_PROMPTS[name] for name in SCENES)])
    antonyms = embedded[: len(pairs)].reshape(len(ATTRIBUTES), 2, -1)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({"antonyms": np.ascontiguousarray(antonyms), "scenes": np.ascontiguousarray(embedded[len(pairs) :])},
              Path(folder) / PROMPTS)  # fmt: skip


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
