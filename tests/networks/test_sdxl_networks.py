"""Networks on SDXL: kohya's names, a part for each text encoder, files of other trainers."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
from functools import partial
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mlm_plugin.config.options import NetworkOptions
from mlm_plugin.errors import UserError
from mlm_plugin.models.checkpoint_file import ARCHITECTURES
from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.networks.create import create_network
from mlm_plugin.networks.kohya_names import (
    canonical_name,
    is_known_key,
    part_of,
    sdxl_unet_names,
    text_encoder_name,
)
from mlm_plugin.networks.lora import Ranks, lora_targets

# network_args -> number of modules, digest of all sorted "key shape" lines.
# Derived by tests/reference/derive_lora.py from sd-scripts' own networks.lora and U-Net.
KOHYA_KEYS = {
    (): (986, "5fa7e54d349ca4e6"),
    ("conv_dim=2", "conv_alpha=0.5"): (1052, "7583fd1949878d89"),
}
ALGOS = ["locon", "lokr", "loha"]
needs_lycoris = pytest.mark.skipif(
    importlib.util.find_spec("lycoris") is None, reason="the LyCORIS package is not installed"
)


def bundle(unet, *text_encoders):
    return SimpleNamespace(
        unet=unet, text_encoders=[SimpleNamespace(model=model) for model in text_encoders]
    )


def full_size_models():
    def config(part):
        return json.loads((ARCHITECTURES / "sdxl" / part / "config.json").read_text())

    with torch.device("meta"):
        return bundle(
            UNet2DConditionModel.from_config(config("unet")),
            CLIPTextModel(CLIPTextConfig(**config("text_encoder"))),
            CLIPTextModelWithProjection(CLIPTextConfig(**config("text_encoder_2"))),
        )


@pytest.fixture(scope="module")
def toy(toy_sdxl_folder):
    """Makes the same toy model each time it is called."""
    model = load_stable_diffusion(toy_sdxl_folder)
    return lambda: copy.deepcopy(model)


def network_on(models, module="networks.lora", *, dim=4, alpha=2.0, **settings):
    return create_network(models, NetworkOptions(module, dim, alpha, **settings))


def randomize(network):
    generator = torch.Generator().manual_seed(0)
    for parameter in chain(*network.parts().values()):
        parameter.data.normal_(generator=generator).mul_(0.3)


@torch.no_grad()
def outputs(models):
    """Everything that the adapters have an effect on."""
    clip_l, clip_g = models.text_encoders
    states_l = clip_l.encode_captions(["a dog"])
    states_g, pooled = clip_g.encode_captions_pooled(["a dog"])
    generator = torch.Generator().manual_seed(0)
    predicted = models.unet(
        torch.randn(1, 4, 16, 16, generator=generator),
        torch.tensor([5]),
        encoder_hidden_states=torch.randn(1, 4, 80, generator=generator),
        added_cond_kwargs={
            "text_embeds": torch.randn(1, 24, generator=generator),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
        },
    ).sample
    return [states_l, states_g, pooled, predicted]


def assert_equal_outputs(left, right):
    for ours, theirs in zip(outputs(left), outputs(right), strict=True):
        torch.testing.assert_close(ours, theirs)


# --- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("network_args", KOHYA_KEYS)
def test_keys_and_shapes_are_those_that_sd_scripts_saves(network_args, monkeypatch):
    network = network_on(full_size_models(), alpha=1.0, network_args=network_args)
    base = "mlm_plugin.networks.base"
    monkeypatch.setattr(f"{base}._copy", lambda tensor: tensor)  # meta tensors
    shapes = {key: tuple(value.shape) for key, value in network.kohya_state_dict().items()}
    digest = hashlib.sha256("\n".join(f"{k} {shapes[k]}" for k in sorted(shapes)).encode())
    assert (len(shapes) // 3, digest.hexdigest()[:16]) == KOHYA_KEYS[network_args]
    counts = [len(modules) for modules in network.modules_of.values()]
    assert counts == [72, 192, 788 if network_args else 722]
    assert all(map(is_known_key, shapes))


def test_unet_names_follow_the_written_rule():
    """Blocks with attention by their number of transformer blocks, as Stability AI counts them."""
    depths = {
        **{f"input_blocks_{n}_1": 2 for n in (4, 5)},
        **{f"input_blocks_{n}_1": 10 for n in (7, 8)},
        "middle_block_1": 10,
        **{f"output_blocks_{n}_1": 10 for n in (0, 1, 2)},
        **{f"output_blocks_{n}_1": 2 for n in (3, 4, 5)},
    }
    attention = [f"attn{n}_to_{p}" for n in (1, 2) for p in ("q", "k", "v", "out_0")]
    inner = (*attention, "ff_net_0_proj", "ff_net_2")
    expected = {f"lora_unet_{b}_proj_{end}" for b in depths for end in ("in", "out")} | {
        f"lora_unet_{block}_transformer_blocks_{i}_{name}"
        for block, depth in depths.items()
        for i in range(depth)
        for name in inner
    }
    network = network_on(full_size_models(), network_train_unet_only=True)
    assert {module.kohya_name for module in network.modules} == expected
    assert len(expected) == 722


@pytest.mark.parametrize("nested", [True, False])
def test_both_text_encoders_have_the_same_names_in_any_transformers_version(nested):
    models = full_size_models()
    for number, layers in ((1, 12), (2, 32)):
        model = models.text_encoders[number - 1].model
        body = getattr(model, "text_model", model)
        model = nn.ModuleDict({"text_model": body}) if nested else body
        names = {
            target.kohya_name
            for target in lora_targets(
                model, Ranks(1, 1), name_of=partial(text_encoder_name, part=f"textencoder{number}")
            )
        }
        parts = [f"self_attn_{p}_proj" for p in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
        assert names == {
            f"lora_te{number}_text_model_encoder_layers_{i}_{part}"
            for i in range(layers)
            for part in parts
        }


def test_every_module_of_the_unet_has_a_name_of_its_own_that_webuis_know():
    weights = full_size_models().unet.state_dict()
    names = sdxl_unet_names(weights).values()
    assert len(set(names)) == len(names) == sum(name.endswith(".weight") for name in weights)
    assert all(is_known_key(f"{name}.alpha") for name in names)


def test_the_part_is_read_off_the_name():
    assert part_of("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha") == "textencoder1"
    assert part_of(text_encoder_name("encoder.layers.0.mlp.fc1", "textencoder2")) == "textencoder2"
    assert part_of("lora_te_text_model_encoder_layers_0_mlp_fc1") == "textencoder"
    assert part_of("lora_unet_label_emb_0_0.alpha") == "unet"
    flat = "lora_te2_encoder_layers_0_mlp_fc1"
    assert canonical_name(flat) == "lora_te2_text_model_encoder_layers_0_mlp_fc1"


# --- parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ((1e-4,), {"textencoder1": 1e-4, "textencoder2": 1e-4, "unet": 1e-3}),
        ((1e-4, 2e-4), {"textencoder1": 1e-4, "textencoder2": 2e-4, "unet": 1e-3}),
        ((1e-4, 0.0), {"textencoder1": 1e-4, "unet": 1e-3}),
        ((0.0,), {"unet": 1e-3}),
        ((), {"unet": 1e-3}),
    ],
)
def test_each_text_encoder_has_its_own_rate_or_the_common_one(toy, rates, expected):
    network = network_on(toy())
    groups = network.parameter_groups(unet_lr=1e-3, text_encoder_lrs=rates)
    assert {group["name"]: group["lr"] for group in groups} == expected
    for part, members in network.parts().items():
        assert all(p.requires_grad == (part in expected) for p in members)
    assert [*network.parts()] == ["textencoder1", "textencoder2", "unet"]


def test_loraplus_raises_the_rate_of_every_part(toy):
    network = network_on(toy(), network_args=["loraplus_lr_ratio=4"])
    groups = network.parameter_groups(unet_lr=1e-3, text_encoder_lrs=(1e-4, 2e-4))
    assert [(g["name"], g["lr"]) for g in groups] == [
        ("textencoder1", 1e-4),
        ("textencoder1 plus", 4e-4),
        ("textencoder2", 2e-4),
        ("textencoder2 plus", 8e-4),
        ("unet", 1e-3),
        ("unet plus", 4e-3),
    ]


def test_gradients_reach_both_encoders_from_what_the_unet_reads(toy):
    models = toy()
    network = network_on(models)
    randomize(network)
    clip_l, clip_g = models.text_encoders
    states_g, pooled = clip_g.encode_captions_pooled(["a dog"])
    (clip_l.encode_captions(["a dog"]).sum() + states_g.sum() + pooled.sum()).backward()
    for number, part in ((1, "textencoder1"), (2, "textencoder2")):
        members = network.parts()[part]
        without = sum(p.grad is None for p in members)
        # The first encoder's last layer is read by nobody; the second's gives the pooled state.
        assert without == (2 * 6 if number == 1 else 0)


def test_disabled_is_the_base_model_bit_for_bit(toy):
    models = toy()
    expected = outputs(models)
    network = network_on(models, network_args=["conv_dim=2"])
    randomize(network)
    assert not any(
        torch.allclose(a, b, atol=1e-3) for a, b in zip(outputs(models), expected, strict=True)
    )
    with network.disabled():
        assert all(torch.equal(a, b) for a, b in zip(outputs(models), expected, strict=True))


# --- weights of a file -----------------------------------------------------------------------


@pytest.mark.parametrize("dim_from_weights", [False, True])
def test_weights_survive_a_round_trip(toy, tmp_path, dim_from_weights):
    models, fresh = toy(), toy()
    network = network_on(models)
    randomize(network)
    save_file(network.kohya_state_dict(), tmp_path / "x.safetensors")
    settings = {"dim": None, "alpha": 1.0} if dim_from_weights else {}
    weights = str(tmp_path / "x.safetensors")
    network_on(fresh, network_weights=weights, dim_from_weights=dim_from_weights, **settings)
    assert_equal_outputs(models, fresh)


def test_names_of_diffusers_unet_are_read_too(toy, tmp_path):
    models, fresh = toy(), toy()
    network = network_on(models)
    randomize(network)
    names = sdxl_unet_names(name for name, _ in fresh.unet.named_parameters())
    diffusers_name = {file_name: name for name, file_name in names.items()}
    state = {}
    for key, tensor in network.kohya_state_dict().items():
        module, _, rest = key.partition(".")
        state[f"{diffusers_name.get(module, module)}.{rest}"] = tensor
    assert "lora_unet_down_blocks_1_attentions_0_proj_in.alpha" in state
    save_file(state, tmp_path / "x.safetensors")
    network_on(fresh, network_weights=str(tmp_path / "x.safetensors"))
    assert_equal_outputs(models, fresh)


def test_weights_of_untrained_text_encoders_are_left_out_with_a_warning(toy, caplog):
    state = network_on(toy()).kohya_state_dict()
    network = network_on(toy(), network_train_unet_only=True)
    with caplog.at_level(logging.WARNING):
        network.load_kohya_state_dict(state)
    assert "54 tensors of the first text encoder are left out" in caplog.text
    assert "54 tensors of the second text encoder are left out" in caplog.text


def test_a_lora_of_sd1_is_refused(toy):
    network = network_on(toy())
    key = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    with pytest.raises(UserError, match="do not belong to this network: lora_te_text_model"):
        network.load_kohya_state_dict({key: torch.ones(4, 32)})


# --- LyCORIS ---------------------------------------------------------------------------------


@needs_lycoris
@pytest.mark.parametrize("algo", ALGOS)
def test_lycoris_networks_survive_a_round_trip(toy, algo):
    models, fresh = toy(), toy()
    network = network_on(models, "lycoris.kohya", network_args=[f"algo={algo}"])
    assert [len(members) for members in network.modules_of.values()][:2] == [18, 18]
    randomize(network)
    state = network.kohya_state_dict()
    assert all(map(is_known_key, state))
    assert not any("down_blocks" in key or "up_blocks" in key for key in state)
    network_on(fresh, "lycoris.kohya", network_args=[f"algo={algo}"]).load_kohya_state_dict(state)
    assert_equal_outputs(models, fresh)


@needs_lycoris
def test_lycoris_ranks_come_from_the_file(toy, tmp_path):
    models, fresh = toy(), toy()
    network = network_on(models, "lycoris.kohya", network_args=["algo=locon", "conv_dim=2"], dim=3)
    randomize(network)
    save_file(network.kohya_state_dict(), tmp_path / "x.safetensors")
    network_on(
        fresh,
        "lycoris.kohya",
        dim=None,
        alpha=1.0,
        network_weights=str(tmp_path / "x.safetensors"),
        dim_from_weights=True,
    )
    assert_equal_outputs(models, fresh)


@needs_lycoris
def test_a_lycoris_locon_of_attention_saves_the_keys_of_networks_lora(toy):
    args = ["algo=lora", "preset=attn-mlp"]
    networks = [network_on(toy(), "lycoris.kohya", network_args=args), network_on(toy())]
    shapes = [
        {key: tuple(value.shape) for key, value in network.kohya_state_dict().items()}
        for network in networks
    ]
    assert shapes[0] == shapes[1]
