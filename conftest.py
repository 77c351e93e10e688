"""Fixtures of tests/ and research/tests/: one toy model per session, no network, one thread.

All tests run in one process per core (``pytest -n 0``: in one alone), those of single files and
folders in this process: starting others would take longer than most of them. Named files and
folders run their long tests too.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in programs of tests

import pytest
import torch

ROOT = Path(__file__).resolve().parent
SHARED_DATA = ROOT.parent / "shared" / "data"
MAX_WORKERS = 8  # each needs about 1.5 GB
LONG = ROOT / "tests" / "long.txt"
NOT_LONG = " and not long"  # in addopts


def pytest_addoption(parser):
    parser.addoption("--write-digests", action="store_true", help="see test_same_weights.py")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Start pytest-xdist's workers, where they help and no ``-n`` says otherwise."""
    option = config.option
    if not _names_all(config):
        option.markexpr = option.markexpr.replace(NOT_LONG, "")
    is_unset = getattr(option, "numprocesses", 0) is None and not hasattr(config, "workerinput")
    if is_unset and not (option.usepdb or option.write_digests) and _takes_long(config):
        option.numprocesses, option.dist = min(_num_cores(), MAX_WORKERS), "worksteal"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark long tests."""
    lines = LONG.read_text(encoding="utf-8").splitlines()
    beginnings = tuple(line for line in lines if line and not line.startswith("#"))
    for item in items:
        if item.nodeid.startswith(beginnings):
            item.add_marker(pytest.mark.long)


def _names_all(config) -> bool:
    """Whether no single file or folder is named."""
    chosen = {Path(config.invocation_params.dir, arg).resolve() for arg in config.args}
    return chosen <= {ROOT, *map(ROOT.joinpath, config.getini("testpaths"))}


def _takes_long(config) -> bool:
    """All tests but the slow ones, which need the memory of the machine."""
    return _names_all(config) and "not slow" in config.option.markexpr


def _num_cores() -> int:
    is_linux = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Tests neither read nor fill the user's cache folder; every worker has one."""
    os.environ["MLM_PLUGIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def _few_targets():
    """The untrained model reads 64 prompts instead of 1024, which is half the time of a toy run."""
    from mlm_plugin.mlm_setup import MLMSetup

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MLMSetup.__init__.__kwdefaults__, "num_targets", 64)
        yield


@pytest.fixture(scope="module")
def all_targets(_few_targets):
    """As many prompts as outside of tests."""
    from mlm_plugin.mlm_setup import NUM_TARGETS, MLMSetup

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MLMSetup.__init__.__kwdefaults__, "num_targets", NUM_TARGETS)
        yield


@pytest.fixture(autouse=True)
def _own_host(monkeypatch):
    """The command uses the standalone trainer even if SD_SCRIPTS_DIR names a checkout."""
    monkeypatch.delenv("SD_SCRIPTS_DIR", raising=False)


@pytest.fixture(autouse=True)
def _own_console():
    """A trainer sets up the console of its process; restore it for the next test."""
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


@pytest.fixture(scope="session")
def toy_sdxl_folder(_own_cache, tmp_path_factory) -> Path:
    """A diffusers folder with SDXL's module names, layout and toy sizes."""
    folder = tmp_path_factory.mktemp("toy") / "sdxl"
    _build_toy_sdxl(folder)
    return folder


def _build_toy_sdxl(folder: Path) -> None:
    """Write the parts of a ``StableDiffusionXLPipeline``, random and small (12 MB).

    Context width 32 + 48 as 768 + 1280 of the real model, pooled width 24, 8 numbers for each of
    the six sizes; the U-Net has its three levels with 0, 1 and 2 transformer blocks.
    """
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from mlm_plugin.export.checkpoint import model_index
    from mlm_plugin.toy import build_toy_tokenizer, toy_corpus

    vocab_size = build_toy_tokenizer(folder / "tokenizer", toy_corpus(num_prompts=200))
    _build_second_tokenizer(folder)
    clip = {
        "vocab_size": vocab_size,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = {
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(hidden_size=32, intermediate_size=64, **clip)
            ),
            "text_encoder_2": CLIPTextModelWithProjection(
                CLIPTextConfig(
                    hidden_size=48,
                    intermediate_size=96,
                    projection_dim=24,
                    hidden_act="gelu",
                    **clip,
                )
            ),
            "unet": UNet2DConditionModel(
                sample_size=16,
                block_out_channels=(32, 32, 64),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 1, 2),
                attention_head_dim=(2, 2, 4),
                cross_attention_dim=32 + 48,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=24 + 6 * 8,
                norm_num_groups=8,
            ),
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(32, 32, 32, 32),
                layers_per_block=1,
                sample_size=64,
                scaling_factor=0.13025,
                force_upcast=True,
            ),
        }
    for part, model in models.items():
        model.save_pretrained(folder / part)
    EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    index = model_index("EulerDiscreteScheduler", is_sdxl=True)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def _build_second_tokenizer(folder: Path) -> None:
    """The same vocabulary, padded with ``!``, which has id 0."""
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / "tokenizer_2" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "!"}))


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
    """A contextualizer of the toy model after three steps: for wiring, not quality."""
    from mlm_plugin.config.pretraining import PretrainOptions
    from mlm_plugin.pretraining.run import pretrain

    path = tmp_path_factory.mktemp("contextualizer") / "toy.safetensors"
    options = PretrainOptions(max_train_steps=3, batch_size=4, eval_every_n_steps=3, num_held_out=8)
    pretrain(_toy_text_encoder(toy_folder), path, options=options, show_progress=False)
    return path


@pytest.fixture(scope="session")
def toy_sdxl_contextualizers(toy_sdxl_folder, tmp_path_factory) -> str:
    """The same for both text encoders of the SDXL toy, as a value of ``mlm_contextualizer``."""
    from mlm_plugin.config.pretraining import PretrainOptions
    from mlm_plugin.models.checkpoints import load_stable_diffusion
    from mlm_plugin.pretraining.run import pretrain

    options = PretrainOptions(max_train_steps=3, batch_size=4, eval_every_n_steps=3, num_held_out=8)
    folder, paths = tmp_path_factory.mktemp("contextualizers"), []
    for text_encoder in load_stable_diffusion(toy_sdxl_folder).text_encoders:
        paths.append(folder / f"te{len(paths) + 1}.safetensors")
        pretrain(text_encoder, paths[-1], options=options, show_progress=False)
    return ",".join(map(str, paths))


@pytest.fixture
def _fresh_accelerator():
    """A process trains once; tests train many times, with different precisions, in any order."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of a test that did not
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def clip_vocabulary() -> Path:
    """The real CLIP vocabulary, if the reference data is beside the project."""
    folder = SHARED_DATA / "clip-vit-large-patch14-tokenizer"
    if not folder.is_dir():
        pytest.skip("the real CLIP vocabulary (shared/data) is not here")
    return folder
