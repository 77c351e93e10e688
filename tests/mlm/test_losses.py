"""The losses as formulas: the mean over masked tokens, the direction of the divergence."""

import pytest
import torch
import torch.nn.functional as F

from mlm_plugin.mlm.losses import masked_cross_entropy, teacher_kl


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
