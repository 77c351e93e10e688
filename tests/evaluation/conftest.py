"""Judges with a few thousand random weights, in the format of the hub; readers of reports."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ViTConfig,
    ViTModel,
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
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


class Page(HTMLParser):
    """Tags, addresses and text of a page; complains of tags that do not close."""

    VOID = {"meta", "img"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.open, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="session")
def page_of():
    """Reads a report: its tags close, and it needs nothing from outside."""

    def read(path):
        text = path.read_text(encoding="utf-8")
        page = Page(text)
        assert "script" not in page.tags
        assert all(address.startswith("data:image/") for address in page.addresses)
        assert not re.search(r"url\(|@import", text)
        return page

    return read


@pytest.fixture
def screenshot_of(tmp_path):
    """A report in a browser, ``(1200, 1000, 3)``: on paper, and nothing runs out of the page."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser is installed ({', '.join(BROWSERS)})")

    def show(report):
        shot = tmp_path / "report.png"
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'browser'}", "--hide-scrollbars",
            "--window-size=1000,1200", f"--screenshot={shot}",
        ]  # fmt: skip
        command = [browser, *flags, report.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
        assert pixels.shape == (1200, 1000, 3)
        paper = pixels[5, 5]
        assert paper.min() > 230 or paper.max() < 40, "light or dark, as the style sheet says"
        assert (abs(pixels[:, :20] - paper) < 8).all(), "nothing runs out of the page on the left"
        assert (abs(pixels[:, 980:] - paper) < 8).all(), "nor on the right"
        return pixels

    return show
