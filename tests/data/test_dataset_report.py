"""The report before training: counts, and warnings about what is probably unintended."""

import numpy as np
import pytest
from PIL import Image

from mlm_plugin.config.datasets import DatasetConfig, SubsetConfig
from mlm_plugin.data.dataset import TrainDataset
from mlm_plugin.data.dataset_report import dataset_report


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "5_sks dog"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def _report(*subsets, concepts=("sks",), count_tokens=None, max_tokens=75, **settings):
    config = DatasetConfig(batch_size=2, resolution=(64, 64), subsets=subsets, **settings)
    dataset = TrainDataset([config], seed=0)
    return dataset_report(
        dataset, concepts=concepts, count_tokens=count_tokens, max_tokens=max_tokens
    )


def _subset(folder, **settings):
    return SubsetConfig(
        image_dir=folder,
        **{"class_tokens": "sks dog", "num_repeats": 5, "caption_extension": ".txt"} | settings,
    )


def test_a_clean_data_set_has_counts_and_no_warnings(folder):
    report = _report(_subset(folder))
    assert report.warnings == []
    assert report.lines() == [
        "Data set: 4 images, 20 per epoch in 10 batches, 0 skipped",
        "  5_sks dog: 4 images, 20 per epoch",
        "    0 of 4 (0%) have captions, the others 'sks dog'",
        "    4 of 4 (100%) captions hold 'sks'",
        "  buckets: 64x64: 20",
    ]


def test_templates_take_the_place_of_captions_in_the_counts(folder):
    (folder / "0.txt").write_text("a dog")
    config = DatasetConfig(batch_size=2, resolution=(64, 64), subsets=(_subset(folder),))
    dataset = TrainDataset([config], seed=0, templates=("a photo of {}", "a picture of {}"))
    report = dataset_report(dataset, concepts=["sks"])
    assert report.warnings == []
    assert "    captions are drawn from 2 templates" in report.lines()
    assert "    4 of 4 (100%) captions hold 'sks'" in report.lines()
    cut = dataset_report(
        dataset, concepts=["zwx"], count_tokens=lambda t: len(t.split()), max_tokens=4
    )
    assert "4 of 4 (100%) captions lack 'zwx'" in cut.warnings[0]
    assert "class_tokens are not used" not in cut.warnings[0]
    assert cut.subsets[0].num_cut == 4


def test_captions_without_the_concept_are_counted_and_explained(folder):
    for i, text in enumerate(["a dog", "a Sks dog", "asksb"]):
        (folder / f"{i}.txt").write_text(text)
    report = _report(_subset(folder))
    (subset,) = report.subsets
    assert (subset.num_captions, subset.num_with_concept) == (3, 2)
    (warning,) = report.warnings
    assert "2 of 4 (50%) captions lack 'sks'" in warning
    assert "class_tokens are not used" in warning
    assert _report(_subset(folder, caption_prefix="sks")).warnings == []


def test_with_wildcards_every_line_must_hold_the_concept(folder):
    (folder / "0.txt").write_text("a sks dog\na dog")
    assert _report(_subset(folder, enable_wildcard=True)).subsets[0].num_with_concept == 3


def test_a_prefix_reaches_the_first_line_only_as_in_training(folder):
    (folder / "0.txt").write_text("one dog\nanother dog")
    (folder / "1.txt").write_text("one dog")
    subset = _subset(folder, caption_prefix="sks", enable_wildcard=True)
    assert _report(subset).subsets[0].num_with_concept == 3


def test_captions_over_the_token_limit_are_counted(folder):
    (folder / "0.txt").write_text("sks " + "very " * 80 + "long")
    report = _report(_subset(folder), count_tokens=lambda text: len(text.split()))
    assert report.subsets[0].num_cut == 1
    assert "    1 of 4 (25%) captions are cut at 75 tokens" in report.lines()
    assert "max_token_length" in report.warnings[0]
    assert _report(_subset(folder)).subsets[0].num_cut is None


def test_captions_under_another_extension_are_named(folder):
    (folder / "0.txt").write_text("a sks dog")
    report = _report(_subset(folder, caption_extension=".caption"))
    assert report.subsets[0].captions_elsewhere == {".txt": 1}
    assert "caption_extension = '.txt'" in report.warnings[0]


def test_small_double_animated_and_broken_files_are_named(folder):
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    Image.new("RGB", (20, 40), "red").save(folder / "tiny.png")
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "film.gif", save_all=True, append_images=frames[1:])
    (folder / "broken.png").write_bytes(b"")
    report = _report(_subset(folder))
    assert report.num_skipped == 1
    text = "\n".join(report.warnings)
    assert len(report.warnings) == 4
    assert "broken.png: " in text
    assert "1 image enlarged more than 2 times, which teaches blur: tiny.png" in text
    assert "1 animated file used with the first frame only: film.gif" in text
    assert "the same file 2 times: 0.png, copy.png" in text


def test_an_alpha_mask_without_transparency_is_named(folder):
    report = _report(_subset(folder, alpha_mask=True))
    assert "alpha_mask: 4 images without transparency: 0.png, 1.png, 2.png and 1 more" in (
        report.warnings
    )


def test_regularisation_captions_should_not_hold_the_concept(folder, tmp_path):
    other = tmp_path / "reg"
    other.mkdir()
    Image.new("RGB", (64, 64)).save(other / "r.png")
    reg = _subset(other, is_reg=True, class_tokens="dog")
    assert _report(_subset(folder), reg).warnings == []
    (other / "r.txt").write_text("a sks dog")
    assert (
        "1 of 1 (100%) regularisation captions hold 'sks'"
        in (_report(_subset(folder), reg).warnings[0])
    )


def test_without_a_concept_nothing_is_said_about_it(folder):
    report = _report(_subset(folder), concepts=())
    assert report.subsets[0].num_with_concept is None
    assert not any("None" in line for line in report.lines())


# --- several concepts ------------------------------------------------------------------------

PETS = ("sks dog", "zwx cat")


@pytest.fixture
def cats(folder):
    """Two more pictures, in a separate folder."""
    other = folder.with_name("5_zwx cat")
    other.mkdir()
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (64, 64), colour).save(other / f"{i}.png")
    return other


def test_each_subset_is_held_to_its_own_concept(folder, cats):
    report = _report(_subset(folder), _subset(cats, class_tokens="zwx cat"), concepts=PETS)
    assert report.warnings == []
    assert "    4 of 4 (100%) captions hold 'sks dog'" in report.lines()
    assert "    2 of 2 (100%) captions hold 'zwx cat'" in report.lines()


def test_a_prefix_is_advised_for_the_pictures_of_one_concept_alone(folder, cats):
    (cats / "0.txt").write_text("a sks dog")
    report = _report(_subset(folder), _subset(cats, class_tokens="zwx cat"), concepts=PETS)
    (warning,) = report.warnings
    assert warning == (
        "5_zwx cat: 1 of 2 (50%) captions lack 'zwx cat' (where a caption file exists, "
        "class_tokens are not used); write it into them or set caption_prefix = 'zwx cat' for "
        "these alone, in a dataset_config"
    )


def test_a_subset_of_no_known_concept_may_hold_any(folder, cats):
    for i, text in enumerate(["a sks dog", "a zwx cat", "a sks dog and a zwx cat", "a bird"]):
        (folder / f"{i}.txt").write_text(text)
    mixed = _subset(folder, class_tokens=None)
    report = _report(mixed, _subset(cats, class_tokens="zwx cat"), concepts=PETS)
    assert report.subsets[0].num_with_concept == 3
    assert "    3 of 4 (75%) captions hold 'sks dog' or 'zwx cat'" in report.lines()
    (warning,) = report.warnings
    assert "1 of 4 (25%) captions lack 'sks dog' or 'zwx cat'; write into each" in warning
    assert "caption_prefix" not in warning


def test_regularisation_captions_should_hold_none_of_several_concepts(folder, cats):
    (cats / "0.txt").write_text("a zwx cat")
    reg = _subset(cats, is_reg=True, class_tokens="cat")
    (warning,) = _report(_subset(folder), reg, concepts=PETS).warnings
    assert "1 of 2 (50%) regularisation captions hold 'sks dog' or 'zwx cat'" in warning
