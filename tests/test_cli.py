"""The command line itself: every help text prints, mistakes end with code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from mlm_plugin import __version__
from mlm_plugin.cli import COMMANDS, main, train_main

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    try:
        code = main([command, "--help"])
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr().out
    assert code == 0
    assert "usage:" in printed
    assert len(printed.splitlines()) > 5


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_command_the_commands_are_listed(arguments, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mlm-plugin {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["tarin"],
        ["train", "--max_train_stepz", "1"],
        ["pretrain"],
        ["pretrain", "--pretrained_model_name_or_path", "toy", "--output", "wrong.txt"],
        ["prompts", "--prompt_set", "livng"],
        ["convert-preset", "absent.json"],
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert len(printed.err.splitlines()) == 1


def test_the_script_beside_the_package_is_the_train_command(capsys):
    assert train_main(["--max_train_stepz", "1"]) == 2
    assert "max_train_steps" in capsys.readouterr().err
    code = subprocess.run(
        [sys.executable, str(ROOT / "train_network_mlm.py"), "--no_such_flag"],
        capture_output=True,
        cwd=ROOT,
    ).returncode
    assert code == 2


def test_commands_import_their_libraries_without_a_word():
    code = (
        "from mlm_plugin.setup.console import quiet_imports; quiet_imports(); "
        "import mlm_plugin.commands.evaluate, mlm_plugin.compare.run, mlm_plugin.demo.run; "
        "from transformers import CLIPImageProcessor"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
