"""Scores of pictures with known results."""

import numpy as np
import pytest
from PIL import Image

from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.eval_prompts import evaluation_prompts
from mlm_plugin.evaluation.image_measures import (
    Judges,
    cut_out,
    find_masks,
    find_photos,
    score_pictures,
)
from mlm_plugin.evaluation.metric_models import load_clip, load_dino

PROMPTS = evaluation_prompts(["a {}", "a {} asleep"], placeholder_token="sks", class_token="dog")


def save(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def judges(tiny_clip, tiny_dino):
    return Judges(load_clip(str(tiny_clip)), load_dino(str(tiny_dino)))


def test_copies_of_the_only_photo_are_wholly_alike_and_not_diverse(tmp_path, judges):
    photo = save(tmp_path / "photo.png", 0)
    pictures = [[save(tmp_path / f"{i}_{j}.png", 0) for j in range(2)] for i in range(2)]
    scores = score_pictures(pictures, PROMPTS, [photo], judges, masks={})
    for name in ("clip_i", "dino"):
        assert scores["measures"][name]["mean"] == pytest.approx(1, abs=1e-5)
    assert scores["measures"]["diversity_dino"]["mean"] == pytest.approx(0, abs=1e-5)
    assert scores["references"] == {"clip_i": None, "dino": None}
    assert "dino_fg" not in scores["measures"]


def test_foregrounds_are_compared_with_foregrounds_and_backgrounds_with_backgrounds(
    tmp_path, judges
):
    photo, scene = save(tmp_path / "photo.png", 0), save(tmp_path / "scene.png", 1)
    left = np.zeros((40, 48), np.uint8)
    left[:, :24] = 255
    mixed = np.where(left[..., None] > 0, np.asarray(Image.open(photo)),
                     np.asarray(Image.open(scene)))  # fmt: skip
    drawn = tmp_path / "drawn.png"
    Image.fromarray(mixed).save(drawn)
    masks = tmp_path / "masks"
    masks.mkdir()
    for name in ("photo", "drawn"):
        Image.fromarray(left).save(masks / f"{name}.png")
    other = save(tmp_path / "other.png", 2)  # without a mask
    scores = score_pictures(
        [[drawn, other], [other]], PROMPTS, [photo], judges, masks=find_masks(str(masks))
    )
    first = scores["per_picture"][0]
    assert first[0]["dino_fg"] == pytest.approx(1, abs=1e-5)
    assert first[0]["dino_bg"] < 0.9999
    assert first[1]["dino_fg"] is None
    assert scores["per_prompt"][1]["dino_fg"] is None
    assert scores["measures"]["dino_fg"]["n"] == 1
    assert scores["num_masked"] == {"pictures": 1, "photos": 1}


def test_what_is_cut_away_gets_the_colour_given():
    image = Image.new("RGB", (4, 2), (10, 20, 30))
    mask = np.array([[255, 0]], np.uint8)  # of another size
    cut = np.asarray(cut_out(image, mask, (1.0, 0.0, 0.0), keep="foreground"))
    assert cut[0, 0].tolist() == [10, 20, 30]
    assert cut[0, -1].tolist() == [255, 0, 0]
    kept = np.asarray(cut_out(image, mask, (1.0, 0.0, 0.0), keep="background"))
    assert kept[0, 0].tolist() == [255, 0, 0]


def test_without_judges_nothing_is_scored(tmp_path):
    photo = save(tmp_path / "photo.png", 0)
    scores = score_pictures([[photo], [photo]], PROMPTS, [photo], Judges(), masks={})
    assert scores["measures"] == {}


def test_photos_are_found_in_kohyas_folders(tmp_path):
    for name in ("10_sks dog/b.png", "10_sks dog/a.png", "c.png"):
        save(tmp_path / name, 0)
    assert [path.name for path in find_photos(str(tmp_path))] == ["c.png", "a.png", "b.png"]


def test_missing_folders_are_one_line(tmp_path):
    with pytest.raises(UserError, match="--train_data_dir: there is no folder"):
        find_photos(str(tmp_path / "none"))
    with pytest.raises(UserError, match="holds no pictures"):
        find_photos(str(tmp_path))
    with pytest.raises(UserError, match="--masks: there is no folder"):
        find_masks(str(tmp_path / "none"))
