"""A plain-text report of a data set, before hours are spent on it.

Uses the pictures and captions that a data set has already read. Knows no tokenizer: the caller
passes a function that counts tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlm_plugin.data.dataset import TrainDataset
from mlm_plugin.data.sources import ImageInfo

__all__ = ["DatasetReport", "SubsetReport", "dataset_report"]

MAX_UPSCALE = 2.0
NUM_NAMED = 3
"""Files named in a warning; the rest are counted."""


@dataclass(frozen=True)
class SubsetReport:
    """Counts of one folder or metadata file. Shares in captions are per picture."""

    name: str
    class_tokens: str | None
    is_reg: bool
    concepts: tuple[str, ...]  # each caption should contain one of them
    num_images: int
    num_repeats: int  # pictures per epoch: images with their repeats
    num_captions: int  # pictures with a caption of their own
    num_with_concept: int | None  # captions with one of the concepts; None without concepts
    num_cut: int | None  # captions over the token limit; None without a tokenizer
    captions_elsewhere: dict[str, int]  # other extension than the configured one -> files
    num_templates: int = 0  # templates that replace captions


@dataclass(frozen=True)
class DatasetReport:
    """Result of :func:`dataset_report`."""

    subsets: list[SubsetReport]
    buckets: dict[tuple[int, int], int]  # (width, height) -> pictures per epoch
    num_batches: int
    num_skipped: int
    max_tokens: int
    warnings: list[str] = field(default_factory=list)
    held_out: tuple[str, ...] = ()  # names of the files that are validated

    @property
    def num_images(self) -> int:
        """Different pictures in use."""
        return sum(subset.num_images for subset in self.subsets)

    def lines(self) -> list[str]:
        """Text for a terminal, warnings last."""
        return [
            f"Data set: {self.num_images} images, {sum(s.num_repeats for s in self.subsets)} per "
            f"epoch in {self.num_batches} batches, {self.num_skipped} skipped",
            *(line for subset in self.subsets for line in self._subset_lines(subset)),
            "  buckets: " + ", ".join(f"{w}x{h}: {n}" for (w, h), n in self.buckets.items()),
            *self._held_out_lines(),
            *(f"  warning: {warning}" for warning in self.warnings),
        ]

    def _held_out_lines(self) -> Iterator[str]:
        if self.held_out:
            more = len(self.held_out) - NUM_NAMED
            names = ", ".join(self.held_out[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
            yield f"  validation: {len(self.held_out)} held out, not trained on ({names})"

    def _subset_lines(self, subset: SubsetReport) -> Iterator[str]:
        kind = " (regularisation)" if subset.is_reg else ""
        yield f"  {subset.name}{kind}: {subset.num_images} images, {subset.num_repeats} per epoch"
        text = f"{_of(subset.num_captions, subset.num_images)} have captions"
        if subset.num_templates:
            text = f"captions are drawn from {subset.num_templates} templates"
        elif subset.num_captions < subset.num_images:
            instead = repr(subset.class_tokens) if subset.class_tokens else "an empty caption"
            text += f", the others {instead}"
        yield f"    {text}"
        if subset.num_with_concept is not None and not subset.is_reg:
            share = _of(subset.num_with_concept, subset.num_images)
            yield f"    {share} captions hold {_either(subset.concepts)}"
        if subset.num_cut:
            share = _of(subset.num_cut, subset.num_images)
            yield f"    {share} captions are cut at {self.max_tokens} tokens"


def dataset_report(
    dataset: TrainDataset,
    *,
    concepts: Sequence[str],
    count_tokens: Callable[[str], int] | None = None,
    max_tokens: int = 75,
) -> DatasetReport:
    """Count what training will see, and warn about what is probably unintended.

    Args:
        dataset: the data set, read.
        concepts: what is learned, as it is called in captions (``sks dog``). They are matched as
            whole words, with prefix and suffix. Of several, each subset is searched for those in
            its class_tokens, or for any if it names none.
        count_tokens: number of tokens of a text, without BOS and EOS.
        max_tokens: number of tokens of a caption that the text encoder sees.
    """
    groups: dict[tuple, list[ImageInfo]] = {}
    for info in dataset.images:
        source = info.subset.metadata_file or info.subset.image_dir
        groups.setdefault((info.dataset_index, source), []).append(info)
    names = _names([key for key in groups], len(dataset.datasets))
    subsets = [
        _subset_report(names[key], infos, dataset, concepts, count_tokens, max_tokens)
        for key, infos in groups.items()
    ]
    buckets: Counter[tuple[int, int]] = Counter()
    for (_, bucket), count in dataset.bucket_counts().items():
        buckets[bucket] += count
    return DatasetReport(
        subsets=subsets,
        buckets=dict(sorted(buckets.items())),
        num_batches=len(dataset),
        num_skipped=len(dataset.skipped),
        held_out=tuple(info.path.name for info in dataset.held_out),
        max_tokens=max_tokens,
        warnings=[
            *_skipped_warnings(dataset.skipped),
            *(
                line
                for subset in subsets
                for line in _caption_warnings(subset, is_only=len(concepts) == 1)
            ),
            *_picture_warnings(dataset.images),
        ],
    )


def _subset_report(
    name: str,
    infos: Sequence[ImageInfo],
    dataset: TrainDataset,
    concepts: Sequence[str],
    count_tokens: Callable[[str], int] | None,
    max_tokens: int,
) -> SubsetReport:
    subset = infos[0].subset
    own = _concepts_of(subset.class_tokens, concepts)
    texts = [dataset.captions_of(info) for info in infos]
    num_templates = 0 if subset.is_reg else len(dataset.templates)
    elsewhere = Counter(i.caption_elsewhere.suffix for i in infos if i.caption_elsewhere)
    return SubsetReport(
        name=name,
        class_tokens=subset.class_tokens,
        is_reg=subset.is_reg,
        concepts=own,
        num_images=len(infos),
        num_repeats=sum(info.repeats for info in infos),
        num_captions=sum(info.caption_source in ("file", "metadata") for info in infos),
        num_with_concept=_count_with(own, texts) if own else None,
        num_cut=(
            sum(max(map(count_tokens, lines)) > max_tokens for lines in texts)
            if count_tokens
            else None
        ),
        captions_elsewhere={} if num_templates else dict(elsewhere),
        num_templates=num_templates,
    )


def _concepts_of(class_tokens: str | None, concepts: Sequence[str]) -> tuple[str, ...]:
    """Which of the concepts a subset shows, by its ``class_tokens``; all where these name none."""
    text = " ".join((class_tokens or "").split())
    named = tuple(concept for concept in concepts if _whole_word(concept).search(text))
    return named or tuple(concepts)


def _caption_warnings(subset: SubsetReport, *, is_only: bool) -> Iterator[str]:
    """Warnings about captions; ``is_only``: the run has one concept."""
    concepts = subset.concepts
    for extension, count in subset.captions_elsewhere.items():
        yield (
            f"{subset.name}: {_files(count, extension)} beside images without a caption are not "
            f"read; set caption_extension = {extension!r} to use them"
        )
    if concepts and not subset.is_reg and subset.num_with_concept < subset.num_images:
        missing = subset.num_images - subset.num_with_concept
        reason = ""
        reads_files = subset.num_captions and not subset.num_templates
        if reads_files and any(concept in (subset.class_tokens or "") for concept in concepts):
            reason = " (where a caption file exists, class_tokens are not used)"
        yield (
            f"{subset.name}: {_of(missing, subset.num_images)} captions lack "
            f"{_either(concepts)}{reason}; {_remedy(concepts, is_only=is_only)}"
        )
    if concepts and subset.is_reg and subset.num_with_concept:
        yield (
            f"{subset.name}: {_of(subset.num_with_concept, subset.num_images)} regularisation "
            f"captions hold {_either(concepts)}, which unteaches it"
        )
    if subset.num_cut:
        yield (
            f"{subset.name}: {_of(subset.num_cut, subset.num_images)} captions are longer than the "
            "text encoder reads; shorten them or set max_token_length = 150 or 225"
        )


def _remedy(concepts: Sequence[str], *, is_only: bool) -> str:
    """How to get the concept into captions; a prefix must not affect another one's pictures."""
    if len(concepts) > 1:
        return "write into each what it shows"
    where = "" if is_only else " for these alone, in a dataset_config"
    return f"write it into them or set caption_prefix = {concepts[0]!r}{where}"


def _picture_warnings(infos: Sequence[ImageInfo]) -> Iterator[str]:
    small = [i.path for i in infos if i.resized[0] / i.size[0] > MAX_UPSCALE]
    if small:
        yield (
            f"{_count(small, 'image')} enlarged more than {MAX_UPSCALE:g} times, which teaches "
            f"blur: {_some(small)}"
        )
    still = [i.path for i in infos if i.facts.num_frames > 1]
    if still:
        yield f"{_count(still, 'animated file')} used with the first frame only: {_some(still)}"
    yield from _profile_warnings(infos)
    same: dict[str, set[Path]] = {}
    for info in infos:
        same.setdefault(info.facts.digest, set()).add(info.path)
    for paths in same.values():
        if len(paths) > 1:
            yield f"the same file {len(paths)} times: {_some(sorted(paths))}"
    opaque = [i.path for i in infos if i.subset.alpha_mask and not i.facts.has_alpha]
    if opaque:
        yield f"alpha_mask: {_count(opaque, 'image')} without transparency: {_some(opaque)}"


def _profile_warnings(infos: Sequence[ImageInfo]) -> Iterator[str]:
    """Profiles that cannot be used; of the others, which were converted."""
    broken = [i.path for i in infos if not i.facts.profile.is_usable]
    if broken:
        yield (
            f"{_count(broken, 'image')} with a colour profile that is broken or of another kind, "
            f"taken as sRGB: {_some(broken)}"
        )
    names = Counter(i.facts.profile.name for i in infos if i.facts.profile.is_converted)
    for name, count in sorted(names.items()):
        yield f"{count} image(s) converted from the colour profile {name!r} to sRGB"


def _skipped_warnings(skipped: dict[Path, str]) -> Iterator[str]:
    for path, reason in skipped.items():
        yield f"skipped {path}: {reason}"


def _count_with(concepts: Sequence[str], texts: Sequence[Sequence[str]]) -> int:
    """Number of pictures with one of the concepts in all their possible captions."""
    patterns = [_whole_word(concept) for concept in concepts]
    return sum(
        all(any(pattern.search(line) for pattern in patterns) for line in lines) for lines in texts
    )


def _whole_word(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)", re.IGNORECASE)


def _either(concepts: Sequence[str]) -> str:
    return " or ".join(map(repr, concepts))


def _names(keys: Sequence[tuple[int, Path]], num_datasets: int) -> dict[tuple[int, Path], str]:
    """Folder names alone, with the number of their data set if there are several."""
    several = num_datasets > 1
    return {key: f"[{key[0] + 1}] {key[1].name}" if several else key[1].name for key in keys}


def _of(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.0f}%)"


def _count(items: Sequence[object], noun: str) -> str:
    return f"{len(items)} {noun}" if len(items) == 1 else f"{len(items)} {noun}s"


def _files(count: int, extension: str) -> str:
    return f"{count} {extension} file{'' if count == 1 else 's'}"


def _some(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - NUM_NAMED} more" if len(paths) > NUM_NAMED else ""
    return ", ".join(path.name for path in paths[:NUM_NAMED]) + more
