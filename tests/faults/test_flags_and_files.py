"""Flags win over the file in every spelling; what a file cannot have is named for what it is."""

import argparse
import logging

import pytest

from mlm_plugin.config.loading import load_config
from mlm_plugin.config.options import OPTIONS
from mlm_plugin.errors import UserError
from mlm_plugin.methods.checks import check_config
from mlm_plugin.sd_scripts.arguments import add_mlm_arguments, answer_in_one_line

SWITCHES = [name for name, entry in OPTIONS.items() if entry.kind is bool]

SUPERSEDED = {  # a flag: (key of the file that would replace it)
    ("max_train_steps", 10): ("max_train_epochs", 4),
    ("save_every_n_epochs", 2): ("save_n_epoch_ratio", 3),
    ("sample_every_n_steps", 5): ("sample_every_n_epochs", 1),
    ("lr_scheduler", "cosine"): ("lr_scheduler_type", "CosineAnnealingLR"),
    ("keep_tokens", 2): ("keep_tokens_separator", "|||"),
    ("train_data_dir", "pictures"): ("dataset_config", "data.toml"),
}


@pytest.fixture
def from_file(tmp_path):
    """``from_file(text, *flags)``: the options of a TOML and flags."""

    def read(text, *flags):
        path = tmp_path / "run.toml"
        path.write_text(text)
        return load_config(["--config_file", str(path), *flags]).to_flat()

    return read


@pytest.mark.parametrize("flag", SUPERSEDED, ids=str)
def test_a_flag_wins_over_the_key_that_would_replace_it(flag, from_file, caplog):
    (name, value), (stronger, given) = flag, SUPERSEDED[flag]
    text = f"{stronger} = {given!r}"
    assert from_file(text)[stronger] == given
    flat = from_file(text, f"--{name}", str(value))
    assert flat[name] == value
    assert flat[stronger] == OPTIONS[stronger].default
    assert f"{name} = {value} takes the place of {stronger}" in caplog.text


def test_of_two_flags_and_of_two_keys_the_stronger_one_stays(from_file):
    both = from_file("", "--max_train_steps", "10", "--max_train_epochs", "2")
    assert both["max_train_epochs"] == 2
    assert from_file("max_train_steps = 10\nmax_train_epochs = 2")["max_train_epochs"] == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"max_train_steps": 10, "max_train_epochs": 2},
        {"sample_every_n_steps": 3, "sample_every_n_epochs": 1, "sample_prompts": "p.txt"},
        {"keep_tokens": 1, "keep_tokens_separator": "|||"},
    ],
    ids=str,
)
def test_an_option_that_another_replaces_is_said_to_have_no_effect(changes, caplog):
    needed = {"pretrained_model_name_or_path": "m", "output_dir": "o", "mlm_loss_weight": 0.1}
    check_config(load_config([]).replace(**needed, **changes))
    assert f"{next(iter(changes))} has no effect" in caplog.text


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("off", ["--no-{}", "--no_{}", "--{}=false", "--{} False", "--{}=0"])
def test_a_switch_of_the_file_is_turned_off_by_a_flag(name, off, from_file):
    if name in ("output_config", "allow_unknown_keys"):
        pytest.skip("decides how the file is read")
    assert from_file(f"{name} = true")[name] is True
    assert from_file(f"{name} = true", *off.format(name).split())[name] is False


@pytest.mark.parametrize("on", ["--{}", "--{}=true", "--{} 1"])
def test_a_switch_is_turned_on_by_a_flag(on, from_file):
    assert from_file("flip_aug = false", *on.format("flip_aug").split())["flip_aug"] is True
    assert from_file("", *on.format("lowram").split())["lowram"] is False  # known, without effect


@pytest.mark.parametrize("wrong", ["--flip_aug=maybe", "--flip_aug=2", "--no_flip_aug=true"])
def test_a_switch_with_another_value_is_refused_in_one_line(wrong):
    with pytest.raises(UserError, match="flip_aug") as caught:
        load_config([wrong])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["LoRA_type", "max_resolution", "multi_gpu", "sdxl"])
def test_a_field_of_the_gui_is_named_as_one(field, from_file):
    with pytest.raises(UserError, match=f"{field}.*kohya_ss GUI.*convert-preset"):
        from_file(f"{field} = 'x'")
    assert from_file(f"{field} = 'x'", "--allow_unknown_keys")["network_dim"] is None


@pytest.mark.parametrize("key", ["netwrk_dim", "zzzz", "clipskip"])
def test_an_unknown_key_comes_with_the_way_around_it(key, from_file):
    with pytest.raises(UserError, match=f"unknown key '{key}'.*allow_unknown_keys = true"):
        from_file(f"{key} = 1")


# --- inside sd-scripts ----------------------------------------------------------------------


@pytest.fixture
def host_parser():
    """A parser with an option of kohya's and ours."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_train_steps", type=int, default=1600)
    parser.add_argument("--optimizer_type", choices=["AdamW", "Lion"])
    add_mlm_arguments(parser)
    answer_in_one_line(parser)
    return parser


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--mlm_los_weight=1", "did you mean --mlm_loss_weight"),
        ("--max_train_stepz=1", "did you mean --max_train_steps"),
        ("--metod=lora", "did you mean --method"),
        ("--max_train_steps=x", "max_train_steps: invalid int value: 'x'"),
        ("--optimizer_type=Adam", "'AdamW', 'Lion'"),
    ],
)
def test_a_mistyped_flag_inside_sd_scripts_is_one_line(flag, part, host_parser, capsys):
    with pytest.raises(UserError) as caught:
        host_parser.parse_args([flag])
    assert part in str(caught.value).replace("AdamW, Lion", "'AdamW', 'Lion'")
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["method", "mlm_arch", "mlm_target", "mlm_read_at"])
def test_the_help_inside_sd_scripts_lists_the_choices(name, host_parser):
    text = " ".join(host_parser.format_help().split())
    assert ", ".join(OPTIONS[name].choices) in text


@pytest.fixture(autouse=True)
def _warnings(caplog):
    caplog.set_level(logging.WARNING)
