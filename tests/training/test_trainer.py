"""The loop: weight 0 is a plain run, resume is exact, a bad loss loses nothing."""

import dataclasses
import itertools
import json
import math
import os
import signal

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import set_seed

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.datasets import DatasetConfig, SubsetConfig
from mlm_plugin.config.options import LossOptions, MLMOptions, OptimizerOptions, TrainConfig
from mlm_plugin.data.dataset import EpochOrder, TrainDataset, make_loader
from mlm_plugin.errors import UserError
from mlm_plugin.methods import METHODS
from mlm_plugin.mlm.contextualizer import Contextualizer, ContextualizerSizes
from mlm_plugin.mlm.regularizer import MLMSchedule
from mlm_plugin.mlm_setup import MLMSetup, PreparedEncoder
from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.training import rollback
from mlm_plugin.training.callbacks import Callback
from mlm_plugin.training.diffusion_loss import DiffusionLoss
from mlm_plugin.training.drift import DriftWatch, TextDrift
from mlm_plugin.training.guards import NonFiniteLatents, NonFiniteLoss
from mlm_plugin.training.interrupt import Stopped
from mlm_plugin.training.logs import CurveLogger, TrackerCloser
from mlm_plugin.training.optimizers import create_optimizer
from mlm_plugin.training.plan import MLMTerm, Objective, Optimization, TrainPlan
from mlm_plugin.training.schedulers import create_scheduler
from mlm_plugin.training.state import RunIdentity
from mlm_plugin.training.trainer import Trainer

SEED = 7
RATES = OptimizerOptions(unet_lr=1e-3, text_encoder_lr=(1e-3,))
CONCEPTS = (Concept("sks", "dog"),)


class Curve(Callback):
    """Records every step."""

    def __init__(self):
        self.results = []

    def on_step_end(self, trainer, result):
        self.results.append(result)


class StopAfter(Callback):
    """Behaves like Ctrl-C after a number of steps, and keeps the state."""

    def __init__(self, step, folder):
        self.step, self.folder = step, folder

    def on_step_end(self, trainer, result):
        if trainer.progress.current_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)

    def on_stop(self, trainer):
        trainer.save_state(self.folder)


@pytest.fixture
def dataset(toy_pictures):
    subset = SubsetConfig(
        image_dir=toy_pictures / "10_sks dog",
        class_tokens="sks dog",
        caption_extension=".txt",
        flip_aug=True,
    )
    config = DatasetConfig(batch_size=2, resolution=(64, 64), subsets=(subset,))
    return TrainDataset([config], seed=SEED)


def make_trainer(
    toy_folder,
    dataset,
    *,
    num_steps=6,
    mlm_weight=None,
    accumulation=1,
    callbacks=(),
    schedule=None,
    dropout=None,
    optimizer_type="AdamW",
    checkpointing=False,
    rates=RATES,
    options=None,
    freeze_at=None,
    method_name="lora",
    optimizer_args=(),
):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    models = load_stable_diffusion(toy_folder)
    set_seed(SEED)
    config = TrainConfig().replace(network_dim=4, network_dropout=dropout, method=method_name)
    method = METHODS[method_name].prepare(models, config, CONCEPTS)
    regularizer = None
    if mlm_weight is not None:
        regularizer = make_regularizer(method)
        schedule = schedule or MLMSchedule(mlm_weight)
    if checkpointing:
        models.unet.enable_gradient_checkpointing()
        models.text_encoders[0].model.gradient_checkpointing_enable({"use_reentrant": False})
    order = EpochOrder(dataset, batches_per_step=accumulation)
    optimizer = create_optimizer(
        optimizer_type,
        method.parameter_groups(rates),
        learning_rate=RATES.learning_rate,
        optimizer_args=optimizer_args,
    )
    scheduler = create_scheduler(optimizer, RATES, num_training_steps=num_steps)
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    set_seed(SEED)
    return Trainer(
        accelerator=accelerator,
        method=method,
        loader=make_loader(order),
        objective=Objective(
            DiffusionLoss(
                models.noise_scheduler, LossOptions(), prediction_type=models.prediction_type
            ),
            mlm=MLMTerm(regularizer, schedule) if regularizer else None,
        ),
        optimization=Optimization(optimizer, scheduler, freeze_at=freeze_at or {}),
        plan=TrainPlan(num_steps, len(order), gradient_accumulation_steps=accumulation),
        identity=RunIdentity(SEED, settings=options or {}),
        callbacks=callbacks,
    )


def make_regularizer(method):
    (text_encoder,) = method.models.text_encoders
    table = text_encoder.token_embedding.weight.detach()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        contextualizer = Contextualizer(
            ContextualizerSizes(
                hidden_size=table.shape[1], vocab_size=len(table), width=64, num_layers=1
            )
        )
    contextualizer.start_from(table, torch.ones(len(table)))
    options = MLMOptions(mlm_batch_size=3, mlm_prompt_set="living", mlm_target="word")
    setup = MLMSetup(options, seed=SEED)
    setup.use_concepts(CONCEPTS)
    setup.encoders = [PreparedEncoder(text_encoder, contextualizer)]
    return setup.attach(
        rank=0, dtype=torch.float32, device=torch.device("cpu"), vary=method.mlm_variants
    )


def run(*args, **settings):
    curve = Curve()
    trainer = make_trainer(*args, callbacks=[curve], **settings)
    trainer.run()
    return trainer.method.state_dict(), curve.results


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_weight_0_is_bit_identical_to_a_run_without_the_plug_in(toy_folder, dataset):
    plain, plain_curve = run(toy_folder, dataset, dropout=0.1)
    zero, zero_curve = run(toy_folder, dataset, mlm_weight=0.0, dropout=0.1)
    assert_same(plain, zero)
    assert [r.loss for r in plain_curve] == [r.loss for r in zero_curve]


def test_the_term_changes_the_text_encoder_and_not_the_noise(toy_folder, dataset):
    plain, plain_curve = run(toy_folder, dataset, num_steps=2, dropout=0.1)
    mlm, mlm_curve = run(toy_folder, dataset, num_steps=2, mlm_weight=1.0, dropout=0.1)
    assert mlm_curve[0].diffusion == plain_curve[0].diffusion  # the same data and noise
    changed = {name for name in plain if not torch.equal(plain[name], mlm[name])}
    assert any(name.startswith("lora_te_") for name in changed)
    assert mlm_curve[0].loss == pytest.approx(mlm_curve[0].diffusion + mlm_curve[0].mlm, rel=1e-6)
    assert plain_curve[0].mlm is None


def gradients(trainer):
    return [None if p.grad is None else p.grad.clone() for p in trainer.method.parameters()]


def test_a_step_has_the_gradients_of_diffusion_plus_weight_times_mlm(toy_folder, dataset):
    trainer = make_trainer(toy_folder, dataset, mlm_weight=0.25)
    trainer.loader.sampler.start_epoch(0)
    batch = next(iter(trainer.loader))
    set_seed(SEED)
    (trainer._diffusion_loss(batch) + 0.25 * trainer._term(0).loss).backward()
    together = gradients(trainer)
    trainer.optimizer.zero_grad(set_to_none=True)
    set_seed(SEED)
    trainer._backward(batch, 0, trainer._mlm_weight())
    for ours, theirs in zip(gradients(trainer), together, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_the_gradient_of_both_losses_together_is_clipped(toy_folder, dataset):
    trainer = make_trainer(toy_folder, dataset, num_steps=2, mlm_weight=10.0)
    trainer.max_grad_norm, norms, step = 1e-4, [], trainer.optimizer.step

    def step_and_measure():
        found = [g.flatten() for g in gradients(trainer) if g is not None]
        norms.append(torch.cat(found).norm().item())
        step()

    trainer.optimizer.step = step_and_measure
    trainer.run()
    assert norms == pytest.approx([1e-4, 1e-4], rel=1e-3)


def test_the_term_alone_moves_only_the_text_encoder(toy_folder, dataset):
    trainer = make_trainer(toy_folder, dataset, mlm_weight=1.0)
    trainer.regularizer(0).loss.backward()
    for name, parameter in trainer.models.unet.named_parameters():
        assert parameter.grad is None, name
    encoder = trainer.models.text_encoders[0].model
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stop_at", [3, 4])
def test_an_interrupted_run_ends_bit_identical_to_a_straight_one(
    toy_folder, dataset, tmp_path, accumulation, stop_at
):
    settings = {"mlm_weight": 0.1, "accumulation": accumulation, "dropout": 0.1}
    straight, straight_curve = run(toy_folder, dataset, **settings)

    stopper = StopAfter(stop_at, tmp_path / "a-state")
    with pytest.raises(Stopped) as stopped:
        make_trainer(toy_folder, dataset, callbacks=[stopper], **settings).run()
    assert stopped.value.exit_code == 130

    curve = Curve()
    trainer = make_trainer(toy_folder, dataset, callbacks=[curve], **settings)
    torch.rand(5)  # whatever the new process drew before
    trainer.load_state(tmp_path / "a-state")
    trainer.run()
    assert_same(straight, trainer.method.state_dict())
    assert [r.loss for r in curve.results] == [r.loss for r in straight_curve[stop_at:]]


def test_gradient_checkpointing_changes_memory_and_nothing_else(toy_folder, dataset):
    plain, _ = run(toy_folder, dataset, num_steps=2, mlm_weight=0.1)
    checkpointed, _ = run(toy_folder, dataset, num_steps=2, mlm_weight=0.1, checkpointing=True)
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], rtol=1e-3, atol=1e-5)


def test_accumulated_batches_make_one_step_of_their_mean(toy_folder, dataset):
    _, single = run(toy_folder, dataset, num_steps=3)
    state, double = run(toy_folder, dataset, num_steps=1, accumulation=3)
    # with a learning rate the weights differ from the second batch on; the first batch is the same
    assert len(double) == 1
    assert double[0].diffusion == pytest.approx(sum(r.diffusion for r in single) / 3, rel=0.02)
    assert any((tensor != 0).any() for name, tensor in state.items() if "lora_up" in name)


def test_a_shorter_step_at_the_end_of_an_epoch_is_the_mean_of_its_batches(toy_folder, dataset):
    batches = len(EpochOrder(dataset))
    settings = {"num_steps": 1, "mlm_weight": 0.1, "optimizer_type": "SGD"}
    whole, _ = run(toy_folder, dataset, accumulation=batches, **settings)
    short, _ = run(toy_folder, dataset, accumulation=2 * batches, **settings)
    assert_same(whole, short)
    assert any((tensor != 0).any() for name, tensor in short.items() if "lora_up" in name)


def test_the_term_acts_on_its_steps_only(toy_folder, dataset):
    schedule = MLMSchedule(0.1, every_n_steps=2, start_step=1, end_step=4)
    _, curve = run(toy_folder, dataset, mlm_weight=0.1, schedule=schedule)
    assert [r.mlm is not None for r in curve] == [False, True, False, True, False, False]
    assert curve[1].mlm_weight == pytest.approx(0.2)


# --- parts that are frozen during the run ---------------------------------------------------

OF_PART = {"textencoder": "lora_te_", "unet": "lora_unet_", "embedding": "embedding."}


class History(Callback):
    """Keeps the trained tensors after every step, and the results of the steps."""

    def __init__(self):
        self.states, self.results = [], []

    def on_step_end(self, trainer, result):
        state = trainer.method.state_dict()
        self.states.append({name: tensor.clone() for name, tensor in state.items()})
        self.results.append(result)

    def changed_in_step(self, part):
        """For each step after the first: whether any tensor of the part has changed."""
        names = [name for name in self.states[0] if name.startswith(OF_PART[part])]
        assert names
        return [
            any(not torch.equal(before[name], after[name]) for name in names)
            for before, after in itertools.pairwise(self.states)
        ]


def run_with_history(*args, **settings):
    history = History()
    trainer = make_trainer(*args, callbacks=[history], **settings)
    trainer.run()
    return trainer, history


@pytest.mark.parametrize(
    ("optimizer_type", "optimizer_args"),
    [
        ("AdamW", ("weight_decay=0.5",)),  # decay and momentum would continue without gradients
        ("SGDNesterov", ("momentum=0.9", "weight_decay=0.5")),
    ],
)
@pytest.mark.parametrize(("part", "other"), [("textencoder", "unet"), ("unet", "textencoder")])
def test_a_frozen_part_stays_bit_identical_and_the_other_continues(
    toy_folder, dataset, part, other, optimizer_type, optimizer_args
):
    settings = {"optimizer_type": optimizer_type, "optimizer_args": optimizer_args}
    trainer, history = run_with_history(toy_folder, dataset, freeze_at={part: 3}, **settings)
    assert history.changed_in_step(part) == [True, True, False, False, False]
    assert history.changed_in_step(other) == [True] * 5
    for parameter in trainer.method.parts()[part]:
        assert not parameter.requires_grad
        assert parameter.grad is None
    assert set(trainer.method.parameters()) == set(trainer.method.parts()[other])


def test_a_run_is_the_same_until_a_part_is_frozen(toy_folder, dataset):
    settings = {"num_steps": 4, "mlm_weight": 0.1, "dropout": 0.1}
    _, plain = run_with_history(toy_folder, dataset, **settings)
    _, frozen = run_with_history(toy_folder, dataset, freeze_at={"textencoder": 2}, **settings)
    for before, after in zip(plain.states[:2], frozen.states[:2], strict=True):
        assert_same(before, after)
    assert frozen.states[2].keys() == plain.states[2].keys()
    assert any(not torch.equal(plain.states[2][n], frozen.states[2][n]) for n in plain.states[2])


def test_a_part_frozen_at_step_0_keeps_its_first_weights(toy_folder, dataset):
    first = make_trainer(toy_folder, dataset).method.state_dict()
    trainer, history = run_with_history(
        toy_folder, dataset, num_steps=2, freeze_at={"textencoder": 0}
    )
    for name, tensor in trainer.method.state_dict().items():
        if name.startswith("lora_te_"):
            assert torch.equal(tensor, first[name]), name
    assert history.changed_in_step("unet") == [True]


def test_the_term_ends_once_nothing_on_the_text_side_is_trained(toy_folder, dataset):
    calls = []
    trainer = make_trainer(toy_folder, dataset, mlm_weight=0.1, freeze_at={"textencoder": 4})
    regularizer = trainer.regularizer
    trainer.regularizer = lambda number: calls.append(number) or regularizer(number)
    curve = Curve()
    trainer.callbacks = [curve]
    trainer.run()
    assert calls == [0, 1, 2, 3]
    assert [r.mlm is not None for r in curve.results] == [True] * 4 + [False] * 2
    assert [r.mlm_weight for r in curve.results] == [0.1] * 4 + [0.0] * 2
    assert curve.results[-1].loss == curve.results[-1].diffusion


def test_the_term_stays_while_the_u_net_is_frozen(toy_folder, dataset):
    _, history = run_with_history(
        toy_folder, dataset, num_steps=4, mlm_weight=0.1, freeze_at={"unet": 2}
    )
    assert all(r.mlm is not None for r in history.results)
    assert history.changed_in_step("textencoder") == [True] * 3


def test_the_term_ends_with_the_last_part_of_the_text_side(toy_folder, dataset):
    """Pivotal tuning: token embeddings and the text encoder's LoRA both are before the states."""
    rates = dataclasses.replace(RATES, embedding_lr=1e-3)
    freeze_at = {"embedding": 2, "textencoder": 4}
    _, history = run_with_history(
        toy_folder,
        dataset,
        mlm_weight=0.1,
        rates=rates,
        method_name="pivotal",
        freeze_at=freeze_at,
    )
    assert history.changed_in_step("embedding") == [True, False, False, False, False]
    assert history.changed_in_step("textencoder") == [True, True, True, False, False]
    assert history.changed_in_step("unet") == [True] * 5
    assert [r.mlm is not None for r in history.results] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("stop_at", [2, 3, 4], ids=["before", "at", "after"])
def test_a_resumed_run_freezes_as_the_straight_one(toy_folder, dataset, tmp_path, stop_at):
    settings = {
        "mlm_weight": 0.1,
        "dropout": 0.1,
        "optimizer_args": ("weight_decay=0.5",),
        "freeze_at": {"textencoder": 3},
    }
    straight, straight_history = run_with_history(toy_folder, dataset, **settings)
    stopper = StopAfter(stop_at, tmp_path / "a-state")
    with pytest.raises(Stopped):
        make_trainer(toy_folder, dataset, callbacks=[stopper], **settings).run()

    history = History()
    resumed = make_trainer(toy_folder, dataset, callbacks=[history], **settings)
    resumed.load_state(tmp_path / "a-state")
    resumed.run()
    assert_same(straight.method.state_dict(), resumed.method.state_dict())
    expected = straight_history.results[stop_at:]
    assert [r.loss for r in history.results] == [r.loss for r in expected]
    assert [r.mlm is None for r in history.results] == [r.mlm is None for r in expected]


def test_accumulated_gradients_of_a_frozen_part_are_none_of_its_steps(toy_folder, dataset):
    _, history = run_with_history(
        toy_folder, dataset, num_steps=3, accumulation=2, freeze_at={"textencoder": 2}
    )
    assert history.changed_in_step("textencoder") == [True, False]
    assert history.changed_in_step("unet") == [True, True]


def test_a_bad_loss_after_freezing_rolls_back_and_leaves_the_frozen_part(toy_folder, dataset):
    poison = Poison(nan_loss)
    trainer = make_trainer(toy_folder, dataset, callbacks=[poison], freeze_at={"textencoder": 1})
    with pytest.raises(NonFiniteLoss):
        trainer.run()
    assert_same(poison.stopped, poison.states[0])
    assert trainer.progress.current_step == 1
    assert all(not parameter.requires_grad for parameter in trainer.method.parts()["textencoder"])


class Poison(Callback):
    """Replaces the diffusion loss after two steps and records the state after each step."""

    def __init__(self, loss, folder=None):
        self.loss, self.folder, self.states, self.rates = loss, folder, [], []

    def on_step_end(self, trainer, result):
        self.states.append(trainer.method.state_dict())
        self.rates.append(trainer.scheduler.get_last_lr())
        if trainer.progress.current_step == 2:
            trainer.diffusion_loss = self.loss

    def on_stop(self, trainer):
        self.stopped = trainer.method.state_dict()
        if self.folder:
            trainer.save_state(self.folder)


def test_a_vae_that_overflows_is_distinguished_from_weights_that_diverged(toy_folder, dataset):
    trainer = make_trainer(toy_folder, dataset)
    trainer.models.vae.quant_conv.bias.data.fill_(math.inf)
    with pytest.raises(
        NonFiniteLatents, match=r"not finite in torch.float32 for .*\.png"
    ) as caught:
        trainer.run()
    assert caught.value.advice.startswith("no_half_vae")


def nan_loss(*_args, **_more):
    return torch.tensor(math.nan, requires_grad=True)


@pytest.mark.parametrize("optimizer_type", ["AdamW", "AdamWScheduleFree"])
def test_a_non_finite_loss_rolls_back_to_the_step_before(
    toy_folder, dataset, tmp_path, optimizer_type
):
    if "ScheduleFree" in optimizer_type:
        pytest.importorskip("schedulefree")
    settings = {"optimizer_type": optimizer_type}
    poison = Poison(nan_loss, tmp_path / "a-state")
    trainer = make_trainer(toy_folder, dataset, callbacks=[poison], **settings)
    with pytest.raises(NonFiniteLoss, match="loss is nan at step 3"):
        trainer.run()
    assert_same(poison.stopped, poison.states[0])  # step 2 made the weights that failed
    assert trainer.progress.current_step == trainer.progress.num_batches == 1
    assert trainer.scheduler.get_last_lr() == poison.rates[0]

    straight = make_trainer(toy_folder, dataset, num_steps=1, **settings)
    straight.run()
    for parameter, other in zip(
        trainer.method.parameters(), straight.method.parameters(), strict=True
    ):
        state, expected = trainer.optimizer.state[parameter], straight.optimizer.state[other]
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(torch.as_tensor(state[name]), torch.as_tensor(value)), name

    resumed = make_trainer(toy_folder, dataset, num_steps=3, **settings)
    resumed.load_state(tmp_path / "a-state")
    resumed.run()
    assert resumed.progress.current_step == 3


def test_a_bad_loss_among_several_batches_drops_the_gradients_of_all(toy_folder, dataset):
    trainer = make_trainer(toy_folder, dataset, accumulation=3, num_steps=4)
    before, plain, numbers = trainer.method.state_dict(), trainer.diffusion_loss, []
    before = {name: tensor.clone() for name, tensor in before.items()}

    def second_is_bad(*inputs, **masks):
        numbers.append(len(numbers))
        return plain(*inputs, **masks) * (math.inf if numbers[-1] == 1 else 1.0)

    trainer.diffusion_loss = second_is_bad
    with pytest.raises(NonFiniteLoss, match=r"loss is inf at step 1 \(diffusion inf, mlm None\)"):
        trainer.run()
    assert_same(before, trainer.method.state_dict())
    assert all(parameter.grad is None for parameter in trainer.method.parameters())


def test_a_term_that_is_not_finite_is_distinguished_from_the_rest(toy_folder, dataset):
    trainer = make_trainer(toy_folder, dataset, mlm_weight=0.5)
    regularizer = trainer.regularizer
    trainer.regularizer = lambda number: regularizer(number)._replace(
        loss=regularizer(number).loss * math.nan
    )
    with pytest.raises(NonFiniteLoss, match=r"loss is nan at step 1 \(diffusion \d\.\d+, mlm nan"):
        trainer.run()


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_an_infinite_gradient_stops_before_it_reaches_the_weights(
    toy_folder, dataset, max_grad_norm
):
    poison = Poison(None)
    trainer = make_trainer(toy_folder, dataset, callbacks=[poison])
    trainer.max_grad_norm = max_grad_norm
    parameter = trainer.method.parameters()[0]
    poison.loss = lambda *_args, **_more: (parameter - parameter.detach()).abs().sqrt().sum()
    with pytest.raises(NonFiniteLoss, match="gradient is (nan|inf) at step 3"):
        trainer.run()
    assert_same(poison.stopped, poison.states[0])
    assert all(p.isfinite().all() for p in trainer.method.parameters())


def test_a_network_too_large_for_a_copy_keeps_its_last_weights(
    toy_folder, dataset, monkeypatch, caplog
):
    monkeypatch.setattr(rollback, "LIMIT", 1000)
    poison = Poison(nan_loss)
    trainer = make_trainer(toy_folder, dataset, callbacks=[poison])
    with pytest.raises(NonFiniteLoss):
        trainer.run()
    assert_same(poison.stopped, poison.states[1])
    assert trainer.progress.current_step == 2
    assert "no copy of the step before" in caplog.text


def test_saving_every_step_changes_nothing_for_a_schedule_free_optimizer(toy_folder, dataset):
    pytest.importorskip("schedulefree")

    class SaveEveryStep(Callback):
        def __init__(self):
            self.moved = False

        def on_step_end(self, trainer, result):
            trained = trainer.method.state_dict()
            with trainer.evaluating():
                saved = trainer.method.state_dict()
            self.moved |= any((saved[name] != trained[name]).any() for name in saved)

    settings = {"optimizer_type": "AdamWScheduleFree"}
    plain, _ = run(toy_folder, dataset, **settings)
    saver = SaveEveryStep()
    trainer = make_trainer(toy_folder, dataset, callbacks=[saver], **settings)
    trainer.run()
    assert saver.moved  # the saved weights are the averaged ones
    assert_same(plain, trainer.method.state_dict())


class MemoryTracker(GeneralTracker):
    """Keeps what is logged."""

    name, requires_logging_directory = "memory", False

    def __init__(self):
        super().__init__(_blank=True)
        self.logged, self.finished = [], False

    @property
    def tracker(self):
        return self.logged

    def log(self, values, step=None, **_more):
        self.logged.append(values)

    def finish(self):
        self.finished = True


def curve_loggers(trainer):
    (text_encoder,) = trainer.models.text_encoders  # a new LoRA leaves its states unchanged
    drift = DriftWatch({"te/drift_cos": TextDrift(text_encoder)})
    curves = CurveLogger(drift)
    return [drift, curves, TrackerCloser(curves)]


def test_the_end_of_the_curves_leaves_the_processes_together(toy_folder, dataset, tmp_path):
    class Exchange(Callback):
        def on_train_end(self, trainer):
            torch.distributed.barrier()  # as saving a state does

    trainer = make_trainer(toy_folder, dataset, num_steps=1)
    trainer.callbacks = [*curve_loggers(trainer), Exchange()]
    tracker = MemoryTracker()
    trainer.accelerator.trackers = [tracker]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        trainer.run()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert tracker.finished
    assert any("loss/current" in values for values in tracker.logged)


def test_an_epoch_without_steps_of_its_own_has_no_average(toy_folder, dataset):
    trainer = make_trainer(toy_folder, dataset, num_steps=4)
    trainer.callbacks = curve_loggers(trainer)
    tracker = MemoryTracker()
    trainer.accelerator.trackers = [tracker]
    trainer.progress = dataclasses.replace(
        trainer.progress, current_step=3, batches_in_epoch=3, num_batches=3
    )  # the state of an epoch's last step
    trainer.run()
    assert trainer.progress.current_step == 4
    assert not any("loss/epoch_average" in values for values in tracker.logged)


def test_an_epoch_ends_with_its_last_batch_and_callbacks_hear_of_it(toy_folder, dataset):
    events = []

    class Notes(Callback):
        def on_train_start(self, trainer):
            events.append("start")

        def on_step_end(self, trainer, result):
            events.append(trainer.progress.current_step)

        def on_epoch_end(self, trainer):
            events.append(f"epoch {trainer.progress.current_epoch}")

        def on_train_end(self, trainer):
            events.append("end")

    assert len(dataset) == 3  # five pictures in batches of two
    make_trainer(toy_folder, dataset, num_steps=5, accumulation=2, callbacks=[Notes()]).run()
    assert events == ["start", 1, 2, "epoch 1", 3, 4, "epoch 2", 5, "end"]


def test_a_state_of_another_seed_or_trainer_is_refused(toy_folder, dataset, tmp_path):
    trainer = make_trainer(toy_folder, dataset, num_steps=1)
    trainer.run()
    trainer.save_state(tmp_path / "a-state")
    other = make_trainer(toy_folder, dataset)
    other.identity = dataclasses.replace(other.identity, seed=8)
    with pytest.raises(ValueError, match="seed 7, now it is 8"):
        other.load_state(tmp_path / "a-state")
    (tmp_path / "a-state" / "train_state.json").write_text('{"current_epoch": 1}')
    with pytest.raises(ValueError, match="network_weights"):
        trainer.load_state(tmp_path / "a-state")
    with pytest.raises(ValueError, match="not a training state"):
        trainer.load_state(tmp_path / "absent-state")


def test_a_state_of_other_settings_is_refused_by_name(toy_folder, dataset, tmp_path):
    options = {"unet_lr": "0.001", "optimizer_type": "AdamW", "train_batch_size": "2"}
    trainer = make_trainer(toy_folder, dataset, options=options)
    trainer.save_state(tmp_path / "a-state")
    trainer.load_state(tmp_path / "a-state")
    settings = {"unet_lr": "1e-06", "optimizer_type": "AdamW", "network_dim": "4"}
    trainer.identity = dataclasses.replace(trainer.identity, settings=settings)
    with pytest.raises(UserError) as refused:
        trainer.load_state(tmp_path / "a-state")
    for text in (
        "network_dim not set (now 4), train_batch_size 2 (now not set), unet_lr 0.001 (now 1e-06)",
        "give the old values",
        "network_weights",
    ):
        assert text in str(refused.value)
    assert "optimizer_type" not in str(refused.value)

    newer = {**options, "directional_embedding": "False"}
    trainer.identity = dataclasses.replace(trainer.identity, settings=newer)
    trainer.load_state(tmp_path / "a-state")  # of a version without this option
    trainer.identity = dataclasses.replace(
        trainer.identity, settings=newer | {"directional_embedding": "True"}
    )
    with pytest.raises(UserError, match=r"directional_embedding not set \(now True\)"):
        trainer.load_state(tmp_path / "a-state")

    trainer.identity = dataclasses.replace(trainer.identity, settings=settings)
    file = tmp_path / "a-state" / "train_state.json"
    values = json.loads(file.read_text())
    del values["settings"]
    file.write_text(json.dumps(values))
    trainer.load_state(tmp_path / "a-state")  # of a version that stored none


def test_a_state_of_other_optimizer_groups_is_refused(toy_folder, dataset, tmp_path):
    trainer = make_trainer(toy_folder, dataset, num_steps=1)
    trainer.run()
    trainer.save_state(tmp_path / "a-state")
    rates = OptimizerOptions(unet_lr=1e-3, text_encoder_lr=(0.0,))
    other = make_trainer(toy_folder, dataset, rates=rates)
    with pytest.raises(UserError, match="parameter group.*network_weights"):
        other.load_state(tmp_path / "a-state")


def test_any_error_saves_the_steps_done_and_stays_the_error(toy_folder, dataset, tmp_path, caplog):
    class Unwell(Callback):
        def on_stop(self, trainer):
            raise OSError("disk full")

    class Save(Callback):
        def on_stop(self, trainer):
            trainer.save_state(tmp_path / "a-state")

    def vanish(*_args, **_more):
        raise FileNotFoundError("a picture is gone")

    poison = Poison(vanish)
    trainer = make_trainer(toy_folder, dataset, num_steps=4, callbacks=[poison, Unwell(), Save()])
    with pytest.raises(FileNotFoundError, match="a picture is gone"):
        trainer.run()
    assert "disk full" in caplog.text
    resumed = make_trainer(toy_folder, dataset, num_steps=4)
    resumed.load_state(tmp_path / "a-state")
    assert resumed.progress.current_step == 2
    assert_same(resumed.method.state_dict(), poison.states[1])


def test_an_error_before_the_first_step_saves_nothing(toy_folder, dataset):
    stops = []

    class Save(Callback):
        def on_stop(self, trainer):
            stops.append(trainer)

    def vanish(*_args, **_more):
        raise FileNotFoundError("a picture is gone")

    trainer = make_trainer(toy_folder, dataset, callbacks=[Save()])
    trainer.diffusion_loss = vanish
    with pytest.raises(FileNotFoundError):
        trainer.run()
    assert not stops


def test_a_state_folder_is_complete_or_absent(toy_folder, dataset, tmp_path, monkeypatch):
    from mlm_plugin.training import state

    trainer = make_trainer(toy_folder, dataset, num_steps=1)

    def fail(*_args, **_more):
        raise OSError("disk full")

    monkeypatch.setattr(state, "write_weights", fail)
    with pytest.raises(OSError, match="disk full"):
        trainer.save_state(tmp_path / "a-state")
    assert list(tmp_path.iterdir()) == []


def test_saving_over_an_old_state_replaces_it(toy_folder, dataset, tmp_path):
    trainer = make_trainer(toy_folder, dataset, num_steps=1)
    (tmp_path / "a-state").mkdir()
    (tmp_path / "a-state" / "stale").touch()
    trainer.save_state(tmp_path / "a-state")
    assert [path.name for path in tmp_path.iterdir()] == ["a-state"]
    assert not (tmp_path / "a-state" / "stale").exists()
    names = {path.name for path in (tmp_path / "a-state").iterdir()}
    assert {"model.safetensors", "optimizer.bin", "scheduler.bin", "train_state.json"} <= names
