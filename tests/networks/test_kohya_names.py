"""Names and shapes of kohya's files."""

import pytest
import torch

from mlm_plugin.networks.kohya_names import (
    canonical_name,
    in_file_shape,
    is_known_key,
    part_of,
    text_encoder_name,
    unet_name,
)


def test_unet_names_are_paths_with_underscores():
    name = unet_name("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0")
    assert name == "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"


@pytest.mark.parametrize(
    "path", ["encoder.layers.3.mlp.fc1", "text_model.encoder.layers.3.mlp.fc1"]
)
def test_nested_and_flat_clip_have_the_same_name(path):
    assert text_encoder_name(path) == "lora_te_text_model_encoder_layers_3_mlp_fc1"


def test_canonical_names_leave_other_keys_alone():
    for key in ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "lora_unet_conv_in.alpha"):
        assert canonical_name(key) == key
    flat = "lora_te_encoder_layers_0_mlp_fc1.alpha"
    assert canonical_name(flat) == "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"


def test_linear_projections_are_convolutions_in_the_file_and_nothing_else_is():
    projection = "lora_unet_mid_block_attentions_0_proj_in"
    matrix = torch.ones(4, 8)
    assert in_file_shape(f"{projection}.lora_down.weight", matrix).shape == (4, 8, 1, 1)
    assert in_file_shape(f"{projection}.lokr_w1", matrix).shape == (4, 8)
    assert in_file_shape(f"{projection}.alpha", torch.tensor(1.0)).shape == ()
    inner = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj.lora_down.weight"
    assert in_file_shape(inner, matrix).shape == (4, 8)


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", True),
        ("lora_unet_up_blocks_1_resnets_2_conv_shortcut.lora_up.weight", True),
        ("lora_unet_down_blocks_0_downsamplers_0_conv.alpha", True),
        ("lora_unet_conv_in.lokr_w1_a", True),
        ("lora_te_text_model_encoder_layers_11_self_attn_out_proj.hada_w1_a", True),
        ("lora_te_encoder_layers_11_self_attn_out_proj.alpha", False),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_A.weight", False),
        ("contextualizer.weight", False),
        ("lora_te_text_projection.alpha", False),
        ("lora_unet_up_blocks_0_downsamplers_0_conv.alpha", False),
    ],
)
def test_webuis_know_only_layers_that_exist(key, known):
    assert is_known_key(key) is known


def test_text_encoder_names_are_distinguished_from_unet_names():
    assert part_of("lora_te_text_model_encoder_layers_0_mlp_fc1") == "textencoder"
    assert part_of("lora_unet_conv_in") == "unet"
