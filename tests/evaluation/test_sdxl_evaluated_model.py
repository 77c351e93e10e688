"""SDXL: what is loaded draws as diffusers draws it; files of another kind of model are one line."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from mlm_plugin.config.options import NetworkOptions
from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.eval_prompts import evaluation_prompts, picture_seed
from mlm_plugin.evaluation.evaluated_model import LearnedFiles, LoadSettings, load_evaluated_model
from mlm_plugin.evaluation.generate import DrawingSettings, draw_pictures
from mlm_plugin.export.checkpoint import save_checkpoint
from mlm_plugin.export.embedding_files import save_embedding
from mlm_plugin.models import checkpoint_file
from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.networks.create import create_network

TEMPLATE, NEGATIVE = "a photo of {} on the beach", "blurry"
PROMPT = TEMPLATE.format("sks dog")
SIDE, STEPS, SCALE = 64, 2, 4.0


@pytest.fixture(scope="module")
def files(toy_folder, toy_sdxl_folder, tmp_path_factory):
    """Files of SDXL and, for refusals, of SD 1, with values large enough to see."""
    folder = tmp_path_factory.mktemp("files")
    made = SimpleNamespace(**{
        name: str(folder / f"{name}.safetensors")
        for name in ("lora", "bundled_lora", "text_lora", "embedding", "half_embedding",
                     "checkpoint", "sd1_lora", "sd1_text_lora", "sd1_embedding", "sd1_checkpoint")
    })  # fmt: skip
    torch.manual_seed(3)
    with torch.no_grad():
        for path, kind in ((made.lora, toy_sdxl_folder), (made.sd1_lora, toy_folder)):
            network = create_network(load_stable_diffusion(kind), NetworkOptions(network_dim=2))
            state = {key: torch.randn_like(value) * 0.3 if "lora_" in key[-16:] else value
                     for key, value in network.kohya_state_dict().items()}  # fmt: skip
            save_file(state, path)
            bundled = {"bundle_emb.sks.clip_l": torch.ones(1, 32)}
            save_file(state | bundled, path.replace("lora.", "bundled_lora."))
            text = {key: value for key, value in state.items() if key.startswith("lora_te")}
            save_file(text, path.replace("lora.", "text_lora."))
        vectors = {"clip_l": torch.randn(2, 32) * 0.1, "clip_g": torch.randn(2, 48) * 0.1}
        save_embedding(made.embedding, vectors, metadata={})
        save_embedding(made.half_embedding, {"clip_l": vectors["clip_l"]}, metadata={})
        save_embedding(made.sd1_embedding, {"emb_params": vectors["clip_l"]}, metadata={})
        trained = load_stable_diffusion(toy_sdxl_folder)
        for encoder in trained.text_encoders:
            encoder.token_embedding.weight.mul_(1.5)
        _save(made.checkpoint, trained)
        _save(made.sd1_checkpoint, load_stable_diffusion(toy_folder))
    return made


def _save(path, models):
    save_checkpoint(path, models.components, family=models.family, metadata={})


def load(base, *, files=None, **settings):
    return load_evaluated_model(
        str(base),
        LearnedFiles(**(files or {})),
        placeholder_token="sks",
        settings=LoadSettings(**settings),
    )


def ours(subject, folder, **how):
    """The picture as the command draws it."""
    prompts = evaluation_prompts([TEMPLATE], placeholder_token="sks", class_token="dog")
    settings = {"steps": STEPS, "scale": SCALE, "negative_prompt": NEGATIVE, "resolution": SIDE}
    ((file,),) = draw_pictures(
        folder,
        prompts,
        DrawingSettings(num_images=1, seed=0, **(settings | how)),
        load=lambda: subject,
        show_progress=False,
    )
    return np.asarray(Image.open(file)).astype(int)


def theirs(pipeline, subject, prompt=PROMPT, negative=NEGATIVE):
    """The picture that a user of diffusers gets from the same noise."""
    pipeline.scheduler = subject.pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(picture_seed(0, TEMPLATE, 0))
    picture = pipeline(
        prompt=prompt,
        negative_prompt=negative,
        height=SIDE,
        width=SIDE,
        latents=torch.randn((1, 4, SIDE // 8, SIDE // 8), generator=noise),
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
    ).images[0]
    return np.asarray(picture).astype(int)


def client(folder, files, kinds):
    """diffusers' pipeline with the files in it, and the word that calls the concept."""
    if "checkpoint" in kinds:
        return StableDiffusionXLPipeline.from_single_file(
            files.checkpoint, config=str(folder), local_files_only=True
        ), "sks"
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    if "lora" in kinds:
        file = Path(files.lora)
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    if "embedding" not in kinds:
        return pipeline, "sks"
    vectors = load_file(files.embedding)
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        pipeline.load_textual_inversion(
            vectors[key],
            token="<learned>",
            text_encoder=getattr(pipeline, f"text_encoder{number}"),
            tokenizer=getattr(pipeline, f"tokenizer{number}"),
        )
    return pipeline, "<learned>"


@pytest.mark.parametrize(
    "kinds", [(), ("lora",), ("embedding",), ("lora", "embedding"), ("checkpoint",)]
)
def test_files_draw_what_a_user_of_diffusers_gets(kinds, toy_sdxl_folder, files, tmp_path):
    subject = load(toy_sdxl_folder, files={kind: getattr(files, kind) for kind in kinds})
    pipeline, word = client(toy_sdxl_folder, files, kinds)
    picture = ours(subject, tmp_path)
    expected = theirs(pipeline, subject, PROMPT.replace("sks", word))
    assert abs(picture - expected).max() <= 1
    if kinds:
        plain = ours(load(toy_sdxl_folder), tmp_path / "plain")
        assert abs(picture - plain).max() > 3, "what was learned must show"


def test_an_empty_negative_prompt_is_encoded_as_in_training(toy_sdxl_folder, tmp_path):
    subject = load(toy_sdxl_folder)
    pipeline = StableDiffusionXLPipeline.from_pretrained(toy_sdxl_folder)
    picture = ours(subject, tmp_path, negative_prompt="")
    assert abs(picture - theirs(pipeline, subject, negative="")).max() <= 1


def test_a_checkpoint_file_is_a_base_model_too(toy_sdxl_folder, files, tmp_path, monkeypatch):
    shapes = tmp_path / "architectures"
    shapes.mkdir()
    (shapes / "sdxl").symlink_to(toy_sdxl_folder)
    monkeypatch.setattr(checkpoint_file, "ARCHITECTURES", shapes)
    subject = load(files.checkpoint, tokenizer_cache_dir=str(toy_sdxl_folder / "tokenizer"))
    assert subject.family == "sdxl"
    same = ours(load(toy_sdxl_folder, files={"checkpoint": files.checkpoint}), tmp_path / "same")
    assert (ours(subject, tmp_path) == same).all()


def test_the_base_text_encoders_are_unchanged(toy_sdxl_folder, files):
    subject = load(toy_sdxl_folder, files={"lora": files.lora, "embedding": files.embedding})
    untouched = load_stable_diffusion(toy_sdxl_folder).text_encoders
    for base, before in zip(subject.base_text_encoders, untouched, strict=True):
        assert base.fingerprint() == before.fingerprint()
        assert base.learned_tokens is None
        with torch.no_grad():
            states = base.encode_captions([PROMPT])
            torch.testing.assert_close(states, before.encode_captions([PROMPT]))


def test_in_half_precision_the_size_is_the_models_own_and_the_vae_fp32(
    toy_sdxl_folder, files, tmp_path
):
    learned = {"lora": files.lora, "embedding": files.embedding}
    subject = load(toy_sdxl_folder, files=learned, dtype=torch.bfloat16)
    assert subject.pipeline.unet.dtype == torch.bfloat16
    assert subject.pipeline.vae.dtype == torch.float32
    assert subject.resolution == 128
    picture = ours(subject, tmp_path, resolution=None, steps=1)
    assert picture.shape == (128, 128, 3)
    full = ours(load(toy_sdxl_folder, files=learned), tmp_path / "full", resolution=None, steps=1)
    assert abs(picture - full).mean() < 3


def test_a_u_net_that_overflows_is_one_line(toy_sdxl_folder, tmp_path):
    subject = load(toy_sdxl_folder)
    subject.pipeline.unet.conv_out.bias.fill_(float("inf"))
    with pytest.raises(UserError, match="the U-Net overflowed in .*: set --precision"):
        ours(subject, tmp_path)


def test_an_embedding_inside_a_lora_is_left_out(toy_sdxl_folder, files, tmp_path):
    bundled = ours(load(toy_sdxl_folder, files={"lora": files.bundled_lora}), tmp_path)
    plain = ours(load(toy_sdxl_folder, files={"lora": files.lora}), tmp_path / "plain")
    assert (bundled == plain).all()


@pytest.mark.parametrize(
    ("option", "file", "message"),
    [
        ("lora", "sd1_lora", r"another kind of model \(textencoder of width 32, unet of width 32"),
        ("lora", "sd1_text_lora", r"is Stable Diffusion XL \(textencoder1 of width 32, text"),
        (
            "embedding",
            "sd1_embedding",
            r"embeddings for 1 text encoder\(s\), .* XL and needs 2 \(clip_l",
        ),
        ("embedding", "half_embedding", r"embeddings for 1 text encoder\(s\)"),
        ("checkpoint", "sd1_checkpoint", r"--checkpoint \(the base model is Stable Diffusion XL"),
        ("xti", "embedding", "--xti: .* is Stable Diffusion XL, files of this method are for"),
        ("delta", "lora", "--delta: .* is Stable Diffusion XL, files of this method are for"),
    ],
)
def test_files_of_sd_1_are_refused_on_sdxl(option, file, message, toy_sdxl_folder, files):
    with pytest.raises(UserError, match=message):
        load(toy_sdxl_folder, files={option: getattr(files, file)})


@pytest.mark.parametrize(
    ("option", "file", "message"),
    [
        ("lora", "lora", r"another kind of model .* is Stable Diffusion 1.x \(textencoder of"),
        ("lora", "text_lora", "another kind of model .textencoder1 of width 32, textencoder2 of"),
        ("embedding", "embedding", r"embeddings for 2 text encoder\(s\), .* 1.x and needs 1"),
        ("checkpoint", "checkpoint", r"--checkpoint \(the base model is Stable Diffusion 1.x\)"),
    ],
)
def test_files_of_sdxl_are_refused_on_sd_1(option, file, message, toy_folder, files):
    with pytest.raises(UserError, match=message):
        load(toy_folder, files={option: getattr(files, file)})
