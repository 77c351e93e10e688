"""Teacher targets: the same words masked around the class word, before anything is trained."""

import random

import pytest
import torch

from mlm_plugin.config.datasets import Concept
from mlm_plugin.config.options import MLMOptions
from mlm_plugin.contextualizer_file import load_contextualizer
from mlm_plugin.errors import UserError
from mlm_plugin.mlm.losses import masked_positions
from mlm_plugin.mlm.masking import IGNORE_INDEX, MASK_ID
from mlm_plugin.mlm.teacher import align_to_prompt
from mlm_plugin.mlm_setup import (
    build_regularizer,
    encoder_handle,
    mlm_target,
    prompts_for,
    teacher_targets_for,
)

SKS_DOG = Concept("sks", "dog")
OPTIONS = MLMOptions(mlm_target="class", mlm_batch_size=6, mlm_probability=0.4)


@pytest.fixture
def contextualizer(toy_text_encoder, toy_contextualizer):
    return load_contextualizer(toy_contextualizer, toy_text_encoder)[0]


def take(text_encoder, contextualizer, *concepts, options=OPTIONS, seed=0):
    return teacher_targets_for(
        text_encoder,
        contextualizer,
        concepts,
        options,
        prompts=prompts_for(options, concepts),
        seed=seed,
    )


def regularizer_of(text_encoder, contextualizer, *concepts, targets, options=OPTIONS):
    encoder = encoder_handle(text_encoder, contextualizer, concepts, teacher_targets=targets)
    return build_regularizer([encoder], options, prompts=prompts_for(options, concepts), seed=0)


def test_a_target_masks_context_words_of_the_prompt_with_the_class_word(
    toy_text_encoder, contextualizer
):
    dog = toy_text_encoder.tokenizer("dog", add_special_tokens=False).input_ids
    for target in take(toy_text_encoder, contextualizer, SKS_DOG)[:100]:
        text = target.text.replace("sks dog", "dog")
        assert target.class_ids == toy_text_encoder.tokenize_trimmed([text])[0].tolist()
        hidden = [label for label in target.labels if label != IGNORE_INDEX]
        assert len(hidden) == len(target.teacher_ND) > 0
        assert not set(hidden) & set(dog)
        assert target.masked_ids.count(MASK_ID) == len(hidden)


@pytest.mark.parametrize(
    "concepts",
    [[SKS_DOG], [Concept("zwx", "teddy bear")], [SKS_DOG, Concept("ohw", "cat")]],
    ids=["one", "two words", "several"],
)
def test_the_same_words_are_masked_around_the_concept(toy_text_encoder, contextualizer, concepts):
    words = [
        toy_text_encoder.tokenizer(concept.text, add_special_tokens=False).input_ids
        for concept in concepts
    ]
    for target in take(toy_text_encoder, contextualizer, *concepts)[:200]:
        ids = toy_text_encoder.tokenize_trimmed([target.text])[0].tolist()
        masked, labels, found = align_to_prompt(target, ids)
        assert found == list(range(len(target.teacher_ND)))
        assert [x for x in labels if x != IGNORE_INDEX] == [
            x for x in target.labels if x != IGNORE_INDEX
        ]
        for before, after, label in zip(ids, masked, labels, strict=True):
            assert (after, label) in [(before, IGNORE_INDEX), (MASK_ID, before)]
        assert any(str(ids)[1:-1] in str(masked) for ids in words)


def test_masked_words_behind_the_length_limit_are_left_out(toy_text_encoder, contextualizer):
    target = take(toy_text_encoder, contextualizer, SKS_DOG)[0]
    ids = toy_text_encoder.tokenize_trimmed([target.text])[0].tolist()
    places = [i for i, label in enumerate(align_to_prompt(target, ids)[1]) if label != IGNORE_INDEX]
    masked, labels, found = align_to_prompt(target, ids[: places[-1]])
    assert len(masked) == len(labels) == places[-1]
    assert found == list(range(len(places) - 1))


def test_the_term_is_zero_while_the_concept_is_read_as_its_class_word(
    toy_text_encoder, contextualizer
):
    itself = Concept(None, "dog")
    targets = take(toy_text_encoder, contextualizer, itself)
    regularizer = regularizer_of(toy_text_encoder, contextualizer, itself, targets=targets)
    assert abs(regularizer(0).loss.item()) < 1e-5
    with torch.no_grad():
        for parameter in toy_text_encoder.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    output = regularizer(0)
    assert output.loss > 1e-3
    output.loss.backward()
    assert any(p.grad.abs().sum() > 0 for p in toy_text_encoder.model.parameters())


def test_the_loss_is_the_divergence_from_the_teacher(toy_text_encoder, contextualizer):
    targets = take(toy_text_encoder, contextualizer, SKS_DOG)
    options = MLMOptions(mlm_batch_size=1, mlm_target="class")
    regularizer = regularizer_of(
        toy_text_encoder, contextualizer, SKS_DOG, targets=targets, options=options
    )
    target = targets[random.Random("mlm/0/5").choices(range(len(targets)), k=1)[0]]
    encoder = regularizer.encoders[0]
    ids = encoder.tokenize([target.text], random.Random(0))
    masked, labels, _ = align_to_prompt(target, ids[0].tolist())
    masked = torch.tensor([masked])
    embedded = encoder.embedding(masked.clamp(min=0))
    embedded[masked == MASK_ID] = encoder.contextualizer.mask_vector
    with torch.no_grad():
        hidden = _states(toy_text_encoder, masked, embedded)
        p = contextualizer(
            hidden,
            torch.ones_like(masked).bool(),
            masked_positions(torch.tensor([labels])),
            encoder.token_table,
        ).softmax(-1)
        q = contextualizer.logits(target.teacher_ND, encoder.token_table).softmax(-1)
    expected = (q * (q / p).log()).sum(-1).mean()
    assert regularizer(5).loss.item() == pytest.approx(expected.item(), rel=1e-3)


def _states(text_encoder, ids, embedded):
    """The encoder's states for given embeddings: a hook replaces the table's output."""
    handle = text_encoder.token_embedding.register_forward_hook(lambda *_: embedded)
    try:
        return text_encoder.encode(ids.clamp(min=0))
    finally:
        handle.remove()


def test_targets_go_by_the_seed_alone(toy_text_encoder, contextualizer):
    first = take(toy_text_encoder, contextualizer, SKS_DOG)
    torch.manual_seed(5)
    again = take(toy_text_encoder, contextualizer, SKS_DOG)
    other = take(toy_text_encoder, contextualizer, SKS_DOG, seed=1)
    assert [r.masked_ids for r in first] == [r.masked_ids for r in again]
    assert torch.equal(first[3].teacher_ND, again[3].teacher_ND)
    assert [r.masked_ids for r in first] != [r.masked_ids for r in other]


@pytest.mark.parametrize(
    ("target", "class_token", "expected"),
    [("auto", "dog", "class"), ("auto", None, "word"), ("word", "dog", "word")],
)
def test_the_target_goes_by_what_is_known(target, class_token, expected):
    concepts = [Concept("sks", class_token)]
    assert mlm_target(MLMOptions(mlm_target=target), concepts) == expected


def test_class_targets_without_a_class_word_are_refused():
    with pytest.raises(UserError, match="class_token"):
        mlm_target(MLMOptions(mlm_target="class"), [SKS_DOG, Concept("zwx", None)])


def test_masked_words_as_targets_need_no_teacher(toy_text_encoder, contextualizer):
    options = MLMOptions(mlm_target="word")
    assert take(toy_text_encoder, contextualizer, SKS_DOG, options=options) == []
