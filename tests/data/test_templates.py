"""Templates have one slot, are all different and mention no place."""

import pytest

from mlm_plugin.data.templates import fill_template, load_templates
from mlm_plugin.errors import UserError
from mlm_plugin.prompt_sets.english import is_dreambench, normal_form


@pytest.mark.parametrize(("kind", "count"), [("object", 27), ("style", 19)])
def test_every_template_holds_one_slot_and_no_two_are_equal(kind, count):
    templates = load_templates(kind)
    assert len(set(templates)) == len(templates) == count
    for template in templates:
        assert template.count("{}") == 1
        assert template.endswith("{}"), "nothing may follow that says where the concept is"
        assert template == template.lower().strip()
        assert not is_dreambench(template)
    assert not set(load_templates("object")) & set(load_templates("style"))


def test_templates_speak_of_pictures_alone():
    allowed = set(
        "artwork amateur another bright brightly close-up close up color composition cropped dark "
        "detail detailed dimly example faithful fine large lit made more professional quick same "
        "scan scene sharp showing slightly blurry small style tightly work art one".split()
    )
    for kind in ("object", "style"):
        for template in load_templates(kind):
            assert set(normal_form(template).split()) - {"{}"} <= allowed, template


def test_another_kind_is_refused():
    with pytest.raises(UserError, match="templates: 'person' is not one of object, style"):
        load_templates("person")


def test_a_filled_template_has_the_right_article():
    assert fill_template("a photo of a {}", "ohwx dog") == "a photo of an ohwx dog"
    assert fill_template("a photo of a {}", "sks dog") == "a photo of a sks dog"
    assert fill_template("a photo of a {}", "<new1> dog") == "a photo of a <new1> dog"
