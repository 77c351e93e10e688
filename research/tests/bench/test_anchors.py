"""Anchors as formulas: which positions count, and what equal and opposite states cost."""

import pytest
import torch
import torch.nn.functional as F

from research.bench.anchors import (
    class_anchor,
    context_anchor,
    encoder_anchor,
    positions_outside,
)


def test_positions_around_the_concept_and_their_places_in_the_class_prompt():
    ids = [100, 1, 2, 7, 8, 3, 101]  # BOS, two words, a concept of two tokens, a word, EOS
    assert positions_outside(ids, [7, 8], 1) == ([0, 1, 2, 5, 6], [0, 1, 2, 4, 5])
    assert positions_outside(ids, [7, 8], 3) == ([0, 1, 2, 5, 6], [0, 1, 2, 6, 7])
    assert positions_outside(ids, [7, 8], 2) == ([0, 1, 2, 5, 6], [0, 1, 2, 5, 6])


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
