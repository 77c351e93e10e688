"""The term of a text encoder that is a language model: it reads itself."""

import pytest
import torch
from accelerate import Accelerator
from transformers import Qwen3Config, Qwen3ForCausalLM

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import MLMOptions
from mlm_plugin.mlm.losses import divergence
from mlm_plugin.mlm.masking import IGNORE_INDEX, MaskingVocabulary
from mlm_plugin.mlm.next_word import CHUNK_SIZE, NextWordHead
from mlm_plugin.mlm_setup import MLMSetup
from mlm_plugin.models.language_model import LanguageModelEncoder

DEVICE = torch.device("cpu")


@pytest.fixture
def language_model():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def prepared(language_model, byte_tokenizer):
    """A set-up of the term with its targets, computed on the untrained model."""

    def prepared(target="class", num_targets=40):
        options = MLMOptions(mlm_target=target, mlm_batch_size=6, mlm_prompt_set="person")
        setup = MLMSetup(options, seed=3, num_targets=num_targets)
        setup.use_concepts([Concept("sks", "girl")])
        encoder = LanguageModelEncoder(byte_tokenizer, language_model.model)
        setup.prepare([encoder], Accelerator(cpu=True))
        setup.compute_targets(DEVICE, dtype=torch.float32)
        return setup

    return prepared


def attached(setup):
    return setup.attach(rank=0, dtype=torch.float32, device=DEVICE)


def test_some_tokens_at_a_time_give_the_divergence_of_all_and_its_gradient():
    torch.manual_seed(0)
    table = torch.randn(300, 16)
    head = NextWordHead(lambda: table)
    states, teacher = torch.randn(2, 2 * CHUNK_SIZE + 5, 16).unbind()
    states.requires_grad_()
    found = head.divergence(states, teacher)
    wanted = divergence(states @ table.T, teacher @ table.T)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(one.sum(), states)[0] for one in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_no_token_at_all_gives_a_loss_that_is_still_part_of_the_graph():
    states = torch.zeros(0, 16, requires_grad=True)
    head = NextWordHead(lambda: torch.randn(300, 16))
    head.divergence(states, torch.zeros(0, 16)).sum().backward()
    assert states.grad.shape == (0, 16)


def test_the_term_is_zero_before_training_and_grows_as_the_model_is_pushed_away(
    prepared, language_model
):
    regularizer = attached(prepared())
    losses = [regularizer(0).loss.item()]
    weight = language_model.model.layers[0].mlp.down_proj.weight
    push = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        weight += 0.05 * push
        losses.append(regularizer(0).loss.item())
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses == sorted(losses)
    assert losses[1] > 0


def test_training_brings_the_term_down_and_changes_nothing_but_what_is_trained(
    prepared, language_model
):
    regularizer = attached(prepared())
    before = {name: value.clone() for name, value in language_model.named_parameters()}
    linear = language_model.model.layers[0].mlp.down_proj
    original = linear.forward
    generator = torch.Generator().manual_seed(1)
    change = 0.3 * torch.randn(linear.weight.shape, generator=generator)
    change.requires_grad_()
    linear.forward = lambda x: original(x) + x @ change.T
    optimizer = torch.optim.Adam([change], lr=1e-2)
    losses = []
    for call in range(40):
        loss = regularizer(call).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    after = dict(language_model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.grad is not None for parameter in after.values())


def test_the_loss_is_what_the_whole_language_model_says(prepared, language_model):
    """KL over the next word after the concept, beyond that before training."""
    setup = prepared(num_targets=1)
    (target,) = setup.encoders[0].targets
    before = language_model(torch.tensor([target.ids])).logits[0]
    language_model.model.layers[0].mlp.down_proj.weight.mul_(3)
    after = language_model(torch.tensor([target.ids])).logits[0]
    language_model.model.layers[0].mlp.down_proj.weight.div_(3)
    places = [i for i, label in enumerate(target.labels) if label != IGNORE_INDEX]
    teacher = target.teacher_ND @ language_model.lm_head.weight.T
    start = divergence(before[places], teacher)
    torch.testing.assert_close(target.starts[0], start, atol=1e-5, rtol=1e-4)
    wanted = (divergence(after[places], teacher) - start).relu().mean()
    regularizer = attached(setup)
    language_model.model.layers[0].mlp.down_proj.weight.mul_(3)
    torch.testing.assert_close(regularizer(0).loss, wanted, atol=1e-5, rtol=1e-4)


def test_only_words_after_the_concept_are_compared(prepared, byte_tokenizer):
    vocabulary = MaskingVocabulary.from_tokenizer(
        byte_tokenizer, protected=["sks", "girl"], low_priority=[]
    )
    compared = 0
    for target in prepared().encoders[0].targets:
        text = byte_tokenizer.decode(target.ids, skip_special_tokens=True)
        concept_end = len(byte_tokenizer(text[: text.index("sks girl") + 8]).input_ids)
        places = [i for i, label in enumerate(target.labels) if label != IGNORE_INDEX]
        assert all(place >= concept_end for place in places), text
        compared += len(places)
        spans = vocabulary.words_after(target.ids)
        assert places == [i for start, end in spans for i in range(start, end)]
    assert compared > 40


def test_the_gradient_enters_at_words_after_the_concept_and_reaches_the_concept(
    prepared, language_model
):
    setup = prepared()
    regularizer = attached(setup)
    language_model.model.layers[0].mlp.down_proj.weight.mul_(3)
    states, inputs, ids = [], [], []

    def keep(_module, args, output):
        ids.append(args[0])
        inputs.append(output.detach().requires_grad_())
        return inputs[-1]

    def retain(_module, _args, output):
        output.retain_grad()
        states.append(output)

    handles = [
        language_model.model.embed_tokens.register_forward_hook(keep),
        language_model.model.norm.register_forward_hook(retain),
    ]
    regularizer(1).loss.backward()
    for handle in handles:
        handle.remove()
    vocabulary = regularizer.encoders[0].vocabulary
    for row, ids_L in enumerate(ids[0].tolist()):
        behind = {i for start, end in vocabulary.words_after(ids_L) for i in range(start, end)}
        entered = states[0].grad[row].abs().sum(dim=-1).nonzero().flatten().tolist()
        assert behind.issuperset(entered)
        if entered:
            first = min(start for start, _ in _concept_spans(vocabulary, ids_L))
            assert inputs[0].grad[row, first].abs().sum() > 0
    assert states[0].grad.abs().sum() > 0


def _concept_spans(vocabulary, ids):
    spans = vocabulary.split_words(ids)
    return [span for span in spans if tuple(ids[slice(*span)]) in vocabulary.protected]


def test_states_need_no_head_and_start_at_zero(prepared, language_model):
    setup = prepared("states")
    assert setup.encoders[0].head is None
    regularizer = attached(setup)
    assert regularizer(0).loss.item() == 0
    language_model.model.layers[0].mlp.down_proj.weight.mul_(3)
    assert regularizer(0).loss.item() > 0


def test_the_states_of_a_frozen_language_model_are_kept(prepared):
    setup = prepared("states")
    encoder = setup.encoders[0]
    encoder.is_trained, encoder.targets = False, None
    setup.compute_targets(DEVICE, dtype=torch.float32)
    kept = encoder.targets[0].states_LD
    assert kept.shape == (len(encoder.targets[0].ids), 32)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1girl, sks girl, blue_eyes", ["1girl", ",", " sks", " girl", ",", " blue", "_", "eyes"]),
        ("(sks girl:1.2)", ["(", "sks", " girl", ":", "1", ".", "2", ")"]),
        ("sks girl's hat", ["sks", " girl", "'", "s", " hat"]),
    ],
)
def test_words_of_a_byte_level_tokenizer(byte_tokenizer, text, words):
    vocabulary = MaskingVocabulary.from_tokenizer(
        byte_tokenizer, protected=["sks girl"], low_priority=["a"]
    )
    ids = byte_tokenizer(text).input_ids
    found = [byte_tokenizer.decode(ids[start:end]) for start, end in vocabulary.split_words(ids)]
    assert "".join(found) == text
    joined = [word for word in found if any(map(str.isalnum, word))]
    assert joined == [word for word in words if any(map(str.isalnum, word))]
    protected = [
        word for word in found if tuple(byte_tokenizer(word).input_ids) in vocabulary.protected
    ]
    assert [word.strip() for word in protected] == ["sks", "girl"]


@pytest.mark.parametrize("text", ["sks girl, on the beach", "a photo of sks girl", ""])
def test_words_of_a_sentencepiece_tokenizer(t5_tokenizer, text):
    vocabulary = MaskingVocabulary.from_tokenizer(
        t5_tokenizer, protected=["sks girl"], low_priority=["a"]
    )
    ids = t5_tokenizer(text).input_ids
    assert ids[-1] == t5_tokenizer.eos_token_id == vocabulary.eos_token_id
    spans = vocabulary.split_words(ids)
    protected = [s for s in spans if tuple(ids[slice(*s)]) in vocabulary.protected]
    assert len(protected) == (2 if "sks" in text else 0)
    behind = t5_tokenizer.decode([ids[i] for s in vocabulary.words_after(ids) for i in range(*s)])
    wanted = text.partition("girl")[2].replace(" ", "")
    assert behind.replace("\u2581", "").replace(" ", "") == wanted


def test_words_without_alphanumerics_are_never_protected(byte_tokenizer):
    vocabulary = MaskingVocabulary.from_tokenizer(
        byte_tokenizer, protected=["sks (character)"], low_priority=[]
    )
    texts = {byte_tokenizer.decode(list(word)).strip() for word in vocabulary.protected}
    assert texts == {"sks", "character"}
