"""The losses as formulas: direction of the divergence, and which positions count."""

import pytest
import torch
import torch.nn.functional as F

from mlm_plugin.mlm.losses import (
    class_anchor,
    context_anchor,
    encoder_anchor,
    masked_cross_entropy,
    positions_outside,
    teacher_kl,
)


def test_the_cross_entropy_is_the_mean_over_masked_tokens_and_zero_without_one():
    logits, labels = torch.randn(5, 7, requires_grad=True), torch.tensor([0, 6, 3, 3, 1])
    loss = masked_cross_entropy(logits, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    empty = masked_cross_entropy(logits[:0], labels[:0])
    assert empty.item() == 0
    empty.backward()  # it is part of the graph


def test_the_teacher_comes_first_in_the_divergence():
    student, teacher = torch.randn(5, 7), 3 * torch.randn(5, 7)
    p, q = student.softmax(-1), teacher.softmax(-1)
    forward = (q * (q / p).log()).sum(-1).mean()
    backward = (p * (p / q).log()).sum(-1).mean()
    assert forward.item() != pytest.approx(backward.item(), rel=0.05)
    assert teacher_kl(student, teacher).item() == pytest.approx(forward.item(), rel=1e-5)
    assert teacher_kl(teacher, teacher).item() == pytest.approx(0, abs=1e-6)


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
