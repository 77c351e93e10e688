"""Puts a finished LoRA or LyCORIS on a model, by the trainer's own networks."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mlm_plugin.config.options import NetworkOptions
from mlm_plugin.errors import UserError
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.models.components import TITLES
from mlm_plugin.networks.base import Network
from mlm_plugin.networks.create import create_network, is_lora, read_weights
from mlm_plugin.networks.kohya_names import TEXT_ENCODER_PARTS, part_of

__all__ = ["load_lora"]

WHOLE_LAYERS = {"diff", "diff_b"}
"""Tensors of algo=full: LyCORIS moves the layers' own weights into its modules, and not back."""

# Layers that take text states, by the end of their name.
READS_TEXT = ("attn2_to_k.lora_down.weight", "self_attn_q_proj.lora_down.weight")


def load_lora(models: StableDiffusion, path: str) -> Network:
    """Put the network of a file on the models, at strength 1 and without dropout.

    Args:
        models: on their device and in their precision, without a network.
        path: LoRA or LyCORIS file with kohya's names.

    Raises:
        UserError: it holds no network, or one of another model.
    """
    state = read_weights(path)
    names = {key.partition(".")[2] for key in state if key.startswith("lora_")}
    if not names - {"alpha"}:
        raise UserError(
            f"{path}: holds no LoRA (no lora_up.weight) and no LyCORIS; give a LoRA in "
            "kohya's spelling"
        )
    if names & WHOLE_LAYERS:
        raise UserError(
            f"{path}: holds whole layers (LyCORIS algo=full), which cannot be put on a "
            "model at a strength here; draw it in a WebUI, or train with another algo"
        )
    _refuse_other_model(models, state, path)
    is_plain = is_lora(models, state)
    options = NetworkOptions(
        network_module="networks.lora" if is_plain else "lycoris.kohya",
        network_weights=path,
        dim_from_weights=True,
        **_parts_of(state),
    )
    try:
        network = create_network(models, options)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except RuntimeError as error:  # LyCORIS copies tensors into layers of other shapes
        if is_plain or "size" not in str(error):
            raise
        raise UserError(
            f"{path}: its shapes are not those of {models.source}, which is "
            f"{TITLES[models.family]}: give the model it was trained on"
        ) from error
    network.train(False)
    return network


def _refuse_other_model(models: StableDiffusion, state: Mapping[str, Tensor], path: str) -> None:
    """Compare text encoders and widths of a file with those of the model."""
    expected: dict[str, int] = {
        part: encoder.token_embedding.embedding_dim
        for part, encoder in zip(
            TEXT_ENCODER_PARTS[len(models.text_encoders)], models.text_encoders, strict=True
        )
    }
    expected["unet"] = models.unet.config.cross_attention_dim
    found = {part_of(key): None for key in state if key.startswith("lora_te")}
    found |= {part_of(key): tensor.shape[1] for key, tensor in state.items()
              if key.endswith(READS_TEXT)}  # fmt: skip
    other = {
        part: width
        for part, width in found.items()
        if part not in expected or width not in (None, expected[part])
    }
    if other:
        shown = ", ".join(_described(part, width) for part, width in sorted(other.items()))
        wanted = ", ".join(_described(part, width) for part, width in expected.items())
        raise UserError(
            f"{path}: was trained on another kind of model ({shown}), {models.source} is "
            f"{TITLES[models.family]} ({wanted}): give the model it was trained on"
        )


def _described(part: str, width: int | None) -> str:
    return part if width is None else f"{part} of width {width}"


def _parts_of(state: Mapping[str, Tensor]) -> dict[str, bool]:
    """Network options for the models that the file adapts."""
    return {
        "network_train_text_encoder_only": not any(key.startswith("lora_unet") for key in state),
        "network_train_unet_only": not any(key.startswith("lora_te") for key in state),
    }
