"""A training run whose disk fails for one kind of file: what becomes of the run.

``RUNS`` is the table: the file, the flags that make the run write it, and how the run must end.
"""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, safe_open

from mlm_plugin.cli import main, train_main
from mlm_plugin.config.options import OutputOptions
from mlm_plugin.setup.saving import require_output_name
from mlm_plugin.training.interrupt import Stopped

pytestmark = pytest.mark.usefixtures("_fresh_accelerator")
CODES = [errno.ENOSPC, errno.EIO, errno.EACCES]


class Run(NamedTuple):
    """A row of the table.

    Attributes:
        file: part of the name of what cannot be written.
        flags: make the run write it.
        exit_code: of the run.
        said: words of the only line about it.
    """

    file: str
    flags: tuple[str, ...] = ()
    exit_code: int = 0
    said: str = "could not be saved"


PIVOTAL = ("--method", "pivotal", "--network_dim", "2")
SAMPLES = ("--sample_every_n_steps", "2", "--sample_prompts")
RUNS = {
    "intermediate file": Run("dog-step00000001.safetensors", ("--save_every_n_steps", "1")),
    "intermediate embedding": Run(
        "dog-step00000001_embedding.safetensors", ("--save_every_n_steps", "1", *PIVOTAL)
    ),
    "intermediate state": Run(
        "dog-step00000001-state", ("--save_every_n_steps", "1", "--save_state")
    ),
    "final file": Run("dog.safetensors", exit_code=1),
    "final embedding": Run("dog_embedding.safetensors", PIVOTAL, exit_code=1),
    "final state": Run("dog-state", ("--save_state",), exit_code=1),
    "sidecar": Run("dog.json", said="not all files beside it"),
    "sample": Run("dog_000002_00_", (*SAMPLES, "PROMPTS"), said="is left out"),
    "preview": Run("dog.preview.png", (*SAMPLES, "PROMPTS"), said="not all files beside it"),
    "page": Run("dog.html", ("--max_train_steps", "10")),
    "latents": Run("_sd.npz", ("--cache_latents_to_disk",), said="kept in memory"),
    "curves": Run("events.out.tfevents", ("--logging_dir", "LOGS"), said="the curves end here"),
}


@pytest.fixture
def arguments(toy_folder, toy_pictures, tmp_path):
    """Flags of a run of two steps without the term, on pictures of its own."""
    (source,) = toy_pictures.iterdir()
    pictures = tmp_path / "pictures" / source.name
    pictures.mkdir(parents=True)
    for path in sorted(source.iterdir())[:4]:
        (pictures / path.name).write_bytes(path.read_bytes())
    (tmp_path / "prompts.txt").write_text("a dog --w 64 --h 64 --s 1 --d 1\na cat --w 64 --h 64\n")
    return [
        *("--pretrained_model_name_or_path", str(toy_folder)),
        *("--train_data_dir", str(pictures.parent), "--method", "textual_inversion"),
        *("--resolution", "64", "--max_train_steps", "2", "--seed", "1"),
        *("--max_data_loader_n_workers", "0", "--mlm_loss_weight", "0"),
        *("--output_dir", str(tmp_path / "out"), "--output_name", "dog"),
    ]


def filled(flags, folder):
    places = {"PROMPTS": folder / "prompts.txt", "LOGS": folder / "logs"}
    return [str(places.get(flag, flag)) for flag in flags]


@pytest.fixture
def failing(monkeypatch, tmp_path):
    """``failing(part of a name, code)``: files of that name cannot get it outside of /tmp."""

    def start(part, code):
        replace, spare = os.replace, tmp_path / "temporary"
        spare.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(spare))

        def fail(source, target):
            if part in Path(target).name and not Path(target).is_relative_to(spare):
                raise OSError(code, os.strerror(code), str(target))
            replace(source, target)

        monkeypatch.setattr("mlm_plugin.files.os.replace", fail)
        if part.startswith("events"):  # written by a thread of TensorBoard
            fail_curves(monkeypatch, code)

    return start


def fail_curves(monkeypatch, code):
    from tensorboard.summary.writer.record_writer import RecordWriter

    flush, calls = RecordWriter.flush, []

    def full(*values):
        calls.append(1)
        if len(calls) > 1:  # the first one is before training
            raise OSError(code, os.strerror(code))
        flush(*values)

    monkeypatch.setattr(RecordWriter, "flush", full)


def output(capsys):
    """All that was printed, in one text; log lines and errors both go to stderr."""
    printed = capsys.readouterr()
    return printed.out + printed.err


def torn(folder):
    """What has a hidden name; everything under a final name can be read."""
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            Image.open(path).load()
    return [path for path in folder.rglob(".*")]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_whose_disk_fails(arguments, failing, tmp_path, capsys, name):
    run = RUNS[name]
    failing(run.file, CODES[list(RUNS).index(name) % len(CODES)])
    assert train_main([*arguments, *filled(run.flags, tmp_path)]) == run.exit_code
    text = output(capsys)
    assert "Traceback" not in text
    assert text.count(run.said) == 1, text
    assert torn(tmp_path / "out") == []
    assert torn(tmp_path / "pictures") == []
    saved = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert not any(run.file in entry for entry in saved)
    if run.exit_code:  # nothing is lost
        rescued = sorted(p.name for p in (tmp_path / "temporary").glob("mlm_plugin-*/*"))
        assert rescued, text
        assert f"{rescued[0]}, in a temporary folder: move it now" in text
    else:
        assert "dog.safetensors" in saved


def test_only_the_state_failed_and_only_that_is_said(arguments, failing, tmp_path, capsys):
    failing("dog-state", errno.ENOSPC)
    assert train_main([*arguments, "--save_state"]) == 1
    (line,) = [x for x in output(capsys).splitlines() if x.startswith("error:")]
    assert "dog-state could not be saved" in line
    assert "dog.safetensors" not in line
    (state,) = tmp_path.glob("temporary/mlm_plugin-*/rescued-state")
    flags = ["--resume", str(state), "--max_train_steps", "3", "--output_name", "cat"]
    assert train_main([*arguments, *flags]) == 0


def test_a_final_save_that_fails_everywhere_says_both(arguments, failing, monkeypatch, capsys):
    failing("", errno.ENOSPC)
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    assert train_main(arguments) == 1
    text = output(capsys)
    assert "Traceback" not in text
    assert "could not be saved" in text
    assert ", nor in " in text


@pytest.mark.parametrize("stop", ["signal", "nan"])
def test_a_stop_whose_state_fails_says_both(arguments, failing, monkeypatch, capsys, stop):
    failing("-state", errno.ENOSPC)
    if stop == "nan":
        from mlm_plugin.training.diffusion_loss import DiffusionLoss

        call, calls = DiffusionLoss.__call__, []

        def fails_later(*values, **settings):
            calls.append(1)
            return call(*values, **settings) * (float("nan") if len(calls) > 2 else 1)

        monkeypatch.setattr(DiffusionLoss, "__call__", fails_later)
    else:
        from mlm_plugin.training.trainer import Trainer

        def stopped(trainer, *_):
            trainer.progress.current_step = 1
            raise Stopped(130)

        monkeypatch.setattr(Trainer, "_run_epoch", stopped)
    assert train_main([*arguments, "--max_train_steps", "3"]) == 1
    (line,) = [x for x in output(capsys).splitlines() if x.startswith("error:")]
    assert {"signal": "stopped by a signal", "nan": "the loss is nan"}[stop] in line
    assert "rescued-state, in a temporary folder" in line
    assert "good state is saved" not in line


def test_a_full_terminal_does_not_end_a_run(arguments, monkeypatch, tmp_path):
    """Standard output and error of a run are often files on the same disk."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        monkeypatch.setattr("sys.stderr", full)
        assert train_main(arguments) == 0
        monkeypatch.undo()
        full.close = lambda: None
    assert (tmp_path / "out" / "dog.safetensors").is_file()


def test_a_log_file_that_is_full_does_not_end_a_run(arguments, capsys):
    assert train_main([*arguments, "--console_log_file", "/dev/full"]) == 0
    text = output(capsys)
    assert text.count("console_log_file = '/dev/full': cannot be written") == 1
    assert "Logging error" not in text


def test_a_log_file_that_cannot_be_opened_is_refused(arguments, tmp_path, capsys):
    path = tmp_path / "nowhere" / "log.txt"
    assert train_main([*arguments, "--console_log_file", str(path)]) == 2
    assert "console_log_file" in output(capsys)


@pytest.mark.parametrize("command", ["pocket concept", "convert-preset"])
def test_every_command_says_a_full_disk_in_one_line(failing, tmp_path, capsys, command):
    preset = tmp_path / "a.json"
    preset.write_text(json.dumps({"learning_rate": 1e-4}))
    failing("", errno.ENOSPC)
    values = {
        "pocket concept": ["--concept", "vvq cat", "--output", str(tmp_path / "concept")],
        "convert-preset": [str(preset), "--output", str(tmp_path / "a.toml")],
    }[command]
    assert main([*command.split(), *values]) == 1
    text = output(capsys)
    assert "Traceback" not in text
    assert "No space left on device" in text


def test_curves_that_cannot_begin_are_refused_before_training(
    arguments, monkeypatch, tmp_path, capsys
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.flush", full)
    assert train_main([*arguments, "--logging_dir", str(tmp_path / "logs")]) == 2
    assert "logging_dir" in output(capsys)


# --- contextualizers ---


def test_a_contextualizer_that_cannot_be_written_is_used_from_memory(
    arguments, failing, monkeypatch, tmp_path, capsys
):
    from mlm_plugin.config.pretraining import PretrainOptions

    quick = PretrainOptions(max_train_steps=2, batch_size=4, eval_every_n_steps=2, num_held_out=8)
    monkeypatch.setattr("mlm_plugin.pretraining.find.SMALL_ENCODER", quick)
    monkeypatch.setenv("MLM_PLUGIN_CACHE", str(tmp_path / "cache"))
    failing("-r", errno.ENOSPC)  # contextualizers in the cache
    flags = ["--mlm_target", "class", "--mlm_loss_weight", "0.1", "--mlm_batch_size", "2"]
    assert train_main([*arguments, *flags]) == 0
    text = output(capsys)
    assert text.count("the contextualizer cannot be kept") == 1
    with safe_open(tmp_path / "out" / "dog.safetensors", framework="pt") as file:
        from_memory = file.metadata()["ss_mlm_contextualizer"]
    assert len(from_memory) == 16
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []


def test_a_contextualizer_made_by_hand_is_saved_elsewhere(toy_folder, failing, tmp_path, capsys):
    failing("mine", errno.ENOSPC)
    flags = ["--max_train_steps", "2", "--batch_size", "4", "--num_held_out", "8"]
    model = ["--pretrained_model_name_or_path", str(toy_folder)]
    output_file = str(tmp_path / "mine.safetensors")
    assert main(["pretrain", *model, "--output", output_file, *flags]) == 1
    (saved,) = tmp_path.glob("temporary/mlm_plugin-*/mine.safetensors")
    assert load_file(saved)
    assert str(saved) in output(capsys)


def test_a_cache_that_is_full_is_replaced_by_a_temporary_folder(
    failing, monkeypatch, tmp_path, caplog
):
    from mlm_plugin.files import cached_folder

    logging.getLogger("mlm_plugin").propagate = True
    monkeypatch.setenv("MLM_PLUGIN_CACHE", str(tmp_path / "cache"))
    failing("model", errno.ENOSPC)
    folder = cached_folder("some/model", lambda path: path.mkdir())
    assert folder.is_relative_to(tmp_path / "temporary")
    assert cached_folder("some/model", lambda path: path.mkdir()) == folder
    messages = {record.getMessage() for record in caplog.records}
    assert len([text for text in messages if "MLM_PLUGIN_CACHE" in text]) == 1


# --- samples ---


def test_a_sample_that_runs_out_of_memory_says_so_and_the_others_are_drawn(
    arguments, monkeypatch, tmp_path, capsys
):
    from mlm_plugin.training import samples

    denoise = samples.denoise

    def too_large(*values, **settings):
        if values[3].num_steps == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return denoise(*values, **settings)

    monkeypatch.setattr(samples, "denoise", too_large)
    flags = filled((*SAMPLES, "PROMPTS"), tmp_path)
    assert train_main([*arguments, *flags]) == 0
    assert "'a dog' is left out (out of memory at 64 x 64" in output(capsys)
    assert [p.name[:13] for p in (tmp_path / "out" / "sample").iterdir()] == ["dog_000002_01"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_stop_while_drawing_is_no_failed_sample(arguments, monkeypatch, tmp_path, error):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr("mlm_plugin.training.samples.denoise", stop)
    flags = filled((*SAMPLES, "PROMPTS"), tmp_path)
    if error is SystemExit:
        with pytest.raises(SystemExit):
            train_main([*arguments, *flags])
    else:
        assert train_main([*arguments, *flags]) == 130


# --- kills ---

EVERYTHING = (
    *("--save_every_n_steps", "1", "--save_state", "--cache_latents_to_disk"),
    *(*SAMPLES, "PROMPTS"),
)
KILLED_AT = ["_sd.npz", "dog-step00000001.safetensors", "dog_000002_00_", "dog-state", "dog.json"]


def killed_run(arguments, part, *, after):
    """Run it in a child process that is killed before or after a file gets this name."""
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        replace = os.replace

        def kill(source, target):
            if part in Path(target).name:
                if after:
                    replace(source, target)
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = kill
        try:
            train_main(arguments)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@pytest.mark.parametrize("part", KILLED_AT)
def test_after_a_kill_the_next_run_of_that_name_is_whole(arguments, tmp_path, part):
    flags = [*arguments, *filled(EVERYTHING, tmp_path)]
    after = KILLED_AT.index(part) % 2 == 1
    assert killed_run(flags, part, after=after) == signal.SIGKILL
    folders = [tmp_path / "out", tmp_path / "pictures"]
    for folder in folders:
        for path in folder.rglob(".*"):
            os.utime(path, (0, 0))
        torn(folder)
    assert train_main(flags) == 0
    assert [torn(folder) for folder in folders] == [[], []]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"dog.safetensors", "dog.json", "dog.preview.png", "dog-state"} <= names


# --- what earlier runs left ---


@pytest.mark.parametrize(
    "name",
    ["n_lora", "n_bundle", "n_sks_xti", "n_embedding", "n-best", "n-000002", "n-000002_lora",
     "n-step00000400_embedding_sks", "n-step00000400-state/", "n-state/"],
)  # fmt: skip
def test_files_of_an_earlier_run_are_named(name, tmp_path, caplog):
    for other in ("n2.safetensors", "nn_lora.safetensors", "n_lora.txt"):
        (tmp_path / other).touch()
    require_output_name(OutputOptions(output_dir=str(tmp_path), output_name="n"))
    assert not caplog.messages
    path = tmp_path / (name if name.endswith("/") else f"{name}.safetensors")
    path.mkdir() if name.endswith("/") else path.touch()
    require_output_name(OutputOptions(output_dir=str(tmp_path), output_name="n"))
    (message,) = caplog.messages
    assert f"with this output_name: {path.name}; those" in message


def test_temporaries_in_the_folders_of_pictures_and_samples_are_removed(arguments, tmp_path):
    (pictures,) = (tmp_path / "pictures").iterdir()
    samples = tmp_path / "out" / "sample"
    samples.mkdir(parents=True)
    old = [
        pictures / ".0_0096x0096_sd.abcdefgh.tmp.npz",
        samples / ".dog_000002_00_20260101000000_1.abcdefgh.tmp.png",
        tmp_path / "out" / ".dog-step00000001_embedding.abcdefgh.tmp.safetensors",
    ]
    kept = [pictures / ".mine.abcdefgh.tmp.npz", pictures / ".hidden.txt"]
    for path in [*old, *kept]:
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    new = pictures / ".1_0096x0096_sd.abcdefgh.tmp.npz"
    new.write_bytes(b"of a run beside this one")
    flags = [*PIVOTAL, "--cache_latents_to_disk", *filled((*SAMPLES, "PROMPTS"), tmp_path)]
    assert train_main([*arguments, *flags]) == 0
    assert not [path.name for path in old if path.exists()]
    assert all(path.exists() for path in [*kept, new])


@pytest.fixture
def immutable():
    """Makes a file or folder immutable, also for root; and undoes it."""
    made = []

    def make(path):
        made.append(path)
        done = subprocess.run(["chattr", "+i", path], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("chattr +i needs root and a file system that knows it")

    if shutil.which("chattr") is None:
        pytest.skip("there is no chattr")
    yield make
    for path in made:
        subprocess.run(["chattr", "-i", path], capture_output=True, check=False)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_is_immutable_is_refused_before_training(arguments, immutable, tmp_path, capsys, what):
    out = tmp_path / "out"
    out.mkdir()
    (out / "dog.safetensors").write_bytes(b"old")
    immutable(out if what == "folder" else out / "dog.safetensors")
    assert train_main(arguments) == 2
    text = output(capsys)
    assert {"file": "output_name", "folder": "output_dir"}[what] in text
    assert "steps:" not in text
    assert (out / "dog.safetensors").read_bytes() == b"old"


def test_a_read_only_file_is_replaced_as_its_folder_can_be_written(arguments, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "dog.safetensors").write_bytes(b"old")
    (out / "dog.safetensors").chmod(0o444)
    assert train_main([*arguments, "--max_train_steps", "1"]) == 0
    assert load_file(out / "dog.safetensors")


@pytest.mark.parametrize("flags", [(), ("--save_state", "--save_every_n_steps", "1")])
def test_what_becomes_immutable_during_the_run_is_told(
    arguments, immutable, monkeypatch, tmp_path, capsys, flags
):
    """Between the check and the save anything can happen."""
    from mlm_plugin.training.trainer import Trainer

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    out, step = tmp_path / "out", Trainer._train_step

    def train_step(*values, **settings):
        immutable(out)
        return step(*values, **settings)

    monkeypatch.setattr(Trainer, "_train_step", train_step)
    assert train_main([*arguments, *flags]) == 1
    text = output(capsys)
    assert "Traceback" not in text
    assert list(out.iterdir()) == []
    rescued = {path.name for path in (tmp_path / "temporary").glob("mlm_plugin-*/*")}
    assert rescued == {"rescued.safetensors", *(["rescued-state"] if flags else [])}


def test_a_name_that_is_taken_is_said_before_training(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name in ["dog.safetensors", "dog_embedding.safetensors", "dog.pt", "dogs.safetensors"]:
        (out / name).write_bytes(b"")
    (out / "dog-state").mkdir()
    assert train_main([*arguments, "--max_train_steps", "1"]) == 0
    text = output(capsys)
    assert text.count("dog.safetensors exists and will be replaced") == 1
    assert "output_name: dog-state, dog.pt, dog_embedding.safetensors; those that" in text
    assert "dogs" not in text
    assert text.index("will be replaced") < text.index("steps:")


def test_the_preview_of_an_earlier_run_is_replaced_or_named(arguments, tmp_path, capsys):
    flags = filled((*SAMPLES, "PROMPTS"), tmp_path)
    assert train_main([*arguments, *flags]) == 0
    preview = tmp_path / "out" / "dog.preview.png"
    first = preview.read_bytes()
    (tmp_path / "prompts.txt").write_text("a dog --w 64 --h 64 --s 1 --d 2\n")
    assert train_main([*arguments, *flags]) == 0
    assert preview.read_bytes() != first
    capsys.readouterr()
    assert train_main(arguments) == 0
    assert "dog.preview.png is from an earlier run with this output_name" in output(capsys)


@pytest.fixture(autouse=True)
def _logged():
    logging.getLogger("mlm_plugin").propagate = False
