"""Measures of the text encoder: what must be zero is, what was put in comes out."""

import copy

import pytest
import torch

from mlm_plugin.contextualizer_file import load_contextualizer
from mlm_plugin.evaluation.eval_prompts import with_class, with_concept
from mlm_plugin.evaluation.text_measures import (
    ConceptPrompts,
    embedding_measures,
    encoder_drift,
    masked_words,
    measure_text_encoder,
    pooled_states,
    random_words,
    set_distances,
)
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.models.token_embeddings import LearnedTokens

TEMPLATES = ["a {} on the beach", "a {} wearing a red hat", "a {} in the snow", "a wet {}"]


def copy_of(text_encoder):
    return TextEncoder(text_encoder.tokenizer, copy.deepcopy(text_encoder.model))


@pytest.fixture
def contextualizer(toy_contextualizer, toy_text_encoder):
    return load_contextualizer(toy_contextualizer, toy_text_encoder)[0]


def test_an_encoder_has_not_drifted_from_itself_and_has_from_another(toy_text_encoder):
    moved = copy_of(toy_text_encoder)
    prompts = ["a quiet library", "two ships in a storm"]
    with torch.no_grad():
        assert encoder_drift(moved, toy_text_encoder, prompts) == pytest.approx(0, abs=1e-6)
        for weight in moved.model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
        assert encoder_drift(moved, toy_text_encoder, prompts) > 0.01


def test_a_concept_that_is_the_class_word_is_at_no_distance_and_collapses_nothing(toy_text_encoder):
    prompts = [with_class(template, "dog") for template in TEMPLATES]
    with torch.no_grad():
        distances = set_distances(toy_text_encoder, prompts, prompts)
    assert distances["inter"] == pytest.approx(0, abs=1e-6)
    assert distances["collapse"] == pytest.approx(0, abs=1e-6)
    assert distances["intra"] == distances["intra_class"] > 0


def test_prompts_that_say_the_same_have_collapsed(toy_text_encoder):
    prompts = [with_class(template, "dog") for template in TEMPLATES]
    with torch.no_grad():
        distances = set_distances(toy_text_encoder, ["a sks dog"] * 4, prompts)
    assert distances["collapse"] == pytest.approx(1, abs=1e-6)


def test_the_pooled_state_is_the_end_tokens_of_a_full_window(toy_text_encoder):
    prompts = ["a dog", "a dog on top of a purple rug in a forest"]
    with torch.no_grad():
        pooled_BD = pooled_states(toy_text_encoder, prompts)[0]
        full_BLD = toy_text_encoder.encode_captions(prompts)
    ends = [toy_text_encoder.count_tokens(prompt) + 1 for prompt in prompts]
    torch.testing.assert_close(pooled_BD, full_BLD[torch.arange(2), ends], atol=1e-5, rtol=1e-5)


def test_the_embedding_has_the_norm_and_direction_it_was_given(toy_text_encoder):
    ids = toy_text_encoder.tokenizer("dog", add_special_tokens=False).input_ids
    class_D = toy_text_encoder.token_embedding.weight.detach()[ids].mean(dim=0)
    across_D = torch.randn_like(class_D)
    across_D -= class_D * (across_D @ class_D) / class_D.square().sum()
    vectors_KND = torch.stack([3 * class_D, 3 * class_D.norm() * across_D / across_D.norm()])[None]
    LearnedTokens(toy_text_encoder, {"sks": vectors_KND})
    found = embedding_measures(toy_text_encoder, placeholder_token="sks", class_token="dog")
    assert found["norm"] == pytest.approx(3 * class_D.norm().item(), rel=1e-4)
    assert found["cosine"] == pytest.approx(0.5, abs=1e-4)  # one along, one across
    assert found["num_vectors"] == 2
    assert embedding_measures(toy_text_encoder, placeholder_token="", class_token="dog") is None


def test_random_words_are_words_of_one_token_and_named_by_the_seed(toy_text_encoder):
    words = random_words(toy_text_encoder, 5, seed=1)
    assert words == random_words(toy_text_encoder, 5, seed=1)
    assert words != random_words(toy_text_encoder, 5, seed=2)
    assert all(toy_text_encoder.count_tokens(word) == 1 for word in words)


def test_the_same_words_are_masked_whatever_is_in_the_slot(toy_text_encoder, contextualizer):
    words = ["sks", "zwx", "dog"]
    results = [
        masked_words(
            toy_text_encoder,
            contextualizer,
            [with_concept(template, word, "dog") for template in TEMPLATES],
            protected=words,
            seed=3,
        )
        for word in ("", "sks", "zwx")
    ]
    assert len({result.num_masked for result in results}) == 1
    assert len({result.loss for result in results}) == 3


def test_every_layers_embedding_of_a_placeholder_counts(toy_text_encoder, contextualizer):
    table_VD = toy_text_encoder.token_embedding.weight.detach()
    both_tokens = LearnedTokens(toy_text_encoder, {"sks": table_VD[[5, 900]][:, None]})
    prompts = [with_concept(template, "sks", "dog") for template in TEMPLATES]
    with torch.no_grad():
        assert pooled_states(toy_text_encoder, prompts).shape[:2] == (2, 4)
        both = masked_words(
            toy_text_encoder, contextualizer, prompts, protected=["sks", "dog"], seed=0
        )
    singles = []
    both_tokens.remove()
    for token in (5, 900):
        single = LearnedTokens(toy_text_encoder, {"sks": table_VD[[token]][:, None]})
        with torch.no_grad():
            singles.append(
                masked_words(
                    toy_text_encoder, contextualizer, prompts, protected=["sks", "dog"], seed=0
                ).loss
            )
        single.remove()
    assert singles[0] != singles[1]
    assert both.loss == pytest.approx(sum(singles) / 2, rel=1e-5)


def test_without_a_contextualizer_the_other_measures_are_taken(toy_text_encoder):
    found = measure_text_encoder(
        toy_text_encoder,
        copy_of(toy_text_encoder),
        None,
        prompts=ConceptPrompts(TEMPLATES, "sks", "dog"),
    )
    assert found["masked_words"] is None
    assert found["drift"]["everyday"] == pytest.approx(0, abs=1e-6)
    assert len(found["distance_per_prompt"]) == len(TEMPLATES)
