"""A sum of losses that is computed one by one has the gradients of the sum, and less in memory."""

import weakref

import pytest
import torch

from mlm_plugin.training.loss_sum import LossSum


def backward(loss):
    loss.backward()


def test_the_gradients_are_those_of_the_weighted_sum():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = LossSum(lambda: (x.exp().sum(),)) + 0.25 * LossSum(lambda: (x.pow(3).sum(),))
    loss.backward(backward)
    torch.testing.assert_close(x.grad, x.detach().exp() + 0.25 * 3 * x.detach().pow(2))


def test_losses_come_back_before_their_weights_with_what_is_logged():
    x = torch.tensor(2.0, requires_grad=True, dtype=torch.float64)
    loss = LossSum(lambda: (x * 3,)) + 0.5 * LossSum(lambda: (x * 4, torch.tensor(0.75)))
    values = loss.backward(backward)
    assert values.tolist() == [6.0, 8.0, 0.75]
    assert values.dtype == torch.float32
    assert not values.requires_grad
    assert x.grad == 3 + 0.5 * 4


def test_a_loss_of_weight_0_is_never_computed():
    x = torch.tensor(2.0, requires_grad=True)
    loss = LossSum(lambda: (x * 3,)) + 0.0 * LossSum(lambda: pytest.fail("computed"))
    assert loss.backward(backward).tolist() == [6.0]


def test_a_loss_goes_backward_and_is_gone_before_the_next_one_starts():
    x, seen = torch.tensor(2.0, requires_grad=True), []

    def first():
        loss = x.exp()
        seen.append(weakref.ref(loss))
        return (loss,)

    def second():
        assert x.grad == x.detach().exp()
        assert seen[0]() is None
        return (x * 1,)

    (LossSum(first) + 2.0 * LossSum(second)).backward(backward)
    assert x.grad == x.detach().exp() + 2
