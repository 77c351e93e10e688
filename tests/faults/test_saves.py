"""Disks that are full or failing: no torn file, the old one intact, nothing left over."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlm_plugin.cli import train_main
from mlm_plugin.export.sidecar import write_sidecar
from mlm_plugin.files import cached_folder, remove_temporaries
from mlm_plugin.methods.lora import LoRAMethod

pytestmark = pytest.mark.usefixtures("_fresh_accelerator")


@pytest.fixture
def arguments(toy_folder, toy_pictures, tmp_path):
    """Flags of a run of two steps without the term."""
    return [
        *("--pretrained_model_name_or_path", str(toy_folder)),
        *("--train_data_dir", str(toy_pictures)),
        *("--resolution", "64", "--network_dim", "2", "--max_train_steps", "2", "--seed", "1"),
        *("--max_data_loader_n_workers", "0", "--mlm_loss_weight", "0"),
        *("--output_dir", str(tmp_path / "out"), "--output_name", "dog"),
    ]


def _fail_under(monkeypatch, folder):
    """No file below ``folder`` can be put in place."""
    replace = os.replace

    def fail(source, target):
        if Path(target).is_relative_to(folder):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("mlm_plugin.files.os.replace", fail)


def test_a_final_save_that_fails_is_saved_elsewhere(arguments, tmp_path, monkeypatch, capsys):
    assert train_main(arguments) == 0
    expected = load_file(tmp_path / "out" / "dog.safetensors")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _fail_under(monkeypatch, tmp_path / "out")
    capsys.readouterr()
    assert train_main(arguments) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "dog.safetensors could not be saved" in line
    assert "No space left" in line
    (saved,) = tmp_path.glob("mlm_plugin-*/rescued.safetensors")
    assert str(saved) in line
    found = load_file(saved)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["dog.json", "dog.safetensors"]


def test_a_full_disk_at_a_state_does_not_end_the_run(arguments, tmp_path, monkeypatch, caplog):
    save, calls = torch.save, []

    def full_once(*values, **settings):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64")
        save(*values, **settings)

    monkeypatch.setattr("accelerate.utils.other.torch.save", full_once)
    flags = ["--save_every_n_steps", "1", "--save_state"]
    assert train_main([*arguments, *flags]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "dog-state" in names
    assert "dog-step00000001-state" not in names
    assert not any(name.startswith(".") for name in names)


@pytest.mark.parametrize("name", ["x" * 243, "ü" * 120, "x" * 230])
def test_a_name_too_long_is_refused_before_training(arguments, name, capsys):
    assert train_main([*arguments, "--output_name", name]) == 2
    assert "output_name" in capsys.readouterr().err


def test_the_longest_name_can_be_saved_with_states(arguments, tmp_path):
    flags = ["--output_name", "x" * 206, "--save_state", "--save_every_n_steps", "1"]
    assert train_main([*arguments, *flags]) == 0
    assert train_main([*arguments, *flags]) == 0  # replaces the states


def test_a_folder_of_that_name_is_refused_before_training(arguments, tmp_path, capsys):
    (tmp_path / "out" / "dog.safetensors").mkdir(parents=True)
    assert train_main(arguments) == 2
    assert "is a folder" in capsys.readouterr().err


def test_a_disk_too_small_is_refused_before_the_first_step(arguments, monkeypatch, capsys):
    monkeypatch.setattr("mlm_plugin.setup.saving.shutil.disk_usage", lambda _: Usage)
    assert train_main(arguments) == 2
    assert "0.0 MB are free" in capsys.readouterr().err


class Usage:
    """A disk without space."""

    free = 0


@pytest.mark.parametrize("line", ["a dog --d 9", "a dog --s 1000"])
def test_a_sample_that_fails_is_a_warning(arguments, tmp_path, monkeypatch, line):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{line} --w 64 --h 64\n")

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mlm_plugin.training.samples.denoise", fail)
    flags = ["--sample_prompts", str(prompts), "--sample_every_n_steps", "1"]
    assert train_main([*arguments, *flags]) == 0
    assert (tmp_path / "out" / "dog.safetensors").is_file()


@pytest.mark.parametrize("flag", [f"--d {2**70}", "--w 1000000", "--h 1000000", "--w 0"])
def test_an_impossible_sample_is_refused_when_the_file_is_read(arguments, tmp_path, capsys, flag):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a dog {flag}\n")
    flags = ["--sample_prompts", str(prompts), "--sample_every_n_steps", "1"]
    assert train_main([*arguments, *flags]) == 2
    assert "prompts.txt" in capsys.readouterr().err


def test_a_cache_folder_that_cannot_be_written_is_replaced_by_a_temporary_one(
    tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLM_PLUGIN_CACHE", str(tmp_path / "file" / "cache"))
    folder = cached_folder("some", lambda path: path.mkdir())
    assert folder.is_dir()
    assert cached_folder("some", lambda path: path.mkdir()) == folder


def test_the_sidecar_follows_the_file_and_keeps_the_users_words(tmp_path):
    path = tmp_path / "a.safetensors"
    write_sidecar(path, base_model_version="sd_v1", activation_text="zwx cat")
    text = path.with_suffix(".json").read_text()
    path.with_suffix(".json").write_text(text.replace('"notes": ""', '"notes": "mine"'))
    write_sidecar(path, base_model_version="sd_v1", activation_text="sks dog")
    text = path.with_suffix(".json").read_text()
    assert '"sks dog"' in text
    assert "zwx" not in text
    assert '"mine"' in text


def test_leftovers_of_a_killed_run_are_removed_by_the_next_of_that_name(arguments, tmp_path):
    folder = tmp_path / "out"
    for name in [
        ".dog.abcdefgh.tmp.safetensors",
        ".dog-step00000004.abcdefgh.tmp.safetensors",
        ".dog-000002.0123abcd.tmp",
    ]:
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("half")
    (folder / ".dog-step00000004-state.abcdefgh").mkdir()
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    (folder / ".dog.ijklmnop.tmp.safetensors").write_text("of a run beside this one")
    (folder / ".cat.abcdefgh.tmp.safetensors").write_text("of another run")
    (folder / ".dog.notes").write_text("of the user")
    assert train_main(arguments) == 0
    hidden = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    beside = ".dog.ijklmnop.tmp.safetensors"
    assert hidden == {beside, ".cat.abcdefgh.tmp.safetensors", ".dog.notes"}


def test_a_state_between_two_renames_gets_its_name_back(tmp_path):
    old = tmp_path / ".dog-state.abcdefgh.old"
    old.mkdir()
    (old / "part").write_text("x")
    os.utime(old, (0, 0))
    remove_temporaries(tmp_path, "dog-state".__eq__)
    assert (tmp_path / "dog-state" / "part").read_text() == "x"
    assert not old.exists()


def test_one_signal_during_the_final_save_lets_it_finish(arguments, tmp_path, monkeypatch):
    export = LoRAMethod.export

    def interrupted(*values):
        os.kill(os.getpid(), signal.SIGINT)
        export(*values)

    monkeypatch.setattr(LoRAMethod, "export", interrupted)
    assert train_main(arguments) == 0
    assert load_file(tmp_path / "out" / "dog.safetensors")
    assert (tmp_path / "out" / "dog.json").is_file()
