"""Plans: those of the package, and what a file may hold."""

import re
from pathlib import Path

import pytest

from mlm_plugin.compare.plan import BUILT_IN, read_plan
from mlm_plugin.config.loading import config_from_values
from mlm_plugin.errors import UserError
from mlm_plugin.methods.checks import check_config

REST = {"pretrained_model_name_or_path": "m", "train_data_dir": "d", "output_dir": "o",
        "placeholder_token": "sks", "class_token": "dog"}  # fmt: skip
ARMS = 'evaluation_steps = [10]\n[[arms]]\nname = "a"\n[[arms]]\nname = "b"\n'


@pytest.mark.parametrize("path", sorted(BUILT_IN.glob("*.toml")), ids=lambda path: path.stem)
def test_a_plan_of_the_package_fits_the_options(path, caplog):
    plan = read_plan(path.stem)
    weights = []
    for arm in plan.arms:
        config = config_from_values({**arm.options, **REST, "max_train_steps": 9}, place=arm.name)
        check_config(config)
        weights.append(config.mlm.mlm_loss_weight)
    assert weights[0] == 0, "the first is plain"
    assert weights[-1] > 0
    assert not [record for record in caplog.records if "no effect" in record.getMessage()]


def test_the_default_plan_varies_the_text_encoder():
    plan = read_plan("sd15")
    rates = [
        config_from_values(arm.options, place="").optimizer.text_encoder_lr for arm in plan.arms
    ]
    assert rates[0] != rates[1]
    assert [arm.name for arm in plan.arms if arm.options.get("network_train_unet_only")]


def test_an_arm_stands_on_the_common_options_and_these_on_a_preset(tmp_path):
    preset = tmp_path / "preset.toml"
    preset.write_text(
        "[network]\nnetwork_dim = 32\n[schedule]\nseed = 5\n[optimizer]\nunet_lr = 1\n"
    )
    common = (
        f'evaluation_steps = [10]\n[common]\nconfig_file = "{preset.as_posix()}"\nunet_lr = 2e-4\n'
    )
    path = tmp_path / "plan.toml"
    path.write_text(f'{common}[[arms]]\nname = "a"\n[[arms]]\nname = "b"\nunet_lr = 3e-4\n')
    a, b = read_plan(str(path)).arms
    assert (a.options["network_dim"], b.options["network_dim"]) == (32, 32)
    assert (a.options["unet_lr"], b.options["unet_lr"]) == (2e-4, 3e-4)
    assert "seed" not in a.options


def test_the_plan_in_the_documentation_is_one(tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    text = (root / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(root)
    (tmp_path / "plan.toml").write_text(block)
    plan = read_plan(str(tmp_path / "plan.toml"))
    assert plan.arms[1].options["network_dim"] == 32, "of the preset"


def test_drawing_has_the_defaults_of_evaluate_where_it_says_nothing(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(f"{ARMS}[drawing]\nsteps = 7\n")
    drawing = read_plan(str(path)).drawing
    assert (drawing.steps, drawing.scale, drawing.sampler) == (7, 7.5, "ddim")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('evaluation_steps = [10]\n[[arms]]\nname = "a"\n', "at least two"),
        (f"{ARMS}mlm_loss_weight = true", "mlm_loss_weight"),
        (f"{ARMS}[drawing]\nstep = 3", "unknown key 'step'; did you mean steps"),
        (f"{ARMS}[drawing]\nresolution = 100", "a multiple of 8"),
        (f"{ARMS}[drawing]\nsteps = 1000", "steps = 1000 is not allowed; .* from 1 to 999"),
        (f"{ARMS}wandb_api_key = 'x'", "wandb_api_key cannot be set: the report would show it"),
        (f"{ARMS}huggingface_token = 'x'", "huggingface_token cannot be set: the report would"),
        (f"pictures_per_prompt = true\n{ARMS}", "pictures_per_prompt = True"),
        (f"common = 3\n{ARMS}", "must be a table"),
        (f'{ARMS}config_file = "none.toml"', "none.toml"),
        (f"{ARMS}reg_data_dir = 'x'", "reg_data_dir cannot be set"),
        (f"{ARMS}mlm_stop_below = 0.8", "mlm_stop_below cannot be set: every trial has to reach"),
        (f"{ARMS}[common]\nmlm_stop_below = 0.5", "mlm_stop_below cannot be set"),
    ],
)
def test_a_wrong_plan_is_one_line(tmp_path, text, message):
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_plan(str(path))
    assert "\n" not in str(caught.value)
