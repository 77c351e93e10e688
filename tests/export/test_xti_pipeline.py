"""An XTI file in a diffusers pipeline."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from mlm_plugin.errors import UserError
from mlm_plugin.export.embedding_files import EMBEDDING_KEY, save_embedding, save_xti
from mlm_plugin.export.xti_pipeline import load_xti
from mlm_plugin.models.cross_attention import split_layers

K, N, D = 16, 2, 32
PROMPT, NEGATIVE = "a photo of <v> on the lawn", "blurry"


@pytest.fixture
def pipeline(toy_folder):
    pipeline = StableDiffusionPipeline.from_pretrained(toy_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def vectors_KND():
    return torch.randn(K, N, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def path(tmp_path, vectors_KND):
    save_xti(tmp_path / "v.safetensors", vectors_KND, metadata={})
    return tmp_path / "v.safetensors"


def latents_of(pipeline, **kwargs):
    return pipeline(
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **kwargs,
    ).images


def embeddings(pipeline, xti):
    return {
        "prompt_embeds": xti.encode(PROMPT),
        "negative_prompt_embeds": xti.encode(NEGATIVE),
    }


def test_each_layer_gets_the_states_of_its_own_vectors(
    pipeline, path, vectors_KND, tmp_path, toy_folder
):
    xti = load_xti(pipeline, path, placeholder_token="<v>")
    states = split_layers(xti.encode([PROMPT, NEGATIVE]), K)
    assert states.shape == (K, 2, 77, D)
    plain = StableDiffusionPipeline.from_pretrained(toy_folder)
    for k in range(K):
        save_embedding(tmp_path / "k.safetensors", {EMBEDDING_KEY: vectors_KND[k]}, metadata={})
        plain.load_textual_inversion(str(tmp_path), weight_name="k.safetensors", token="<v>")
        expected, _ = plain.encode_prompt([PROMPT, NEGATIVE], "cpu", 1, False)
        plain.unload_textual_inversion()
        torch.testing.assert_close(states[k], expected)
    assert not torch.allclose(states[0, 0], states[1, 0], atol=1e-3)
    assert torch.equal(states[0, 1], states[1, 1])


@pytest.mark.parametrize("num_images_per_prompt", [1, 2])
def test_equal_vectors_for_all_layers_draw_what_textual_inversion_draws(
    pipeline, vectors_KND, tmp_path, toy_folder, num_images_per_prompt
):
    vectors_ND = vectors_KND[0]
    save_xti(tmp_path / "xti.safetensors", vectors_ND.expand(K, N, D), metadata={})
    xti = load_xti(pipeline, tmp_path / "xti.safetensors", placeholder_token="<v>")
    drawn = latents_of(
        pipeline, num_images_per_prompt=num_images_per_prompt, **embeddings(pipeline, xti)
    )

    plain = StableDiffusionPipeline.from_pretrained(toy_folder)
    plain.set_progress_bar_config(disable=True)
    save_embedding(tmp_path / "ti.safetensors", {EMBEDDING_KEY: vectors_ND}, metadata={})
    plain.load_textual_inversion(str(tmp_path), weight_name="ti.safetensors", token="<v>")
    expected = latents_of(
        plain,
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        num_images_per_prompt=num_images_per_prompt,
    )
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)


def test_a_vector_of_one_layer_changes_the_picture(pipeline, vectors_KND, tmp_path):
    drawn = []
    for scale in (1, -1):
        vectors_KND[15] *= scale
        save_xti(tmp_path / "x.safetensors", vectors_KND, metadata={})
        xti = load_xti(pipeline, tmp_path / "x.safetensors", placeholder_token="<v>")
        drawn.append(latents_of(pipeline, **embeddings(pipeline, xti)))
        xti.remove()
    assert (drawn[0] - drawn[1]).abs().max() > 1e-2


def test_prompts_as_text_go_on_and_remove_leaves_nothing(pipeline, path):
    processors = dict(pipeline.unet.attn_processors)
    before = latents_of(pipeline, prompt=PROMPT)
    xti = load_xti(pipeline, path, placeholder_token="<v>")
    assert torch.equal(latents_of(pipeline, prompt=PROMPT), before)
    xti.remove()
    assert torch.equal(latents_of(pipeline, prompt=PROMPT), before)
    assert all(value is processors[key] for key, value in pipeline.unet.attn_processors.items())
    embedding = pipeline.text_encoder.get_input_embeddings()
    assert not embedding._forward_hooks
    assert not embedding._forward_pre_hooks


def test_a_prompt_has_the_same_states_alone_and_in_a_batch(pipeline, path):
    xti = load_xti(pipeline, path, placeholder_token="<v>")
    together = xti.encode([PROMPT, NEGATIVE])
    alone = torch.cat([xti.encode(PROMPT), xti.encode(NEGATIVE)])
    torch.testing.assert_close(together, alone)
    assert not together.requires_grad


def test_clip_skip_is_that_of_training(pipeline, path):
    states = []
    for clip_skip in (None, 1, 2):
        xti = load_xti(pipeline, path, placeholder_token="<v>", clip_skip=clip_skip)
        states.append(xti.encode(PROMPT))
        xti.remove()
    torch.testing.assert_close(states[0], states[1])
    assert not torch.allclose(states[0], states[2], atol=1e-3)


def test_files_that_do_not_fit_and_second_files_are_refused(pipeline, path, tmp_path):
    save_xti(tmp_path / "wide.safetensors", torch.ones(K, N, 2 * D), metadata={})
    with pytest.raises(UserError, match="width 64, the text encoder of width 32"):
        load_xti(pipeline, tmp_path / "wide.safetensors", placeholder_token="<v>")
    save_embedding(tmp_path / "ti.safetensors", {EMBEDDING_KEY: torch.ones(N, D)}, metadata={})
    with pytest.raises(UserError, match="an XTI file"):
        load_xti(pipeline, tmp_path / "ti.safetensors", placeholder_token="<v>")
    with pytest.raises(UserError, match="placeholder_token is empty"):
        load_xti(pipeline, path, placeholder_token=" ")
    load_xti(pipeline, path, placeholder_token="<v>")
    with pytest.raises(UserError, match="already"):
        load_xti(pipeline, path, placeholder_token="<w>")
