"""A damaged state is refused in one line that names the file; nothing is trained from it."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlm_plugin.cli import train_main

pytestmark = pytest.mark.usefixtures("_fresh_accelerator")
FILES = [
    "model.safetensors",
    "optimizer.bin",
    "scheduler.bin",
    "random_states_0.pkl",
    "train_state.json",
]


class Harm:
    """A pickle that would create a file when it is read."""

    def __reduce__(self):
        return (open, ("harm.txt", "w"))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_list(path):
    if path.suffix == ".json":
        path.write_text("[1, 2]")
    else:
        torch.save([1, 2], path)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "truncated": cut,
    "empty": lambda path: path.write_bytes(b""),
    "list": write_list,
    "pickle": lambda path: path.write_bytes(pickle.dumps(Harm())),
    "latin1": lambda path: path.write_bytes("\xe9\xff{".encode("latin1")),
}


@pytest.fixture(scope="module")
def base(toy_folder, toy_pictures):
    return [
        *("--pretrained_model_name_or_path", str(toy_folder)),
        *("--train_data_dir", str(toy_pictures)),
        *("--resolution", "64", "--network_dim", "2", "--seed", "1"),
        *("--max_data_loader_n_workers", "0", "--mlm_loss_weight", "0"),
        *("--output_name", "dog"),
    ]


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    flags = ["--max_train_steps", "2", "--save_state", "--output_dir", str(folder)]
    assert train_main([*base, *flags]) == 0
    return folder / "dog-state"


@pytest.fixture
def state(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "a-state")


def resume(base, state, folder, steps="3"):
    flags = ["--resume", str(state), "--max_train_steps", steps, "--output_dir", str(folder)]
    return train_main([*base, *flags])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_state_is_named(
    base, state, tmp_path, monkeypatch, capsys, name, damage
):
    monkeypatch.chdir(tmp_path)
    DAMAGES[damage](state / name)
    assert resume(base, state, tmp_path / "out") == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(lines) == 1
    assert name in lines[0]
    assert not (tmp_path / "harm.txt").exists()
    assert not (tmp_path / "out" / "dog.safetensors").exists()


def test_weights_that_are_nan_are_named(base, state, tmp_path, capsys):
    weights = load_file(state / "model.safetensors")
    save_file({n: t * float("nan") for n, t in weights.items()}, state / "model.safetensors")
    assert resume(base, state, tmp_path / "out") == 2
    assert "NaN" in capsys.readouterr().err


def test_weights_that_are_incomplete_are_named(base, state, tmp_path, capsys):
    weights = load_file(state / "model.safetensors")
    weights.pop(min(weights))
    save_file(weights, state / "model.safetensors")
    assert resume(base, state, tmp_path / "out") == 2
    assert "model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["2", -1, None, 1.5])
def test_a_progress_that_is_no_number_is_named(base, state, tmp_path, capsys, value):
    path = state / "train_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"current_step": value}))
    assert resume(base, state, tmp_path / "out") == 2
    assert "current_step" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["1", "2"])
def test_a_state_at_or_past_the_end_is_refused(base, state, tmp_path, capsys, steps):
    assert resume(base, state, tmp_path / "out", steps) == 2
    assert "nothing is left to train" in capsys.readouterr().err


def test_a_whole_state_is_resumed_and_readable_by_all(base, state, tmp_path):
    assert resume(base, state, tmp_path / "out") == 0
    modes = {path.name: path.stat().st_mode & 0o777 for path in state.iterdir()}
    assert modes["model.safetensors"] == modes["train_state.json"]


def test_a_loss_that_is_nan_from_the_start_is_told_as_that(base, tmp_path, monkeypatch, capsys):
    from mlm_plugin.training.diffusion_loss import DiffusionLoss

    call = DiffusionLoss.__call__
    monkeypatch.setattr(DiffusionLoss, "__call__", lambda *v, **k: call(*v, **k) * float("nan"))
    flags = ["--max_train_steps", "3", "--output_dir", str(tmp_path / "out")]
    assert train_main([*base, *flags]) == 1
    error = capsys.readouterr().err
    assert "no step was done" in error
    assert "good state" not in error
