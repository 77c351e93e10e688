"""LoRA layers against kohya's formula; stored numbers: tests/reference/derive_lora.py."""

import math

import pytest
import torch
from torch import nn

from mlm_plugin.networks.lora import Dropouts, LoraTarget, inject_lora, limit_norms

LINEAR_INPUT = (2, 5, 6)
CONV_INPUT = (2, 3, 8, 8)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.small = nn.Conv2d(3, 4, 1)


def targets(rank=2, alpha=1.0):
    return [LoraTarget(name, f"lora_{name}", rank, alpha) for name in ("linear", "conv", "small")]


def injected(*, dropouts=None, dtype=torch.float32, seed=0, **settings):
    torch.manual_seed(seed)
    model = Layers().to(dtype)
    modules = inject_lora(model, targets(**settings), dropouts=dropouts or Dropouts())
    return model, {module.kohya_name: module for module in modules}


def fill(module, *, scale=1.0):
    for weight in (module.down, module.up):
        values = torch.sin(torch.arange(1.0, weight.numel() + 1)).reshape(weight.shape)
        weight.data = values * scale


@pytest.mark.parametrize(("name", "shape"), [("linear", LINEAR_INPUT), ("conv", CONV_INPUT)])
def test_the_output_is_the_layers_plus_up_of_down_times_alpha_by_rank(name, shape):
    model, modules = injected(rank=2, alpha=3.0)
    module = modules[f"lora_{name}"]
    fill(module)
    x = torch.randn(shape)
    base = model.get_submodule(name).base_layer
    if name == "linear":
        lora = (x @ module.down.T) @ module.up.T
    else:
        down = nn.functional.conv2d(x, module.down, stride=2, padding=1)
        lora = nn.functional.conv2d(down, module.up)
    expected = base(x) + lora * 3.0 / 2
    torch.testing.assert_close(model.get_submodule(name)(x), expected)
    assert not torch.allclose(expected, base(x))


def test_up_starts_at_zero_and_down_as_kaiming_uniform_from_the_global_stream():
    _, modules = injected(seed=3)
    _, again = injected(seed=3)
    _, other = injected(seed=4)
    down = modules["lora_linear"].down
    assert torch.equal(down, again["lora_linear"].down)
    assert not torch.equal(down, other["lora_linear"].down)
    assert down.abs().max() <= 1 / math.sqrt(6)
    assert all(not module.up.any() for module in modules.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lora_weights_are_the_same_fp32_values_over_a_half_model(dtype):
    _, full = injected(seed=1)
    model, half = injected(seed=1, dtype=dtype)
    assert {m.down.dtype for m in half.values()} == {m.up.dtype for m in half.values()}
    assert half["lora_conv"].down.dtype == torch.float32
    assert torch.equal(half["lora_conv"].down, full["lora_conv"].down)
    fill(half["lora_linear"])
    x = torch.randn(LINEAR_INPUT)
    plain = model.linear(x.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        under_autocast = model.linear(x)
    assert plain.dtype == under_autocast.dtype == dtype
    torch.testing.assert_close(plain, under_autocast, atol=0.05, rtol=0.05)
    plain.float().sum().backward()
    assert half["lora_linear"].up.grad.dtype == torch.float32
    assert half["lora_linear"].up.grad.abs().sum() > 0


def test_only_the_lora_is_trained():
    model, modules = injected()
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for m in modules.values() for _, p in m.named_parameters()}


def test_disabled_layers_compute_bit_for_bit_as_before():
    torch.manual_seed(0)
    bare = Layers()
    x = torch.randn(LINEAR_INPUT)
    expected = bare.linear(x)
    module = inject_lora(bare, targets(), dropouts=Dropouts())[0]
    fill(module)
    module.up.requires_grad_(False)
    module.set_enabled(False)
    assert torch.equal(bare.linear(x), expected)
    module.set_enabled(True)
    assert not torch.allclose(bare.linear(x), expected)
    assert module.down.requires_grad
    assert not module.up.requires_grad


# --- dropout --------------------------------------------------------------------------------

DROPPED = [
    [0.0, 0.0, 9.1837, 9.1837],
    [3.0612, 3.0612, 6.1224, 6.1224],
    [3.0612, 9.1837, 3.0612, 6.1224],
    [0.0, 0.0, 0.0, 0.0],
]


@pytest.mark.parametrize("seed", range(4))
def test_the_three_dropouts_draw_and_scale_as_in_kohyas_module(seed):
    model = nn.ModuleDict({"x": nn.Linear(3, 2)})
    dropouts = Dropouts(dropout=0.3, rank_dropout=0.3, module_dropout=0.3)
    (module,) = inject_lora(model, [LoraTarget("x", "lora_x", 4, 2.0)], dropouts=dropouts)
    module.down.data.fill_(1.0)
    module.up.data.fill_(1.0)
    x = torch.ones(2, 2, 3)
    base = model["x"].base_layer(x)
    torch.manual_seed(seed)
    change = (model["x"](x) - base)[..., 0].flatten()
    torch.testing.assert_close(change, torch.tensor(DROPPED[seed]), atol=1e-3, rtol=0)


def test_dropout_follows_the_network_and_not_the_models_mode():
    dropouts = Dropouts(dropout=0.5)
    model, modules = injected(dropouts=dropouts)
    fill(modules["lora_linear"])
    x = torch.randn(LINEAR_INPUT)
    model.eval()
    assert not torch.equal(model.linear(x), model.linear(x))
    model.train()
    dropouts.training = False
    assert torch.equal(model.linear(x), model.linear(x))


@pytest.mark.parametrize("shape", [(3, 4), (3, 7, 4), (3, 4, 5, 5)])
def test_rank_dropout_drops_whole_ranks_of_a_sample(shape):
    torch.manual_seed(0)
    ranks = Dropouts(rank_dropout=0.5)(torch.ones(shape))
    by_rank = ranks.movedim(-1, 1) if len(shape) == 3 else ranks
    by_rank = by_rank.reshape(3, 4, -1)
    assert torch.equal(by_rank.amin(-1), by_rank.amax(-1))
    assert set(by_rank.unique().tolist()) == {0.0, 2.0}


def test_module_dropout_leaves_the_bare_layer():
    model, modules = injected(dropouts=Dropouts(module_dropout=0.999999))
    fill(modules["lora_conv"])
    x = torch.randn(CONV_INPUT)
    assert torch.equal(model.conv(x), model.conv.base_layer(x))


# --- norms ----------------------------------------------------------------------------------

MAX_NORM = (2, 0.6666914402182252, 1.0)
SUMS = {
    "lora_linear": (5.13172, 4.14927),
    "lora_conv": (18.46646, 2.96424),
    "lora_small": (0.03887, 0.05533),
}


def test_norms_are_limited_with_kohyas_numbers():
    _, modules = injected(rank=2, alpha=1.0)
    for name, module in modules.items():
        fill(module, scale=0.01 if name == "lora_small" else 1.0)
    result = limit_norms(modules.values(), 1.0)
    assert tuple(result) == pytest.approx(MAX_NORM, rel=1e-5)
    for name, module in modules.items():
        sums = (module.down.abs().sum().item(), module.up.abs().sum().item())
        assert sums == pytest.approx(SUMS[name], abs=2e-5)


def test_a_limited_module_has_exactly_the_allowed_norm():
    _, modules = injected(rank=2, alpha=2.0)
    fill(modules["lora_conv"])
    limit_norms(modules.values(), 0.25)
    module = modules["lora_conv"]
    change = nn.functional.conv2d(module.down.permute(1, 0, 2, 3), module.up).permute(1, 0, 2, 3)
    assert change.norm().item() * module.scale == pytest.approx(0.25, rel=1e-5)
