"""The two losses go backward one after the other: the gradients of the sum, the memory of one."""

import random

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlm_plugin.errors import UserError
from mlm_plugin.estimate.live_bytes import LiveBytes
from mlm_plugin.methods import METHODS
from mlm_plugin.training.callbacks import Callback
from mlm_plugin.training.guards import NonFiniteLoss

SDXL_METHODS = [name for name, method in METHODS.items() if method.supports_sdxl]
aten = torch.ops.aten
WEIGHT = 0.5
LYCORIS = ("locon", "loha", "lokr", "ia3", "glora", "diag-oft", "boft", "full")


def gradients_of(trainer, backward):
    """Gradients of everything that is trained, by the same noise and dropout each time."""
    torch.manual_seed(5)
    random.seed(5)
    trainer.method.train(True)
    trainer.optimizer.zero_grad(set_to_none=True)
    backward(next(iter(trainer.loader)))
    return [None if p.grad is None else p.grad.clone() for p in trainer.method.parameters()]


def tensors_of(trainer):
    """Tensors that are on the device for the whole run."""
    models = trainer.models
    networks = [models.unet, models.vae, *(te.model for te in models.text_encoders)]
    networks += [encoder.contextualizer for encoder in trainer.regularizer.encoders]
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    return [*tensors, *trainer.method.parameters()]


def assert_passes_add_up(trainer):
    def together(batch):
        loss = trainer._diffusion_loss(batch) + WEIGHT * trainer._term(3).loss
        trainer.accelerator.backward(loss)

    expected = gradients_of(trainer, together)
    found = gradients_of(trainer, lambda batch: trainer._backward(batch, 3, WEIGHT))
    assert any(gradient is not None and gradient.any() for gradient in expected)
    for a, b in zip(expected, found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6 * float(a.abs().max() + 1))


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_two_passes_give_the_gradients_of_the_sum(name, trainer_of):
    assert_passes_add_up(trainer_of(name))


@pytest.mark.parametrize("name", SDXL_METHODS)
def test_two_passes_give_the_gradients_of_the_sum_in_sdxl(name, sdxl_trainer_of):
    assert_passes_add_up(sdxl_trainer_of(name, gradient_checkpointing=True))


def test_accumulation_checkpointing_and_dropout_change_nothing_of_that(trainer_of):
    trainer = trainer_of(
        "lora",
        gradient_accumulation_steps=3,
        gradient_checkpointing=True,
        network_dropout=0.2,
        network_args=["rank_dropout=0.2", "module_dropout=0.2", "conv_dim=2"],
    )
    assert_passes_add_up(trainer)


@pytest.mark.parametrize("arguments", [*([f"algo={a}"] for a in LYCORIS), ["dora_wd=True"]])
def test_adapters_of_lycoris_share_nothing_between_the_passes(arguments, trainer_of):
    pytest.importorskip("lycoris")
    module = {"network_module": "lycoris.kohya", "network_args": arguments}
    assert_passes_add_up(trainer_of("lora", **module))


def test_a_gradient_scaler_scales_both_passes(trainer_of):
    trainer = trainer_of("pivotal")
    plain = gradients_of(trainer, lambda batch: trainer._backward(batch, 3, WEIGHT))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = gradients_of(trainer, lambda batch: trainer._backward(batch, 3, WEIGHT))
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(b / 1024, a)


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_what_the_first_pass_kept_is_gone_before_the_second(name, checkpointing, trainer_of):
    options = {"gradient_checkpointing": True} if checkpointing else {}
    trainer = trainer_of(name, cache_latents=True, **options)
    trainer.method.train(True)
    live, regularizer, found = LiveBytes("cpu"), trainer.regularizer, {}
    live.hold(tensors_of(trainer), "resident")
    live.hold_gradients(trainer.method.parameters(), "gradients")
    resident = live.live["resident"]

    def term(number):
        found["left"] = sum(live.live.values()) - resident - live.live["gradients"]
        found["peak"] = live.peak - resident
        return regularizer(number)

    trainer.regularizer = term
    with live:
        trainer._backward(next(iter(trainer.loader)), 0, WEIGHT)
    assert found["left"] < 0.01 * found["peak"]


# --- waiting for the device -------------------------------------------------------------------

READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)


class DeviceReads(TorchDispatchMode):
    """Records every read of a value that would be on the GPU: of the models or derived from them.

    What was drawn and masked on the CPU stays out of it, as on a GPU.
    """

    def __init__(self, tensors, monkeypatch):
        super().__init__()
        self.reads, self._on_device = [], {}
        self._note(tensors)
        monkeypatch.setattr(Tensor, "tolist", self._watched("tolist"))
        monkeypatch.setattr(Tensor, "numpy", self._watched("numpy"))
        monkeypatch.setattr(Tensor, "cpu", self._watched("cpu"))

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        derived = any(map(self._is_on_device, tensors))
        masks = any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
        if derived and (func in READS or (func is aten.index.Tensor and masks)):
            self.reads.append(str(func))
        result = func(*args, **(kwargs or {}))
        if derived:
            self._note(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _is_on_device(self, tensor):
        return tensor.untyped_storage()._cdata in self._on_device

    def _note(self, tensors):
        for tensor in tensors:
            storage = tensor.untyped_storage()  # kept, so that no other one gets its address
            self._on_device[storage._cdata] = storage

    def _watched(self, name):
        plain = getattr(Tensor, name)

        def watched(tensor, *args, **kwargs):
            if self._is_on_device(tensor):
                self.reads.append(name)
            return plain(tensor, *args, **kwargs)

        return watched


def reads_of_a_step(trainer, monkeypatch):
    """Reads of the second optimizer step."""
    trainer.method.train(True)
    batches = iter(trainer.loader)
    trainer._train_step([next(batches)], exit_code=0)
    reads = DeviceReads(tensors_of(trainer), monkeypatch)
    batch = next(batches)
    with reads:
        trainer._train_step([batch], exit_code=0)
    return reads.reads


@pytest.mark.parametrize("name", METHODS)
def test_a_step_waits_for_its_device_once(name, trainer_of, monkeypatch):
    trainer = trainer_of(name, min_snr_gamma=5, noise_offset=0.05)
    assert reads_of_a_step(trainer, monkeypatch) == ["tolist"]


def test_a_step_waits_for_its_device_once_in_sdxl(sdxl_trainer_of, monkeypatch):
    trainer = sdxl_trainer_of("pivotal", gradient_checkpointing=True, cache_latents=True)
    assert reads_of_a_step(trainer, monkeypatch) == ["tolist"]


def test_limiting_norms_makes_nobody_wait(trainer_of, monkeypatch):
    trainer = trainer_of("lora", scale_weight_norms=0.1, network_dropout=0.1)
    assert reads_of_a_step(trainer, monkeypatch) == ["tolist"]


def test_steps_inside_the_backward_pass_check_the_loss_before_it(trainer_of, monkeypatch):
    trainer = trainer_of("dreambooth", fused_backward_pass=True, optimizer_type="SGDNesterov")
    assert reads_of_a_step(trainer, monkeypatch) == ["aten._local_scalar_dense.default", "tolist"]


# --- steps inside the backward pass ------------------------------------------------------------


class After(Callback):
    """Keeps the weights after every step, and after two steps puts another loss in place."""

    def __init__(self, loss=None):
        self.loss, self.states = loss, []

    def on_step_end(self, trainer, result):
        state = trainer.method.state_dict()
        self.states.append({name: tensor.clone() for name, tensor in state.items()})
        if self.loss and trainer.progress.current_step == 2:
            trainer.diffusion_loss = self.loss


def dreambooth(trainer_of, *, loss=None, **options):
    options = {
        "optimizer_type": "SGDNesterov",
        "max_grad_norm": 0,
        "learning_rate": 0.05,
        **options,
    }
    trainer = trainer_of("dreambooth", mlm_loss_weight=0.5, **options)
    trainer.callbacks = [After(loss)]
    return trainer, trainer.callbacks[0]


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("target", "checkpointing"), [("class", False), ("states", True)])
def test_a_run_with_steps_inside_the_backward_pass_is_the_same_run(
    target, checkpointing, trainer_of
):
    """Keys and values, which the term reads where states are compared, are stepped once too."""
    options = {"lr_scheduler": "linear", "mlm_target": target}
    if checkpointing:
        options["gradient_checkpointing"] = True
    plain, _ = dreambooth(trainer_of, **options)
    start = {name: tensor.clone() for name, tensor in plain.method.state_dict().items()}
    plain.run()
    end = plain.method.state_dict()
    fused, _ = dreambooth(trainer_of, fused_backward_pass=True, **options)  # seeds again
    fused.run()
    assert_same(end, fused.method.state_dict())
    moved = {name.partition(".")[0] for name in end if (end[name] != start[name]).any()}
    assert moved == {"unet", "textencoder"}


def test_such_a_run_is_resumed_exactly(trainer_of, tmp_path):
    options = {"fused_backward_pass": True, "optimizer_type": "AdamW", "learning_rate": 1e-4}
    options["max_grad_norm"] = 1.0
    straight, _ = dreambooth(trainer_of, **options)
    straight.run()
    first, _ = dreambooth(trainer_of, steps=2, **options)
    first.run()
    first.save_state(tmp_path / "state")
    second, _ = dreambooth(trainer_of, **options)
    second.load_state(tmp_path / "state")
    second.run()
    assert_same(straight.method.state_dict(), second.method.state_dict())


def test_a_bad_loss_never_reaches_weights_that_are_stepped_at_once(trainer_of):
    def bad(*_args, **_more):
        return sum(p.sum() for p in trainer.models.unet.parameters()) * float("nan")

    trainer, after = dreambooth(trainer_of, fused_backward_pass=True, loss=bad)
    with pytest.raises(NonFiniteLoss, match="the loss is nan at step 3"):
        trainer.run()
    assert_same(trainer.method.state_dict(), after.states[0])  # step 2 made the weights that failed
    assert trainer.progress.current_step == 1


def test_a_bad_gradient_takes_back_the_step_that_is_half_done(trainer_of):
    def bad(*_args, **_more):
        weights = list(trainer.models.unet.parameters())
        root = (weights[0] - weights[0].detach()).abs().sqrt().sum()
        return root + sum(weight.square().mean() for weight in weights[1:])

    trainer, after = dreambooth(trainer_of, fused_backward_pass=True, loss=bad)
    with pytest.raises(NonFiniteLoss, match="the norm of the gradient is (nan|inf) at step 3"):
        trainer.run()
    assert_same(trainer.method.state_dict(), after.states[1])
    assert trainer.progress.current_step == 2
    assert all(p.grad is None for p in trainer.method.parameters())


def test_steps_inside_the_backward_pass_are_for_one_process(trainer_of, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda _: 2))
    with pytest.raises(UserError, match="fused_backward_pass cannot be combined with 2 processes"):
        trainer_of("dreambooth", fused_backward_pass=True)


def test_an_optimizer_that_must_see_all_tensors_at_once_is_refused(trainer_of):
    options = {"fused_backward_pass": True, "optimizer_type": "LBFGS"}
    with pytest.raises(UserError, match="fused_backward_pass.*'LBFGS'.*Adafactor"):
        trainer_of("dreambooth", no_train_text_encoder=True, mlm_loss_weight=0, **options)
