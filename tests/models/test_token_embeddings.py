"""Learned tokens: expanded captions, embeddings through the hook, and what is unchanged."""

import pytest
import torch

from mlm_plugin.errors import UserError
from mlm_plugin.mlm.encoder import mask_embedding
from mlm_plugin.mlm.masking import MASK_ID
from mlm_plugin.models.token_embeddings import LearnedTokens, initial_embeddings


@pytest.fixture
def text_encoder(toy_text_encoder):
    toy_text_encoder.model.requires_grad_(False)
    return toy_text_encoder


def start_at(text_encoder, word, *, num_vectors=1, num_variants=1):
    vectors = initial_embeddings(text_encoder, word, num_vectors=num_vectors)
    return vectors.expand(num_variants, *vectors.shape)


def holds_learned(text_encoder, ids):
    return (ids >= text_encoder.model.config.vocab_size).any(dim=-1)


def states(text_encoder, caption):
    return text_encoder.encode_captions([caption])


def test_embeddings_that_start_as_a_word_read_like_that_word(text_encoder):
    expected = states(text_encoder, "a photo of a dog on the beach")
    LearnedTokens(text_encoder, {"sks": start_at(text_encoder, "dog")})
    assert torch.equal(states(text_encoder, "a photo of a sks on the beach"), expected)


def test_a_placeholder_is_read_as_a_whole_word_in_any_case(text_encoder):
    plain = text_encoder.tokenize_trimmed(["tasks, sksx"])
    LearnedTokens(text_encoder, {"sks": start_at(text_encoder, "dog")})
    ids = text_encoder.tokenize_trimmed(["a sks", "a SKS", "sks's", "a (sks), sks."])
    counts = [(row >= text_encoder.model.config.vocab_size).sum().item() for row in ids]
    assert counts == [1, 1, 1, 2]
    assert torch.equal(text_encoder.tokenize_trimmed(["tasks, sksx"]), plain)
    assert holds_learned(text_encoder, ids).all()
    assert not holds_learned(text_encoder, plain).any()


@pytest.mark.parametrize("name", ["<my-dog>", "my pet", "sks*", "ßa"])
def test_placeholders_may_hold_spaces_and_signs(text_encoder, name):
    LearnedTokens(text_encoder, {name: start_at(text_encoder, "dog", num_vectors=3)})
    ids = text_encoder.tokenize_trimmed([f"a photo of {name} dog"])
    assert holds_learned(text_encoder, ids).all()
    assert text_encoder.count_tokens(f"a photo of {name} dog") == 3 + 3 + 1


def test_several_vectors_stand_in_a_row_and_each_gets_a_gradient(text_encoder):
    tokens = LearnedTokens(text_encoder, {"sks": start_at(text_encoder, "dog", num_vectors=3)})
    states(text_encoder, "a photo of sks dog").square().sum().backward()
    gradient = tokens.embeddings["sks"].grad
    assert gradient.shape == (1, 3, 32)
    assert (gradient != 0).any(dim=-1).all()


def test_only_the_embeddings_are_parameters(text_encoder):
    tokens = LearnedTokens(text_encoder, {"sks": start_at(text_encoder, "dog")})
    assert [p.numel() for p in tokens.parameters()] == [32]
    assert text_encoder.token_embedding.num_embeddings == text_encoder.model.config.vocab_size


def test_the_longest_of_overlapping_placeholders_wins(text_encoder):
    names = {
        "sks": start_at(text_encoder, "dog"),
        "sks two": start_at(text_encoder, "cat"),
    }
    tokens = LearnedTokens(text_encoder, names)
    states(text_encoder, "a photo of sks two").sum().backward()
    assert tokens.embeddings["sks"].grad is None or not tokens.embeddings["sks"].grad.any()
    assert tokens.embeddings["sks two"].grad.any()


@pytest.mark.parametrize("written", ["kızım", "KİZİM", "ſkiz"])
def test_letters_that_match_only_without_case_do_no_harm(text_encoder, written):
    LearnedTokens(text_encoder, {"kizim": start_at(text_encoder, "dog")})
    text_encoder.tokenize_trimmed([f"a {written} dog"])


def test_variants_stand_apart_and_leave_other_words_alone(text_encoder):
    shapes = {"sks": (4, 2), "zwx": (4, 1)}
    table = {name: torch.randn(*shape, 32) for name, shape in shapes.items()}
    tokens = LearnedTokens(text_encoder, table)
    ids = text_encoder.tokenize_trimmed(["a sks near a zwx"])
    read = text_encoder.token_embedding
    is_row = ids >= text_encoder.model.config.vocab_size
    for k in range(4):
        variant = tokens.variant(ids, k)
        expected = torch.cat([table["sks"][k], table["zwx"][k]])
        assert torch.equal(read(variant)[is_row], expected)
        assert torch.equal(variant[~is_row], ids[~is_row])
    mixed = tokens.variant(ids.expand(4, -1), torch.arange(4)[:, None])
    assert torch.equal(mixed, torch.cat([tokens.variant(ids, k) for k in range(4)]))


def test_mask_and_learned_tokens_share_the_embedding(text_encoder):
    LearnedTokens(text_encoder, {"sks": start_at(text_encoder, "dog")})
    ids = text_encoder.tokenize_trimmed(["a sks dog"])
    before = text_encoder.token_embedding(ids)
    masked = ids.clone()
    masked[0, 1] = MASK_ID
    vector = torch.randn(32)
    with mask_embedding(text_encoder.token_embedding, vector):
        after = text_encoder.token_embedding(masked)
    assert torch.equal(after[0, 1], vector)
    assert torch.equal(after[0, 2:], before[0, 2:])


def test_the_encoder_is_as_before_once_the_tokens_are_removed(text_encoder):
    caption, tokenizer = "a photo of sks dog", text_encoder.tokenizer
    before = states(text_encoder, caption)
    tokens = LearnedTokens(text_encoder, {"sks": torch.randn(1, 2, 32)})
    assert not torch.equal(states(text_encoder, caption), before)
    tokens.remove()
    assert text_encoder.tokenizer is tokenizer
    assert torch.equal(states(text_encoder, caption), before)
    assert len(tokenizer) == text_encoder.model.config.vocab_size


def test_fingerprints_do_not_depend_on_the_learned_tokens(text_encoder):
    before = text_encoder.fingerprint(), text_encoder.tokenizer_fingerprint()
    LearnedTokens(text_encoder, {"sks": torch.randn(1, 2, 32)})
    assert (text_encoder.fingerprint(), text_encoder.tokenizer_fingerprint()) == before


def test_learned_tokens_work_in_half_precision_with_fp32_parameters(text_encoder):
    text_encoder.model.to(torch.bfloat16)
    tokens = LearnedTokens(text_encoder, {"sks": start_at(text_encoder, "dog")})
    output = states(text_encoder, "a sks")
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert tokens.embeddings["sks"].dtype == tokens.embeddings["sks"].grad.dtype == torch.float32


def test_vectors_start_at_the_tokens_of_the_word_in_turn(text_encoder):
    table = text_encoder.token_embedding.weight
    ids = text_encoder.tokenizer("dog house", add_special_tokens=False).input_ids
    assert len(ids) > 1
    vectors = initial_embeddings(text_encoder, "dog house", num_vectors=len(ids) + 1)
    assert torch.equal(vectors, table[[*ids, ids[0]]])
    last = initial_embeddings(text_encoder, "dog house", num_vectors=1)
    assert torch.equal(last, table[[ids[-1]]])
    assert torch.equal(initial_embeddings(text_encoder, "id:7", num_vectors=2), table[[7, 7]])


@pytest.mark.parametrize(
    ("word", "message"),
    [("id:99999", "id:0 to"), ("id:abc", "id:0 to"), ("id:-1", "id:0 to"), ("", "no tokens")],
)
def test_a_start_that_is_not_there_is_refused(text_encoder, word, message):
    with pytest.raises(UserError, match=message):
        initial_embeddings(text_encoder, word, num_vectors=1)
