"""Contradictions end the run before a model is opened; settings without effect are named."""

import logging

import pytest

from mlm_plugin.config.checks import check_config, mlm_obstacle, text_encoder_lr_of
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.errors import UserError

USABLE = TrainConfig().replace(
    pretrained_model_name_or_path="model", output_dir="out", network_alpha=4.0, network_dim=4
)


def test_a_plain_run_passes_without_a_word(caplog):
    check_config(USABLE)
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"pretrained_model_name_or_path": None}, ["pretrained_model_name_or_path"]),
        ({"output_dir": None}, ["output_dir"]),
        (
            {"network_train_unet_only": True, "network_train_text_encoder_only": True},
            ["network_train_unet_only", "network_train_text_encoder_only"],
        ),
        ({"dim_from_weights": True}, ["dim_from_weights", "network_weights"]),
        ({"network_dropout": 1.0}, ["network_dropout"]),
        ({"network_args": ("conv_dim",)}, ["network_args", "key=value"]),
        ({"unet_lr": -1.0}, ["unet_lr"]),
        ({"unet_lr": 0.0, "text_encoder_lr": (0.0,)}, ["nothing would be trained"]),
        ({"lr_warmup_steps": 100}, ["lr_warmup_steps", "constant_with_warmup"]),
        (
            {"lr_warmup_steps": 0.1, "lr_scheduler_type": "CosineAnnealingLR"},
            ["lr_scheduler_type", "lr_warmup_steps = 0"],
        ),
        ({"full_fp16": True}, ["full_fp16", "mixed_precision"]),
        ({"full_bf16": True, "mixed_precision": "fp16"}, ["full_bf16", "'bf16'"]),
        ({"adaptive_noise_scale": 0.1}, ["adaptive_noise_scale", "noise_offset"]),
        ({"scale_v_pred_loss_like_noise_pred": True}, ["v_parameterization"]),
        ({"v_pred_like_loss": 0.5, "v_parameterization": True}, ["v_pred_like_loss"]),
        ({"min_timestep": 600, "max_timestep": 500}, ["min_timestep", "600", "500"]),
        ({"max_timestep": 1001}, ["max_timestep", "1000"]),
        ({"cache_latents": True, "color_aug": True}, ["cache_latents", "color_aug"]),
        ({"cache_latents_to_disk": True, "random_crop": True}, ["random_crop"]),
        ({"caption_dropout_rate": 1.5}, ["caption_dropout_rate"]),
        ({"conditioning_data_dir": "masks"}, ["masked_loss"]),
        ({"save_model_as": "ckpt"}, ["save_model_as", "safetensors"]),
        ({"output_name": "a/b"}, ["output_name", "output_dir"]),
        ({"log_with": "tensorboard"}, ["log_with", "logging_dir"]),
        ({"sample_every_n_steps": 100}, ["sample_every_n_steps", "sample_prompts"]),
        ({"sample_at_first": True}, ["sample_at_first", "sample_prompts"]),
        ({"mlm_probability": 0.0}, ["mlm_probability"]),
        ({"mlm_probability": 1.5}, ["mlm_probability"]),
        ({"mlm_start_step": 50, "mlm_end_step": 50}, ["mlm_start_step", "mlm_end_step"]),
        ({"mlm_start_step": 2000}, ["mlm_start_step", "max_train_steps"]),
    ],
)
def test_a_contradiction_names_its_options(changes, parts):
    with pytest.raises(UserError) as caught:
        check_config(USABLE.replace(**changes))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


WITHOUT_GRADIENT = [
    ({"network_train_unet_only": True}, "network_train_unet_only"),
    ({"text_encoder_lr": (0.0,)}, "text_encoder_lr"),
    ({"learning_rate": 0.0, "unet_lr": 1e-4}, "learning_rate"),
    (
        {"network_module": "lycoris.kohya", "network_args": ("preset=unet-transformer-only",)},
        "preset=unet-transformer-only",
    ),
]


@pytest.mark.parametrize(("changes", "named"), WITHOUT_GRADIENT)
def test_mlm_without_a_gradient_is_refused_with_the_reason(changes, named):
    config = USABLE.replace(**changes)
    with pytest.raises(UserError, match=named) as caught:
        check_config(config)
    assert "mlm_loss_weight = 0" in str(caught.value)
    check_config(config.replace(mlm_loss_weight=0.0))
    assert mlm_obstacle(USABLE) is None


def test_text_encoder_lr_falls_back_to_learning_rate():
    assert text_encoder_lr_of(USABLE.replace(learning_rate=3e-4)) == 3e-4
    assert text_encoder_lr_of(USABLE.replace(text_encoder_lr=(5e-5,))) == 5e-5


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"network_dim": 32, "network_alpha": 1.0}, "network_alpha"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr"),
        ({"v2": True, "clip_skip": 2}, "clip_skip"),
        ({"text_encoder_lr": (1e-4, 1e-5)}, "text_encoder_lr"),
        ({"noise_offset_random_strength": True}, "noise_offset_random_strength"),
        ({"huber_c": 0.5}, "huber_c"),
        ({"sample_prompts": "prompts.txt"}, "sample_prompts"),
        ({"save_last_n_epochs": 2}, "save_last_n_epochs"),
    ],
)
def test_a_doubtful_setting_is_named_once(changes, named, caplog):
    caplog.set_level(logging.WARNING)
    check_config(USABLE.replace(**changes))
    assert len(caplog.records) == 1
    assert named in caplog.text


def test_warmup_is_fine_where_the_scheduler_or_the_optimizer_handles_it():
    check_config(USABLE.replace(lr_warmup_steps=100, lr_scheduler="constant_with_warmup"))
    check_config(USABLE.replace(lr_warmup_steps=100, lr_scheduler="cosine"))
    check_config(USABLE.replace(lr_warmup_steps=100, optimizer_type="AdamWScheduleFree"))


def test_looking_at_the_data_needs_no_output_folder():
    check_config(USABLE.replace(output_dir=None, debug_dataset=True))
    check_config(USABLE.replace(output_dir=None, check=True))
