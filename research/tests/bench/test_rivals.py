"""Rivals: which tokens they compare, and where their gradients go."""

import copy

import pytest
import torch

from mlm_plugin.config.concepts import Concept
from mlm_plugin.models.text_encoder import TextEncoder
from research.bench.rivals import ContextBatches, TextRival

CONTEXTS = ["a photo of {} on the beach", "{} in the snow", "a {}"]


@pytest.fixture
def encoders(toy_text_encoder):
    trained = copy.deepcopy(toy_text_encoder.model).requires_grad_(True)
    return TextEncoder(toy_text_encoder.tokenizer, trained), toy_text_encoder


def rival(name, encoders, **changes):
    trained, frozen = encoders
    settings = {
        "text_encoder": trained, "frozen": frozen, "concept": Concept("sks", "dog"),
        "prompts": ContextBatches(CONTEXTS, batch_size=4, seed=0),
    }  # fmt: skip
    return TextRival(name, **settings | changes)


@pytest.mark.parametrize("name", ["core", "textboost", "classdiffusion"])
def test_calls_repeat_by_number_and_move_the_encoder(name, encoders):
    term = rival(name, encoders)
    with torch.no_grad():
        for parameter in encoders[0].model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    first = term(3)
    assert torch.equal(first.loss, term(3).loss)
    assert not torch.equal(first.loss, term(4).loss)
    first.loss.backward()
    moved = [p for p in encoders[0].model.parameters() if p.grad is not None and p.grad.any()]
    assert moved
    assert all(p.grad is None for p in encoders[1].model.parameters())


def test_the_encoder_anchor_is_zero_while_the_encoder_is_untrained(encoders):
    assert rival("textboost", encoders)(0).loss.item() == pytest.approx(0, abs=1e-5)


def test_the_context_anchor_is_zero_where_the_concept_is_the_class_word(encoders):
    term = rival("core", encoders, concept=Concept(None, "dog"))
    assert term(0).loss.item() == pytest.approx(0, abs=1e-5)
