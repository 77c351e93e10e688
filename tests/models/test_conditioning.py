"""Conditioning of the U-Net: SDXL's two encoders and sizes, as in diffusers and sd-scripts."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.embeddings import Timesteps

from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.models.conditioning import Conditioning, encode_captions, size_ids, unet_inputs

# tests/reference/derive_sizes.py: some of the 1536 values of two pictures, and the sum of all
ORIGINAL, CROP, TARGET = [(1200, 903), (3024, 4032)], [(0, 31), (12, 0)], [(1152, 896), (896, 1152)]
SHOWN = (1, 130, 260, 515, 770, 1030, 1300, 1535)
DERIVED = [
    ([-0.14923, 0.65188, 0.14079, 1.0, -0.14088, 0.92544, 0.40553, 0.09614], 387.935),
    ([0.68426, -0.98746, 0.20791, -0.97006, 1.0, -0.79529, -0.99072, 0.12348], 368.580),
]


def test_the_u_net_embeds_the_sizes_as_sd_scripts_does():
    ids_B6 = size_ids(ORIGINAL, CROP, TARGET)
    project = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)  # SDXL's add_time_proj
    embedding = project(ids_B6.flatten()).reshape(2, -1)
    for row, (values, total) in zip(embedding, DERIVED, strict=True):
        torch.testing.assert_close(row[list(SHOWN)], torch.tensor(values), atol=1e-4, rtol=0)
        assert row.sum().item() == pytest.approx(total, abs=2e-2)


def test_captions_are_encoded_as_the_diffusers_pipeline_does(toy_sdxl_folder):
    captions = ["a photo of sks dog", ""]
    models = load_stable_diffusion(toy_sdxl_folder)
    pipeline = StableDiffusionXLPipeline.from_pretrained(toy_sdxl_folder)
    with torch.no_grad():
        ours = encode_captions(models.text_encoders, captions)
        states, _, pooled, _ = pipeline.encode_prompt(
            captions, device="cpu", do_classifier_free_guidance=False
        )
    torch.testing.assert_close(ours.states, states)
    torch.testing.assert_close(ours.pooled, pooled)


def test_one_text_encoder_gives_its_states_alone(toy_text_encoder):
    ours = encode_captions([toy_text_encoder], ["a dog"])
    assert torch.equal(ours.states, toy_text_encoder.encode_captions(["a dog"]))
    inputs = unet_inputs(ours, size_ids([(1, 1)], [(0, 0)], [(1, 1)]), dtype=torch.float32)
    assert inputs.keys() == {"encoder_hidden_states"}


def test_half_precision_does_not_round_the_sizes():
    conditioning = Conditioning(torch.zeros(1, 2, 3), torch.zeros(1, 4)).to(torch.bfloat16)
    ids_B6 = size_ids([(1025, 1023)], [(0, 0)], [(1024, 1024)])
    added = unet_inputs(conditioning, ids_B6, dtype=torch.bfloat16)["added_cond_kwargs"]
    assert added["text_embeds"].dtype == torch.bfloat16
    assert added["time_ids"].tolist() == [[1025, 1023, 0, 0, 1024, 1024]]
