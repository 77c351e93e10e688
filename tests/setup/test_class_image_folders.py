"""Which folder has the pictures of a class, and that the run may create it."""

import pytest

from mlm_plugin.config.datasets import folder_name, resolve_datasets
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.errors import UserError
from mlm_plugin.setup.class_image_folders import _folder


def folders(parent, *names):
    for name in names:
        (parent / name).mkdir(parents=True)
    return parent


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("10_sks dog", (10, "sks dog")),
        ("3_a_b c", (3, "a_b c")),
        ("2_", (2, "")),
        ("2", (2, "")),
        ("0_dog", None),
        ("x_dog", None),
        ("dog", None),
        ("-1_dog", None),
    ],
)
def test_a_folder_name_begins_with_its_repeats(name, parts):
    assert folder_name(name) == parts


@pytest.mark.parametrize(
    ("names", "class_token", "chosen"),
    [
        ([], "dog", "1_dog"),
        (["7_dog"], "dog", "7_dog"),
        (["1_hot_dog", "x_dog", "0_dog"], "dog", "1_dog"),
        (["1_hot_dog"], "hot_dog", "1_hot_dog"),
        (["5_dog", "3_dog", "4_dog"], "dog", "3_dog"),
        (["1_dog r"], "dog [red]", "1_dog [red]"),
        (["2_dog [red]"], "dog [red]", "2_dog [red]"),
        (["2_duck  toy"], "duck toy", "2_duck  toy"),
    ],
)
def test_pictures_go_into_the_folder_of_exactly_their_class(tmp_path, names, class_token, chosen):
    assert _folder(folders(tmp_path, *names), class_token).name == chosen


@pytest.mark.parametrize("class_token", ["dog/cat", "dog\\cat", "../dog"])
def test_a_class_that_would_make_folders_is_refused_in_one_line(tmp_path, class_token):
    with pytest.raises(UserError, match="cannot name a folder") as caught:
        _folder(tmp_path, class_token)
    assert repr(class_token) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [None, [], ["dog"]], ids=["missing", "empty", "no repeats"])
def test_a_folder_that_is_going_to_be_filled_may_be_missing_or_empty(tmp_path, names):
    train, reg = folders(tmp_path / "train", "1_sks dog"), tmp_path / "reg"
    if names is not None:
        reg.mkdir()
        folders(reg, *names)
    options = {"train_data_dir": str(train), "reg_data_dir": str(reg), "resolution": "64"}
    config = TrainConfig().replace(**options)
    with pytest.raises(UserError, match="reg_data_dir"):
        resolve_datasets(config)
    config = config.replace(generate_class_images=2)
    (dataset,) = resolve_datasets(config)
    assert [subset.is_reg for subset in dataset.subsets] == [False]
    folders(reg, "1_dog")
    (dataset,) = resolve_datasets(config)
    assert [subset.is_reg for subset in dataset.subsets] == [False, True]
