"""Class images: the same set after any interruptions, and nothing drawn twice."""

import dataclasses
import json
import logging
import random

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from mlm_plugin.config.datasets import DatasetConfig, SubsetConfig
from mlm_plugin.data.sources import read_dataset
from mlm_plugin.errors import UserError
from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.training.draw_class_images import (
    SETTINGS_FILE,
    ClassImageSettings,
    draw_class_images,
    missing_class_images,
)

PROMPT = "a photo of a dog"


@pytest.fixture(scope="module")
def models(toy_folder):
    return load_stable_diffusion(toy_folder)


@pytest.fixture
def unet_calls(models):
    """Grows by one with each pass through the U-Net."""
    calls = []
    handle = models.unet.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def draw(folder, models, num_images=3, caption_extension=".txt", **settings):
    settings = {
        "prompt": PROMPT,
        "model": models.source,
        "size": (64, 72),
        "seed": 0,
        "num_steps": 2,
        **settings,
    }
    return draw_class_images(
        folder,
        ClassImageSettings(**settings),
        num_images=num_images,
        caption_extension=caption_extension,
        load=lambda: models,
        accelerator=Accelerator(cpu=True),
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_holds_pictures_captions_and_the_settings(models, tmp_path):
    paths = draw(tmp_path, models, num_images=2)
    assert paths == [tmp_path / "class_000000.png", tmp_path / "class_000001.png"]
    assert sorted(contents(tmp_path)) == [
        "class_000000.png",
        "class_000000.txt",
        "class_000001.png",
        "class_000001.txt",
        SETTINGS_FILE,
    ]
    assert (tmp_path / "class_000001.txt").read_text() == f"{PROMPT}\n"
    pictures = [Image.open(path) for path in paths]
    assert {picture.size for picture in pictures} == {(72, 64)}
    assert pictures[0].tobytes() != pictures[1].tobytes()
    assert json.loads((tmp_path / SETTINGS_FILE).read_text()) == {
        "prompt": PROMPT,
        "model": models.source,
        "seed": 0,
        "size": [64, 72],
        "sampler": "ddim",
        "num_steps": 2,
        "scale": 7.5,
    }


def test_a_data_set_finds_the_pictures_and_their_captions(models, toy_pictures, tmp_path):
    draw(tmp_path, models)
    concept = SubsetConfig(image_dir=toy_pictures / "10_sks dog", caption_extension=".txt")
    classes = SubsetConfig(image_dir=tmp_path, caption_extension=".txt", is_reg=True)
    config = DatasetConfig(batch_size=1, resolution=(64, 64), subsets=(concept, classes))
    sources = read_dataset(config)
    captions = [(info.caption, info.caption_source) for info in sources.images if info.is_reg]
    assert captions == [(PROMPT, "file")] * 3
    assert sources.skipped == {}


def test_interrupted_and_resumed_drawing_gives_the_set_of_an_uninterrupted_run(models, tmp_path):
    draw(tmp_path / "straight", models)
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 4:  # within the second picture
            raise KeyboardInterrupt

    handle = models.unet.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "resumed", models)
    handle.remove()
    assert missing_class_images(tmp_path / "resumed", 3) == [1, 2]
    assert len(draw(tmp_path / "resumed", models)) == 2
    assert contents(tmp_path / "resumed") == contents(tmp_path / "straight")


def test_a_save_that_is_interrupted_leaves_no_half_picture(models, tmp_path, monkeypatch):
    save = Image.Image.save

    def interrupted(self, path, *args, **kwargs):
        save(self, path, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path, models)
    assert sorted(contents(tmp_path)) == ["class_000000.txt", SETTINGS_FILE]


def test_a_deleted_picture_is_drawn_as_it_was(models, tmp_path):
    draw(tmp_path, models)
    before = contents(tmp_path)
    (tmp_path / "class_000001.png").unlink()
    assert [path.name for path in draw(tmp_path, models)] == ["class_000001.png"]
    assert contents(tmp_path) == before


def test_a_whole_folder_draws_nothing(models, unet_calls, tmp_path):
    draw(tmp_path, models)
    drawn, before = len(unet_calls), contents(tmp_path)
    assert draw(tmp_path, models) == []
    assert draw(tmp_path, models, num_images=2) == []
    assert len(unet_calls) == drawn == 6
    assert contents(tmp_path) == before


def test_more_pictures_are_added_to_those_that_are_there(models, tmp_path):
    draw(tmp_path / "grown", models, num_images=1)
    draw(tmp_path / "grown", models, num_images=2)
    draw(tmp_path / "straight", models, num_images=2)
    assert contents(tmp_path / "grown") == contents(tmp_path / "straight")


def test_the_pictures_of_two_seeds_have_nothing_in_common(models, tmp_path):
    pictures = [
        path.read_bytes()
        for seed in (0, 1)
        for path in draw(tmp_path / str(seed), models, num_images=2, seed=seed)
    ]
    assert len(set(pictures)) == 4


def test_another_prompt_or_model_is_refused_though_nothing_is_missing(models, tmp_path):
    draw(tmp_path, models, num_images=1)
    with pytest.raises(UserError, match=r"prompt 'a photo of a dog', not 'a cat'; choose another"):
        draw(tmp_path, models, num_images=1, prompt="a cat")
    other = dataclasses.replace(models, source="other/model")
    with pytest.raises(UserError, match="not 'other/model'"):
        draw(tmp_path, other, num_images=1)


def test_other_settings_are_refused_only_where_two_kinds_would_be_mixed(models, tmp_path, caplog):
    draw(tmp_path, models, num_images=1)
    with caplog.at_level(logging.INFO):
        assert draw(tmp_path, models, num_images=1, seed=1) == []
    assert "seed 0, not 1; they are used unchanged" in caplog.text
    with pytest.raises(UserError, match=r"seed 0, not 1.*class_images\.json"):
        draw(tmp_path, models, num_images=2, seed=1)
    with pytest.raises(UserError, match="size"):
        draw(tmp_path, models, num_images=2, size=(64, 64))


def test_without_the_settings_file_pictures_count_as_they_are(models, tmp_path):
    (path,) = draw(tmp_path, models, num_images=1)
    before = path.read_bytes()
    (tmp_path / SETTINGS_FILE).unlink()
    assert len(draw(tmp_path, models, num_images=2, seed=5)) == 1
    assert path.read_bytes() == before


def test_settings_that_led_to_no_picture_bind_nobody(models, tmp_path):
    draw(tmp_path, models, num_images=1)[0].unlink()
    (tmp_path / "class_000000.txt").unlink()
    draw(tmp_path, models, num_images=1, prompt="a cat")
    assert (tmp_path / "class_000000.txt").read_text() == "a cat\n"


def test_pictures_of_the_user_are_filled_up_and_stay_alone(models, tmp_path):
    for name in ("one.jpg", "two.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    before = contents(tmp_path)
    assert draw(tmp_path, models, num_images=2) == []
    assert contents(tmp_path) == before
    assert missing_class_images(tmp_path, 4) == [0, 1]
    draw(tmp_path, models, num_images=4)
    assert missing_class_images(tmp_path, 4) == []
    assert before.items() <= contents(tmp_path).items()
    assert not (tmp_path / "one.txt").exists()


def test_a_folder_that_is_not_there_lacks_everything(tmp_path):
    assert missing_class_images(tmp_path / "none", 2) == [0, 1]
    assert missing_class_images(tmp_path / "none", 0) == []


def test_another_caption_extension_gets_captions_and_edited_ones_stay(models, tmp_path):
    draw(tmp_path, models, num_images=1)
    (tmp_path / "class_000000.txt").write_text("a dog in the snow")
    draw(tmp_path, models, num_images=1, caption_extension="caption")
    assert (tmp_path / "class_000000.caption").read_text() == f"{PROMPT}\n"
    assert (tmp_path / "class_000000.txt").read_text() == "a dog in the snow"


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_settings_file_is_named(models, tmp_path, text):
    draw(tmp_path, models, num_images=1)
    (tmp_path / SETTINGS_FILE).write_text(text)
    with pytest.raises(UserError, match=r"class_images\.json.*delete it"):
        draw(tmp_path, models, num_images=1)


def test_random_states_and_the_model_are_unchanged(models, tmp_path):
    weights = [parameter.clone() for parameter in models.unet.parameters()]
    states = torch.get_rng_state(), random.getstate()
    draw(tmp_path, models, num_images=1, sampler="euler_a")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(map(torch.equal, models.unet.parameters(), weights))
    assert not models.unet.training


def test_a_vae_that_overflows_leaves_no_black_picture(toy_folder, tmp_path):
    broken = load_stable_diffusion(toy_folder)
    torch.nn.init.constant_(broken.vae.decoder.conv_out.bias, float("nan"))
    with pytest.raises(UserError, match="no_half_vae"):
        draw(tmp_path, broken, num_images=1)
    assert missing_class_images(tmp_path, 1) == [0]


def test_a_folder_that_cannot_be_made_is_refused(models, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        draw(tmp_path / "file", models)


def test_an_unknown_sampler_is_refused(models, tmp_path):
    with pytest.raises(UserError, match="eular"):
        draw(tmp_path, models, sampler="eular")
