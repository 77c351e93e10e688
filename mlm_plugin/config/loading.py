"""Command line and TOML -> ``TrainConfig``.

Flags take precedence over the TOML, and the TOML over the defaults, as in kohya's trainer. Unlike
there, every key is checked and every value converted to its declared type, with an error that names
its location. This module does not know which options contradict each other (``checks``) and opens
no images or models.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mlm_plugin.config.gui_fields import is_gui_field
from mlm_plugin.config.nearest import did_you_mean
from mlm_plugin.config.options import (
    ALIASES,
    GROUPS,
    NO_EFFECT,
    OPTIONS,
    REFUSED,
    SWITCH_ALIASES,
    Declined,
    Option,
    TrainConfig,
    known_names,
)
from mlm_plugin.config.toml_files import read_toml
from mlm_plugin.errors import UserError, shown
from mlm_plugin.files import atomic_path

__all__ = [
    "coerce",
    "config_from_values",
    "describe_option",
    "load_config",
    "metavar_of",
    "options_markdown",
    "parser",
    "without_aliases",
    "write_config",
    "write_options",
]

logger = logging.getLogger(__name__)

_COMMAND_LINE = "command line"
LONGEST_NAME = 255
_LENIENT = "allow_unknown_keys = true"


def load_config(argv: Sequence[str]) -> TrainConfig:
    """Read flags and, if ``--config_file`` is among them, its TOML.

    With ``--output_config`` the file is the target of ``write_config`` and is not read.

    Args:
        argv: Arguments without the program name.

    Raises:
        UserError: Unknown flag or key, wrong type or choice, unreadable file, refused option.

    Source: sd-scripts library/train_util.py read_config_from_file (precedence, flattening).
    """
    known, unknown = parser().parse_known_args(list(argv))
    flags = vars(known)
    config_file = flags.get("config_file")
    sources: list[tuple[str, dict[str, Any]]] = []
    if config_file and not flags.get("output_config"):
        flags["config_file"] = _with_extension(config_file)
        sources.append((flags["config_file"], _flatten(flags["config_file"])))
    sources.append((_COMMAND_LINE, flags))
    lenient = _is_lenient(sources)
    _report_unknown_flags(unknown, lenient=lenient)
    values: dict[str, Any] = {}
    for place, given in sources:
        own = _read_values(given, place=place, lenient=lenient)
        _drop_superseding(values, own, place=place)
        values |= own
    return TrainConfig.from_flat(values)


_SUPERSEDED_BY = {
    "max_train_steps": "max_train_epochs",
    "save_every_n_epochs": "save_n_epoch_ratio",
    "sample_every_n_steps": "sample_every_n_epochs",
    "lr_scheduler": "lr_scheduler_type",
    "keep_tokens": "keep_tokens_separator",
    "train_data_dir": "dataset_config",
}
"""Options that another one replaces where both are given."""


def _drop_superseding(before: dict[str, Any], given: Mapping[str, Any], *, place: str) -> None:
    """A flag wins over the file also where the file has the option that would replace it."""
    for name, stronger in _SUPERSEDED_BY.items():
        if given.get(name) and before.get(stronger) and stronger not in given:
            dropped = before.pop(stronger)
            logger.warning(
                "%s: %s = %s takes the place of %s = %s in the file",
                *(place, name, given[name], stronger, dropped),
            )


def config_from_values(values: Mapping[str, Any], *, place: str) -> TrainConfig:
    """The config for a mapping of options, checked like a TOML.

    Args:
        values: Option names and values as a TOML would hold them.
        place: Name of the source in errors.

    Raises:
        UserError: As in ``load_config``.
    """
    return TrainConfig.from_flat(_read_values(values, place=place, lenient=False))


def write_config(config: TrainConfig, path: str | Path | None = None) -> Path:
    """Write the options that differ from the defaults as TOML, one section per group.

    Options of the ``run`` group and secrets are left out.

    Args:
        config: What to write.
        path: Target; ``config_file`` of the config if not given.

    Raises:
        UserError: No target, or the target exists.
    """
    path = path or config.run.config_file
    if not path:
        raise UserError("--output_config: give the file to write as --config_file")
    return write_options(config.changed(), path)


def write_options(values: Mapping[str, Any], path: str | Path) -> Path:
    """Write options as TOML, one section per group, without the ``run`` group and secrets.

    Raises:
        UserError: The target exists.
    """
    import tomli_w

    target = Path(_with_extension(str(path)))
    if target.exists():
        raise UserError(f"{target}: exists already; remove it or choose another name")
    sections: dict[str, dict[str, Any]] = {}
    for name, entry in OPTIONS.items():
        if name in values and entry.group != "run" and not entry.secret:
            sections.setdefault(entry.group, {})[name] = values[name]
    with atomic_path(target) as temporary:
        temporary.write_text(tomli_w.dumps(sections), encoding="utf-8")
    return target


# --- values ---------------------------------------------------------------------------------


def coerce(entry: Option, raw: Any, *, place: str) -> Any:
    """Convert a value to the declared type of its option.

    Accepts what people write: ``"1e-4"`` for a number, ``1.0`` for a whole number, 0/1 and
    ``"false"`` for a switch, one value for a list, an empty text for "not given".

    Args:
        entry: The declaration.
        raw: A TOML value, or the text (or list of texts) of a flag.
        place: File or ``command line``, for the error.

    Raises:
        UserError: Wrong type, choice or range.
    """
    try:
        value = entry.convert(raw) if entry.convert else raw
        if entry.nullable and _is_empty(value):
            return None
        if entry.many:
            values = tuple(_to_kind(entry.kind, item) for item in _to_list(entry, value))
            for item in values:
                _check_limits(entry, item, place=place)
            return values
        value = _to_number(value) if entry.whole else _to_kind(entry.kind, value)
        if entry.zero_is_off and value == 0:
            return None
        _check_limits(entry, value, place=place)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{place}: {entry.name} = {shown(raw)} is not allowed; it must be {_expected(entry)}"
        ) from error
    return value


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], ())


def _to_list(entry: Option, value: Any) -> list:
    if isinstance(value, (list, tuple)):
        return list(value)
    if entry.kind is str and isinstance(value, str):
        words = value.split()
        return words if all("=" in word for word in words) else [value]
    return [value]


def _to_kind(kind: type, value: Any) -> Any:
    if kind is bool:
        return _to_bool(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError
    if kind is str:
        return str(value)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    if kind is float:
        return number
    if number != int(number):
        raise ValueError
    return int(value) if isinstance(value, int) else int(number)


def _to_number(value: Any) -> int | float:
    number = _to_kind(float, value)
    return int(number) if number == int(number) else number


def _to_bool(value: Any) -> bool:
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}[value.strip().lower()]
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    raise TypeError


def _check_limits(entry: Option, value: Any, *, place: str) -> None:
    if entry.choices is not None and value not in entry.choices:
        raise ValueError
    if entry.at_least is not None and value < entry.at_least:
        raise ValueError
    if entry.at_most is not None and value > entry.at_most:
        raise ValueError
    if entry.kind is str:
        _check_text(entry, value, place=place)
    if entry.path and place != _COMMAND_LINE and any(ord(letter) < 32 for letter in value):
        raise UserError(
            f"{place}: {entry.name} = {value!r} holds a control character; "
            "write Windows paths with / or in single quotes"
        )


def _check_text(entry: Option, value: str, *, place: str) -> None:
    """What no program and no file system can take."""
    if "\0" in value:
        raise UserError(f"{place}: {entry.name} = {value!r} holds a zero byte; remove it")
    longest = max(len(part.encode("utf-8", "replace")) for part in re.split(r"[/\\,]", value))
    if entry.path and longest > LONGEST_NAME:
        raise UserError(
            f"{place}: {entry.name} = {value!r}: a name in it has {longest} bytes, and no disk "
            f"takes more than {LONGEST_NAME}"
        )


def _expected(entry: Option) -> str:
    if entry.choices is not None:
        text = "one of " + ", ".join(str(choice) for choice in entry.choices)
    else:
        text = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[
            entry.kind
        ]
    if entry.name == "max_token_length":
        text = "one of 75, 150, 225"
    if entry.whole:
        text = "a whole number of steps, a ratio below 1 or a percentage like 10%"
    if entry.name == "stop_text_encoder_training":  # -1 in kohya's train_db.py
        text += " (to train none at all: no_train_text_encoder or network_train_unet_only)"
    if entry.at_least is not None:
        text += f" of at least {entry.at_least:g}"
    if entry.at_most is not None:
        text += f" and at most {entry.at_most}"
    return f"a list; each item {text}" if entry.many else text


# --- sources --------------------------------------------------------------------------------


def _with_extension(path: str) -> str:
    return path if path.endswith(".toml") else path + ".toml"


def _flatten(path: str) -> dict[str, Any]:
    """Keys of a TOML without its sections, which are flattened exactly one level."""
    if not Path(path).is_file():
        raise UserError(
            f"--config_file {path}: there is no such file (the name must end in .toml; "
            "kohya_ss GUI presets are turned into TOML by `mlm-plugin convert-preset`)"
        )
    flat: dict[str, Any] = {}
    section_of: dict[str, str] = {}
    for name, value in read_toml(path).items():
        if name == "datasets":
            raise UserError(f"{path}: describes data sets; give it as --dataset_config")
        section, members = (
            (f"[{name}]", value) if isinstance(value, dict) else ("top", {name: value})
        )
        for key, member in members.items():
            if key in flat:
                raise UserError(
                    f"{path}: {key} is given twice, in {section_of[key]} and in {section}"
                )
            flat[key] = member
            section_of[key] = section
    return flat


def _is_lenient(sources: Sequence[tuple[str, Mapping[str, Any]]]) -> bool:
    entry = OPTIONS["allow_unknown_keys"]
    given = [
        coerce(entry, values[entry.name], place=place)
        for place, values in sources
        if entry.name in values
    ]
    return given[-1] if given else entry.default


def _report_unknown_flags(arguments: Sequence[str], *, lenient: bool) -> None:
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        flag = argument.split("=")[0]
        names = [*known_names(), *(f"no_{name}" for name in known_names())]
        hint = did_you_mean(flag[2:], names, prefix="--")
        _complain(f"{_COMMAND_LINE}: unknown flag {flag}{hint}", lenient=lenient)
    if arguments and not any(argument.startswith("--") for argument in arguments):
        _complain(
            f"{_COMMAND_LINE}: cannot place {arguments[0]!r}; flags are written --name value",
            lenient=lenient,
        )


def _unknown_key(name: str) -> str:
    if is_gui_field(name):
        return (
            f"{name!r} is a field of the kohya_ss GUI, not an option of a trainer; turn the "
            "preset (JSON) into TOML with `mlm-plugin convert-preset`, remove the key, or set "
            f"{_LENIENT}"
        )
    hint = did_you_mean(name, known_names())
    return f"unknown key {name!r}{hint or '; remove it'}, or set {_LENIENT} to go on without it"


def _complain(message: str, *, lenient: bool) -> None:
    if not lenient:
        raise UserError(message)
    logger.warning("%s (ignored)", message)


def _read_values(given: Mapping[str, Any], *, place: str, lenient: bool) -> dict[str, Any]:
    """Final values of the supported options in one source; complains about the others."""
    values: dict[str, Any] = {}
    for name, raw in without_aliases(given, place=place).items():
        if name in OPTIONS:
            value = coerce(OPTIONS[name], raw, place=place)
            if value is not None or OPTIONS[name].nullable:
                values[name] = value
        elif name in REFUSED:
            if _asks_for_something(REFUSED[name], raw):
                raise UserError(f"{place}: {name}: {REFUSED[name].reason}")
        elif name in NO_EFFECT:
            if _asks_for_something(NO_EFFECT[name], raw):
                logger.warning("%s: %s has no effect: %s", place, name, NO_EFFECT[name].reason)
        else:
            _complain(f"{place}: {_unknown_key(name)}", lenient=lenient)
    return values


def without_aliases(given: Mapping[str, Any], *, place: str) -> dict[str, Any]:
    """Values with old spellings replaced by the options that they mean.

    Raises:
        UserError: both are given, and differ.
    """
    plain = dict(given)
    for old, new in ALIASES.items():
        if old in plain:
            _add(plain, new, plain.pop(old), old=old, place=place)
    for old, (new, value) in SWITCH_ALIASES.items():
        if old in plain and _asks_for_something(Declined(False, ""), plain.pop(old)):
            _add(plain, new, value, old=old, place=place)
    return plain


def _add(plain: dict[str, Any], name: str, value: Any, *, old: str, place: str) -> None:
    if plain.get(name) not in (None, "", value):
        raise UserError(f"{place}: {old} and {name} are both given; keep {name} only")
    plain[name] = value


def _asks_for_something(entry: Declined, raw: Any) -> bool:
    if isinstance(raw, str) and isinstance(entry.default, (bool, int, float)):
        raw = {"true": True, "false": False}.get(raw.lower(), raw)
    if not entry.default and raw in (0, "0", "", None, [], ()):
        return False
    return str(raw) != str(entry.default)


# --- command line ---------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{_COMMAND_LINE}: {message.replace('argument --', '--')}")


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line of a training run, for ``--help`` and for flags that were given.

    Options that were not given are absent from the parsed namespace.
    """
    built = _Parser(
        prog=prog,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_Formatter,
        description="Teach concepts to Stable Diffusion with the MLM regularizer: a LoRA, or what "
        "--method names. Options are those of kohya's train_network.py, and ours.",
        epilog="Every switch that the TOML turns on is turned off by --no_NAME or --NAME=false, "
        "e.g. --no_shuffle_caption. --traceback shows where an error comes from.",
    )
    for group, cls in GROUPS.items():
        section = built.add_argument_group(group, cls.__doc__)
        for entry in OPTIONS.values():
            if entry.group == group:
                _add_flag(section, entry)
    for title, table in (("accepted, without effect", NO_EFFECT), ("refused", REFUSED)):
        section = built.add_argument_group(title)
        for name, declined in table.items():
            _add_declined(section, name, declined)
    section = built.add_argument_group("old spellings")
    for name, new in ALIASES.items():
        section.add_argument(f"--{name}", metavar="TEXT", help=f"means {new}")
    for name, (new, value) in SWITCH_ALIASES.items():
        _add_switch(section, name, f"means {new}={value}")
    return built


def _add_flag(section: Any, entry: Option) -> None:
    text = describe_option(entry)
    if entry.kind is bool:
        _add_switch(section, entry.name, text)
    else:
        nargs = "*" if entry.many else None
        section.add_argument(f"--{entry.name}", metavar=metavar_of(entry), nargs=nargs, help=text)


def _add_switch(section: Any, name: str, text: str) -> None:
    """``--x``, ``--x=false`` and ``--no-x``; the value is converted as one of a TOML."""
    section.add_argument(f"--{name}", nargs="?", const=True, help=text)
    off = (f"--no-{name}", f"--no_{name}")
    section.add_argument(*off, action="store_false", dest=name, help=argparse.SUPPRESS)


def _add_declined(section: Any, name: str, entry: Declined) -> None:
    text = entry.reason.replace("%", "%%")
    if entry.default is False:
        _add_switch(section, name, text)
    else:
        nargs = "*" if isinstance(entry.default, tuple) else None
        section.add_argument(f"--{name}", metavar="VALUE", nargs=nargs, help=text)


def metavar_of(entry: Option) -> str:
    """What stands for the value of an option in ``--help``."""
    if entry.path:
        return "PATH"
    pairs = entry.name.endswith("_args")
    return {int: "N", float: "X", str: "KEY=VALUE" if pairs else "TEXT"}[entry.kind]


def describe_option(entry: Option) -> str:
    """The help of an option with its choices and its default, for argparse."""
    text = entry.help
    if entry.choices is not None and len(entry.choices) > 1 and entry.name != "max_token_length":
        text += " One of: " + ", ".join(str(choice) for choice in entry.choices) + "."
    if not _is_empty(entry.default) and entry.kind is not bool:
        text += f" (default: {_number_text(entry.default)})"
    return text.replace("%", "%%")


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=100)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "" if action.nargs == "?" else super()._format_args(action, default_metavar)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        short = "%(prog)s [--config_file RUN.toml] [--dataset_config DATA.toml] [--NAME VALUE ...]"
        super().add_usage(short, [], [], prefix)


# --- documentation --------------------------------------------------------------------------


def options_markdown() -> str:
    """The tables of ``docs/options.md``: one per group with option, default and help."""
    return "\n\n".join(_group_markdown(group, cls) for group, cls in GROUPS.items()) + "\n"


def _group_markdown(group: str, cls: type) -> str:
    lines = [f"**{group}**: {cls.__doc__}", "", "| option | default | effect |", "|---|---|---|"]
    for entry in OPTIONS.values():
        if entry.group == group:
            effect = (
                describe_option(entry)
                .replace("%%", "%")
                .split(" (default: ")[0]
                .replace("|", "\\|")
            )
            lines.append(f"| `{entry.name}` | {_default_text(entry)} | {effect} |")
    return "\n".join(lines)


def _default_text(entry: Option) -> str:
    if entry.kind is bool:
        return "on" if entry.default else "off"
    return "" if _is_empty(entry.default) else f"`{_number_text(entry.default)}`"


def _number_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
