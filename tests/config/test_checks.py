"""Contradictions end the run before a model is opened; settings without effect are named."""

import logging
from pathlib import Path

import pytest

from mlm_plugin.config.checks import check_config, check_model, mlm_obstacle, trained_text_encoders
from mlm_plugin.config.loading import load_config
from mlm_plugin.config.options import (
    METHOD_NAMES,
    OPTIONS,
    SDXL_METHODS,
    TOKEN_METHODS,
    TrainConfig,
)
from mlm_plugin.errors import UserError

PRESETS = sorted((Path(__file__).parents[2] / "presets").glob("*.toml"))
USABLE = TrainConfig().replace(
    pretrained_model_name_or_path="model", output_dir="out", network_alpha=4.0, network_dim=4
)
NO_NETWORK = TrainConfig().replace(pretrained_model_name_or_path="model", output_dir="out")


def test_a_plain_run_passes_without_a_word(caplog):
    check_config(USABLE)
    assert not caplog.records


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_can_run_with_the_defaults_and_have_the_mlm_term(method, caplog):
    config = NO_NETWORK.replace(method=method)
    check_config(config)
    assert not caplog.records
    assert mlm_obstacle(config) is None


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"pretrained_model_name_or_path": None}, ["pretrained_model_name_or_path"]),
        ({"output_dir": None}, ["output_dir"]),
        (
            {"network_train_unet_only": True, "network_train_text_encoder_only": True},
            ["network_train_unet_only", "network_train_text_encoder_only"],
        ),
        (
            {"quantize_unet": "nf4", "method": "dreambooth"},
            ["quantize_unet = 'nf4'", "method = 'dreambooth'", "lora, textual_inversion, xti"],
        ),
        ({"quantize_unet": "int8", "method": "custom_diffusion"}, ["quantize_unet = 'int8'"]),
        ({"dim_from_weights": True}, ["dim_from_weights", "network_weights"]),
        ({"network_dropout": 1.0}, ["network_dropout"]),
        ({"network_args": ("conv_dim",)}, ["network_args", "key=value"]),
        ({"text_encoder_lr": (1e-4, 1e-5, 0.0)}, ["0.0001, 1e-05, 0", "two text encoders"]),
        ({"text_encoder_lr": (1e-4, -1e-5)}, ["text_encoder_lr = -1e-05", "negative"]),
        ({"cache_text_encoder_outputs": True}, ["cache_text_encoder_outputs", "unet_only"]),
        (
            {"cache_text_encoder_outputs": True, "method": "textual_inversion"},
            ["cache_text_encoder_outputs"],
        ),
        ({"unet_lr": -1.0}, ["unet_lr"]),
        (
            {"unet_lr": 0.0, "text_encoder_lr": (0.0,)},
            ["unet_lr and text_encoder_lr are all 0", "nothing would be trained"],
        ),
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
            {"fused_backward_pass": True},
            ["fused_backward_pass", "method = 'lora'", "dreambooth"],
        ),
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
def test_a_contradiction_names_its_options(changes, parts):
    with pytest.raises(UserError) as caught:
        check_config(USABLE.replace(**changes))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "lora", "learning_rate": 0.0}, "learning_rate is 0"),
        (
            {"method": "lora", "unet_lr": 0.0, "text_encoder_lr": (0.0,)},
            "unet_lr and text_encoder_lr are all 0",
        ),
        (
            {"method": "dreambooth", "learning_rate": 0.0, "learning_rate_te": 0.0},
            "learning_rate and learning_rate_te are all 0",
        ),
        (
            {"method": "dreambooth", "learning_rate": 0.0, "no_train_text_encoder": True},
            "learning_rate is 0",
        ),
        ({"method": "textual_inversion", "embedding_lr": 0.0}, "embedding_lr is 0"),
        ({"method": "xti", "learning_rate": 0.0}, "learning_rate is 0"),
        (
            {"method": "custom_diffusion", "learning_rate": 0.0},
            "learning_rate is 0",
        ),
        (
            {
                "method": "pivotal",
                "unet_lr": 0.0,
                "text_encoder_lr": (0.0,),
                "embedding_lr": 0.0,
            },
            "unet_lr and text_encoder_lr and embedding_lr are all 0",
        ),
    ],
)
def test_a_run_whose_rates_are_all_0_is_refused_by_their_names(changes, said):
    with pytest.raises(UserError, match="nothing would be trained") as caught:
        check_config(NO_NETWORK.replace(**changes))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("method", "trained", "untrained"),
    [
        ("lora", {"unet_lr": 1e-4}, {}),
        ("lora", {"text_encoder_lr": (1e-4,)}, {"embedding_lr": 1e-4, "learning_rate_te": 1e-4}),
        ("dreambooth", {"learning_rate_te": 1e-6}, {"unet_lr": 1e-4, "embedding_lr": 1e-4}),
        ("textual_inversion", {"embedding_lr": 5e-4}, {"unet_lr": 1e-4, "learning_rate_te": 1e-4}),
        ("xti", {"embedding_lr": 5e-4}, {"text_encoder_lr": (1e-4,)}),
        ("custom_diffusion", {"embedding_lr": 5e-4}, {"unet_lr": 1e-4}),
        ("pivotal", {"embedding_lr": 5e-4}, {"learning_rate_te": 1e-4}),
    ],
)
def test_a_method_is_trained_by_its_own_rates_alone(method, trained, untrained):
    config = NO_NETWORK.replace(method=method, learning_rate=0.0, mlm_loss_weight=0.0)
    check_config(config.replace(**trained))
    with pytest.raises(UserError, match="nothing would be trained"):
        check_config(config.replace(**untrained))


@pytest.mark.parametrize(
    ("method", "changes", "named"),
    [
        ("lora", {"unet_lr": -1.0}, "unet_lr = -1"),
        ("dreambooth", {"learning_rate_te": -1.0}, "learning_rate_te = -1"),
        ("custom_diffusion", {"learning_rate": -1.0, "embedding_lr": 1.0}, "learning_rate = -1"),
        ("xti", {"embedding_lr": -1.0}, "embedding_lr = -1"),
    ],
)
def test_a_negative_rate_is_refused_by_its_name(method, changes, named):
    with pytest.raises(UserError, match=named):
        check_config(NO_NETWORK.replace(method=method, **changes))


WITHOUT_GRADIENT = [
    ({"network_train_unet_only": True}, "network_train_unet_only"),
    ({"text_encoder_lr": (0.0,)}, "text_encoder_lr = 0"),
    ({"learning_rate": 0.0, "unet_lr": 1e-4}, "learning_rate = 0"),
    (
        {"network_module": "lycoris.kohya", "network_args": ("preset=unet-transformer-only",)},
        "preset=unet-transformer-only",
    ),
    ({"method": "dreambooth", "no_train_text_encoder": True}, "no_train_text_encoder"),
    ({"method": "dreambooth", "learning_rate_te": 0.0}, "learning_rate_te = 0"),
    ({"method": "custom_diffusion", "embedding_lr": 0.0}, "embedding_lr = 0"),
    (
        {"method": "pivotal", "embedding_lr": 0.0, "text_encoder_lr": (0.0,), "unet_lr": 1e-4},
        "text_encoder_lr = 0",
    ),
    (
        {"method": "pivotal", "embedding_lr": 0.0, "network_train_unet_only": True},
        "network_train_unet_only",
    ),
]


@pytest.mark.parametrize(("changes", "named"), WITHOUT_GRADIENT)
def test_mlm_without_a_gradient_is_refused_with_the_reason(changes, named):
    config = USABLE.replace(**changes)
    assert named in mlm_obstacle(config)
    with pytest.raises(UserError, match=named) as caught:
        check_config(config)
    assert "mlm_loss_weight = 0" in str(caught.value)
    check_config(config.replace(mlm_loss_weight=0.0))
    assert mlm_obstacle(USABLE) is None


@pytest.mark.parametrize("method", TOKEN_METHODS)
def test_rows_give_the_mlm_term_its_gradient_whatever_else_is_off(method):
    config = NO_NETWORK.replace(method=method, learning_rate=0.0, embedding_lr=1e-3)
    assert mlm_obstacle(config) is None
    assert mlm_obstacle(config.replace(text_encoder_lr=(0.0,), unet_lr=0.0)) is None
    assert mlm_obstacle(config.replace(network_train_unet_only=True)) is None
    assert mlm_obstacle(config.replace(no_train_text_encoder=True, learning_rate_te=0.0)) is None


def test_pivotal_needs_rows_or_text_encoder_modules_for_the_mlm_term():
    pivotal = NO_NETWORK.replace(method="pivotal")
    assert mlm_obstacle(pivotal.replace(embedding_lr=0.0)) is None
    assert mlm_obstacle(pivotal.replace(network_train_unet_only=True)) is None
    assert mlm_obstacle(pivotal.replace(embedding_lr=0.0, network_train_unet_only=True))


def test_a_method_minds_only_its_own_obstacles():
    dreambooth = NO_NETWORK.replace(method="dreambooth")
    assert mlm_obstacle(dreambooth.replace(network_train_unet_only=True)) is None
    assert mlm_obstacle(dreambooth.replace(text_encoder_lr=(0.0,), embedding_lr=0.0)) is None
    assert mlm_obstacle(dreambooth.replace(learning_rate=0.0, learning_rate_te=1e-6)) is None
    assert mlm_obstacle(dreambooth.replace(learning_rate=0.0)).startswith("learning_rate = 0")
    assert "learning_rate_te" in mlm_obstacle(dreambooth.replace(learning_rate_te=0.0))
    assert mlm_obstacle(USABLE.replace(no_train_text_encoder=True, learning_rate_te=0.0)) is None
    assert mlm_obstacle(USABLE.replace(embedding_lr=0.0)) is None


def test_the_text_encoder_rate_of_a_lora_falls_back_to_learning_rate():
    frozen = USABLE.replace(learning_rate=0.0, unet_lr=1e-4)
    assert mlm_obstacle(frozen).startswith("learning_rate = 0")
    assert mlm_obstacle(frozen.replace(text_encoder_lr=(5e-5,))) is None
    assert mlm_obstacle(USABLE.replace(text_encoder_lr=(0.0,))).startswith("text_encoder_lr = 0")


def test_with_two_text_encoders_one_that_is_trained_is_enough_for_the_mlm_term():
    second = USABLE.replace(text_encoder_lr=(0.0, 1e-4))
    assert mlm_obstacle(second) is None
    assert mlm_obstacle(second, num_text_encoders=1).startswith("text_encoder_lr = 0")
    dreambooth = NO_NETWORK.replace(method="dreambooth", learning_rate_te1=0.0)
    assert mlm_obstacle(dreambooth) is None
    none = dreambooth.replace(learning_rate_te2=0.0)
    assert mlm_obstacle(none).startswith("learning_rate_te1 = 0 and learning_rate_te2 = 0 leaves")
    assert mlm_obstacle(none, num_text_encoders=1) is None  # it has learning_rate_te
    assert mlm_obstacle(dreambooth.replace(learning_rate_te=0.0)).startswith("learning_rate_te1")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [True, True]),
        ({"text_encoder_lr": (1e-4,)}, [True, True]),
        ({"text_encoder_lr": (1e-4, 0.0)}, [True, False]),
        ({"network_train_unet_only": True}, [False, False]),
        ({"method": "dreambooth", "learning_rate_te1": 0.0}, [False, True]),
        (
            {"method": "dreambooth", "learning_rate_te": 0.0, "learning_rate_te1": 1e-6},
            [True, False],
        ),
        ({"method": "dreambooth", "no_train_text_encoder": True}, [False, False]),
        ({"method": "textual_inversion"}, [True, True]),
        ({"method": "pivotal", "text_encoder_lr": (0.0, 0.0)}, [True, True]),
        ({"method": "pivotal", "embedding_lr": 0.0, "text_encoder_lr": (0.0, 1.0)}, [False, True]),
    ],
)
def test_the_mlm_term_reaches_the_text_encoders_before_whose_output_something_is_trained(
    changes, expected
):
    assert trained_text_encoders(NO_NETWORK.replace(**changes), num_text_encoders=2) == expected


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_method_made_of_one_text_encoder_refuses_sdxl(method):
    config = NO_NETWORK.replace(method=method)
    check_model(config, is_sdxl=False)
    if method in SDXL_METHODS:
        check_model(config, is_sdxl=True)
        return
    with pytest.raises(UserError, match=rf"method = '{method}'.* model is SDXL; use one of lora"):
        check_model(config, is_sdxl=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"text_encoder_lr": (1e-4, 1e-5)}, "the second text_encoder_lr"),
        ({"stop_text_encoder2_training": 5}, "stop_text_encoder2_training"),
        ({"method": "dreambooth", "learning_rate_te1": 1e-6}, "learning_rate_te1"),
    ],
)
def test_an_option_of_the_second_text_encoder_is_named_where_there_is_none(changes, named, caplog):
    config = NO_NETWORK.replace(**changes)
    check_model(config, is_sdxl=True)
    assert not caplog.records
    check_model(config, is_sdxl=False)
    assert [record.getMessage().split(" has no effect")[0] for record in caplog.records] == [named]


READERS = {
    **{name: {"lora", "pivotal"} for name, entry in OPTIONS.items() if entry.group == "network"},
    "unet_lr": {"lora", "pivotal"},
    "text_encoder_lr": {"lora", "pivotal"},
    "num_vectors_per_token": set(TOKEN_METHODS),
    "init_word": set(TOKEN_METHODS),
    "weights": set(TOKEN_METHODS),
    "embedding_lr": set(TOKEN_METHODS),
    "stop_embedding_training": set(TOKEN_METHODS),
    "xti_mlm_layers": {"xti"},
    "bundle_embedding": {"pivotal"},
    "delta_lora_rank": {"custom_diffusion"},
    "no_train_text_encoder": {"dreambooth"},
    "learning_rate_te": {"dreambooth"},
    "learning_rate_te1": {"dreambooth"},
    "learning_rate_te2": {"dreambooth"},
    "save_diffusers_folder": {"dreambooth"},
    "stop_text_encoder_training": {"lora", "pivotal", "dreambooth"},
    "stop_text_encoder1_training": {"lora", "pivotal", "dreambooth"},
    "stop_text_encoder2_training": {"lora", "pivotal", "dreambooth"},
    "stop_unet_training": {"lora", "pivotal", "dreambooth", "custom_diffusion"},
}
"""Which methods read an option; those that are not here are read by all."""

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
"""A value that is not the default, where True and 4 are no values."""


PARTNERS = {"dim_from_weights": {"network_weights": "a.safetensors"}}


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("name", READERS)
def test_an_option_is_named_where_the_method_does_not_read_it(name, method, caplog):
    value = VALUES.get(name, True if OPTIONS[name].kind is bool else 4)
    config = NO_NETWORK.replace(method=method, mlm_loss_weight=0.0, **PARTNERS.get(name, {}))
    check_config(config.replace(**{name: value}))
    said = [r.getMessage() for r in caplog.records if f"with method = {method}" in r.getMessage()]
    assert len(said) == (method not in READERS[name])
    assert all(name in message.split(" ha")[0].split(", ") for message in said)


def test_options_of_another_method_are_named_together(caplog):
    check_config(NO_NETWORK.replace(method="xti", network_dim=8, unet_lr=1e-4, network_alpha=8.0))
    check_config(NO_NETWORK.replace(method="dreambooth", init_word=("dog",), embedding_lr=1e-3))
    assert [record.getMessage() for record in caplog.records] == [
        "network_dim, network_alpha, unet_lr have no effect with method = xti",
        "init_word, embedding_lr have no effect with method = dreambooth",
    ]


def test_every_option_of_the_new_groups_says_which_methods_read_it():
    of_data = {"class_prompt", "generate_class_images"}  # regularization images suit all methods
    names = {n for n, entry in OPTIONS.items() if entry.group in ("embedding", "finetune")}
    assert names - of_data <= READERS.keys()


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
        ({"save_last_n_steps_state": 2, "save_every_n_steps": 9}, "without save_state"),
        ({"save_last_n_epochs_state": 2, "save_state": True}, "save_every_n_epochs"),
        ({"save_every_n_epochs": 1, "save_n_epoch_ratio": 3}, "save_every_n_epochs"),
        ({"log_prefix": "a", "log_with": "wandb"}, "logging_dir"),
        ({"log_tracker_name": "a", "log_config": True}, "log_tracker_name, log_config have"),
        ({"wandb_run_name": "a", "logging_dir": "logs"}, "wandb"),
        ({"sample_sampler": "euler_a"}, "sample_prompts"),
        (
            {"mlm_loss_weight": 0.0, "mlm_batch_size": 4, "mlm_prompt_syntax": "tags"},
            "mlm_batch_size, mlm_prompt_syntax have no effect without mlm_loss_weight",
        ),
        ({"mlm_prompt_syntax": "tags", "mlm_prompt_set": "captions"}, "captions"),
        ({"mlm_prompt_syntax": "tags", "mlm_prompt_set": "a/{b}.txt"}, "a/{b}.txt"),
        ({"class_prompt": "a dog"}, "class_prompt has no effect without generate_class_images"),
        (
            {"mlm_loss_weight": 0.0, "mlm_joint_share": 0.1},
            "mlm_joint_share has no effect without mlm_loss_weight",
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
        {"save_last_n_steps_state": 2, "save_every_n_steps": 9, "save_state": True},
        {"log_prefix": "a", "logging_dir": "logs"},
        {"wandb_run_name": "a", "log_with": "wandb", "log_config": True},
        {"mlm_prompt_syntax": "tags", "mlm_prompt_set": "living"},
        {"seed": 2**32 - 1},
        {"lr_warmup_steps": 50, "lr_scheduler": "cosine", "max_train_steps": 50},
        {
            "lr_warmup_steps": 50,
            "lr_scheduler": "cosine",
            "max_train_steps": 3,
            "max_train_epochs": 9,
        },
    ],
)
def test_a_setting_that_is_read_is_not_complained_of(changes, caplog):
    check_config(USABLE.replace(**changes))
    assert not caplog.records


def test_what_a_frozen_text_encoder_leaves_unread_is_named(caplog):
    config = NO_NETWORK.replace(method="dreambooth", no_train_text_encoder=True)
    config = config.replace(mlm_loss_weight=0.0, save_diffusers_folder=True)
    check_config(config)
    assert not caplog.records
    check_config(config.replace(learning_rate_te=1e-6, stop_text_encoder_training=0.5))
    (record,) = caplog.records
    assert record.getMessage() == (
        "learning_rate_te, stop_text_encoder_training have no effect with no_train_text_encoder"
    )


@pytest.mark.parametrize("method", ["dreambooth", "textual_inversion", "xti", "custom_diffusion"])
def test_the_scale_of_a_network_is_no_matter_where_none_is_trained(method, caplog):
    check_config(NO_NETWORK.replace(method=method, network_dim=32))
    assert "network_alpha is 1" not in caplog.text


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
