"""`mlm-plugin pocket`: what the demo writes, and what is only in a checkout."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mlm_plugin.cli import main
from mlm_plugin.demo.command import run_pocket
from mlm_plugin.demo.run import run_demo
from mlm_plugin.errors import UserError
from mlm_plugin.pocket.concepts import REPORTED
from mlm_plugin.pocket.shipped import pocket_model
from mlm_plugin.pocket.text_to_image import Sampling


def test_the_demo_writes_two_loras_and_a_grid(tmp_path, capsys):
    short = {"num_train_steps": 2, "sampling": Sampling(num_steps=2, guidance=4.0)}
    assert run_demo(REPORTED[0], model=pocket_model(), output=tmp_path, **short) == 0
    plain, mlm = (load_file(tmp_path / name / "last.safetensors") for name in ("plain", "mlm"))
    assert plain.keys() == mlm.keys()
    assert any(not torch.equal(plain[name], mlm[name]) for name in plain)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 3 * 128
        assert len(set(grid.convert("L").getdata())) > 50
    assert "plain and" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["demo", "--output", "{}", "--model", "{}"], "no oracle.safetensors there"),
        (["demo"], "required: --output"),
        (["bake"], "bake"),
    ],
)
def test_bad_input_is_one_line(argv, named, tmp_path):
    with pytest.raises(UserError, match=named) as error:
        run_pocket([part.format(tmp_path) for part in argv])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("command", "module"), [("build", "research.pocket_model"), ("bench", "research.bench")]
)
def test_what_is_not_installed_says_what_to_run(command, module, capsys):
    assert main(["pocket", command, "--output", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"pocket {command}: not part of the installed package" in line
    assert f"python -m {module}`" in line
