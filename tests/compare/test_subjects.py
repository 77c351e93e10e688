"""Subjects in the layouts that people have."""

import json

import pytest
from PIL import Image

from mlm_plugin.compare.subjects import find_subjects
from mlm_plugin.errors import UserError


def photo(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def test_the_folder_of_dreambench_is_read_as_it_is(tmp_path):
    for name in ("duck_toy", "dog"):
        photo(tmp_path / name / "00.jpg")
    classes = "Classes\n\nsubject_name,class\ndog,dog\nduck_toy,toy\n\nPrompts\n'a {0} {1}', x\n"
    (tmp_path / "prompts_and_classes.txt").write_text(classes)
    found = [(s.name, s.placeholder_token, s.class_token) for s in find_subjects(tmp_path)]
    assert found == [("dog", "sks", "dog"), ("duck_toy", "sks", "toy")]


def test_plain_photos_are_given_to_the_trainer_with_their_words(tmp_path):
    photo(tmp_path / "subjects" / "mine" / "a.png")
    words = 'placeholder_token = "zwx"\nclass_token = "rubber duck"\n'
    (tmp_path / "subjects" / "mine" / "subject.toml").write_text(words)
    (subject,) = find_subjects(tmp_path / "subjects")
    options = subject.options(tmp_path / "out")
    assert (options["placeholder_token"], options["class_token"]) == ("zwx", "rubber duck")
    (dataset,) = json.loads(open(options["dataset_config"]).read())["datasets"]
    assert dataset["subsets"][0]["class_tokens"] == "zwx rubber duck"


def test_kohyas_folder_names_both_words_and_hidden_folders_are_left_out(tmp_path):
    photo(tmp_path / "mine" / "10_sks duck toy" / "a.png")
    (tmp_path / ".cache").mkdir()
    (subject,) = find_subjects(tmp_path)
    assert (subject.placeholder_token, subject.class_token) == ("sks", "duck toy")
    assert subject.options(tmp_path)["train_data_dir"] == str(tmp_path / "mine")


@pytest.mark.parametrize(
    ("text", "message"), [("class_token = 3", "must be a word"), ("class_token", "not valid TOML")]
)
def test_a_wrong_subject_file_is_one_line(tmp_path, text, message):
    photo(tmp_path / "mine" / "a.png")
    (tmp_path / "mine" / "subject.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        find_subjects(tmp_path)


def test_a_folder_without_subjects_is_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no folders"):
        find_subjects(tmp_path)
