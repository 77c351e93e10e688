"""Flags override the TOML, values get their types, errors name place, key and remedy."""

import logging
import subprocess
import sys
import time

import pytest

from mlm_plugin.config.loading import (
    load_config,
    options_markdown,
    parser,
    write_config,
)
from mlm_plugin.config.options import NO_EFFECT, OPTIONS, REFUSED, TrainConfig
from mlm_plugin.config.toml_files import read_toml
from mlm_plugin.errors import UserError

# What kohya_ss v26 writes for an SD 1.5 LoRA (config_lora-<time>.toml).
GUI_TOML = """
bucket_no_upscale = true
bucket_reso_steps = 64
cache_latents = true
caption_extension = ".txt"
clip_skip = 1
dynamo_backend = "no"
enable_bucket = true
epoch = 10
gradient_accumulation_steps = 1.0
huber_c = 0.1
huber_schedule = "snr"
keep_tokens = 1
loss_type = "l2"
lr_scheduler = "cosine"
lr_scheduler_args = []
lr_scheduler_num_cycles = 1
lr_scheduler_power = 1
lr_warmup_steps = 160
max_bucket_reso = 2048
max_data_loader_n_workers = 0
max_grad_norm = 1
max_timestep = 1000
max_token_length = 75
max_train_steps = 1600
min_bucket_reso = 256
mixed_precision = "bf16"
network_alpha = 16
network_args = [ "rank_dropout=0.1",]
network_dim = 32
network_module = "networks.lora"
noise_offset_type = "Original"
optimizer_args = [ "weight_decay=0.1", "betas=0.9,0.99",]
optimizer_type = "AdamW8bit"
output_dir = "C:/loras"
output_name = "toy"
persistent_data_loader_workers = 1
pretrained_model_name_or_path = "runwayml/stable-diffusion-v1-5"
prior_loss_weight = 1
resolution = "512,512"
sample_sampler = "euler_a"
save_every_n_epochs = 1
save_model_as = "safetensors"
save_precision = "bf16"
seed = 42
text_encoder_lr = 5e-5
train_batch_size = 2
train_data_dir = "C:/pictures"
unet_lr = 0.0001
xformers = true
"""


@pytest.fixture
def toml(tmp_path):
    def write(text, name="run.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def load(path, *flags):
    return load_config(["--config_file", path, *flags])


def error_of(*argv):
    with pytest.raises(UserError) as caught:
        load_config(list(argv))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_flags_win_over_toml_and_toml_over_defaults(toml):
    path = toml("network_dim = 8\nunet_lr = 1e-4\nshuffle_caption = true\nseed = 1")
    config = load(path, "--network_dim", "16", "--no-shuffle_caption")
    assert config.network.network_dim == 16
    assert config.optimizer.unet_lr == 1e-4
    assert config.dataset.shuffle_caption is False
    assert config.schedule.seed == 1
    assert config.schedule.max_train_steps == 1600


def test_a_gui_toml_loads_with_every_type_right(toml, caplog):
    config = load(toml(GUI_TOML))
    assert config.schedule.gradient_accumulation_steps == 1
    assert isinstance(config.schedule.gradient_accumulation_steps, int)
    assert config.schedule.persistent_data_loader_workers is True
    assert config.model.max_token_length is None
    assert config.optimizer.text_encoder_lr == (5e-5,)
    assert config.optimizer.optimizer_args == ("weight_decay=0.1", "betas=0.9,0.99")
    assert config.optimizer.lr_scheduler_args == ()
    assert config.optimizer.lr_warmup_steps == 160
    assert isinstance(config.network.network_alpha, float)
    named = [record.getMessage().split(":")[1].split()[0] for record in caplog.records]
    assert named == ["epoch", "noise_offset_type"]


def test_extension_is_added_and_sections_are_flattened(toml, tmp_path):
    toml("[network]\nnetwork_dim = 8\n[anything]\nseed = 3\n")
    config = load(str(tmp_path / "run"))
    assert (config.network.network_dim, config.schedule.seed) == (8, 3)
    assert config.run.config_file == str(tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("line", "name", "expected"),
    [
        ('learning_rate = "1e-4"', "learning_rate", 1e-4),
        ("learning_rate = 1", "learning_rate", 1.0),
        ("resolution = 512", "resolution", "512"),
        ("resolution = [512, 768]", "resolution", "512,768"),
        ("max_token_length = 75", "max_token_length", None),
        ('max_token_length = "225"', "max_token_length", 225),
        ("gradient_checkpointing = 1", "gradient_checkpointing", True),
        ('gradient_checkpointing = "false"', "gradient_checkpointing", False),
        ("train_batch_size = 4.0", "train_batch_size", 4),
        ('seed = ""', "seed", None),
        ('reg_data_dir = ""', "reg_data_dir", None),
        ("text_encoder_lr = 5e-5", "text_encoder_lr", (5e-5,)),
        ("text_encoder_lr = [1e-5, 2e-5]", "text_encoder_lr", (1e-5, 2e-5)),
        (
            'network_args = "conv_dim=4 conv_alpha=1"',
            "network_args",
            ("conv_dim=4", "conv_alpha=1"),
        ),
        ('lr_warmup_steps = "10%"', "lr_warmup_steps", 0.1),
        ("lr_warmup_steps = 0.05", "lr_warmup_steps", 0.05),
        ("lr_warmup_steps = 100.0", "lr_warmup_steps", 100),
        ("save_every_n_epochs = 0", "save_every_n_epochs", None),
        ("face_crop_aug_range = [1.0, 3.0]", "face_crop_aug_range", "1.0,3.0"),
        ("output_name = 12", "output_name", "12"),
        ('caption_extention = ".txt"', "caption_extension", ".txt"),
        ('token_string = "sks"', "placeholder_token", ("sks",)),
        ('token_string = ["sks", "ohwx"]', "placeholder_token", ("sks", "ohwx")),
        ('placeholder_token = "sks"', "placeholder_token", ("sks",)),
        ('placeholder_token = "my pet"', "placeholder_token", ("my pet",)),
        ('placeholder_token = ""', "placeholder_token", None),
        ("placeholder_token = []", "placeholder_token", None),
        ('class_token = "duck toy"', "class_token", ("duck toy",)),
        ('class_token = ["dog", "duck toy"]', "class_token", ("dog", "duck toy")),
        ('init_word = "duck toy"', "init_word", ("duck toy",)),
        ('init_word = ["dog", "id:42170"]', "init_word", ("dog", "id:42170")),
        ("weights = 'C:\\rows\\my rows.pt'", "weights", ("C:\\rows\\my rows.pt",)),
        ("embedding_lr = 0", "embedding_lr", 0.0),
        ("learning_rate_te = 0", "learning_rate_te", 0.0),
        ("generate_class_images = 0", "generate_class_images", None),
        ("delta_lora_rank = 0", "delta_lora_rank", None),
        ("stop_text_encoder_training = 0", "stop_text_encoder_training", None),
        ("stop_text_encoder_training = 0.0", "stop_text_encoder_training", None),
        ('stop_text_encoder_training = "0"', "stop_text_encoder_training", None),
        ('stop_text_encoder_training = ""', "stop_text_encoder_training", None),
        ("stop_text_encoder_training = 300", "stop_text_encoder_training", 300),
        ("stop_text_encoder_training = 300.0", "stop_text_encoder_training", 300),
        ("stop_text_encoder_training = 0.6", "stop_text_encoder_training", 0.6),
        ('stop_text_encoder_training = "60%"', "stop_text_encoder_training", 0.6),
        ('stop_embedding_training = "50%"', "stop_embedding_training", 0.5),
        ('stop_embedding_training = "0%"', "stop_embedding_training", None),
        ("stop_unet_training = 1", "stop_unet_training", 1),
        ("use_8bit_adam = true", "optimizer_type", "AdamW8bit"),
        ("use_lion_optimizer = true", "optimizer_type", "Lion"),
        ("use_8bit_adam = false", "optimizer_type", ""),
    ],
)
def test_toml_values_reach_the_declared_type(toml, line, name, expected):
    value = load(toml(line)).to_flat()[name]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("netwrk_dim = 4", ["run.toml", "'netwrk_dim'", "did you mean network_dim"]),
        ('network_dim = "four"', ["run.toml", "network_dim", "'four'", "whole number"]),
        ("network_dim = 4.5", ["network_dim", "4.5", "whole number"]),
        ("network_dim = 0", ["network_dim", "at least 1"]),
        ("network_dim = true", ["network_dim", "True", "whole number"]),
        ("output_name = true", ["output_name", "text"]),
        ("shuffle_caption = 2", ["shuffle_caption", "true or false"]),
        ('shuffle_caption = "yes"', ["shuffle_caption", "true or false"]),
        ("learning_rate = nan", ["learning_rate", "number"]),
        ('mixed_precision = "fp8"', ["mixed_precision", "'fp8'", "no, fp16, bf16"]),
        ('quantize_unet = "fp8"', ["quantize_unet", "'fp8'", "no, int8, nf4"]),
        ("max_token_length = 77", ["max_token_length", "75, 150, 225"]),
        ("lr_warmup_steps = 1.5", ["lr_warmup_steps", "ratio"]),
        ("stop_unet_training = 1.5", ["stop_unet_training", "1.5", "ratio below 1"]),
        ("stop_unet_training = -1", ["stop_unet_training", "-1", "ratio below 1"]),
        ('stop_unet_training = "late"', ["stop_unet_training", "'late'", "percentage"]),
        ('stop_unet_training = "100%"', ["stop_unet_training", "'100%'", "percentage"]),
        ("stop_unet_training = true", ["stop_unet_training", "True"]),
        ('method = "ti"', ["method", "'ti'", "lora, dreambooth, textual_inversion, xti"]),
        ("num_vectors_per_token = 0", ["num_vectors_per_token", "at least 1"]),
        ('token_string = "sks"\nplaceholder_token = "ohwx"', ["token_string", "placeholder_token"]),
        ("class_token = [1, [2]]", ["class_token", "a list; each item text"]),
        ("optimizer_args = [[1]]", ["optimizer_args", "list"]),
        ("[network.deep]\nnetwork_dim = 4", ["'deep'"]),
        ("[[datasets]]\nresolution = 512", ["--dataset_config"]),
        ("fp8_base = true", ["fp8_base", "quantize_unet = 'int8'"]),
        ('in_json = "meta.json"', ["in_json", "metadata_file", "dataset_config"]),
        ('base_weights = ["a"]', ["base_weights", "merge"]),
        ("validation_split = -0.1", ["validation_split", "-0.1", "at least 0"]),
        ("validate_every_n_steps = -1", ["validate_every_n_steps", "-1", "at least 1"]),
        ("max_validation_steps = 0", ["max_validation_steps", "at least 1"]),
        ('vae = "C:\\new\\temp"', ["vae", "single quotes"]),
        ('use_8bit_adam = true\noptimizer_type = "Lion"', ["use_8bit_adam", "optimizer_type"]),
    ],
)
def test_an_error_names_file_key_value_and_what_is_allowed(toml, line, parts):
    message = error_of("--config_file", toml(line))
    assert "run.toml" in message
    for part in parts:
        assert part in message


def test_a_key_in_two_sections_is_an_error_naming_both(toml):
    message = error_of("--config_file", toml("[a]\nseed = 1\n[b]\nseed = 1\n"))
    assert "seed" in message
    assert "[a]" in message
    assert "[b]" in message


def test_broken_toml_names_file_and_line_and_hints_at_backslashes(toml):
    message = error_of("--config_file", toml('seed = 1\nvae = "C:\\Users\\me"\n'))
    assert "run.toml" in message
    assert "line 2" in message
    assert "single quotes" in message
    assert read_toml(toml("vae = 'C:\\Users\\me'"))["vae"] == "C:\\Users\\me"


def test_a_byte_order_mark_is_not_an_error(tmp_path):
    path = tmp_path / "notepad.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 5\n")
    assert load(str(path)).schedule.seed == 5


def test_a_missing_config_file_is_named():
    assert "nowhere.toml" in error_of("--config_file", "nowhere")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--netwrk_dim", "4"], ["--netwrk_dim", "--network_dim"]),
        (["--network-dim=4"], ["--network_dim"]),
        (["--no-shuffle"], ["--no_shuffle_caption"]),
        (["--network_dim"], ["--network_dim", "argument"]),
        (["--network_dim", "x"], ["command line", "network_dim"]),
        (["stray"], ["'stray'"]),
        (["--deepspeed"], ["deepspeed", "accelerate"]),
        (["--cache_text_encoder_outputs_to_disk"], ["use cache_text_encoder_outputs"]),
        (["--dataset_class", "my.Data"], ["dataset_class"]),
    ],
)
def test_a_wrong_flag_is_one_line_with_the_nearest_one(argv, parts):
    message = error_of(*argv)
    for part in parts:
        assert part in message


def test_unknown_keys_and_flags_become_warnings_on_request(toml, caplog):
    path = toml("allow_unknown_keys = true\nnetwrk_dim = 4\nseed = 2")
    assert load(path, "--unheard_of", "3").schedule.seed == 2
    text = caplog.text
    assert "netwrk_dim" in text
    assert "--unheard_of" in text
    assert load(toml("netwrk_dim = 4"), "--allow_unknown_keys") is not None
    with pytest.raises(UserError, match="netwrk_dim"):
        load(path, "--no-allow_unknown_keys")


@pytest.mark.parametrize("name", [n for n, e in NO_EFFECT.items() if e.default is False])
def test_an_option_without_effect_warns_by_name_only_when_set(name, caplog):
    caplog.set_level(logging.WARNING)
    load_config([f"--no-{name}"])
    assert not caplog.records
    load_config([f"--{name}"])
    assert [record.getMessage().split(":")[1].split()[0] for record in caplog.records] == [name]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_option_is_an_error_only_when_it_asks_for_something(name):
    default = REFUSED[name].default
    if default is False:
        load_config([f"--no-{name}"])
        argv = [f"--{name}"]
    else:
        argv = [f"--{name}", "1"]
    with pytest.raises(UserError, match=name):
        load_config(argv)


def test_lists_and_negative_numbers_come_through_the_command_line():
    config = load_config(["--text_encoder_lr", "0", "1e-5", "--adaptive_noise_scale", "-0.1"])
    assert config.optimizer.text_encoder_lr == (0.0, 1e-5)
    assert config.loss.adaptive_noise_scale == -0.1


@pytest.mark.parametrize(
    ("flags", "name", "expected"),
    [
        (["--token_string", "sks"], "placeholder_token", ("sks",)),
        (["--token_string", "my pet"], "placeholder_token", ("my pet",)),
        (["--placeholder_token", "sks"], "placeholder_token", ("sks",)),
        (["--placeholder_token", "sks", "ohwx"], "placeholder_token", ("sks", "ohwx")),
        (["--class_token", "duck toy"], "class_token", ("duck toy",)),
        (["--class_token", "dog", "duck toy"], "class_token", ("dog", "duck toy")),
        (["--class_token=duck toy"], "class_token", ("duck toy",)),
        (["--class_token", "duck", "toy"], "class_token", ("duck", "toy")),
        (["--init_word", "duck toy", "id:42170"], "init_word", ("duck toy", "id:42170")),
        (["--stop_text_encoder_training", "60%"], "stop_text_encoder_training", 0.6),
        (["--stop_text_encoder_training", "300"], "stop_text_encoder_training", 300),
        (["--stop_text_encoder_training", "0"], "stop_text_encoder_training", None),
    ],
)
def test_words_in_quotes_stay_together_on_the_command_line(flags, name, expected):
    value = load_config(flags).to_flat()[name]
    assert value == expected
    assert type(value) is type(expected)


def test_an_old_spelling_on_the_command_line_wins_over_the_toml(toml):
    config = load(toml('placeholder_token = ["sks", "ohwx"]'), "--token_string", "zwx")
    assert config.mlm.placeholder_token == ("zwx",)
    message = error_of("--token_string", "sks", "--placeholder_token", "ohwx")
    assert "keep placeholder_token only" in message


def test_lists_of_words_are_written_and_read_again(tmp_path):
    pytest.importorskip("tomli_w")
    argv = ["--placeholder_token", "sks", "ohwx", "--class_token", "dog", "duck toy"]
    argv += ["--method", "pivotal", "--stop_embedding_training", "60%", "--init_word", "dog", "toy"]
    config = load_config(argv)
    again = load_config(["--config_file", str(write_config(config, tmp_path / "out.toml"))])
    changed = {n: v for n, v in again.changed().items() if OPTIONS[n].group != "run"}
    assert changed == config.changed()
    assert changed["class_token"] == ("dog", "duck toy")


def test_written_options_load_again_and_hold_no_secret(tmp_path):
    pytest.importorskip("tomli_w")
    target = tmp_path / "out"
    argv = ["--config_file", str(target), "--output_config", "--wandb_api_key", "hidden"]
    argv += ["--vae", "C:\\x\\vae", "--unet_lr", "1e-4", "--text_encoder_lr", "5e-5"]
    argv += ["--network_args", "conv_dim=4", "--shuffle_caption", "--output_name", 'a "name"']
    config = load_config(argv)
    assert write_config(config) == tmp_path / "out.toml"
    text = (tmp_path / "out.toml").read_text(encoding="utf-8")
    assert "hidden" not in text
    assert "output_config" not in text
    again = load_config(["--config_file", str(target)])
    kept = {n: v for n, v in config.changed().items() if OPTIONS[n].group != "run"}
    del kept["wandb_api_key"]
    assert {n: v for n, v in again.changed().items() if OPTIONS[n].group != "run"} == kept
    with pytest.raises(UserError, match="exists already"):
        write_config(config)


def test_every_option_can_be_set_by_flag_and_by_toml(toml):
    sample = {bool: True, int: 3, float: 0.5, str: "text"}
    for name, entry in OPTIONS.items():
        if name in ("config_file", "output_config"):
            continue
        value = sample[entry.kind]
        if entry.choices:
            value = entry.choices[-1]
        if name == "resolution":
            value = "512,640"
        as_flag = [f"--{name}"] if entry.kind is bool else [f"--{name}", str(value)]
        quoted = f'"{value}"' if isinstance(value, str) else str(value).lower()
        by_flag = load_config(as_flag).to_flat()[name]
        by_toml = load(toml(f"{name} = {quoted}")).to_flat()[name]
        assert by_flag == by_toml == ((value,) if entry.many else value), name


def test_help_is_complete_and_readable():
    text = parser("mlm-plugin train").format_help()
    for name in (*OPTIONS, *NO_EFFECT, *REFUSED):
        assert f"--{name}" in text
    assert "==SUPPRESS==" not in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys, mlm_plugin.config.loading as l; l.parser().format_help();"
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - start < 5  # seconds; 0.3 on an idle machine


def test_the_readme_table_lists_every_option_once():
    text = options_markdown()
    for name in OPTIONS:
        assert text.count(f"| `{name}` |") == 1
    assert "| `mlm_loss_weight` | `0.1` |" in text
    assert "| `network_alpha` | `1` |" in text


def test_no_arguments_give_the_defaults():
    assert load_config([]) == TrainConfig()


@pytest.mark.parametrize("key", ["LoRA_type", "train_on_input", "ui_language"])
def test_a_key_of_a_gui_is_not_taken_for_a_slip(tmp_path, key):
    """The way out is named instead."""
    toml = tmp_path / "gui.toml"
    toml.write_text(f'{key} = "Standard"\n')
    with pytest.raises(UserError) as caught:
        load_config(["--config_file", str(toml)])
    assert "did you mean" not in str(caught.value)
    assert "allow_unknown_keys = true" in str(caught.value)
    toml.write_text(f'{key} = "Standard"\nallow_unknown_keys = true\n')
    load_config(["--config_file", str(toml)])
