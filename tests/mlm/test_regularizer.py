"""Where the gradient goes, that the host is left alone, and when the term acts."""

import random

import pytest
import torch

from mlm_plugin.mlm.contextualizer import Contextualizer, ContextualizerSizes
from mlm_plugin.mlm.encoder import EncoderHandle, Variants, mask_embedding
from mlm_plugin.mlm.losses import masked_word_loss
from mlm_plugin.mlm.masking import (
    IGNORE_INDEX,
    MASK_ID,
    MaskingVocabulary,
    prompt_attention_mask,
)
from mlm_plugin.mlm.regularizer import MLMRegularizer, MLMSchedule
from mlm_plugin.mlm.teacher import MaskSettings

PROMPTS = [
    "a photo of sks dog on the beach",
    "sks dog wearing a red hat in the rain",
    "an oil painting of sks dog next to a chair",
]


def make_handle(text_encoder, **changes):
    table = text_encoder.token_embedding.weight.detach()
    contextualizer = Contextualizer(
        ContextualizerSizes(hidden_size=32, vocab_size=len(table), width=64, num_layers=2)
    )
    contextualizer.start_from(table, torch.ones(len(table)))
    parts = {
        "tokenize": text_encoder.tokenize_trimmed,
        "encode": text_encoder.encode,
        "embedding": text_encoder.token_embedding,
        "contextualizer": contextualizer,
        "vocabulary": MaskingVocabulary.from_tokenizer(
            text_encoder.tokenizer, protected=["sks", "dog"], low_priority=["a", "of", "the"]
        ),
        "pad_token_id": text_encoder.tokenizer.pad_token_id,
        "device": torch.device("cpu"),
        "token_table": table,
    }
    return EncoderHandle(**parts | changes)


def make_regularizer(*encoders, mlm_probability=0.3, **settings):
    masks = MaskSettings(mlm_probability, "mask")
    settings = {"batch_size": 4, "masks": masks, "seed": 0} | settings
    return MLMRegularizer(encoders, lambda rng: rng.choice(PROMPTS), **settings)


def test_one_call_gives_a_finite_loss_and_a_share_of_words(toy_text_encoder):
    output = make_regularizer(make_handle(toy_text_encoder))(0)
    assert output.loss.ndim == 0
    assert output.loss.dtype == torch.float32
    assert torch.isfinite(output.loss)
    assert 0 <= output.parts["accuracy"] <= 1


def test_the_gradient_reaches_the_text_encoder_and_never_the_contextualizer(toy_text_encoder):
    encoder = make_handle(toy_text_encoder)
    make_regularizer(encoder)(0).loss.backward()
    for name, parameter in toy_text_encoder.model.named_parameters():
        assert parameter.grad is not None, name
    assert all(p.grad is None for p in encoder.contextualizer.parameters())
    assert not encoder.contextualizer.training


@pytest.mark.parametrize("side", ["before", "after"])
def test_the_gradient_reaches_the_concept_for_masks_on_either_side(toy_text_encoder, side):
    """CLIP is causal: without a bidirectional head, words before it would teach nothing."""
    encoder = make_handle(toy_text_encoder)
    ids_BL = toy_text_encoder.tokenize_trimmed(["a painting of sks dog on a beach"])
    words = encoder.vocabulary.split_words(ids_BL[0].tolist())
    start, end = words[1] if side == "before" else words[-1]
    labels = torch.full_like(ids_BL, IGNORE_INDEX)
    labels[0, start:end] = ids_BL[0, start:end]
    masked = ids_BL.clone()
    masked[0, start:end] = MASK_ID
    with mask_embedding(encoder.embedding, encoder.contextualizer.mask_vector):
        hidden = encoder.encode(masked)
    loss = masked_word_loss(
        encoder.contextualizer,
        hidden,
        labels_BL=labels,
        attention_mask_BL=torch.ones_like(ids_BL).bool(),
        token_table_VD=encoder.token_table,
    ).loss
    loss.backward()
    concept = toy_text_encoder.tokenizer("sks", add_special_tokens=False).input_ids
    grad = encoder.embedding.weight.grad[concept]
    assert (grad.abs().sum(dim=1) > 0).all()


def test_the_hosts_random_streams_are_unchanged(toy_text_encoder):
    regularizer = make_regularizer(make_handle(toy_text_encoder))
    torch.manual_seed(3)
    random.seed(3)
    expected = (torch.rand(4), random.random())
    torch.manual_seed(3)
    random.seed(3)
    regularizer(0)
    assert torch.equal(torch.rand(4), expected[0])
    assert random.random() == expected[1]


def test_a_call_is_named_by_seed_and_number_alone(toy_text_encoder):
    encoder = make_handle(toy_text_encoder)
    straight = [make_regularizer(encoder)(call).loss for call in range(3)]
    resumed = make_regularizer(encoder)(2).loss
    assert torch.equal(resumed, straight[2])
    assert not torch.equal(straight[0], straight[1])
    assert not torch.equal(make_regularizer(encoder, seed=1)(0).loss, straight[0])


def test_several_text_encoders_see_the_same_prompts_and_their_losses_are_averaged(
    toy_text_encoder,
):
    seen = []

    def tokenize(prompts):
        seen.append(list(prompts))
        return toy_text_encoder.tokenize_trimmed(prompts)

    encoder = make_handle(toy_text_encoder, tokenize=tokenize)
    single = make_regularizer(encoder)(0)
    double = make_regularizer(encoder, encoder)(0)
    assert seen[1] == seen[2] == seen[0]
    torch.testing.assert_close(double.loss, single.loss)
    assert list(double.parts) == ["accuracy", "te1", "te2"]


def test_variants_of_prompts_are_drawn_from_the_stream_of_the_call(toy_text_encoder):
    draws = []

    def vary(ids_BL, rng):
        draws.append(rng.random())
        return Variants(ids_BL)

    regularizer = make_regularizer(make_handle(toy_text_encoder, vary=vary))
    for call in (0, 1, 1):
        regularizer(call)
    assert draws[0] != draws[1] == draws[2]
    make_regularizer(make_handle(toy_text_encoder, vary=vary), seed=1)(1)
    assert draws[3] != draws[1]


def test_a_prompt_may_have_several_variants(toy_text_encoder):
    """As in XTI, with the embeddings of every layer in turn."""

    def twice(ids_BL, _rng):
        return Variants(ids_BL.repeat(2, 1))

    encoded = []

    def encode(ids_BL):
        encoded.append(len(ids_BL))
        return toy_text_encoder.encode(ids_BL)

    double = make_regularizer(make_handle(toy_text_encoder, vary=twice, encode=encode))(0)
    assert torch.isfinite(double.loss)
    assert encoded == [2 * 4]


def test_prompts_without_context_give_zero_and_not_nan(toy_text_encoder):
    regularizer = make_regularizer(make_handle(toy_text_encoder), batch_size=2)
    regularizer.sample_prompt = lambda rng: "sks dog"
    output = regularizer(0)
    output.loss.backward()
    assert output.loss == 0
    assert output.parts["accuracy"] == 0


def test_a_handle_refuses_a_contextualizer_without_mask_vector(toy_text_encoder):
    table = toy_text_encoder.token_embedding.weight.detach()
    fresh = Contextualizer(ContextualizerSizes(hidden_size=32, vocab_size=len(table)))
    with pytest.raises(ValueError, match="never trained"):
        make_handle(toy_text_encoder, contextualizer=fresh)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (MLMSchedule(0.5), [0.5] * 6),
        (MLMSchedule(0.5, every_n_steps=3), [1.5, 0, 0, 1.5, 0, 0]),
        (MLMSchedule(0.5, start_step=2, end_step=4), [0, 0, 0.5, 0.5, 0, 0]),
        (MLMSchedule(0.5, every_n_steps=2, start_step=1), [0, 1.0, 0, 1.0, 0, 1.0]),
        (MLMSchedule(0.0), [0] * 6),
    ],
)
def test_the_schedule_keeps_the_expected_weight(schedule, expected):
    assert [schedule.weight_at(step) for step in range(6)] == expected


def test_text_encoders_with_unlike_padding_mask_the_same_words(toy_text_encoder):
    """SDXL pads its second encoder's prompts with another token than its first encoder's."""
    seen = []

    def handle(pad_id):
        def tokenize(prompts):
            ids_BL = toy_text_encoder.tokenize_trimmed(prompts)
            eos = toy_text_encoder.tokenizer.eos_token_id
            is_padding = ~prompt_attention_mask(ids_BL, eos)
            return ids_BL.masked_fill(is_padding, pad_id)

        def encode(ids_BL):
            seen.append(ids_BL == MASK_ID)
            return toy_text_encoder.encode(ids_BL.clamp(min=0))

        return make_handle(toy_text_encoder, tokenize=tokenize, encode=encode)

    eos = toy_text_encoder.tokenizer.eos_token_id
    regularizer = make_regularizer(handle(eos), handle(0), mlm_probability=0.5)
    for call in range(5):
        regularizer(call)
    assert all(torch.equal(*seen[i : i + 2]) for i in range(0, 10, 2))
    assert not torch.equal(seen[0], seen[2])
