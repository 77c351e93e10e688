"""The set-up of the term: targets of the untrained encoder, in whatever order the host calls."""

import random
from dataclasses import replace

import numpy
import pytest
import torch
from accelerate import Accelerator

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import MLMOptions
from mlm_plugin.errors import UserError
from mlm_plugin.mlm_setup import MLMSetup
from mlm_plugin.models.text_encoder import TextEncoder

CONCEPTS = [Concept("sks", "dog")]


@pytest.fixture
def accelerator(_fresh_accelerator):
    return Accelerator(cpu=True)


@pytest.fixture
def options(toy_contextualizer):
    return MLMOptions(
        mlm_target="class", mlm_batch_size=4, mlm_contextualizer=str(toy_contextualizer)
    )


def prepared(options, text_encoder: TextEncoder, accelerator, *, concepts_first=True) -> MLMSetup:
    setup = MLMSetup(options, seed=3)
    if concepts_first:
        setup.use_concepts(CONCEPTS)
    setup.prepare([text_encoder], accelerator)
    if not concepts_first:
        setup.use_concepts(CONCEPTS)
    setup.compute_targets(accelerator.device, dtype=torch.float32)
    return setup


def disturb(text_encoder):
    with torch.no_grad():
        for parameter in text_encoder.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def attached(setup, rank=0):
    return setup.attach(rank=rank, dtype=torch.float32, device=torch.device("cpu"))


def loss_of(setup):
    return attached(setup)(0).loss.item()


@pytest.mark.parametrize("target", ["class", "word"])
def test_the_output_table_is_that_of_the_untrained_encoder_however_late_the_term_starts(
    toy_text_encoder, options, accelerator, target
):
    toy_text_encoder.model.requires_grad_(True)
    setup = prepared(replace(options, mlm_target=target), toy_text_encoder, accelerator)
    before = toy_text_encoder.token_embedding.weight.detach().clone()
    disturb(toy_text_encoder)
    (encoder,) = attached(setup).encoders
    assert torch.equal(encoder.token_table, before)


def test_targets_are_those_of_the_untrained_encoder(toy_text_encoder, options, accelerator):
    setup = prepared(options, toy_text_encoder, accelerator)
    before = [target.teacher_ND.clone() for target in setup.encoders[0].targets]
    untrained = loss_of(setup)
    disturb(toy_text_encoder)
    setup.compute_targets(accelerator.device, dtype=torch.float32)  # they are there already
    (encoder,) = attached(setup).encoders
    assert all(map(torch.equal, before, (t.teacher_ND for t in encoder.targets)))
    assert loss_of(setup) > untrained
    encoder_again, setup.encoders[0].targets = setup.encoders[0], None
    setup.compute_targets(accelerator.device, dtype=torch.float32)
    late = encoder_again.targets
    assert late[0].ids == encoder.targets[0].ids
    assert not torch.allclose(late[0].teacher_ND, before[0], atol=1e-3)


def test_concepts_and_text_encoders_come_in_any_order(toy_text_encoder, options, accelerator):
    first = prepared(options, toy_text_encoder, accelerator)
    second = prepared(options, toy_text_encoder, accelerator, concepts_first=False)
    assert loss_of(first) == loss_of(second)
    pairs = zip(first.encoders[0].targets, second.encoders[0].targets, strict=True)
    assert all(torch.equal(a.teacher_ND, b.teacher_ND) for a, b in pairs)


def test_states_need_no_contextualizer(toy_text_encoder, accelerator):
    options = MLMOptions(mlm_batch_size=4, mlm_target="states", mlm_contextualizer="missing")
    setup = prepared(options, toy_text_encoder, accelerator)
    assert setup.contextualizers == []
    disturb(toy_text_encoder)
    assert loss_of(setup) > 0


def test_the_host_keeps_its_random_numbers(toy_text_encoder, options, accelerator):
    states = random.getstate(), torch.get_rng_state(), numpy.random.get_state()[1].tolist()
    prepared(options, toy_text_encoder, accelerator)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert numpy.random.get_state()[1].tolist() == states[2]


def test_processes_draw_prompts_of_their_own(toy_text_encoder, options, accelerator):
    setup = prepared(options, toy_text_encoder, accelerator)
    disturb(toy_text_encoder)
    first, second = (attached(setup, rank) for rank in range(2))
    assert first(0).loss != second(0).loss


def test_a_concept_is_never_masked(toy_text_encoder, options, accelerator):
    setup = prepared(options, toy_text_encoder, accelerator)
    concept = set(toy_text_encoder.tokenizer("sks dog", add_special_tokens=False).input_ids)
    for target in setup.encoders[0].targets:
        assert not concept & set(target.labels)


def test_another_number_of_files_is_refused(toy_text_encoder, toy_contextualizer, accelerator):
    two = MLMOptions(
        mlm_target="class", mlm_contextualizer=f"{toy_contextualizer},{toy_contextualizer}"
    )
    with pytest.raises(UserError, match="names 2 file"):
        MLMSetup(two, seed=0).prepare([toy_text_encoder], accelerator)
    setup = MLMSetup(two, seed=0)
    setup.prepare([toy_text_encoder], accelerator, more_may_come=True)
    assert len(setup.encoders) == 1


def test_an_encoder_that_does_not_fit_on_the_device_reads_where_it_is(
    toy_text_encoder, accelerator, caplog, monkeypatch
):
    """As T5-XXL beside a transformer on the same card."""
    states = MLMOptions(mlm_target="states", mlm_batch_size=4)
    wanted = prepared(states, toy_text_encoder, accelerator).encoders[0].targets
    model, moves = toy_text_encoder.model, []
    to = model.to

    def full(device):
        moves.append(device)
        if len(moves) == 1:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return to(device)

    monkeypatch.setattr(model, "to", full)
    found = prepared(states, toy_text_encoder, accelerator).encoders[0].targets
    assert "does not fit" in caplog.text
    assert all(torch.equal(a.starts, b.starts) for a, b in zip(found, wanted, strict=True))
