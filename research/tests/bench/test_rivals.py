"""Rivals: their formulas, which tokens count, and where their gradients go."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mlm_plugin.config.datasets import Concept
from mlm_plugin.models.text_encoder import TextEncoder
from research.bench.rivals import (
    ContextBatches,
    TextRival,
    class_anchor,
    context_anchor,
    encoder_anchor,
    outside_of,
)

CONTEXTS = ["a photo of {} on the beach", "{} in the snow", "a {}"]


def test_positions_around_the_concept_and_their_places_in_the_class_prompt():
    ids = [100, 1, 2, 7, 8, 3, 101]  # BOS, two words, a concept of two tokens, a word, EOS
    assert outside_of(ids, [7, 8], 1) == ([0, 1, 2, 5, 6], [0, 1, 2, 4, 5])
    assert outside_of(ids, [7, 8], 3) == ([0, 1, 2, 5, 6], [0, 1, 2, 6, 7])
    assert outside_of(ids, [7, 8], 2) == ([0, 1, 2, 5, 6], [0, 1, 2, 5, 6])


def test_equal_states_cost_nothing_and_opposite_ones_two():
    states = torch.randn(2, 5, 8)
    kept = [([0, 1, 4], [0, 1, 4])] * 2
    everything = torch.ones(2, 5, dtype=torch.bool)
    assert context_anchor(states, states, kept).item() == pytest.approx(0, abs=1e-6)
    assert context_anchor(states, -states, kept).item() == pytest.approx(2)
    assert encoder_anchor(states, -3 * states, everything).item() == pytest.approx(2)
    assert class_anchor(states[:, 0], 2 * states[:, 0]).item() == pytest.approx(0, abs=1e-6)


def test_only_kept_positions_count():
    states, frozen = torch.randn(1, 5, 8), torch.randn(1, 4, 8)
    loss = context_anchor(states, frozen, [([0, 3], [0, 2])])
    cosines = [F.cosine_similarity(states[0, i], frozen[0, j], dim=0) for i, j in ((0, 0), (3, 2))]
    assert loss.item() == pytest.approx(1 - torch.stack(cosines).mean().item())


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
