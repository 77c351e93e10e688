"""The ``mlm`` options on the command line of a script of sd-scripts: adding and reading them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from mlm_plugin.config.checks import mlm_range_errors
from mlm_plugin.config.loading import coerce, describe_option, metavar_of
from mlm_plugin.config.nearest import did_you_mean
from mlm_plugin.config.options import OPTIONS, MLMOptions, Option
from mlm_plugin.errors import UserError

__all__ = [
    "PLACE",
    "WatchOptions",
    "add_mlm_arguments",
    "answer_in_one_line",
    "read_at",
    "read_mlm_options",
    "read_watch_options",
    "text_encoder_rates",
    "why_network_has_no_gradient",
    "why_script_has_no_gradient",
    "why_script_trains_no_text",
    "why_unet_untrained",
]

LAUNCH = ("host", "sd_scripts_dir", "method", "mlm_arch", "mlm_script")
WATCHING = ("mlm_page", "mlm_keep_best", "mlm_stop_below")
"""Options of the standalone trainer's output that network trainers have here too."""
PAGE_HELP = (
    "Write a page of the run with every saved file: curves, samples, the words that are still "
    "read, files, settings, warnings. Without a value it is NAME.html beside the file; the value "
    "may be its path."
)
PLACE = "command line or config_file"
WITH_CROSS_ATTENTION = ("sd", "sdxl", "anima")
"""Architectures whose image model reads the prompt in all of its layers."""
TEXT_OPTIONS = {
    "train_db.py": ("stop_text_encoder_training", "learning_rate_te"),
    "fine_tune.py": ("train_text_encoder", "learning_rate_te"),
    "sdxl_train.py": (
        "train_text_encoder", "cache_text_encoder_outputs", "learning_rate_te1",
        "learning_rate_te2",
    ),
    "sd3_train.py": (
        "train_text_encoder", "cache_text_encoder_outputs", "use_t5xxl_cache_only",
        "learning_rate_te1", "learning_rate_te2",
    ),
}  # fmt: skip
"""What decides in scripts that train whole models whether they train a CLIP text encoder. A TOML
may hold other options, which such a script does not read."""
TRAINED_WHILE_CACHED = ("sd3", "flux", "lumina")
"""Architectures whose trainers run a trained text encoder although outputs are cached.

Source: sd-scripts ``train_network.py`` (``or train_text_encoder``); others refuse the two together.
"""


class WatchOptions(NamedTuple):
    """What is watched of a run.

    Attributes:
        page: path of its page; ``None`` without one.
        keep_best: whether a copy of the best file is kept.
        stop_below: the run ends where a file keeps less of its context; ``None`` = never.
    """

    page: Path | None = None
    keep_best: bool = False
    stop_below: float | None = None

    @property
    def needing_score(self) -> list[str]:
        """Names of the options that are nothing without the score."""
        keep_best = ["mlm_keep_best"] if self.keep_best else []
        return [*keep_best, "mlm_stop_below"] if self.stop_below is not None else keep_best

    @property
    def given(self) -> list[str]:
        """Names of the options that ask for something."""
        return ["mlm_page", *self.needing_score] if self.page else self.needing_score


def add_mlm_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what sd-scripts does not know; its own options are unchanged."""
    section = parser.add_argument_group("mlm", MLMOptions.__doc__)
    switch = {"nargs": "?", "const": True}
    section.add_argument("--mlm_page", **switch, metavar="PATH.html", help=PAGE_HELP)
    for name, form in (("mlm_keep_best", {**switch, "metavar": "true"}), ("mlm_stop_below", {})):
        section.add_argument(f"--{name}", **form, help=describe_option(OPTIONS[name]))
    for entry in _entries():
        section.add_argument(
            f"--{entry.name}",
            nargs="*" if entry.many else None,
            default=entry.default,
            metavar=metavar_of(entry),
            help=describe_option(entry),
        )


def answer_in_one_line(parser: argparse.ArgumentParser) -> None:
    """Make every mistake on the command line a ``UserError``, in place of the whole usage."""

    def error(message: str) -> NoReturn:
        kind, _, rest = message.partition(": ")
        if kind == "unrecognized arguments":
            names = vars(parser.parse_known_args([])[0])
            raise UserError(f"command line: {_unknown(rest.split(), names)}")
        raise UserError(f"command line: {message.replace('argument --', '--')}")

    parser.error = error


def _unknown(words: Sequence[str], names: Iterable[str]) -> str:
    flag = next((word for word in words if word.startswith("--")), None)
    if flag is None:
        return f"cannot place {words[0]!r}; flags are written --name value"
    flag = flag.split("=")[0]
    return f"unknown flag {flag}{did_you_mean(flag[2:], names, prefix='--')}"


def read_mlm_options(
    args: argparse.Namespace, given: Mapping[str, Any] = MappingProxyType({}), *, place: str = PLACE
) -> MLMOptions:
    """The checked options of a run; textual inversion's ``token_string`` names the placeholder.

    Args:
        args: options of the host; may hold ours, as keys of its TOML.
        given: options that take precedence over them.
        place: where they were given, for errors.

    Raises:
        UserError: a wrong type, choice or range, or an unknown ``mlm_`` key.
    """
    known = {*WATCHING, *(entry.name for entry in _entries())}
    raw = {**vars(args), **given}
    for name in raw:
        if name.startswith("mlm_") and name not in known:
            raise UserError(f"{place}: unknown key {name!r}{did_you_mean(name, known)}")
    values = {
        name: coerce(entry, raw[name], place=place)
        for name, entry in OPTIONS.items()
        if entry.group == "mlm" and raw.get(name) is not None
    }
    if not values.get("placeholder_token") and getattr(args, "token_string", None):
        values["placeholder_token"] = (args.token_string,)
    options = MLMOptions(**values)
    by_epochs = getattr(args, "max_train_epochs", None) is not None
    continues = getattr(args, "resume", None)  # the term's steps count on, the trainer's may not
    num_steps = None if by_epochs or continues else int(args.max_train_steps)
    if message := next(mlm_range_errors(options, num_steps=num_steps), None):
        raise UserError(message)
    return options


def read_watch_options(
    args: argparse.Namespace, given: Mapping[str, Any] = MappingProxyType({}), *, place: str = PLACE
) -> WatchOptions:
    """What is watched of a run; all of it is off unless it is asked for.

    Args: as in :func:`read_mlm_options`.

    Raises:
        UserError: a wrong type or range.
    """
    raw = {name: value for name, value in {**vars(args), **given}.items() if name in WATCHING}
    raw = {name: value for name, value in raw.items() if value not in (None, "")}
    page = raw.pop("mlm_page", False)
    values = {name: coerce(OPTIONS[name], value, place=place) for name, value in raw.items()}
    return WatchOptions(
        _page_path(page, args, place=place),
        values.get("mlm_keep_best", False),
        values.get("mlm_stop_below"),
    )


def _page_path(given: Any, args: argparse.Namespace, *, place: str) -> Path | None:
    if isinstance(given, str) and given.lower().endswith(".html"):
        return Path(given)
    try:
        is_on = coerce(OPTIONS["mlm_page"], given, place=place)
    except UserError as error:
        raise UserError(
            f"{place}: mlm_page = {given!r} is not allowed; it must be true, or the path of the "
            "page, which ends in .html"
        ) from error
    name = getattr(args, "output_name", None) or "last"
    return Path(getattr(args, "output_dir", None) or ".") / f"{name}.html" if is_on else None


def _entries() -> Iterator[Option]:
    for name, entry in OPTIONS.items():
        if entry.group == "mlm" or name in LAUNCH:
            yield entry


def read_at(options: MLMOptions, *, arch: str, trains_text: bool, trains_unet: bool) -> str:
    """``mlm_read_at`` with ``auto`` decided, as in the standalone trainer.

    Args:
        options: of the run.
        arch: architecture of the model.
        trains_text: whether a text encoder is trained.
        trains_unet: whether a network is trained on the U-Net.
    """
    if options.mlm_read_at != "auto":
        return options.mlm_read_at
    if not trains_text:
        return "cross_attention"
    reads_both = options.mlm_target == "states" and trains_unet and arch in WITH_CROSS_ATTENTION
    return "both" if reads_both else "encoder"


def why_network_has_no_gradient(
    args: argparse.Namespace, options: MLMOptions, *, arch: str
) -> str | None:
    """Why the term has no gradient in a network trainer, naming its options; None if it has."""
    of_text = _why_text_untrained(args, arch=arch)
    of_unet = why_unet_untrained(args)
    place = read_at(options, arch=arch, trains_text=of_text is None, trains_unet=of_unet is None)
    return of_text if of_text is None or place != "cross_attention" else of_unet


def _why_text_untrained(args: argparse.Namespace, *, arch: str) -> str | None:
    """Every option that has to be changed, so that nobody meets them one after the other."""
    lines = []
    if getattr(args, "network_train_unet_only", False):
        lines.append("network_train_unet_only")
    if getattr(args, "cache_text_encoder_outputs", False) and arch not in TRAINED_WHILE_CACHED:
        lines.append("cache_text_encoder_outputs")
    if not any(_given_rates(args)):
        given = getattr(args, "text_encoder_lr", None)
        name = "learning_rate" if given in (None, []) else "text_encoder_lr"
        lines.append(f"{name} = 0")
    if not lines:
        return None
    *others, last = lines
    named = f"{', '.join(others)} and {last} leave" if others else f"{last} leaves"
    return f"{named} the text encoder untrained"


def why_unet_untrained(args: argparse.Namespace) -> str | None:
    """Why a network trainer trains nothing on the U-Net, naming its options; None if it does."""
    if getattr(args, "network_train_text_encoder_only", False):
        return "network_train_text_encoder_only trains no U-Net, and nothing trains a text encoder"
    given = getattr(args, "unet_lr", None)
    if not float((args.learning_rate if given is None else given) or 0):
        name = "learning_rate" if given is None else "unet_lr"
        return f"{name} = 0 leaves the U-Net untrained, and nothing trains a text encoder"
    return None


def text_encoder_rates(args: argparse.Namespace, network: Any, *, count: int) -> list[float]:
    """The learning rate of each of ``count`` text encoders.

    Most networks train all of them at the first rate. Those that take one rate each repeat the
    last one if there are too few.

    Source: sd-scripts ``train_network.py``, ``networks/lora_sd3.py``, ``networks/lora_flux.py``.
    """
    rates = _given_rates(args)
    if not hasattr(network, "prepare_optimizer_params_with_multiple_te_lrs"):
        rates = rates[:1]
    return [rates[min(i, len(rates) - 1)] for i in range(count)]


def _given_rates(args: argparse.Namespace) -> list[float]:
    """One rate, or one for each text encoder. Source: train_network.py, ``text_encoder_lr``."""
    given = getattr(args, "text_encoder_lr", None)
    if given in (None, []):
        given = args.learning_rate
    rates = given if isinstance(given, (list, tuple)) else [given]
    return [float(rate or 0) for rate in rates]


def why_script_has_no_gradient(
    args: argparse.Namespace, options: MLMOptions, *, file: str, arch: str
) -> str | None:
    """The same for scripts that train whole models.

    Args:
        args: options of the script, and whatever else a TOML holds.
        options: of the term.
        file: of the script.
        arch: of its model.
    """
    of_text = why_script_trains_no_text(args, file=file)
    place = read_at(options, arch=arch, trains_text=of_text is None, trains_unet=False)
    if of_text is None or place != "cross_attention" or arch not in WITH_CROSS_ATTENTION:
        return of_text
    if not float(args.learning_rate or 0):
        return f"{of_text}, and learning_rate = 0 leaves the U-Net untrained"
    return None


def why_script_trains_no_text(args: argparse.Namespace, *, file: str) -> str | None:
    """Why such a script trains no text encoder; None if it does. Arguments as above."""
    given = {name: getattr(args, name) for name in TEXT_OPTIONS[file] if hasattr(args, name)}
    if not given.get("train_text_encoder", True):
        return "without train_text_encoder the text encoder is not trained"
    if given.get("cache_text_encoder_outputs") and not given.get("use_t5xxl_cache_only"):
        return "cache_text_encoder_outputs leaves the text encoder untrained"
    stop = given.get("stop_text_encoder_training")
    if stop is not None and int(stop) <= 0:
        return f"stop_text_encoder_training = {stop} leaves the text encoder untrained"
    names = [name for name in TEXT_OPTIONS[file] if name.startswith("learning_rate_te")]
    rates = [args.learning_rate if given.get(name) is None else given[name] for name in names]
    if not any(float(rate or 0) for rate in rates):
        return f"{' and '.join(names)} = 0 leaves the text encoder untrained"
    return None
