"""Judges with a few thousand random weights, in the format of the hub."""

import json
import shutil

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ViTConfig,
    ViTModel,
)

SIDE = 32
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
NORMALIZED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
              "resample": 3, "rescale_factor": 1 / 255}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_clip(toy_folder, tmp_path_factory):
    """Folder of a CLIP with the toy vocabulary."""
    folder = tmp_path_factory.mktemp("judges") / "clip"
    shutil.copytree(toy_folder / "tokenizer", folder)
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    size = len(vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        text = CLIPTextConfig(
            vocab_size=size, max_position_embeddings=77, bos_token_id=size - 2,
            eos_token_id=size - 1, pad_token_id=size - 1, **TOWER,
        )  # fmt: skip
        vision = CLIPVisionConfig(image_size=SIDE, patch_size=8, **TOWER)
        config = CLIPConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
        )
        CLIPModel(config).eval().save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIDE},
        "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        **NORMALIZED,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="session")
def tiny_dino(tmp_path_factory):
    """Folder of a ViT."""
    folder = tmp_path_factory.mktemp("judges") / "dino"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        ViTModel(ViTConfig(image_size=SIDE, patch_size=8, **TOWER)).eval().save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": SIDE, "width": SIDE},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        **NORMALIZED,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
