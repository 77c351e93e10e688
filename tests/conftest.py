"""Shared fixtures: one toy model for the whole session, no network, one thread."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Tests neither read nor fill the user's cache folder."""
    os.environ["MLM_PLUGIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _own_host(monkeypatch):
    """The command chooses the standalone trainer also where SD_SCRIPTS_DIR names a checkout."""
    monkeypatch.delenv("SD_SCRIPTS_DIR", raising=False)


@pytest.fixture(autouse=True)
def _own_console():
    """A trainer sets up the console of its process; the next test finds it as it was."""
    ours = logging.getLogger("mlm_plugin")
    before = ours.level, ours.propagate, list(ours.handlers)
    yield
    ours.setLevel(before[0])
    ours.propagate, ours.handlers[:] = before[1], before[2]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(scope="session")
def toy_folder(_own_cache) -> Path:
    """A diffusers folder with SD 1.5's module names and toy sizes."""
    from mlm_plugin.toy import toy_model

    return toy_model()


@pytest.fixture(scope="session")
def toy_pictures(_own_cache) -> Path:
    """A kohya data folder with five pictures and captions."""
    from mlm_plugin.toy import toy_data

    return toy_data()


def _toy_text_encoder(toy_folder):
    from transformers import CLIPTextModel, CLIPTokenizer

    from mlm_plugin.models.text_encoder import TextEncoder

    return TextEncoder(
        CLIPTokenizer.from_pretrained(toy_folder / "tokenizer"),
        CLIPTextModel.from_pretrained(toy_folder / "text_encoder").eval(),
    )


@pytest.fixture
def toy_text_encoder(toy_folder):
    """The toy model's text encoder; a fresh copy for each test."""
    return _toy_text_encoder(toy_folder)


@pytest.fixture(scope="session")
def toy_contextualizer(toy_folder, tmp_path_factory) -> Path:
    """A contextualizer of the toy model that has seen three steps: wiring, not quality."""
    from mlm_plugin.config.pretraining import PretrainOptions
    from mlm_plugin.training.pretrain import pretrain

    path = tmp_path_factory.mktemp("contextualizer") / "toy.safetensors"
    options = PretrainOptions(max_train_steps=3, batch_size=4, eval_every_n_steps=3, num_held_out=8)
    pretrain(_toy_text_encoder(toy_folder), path, options=options, show_progress=False)
    return path


@pytest.fixture
def _fresh_accelerator():
    """A process trains once; tests train many times, with other precisions."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def clip_vocabulary() -> Path:
    """The real CLIP vocabulary, where the reference data lies beside the project."""
    folder = SHARED_DATA / "clip-vit-large-patch14-tokenizer"
    if not folder.is_dir():
        pytest.skip("the real CLIP vocabulary (shared/data) is not here")
    return folder


@pytest.fixture(scope="session")
def tiny_pocket(tmp_path_factory, _own_cache):
    """A miniature of the pocket model: folder, quality card, last losses of every stage."""
    from mlm_plugin.pocket.build import TINY, build

    folder = tmp_path_factory.mktemp("pocket") / "tiny"
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    stage_logger = logging.getLogger("mlm_plugin.pocket.stage")
    stage_logger.addHandler(handler)
    before = stage_logger.level
    stage_logger.setLevel(logging.INFO)
    try:
        card = build(folder, recipe=TINY, show_progress=False)
    finally:
        stage_logger.removeHandler(handler)
        stage_logger.setLevel(before)
    return folder, card, _last_losses(messages)


def _last_losses(messages):
    """Last numbers of every stage, by stage: ``{"clip": {"loss": 4.5, ...}}``."""
    found = {}
    for message in messages:
        name, _, numbers = message.partition(": ")
        if numbers.startswith("loss "):
            pairs = (pair.split() for pair in numbers.split(", "))
            found[name] = {key: float(value) for key, value in pairs}
    return found
