"""`mlm-plugin estimate`: full-size models by their counts, the table, and mistakes in one line."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mlm_plugin.cli import main
from mlm_plugin.commands.estimate import estimate_of
from mlm_plugin.estimate.meta_run import largest_batch
from mlm_plugin.estimate.options import parse_estimate
from mlm_plugin.estimate.step import LABELS
from mlm_plugin.models.checkpoint_file import ARCHITECTURES
from mlm_plugin.models.checkpoints import ModelSettings, empty_stable_diffusion
from mlm_plugin.toy import build_toy_tokenizer, toy_corpus

ROOT = Path(__file__).parents[2]
COUNTS = {  # U-Net, text encoders; the VAE is the same in all
    "sd_v1": (859_520_964, 123_060_480),
    "sd_v2": (865_910_724, 340_387_840),
    "sdxl": (2_567_463_684, 123_060_480, 694_659_840),
}
VAE_COUNT = 83_653_863
SMALL = ("--resolution", "64", "--no_savings", "--mlm_batch_size", "2")


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_toy_tokenizer(folder, toy_corpus(num_prompts=100))
    return folder


# --- models without weights -----------------------------------------------------------------


@pytest.mark.parametrize("family", COUNTS)
def test_a_model_without_weights_has_the_known_counts(family, tokenizer_folder):
    settings = ModelSettings(tokenizer_cache_dir=tokenizer_folder)
    models = empty_stable_diffusion(ARCHITECTURES / family, settings)
    networks = [models.unet, *(te.model for te in models.text_encoders)]
    assert tuple(map(count, networks)) == COUNTS[family]
    assert count(models.vae) == VAE_COUNT
    assert models.family == family
    assert all(p.is_meta for network in networks for p in network.parameters())


def test_a_checkpoint_file_is_known_by_its_header(tmp_path, tokenizer_folder):
    path = tmp_path / "model.safetensors"
    prefixes = ("model.diffusion_model.out.0", "conditioner.embedders.0.transformer.x")
    save_file({f"{prefix}.weight": torch.zeros(1) for prefix in prefixes}, path)
    models = empty_stable_diffusion(path, ModelSettings(tokenizer_cache_dir=tokenizer_folder))
    assert models.is_sdxl


# --- the command ----------------------------------------------------------------------------


def test_the_table_adds_up(toy_folder, capsys):
    assert main(["estimate", "--pretrained_model_name_or_path", str(toy_folder), *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "trained weights" in printed
    assert "Predicted, not measured." in printed
    assert "what would save memory" not in printed


def test_what_would_save_memory_is_listed_with_its_price(toy_folder, capsys):
    arguments = ["--pretrained_model_name_or_path", str(toy_folder), *SMALL]
    arguments.remove("--no_savings")
    settled = ["--gradient_checkpointing", "--mixed_precision=bf16", "--full_bf16"]
    settled += ["--method=textual_inversion", "--optimizer_type=Lion8bit", "--mlm_loss_weight=0"]
    assert main(["estimate", "--train_batch_size=2", *settled, *arguments]) == 0
    _, _, savings = capsys.readouterr().out.partition("what would save memory, each alone:\n")
    assert "cache_latents = true" in savings
    assert "train_batch_size = 1" in savings
    assert 'quantize_unet = "nf4"' in savings
    assert all(re.search(r" -\d+\.\d\d MiB +\(.+\)$", line) for line in savings.splitlines())


def test_neither_pictures_nor_a_model_are_needed(capsys):
    preset = str(ROOT / "presets" / "sd15_8gb.toml")
    arguments = ["--config_file", preset, "--architecture", "sd_v1", *SMALL]
    assert main(["estimate", *arguments]) == 0
    assert "512" not in capsys.readouterr().out.splitlines()[0]


def test_pictures_of_the_largest_data_set_count(tmp_path, toy_pictures):
    folder = next(toy_pictures.iterdir())
    subset = f'subsets = [{{ image_dir = "{folder}", class_tokens = "sks dog" }}]'
    sets = [(512, 2), (768, 1), (640, 2)]
    tables = [f"[[datasets]]\nresolution = {r}\nbatch_size = {b}\n{subset}\n" for r, b in sets]
    path = tmp_path / "data.toml"
    path.write_text("\n".join(tables))
    config = parse_estimate(["--dataset_config", str(path)]).config
    assert largest_batch(config) == (2, 640, 640)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--resolution", "64"], "pretrained_model_name_or_path is missing"),
        (["--architecture", "sd_v3"], "invalid choice: 'sd_v3'"),
        (["--architecture", "sd_v1", "--resolution", "big"], "resolution = 'big' is not allowed"),
        (["--architecture", "sd_v1"], "resolution is missing"),
        (["--architecture", "sd_v1", "--resolutoin", "64"], "resolution"),
        (["--architecture", "sdxl", "--method", "xti", "--resolution", "64"], "is SDXL"),
        (
            ["--pretrained_model_name_or_path", "no/model", "--resolution", "64"],
            "no/model is not on this machine",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, says, capsys):
    assert main(["estimate", *arguments]) == 2
    printed = capsys.readouterr().err.rsplit("\r")[-1].strip()  # behind the progress bar
    assert printed.startswith("error: ")
    assert says in printed
    assert len(printed.splitlines()) == 1


# --- what must hold for any training --------------------------------------------------------


@cache
def peak(folder, *arguments):
    flags = ["--pretrained_model_name_or_path", str(folder), "--output_dir", "unused", *SMALL]
    return estimate_of(parse_estimate([*flags, *arguments]).config).peak


def test_more_pictures_take_more_and_half_precision_takes_less(toy_folder):
    assert peak(toy_folder, "--train_batch_size", "4") > peak(toy_folder)
    assert peak(toy_folder, "--mixed_precision", "bf16") < peak(toy_folder)


def test_fewer_bits_take_less(toy_folder):
    peaks = [peak(toy_folder, "--quantize_unet", kind) for kind in ("nf4", "int8", "no")]
    assert peaks == sorted(peaks)
    assert len(set(peaks)) == 3


def test_the_term_costs_its_contextualizer_and_activations_where_they_are_the_peak(toy_folder):
    with_words = peak(toy_folder, "--mlm_target", "class")
    assert peak(toy_folder) == peak(toy_folder, "--mlm_loss_weight", "0") < with_words
    batch = ("--mlm_target", "class", "--mlm_batch_size")
    assert peak(toy_folder, *batch, "4") == with_words  # those of the U-Net went
    assert peak(toy_folder, *batch, "64") > with_words


def test_steps_inside_the_backward_pass_save_the_gradients_of_the_u_net(toy_folder, capsys):
    arguments = ["--pretrained_model_name_or_path", str(toy_folder), *SMALL]
    arguments.remove("--no_savings")
    dreambooth = ("--method", "dreambooth")
    settled = ("--gradient_checkpointing", "--optimizer_type=SGD", "--mlm_loss_weight=0")
    assert main(["estimate", *dreambooth, *settled, "--output_dir", "x", *arguments]) == 0
    assert "fused_backward_pass = true" in capsys.readouterr().out
    fused = peak(toy_folder, *dreambooth, "--fused_backward_pass")
    assert fused < 0.9 * peak(toy_folder, *dreambooth)


def test_every_byte_has_a_label(toy_folder):
    flags = ["--pretrained_model_name_or_path", str(toy_folder), "--output_dir", "x", *SMALL]
    estimate = estimate_of(parse_estimate([*flags, "--cache_latents"]).config)
    assert set(estimate.moments) == {"caching", "training step", "optimizer step"}
    for moment in estimate.moments.values():
        assert {label for label, nbytes in moment.items() if nbytes} <= set(LABELS)


def test_the_list_of_savings_shows_how_far_it_is_while_the_table_can_be_read(capsys, toy_folder):
    flags = ["--pretrained_model_name_or_path", str(toy_folder), "--resolution", "64"]
    settled = ["--method=textual_inversion", "--optimizer_type=Lion8bit", "--quantize_unet=int8"]
    settled += ["--mixed_precision=bf16", "--full_bf16", "--cache_latents", "--mlm_loss_weight=0"]
    assert main(["estimate", *flags, *settled]) == 0
    shown = capsys.readouterr()
    assert "counting" in shown.err
    assert re.search(r"what would save memory: +0%", shown.err)
    assert "gradient_checkpointing = true" in shown.err
    assert "gradient_checkpointing = true" in shown.out


def test_what_the_training_would_refuse_is_not_suggested(
    capsys, toy_folder, toy_pictures, tmp_path
):
    dataset = tmp_path / "d.toml"
    dataset.write_text(
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n"
        f"image_dir = {str(toy_pictures)!r}\nclass_tokens = 'sks dog'\nrandom_crop = true\n"
    )
    flags = ["--pretrained_model_name_or_path", str(toy_folder), "--dataset_config", str(dataset)]
    assert main(["estimate", *flags, "--method=lora", "--mlm_loss_weight=0"]) == 0
    shown = capsys.readouterr().out
    assert "gradient_checkpointing = true" in shown
    assert "cache_latents" not in shown


def test_the_quickstart_preset_is_estimated(capsys):
    preset = ROOT / "presets" / "quickstart.toml"
    assert main(["estimate", "--config_file", str(preset), "--no_savings"]) == 0
    assert "training step" in capsys.readouterr().out
