"""Judges against transformers' own: features, logits, preparation of pictures."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    ViTModel,
)

from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.measures import paired_cosine
from mlm_plugin.evaluation.metric_models import load_clip, load_dino, preprocess

try:
    from transformers import CLIPImageProcessorPil as ReferenceProcessor
except ImportError:  # transformers 4: the plain class works with Pillow
    from transformers import CLIPImageProcessor as ReferenceProcessor

TEXTS = ["a dog in the jungle", "a red cat", "a teapot on a white rug in the sun"]


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


IMAGES = [picture(64, 64, 0), picture(96, 60, 1), picture(45, 120, 2)]


@pytest.mark.parametrize("image", IMAGES, ids=["square", "wide", "tall"])
def test_pictures_are_prepared_as_transformers_prepares_them(tiny_clip, image):
    expected = ReferenceProcessor.from_pretrained(tiny_clip)(image, return_tensors="np")
    ours = preprocess(image, load_clip(str(tiny_clip)).how).numpy()
    np.testing.assert_allclose(ours, expected["pixel_values"][0], atol=0.01)


def test_clip_t_is_the_cosine_behind_clips_logits(tiny_clip):
    clip = load_clip(str(tiny_clip))
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    tokens = CLIPTokenizer.from_pretrained(tiny_clip)(TEXTS, padding=True, return_tensors="pt")
    pixels = torch.stack([preprocess(image, clip.how) for image in IMAGES])
    with torch.no_grad():
        logits = model(**tokens, pixel_values=pixels).logits_per_image / model.logit_scale.exp()
    cosines = paired_cosine(clip.image_features(IMAGES), clip.text_features(TEXTS))
    torch.testing.assert_close(cosines, logits.diagonal(), atol=1e-5, rtol=1e-5)


def test_long_texts_are_cut_off(tiny_clip):
    assert load_clip(str(tiny_clip)).text_features(["dog " * 200]).isfinite().all()


@pytest.fixture
def tiny_siglip(tiny_clip, tmp_path):
    """Folder of a SigLIP with the toy vocabulary."""
    folder = tmp_path / "siglip"
    shutil.copytree(tiny_clip, folder)
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2}  # fmt: skip
    vocab_size = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    text = {"vocab_size": vocab_size, "max_position_embeddings": 16, "bos_token_id": None,
            "eos_token_id": None, "pad_token_id": None, **size}  # fmt: skip
    vision = {"image_size": 32, "patch_size": 8, **size}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = SiglipConfig(text_config=text, vision_config=vision)
        SiglipModel(config).eval().save_pretrained(folder)
    return folder


def test_a_siglip_scores_as_its_logits_do(tiny_siglip):
    siglip = load_clip(str(tiny_siglip))
    model = SiglipModel.from_pretrained(tiny_siglip).eval()
    settings = {"padding": "max_length", "max_length": 16, "return_tensors": "pt"}
    ids = CLIPTokenizer.from_pretrained(tiny_siglip)(TEXTS, **settings).input_ids
    pixels = torch.stack([preprocess(image, siglip.how) for image in IMAGES])
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits_per_image
        expected = (logits - model.logit_bias) / model.logit_scale.exp()
    cosines = paired_cosine(siglip.image_features(IMAGES), siglip.text_features(TEXTS))
    torch.testing.assert_close(cosines, expected.diagonal(), atol=1e-5, rtol=1e-5)
    assert siglip.text_features(["dog " * 200]).isfinite().all()


def test_dino_is_the_cls_state_of_the_model(tiny_dino):
    dino = load_dino(str(tiny_dino))
    pixels = torch.stack([preprocess(image, dino.how) for image in IMAGES])
    with torch.no_grad():
        states = ViTModel.from_pretrained(tiny_dino).eval()(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(dino.image_features(IMAGES), states[:, 0])


def test_dino_cuts_out_the_middle_as_its_own_evaluation_does(tiny_dino):
    how = load_dino(str(tiny_dino)).how
    assert (how.shortest_edge, how.crop, how.resample) == (37, 32, 3)  # 32 * 256 / 224


def test_dinov2_is_prepared_as_its_processor_says(tiny_dino, tmp_path):
    shutil.copytree(tiny_dino, tmp_path, dirs_exist_ok=True)
    Dinov2Model(
        Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    ).save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    config = json.loads(file.read_text())
    crop = {"size": {"shortest_edge": 32}, "do_center_crop": True,
            "crop_size": {"height": 28, "width": 28}}  # fmt: skip
    file.write_text(json.dumps(config | crop))
    dino = load_dino(str(tmp_path))
    assert (dino.how.shortest_edge, dino.how.crop) == (32, 28)
    assert dino.image_features(IMAGES).shape == (3, 24)


@pytest.mark.parametrize(("load", "option"), [(load_clip, "clip_model"), (load_dino, "dino_model")])
@pytest.mark.parametrize("name", ["nobody/no-such-model", "no_such_folder"])
def test_a_missing_judge_is_one_line(load, option, name):
    with pytest.raises(UserError, match=f"--{option} {name}: .*'none'") as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_a_clip_is_no_dino(tiny_clip):
    with pytest.raises(UserError, match="^--dino_model .*: is no ViT; give one of DINO"):
        load_dino(str(tiny_clip))


def test_a_judge_without_numbers_for_pictures_is_one_line(tiny_clip, tmp_path):
    shutil.copytree(tiny_clip, tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="--clip_model"):
        load_clip(str(tmp_path))
