"""Batches: pictures of one bucket with their captions, the same for equal (seed, epoch, index).

Knows neither tokenizer nor VAE nor devices. One item of the data set is one :class:`Batch`. There
is no hidden state: everything random in a batch follows from (seed, epoch, index), so a resumed
run and any number of workers or processes see the same batches.

Epochs count from 0. ``caption_dropout_every_n_epochs`` counts from 1, as in sd-scripts.
"""

from __future__ import annotations

import copy
import logging
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mlm_plugin.data.buckets import crop_top_left
from mlm_plugin.data.captions import (
    ineffective_settings,
    possible_captions,
    process_caption,
)
from mlm_plugin.data.images import RESIZE_INTERPOLATIONS, color_augment, image_tensor
from mlm_plugin.data.latents import CachedLatents, cache_latents, read_latents
from mlm_plugin.data.scale_augmentation import MIN_SIDE, Scaling, draw_scaling, unscaled
from mlm_plugin.data.sources import ImageInfo, load_pixels, read_dataset
from mlm_plugin.data.templates import fill_template
from mlm_plugin.errors import UserError

if TYPE_CHECKING:
    from mlm_plugin.config.datasets import DatasetConfig, SubsetConfig

__all__ = ["Batch", "BatchKey", "EpochOrder", "ImageInfo", "TrainDataset", "make_loader"]

logger = logging.getLogger(__name__)

Size = tuple[int, int]

CHANGING_PICTURES = ("color_aug", "random_crop", "scale_aug")
CHANGING_CAPTIONS = (
    "shuffle_caption",
    "caption_dropout_rate",
    "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate",
    "token_warmup_step",
    "enable_wildcard",
    "scale_aug",
)
"""Settings of a subset that make pictures, or captions, differ between draws."""


@dataclass
class Batch:
    """Pictures of one size; B of them, H x W pixels. Exactly one of the first two is given."""

    pixel_values: Tensor | None  # (B, 3, H, W) in [-1, 1]
    latents: Tensor | None  # (B, 4, H/8, W/8), a sample of the VAE, not scaled
    loss_masks: Tensor | None  # (B, 1, H, W) in [0, 1], 1 = learn
    valid_masks: Tensor | None  # (B, 1, H, W) of 0 and 1, 1 = picture, 0 = blank
    loss_weights: Tensor  # (B,), prior_loss_weight for regularisation images, else 1
    captions: list[str]
    original_sizes: list[Size]  # (h, w)
    crop_top_lefts: list[Size]  # (top, left)
    target_sizes: list[Size]  # (h, w)
    is_reg: list[bool]
    image_paths: list[str]
    custom_attributes: list[dict[str, Any]]

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, for asynchronous copies to a GPU.

        Called by a loader with ``pin_memory``.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(
            **{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in values.items()}
        )


class BatchKey(NamedTuple):
    """Identifies a batch."""

    epoch: int  # from 0
    index: int
    step: int = 0  # optimiser steps done, for token_warmup_step


class _Sample(NamedTuple):
    pixel_values: Tensor | None
    latents: Tensor | None
    loss_mask: Tensor | None  # (1, H, W)
    scaling: Scaling
    caption: str
    flipped: bool


class TrainDataset(Dataset):
    """The pictures of all data sets, in batches that mix neither buckets nor data sets.

    Args:
        datasets: resolved configuration.
        seed: seed of everything random.
        prior_loss_weight: loss weight of regularisation images.
        masked_loss: whether masks from ``conditioning_data_dir`` are used; alpha masks depend on
            the subset alone.
        templates: if given, a random one replaces a picture's caption each time, with the subset's
            ``class_tokens`` or else ``concept`` in its slot. Regularisation images keep their
            captions.
        concept: what is learned, as it is called in captions.

    Attributes:
        images: every picture in use.
        skipped: files that could not be used, and why.
        held_out: pictures that are validated and not trained on.
        num_train_images: pictures per epoch, with repeats, without regularisation images.
        num_reg_images: regularisation images per epoch, with repeats.

    Raises:
        UserError: no picture can be used, or settings contradict each other.
    """

    def __init__(
        self,
        datasets: Sequence[DatasetConfig],
        *,
        seed: int,
        prior_loss_weight: float = 1.0,
        masked_loss: bool = False,
        templates: Sequence[str] = (),
        concept: str | None = None,
    ):
        self.datasets = tuple(datasets)
        self.seed = seed
        self.prior_loss_weight = prior_loss_weight
        self.templates, self.concept = tuple(templates), concept
        subsets = [s for d in self.datasets for s in d.subsets]
        _check_subsets(subsets, masked_loss=masked_loss)
        if templates:
            _check_concepts(subsets, concept)
        self.images: list[ImageInfo] = []
        self.skipped: dict[Path, str] = {}
        self.held_out: list[ImageInfo] = []
        for index, config in enumerate(self.datasets):
            found = read_dataset(config, dataset_index=index, seed=seed)
            self.images += found.images
            self.skipped |= found.skipped
            self.held_out += found.held_out
        if not self.images:
            raise UserError(_nothing_found(self.datasets, self.skipped))
        self._max_train_steps: int | None = None
        self._prepare()

    def _prepare(self) -> None:
        """What follows from the pictures."""
        self.num_train_images = sum(i.repeats for i in self.images if not i.is_reg)
        self.num_reg_images = sum(i.repeats for i in self.images if i.is_reg)
        self._any_mask = any(info.has_mask for info in self.images)
        self._any_scaled = any(info.is_scaled for info in self.images)
        _check_canvases([info for info in self.images if info.is_scaled])
        self._cache: list[CachedLatents | Path] | None = None
        self._groups = self._group_by_bucket()
        self._plan: tuple[int, list[list[int]]] = (-1, [])
        self._length = len(self._batches(0))

    def validation_set(self, *, seed: int) -> TrainDataset | None:
        """The pictures that are held out, as a data set without repeats; ``None`` without any.

        Args:
            seed: decides which of them share a batch.
        """
        if not self.held_out:
            return None
        other = copy.copy(self)
        other.seed = seed
        other.images, other.held_out = list(self.held_out), []
        other._prepare()
        return other

    def set_max_train_steps(self, num_steps: int) -> None:
        """Set the length of the run, of which a ``token_warmup_step`` below 1 is a share."""
        self._max_train_steps = num_steps

    def cache_latents(
        self,
        encode: Callable[[Tensor], Tensor],
        *,
        vae_id: str,
        to_disk: bool = False,
        batch_size: int = 1,
        skip_check: bool = False,
        is_sdxl: bool = False,
    ) -> None:
        """Replace pixels by latents from here on; arguments as in :func:`.latents.cache_latents`.

        With several processes and ``to_disk``, call it on the main process first: the others then
        find its files.

        Raises:
            UserError: the pictures of a subset differ between draws.
        """
        self._refuse_together("cache_latents", CHANGING_PICTURES)
        self._cache = cache_latents(
            self.images,
            encode,
            vae_id=vae_id,
            to_disk=to_disk,
            batch_size=batch_size,
            skip_check=skip_check,
            is_sdxl=is_sdxl,
        )

    def bucket_counts(self) -> Counter[tuple[int, Size]]:
        """Count pictures with repeats per (data set, bucket)."""
        return Counter({key: len(members) for key, members in self._groups.items()})

    def fixed_captions(self) -> list[str]:
        """Every caption that can be in a batch, exactly as it is there.

        Raises:
            UserError: the captions of a subset differ between draws.

        Source: sd-scripts library/train_util.py is_text_encoder_output_cacheable.
        """
        self._refuse_together("cache_text_encoder_outputs", CHANGING_CAPTIONS)
        captions = (
            process_caption(text, info.subset, rng=random.Random(0), epoch=1, step=0)
            for info in self.images
            for text in self._texts_of(info)
        )
        return list(dict.fromkeys(captions))

    def captions_of(self, info: ImageInfo) -> list[str]:
        """The possible captions of a picture: filled templates, or its own ones."""
        texts = self._texts_of(info)
        return [one for text in texts for one in possible_captions(text, info.subset)]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key: BatchKey) -> Batch:
        rng = random.Random(f"{self.seed}/{key.epoch}/{key.index}")
        members = self._batches(key.epoch)[key.index]
        return self._collate(members, [self._sample(i, rng, key) for i in members])

    def _refuse_together(self, option: str, names: Sequence[str]) -> None:
        for subset in {id(i.subset): i.subset for i in self.images}.values():
            for name in names:
                if getattr(subset, name):
                    raise UserError(
                        f"{option}: impossible with {name} ({_source(subset)}); "
                        "switch one of the two off"
                    )

    def _group_by_bucket(self) -> dict[tuple[int, Size], list[int]]:
        groups: dict[tuple[int, Size], list[int]] = {}
        for i, info in enumerate(self.images):
            groups.setdefault((info.dataset_index, info.bucket), []).extend([i] * info.repeats)
        return dict(sorted(groups.items()))

    def _batches(self, epoch: int) -> list[list[int]]:
        """Shuffle bucket contents, cut them into batches, shuffle those."""
        if self._plan[0] != epoch:
            rng = random.Random(f"{self.seed}/{epoch}")
            batches = []
            for (dataset_index, _), members in self._groups.items():
                size = self.datasets[dataset_index].batch_size
                shuffled = rng.sample(members, len(members))
                batches += [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
            rng.shuffle(batches)
            self._plan = (epoch, batches)
        return self._plan[1]

    def _sample(self, i: int, rng: random.Random, key: BatchKey) -> _Sample:
        info = self.images[i]
        subset = info.subset
        flipped = bool(subset.flip_aug and rng.random() < 0.5)
        scaling = draw_scaling(rng, info.bucket) if info.is_scaled else unscaled(info.bucket)
        if self._cache is None:
            content = _draw_pixels(info, flipped, scaling, rng)
        else:
            content = _draw_latents(self._cache[i], info, flipped)
        texts = self._texts_of(info)
        caption = process_caption(
            rng.choice(texts) if self._takes_template(info) else texts[0],
            subset,
            rng=rng,
            epoch=key.epoch + 1,
            step=key.step,
            max_step=self._max_train_steps,
        )
        return _Sample(*content, scaling=scaling, caption=scaling.caption(caption), flipped=flipped)

    def _texts_of(self, info: ImageInfo) -> list[str]:
        """The filled templates that replace a picture's caption, else only that caption."""
        if not self._takes_template(info):
            return [info.caption]
        concept = " ".join((info.subset.class_tokens or self.concept).split())
        return [fill_template(template, concept) for template in self.templates]

    def _takes_template(self, info: ImageInfo) -> bool:
        return bool(self.templates) and not info.is_reg

    def _collate(self, members: list[int], samples: list[_Sample]) -> Batch:
        infos = [self.images[i] for i in members]
        width, height = infos[0].bucket
        weights = [self.prior_loss_weight if info.is_reg else 1.0 for info in infos]
        no_mask = torch.ones(1, height, width)
        masks = [no_mask if s.loss_mask is None else s.loss_mask for s in samples]
        return Batch(
            pixel_values=_stack([s.pixel_values for s in samples]),
            latents=_stack([s.latents for s in samples]),
            loss_masks=torch.stack(masks) if self._any_mask else None,
            valid_masks=(
                torch.stack([s.scaling.valid_mask() for s in samples]) if self._any_scaled else None
            ),
            loss_weights=torch.tensor(weights),
            captions=[s.caption for s in samples],
            original_sizes=[(info.size[1], info.size[0]) for info in infos],
            crop_top_lefts=[
                crop_top_left(info.bucket, info.size, flipped=s.flipped)
                for info, s in zip(infos, samples, strict=True)
            ],
            target_sizes=[(height, width)] * len(infos),
            is_reg=[info.is_reg for info in infos],
            image_paths=[str(info.path) for info in infos],
            custom_attributes=[dict(info.subset.custom_attributes) for info in infos],
        )


class EpochOrder(Sampler[BatchKey]):
    """Which batches this process takes in an epoch, and in which order.

    Every key carries its epoch and step, so persistent workers need no message. With several
    processes the list is filled up from its start until all have the same number.

    Args:
        dataset: the data set.
        rank: number of this process.
        world_size: processes that share an epoch.
        batches_per_step: batches of one process per optimiser step (gradient accumulation).
    """

    def __init__(
        self,
        dataset: TrainDataset,
        *,
        rank: int = 0,
        world_size: int = 1,
        batches_per_step: int = 1,
    ):
        assert 0 <= rank < world_size, (rank, world_size)
        self.dataset = dataset
        self.rank, self.world_size, self.batches_per_step = rank, world_size, batches_per_step
        self.start_epoch(0)

    def start_epoch(self, epoch: int, *, skip: int = 0, step: int = 0) -> None:
        """Prepare the next pass.

        Args:
            epoch: counted from 0.
            skip: batches of this process that were already trained in this epoch (resume).
            step: optimiser steps done before the first batch.
        """
        self.epoch, self.skip, self.step = epoch, skip, step

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.world_size) - self.skip

    def __iter__(self) -> Iterator[BatchKey]:
        for n in range(len(self)):
            index = (n + self.skip) * self.world_size + self.rank
            step = self.step + n // self.batches_per_step
            yield BatchKey(self.epoch, index % len(self.dataset), step)


def make_loader(
    order: EpochOrder,
    *,
    num_workers: int = 0,
    persistent_workers: bool = False,
    pin_memory: bool = False,
) -> DataLoader:
    """Create a loader of complete batches; call ``order.start_epoch`` before each pass.

    It does not use torch's global random stream.

    Args:
        order: which batches.
        num_workers: processes that load them; 0 = this one.
        persistent_workers: whether the processes are kept between passes.
        pin_memory: put batches into page-locked memory, for a GPU.
    """
    return DataLoader(
        order.dataset,
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        persistent_workers=persistent_workers and num_workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator().manual_seed(order.dataset.seed),
    )


def _ignore_interrupts(_worker_id: int) -> None:
    """Ctrl-C reaches every process; only the main one handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _draw_pixels(
    info: ImageInfo, flipped: bool, scaling: Scaling, rng: random.Random
) -> tuple[Tensor, None, Tensor | None]:
    pixels = load_pixels(info, rng=rng if info.subset.random_crop else None, size=scaling.size)
    if flipped:
        pixels = pixels[:, ::-1]
    rgb = pixels[:, :, :3]
    if info.subset.color_aug:
        rgb = color_augment(rgb, rng=rng)
    mask = None
    if info.has_mask:
        mask = scaling.place(image_tensor(pixels[:, :, 3:]) / 2 + 0.5)
    return scaling.place(image_tensor(rgb)), None, mask


def _draw_latents(
    entry: CachedLatents | Path, info: ImageInfo, flipped: bool
) -> tuple[None, Tensor, Tensor | None]:
    cached = read_latents(entry, info) if isinstance(entry, Path) else entry
    mask = None if cached.mask is None else cached.mask.unsqueeze(0)
    if not flipped:
        return None, cached.latents, mask
    return None, cached.latents_flipped, None if mask is None else mask.flip(2)


def _stack(tensors: list[Tensor | None]) -> Tensor | None:
    return None if tensors[0] is None else torch.stack(tensors)


def _check_subsets(subsets: Sequence[SubsetConfig], *, masked_loss: bool) -> None:
    for subset in subsets:
        where = _source(subset)
        if subset.face_crop_aug_range is not None:
            raise UserError(
                f"face_crop_aug_range: not supported ({where}); use random_crop, or crop the files"
            )
        if subset.alpha_mask and subset.conditioning_data_dir:
            raise UserError(f"alpha_mask and conditioning_data_dir: choose one of them for {where}")
        if subset.conditioning_data_dir and not masked_loss:
            raise UserError(f"conditioning_data_dir: needs masked_loss to have an effect ({where})")
        if subset.resize_interpolation not in (None, *RESIZE_INTERPOLATIONS):
            raise UserError(
                f"resize_interpolation: {subset.resize_interpolation!r} is not one of "
                f"{', '.join(RESIZE_INTERPOLATIONS)} ({where})"
            )
        for line in ineffective_settings(subset):
            logger.warning("%s: %s", where, line)
    if masked_loss and not any(s.alpha_mask or s.conditioning_data_dir for s in subsets):
        raise UserError(
            "masked_loss: no data has a mask; set alpha_mask (pictures with transparency) or "
            "conditioning_data_dir (black and white masks)"
        )


def _check_concepts(subsets: Sequence[SubsetConfig], concept: str | None) -> None:
    for subset in subsets:
        if not (subset.is_reg or (subset.class_tokens or "").strip() or (concept or "").strip()):
            raise UserError(
                f"templates: nothing says what {_source(subset)} shows; give class_tokens to the "
                "subset, or name its folder like '10_sks dog'"
            )


def _check_canvases(infos: Sequence[ImageInfo]) -> None:
    for info in infos:
        if min(info.bucket) < MIN_SIDE:
            raise UserError(
                f"scale_aug: {info.path} is trained at {info.bucket[0]}x{info.bucket[1]}; needed "
                f"are at least {MIN_SIDE} pixels a side, so raise the resolution"
            )


def _nothing_found(datasets: Sequence[DatasetConfig], skipped: dict[Path, str]) -> str:
    places = ", ".join(str(_source(s)) for d in datasets for s in d.subsets) or "no folder at all"
    if skipped:
        path, reason = next(iter(skipped.items()))
        return f"no usable picture in {places}: {len(skipped)} unusable, first {path} ({reason})"
    if any(s.is_reg for d in datasets for s in d.subsets):
        return f"no training picture in {places}; regularisation images alone teach nothing"
    return f"no picture in {places}; put .png, .jpg, .webp or .bmp files there"


def _source(subset: SubsetConfig) -> Path:
    return subset.metadata_file or subset.image_dir
