"""Every kohya option is known, and the declarations agree with kohya's parser."""

import json
from pathlib import Path

import pytest

from mlm_plugin.config.loading import coerce
from mlm_plugin.config.options import (
    ALIASES,
    GROUPS,
    NO_EFFECT,
    OPTIONS,
    REFUSED,
    SWITCH_ALIASES,
    TrainConfig,
    known_names,
)
from mlm_plugin.errors import UserError

REFERENCE = Path(__file__).parents[3] / "shared" / "reference" / "kohya_args.json"

ALWAYS_CHECKED = {
    # name: (default, choices); taken from train_network.py's parser at sd-scripts 48d368fa
    "learning_rate": (2e-6, None),
    "max_train_steps": (1600, None),
    "network_alpha": (1.0, None),
    "max_grad_norm": (1.0, None),
    "lr_scheduler": ("constant", None),
    "caption_extension": (".caption", None),
    "max_data_loader_n_workers": (8, None),
    "mixed_precision": ("no", ("no", "fp16", "bf16")),
    "loss_type": ("l2", ("l1", "l2", "huber", "smooth_l1")),
    "multires_noise_discount": (0.3, None),
    "huber_c": (0.1, None),
    "sample_sampler": ("ddim", None),
    "bucket_reso_steps": (64, None),
    "prior_loss_weight": (1.0, None),
    "save_model_as": ("safetensors", ("safetensors", "ckpt", "pt")),
}

EXTRA_IN_GUI_TOMLS = (
    "epoch",
    "noise_offset_type",
    "train_inpainting",
    "mem_eff_save",
    "stop_text_encoder_training",
    "dynamo_backend",
)


@pytest.mark.parametrize("name", ALWAYS_CHECKED)
def test_default_and_choices_are_kohyas(name):
    default, choices = ALWAYS_CHECKED[name]
    assert OPTIONS[name].default == default
    if choices:
        assert OPTIONS[name].choices == choices


@pytest.mark.parametrize("name", EXTRA_IN_GUI_TOMLS)
def test_what_guis_write_besides_is_known(name):
    assert name in known_names()


def kohya_options():
    if not REFERENCE.exists():
        return []
    reference = json.loads(REFERENCE.read_text())
    groups = reference["scripts"]["train_network"]
    return [entry for group in groups for entry in reference["groups"][group]]


@pytest.mark.skipif(not REFERENCE.exists(), reason="shared/reference/kohya_args.json is absent")
def test_every_option_of_train_network_is_known_with_kohyas_default():
    entries = kohya_options()
    assert len(entries) == 193
    ours = {"network_module": "networks.lora"}
    for entry in entries:
        name = entry["flag"].removeprefix("--")
        assert name in known_names()
        if name in ALIASES or name in SWITCH_ALIASES:
            continue
        declared = OPTIONS.get(name) or NO_EFFECT.get(name) or REFUSED[name]
        assert (declared.default or None) == (ours.get(name) or entry.get("default") or None), name


@pytest.mark.skipif(not REFERENCE.exists(), reason="shared/reference/kohya_args.json is absent")
def test_types_and_choices_contain_kohyas():
    for entry in kohya_options():
        declared = OPTIONS.get(entry["flag"].removeprefix("--"))
        if declared is None:
            continue
        assert entry["type"] in (declared.kind.__name__, "int_or_float", "Path"), declared.name
        assert declared.many == (entry.get("nargs") == "*"), declared.name
        kohyas = {choice for choice in (entry.get("choices") or ()) if choice is not None}
        assert kohyas <= set(declared.choices or ()), declared.name


def test_an_option_is_in_one_table_only():
    tables = [OPTIONS, NO_EFFECT, REFUSED, ALIASES, SWITCH_ALIASES]
    assert sum(len(table) for table in tables) == len(known_names())


def test_every_option_and_every_reason_is_explained():
    for entry in OPTIONS.values():
        assert entry.help.endswith((".", ")")), entry.name
    for name, entry in (NO_EFFECT | REFUSED).items():
        assert len(entry.reason) > 10, name


def test_defaults_are_allowed_by_their_own_declaration():
    for entry in OPTIONS.values():
        if entry.default is not None and entry.choices is not None:
            assert entry.default in entry.choices, entry.name
        if entry.default is not None and entry.at_least is not None:
            assert entry.default >= entry.at_least, entry.name


def test_flat_form_holds_every_kohya_name_and_round_trips():
    config = TrainConfig().replace(network_dim=8, mlm_seed=3, unet_lr=1e-4)
    flat = config.to_flat()
    assert flat["network_dim"] == 8
    assert flat["lowram"] is False
    assert flat["validation_split"] == 0.0
    assert TrainConfig.from_flat({name: flat[name] for name in OPTIONS}) == config
    assert config.changed() == {"network_dim": 8, "mlm_seed": 3, "unet_lr": 1e-4}


def test_groups_are_the_attributes_of_the_config():
    config = TrainConfig()
    assert {group: type(getattr(config, group)) for group in GROUPS} == GROUPS
    with pytest.raises(AttributeError):
        config.mlm.mlm_seed = 1


@pytest.mark.parametrize(
    "name",
    [
        "scale_weight_norms",
        "network_alpha",
        "noise_offset",
        "ip_noise_gamma",
        "multires_noise_discount",
        "seed",
    ],
)
def test_a_negative_number_is_refused_where_it_has_no_meaning(name):
    with pytest.raises(UserError, match=f"{name} = -1 .*at least 0"):
        coerce(OPTIONS[name], -1, place="test")


def test_the_zero_of_a_gui_is_read_as_it_means():
    assert coerce(OPTIONS["scale_weight_norms"], 0, place="test") is None
    for zero in (0, "0"):
        assert coerce(OPTIONS["vae_batch_size"], zero, place="test") == 1
    with pytest.raises(UserError, match="vae_batch_size"):
        coerce(OPTIONS["vae_batch_size"], -1, place="test")
