"""Every shipped preset parses, explains each line, and fits the options and its method."""

import json
import logging
import shlex
from pathlib import Path

import pytest

from mlm_plugin.config.gui_presets import run_convert_preset
from mlm_plugin.config.loading import load_config
from mlm_plugin.config.methods import METHOD_CLASSES
from mlm_plugin.methods.checks import check_config

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "presets").glob("*.toml"))
QUICKSTART = ROOT / "presets" / "quickstart.toml"
OWN_METHOD = [path for path in PRESETS if path != QUICKSTART]
RESEARCH_CODE = [path for path in PRESETS if path.name.startswith("paper_")]
GUI_PRESETS = sorted((ROOT.parent / "shared" / "data" / "kohya_gui_presets").glob("*.json"))
REST = ["--pretrained_model_name_or_path", "model", "--train_data_dir", "data", "--output_dir", "o"]


def load(path, *arguments):
    return load_config(["--config_file", str(path), *REST, *arguments])


def named_method(path):
    """What the file's name promises: paper_X, sd15_X_8gb; a name without a method is a LoRA."""
    rest = path.stem.partition("_")[2]
    return next((name for name in METHOD_CLASSES if rest.startswith(name)), "lora")


def ineffective(caplog):
    return [r.getMessage() for r in caplog.records if "no effect" in r.getMessage()]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_a_preset_parses_and_its_options_go_together(path):
    check_config(load(path))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_a_presets_head_says_what_it_is_and_how_to_run_it(path):
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert head.startswith("# ")
    assert f"presets/{path.name}" in head
    assert "Expected:" in head


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_the_command_in_a_presets_head_parses(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    lines = [line.removeprefix("#").strip() for line in head.splitlines()]
    text = "\n".join(lines).replace("\\\n", " ")
    command = text[text.index("python train_network_mlm.py") :].splitlines()[0]
    check_config(load_config(shlex.split(command)[2:]))


@pytest.mark.parametrize("path", OWN_METHOD, ids=lambda path: path.name)
def test_every_line_of_a_preset_has_an_effect(path, caplog):
    with caplog.at_level(logging.WARNING):
        check_config(load(path))
    assert ineffective(caplog) == []


@pytest.mark.parametrize("path", OWN_METHOD, ids=lambda path: path.name)
def test_a_preset_trains_the_method_it_is_named_after(path):
    assert load(path).schedule.method == named_method(path)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_a_preset_can_be_tried_for_two_steps(path):
    check_config(load(path, "--max_train_steps", "2"))


def test_every_method_has_a_preset_besides_the_quickstart():
    assert {load(path).schedule.method for path in OWN_METHOD} == set(METHOD_CLASSES)


@pytest.mark.parametrize("method", METHOD_CLASSES)
def test_the_quickstart_suits_every_method(method, caplog):
    config = load(QUICKSTART, "--method", method)
    assert config.schedule.method == method
    with caplog.at_level(logging.WARNING):
        check_config(config)
    assert ineffective(caplog) == []


@pytest.mark.parametrize("path", RESEARCH_CODE, ids=lambda path: path.name)
def test_a_preset_of_the_research_code_has_its_settings_and_says_whose_they_are(path):
    text, config = path.read_text(encoding="utf-8"), load(path)
    assert "reproduces the settings of research code attributed to the authors" in text
    assert "hyper-parameters are not public" in text
    assert (config.mlm.mlm_batch_size, config.mlm.mlm_probability) == (25, 0.15)
    assert config.schedule.mixed_precision == "no"
    assert config.dataset.resolution == "512,512"
    optimizer = config.optimizer
    assert (optimizer.optimizer_type, optimizer.lr_scheduler) == ("AdamW", "constant")


def test_the_four_baselines_of_the_paper_have_a_preset_of_the_research_code():
    baselines = {"textual_inversion", "xti", "dreambooth", "custom_diffusion"}
    assert {named_method(path) for path in RESEARCH_CODE} == baselines


@pytest.mark.parametrize("path", GUI_PRESETS, ids=lambda path: path.name)
def test_a_community_preset_becomes_a_toml_that_loads(path, tmp_path):
    target = tmp_path / "run.toml"
    assert run_convert_preset([str(path), "-o", str(target)]) == 0
    config = load(target)
    source = json.loads(path.read_text(encoding="utf-8"))
    assert config.network.network_dim == int(source["network_dim"])


def test_the_community_presets_are_here():
    if not GUI_PRESETS:
        pytest.skip("the community presets (shared/data/kohya_gui_presets) are not here")
    assert len(GUI_PRESETS) >= 15
