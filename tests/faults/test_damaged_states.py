"""A damaged state is refused in one line that names the file; nothing is trained from it."""

import json
import pickle
import shutil

import pytest
import torch
from accelerate.checkpointing import load
from safetensors.torch import load_file, save_file

from mlm_plugin.cli import train_main
from mlm_plugin.config.options import OptimizerOptions
from mlm_plugin.errors import UserError
from mlm_plugin.sd_scripts.term import _read_counters
from mlm_plugin.training.schedulers import create_scheduler, rate_jumps
from mlm_plugin.training.state import RunIdentity, load_state

pytestmark = pytest.mark.usefixtures("_fresh_accelerator")
FILES = [
    "model.safetensors",
    "optimizer.bin",
    "scheduler.bin",
    "random_states_0.pkl",
    "train_state.json",
    "scaler.pt",
]
SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}


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


def with_nan(path):
    """One number of the file becomes NaN."""
    if path.suffix == ".safetensors":
        weights = load_file(path)
        weights[max(weights)].flatten()[-1] = float("nan")
        save_file(weights, path)
    elif path.suffix == ".json":
        path.write_text(path.read_text().replace('"current_step": 2', '"current_step": NaN'))
    else:
        content = load(path)
        spoil(content)
        torch.save(content, path)


def spoil(content):
    """Put NaN into the last number; random states are not numbers: one of them is made unusable."""
    if "torch_manual_seed" in content:
        content["torch_manual_seed"] = torch.tensor([float("nan")])
    elif "_last_lr" in content:
        content["_last_lr"] = [float("nan")]
    elif content.get("state"):
        moments = content["state"][max(content["state"])]
        moments["exp_avg_sq"].flatten()[-1] = float("nan")
    else:
        content[max(k for k, v in content.items() if isinstance(v, float))] = float("nan")


DAMAGES = {
    "nan": with_nan,
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
        *("--output_name", "dog", "--network_train_text_encoder_only"),
    ]


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    flags = ["--max_train_steps", "2", "--save_state", "--output_dir", str(folder)]
    assert train_main([*base, *flags]) == 0
    return folder / "dog-state"


@pytest.fixture
def state(whole, tmp_path):
    torch.save(SCALER, shutil.copytree(whole, tmp_path / "a-state") / "scaler.pt")
    return tmp_path / "a-state"


def resume(base, state, folder, steps="3"):
    flags = ["--resume", str(state), "--max_train_steps", steps, "--output_dir", str(folder)]
    return train_main([*base, *flags])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_state_is_named(
    base, state, tmp_path, monkeypatch, capsys, name, damage
):
    if (name, damage) == ("scaler.pt", "missing"):
        pytest.skip("there is none without fp16; see the test of fp16")
    monkeypatch.chdir(tmp_path)
    DAMAGES[damage](state / name)
    assert resume(base, state, tmp_path / "out") == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(lines) == 1
    assert name in lines[0]
    assert not (tmp_path / "harm.txt").exists()
    assert not (tmp_path / "out" / "dog.safetensors").exists()


def test_a_missing_scaler_is_named_where_there_must_be_one(state):
    (state / "scaler.pt").unlink()
    identity = RunIdentity(seed=1)
    with pytest.raises(UserError, match=r"scaler\.pt is missing") as caught:
        load_state(state, accelerator=WithScaler, method=None, identity=identity)
    assert "mixed_precision fp16" in str(caught.value)


class WithScaler:
    """What an accelerator has on a GPU with mixed_precision fp16."""

    scaler = object()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer.bin", {"a": 1}),
        ("optimizer.bin", {"state": {}, "param_groups": []}),
        ("random_states_0.pkl", {"random_state": 1, "numpy_random_seed": 2}),
        ("scheduler.bin", {"_last_lr": [float("nan")]}),
    ],
)
def test_a_dict_of_other_things_is_refused(base, state, tmp_path, capsys, name, content):
    torch.save(content, state / name)
    assert resume(base, state, tmp_path / "out") == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(lines) == 1
    assert name in lines[0] or "does not fit this optimizer" in lines[0]


@pytest.mark.parametrize("settings", [[1, 2], "x", 1])
def test_settings_that_are_no_object_are_named(base, state, tmp_path, capsys, settings):
    path = state / "train_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": settings}))
    assert resume(base, state, tmp_path / "out") == 2
    assert "train_state.json: settings is" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "[1, 2]", '{"step": 1}', '{"step": "x", "call": 1}', "\xe9"]
)
def test_damaged_counters_of_the_term_in_sd_scripts_are_named(tmp_path, content):
    path = tmp_path / "mlm_state.json"
    path.write_text(content, encoding="latin1")
    with pytest.raises(UserError, match="mlm_state.json is damaged"):
        _read_counters(path)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "polynomial", "constant"])
def test_a_schedule_that_is_stretched_is_told(base, tmp_path, capsys, schedule):
    """Extending a run is allowed; that no single run has such rates is not kept silent."""
    out = tmp_path / "out"
    flags = ["--lr_scheduler", schedule, "--learning_rate", "1e-3"]
    first = ["--max_train_steps", "2", "--save_state", "--output_dir", str(out)]
    assert train_main([*base, *flags, *first]) == 0
    capsys.readouterr()
    assert resume([*base, *flags], out / "dog-state", out, steps="4") == 0
    told = "the learning rate goes from" in capsys.readouterr().err
    assert told == (schedule != "constant")


def test_the_rates_told_are_those_of_the_steps():
    old, new = (schedule_of(num_steps) for num_steps in (10, 20))
    for _ in range(10):
        old.step()
    new.load_state_dict(old.state_dict())
    ((before, after),) = rate_jumps(new)
    assert before == pytest.approx(0, abs=1e-9)
    assert after == pytest.approx(0.5e-3)
    new.step()
    assert 0.4e-3 < new.get_last_lr()[0] < after
    assert rate_jumps(new) == []


def schedule_of(num_steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    options = OptimizerOptions(lr_scheduler="cosine")
    return create_scheduler(optimizer, options, num_training_steps=num_steps)


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
    assert not list(tmp_path.rglob("*-state"))
    assert "good state" not in error
