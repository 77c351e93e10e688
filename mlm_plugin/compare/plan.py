"""What is compared: a TOML with arms, seeds, evaluation steps, prompts and how they are drawn.

Options of the arms are read as those of a training are. Knows no torch, subjects or models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mlm_plugin.config.loading import config_from_values, load_config
from mlm_plugin.config.nearest import did_you_mean
from mlm_plugin.config.toml_files import read_toml
from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.options import MOST_STEPS

__all__ = ["Arm", "Drawing", "Plan", "read_plan"]

BUILT_IN = Path(__file__).with_name("plans")

SET_HERE: Mapping[str, str] = {
    "pretrained_model_name_or_path": "the command line names it",
    **dict.fromkeys(
        ("train_data_dir", "dataset_config", "placeholder_token", "class_token"),
        "the subjects name it",
    ),
    **dict.fromkeys(("reg_data_dir", "generate_class_images"), "it would be that of one subject"),
    **dict.fromkeys(
        ("max_train_steps", "max_train_epochs"), "the last of evaluation_steps sets the length"
    ),
    **dict.fromkeys(("output_dir", "output_name", "resume"), "each trial has its own"),
    "seed": "seeds names it",
    "wandb_api_key": "the report would show it; keep it in the environment (WANDB_API_KEY)",
    "huggingface_token": "the report would show it, and nothing is uploaded",
    "mlm_stop_below": "every trial has to reach its last evaluation",
}
"""Options that an arm cannot have."""


class _Kind(NamedTuple):
    expected: str
    fits: Callable[[Any], bool]


def _is_whole(value: Any, at_least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _are_whole(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(map(_is_whole, values))


_COUNT = _Kind("a whole number, 1 or more", lambda value: _is_whole(value, 1))
_TEXT = _Kind("a text", lambda value: isinstance(value, str))
_KINDS: Mapping[str, _Kind] = {
    "seeds": _Kind(
        "a list of different whole numbers", lambda v: _are_whole(v) and len(set(v)) == len(v)
    ),
    "evaluation_steps": _Kind(
        "a rising list of steps, such as [200, 400]",
        lambda v: _are_whole(v) and sorted(set(v)) == v and v[-1] > 0,
    ),
    "prompts": _TEXT,
    "blind_pairs": _Kind("a whole number", _is_whole),
    "scale": _Kind("a number", lambda v: isinstance(v, float) or _is_whole(v)),
    "steps": _Kind(
        f"a whole number from 1 to {MOST_STEPS}",
        lambda value: _is_whole(value, 1) and value <= MOST_STEPS,
    ),
    "sampler": _TEXT,
    "negative_prompt": _TEXT,
    "resolution": _Kind("a multiple of 8", lambda v: _is_whole(v, 8) and v % 8 == 0),
}
"""Other keys are counts."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: in tables and names of files.
        options: options of the trainer by name, as a TOML holds them.
    """

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; as the options of `mlm-plugin evaluate` of these names."""

    steps: int = 30
    scale: float = 7.5
    sampler: str = "ddim"
    negative_prompt: str = ""
    resolution: int | None = None
    batch_size: int = 4


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        arms: at least two; the others are compared with the first.
        evaluation_steps: when pictures are drawn; 0 is the untrained model, the last step ends the
            training.
        seeds: each arm learns each subject once with each.
        prompts: text file, one per line with ``{}`` for the subject; None = DreamBench's.
        pictures_per_prompt: at each evaluation.
        blind_pairs: pairs of pictures on the sheet for votes.
        drawing: how pictures are drawn.
    """

    arms: tuple[Arm, ...]
    evaluation_steps: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)
    prompts: str | None = None
    pictures_per_prompt: int = 1
    blind_pairs: int = 60
    drawing: Drawing = field(default_factory=Drawing)


def read_plan(name: str) -> Plan:
    """Read a plan of the package or a file, and every option in it.

    Raises:
        UserError: not a plan; an unknown key or option, or a value that is not allowed.
    """
    built_in = BUILT_IN / f"{name}.toml"
    path = built_in if built_in.is_file() and not Path(name).exists() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in BUILT_IN.glob("*.toml")))
        raise UserError(
            f"--plan {name}: there is no such file; give a TOML file, or one of {known}"
        )
    values = read_toml(path)
    common = _table(values.pop("common", {}), place=f"{path} [common]")
    arms = values.pop("arms", None)
    drawing = _table(values.pop("drawing", {}), place=f"{path} [drawing]")
    plan = Plan(
        arms=_arms(arms, common, place=str(path)),
        drawing=Drawing(**_checked(drawing, Drawing, place=f"{path} [drawing]")),
        **_checked(values, Plan, place=str(path)),
    )
    precisions = {str(_precision(arm)) for arm in plan.arms}
    if len(precisions) > 1:
        raise UserError(
            f"{path}: mixed_precision differs between the arms ({', '.join(sorted(precisions))}); "
            "set it once, in [common]"
        )
    return plan


def _table(value: Any, *, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place}: must be a table of key = value")
    return value


def _checked(values: Mapping[str, Any], cls: type, *, place: str) -> dict[str, Any]:
    """Values of the fields of a class; lists become tuples."""
    names = [item.name for item in dataclasses.fields(cls) if item.name not in ("arms", "drawing")]
    for name, value in values.items():
        if name not in names:
            hint = did_you_mean(name, [*names, "arms", "common", "drawing"])
            raise UserError(f"{place}: unknown key {name!r}{hint}")
        kind = _KINDS.get(name, _COUNT)
        if not kind.fits(value):
            raise UserError(
                f"{place}: {name} = {value!r} is not allowed; it must be {kind.expected}"
            )
    if cls is Plan and "evaluation_steps" not in values:
        raise UserError(
            f"{place}: evaluation_steps is missing: the steps to draw at, such as [200, 400]"
        )
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def _arms(tables: Any, common: Mapping[str, Any], *, place: str) -> tuple[Arm, ...]:
    if not isinstance(tables, list) or len(tables) < 2:
        raise UserError(f"{place}: needs at least two [[arms]]")
    arms = []
    for number, table in enumerate(tables, start=1):
        own = dict(_table(table, place=f"{place} arm {number}"))
        name = own.pop("name", None)
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{place} arm {number}: name is missing")
        if name in [arm.name for arm in arms]:
            raise UserError(f"{place}: two arms are named {name!r}")
        arms.append(Arm(name, _options({**common, **own}, place=f"{place} arm {name!r}")))
    return tuple(arms)


def _options(given: Mapping[str, Any], *, place: str) -> dict[str, Any]:
    """Options on top of those of a ``config_file``, each read once to check it."""
    own = dict(given)
    preset: dict[str, Any] = {}
    if config_file := own.pop("config_file", None):
        preset = load_config(["--config_file", str(config_file)]).changed()
        preset = {
            name: value for name, value in preset.items() if name not in (*SET_HERE, "config_file")
        }
    for name in {**config_from_values(own, place=place).changed(), **own}:
        if name in SET_HERE:
            raise UserError(f"{place}: {name} cannot be set: {SET_HERE[name]}; remove it")
    options = {**preset, **own}
    config_from_values(options, place=place)
    return options


def _precision(arm: Arm) -> str:
    return config_from_values(arm.options, place=arm.name).schedule.mixed_precision
