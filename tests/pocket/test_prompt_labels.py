"""Labels of prompts on disk: they come back, and a bad file is one line."""

import json

import pytest

from mlm_plugin.errors import UserError
from mlm_plugin.pocket.captions import Caption
from mlm_plugin.pocket.prompt_labels import labels_path, read_labels, write_labels

CAPTIONS = [
    Caption("a {} on the beach", {"subject": "dog", "background": "beach"}),
    Caption("{}, crown", {"subject": "dog", "companion": "crown"}),
]


def test_labels_come_back_by_their_text(tmp_path):
    write_labels(tmp_path / "mine.json", "sks dog", CAPTIONS)
    labels = read_labels(labels_path(tmp_path / "mine.txt"))
    assert labels.concept == "sks dog"
    assert labels.captions == {caption.text: caption for caption in CAPTIONS}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ([], 'names no "concept"'),
        ({"concept": 1, "prompts": {}}, 'names no "concept"'),
        ({"concept": "sks dog", "prompts": []}, 'no table of "prompts"'),
        ({"concept": "sks dog", "prompts": {"a {}": "beach"}}, "'a {}' has 'beach' in place"),
        ({"concept": "sks dog", "prompts": {"a {}": {"place": "beach"}}}, "asks for 'place'"),
        ({"concept": "sks dog", "prompts": {"a {}": {"position": "top"}}},
         "position 'top'; allowed: left, middle, right"),
        ({"concept": "sks dog", "prompts": {"a {}": {"position": ["left"]}}}, "allowed: left"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_in_one_line(tmp_path, content, message):
    path = tmp_path / "labels.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        read_labels(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
