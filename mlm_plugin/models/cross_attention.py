"""Cross-attention layers of a Stable Diffusion U-Net: names, codes, and text states for each.

XTI (P+) gives every cross-attention layer its own text states. They pass through the U-Net as one
conditioning, with the layers' states joined along the token axis, and each layer slices its own
window. So whatever handles conditioning by batch (classifier-free guidance, gradient checkpointing,
``prompt_embeds`` of diffusers pipelines) works unchanged. Knows no prompts and no text encoders.

Shapes: K cross-attention layers, B prompts, L tokens of one layer (77, 152 or 227), D width.
"""

from __future__ import annotations

import re
from collections import Counter

from torch import Tensor, nn

from mlm_plugin.errors import UserError
from mlm_plugin.models.ldm_names import unet_names

__all__ = [
    "MAX_SHARED_TOKENS",
    "MIN_LAYERS",
    "LayerWindow",
    "PerLayerConditioning",
    "cross_attention_names",
    "is_per_layer",
    "join_layers",
    "layer_codes",
    "layer_window",
    "per_layer_conditioning",
    "split_layers",
]

MAX_SHARED_TOKENS = 3 * 75 + 2
"""Tokens of the longest conditioning that all layers share: BOS, three windows, EOS."""

MIN_LAYERS = 4
"""Fewest layers whose joined states, 77 tokens each, are clearly longer than any shared ones."""

SIDES = {
    "down_blocks": 0, "mid_block": 1, "up_blocks": 2,
    "input_blocks": 0, "middle_block": 1, "output_blocks": 2,  # sd-scripts' own U-Net of SDXL
}  # fmt: skip
CODES = {"input": "IN", "output": "OUT"}


def cross_attention_names(unet: nn.Module) -> list[str]:
    """Module names of all cross-attention layers in the order in which they run.

    16 in SD 1.x and 2.x: six on the way down, one in the middle, nine on the way up.
    """
    names = [
        name
        for name, _ in unet.named_modules()
        if name.endswith(".attn2") and name.partition(".")[0] in SIDES  # not SD 3.5 medium's
    ]
    return sorted(names, key=lambda name: SIDES[name.partition(".")[0]])


def layer_codes(unet: nn.Module) -> list[str]:
    """The code that kohya uses for each cross-attention layer, in the order in which they run.

    ``IN`` and ``OUT`` with the number of the LDM input or output block in two digits, ``MID`` for
    the middle block: IN01, IN02, IN04, IN05, IN07, IN08, MID, OUT03 ... OUT11 in SD 1.x and 2.x.
    Additional layers of the same block end in ``_1``, ``_2`` and so on.

    Source: sd-scripts ``train_textual_inversion_XTI.py``.
    """
    weights = [f"{name}.to_k.weight" for name in cross_attention_names(unet)]
    # LDM's block numbers follow from the number of residual blocks on each level.
    resnets = [
        f"down_blocks.0.resnets.{i}.conv1.weight" for i in range(len(unet.down_blocks[0].resnets))
    ]
    places = unet_names(weights + resnets)
    seen: Counter[str] = Counter()
    codes = []
    for weight in weights:
        code = _block_code(places[weight].key)
        codes.append(f"{code}_{seen[code]}" if seen[code] else code)
        seen[code] += 1
    return codes


def join_layers(states_KBLD: Tensor) -> Tensor:
    """One conditioning for all layers: ``(K, B, L, D) -> (B, K L, D)``, layer after layer.

    Raises:
        UserError: the result would be mistaken for states that all layers share.
    """
    joined = states_KBLD.transpose(0, 1).flatten(1, 2)
    if not is_per_layer(joined):
        num_layers, _, length, _ = states_KBLD.shape
        raise UserError(
            f"text states of {num_layers} layers x {length} tokens look like shared ones "
            f"(up to {MAX_SHARED_TOKENS} tokens): use at least {MIN_LAYERS} layers and 77 tokens"
        )
    return joined


def split_layers(joined: Tensor, num_layers: int) -> Tensor:
    """The inverse of :func:`join_layers`: ``(B, K L, D) -> (K, B, L, D)``."""
    return joined.unflatten(1, (num_layers, -1)).transpose(0, 1)


def is_per_layer(states: Tensor) -> bool:
    """Whether a conditioning contains separate states for each layer, by its number of tokens."""
    return states.shape[1] > MAX_SHARED_TOKENS


def layer_window(states: Tensor, layer: int, num_layers: int, *, dim: int = 1) -> Tensor:
    """The part of joined states that belongs to one layer: its L tokens along ``dim``.

    Raises:
        UserError: the number of tokens is not a multiple of the number of layers.
    """
    num_tokens = states.shape[dim]
    if num_tokens % num_layers:
        raise UserError(
            f"conditioning of {num_tokens} tokens: up to {MAX_SHARED_TOKENS} are shared by all "
            f"layers, more must be a multiple of the {num_layers} cross-attention layers"
        )
    length = num_tokens // num_layers
    return states.narrow(dim, layer * length, length)


class LayerWindow:
    """Attention processor that passes one layer's window to the processor it wraps.

    Args:
        processor: the layer's own processor, which does the attention.
        layer: number of the layer, 0 = first to run.
        num_layers: number of layers in a joined conditioning.
    """

    def __init__(self, processor, *, layer: int, num_layers: int):
        self.processor = processor
        self.layer = layer
        self.num_layers = num_layers

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Attend to this layer's window of joined states, or to shared states unchanged."""
        if encoder_hidden_states is not None and is_per_layer(encoder_hidden_states):
            encoder_hidden_states = self._own(encoder_hidden_states)
            if attention_mask is not None:
                attention_mask = self._own(attention_mask, dim=-1)
        if temb is not None:  # not every processor of diffusers has this argument
            kwargs["temb"] = temb
        return self.processor(
            attn,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            **kwargs,
        )

    def _own(self, states: Tensor, *, dim: int = 1) -> Tensor:
        return layer_window(states, self.layer, self.num_layers, dim=dim)


class PerLayerConditioning:
    """The processors of :func:`per_layer_conditioning`, until :meth:`remove`.

    Attributes:
        num_layers: K, the number of layers in a joined conditioning.
    """

    def __init__(self, unet: nn.Module, names: list[str]):
        self.num_layers = len(names)
        self._layers = [unet.get_submodule(name) for name in names]
        self._windows = [
            LayerWindow(layer.processor, layer=number, num_layers=self.num_layers)
            for number, layer in enumerate(self._layers)
        ]
        for layer, window in zip(self._layers, self._windows, strict=True):
            layer.set_processor(window)
        self._handle = unet.register_forward_pre_hook(self._require_windows, with_kwargs=True)

    def remove(self) -> None:
        """Restore every layer's own processor; one that was replaced meanwhile stays."""
        for layer, window in zip(self._layers, self._windows, strict=True):
            if layer.processor is window:
                layer.set_processor(window.processor)
        self._handle.remove()

    def _require_windows(self, _unet: nn.Module, args: tuple, kwargs: dict) -> None:
        """Without its processor a layer would silently attend to the states of all layers.

        Raises:
            UserError: joined states, and the processors were replaced.
        """
        states = kwargs["encoder_hidden_states"] if len(args) < 3 else args[2]
        if not is_per_layer(states):
            return
        for layer, window in zip(self._layers, self._windows, strict=True):
            if layer.processor is not window:
                raise UserError(
                    "the attention processors were replaced (xformers, slicing, IP-Adapter?) after "
                    "text states for each layer were set up: choose them before"
                )


def per_layer_conditioning(unet: nn.Module) -> PerLayerConditioning:
    """Let every cross-attention layer take its own text states from a joined conditioning.

    A conditioning of more than ``MAX_SHARED_TOKENS`` tokens is ``(B, K L, D)`` as
    :func:`join_layers` makes it; a shorter one is shared by all layers, bit for bit as before.
    Attention processors (xformers, slicing) must be chosen first: each is then wrapped by the one
    that slices the window.

    Args:
        unet: ``UNet2DConditionModel``, not wrapped.

    Returns:
        a handle; its ``remove()`` undoes everything.

    Raises:
        UserError: fewer than ``MIN_LAYERS`` layers, a second call without ``remove()``, or
            processors with weights of their own, which would drop out of the U-Net.
    """
    names = cross_attention_names(unet)
    if len(names) < MIN_LAYERS:
        raise UserError(
            f"the U-Net has {len(names)} cross-attention layers; text states for each layer need "
            f"at least {MIN_LAYERS}: use a larger U-Net, or one embedding for all layers"
        )
    for name in names:
        processor = unet.get_submodule(name).processor
        if isinstance(processor, LayerWindow):
            raise UserError(
                "the U-Net already takes text states for each layer: remove() the first ones"
            )
        if isinstance(processor, nn.Module):
            raise UserError(
                f"{name} has an attention processor with weights ({type(processor).__name__}): "
                "unload it (IP-Adapter?) before setting text states for each layer"
            )
    return PerLayerConditioning(unet, names)


def _block_code(ldm_key: str) -> str:
    block = re.search(r"\.(input|output)_blocks\.(\d+)\.", ldm_key)
    return "MID" if block is None else f"{CODES[block[1]]}{int(block[2]):02d}"
