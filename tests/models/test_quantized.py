"""Packed weights: their error, gradients through them, and adapters on top of them."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from mlm_plugin.config.options import NetworkOptions
from mlm_plugin.errors import UserError
from mlm_plugin.estimate.live_bytes import storage_bytes
from mlm_plugin.models.quantized import FORMATS, NF4_BLOCK, QuantizedLinear, quantize_linears
from mlm_plugin.networks.create import create_network

needs_lycoris = pytest.mark.skipif(
    importlib.util.find_spec("lycoris") is None, reason="the LyCORIS package is not installed"
)
PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]
NEAR = {"int8": 0.01, "nf4": 0.11}  # of the norm of normally distributed weights
BITS = {"int8": 8, "nf4": 4 + 32 / NF4_BLOCK}


def frozen_linear(*, inputs=256, outputs=192, dtype=torch.float32, seed=0, bias=True):
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=0.02)
    return layer.to(dtype).requires_grad_(False)


def toy_unet(*, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=2,
            use_linear_projection=True,
        )
    return unet.requires_grad_(False)


def toy_models(*, kind=None):
    unet = toy_unet()
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=1,
        )
    )
    if kind:
        quantize_linears(unet, kind, device="cpu")
    return SimpleNamespace(text_encoders=[SimpleNamespace(model=clip)], unet=unet)


def predict(unet, *, seed=0, states=None):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    if states is None:
        states = torch.randn(2, 6, 32, generator=generator)
    return unet(latents, torch.tensor([5, 900]), encoder_hidden_states=states).sample


def relative(a, b):
    return ((a - b).float().norm() / b.float().norm()).item()


# --- one layer ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_packed_weight_is_near_and_takes_its_bits(kind, dtype):
    layer = frozen_linear(dtype=dtype)
    packed = QuantizedLinear(layer, kind)
    assert packed.unpacked().dtype == dtype
    assert relative(packed.unpacked(), layer.weight) < NEAR[kind]
    row_scales = 4 * layer.out_features if kind == "int8" else 0
    nbytes = storage_bytes([packed.weight, *packed.buffers()])
    assert nbytes == layer.weight.numel() * BITS[kind] / 8 + row_scales


def test_int8_is_nearer_than_a_cast_to_fp8_of_the_same_size():
    layer = frozen_linear()
    cast = layer.weight.to(torch.float8_e4m3fn).float()
    packed = QuantizedLinear(layer, "int8").unpacked()
    assert relative(packed, layer.weight) < relative(cast, layer.weight) / 3


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_of_zeros_and_odd_sizes_come_back(kind):
    layer = frozen_linear(inputs=7, outputs=5)
    layer.weight[2] = 0
    packed = QuantizedLinear(layer, kind).unpacked()
    assert packed.shape == (5, 7)
    assert not packed[2].any()
    assert relative(packed, layer.weight) < 2 * NEAR[kind]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMATS)
def test_output_and_gradient_are_those_of_a_layer_with_the_unpacked_weight(kind, dtype, bias):
    layer = frozen_linear(dtype=dtype, bias=bias)
    packed = QuantizedLinear(layer, kind)
    inputs = torch.randn(2, 3, 256, dtype=dtype, requires_grad=True)
    found = packed(inputs)
    expected = nn.functional.linear(inputs, packed.unpacked(), layer.bias)
    assert torch.equal(found, expected)
    towards = torch.randn_like(found)
    (gradient,) = torch.autograd.grad(found, inputs, towards)
    (reference,) = torch.autograd.grad(expected, inputs, towards)
    torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_backward_pass_keeps_no_unpacked_weight(kind):
    packed, kept = QuantizedLinear(frozen_linear(), kind), []
    inputs = torch.randn(2, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed(inputs)
    whole = 4 * packed.in_features * packed.out_features
    assert sum(tensor.nbytes for tensor in kept) < whole / 3


@pytest.mark.parametrize("kind", FORMATS)
def test_mixed_precision_gives_the_precision_of_the_layer_as_autocast_would(kind):
    layer = frozen_linear(dtype=torch.bfloat16)
    inputs = torch.randn(2, 256)  # a layer norm gives fp32 under autocast
    with torch.autocast("cpu", torch.bfloat16):
        assert QuantizedLinear(layer, kind)(inputs).dtype == layer(inputs).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", FORMATS)
def test_a_cast_of_the_model_changes_its_precision_and_not_its_weight(kind):
    packed = QuantizedLinear(frozen_linear(), kind)
    exact, inputs = packed.unpacked(), torch.randn(2, 256)
    packed.to(torch.bfloat16)
    assert packed(inputs).dtype == torch.bfloat16
    assert torch.equal(packed.unpacked(), exact.bfloat16())
    assert torch.equal(packed.to(torch.float32).unpacked(), exact)
    assert packed(inputs).dtype == torch.float32


def test_a_format_without_its_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(UserError, match=r"quantize_unet = 'nf4' needs bitsandbytes.*'int8'"):
        QuantizedLinear(frozen_linear(), "nf4")


# --- a U-Net --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "near"), [("int8", 0.01), ("nf4", 0.15)])
def test_a_packed_u_net_predicts_nearly_the_same(kind, near):
    expected, unet = predict(toy_unet()), toy_unet()
    names = [name for name, _ in unet.named_parameters()]
    count = quantize_linears(unet, kind, device="cpu")
    assert count == sum(isinstance(layer, QuantizedLinear) for layer in unet.modules()) == 48
    assert [name for name, _ in unet.named_parameters()] == names
    assert unet.dtype == torch.float32
    assert 0 < relative(predict(unet), expected) < near


def test_convolutions_and_what_reads_the_time_are_unchanged():
    unet, packed = toy_unet(), toy_unet()
    quantize_linears(packed, "nf4", device="cpu")
    packed_names = {n for n, m in packed.named_modules() if isinstance(m, QuantizedLinear)}
    assert all(".attentions." in name for name in packed_names)
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Conv2d) or "time_emb" in name:
            assert type(packed.get_submodule(name)) is type(layer)


@pytest.mark.parametrize("kind", FORMATS)
def test_sizes_on_the_meta_device_are_the_real_ones(kind):
    sizes = []
    for device in ("cpu", "meta"):
        unet = toy_unet(device=device)
        full = storage_bytes([*unet.parameters(), *unet.buffers()])
        quantize_linears(unet, kind, device=device)
        tensors = [*unet.parameters(), *unet.buffers()]
        assert {tensor.device.type for tensor in tensors} == {device}
        sizes.append([(tensor.shape, tensor.dtype) for tensor in tensors])
        assert storage_bytes(tensors) < full
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("kind", FORMATS)
def test_text_states_get_nearly_the_gradient_of_the_full_u_net(kind):
    gradients = []
    for unet in (toy_models(kind=kind).unet, toy_unet()):
        states = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
        states.requires_grad_(True)
        unet.train()
        unet.enable_gradient_checkpointing()
        predict(unet, states=states).square().mean().backward()
        gradients.append(states.grad)
    cosine = torch.cosine_similarity(*(g.flatten() for g in gradients), dim=0)
    assert cosine > (0.999 if kind == "int8" else 0.9)


# --- adapters on top ------------------------------------------------------------------------


def network_on(models, module="networks.lora", **settings):
    return create_network(models, NetworkOptions(module, 4, 4.0, **settings))


def train_towards(unet, network, *, steps=8):
    """Losses of a fixed target."""
    target = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    optimizer, losses = (
        torch.optim.Adam([p for part in network.parts().values() for p in part], lr=3e-2),
        [],
    )
    for _ in range(steps):
        loss = (predict(unet) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", FORMATS)
def test_a_lora_on_packed_layers_has_the_names_of_any_other_and_learns(kind):
    plain, models = network_on(toy_models()), toy_models(kind=kind)
    before = {name: p.clone() for name, p in models.unet.named_parameters()}
    network = network_on(models)
    shapes = {key: value.shape for key, value in network.kohya_state_dict().items()}
    assert shapes == {key: value.shape for key, value in plain.kohya_state_dict().items()}
    losses = train_towards(models.unet, network)
    assert losses[-1] < 0.9 * losses[0]
    assert all((module.up != 0).any() for module in network.modules_of["unet"])
    for name, parameter in models.unet.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name


@needs_lycoris
@pytest.mark.parametrize("algo", ["locon", "loha", "lokr"])
def test_lycoris_adds_to_packed_layers_without_reading_their_weights(algo):
    models = toy_models(kind="nf4")
    base = predict(models.unet)
    arguments = [f"algo={algo}", "factor=4"] if algo == "lokr" else [f"algo={algo}"]
    network = network_on(models, "lycoris.kohya", network_args=arguments)
    torch.testing.assert_close(predict(models.unet), base)
    losses = train_towards(models.unet, network)
    assert losses[-1] < 0.95 * losses[0]


@needs_lycoris
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["algo=full"], "algo=full"),
        (["algo=diag-oft"], "algo=diag-oft"),
        (["algo=locon", "dora_wd=True"], "dora_wd"),
        (["bypass_mode=False"], "bypass_mode=False"),
    ],
)
def test_what_has_to_read_packed_weights_is_refused(arguments, named):
    with pytest.raises(UserError, match=f"{named} reads the U-Net's weights"):
        network_on(toy_models(kind="int8"), "lycoris.kohya", network_args=arguments)
