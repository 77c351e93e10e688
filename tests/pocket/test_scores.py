"""Scores of predictions written by hand: prompt fidelity and identity."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mlm_plugin.data.images import image_tensor
from mlm_plugin.pocket.captions import Caption
from mlm_plugin.pocket.concepts import REPORTED, TUNING, Concept
from mlm_plugin.pocket.oracle import Predictions
from mlm_plugin.pocket.scores import identity, prompt_fidelity, seen_right
from mlm_plugin.pocket.world import (
    ATTRIBUTES,
    COLOURS,
    NO_COMPANION,
    Scene,
    render,
    thing_alone,
)

SCENE = Scene("dog", "red", "dotted", "large", "left", "meadow")
CONCEPTS = (*REPORTED, *TUNING)
every_concept = pytest.mark.parametrize("concept", CONCEPTS, ids=lambda concept: concept.name)


def predictions_of(*scenes):
    """What a perfect oracle sees in pictures of these scenes."""
    logits = {
        name: F.one_hot(
            torch.tensor([values.index(getattr(scene, name)) for scene in scenes]), len(values)
        ).float()
        for name, values in ATTRIBUTES.items()
    }
    return Predictions(logits)


def test_an_attribute_is_right_wrong_or_not_asked():
    predictions = predictions_of(SCENE, replace(SCENE, background="snow"))
    prompts = [Caption("", {"background": "meadow"}), Caption("", {"background": "sea"})]
    right = seen_right(predictions, prompts)
    assert right["background"].tolist() == [1, 0]
    assert set(right) == set(ATTRIBUTES)
    assert right["position"].isnan().all()


def test_prompt_fidelity_is_the_share_of_what_was_asked():
    said = {"subject": "dog", "background": "meadow", "position": "left", "companion": "crown"}
    predictions = predictions_of(
        SCENE, replace(SCENE, companion="crown"), replace(SCENE, position="right")
    )
    fidelity = prompt_fidelity(predictions, [Caption("", said)] * 3)
    torch.testing.assert_close(fidelity, torch.tensor([2 / 3, 1, 1 / 3]))


def test_the_subject_counts_as_identity_and_not_as_fidelity():
    predictions = predictions_of(SCENE, SCENE)
    prompts = [
        Caption("", {"subject": "cat", "background": "meadow"}),
        Caption("", {"subject": "dog"}),
    ]
    fidelity = prompt_fidelity(predictions, prompts)
    assert fidelity[0] == 1
    assert fidelity[1].isnan()


def test_a_companion_may_be_asked_not_to_be_there():
    prompts = [Caption("", {"companion": NO_COMPANION})] * 2
    predictions = predictions_of(SCENE, replace(SCENE, companion="crown"))
    assert prompt_fidelity(predictions, prompts).tolist() == [1, 0]


def pictures_of(*scenes):
    return torch.stack([image_tensor(render(scene)) for scene in scenes])


@every_concept
def test_a_concept_is_recognized_at_any_position(concept):
    elsewhere = replace(concept.scene, background="sea", position="middle", seed=5)
    assert identity(pictures_of(concept.scene, elsewhere), concept).min() > 0.9
    for companion in ATTRIBUTES["companion"]:
        together = replace(concept.scene, background="brick wall", companion=companion)
        assert identity(pictures_of(together), concept).item() > 0.9
    small = replace(concept.scene, size="small")
    assert identity(pictures_of(small), concept).item() > 0.6


@every_concept
def test_other_colours_patterns_and_shapes_are_not_the_concept(concept):
    true = concept.scene
    own = identity(pictures_of(true), concept).item()
    other_subject = next(s for s in ATTRIBUTES["subject"] if s != true.subject)
    others = pictures_of(
        *(replace(true, paint=None, colour=colour) for colour in COLOURS),
        replace(true, pattern="plain"),
        replace(true, subject=other_subject),
    )
    scores = identity(others, concept)
    assert scores.max() < own - 0.2
    assert scores[: len(COLOURS)].mean() < 0.35


@every_concept
def test_an_even_error_costs_what_the_formula_says(concept):
    """A picture that is off by 0.2 everywhere is the concept to 1/e; by 0.1, to e^(-1/4)."""
    thing, covers = thing_alone(concept.scene, concept.scene.size)
    height, width = covers.shape
    canvas = torch.zeros(1, 3, 32, 32)
    canvas[0, :, 4 : 4 + height, 3 : 3 + width] = torch.from_numpy(thing).permute(2, 0, 1) / 255
    for error, expected in ((0.0, 1.0), (0.1, math.exp(-0.25)), (0.2, math.exp(-1))):
        pixels = (canvas + error).repeat_interleave(2, 2).repeat_interleave(2, 3) * 2 - 1
        assert identity(pixels, concept).item() == pytest.approx(expected, abs=2e-3)


def test_colours_may_have_a_name_too():
    concept = Concept("sks", replace(SCENE, colour="blue"))
    scores = identity(pictures_of(replace(SCENE, colour="blue"), SCENE), concept)
    assert scores[0] > 0.9
    assert scores[1] < 0.4
