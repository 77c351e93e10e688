"""Every method of the table: it learns, changes only what it should, resumes, and its files load.

A new method gets all of this by its line in ``METHODS`` and one in ``CLIENTS``.
"""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from mlm_plugin.config.options import METHOD_NAMES
from mlm_plugin.export.xti_pipeline import load_xti
from mlm_plugin.methods import METHODS, Export
from mlm_plugin.training.samples import DenoiseSettings, create_sampler, denoise

PROMPT, NEGATIVE = "a photo of sks dog on the beach", "blurry"
STEPS, SCALE, SIDE = 4, 4.0, 64

CHANGED = {  # of the base model; everything else stays bit for bit
    "lora": (),
    "textual_inversion": (),
    "xti": (),
    "pivotal": (),
    "custom_diffusion": ("unet.attn2.to_k", "unet.attn2.to_v"),
    "dreambooth": ("unet.", "text_encoder."),
}


def base_weights(models):
    """Every tensor of the model under names that adapters and library versions do not touch."""
    parts = {
        "unet": models.unet,
        "text_encoder": models.text_encoders[0].model,
        "vae": models.vae,
    }
    return {
        f"{part}.{name}".replace(".base_layer", "").replace("text_model.", ""): tensor.clone()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
        if ".lora_" not in name
    }


def may_change(name, method):
    part, _, rest = name.partition(".")
    return any(
        prefix == f"{part}." or f"{part}.{'.'.join(rest.split('.')[-3:-1])}" == prefix
        for prefix in CHANGED[method]
    )


def fixed_loss(trainer):
    """The diffusion loss on the same pictures with the same noise, whatever was trained."""
    batches = [trainer.loader.dataset[i] for i in range(6)]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        trainer.method.train(False)
        losses = [trainer._diffusion_loss(batch) for batch in batches]
        trainer.method.train(True)
    return float(torch.stack(losses).mean())


def own_sample(trainer, *, seed=3):
    """The trainer's own picture in [0, 1], before it becomes bytes."""
    models, method = trainer.models, trainer.method
    with trainer.evaluating(), torch.no_grad():
        latents = denoise(
            models.unet,
            method.encode([NEGATIVE, PROMPT]),
            create_sampler("ddim", models.noise_scheduler, prediction_type="epsilon"),
            DenoiseSettings(size=(SIDE, SIDE), num_steps=STEPS, scale=SCALE),
            generator=torch.Generator().manual_seed(seed),
        )
        pixels = models.vae.decode(latents / models.vae.config.scaling_factor).sample
    return (pixels[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


def client_sample(pipeline, trainer, *, seed=3, **prompts):
    """What diffusers draws from the same noise with the same sampler."""
    models = trainer.models
    pipeline.scheduler = create_sampler("ddim", models.noise_scheduler, prediction_type="epsilon")
    pipeline.set_progress_bar_config(disable=True)
    shape = (1, 4, SIDE // 8, SIDE // 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return pipeline(
        **prompts,
        latents=latents,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        output_type="np",
    ).images[0]


def texts(word="sks"):
    return {"prompt": PROMPT.replace("sks", word), "negative_prompt": NEGATIVE}


def client_lora(folder, files):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(str(files[0].parent), weight_name=files[0].name)
    return pipeline, texts()


def client_textual_inversion(folder, files):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.load_textual_inversion(str(files[0]), token="<learned>")
    return pipeline, texts("<learned>")


def client_xti(folder, files):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    xti = load_xti(pipeline, files[0], placeholder_token="sks")
    embeds = {"prompt_embeds": xti.encode(PROMPT), "negative_prompt_embeds": xti.encode(NEGATIVE)}
    return pipeline, embeds


def client_custom_diffusion(folder, files):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.unet.load_attn_procs(
        str(files[0].parent), weight_name=files[0].name, _pipeline=pipeline
    )
    pipeline.load_textual_inversion(str(files[1]), token="<learned>")
    return pipeline, texts("<learned>")


def client_pivotal(folder, files):
    pipeline, _ = client_lora(folder, files)
    pipeline.load_textual_inversion(str(files[1]), token="<learned>")
    return pipeline, texts("<learned>")


def client_dreambooth(folder, files):
    pipeline = StableDiffusionPipeline.from_single_file(
        str(files[0]), config=str(folder), local_files_only=True
    )
    return pipeline, texts()


CLIENTS = {
    "lora": client_lora,
    "dreambooth": client_dreambooth,
    "textual_inversion": client_textual_inversion,
    "xti": client_xti,
    "custom_diffusion": client_custom_diffusion,
    "pivotal": client_pivotal,
}


def test_every_method_is_an_option_and_has_a_client():
    assert tuple(METHODS) == METHOD_NAMES
    assert METHODS.keys() == CLIENTS.keys() == CHANGED.keys()


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_and_its_files_draw_the_trainers_picture(name, trainer_of, toy_folder, tmp_path):
    trainer = trainer_of(name, steps=8)
    before, first_loss = base_weights(trainer.models), fixed_loss(trainer)
    untrained = own_sample(trainer)
    started = [p.detach().clone() for p in trainer.method.parameters()]
    trainer.run()

    # the loss falls
    assert fixed_loss(trainer) < first_loss
    # only what is meant to change has changed
    after = base_weights(trainer.models)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    allowed = {key for key in before if may_change(key, name)}
    assert changed <= allowed
    assert len(changed) >= 0.9 * len(allowed)
    moved = [
        not torch.equal(a, b) for a, b in zip(started, trainer.method.parameters(), strict=True)
    ]
    assert sum(moved) > 0.9 * len(moved)
    # the exported files, loaded by the client, draw the same picture
    path = tmp_path / "x.safetensors"
    trainer.method.export(Export(path, metadata=lambda kind: {"modelspec.title": kind}))
    files = trainer.method.files(path)
    assert files[0] == path
    assert sorted(files) == sorted(tmp_path.iterdir())
    assert trainer.method.verify(path)
    pipeline, prompts = CLIENTS[name](toy_folder, files)
    sample = own_sample(trainer)
    assert np.abs(sample - untrained).max() > 1e-2, "the training must show"
    np.testing.assert_allclose(client_sample(pipeline, trainer, **prompts), sample, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_bit_identical_to_a_straight_one(name, trainer_of, tmp_path):
    straight = trainer_of(name, mlm_loss_weight=0.1)
    straight.run()
    first = trainer_of(name, mlm_loss_weight=0.1)
    first.plan = dataclasses.replace(first.plan, num_steps=2)
    first.run()
    first.save_state(tmp_path / "state")
    second = trainer_of(name, mlm_loss_weight=0.1)
    second.load_state(tmp_path / "state")
    second.run()
    a, b = straight.method.state_dict(), second.method.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", METHODS)
def test_the_term_changes_the_text_side_and_never_the_noise(name, trainer_of):
    plain, regularized = trainer_of(name, mlm_loss_weight=0), trainer_of(name, mlm_loss_weight=10)
    losses = []
    for trainer in (plain, regularized):
        batch = next(iter(trainer.loader))
        torch.manual_seed(5)
        losses.append(trainer._diffusion_loss(batch).item())
    assert losses[0] == losses[1]
    output, weight = regularized._term(0), regularized._mlm_weight()
    (weight * output.loss).backward()
    reached = {
        part: any(p.grad is not None and p.grad.any() for p in members)
        for part, members in regularized.method.parts().items()
    }
    assert not reached.get("unet", False)
    assert any(reached.values())


@pytest.mark.parametrize("name", METHODS)
def test_a_frozen_part_stays_as_it_is(name, trainer_of):
    trainer = trainer_of(name)
    for part in trainer.method.parts():
        trainer.method.freeze(part)
        assert not any(p.requires_grad for p in trainer.method.parts()[part])
    assert trainer.method.parameters() == []
    assert not trainer.method.trains_text_side
