"""Networks on full-size (meta) and toy models: names, groups, loading, disabling."""

import copy
import hashlib
import importlib
import importlib.util
import io
import logging
import re
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from mlm_plugin.config.options import NetworkOptions
from mlm_plugin.errors import UserError
from mlm_plugin.networks.create import NETWORK_MODULES, create_network, read_weights
from mlm_plugin.networks.network_args import parse_network_args, warn_of_output_norms
from mlm_plugin.networks.peft_network import BLOCK_ARGS

needs_lycoris = pytest.mark.skipif(
    importlib.util.find_spec("lycoris") is None, reason="the LyCORIS package is not installed"
)


def clip(*, width, layers, heads):
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=100,
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=heads,
            num_hidden_layers=layers,
            bos_token_id=98,
            eos_token_id=99,
            pad_token_id=99,
        )
    )


def bundle(text_encoder, unet):
    return SimpleNamespace(text_encoders=[SimpleNamespace(model=text_encoder)], unet=unet)


def full_size_models(*, v2):
    with torch.device("meta"):
        if v2:
            unet = UNet2DConditionModel(
                cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
                use_linear_projection=True,
            )  # fmt: skip
            return bundle(clip(width=1024, layers=23, heads=16), unet)
        return bundle(
            clip(width=768, layers=12, heads=12), UNet2DConditionModel(cross_attention_dim=768)
        )


def toy_models(*, seed=0, linear=False):
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        use_linear_projection=linear,
    )
    return bundle(clip(width=32, layers=2, heads=2), unet)


def toy_network(models=None, *, module="networks.lora", dim=4, alpha=2.0, **settings):
    settings = {f"network_{key}": value for key, value in settings.items()}
    dim_from_weights = settings.pop("network_dim_from_weights", False)
    options = NetworkOptions(module, dim, alpha, dim_from_weights=dim_from_weights, **settings)
    return create_network(models or toy_models(), options)


def randomize(network, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in chain(*network.parts().values()):
        parameter.data.normal_(generator=generator).mul_(0.3)


def encode(models):
    model = models.text_encoders[0].model
    return model(input_ids=torch.tensor([[98, 5, 6, 99]])).last_hidden_state


def predict(models):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    states = torch.randn(1, 4, 32, generator=generator)
    return models.unet(latents, torch.tensor([5]), encoder_hidden_states=states).sample


# --- names ----------------------------------------------------------------------------------

# (v2, network_args) -> number of modules, digest of all sorted "key shape" lines.
# Derived by tests/reference/derive_lora.py from sd-scripts' own networks.lora and U-Net.
KOHYA_KEYS = {
    (False, ()): (264, "b8973aebfbffa87f"),
    (False, ("conv_dim=2", "conv_alpha=0.5")): (350, "8d38f41a09044f4e"),
    (True, ()): (330, "b1d7c51e112aa218"),
    (True, ("conv_dim=2", "conv_alpha=0.5")): (416, "c8efe14cf56230a5"),
}


@pytest.mark.parametrize(("v2", "network_args"), KOHYA_KEYS)
def test_keys_and_shapes_are_those_that_sd_scripts_saves(v2, network_args, monkeypatch):
    network = toy_network(full_size_models(v2=v2), alpha=1.0, args=network_args)
    base = "mlm_plugin.networks.base"
    monkeypatch.setattr(f"{base}._copy", lambda tensor: tensor)  # meta tensors
    shapes = {key: tuple(value.shape) for key, value in network.kohya_state_dict().items()}
    digest = hashlib.sha256("\n".join(f"{k} {shapes[k]}" for k in sorted(shapes)).encode())
    assert (len(shapes) // 3, digest.hexdigest()[:16]) == KOHYA_KEYS[v2, network_args]
    assert network.num_text_encoder_modules == (138 if v2 else 72)
    assert network.num_unet_modules == (278 if network_args else 192)


def expected_attention_names():
    """The rule of kohya.md 5.1 for SD 1.5, written out."""
    blocks = [f"down_blocks_{i}_attentions_{j}" for i in range(3) for j in range(2)]
    blocks += [f"up_blocks_{i}_attentions_{j}" for i in range(1, 4) for j in range(3)]
    blocks += ["mid_block_attentions_0"]
    attention = [f"attn{n}_to_{p}" for n in (1, 2) for p in ("q", "k", "v", "out_0")]
    inner = [f"transformer_blocks_0_{name}" for name in (*attention, "ff_net_0_proj", "ff_net_2")]
    unet = {f"lora_unet_{b}_{i}" for b in blocks for i in ("proj_in", "proj_out", *inner)}
    parts = [f"self_attn_{p}_proj" for p in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
    return unet | {
        f"lora_te_text_model_encoder_layers_{i}_{part}" for i in range(12) for part in parts
    }


def test_sd15_names_follow_the_written_rule():
    network = create_network(full_size_models(v2=False), NetworkOptions())
    names = {module.kohya_name for module in network.modules}
    assert names == expected_attention_names()
    assert len(names) == 192 + 72


def test_convolutions_have_their_own_rank_and_their_blocks_linears_the_common_one():
    network = toy_network(args=["conv_dim=2", "conv_alpha=0.5"])
    ranks = {module.kohya_name: (module.rank, module.alpha) for module in network.modules}
    assert ranks["lora_unet_down_blocks_0_resnets_0_conv1"] == (2, 0.5)
    assert ranks["lora_unet_down_blocks_0_downsamplers_0_conv"] == (2, 0.5)
    assert ranks["lora_unet_down_blocks_0_resnets_0_time_emb_proj"] == (4, 2.0)
    assert ranks["lora_unet_up_blocks_0_resnets_0_conv_shortcut"] == (4, 2.0)


def test_one_model_alone_is_adapted_on_request():
    unet_only = toy_network(train_unet_only=True)
    assert unet_only.num_text_encoder_modules == 0
    assert all(key.startswith("lora_unet") for key in unet_only.kohya_state_dict())
    text_only = toy_network(train_text_encoder_only=True)
    assert text_only.num_unet_modules == 0
    assert all(key.startswith("lora_te") for key in text_only.kohya_state_dict())
    models = toy_models()
    toy_network(models, train_unet_only=True)
    assert not any(p.requires_grad for p in models.text_encoders[0].model.parameters())


def test_alpha_zero_is_the_rank_and_the_default_is_one():
    assert toy_network(alpha=0).modules[0].scale == 1.0
    network = create_network(toy_models(), NetworkOptions())
    assert (network.modules[0].alpha, network.modules[0].rank) == (1.0, 4)


# --- learning rates -------------------------------------------------------------------------


def test_groups_are_named_and_ordered_as_kohyas():
    groups = toy_network(
        args=["loraplus_lr_ratio=4", "loraplus_text_encoder_lr_ratio=2"]
    ).parameter_groups(unet_lr=1e-3, text_encoder_lrs=[1e-4])
    assert [(g["name"], g["lr"]) for g in groups] == [
        ("textencoder", 1e-4),
        ("textencoder plus", 2e-4),
        ("unet", 1e-3),
        ("unet plus", 4e-3),
    ]
    torch.optim.AdamW(groups)


def test_groups_hold_every_weight_once():
    network = toy_network()
    groups = network.parameter_groups(unet_lr=1e-3, text_encoder_lrs=[1e-4])
    grouped = [id(p) for group in groups for p in group["params"]]
    assert [g["name"] for g in groups] == ["textencoder", "unet"]
    assert sorted(grouped) == sorted(map(id, chain(*network.parts().values())))


def test_a_part_with_learning_rate_zero_is_frozen_but_saved():
    network = toy_network()
    groups = network.parameter_groups(unet_lr=1e-3, text_encoder_lrs=[0.0])
    assert [g["name"] for g in groups] == ["unet"]
    assert not any(
        p.requires_grad for m in network.modules_of["textencoder"] for _, p in m.named_parameters()
    )
    assert any(key.startswith("lora_te") for key in network.kohya_state_dict())
    with network.disabled():
        pass
    trained = [p for p in chain(*network.parts().values()) if p.requires_grad]
    assert len(trained) == 2 * network.num_unet_modules


# --- loading --------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [False, True])
def test_weights_survive_a_round_trip(linear):
    network = toy_network(toy_models(linear=linear))
    randomize(network)
    state = network.kohya_state_dict()
    fresh = toy_network(toy_models(linear=linear))
    fresh.load_kohya_state_dict(state)
    loaded = fresh.kohya_state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert loaded["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"].ndim == 4


def test_saved_weights_are_copies():
    network = toy_network()
    state = network.kohya_state_dict()
    randomize(network)
    assert not any(state[key].any() for key in state if "lora_up" in key)


def test_flat_names_and_matrices_of_other_tools_are_accepted():
    models = toy_models(linear=True)
    network = toy_network(models)
    randomize(network)
    state = {
        key.replace("lora_te_text_model_", "lora_te_"): value.squeeze() if value.ndim else value
        for key, value in network.kohya_state_dict().items()
    }
    fresh_models = toy_models(linear=True)
    fresh = toy_network(fresh_models)
    fresh.load_kohya_state_dict(state)
    assert torch.equal(encode(fresh_models), encode(models))
    assert torch.equal(predict(fresh_models), predict(models))


def test_the_files_alpha_wins_so_that_the_lora_acts_as_it_was_trained(caplog):
    models = toy_models()
    network = toy_network(models, alpha=4.0)
    randomize(network)
    other_models = toy_models()
    other = toy_network(other_models, alpha=1.0)
    with caplog.at_level(logging.WARNING):
        other.load_kohya_state_dict(network.kohya_state_dict())
    assert torch.equal(encode(models), encode(other_models))
    assert "alpha 4 of the file" in caplog.text


def test_a_missing_alpha_means_the_rank():
    network = toy_network(alpha=1.0)
    state = {k: v for k, v in network.kohya_state_dict().items() if not k.endswith("alpha")}
    network.load_kohya_state_dict(state)
    assert network.modules[0].alpha == 4.0


def test_foreign_tensors_are_refused_with_their_number_and_names():
    network = toy_network()
    state = network.kohya_state_dict() | {"lora_unet_conv_in.lora_up.weight": torch.ones(1)}
    with pytest.raises(UserError, match=r"1 of \d+ tensors.*lora_unet_conv_in"):
        network.load_kohya_state_dict(state)


def test_another_rank_is_refused_with_the_way_out():
    state = toy_network(dim=8).kohya_state_dict()
    with pytest.raises(UserError, match="dim_from_weights"):
        toy_network(dim=4).load_kohya_state_dict(state)


def test_nothing_is_changed_by_a_file_that_is_refused():
    network = toy_network(dim=4)
    before = network.kohya_state_dict()
    with pytest.raises(UserError):
        network.load_kohya_state_dict(toy_network(dim=8).kohya_state_dict())
    after = network.kohya_state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_weights_of_an_untrained_part_are_left_out_with_a_warning(caplog):
    state = toy_network().kohya_state_dict()
    network = toy_network(train_unet_only=True)
    with caplog.at_level(logging.WARNING):
        network.load_kohya_state_dict(state)
    assert "text encoder" in caplog.text


def test_ranks_and_alphas_come_from_the_file(tmp_path):
    models = toy_models()
    trained = toy_network(models, dim=3, alpha=2.0, args=["conv_dim=2", "conv_alpha=0.5"])
    randomize(trained)
    save_file(trained.kohya_state_dict(), tmp_path / "x.safetensors")
    fresh_models = toy_models()
    options = NetworkOptions(network_weights=str(tmp_path / "x.safetensors"), dim_from_weights=True)
    network = create_network(fresh_models, options)
    assert network.num_unet_modules == trained.num_unet_modules
    assert torch.equal(predict(models), predict(fresh_models))
    assert torch.equal(encode(models), encode(fresh_models))


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"dim": 8}, {"network_dim"}),
        ({"alpha": 2.0}, {"network_alpha"}),
        ({"args": ["conv_dim=2", "conv_alpha=1"]}, {"conv_dim", "conv_alpha"}),
        ({"alpha": 1.0, "dropout": 0.1, "args": ["rank_dropout=0.1"]}, set()),
    ],
)
def test_settings_that_the_file_decides_are_named(tmp_path, caplog, settings, names):
    save_file(toy_network(alpha=1.0).kohya_state_dict(), tmp_path / "x.safetensors")
    settings = {"dim": None, "alpha": 1.0, **settings}
    with caplog.at_level(logging.WARNING):
        toy_network(weights=tmp_path / "x.safetensors", dim_from_weights=True, **settings)
    assert named_without_effect(caplog) == names


def named_without_effect(caplog):
    messages = [record.getMessage().partition(" no effect") for record in caplog.records]
    words = {word for names, found, _ in messages if found for word in re.findall(r"\w+", names)}
    return words - {"network_args", "has"}


def test_network_weights_are_loaded_from_safetensors_and_from_pickles(tmp_path):
    trained = toy_network()
    randomize(trained)
    state = trained.kohya_state_dict()
    save_file(state, tmp_path / "x.safetensors")
    torch.save(state, tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        loaded = toy_network(weights=tmp_path / name).kohya_state_dict()
        assert all(torch.equal(loaded[key], state[key]) for key in state)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def pickled(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.safetensors", None, "there is no file"),
        ("x.safetensors", b"no", "cannot be read as safetensors"),
        ("x.safetensors", POINTER, "git lfs pull"),
        ("x.pt", POINTER, "git lfs pull"),
        ("x.pt", b"no", "is the download complete"),
        ("x.pt", pickled({"a": torch.ones(64)})[:-100], "is the download complete"),
        ("x.pt", pickled({"a": Path("x")}), "run code"),
        ("x.pt", pickled([torch.ones(1)]), "holds a list"),
        ("x.pt", pickled({0: torch.ones(1)}), "weights by name"),
        ("x.zip", b"no", "unknown kind of weights file"),
    ],
)
def test_unreadable_weights_are_one_line_with_option_and_file(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"network_weights: .*{name}.*") as caught:
        read_weights(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- off ------------------------------------------------------------------------------------


def test_disabled_is_the_base_model_bit_for_bit():
    models = toy_models()
    expected = encode(models), predict(models)
    network = toy_network(models, args=["conv_dim=2"])
    randomize(network)
    with network.disabled():
        assert torch.equal(encode(models), expected[0])
        assert torch.equal(predict(models), expected[1])
    assert not torch.allclose(encode(models), expected[0], atol=1e-3)
    assert not torch.allclose(predict(models), expected[1], atol=1e-3)


@needs_lycoris
@pytest.mark.parametrize("algo", ["full", "loha", "diag-oft"])
def test_lycoris_that_was_disabled_is_what_it_was(algo):
    models = toy_models(linear=True)
    expected = predict(models)
    network = lycoris_network(models, f"algo={algo}")
    randomize(network)
    weights, active = network.kohya_state_dict(), predict(models)
    for _ in range(2):
        with network.disabled():
            assert torch.equal(predict(models), expected)
    assert torch.equal(predict(models), active)
    assert all(torch.equal(weights[key], new) for key, new in network.kohya_state_dict().items())


@needs_lycoris
@pytest.mark.parametrize("algo", ["glora", "full"])
def test_a_limit_of_norms_that_would_do_nothing_is_refused(algo):
    network = {"network_module": "lycoris.kohya", "network_args": (f"algo={algo}",)}
    options = NetworkOptions(**network, network_dim=4, scale_weight_norms=1.0)
    with pytest.raises(UserError, match=f"scale_weight_norms.*algo={algo}"):
        create_network(toy_models(), options)


def test_an_error_within_disabled_turns_the_network_on_again():
    models = toy_models()
    network = toy_network(models)
    randomize(network)
    active = encode(models)
    with pytest.raises(KeyError), network.disabled():
        raise KeyError
    assert torch.equal(encode(models), active)


def test_training_mode_turns_dropout_on_and_off():
    models = toy_models()
    network = toy_network(models, dropout=0.5)
    randomize(network)
    network.train(False)
    assert torch.equal(encode(models), encode(models))
    network.train(True)
    assert not torch.equal(encode(models), encode(models))


def test_max_norm_holds_for_every_module():
    network = toy_network()
    randomize(network)
    result = network.apply_max_norm(0.1)
    assert result.keys_scaled == len(network.modules)
    assert result.max_norm == pytest.approx(0.1, rel=1e-4)


# --- user errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"module": "networks.dylora"}, "lycoris.kohya"),
        ({"args": ["conv_dims=4"]}, "did you mean conv_dim"),
        ({"args": ["conv_dim"]}, "key=value"),
        ({"args": ["conv_dim=x"]}, "whole number"),
        ({"args": ["conv_dim=0"]}, "at least 1"),
        ({"args": ["conv_alpha=1"]}, "conv_dim"),
        ({"args": ["rank_dropout=1"]}, "below 1"),
        ({"dropout": 1.5}, "^network_dropout=1.5"),
        ({"dropout": -0.1}, "^network_dropout=-0.1"),
        ({"args": ["module_dropout=-1"]}, "^network_args: module_dropout=-1"),
        *(({"args": [f"{key}=1"]}, key) for key in BLOCK_ARGS),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        toy_network(**settings)


def test_network_args_are_strings_and_the_last_wins():
    assert parse_network_args(["a=1", "b=x=y", "a=2"]) == {"a": "2", "b": "x=y"}


def test_both_network_modules_are_registered():
    assert set(NETWORK_MODULES) == {"networks.lora", "lycoris.kohya"}


# --- LyCORIS --------------------------------------------------------------------------------


def lycoris_network(models=None, *network_args, **settings):
    return toy_network(models, module="lycoris.kohya", args=network_args, **settings)


@needs_lycoris
@pytest.mark.parametrize("algo", ["locon", "lokr", "loha"])
@pytest.mark.parametrize("linear", [False, True])
def test_lycoris_networks_survive_a_round_trip(algo, linear):
    models = toy_models(linear=linear)
    expected = encode(models), predict(models)
    network = lycoris_network(models, f"algo={algo}")
    assert network.num_text_encoder_modules == 12
    randomize(network)
    assert not torch.allclose(encode(models), expected[0], atol=1e-3)
    assert not torch.allclose(predict(models), expected[1], atol=1e-3)
    state = network.kohya_state_dict()
    assert all("lora_te_text_model_" in key for key in state if key.startswith("lora_te"))
    fresh_models = toy_models(linear=linear)
    lycoris_network(fresh_models, f"algo={algo}").load_kohya_state_dict(state)
    torch.testing.assert_close(encode(fresh_models), encode(models))
    torch.testing.assert_close(predict(fresh_models), predict(models))
    with network.disabled():
        assert torch.equal(encode(models), expected[0])
        assert torch.equal(predict(models), expected[1])
    assert not torch.allclose(encode(models), expected[0], atol=1e-3)


@needs_lycoris
@pytest.mark.parametrize("linear", [False, True])
def test_lycoris_ranks_come_from_the_file(tmp_path, linear):
    models = toy_models(linear=linear)
    network = lycoris_network(models, "algo=locon", "conv_dim=2", dim=3)
    randomize(network)
    save_file(network.kohya_state_dict(), tmp_path / "x.safetensors")
    fresh_models = toy_models(linear=linear)
    lycoris_network(
        fresh_models, dim=None, weights=tmp_path / "x.safetensors", dim_from_weights=True
    )
    torch.testing.assert_close(encode(fresh_models), encode(models))
    torch.testing.assert_close(predict(fresh_models), predict(models))


@needs_lycoris
@pytest.mark.parametrize("dims", [{"alpha": 2.0}, {"dim": None}])
def test_lycoris_goes_on_from_a_file_without_weights_in_memory(tmp_path, dims):
    """As a rehearsal does."""
    path = tmp_path / "x.safetensors"
    save_file(lycoris_network(None, "algo=locon", alpha=2.0).kohya_state_dict(), path)
    models = toy_models()
    for model in (models.unet, *(encoder.model for encoder in models.text_encoders)):
        model.to("meta")
    rest = {"weights": path, "dim_from_weights": "alpha" not in dims}
    network = lycoris_network(models, "algo=locon", **dims, **rest)
    assert {weight.device.type for weight in network.weights().values()} == {"meta"}
    if "alpha" in dims:
        with pytest.raises(UserError, match="alpha is 2, this network has 1; set network_alpha"):
            lycoris_network(None, "algo=locon", alpha=1.0, **rest)


@needs_lycoris
@pytest.mark.parametrize("algo", ["boft", "ia3"])
def test_modules_that_lycoris_cannot_make_from_a_file_are_named(algo, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(lycoris_network(None, f"algo={algo}").kohya_state_dict(), path)
    with pytest.raises(UserError, match="dim_from_weights: LyCORIS cannot make modules of this"):
        lycoris_network(None, dim=None, weights=path, dim_from_weights=True)


@needs_lycoris
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["conv_dim=x"], "conv_dim=x: expected a whole number"),
        (["conv_dim=-2"], "conv_dim=-2: expected a whole number of at least 0"),
        (["conv_alpha=x"], "conv_alpha=x"),
        (["rank_dropout=2"], "rank_dropout=2: .* below 1"),
        (["module_dropout=-1"], "module_dropout=-1"),
        (["algo=lokr", "factor=x"], "factor=x"),
        (["algo=diag-oft", "constraint=x"], "constraint=x"),
        (["algo=dylora"], "algo=dylora writes files and states that LyCORIS cannot"),
        (["algo=lokr", "rs_lora=True"], "rs_lora with algo=lokr"),
    ],
)
def test_arguments_of_lycoris_that_cannot_work_are_named(args, message):
    with pytest.raises(UserError, match=f"^network_args: {message}"):
        lycoris_network(None, *args)


@needs_lycoris
@pytest.mark.parametrize("algo", ["locon", "lokr"])
def test_a_file_of_lycoris_is_not_taken_for_a_lora(algo, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(lycoris_network(None, f"algo={algo}", "preset=full").kohya_state_dict(), path)
    with pytest.raises(UserError, match="set network_module = lycoris.kohya"):
        toy_network(None, dim=None, weights=path, dim_from_weights=True)


@needs_lycoris
def test_settings_that_the_file_decides_in_lycoris_are_named(tmp_path, caplog):
    save_file(lycoris_network(None, alpha=1.0).kohya_state_dict(), tmp_path / "x.safetensors")
    given = ("algo=lokr", "conv_dim=2", "dropout=0.1", "preset=attn-only", "loraplus_lr_ratio=2")
    with caplog.at_level(logging.WARNING):
        network = lycoris_network(
            None,
            *given,
            dim=None,
            alpha=1.0,
            dropout=0.1,
            weights=tmp_path / "x.safetensors",
            dim_from_weights=True,
        )
    assert network.loraplus.unet == 2
    assert named_without_effect(caplog) == {
        "network_dropout", "algo", "conv_dim", "dropout", "preset",
    }  # fmt: skip


def a1111_weight(module, file_scale):
    """A layer's weight as A1111 1.10.1 computes it: norms over all axes but that of the inputs."""
    weight = module.org_module[0].weight
    changed = weight + module.get_diff_weight(1)[0].reshape(weight.shape)
    axes = [axis for axis in range(weight.ndim) if axis != 1]
    return changed * file_scale / changed.square().sum(dim=axes, keepdim=True).sqrt()


@needs_lycoris
@pytest.mark.parametrize("algo", ["locon", "loha", "lokr"])
@pytest.mark.parametrize("on_output", [True, False])
def test_a1111_computes_the_weights_that_were_trained_from_input_norms_alone(algo, on_output):
    arguments = (f"algo={algo}", "dora_wd=True", f"wd_on_output={on_output}")
    network = lycoris_network(toy_models(linear=True), *arguments)
    errors = []
    with torch.no_grad():
        for module in network.modules:
            for name, parameter in module.named_parameters():
                if "org" not in name:
                    parameter.mul_(1 + 0.1 * torch.randn_like(parameter)).add_(0.01)
            if module.org_module[0].weight.ndim == 2:
                trained = module.get_merged_weight(1)[0]
                found = a1111_weight(module, module.custom_state_dict()["dora_scale"])
                errors.append(float((found - trained).norm() / trained.norm()))
    assert (max(errors) > 0.4) if on_output else (max(errors) < 1e-5)


@pytest.mark.parametrize(
    ("arguments", "is_wrong"),
    [
        ({}, False),
        ({"dora_wd": "True"}, True),
        ({"dora_wd": "1", "algo": "LoKr"}, True),
        ({"dora_wd": "True", "wd_on_output": "true", "algo": "loha"}, True),
        ({"dora_wd": "True", "wd_on_output": "False"}, False),
        ({"dora_wd": "false", "algo": "locon"}, False),
        ({"dora_wd": "True", "algo": "ia3"}, False),
    ],
)
def test_norms_that_a1111_misreads_are_named(arguments, is_wrong, caplog):
    warn_of_output_norms(arguments)
    assert ["wd_on_output=False" in text for text in caplog.messages] == [True] * is_wrong


@needs_lycoris
@pytest.mark.parametrize("algo", ["locon", "loha", "lokr"])
def test_input_norms_are_gone_on_with_or_refused_in_words(algo, tmp_path):
    arguments = (f"algo={algo}", "dora_wd=True", "wd_on_output=False")
    models, path = toy_models(), tmp_path / "x.safetensors"
    network = lycoris_network(models, *arguments)
    randomize(network)
    save_file(network.kohya_state_dict(), path)
    fresh_models = toy_models()
    lycoris_network(fresh_models, *arguments, weights=path)
    torch.testing.assert_close(encode(fresh_models), encode(models))
    with pytest.raises(UserError, match="dim_from_weights: .* wd_on_output=False"):
        lycoris_network(None, dim=None, weights=path, dim_from_weights=True)


@needs_lycoris
def test_lycoris_dropout_has_one_value_under_its_two_names():
    for settings in ({"dropout": 0.1}, {"args": ["dropout=0.1"]}):
        network = lycoris_network(None, *settings.pop("args", ()), **settings)
        assert {module.dropout.p for module in network.modules} == {0.1}
    lycoris_network(None, "dropout=0.1", dropout=0.1)
    with pytest.raises(UserError, match="network_dropout=0.2 .* dropout=0.1"):
        lycoris_network(None, "dropout=0.1", dropout=0.2)
    with pytest.raises(UserError, match="network_args: dropout=x"):
        lycoris_network(None, "dropout=x")


@needs_lycoris
def test_a_lycoris_locon_of_attention_saves_the_keys_of_networks_lora():
    locon = lycoris_network(None, "algo=lora", "preset=attn-mlp")
    ours = toy_network()
    shapes = [
        {key: tuple(value.shape) for key, value in network.kohya_state_dict().items()}
        for network in (locon, ours)
    ]
    assert shapes[0] == shapes[1]


@needs_lycoris
def test_lycoris_presets_without_text_encoder_have_no_modules_there():
    assert lycoris_network(None, "preset=unet-only").num_text_encoder_modules == 0


@needs_lycoris
def test_lycoris_presets_that_name_kohyas_attention_class_find_diffusers_one(tmp_path):
    attention = ("attn1_to_q", "attn2_to_out_0")
    (tmp_path / "p.toml").write_text(
        'unet_target_module = ["CrossAttention"]\nenable_conv = false\n'
    )
    for preset in ("attn-only", tmp_path / "p.toml"):
        network = lycoris_network(None, f"preset={preset}")
        keys = network.kohya_state_dict()
        prefix = "lora_unet_mid_block_attentions_0_transformer_blocks_0"
        assert all(f"{prefix}_{name}.alpha" in keys for name in attention)
        assert f"{prefix}_ff_net_2.alpha" not in keys


@needs_lycoris
def test_presets_of_lycoris_are_as_before_afterwards(tmp_path):
    presets = importlib.import_module("lycoris.kohya").PRESET
    before = copy.deepcopy(presets)
    modules = set(lycoris_network(None, "preset=full").kohya_state_dict())
    assert presets == before
    (tmp_path / "p.toml").write_text(
        'exclude_name = ["mid_block.*"]\nuse_fnmatch = true\nenable_conv = false\n'
    )
    lycoris_network(None, f"preset={tmp_path / 'p.toml'}")
    assert set(lycoris_network(None, "preset=full").kohya_state_dict()) == modules


@needs_lycoris
def test_a_preset_without_any_layer_is_refused(tmp_path):
    (tmp_path / "p.toml").write_text(
        "unet_target_module = []\nunet_target_name = []\ntext_encoder_target_module = []\n"
    )
    with pytest.raises(UserError, match="no layer"):
        lycoris_network(None, f"preset={tmp_path / 'p.toml'}")


@needs_lycoris
def test_lycoris_groups_and_norms_have_our_form():
    network = lycoris_network(None, "algo=locon", "loraplus_lr_ratio=2")
    randomize(network)
    groups = network.parameter_groups(unet_lr=1e-3, text_encoder_lrs=[0.0])
    assert [(g["name"], g["lr"]) for g in groups] == [("unet", 1e-3), ("unet plus", 2e-3)]
    result = network.apply_max_norm(0.1)
    assert result.keys_scaled > 0
    assert result.max_norm == pytest.approx(0.1, rel=1e-2)


@needs_lycoris
@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("algo=loha", "loraplus_lr_ratio=4"), "text encoder and the U-Net"),
        (("algo=lokr", "loraplus_unet_lr_ratio=4"), "U-Net"),
        (("algo=lokr", "loraplus_text_encoder_lr_ratio=4"), "text encoder"),
        (("algo=diag-oft", "loraplus_lr_ratio=4"), "text encoder and the U-Net"),
        (("algo=loha", "preset=unet-only", "loraplus_lr_ratio=4"), "U-Net"),
        (("algo=locon", "loraplus_lr_ratio=4"), None),
        (("algo=lora", "dora_wd=True", "wd_on_output=False", "loraplus_lr_ratio=4"), None),
        (("algo=loha",), None),
    ],
)
def test_a_loraplus_ratio_for_modules_without_up_projections_is_named(args, named, caplog):
    network = lycoris_network(None, *args)
    caplog.clear()
    network.parameter_groups(unet_lr=1e-3, text_encoder_lrs=[1e-4])
    said = caplog.messages
    assert len(said) == (named is not None)
    assert all(f"the LoRA+ ratio has no effect on the {named}: " in text for text in said)


@needs_lycoris
def test_another_alpha_is_refused_by_lycoris_networks():
    state = lycoris_network(alpha=1.0).kohya_state_dict()
    with pytest.raises(UserError, match="network_alpha"):
        lycoris_network(alpha=2.0).load_kohya_state_dict(state)


@needs_lycoris
@pytest.mark.parametrize(("arg", "hint"), [("algo=lokrr", "lokr"), ("preset=ful", "full")])
def test_unknown_lycoris_settings_are_named(arg, hint):
    with pytest.raises(UserError, match=f"did you mean {hint}"):
        lycoris_network(None, arg)


def test_a_missing_lycoris_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lycoris.kohya", None)
    with pytest.raises(UserError, match="pip install"):
        lycoris_network()
