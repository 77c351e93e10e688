"""Captions: found beside a picture, and rewritten for each draw (shuffle, dropout, wildcards).

Knows no pixels, no tokenizer and no placeholder token. The order of the steps, and of the random
draws within them, is that of sd-scripts (commit 48d368fa), so equal seeds give equal captions.
"""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mlm_plugin.errors import UserError

if TYPE_CHECKING:
    from mlm_plugin.config.datasets import SubsetConfig

__all__ = [
    "KNOWN_EXTENSIONS",
    "FoundCaption",
    "NotUTF8",
    "ineffective_settings",
    "metadata_caption",
    "possible_captions",
    "process_caption",
    "read_captions",
]

logger = logging.getLogger(__name__)

KNOWN_EXTENSIONS = (".caption", ".txt", ".tags", ".cap")
"""Extensions that caption tools write; others than the configured one are reported, not used."""

FACE_INFO_PARTS = 4
"""sd-scripts' face tools append _cx_cy_w_h to a picture's name, not to its caption's."""

WILDCARD = re.compile(r"\{([^}]+)\}")


class FoundCaption(NamedTuple):
    """The caption found beside a picture."""

    text: str | None  # None: no file; "": an empty file; lines joined by "\n" with wildcards
    path: Path | None  # the file that was read
    elsewhere: Path | None  # a caption under another extension, when none was found


class NotUTF8(UserError):
    """A caption file in another encoding; ``path`` and ``byte`` say where."""

    def __init__(self, path: Path, byte: int):
        super().__init__(f"{path}: the caption is not UTF-8 (byte {byte}); save it as UTF-8")
        self.path, self.byte = path, byte


def read_captions(image_path: Path, extension: str, enable_wildcard: bool) -> FoundCaption:
    """Read the caption file of a picture: same stem, then the stem without face information.

    Without wildcards the first line with text is used, else every such line. A UTF-8 byte
    order mark is dropped.

    Raises:
        NotUTF8: names the file.

    Source: sd-scripts library/train_util.py read_caption; there an empty file stops the run.
    """
    extension = extension if extension.startswith(".") else f".{extension}"
    stems = _caption_stems(image_path)
    for stem in stems:
        path = image_path.with_name(stem + extension)
        if path.is_file():
            return FoundCaption(_read_lines(path, enable_wildcard), path, None)
    others = (e for e in KNOWN_EXTENSIONS if e != extension)
    candidates = (image_path.with_name(stem + other) for stem in stems for other in others)
    return FoundCaption(None, None, next((path for path in candidates if path.is_file()), None))


def metadata_caption(caption: str | None, tags: str | None, subset: SubsetConfig) -> str:
    """Join caption and tags of a metadata entry; with wildcards the tags follow every line.

    Source: sd-scripts library/train_util.py FineTuningDataset. There tags without a caption are
    lost when wildcards are on; here they are the caption.
    """
    separator = subset.caption_separator
    lines = [caption or ""]
    if subset.enable_wildcard:
        tags = tags.replace("\n", separator) if tags else tags
        lines = [line for line in (caption or "").split("\n") if line.strip()] or [""]
    return "\n".join(separator.join(part for part in (line, tags) if part) for line in lines)


def process_caption(
    caption: str,
    subset: SubsetConfig,
    *,
    rng: random.Random,
    epoch: int,
    step: int,
    max_step: int | None = None,
) -> str:
    r"""Rewrite one caption for one draw.

    Order: prefix and suffix; dropout of the whole caption; wildcards; keep, warm-up, shuffle and
    dropout of tags (only if one of the last three is on; the tags are then joined by ", ");
    secondary separator.

    Args:
        caption: text of the picture, lines joined by "\n".
        subset: its settings.
        rng: source of every draw.
        epoch: counted from 1, as ``caption_dropout_every_n_epochs`` counts.
        step: optimiser steps done, for ``token_warmup_step``.
        max_step: steps of the run; needed when ``token_warmup_step`` is a share (below 1).

    Returns:
        The caption; "" when it was dropped.

    Source: sd-scripts library/train_util.py BaseDataset.process_caption.
    """
    caption = _with_prefix_and_suffix(caption, subset)
    if _drops_caption(subset, rng, epoch):
        return ""
    if subset.enable_wildcard:
        caption = _fill_wildcards(caption, rng)
    else:
        caption = caption.split("\n")[0]
    if _rewrites_tags(subset):
        warmup_steps = _warmup_steps(subset.token_warmup_step, max_step)
        caption = _rewrite_tags(caption, subset, rng, step, warmup_steps)
    if subset.secondary_separator:
        caption = caption.replace(subset.secondary_separator, subset.caption_separator)
    return caption


def possible_captions(caption: str, subset: SubsetConfig) -> list[str]:
    """What a caption becomes in :func:`process_caption`, with all tags and in their order.

    With wildcards every line, and every option of a wildcard at least once.
    """
    lines = _with_prefix_and_suffix(caption, subset).split("\n")
    lines = [f for line in lines for f in _fillings(line)] if subset.enable_wildcard else lines[:1]
    return [_without_separators(line, subset) for line in lines]


def _with_prefix_and_suffix(caption: str, subset: SubsetConfig) -> str:
    """Put ``caption_prefix`` before the first line and ``caption_suffix`` after the last one."""
    if subset.caption_prefix:
        caption = f"{subset.caption_prefix} {caption}"
    if subset.caption_suffix:
        caption = f"{caption} {subset.caption_suffix}"
    return caption


def ineffective_settings(subset: SubsetConfig) -> list[str]:
    """Name the caption settings that have no effect with the others, one line each."""
    lines = []
    if not _rewrites_tags(subset):
        needed = "shuffle_caption, caption_tag_dropout_rate or token_warmup_step"
        if subset.keep_tokens:
            lines.append(f"keep_tokens {subset.keep_tokens} has no effect without {needed}")
        if subset.keep_tokens_separator:
            lines.append(
                f"keep_tokens_separator {subset.keep_tokens_separator!r} stays in the captions "
                f"as text without {needed}"
            )
    if subset.token_warmup_min != 1 and not subset.token_warmup_step:
        lines.append("token_warmup_min has no effect without token_warmup_step")
    return lines


def _caption_stems(image_path: Path) -> list[str]:
    stem = image_path.stem
    parts = stem.split("_")
    if len(parts) > FACE_INFO_PARTS:
        return [stem, "_".join(parts[:-FACE_INFO_PARTS])]
    return [stem]


def _read_lines(path: Path, every_line: bool) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotUTF8(path, error.start) from error
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return "\n".join(lines if every_line else lines[:1])


def _drops_caption(subset: SubsetConfig, rng: random.Random, epoch: int) -> bool:
    rate, every = subset.caption_dropout_rate, subset.caption_dropout_every_n_epochs
    by_chance = rate > 0 and rng.random() < rate
    return by_chance or (every > 0 and epoch % every == 0)


def _fill_wildcards(caption: str, rng: random.Random) -> str:
    if "\n" in caption:
        caption = rng.choice(caption.split("\n"))
    return _replace_wildcards(caption, rng.choice)


def _fillings(line: str) -> list[str]:
    """The first option of every wildcard, then the second ..., as long as one has another."""
    counts = [1]

    def counted(options: list[str]) -> str:
        counts.append(len(options))
        return options[0]

    first = _replace_wildcards(line, counted)
    return [first] + [
        _replace_wildcards(line, lambda options, n=n: options[n % len(options)])
        for n in range(1, max(counts))
    ]


def _replace_wildcards(caption: str, choose: Callable[[list[str]], str]) -> str:
    # Doubled braces are literal. They are replaced by characters that the caption does not use.
    opened, closed = "\ue000", "\ue001"
    while opened in caption or closed in caption:
        opened, closed = opened + "\ue000", closed + "\ue001"
    caption = caption.replace("{{", opened).replace("}}", closed)
    caption = WILDCARD.sub(lambda match: choose(match.group(1).split("|")), caption)
    return caption.replace(opened, "{").replace(closed, "}")


def _rewrites_tags(subset: SubsetConfig) -> bool:
    warms_up = subset.token_warmup_step > 0
    return subset.shuffle_caption or warms_up or subset.caption_tag_dropout_rate > 0


def _warmup_steps(token_warmup_step: float, max_step: int | None) -> float:
    if token_warmup_step <= 0 or token_warmup_step >= 1:
        return token_warmup_step
    assert max_step is not None, "token_warmup_step is a share of the run: its length is needed"
    return math.floor(token_warmup_step * max_step)


def _rewrite_tags(
    caption: str, subset: SubsetConfig, rng: random.Random, step: int, warmup_steps: float
) -> str:
    first, tags, last = _split_tags(caption, subset)
    if step < warmup_steps:
        shown = math.floor(step * ((len(tags) - subset.token_warmup_min) / warmup_steps))
        tags = tags[: shown + subset.token_warmup_min]
    if subset.shuffle_caption:
        rng.shuffle(tags)
    if subset.caption_tag_dropout_rate > 0:
        tags = [tag for tag in tags if rng.random() >= subset.caption_tag_dropout_rate]
    return ", ".join(first + tags + last)


def _without_separators(line: str, subset: SubsetConfig) -> str:
    mark = subset.keep_tokens_separator
    if mark and mark in line and _rewrites_tags(subset):
        line = ", ".join(tag for tags in _split_tags(line, subset) for tag in tags)
    if subset.secondary_separator:
        line = line.replace(subset.secondary_separator, subset.caption_separator)
    return line


def _split_tags(caption: str, subset: SubsetConfig) -> tuple[list[str], list[str], list[str]]:
    """Split into tags kept at the front, tags to shuffle, and tags kept at the end."""
    mark = subset.keep_tokens_separator
    if mark and mark in caption:
        parts = [_tags(part, subset.caption_separator) for part in caption.split(mark, 2)]
        first, tags, last = [*parts, []][:3]
        return first, tags, last
    tags = [tag.strip() for tag in caption.strip().split(subset.caption_separator)]
    return tags[: subset.keep_tokens], tags[subset.keep_tokens :], []


def _tags(text: str, separator: str) -> list[str]:
    return [tag.strip() for tag in text.split(separator) if tag.strip()]
