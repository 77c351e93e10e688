"""Bytes are counted from making to release, and alike on the meta device and on real tensors."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from mlm_plugin.estimate.live_bytes import LiveBytes
from mlm_plugin.estimate.on_meta import CPU_TO_FP32, OnMeta

KIB = 1024


def unet():
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    ).train()


def clip():
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
        )
    ).train()


def unet_loss(model, device):
    latents = torch.zeros(2, 4, 16, 16, device=device)
    timesteps = torch.zeros(2, dtype=torch.long, device=device)
    return model(latents, timesteps, torch.zeros(2, 77, 24, device=device)).sample.float().mean()


def clip_loss(model, device):
    ids = torch.zeros(2, 20, dtype=torch.long, device=device)
    return model(input_ids=ids).last_hidden_state.float().mean()


CASES = {"unet": (unet, unet_loss), "text encoder": (clip, clip_loss)}


def step_bytes(model, loss_of, *, device, autocast=None):
    """Bytes kept for the backward pass, and the peak of both passes."""
    model = model.to(device)
    live = LiveBytes(device)
    live.hold([*model.parameters(), *model.buffers()], "weights")
    mode = OnMeta(to_fp32=CPU_TO_FP32)
    dtype = autocast if device == "meta" else None
    with mode, live:
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast) and device == "cpu"):
            with mode.autocast(dtype), live.labelled("kept"):
                loss = loss_of(model, device)
        kept = live.live["kept"]
        mode.backward(loss, dtype)
    return kept, live.peak


# --- counting -------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_peak_is_where_most_lives_at_once(device):
    live = LiveBytes(device)
    with live:
        first = torch.empty(KIB, dtype=torch.uint8, device=device)
        second = first + 1
        del first
        third = torch.empty(KIB // 2, dtype=torch.uint8, device=device)
        del second, third
    assert live.peak == 2 * KIB
    assert sum(live.live.values()) == 0


def test_a_view_is_not_new_memory_and_keeps_all_of_the_old():
    live = LiveBytes("cpu")
    with live:
        row = torch.empty(8, KIB, dtype=torch.uint8)[3]
        row += 1
    assert sum(live.live.values()) == 8 * KIB


def test_labels_say_what_lived_at_the_peak():
    live, weight = LiveBytes("cpu"), torch.empty(KIB, dtype=torch.uint8)
    live.hold([weight], "weights")
    with live:
        with live.labelled("first"):
            first = weight + 1
        del first
        with live.labelled("second"):
            second = torch.cat([weight, weight])
    assert +live.at_peak == {"weights": KIB, "second": 2 * KIB}
    del second


def test_gradients_have_their_own_label_once_they_are_complete():
    layer, live = nn.Linear(4, 4, bias=False), LiveBytes("cpu")
    live.hold(layer.parameters(), "weights")
    live.hold_gradients(layer.parameters(), "gradients")
    with live, live.labelled("other"):
        torch.autograd.backward(layer(torch.ones(2, 4)).sum())
    assert live.live["gradients"] == layer.weight.nbytes


def test_a_new_start_forgets_the_old_peak():
    live = LiveBytes("cpu")
    with live:
        torch.empty(KIB, dtype=torch.uint8)
        live.reset_peak()
        torch.empty(8, dtype=torch.uint8)
    assert live.peak == 8


# --- the meta device against real tensors ---------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_meta_keeps_and_needs_what_real_tensors_do(case, checkpointing):
    make, loss_of = CASES[case]
    found = {}
    for device in ("cpu", "meta"):
        model = make()
        if checkpointing:
            enable = getattr(model, "enable_gradient_checkpointing", None)
            (enable or model.gradient_checkpointing_enable)()
        found[device] = step_bytes(model, loss_of, device=device)
    assert found["meta"] == found["cpu"]


@pytest.mark.parametrize("case", CASES)
def test_mixed_precision_on_meta_keeps_what_autocast_does(case):
    make, loss_of = CASES[case]
    found = {
        device: step_bytes(make(), loss_of, device=device, autocast=torch.bfloat16)
        for device in ("cpu", "meta")
    }
    # a CPU keeps the statistics of a group norm in fp32 beside half inputs; a GPU has fp32 inputs
    assert found["meta"] == pytest.approx(found["cpu"], rel=1e-3)


def test_gradient_checkpointing_keeps_less():
    plain, saving = unet(), unet()
    saving.enable_gradient_checkpointing()
    kept, _ = step_bytes(plain, unet_loss, device="meta")
    kept_saving, _ = step_bytes(saving, unet_loss, device="meta")
    assert kept_saving < kept / 2
