"""The standalone trainer as a user runs it: files, names, metadata, signals, refusals."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops, ImageStat
from safetensors import safe_open
from safetensors.torch import load_file

from mlm_plugin.cli import train_main
from mlm_plugin.config.loading import load_config
from mlm_plugin.config.pretraining import PretrainOptions
from mlm_plugin.contextualizer_file import cached_contextualizer_path
from mlm_plugin.methods import METHODS
from mlm_plugin.pretraining.find import find_contextualizer
from mlm_plugin.pretraining.run import pretrain
from mlm_plugin.setup.saving import Saver

ROOT = Path(__file__).parents[2]
TEXT_ONLY = ("--network_train_text_encoder_only",)  # where the network does not matter: quicker
QUICK = PretrainOptions(max_train_steps=3, batch_size=4, eval_every_n_steps=3, num_held_out=8)


@pytest.fixture(scope="session")
def contextualizer(toy_folder, tmp_path_factory):
    from transformers import CLIPTextModel, CLIPTokenizer

    from mlm_plugin.models.text_encoder import TextEncoder

    text_encoder = TextEncoder(
        CLIPTokenizer.from_pretrained(toy_folder / "tokenizer"),
        CLIPTextModel.from_pretrained(toy_folder / "text_encoder").eval(),
    )
    path = tmp_path_factory.mktemp("contextualizer") / "toy.safetensors"
    pretrain(text_encoder, path, options=QUICK, show_progress=False)
    return path


@pytest.fixture
def arguments(toy_folder, toy_pictures, contextualizer, tmp_path):
    """Flags of a small run; later flags take precedence."""
    return [
        *("--pretrained_model_name_or_path", str(toy_folder)),
        *("--train_data_dir", str(toy_pictures)),
        *("--caption_extension", ".txt"),
        *("--resolution", "64"),
        *("--network_dim", "4"),
        *("--network_alpha", "4"),
        *("--learning_rate", "1e-3"),
        *("--max_train_steps", "4"),
        *("--max_data_loader_n_workers", "0"),
        *("--seed", "1"),
        *("--mlm_target", "class", "--mlm_contextualizer", str(contextualizer)),
        *("--mlm_batch_size", "2"),
        *("--output_dir", str(tmp_path / "out")),
        *("--output_name", "dog"),
    ]


@pytest.fixture(autouse=True)
def _fresh(_fresh_accelerator):
    """A process trains once."""


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_same_weights(a, b):
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_a_run_writes_a_lora_a_sidecar_and_says_what_it_is(arguments, tmp_path, capsys):
    assert train_main([*arguments, "--save_precision", "fp16"]) == 0
    printed = capsys.readouterr().out
    assert "5 images, 50 per epoch" in printed
    assert "5 of 5 (100%) captions hold 'sks dog'" in printed
    assert "'sks' is a dog; the tokenizer reads it as 1 token(s)" in printed
    assert names_in(tmp_path / "out") == ["dog.json", "dog.safetensors"]

    state = load_file(tmp_path / "out" / "dog.safetensors")
    modules = {key.split(".")[0] for key in state}
    assert sum(name.startswith("lora_unet_") for name in modules) == 192
    assert sum(name.startswith("lora_te_text_model_") for name in modules) == 12
    assert {key.split(".", 1)[1] for key in state} == {
        "alpha",
        "lora_down.weight",
        "lora_up.weight",
    }
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all((state[k] != 0).any() for k in state if k.endswith("lora_up.weight"))

    metadata = metadata_of(tmp_path / "out" / "dog.safetensors")
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["ss_v2"] == "False"
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_steps"] == "4"
    assert metadata["ss_mlm_loss_weight"] == "0.1"
    assert metadata["ss_mlm_prompt_set"] == "living"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.trigger_phrase"] == "sks dog"
    assert len(metadata["sshs_model_hash"]) == 64
    sidecar = json.loads((tmp_path / "out" / "dog.json").read_text())
    assert sidecar["activation text"] == "sks dog"
    assert sidecar["sd version"] == "SD1"


def test_the_same_command_gives_the_same_file(arguments, tmp_path):
    for name in ("a", "b"):
        assert train_main([*arguments, "--output_name", name]) == 0
    assert_same_weights(*(tmp_path / "out" / f"{name}.safetensors" for name in "ab"))


def test_cached_latents_and_loader_processes_do_not_change_the_result(arguments, tmp_path):
    assert train_main([*arguments, "--output_name", "a"]) == 0
    assert train_main([*arguments, "--output_name", "b", "--max_data_loader_n_workers", "2"]) == 0
    assert_same_weights(*(tmp_path / "out" / f"{name}.safetensors" for name in "ab"))
    assert train_main([*arguments, "--output_name", "c", "--cache_latents"]) == 0
    c = load_file(tmp_path / "out" / "c.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in c.values())


def test_files_and_states_have_kohyas_names_and_old_ones_go(arguments, tmp_path):
    flags = ["--save_every_n_steps", "2", "--save_last_n_steps", "2", "--save_state", *TEXT_ONLY]
    assert train_main([*arguments, *flags, "--max_train_steps", "8"]) == 0
    assert names_in(tmp_path / "out") == [
        "dog-state",
        "dog-step00000004-state",
        "dog-step00000004.safetensors",
        "dog-step00000006-state",
        "dog-step00000006.safetensors",
        "dog.json",
        "dog.safetensors",
    ]
    assert metadata_of(tmp_path / "out" / "dog-step00000004.safetensors")["ss_steps"] == "4"


def test_epochs_are_saved_by_number_and_the_last_is_the_final_file(arguments, tmp_path):
    flags = ["--train_batch_size", "25", "--max_train_epochs", "3", "--save_every_n_epochs", "1"]
    assert train_main([*arguments, *flags, *TEXT_ONLY]) == 0
    assert names_in(tmp_path / "out") == [
        "dog-000001.safetensors",
        "dog-000002.safetensors",
        "dog.json",
        "dog.safetensors",
    ]
    assert metadata_of(tmp_path / "out" / "dog.safetensors")["ss_epoch"] == "3"


def test_samples_are_drawn_without_a_trace_in_training_and_become_the_preview(
    arguments, tmp_path, capsys
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# a comment\n[trigger] on the beach --w 64 --h 64 --s 2 --d 5 --l 3\n")
    assert train_main([*arguments, "--output_name", "plain"]) == 0
    flags = ["--sample_prompts", str(prompts), "--sample_every_n_steps", "2", "--sample_at_first"]
    assert train_main([*arguments, *flags]) == 0
    out = tmp_path / "out"
    assert_same_weights(out / "plain.safetensors", out / "dog.safetensors")
    samples = names_in(out / "sample")
    assert [name.rsplit("_", 2)[0] for name in samples] == [
        "dog_000000_00",
        "dog_000002_00",
        "dog_000004_00",
    ]
    with Image.open(out / "dog.png") as preview:
        assert preview.size == (256, 256)
    assert f"samples: {(out / 'sample').resolve()}" in capsys.readouterr().out


def prompts_file(tmp_path, size=64):
    path = tmp_path / "prompts.txt"
    path.write_text(f"[trigger] on the beach --w {size} --h 64 --s 1\n")
    return str(path)


@pytest.mark.parametrize(
    ("method", "previews"),
    [
        ("lora", ["dog.png"]),
        ("dreambooth", ["dog.png"]),
        ("textual_inversion", ["dog.preview.png"]),
        ("pivotal", ["dog.png", "dog_embedding.preview.png"]),
    ],
)
def test_the_final_file_shows_the_newest_sample(arguments, method, previews, tmp_path):
    flags = ["--sample_prompts", prompts_file(tmp_path, size=384), "--sample_every_n_steps", "2"]
    assert train_main([*arguments, *flags, "--method", method, "--save_every_n_steps", "2"]) == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.png")) == previews
    kind, _, content = metadata_of(out / "dog.safetensors")["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    newest = sorted((out / "sample").iterdir())[-1]
    with Image.open(io.BytesIO(base64.b64decode(content))) as shown, Image.open(newest) as sample:
        assert shown.size == (256, 43)
        difference = ImageChops.difference(shown, sample.convert("RGB").resize(shown.size))
        assert ImageStat.Stat(difference).mean < [24, 24, 24]
    assert "modelspec.thumbnail" not in metadata_of(out / "dog-step00000002.safetensors")


def test_pictures_of_the_untrained_model_are_not_shown(arguments, tmp_path):
    flags = ["--sample_prompts", prompts_file(tmp_path), "--sample_every_n_steps", "3"]
    steps = ["--sample_at_first", "--max_train_steps", "2", *TEXT_ONLY]
    assert train_main([*arguments, *flags, *steps]) == 0
    assert names_in(tmp_path / "out") == ["dog.json", "dog.safetensors", "sample"]
    assert "modelspec.thumbnail" not in metadata_of(tmp_path / "out" / "dog.safetensors")


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\n damaged"])
def test_a_sample_that_cannot_be_read_costs_only_the_thumbnail(
    arguments, content, tmp_path, monkeypatch, capsys
):
    end = Saver.on_train_end

    def damaged(self, trainer):
        (sample,) = (tmp_path / "out" / "sample").iterdir()
        sample.unlink() if content is None else sample.write_bytes(content)
        end(self, trainer)

    monkeypatch.setattr(Saver, "on_train_end", damaged)
    flags = ["--sample_prompts", prompts_file(tmp_path), "--sample_every_n_steps", "4"]
    assert train_main([*arguments, *flags, *TEXT_ONLY]) == 0
    assert "the sample is not in the header" in capsys.readouterr().err
    assert "modelspec.thumbnail" not in metadata_of(tmp_path / "out" / "dog.safetensors")


def test_curves_carry_kohyas_tags_and_ours(arguments, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--logging_dir", str(tmp_path / "logs"), "--log_prefix", "dog-"]
    assert train_main([*arguments, *flags, "--train_batch_size", "25"]) == 0
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("dog-")
    events = EventAccumulator(str(folder / "network_train"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "loss/current",
        "loss/average",
        "loss/epoch_average",
        "loss/diffusion",
        "loss/mlm",
        "mlm/accuracy",
        "te/drift_cos",
        "lr/unet",
        "lr/textencoder",
    } <= tags
    assert len(events.Scalars("loss/current")) == 4
    drift = [event.value for event in events.Scalars("te/drift_cos")]
    assert drift[-1] < 1 + 1e-6
    assert drift[-1] != drift[0]


def test_lycoris_trains_where_it_is_installed(arguments, tmp_path):
    pytest.importorskip("lycoris")
    flags = ["--network_module", "lycoris.kohya", "--network_args", "algo=lokr", "factor=4"]
    assert train_main([*arguments, *flags, "--max_train_steps", "2"]) == 0
    state = load_file(tmp_path / "out" / "dog.safetensors")
    assert any("lokr_w1" in key for key in state)
    assert any(key.startswith("lora_te_text_model_encoder_") for key in state)


def test_a_packed_u_net_draws_waits_on_the_cpu_and_is_named_in_the_file(arguments, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("[trigger] on the beach --w 64 --h 64 --s 2 --d 5 --l 3\n")
    samples = ["--sample_prompts", str(prompts), "--sample_every_n_steps", "2"]
    packed = ["--quantize_unet", "nf4", "--cache_latents", "--mixed_precision", "bf16"]
    assert train_main([*arguments, *packed, *samples, "--max_train_steps", "2"]) == 0
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1
    assert metadata_of(tmp_path / "out" / "dog.safetensors")["ss_mlm_quantize_unet"] == "nf4"


@pytest.mark.parametrize(
    "flags",
    [
        ["--mixed_precision", "bf16"],
        ["--mixed_precision", "bf16", "--full_bf16", "--gradient_checkpointing"],
        ["--optimizer_type", "AdamW8bit", "--lr_scheduler", "cosine", "--lr_warmup_steps", "1"],
        ["--network_args", "conv_dim=2", "conv_alpha=1", "--scale_weight_norms", "1"],
        ["--network_train_text_encoder_only"],
        ["--max_token_length", "150", "--clip_skip", "1", "--min_snr_gamma", "5"],
        ["--noise_offset", "0.05", "--gradient_accumulation_steps", "2", "--flip_aug"],
        ["--mlm_prompt_set", "captions", "--mlm_replace", "bert", "--mlm_every_n_steps", "2"],
    ],
    ids=lambda flags: " ".join(flags).replace("--", ""),
)
def test_common_settings_train_to_finite_weights(arguments, tmp_path, flags):
    assert train_main([*arguments, "--max_train_steps", "2", *flags]) == 0
    state = load_file(tmp_path / "out" / "dog.safetensors")
    assert all(torch.isfinite(tensor.float()).all() for tensor in state.values())


def test_weight_0_needs_no_contextualizer_and_no_concept(arguments, tmp_path):
    flags = ["--mlm_loss_weight", "0", "--mlm_contextualizer", "absent.safetensors"]
    assert train_main([*arguments, *flags]) == 0
    metadata = metadata_of(tmp_path / "out" / "dog.safetensors")
    assert metadata["ss_mlm_loss_weight"] == "0.0"
    assert "ss_mlm_prompt_set" not in metadata


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--network_train_unet_only", "--mlm_read_at=encoder"], "network_train_unet_only"),
        (["--text_encoder_lr", "0", "--mlm_read_at", "encoder"], "text_encoder_lr"),
        (["--mlm_contextualizer", "absent.safetensors"], "absent.safetensors"),
        (["--mlm_prompt_set", "livng"], "living"),
        (["--train_data_dir", "nowhere"], "nowhere"),
        (["--pretrained_model_name_or_path", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--resume", "nowhere-state"], "nowhere-state"),
        (["--mixed_precision", "fp16"], "bf16"),
        (["--optimizer_type", "AdamWW"], "AdamWW"),
        (["--network_module", "networks.dylora"], "networks.dylora"),
        (["--sample_prompts", "nowhere.txt", "--sample_every_n_steps", "1"], "nowhere.txt"),
        (["--max_train_stepz", "1"], "max_train_steps"),
        (["--log_with", "wandb"], "wandb"),
        (["--output_dir", "/proc/nowhere"], "/proc/nowhere"),
        (["--cache_text_encoder_outputs"], "cache_text_encoder_outputs"),
        (["--quantize_unet", "int8", "--method", "dreambooth"], "quantize_unet = 'int8'"),
        (["--quantize_unet", "fp8"], "no, int8, nf4"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, tmp_path, capsys, flags, expected):
    assert train_main([*arguments, *flags]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert expected in error[0]
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--network_module", "networks.dylora"],
        ["--network_weights", "nowhere.safetensors"],
        ["--network_module=lycoris.kohya", "--network_args=algo=tlora"],
        ["--network_module=lycoris.kohya", "--network_args=algo=TLora"],
        ["--resume", "nowhere-state"],
        ["--pretrained_model_name_or_path", "nowhere.safetensors"],
        ["--vae", "nowhere.pt"],
        ["--sample_prompts", "nowhere.txt", "--sample_every_n_steps", "1"],
        ["--mixed_precision", "fp16"],
        ["--optimizer_type", "AdamWW"],
        ["--optimizer_type", "no_such_package.Adam"],
        ["--mlm_contextualizer", "nowhere.safetensors"],
        ["--mlm_prompt_set", "livng"],
        ["--mlm_prompt_set", "nowhere.toml"],
        ["--log_with", "wandb"],
        ["--metadata_thumbnail", "nowhere.png"],
        ["--metadata_thumbnail", __file__],
    ],
    ids=lambda flags: " ".join(flags[:2]),
)
def test_what_the_run_would_refuse_is_refused_by_check_in_the_same_words(arguments, capsys, flags):
    messages = []
    for also in ([], ["--check"]):
        assert train_main([*arguments, *flags, *also]) == 2
        lines = capsys.readouterr().err.splitlines()
        messages.append([line for line in lines if line.startswith("error: ")])
    assert messages[0] == messages[1]
    assert len(messages[0]) == 1


@pytest.mark.parametrize("given", ["", " wd_on_output=False", " wd_on_output=True"])
def test_what_a1111_makes_of_dora_is_said_once_at_the_start(arguments, given, capsys):
    pytest.importorskip("lycoris")
    dora = ["--network_args", "algo=locon", "dora_wd=True", *given.split()]
    flags = ["--network_module", "lycoris.kohya", *dora, "--mlm_loss_weight", "0"]
    for also in ([], ["--check"]):
        assert train_main([*arguments, *flags, "--max_train_steps", "1", *also]) == 0
        assert capsys.readouterr().err.count("for A1111 add wd_on_output=False") == (
            "False" not in given
        )


def test_a_prompt_file_that_is_never_drawn_from_does_not_end_the_run(arguments, capsys):
    assert train_main([*arguments, "--sample_prompts", "nowhere.txt", *TEXT_ONLY]) == 0
    assert "sample_prompts has no effect" in capsys.readouterr().err


def test_steps_as_a_flag_take_precedence_over_epochs_of_the_file(tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text("max_train_epochs = 3\nmax_train_steps = 50\n")
    assert load_config(["--config_file", str(toml)]).schedule.max_train_epochs == 3
    schedule = load_config(["--config_file", str(toml), "--max_train_steps", "7"]).schedule
    assert (schedule.max_train_steps, schedule.max_train_epochs) == (7, None)
    flags = ["--config_file", str(toml), "--max_train_steps", "7", "--max_train_epochs", "2"]
    assert load_config(flags).schedule.max_train_epochs == 2


def test_check_ends_before_the_model_is_loaded(arguments, capsys):
    flags = ["--pretrained_model_name_or_path", "not/there", "--check"]
    assert train_main([*arguments, *flags]) == 0
    assert "5 images" in capsys.readouterr().out


def test_output_config_writes_a_toml_that_gives_the_same_run(arguments, tmp_path):
    toml = tmp_path / "run.toml"
    arguments = [*arguments, *TEXT_ONLY]
    assert train_main([*arguments, "--config_file", str(toml), "--output_config"]) == 0
    assert train_main([*arguments, "--output_name", "flags"]) == 0
    assert train_main(["--config_file", str(toml), "--output_name", "toml"]) == 0
    out = tmp_path / "out"
    assert_same_weights(out / "flags.safetensors", out / "toml.safetensors")


def test_the_auto_contextualizer_is_made_once_and_found_again(toy_text_encoder, monkeypatch):
    monkeypatch.setattr("mlm_plugin.pretraining.find.SMALL_ENCODER", QUICK)
    path = cached_contextualizer_path(toy_text_encoder)
    path.unlink(missing_ok=True)
    made = find_contextualizer(toy_text_encoder, "auto", show_progress=False)
    before = path.stat().st_mtime_ns
    found = find_contextualizer(toy_text_encoder, "auto", show_progress=False)
    assert found.digest == made.digest
    assert path.stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes()[:1000])  # a damaged file is made again
    assert find_contextualizer(toy_text_encoder, "auto", show_progress=False).facts == made.facts
    toy_text_encoder.clip_skip = 2
    assert cached_contextualizer_path(toy_text_encoder) != path


def test_a_term_that_would_start_after_the_end_is_refused(arguments, capsys):
    flags = ["--train_batch_size", "25", "--max_train_epochs", "1", "--mlm_start_step", "9"]
    assert train_main([*arguments, *flags]) == 2
    assert "ends after 2 steps" in capsys.readouterr().err


def test_a_file_that_cannot_be_saved_on_the_way_does_not_end_the_run(
    arguments, tmp_path, monkeypatch
):
    from mlm_plugin.methods import lora

    save_lora, names = lora.save_lora, []

    def fail_once(path, *values, **more):
        names.append(path.name)
        if len(names) == 1:
            raise OSError(28, "No space left on device")
        save_lora(path, *values, **more)

    monkeypatch.setattr(lora, "save_lora", fail_once)
    assert train_main([*arguments, "--save_every_n_steps", "2"]) == 0
    assert names == ["dog-step00000002.safetensors", "dog.safetensors"]
    assert names_in(tmp_path / "out") == ["dog.json", "dog.safetensors"]


@pytest.mark.parametrize("method", METHODS)
def test_token_methods_ask_for_the_concept_even_without_the_mlm_term(
    arguments, tmp_path, capsys, method
):
    (tmp_path / "data" / "10_").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "data" / "10_" / "a.png")
    (tmp_path / "data" / "10_" / "a.txt").write_text("a photo of sks")
    flags = ["--train_data_dir", str(tmp_path / "data"), "--mlm_loss_weight", "0", "--check"]
    asks = METHODS[method].learns_tokens
    assert train_main([*arguments, *flags, "--method", method]) == (2 if asks else 0)
    assert ("the run needs to know the concept" in capsys.readouterr().err) == asks
    flags += ["--placeholder_token", "sks", "--class_token", "duck toy"]
    assert train_main([*arguments, *flags, "--method", method]) == 0


@pytest.mark.parametrize("stop", ["2", "0.5", "50%"])
def test_a_part_is_frozen_from_a_step_or_a_share_of_the_run_on(arguments, tmp_path, stop):
    flags = ["--save_every_n_steps", "2", "--mlm_loss_weight", "0"]
    assert train_main([*arguments, *flags, "--stop_text_encoder_training", stop]) == 0
    half = load_file(tmp_path / "out" / "dog-step00000002.safetensors")
    whole = load_file(tmp_path / "out" / "dog.safetensors")
    assert all(half[name].any() for name in half if name.endswith("lora_up.weight"))
    changed = [name for name in half if not torch.equal(half[name], whole[name])]
    assert changed
    assert all(name.startswith("lora_unet_") for name in changed)


def test_a_run_that_would_end_with_nothing_trained_is_refused(arguments, capsys):
    flags = ["--stop_text_encoder_training", "50%", "--stop_unet_training", "3"]
    assert train_main([*arguments, *flags]) == 2
    assert "nothing is trained from step 3 of 4 on" in capsys.readouterr().err


def test_resuming_with_other_settings_is_refused_by_name(arguments, tmp_path, capsys):
    assert train_main([*arguments, "--save_state", "--max_train_steps", "2"]) == 0
    state = str(tmp_path / "out" / "dog-state")
    flags = ["--resume", state, "--unet_lr", "1e-6", "--optimizer_type", "SGDNesterov"]
    assert train_main([*arguments, *flags]) == 2
    error = capsys.readouterr().err
    assert "unet_lr" in error
    assert "optimizer_type" in error
    longer = ["--resume", state, "--max_train_steps", "6", "--mlm_loss_weight", "0.01"]
    assert train_main([*arguments, *longer]) == 0  # length and the MLM term may change


def start(arguments):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train_network_mlm.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def wait_for(path, process):
    for _ in range(3000):  # a start takes a minute where many processes run
        if path.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    assert path.exists(), process.communicate()[0]


@pytest.mark.usefixtures("all_targets")  # as the process that is stopped
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_sigterm_saves_a_state_from_which_the_run_ends_as_a_straight_one(arguments, tmp_path):
    out = tmp_path / "out"
    long = [*arguments, "--max_train_steps", "16"]
    process = start([*long, "--save_every_n_steps", "2"])
    wait_for(out / "dog-step00000002.safetensors", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143, output
    (state,) = out.glob("dog-step*-state")
    assert f"--resume {state}" in output
    assert not (out / "dog.safetensors").exists()

    assert train_main([*long, "--resume", str(state)]) == 0
    assert train_main([*long, "--output_name", "straight"]) == 0
    assert_same_weights(out / "dog.safetensors", out / "straight.safetensors")


def test_a_run_whose_seed_was_drawn_can_be_resumed(arguments, tmp_path, capsys):
    at = arguments.index("--seed")
    unseeded = [*arguments[:at], *arguments[at + 2 :], *TEXT_ONLY]
    assert train_main([*unseeded, "--save_state", "--max_train_steps", "2"]) == 0
    state = tmp_path / "out" / "dog-state"
    assert train_main([*unseeded, "--resume", str(state)]) == 0
    metadata = metadata_of(tmp_path / "out" / "dog.safetensors")
    assert metadata["ss_steps"] == "4"
    assert metadata["ss_seed"] == str(json.loads((state / "train_state.json").read_text())["seed"])


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_kill_leaves_no_half_file_under_a_final_name(arguments, tmp_path):
    out = tmp_path / "out"
    process = start([*arguments, "--max_train_steps", "500", "--save_every_n_steps", "1"])
    wait_for(out / "dog-step00000003.safetensors", process)
    process.kill()
    process.communicate(timeout=300)
    for path in out.glob("dog*.safetensors"):
        load_file(path)  # every one of them is complete
