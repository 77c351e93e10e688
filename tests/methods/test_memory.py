"""The predicted memory of every method is that of its real training step on the toy."""

import pytest

from mlm_plugin.commands.estimate import estimate_of
from mlm_plugin.estimate.live_bytes import LiveBytes, storage_bytes
from mlm_plugin.estimate.options import parse_estimate
from mlm_plugin.estimate.step import GRADIENTS, STATES, TRAINED, UNET, UNTRAINED
from mlm_plugin.methods import METHODS
from mlm_plugin.models.key_values import matrices_of
from mlm_plugin.training.callbacks import Callback

pytestmark = pytest.mark.usefixtures("all_targets")  # they take memory

SDXL_METHODS = [name for name, method in METHODS.items() if method.supports_sdxl]
CLOSE = 0.10


class StartAnew(Callback):
    """The first step makes the optimizer's states; peaks count from the second."""

    def __init__(self, live):
        self.live = live

    def on_step_end(self, trainer, _result):
        if trainer.progress.current_step == 1:
            self.live.reset_peak()


def real_peak(trainer):
    """Bytes at the peak of the second step of a real run on the CPU."""
    live, models = LiveBytes("cpu"), trainer.models
    networks = [models.unet, *(te.model for te in models.text_encoders)]
    networks += [e.contextualizer for e in trainer.regularizer.encoders if e.contextualizer]
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    if trainer.regularizer.cross_attention:
        tensors += trainer.regularizer.cross_attention.copies
    live.hold([*tensors, *trainer.method.parameters()], "resident")
    trainer.callbacks = [StartAnew(live)]
    with live:
        trainer.run()
    return live.peak


def predicted(method, folder, **options):
    values = {
        "method": method,
        "pretrained_model_name_or_path": folder,
        "output_dir": "unused",
        "resolution": 64,
        "network_dim": 4,
        "network_alpha": 4,
        "learning_rate": 2e-3,
        "train_batch_size": 2,
        "mlm_target": "class",
        "mlm_batch_size": 2,
        **options,
    }
    flags = [f"--{k}" if v is True else f"--{k}={v}" for k, v in values.items()]
    return estimate_of(parse_estimate([*flags, "--cache_latents"]).config)


@pytest.mark.parametrize(
    ("method", "target"),
    [*((method, "states") for method in METHODS), ("lora", "class"), ("xti", "class")],
)
def test_the_step_takes_what_was_predicted(method, target, trainer_of, toy_folder):
    options = {"optimizer_type": "SGDNesterov", "mlm_target": target}
    trainer = trainer_of(method, steps=2, cache_latents=True, **options)
    moment = predicted(method, toy_folder, **options).moments["training step"]
    trained = sum(p.nbytes for p in trainer.method.parameters())
    assert moment[TRAINED] == moment[STATES] == trained
    assert moment[GRADIENTS] <= trained
    assert moment.total() == pytest.approx(real_peak(trainer), rel=CLOSE)


@pytest.mark.parametrize(
    "method",  # pivotal is lora and textual_inversion together
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in ("lora", "textual_inversion")))
        for name in SDXL_METHODS
    ],
)
def test_the_step_takes_what_was_predicted_in_sdxl(method, sdxl_trainer_of, toy_sdxl_folder):
    options = {"optimizer_type": "SGDNesterov", "gradient_checkpointing": True}
    trainer = sdxl_trainer_of(method, steps=2, cache_latents=True, **options)
    moment = predicted(method, toy_sdxl_folder, **options).moments["training step"]
    assert moment.total() == pytest.approx(real_peak(trainer), rel=CLOSE)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_packed_u_net_takes_what_was_predicted(kind, sdxl_trainer_of, toy_sdxl_folder):
    options = {"optimizer_type": "SGDNesterov", "gradient_checkpointing": True}
    options["quantize_unet"] = kind
    trainer = sdxl_trainer_of("lora", steps=2, cache_latents=True, **options)
    moment = predicted("lora", toy_sdxl_folder, **options).moments["training step"]
    unet = trainer.models.unet
    tensors = [*unet.named_parameters(), *unet.named_buffers()]
    assert moment[UNET] == storage_bytes([t for name, t in tensors if ".lora_" not in name])
    assert moment.total() == pytest.approx(real_peak(trainer), rel=CLOSE)


def test_steps_inside_the_backward_pass_take_what_was_predicted(trainer_of, toy_folder):
    sgd = {"optimizer_type": "SGDNesterov", "mlm_target": "states"}
    fusing = {"fused_backward_pass": True}
    trainer = trainer_of("dreambooth", steps=2, cache_latents=True, **sgd, **fusing)
    fused, plain = (
        predicted("dreambooth", toy_folder, **sgd, **more).moments for more in (fusing, {})
    )
    moment = fused["training step"]
    assert moment.total() == pytest.approx(real_peak(trainer), rel=CLOSE)
    assert moment.total() < plain["training step"].total()
    read = [layer.weight for pair in matrices_of(trainer.models.unet) for layer in pair]
    kept = [*trainer.method.parts()["textencoder"], *read]
    assert fused["optimizer step"][GRADIENTS] == sum(weight.nbytes for weight in kept)


@pytest.mark.parametrize("method", ["dreambooth", "custom_diffusion", "lora"])
def test_untrained_keys_and_values_are_counted_where_training_changes_them(
    method, trainer_of, toy_folder
):
    trainer = trainer_of(method, mlm_target="states")
    copied = trainer.method.trains_base_weights
    read = [layer.weight for pair in matrices_of(trainer.models.unet) for layer in pair]
    expected = 2 * sum(weight.numel() for weight in read) if copied else 0
    assert copied == (method != "lora")
    assert storage_bytes(trainer.regularizer.cross_attention.copies) == expected
    for moment in predicted(method, toy_folder, mlm_target="states").moments.values():
        assert moment[UNTRAINED] == expected


def test_two_batches_a_step_hold_gradients_all_the_time(toy_folder):
    one = predicted("dreambooth", toy_folder)
    two = predicted("dreambooth", toy_folder, gradient_accumulation_steps=2)
    assert two.moments["training step"][GRADIENTS] == two.moments["training step"][TRAINED]
    assert two.peak > one.peak


def test_cached_captions_leave_no_text_encoder_on_the_card(toy_folder):
    cached = predicted(
        "lora",
        toy_folder,
        cache_text_encoder_outputs=True,
        network_train_unet_only=True,
        mlm_loss_weight=0,
    )
    assert cached.moments["training step"]["text encoders"] == 0
    assert cached.moments["training step"]["contextualizers"] == 0
    states = 2 * 77 * 32 * 4  # of two captions, and no weights among them
    assert cached.moments["training step"]["kept of the captions"] <= 2 * states
