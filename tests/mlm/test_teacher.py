"""Readings: the same words hidden around the class word, taken before anything is trained."""

import random

import pytest
import torch

from mlm_plugin.config.datasets import Concept
from mlm_plugin.config.options import MLMOptions
from mlm_plugin.errors import UserError
from mlm_plugin.mlm.contextualizer import places_of
from mlm_plugin.mlm.masking import IGNORE_INDEX, MASK_ID
from mlm_plugin.mlm.teacher import moved_onto
from mlm_plugin.mlm_setup import (
    build_regularizer,
    load_contextualizer,
    mlm_target,
    prompts_for,
    readings_for,
    text_tap,
)

SKS_DOG = Concept("sks", "dog")
OPTIONS = MLMOptions(mlm_target="class", mlm_batch_size=6, mlm_probability=0.4)


@pytest.fixture
def contextualizer(toy_text_encoder, toy_contextualizer):
    return load_contextualizer(toy_contextualizer, toy_text_encoder)[0]


def take(text_encoder, contextualizer, *concepts, options=OPTIONS, seed=0):
    return readings_for(
        text_encoder,
        contextualizer,
        concepts,
        options,
        prompts=prompts_for(options, concepts),
        seed=seed,
    )


def regularizer_of(text_encoder, contextualizer, *concepts, readings, options=OPTIONS):
    tap = text_tap(text_encoder, contextualizer, concepts, readings=readings)
    return build_regularizer([tap], options, prompts=prompts_for(options, concepts), seed=0)


def test_a_reading_hides_context_words_of_the_prompt_with_the_class_word(
    toy_text_encoder, contextualizer
):
    dog = toy_text_encoder.tokenizer("dog", add_special_tokens=False).input_ids
    for reading in take(toy_text_encoder, contextualizer, SKS_DOG)[:100]:
        text = reading.text.replace("sks dog", "dog")
        assert reading.ids == toy_text_encoder.tokenize_trimmed([text])[0].tolist()
        hidden = [label for label in reading.labels if label != IGNORE_INDEX]
        assert len(hidden) == len(reading.vectors_ND) > 0
        assert not set(hidden) & set(dog)
        assert reading.masked_ids.count(MASK_ID) == len(hidden)


@pytest.mark.parametrize(
    "concepts",
    [[SKS_DOG], [Concept("zwx", "teddy bear")], [SKS_DOG, Concept("ohw", "cat")]],
    ids=["one", "two words", "several"],
)
def test_the_same_words_are_hidden_around_the_concept(toy_text_encoder, contextualizer, concepts):
    words = [
        toy_text_encoder.tokenizer(concept.text, add_special_tokens=False).input_ids
        for concept in concepts
    ]
    for reading in take(toy_text_encoder, contextualizer, *concepts)[:200]:
        ids = toy_text_encoder.tokenize_trimmed([reading.text])[0].tolist()
        masked, labels, found = moved_onto(reading, ids)
        assert found == list(range(len(reading.vectors_ND)))
        assert [x for x in labels if x != IGNORE_INDEX] == [
            x for x in reading.labels if x != IGNORE_INDEX
        ]
        for before, after, label in zip(ids, masked, labels, strict=True):
            assert (after, label) in [(before, IGNORE_INDEX), (MASK_ID, before)]
        assert any(str(ids)[1:-1] in str(masked) for ids in words)


def test_hidden_words_behind_the_length_limit_are_left_out(toy_text_encoder, contextualizer):
    reading = take(toy_text_encoder, contextualizer, SKS_DOG)[0]
    ids = toy_text_encoder.tokenize_trimmed([reading.text])[0].tolist()
    places = [i for i, label in enumerate(moved_onto(reading, ids)[1]) if label != IGNORE_INDEX]
    masked, labels, found = moved_onto(reading, ids[: places[-1]])
    assert len(masked) == len(labels) == places[-1]
    assert found == list(range(len(places) - 1))


def test_the_term_is_zero_while_the_concept_is_read_as_its_class_word(
    toy_text_encoder, contextualizer
):
    itself = Concept(None, "dog")
    readings = take(toy_text_encoder, contextualizer, itself)
    regularizer = regularizer_of(toy_text_encoder, contextualizer, itself, readings=readings)
    assert abs(regularizer(0).loss.item()) < 1e-5
    with torch.no_grad():
        for parameter in toy_text_encoder.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    output = regularizer(0)
    assert output.loss > 1e-3
    output.loss.backward()
    assert any(p.grad.abs().sum() > 0 for p in toy_text_encoder.model.parameters())


def test_the_loss_is_the_divergence_from_what_was_read(toy_text_encoder, contextualizer):
    readings = take(toy_text_encoder, contextualizer, SKS_DOG)
    options = MLMOptions(mlm_batch_size=1, mlm_target="class")
    regularizer = regularizer_of(
        toy_text_encoder, contextualizer, SKS_DOG, readings=readings, options=options
    )
    reading = readings[random.Random("mlm/0/5").choices(range(len(readings)), k=1)[0]]
    tap = regularizer.taps[0]
    ids = tap.tokenize([reading.text], random.Random(0))
    masked, labels, _ = moved_onto(reading, ids[0].tolist())
    masked = torch.tensor([masked])
    embedded = tap.embedding(masked.clamp(min=0))
    embedded[masked == MASK_ID] = tap.contextualizer.mask_vector
    with torch.no_grad():
        tap_hidden = _states(toy_text_encoder, masked, embedded)
        p = contextualizer(
            tap_hidden,
            torch.ones_like(masked).bool(),
            places_of(torch.tensor([labels])),
            tap.token_table,
        ).softmax(-1)
        q = contextualizer.score(reading.vectors_ND, tap.token_table).softmax(-1)
    expected = (q * (q / p).log()).sum(-1).mean()
    assert regularizer(5).loss.item() == pytest.approx(expected.item(), rel=1e-3)


def _states(text_encoder, ids, embedded):
    """The encoder's states for given embeddings: a hook in place of the table's answer."""
    handle = text_encoder.token_embedding.register_forward_hook(lambda *_: embedded)
    try:
        return text_encoder.encode(ids.clamp(min=0))
    finally:
        handle.remove()


def test_readings_go_by_the_seed_alone(toy_text_encoder, contextualizer):
    first = take(toy_text_encoder, contextualizer, SKS_DOG)
    torch.manual_seed(5)
    again = take(toy_text_encoder, contextualizer, SKS_DOG)
    other = take(toy_text_encoder, contextualizer, SKS_DOG, seed=1)
    assert [r.masked_ids for r in first] == [r.masked_ids for r in again]
    assert torch.equal(first[3].vectors_ND, again[3].vectors_ND)
    assert [r.masked_ids for r in first] != [r.masked_ids for r in other]


@pytest.mark.parametrize(
    ("target", "class_token", "expected"),
    [("auto", "dog", "class"), ("auto", None, "word"), ("word", "dog", "word")],
)
def test_the_target_goes_by_what_is_known(target, class_token, expected):
    concepts = [Concept("sks", class_token)]
    assert mlm_target(MLMOptions(mlm_target=target), concepts) == expected


def test_class_readings_without_a_class_word_are_refused():
    with pytest.raises(UserError, match="class_token"):
        mlm_target(MLMOptions(mlm_target="class"), [SKS_DOG, Concept("zwx", None)])


def test_hidden_words_as_targets_need_no_readings(toy_text_encoder, contextualizer):
    options = MLMOptions(mlm_target="word")
    assert take(toy_text_encoder, contextualizer, SKS_DOG, options=options) == []
