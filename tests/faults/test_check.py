"""What can be known before a model is loaded is said then, by ``--check`` and by the run alike."""

import json
import shutil

import pytest

from mlm_plugin.cli import train_main

REFUSED_EARLY = {
    "unknown network": ["--network_module", "networks.dylora"],
    "unknown network setting": ["--network_args", "conv_dims=4"],
    "network weights absent": ["--network_weights", "absent.safetensors"],
    "no state": ["--resume", "absent-state"],
    "no prompt file": ["--sample_prompts", "absent.txt", "--sample_every_n_steps", "1"],
    "fp16 without a GPU": ["--mixed_precision", "fp16"],
    "optimizer not installed": ["--optimizer_type", "DAdaptAdam"],
    "unknown optimizer": ["--optimizer_type", "AdamX"],
    "unknown optimizer setting": ["--optimizer_args", "weight_decoy=1"],
    "unknown schedule": ["--lr_scheduler", "cosinus"],
    "prompt set absent": ["--mlm_prompt_set", "absent.toml"],
    "contextualizer absent": ["--mlm_contextualizer", "absent.safetensors"],
    "VAE absent": ["--vae", "/absent/vae"],
    "tracker settings absent": ["--logging_dir", "logs", "--log_tracker_config", "absent.toml"],
    "term starts too late": ["--mlm_start_step", "60", "--max_train_epochs", "1"],
    "nothing trained at the end": ["--stop_unet_training=1", "--stop_text_encoder_training=1"],
}


@pytest.fixture
def arguments(toy_folder, toy_pictures, toy_contextualizer, tmp_path, monkeypatch):
    """Flags of a small run."""
    monkeypatch.chdir(tmp_path)
    return [
        *("--pretrained_model_name_or_path", str(toy_folder)),
        *("--train_data_dir", str(toy_pictures)),
        *("--mlm_target", "class", "--mlm_contextualizer", str(toy_contextualizer)),
        *("--output_dir", str(tmp_path / "out")),
        *"--caption_extension .txt --resolution 64 --learning_rate 1e-3 --seed 1".split(),
        *"--max_train_steps 2 --max_data_loader_n_workers 0 --mlm_batch_size 2".split(),
    ]


@pytest.fixture(autouse=True)
def _fresh(_fresh_accelerator):
    """A process trains once."""


def refusal_of(arguments, capsys):
    """The one line that the command ends with."""
    assert train_main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def damaged_model(toy_folder, tmp_path):
    """A model whose weights cannot be read: what comes before them is told first."""
    folder = tmp_path / "damaged"
    shutil.copytree(toy_folder, folder)
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(b"nothing")
    return folder


@pytest.mark.parametrize("name", REFUSED_EARLY)
def test_the_check_and_the_run_refuse_it_before_weights_are_read(
    name, arguments, damaged_model, tmp_path, capsys
):
    flags = [*arguments, "--pretrained_model_name_or_path", str(damaged_model)]
    run = refusal_of([*flags, *REFUSED_EARLY[name]], capsys)
    assert "cannot be read as safetensors" not in run
    assert refusal_of([*flags, *REFUSED_EARLY[name], "--check"], capsys) == run


@pytest.mark.parametrize("model", ["/absent/model", "absent.safetensors"])
def test_a_missing_model_is_told_by_the_check(model, arguments, capsys):
    flags = [*arguments, "--pretrained_model_name_or_path", model]
    assert model in refusal_of([*flags, "--check"], capsys)
    assert model in refusal_of(flags, capsys)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_without_weights_is_told_by_the_check(part, arguments, toy_folder, tmp_path, capsys):
    shutil.copytree(toy_folder, tmp_path / "model")
    for path in (tmp_path / "model" / part).glob("*.safetensors"):
        path.unlink()
    flags = [*arguments, "--pretrained_model_name_or_path", str(tmp_path / "model"), "--check"]
    assert part in refusal_of(flags, capsys)


def test_the_check_says_that_a_model_was_made_for_zero_terminal_snr(
    arguments, toy_folder, tmp_path, capsys
):
    shutil.copytree(toy_folder, tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    marks = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | marks))
    flags = [*arguments, "--pretrained_model_name_or_path", str(tmp_path / "model"), "--check"]
    assert train_main(flags) == 0
    assert "set --zero_terminal_snr" in capsys.readouterr().err
    assert train_main([*flags, "--v_parameterization", "--zero_terminal_snr"]) == 0
    assert "set --zero_terminal_snr" not in capsys.readouterr().err


def test_a_model_on_the_hub_is_said_to_be_unchecked(arguments, capsys):
    flags = [*arguments, "--pretrained_model_name_or_path", "nobody/nothing", "--check"]
    assert train_main(flags) == 0
    assert "nobody/nothing is not on this machine" in capsys.readouterr().out


def test_the_check_prints_concept_steps_and_epochs_and_writes_nothing(arguments, tmp_path, capsys):
    assert train_main([*arguments, "--check", "--max_train_steps", "60"]) == 0
    printed = capsys.readouterr().out
    assert "Concept: 'sks' is a dog" in printed
    assert "Length: 60 step(s), 2 epoch(s)" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--sample_prompts", "absent.txt"],
        ["--log_tracker_config", "absent.toml"],
        ["--mlm_prompt_set", "absent.toml", "--mlm_loss_weight", "0"],
        ["--mlm_contextualizer", "absent.safetensors", "--mlm_target", "states"],
        ["--weights", "absent.safetensors"],
        ["--network_weights=absent.safetensors", "--method=dreambooth", "--mlm_loss_weight=0"],
    ],
    ids=" ".join,
)
def test_a_file_said_to_have_no_effect_is_not_missed(flags, arguments, capsys):
    flags = [*arguments, *flags, "--max_train_steps", "1"]
    for command in ([*flags, "--check"], flags):
        assert train_main(command) == 0
        assert "no effect" in capsys.readouterr().err
