"""What is drawn, what it is scored by, and where its noise comes from."""

import pytest

from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.eval_prompts import evaluation_prompts, load_templates, picture_seed
from mlm_plugin.prompt_sets.english import dreambench_prompts


def test_the_class_chooses_dreambenchs_list():
    assert load_templates(None, class_token="dog") == list(dreambench_prompts("living"))
    assert load_templates(None, class_token="teapot") == list(dreambench_prompts("object"))


def test_the_placeholder_is_drawn_but_not_scored():
    (prompt,) = evaluation_prompts(["a {} on a"], placeholder_token="sks", class_token="elephant")
    assert prompt.prompt == "a sks elephant on a"
    assert prompt.text == "an elephant on a"


def test_without_placeholder_the_plain_class_is_drawn():
    (prompt,) = evaluation_prompts(["a {} asleep"], placeholder_token="", class_token="owl")
    assert prompt.prompt == prompt.text == "an owl asleep"


def test_a_file_of_prompts_may_have_comments_and_blank_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# mine\n\na {}  in the rain\n{} asleep\n")
    assert load_templates(path, class_token="dog") == ["a {} in the rain", "{} asleep"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a dog\n", "line 1: 'a dog' has 0 slots"),
        ("a {}\n{} and {}\n", "line 2"),
        ("# nothing\n", "no prompts"),
        ("a {}\na {}\n", "is there twice"),
    ],
)
def test_a_bad_file_of_prompts_is_named_with_the_line(tmp_path, text, message):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_templates(path, class_token="dog")


def test_seeds_differ_by_run_prompt_and_number_and_stay_the_same():
    seeds = {picture_seed(s, t, n) for s in (0, 1) for t in ("a {}", "b {}") for n in (0, 1)}
    assert len(seeds) == 8
    assert picture_seed(1, "a {}", 1) in seeds
