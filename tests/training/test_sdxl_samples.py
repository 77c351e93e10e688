"""SDXL: sample pictures are those of the diffusers pipeline."""

import torch
from diffusers import StableDiffusionXLPipeline

from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.models.conditioning import encode_captions
from mlm_plugin.training.samples import DenoiseSettings, create_sampler, decode_latents, denoise

PROMPT, NEGATIVE = "a photo of sks dog on the beach", "blurry"


def test_a_sample_is_the_picture_of_the_diffusers_pipeline(toy_sdxl_folder):
    models = load_stable_diffusion(toy_sdxl_folder)
    pipeline = StableDiffusionXLPipeline.from_pretrained(toy_sdxl_folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = create_sampler("ddim", models.noise_scheduler, prediction_type="epsilon")
    with torch.no_grad():
        latents = denoise(
            models.unet,
            encode_captions(models.text_encoders, [NEGATIVE, PROMPT]),
            create_sampler("ddim", models.noise_scheduler, prediction_type="epsilon"),
            DenoiseSettings(size=(64, 96), num_steps=3, scale=4.0),
            generator=torch.Generator().manual_seed(3),
        )
        ours = decode_latents(models.vae, latents)

    def theirs(output_type):
        return pipeline(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            height=64,
            width=96,
            latents=torch.randn((1, 4, 8, 12), generator=torch.Generator().manual_seed(3)),
            num_inference_steps=3,
            guidance_scale=4.0,
            output_type=output_type,
        ).images[0]

    torch.testing.assert_close(latents[0], theirs("latent"), atol=1e-4, rtol=1e-4)
    pairs = zip(ours.tobytes(), theirs("pil").tobytes(), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 1
