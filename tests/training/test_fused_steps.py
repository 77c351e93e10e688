"""Steps inside the backward pass make the optimizer's whole step, and keep no gradient."""

import copy

import pytest
import torch
from torch import nn

from mlm_plugin.training.fused_steps import FusedSteps
from mlm_plugin.training.optimizers import create_optimizer, steps_one_by_one

OPTIMIZERS = [
    ("AdamW", ["weight_decay=0.1"]),
    ("SGDNesterov", []),
    ("Adafactor", []),
    ("Adafactor", ["relative_step=False", "scale_parameter=False"]),
    ("AdamW8bit", []),
]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.GELU(), nn.Linear(80, 64), nn.LayerNorm(64))


def optimizer_of(model, name="AdamW", arguments=()):
    groups = [
        {"params": list(model[0].parameters()), "lr": 1e-2},
        {"params": list(model[2:].parameters()), "lr": 3e-3},
    ]
    return create_optimizer(name, groups, learning_rate=1e-2, optimizer_args=arguments)


def loss_of(model, step=0):
    noise = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
    return (model(noise) - noise.roll(1, dims=1)).square().mean()


@pytest.mark.parametrize(("name", "arguments"), OPTIMIZERS, ids=lambda value: str(value))
def test_single_steps_are_the_whole_step(name, arguments):
    if name == "AdamW8bit":
        pytest.importorskip("bitsandbytes")
    plain, fused = network(), network()
    whole, single = (optimizer_of(model, name, arguments) for model in (plain, fused))
    FusedSteps(list(fused.parameters()), single)
    for step in range(4):
        for optimizer in (whole, single):
            if optimizer.param_groups[0]["lr"]:  # as a scheduler changes it
                optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        loss_of(plain, step).backward()
        whole.step()
        whole.zero_grad()
        loss_of(fused, step).backward()
        assert all(parameter.grad is None for parameter in fused.parameters())
        single.step()  # finds nothing to do
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(single.state) == len(whole.state)
    assert len(single.param_groups) == 2


def test_a_state_that_was_loaded_continues():
    plain, fused = network(), network()
    whole, single = optimizer_of(plain), optimizer_of(fused)
    steps = FusedSteps(list(fused.parameters()), single)
    for number in range(2):
        loss_of(plain, number).backward()
        whole.step()
        whole.zero_grad()
    fused.load_state_dict(plain.state_dict())
    single.load_state_dict(copy.deepcopy(whole.state_dict()))  # brings new groups
    single.param_groups[1]["lr"] = whole.param_groups[1]["lr"] = 0.5
    loss_of(plain, 2).backward()
    whole.step()
    loss_of(fused, 2).backward()
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.equal(a, b)
    assert steps.clip_others([]).isfinite()


def test_one_gradient_lives_at_a_time():
    model, alive = network(), []
    FusedSteps(list(model.parameters()), optimizer_of(model))
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    loss_of(model).backward()
    assert alive == [0] * len(list(model.parameters()))


def test_each_gradient_is_clipped_separately_and_the_norm_is_of_all():
    plain, fused = network(), network()
    whole, single = (optimizer_of(model, "SGD") for model in (plain, fused))
    steps = FusedSteps(list(fused[2:].parameters()), single, max_grad_norm=0.4)
    loss_of(plain).backward()
    norms = [nn.utils.clip_grad_norm_([p], 0.4) for p in plain.parameters()]
    assert max(norms) > 0.4 > min(norms)
    whole.step()
    loss_of(fused).backward()
    norm = steps.clip_others(list(fused.parameters()))
    single.step()
    torch.testing.assert_close(norm, torch.stack(norms).norm())
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(b, a)


def test_a_gradient_that_is_not_finite_shows_and_spoils_no_weight():
    model = network()
    steps = FusedSteps(list(model.parameters()), optimizer_of(model), max_grad_norm=1.0)
    (loss_of(model) + (model[0].weight - model[0].weight.detach()).abs().sqrt().sum()).backward()
    assert not steps.clip_others([]).isfinite()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_only_optimizers_known_to_step_so_are_taken():
    class Own(torch.optim.SGD):
        """An unknown optimizer."""

    model = network()
    assert steps_one_by_one(optimizer_of(model, "Adafactor"))
    assert not steps_one_by_one(Own(model.parameters(), lr=1.0))
    assert not steps_one_by_one(torch.optim.LBFGS(model.parameters()))
