"""Bad values of every option, from a seed: each ends in one line, or the run is set up."""

import json
import random
import shutil
import zlib

import pytest

from mlm_plugin.cli import train_main
from mlm_plugin.config.datasets import resolve_datasets
from mlm_plugin.config.gui_presets import run_convert_preset
from mlm_plugin.config.loading import coerce, config_from_values, load_config
from mlm_plugin.config.options import OPTIONS
from mlm_plugin.data.sources import read_dataset
from mlm_plugin.errors import UserError
from mlm_plugin.models.checkpoints import ModelSettings, load_stable_diffusion
from mlm_plugin.training.samples import parse_sample_prompts

HUGE = int("9" * 4000) ** 2  # has no text: Python limits the digits
AS_TOML = (True, -1, -0.5, 1e300, float("nan"), float("inf"), HUGE, -HUGE, "", "text", "\0", [],
           [1, "x"], [[]], {}, {"a": 1}, None, "é" * 300, "9" * 5000)  # fmt: skip
AS_FLAGS = ("text", "-1", "1e30", "999999999999", "99", "nan", "-inf", "", "a/b", "a\0b",
            "9" * 5000, "\n", ["1", "x", "2"])  # fmt: skip
NUM_FLAGS = 1  # tried of each option, with the whole set-up of a run
APART = ("host", "sd_scripts_dir", "mlm_script", "config_file", "output_config", "check")


@pytest.fixture
def arguments(toy_folder, toy_pictures, toy_contextualizer, tmp_path, monkeypatch):
    """A check of a small run."""
    monkeypatch.chdir(tmp_path)
    return [
        *("--pretrained_model_name_or_path", str(toy_folder)),
        *("--train_data_dir", str(toy_pictures)),
        *("--mlm_target", "class", "--mlm_contextualizer", str(toy_contextualizer)),
        *("--output_dir", str(tmp_path / "out")),
        *"--caption_extension .txt --resolution 64 --learning_rate 1e-3 --seed 1".split(),
        *"--max_train_steps 2 --check --console_log_level ERROR".split(),
    ]


def refusal_of(name, value):
    """The message for a value, if it is refused."""
    try:
        coerce(OPTIONS[name], value, place="run.toml")
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_bad_value_of_a_file_is_refused_in_one_line_or_read(name):
    for value in AS_TOML:
        message = refusal_of(name, value)
        assert message is None or f"run.toml: {name} = " in message


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in APART])
def test_a_bad_flag_is_refused_in_one_line_or_the_run_is_set_up(name, arguments, capsys):
    rng = random.Random(zlib.crc32(name.encode()))
    for value in rng.sample(AS_FLAGS, NUM_FLAGS):
        flags = [f"--{name}", *value] if isinstance(value, list) else [f"--{name}={value}"]
        code = train_main([*arguments, *flags])
        printed = capsys.readouterr().err.splitlines()
        assert code in (0, 2), printed
        errors = [line for line in printed if line.startswith("error: ")]
        assert len(errors) == (code == 2), printed
        assert all(len(line) < 1200 for line in printed)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in APART])
def test_every_bad_flag(name, arguments):
    for value in AS_FLAGS:
        flags = [f"--{name}", *value] if isinstance(value, list) else [f"--{name}={value}"]
        assert train_main([*arguments, *flags]) in (0, 2), value


# --- the samples ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--clip_skip=99", "has 2 layers"),
        ("--network_dim=1000000000", "at most 1000000"),
        ("--network_dim=10001", "at most 10000"),
        ("--resolution=999999", "at most 16384"),
        ("--resolution=64,999999", "at most 16384"),
        ("--max_bucket_reso=999999", "at most 16384"),
        ("--train_batch_size=9999999", "at most 4096"),
        ("--mlm_batch_size=9999999", "at most 4096"),
        ("--caption_extension=a/b", "not the end of a file name"),
        ("--caption_extension=\\..\\x", "not the end of a file name"),
        ("--output_name=a\0b", "zero byte"),
        ("--metadata_title=a\0b", "zero byte"),
        ("--seed=" + "9" * 5000, "(5002 characters)"),
        ("--output_dir=" + "x" * 300, "300 bytes"),
    ],
    ids=lambda value: value[:30],
)
def test_an_impossible_value_is_told_with_its_limit(flag, part, arguments, capsys):
    assert train_main([*arguments, flag]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line


@pytest.mark.parametrize("clip_skip", [3, 12, 100])
def test_no_model_skips_more_layers_than_it_has(clip_skip, toy_folder):
    with pytest.raises(UserError, match=f"clip_skip {clip_skip}: .* 2 layers"):
        load_stable_diffusion(toy_folder, ModelSettings(clip_skip=clip_skip))


def data_file(tmp_path, pictures, **subset):
    path = tmp_path / "data.json"
    subset = {"image_dir": str(pictures), "num_repeats": 1} | subset
    path.write_text(json.dumps({"datasets": [{"resolution": 64, "subsets": [subset]}]}))
    return path


@pytest.mark.parametrize(
    "subset",
    [
        {"num_repeats": 10**9},
        {"num_repeats": 10**400},
        {"num_repeats": 1_000_001},
        {"caption_extension": "a/b"},
        {"caption_extension": ".t\0xt"},
        {"token_warmup_step": float("nan")},
        {"token_warmup_step": float("inf")},
        {"keep_tokens": 10**400},
    ],
    ids=lambda subset: str(subset)[:40],
)
def test_a_dataset_config_has_the_same_limits(subset, toy_pictures, tmp_path):
    (folder,) = toy_pictures.iterdir()
    config = load_config(["--dataset_config", str(data_file(tmp_path, folder, **subset))])
    with pytest.raises(UserError, match=next(iter(subset))):
        resolve_datasets(config)


@pytest.mark.parametrize("repeats", ["1000000000_sks dog", "9" * 200 + "_sks dog"])
def test_a_folder_has_the_same_limits(repeats, tmp_path):
    (tmp_path / repeats).mkdir()
    with pytest.raises(UserError, match="num_repeats"):
        resolve_datasets(load_config(["--train_data_dir", str(tmp_path), "--resolution", "64"]))


def test_repeats_of_many_pictures_are_limited_together(toy_pictures, tmp_path):
    (folder,) = toy_pictures.iterdir()
    (tmp_path / "many").mkdir()
    for number in range(11):
        shutil.copy(next(folder.glob("*.png")), tmp_path / "many" / f"{number}.png")

    def read(repeats):
        path = data_file(tmp_path, tmp_path / "many", num_repeats=repeats)
        (dataset,) = resolve_datasets(load_config(["--dataset_config", str(path)]))
        return read_dataset(dataset)

    assert len(read(900_000).images) == 11
    with pytest.raises(UserError, match="11000000 pictures per epoch.*num_repeats = 1000000"):
        read(10**6)


NESTED = 100_000


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("a.toml", f"seed = {'[' * NESTED}", lambda path: load_config(["--config_file", path])),
        ("b.toml", f"seed = {'9' * 5000}", lambda path: load_config(["--config_file", path])),
        ("c.toml", f"seed = 0x{'f' * 5000}", lambda path: load_config(["--config_file", path])),
        ("d.json", "[" * NESTED, lambda path: run_convert_preset([path])),
        ("e.json", '{"a":' * NESTED, parse_sample_prompts),
        ("f.json", '{"seed": ' + "9" * 5000 + "}", lambda path: run_convert_preset([path])),
        (
            "g.json",
            "[" * NESTED,
            lambda path: resolve_datasets(load_config(["--dataset_config", path])),
        ),
    ],
    ids=["toml", "digits", "hex", "preset", "prompts", "json digits", "data"],
)
def test_a_file_that_no_one_would_write_is_one_line(name, text, read, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=f"{name}:"):
        read(str(path))


def test_values_of_a_plan_go_the_same_way():
    with pytest.raises(UserError, match="network_dim"):
        config_from_values({"network_dim": HUGE}, place="plan")
