"""Contradicting options end the run before a model is opened; ineffective ones are named."""

import logging
from pathlib import Path

import pytest

from mlm_plugin.config.loading import load_config
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.methods.checks import check_config  # includes the checks of the method

PRESETS = sorted((Path(__file__).parents[2] / "presets").glob("*.toml"))
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
        ({"text_encoder_lr": (1e-4, 1e-5, 0.0)}, ["0.0001, 1e-05, 0", "two text encoders"]),
        ({"lr_warmup_steps": 100}, ["lr_warmup_steps", "constant_with_warmup"]),
        (
            {"lr_warmup_steps": 0.1, "lr_scheduler_type": "CosineAnnealingLR"},
            ["lr_scheduler_type", "lr_warmup_steps = 0"],
        ),
        (
            {"lr_warmup_steps": 50, "lr_scheduler": "cosine", "max_train_steps": 3},
            ["lr_warmup_steps = 50", "max_train_steps = 3"],
        ),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, ["ReduceLROnPlateau", "validation loss"]),
        (
            {"lr_scheduler_type": "torch.optim.lr_scheduler.ReduceLROnPlateau"},
            ["ReduceLROnPlateau", "validation loss"],
        ),
        ({"seed": -1}, ["seed = -1", "4294967295"]),
        ({"seed": 2**32}, ["seed = 4294967296"]),
        ({"full_fp16": True}, ["full_fp16", "mixed_precision"]),
        ({"full_bf16": True, "mixed_precision": "fp16"}, ["full_bf16", "'bf16'"]),
        (
            {
                "fused_backward_pass": True,
                "method": "dreambooth",
                "gradient_accumulation_steps": 2,
            },
            ["fused_backward_pass", "gradient_accumulation_steps = 2"],
        ),
        (
            {"fused_backward_pass": True, "method": "dreambooth", "mixed_precision": "fp16"},
            ["fused_backward_pass", "'fp16'", "'bf16'"],
        ),
        ({"adaptive_noise_scale": 0.1}, ["adaptive_noise_scale", "noise_offset"]),
        ({"scale_v_pred_loss_like_noise_pred": True}, ["v_parameterization"]),
        ({"v_pred_like_loss": 0.5, "v_parameterization": True}, ["v_pred_like_loss"]),
        ({"min_timestep": 600, "max_timestep": 500}, ["min_timestep", "600", "500"]),
        ({"max_timestep": 1001}, ["max_timestep", "1000"]),
        ({"cache_latents": True, "color_aug": True}, ["cache_latents", "color_aug"]),
        ({"cache_latents_to_disk": True, "random_crop": True}, ["random_crop"]),
        ({"cache_latents": True, "scale_aug": True}, ["cache_latents", "scale_aug"]),
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
        ({"mlm_joint_share": 1.5}, ["mlm_joint_share = 1.5", "0 to 1"]),
        ({"mlm_joint_share": -0.1}, ["mlm_joint_share = -0.1"]),
        (
            {
                "method": "textual_inversion",
                "use_object_template": True,
                "use_style_template": True,
            },
            ["use_object_template", "use_style_template", "keep one"],
        ),
        (
            {"method": "pivotal", "weights": ("sks.pt",), "init_word": ("dog",)},
            ["weights", "init_word", "keep one"],
        ),
        (
            {"generate_class_images": 200, "dataset_config": "data.toml"},
            ["generate_class_images", "dataset_config", "is_reg = true"],
        ),
    ],
)
def test_a_contradiction_names_its_options(changes, parts, refused):
    with refused(parts):
        check_config(USABLE.replace(**changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"network_dim": 32, "network_alpha": 1.0}, "network_alpha"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr"),
        ({"v2": True, "clip_skip": 2}, "clip_skip"),
        ({"noise_offset_random_strength": True}, "noise_offset_random_strength"),
        ({"huber_c": 0.5}, "huber_c"),
        ({"sample_prompts": "prompts.txt"}, "sample_prompts"),
        ({"save_last_n_epochs": 2}, "save_last_n_epochs"),
        ({"lr_scheduler_power": 2.0}, "lr_scheduler_power"),
        ({"lr_scheduler_timescale": 100}, "inverse_sqrt"),
        ({"lr_scheduler_min_lr_ratio": 0.1, "lr_scheduler": "cosine"}, "cosine_with_min_lr"),
        ({"lr_decay_steps": 100}, "warmup_stable_decay"),
        (
            {"enable_bucket": True, "bucket_no_upscale": True, "max_bucket_reso": 640},
            "with bucket_no_upscale",
        ),
        ({"lr_scheduler_num_cycles": 3, "lr_scheduler": "cosine"}, "cosine_with_restarts"),
        ({"lr_scheduler": "cosine", "lr_scheduler_type": "ConstantLR"}, "lr_scheduler_type"),
        ({"unet_lr": 1e-4, "network_train_text_encoder_only": True}, "unet_lr"),
        (
            {
                "text_encoder_lr": (1e-4,),
                "network_train_unet_only": True,
                "mlm_loss_weight": 0.0,
            },
            "text_encoder_lr",
        ),
        ({"dynamo_backend": "eager"}, "torch_compile"),
        ({"persistent_data_loader_workers": True, "max_data_loader_n_workers": 0}, "n_workers"),
        ({"vae_batch_size": 4}, "cache_latents"),
        ({"skip_cache_check": True, "cache_latents": True}, "cache_latents_to_disk"),
        (
            {"max_bucket_reso": 2048, "bucket_no_upscale": True},
            "max_bucket_reso, bucket_no_upscale have no effect without enable_bucket",
        ),
        ({"dataset_repeats": 2}, "dataset_config"),
        ({"prior_loss_weight": 0.5}, "reg_data_dir"),
        ({"save_last_n_steps": 2}, "save_every_n_steps"),
        ({"save_last_n_steps": 3, "save_every_n_steps": 4}, "only the newest"),
        ({"save_last_n_steps": 1, "save_every_n_steps": 2}, "save_last_n_steps = 1"),
        (
            {"save_last_n_steps_state": 3, "save_every_n_steps": 4, "save_state": True},
            "save_last_n_steps_state = 3",
        ),
        ({"save_last_n_steps_state": 9, "save_every_n_steps": 9}, "without save_state"),
        ({"save_last_n_epochs_state": 2, "save_state": True}, "save_every_n_epochs"),
        ({"save_every_n_epochs": 1, "save_n_epoch_ratio": 3}, "save_every_n_epochs"),
        ({"log_prefix": "a", "log_with": "wandb"}, "logging_dir"),
        ({"log_tracker_name": "a", "log_config": True}, "log_tracker_name, log_config have"),
        ({"wandb_run_name": "a", "logging_dir": "logs"}, "wandb"),
        ({"sample_sampler": "euler_a"}, "sample_prompts"),
        (
            {"mlm_loss_weight": 0.0, "mlm_batch_size": 4, "mlm_every_n_steps": 2},
            "mlm_batch_size, mlm_every_n_steps have no effect without mlm_loss_weight",
        ),
        ({"mlm_prompt_syntax": "tags", "mlm_prompt_set": "captions"}, "captions"),
        ({"mlm_prompt_syntax": "tags", "mlm_prompt_set": "a/{b}.txt"}, "a/{b}.txt"),
        ({"class_prompt": "a dog"}, "class_prompt has no effect without generate_class_images"),
        (
            {"mlm_loss_weight": 0.0, "mlm_page": False, "mlm_joint_share": 0.1},
            "mlm_joint_share has no effect without mlm_loss_weight or mlm_page or mlm_keep_best",
        ),
    ],
)
def test_a_doubtful_setting_is_named_once(changes, named, caplog):
    caplog.set_level(logging.WARNING)
    check_config(USABLE.replace(**changes))
    assert len(caplog.records) == 1
    assert named in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_scheduler": "polynomial", "lr_scheduler_power": 2.0},
        {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3},
        {"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 0.1},
        {"lr_scheduler_type": "ConstantLR"},
        {"text_encoder_lr": (0.0,), "network_train_unet_only": True, "mlm_loss_weight": 0.0},
        {"dynamo_backend": "no"},
        {"vae_batch_size": 4, "cache_latents_to_disk": True},
        {"max_bucket_reso": 2048, "dataset_config": "data.toml"},
        {"prior_loss_weight": 0.5, "reg_data_dir": "reg"},
        {"prior_loss_weight": 0.5, "generate_class_images": 200},
        {"class_prompt": "a dog", "generate_class_images": 200},
        {"generate_class_images": 200, "train_data_dir": "data", "reg_data_dir": "reg"},
        {"stop_text_encoder_training": 0.6, "stop_unet_training": 100},
        {"save_last_n_epochs": 2, "save_n_epoch_ratio": 3},
        {"save_last_n_steps_state": 9, "save_every_n_steps": 9, "save_state": True},
        {"log_prefix": "a", "logging_dir": "logs"},
        {"wandb_run_name": "a", "log_with": "wandb", "log_config": True},
        {"mlm_prompt_syntax": "tags", "mlm_prompt_set": "living"},
        {
            "mlm_loss_weight": 0.0,
            "mlm_keep_best": True,
            "mlm_stop_below": 0.8,
            "save_every_n_steps": 9,
            "mlm_page": False,
            "mlm_prompt_set": "living",
        },
        {"seed": 2**32 - 1},
        {"lr_warmup_steps": 50, "lr_scheduler": "cosine", "max_train_steps": 50},
        {
            "lr_warmup_steps": 50,
            "lr_scheduler": "cosine",
            "max_train_epochs": 9,
        },
    ],
)
def test_a_setting_that_is_read_is_not_complained_of(changes, caplog):
    check_config(USABLE.replace(**changes))
    assert not caplog.records


def test_warmup_is_fine_where_the_scheduler_or_the_optimizer_handles_it():
    check_config(USABLE.replace(lr_warmup_steps=100, lr_scheduler="constant_with_warmup"))
    check_config(USABLE.replace(lr_warmup_steps=100, lr_scheduler="cosine"))
    check_config(USABLE.replace(lr_warmup_steps=100, optimizer_type="AdamWScheduleFree"))


def test_looking_at_the_data_needs_no_output_folder():
    check_config(USABLE.replace(output_dir=None, debug_dataset=True))
    check_config(USABLE.replace(output_dir=None, check=True))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_no_line_of_a_shipped_preset_is_without_effect(path, caplog):
    config = load_config(["--config_file", str(path)])
    check_config(config.replace(pretrained_model_name_or_path="model", output_dir="out"))
    assert "no effect" not in caplog.text
