"""Every method of the table: it learns, changes only what it should, resumes, and its files load.

A new method gets all of this by its line in ``METHOD_CLASSES`` and its row here.
"""

import dataclasses
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from mlm_plugin.config.methods import METHOD_CLASSES
from mlm_plugin.config.options import OPTIONS, TrainConfig
from mlm_plugin.data.dataset import BatchKey
from mlm_plugin.export.xti_pipeline import load_xti
from mlm_plugin.methods import METHODS, Export
from mlm_plugin.methods.checks import check_config
from mlm_plugin.training.samples import DenoiseSettings, create_sampler, denoise

PROMPT, NEGATIVE = "a photo of sks dog on the beach", "blurry"
STEPS, SCALE, SIDE = 4, 4.0, 64


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
    return any(fnmatchcase(name, pattern) for pattern in ROWS[method].changed)


def fixed_loss(trainer):
    """The diffusion loss on the same pictures with the same noise, whatever was trained."""
    batches = [trainer.loader.dataset[BatchKey(0, i)] for i in range(6)]
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
    xti = load_xti(pipeline, files[1], placeholder_token="sks")
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


NETWORK = {
    *(name for name, entry in OPTIONS.items() if entry.group == "network"),
    *("unet_lr", "text_encoder_lr"),
}
TOKENS = {
    *("num_vectors_per_token", "init_word", "weights"),
    *("directional_embedding", "directional_kappa"),
    *("embedding_lr", "stop_embedding_training"),
}
STOP_UNET = {"stop_unet_training"}
STOP_TEXT = {f"stop_text_encoder{number}_training" for number in ("", "1", "2")}
RATES_TE = {f"learning_rate_te{number}" for number in ("", "1", "2")}


class Row(NamedTuple):
    """What is expected of a method.

    Attributes:
        client: the program that loads its files, and what draws the concept there.
        changed: weights of the base model that it may change; all others stay bit for bit.
        reads: options that not every method reads.
    """

    client: Callable
    changed: tuple[str, ...]
    reads: set[str]


ROWS = {
    "lora": Row(client_lora, (), NETWORK | STOP_UNET | STOP_TEXT),
    "dreambooth": Row(
        client_dreambooth,
        ("unet.*", "text_encoder.*"),
        {"no_train_text_encoder", "save_diffusers_folder"} | RATES_TE | STOP_UNET | STOP_TEXT,
    ),
    "textual_inversion": Row(client_textual_inversion, (), TOKENS),
    "xti": Row(client_xti, (), TOKENS | {"xti_mlm_layers"}),
    "custom_diffusion": Row(
        client_custom_diffusion,
        ("unet.*.attn2.to_[kv].weight",),
        TOKENS | {"delta_lora_rank"} | STOP_UNET,
    ),
    "pivotal": Row(
        client_pivotal, (), NETWORK | TOKENS | {"bundle_embedding"} | STOP_UNET | STOP_TEXT
    ),
}


def test_every_method_is_an_option_and_has_a_row():
    assert OPTIONS["method"].choices == tuple(METHOD_CLASSES)
    assert METHODS.keys() == METHOD_CLASSES.keys() == ROWS.keys()


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
    trainer.method.export(Export(path, metadata=lambda kind, file: {"modelspec.title": kind}))
    files = trainer.method.files(path)
    assert files[0] == path
    assert sorted(files) == sorted(tmp_path.iterdir())
    assert trainer.method.verify(path)
    pipeline, prompts = ROWS[name].client(toy_folder, files)
    sample = own_sample(trainer)
    assert np.abs(sample - untrained).max() > 1e-2, "the training must show"
    np.testing.assert_allclose(client_sample(pipeline, trainer, **prompts), sample, atol=1e-3)


@pytest.mark.parametrize("num_vectors", [1, 3])
def test_a_bundle_leaves_the_lora_as_diffusers_loads_it(
    num_vectors, trainer_of, toy_folder, tmp_path
):
    trainer = trainer_of(
        "pivotal", steps=8, bundle_embedding=True, num_vectors_per_token=num_vectors
    )
    trainer.run()
    path = tmp_path / "x.safetensors"
    trainer.method.export(Export(path, metadata=lambda kind, file: {"modelspec.title": kind}))
    files = trainer.method.files(path)
    assert sorted(files) == sorted(tmp_path.iterdir())
    pipeline, prompts = client_pivotal(toy_folder, files)
    sample = own_sample(trainer)
    np.testing.assert_allclose(client_sample(pipeline, trainer, **prompts), sample, atol=1e-3)
    with pytest.raises(ValueError, match="Invalid LoRA"):  # why the bundle is a file of its own
        client_lora(toy_folder, [files[-1]])


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
    with torch.no_grad():  # at the start the term is 0 and has no gradient
        for parameter in regularized.method.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    output, weight = regularized._term(0), regularized._mlm_weight()
    (weight * output.loss).backward()
    reached = {
        part: any(p.grad is not None and p.grad.any() for p in members)
        for part, members in regularized.method.parts().items()
    }
    assert not reached.get("unet", False)
    assert any(reached.values())


@pytest.mark.parametrize("name", METHODS)
def test_a_frozen_part_is_unchanged(name, trainer_of):
    trainer = trainer_of(name)
    for part in trainer.method.parts():
        trainer.method.freeze(part)
        assert not any(p.requires_grad for p in trainer.method.parts()[part])
    assert trainer.method.parameters() == []
    assert not trainer.method.trains_text_side


# --- options ---

PLAIN = TrainConfig().replace(pretrained_model_name_or_path="model", output_dir="out")
OWN_OPTIONS = sorted(set().union(*(row.reads for row in ROWS.values())))

VALUES = {
    "network_module": "lycoris.kohya",
    "network_args": ("conv_dim=4",),
    "network_weights": "a.safetensors",
    "network_dropout": 0.1,
    "unet_lr": 1e-4,
    "text_encoder_lr": (1e-4,),
    "init_word": ("dog",),
    "weights": ("a.pt",),
    "embedding_lr": 1e-4,
    "stop_embedding_training": 5,
    "xti_mlm_layers": "all",
    "learning_rate_te": 1e-6,
    "learning_rate_te1": 1e-6,
    "learning_rate_te2": 1e-6,
    "stop_text_encoder_training": 0.5,
    "stop_unet_training": 5,
}
"""A value other than the default, where True and 4 are not allowed."""

PARTNERS = {"dim_from_weights": {"network_weights": "a.safetensors"}}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OWN_OPTIONS)
def test_an_option_is_named_where_the_method_does_not_read_it(name, method, caplog):
    value = VALUES.get(name, True if OPTIONS[name].kind is bool else 4)
    config = PLAIN.replace(method=method, mlm_loss_weight=0.0, **PARTNERS.get(name, {}))
    check_config(config.replace(**{name: value}))
    said = [r.getMessage() for r in caplog.records if f"with method = {method}" in r.getMessage()]
    assert len(said) == (name not in ROWS[method].reads)
    assert all(name in message.split(" ha")[0].split(", ") for message in said)


def test_options_of_another_method_are_named_together(caplog):
    check_config(PLAIN.replace(method="xti", network_dim=8, unet_lr=1e-4, network_alpha=8.0))
    check_config(PLAIN.replace(method="dreambooth", init_word=("dog",), embedding_lr=1e-3))
    assert [record.getMessage() for record in caplog.records] == [
        "network_dim, network_alpha, unet_lr have no effect with method = xti",
        "init_word, embedding_lr have no effect with method = dreambooth",
    ]


def test_every_option_of_the_new_groups_says_which_methods_read_it():
    of_data = {"class_prompt", "generate_class_images"}  # regularization images suit all methods
    names = {n for n, entry in OPTIONS.items() if entry.group in ("embedding", "finetune")}
    assert names - of_data <= set(OWN_OPTIONS)
