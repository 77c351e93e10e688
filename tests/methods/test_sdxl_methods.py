"""Every method that reads SDXL: its loss, both text encoders, resuming, and files that load."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from mlm_plugin.config.options import TrainConfig
from mlm_plugin.errors import UserError
from mlm_plugin.methods import METHODS, Export
from mlm_plugin.training.samples import DenoiseSettings, create_sampler, denoise

PROMPT, NEGATIVE = "a photo of sks dog on the beach", "blurry"
STEPS, SCALE, SIDE = 3, 4.0, 64
SDXL_METHODS = [name for name, method in METHODS.items() if method.supports_sdxl]


def own_sample(trainer):
    """The trainer's own picture in [0, 1], before it becomes bytes."""
    models = trainer.models
    with trainer.evaluating(), torch.no_grad():
        latents = denoise(
            models.unet,
            trainer.encode([NEGATIVE, PROMPT]),
            create_sampler("ddim", models.noise_scheduler, prediction_type="epsilon"),
            DenoiseSettings(size=(SIDE, SIDE), num_steps=STEPS, scale=SCALE),
            generator=torch.Generator().manual_seed(3),
        )
        pixels = models.vae.decode(latents / models.vae.config.scaling_factor).sample
    return (pixels[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


def client_sample(pipeline, trainer, word):
    """What diffusers draws from the same noise with the same sampler."""
    scheduler = trainer.models.noise_scheduler
    pipeline.scheduler = create_sampler("ddim", scheduler, prediction_type="epsilon")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=PROMPT.replace("sks", word),
        negative_prompt=NEGATIVE,
        height=SIDE,
        width=SIDE,
        latents=torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(3)),
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        output_type="np",
    ).images[0]


def add_embedding(pipeline, file):
    """Learned embeddings in both encoders, as diffusers' guide of pivotal tuning loads them."""
    embeddings = load_file(file)
    for key, encoder, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        pipeline.load_textual_inversion(
            embeddings[key], token="<learned>", text_encoder=encoder, tokenizer=tokenizer
        )


def client_of(method, folder, files):
    """The pipeline with the files loaded, and the word that triggers the concept."""
    if method.trains_base_weights:
        pipeline = StableDiffusionXLPipeline.from_single_file(
            str(files[0]), config=str(folder), local_files_only=True
        )
        return pipeline, "sks"
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    if method.trains_network:
        pipeline.load_lora_weights(str(files[0].parent), weight_name=files[0].name)
    if not method.learns_tokens:
        return pipeline, "sks"
    add_embedding(pipeline, files[-1])
    return pipeline, "<learned>"


@pytest.mark.parametrize("name", SDXL_METHODS)
def test_it_learns_and_its_files_draw_the_trainers_picture(
    name, sdxl_trainer_of, toy_sdxl_folder, tmp_path
):
    method = METHODS[name]
    rates = {"embedding_lr": 2e-2} if method.learns_tokens else {}
    trainer = sdxl_trainer_of(name, steps=4, **rates)
    parts = method.learning_rates(TrainConfig(), num_text_encoders=2).keys()
    assert trainer.method.parts().keys() == parts
    untrained = own_sample(trainer)
    trainer.run()
    path = tmp_path / "x.safetensors"
    trainer.method.export(Export(path, metadata=lambda kind, file: {"modelspec.title": kind}))
    files = trainer.method.files(path)
    assert sorted(files) == sorted(tmp_path.iterdir())
    assert trainer.method.verify(path)
    pipeline, word = client_of(method, toy_sdxl_folder, files)
    sample = own_sample(trainer)
    assert np.abs(sample - untrained).max() > 1e-2, "the training must show"
    np.testing.assert_allclose(client_sample(pipeline, trainer, word), sample, atol=1e-3)


@pytest.mark.parametrize(("zero_terminal_snr", "marks"), [(False, {"v_pred"}),
                                                          (True, {"v_pred", "ztsnr"})])  # fmt: skip
def test_a_model_that_predicts_v_says_so_in_its_file(
    sdxl_trainer_of, toy_sdxl_folder, tmp_path, zero_terminal_snr, marks
):
    folder = tmp_path / "model"
    shutil.copytree(toy_sdxl_folder, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"})
    )
    v = {"pretrained_model_name_or_path": folder, "v_parameterization": True}
    if zero_terminal_snr:
        v["zero_terminal_snr"] = True
    trainer = sdxl_trainer_of("dreambooth", steps=1, mlm_loss_weight=0, **v)
    path = tmp_path / "x.safetensors"
    trainer.method.export(Export(path, metadata=lambda kind, file: {"modelspec.title": kind}))
    assert {"v_pred", "ztsnr"} & load_file(path).keys() == marks
    assert trainer.method.verify(path)


def test_a_bundle_leaves_the_lora_as_diffusers_loads_it(sdxl_trainer_of, toy_sdxl_folder, tmp_path):
    trainer = sdxl_trainer_of("pivotal", steps=4, bundle_embedding=True, embedding_lr=2e-2)
    trainer.run()
    path = tmp_path / "x.safetensors"
    trainer.method.export(Export(path, metadata=lambda kind, file: {"modelspec.title": kind}))
    lora, embedding, bundle = trainer.method.files(path)
    assert {"bundle_emb.sks.clip_l", "bundle_emb.sks.clip_g"} <= load_file(bundle).keys()
    pipeline, word = client_of(METHODS["pivotal"], toy_sdxl_folder, [lora, embedding])
    sample = own_sample(trainer)
    np.testing.assert_allclose(client_sample(pipeline, trainer, word), sample, atol=1e-3)


@pytest.mark.parametrize("name", ["dreambooth", "pivotal"])  # weights; adapters and embeddings
def test_a_resumed_run_ends_bit_identical_to_a_straight_one(name, sdxl_trainer_of, tmp_path):
    straight = sdxl_trainer_of(name, steps=2, mlm_loss_weight=0.1)
    straight.run()
    first = sdxl_trainer_of(name, steps=2, mlm_loss_weight=0.1)
    first.plan = dataclasses.replace(first.plan, num_steps=1)
    first.run()
    first.save_state(tmp_path / "state")
    second = sdxl_trainer_of(name, steps=2, mlm_loss_weight=0.1)
    second.load_state(tmp_path / "state")
    second.run()
    a, b = straight.method.state_dict(), second.method.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", SDXL_METHODS)
def test_the_term_has_a_loss_and_a_gradient_for_each_text_encoder(name, sdxl_trainer_of):
    trainer = sdxl_trainer_of(name, mlm_loss_weight=1)
    disturb(trainer)
    output, weight = trainer._term(0), trainer._mlm_weight()
    losses = [output.parts[name] for name in ("te1", "te2")]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())
    (weight * output.loss).backward()
    reached = {
        part: sum(bool(p.grad is not None and p.grad.any()) for p in members)
        for part, members in trainer.method.parts().items()
    }
    assert reached.pop("unet", 0) == 0
    if "embedding" in reached:
        assert reached["embedding"] == 2  # those of either encoder
    assert all(reached.values())


def disturb(trainer):
    """Move everything that is trained: at the start the term is 0 and has no gradient."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.method.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def test_each_text_encoder_has_its_rate_and_its_stop(sdxl_trainer_of):
    trainer = sdxl_trainer_of(
        "lora",
        unet_lr=1e-3,
        text_encoder_lr=[2e-4, 3e-5],
        stop_text_encoder_training="75%",
        stop_text_encoder2_training=1,
    )
    rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"textencoder1": 2e-4, "textencoder2": 3e-5, "unet": 1e-3}
    assert trainer.freeze_at == {"textencoder1": 3, "textencoder2": 1}


def test_one_rate_serves_both_text_encoders(sdxl_trainer_of):
    trainer = sdxl_trainer_of("lora", unet_lr=1e-3, text_encoder_lr=2e-4)
    rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"textencoder1": 2e-4, "textencoder2": 2e-4, "unet": 1e-3}


def test_dreambooth_reads_the_rates_of_sdxl_train(sdxl_trainer_of):
    trainer = sdxl_trainer_of(
        "dreambooth", learning_rate_te=1e-5, learning_rate_te2=2e-5, mlm_loss_weight=0
    )
    rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {"unet": 2e-3, "textencoder1": 1e-5, "textencoder2": 2e-5}


def test_the_term_leaves_out_a_text_encoder_that_is_not_trained(
    sdxl_trainer_of, toy_sdxl_contextualizers
):
    second = toy_sdxl_contextualizers.split(",")[1]
    rates = {"text_encoder_lr": [0, 1e-3], "unet_lr": 1e-3}
    trainer = sdxl_trainer_of("lora", mlm_contextualizer=second, **rates)
    (encoder,) = trainer.regularizer.encoders
    assert encoder.embedding is trainer.models.text_encoders[1].token_embedding
    with pytest.raises(UserError, match=r"names 2 file\(s\), needed: 1"):
        sdxl_trainer_of("lora", **rates)


def test_kept_captions_train_as_those_that_are_encoded_each_time(sdxl_trainer_of):
    losses = []
    for kept in (False, True):
        trainer = sdxl_trainer_of(
            "lora",
            network_train_unet_only=True,
            mlm_loss_weight=0,
            **({"cache_text_encoder_outputs": True} if kept else {}),
        )
        torch.manual_seed(5)
        losses.append(trainer._diffusion_loss(next(iter(trainer.loader))).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for text_encoder in trainer.models.text_encoders:
        text_encoder.model = None  # no longer needed
    trainer._diffusion_loss(next(iter(trainer.loader)))


@pytest.mark.parametrize("setting", [{"shuffle_caption": True}, {"caption_dropout_rate": 0.1}])
def test_captions_that_change_cannot_be_kept(setting, sdxl_trainer_of):
    with pytest.raises(UserError, match=f"impossible with {next(iter(setting))}"):
        sdxl_trainer_of(
            "lora",
            network_train_unet_only=True,
            mlm_loss_weight=0,
            cache_text_encoder_outputs=True,
            **setting,
        )


@pytest.mark.parametrize("name", ["xti", "custom_diffusion"])
def test_a_method_of_one_text_encoder_is_refused(name, sdxl_trainer_of):
    with pytest.raises(UserError, match="is SDXL; use one of lora, dreambooth"):
        sdxl_trainer_of(name)


def test_embeddings_for_another_number_of_text_encoders_are_refused(
    trainer_of, sdxl_trainer_of, tmp_path
):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    for make, path in ((trainer_of, one), (sdxl_trainer_of, two)):
        method = make("textual_inversion").method
        method.export(Export(path, metadata=lambda kind, file: {}))
    again = sdxl_trainer_of("textual_inversion", weights=two).method
    assert torch.equal(again.embedding_parameters()[1], method.embedding_parameters()[1])
    with pytest.raises(UserError, match=r"embeddings for 1 text encoder\(s\), this model has 2"):
        sdxl_trainer_of("textual_inversion", weights=one)
    with pytest.raises(UserError, match=r"embeddings for 2 text encoder\(s\), this model has 1"):
        trainer_of("textual_inversion", weights=two)


def test_the_loss_of_a_batch_is_that_of_diffusers_by_hand(sdxl_trainer_of, toy_sdxl_folder):
    trainer = sdxl_trainer_of("dreambooth", resolution="64,96", flip_aug=True, mlm_loss_weight=0)
    trainer.method.train(False)
    batch = next(iter(trainer.loader))
    assert batch.crop_top_lefts == [(16, 0)] * 2
    with torch.no_grad():
        torch.manual_seed(5)
        ours = trainer._diffusion_loss(batch)

        pipeline = StableDiffusionXLPipeline.from_pretrained(toy_sdxl_folder)
        torch.manual_seed(5)
        latents = pipeline.vae.encode(batch.pixel_values).latent_dist.sample() * 0.13025
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (2,))
        states, _, pooled, _ = pipeline.encode_prompt(
            batch.captions, device="cpu", do_classifier_free_guidance=False
        )
        time_ids = torch.tensor([[96, 96, 16, 0, 96, 64]] * 2)  # file, crop, training picture
        pred = pipeline.unet(
            trainer.models.noise_scheduler.add_noise(latents, noise, timesteps),
            timesteps,
            encoder_hidden_states=states,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
        ).sample
    torch.testing.assert_close(ours, torch.nn.functional.mse_loss(pred, noise))
