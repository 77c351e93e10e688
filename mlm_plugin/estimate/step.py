"""The training step on the meta device: what lives at its peak, and at the peaks around it.

Runs the trainer's own forward pass, autograd's own backward pass and gradient checkpointing itself,
so whatever these keep is counted. Makes no models and reads no files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mlm_plugin.config.options import TrainConfig
from mlm_plugin.data.dataset import Batch
from mlm_plugin.estimate.live_bytes import LiveBytes
from mlm_plugin.estimate.on_meta import OnMeta
from mlm_plugin.estimate.optimizer_states import OptimizerBytes
from mlm_plugin.methods import WEIGHT_DTYPES, Method
from mlm_plugin.mlm.regularizer import MLMRegularizer
from mlm_plugin.models.conditioning import Conditioning
from mlm_plugin.training.diffusion_loss import DiffusionLoss
from mlm_plugin.training.forward import batch_diffusion_loss, term_output
from mlm_plugin.training.rollback import LIMIT

__all__ = ["LABELS", "Moment", "Training", "caching_peak", "optimizer_peak", "step_peak"]

UNET, TEXT, VAE = "U-Net", "text encoders", "VAE"
TRAINED, CONTEXTUALIZERS = "trained weights", "contextualizers"
UNTRAINED = "untrained keys, values"
STATES, COPY, GRADIENTS = "optimizer states", "copy of the step before", "gradients"
UNET_KEPT, TEXT_KEPT, MLM_KEPT = "kept of the U-Net", "kept of the captions", "kept of the MLM term"
WORKING = "working memory"

LABELS = {
    UNET: "frozen weights",
    TEXT: "frozen weights",
    VAE: "frozen weights, where latents are not cached",
    TRAINED: "of the method",
    CONTEXTUALIZERS: "of the MLM term",
    UNTRAINED: "what the MLM term compares with, in half precision",
    STATES: "kept from step to step",
    COPY: "to undo a step with a loss that is not finite",
    GRADIENTS: "of the trained weights",
    UNET_KEPT: "activations that the backward pass reads",
    TEXT_KEPT: "the same of the text encoders",
    MLM_KEPT: "the same of text encoders and contextualizers",
    WORKING: "temporary tensors",
}
"""What bytes belong to, in the order of the table, and what that is."""

Moment = Counter[str]
"""Bytes by label that live at one moment."""


@dataclass(frozen=True)
class Training:
    """A run on the meta device, ready for one step.

    Attributes:
        config: its options.
        method: what is trained, with its models.
        diffusion_loss: of the run.
        batch: a batch of the run's size; latents on the meta device, or pictures.
        regularizer: the MLM term, or ``None``.
        optimizer: its bytes.
        fused: what the optimizer steps inside the backward pass, where its gradients are freed.
        fused_working: bytes that the optimizer needs for the largest of these.
    """

    config: TrainConfig
    method: Method
    diffusion_loss: DiffusionLoss
    batch: Batch
    regularizer: MLMRegularizer | None
    optimizer: OptimizerBytes
    fused: Sequence[nn.Parameter] = ()
    fused_working: int = 0

    @property
    def dtype(self) -> torch.dtype | None:
        """What mixed precision computes in; ``None`` = it is off."""
        dtype = WEIGHT_DTYPES[self.config.schedule.mixed_precision]
        return None if dtype == torch.float32 else dtype


def step_peak(training: Training) -> Moment:
    """What lives when the passes of one batch need most: those of one loss, then of the other.

    Leaves gradients and hooks at the parameters.
    """
    method, on_meta, live = training.method, OnMeta(), _resident_in_step(training)
    _count_gradients(training, live)
    method.train(True)
    cached = training.config.dataset.cache_text_encoder_outputs
    encode = _captions_from_cache(training) if cached else method.encode
    autocast = partial(on_meta.autocast, training.dtype)
    place = {"device": torch.device("meta"), "autocast": autocast}

    def passes(loss_of: Callable[[], Tensor], label: str) -> None:
        with live.labelled(label):
            loss = loss_of()
        with live.labelled(WORKING):
            on_meta.backward(loss, training.dtype)

    with on_meta, live:
        diffusion = partial(
            batch_diffusion_loss,
            training.batch,
            models=method.models,
            encode=live.labelled(TEXT_KEPT)(encode),
            diffusion_loss=training.diffusion_loss,
            **place,
        )
        passes(diffusion, UNET_KEPT)
        if training.regularizer:
            term = partial(training.regularizer, 0)
            passes(lambda: term_output(term, **place).loss, MLM_KEPT)
    fused = Counter({WORKING: training.fused_working})
    return live.at_peak + fused + _kept_between_steps(training)


def optimizer_peak(training: Training) -> Moment:
    """What lives while the optimizer steps: no activations, but all gradients that are left."""
    left = set(training.method.parameters()).difference(training.fused)
    gradients = sum(parameter.nbytes for parameter in left)
    extra = Counter({GRADIENTS: gradients, WORKING: training.optimizer.working})
    return _resident_in_step(training).live + extra + _kept_between_steps(training)


def caching_peak(training: Training) -> Moment:
    """What lives while the VAE encodes pictures beforehand: all but the U-Net."""
    live, vae = _resident(training, TEXT, VAE), training.method.models.vae
    size = training.config.dataset.vae_batch_size, 3, *training.batch.original_sizes[0]
    with torch.no_grad(), OnMeta(), live, live.labelled(WORKING):
        pixels = torch.empty(size, dtype=vae.dtype, device="meta")
        vae.encode(pixels).latent_dist.sample().float()
    return live.at_peak


def _resident_in_step(training: Training) -> LiveBytes:
    """What lies on the GPU between two steps."""
    labels = [UNET]
    if not training.config.dataset.cache_text_encoder_outputs:
        labels.append(TEXT)
    if training.batch.latents is None:
        labels.append(VAE)
    return _resident(training, *labels)


def _resident(training: Training, *labels: str) -> LiveBytes:
    """The frozen weights under these labels, the trained ones of the same networks, the term."""
    live, models = LiveBytes(), training.method.models
    networks = {
        UNET: [models.unet],
        TEXT: [text_encoder.model for text_encoder in models.text_encoders],
        VAE: [models.vae],
    }
    for label in labels:
        for network in networks[label]:
            live.hold(_weights(network), label)
    away = set() if UNET in labels else set(models.unet.parameters())
    trained = [p for members in training.method.parts().values() for p in members]
    live.hold([parameter for parameter in trained if parameter not in away], TRAINED)
    encoders = training.regularizer.encoders if training.regularizer else ()
    for encoder in (encoder for encoder in encoders if encoder.contextualizer is not None):
        live.hold(_weights(encoder.contextualizer), CONTEXTUALIZERS)
        live.hold([encoder.token_table], CONTEXTUALIZERS if _is_copy(encoder) else TEXT)
    if training.regularizer and training.regularizer.cross_attention:
        live.hold(training.regularizer.cross_attention.copies, UNTRAINED)
    return live


def _count_gradients(training: Training, live: LiveBytes) -> None:
    """Count gradients under their label from when they exist to when they are freed."""
    parameters = training.method.parameters()
    if training.config.schedule.gradient_accumulation_steps > 1:  # they exist from the start
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        live.hold([parameter.grad for parameter in parameters], GRADIENTS)
    live.hold_gradients(parameters, GRADIENTS)
    for parameter in training.fused:
        parameter.register_post_accumulate_grad_hook(_free_gradient)


def _captions_from_cache(training: Training) -> Callable[[Sequence[str]], Conditioning]:
    """Captions as they arrive from the CPU's memory: the text encoders have left the GPU."""
    with torch.no_grad(), OnMeta() as on_meta, on_meta.autocast(training.dtype):
        found = training.method.encode(training.batch.captions)
    kept = found.to(training.method.models.unet.dtype)
    return lambda _captions: Conditioning(
        *(part if part is None else part.clone() for part in kept)
    )


def _free_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _kept_between_steps(training: Training) -> Moment:
    """Optimizer states, and the copy of them and the weights, where they are small enough."""
    trained = sum(parameter.nbytes for parameter in training.method.parameters())
    changed = trained + training.optimizer.states
    return Counter({STATES: training.optimizer.states, COPY: changed if changed <= LIMIT else 0})


def _weights(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _is_copy(encoder) -> bool:
    return (
        encoder.token_table.untyped_storage()._cdata
        != encoder.embedding.weight.untyped_storage()._cdata
    )
