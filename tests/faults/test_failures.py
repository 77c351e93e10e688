"""Whatever happens, the command line ends in one line, or in a short report with a file."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mlm_plugin.cli import main
from mlm_plugin.errors import UserError
from mlm_plugin.failures import exit_code_of, one_line

ROOT = Path(__file__).parents[2]
TRAINED = UserError("learning_rate = 9: too high")
TRAINED.exit_code = 1


def ends_with(error, capsys, *flags):
    """Exit code and stderr of a command that raises an error."""

    def command(argv):
        assert "--traceback" not in argv
        raise error

    code = exit_code_of(command, ["--seed", "1", *flags])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (UserError("seed = x: a number"), 2, "error: seed = x: a number"),
        (UserError("seed = 'a\nb'"), 2, "error: seed = 'a b'"),
        (TRAINED, 1, "too high"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/a"), 1, "/out/a: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "x.json"), 1, "x.json: Permission"),
        (FileNotFoundError(errno.ENOENT, "No such file", "y"), 2, "y: No such file"),
        (MemoryError(), 2, "not enough memory (MemoryError)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB\nGPU 0"), 2, "estimate"),
        (RuntimeError("[enforce fail] can't allocate memory: 9 bytes"), 2, "not enough memory"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_mend_is_one_line(error, code, part, capsys):
    found, printed = ends_with(error, capsys)
    assert (found, len(printed.splitlines())) == (code, 1)
    assert part in printed
    assert printed.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("doctor", "a.safetensors"), 0, "give --base MODEL to see what it does to sentences"),
        (
            ("estimate", "--pretrained_model_name_or_path", "toy"),
            2,
            "error: this command needs peft, which is not installed here: pip install peft\n",
        ),
    ],
)
def test_beside_a_trainer_without_peft(arguments, code, line, tmp_path):
    """The doctor needs none; a command that does says how to get it."""
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors")
    program = "import sys; sys.modules['peft'] = None; from mlm_plugin.cli import main; "
    done = subprocess.run(
        [sys.executable, "-c", f"{program} sys.exit(main(sys.argv[1:]))", *arguments],
        capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == code
    assert line in done.stdout + done.stderr


class Deadly(torch.utils.data.Dataset):
    """Kills the process that reads it, as a system without memory does."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_loader_process_is_one_line_with_the_remedy(capsys):
    def command(_argv):
        for _ in torch.utils.data.DataLoader(Deadly(), num_workers=1):
            raise AssertionError("nothing can be read")

    assert exit_code_of(command, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "max_data_loader_n_workers = 0" in line


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), IndexError("list"), OSError("no number"), RuntimeError("shapes\ndiffer")],
    ids=repr,
)
def test_anything_else_is_a_short_report_with_a_file(error, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    secrets = ["--wandb_api_key", "secret1", "--huggingface_token=secret2"]
    monkeypatch.setattr(sys, "argv", ["mlm-plugin", "train", *secrets])
    code, printed = ends_with(error, capsys)
    assert code == 1
    assert len(printed.splitlines()) == 4
    assert f"unexpected {type(error).__name__}" in printed
    assert f"torch {torch.__version__}" in printed
    (file,) = tmp_path.iterdir()
    assert str(file) in printed
    written = file.read_text()
    assert "Traceback (most recent call last)" in written
    assert "command: mlm-plugin train" in written
    assert "secret" not in printed + written


def test_without_a_place_for_the_file_the_traceback_is_printed(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    code, printed = ends_with(KeyError("x"), capsys)
    assert code == 1
    assert "Traceback (most recent call last)" in printed


@pytest.mark.parametrize("error", [UserError("seed"), KeyError("x")], ids=repr)
def test_the_traceback_is_shown_on_request(error, capsys):
    assert "Traceback" not in ends_with(error, capsys)[1]
    assert "Traceback (most recent call last)" in ends_with(error, capsys, "--traceback")[1]


@pytest.mark.parametrize("arguments", [["train", "--traceback"], ["--traceback", "train"]])
def test_the_flag_is_taken_anywhere(arguments, capsys):
    assert main([*arguments, "--max_train_stepz", "1"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["train_network_mlm.py", "-mmlm_plugin.cli"])
def test_both_entries_end_in_one_line(script):
    arguments = [] if script.endswith(".py") else ["train"]
    ended = subprocess.run(
        [sys.executable, script, *arguments, "--seed", "x"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ended.returncode == 2
    assert re.fullmatch(r"error: command line: seed = 'x' .*\n", ended.stderr)


@pytest.mark.parametrize("length", [10, 159, 5000, 10**6])
def test_a_line_fits_on_the_screen(length):
    line = one_line("seed = " + "9" * length + " is not\x00 allowed")
    assert len(line) < 250
    assert line.endswith("is not  allowed")
