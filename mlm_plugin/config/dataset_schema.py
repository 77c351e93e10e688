"""What a ``--dataset_config`` may hold: keys, where they may stand and what their values may be.

Source: sd-scripts library/config_util.py (``ConfigSanitizer``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from mlm_plugin.config.nearest import did_you_mean
from mlm_plugin.config.options import LARGEST_BATCH, LARGEST_SIDE, MOST_REPEATS, OPTIONS
from mlm_plugin.errors import UserError, shown

__all__ = ["IMAGES", "KEYS", "Key", "check_caption_extension", "check_table", "is_kind"]


class Key(NamedTuple):
    """What a value must be, and where it may stand."""

    kind: str
    levels: str  # g general, d data set, s subset
    only: str = "images metadata"  # kinds of subsets that have it


IMAGES = "images"

KEYS: dict[str, Key] = {
    "batch_size": Key("int", "gd"),
    "resolution": Key("size", "gd"),
    "enable_bucket": Key("bool", "gd"),
    "bucket_no_upscale": Key("bool", "gd"),
    "min_bucket_reso": Key("int", "gd"),
    "max_bucket_reso": Key("int", "gd"),
    "bucket_reso_steps": Key("int", "gd"),
    "network_multiplier": Key("float", "gd"),
    "validation_split": Key("share", "gd"),
    "validation_seed": Key("int", "gd"),
    "num_repeats": Key("int", "gds"),
    "shuffle_caption": Key("bool", "gds"),
    "keep_tokens": Key("int", "gds"),
    "keep_tokens_separator": Key("str", "gds"),
    "secondary_separator": Key("str", "gds"),
    "caption_separator": Key("str", "gds"),
    "enable_wildcard": Key("bool", "gds"),
    "caption_prefix": Key("str", "gds"),
    "caption_suffix": Key("str", "gds"),
    "caption_dropout_rate": Key("rate", "gds"),
    "caption_dropout_every_n_epochs": Key("int", "gds"),
    "caption_tag_dropout_rate": Key("rate", "gds"),
    "token_warmup_min": Key("int", "gds"),
    "token_warmup_step": Key("float", "gds"),
    "color_aug": Key("bool", "gds"),
    "flip_aug": Key("bool", "gds"),
    "scale_aug": Key("bool", "gds"),
    "random_crop": Key("bool", "gds"),
    "face_crop_aug_range": Key("range", "gds"),
    "resize_interpolation": Key("interpolation", "gds"),
    "custom_attributes": Key("table", "gds"),
    "caption_extension": Key("str", "gds", IMAGES),
    "class_tokens": Key("str", "gds", IMAGES),
    "cache_info": Key("bool", "gds", IMAGES),
    "alpha_mask": Key("bool", "s"),
    "image_dir": Key("str", "s"),
    "is_reg": Key("bool", "s", IMAGES),
    "conditioning_data_dir": Key("str", "s", IMAGES),
    "metadata_file": Key("str", "s", "metadata"),
}
"""Every key of a dataset_config. Source: ConfigSanitizer's schemas."""

_MOST = {
    "batch_size": LARGEST_BATCH,
    "num_repeats": MOST_REPEATS,
    **dict.fromkeys(("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps"), LARGEST_SIDE),
}
LARGEST_NUMBER = 1e30

_EXPECTED = {
    "int": "a whole number, 0 or more",
    "float": "a number",
    "rate": "a number from 0 to 1",
    "share": "a number from 0 to below 1",
    "bool": "true or false",
    "str": "text",
    "size": f"a number of pixels or [width, height], at most {LARGEST_SIDE}",
    "range": "two numbers [min, max]",
    "interpolation": "one of " + ", ".join(OPTIONS["resize_interpolation"].choices or ()),
    "table": "a table of key = value",
}


def _names(level: str, kind: str | None = None) -> set[str]:
    """Keys of a level (``general``, ``dataset``, ``subset``), of both kinds if none is given."""
    return {
        name
        for name, key in KEYS.items()
        if level[0] in key.levels and (kind is None or kind in key.only)
    }


def check_table(table: Any, level: str, kind: str | None = None, *, place: str) -> None:
    """Refuse keys and values that a table cannot have.

    Args:
        table: as read.
        level: ``general``, ``dataset`` or ``subset``.
        kind: of the subsets, ``images`` or ``metadata``; ``None``: either.
        place: the table's name in messages.

    Raises:
        UserError: not a table, an unknown or misplaced key, a value of another kind.
    """
    if not isinstance(table, dict):
        raise UserError(f"{place}: must be a table of key = value")
    for name, value in table.items():
        if name not in _names(level, kind):
            raise UserError(f"{place}: {_misplaced(name, level)}")
        if not is_kind(KEYS[name].kind, value):
            raise UserError(
                f"{place}: {name} = {shown(value)} is not allowed; "
                f"it must be {_EXPECTED[KEYS[name].kind]}"
            )
        if name in _MOST and value > _MOST[name]:
            raise UserError(f"{place}: {name} = {value} is too large; at most {_MOST[name]}")
        if name == "caption_extension":
            check_caption_extension(value, place=place)


def check_caption_extension(extension: str, *, place: str) -> None:
    """Refuse what cannot end a file name.

    Raises:
        UserError: a slash or a control character, or one that is too long.
    """
    if set(extension) & set("/\\") or not extension.isprintable() or len(extension) > 50:
        raise UserError(
            f"{place}: caption_extension = {extension!r} is not the end of a file name; give one "
            "like '.txt'"
        )


def _misplaced(name: str, level: str) -> str:
    if name not in KEYS:
        return f"unknown key {name!r}{did_you_mean(name, _names(level))}"
    if name in _names(level):
        return f"{name} cannot be combined with metadata_file, which holds the captions; remove it"
    places = {"g": "[general]", "d": "[[datasets]]", "s": "[[datasets.subsets]]"}
    return f"{name} does not belong here; it goes to " + " or ".join(
        places[letter] for letter in KEYS[name].levels
    )


def is_kind(kind: str, value: Any) -> bool:
    """Whether a value is what :attr:`Key.kind` says."""
    is_number = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= LARGEST_NUMBER  # neither inf nor NaN
    )
    is_whole = is_number and float(value).is_integer() and value >= 0
    if kind == "int":
        return is_whole
    if kind == "size":
        sides = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
        return all(is_kind("int", side) and 0 < side <= LARGEST_SIDE for side in sides)
    if kind == "range":
        return (
            isinstance(value, (list, tuple))
            and len(value) == 2
            and all(is_kind("float", item) for item in value)
            and value[0] <= value[1]
        )
    if kind == "rate":
        return is_number and 0 <= value <= 1
    if kind == "share":
        return is_number and 0 <= value < 1
    if kind == "interpolation":
        return value in (OPTIONS["resize_interpolation"].choices or ())
    if kind == "float":
        return is_number
    return isinstance(value, {"bool": bool, "str": str, "table": dict}[kind])
