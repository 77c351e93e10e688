"""LoRA as a training method: options become a network."""

import logging
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from mlm_plugin.config.options import NetworkOptions
from mlm_plugin.methods.lora import LoRAMethod


def toy_models():
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_attention_heads=2,
        num_hidden_layers=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
    )
    return SimpleNamespace(text_encoders=[SimpleNamespace(model=CLIPTextModel(config))], unet=unet)


def ranks(method):
    return {module.rank for module in method.network.modules}


def test_the_rank_is_kohyas_default_where_none_is_given():
    assert ranks(LoRAMethod(toy_models(), NetworkOptions())) == {4}
    assert ranks(LoRAMethod(toy_models(), NetworkOptions(network_dim=3))) == {3}


@pytest.mark.parametrize(
    ("given", "named"),
    [({}, []), ({"network_dim": 8, "network_alpha": 8.0}, ["network_dim", "network_alpha"])],
)
def test_only_settings_that_were_given_are_named_as_without_effect(tmp_path, caplog, given, named):
    trained = LoRAMethod(toy_models(), NetworkOptions(network_dim=3, network_alpha=2.0))
    save_file(trained.network.kohya_state_dict(), tmp_path / "x.safetensors")
    options = NetworkOptions(
        network_weights=str(tmp_path / "x.safetensors"), dim_from_weights=True, **given
    )
    with caplog.at_level(logging.WARNING):
        assert ranks(LoRAMethod(toy_models(), options)) == {3}
    messages = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert [message.split()[0] for message in messages] == named
