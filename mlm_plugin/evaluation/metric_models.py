"""CLIP or SigLIP, and DINO, as judges: pictures and texts in, features out.

Loaded by transformers from a folder or hub id. Pictures are resized, cropped and normalized here
with Pillow from the numbers of the model's ``preprocessor_config.json``: transformers' own image
processors need torchvision only in some versions. Knows no measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPModel, CLIPTokenizer
from transformers.image_processing_utils import BaseImageProcessor

from mlm_plugin.errors import UserError, shown_error

__all__ = ["Clip", "Dino", "Preprocessing", "Siglip", "load_clip", "load_dino", "preprocess"]

BATCH = 32
DINO_MARGIN = 256 / 224  # of DINO's evaluation: resize to 256, crop to 224


class Preprocessing(NamedTuple):
    """From a picture to a model's input.

    Attributes:
        shortest_edge: pixels of the shorter side after resizing.
        crop: side of the centre crop.
        resample: Pillow's number of the filter (3 = bicubic).
        mean: mean by channel, of values in [0, 1].
        std: standard deviation by channel.
    """

    shortest_edge: int
    crop: int
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def preprocess(image: Image.Image, how: Preprocessing) -> Tensor:
    """Resize, crop at the centre, normalize: ``(3, crop, crop)`` fp32.

    Source: transformers ``CLIPImageProcessor`` (its Pillow version; a test compares the two).
    """
    image = image.convert("RGB")
    width, height = image.size
    short = min(width, height)
    size = tuple(max(how.crop, int(side * how.shortest_edge / short)) for side in (width, height))
    image = image.resize(size, resample=how.resample)
    left, top = (size[0] - how.crop) // 2, (size[1] - how.crop) // 2
    pixels = np.asarray(image.crop((left, top, left + how.crop, top + how.crop)), np.float32)
    values = (pixels / 255 - np.float32(how.mean)) / np.float32(how.std)
    return torch.from_numpy(values).permute(2, 0, 1)


class Clip:
    """A CLIP model that embeds pictures and texts in one space."""

    def __init__(self, name: str, model: CLIPModel, tokenizer, how: Preprocessing):
        self.name, self.model, self.tokenizer, self.how = name, model, tokenizer, how

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """``(N, D)`` fp32 on the CPU, projected but not normalized."""

        def features(pixels: Tensor) -> Tensor:
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            return self.model.visual_projection(pooled)

        return _features(images, self.how, self.model, features)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """``(N, D)`` fp32 on the CPU; longer texts are truncated as in CLIP."""
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(_device(self.model))
        pooled = self.model.text_model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).pooler_output
        return self.model.text_projection(pooled).float().cpu()


class Siglip(Clip):
    """SigLIP or SigLIP 2 at a fixed resolution, in place of a CLIP.

    Source: arXiv 2502.14786; its texts are in lower case and padded to 64 tokens, as in training.
    """

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """``(N, D)`` fp32 on the CPU, not normalized."""
        return _features(
            images,
            self.how,
            self.model,
            lambda pixels: self.model.vision_model(pixel_values=pixels).pooler_output,
        )

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """``(N, D)`` fp32 on the CPU; longer texts are truncated."""
        tokens = self.tokenizer(
            [text.lower() for text in texts],
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        ids_NL = tokens.input_ids.to(_device(self.model))
        return self.model.text_model(input_ids=ids_NL).pooler_output.float().cpu()


class Dino:
    """A self-supervised ViT whose CLS state distinguishes individual objects."""

    def __init__(self, name: str, model: nn.Module, how: Preprocessing):
        self.name, self.model, self.how = name, model, how

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """CLS state after the final layer norm, ``(N, D)`` fp32 on the CPU."""
        return _features(
            images,
            self.how,
            self.model,
            lambda pixels: self.model(pixel_values=pixels).last_hidden_state[:, 0],
        )


def load_clip(name: str, *, device: torch.device | str = "cpu") -> Clip:
    """A CLIP or SigLIP by folder or hub id, fp32, frozen.

    Raises:
        UserError: it is neither local nor downloadable, or is neither of the two.
    """

    def load(model_class: Any) -> Any:
        return _load(lambda: model_class.from_pretrained(name), name, option="clip_model")

    is_siglip = load(AutoConfig).model_type == "siglip"
    model = load(AutoModel if is_siglip else CLIPModel)
    tokenizer = load(AutoTokenizer if is_siglip else CLIPTokenizer)
    how = _preprocessing(_processor_config(name, option="clip_model"), margin=1.0)
    return (Siglip if is_siglip else Clip)(name, _frozen(model, device), tokenizer, how)


def load_dino(name: str, *, device: torch.device | str = "cpu") -> Dino:
    """A ViT of DINO or DINOv2 by folder or hub id, fp32, frozen.

    If the processor would distort pictures into a square, the protocol of DINO's own evaluation is
    used: shorter side to 256/224 of the input, then a centre crop, bicubic.

    Raises:
        UserError: it is neither local nor downloadable, or is not a ViT.

    Source: facebookresearch/dino ``eval_knn.py``; CustomConcept101 ``evaluate.py``.
    """
    model = _load(lambda: AutoModel.from_pretrained(name), name, option="dino_model")
    how = _preprocessing(_processor_config(name, option="dino_model"), margin=DINO_MARGIN)
    dino = Dino(name, _frozen(model, device), how)
    try:
        features = dino.image_features([Image.new("RGB", (how.crop, how.crop))])
    except (AttributeError, TypeError, ValueError):  # it needs a text, or has no such states
        features = torch.empty(0)
    if features.ndim != 2:
        raise UserError(f"--dino_model {name}: is no ViT; give one of DINO or DINOv2")
    return dino


def _load(make: Callable[[], Any], name: str, *, option: str) -> Any:
    try:
        return make()
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        where = (
            "its folder cannot be loaded"
            if Path(name).is_dir()
            else "it is not here and no hub gave it"
        )
        raise UserError(
            f"--{option} {name}: {where}; give the folder of a model, or 'none' to leave its "
            f"measures out ({shown_error(error, limit=120)})"
        ) from error


def _processor_config(name: str, *, option: str) -> dict[str, Any]:
    def read() -> dict[str, Any]:
        config, _ = BaseImageProcessor.get_image_processor_dict(name)
        return config.get("image_processor", config)

    config = _load(read, name, option=option)
    if "image_mean" not in config or not (config.get("crop_size") or config.get("size")):
        raise UserError(
            f"--{option} {name}: its preprocessor_config.json lacks image_mean, size or crop_size"
        )
    return config


def _preprocessing(config: dict[str, Any], *, margin: float) -> Preprocessing:
    size = config.get("size") or config["crop_size"]
    edge = _side(size)
    if config.get("do_center_crop") and config.get("crop_size"):
        return Preprocessing(edge, _side(config["crop_size"]), *_values(config))
    how = Preprocessing(round(edge * margin), edge, *_values(config))
    return how if margin == 1.0 else how._replace(resample=int(Image.Resampling.BICUBIC))


def _values(config: dict[str, Any]) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    resample = config.get("resample", Image.Resampling.BICUBIC)
    return int(resample), tuple(config["image_mean"]), tuple(config["image_std"])


def _side(size: int | dict[str, int]) -> int:
    return size if isinstance(size, int) else size.get("shortest_edge") or size["height"]


def _features(
    images: Sequence[Image.Image],
    how: Preprocessing,
    model: nn.Module,
    features: Callable[[Tensor], Tensor],
) -> Tensor:
    batches = [
        features(torch.stack([preprocess(image, how) for image in batch]).to(_device(model)))
        for batch in _batches(images)
    ]
    return torch.cat(batches).float().cpu()


def _batches(images: Sequence[Image.Image]) -> Iterator[Sequence[Image.Image]]:
    for start in range(0, len(images), BATCH):
        yield images[start : start + BATCH]


def _frozen(model: nn.Module, device: torch.device | str) -> Any:
    return model.float().eval().requires_grad_(False).to(device)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
