"""Scores of readings written by hand: what was asked is seen, and the concept is itself."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mlm_plugin.pocket.captions import Caption
from mlm_plugin.pocket.concepts import REPORTED, TUNING, Concept, find_concept
from mlm_plugin.pocket.oracle import Reading
from mlm_plugin.pocket.scores import colour_agreement, identity, prompt_fidelity, seen_right
from mlm_plugin.pocket.world import ATTRIBUTES, COLOURS, NO_COMPANION, Paint, Scene

SCENE = Scene("dog", "red", "dotted", "large", "left", "meadow")
CONCEPTS = (*REPORTED, *TUNING)
every_concept = pytest.mark.parametrize("concept", CONCEPTS, ids=lambda concept: concept.name)


def reading_of(*scenes, paint=None):
    """What an oracle without fault reads in pictures of these scenes."""
    logits = {
        name: F.one_hot(
            torch.tensor([values.index(getattr(scene, name)) for scene in scenes]), len(values)
        ).float()
        for name, values in ATTRIBUTES.items()
    }
    paints = [scene.paint or COLOURS[scene.colour] for scene in scenes]
    return Reading(logits, torch.tensor(paints) / 255 if paint is None else paint)


def shifted(concept, distance):
    """The concept's colours, each off by ``distance`` in RGB."""
    offset = torch.tensor([1.0, -1.0, 1.0]) * distance / 3**0.5
    return torch.tensor([concept.scene.paint]) / 255 + offset


def test_an_attribute_is_right_wrong_or_not_asked():
    reading = reading_of(SCENE, replace(SCENE, background="snow"))
    prompts = [Caption("", {"background": "meadow"}), Caption("", {"background": "sea"})]
    right = seen_right(reading, prompts)
    assert right["background"].tolist() == [1, 0]
    assert set(right) == set(ATTRIBUTES)
    assert right["position"].isnan().all()


def test_prompt_fidelity_is_the_share_of_what_was_asked():
    said = {"subject": "dog", "background": "meadow", "position": "left", "companion": "crown"}
    reading = reading_of(SCENE, replace(SCENE, companion="crown"), replace(SCENE, position="right"))
    fidelity = prompt_fidelity(reading, [Caption("", said)] * 3)
    torch.testing.assert_close(fidelity, torch.tensor([2 / 3, 1, 1 / 3]))


def test_the_subject_counts_as_identity_and_not_as_fidelity():
    reading = reading_of(SCENE, SCENE)
    prompts = [
        Caption("", {"subject": "cat", "background": "meadow"}),
        Caption("", {"subject": "dog"}),
    ]
    fidelity = prompt_fidelity(reading, prompts)
    assert fidelity[0] == 1
    assert fidelity[1].isnan()


def test_a_companion_may_be_asked_not_to_be_there():
    prompts = [Caption("", {"companion": NO_COMPANION})] * 2
    reading = reading_of(SCENE, replace(SCENE, companion="crown"))
    assert prompt_fidelity(reading, prompts).tolist() == [1, 0]


@every_concept
def test_a_concept_is_itself_wherever_it_stands(concept):
    elsewhere = replace(concept.scene, background="sea", position="right", companion="crown")
    reading = reading_of(concept.scene, elsewhere)
    assert identity(reading, concept).tolist() == pytest.approx([1, 1])


@every_concept
def test_no_named_colour_agrees_with_a_concepts_and_the_noise_of_reading_does(concept):
    named = torch.tensor([paint for paint in COLOURS.values()]) / 255
    assert colour_agreement(named, concept).max() < 0.1
    assert colour_agreement(shifted(concept, 0.05), concept).item() > 0.85
    assert colour_agreement(shifted(concept, 0.1), concept).item() > 0.6
    assert colour_agreement(shifted(concept, 0.15), concept).item() == pytest.approx(0.3679, 1e-3)


def test_a_wrong_shape_pattern_or_colour_costs_a_third_each():
    concept = find_concept("sks dog")
    true = concept.scene
    reading = reading_of(
        replace(true, subject="cat"),
        replace(true, pattern="plain"),
        replace(true, paint=None, colour="red"),
        replace(true, subject="cat", pattern="plain", paint=None, colour="red"),
    )
    scores = identity(reading, concept)
    assert scores.tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 0], abs=0.01)


@pytest.mark.parametrize(
    ("pattern", "agrees"), [("striped", True), ("checkered", True), ("dotted", False)]
)
def test_colours_may_change_places_where_neither_is_the_ground(pattern, agrees):
    concept = find_concept("sks dog")
    concept = replace(concept, scene=replace(concept.scene, pattern=pattern))
    swapped = (torch.tensor([concept.scene.paint]) / 255).flip(1)
    assert colour_agreement(swapped, concept).item() == pytest.approx(float(agrees), abs=0.01)


def test_what_is_plain_has_one_colour():
    scene = replace(SCENE, pattern="plain", paint=Paint((10, 200, 190), (250, 120, 0)))
    paint = torch.tensor([[[10, 200, 190], [0, 0, 0]]]) / 255
    assert colour_agreement(paint, Concept("sks", scene)).item() == pytest.approx(1)


def test_colours_may_have_a_name_too():
    concept = Concept("sks", replace(SCENE, colour="blue"))
    reading = reading_of(replace(SCENE, colour="blue"), SCENE)
    assert identity(reading, concept).tolist() == pytest.approx([1, 2 / 3], abs=0.01)
