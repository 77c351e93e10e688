"""Concepts: unseen objects, pictured in one place, prompted in others."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from mlm_plugin.demo.command import run_pocket
from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.eval_prompts import load_templates
from mlm_plugin.pocket.captions import (
    BACKGROUND_PHRASES,
    BACKGROUND_TAGS,
    POSITION_PHRASES,
    RARE_WORDS,
    SIZE_WORDS,
)
from mlm_plugin.pocket.concepts import (
    ASKED,
    REPORTED,
    TUNING,
    contexts,
    find_concept,
    prompt_templates,
    training_scenes,
)
from mlm_plugin.pocket.prompt_labels import read_labels
from mlm_plugin.pocket.scores import identity
from mlm_plugin.pocket.shipped import pocket_model
from mlm_plugin.pocket.world import ATTRIBUTES, COLOURS, NO_COMPANION, render

CONCEPTS = (*REPORTED, *TUNING)
every_concept = pytest.mark.parametrize("concept", CONCEPTS, ids=lambda concept: concept.name)


@every_concept
def test_a_concept_is_made_of_known_values_and_unnamed_colours(concept):
    for name, values in ATTRIBUTES.items():
        assert getattr(concept.scene, name) in values
    assert concept.token in RARE_WORDS
    named = np.array([paint for paint in COLOURS.values()], float)
    distance = np.linalg.norm(named - np.array(concept.scene.paint, float), axis=-1)
    assert distance.max(axis=1).min() > 75  # of 442; in one of its two colours at least


def test_no_two_concepts_share_a_name_or_a_shape_with_its_pattern():
    looks = [(concept.scene.subject, concept.scene.pattern) for concept in CONCEPTS]
    for part in ([concept.name for concept in CONCEPTS], looks):
        assert len(set(part)) == len(CONCEPTS)


def test_settings_are_tuned_on_other_shapes_than_those_reported():
    assert (len(REPORTED), len(TUNING)) == (12, 6)
    reported, tuning = ({c.scene.subject for c in concepts} for concepts in (REPORTED, TUNING))
    assert not reported & tuning


@pytest.fixture(scope="module")
def vae():
    folder = pocket_model() / "vae"
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)


@every_concept
def test_the_autoencoder_preserves_every_concept(concept, vae):
    pixels = torch.stack([_pixels(render(scene)) for scene in training_scenes(concept)])
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    assert identity(decoded, concept).mean() > 0.75


def _pixels(art):
    return torch.from_numpy(art).permute(2, 0, 1).float() / 127.5 - 1


@every_concept
def test_training_pictures_share_all_that_is_named_and_no_two_are_equal(concept):
    scenes = training_scenes(concept)
    assert len({(scene.background, scene.position, scene.paint) for scene in scenes}) == 1
    assert {scene.companion for scene in scenes} == {NO_COMPANION}
    assert len({render(scene).tobytes() for scene in scenes}) == len(scenes) == 4
    assert scenes == training_scenes(concept)


@every_concept
def test_prompts_ask_for_what_the_pictures_do_not_show(concept):
    prompts = prompt_templates(concept)
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 24
    for prompt in prompts:
        assert prompt.text.count("{}") == 1
        asked = set(prompt.said) - {"subject"}
        assert asked
        assert asked <= set(ASKED)
        assert all(prompt.said[name] != getattr(concept.scene, name) for name in asked)
        assert not set(COLOURS) & set(prompt.text.replace("red hat", "").replace("blue hat", "")
                                      .replace("flower", "").split())  # fmt: skip
    for name in ASKED:
        assert sum(name in prompt.said for prompt in prompts) >= 5


def test_the_command_writes_a_data_folder_and_prompts(tmp_path, capsys):
    assert run_pocket(["concept", "--concept", "sks dog", "--output", str(tmp_path / "dog")]) == 0
    assert "sks dog" in capsys.readouterr().out
    files = sorted((tmp_path / "dog" / "train" / "10_sks dog").iterdir())
    assert [file.name for file in files] == ["0.png", "1.png", "2.png", "3.png"]
    first = training_scenes(find_concept("sks dog"))[0]
    assert np.array_equal(np.array(Image.open(files[0])), render(first))
    templates = load_templates(tmp_path / "dog" / "test_prompts.txt", class_token="dog")
    prompts = prompt_templates(find_concept("sks dog"))
    assert templates == [prompt.text for prompt in prompts]
    labels = read_labels(tmp_path / "dog" / "test_prompts.json")
    assert labels == ("sks dog", {prompt.text: prompt for prompt in prompts})


def test_another_concept_is_not_mixed_into_a_folder(tmp_path):
    output = ["--output", str(tmp_path / "dog")]
    assert run_pocket(["concept", "--concept", "sks dog", *output]) == 0
    assert run_pocket(["concept", "--concept", "sks dog", *output]) == 0
    with pytest.raises(UserError, match="holds another concept .train/10_sks dog.; choose"):
        run_pocket(["concept", "--concept", "zwx robot", *output])


def test_an_unknown_concept_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="zwx robot"):
        run_pocket(["concept", "--concept", "dog", "--output", str(tmp_path / "dog")])
    assert not (tmp_path / "dog").exists()


@every_concept
def test_contexts_for_the_term_ask_nothing_that_a_test_prompt_asks(concept):
    tested = {asked_of(prompt.said) for prompt in prompt_templates(concept)}
    texts = contexts(concept, number=300)
    assert len(set(texts)) == 300
    assert all(text.count("{}") == 1 for text in texts)
    assert not set(texts) & {prompt.text for prompt in prompt_templates(concept)}
    for text in texts:
        assert said_in(text)
        assert said_in(text) not in tested


def asked_of(said):
    return frozenset((name, said[name]) for name in ASKED if name in said)


def said_in(text):
    """What a context names, found by the phrases themselves."""
    found = {}
    for value, phrases in BACKGROUND_PHRASES.items():
        if any(phrase in text for phrase in phrases) or BACKGROUND_TAGS.get(value, value) in text:
            found["background"] = value
    for value, phrases in POSITION_PHRASES.items():
        if any(phrase in text for phrase in phrases):
            found["position"] = value
    for value in ATTRIBUTES["companion"]:
        if f"a {value}" in text or f", {value}" in text:  # "flower", but not "field of flowers"
            found["companion"] = value
    sizes = [word for words in SIZE_WORDS.values() for word in words]
    return frozenset(found.items()) or frozenset(word for word in sizes if word in text.split())
