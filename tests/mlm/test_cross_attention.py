"""Keys and values as the term reads them: the two readings against their formulas."""

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from mlm_plugin.mlm import cross_attention
from mlm_plugin.mlm.cross_attention import CrossAttention, Projection, solve_for_states

WIDTH = 12


def projection(layer=0, num_outputs=8, change=0.0, seed=0):
    """A linear map, and the trained one, which differs by ``change``."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_outputs, WIDTH, generator=generator)
    trained = nn.Linear(WIDTH, num_outputs, bias=False)
    with torch.no_grad():
        trained.weight.copy_(weight + change * torch.randn(weight.shape, generator=generator))
    return Projection(layer, trained, lambda: weight)


@pytest.fixture
def states():
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("num_outputs", [5, WIDTH, 30])
def test_the_inverse_is_ridge_regression_and_at_its_limit_the_pseudo_inverse(
    num_outputs, states, monkeypatch
):
    weight = projection(num_outputs=num_outputs).weight().double()
    change = states.double() @ weight.T
    gram = weight.T @ weight
    smaller = min(weight.shape)
    ridge = cross_attention.RIDGE * gram.trace() / smaller  # both Gram matrices have this trace
    explicit = torch.linalg.inv(gram + ridge * torch.eye(WIDTH).double()) @ weight.T
    assert torch.allclose(solve_for_states(weight, change), change @ explicit.T, atol=1e-10)
    monkeypatch.setattr(cross_attention, "RIDGE", 1e-12)
    limit = change @ torch.linalg.pinv(weight).T
    assert torch.allclose(solve_for_states(weight, change), limit, atol=1e-6)


def test_what_is_written_back_gives_the_layer_what_training_gives_it(states, monkeypatch):
    monkeypatch.setattr(cross_attention, "RIDGE", 1e-10)
    one = projection(change=0.3)
    written = one.written_back(states)
    assert torch.allclose(written @ one.weight().T, one.trained(states), atol=1e-3)
    assert not torch.allclose(written, states, atol=0.1)


def test_without_a_change_the_states_are_those_of_the_encoder(states):
    layers = CrossAttention([projection(layer, change=0.0, seed=layer) for layer in range(3)])
    assert torch.equal(layers.written_back(states, random.Random(0)), states)
    flat = states.flatten(0, 1)
    assert layers.distance(flat, flat, flat, random.Random(0)) == 0


def test_the_distance_is_the_mean_share_of_keys_and_values_that_has_changed(states):
    members = [
        projection(layer, change=0.2, seed=10 * layer + k) for layer in (0, 1) for k in (0, 1)
    ]
    h, g, h0 = (states.flatten(0, 1) + shift for shift in (0.0, 0.1, 0.05))

    def expected(p):
        wanted, start = g @ p.weight().T, h0 @ p.weight().T
        now = (p.trained(h) - wanted).square().sum(dim=-1)
        return (now - (start - wanted).square().sum(dim=-1)).clamp(min=0).sum() / (
            wanted.square().sum()
        )

    found = CrossAttention(members).distance(h, g, h0, random.Random(0))
    assert torch.allclose(found, torch.stack([expected(p) for p in members]).mean())


@pytest.mark.parametrize("reading", ["distance", "written_back"])
def test_the_gradient_reaches_the_change_and_the_states(states, reading):
    layers, rng = CrossAttention([projection(change=0.2)]), random.Random(0)
    states.requires_grad_(True)
    if reading == "distance":
        loss = layers.distance(states.flatten(0, 1), *[states.detach().flatten(0, 1)] * 2, rng)
    else:
        loss = (layers.written_back(states, rng) - states.detach()).square().sum()
    loss.backward()
    (member,) = layers.by_layer[0]
    assert member.trained.weight.grad.abs().sum() > 0
    assert states.grad.abs().sum() > 0


def test_every_prompt_is_written_back_by_a_layer_of_its_own(states):
    members = [projection(layer, change=0.2, seed=layer) for layer in range(4)]
    layers = CrossAttention(members)
    given = torch.tensor([2, 0, 3])
    written = layers.written_back(states, random.Random(0), layers_B=given)
    for row, layer in enumerate(given.tolist()):
        assert torch.allclose(written[row], members[layer].written_back(states[row]), atol=1e-5)
    drawn = [layers.written_back(states[:1], random.Random(seed)) for seed in range(40)]
    assert len({round(value.sum().item(), 3) for value in drawn}) == 4


def test_tokens_may_each_be_for_one_layer(states):
    """As in XTI, where every layer has states of its own."""
    members = [projection(layer, change=0.2, seed=layer) for layer in range(3)]
    h = states.flatten(0, 1)
    layers_N = torch.tensor([0] * 5 + [2] * 10)
    found = CrossAttention(members).distance(h, h, h, random.Random(0), layers_N=layers_N)
    expected = [members[0].distance(*[h[:5]] * 3), members[2].distance(*[h[5:]] * 3)]
    assert torch.allclose(found, torch.stack(expected).mean())


def test_a_call_reads_a_bounded_number_of_layers(states):
    calls = []

    def member(layer):
        weight = torch.eye(WIDTH)
        return Projection(layer, lambda x: calls.append(layer) or x * 1.1, lambda: weight)

    layers = CrossAttention([member(layer) for layer in range(70)])
    h = states.flatten(0, 1)
    values = [layers.distance(h, h, h, random.Random(seed)).item() for seed in range(40)]
    assert len(calls) == 40 * cross_attention.MAX_LAYERS
    assert len(set(calls)) == 70
    assert values == pytest.approx([0.01] * 40, rel=1e-3)


def test_where_the_states_are_frozen_only_trained_layers_are_drawn(states):
    trained = projection(33, change=0.1)
    frozen = [
        replace(projection(layer), is_trained=lambda: False, trained=refuse) for layer in range(70)
    ]
    layers = CrossAttention([*frozen, trained])
    assert layers.is_trained
    flat = states.flatten(0, 1)
    for call in range(5):
        rng = random.Random(call)
        assert layers.trained_part().distance(flat, flat, flat, rng).requires_grad
        assert layers.trained_part().written_back(states, rng).requires_grad
    assert not CrossAttention(frozen).is_trained


def refuse(_states):
    raise AssertionError("a frozen layer was read")
