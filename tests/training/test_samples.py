"""Sample pictures: kohya's prompt files, when they are due, and no trace left in training."""

import json
import logging
import random
import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from mlm_plugin.config.options import SamplingOptions
from mlm_plugin.errors import UserError
from mlm_plugin.models.conditioning import Conditioning
from mlm_plugin.training.samples import (
    SAMPLERS,
    DenoiseSettings,
    SampleFiles,
    SampleModels,
    SamplePrompt,
    create_sampler,
    denoise,
    enlarged,
    generate_samples,
    parse_sample_prompts,
    sample_due,
)

# (line, values): sd-scripts 48d368fa, library/train_util.py line_to_prompt_dict, printed by
# tests/reference/derive_losses.py.
PROMPTS = [
    (
        "a photo of a dog --n blurry, low quality --w 640 --h 448 --d 42 --s 20 --l 6.5 "
        "--ss euler_a",
        {
            "prompt": "a photo of a dog",
            "negative_prompt": "blurry, low quality",
            "width": 640,
            "height": 448,
            "seed": 42,
            "sample_steps": 20,
            "scale": 6.5,
            "sample_sampler": "euler_a",
        },
    ),
    ("a photo of a dog, in the park", {"prompt": "a photo of a dog, in the park"}),
    ("a dog --W 70 --s 5000", {"prompt": "a dog", "width": 70, "sample_steps": 1000}),
]


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        dropout=0.5,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
    )
    return unet, vae


def noise_scheduler():
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )


def encode_captions(captions):
    """77 states per caption that depend on its text alone."""
    states = [
        torch.randn(77, 32, generator=torch.Generator().manual_seed(sum(caption.encode())))
        for caption in captions
    ]
    return Conditioning(torch.stack(states))


def draw(parts, prompts, folder, *, autocast=nullcontext, sampler="ddim", step=0, **names):
    models = SampleModels(*parts, encode_captions, noise_scheduler(), "epsilon", autocast)
    return generate_samples(prompts, models, SampleFiles(folder, step, **names), sampler=sampler)


def small(prompt="a dog", **settings):
    return SamplePrompt(prompt, **{"width": 64, "height": 64, "sample_steps": 2, **settings})


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("line", "values"), PROMPTS)
def test_a_line_means_what_it_means_to_sd_scripts(line, values, tmp_path):
    assert parse_sample_prompts(write(tmp_path, "p.txt", line)) == [SamplePrompt(**values)]


def test_comments_and_blank_lines_are_skipped_and_the_rest_keeps_its_order(tmp_path):
    path = write(tmp_path, "p.txt", "\ufeff# a comment\none\n\n  two --d 3\n#three\n")
    assert parse_sample_prompts(path) == [SamplePrompt("one"), SamplePrompt("two", seed=3)]


def test_a_prompt_that_starts_like_an_option_stays_a_prompt(tmp_path):
    path = write(tmp_path, "p.txt", "s 20 people in a street --s 5")
    assert parse_sample_prompts(path) == [SamplePrompt("s 20 people in a street", sample_steps=5)]


def test_toml_subsets_take_the_defaults_and_may_override_them(tmp_path):
    path = write(
        tmp_path,
        "p.toml",
        """
        [prompt]
        width = 768
        scale = 7
        negative_prompt = "blurry"
        [[prompt.subset]]
        prompt = "a dog"
        [[prompt.subset]]
        prompt = "a cat"
        width = 512
        seed = 5
        """,
    )
    assert parse_sample_prompts(path) == [
        SamplePrompt("a dog", "blurry", width=768, scale=7.0),
        SamplePrompt("a cat", "blurry", width=512, scale=7.0, seed=5),
    ]


def test_json_mixes_lines_and_objects(tmp_path):
    entries = ["a dog --w 256", {"prompt": "a cat", "sample_steps": 12}]
    path = write(tmp_path, "p.json", json.dumps(entries))
    assert parse_sample_prompts(path) == [
        SamplePrompt("a dog", width=256),
        SamplePrompt("a cat", sample_steps=12),
    ]


def test_the_trigger_is_replaced_by_the_concept(tmp_path):
    path = write(tmp_path, "p.txt", "a photo of [trigger] on the moon --n not [trigger]")
    (prompt,) = parse_sample_prompts(path, trigger="sks dog")
    assert prompt == SamplePrompt("a photo of sks dog on the moon", "not sks dog")
    with pytest.raises(UserError, match="trigger"):
        parse_sample_prompts(path)


def test_options_of_other_models_are_named_in_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        parse_sample_prompts(write(tmp_path, "p.txt", "a dog --g 3.5 --fs 3"))
    assert "guidance_scale has no effect" in caplog.text
    assert "flow_shift has no effect" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("p.txt", "a dog\na cat --x 3", "line 2: unknown option --x"),
        ("p.txt", "a dog --w wide", "line 1: width='wide'"),
        ("p.txt", "a dog --ss eular", "unknown sampler 'eular'"),
        ("p.txt", "# nothing\n", "no prompt"),
        ("p.md", "a dog", "expected a .txt, .toml or .json"),
        ("p.json", "{", "not valid JSON"),
        ("p.json", '{"prompt": "a dog"}', "expected a list"),
        ("p.json", '[{"promt": "a dog"}]', "unknown key 'promt'"),
        ("p.json", '[{"prompt": "a dog", "seed": 1.5}]', "seed=1.5"),
        ("p.toml", "prompt = 'a dog'", "prompt.subset"),
    ],
)
def test_a_mistake_is_refused_with_its_place(name, text, named, tmp_path):
    with pytest.raises(UserError, match=re.escape(named)):
        parse_sample_prompts(write(tmp_path, name, text))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.txt"):
        parse_sample_prompts(tmp_path / "none.txt")


def test_samples_by_steps_are_due_on_steps_and_not_at_the_end_of_an_epoch():
    due = [step for step in range(13) if sample_due(step, every_n_steps=5)]
    assert due == [5, 10]
    assert not sample_due(10, epoch=2, every_n_steps=5)


def test_samples_by_epochs_switch_samples_by_steps_off():
    rule = {"every_n_steps": 5, "every_n_epochs": 2}
    assert not sample_due(10, **rule)
    assert [epoch for epoch in range(1, 7) if sample_due(7 * epoch, epoch=epoch, **rule)] == [
        2,
        4,
        6,
    ]


def test_before_the_first_step_only_sample_at_first_counts():
    assert not sample_due(0, every_n_steps=1)
    assert sample_due(0, at_first=True)
    assert not sample_due(3, at_first=True)


def test_every_sampler_that_can_be_chosen_exists():
    choices = SamplingOptions.__dataclass_fields__["sample_sampler"].metadata["choices"]
    assert set(choices) == set(SAMPLERS)
    assert all(SAMPLERS[f"k_{name}"] == SAMPLERS[name] for name in ("lms", "euler_a", "dpm_2"))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if not name.startswith("k_")])
def test_every_sampler_denoises_as_the_diffusers_pipeline_does(parts, name, prediction_type):
    if name.endswith("lms"):
        pytest.importorskip("scipy")
    unet, vae = (part.eval() for part in parts)
    prompts = encode_captions(["bad", "a dog"])
    with torch.no_grad():
        ours = denoise(
            unet,
            prompts,
            create_sampler(name, noise_scheduler(), prediction_type=prediction_type),
            DenoiseSettings(size=(64, 72), num_steps=5, scale=4.0),
            generator=torch.Generator().manual_seed(3),
        )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=create_sampler(name, noise_scheduler(), prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt_embeds=prompts.states[1:],
        negative_prompt_embeds=prompts.states[:1],
        height=64,
        width=72,
        num_inference_steps=5,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert ours.std() > 0.1


def test_a_sampler_without_its_package_is_refused(monkeypatch):
    def missing(**_):
        raise ImportError("LMSDiscreteScheduler requires the scipy library")

    monkeypatch.setattr("diffusers.LMSDiscreteScheduler", missing)
    with pytest.raises(UserError, match="scipy"):
        create_sampler("lms", noise_scheduler(), prediction_type="epsilon")


def test_files_are_named_as_sd_scripts_names_them(parts, tmp_path):
    prompts = [small(seed=42), small()]
    first, second = draw(parts, prompts, tmp_path, step=100, name="lora")
    assert first.parent == tmp_path / "sample"
    assert re.fullmatch(r"lora_000100_00_\d{14}_42\.png", first.name)
    assert re.fullmatch(r"lora_000100_01_\d{14}\.png", second.name)
    (third,) = draw(parts, [small()], tmp_path, step=100, epoch=3)
    assert re.fullmatch(r"e000003_00_\d{14}\.png", third.name)
    assert {path.name for path in (tmp_path / "sample").iterdir()} == {
        first.name,
        second.name,
        third.name,
    }


def test_sizes_are_rounded_down_to_eights_but_not_below_64(parts, tmp_path):
    (path,) = draw(parts, [small(width=87, height=10)], tmp_path)
    assert Image.open(path).size == (4 * 80, 4 * 64)  # too small to be looked at as it is


@pytest.mark.parametrize(
    ("size", "factor"), [((64, 64), 4), ((128, 8), 4), ((136, 64), 1), ((512, 768), 1)]
)
def test_only_tiny_pictures_are_enlarged_pixel_by_pixel(size, factor):
    picture = Image.effect_noise(size, 50)
    result = enlarged(picture)
    assert result.size == (factor * size[0], factor * size[1])
    assert np.array_equal(np.asarray(result)[::factor, ::factor], np.asarray(picture))


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_seed_repeats_a_picture_and_no_seed_makes_a_new_one(parts, tmp_path):
    prompts = [small(seed=1), small(seed=1), small(seed=2), small(), small()]
    one, same, other, new, newer = map(pixels, draw(parts, prompts, tmp_path))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert not np.array_equal(new, newer)


def test_prompt_negative_prompt_scale_and_sampler_all_count(parts, tmp_path):
    prompts = [
        small(seed=1),
        small("a cat", seed=1),
        small(seed=1, negative_prompt="blurry"),
        small(seed=1, scale=1.0),
        small(seed=1, sample_sampler="euler_a"),
    ]
    pictures = [pixels(path).tobytes() for path in draw(parts, prompts, tmp_path)]
    assert len(set(pictures)) == len(pictures)


def test_without_guidance_the_negative_prompt_does_not_count(parts, tmp_path):
    prompts = [small(seed=1, scale=1.0), small(seed=1, scale=0.0, negative_prompt="blurry")]
    one, other = map(pixels, draw(parts, prompts, tmp_path))
    assert np.abs(one.astype(int) - other).max() <= 1


def test_training_continues_as_if_no_sample_had_been_drawn(parts, tmp_path):
    unet, vae = parts
    vae.eval()
    unet.train()
    unet.conv_in.eval()
    modes = [[module.training for module in model.modules()] for model in (unet, vae)]
    weights = [parameter.clone() for parameter in unet.parameters()]
    config = dict(unet.config)

    def after(sampling):
        torch.manual_seed(5)
        random.seed(5)
        if sampling:
            prompts = [small(sample_sampler="euler_a"), small(seed=3)]
            draw(parts, prompts, tmp_path)
        return torch.rand(3), random.random()

    (ours, python), (reference, python_reference) = after(True), after(False)
    assert torch.equal(ours, reference)
    assert python == python_reference
    assert modes == [[m.training for m in model.modules()] for model in (unet, vae)]
    assert all(map(torch.equal, unet.parameters(), weights))
    assert dict(unet.config) == config


def test_dropout_is_off_while_drawing_and_modes_return_after_an_error(parts, tmp_path):
    parts[0].train()
    one, two = draw(parts, [small(seed=1), small(seed=1)], tmp_path)
    assert np.array_equal(pixels(one), pixels(two))
    with pytest.raises(UserError, match="eular"):
        draw(parts, [small()], tmp_path, sampler="eular")
    assert parts[0].training


def test_a_sample_that_overflows_is_black_and_says_why(parts, tmp_path, caplog):
    unet, vae = parts
    broken = AutoencoderKL.from_config(vae.config)
    torch.nn.init.constant_(broken.decoder.conv_out.bias, float("nan"))
    with caplog.at_level(logging.WARNING):
        (path,) = draw((unet, broken), [small()], tmp_path)
    assert "no_half_vae" in caplog.text
    assert pixels(path).max() == 0


def test_half_precision_models_draw_in_autocast_or_without(parts, tmp_path):
    unet, vae = (type(part).from_config(part.config).bfloat16() for part in parts)
    draw((unet, vae), [small()], tmp_path)
    draw(
        (unet, vae.float()),
        [small()],
        tmp_path,
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    )


class Zero(torch.nn.Module):
    """Predicts no noise at any timestep."""

    config = SimpleNamespace(in_channels=4)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.timesteps = []

    def forward(self, latents, timestep, **_inputs):
        self.timesteps.append(float(timestep))
        return SimpleNamespace(sample=torch.zeros_like(latents))


@pytest.mark.parametrize("num_steps", [1, 999, 1000])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_as_many_steps_as_there_are_timesteps(name, num_steps):
    """At 1000 steps the offset of DDIM and PNDM would ask for a timestep after the last one."""
    try:
        scheduler = create_sampler(name, DDPMScheduler(), prediction_type="epsilon")
    except UserError as error:
        pytest.skip(str(error))
    unet = Zero()
    settings = DenoiseSettings((64, 64), num_steps, 1.0)
    prompts = Conditioning(torch.zeros(2, 77, 8))
    generator = torch.Generator().manual_seed(0)
    denoise(unet, prompts, scheduler, settings, generator=generator)
    assert len(unet.timesteps) >= num_steps
    assert max(unet.timesteps) <= 999
