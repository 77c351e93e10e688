"""Optimizers by the names kohya users write, or any class by its path.

Knows names, packages and the peculiarities of a few families, but no models or schedules. Packages
other than torch are imported only when their optimizer is used. Names and rules are those of
sd-scripts ``library/train_util.py`` ``get_optimizer`` (commit 48d368fa).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import optim

from mlm_plugin.errors import UserError

__all__ = [
    "OPTIMIZERS",
    "create_optimizer",
    "find_optimizer_class",
    "import_class",
    "is_schedule_free",
    "optimizer_description",
    "parse_arguments",
    "set_optimizer_mode",
    "steps_one_by_one",
    "uses_relative_step",
]

logger = logging.getLogger(__name__)

BITSANDBYTES_WITH_CPU = (0, 50)  # earlier versions create an optimizer and fail at its first step
ONE_RATE_FAMILIES = ("dadaptation", "prodigyopt")  # they estimate the rate themselves
ONE_BY_ONE_FAMILIES = ("torch", "transformers", "bitsandbytes", "lion_pytorch")
"""Packages whose optimizers share no state between tensors or in their groups."""


class Named(NamedTuple):
    """Where an optimizer with a known name is defined."""

    path: str  # "package.module.Class"
    package: str | None = None  # what pip calls it; None = always there
    defaults: Mapping[str, Any] = {}  # settings kohya gives it and writes to the metadata
    fixed: Mapping[str, Any] = {}  # settings implied by the name, not written


def create_optimizer(
    name: str,
    parameter_groups: Sequence[Mapping[str, Any]],
    *,
    learning_rate: float,
    optimizer_args: Sequence[str] = (),
) -> optim.Optimizer:
    """Build an optimizer in training mode.

    Args:
        name: kohya's name in any case, a class of ``torch.optim``, or ``package.module.Class``;
            empty = AdamW.
        parameter_groups: Groups with ``params`` and, if they differ, ``lr``; not changed.
        learning_rate: For groups without their own. Relative-step Adafactor takes no rates at all;
            there it is the first rate of its schedule (see ``schedulers``).
        optimizer_args: ``key=value`` settings, values as Python literals.

    Raises:
        UserError: An unknown name, a missing package, or settings that the class refuses.
    """
    optimizer_class = find_optimizer_class(name)
    _check_device(name, optimizer_class)
    settings = _settings(name, optimizer_args)
    _check_settings(name, optimizer_class, settings)
    groups = [dict(group) for group in parameter_groups]
    if optimizer_class.__module__.split(".")[0] in ONE_RATE_FAMILIES:
        groups = _with_one_rate(name, groups, learning_rate)
    if settings.get("relative_step"):
        for group in groups:
            group.pop("lr", None)
        learning_rate = None
        logger.warning(
            "Adafactor with relative_step finds its own rates: unet_lr and text_encoder_lr have "
            "no effect, learning_rate is where its schedule starts"
        )
    try:
        optimizer = optimizer_class(groups, lr=learning_rate, **_named(name).fixed, **settings)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"optimizer_args={' '.join(optimizer_args)}: {optimizer_class.__name__} says: {error}"
        ) from error
    set_optimizer_mode(optimizer, training=True)
    return optimizer


def optimizer_description(name: str, optimizer_args: Sequence[str] = ()) -> str:
    """``module.Class(key=value,...)`` as in the metadata ``ss_optimizer`` of kohya's files."""
    optimizer_class = find_optimizer_class(name)
    settings = ",".join(f"{k}={v}" for k, v in _settings(name, optimizer_args).items())
    path = f"{optimizer_class.__module__}.{optimizer_class.__name__}"
    return f"{path}({settings})" if settings else path


def set_optimizer_mode(optimizer: optim.Optimizer, *, training: bool) -> None:
    """Switch a schedule-free optimizer between training and evaluation; others have no modes.

    Schedule-free optimizers train one set of weights and evaluate another (an average), so they are
    set to ``training=False`` around saving and sampling.
    """
    optimizer = _unwrapped(optimizer)
    switch = getattr(optimizer, "train" if training else "eval", None)
    if callable(switch):
        switch()


def is_schedule_free(optimizer: optim.Optimizer) -> bool:
    """Whether the optimizer works without a learning-rate schedule."""
    return "schedulefree" in type(_unwrapped(optimizer)).__name__.lower()


def steps_one_by_one(optimizer: optim.Optimizer) -> bool:
    """Whether stepping tensors one by one is known to equal the whole step."""
    family = type(_unwrapped(optimizer)).__module__.split(".")[0]
    return family in ONE_BY_ONE_FAMILIES and not isinstance(_unwrapped(optimizer), optim.LBFGS)


def uses_relative_step(optimizer: optim.Optimizer) -> bool:
    """Whether the optimizer is an Adafactor that finds its own rates."""
    return bool(_unwrapped(optimizer).defaults.get("relative_step"))


def parse_arguments(option_name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """``["k=1", "betas=0.9,0.99"]`` to a dict, values read as Python literals.

    Raises:
        UserError: An argument that is not ``key=literal``; names the option and the argument.
    """
    settings = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        try:
            if not equals or not key.strip().isidentifier():
                raise ValueError
            settings[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError) as error:
            raise UserError(
                f"{option_name}: cannot read {argument!r}; expected key=value with a number, True, "
                "False, None, a quoted text or numbers with commas, e.g. weight_decay=0.01"
            ) from error
    return settings


def import_class(path: str, *, option_name: str, default_module: str) -> type:
    """Class by ``package.module.Class``, or by its bare name in ``default_module``.

    Raises:
        UserError: Nothing of that name; names the option.
    """
    module_name, _, class_name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name or default_module), class_name)
    except ImportError as error:
        raise UserError(
            f"{option_name}={path}: cannot import {module_name} ({error}); install the package"
        ) from error
    except AttributeError:
        found = None
    if not inspect.isclass(found):
        raise UserError(
            f"{option_name}={path}: no class {class_name} in {module_name or default_module}"
        )
    return found


def find_optimizer_class(name: str) -> type[optim.Optimizer]:
    """The class by kohya's name or its path; imports its package.

    Raises:
        UserError: not known, or its package is missing or too old.
    """
    named = _named(name)
    if named.path == name:  # not one of OPTIMIZERS
        if "." not in name and not hasattr(optim, name):
            raise UserError(
                f"optimizer_type={name}: not known; expected package.module.Class, a class of "
                f"torch.optim, or one of {', '.join(OPTIMIZERS)}"
            )
        return import_class(name, option_name="optimizer_type", default_module="torch.optim")
    module_name, _, class_name = named.path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        instead = ", or use optimizer_type=AdamW" if named.package == "bitsandbytes" else ""
        raise UserError(
            f"optimizer_type={name} needs the package {named.package} ({error}): "
            f"pip install {named.package}{instead}"
        ) from error
    except AttributeError as error:
        raise UserError(
            f"optimizer_type={name}: the installed {named.package} has no {class_name}: "
            f"pip install -U {named.package}"
        ) from error


def _named(name: str) -> Named:
    """The entry of a known name; any other name is a path."""
    return _BY_LOWER_NAME.get((name or "AdamW").lower(), Named(name))


def _settings(name: str, optimizer_args: Sequence[str]) -> dict[str, Any]:
    """The user's settings and those kohya adds, in kohya's order: the user's come first."""
    settings = parse_arguments("optimizer_args", optimizer_args)
    for key, value in _named(name).defaults.items():
        settings.setdefault(key, value)
    if settings.get("warmup_init") and settings.get("relative_step") is False:
        logger.warning("Adafactor: warmup_init turns relative_step on")
        settings["relative_step"] = True
    return settings


def _check_device(name: str, optimizer_class: type) -> None:
    if optimizer_class.__module__.split(".")[0] != "bitsandbytes" or torch.cuda.is_available():
        return
    installed = version("bitsandbytes")
    if tuple(int(part) for part in installed.split(".")[:2]) < BITSANDBYTES_WITH_CPU:
        raise UserError(
            f"optimizer_type={name}: bitsandbytes {installed} needs a GPU: pip install -U "
            "'bitsandbytes>=0.50', or use optimizer_type=AdamW"
        )


def _check_settings(name: str, optimizer_class: type, settings: Mapping[str, Any]) -> None:
    parameters = inspect.signature(optimizer_class).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    decided = ("params", "lr", "kwargs", *_named(name).fixed)
    allowed = [key for key in parameters if key not in decided]
    for key in settings:
        if key == "lr":
            raise UserError("optimizer_args: lr belongs to learning_rate, unet_lr, text_encoder_lr")
        if key not in allowed and not open_ended:
            raise UserError(
                f"optimizer_args: {optimizer_class.__name__} has no {key}; it has "
                f"{', '.join(allowed)}"
            )


def _with_one_rate(name: str, groups: list[dict], learning_rate: float) -> list[dict]:
    """Give all groups the first one's rate; these optimizers refuse to work with several."""
    rates = [group.get("lr", learning_rate) for group in groups]
    if rates[0] <= 0.1:
        logger.warning(
            "%s finds the rate itself and expects a factor around 1.0; the learning rate is %g",
            name,
            rates[0],
        )
    if len(set(rates)) > 1:
        logger.warning(
            "%s has one learning rate for all parts: %g is used, %s without effect",
            name,
            rates[0],
            ", ".join(f"{rate:g}" for rate in dict.fromkeys(rates[1:]) if rate != rates[0]),
        )
    return [{**group, "lr": rates[0]} for group in groups]


def _unwrapped(optimizer: optim.Optimizer) -> optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


OPTIMIZERS: dict[str, Named] = {
    "AdamW": Named("torch.optim.AdamW"),
    "AdamW8bit": Named("bitsandbytes.optim.AdamW8bit", "bitsandbytes"),
    "PagedAdamW": Named("bitsandbytes.optim.PagedAdamW", "bitsandbytes"),
    "PagedAdamW8bit": Named("bitsandbytes.optim.PagedAdamW8bit", "bitsandbytes"),
    "PagedAdamW32bit": Named("bitsandbytes.optim.PagedAdamW32bit", "bitsandbytes"),
    "AdEMAMix8bit": Named("bitsandbytes.optim.AdEMAMix8bit", "bitsandbytes"),
    "PagedAdEMAMix8bit": Named("bitsandbytes.optim.PagedAdEMAMix8bit", "bitsandbytes"),
    "Lion": Named("lion_pytorch.Lion", "lion-pytorch"),
    "Lion8bit": Named("bitsandbytes.optim.Lion8bit", "bitsandbytes"),
    "PagedLion8bit": Named("bitsandbytes.optim.PagedLion8bit", "bitsandbytes"),
    "SGDNesterov": Named("torch.optim.SGD", None, {"momentum": 0.9}, {"nesterov": True}),
    "SGDNesterov8bit": Named(
        "bitsandbytes.optim.SGD8bit", "bitsandbytes", {"momentum": 0.9}, {"nesterov": True}
    ),
    "Adafactor": Named("transformers.optimization.Adafactor", None, {"relative_step": True}),
    "Prodigy": Named("prodigyopt.Prodigy", "prodigyopt"),
    "DAdaptation": Named("dadaptation.experimental.DAdaptAdamPreprint", "dadaptation"),
    "DAdaptAdamPreprint": Named("dadaptation.experimental.DAdaptAdamPreprint", "dadaptation"),
    "DAdaptAdaGrad": Named("dadaptation.DAdaptAdaGrad", "dadaptation"),
    "DAdaptAdam": Named("dadaptation.DAdaptAdam", "dadaptation"),
    "DAdaptAdan": Named("dadaptation.DAdaptAdan", "dadaptation"),
    "DAdaptAdanIP": Named("dadaptation.experimental.DAdaptAdanIP", "dadaptation"),
    "DAdaptLion": Named("dadaptation.DAdaptLion", "dadaptation"),
    "DAdaptSGD": Named("dadaptation.DAdaptSGD", "dadaptation"),
    "AdamWScheduleFree": Named("schedulefree.AdamWScheduleFree", "schedulefree"),
    "RAdamScheduleFree": Named("schedulefree.RAdamScheduleFree", "schedulefree"),
    "SGDScheduleFree": Named("schedulefree.SGDScheduleFree", "schedulefree"),
}
_BY_LOWER_NAME = {name.lower(): named for name, named in OPTIMIZERS.items()}
