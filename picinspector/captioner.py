"""The captioner: a SmolVLM (vision transformer, pixel shuffle, linear connector, SmolLM decoder) through transformers.

A captioner folder is a Hugging Face model folder of the SmolVLM or Idefics3 family (`config.json`, `model.safetensors`,
`tokenizer.json`, `tokenizer_config.json`, `preprocessor_config.json`), with `captioner.json`, which says what to ask,
and, where it was fine-tuned that way, `adapter/`: LoRA matrices and connector in peft's format.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from picinspector.device import pick_device, pick_dtype, to_input
from picinspector.errors import BundleError
from picinspector.preprocess import CAPTIONER_SPEC, captioner_preprocess

transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]

ADAPTER = "adapter"
#: Rows of one forward pass, always: the last ones are filled up with copies. The shape of a matrix decides the order in
#: which its products are summed, so that with other shapes the same photo might get other words. Measured, builtin on
#: two cores: 8 rows give nine tenths of the captions a second of 32.
_ROWS = {"cpu": 8, "cuda": 64}
#: Weights of this size and more are read in bfloat16 on a CPU: then generation waits for memory. Smaller ones wait for
#: the interpreter. Measured, builtin (18 MB) on two cores: float32 gives 2.4 times the captions of bfloat16.
_LARGE_BYTES = 100e6
#: Prompts are padded on the left to a multiple of this many tokens, for the same reason: those of one captioner differ
#: by a few tokens in a hundred.
_PROMPT_STEP = 64
#: What may be loaded; any other type could name code of its own.
_FAMILIES = ("idefics3", "smolvlm")
_IMAGE, _AROUND, _GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
_END = "<end_of_utterance>"


class Captioner:
    """A SmolVLM that describes photos, one small crop each, without chance.

    Attributes:
        crop: the crop to pass to `caption`.
    """

    def __init__(
        self, folder: str | os.PathLike[str], device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Load model, tokenizer and adapter onto `device` (default: the GPU if there is one).

        Args:
            folder: see the module.
            device: where to run.
            dtype: default: what the device is fast in; on the CPU float32 for a small model.

        Raises:
            BundleError: the folder lacks a file, or its files do not fit together.
        """
        self.device = device or pick_device()
        self._preprocess = captioner_preprocess(folder)
        self.crop = self._preprocess.crop
        path = Path(folder)
        small = self.device.type == "cpu" and sum(f.stat().st_size for f in path.glob("*.safetensors")) < _LARGE_BYTES
        self.dtype = dtype or (torch.float32 if small else pick_dtype(self.device))
        try:
            spec = json.loads((path / CAPTIONER_SPEC).read_text("utf-8"))
            self._question, self._told = str(spec["question"]), str(spec["question_with_facts"])
            self._max_new_tokens = int(spec["max_new_tokens"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{path / CAPTIONER_SPEC}: not a captioner's spec ({error!r}); fetch it again") from error
        self._model, self._tokenizer = load_captioner(path, self.device, self.dtype)
        self._rows = _ROWS["cuda" if self.device.type == "cuda" else "cpu"]

    @torch.inference_mode()
    def caption(self, crops: np.ndarray, facts: Sequence[str] | None = None, beams: int = 1) -> list[str]:
        """Describe photos.

        Args:
            crops: uint8 sRGB (B, S, S, 3).
            facts: for each photo a line of what was measured (`wording.tell`), to be put into words; None lets the
                model say what it sees. The same photo gets the same words whatever it shares a batch with.
            beams: of the search for the likeliest text; 1 is greedy.

        Returns:
            a text for each; one line, without control characters; it may be empty. On another kind of device, or in
            another precision, a near tie may fall otherwise.
        """
        texts: list[str] = []
        for start in range(0, len(crops), self._rows):
            part = crops[start : start + self._rows]
            told = facts[start : start + self._rows] if facts is not None else None
            texts += self._generate(part, told, beams)[: len(part)]
        return texts

    def _generate(self, crops: np.ndarray, facts: Sequence[str] | None, beams: int) -> list[str]:
        rows = np.minimum(np.arange(self._rows), len(crops) - 1)  # an all-zero filler would be taken for no image
        questions = [self._question if facts is None else self._told.format(facts=facts[row]) for row in rows]
        prompts = self._tokenizer(
            [prompt(question, self._model.config) for question in questions],
            padding=True,
            padding_side="left",
            pad_to_multiple_of=_PROMPT_STEP,
            add_special_tokens=False,
            return_tensors="pt",
        ).to(self.device)
        pixels = to_input(crops[rows], self._preprocess, self.device, self.dtype)  # (R, 3, S, S)
        tokens = self._model.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            pixel_values=pixels.unsqueeze(1),
            do_sample=False,
            num_beams=beams,
            max_new_tokens=self._max_new_tokens,
            eos_token_id=[self._tokenizer.convert_tokens_to_ids(_END), self._tokenizer.eos_token_id],
            pad_token_id=self._tokenizer.pad_token_id,
        )
        texts = self._tokenizer.batch_decode(tokens[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
        return [_tidy(text) for text in texts]


def prompt(question: str, config: Any) -> str:
    """One turn of the SmolVLM chat template, with an image that is not split into tiles, before a question.

    The same text as `SmolVLMProcessor` makes with `do_image_splitting=False`.

    Args:
        question: without an image.
        config: of the model: how many tokens its image takes.
    """
    vision = config.vision_config
    side = vision.image_size // vision.patch_size // config.scale_factor
    image = f"{_AROUND}{_GLOBAL}{_IMAGE * side**2}{_AROUND}"
    return f"<|im_start|>User:{image}{question}{_END}\nAssistant:"


def answer(text: str) -> str:
    """What follows `prompt` where the model says `text`: for training."""
    return f" {text}{_END}"


def load_captioner(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model in `dtype`, its adapter merged into the weights, and tokenizer.

    Raises:
        BundleError: the folder lacks a file, or its files do not fit together.
    """
    # Without trust_remote_code=False transformers would ask at the terminal, and take a yes.
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        family = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
        if family not in _FAMILIES:
            raise ValueError(f"model_type {family}, expected one of {', '.join(_FAMILIES)}")
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            os.fspath(folder), use_safetensors=True, dtype=dtype, output_loading_info=True, **local
        )
        model, loading = loaded
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(folder), **local)
        if (folder / ADAPTER).is_dir():
            model = _with_adapter(model, folder / ADAPTER)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BundleError(f"{folder}: transformers cannot load it: {reason}") from error
    if missing := sorted(loading["missing_keys"]):  # transformers would fill them with random numbers
        raise BundleError(f"{folder}: the weights lack {missing[0]}, which config.json asks for; fetch it again")
    unknown = [token for token in (_IMAGE, _AROUND, _GLOBAL, _END) if token not in tokenizer.get_vocab()]
    if unknown:
        raise BundleError(f"{folder}: the tokenizer lacks {unknown[0]}: not a captioner of the SmolVLM family")
    return model.to(device).eval(), tokenizer


def _with_adapter(model: Any, folder: Path) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():  # peft would go on to a pickle
        raise BundleError(f"{folder}: adapter_model.safetensors is missing; train or fetch it again")
    tuned = PeftModel.from_pretrained(model, os.fspath(folder), local_files_only=True)
    with safe_open(weights, "pt") as file:
        wrong = set(get_peft_model_state_dict(tuned)) ^ set(file.keys())
    if wrong:  # peft would warn, and leave the base as it is
        raise BundleError(f"{folder}: {min(wrong)} is not in both the adapter and its model; train it again")
    return tuned.merge_and_unload()


def _tidy(text: str) -> str:
    """One line of printable text, whole sentences where there is one: a token limit may have cut the last."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", text)]  # not within a number
    return text[: ends[-1]] if ends else text
