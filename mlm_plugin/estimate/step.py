"""The training step on the meta device: what lives at its peak, and at the peaks around it.

Runs the trainer's own forward pass, autograd's own backward pass and gradient checkpointing itself,
so whatever these keep is counted. Knows no options and no files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mlm_plugin.data.dataset import Batch
from mlm_plugin.estimate.live_bytes import LiveBytes
from mlm_plugin.estimate.on_meta import OnMeta
from mlm_plugin.estimate.optimizer_states import OptimizerBytes
from mlm_plugin.methods.base import Method
from mlm_plugin.mlm.regularizer import MLMRegularizer
from mlm_plugin.models.conditioning import Conditioning
from mlm_plugin.training.diffusion_loss import DiffusionLoss
from mlm_plugin.training.forward import batch_diffusion_loss, term_output
from mlm_plugin.training.rollback import LIMIT

__all__ = ["LABELS", "Moment", "Training", "caching_peak", "optimizer_peak", "step_peak"]

UNET, TEXT, VAE = "U-Net", "text encoders", "VAE"
TRAINED, CONTEXTUALIZERS = "trained weights", "contextualizers"
STATES, COPY, GRADIENTS = "optimizer states", "copy of the step before", "gradients"
UNET_KEPT, TEXT_KEPT, MLM_KEPT = "kept of the U-Net", "kept of the captions", "kept of the MLM term"
WORKING = "working memory"

LABELS = {
    UNET: "frozen weights",
    TEXT: "frozen weights",
    VAE: "frozen weights, where latents are not cached",
    TRAINED: "of the method",
    CONTEXTUALIZERS: "of the MLM term",
    STATES: "kept from step to step",
    COPY: "for the case of a loss that is not finite",
    GRADIENTS: "of the trained weights",
    UNET_KEPT: "activations that the backward pass reads",
    TEXT_KEPT: "the same of the text encoders",
    MLM_KEPT: "the same of text encoders and contextualizers",
    WORKING: "what comes and goes",
}
"""What bytes belong to, in the order of the table, and what that is."""

Moment = Counter[str]
"""Bytes by label that live at one moment."""


Encode = Callable[[Sequence[str]], Conditioning]


@dataclass
class Training:
    """A run on the meta device, ready for its step.

    Attributes:
        method: what is trained, with its models.
        diffusion_loss: of the run.
        batch: a batch of the run's size; latents on the meta device, or pictures.
        dtype: ``mixed_precision``; ``None`` = fp32.
        on_meta: the mode all of it runs in.
        regularizer: the MLM term, or ``None``.
        optimizer: its bytes.
        captions_are_cached: they were encoded beforehand, and the text encoders have gone.
        accumulates: several batches make a step, so that gradients lie there from the start.
        fused: what the optimizer steps inside the backward pass, where its gradients are freed.
        fused_working: what it needs for the largest of these.
    """

    method: Method
    diffusion_loss: DiffusionLoss
    batch: Batch
    dtype: torch.dtype | None
    on_meta: OnMeta
    regularizer: MLMRegularizer | None
    optimizer: OptimizerBytes
    captions_are_cached: bool = False
    accumulates: bool = False
    fused: Sequence[nn.Parameter] = ()
    fused_working: int = 0


def _hold_resident(training: Training, live: LiveBytes) -> None:
    """Put under their labels what lies on the GPU between two steps."""
    models = training.method.models
    live.hold(_weights(models.unet), UNET)
    if not training.captions_are_cached:
        _hold_text_encoders(training, live)
    if training.batch.latents is None:
        live.hold(_weights(models.vae), VAE)
    live.hold(_trained(training), TRAINED)
    _hold_term(training, live)


def _hold_text_encoders(training: Training, live: LiveBytes) -> None:
    for text_encoder in training.method.models.text_encoders:
        live.hold(_weights(text_encoder.model), TEXT)


def _hold_term(training: Training, live: LiveBytes) -> None:
    if training.regularizer:
        for encoder in training.regularizer.encoders:
            live.hold(_weights(encoder.contextualizer), CONTEXTUALIZERS)
            live.hold([encoder.token_table], CONTEXTUALIZERS if _is_copy(encoder) else TEXT)


def step_peak(training: Training) -> Moment:
    """What lives when the passes of one batch need most: those of one loss, then of the other."""
    method, live = training.method, LiveBytes()
    _hold_resident(training, live)
    parameters = method.parameters()
    if training.accumulates:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        live.hold([parameter.grad for parameter in parameters], GRADIENTS)
    method.train(True)
    encode = _captions_from_cache(training) if training.captions_are_cached else method.encode
    hooks = live.hold_gradients(parameters, GRADIENTS)
    hooks += [parameter.register_post_accumulate_grad_hook(_free) for parameter in training.fused]
    try:
        with training.on_meta, live:
            _passes_of_pictures(training, encode, live)
            if training.regularizer:
                _passes_of_term(training, live)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in parameters:
            parameter.grad = None
    fused = Counter({WORKING: training.fused_working})
    return live.at_peak + fused + _kept_between_steps(training)


def optimizer_peak(training: Training) -> Moment:
    """What lives while the optimizer steps: no activations, but all gradients that are left."""
    live = LiveBytes()
    _hold_resident(training, live)
    left = set(training.method.parameters()).difference(training.fused)
    gradients = Counter({GRADIENTS: sum(parameter.nbytes for parameter in left)})
    working = Counter({WORKING: training.optimizer.working})
    return live.live + gradients + working + _kept_between_steps(training)


def caching_peak(training: Training, pixels: Tensor) -> Moment:
    """What lives while the VAE encodes pictures beforehand: all but the U-Net.

    Args:
        training: the run.
        pixels: ``(B, 3, H, W)`` on the meta device, as many as it encodes at once.
    """
    live, models = LiveBytes(), training.method.models
    _hold_text_encoders(training, live)
    live.hold(_weights(models.vae), VAE)
    in_unet = set(map(id, models.unet.parameters()))
    live.hold([p for p in _trained(training) if id(p) not in in_unet], TRAINED)
    _hold_term(training, live)
    live.hold([pixels], WORKING)
    with torch.no_grad(), training.on_meta, live, live.labelled(WORKING):
        models.vae.encode(pixels).latent_dist.sample().float()
    return live.at_peak


def _captions_from_cache(training: Training) -> Encode:
    """Captions as they come from the CPU's memory: the text encoders have gone."""
    with torch.no_grad(), training.on_meta, training.on_meta.autocast(training.dtype):
        found = training.method.encode(training.batch.captions)
    kept = found.to(training.method.models.unet.dtype)
    return lambda _captions: Conditioning(
        *(part if part is None else part.clone() for part in kept)
    )


def _passes_of_pictures(training: Training, encode: Encode, live: LiveBytes) -> None:
    """Forward and backward pass of the denoising loss; what is kept is under its labels."""

    def labelled_encode(captions: Sequence[str]) -> Conditioning:
        with live.labelled(TEXT_KEPT):
            return encode(captions)

    with live.labelled(UNET_KEPT):
        loss = batch_diffusion_loss(
            training.batch,
            models=training.method.models,
            encode=labelled_encode,
            diffusion_loss=training.diffusion_loss,
            device=torch.device("meta"),
            autocast=partial(training.on_meta.autocast, training.dtype),
        )
    with live.labelled(WORKING):
        training.on_meta.backward(loss, training.dtype)


def _passes_of_term(training: Training, live: LiveBytes) -> None:
    """The same of the MLM term."""
    with live.labelled(MLM_KEPT):
        loss = term_output(
            partial(training.regularizer, 0),
            device=torch.device("meta"),
            autocast=partial(training.on_meta.autocast, training.dtype),
        ).loss
    with live.labelled(WORKING):
        training.on_meta.backward(loss, training.dtype)


def _free(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _kept_between_steps(training: Training) -> Moment:
    """Optimizer states, and the copy of them and the weights, where they are small enough."""
    trained = sum(parameter.nbytes for parameter in training.method.parameters())
    changed = trained + training.optimizer.states
    copy = changed if changed <= LIMIT else 0
    return Counter({STATES: training.optimizer.states, COPY: copy})


def _trained(training: Training) -> list[Tensor]:
    return [p for members in training.method.parts().values() for p in members]


def _weights(module: torch.nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _is_copy(encoder) -> bool:
    return (
        encoder.token_table.untyped_storage()._cdata
        != encoder.embedding.weight.untyped_storage()._cdata
    )
