"""How much of the context around a concept a file leaves, at any strength.

The same prompts are read by the base model and by the base model with the file. For each text
encoder the states are compared, for each block of the U-Net the keys and values. Of Anima, whose
transformer reads Qwen3 through an adapter of its own, the states of Qwen3 alone are.

Shapes: N tokens of all prompts, D width of the states (in SDXL of both encoders side by side).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlm_plugin.doctor.learned_file import LearnedFile, Module
from mlm_plugin.doctor.weight_changes import weight_change
from mlm_plugin.errors import UserError
from mlm_plugin.mlm.kept_context import kept_context
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.models.components import TITLES
from mlm_plugin.models.cross_attention import cross_attention_names, layer_codes
from mlm_plugin.models.key_values import MATRICES
from mlm_plugin.models.language_model import LanguageModelEncoder
from mlm_plugin.models.qwen3 import AnimaText
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.models.token_embeddings import LearnedTokens
from mlm_plugin.networks.kohya_names import sdxl_unet_names, text_encoder_name, unet_name

__all__ = ["Patient", "Prompts", "Reading", "encoders_keep", "reading_of"]

ONE_ENCODER = ("text encoder",)
TWO_ENCODERS = ("CLIP-L", "OpenCLIP bigG")
LANGUAGE_MODEL = ("Qwen3",)


READS_TEXT = re.compile(r"lora_unet_.*attn2_to_[kv]")


class Prompts(NamedTuple):
    """The same contexts around a word.

    Attributes:
        templates: with ``{}`` for the word.
        concept: the word or words that are put there; their own tokens are not compared.
    """

    templates: Sequence[str]
    concept: str

    @property
    def texts(self) -> list[str]:
        """Such as "a sks dog in the jungle"."""
        return [template.replace("{}", self.concept) for template in self.templates]


class Reading(NamedTuple):
    """Shares of the context that are kept, 0 to 1.

    Attributes:
        encoders: by text encoder.
        blocks: by block of the U-Net, in the order in which they run; empty where none is read.
    """

    encoders: Mapping[str, float]
    blocks: Mapping[str, float]

    @property
    def text(self) -> float:
        """Of the text encoder that keeps least."""
        return min(self.encoders.values())

    @property
    def image(self) -> float | None:
        """Mean over the blocks; ``None`` where none is read."""
        return sum(self.blocks.values()) / len(self.blocks) if self.blocks else None


class KeyValues(NamedTuple):
    """Keys or values of one layer."""

    block: str
    layer: nn.Linear
    module: Module | None  # of the file


class Patient:
    """A file on its base model.

    Args:
        file: a network or an embedding.
        models: from ``load_text_side`` or ``load_anima_text``, in fp32.
        word: what an embedding is called in prompts.

    Raises:
        UserError: the file is for another kind of model.
    """

    def __init__(self, file: LearnedFile, models: StableDiffusion | AnimaText, *, word: str = ""):
        if isinstance(models, AnimaText):
            _refuse_other_encoder(file, models)
        else:
            _refuse_other_model(file, models)
        self.file, self.models, self.word = file, models, word
        self.encoders: list[TextEncoder] | list[LanguageModelEncoder] = models.text_encoders
        self.names = _names(models)
        self._text_layers = [
            list(_text_layers(encoder.model, file.of_text_encoder(number)))
            for number, encoder in enumerate(self.encoders)
        ]
        has_unet = models.unet is not None
        self.key_values = list(_key_values(models.unet, file.modules)) if has_unet else []

    @property
    def has_text_part(self) -> bool:
        """Whether the file changes a text encoder."""
        return any(self._text_layers)

    @torch.no_grad()
    def states(self, prompts: Prompts, *, strength: float) -> list[Tensor]:
        """States of every text encoder at the words around the concept and at EOS, ``(N, D)``.

        Raises:
            UserError: a prompt is too long, the prompts are nothing but the concept, or the file
                does not fit the layers.
        """
        with self.fitting():
            return [
                _states(encoder, prompts, layers, strength)
                for encoder, layers in zip(self.encoders, self._text_layers, strict=True)
            ]

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Around the file's changes to layers, whose shapes may be others.

        Raises:
            UserError: in place of torch's ``RuntimeError`` about shapes.
        """
        try:
            yield
        except RuntimeError as error:
            if not re.search("size|shape", str(error)):
                raise
            option = "--qwen3" if isinstance(self.models, AnimaText) else "--base"
            raise UserError(
                f"{option}: the layers of {self.models.source} have other shapes than those of "
                f"{self.file.path}: give the model it was trained on"
            ) from error

    @contextmanager
    def with_embedding(self) -> Iterator[None]:
        """The word has the file's vectors inside the block."""
        added = [
            LearnedTokens(encoder, {self.word: vectors_ND[None].float()})
            for encoder, vectors_ND in zip(self.encoders, self.file.embeddings, strict=True)
        ]
        try:
            yield
        finally:
            for encoder, tokens in zip(self.encoders, added, strict=True):
                tokens.remove()
                encoder.learned_tokens = None


def encoders_keep(
    patient: Patient, states: Sequence[Tensor], untrained: Sequence[Tensor]
) -> dict[str, float]:
    """What is kept in the states of each text encoder.

    Args:
        patient: the file on its model.
        states: of :meth:`Patient.states`.
        untrained: of the base model in the same contexts.
    """
    return {
        name: kept_context(now_ND, before_ND)
        for name, now_ND, before_ND in zip(patient.names, states, untrained, strict=True)
    }


def reading_of(
    patient: Patient, states: Sequence[Tensor], untrained: Sequence[Tensor], *, unet: float = 1.0
) -> Reading:
    """What the model with the file still reads.

    Args:
        patient: the file on its model.
        states: of :meth:`Patient.states`.
        untrained: of the base model in the same contexts.
        unet: strength of the U-Net's part; 1 = as trained.

    Raises:
        UserError: the file does not fit the layers.
    """
    shares: dict[str, list[float]] = defaultdict(list)
    joined, joined_before = (torch.cat(list(parts), dim=1) for parts in (states, untrained))
    with patient.fitting():
        for one in patient.key_values:
            shares[one.block].append(_kept_by(one, joined, joined_before, unet))
    blocks = {block: sum(all_) / len(all_) for block, all_ in shares.items()}
    return Reading(encoders_keep(patient, states, untrained), blocks)


@torch.no_grad()
def _kept_by(one: KeyValues, states_ND: Tensor, untrained_ND: Tensor, strength: float) -> float:
    weight_OD = one.layer.weight
    trained_OD = weight_OD
    if one.module is not None:
        trained_OD = weight_OD + weight_change(one.module, one.layer, scale=strength).weight
    return kept_context(F.linear(states_ND, trained_OD), F.linear(untrained_ND, weight_OD))


def _names(models: StableDiffusion | AnimaText) -> tuple[str, ...]:
    if isinstance(models, AnimaText):
        return LANGUAGE_MODEL
    return ONE_ENCODER if len(models.text_encoders) == 1 else TWO_ENCODERS


def _states(
    encoder: TextEncoder | LanguageModelEncoder,
    prompts: Prompts,
    layers: Sequence[tuple[nn.Module, Module]],
    strength: float,
) -> Tensor:
    rows = [encoder.positions_around(text, prompts.concept) for text in prompts.texts]
    if None in rows:
        raise UserError(
            "--prompts: a prompt is so long that the trigger is cut off; write a shorter one"
        )
    if not any(rows):
        raise UserError("--prompts: there is nothing around {} to compare; add words after it")
    with _changed(layers, strength):
        states_BLD = encoder.encode(encoder.tokenize_trimmed(prompts.texts))
    return torch.cat([states_LD[row] for states_LD, row in zip(states_BLD, rows, strict=True)])


@contextmanager
def _changed(layers: Sequence[tuple[nn.Module, Module]], strength: float) -> Iterator[None]:
    """The layers with the file's changes inside the block."""
    before = [(layer.weight, layer.bias) for layer, _ in layers]
    try:
        for layer, module in layers if strength else ():
            change = weight_change(module, layer, scale=strength)
            layer.weight = _frozen(layer.weight + change.weight)
            if change.bias is not None and layer.bias is not None:
                layer.bias = _frozen(layer.bias + change.bias)
        yield
    finally:
        for (layer, _), (weight, bias) in zip(layers, before, strict=True):
            layer.weight, layer.bias = weight, bias


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _text_layers(
    encoder: nn.Module, modules: Mapping[str, Module]
) -> Iterator[tuple[nn.Module, Module]]:
    """Layers of a text encoder that the file changes, with what it holds for them."""
    for path, layer in encoder.named_modules():
        name = text_encoder_name(path).removeprefix("lora_te_")
        if name in modules and isinstance(layer, nn.Linear):
            yield layer, modules[name]


def _key_values(unet: nn.Module, modules: Mapping[str, Module]) -> Iterator[KeyValues]:
    names = _names_by_layer(unet)
    for path, code in zip(cross_attention_names(unet), layer_codes(unet), strict=True):
        for matrix in MATRICES:
            layer = f"{path}.{matrix}"
            module = next((modules[name] for name in names[layer] if name in modules), None)
            yield KeyValues(re.sub(r"_\d+$", "", code), unet.get_submodule(layer), module)


def _names_by_layer(unet: nn.Module) -> dict[str, list[str]]:
    """What files call keys and values: diffusers' names and, in SDXL, the original ones."""
    others = sdxl_unet_names(unet.state_dict()) if _is_sdxl(unet) else {}
    layers = [f"{path}.{matrix}" for path in cross_attention_names(unet) for matrix in MATRICES]
    return {
        layer: [name, *([others[name]] if name in others else [])]
        for layer, name in ((layer, unet_name(layer)) for layer in layers)
    }


def _is_sdxl(unet: nn.Module) -> bool:
    return unet.config.addition_embed_type == "text_time"


def _refuse_other_model(file: LearnedFile, models: StableDiffusion) -> None:
    """Compare widths where the file tells them."""
    if file.other_model:
        raise UserError(
            f"{file.path} is for {file.other_model}; Stable Diffusion 1, 2, XL and Anima can be "
            "examined: leave out --base to see what is in the file"
        )
    if file.embeddings:
        found = [vectors_ND.shape[1] for vectors_ND in file.embeddings]
        expected = [one.token_embedding.embedding_dim for one in models.text_encoders]
    else:
        found, expected = _widths(file), [models.unet.config.cross_attention_dim]
    if found and list(found) != expected:
        raise UserError(
            f"--base: {models.source} is {TITLES[models.family]} with text of width "
            f"{_shown(expected)}, {file.path} was made for width {_shown(found)}: give the model "
            "it was trained on"
        )
    if strangers := _without_layer(file, models):
        raise UserError(
            f"--base: {models.source} is {TITLES[models.family]} and has no layer for "
            f"{len(strangers)} module(s) of {file.path} ({strangers[0]}, ...): give the model it "
            "was trained on"
        )


def _without_layer(file: LearnedFile, models: StableDiffusion) -> list[str]:
    """Modules for text encoders, keys or values that the model does not have."""
    found = []
    for number in (0, 1):
        encoders = models.text_encoders[number : number + 1]
        paths = (path for encoder in encoders for path, _ in encoder.model.named_modules())
        known = {text_encoder_name(path).removeprefix("lora_te_") for path in paths}
        found += sorted(file.of_text_encoder(number).keys() - known)
    reading = {name for name in file.modules if READS_TEXT.fullmatch(name)}
    known = {name for names in _names_by_layer(models.unet).values() for name in names}
    return found + sorted(reading - known)


def _refuse_other_encoder(file: LearnedFile, models: AnimaText) -> None:
    """Every module of the text encoder part must have its layer."""
    layers = {
        text_encoder_name(path).removeprefix("lora_te_"): layer
        for path, layer in models.text_encoders[0].model.named_modules()
    }
    strangers = [
        name
        for name, module in file.of_text_encoder(0).items()
        if name not in layers or not _has_shape_of(module, layers[name])
    ]
    if strangers:
        raise UserError(
            f"--qwen3: {models.source} has no layer of their shape for {len(strangers)} module(s) "
            f"of {file.path} ({strangers[0]}, ...); give the text encoder it was trained on"
        )


def _has_shape_of(module: Module, layer: nn.Module) -> bool:
    """Whether a LoRA's matrices fit a linear layer; of others the name must do."""
    if "lora_down.weight" not in module or not isinstance(layer, nn.Linear):
        return True
    shape = (len(module["lora_up.weight"]), module["lora_down.weight"].shape[1])
    return shape == layer.weight.shape


def _widths(file: LearnedFile) -> list[int]:
    """Width of the text that the U-Net's part takes; empty if the file does not tell."""
    return sorted(
        {
            module["lora_down.weight"].shape[1]
            for name, module in file.modules.items()
            if READS_TEXT.fullmatch(name) and "lora_down.weight" in module
        }
    )


def _shown(widths: Sequence[int]) -> str:
    return " and ".join(map(str, widths))
