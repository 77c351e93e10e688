"""The contextualizer: parity of its loss, attention both ways, its file, its refusals."""

import dataclasses

import pytest
import torch

from mlm_plugin.contextualizer_file import (
    ContextualizerFacts,
    load_contextualizer,
    save_contextualizer,
)
from mlm_plugin.errors import UserError
from mlm_plugin.mlm.contextualizer import Contextualizer, ContextualizerSizes
from mlm_plugin.mlm.encoder import mask_embedding
from mlm_plugin.mlm.losses import masked_word_loss
from mlm_plugin.mlm.masking import IGNORE_INDEX, MASK_ID, prompt_attention_mask

SIZES = ContextualizerSizes(hidden_size=32, vocab_size=50, width=64, num_layers=2)


@pytest.fixture
def network():
    network = Contextualizer(SIZES)
    network.start_from(torch.randn(50, 32), torch.ones(50))
    return network


@pytest.fixture
def batch():
    labels = torch.full((3, 9), IGNORE_INDEX)
    labels[0, 2], labels[1, 4], labels[1, 5] = 7, 11, 30
    is_token = torch.arange(9) < torch.tensor([[9], [7], [5]])
    return torch.randn(3, 9, 32), labels, is_token


def facts_of(model, **changes):
    facts = ContextualizerFacts(
        text_encoder=model.fingerprint(),
        tokenizer=model.tokenizer_fingerprint(),
        num_steps=3,
        accuracy=0.5,
        loss=1.5,
    )
    return dataclasses.replace(facts, **changes)


def test_the_loss_at_labelled_positions_equals_transformers_masked_lm_loss(network, batch):
    """BERT computes all positions and lets cross-entropy ignore most; ours gathers them first."""
    from transformers import BertConfig, BertForMaskedLM

    hidden, labels, is_token = batch
    table = torch.randn(50, 32)
    everywhere = torch.arange(is_token.numel())
    logits_BLV = network(hidden, is_token, everywhere, table).unflatten(0, is_token.shape)

    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32,
        )
    )  # fmt: skip
    bert.cls.forward = lambda _states: logits_BLV
    reference = bert(input_ids=torch.zeros_like(labels), labels=labels).loss

    result = masked_word_loss(
        network, hidden, labels_BL=labels, attention_mask_BL=is_token, token_table_VD=table
    )
    torch.testing.assert_close(result.loss, reference)
    assert result.num_masked == 3
    predicted = logits_BLV[labels != IGNORE_INDEX].argmax(-1)
    assert result.num_correct == (predicted == labels[labels != IGNORE_INDEX]).sum()


def test_without_labels_the_loss_is_a_zero_with_a_graph(network, batch):
    hidden, labels, is_token = batch
    hidden.requires_grad_(True)
    result = masked_word_loss(
        network,
        hidden,
        labels_BL=torch.full_like(labels, IGNORE_INDEX),
        attention_mask_BL=is_token,
        token_table_VD=torch.randn(50, 32),
    )
    result.loss.backward()
    assert result.loss == 0
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_padding_does_not_change_the_logits(network, batch):
    hidden, labels, is_token = batch
    table = torch.randn(50, 32)
    disturbed = torch.where(is_token[..., None], hidden, torch.randn_like(hidden) * 100)
    a, b = (
        masked_word_loss(
            network, states, labels_BL=labels, attention_mask_BL=is_token, token_table_VD=table
        ).loss
        for states in (hidden, disturbed)
    )
    torch.testing.assert_close(a, b)


def test_attention_goes_both_ways(network, batch):
    hidden, labels, is_token = batch
    hidden.requires_grad_(True)
    masked_word_loss(
        network,
        hidden,
        labels_BL=labels,
        attention_mask_BL=is_token,
        token_table_VD=torch.randn(50, 32),
    ).loss.backward()
    assert (hidden.grad[0, 0] != 0).any()  # before the masked word at 2
    assert (hidden.grad[0, 8] != 0).any()  # and after it
    assert (hidden.grad[2] == 0).all()  # a prompt without labels


def test_the_loss_is_fp32_in_half_precision(network, batch):
    hidden, labels, is_token = batch
    table = torch.randn(50, 32)
    full = masked_word_loss(
        network, hidden, labels_BL=labels, attention_mask_BL=is_token, token_table_VD=table
    )
    half = masked_word_loss(
        network.bfloat16(),
        hidden.bfloat16(),
        labels_BL=labels,
        attention_mask_BL=is_token,
        token_table_VD=table,
    )
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, full.loss, rtol=0.05, atol=0.05)


def test_a_fresh_network_cannot_be_used_or_saved(toy_text_encoder, tmp_path):
    fresh = Contextualizer(SIZES)
    with pytest.raises(UserError, match="never trained"):
        fresh.require_trained()
    with pytest.raises(UserError, match="never trained"):
        save_contextualizer(tmp_path / "c.safetensors", fresh, facts_of(toy_text_encoder))
    assert not (tmp_path / "c.safetensors").exists()


def test_a_file_brings_everything_back_frozen_and_leaves_the_random_stream_alone(
    network, toy_text_encoder, tmp_path
):
    path = tmp_path / "c.safetensors"
    save_contextualizer(path, network, facts_of(toy_text_encoder))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    loaded, facts = load_contextualizer(path, toy_text_encoder)
    assert torch.equal(torch.rand(3), expected)
    assert facts == facts_of(toy_text_encoder)
    assert loaded.sizes == SIZES
    assert not loaded.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("field", ["text_encoder", "tokenizer"])
def test_a_file_for_another_model_is_refused_with_both_fingerprints(
    network, toy_text_encoder, tmp_path, field
):
    path = tmp_path / "c.safetensors"
    save_contextualizer(path, network, facts_of(toy_text_encoder, **{field: "0123abcd"}))
    present = {
        "text_encoder": toy_text_encoder.fingerprint(),
        "tokenizer": toy_text_encoder.tokenizer_fingerprint(),
    }[field]
    with pytest.raises(UserError, match=f"0123abcd.*{present}"):
        load_contextualizer(path, toy_text_encoder)


def test_files_that_are_no_contextualizer_are_refused_by_name(toy_text_encoder, tmp_path):
    from safetensors.torch import save_file

    other = tmp_path / "lora.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a file")
    for path in (other, broken, tmp_path / "absent.safetensors"):
        with pytest.raises(UserError, match=path.name):
            load_contextualizer(path, toy_text_encoder)


@torch.no_grad()
def test_the_hook_puts_the_vector_at_mask_positions_and_nowhere_else():
    embedding = torch.nn.Embedding(10, 4)
    vector = torch.full((4,), 7.0)
    ids = torch.tensor([[1, MASK_ID, 3], [MASK_ID, 5, 6]])
    with mask_embedding(embedding, vector):
        vectors = embedding(ids)
        assert torch.equal(embedding(torch.tensor([[2]])), embedding.weight[2][None, None])
    assert torch.equal(vectors[ids == MASK_ID], vector.expand(2, 4))
    assert torch.equal(vectors[ids != MASK_ID], embedding.weight[ids[ids != MASK_ID]])
    with pytest.raises(IndexError):
        embedding(ids)  # the hook is gone


def test_the_hook_is_removed_when_the_block_fails():
    embedding = torch.nn.Embedding(10, 4)
    with pytest.raises(RuntimeError, match="boom"), mask_embedding(embedding, torch.zeros(4)):
        raise RuntimeError("boom")
    assert not embedding._forward_hooks
    assert not embedding._forward_pre_hooks


def test_padding_begins_behind_the_first_eos():
    ids = torch.tensor([[1, 5, 9, 9, 9], [1, 5, 6, 9, 0]])
    expected = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    assert torch.equal(prompt_attention_mask(ids, 9), expected)
