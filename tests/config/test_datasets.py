"""Data sets resolve by kohya's order; every mistake is named with file and place."""

import json
import logging
from pathlib import Path

import pytest

from mlm_plugin.config.concepts import Concept, concepts_of
from mlm_plugin.config.datasets import require_bucket_steps, resolve_datasets
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.errors import UserError


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


@pytest.fixture
def dataset_file(tmp_path):
    def write(text, name="data.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def resolve(path, **options):
    values = {"dataset_config": path, "resolution": "512", **options}
    return resolve_datasets(TrainConfig().replace(**values))


def folders(parent, *names):
    for name in names:
        (parent / name).mkdir(parents=True)
    return str(parent)


# --- order of resolution ---------------------------------------------------------------------

LEVELS = ["subset", "dataset", "general", "option", "default"]


@pytest.mark.parametrize("level", range(5))
@pytest.mark.parametrize(
    ("name", "option", "given", "default"),
    [
        ("keep_tokens", "keep_tokens", [5, 4, 3, 2], 0),
        ("num_repeats", "dataset_repeats", [5, 4, 3, 2], 1),
        ("shuffle_caption", "shuffle_caption", [True, True, True, True], False),
        ("caption_extension", "caption_extension", [".a", ".b", ".c", ".d"], ".caption"),
        ("caption_dropout_rate", "caption_dropout_rate", [0.4, 0.3, 0.2, 0.1], 0.0),
        ("caption_separator", "caption_separator", [";", "|", "/", "+"], ","),
        ("resize_interpolation", "resize_interpolation", ["area", "box", "cubic", "linear"], None),
        ("secondary_separator", "secondary_separator", [";;", "||", "//", "++"], None),
    ],
)
def test_the_nearest_level_wins(dataset_file, images, level, name, option, given, default):
    """Levels nearer than ``level`` are left out: the value of ``level`` must come through."""
    lines = [
        "" if level > number else f"{name} = {json.dumps(value)}"
        for number, value in enumerate(given[:3])
    ]
    path = dataset_file(
        f"[general]\n{lines[2]}\n[[datasets]]\n{lines[1]}\n"
        f'[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\n{lines[0]}\n'
    )
    options = {option: given[3]} if level <= 3 else {}
    (dataset,) = resolve(path, **options)
    expected = [*given, default][level]
    assert getattr(dataset.subsets[0], name) == expected, LEVELS[level]


def test_false_in_a_subset_beats_true_outside(dataset_file, images):
    path = dataset_file(
        "[general]\nflip_aug = true\n[[datasets]]\n"
        f'[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\nflip_aug = false\n'
    )
    assert resolve(path, flip_aug=True)[0].subsets[0].flip_aug is False


def test_batch_size_and_resolution_come_from_the_options_last(dataset_file, images):
    subset = f'[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\n'
    path = dataset_file(
        f"[general]\nbatch_size = 3\n[[datasets]]\nresolution = 640\n{subset}"
        f"[[datasets]]\nbatch_size = 2\nresolution = [512, 768]\n{subset}[[datasets]]\n{subset}"
    )
    found = resolve(path, resolution="256,320", train_batch_size=7)
    assert [dataset.batch_size for dataset in found] == [3, 2, 3]
    assert [dataset.resolution for dataset in found] == [(640, 640), (512, 768), (256, 320)]


def test_subset_values_keep_their_shape(dataset_file, images):
    path = dataset_file(
        "[[datasets]]\ncustom_attributes = {mlm = 'a'}\n"
        f'[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\nclass_tokens = "sks dog"\n'
        "caption_extension = 'txt'\nface_crop_aug_range = [1, 3]\n"
    )
    (subset,) = resolve(path)[0].subsets
    assert subset.image_dir == images
    assert subset.custom_attributes == {"mlm": "a"}
    assert subset.caption_extension == ".txt"
    assert subset.face_crop_aug_range == (1.0, 3.0)
    assert not subset.is_reg


def test_json_says_the_same_as_toml(dataset_file, images):
    subset = {"image_dir": str(images), "num_repeats": 4}
    user = {"general": {"keep_tokens": 2}, "datasets": [{"batch_size": 2, "subsets": [subset]}]}
    as_json = resolve(dataset_file(json.dumps(user), "data.json"))
    as_toml = resolve(
        dataset_file(
            "[general]\nkeep_tokens = 2\n[[datasets]]\nbatch_size = 2\n"
            f'[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\nnum_repeats = 4\n'
        )
    )
    assert as_json == as_toml


# --- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("general", "dataset", "subset", "parts"),
    [
        ("", "", "num_repeat = 2", ["subset 1", "'num_repeat'", "num_repeats"]),
        ("keep_token = 2", "", "", ["[general]", "keep_tokens"]),
        ("", "batchsize = 2", "", ["[[datasets]] 1", "batch_size"]),
        ("", "", "num_repeats = '2'", ["num_repeats", "'2'", "whole number"]),
        ("", "", "shuffle_caption = 1", ["shuffle_caption", "true or false"]),
        ("", "", "batch_size = 2", ["batch_size", "[[datasets]]"]),
        ("is_reg = true", "", "", ["is_reg", "[[datasets.subsets]]"]),
        ("", "resolution = [512]", "", ["resolution", "[width, height]"]),
        ("", "resolution = 0", "", ["resolution"]),
        ("", "", "caption_dropout_rate = 2", ["caption_dropout_rate", "0 to 1"]),
        ("", "", "resize_interpolation = 'nice'", ["resize_interpolation", "lanczos"]),
        ("", "", "face_crop_aug_range = [3.0, 1.0]", ["face_crop_aug_range"]),
        ("", "", "custom_attributes = 1", ["custom_attributes"]),
        ("", "validation_split = 1", "", ["validation_split = 1 ", "0 to below 1"]),
        ("validation_split = -0.1", "", "", ["[general]", "validation_split", "0 to below 1"]),
        ("", "validation_seed = -1", "", ["validation_seed = -1", "whole number"]),
        ("", "", "validation_split = 0.1", ["validation_split", "[general] or [[datasets]]"]),
        ("", "", "is_reg = true", ["regularization"]),
        ("", "", "conditioning_data_dir = '.'", ["masked_loss"]),
        ("", "batch_size = 0", "", ["batch_size"]),
    ],
)
def test_a_mistake_is_named_with_file_and_place(
    dataset_file, images, general, dataset, subset, parts
):
    path = dataset_file(
        f"[general]\n{general}\n[[datasets]]\n{dataset}\n"
        f'[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\n{subset}\n'
    )
    with pytest.raises(UserError) as caught:
        resolve(path)
    message = str(caught.value)
    assert message.startswith(path)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "[[datasets]]"),
        ("[[datasets]]\nresolution = 512", "[[datasets.subsets]]"),
        ("[[datasets]]\n[[datasets.subset]]\nimage_dir = '.'", "'subset'"),
        ("[[dataset]]\nresolution = 512", "did you mean datasets"),
        ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 2", "image_dir is missing"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'gone'", "no such folder"),
        ("[[datasets]]\n[[datasets.subsets]]\nmetadata_file = 'gone.json'", "no such file"),
        ("[[datasets]\n", "line 1"),
    ],
)
def test_an_unusable_file_says_what_is_missing(dataset_file, text, part):
    with pytest.raises(UserError) as caught:
        resolve(dataset_file(text))
    assert part in str(caught.value)


def test_a_missing_resolution_is_an_error(dataset_file, images):
    path = dataset_file(f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\n')
    with pytest.raises(UserError, match="resolution is missing"):
        resolve(path, resolution=None)
    with pytest.raises(UserError, match="width,height"):
        resolve(path, resolution="512x768")


def test_repeated_and_unused_subsets_are_skipped_by_name(dataset_file, images, caplog):
    subset = f'[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\n'
    path = dataset_file(f"[[datasets]]\n{subset}num_repeats = 2\n{subset}num_repeats = 9\n")
    (dataset,) = resolve(path)
    assert [subset.num_repeats for subset in dataset.subsets] == [2]
    assert images.name in caplog.text
    with pytest.raises(UserError, match="nothing to train on"):
        resolve(dataset_file(f"[[datasets]]\n{subset}num_repeats = 0\n"))


# --- kinds of subsets ------------------------------------------------------------------------


def test_metadata_subsets_stand_alone_and_take_no_caption_files(dataset_file, images, tmp_path):
    metadata = tmp_path / "meta.json"
    metadata.write_text("{}")
    head = f'[[datasets]]\n[[datasets.subsets]]\nmetadata_file = "{metadata.as_posix()}"\n'
    (dataset,) = resolve(dataset_file(head))
    assert dataset.subsets[0].metadata_file == metadata
    assert dataset.subsets[0].image_dir is None
    with pytest.raises(UserError, match="caption_extension"):
        resolve(dataset_file(head + "caption_extension = '.txt'"))
    mixed = head + f'[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\n'
    with pytest.raises(UserError, match="metadata_file"):
        resolve(dataset_file(mixed))


def test_mask_folders_need_masked_loss_and_all_subsets(dataset_file, images, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    subset = f'[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\n'
    masked = subset + f'conditioning_data_dir = "{masks.as_posix()}"\n'
    path = dataset_file("[[datasets]]\n" + masked)
    assert resolve(path, masked_loss=True)[0].subsets[0].conditioning_data_dir == masks
    with pytest.raises(UserError, match="masked_loss"):
        resolve(path)
    with pytest.raises(UserError, match="conditioning_data_dir"):
        resolve(dataset_file("[[datasets]]\n" + masked + subset), masked_loss=True)


def test_masked_loss_without_any_mask_is_an_error(dataset_file, images):
    subset = f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\n'
    with pytest.raises(UserError, match="alpha_mask"):
        resolve(dataset_file(subset), masked_loss=True)
    resolve(dataset_file(subset + "alpha_mask = true"), masked_loss=True)


def test_caching_is_refused_where_a_subset_changes_its_images(dataset_file, images):
    subset = f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\n'
    for name in ("random_crop", "color_aug", "scale_aug"):
        path = dataset_file(subset + f"{name} = true")
        resolve(path)
        with pytest.raises(UserError, match=name):
            resolve(path, cache_latents=True)


def test_scales_are_for_training_images_alone(dataset_file, images):
    reg = images.parent / "reg"
    reg.mkdir()
    train = f'[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\n'
    regular = f'[[datasets.subsets]]\nimage_dir = "{reg.as_posix()}"\nis_reg = true\n'
    path = dataset_file("[[datasets]]\nscale_aug = true\n" + train + regular)
    (dataset,) = resolve(path)
    assert [subset.scale_aug for subset in dataset.subsets] == [True, False]
    path = dataset_file("[[datasets]]\n" + train + regular + "scale_aug = true\n")
    with pytest.raises(UserError, match="subset 2: scale_aug = true has no effect"):
        resolve(path)


# --- sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "used"), [(1, 32), (32, 32), (64, 64), (65, 96), (128, 128)])
def test_bucket_steps_are_rounded_up_to_32_with_a_warning(
    dataset_file, images, caplog, given, used
):
    subset = f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\n'
    (dataset,) = resolve(dataset_file(subset), enable_bucket=True, bucket_reso_steps=given)
    assert dataset.bucket_reso_steps == used
    assert ("bucket_reso_steps" in caplog.text) == (given != used)


@pytest.mark.parametrize(("steps", "sdxl_only"), [(32, True), (96, True), (64, False)])
def test_steps_of_32_are_for_sdxl(dataset_file, images, refused, steps, sdxl_only):
    subset = f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\n'
    datasets = resolve(dataset_file(subset), enable_bucket=True, bucket_reso_steps=steps)
    require_bucket_steps(datasets, is_sdxl=True)
    require_bucket_steps(resolve(dataset_file(subset), bucket_reso_steps=steps), is_sdxl=False)
    if not sdxl_only:
        require_bucket_steps(datasets, is_sdxl=False)
        return
    with refused([f"bucket_reso_steps = {steps}", "multiple of 64"]):
        require_bucket_steps(datasets, is_sdxl=False)


def test_bucket_steps_do_not_matter_without_buckets(dataset_file, images, caplog):
    subset = f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\n'
    resolve(dataset_file(subset), bucket_reso_steps=1)
    assert not caplog.records


def test_a_size_that_latents_cannot_have_is_rounded_down(dataset_file, images, caplog):
    path = dataset_file(f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\n')
    assert resolve(path, resolution="512,650")[0].resolution == (512, 648)
    assert "512,648" in caplog.text
    assert resolve(path, resolution="512,650", enable_bucket=True)[0].resolution == (512, 650)


# --- folder convention -----------------------------------------------------------------------


def from_folders(train, reg=None, **options):
    values = {"train_data_dir": train, "reg_data_dir": reg, "resolution": "64", **options}
    return resolve_datasets(TrainConfig().replace(**values))


def test_folder_names_give_repeats_and_class_tokens(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    train = folders(tmp_path / "train", "10_sks dog", "3_a_b c", "2_", "plain", "x_y")
    (tmp_path / "train" / "note.txt").write_text("")
    reg = folders(tmp_path / "reg", "1_dog")
    (dataset,) = from_folders(train, reg, dataset_repeats=9)
    found = [(s.image_dir.name, s.num_repeats, s.class_tokens, s.is_reg) for s in dataset.subsets]
    assert found == [
        ("10_sks dog", 10, "sks dog", False),
        ("2_", 2, None, False),
        ("3_a_b c", 3, "a_b c", False),
        ("1_dog", 1, "dog", True),
    ]
    warned = [record.getMessage() for record in caplog.records]
    assert [name in text for name, text in zip(("plain", "x_y"), warned, strict=True)] == [True] * 2
    assert "10_sks dog" in warned[0]


@pytest.mark.parametrize("names", [[], ["dog"], ["0_sks dog"]])
def test_a_folder_without_usable_folders_says_the_right_form(tmp_path, names):
    train = folders(tmp_path / "train", "unused", *names)
    with pytest.raises(UserError, match="10_sks dog"):
        from_folders(train)


@pytest.mark.parametrize("name", ["0_sks dog", "-1_sks dog", "00_sks dog"])
def test_repeats_below_one_are_named_as_the_reason(tmp_path, caplog, name):
    train = folders(tmp_path / "train", name, "2_sks dog")
    from_folders(train)
    assert "the number of repeats must be 1 or more" in caplog.text


def test_the_folder_of_the_concept_itself_is_told_from_its_parent(tmp_path):
    folders(tmp_path / "train", "10_sks dog")
    with pytest.raises(UserError, match="give .*train, the folder that holds this one"):
        from_folders(str(tmp_path / "train" / "10_sks dog"))


def test_missing_folders_are_errors(tmp_path):
    with pytest.raises(UserError, match="train_data_dir"):
        from_folders(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="train_data_dir or dataset_config"):
        from_folders(None)
    train = folders(tmp_path / "train", "1_sks dog")
    with pytest.raises(UserError, match="reg_data_dir"):
        from_folders(train, str(tmp_path / "gone"))


def test_the_mask_folder_option_serves_the_concept_only(tmp_path):
    train = folders(tmp_path / "train", "1_sks dog")
    reg = folders(tmp_path / "reg", "1_dog")
    masks = folders(tmp_path / "masks")
    Path(masks).mkdir(exist_ok=True)
    (dataset,) = from_folders(train, reg, masked_loss=True, conditioning_data_dir=masks)
    assert [subset.conditioning_data_dir for subset in dataset.subsets] == [Path(masks), None]


def test_a_dataset_config_beats_the_folder_options_with_a_warning(dataset_file, images, caplog):
    path = dataset_file(f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\n')
    (dataset,) = resolve(path, train_data_dir="elsewhere")
    assert dataset.subsets[0].image_dir == images
    assert "train_data_dir" in caplog.text


# --- the concepts ----------------------------------------------------------------------------

SKS, OHWX = Concept("sks", "dog"), Concept("ohwx", "cat")


def concepts(tmp_path, names, *, required=True, **options):
    config = TrainConfig().replace(
        train_data_dir=folders(tmp_path / "train", *names), resolution="64", **options
    )
    return concepts_of(config, resolve_datasets(config), required=required)


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("10_sks dog", Concept("sks", "dog")),
        ("10_sks duck toy", Concept("sks", "duck toy")),
        ("10_  sks  dog ", Concept("sks", "dog")),
    ],
)
def test_the_concept_is_read_from_the_folder_name(tmp_path, folder, expected):
    assert concepts(tmp_path, [folder]) == (expected,)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"placeholder_token": ("ohwx",), "class_token": ("cat",)}, Concept("ohwx", "cat")),
        ({"placeholder_token": ("my pet",)}, Concept("my pet", "dog")),
        ({"class_token": ("pet dog",)}, Concept("my", "pet dog")),
        ({"class_token": ("dog",)}, Concept("my pet", "dog")),
    ],
)
def test_options_win_and_the_rest_is_read_around_them(tmp_path, options, expected):
    assert concepts(tmp_path, ["10_my pet dog"], **options) == (expected,)


def test_regularization_folders_do_not_name_the_concept(tmp_path):
    reg = folders(tmp_path / "reg", "1_dog")
    assert concepts(tmp_path, ["10_sks dog"], reg_data_dir=reg) == (SKS,)


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["10_sks"], ["'sks'", "--class_token", "10_sks dog"]),
        (["10_"], ["--placeholder_token", "--class_token"]),
    ],
)
def test_an_unknown_concept_is_an_error_only_where_it_is_required(tmp_path, names, parts):
    with pytest.raises(UserError) as caught:
        concepts(tmp_path, names)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
    known = [name[3:] for name in names if name[3:]]
    assert [c.text for c in concepts(tmp_path / "off", names, required=False)] == known


def test_equal_names_in_several_folders_are_one_concept(tmp_path):
    assert concepts(tmp_path, ["10_sks dog", "5_sks dog"]) == (SKS,)


def test_folders_with_two_placeholders_are_two_concepts_in_their_order(tmp_path):
    assert concepts(tmp_path, ["10_sks dog", "5_ohwx cat"]) == (SKS, OHWX)
    assert concepts(tmp_path / "b", ["5_ohwx cat", "6_sks dog"]) == (OHWX, SKS)
    assert concepts(tmp_path / "c", ["10_sks dog", "5_ohwx dog"]) == (SKS, Concept("ohwx", "dog"))


def test_several_data_sets_name_concepts_together(dataset_file, tmp_path):
    subsets = [
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{(tmp_path / text).as_posix()}'\n"
        f"class_tokens = '{text}'\n"
        for text in ("sks dog", "ohwx cat")
    ]
    folders(tmp_path, "sks dog", "ohwx cat")
    path = dataset_file("".join(subsets))
    config = TrainConfig().replace(dataset_config=path, resolution="64")
    assert concepts_of(config, resolve_datasets(config), required=True) == (SKS, OHWX)


def test_lists_name_several_concepts_pair_by_pair(tmp_path):
    options = {"placeholder_token": ("sks", "zwx"), "class_token": ("dog", "duck toy")}
    found = concepts(tmp_path, ["10_"], **options)
    assert found == (SKS, Concept("zwx", "duck toy"))
    assert [concept.text for concept in found] == ["sks dog", "zwx duck toy"]


def test_a_list_of_one_kind_takes_the_rest_from_the_folders(tmp_path):
    names = ["10_sks dog", "5_ohwx cat"]
    assert concepts(tmp_path, names, placeholder_token=("ohwx", "sks")) == (OHWX, SKS)
    assert concepts(tmp_path / "b", names, class_token=("cat", "dog")) == (OHWX, SKS)
    assert concepts(tmp_path / "c", names, placeholder_token=("sks",)) == (SKS,)


@pytest.mark.parametrize(
    ("names", "options", "parts"),
    [
        (
            ["10_sks dog", "5_sks cat"],
            {},
            ["'sks' names several concepts (sks dog, sks cat)", "give each its own"],
        ),
        (
            ["10_sks dog"],
            {"placeholder_token": ("sks", "ohwx"), "class_token": ("dog",)},
            ["placeholder_token names 2 concepts, class_token 1", "in quotes"],
        ),
        (
            ["10_sks dog"],
            {"placeholder_token": ("sks",), "class_token": ("duck", "toy")},
            ["placeholder_token names 1 concepts, class_token 2", "in quotes"],
        ),
        (
            ["10_"],
            {"placeholder_token": ("sks", "sks"), "class_token": ("dog", "cat")},
            ["'sks' names several concepts (sks dog, sks cat)", "give each its own"],
        ),
        (
            ["10_"],
            {"placeholder_token": ("sks", "SKS"), "class_token": ("dog", "cat")},
            ["'sks' names several concepts (sks dog, SKS cat)"],
        ),
        (
            ["10_"],
            {"class_token": ("dog", "cat")},
            ["needs to know the concept", "--placeholder_token"],
        ),
        (
            ["10_sks dog", "5_ohwx cat"],
            {"class_token": ("toy", "bird")},
            ["several concepts (sks dog, ohwx cat)", "--placeholder_token"],
        ),
        (
            ["10_sks dog"],
            {"placeholder_token": ("sks", "ohwx")},
            ["needs to know the concept", "--class_token"],
        ),
        (
            ["10_sks dog", "5_sks cat"],
            {"placeholder_token": ("sks",)},
            ["several concepts (sks dog, sks cat)", "--class_token"],
        ),
        (["10_sks dog", "5_ohwx"], {}, ["'ohwx'", "--class_token", "10_ohwx dog"]),
    ],
)
def test_concepts_that_cannot_be_distinguished_are_refused(tmp_path, names, options, parts):
    with pytest.raises(UserError) as caught:
        concepts(tmp_path, names, **options)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_unequal_lists_are_refused_even_where_no_concept_is_required(tmp_path):
    options = {"placeholder_token": ("sks", "ohwx"), "class_token": ("dog",)}
    with pytest.raises(UserError, match="names 2 concepts"):
        concepts(tmp_path, ["10_"], required=False, **options)


def test_a_name_is_kept_without_its_class_where_the_run_needs_none(tmp_path):
    found = concepts(tmp_path, ["10_sks dog", "5_ohwx"], required=False)
    assert found == (SKS, Concept("ohwx", None))
    assert [concept.text for concept in found] == ["sks dog", "ohwx"]
