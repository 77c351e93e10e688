"""Every shipped preset parses, says what each line does, and fits the options."""

import json
from pathlib import Path

import pytest

from mlm_plugin.config.checks import check_config
from mlm_plugin.config.gui_presets import run_convert_preset
from mlm_plugin.config.loading import load_config

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "presets").glob("*.toml"))
GUI_PRESETS = sorted((ROOT.parent / "shared" / "data" / "kohya_gui_presets").glob("*.json"))
REST = ["--pretrained_model_name_or_path", "model", "--train_data_dir", "data", "--output_dir", "o"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_a_preset_parses_and_its_options_go_together(path):
    check_config(load_config(["--config_file", str(path), *REST]))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_a_presets_head_says_what_it_is_and_how_to_run_it(path):
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert head.startswith("# ")
    assert f"presets/{path.name}" in head
    assert "Expected:" in head


@pytest.mark.parametrize("path", GUI_PRESETS, ids=lambda path: path.name)
def test_a_community_preset_becomes_a_toml_that_loads(path, tmp_path):
    target = tmp_path / "run.toml"
    assert run_convert_preset([str(path), "-o", str(target)]) == 0
    config = load_config(["--config_file", str(target), *REST])
    source = json.loads(path.read_text(encoding="utf-8"))
    assert config.network.network_dim == int(source["network_dim"])


def test_the_community_presets_are_here():
    if not GUI_PRESETS:
        pytest.skip("the community presets (shared/data/kohya_gui_presets) are not here")
    assert len(GUI_PRESETS) >= 15
