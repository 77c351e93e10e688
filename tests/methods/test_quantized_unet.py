"""Every method that leaves the U-Net alone trains on a packed one, and its files are the same."""

import dataclasses

import pytest
import torch
from safetensors import safe_open

from mlm_plugin.methods import METHODS, Export
from mlm_plugin.models.quantized import QuantizedLinear

FROZEN_UNET_METHODS = [name for name, method in METHODS.items() if not method.trains_base_weights]


def is_packed(unet):
    return any(isinstance(layer, QuantizedLinear) for layer in unet.modules())


def exported(trainer, folder):
    """Names and shapes of every tensor in every file."""
    folder.mkdir()
    path = folder / "x.safetensors"
    trainer.method.export(Export(path, metadata=lambda _kind, _file: {}))
    found = {}
    for file in trainer.method.files(path):
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            found |= {(file.name, n): tuple(tensors.get_tensor(n).shape) for n in names}
            assert all(torch.isfinite(tensors.get_tensor(name)).all() for name in names)
    return found


@pytest.mark.parametrize(
    "method",  # pivotal is lora and textual_inversion together
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name == "pivotal"))
        for name in FROZEN_UNET_METHODS
    ],
)
def test_a_method_trains_on_a_packed_u_net_and_writes_the_same_files(method, trainer_of, tmp_path):
    options = {"mixed_precision": "bf16", "gradient_checkpointing": True, "cache_latents": True}
    trainer = trainer_of(method, steps=2, quantize_unet="nf4", **options)
    before = {name: weight.clone() for name, weight in trainer.method.state_dict().items()}
    trainer.run()
    assert is_packed(trainer.models.unet)
    after = trainer.method.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    plain = trainer_of(method, steps=2, **options)
    assert exported(trainer, tmp_path / "a") == exported(plain, tmp_path / "b")


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_a_resumed_run_ends_bit_identical_to_a_straight_one(kind, trainer_of, tmp_path):
    straight = trainer_of("lora", quantize_unet=kind)
    straight.run()
    first = trainer_of("lora", quantize_unet=kind)
    first.plan = dataclasses.replace(first.plan, num_steps=2)
    first.run()
    first.save_state(tmp_path / "state")
    second = trainer_of("lora", quantize_unet=kind)
    second.load_state(tmp_path / "state")
    second.run()
    a, b = straight.method.state_dict(), second.method.state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_step_on_a_gpu_moves_the_u_net_to_the_cpu_and_back(kind, precision, trainer_of):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    trainer = trainer_of(
        "lora",
        steps=2,
        quantize_unet=kind,
        mixed_precision=precision,
        gradient_checkpointing=True,
        cache_latents=True,  # the U-Net waits on the CPU meanwhile
    )
    unet = trainer.models.unet
    assert {tensor.device.type for tensor in (*unet.parameters(), *unet.buffers())} == {"cuda"}
    on_the_gpu = {n: m.unpacked().float() for n, m in unet.named_modules() if hasattr(m, "kind")}
    trainer.run()
    assert all(torch.isfinite(weight).all() for weight in trainer.method.state_dict().values())
    unet.to("cpu")
    for name, weight in on_the_gpu.items():
        torch.testing.assert_close(
            unet.get_submodule(name).unpacked().float(), weight.cpu(), rtol=1e-2, atol=1e-5
        )
