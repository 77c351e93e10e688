"""The states the U-Net sees: clip skip, windows, trimming, fingerprints."""

import pytest
import torch

from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.models.token_embeddings import LearnedTokens
from mlm_plugin.models.tokenizers import second_tokenizer

LONG = " ".join(["dog beach rain hat chair snow"] * 20)


@torch.no_grad()
def test_a_trimmed_prompt_gives_the_same_states_as_a_full_window(toy_text_encoder):
    prompts = ["a photo of sks dog on the beach", "sks dog"]
    full = toy_text_encoder.encode_captions(prompts)
    trimmed_ids = toy_text_encoder.tokenize_trimmed(prompts)
    trimmed = toy_text_encoder.encode(trimmed_ids)
    length = trimmed_ids.shape[1]
    assert length < 77
    torch.testing.assert_close(full[:, :length], trimmed, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_clip_skip_the_states_are_the_last_hidden_state(toy_text_encoder):
    ids = toy_text_encoder.tokenize_trimmed(["a photo of a dog"])
    expected = toy_text_encoder.model(ids).last_hidden_state
    torch.testing.assert_close(toy_text_encoder.encode(ids), expected)
    toy_text_encoder.clip_skip = 1
    torch.testing.assert_close(toy_text_encoder.encode(ids), expected)


@torch.no_grad()
def test_clip_skip_2_is_the_layer_before_the_last_through_the_final_norm(toy_text_encoder):
    ids = toy_text_encoder.tokenize_trimmed(["a photo of a dog"])
    states = toy_text_encoder.model(ids, output_hidden_states=True).hidden_states
    toy_text_encoder.clip_skip = 2
    expected = toy_text_encoder.body.final_layer_norm(states[-2])
    torch.testing.assert_close(toy_text_encoder.encode(ids), expected)
    assert not torch.allclose(expected, states[-2])


def test_long_captions_are_split_into_windows_that_begin_and_end_properly(toy_text_encoder):
    tokenizer = toy_text_encoder.tokenizer
    toy_text_encoder.max_token_length = 225
    ids_BNL = toy_text_encoder.tokenize([LONG, "a dog"])
    assert ids_BNL.shape == (2, 3, 77)
    assert (ids_BNL[:, :, 0] == tokenizer.bos_token_id).all()
    assert (ids_BNL[:, :, -1] == tokenizer.eos_token_id).all()
    bodies = ids_BNL[0, :, 1:-1].flatten()
    expected = tokenizer(LONG, add_special_tokens=False).input_ids
    num_tokens = min(225, len(expected))
    assert bodies[:num_tokens].tolist() == expected[:num_tokens]


@torch.no_grad()
@pytest.mark.parametrize(("limit", "length"), [(None, 77), (75, 77), (150, 152), (225, 227)])
def test_the_unet_gets_75_states_per_window_and_two_ends(toy_text_encoder, limit, length):
    toy_text_encoder.max_token_length = limit
    states = toy_text_encoder.encode_captions([LONG])
    assert states.shape == (1, length, 32)
    ids = toy_text_encoder.tokenize([LONG])
    torch.testing.assert_close(states[:, :76], toy_text_encoder.encode(ids[:, 0])[:, :76])
    torch.testing.assert_close(states[:, -1], toy_text_encoder.encode(ids[:, -1])[:, -1])


def test_padding_that_is_not_eos_gets_its_ends_put_back(toy_text_encoder):
    """SD 2 pads with "!"; every window must still hold one EOS."""
    tokenizer = toy_text_encoder.tokenizer
    tokenizer.pad_token = "!"
    toy_text_encoder.max_token_length = 150
    ids_BNL = toy_text_encoder.tokenize([LONG, "a dog"])
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert pad != eos
    assert ids_BNL[0, 0, -1] == eos  # a full window ends in EOS
    assert ids_BNL[1, 1, 1] == eos  # an empty one is BOS, EOS, padding
    assert (ids_BNL[1, 1, 2:] == pad).all()


def test_the_fingerprint_survives_half_precision_and_sees_other_weights(toy_text_encoder):
    fingerprint = toy_text_encoder.fingerprint()
    for dtype in (torch.bfloat16, torch.float16):
        assert toy_text_encoder.model.to(dtype) is toy_text_encoder.model
        assert toy_text_encoder.fingerprint() == fingerprint
    skipping = TextEncoder(toy_text_encoder.tokenizer, toy_text_encoder.model, clip_skip=2)
    assert skipping.fingerprint() != fingerprint
    with torch.no_grad():
        toy_text_encoder.body.encoder.layers[0].mlp.fc1.weight.neg_()
    assert toy_text_encoder.fingerprint() != fingerprint


def test_added_tokens_do_not_change_the_tokenizers_fingerprint(toy_text_encoder):
    fingerprint = toy_text_encoder.tokenizer_fingerprint()
    toy_text_encoder.tokenizer.add_tokens(["<concept>"])
    assert toy_text_encoder.tokenizer_fingerprint() == fingerprint


def test_storing_activations_gives_the_same_states_and_leaves_checkpointing_on(toy_text_encoder):
    toy_text_encoder.model.train()
    toy_text_encoder.enable_gradient_checkpointing()
    ids = toy_text_encoder.tokenize_trimmed(["a photo of a dog"])
    runs = []
    layer = toy_text_encoder.body.encoder.layers[0]
    layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
    for encode, num_forwards in (
        (toy_text_encoder.encode_storing, 1),
        (toy_text_encoder.encode, 2),
    ):
        runs.clear()
        states = encode(ids)
        states.sum().backward()
        assert len(runs) == num_forwards  # checkpointing computes the layer once more
    torch.testing.assert_close(toy_text_encoder.encode_storing(ids), toy_text_encoder.encode(ids))


# --- pooled states ---------------------------------------------------------------------------


@pytest.fixture(params=["eos id", "highest id"])
def pooling_encoder(request, toy_sdxl_folder):
    """SDXL's second encoder, with both ways in which the library finds the end token."""
    _, text_encoder = load_stable_diffusion(toy_sdxl_folder).text_encoders
    text_encoder.tokenizer = second_tokenizer(text_encoder.tokenizer)
    if request.param == "highest id":  # in old configurations, including SDXL's own
        text_encoder.body.eos_token_id = 2
    return text_encoder


@torch.no_grad()
def test_the_pooled_state_is_the_librarys_projected_end(pooling_encoder):
    ids = pooling_encoder.tokenize(["a photo of a dog", "a"])[:, 0]
    states, pooled = pooling_encoder.encode_pooled(ids)
    torch.testing.assert_close(pooled, pooling_encoder.model(ids).text_embeds)
    torch.testing.assert_close(states, pooling_encoder.encode(ids))


@torch.no_grad()
def test_learned_tokens_do_not_move_the_pooled_state(pooling_encoder):
    """An embedding with the values of a word gives its pooled state, though its id is higher."""
    table = pooling_encoder.token_embedding.weight
    (dog,) = pooling_encoder.tokenizer("dog", add_special_tokens=False).input_ids
    captions = ["a photo of a dog!", "dog"]
    expected = pooling_encoder.encode_captions_pooled(captions)
    learned = LearnedTokens(pooling_encoder, {"sks": table[None, None, dog]})
    found = pooling_encoder.encode_captions_pooled([c.replace("dog", "sks") for c in captions])
    torch.testing.assert_close(found.pooled, expected.pooled)
    torch.testing.assert_close(found.states, expected.states)
    learned.remove()
