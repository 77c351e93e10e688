"""GUI presets become TOMLs that load; nothing is dropped silently."""

import json
from pathlib import Path

import pytest

from mlm_plugin.config.gui_presets import convert_preset, run_convert_preset
from mlm_plugin.config.loading import config_from_values, load_config
from mlm_plugin.errors import UserError

PRESETS = Path(__file__).parents[3] / "shared" / "data" / "kohya_gui_presets"
SHIPPED = sorted(PRESETS.glob("*.json")) if PRESETS.is_dir() else []

PRESET = {
    "LoRA_type": "Standard",
    "adaptive_noise_scale": 0.005,
    "additional_parameters": '--max_grad_norm=0.5 --training_comment "two words" --new_flag 3',
    "bucket_reso_steps": "64.0",
    "caption_dropout_every_n_epochs": 0.0,
    "caption_extension": ".txt",
    "clip_skip": "2",
    "conv_dim": 8,
    "down_lr_weight": "",
    "enable_bucket": True,
    "epoch": 12,
    "fp8_base": True,
    "learning_rate": "0.0001",
    "lora_network_weights": "D:/loras\\old.safetensors",
    "lr_scheduler": "cosine",
    "lr_scheduler_num_cycles": "",
    "lr_warmup": 10,
    "max_data_loader_n_workers": "0",
    "max_resolution": "512,650",
    "max_token_length": "75",
    "max_train_epochs": "",
    "max_train_steps": "",
    "min_snr_gamma": 5,
    "multires_noise_iterations": 6,
    "network_alpha": 16,
    "network_dim": 32,
    "noise_offset": "0.05",
    "noise_offset_type": "Original",
    "num_cpu_threads_per_process": 2,
    "optimizer": "AdamW8bit",
    "optimizer_args": '"weight_decay=0.1" "betas=0.9,0.99"',
    "rank_dropout": 0.1,
    "sample_prompts": "a dog --w 512",
    "scale_weight_norms": 0,
    "seed": "",
    "stop_text_encoder_training": 0,
    "text_encoder_lr": "5e-05",
    "unet_lr": "0.0001",
    "vae_batch_size": 0,
    "xformers": "sdpa",
}


@pytest.mark.parametrize(
    ("split", "expected"),
    [(0, {}), ("0.2", {"validation_split": 0.2, "validate_every_n_steps": 50})],
)
def test_zeros_of_the_validation_fields_mean_nothing(split, expected):
    unset = dict.fromkeys(("validation_seed", "validate_every_n_epochs", "max_validation_steps"), 0)
    every = 50 if expected else 0
    fields = {"validation_split": split, "validate_every_n_steps": every, **unset}
    values, warnings = convert_preset(fields)
    assert {name: value for name, value in values.items() if name.startswith("valid")} == expected
    assert not [warning for warning in warnings if "valid" in warning]


@pytest.mark.parametrize(
    ("percent", "expected", "num_warnings"),
    [(30, 0.3, 0), ("60", 0.6, 0), (0, None, 0), (100, None, 0), (-1, None, 1)],
)
def test_the_stop_of_the_text_encoder_is_a_percentage(percent, expected, num_warnings):
    values, warnings = convert_preset({"stop_text_encoder_training": percent})
    assert values.get("stop_text_encoder_training") == expected
    assert len([w for w in warnings if "stop_text_encoder" in w]) == num_warnings


def test_gui_fields_become_the_options_the_gui_would_pass():
    values, _ = convert_preset(PRESET)
    assert values == {
        "caption_extension": ".txt",
        "clip_skip": 2,
        "enable_bucket": True,
        "learning_rate": 1e-4,
        "network_weights": "D:/loras\\old.safetensors",
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 0.1,
        "max_data_loader_n_workers": 0,
        "resolution": "512,650",
        "max_train_epochs": 12,
        "min_snr_gamma": 5.0,
        "network_alpha": 16.0,
        "network_dim": 32,
        "network_args": ["rank_dropout=0.1"],
        "noise_offset": 0.05,
        "adaptive_noise_scale": 0.005,
        "optimizer_type": "AdamW8bit",
        "optimizer_args": ["weight_decay=0.1", "betas=0.9,0.99"],
        "text_encoder_lr": [5e-5],
        "unet_lr": 1e-4,
        "sdpa": True,
        "max_grad_norm": 0.5,
        "training_comment": "two words",
    }


def test_what_is_left_out_is_named():
    _, warnings = convert_preset(PRESET)
    text = "\n".join(warnings)
    for name in ("fp8_base", "sample_prompts", "--new_flag"):
        assert name in text
    assert len(warnings) == 3


@pytest.mark.parametrize(
    ("fields", "module", "arguments"),
    [
        (
            {"LoRA_type": "Kohya LoCon", "conv_dim": 8, "conv_alpha": 4},
            None,
            ["conv_dim=8", "conv_alpha=4"],
        ),
        (
            {
                "LoRA_type": "LyCORIS/LoKr",
                "conv_dim": 8,
                "factor": 6,
                "use_cp": True,
                "use_scalar": False,
            },
            "lycoris.kohya",
            ["algo=lokr", "preset=full", "conv_dim=8", "factor=6", "use_cp=True"],
        ),
        (
            {"LoRA_type": "LyCORIS/iA3", "LyCORIS_preset": "attn-only", "train_on_input": True},
            "lycoris.kohya",
            ["algo=ia3", "preset=attn-only", "train_on_input=True"],
        ),
        ({"LoRA_type": "LoRA-FA"}, "networks.lora_fa", None),
    ],
)
def test_the_lora_type_becomes_module_and_arguments(fields, module, arguments):
    values, _ = convert_preset(fields)
    assert values.get("network_module") == module
    assert values.get("network_args") == arguments


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"epoch": 5, "max_train_steps": "160"}, {"max_train_steps": 160}),
        ({"epoch": 5, "max_train_epochs": 0, "max_train_steps": 0}, {"max_train_epochs": 5}),
        ({"epoch": 5, "max_train_epochs": "3"}, {"max_train_epochs": 3}),
    ],
)
def test_the_length_of_the_run_is_the_guis(fields, expected):
    values, _ = convert_preset(fields)
    assert {n: v for n, v in values.items() if n.startswith("max_train")} == expected


def test_only_the_chosen_noise_is_passed_on():
    fields = {"noise_offset": 0.05, "multires_noise_iterations": 6}
    assert set(convert_preset(fields | {"noise_offset_type": "Original"})[0]) == {"noise_offset"}
    chosen = convert_preset(fields | {"noise_offset_type": "Multires"})[0]
    assert set(chosen) == {"multires_noise_iterations"}


def test_a_text_encoder_rate_of_zero_trains_the_unet_only():
    values, warnings = convert_preset({"text_encoder_lr": 0, "unet_lr": 1e-4})
    assert values["network_train_unet_only"] is True
    assert not warnings, "the term is read at the U-Net's cross-attention"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--use_8bit_adam", {"optimizer_type": "AdamW8bit"}),
        ("--use_lion_optimizer --max_grad_norm 0.5", {"optimizer_type": "Lion"}),
        ("--token_string sks", {"placeholder_token": ["sks"]}),
        ("--caption_extention .caption", {"caption_extension": ".caption"}),
        ('--training_comment "don\'t"', {}),
    ],
)
def test_old_spellings_in_the_free_text_box_are_understood(text, expected):
    values, _ = convert_preset({"optimizer": "AdamW", "additional_parameters": text})
    assert expected.items() <= values.items()


@pytest.mark.parametrize("text", ["--training_comment don't", '--max_grad_norm "1'])
def test_a_free_text_box_that_is_no_command_line_is_an_error(refused, text):
    with refused(["additional_parameters", repr(text), "quotation"]):
        convert_preset({"additional_parameters": text})


def test_warmup_is_left_out_for_the_constant_scheduler():
    values, warnings = convert_preset({"lr_warmup": 5, "lr_scheduler": "constant"})
    assert "lr_warmup_steps" not in values
    assert "lr_warmup" in warnings[0]


def test_a_field_of_the_wrong_type_is_an_error():
    with pytest.raises(UserError, match="network_dim"):
        convert_preset({"network_dim": "many"})
    with pytest.raises(UserError, match="unet_lr"):
        convert_preset({"unet_lr": "fast"})


def test_the_command_writes_a_toml_that_loads(tmp_path, capsys):
    pytest.importorskip("tomli_w")
    source = tmp_path / "my preset.json"
    source.write_text(json.dumps(PRESET))
    assert run_convert_preset([str(source)]) == 0
    printed = capsys.readouterr().out
    assert "fp8_base" in printed
    target = tmp_path / "my preset.toml"
    assert str(target) in printed
    config = load_config(["--config_file", str(target)])
    assert config == config_from_values(convert_preset(PRESET)[0], place="preset").replace(
        config_file=str(target)
    )
    with pytest.raises(UserError, match="exists already"):
        run_convert_preset([str(source)])


def test_switches_of_sdxl_count_in_a_preset_for_sdxl_only():
    switches = {"sdxl_no_half_vae": True, "sdxl_cache_text_encoder_outputs": True}
    values, warnings = convert_preset({"sdxl": True, "network_dim": 8, **switches})
    assert values["no_half_vae"]
    assert values["cache_text_encoder_outputs"]
    assert not warnings
    values, _ = convert_preset({"sdxl": False, "network_dim": 8, **switches})
    assert not values.keys() & {"no_half_vae", "cache_text_encoder_outputs"}


def test_an_unreadable_preset_is_one_line(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UserError, match=r"broken\.json"):
        run_convert_preset([str(broken)])
    with pytest.raises(UserError, match=r"gone\.json"):
        run_convert_preset([str(tmp_path / "gone.json")])


@pytest.mark.skipif(not SHIPPED, reason="shared/data/kohya_gui_presets is absent")
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_preset_converts_and_loads(path, caplog):
    values, warnings = convert_preset(json.loads(path.read_text()))
    config = config_from_values(values, place=path.name)
    assert config.network.network_dim
    assert config.optimizer.learning_rate > 0
    assert not caplog.records
    foreign = path.stem.startswith("flux")
    assert any("does not load" in warning for warning in warnings) == foreign
