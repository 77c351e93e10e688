"""kohya_ss GUI presets (JSON) -> TOML for this trainer.

The GUI has its own field names, keeps empty boxes as "" or 0 and packs the network's settings
into one field each. This module translates them into the options of sd-scripts that the GUI would
have passed. What cannot be translated causes a warning, and is never dropped silently.

Source: bmaltais/kohya_ss kohya_gui/lora_gui.py train_model (which field becomes which option).
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlm_plugin.config.gui_fields import (
    GUI_ONLY,
    HANDLED,
    KOHYA_ARGS,
    LYCORIS_ARGS,
    RENAMED,
    SDXL_SWITCHES,
)
from mlm_plugin.config.loading import coerce, parser, without_aliases, write_options
from mlm_plugin.config.options import NO_EFFECT, OPTIONS, REFUSED
from mlm_plugin.errors import UserError
from mlm_plugin.files import parse_json, read_text

__all__ = ["convert_preset", "run_convert_preset"]

_PLACE = "preset"

_LYCORIS_ALGO = {
    "LyCORIS/LoCon": "locon",
    "LoCon": "locon",
    "LyCORIS/LoHa": "loha",
    "LyCORIS/LoKr": "lokr",
    "LyCORIS/iA3": "ia3",
    "LyCORIS/BOFT": "boft",
    "LyCORIS/Diag-OFT": "diag-oft",
    "LyCORIS/DyLoRA": "dylora",
    "LyCORIS/GLoRA": "glora",
    "LyCORIS/Native Fine-Tuning": "full",
}

_KOHYA_MODULE = {
    "Standard": "networks.lora",
    "Kohya LoCon": "networks.lora",
    "LoRA-FA": "networks.lora_fa",
    "Kohya DyLoRA": "networks.dylora",
    "Flux1": "networks.lora_flux",
}

_ORIGINAL_NOISE = ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale")
_MULTIRES_NOISE = ("multires_noise_iterations", "multires_noise_discount")


def convert_preset(preset: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Options that the GUI would pass for a preset.

    Args:
        preset: The JSON object: GUI field names and values.

    Returns:
        Options that differ from their defaults, and warnings about what could not be translated.

    Raises:
        UserError: A field holds a value of the wrong type, or text that cannot be split into flags.
    """
    fields = {name: value for name, value in preset.items() if not _is_blank(value)}
    warnings: list[str] = []
    values = _plain_options(fields, warnings)
    values |= _network(fields, warnings)
    values |= _length(fields)
    values |= _learning_rates(fields)
    values |= _warmup(fields, warnings)
    values |= _text_encoder_stop(fields, warnings)
    values |= _switches(fields, warnings)
    _keep_chosen_noise(fields, values)
    values |= _additional(str(fields.get("additional_parameters", "")), warnings)
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }, warnings


def run_convert_preset(argv: Sequence[str]) -> int:
    """``mlm-plugin convert-preset in.json [-o out.toml]``; returns the exit code.

    Raises:
        UserError: Unreadable preset, or the target exists.
    """
    arguments = argparse.ArgumentParser(
        prog="mlm-plugin convert-preset",
        description="Turn a kohya_ss GUI preset (JSON) into a TOML for --config_file.",
    )
    arguments.add_argument("preset", help="the GUI's .json file")
    arguments.add_argument("-o", "--output", help="the .toml to write (default: beside the preset)")
    options = arguments.parse_args(argv)
    values, warnings = convert_preset(_read_json(options.preset))
    target = write_options(values, options.output or Path(options.preset).with_suffix(".toml"))
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"wrote {target}: {len(values)} options that differ from the defaults")
    return 0


def _read_json(path: str) -> dict[str, Any]:
    preset = parse_json(read_text(path), path)
    if not isinstance(preset, dict):
        raise UserError(f"{path}: is not a GUI preset: an object of fields is needed")
    return preset


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _is_off(value: Any) -> bool:
    """0, "0", 0.0, false, "" and None: the GUI's values for "not set"."""
    return _is_blank(value) or value in (0, "0", "0.0", "False", "none")


def _number(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name, 0)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{_PLACE}: {name} = {value!r} is not allowed; it must be a number"
        ) from error


def _plain_options(fields: Mapping[str, Any], warnings: list[str]) -> dict[str, Any]:
    """Fields that are options under their own or another name."""
    values: dict[str, Any] = {}
    for field, value in fields.items():
        name = RENAMED.get(field, field)
        if field in HANDLED or field in GUI_ONLY:
            continue
        if name in OPTIONS:
            values |= _one_option(name, value)
        elif name in REFUSED or name in NO_EFFECT:
            entry = REFUSED.get(name) or NO_EFFECT[name]
            if not _is_off(value) and value != entry.default:
                warnings.append(f"{field} = {value!r} is left out: {entry.reason}")
        elif not _is_off(value):
            warnings.append(f"{field} = {value!r} is left out: no option of this trainer")
    return values


def _one_option(name: str, value: Any) -> dict[str, Any]:
    entry = OPTIONS[name]
    means_unset = entry.nullable or (entry.at_least or 0) > 0
    if _is_off(value) and entry.kind is not bool and means_unset:
        return {}
    if entry.many and isinstance(value, str):
        value = value.replace('"', "").split()
    final = coerce(entry, value, place=_PLACE)
    return {} if final == entry.default else {name: final}


def _network(fields: Mapping[str, Any], warnings: list[str]) -> dict[str, Any]:
    kind = str(fields.get("LoRA_type", "Standard"))
    if kind in _LYCORIS_ALGO:
        module, arguments = "lycoris.kohya", _lycoris_arguments(fields, _LYCORIS_ALGO[kind])
    else:
        if kind not in _KOHYA_MODULE:
            warnings.append(f"LoRA_type = {kind!r} is unknown; networks.lora is used")
        module = _KOHYA_MODULE.get(kind, "networks.lora")
        names = list(KOHYA_ARGS)
        if kind in ("Kohya LoCon", "Kohya DyLoRA"):
            names += ["conv_dim", "conv_alpha"]
        if kind == "Kohya DyLoRA":
            names += ["unit"]
        arguments = [f"{name}={fields[name]}" for name in names if not _is_off(fields.get(name))]
    given = str(fields.get("network_args", "")).replace('"', "").split()
    found = {"network_args": tuple([*arguments, *given])} if arguments or given else {}
    default = OPTIONS["network_module"].default
    return found | ({"network_module": module} if module != default else {})


def _lycoris_arguments(fields: Mapping[str, Any], algo: str) -> list[str]:
    arguments = [f"algo={algo}", f"preset={fields.get('LyCORIS_preset', 'full')}"]
    if algo != "full":
        arguments += [
            f"{name}={fields[name]}" for name in ("conv_dim", "conv_alpha") if name in fields
        ]
    if algo == "lokr" and fields.get("factor", -1) != -1:
        arguments.append(f"factor={fields['factor']}")
    if algo == "ia3" and "train_on_input" in fields:
        arguments.append(f"train_on_input={fields['train_on_input']}")
    if algo == "dylora":
        arguments.append(f"block_size={fields.get('unit', 1)}")
    return arguments + [
        f"{name}={fields[name]}" for name in LYCORIS_ARGS if not _is_off(fields.get(name))
    ]


def _length(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Epochs take precedence over steps; without either the GUI uses ``epoch``."""
    given = {}
    for name in ("max_train_epochs", "max_train_steps"):
        if number := _number(fields, name):
            given[name] = int(number)
    if not given and "epoch" in fields:
        given["max_train_epochs"] = int(_number(fields, "epoch"))
    if not _is_blank(fields.get("lr_scheduler_num_cycles")):
        given |= _one_option("lr_scheduler_num_cycles", fields["lr_scheduler_num_cycles"])
    elif str(fields.get("lr_scheduler")) == "cosine_with_restarts" and "epoch" in fields:
        given["lr_scheduler_num_cycles"] = int(_number(fields, "epoch"))
    return given


def _learning_rates(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A rate of 0 beside a positive one switches that part off, as in the GUI."""
    text, unet, both = (
        _number(fields, name) for name in ("text_encoder_lr", "unet_lr", "learning_rate")
    )
    values: dict[str, Any] = {"learning_rate": both} if both else {}
    if unet:
        values["unet_lr"] = unet
    if text:
        values["text_encoder_lr"] = (text,)
    if unet and not text:
        values["network_train_unet_only"] = True
    if text and not unet:
        values["network_train_text_encoder_only"] = True
    return values


def _warmup(fields: Mapping[str, Any], warnings: list[str]) -> dict[str, Any]:
    """``lr_warmup`` is a percentage of the run, ``lr_warmup_steps`` takes precedence."""
    steps, percent = _number(fields, "lr_warmup_steps"), _number(fields, "lr_warmup")
    if not steps and not percent:
        return {}
    if str(fields.get("lr_scheduler", "constant")) == "constant":
        warnings.append("lr_warmup is left out: the constant scheduler has none")
        return {}
    return {"lr_warmup_steps": int(steps) if steps else percent / 100}


def _text_encoder_stop(fields: Mapping[str, Any], warnings: list[str]) -> dict[str, Any]:
    """``stop_text_encoder_training`` is a percentage of the run here; 0 and 100 are its end."""
    percent = _number(fields, "stop_text_encoder_training")
    if percent < 0:
        warnings.append(
            "stop_text_encoder_training = -1 is left out: kohya's LoRA trainer ignores it; "
            "network_train_unet_only trains no text encoder"
        )
    return {"stop_text_encoder_training": percent / 100} if 0 < percent < 100 else {}


def _switches(fields: Mapping[str, Any], warnings: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    attention = fields.get("xformers")
    if attention in (True, "xformers", "sdpa"):
        values["sdpa" if attention == "sdpa" else "xformers"] = True
    if fields.get("sdxl") is True:
        values |= {name: True for field, name in SDXL_SWITCHES.items() if fields.get(field) is True}
    if fields.get("LoRA_type") == "Flux1":
        warnings.append("the preset is for FLUX, which this trainer does not load")
    prompts = str(fields.get("sample_prompts", "")).strip()
    if prompts.endswith((".txt", ".toml", ".json")) and "\n" not in prompts:
        values["sample_prompts"] = prompts
    elif prompts:
        warnings.append(
            "sample_prompts is left out: write the prompts into a .txt and give its name"
        )
    return values


def _keep_chosen_noise(fields: Mapping[str, Any], values: dict[str, Any]) -> None:
    """The GUI passes only the noise of the chosen type."""
    unused = {"Original": _MULTIRES_NOISE, "Multires": _ORIGINAL_NOISE}
    for name in unused.get(str(fields.get("noise_offset_type")), ()):
        values.pop(name, None)


def _additional(text: str, warnings: list[str]) -> dict[str, Any]:
    """Flags from the GUI's free text box; they take precedence over its fields."""
    if not text:
        return {}
    place = f"{_PLACE} additional_parameters"
    known, unknown = parser().parse_known_args(_words(text, place=place))
    values: dict[str, Any] = {}
    for name, raw in without_aliases(vars(known), place=place).items():
        if name in OPTIONS:
            values[name] = coerce(OPTIONS[name], raw, place=place)
        else:
            reason = (REFUSED.get(name) or NO_EFFECT[name]).reason
            warnings.append(f"additional_parameters --{name} is left out: {reason}")
    if unknown:
        warnings.append(f"additional_parameters {' '.join(unknown)!r} is left out: unknown")
    return {name: value for name, value in values.items() if value is not None}


def _words(text: str, *, place: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(
            f"{place}: {text!r} cannot be split into flags ({error}); close every quotation mark, "
            "and put an apostrophe between double ones"
        ) from error
