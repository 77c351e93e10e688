"""SDXL as a user runs it: every method from the command line, samples, curves, pretraining."""

import signal
from pathlib import Path

import pytest
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from mlm_plugin.cli import main, train_main
from mlm_plugin.methods import METHODS
from mlm_plugin.pretraining.run import PretrainingRun

ROOT = Path(__file__).parents[2]
SDXL_METHODS = [name for name, method in METHODS.items() if method.supports_sdxl]
FIRST_STEP = "text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"


@pytest.fixture
def arguments(
    toy_sdxl_folder, toy_pictures, toy_sdxl_contextualizers, tmp_path, _fresh_accelerator
):
    """Flags of a short run of the quickstart preset; later flags take precedence."""
    return [
        *("--config_file", str(ROOT / "presets" / "quickstart.toml")),
        *("--pretrained_model_name_or_path", str(toy_sdxl_folder)),
        *("--train_data_dir", str(toy_pictures)),
        *("--mlm_target", "class", "--mlm_contextualizer", toy_sdxl_contextualizers),
        *("--mlm_target", "class"),
        *("--max_train_steps", "2"),
        *("--output_dir", str(tmp_path / "out")),
        *("--output_name", "x"),
    ]


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("method", SDXL_METHODS)
def test_every_method_runs_and_says_what_it_was_trained_on(arguments, method, tmp_path, capsys):
    assert train_main([*arguments, "--method", method]) == 0
    path = tmp_path / "out" / "x.safetensors"
    assert f"wrote {path}" in capsys.readouterr().out
    metadata = metadata_of(path)
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.architecture"].startswith("stable-diffusion-xl-v1-base")
    assert len(metadata["ss_mlm_contextualizer"].split("+")) == 2


BUCKETS_OF_32 = (
    *("--enable_bucket", "--resolution", "96", "--min_bucket_reso", "32"),
    *("--max_bucket_reso", "128", "--bucket_reso_steps", "32", "--mlm_loss_weight", "0"),
)


def test_buckets_of_32_pixels_are_kept(arguments, tmp_path, capsys):
    assert train_main([*arguments, *BUCKETS_OF_32]) == 0
    printed = capsys.readouterr()
    assert "buckets: 96x96: " in printed.out
    assert "bucket_reso_steps" not in printed.err
    assert (tmp_path / "out" / "x.safetensors").is_file()


def test_buckets_of_32_pixels_are_refused_for_sd_1(arguments, toy_folder, capsys):
    model = ("--pretrained_model_name_or_path", str(toy_folder))
    assert train_main([*arguments, *BUCKETS_OF_32, *model]) == 2
    assert "bucket_reso_steps = 32: Stable Diffusion 1 and 2" in capsys.readouterr().err


def test_the_lora_has_both_text_encoders_and_diffusers_loads_it(
    arguments, toy_sdxl_folder, tmp_path
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    samples = tmp_path / "prompts.txt"
    samples.write_text("a photo of [trigger] --w 64 --h 96 --s 2 --d 1\n")
    flags = ["--sample_prompts", str(samples), "--sample_every_n_steps", "2"]
    logs = ["--logging_dir", str(tmp_path / "logs")]
    assert train_main([*arguments, "--text_encoder_lr", "1e-3", "5e-4", *flags, *logs]) == 0
    state = load_file(tmp_path / "out" / "x.safetensors")
    for prefix in ("lora_te1_", "lora_te2_"):
        assert state[prefix + FIRST_STEP].any(), "both text encoders have learned"
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1
    (folder,) = (tmp_path / "logs").iterdir()
    events = EventAccumulator(str(folder / "network_train"))
    events.Reload()
    of_each = ("te{}/drift_cos", "loss/mlm_te{}", "lr/textencoder{}")
    assert {tag.format(n) for tag in of_each for n in (1, 2)} <= set(events.Tags()["scalars"])
    pipeline = StableDiffusionXLPipeline.from_pretrained(toy_sdxl_folder)
    pipeline.load_lora_weights(str(tmp_path / "out"), weight_name="x.safetensors")
    adapters = pipeline.get_list_adapters()
    assert adapters.keys() == {"unet", "text_encoder", "text_encoder_2"}


def test_a_u_net_alone_is_trained_on_kept_captions_with_samples(arguments, tmp_path):
    samples = tmp_path / "prompts.txt"
    samples.write_text("a photo of [trigger] --n blurry --w 64 --h 64 --s 2 --d 1\n")
    unet_only = ["--network_train_unet_only", "--cache_text_encoder_outputs"]
    flags = ["--sample_prompts", str(samples), "--sample_at_first", "--mlm_loss_weight", "0"]
    assert train_main([*arguments, *unet_only, *flags]) == 0
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1
    assert all(key.startswith("lora_unet_") for key in load_file(tmp_path / "out/x.safetensors"))


def test_class_images_are_drawn_with_both_text_encoders(arguments, tmp_path):
    flags = ["--method", "dreambooth", "--generate_class_images", "1", "--mlm_loss_weight", "0"]
    assert train_main([*arguments, *flags, "--max_train_steps", "1"]) == 0
    assert (tmp_path / "out" / "class_images" / "1_dog" / "class_000000.png").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "xti"], "is SDXL; use one of lora"),
        (["--v2"], "--v2"),
        (
            ["--cache_text_encoder_outputs"],
            "cache_text_encoder_outputs cannot be combined with training",
        ),
    ],
)
def test_what_sdxl_cannot_do_is_one_line(arguments, flags, message, capsys):
    assert train_main([*arguments, *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_one_contextualizer_does_not_serve_two_text_encoders(arguments, toy_contextualizer, capsys):
    assert train_main([*arguments, "--mlm_contextualizer", str(toy_contextualizer)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "names 1 file(s), needed: 2" in error


def test_pretraining_makes_a_contextualizer_for_each_text_encoder(
    toy_sdxl_folder, tmp_path, capsys
):
    small = ["--max_train_steps", "1", "--batch_size", "2", "--num_held_out", "4"]
    output = tmp_path / "context.safetensors"
    model = ["--pretrained_model_name_or_path", str(toy_sdxl_folder)]
    assert main(["pretrain", *model, "--output", str(output), *small]) == 0
    files = [tmp_path / f"context_te{number}.safetensors" for number in (1, 2)]
    assert all(file.is_file() for file in files)
    assert f"--mlm_contextualizer {files[0]},{files[1]}" in capsys.readouterr().out
    widths = [load_file(file)["mask_vector"].shape for file in files]
    assert widths == [(32,), (48,)]


def test_a_pretraining_stopped_in_the_second_text_encoder_keeps_the_first(
    toy_sdxl_folder, tmp_path, capsys, monkeypatch
):
    small = ["--max_train_steps", "2", "--batch_size", "2", "--num_held_out", "4"]
    output = tmp_path / "context.safetensors"
    model = ["--pretrained_model_name_or_path", str(toy_sdxl_folder)]
    command = ["pretrain", *model, "--output", str(output), *small]
    train_step, steps, signals = PretrainingRun.train_step, [], [signal.SIGINT]

    def interrupted_step(self):
        steps.append(self.output.stem)
        if steps[-1] == "context_te2" and signals:
            signal.raise_signal(signals.pop())
        return train_step(self)

    monkeypatch.setattr(PretrainingRun, "train_step", interrupted_step)
    assert main(command) == 130
    first = (tmp_path / "context_te1.safetensors").read_bytes()
    del steps[:]
    assert main(command) == 0
    assert set(steps) == {"context_te2"}
    assert "context_te1.safetensors: is done already" in capsys.readouterr().out
    assert (tmp_path / "context_te1.safetensors").read_bytes() == first
    (tmp_path / "context_te2.state.pt").touch()  # as an interrupted run would leave it
    del steps[:]
    assert main([*command, "--batch_size", "3"]) == 0
    assert "context_te1" in steps, "made with other options"


def test_a_trained_lora_is_evaluated(
    arguments, toy_sdxl_folder, toy_sdxl_contextualizers, tmp_path, capsys
):
    assert train_main([*arguments, "--text_encoder_lr", "1e-2", "1e-2"]) == 0
    model = ["--pretrained_model_name_or_path", str(toy_sdxl_folder)]
    lora = ["--lora", str(tmp_path / "out" / "x.safetensors"), "--class_token", "dog"]
    text = ["--text_only", "--mlm_contextualizer", toy_sdxl_contextualizers]
    output = ["--output", str(tmp_path / "r")]
    capsys.readouterr()
    assert main(["evaluate", *model, *lora, *text, *output]) == 0
    printed = capsys.readouterr().out
    for name in ("clip_l", "clip_g"):
        (line,) = [line for line in printed.splitlines() if f"Encoder drift, {name}" in line]
        assert float(line.split(name)[1].split()[0]) > 0
    assert main(["evaluate", *model, *lora, *text, *output, "--xti", lora[1]]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "--xti" in error
