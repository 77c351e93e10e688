"""Teacher targets: the same words masked around the class word, before anything is trained."""

import random

import pytest
import torch

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import MLMOptions
from mlm_plugin.contextualizer_file import load_contextualizer
from mlm_plugin.mlm.cross_attention import CrossAttention, Projection
from mlm_plugin.mlm.losses import masked_positions
from mlm_plugin.mlm.masking import IGNORE_INDEX, MASK_ID, MaskedTokens
from mlm_plugin.mlm.teacher import align_to_prompt
from mlm_plugin.mlm_setup import (
    NUM_TARGETS,
    MLMSetup,
    PreparedEncoder,
)

pytestmark = pytest.mark.usefixtures("all_targets")

SKS_DOG = Concept("sks", "dog")
OPTIONS = MLMOptions(mlm_target="class", mlm_batch_size=6, mlm_probability=0.4)
STATES = MLMOptions(mlm_target="states", mlm_batch_size=6)
CPU = torch.device("cpu")


@pytest.fixture
def contextualizer(toy_text_encoder, toy_contextualizer):
    return load_contextualizer(toy_contextualizer, toy_text_encoder)[0]


def take(text_encoder, contextualizer, *concepts, options=OPTIONS, seed=0, is_trained=True):
    """The encoder with its targets."""
    setup = MLMSetup(options, seed=seed)
    setup.use_concepts(concepts)
    setup.encoders = [PreparedEncoder(text_encoder, contextualizer, is_trained)]
    setup.compute_targets(CPU, dtype=torch.float32)
    return setup.encoders[0]


def regularizer_of(encoder, *concepts, options=OPTIONS, cross_attention=None):
    read_at = "cross_attention" if cross_attention else "encoder"
    setup = MLMSetup(options, seed=0, read_at=read_at)
    setup.use_concepts(concepts)
    setup.encoders = [encoder]
    return setup.attach(rank=0, dtype=torch.float32, device=CPU, cross_attention=cross_attention)


def labelled(target):
    return [label for label in target.labels if label != IGNORE_INDEX]


def test_a_target_masks_context_words_of_its_prompt(toy_text_encoder, contextualizer):
    concept = set(toy_text_encoder.tokenizer("sks dog", add_special_tokens=False).input_ids)
    for target in take(toy_text_encoder, contextualizer, SKS_DOG).targets[:100]:
        assert len(labelled(target)) == len(target.teacher_ND) > 0
        assert not set(labelled(target)) & concept
        assert target.ids.count(MASK_ID) == len(labelled(target))
        assert concept <= set(target.ids)


@pytest.mark.parametrize(
    ("prompt", "teacher"),
    [
        ("a photo of sks dog on the beach", "a photo of dog on the beach"),
        ("sks dog in the snow", "sks dog in the snow"),
        ("zwx teddy bear and sks dog", "bear and dog"),
    ],
)
def test_the_same_words_are_masked_around_the_concept(toy_text_encoder, prompt, teacher):
    prompt_ids, teacher_ids = (
        toy_text_encoder.tokenize_trimmed([text])[0].tolist() for text in (prompt, teacher)
    )
    labels = torch.tensor(teacher_ids)
    chosen = torch.tensor([number % 2 == 1 for number in range(len(teacher_ids))])
    masked = MaskedTokens(
        labels.masked_fill(chosen, MASK_ID), labels.masked_fill(~chosen, IGNORE_INDEX)
    )
    ids, our_labels, found = align_to_prompt(prompt_ids, teacher_ids, masked)
    assert found == list(range(int(chosen.sum())))
    assert [x for x in our_labels if x != IGNORE_INDEX] == labels[chosen].tolist()
    for before, after, label in zip(prompt_ids, ids, our_labels, strict=True):
        assert (after, label) in [(before, IGNORE_INDEX), (MASK_ID, before)]


def test_words_after_the_length_limit_are_left_out(toy_text_encoder):
    ids = toy_text_encoder.tokenize_trimmed(["sks dog in the snow"])[0].tolist()
    masked = MaskedTokens(torch.tensor(ids), torch.tensor(ids))
    cut, labels, found = align_to_prompt(ids[:-2], ids, masked)
    assert len(cut) == len(labels) == len(ids) - 2
    assert found == list(range(len(ids) - 2))


def test_states_are_compared_at_every_word_around_the_concept(toy_text_encoder):
    target = take(toy_text_encoder, None, SKS_DOG, options=STATES).targets[0]
    concept = toy_text_encoder.tokenizer("sks dog", add_special_tokens=False).input_ids
    bos, *others = target.ids
    assert target.labels[0] == IGNORE_INDEX
    assert bos == toy_text_encoder.tokenizer.bos_token_id
    assert labelled(target) == [token for token in others if token not in concept]
    assert MASK_ID not in target.ids
    assert target.teacher_ND.shape == (len(labelled(target)), 32)


@pytest.mark.parametrize("target", ["class", "word", "states"])
def test_a_frozen_encoder_is_not_run_any_more(toy_text_encoder, contextualizer, target):
    options = MLMOptions(mlm_target=target, mlm_batch_size=6)
    network = None if target == "states" else contextualizer
    encoder = take(toy_text_encoder, network, SKS_DOG, options=options, is_trained=False)
    trained = PreparedEncoder(toy_text_encoder, network)
    trained.targets = [kept._replace(states_LD=None) for kept in encoder.targets]
    wide = CrossAttention([Projection(0, torch.nn.Identity(), lambda: torch.eye(32))])
    values = []
    for each in (trained, encoder):
        regularizer = regularizer_of(each, SKS_DOG, options=options, cross_attention=wide)
        values.append(regularizer(0).loss.item())
        toy_text_encoder.encode_storing = None  # the second must not need it
    assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_the_loss_is_the_divergence_from_the_teacher(toy_text_encoder, contextualizer):
    options = MLMOptions(mlm_batch_size=1, mlm_target="class")
    encoder = take(toy_text_encoder, contextualizer, SKS_DOG)
    target = encoder.targets[random.Random("mlm/0/0/5").choices(range(NUM_TARGETS), k=1)[0]]
    disturb(toy_text_encoder)
    regularizer = regularizer_of(encoder, SKS_DOG, options=options)
    handle = regularizer.encoders[0]
    masked = torch.tensor([target.ids])
    embedded = handle.embedding(masked.clamp(min=0))
    embedded[masked == MASK_ID] = contextualizer.mask_vector
    with torch.no_grad():
        hidden = _states(toy_text_encoder, masked, embedded)
        p = contextualizer(
            hidden,
            torch.ones_like(masked).bool(),
            masked_positions(torch.tensor([target.labels])),
            handle.token_table,
        ).softmax(-1)
        q = contextualizer.logits(target.teacher_ND, handle.token_table).softmax(-1)
    now = (q * (q / p).log()).sum(-1)
    assert (target.starts[0] > 0.01).any()
    expected = (now - target.starts[0]).clamp(min=0).mean()
    assert expected > 0.1
    assert regularizer(5).loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_the_states_loss_is_the_share_that_has_changed(toy_text_encoder):
    encoder = take(toy_text_encoder, None, SKS_DOG, options=STATES)
    target = encoder.targets[random.Random("mlm/0/0/5").choices(range(NUM_TARGETS), k=1)[0]]
    disturb(toy_text_encoder)
    options = MLMOptions(mlm_target="states", mlm_batch_size=1)
    output = regularizer_of(encoder, SKS_DOG, options=options)(5)
    with torch.no_grad():
        states_LD = toy_text_encoder.encode(torch.tensor([target.ids]))[0]
    kept = [i for i, label in enumerate(target.labels) if label != IGNORE_INDEX]
    now = (states_LD[kept] - target.teacher_ND).square().sum(dim=-1)
    before = (target.starts[0] - target.teacher_ND).square().sum(dim=-1)
    expected = (now - before).clamp(min=0).sum() / target.teacher_ND.square().sum()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.parts == {}


def disturb(text_encoder):
    with torch.no_grad():
        for parameter in text_encoder.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def _states(text_encoder, ids, embedded):
    """The encoder's states for given embeddings: a hook replaces the table's output."""
    handle = text_encoder.token_embedding.register_forward_hook(lambda *_: embedded)
    try:
        return text_encoder.encode(ids.clamp(min=0))
    finally:
        handle.remove()


def test_targets_go_by_the_seed_alone(toy_text_encoder, contextualizer):
    first = take(toy_text_encoder, contextualizer, SKS_DOG).targets
    torch.manual_seed(5)
    again = take(toy_text_encoder, contextualizer, SKS_DOG).targets
    other = take(toy_text_encoder, contextualizer, SKS_DOG, seed=1).targets
    assert [r.ids for r in first] == [r.ids for r in again]
    assert torch.equal(first[3].teacher_ND, again[3].teacher_ND)
    assert [r.ids for r in first] != [r.ids for r in other]
