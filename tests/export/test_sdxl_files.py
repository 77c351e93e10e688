"""LoRAs and embeddings of SDXL: what diffusers and sd-scripts make of them, and our own checks."""

from __future__ import annotations

import ast
import copy
import os
from itertools import chain
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from mlm_plugin.config.options import NetworkOptions
from mlm_plugin.errors import UserError
from mlm_plugin.export.embedding_files import (
    EMBEDDING_KEYS,
    read_embedding,
    read_embeddings,
    save_embedding,
    verify_embedding,
)
from mlm_plugin.export.lora_files import bundled_embeddings, save_lora, verify_lora
from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.models.conditioning import encode_captions
from mlm_plugin.models.token_embeddings import LearnedTokens
from mlm_plugin.networks.create import create_network

CHECKOUT = os.environ.get("SD_SCRIPTS_DIR")  # read here: tests run without it
CAPTIONS = ["a photo of a dog", "sks"]


@pytest.fixture(scope="module")
def base(toy_sdxl_folder):
    return load_stable_diffusion(toy_sdxl_folder)


@pytest.fixture
def models(base):
    """The toy to be adapted."""
    return copy.deepcopy(base)


@pytest.fixture
def pipeline(toy_sdxl_folder):
    return StableDiffusionXLPipeline.from_pretrained(toy_sdxl_folder)


@torch.no_grad()
def encode(pipeline, captions):
    """States and pooled state, as the pipeline gives them to its U-Net."""
    states, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    return states, pooled


@torch.no_grad()
def predict(unet):
    generator = torch.Generator().manual_seed(0)
    return unet(
        torch.randn(1, 4, 16, 16, generator=generator),
        torch.tensor([5]),
        encoder_hidden_states=torch.randn(1, 4, 80, generator=generator),
        added_cond_kwargs={
            "text_embeds": torch.randn(1, 24, generator=generator),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
        },
    ).sample


def method_of_sd_scripts(name):
    """A method of sd-scripts' SDXL Textual Inversion trainer, without importing the file."""
    if CHECKOUT is None:
        pytest.skip("no sd-scripts checkout (SD_SCRIPTS_DIR) here")
    source = (Path(CHECKOUT) / "sdxl_train_textual_inversion.py").read_text("utf-8")
    (function,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    scope = {"os": os, "torch": torch}
    exec(compile(ast.Module([function], type_ignores=[]), name, "exec"), scope)
    return lambda *args: scope[name](None, *args)


# --- LoRA ------------------------------------------------------------------------------------


@torch.no_grad()
def test_diffusers_loads_a_lora_and_computes_what_our_model_computes(
    tmp_path, base, models, pipeline
):
    network = create_network(models, NetworkOptions(network_dim=4, network_alpha=2.0))
    generator = torch.Generator().manual_seed(0)
    for parameter in chain(*network.parts().values()):
        parameter.data.normal_(generator=generator).mul_(0.2)
    save_lora(tmp_path / "x.safetensors", network.kohya_state_dict(), metadata={})
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")

    expected = *encode_captions(models.text_encoders, CAPTIONS), predict(models.unet)
    bare = *encode_captions(base.text_encoders, CAPTIONS), predict(base.unet)
    loaded = *encode(pipeline, CAPTIONS), predict(pipeline.unet)
    for ours, theirs, without in zip(expected, loaded, bare, strict=True):
        assert (ours - without).abs().max() > 1e-2
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def test_a_lora_passes_the_check_with_its_counts(tmp_path, models):
    network = create_network(models, NetworkOptions(network_args=["conv_dim=2"]))
    vectors = {"sks": [torch.ones(2, 32), torch.ones(2, 48)]}
    state = network.kohya_state_dict() | bundled_embeddings(vectors)
    save_lora(tmp_path / "x.safetensors", state, metadata={}, dtype=torch.float16)
    counts = verify_lora(tmp_path / "x.safetensors")
    assert counts == (18 + 18, network.num_unet_modules)
    assert {"bundle_emb.sks.clip_l", "bundle_emb.sks.clip_g"} <= state.keys()


# --- embeddings ------------------------------------------------------------------------------


def vectors_of(num_vectors, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_vectors, width, generator=generator) for width in (32, 48)]


def saved(path, vectors, **settings):
    tensors = dict(zip(EMBEDDING_KEYS[len(vectors)], vectors, strict=True))
    save_embedding(path, tensors, metadata={}, **settings)
    return path


def test_one_file_holds_the_vectors_of_both_encoders(tmp_path):
    vectors = vectors_of(3)
    path = saved(tmp_path / "x.safetensors", vectors)
    assert load_file(path).keys() == {"clip_l", "clip_g"}
    assert all(map(torch.equal, read_embeddings(path), vectors))
    assert verify_embedding(path) == 3


def test_other_numbers_of_vectors_are_refused(tmp_path):
    path = saved(tmp_path / "x.safetensors", [torch.ones(2, 32), torch.ones(3, 48)])
    for read in (read_embeddings, verify_embedding):
        with pytest.raises(UserError, match="not.* the same number"):
            read(path)


def test_an_embedding_of_one_model_is_distinguished_from_the_others(tmp_path):
    sdxl = saved(tmp_path / "xl.safetensors", vectors_of(1))
    with pytest.raises(UserError, match="is an embedding for SDXL"):
        read_embedding(sdxl)
    sd1 = saved(tmp_path / "1.safetensors", [torch.ones(2, 768)])
    assert [vectors.shape for vectors in read_embeddings(sd1)] == [(2, 768)]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_sd_scripts_reads_the_file_and_we_read_its_file(tmp_path, suffix):
    read, write = method_of_sd_scripts("load_weights"), method_of_sd_scripts("save_weights")
    vectors = vectors_of(2)
    path = saved(tmp_path / "ours.safetensors", vectors)
    assert all(map(torch.equal, read(str(path)), vectors))
    write(str(tmp_path / f"theirs{suffix}"), vectors, torch.float16, {})
    for ours, original in zip(read_embeddings(tmp_path / f"theirs{suffix}"), vectors, strict=True):
        assert torch.equal(ours, original.half().float())


@torch.no_grad()
@pytest.mark.parametrize("num_vectors", [1, 3])
def test_diffusers_reads_learned_vectors_as_our_encoders_do(
    tmp_path, models, pipeline, num_vectors
):
    vectors = vectors_of(num_vectors)
    for text_encoder, tensor in zip(models.text_encoders, vectors, strict=True):
        LearnedTokens(text_encoder, {"sks": tensor[None]})
    captions = ["a photo of sks dog", "sks", "a dog! and sks!"]
    states, pooled = encode_captions(models.text_encoders, captions)

    loaded = load_file(saved(tmp_path / "x.safetensors", vectors))
    for key, encoder, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        pipeline.load_textual_inversion(
            loaded[key], token="<sks>", text_encoder=encoder, tokenizer=tokenizer
        )
    expected_states, expected_pooled = encode(
        pipeline, [caption.replace("sks", "<sks>") for caption in captions]
    )
    torch.testing.assert_close(states, expected_states, atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled, expected_pooled, atol=1e-5, rtol=0)
