"""The captioner: prompts as published, words that do not depend on the company, adapters, damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Idefics3ImageProcessor, Idefics3Processor, SmolVLMConfig

from picinspector import captioner
from picinspector.captioner import Captioner, load_captioner, prompt
from picinspector.device import to_input
from picinspector.errors import BundleError
from picinspector.photo import CropSpec, decode, foveate
from picinspector.preprocess import captioner_preprocess
from tests.bundles import write_captioner
from training.ladders import png

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captioner")
    write_captioner(path)
    return path


def crops(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)


def test_the_prompt_is_that_of_the_published_processor(folder: Path) -> None:
    """SmolVLM-256M and 500M are Idefics3 models: their processor, an image that is not split, their chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = Idefics3ImageProcessor(do_image_splitting=False, max_image_size={"longest_edge": 224})
    template = (
        "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] "
        "== 'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == "
        "'text' %}{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
        "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    content = [{"type": "image"}, {"type": "text", "text": "Describe it."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    theirs = processor(text=text, images=[crops(1)[0]], return_tensors="pt", add_special_tokens=False)

    config = SmolVLMConfig(vision_config={"image_size": 224, "patch_size": 16}, scale_factor=7)
    ours = tokenizer(prompt("Describe it.", config), add_special_tokens=False).input_ids
    assert ours == theirs.input_ids[0].tolist()


def test_pixels_are_those_of_the_published_processor(folder: Path) -> None:
    image = crops(1)
    processor = Idefics3ImageProcessor(do_image_splitting=False, do_resize=False, max_image_size={"longest_edge": 224})
    theirs = processor([image[0]], return_tensors="pt").pixel_values[0, 0]
    ours = to_input(image, captioner_preprocess(folder), CPU, torch.float32)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_published_folder_is_squashed_to_its_square(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "published"
    shutil.copytree(folder, target)
    spec = json.loads((target / "captioner.json").read_text())
    (target / "captioner.json").write_text(json.dumps(spec | {"crop": "squash"}))
    assert captioner_preprocess(target).crop == CropSpec(224, 224, "bicubic", "squash")
    (target / "captioner.json").write_text(json.dumps(spec | {"crop": "round"}))
    with pytest.raises(BundleError, match="use foveated or squash"):
        captioner_preprocess(target)


def test_a_foveated_crop_is_the_square_and_three_details_of_it() -> None:
    square = crops(1)[0][:64, :64]
    small = foveate(square, 32)
    np.testing.assert_array_equal(small[:16, 16:], square[24:40, 24:40])  # the centre
    np.testing.assert_array_equal(small[16:, :16], square[8:24, 8:24])  # upper left
    np.testing.assert_array_equal(small[16:, 16:], square[40:56, 40:56])  # lower right
    means = square.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))  # a factor of four: each pixel the mean of sixteen
    assert np.abs(small[:16, :16] - means).max() <= 1
    photo = decode(png(square), [CropSpec(64, 32, "bicubic", "foveated", "floor")])
    np.testing.assert_array_equal(photo.crops[0], small)


@pytest.mark.parametrize("told", [False, True])
def test_words_do_not_depend_on_the_batch(folder: Path, told: bool) -> None:
    model = Captioner(folder, CPU)
    photos = crops(11)
    facts = [f"scene night, {'noisy and ' * row}dark" for row in range(11)] if told else None
    together = model.caption(photos, facts)
    alone = [model.caption(photos[[row]], facts and [facts[row]])[0] for row in range(11)]
    backwards = model.caption(photos[::-1], facts and facts[::-1])[::-1]
    assert together == alone == backwards
    if told:  # what a random model sees is too little to change its babble
        assert len(set(together)) > 1


def test_no_photos_no_words(folder: Path) -> None:
    assert Captioner(folder, CPU).caption(crops(0)) == []


def test_a_black_and_a_grey_photo_are_photos(folder: Path) -> None:
    """transformers takes an image whose normalised pixels are all zero for padding."""
    flat = np.stack([np.full((224, 224, 3), value, np.uint8) for value in (0, 127, 128, 255)])
    assert len(Captioner(folder, CPU).caption(flat)) == 4


def test_an_adapter_is_loaded_and_merged(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "tuned"
    shutil.copytree(folder, target)
    model, _ = load_captioner(folder, CPU, torch.float32)
    lora = LoraConfig(r=4, target_modules=r".*text_model.*\.(q_proj|v_proj)", modules_to_save=["connector"])
    tuned = get_peft_model(model, lora)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                value.copy_(torch.randn_like(value) * 0.1)
    tuned.save_pretrained(target / "adapter")
    expected = tuned.merge_and_unload().state_dict()

    merged, _ = load_captioner(target, CPU, torch.float32)
    plain, _ = load_captioner(folder, CPU, torch.float32)
    changed = 0
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected[name])
        changed += not torch.equal(value, plain.state_dict()[name])
    assert changed == 2 * 6 + 1  # query and value of six layers, and the connector


def test_an_adapter_that_is_a_pickle_is_refused(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "pickled"
    shutil.copytree(folder, target)
    (target / "adapter").mkdir()
    (target / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    torch.save({}, target / "adapter" / "adapter_model.bin")
    with pytest.raises(BundleError, match=r"adapter_model\.safetensors is missing"):
        load_captioner(target, CPU, torch.float32)


def test_an_adapter_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    """peft would warn, and caption with the base as it is."""
    target = tmp_path / "foreign"
    shutil.copytree(folder, target)
    model, _ = load_captioner(folder, CPU, torch.float32)
    get_peft_model(model, LoraConfig(r=4, target_modules=r".*text_model.*\.q_proj")).save_pretrained(target / "adapter")
    path = target / "adapter" / "adapter_model.safetensors"
    save_file({f"other.{name}": value for name, value in load_file(path).items()}, path)
    with pytest.raises(BundleError, match="is not in both the adapter and its model"):
        load_captioner(target, CPU, torch.float32)


def test_code_of_the_model_s_own_is_not_run(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "remote"
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForImageTextToText": "code.Model"}}
    (target / "config.json").write_text(json.dumps(config))
    (target / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(BundleError, match="model_type mine, expected one of idefics3, smolvlm"):
        load_captioner(target, CPU, torch.float32)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "captioner.json"])
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_damaged_folder_is_one_clear_line(folder: Path, tmp_path: Path, name: str, how: str) -> None:
    target = tmp_path / "damaged"
    shutil.copytree(folder, target)
    (target / name).unlink()
    if how == "empty":
        (target / name).touch()
    with pytest.raises(BundleError) as error:
        Captioner(target, CPU)
    assert "\n" not in str(error.value) and str(target) in str(error.value)


@pytest.mark.parametrize(
    ("text", "tidy"),
    [
        (" It is sharp. It is", "It is sharp."),
        ("It is\n\tsharp.\x1b[31m", "It is sharp."),
        ("Taken at f/2.8. Then at f/4.5 and", "Taken at f/2.8."),
        ("no end", "no end"),
        ("", ""),
    ],
)
def test_text_is_one_line_of_whole_sentences(text: str, tidy: str) -> None:
    assert captioner._tidy(text) == tidy
