"""Pretraining: it learns, its split is clean, it resumes to the same file."""

import copy
import dataclasses
import errno
import os
import random
import re
import signal
import zlib

import pytest
import torch

from mlm_plugin.commands.pretrain import run_pretrain
from mlm_plugin.config.pretraining import PretrainOptions, parse_pretrain
from mlm_plugin.contextualizer_file import (
    cached_contextualizer_path,
    load_contextualizer,
)
from mlm_plugin.errors import UserError
from mlm_plugin.pretraining import find
from mlm_plugin.pretraining import run as pretraining_run
from mlm_plugin.pretraining.corpus import Corpus, read_caption_files
from mlm_plugin.pretraining.find import find_contextualizer, find_start
from mlm_plugin.pretraining.run import (
    Interrupted,
    PretrainingRun,
    learning_rate_share,
    parameter_groups,
    pretrain,
)

SMALL = PretrainOptions(
    max_train_steps=20,
    batch_size=16,
    warmup_steps=5,
    eval_every_n_steps=10,
    num_held_out=32,
    width=64,
    num_layers=1,
)


ANIMALS = ("cat", "dog", "horse", "bird", "fish", "bear", "fox", "owl")
PLACES = ("beach", "forest", "street", "kitchen", "river", "garden", "tower", "bridge")
TIMES = ("morning", "evening", "summer", "winter", "rain", "snow", "night", "autumn")
REPEATING_CAPTIONS = [
    f"{animal} {animal} {place} {place} {time} {time}"
    for animal in ANIMALS
    for place in PLACES
    for time in TIMES
]
"""One word fixes the one beside it."""


def run(text_encoder, path, **changes):
    return pretrain(
        text_encoder, path, options=dataclasses.replace(SMALL, **changes), show_progress=False
    )


def test_it_learns_to_name_words_that_their_context_tells(toy_text_encoder, tmp_path):
    """Combinations that were not trained on."""
    scores = pretrain(
        toy_text_encoder,
        tmp_path / "c.safetensors",
        options=dataclasses.replace(
            SMALL, max_train_steps=300, batch_size=32, eval_every_n_steps=150, learning_rate=3e-3
        ),
        captions=REPEATING_CAPTIONS,
        show_progress=False,
    )
    assert scores.families["captions"].accuracy > 0.25  # knowing the position alone gives 1/8
    assert len(scores.families) > 5
    assert all(0 <= family.accuracy <= 1 for family in scores.families.values())
    assert min(family.loss for family in scores.families.values()) <= scores.loss
    assert max(family.loss for family in scores.families.values()) >= scores.loss


def test_the_file_fits_the_text_encoder_and_says_how_good_it_is(toy_text_encoder, tmp_path):
    path = tmp_path / "c.safetensors"
    before = {k: v.clone() for k, v in toy_text_encoder.model.state_dict().items()}
    scores = run(toy_text_encoder, path)
    network, facts = load_contextualizer(path, toy_text_encoder)
    assert facts.accuracy == scores.accuracy
    assert facts.num_steps == 20
    assert facts.training["batch_size"] == 16
    assert torch.isfinite(network.mask_vector).all()
    start = toy_text_encoder.token_embedding.weight.mean(dim=0)
    assert not torch.allclose(network.mask_vector, start)  # the vector is trained too
    for name, tensor in toy_text_encoder.model.state_dict().items():
        assert torch.equal(before[name], tensor), name
    assert all(p.requires_grad for p in toy_text_encoder.model.parameters())
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


def interrupt_at(step, number, monkeypatch):
    """Send this process a signal while a pretraining is in ``step``."""
    train_step = PretrainingRun.train_step

    def train_and_interrupt(self):
        if self.step == step:
            os.kill(os.getpid(), number)
        return train_step(self)

    monkeypatch.setattr(PretrainingRun, "train_step", train_and_interrupt)


def test_an_interrupted_pretraining_ends_like_a_straight_one(
    toy_text_encoder, tmp_path, monkeypatch
):
    run(toy_text_encoder, tmp_path / "straight.safetensors")
    interrupt_at(7, signal.SIGINT, monkeypatch)
    with pytest.raises(Interrupted) as stopped:
        run(toy_text_encoder, tmp_path / "broken.safetensors")
    assert stopped.value.exit_code == 130
    assert not (tmp_path / "broken.safetensors").exists()
    monkeypatch.undo()
    run(toy_text_encoder, tmp_path / "broken.safetensors")
    straight, _ = load_contextualizer(tmp_path / "straight.safetensors", toy_text_encoder)
    resumed, _ = load_contextualizer(tmp_path / "broken.safetensors", toy_text_encoder)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def fail_to_save(monkeypatch, *, from_step):
    """The disk is full from a step on."""
    save_state = PretrainingRun.save_state

    def save_or_fail(self):
        if self.step >= from_step:
            monkeypatch.setattr(pretraining_run.torch, "save", full_disk)
        save_state(self)

    monkeypatch.setattr(PretrainingRun, "save_state", save_or_fail)


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("disk_ends", "stopped_in", "said"),
    [
        (99, 12, "stopped; the same command continues from .*c.state.pt$"),
        (0, 7, "its state could not be saved: the same command starts again"),
        (11, 12, "could not be saved: the same command continues from step 10 of 13, in .*c.state"),
    ],
)
def test_an_interruption_says_what_the_same_command_does(
    toy_text_encoder, tmp_path, monkeypatch, disk_ends, stopped_in, said
):
    fail_to_save(monkeypatch, from_step=disk_ends)
    interrupt_at(stopped_in, signal.SIGINT, monkeypatch)
    with pytest.raises(Interrupted, match=said):
        run(toy_text_encoder, tmp_path / "c.safetensors")
    assert (tmp_path / "c.state.pt").exists() == (disk_ends > 0)


def test_an_interruption_after_going_on_names_the_state_that_it_went_on_from(
    toy_text_encoder, tmp_path, monkeypatch
):
    with monkeypatch.context() as first:
        interrupt_at(4, signal.SIGINT, first)
        with pytest.raises(Interrupted):
            run(toy_text_encoder, tmp_path / "c.safetensors")
    fail_to_save(monkeypatch, from_step=0)
    interrupt_at(6, signal.SIGINT, monkeypatch)
    with pytest.raises(Interrupted, match="continues from step 5 of 7"):
        run(toy_text_encoder, tmp_path / "c.safetensors")


def test_a_state_of_other_settings_is_not_continued(toy_text_encoder, tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    interrupt_at(5, signal.SIGTERM, monkeypatch)
    with pytest.raises(Interrupted) as stopped:
        run(toy_text_encoder, path)
    assert stopped.value.exit_code == 143
    monkeypatch.undo()
    run(toy_text_encoder, path, seed=1)
    other = tmp_path / "other.safetensors"
    run(toy_text_encoder, other, seed=1)
    a, b = (load_contextualizer(file, toy_text_encoder)[0] for file in (path, other))
    assert torch.equal(a.mask_vector, b.mask_vector)


def test_it_stops_when_the_held_out_loss_is_flat(toy_text_encoder, tmp_path):
    path = tmp_path / "c.safetensors"
    run(toy_text_encoder, path, max_train_steps=500, learning_rate=0.0, eval_every_n_steps=2,
        patience=2, warmup_steps=1)  # fmt: skip
    _, facts = load_contextualizer(path, toy_text_encoder)
    assert facts.num_steps == 6  # one evaluation that counts as a gain, two that do not


RISING = {"learning_rate": 0.3, "max_train_steps": 24, "eval_every_n_steps": 4, "patience": 6}
"""So high a rate that the held-out loss falls and then rises."""


def noted_losses(monkeypatch):
    """Every held-out loss of the pretrainings that follow."""
    evaluate, losses = PretrainingRun.evaluate, []

    def noted(self):
        evaluate(self)
        losses.append(self.scores.loss)

    monkeypatch.setattr(PretrainingRun, "evaluate", noted)
    return losses


def test_the_best_network_is_kept_not_the_last(toy_text_encoder, tmp_path, monkeypatch):
    losses = noted_losses(monkeypatch)
    path = tmp_path / "c.safetensors"
    scores = run(toy_text_encoder, path, **RISING)
    of_evaluations, of_file = losses[:6], losses[6]
    assert min(of_evaluations) < of_evaluations[-1]
    assert of_file == pytest.approx(min(of_evaluations), rel=1e-6)
    assert scores.loss == load_contextualizer(path, toy_text_encoder)[1].loss == of_file


def spoil_weights(monkeypatch, *, from_step):
    """The network's weights become NaN at a step, as after a gradient that overflowed."""
    train_step = PretrainingRun.train_step

    def train_and_spoil(self):
        loss = train_step(self)
        if self.step >= from_step:
            self.network.mask_vector.data.fill_(float("nan"))
        return loss

    monkeypatch.setattr(PretrainingRun, "train_step", train_and_spoil)


@pytest.mark.parametrize("from_step", [11, 20])
def test_the_best_network_is_kept_when_the_last_is_nan(
    toy_text_encoder, tmp_path, monkeypatch, from_step
):
    best = run(toy_text_encoder, tmp_path / "best.safetensors", max_train_steps=10)
    spoil_weights(monkeypatch, from_step=from_step)
    monkeypatch.setattr(pretraining_run, "learning_rate_share", ten_steps_share)
    scores = run(toy_text_encoder, tmp_path / "spoilt.safetensors")
    assert scores == best
    load_contextualizer(tmp_path / "spoilt.safetensors", toy_text_encoder)


def ten_steps_share(step, _options, of=learning_rate_share):
    """The rates of a run that ends after ten steps."""
    return of(step, dataclasses.replace(SMALL, max_train_steps=10))


def test_a_loss_that_was_never_finite_is_named(toy_text_encoder, tmp_path, monkeypatch):
    spoil_weights(monkeypatch, from_step=1)
    with pytest.raises(UserError, match="--learning_rate = 0.0005: the held-out loss .* nan") as e:
        run(toy_text_encoder, tmp_path / "c.safetensors")
    assert e.value.exit_code == 1
    assert not list(tmp_path.iterdir())


def test_the_best_network_survives_an_interruption(toy_text_encoder, tmp_path, monkeypatch):
    losses = noted_losses(monkeypatch)
    scores = run(toy_text_encoder, tmp_path / "straight.safetensors", **RISING)
    best_step = 4 * (1 + losses.index(min(losses[:6])))
    assert best_step < 20
    interrupt_at(best_step + 1, signal.SIGINT, monkeypatch)
    with pytest.raises(Interrupted):
        run(toy_text_encoder, tmp_path / "broken.safetensors", **RISING)
    monkeypatch.undo()
    resumed = run(toy_text_encoder, tmp_path / "broken.safetensors", **RISING)
    assert resumed == scores


def test_matrices_alone_decay(toy_text_encoder, tmp_path):
    network = PretrainingRun(toy_text_encoder, tmp_path / "c.safetensors", options=SMALL).network
    names = {id(weight): name for name, weight in network.named_parameters()}
    decayed, others = (
        {names[id(weight)] for weight in group["params"]} for group in parameter_groups(network)
    )
    assert decayed | others == set(names.values())
    assert {"mask_vector", "output_bias", "output_scale"} <= others
    assert all("norm" not in name and not name.endswith("bias") for name in decayed)
    assert {"position", "input.weight", "head.1.weight"} <= decayed


def test_training_and_held_out_text_never_meet():
    corpus = Corpus(["my own caption number one", "another caption of mine"] * 3)
    rng = random.Random(0)
    trained = {corpus.draw(rng, held_out=False)[0] for _ in range(2000)}
    held_out = {corpus.draw(rng, held_out=True)[0] for _ in range(200)}
    assert not trained & held_out
    assert any("caption" in text for text in trained | held_out)
    assert not any("sks" in text or "{}" in text for text in trained | held_out)


def test_captions_are_drawn_as_often_as_asked():
    corpus = Corpus(REPEATING_CAPTIONS, caption_share=1.0)
    rng = random.Random(0)
    assert {corpus.draw(rng, held_out=False)[1] for _ in range(50)} == {"captions"}


HELD_OUT = [text for text in REPEATING_CAPTIONS if zlib.crc32(text.encode()) % 20 == 0]
TRAINED = [text for text in REPEATING_CAPTIONS if text not in HELD_OUT]


@pytest.mark.parametrize(
    ("captions", "found"),
    [
        (TRAINED[:1], "none of the 1 different"),
        (TRAINED[:30] * 2, "none of the 30 different"),
        (HELD_OUT[:2], "all of the 2 different"),
    ],
)
def test_captions_alone_that_leave_a_side_of_the_split_empty_are_refused(tmp_path, captions, found):
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(captions), encoding="utf-8")
    command = parse_pretrain(
        ["--pretrained_model_name_or_path", "not read", "--output", "c.safetensors",
         "--captions", str(file), "--caption_share", "1"]
    )  # fmt: skip
    with pytest.raises(UserError, match=f"--caption_share = 1: {found}"):
        run_pretrain(command)
    with pytest.raises(UserError, match=f"--caption_share = 1: {found}"):
        Corpus(captions, caption_share=1.0)
    Corpus(captions, caption_share=0.9)
    Corpus([TRAINED[0], HELD_OUT[0]], caption_share=1.0)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--caption_share", "1.5", "--captions", "c.txt"], "--caption_share = 1.5"),
        (["--caption_share", "0.9"], "--caption_share = 0.9: does nothing without --captions"),
        (["--num_layers", "-1"], "--num_layers = -1"),
        (["--width", "-5"], "--width = -5"),
        (["--warmup_steps", "-3"], "--warmup_steps = -3"),
        (["--seed", "1" * 23], "must be at most"),
        (["--learning_rate", "nan"], "--learning_rate = nan: must be finite, at least 0"),
        (["--learning_rate", "-1"], "--learning_rate = -1.0: must be finite"),
        (["--clip_skip", "0"], "--clip_skip = 0: must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(flags, named):
    argv = ["--pretrained_model_name_or_path", "toy", "--output", "c.safetensors", *flags]
    with pytest.raises(UserError, match=re.escape(named)):
        parse_pretrain(argv)


def test_without_blocks_every_word_is_named_from_its_own_state(toy_text_encoder, tmp_path):
    path = tmp_path / "c.safetensors"
    run(toy_text_encoder, path, num_layers=0)
    network, _ = load_contextualizer(path, toy_text_encoder)
    states = torch.randn(1, 6, network.sizes.hidden_size)
    changed = states.clone()
    changed[:, 3] += 1.0
    is_token, places = torch.ones(1, 6, dtype=torch.bool), torch.tensor([4])
    table = toy_text_encoder.token_embedding.weight
    before, after = (network(s, is_token, places, table) for s in (states, changed))
    assert torch.equal(before, after)


def test_the_learning_rate_warms_up_and_decays_to_a_tenth():
    options = PretrainOptions(max_train_steps=1000, warmup_steps=100)
    assert learning_rate_share(0, options) == pytest.approx(0.01)
    assert learning_rate_share(100, options) == pytest.approx(1.0)
    assert learning_rate_share(550, options) == pytest.approx(0.55)
    assert learning_rate_share(1000, options) == pytest.approx(0.1)


def test_caption_files_are_read_and_bad_ones_are_named(tmp_path):
    good = tmp_path / "good.txt"
    good.write_text("a cat\n\n  a dog \n", encoding="utf-8-sig")  # with a BOM
    assert read_caption_files([good]) == ["a cat", "a dog"]
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    for path in (empty, binary, tmp_path / "absent.txt"):
        with pytest.raises(UserError, match=path.name):
            read_caption_files([path])


def test_a_wide_text_encoder_encodes_a_step_in_chunks(toy_text_encoder, tmp_path, monkeypatch):
    """Encoding more or fewer prompts at once is the same training: same rates and masks."""
    whole = run(toy_text_encoder, tmp_path / "whole.safetensors", max_train_steps=3)
    monkeypatch.setattr(pretraining_run, "WIDE", 8)
    monkeypatch.setattr(pretraining_run, "CHUNK_SIZE", 4)
    pieces = run(toy_text_encoder, tmp_path / "pieces.safetensors", max_train_steps=3)
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-2)


@pytest.mark.filterwarnings("ignore:CUDA is not available", "ignore:User provided device_type")
@pytest.mark.parametrize("is_native", [True, False])
def test_bf16_is_used_where_the_gpu_has_it_not_where_it_is_emulated(monkeypatch, is_native):
    def is_supported(including_emulation=True):
        return is_native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    context = pretraining_run._autocast(torch.device("cuda"))
    assert isinstance(context, torch.autocast) == is_native


# --- starting from the contextualizer of a similar text encoder -------------------------------


def moved(text_encoder, share):
    """A fine-tune of the encoder: every weight moved by a share of its matrix's spread."""
    generator = torch.Generator().manual_seed(0)
    other = copy.deepcopy(text_encoder)
    for weight in other.model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data += share * weight.data.std(unbiased=False) * noise
    return other


@pytest.fixture
def taught(toy_text_encoder, monkeypatch, tmp_path):
    """A cached contextualizer that names some words, and the recipe that made it."""

    def captions_alone(captions, caption_share):
        return Corpus(REPEATING_CAPTIONS, caption_share=1.0)

    monkeypatch.setenv("MLM_PLUGIN_CACHE", str(tmp_path))
    monkeypatch.setattr(pretraining_run, "Corpus", captions_alone)
    options = dataclasses.replace(
        SMALL, max_train_steps=300, batch_size=32, eval_every_n_steps=150, learning_rate=3e-3,
        num_held_out=128,
    )  # fmt: skip
    monkeypatch.setattr(find, "SMALL_ENCODER", options)
    path = cached_contextualizer_path(toy_text_encoder)
    scores = pretrain(toy_text_encoder, path, options=options, show_progress=False)
    assert scores.accuracy > 0.2
    return scores


def test_a_fine_tuned_encoder_starts_from_the_contextualizer_of_its_base(toy_text_encoder, taught):
    similar = moved(toy_text_encoder, 0.02)
    assert similar.fingerprint() != toy_text_encoder.fingerprint()
    found = find_contextualizer(similar, "auto", show_progress=False)
    assert found.facts.num_steps <= 30  # a tenth of the steps from nothing
    assert found.facts.training["started_from"] == toy_text_encoder.fingerprint()
    assert found.facts.accuracy > 0.9 * taught.accuracy


def test_an_unrelated_encoder_starts_from_nothing(toy_text_encoder, taught):
    unrelated = moved(toy_text_encoder, 20)
    found = find_contextualizer(unrelated, "auto", show_progress=False)
    assert found.facts.num_steps == 300
    assert found.facts.training["started_from"] is None


def test_a_damaged_file_is_no_start(toy_text_encoder, taught):
    cached_contextualizer_path(toy_text_encoder).write_bytes(b"")
    options = find.SMALL_ENCODER
    assert find_start(moved(toy_text_encoder, 0.02), options) is None
