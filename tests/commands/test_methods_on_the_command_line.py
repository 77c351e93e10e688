"""The other methods as a user runs them: files, old saves, class images, refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mlm_plugin.cli import train_main
from mlm_plugin.methods import METHODS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments(toy_folder, toy_pictures, toy_contextualizer, tmp_path, _fresh_accelerator):
    """Flags of a short run of the quickstart preset; later flags take precedence."""
    return [
        *("--config_file", str(ROOT / "presets" / "quickstart.toml")),
        *("--pretrained_model_name_or_path", str(toy_folder)),
        *("--train_data_dir", str(toy_pictures)),
        *("--mlm_target", "class", "--mlm_contextualizer", str(toy_contextualizer)),
        *("--max_train_steps", "2"),
        *("--output_dir", str(tmp_path / "out")),
        *("--output_name", "x"),
    ]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def trigger_of(path):
    return metadata_of(path)["modelspec.trigger_phrase"]


MORE_FILES = {"pivotal": ["--bundle_embedding"], "custom_diffusion": ["--delta_lora_rank", "2"]}


@pytest.mark.parametrize("method", METHODS)
def test_the_quickstart_runs_with_every_method(arguments, method, tmp_path, capsys):
    flags = ["--save_every_n_steps", "1", *MORE_FILES.get(method, [])]
    assert train_main([*arguments, "--method", method, *flags]) == 0
    path = tmp_path / "out" / "x.safetensors"
    assert f"wrote {path}" in capsys.readouterr().out
    metadata = metadata_of(path)
    assert metadata["ss_mlm_method"] == method
    assert ("ss_network_dim" in metadata) == (method in ("lora", "pivotal"))
    called = "x_embedding dog"
    words = {
        "textual_inversion": {"x": "x dog"},
        "xti": {"x": "x dog"},
        "custom_diffusion": {"x_embedding": called, "x_lora": called},
        "pivotal": {"x": called, "x_embedding": called, "x_bundle": "sks dog"},
    }
    written = {
        card.stem: json.loads(card.read_text())["activation text"]
        for card in path.parent.glob("*.json")
    }
    assert written == words.get(method, {"x": "sks dog"})
    # headers say the same as the sidecars, and files without a sidecar the placeholder
    other = {"xti": {"x_xti": "sks dog"}, "custom_diffusion": {"x": "sks dog"}}.get(method, {})
    files = [file for file in path.parent.glob("*.safetensors") if "step" not in file.stem]
    assert {file.stem: trigger_of(file) for file in files} == written | other
    if method == "pivotal":
        assert metadata_of(path)["ss_output_name"] == "x"
        assert metadata_of(path.with_stem("x_bundle"))["ss_output_name"] == "x_bundle"
    for file in files:
        assert metadata_of(file)["modelspec.usage_hint"].startswith(f"Trigger: {trigger_of(file)}.")
        renamed = file.stem.replace("x", "x-step00000001", 1)
        trigger = trigger_of(file).replace("x", "x-step00000001", 1)
        assert trigger_of(file.with_stem(renamed)) == trigger


@pytest.mark.parametrize("method", METHODS)
def test_headers_and_sidecars_agree_on_two_concepts(arguments, method, toy_pictures, tmp_path):
    (source,) = toy_pictures.iterdir()
    for concept in ("sks dog", "zwx cat"):
        folder = shutil.copytree(source, tmp_path / "train" / f"1_{concept}")
        for caption in folder.glob("*.txt"):
            caption.write_text(caption.read_text().replace("sks dog", concept))
    flags = ["--train_data_dir", str(tmp_path / "train"), "--mlm_loss_weight", "0"]
    flags += ["--max_train_steps", "1", *MORE_FILES.get(method, [])]
    assert train_main([*arguments, "--method", method, *flags]) == 0
    said = {
        card.stem: json.loads(card.read_text())["activation text"]
        for card in (tmp_path / "out").glob("*.json")
    }
    assert said == {name: trigger_of(tmp_path / "out" / f"{name}.safetensors") for name in said}
    apart = {"x_sks": "x_sks dog", "x_zwx": "x_zwx cat"}
    beside = {"x_embedding_sks": "x_embedding_sks dog", "x_embedding_zwx": "x_embedding_zwx cat"}
    both = "x_embedding_sks dog, x_embedding_zwx cat"
    assert said == {
        "textual_inversion": apart,
        "xti": apart,
        "custom_diffusion": {**beside, "x_lora": both},
        "pivotal": {**beside, "x": both, "x_bundle": "sks dog, zwx cat"},
    }.get(method, {"x": "sks dog, zwx cat"})


@pytest.mark.parametrize("method", ["lora", "textual_inversion", "pivotal"])
def test_header_and_sidecar_say_the_users_phrase(arguments, method, tmp_path):
    phrase = ["--metadata_trigger_phrase", "my good boy"]
    assert train_main([*arguments, "--method", method, *phrase]) == 0
    cards = list((tmp_path / "out").glob("*.json"))
    assert cards
    for card in cards:
        assert json.loads(card.read_text())["activation text"] == "my good boy"
        assert trigger_of(card.with_suffix(".safetensors")) == "my good boy"


def test_old_saves_are_removed_with_everything_that_belongs_to_them(arguments, tmp_path):
    keep = ["--save_every_n_steps", "1", "--save_last_n_steps", "1", "--max_train_steps", "4"]
    assert train_main([*arguments, "--method", "xti", *keep]) == 0
    saved = [name for name in names_in(tmp_path / "out") if "step" in name]
    assert saved == [
        f"x-step0000000{step}{ending}.safetensors" for step in (2, 3) for ending in ("", "_xti")
    ]


def test_class_images_are_drawn_once_and_learned_from(arguments, tmp_path, capsys):
    flags = ["--method", "dreambooth", "--generate_class_images", "2", "--prior_loss_weight", "0.5"]
    assert train_main([*arguments, *flags]) == 0
    folder = tmp_path / "out" / "class_images" / "1_dog"
    drawn = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(drawn) == {
        *(f"class_{i:06d}{suffix}" for i in range(2) for suffix in (".png", ".txt")),
        "class_images.json",
    }
    assert (folder / "class_000000.txt").read_text() == "a photo of a dog\n"
    assert "1_dog" in capsys.readouterr().out
    assert metadata_of(tmp_path / "out" / "x.safetensors")["ss_num_reg_images"] == "2"
    assert train_main([*arguments, *flags]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == drawn


CLASS_IMAGES = ("--method", "dreambooth", "--generate_class_images", "2", "--mlm_loss_weight", "0")


def test_a_run_with_class_images_resumes(arguments, tmp_path):
    run = [*arguments, *CLASS_IMAGES, "--save_state"]
    assert train_main([*run, "--max_train_steps", "1"]) == 0
    (state,) = (tmp_path / "out").glob("*-state")
    assert train_main([*run, "--max_train_steps", "2", "--resume", str(state)]) == 0


def test_another_class_in_the_same_output_folder_has_pictures_of_its_own(
    arguments, tmp_path, capsys
):
    assert train_main([*arguments, *CLASS_IMAGES]) == 0
    capsys.readouterr()
    cat = ["--placeholder_token", "sks", "--class_token", "cat", "--output_name", "cat"]
    assert train_main([*arguments, *CLASS_IMAGES, *cat]) == 0
    printed = capsys.readouterr().out
    assert "1_cat (regularisation)" in printed
    assert "1_dog" not in printed
    assert names_in(tmp_path / "out" / "class_images") == ["1_cat", "1_dog"]


def test_a_check_counts_class_images_that_are_still_to_be_drawn(arguments, capsys):
    run = [*arguments, *CLASS_IMAGES, "--train_batch_size", "25", "--max_train_epochs", "1"]
    assert train_main([*run, "--check"]) == 0
    assert "Length: about 4 step(s), 1 epoch(s)" in capsys.readouterr().out
    assert train_main(run) == 0
    assert train_main([*run, "--check"]) == 0
    assert "Length: 4 step(s), 1 epoch(s)" in capsys.readouterr().out


@pytest.mark.parametrize("exists", [False, True], ids=["missing", "empty"])
def test_class_images_fill_a_new_folder(arguments, exists, tmp_path):
    reg = tmp_path / "reg"
    if exists:
        reg.mkdir()
    flags = ["--method", "dreambooth", "--generate_class_images", "1", "--reg_data_dir", str(reg)]
    assert train_main([*arguments, *flags, "--check"]) == 0
    assert train_main([*arguments, *flags]) == 0
    assert names_in(reg) == ["1_dog"]
    assert metadata_of(tmp_path / "out" / "x.safetensors")["ss_num_reg_images"] == "1"


def test_a_class_that_cannot_name_a_folder_is_refused(arguments, tmp_path, capsys):
    flags = ["--method", "dreambooth", "--generate_class_images", "1", "--class_token", "dog/cat"]
    assert train_main([*arguments, *flags, "--placeholder_token", "sks"]) == 2
    assert "class 'dog/cat' cannot name a folder" in capsys.readouterr().err
    assert not (tmp_path / "out" / "class_images").exists()


def test_class_images_of_another_prompt_are_refused(arguments, capsys):
    flags = ["--method", "dreambooth", "--generate_class_images", "1"]
    assert train_main([*arguments, *flags]) == 0
    assert train_main([*arguments, *flags, "--class_prompt", "a drawing of a dog"]) == 2
    assert "a drawing of a dog" in capsys.readouterr().err


def test_a_frozen_part_of_a_pivotal_run_stays(arguments, tmp_path):
    run = [*arguments, "--method", "pivotal", "--mlm_loss_weight", "0"]
    stop = ["--stop_embedding_training", "0.5", "--save_every_n_steps", "1"]
    assert train_main([*run, *stop, "--max_train_steps", "4"]) == 0
    saved = [
        load_file(tmp_path / "out" / f"x{name}_embedding.safetensors")["emb_params"]
        for name in ("-step00000001", "-step00000002", "-step00000003", "")
    ]
    assert not torch.equal(saved[0], saved[1])
    assert torch.equal(saved[1], saved[2])
    assert torch.equal(saved[2], saved[3])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "textual_inversion", "--placeholder_token", "zwx"], "none of the 5 captions"),
        (["--method", "textual_inversion", "--embedding_lr", "0"], "nothing would be trained"),
        (["--method", "dreambooth", "--no_train_text_encoder", "--mlm_read_at", "encoder"],
         "no_train_text_encoder"),
        (["--method", "pivotal", "--stop_unet_training", "1", "--stop_text_encoder_training", "1",
          "--stop_embedding_training", "1"], "nothing is trained from step 1"),
        (["--method", "lora", "--unet_lr", "0", "--text_encoder_lr", "1e-3", "--mlm_loss_weight",
          "0", "--stop_text_encoder_training", "1"], "nothing is trained from step 1"),
        (["--method", "pivotal", "--stop_text_encoder_training", "1", "--mlm_start_step", "1",
          "--stop_embedding_training", "0.5", "--mlm_read_at", "encoder"], "it would never act"),
        (["--method", "custom_difusion"], "custom_difusion"),
        (["--method", "custom_diffusion", "--scale_aug", "--cache_latents"], "scale_aug"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_and_exit_code_2(arguments, flags, message, capsys):
    assert train_main([*arguments, "--class_token", "dog", *flags]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert message in line


def test_captions_that_lack_the_placeholder_name_what_they_hold(arguments, toy_pictures, tmp_path):
    folder = tmp_path / "train" / "1_sks dog"
    shutil.copytree(next(toy_pictures.iterdir()), folder)
    for caption in folder.glob("*.txt"):
        caption.write_text("a photo of my dog")
    flags = ["--train_data_dir", str(folder.parent), "--method", "xti"]
    assert train_main([*arguments, *flags]) == 2


def test_a_check_holds_each_folder_to_its_own_concept(arguments, toy_pictures, tmp_path, capsys):
    pictures, train = next(toy_pictures.iterdir()), tmp_path / "train"
    shutil.copytree(pictures, train / "1_sks dog")
    shutil.copytree(pictures, train / "1_zwx cat", ignore=shutil.ignore_patterns("*.txt"))
    assert train_main([*arguments, "--train_data_dir", str(train), "--check"]) == 0
    out = capsys.readouterr().out
    assert "5 of 5 (100%) captions hold 'sks dog'" in out
    assert "5 of 5 (100%) captions hold 'zwx cat'" in out
    assert "lack" not in out


def test_a_prefix_may_bring_the_placeholder(arguments, toy_pictures, tmp_path):
    folder = tmp_path / "train" / "1_sks dog"
    shutil.copytree(next(toy_pictures.iterdir()), folder)
    for caption in folder.glob("*.txt"):
        caption.write_text("on the lawn")
    flags = ["--train_data_dir", str(folder.parent), "--caption_prefix", "sks dog"]
    assert train_main([*arguments, *flags, "--method", "textual_inversion"]) == 0
