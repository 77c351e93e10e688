"""Text encoders of diffusion transformers, on small random models of the real classes."""

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from mlm_plugin.models.language_model import (
    AdaptedEncoder,
    LanguageModelEncoder,
    T5Encoder,
    is_causal_language_model,
)

SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}
PROMPTS = ["a photo of sks girl on the beach", "sks girl, blue_eyes"]


@pytest.fixture(scope="module")
def qwen():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()


@pytest.fixture(scope="module")
def gemma():
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, sliding_window=4, final_logit_softcapping=3.0)
    return Gemma2ForCausalLM(config).eval()


def test_a_language_model_is_told_from_t5(qwen, gemma):
    t5 = T5EncoderModel(T5Config(vocab_size=64, d_model=16, d_ff=16, d_kv=4, num_layers=1))
    assert is_causal_language_model(qwen.model)
    assert is_causal_language_model(gemma.model)
    assert not is_causal_language_model(t5)


def test_states_are_those_that_the_host_computes_for_padded_prompts(qwen, byte_tokenizer):
    encoder = LanguageModelEncoder(byte_tokenizer, qwen.model)
    ids_BL = encoder.tokenize_trimmed(PROMPTS)
    padded = byte_tokenizer(PROMPTS, padding="max_length", max_length=64, return_tensors="pt")
    with torch.no_grad():
        wanted = qwen.model(**padded).last_hidden_state
        found = encoder.encode(ids_BL)
    is_token = ids_BL != byte_tokenizer.pad_token_id
    torch.testing.assert_close(found[is_token], wanted[:, : ids_BL.shape[1]][is_token])


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_the_head_predicts_what_the_whole_language_model_predicts(gemma, byte_tokenizer, skip):
    """Whatever layers the image model skips; Gemma bounds its logits and has sliding windows."""
    encoder = LanguageModelEncoder(byte_tokenizer, gemma.model, skip=skip)
    ids_BL = encoder.tokenize_trimmed(PROMPTS[:1])
    with torch.no_grad():
        wanted = gemma(input_ids=ids_BL).logits[0]
        states = encoder.encode(ids_BL)
        head = encoder.next_word_head()
        found = head.logits(head.features(states, None, torch.arange(ids_BL.shape[1])))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_training_a_skipped_layer_does_not_help_the_reader(gemma, byte_tokenizer):
    encoder = LanguageModelEncoder(byte_tokenizer, gemma.model, skip=1)
    head = encoder.next_word_head()
    states = torch.randn(1, 5, 32)
    before = head.tail(states)
    with torch.no_grad():
        gemma.model.layers[-1].mlp.down_proj.weight.mul_(2)
    torch.testing.assert_close(head.tail(states), before, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in head.tail.parameters())


def test_the_prefix_of_the_host_comes_before_every_prompt(qwen, byte_tokenizer):
    encoder = LanguageModelEncoder(byte_tokenizer, qwen.model, prefix="You draw. <Prompt Start> ")
    first = encoder.tokenize_trimmed(["a dog"])[0].tolist()
    assert byte_tokenizer.decode(first) == "You draw. <Prompt Start> a dog"


def test_t5_does_not_attend_to_padding(t5_tokenizer):
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=64, d_model=16, d_ff=16, d_kv=4, num_layers=2))
    encoder = T5Encoder(t5_tokenizer, model.eval())
    alone = encoder.encode(encoder.tokenize_trimmed(["sks"]))
    together = encoder.encode(encoder.tokenize_trimmed(["sks", "a much longer prompt"]))
    torch.testing.assert_close(together[0, : alone.shape[1]], alone[0])


class Adapter(nn.Module):
    """The signature of Anima's ``llm_adapter``: T5's tokens look at the states."""

    def __init__(self, width=32):
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, states, ids, target_attention_mask=None, source_attention_mask=None):
        scores = self.embed(ids) @ states.transpose(1, 2)
        scores = scores.masked_fill(~source_attention_mask[:, None], -torch.inf)
        return self.norm(self.embed(ids) + scores.softmax(-1) @ states)


@pytest.fixture
def adapted(qwen, byte_tokenizer, t5_tokenizer):
    torch.manual_seed(0)
    source = LanguageModelEncoder(byte_tokenizer, qwen.model)
    adapter = Adapter()
    return lambda keep: AdaptedEncoder(source, adapter, t5_tokenizer, keep_states=keep)


def test_adapted_states_are_the_same_with_kept_states_and_for_any_padding(adapted):
    fresh, kept = adapted(False), adapted(True)
    ids_BL = fresh.tokenize_trimmed(PROMPTS)
    torch.testing.assert_close(kept.tokenize_trimmed(PROMPTS), ids_BL)
    wanted = fresh.encode(ids_BL)
    torch.testing.assert_close(kept.encode(ids_BL), wanted)
    one = fresh.tokenize_trimmed(PROMPTS[1:])
    torch.testing.assert_close(fresh.encode(one)[0], wanted[1, : one.shape[1]])


def test_with_kept_states_the_language_model_is_run_once_for_a_prompt(adapted, monkeypatch):
    kept = adapted(True)
    calls = []
    encode = kept.source.encode
    monkeypatch.setattr(kept.source, "encode", lambda ids: calls.append(len(ids)) or encode(ids))
    ids_BL = kept.tokenize_trimmed(PROMPTS)
    kept.encode(ids_BL)
    kept.encode(ids_BL[1:])
    assert calls == [2]


def test_the_gradient_reaches_the_language_model_through_the_adapter(adapted):
    fresh = adapted(False)
    weight = fresh.source.model.layers[0].mlp.down_proj.weight
    fresh.encode(fresh.tokenize_trimmed(PROMPTS)).square().sum().backward()
    assert weight.grad.abs().sum() > 0
    weight.grad = None
    fresh.source.model.zero_grad()


def test_tokenizers_are_those_of_the_fixtures(byte_tokenizer):
    assert isinstance(byte_tokenizer, PreTrainedTokenizerFast)
    assert byte_tokenizer.eos_token_id not in byte_tokenizer("a").input_ids


def test_the_dropout_of_t5_is_not_taken_for_a_change(t5_tokenizer):
    """It is in training mode where the host checkpoints its gradients."""
    sizes = {"vocab_size": 64, "d_model": 16, "d_ff": 16, "d_kv": 4, "num_layers": 2}
    model = T5EncoderModel(T5Config(**sizes, dropout_rate=0.5)).train()
    model.encoder.block[0].eval()
    encoder = T5Encoder(t5_tokenizer, model)
    ids_BL = encoder.tokenize_trimmed(PROMPTS)
    modes = [module.training for module in model.modules()]
    states = encoder.encode_storing(ids_BL)
    assert states.requires_grad
    assert modes == [module.training for module in model.modules()]
    torch.testing.assert_close(states, T5Encoder(t5_tokenizer, model.eval()).encode(ids_BL))
