"""Which trainer runs, and where the sd-scripts checkout is. Imports neither it nor torch."""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlm_plugin.config.loading import coerce
from mlm_plugin.config.options import OPTIONS
from mlm_plugin.config.toml_files import read_toml
from mlm_plugin.errors import UserError

__all__ = [
    "LaunchOptions",
    "check_checkout",
    "check_libraries",
    "config_file_values",
    "find_checkout",
    "launch_options",
]

logger = logging.getLogger(__name__)

TRAINER = "train_network.py"
OLDEST = "v0.10.0"
SIGNS_OF_AGE = {"is_train", "text_encoding_strategy", "tokenize_strategy"}
"""Parameters that ``NetworkTrainer.process_batch`` has since v0.10.0; forks have it with others."""
NAME_IN_5 = "CLIPImageProcessor"
LIBRARIES = ("transformers", "diffusers", "accelerate")
PIN = re.compile(r"^\s*([A-Za-z0-9_.-]+?)(?:\[[^\]]*\])?\s*==\s*([0-9][^\s;#]*)", re.MULTILINE)


class LaunchOptions(NamedTuple):
    """Options needed before a script of sd-scripts can read its own command line."""

    host: str
    sd_scripts_dir: str | None
    method: str
    mlm_arch: str
    mlm_script: str | None
    pretrained_model_name_or_path: str | None


def launch_options(argv: Sequence[str]) -> LaunchOptions:
    """Read them from the flags and the TOML of ``--config_file``; flags take precedence.

    Raises:
        UserError: a value that is not allowed.
    """
    peek = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for name in (*LaunchOptions._fields, "config_file"):
        peek.add_argument(f"--{name}", nargs="?")  # the run's own parser reports missing values
    parsed, _ = peek.parse_known_args(list(argv))
    flags = {name: value for name, value in vars(parsed).items() if value is not None}
    in_file = config_file_values(flags.pop("config_file", None))
    given = {name: value for name, value in in_file.items() if name in LaunchOptions._fields}
    given |= flags
    return LaunchOptions(
        **{
            name: coerce(OPTIONS[name], given[name], place="command line")
            if name in given
            else OPTIONS[name].default
            for name in LaunchOptions._fields
        }
    )


def config_file_values(config_file: str | None) -> dict[str, Any]:
    """Keys and values of a ``--config_file``; none if it does not exist, which the trainer reports.

    Raises:
        UserError: it is not TOML.
    """
    if config_file is None:
        return {}
    path = Path(config_file if config_file.endswith(".toml") else f"{config_file}.toml")
    if not path.is_file():
        return {}
    flat: dict[str, Any] = {}
    for name, value in read_toml(path).items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def find_checkout(
    options: LaunchOptions, *, script: str | Path, environment: Mapping[str, str] = os.environ
) -> Path | None:
    """The checkout whose trainer runs; ``None`` for the standalone trainer.

    Args:
        options: ``host`` and ``sd_scripts_dir``.
        script: the script that was started; it may be in a checkout.
        environment: may contain ``SD_SCRIPTS_DIR``.

    Raises:
        UserError: a folder that is not a usable checkout, or none where one is needed.
    """
    if options.host == "standalone":
        return None
    beside = Path(script).resolve().parent
    for name, folder in (
        ("--sd_scripts_dir", options.sd_scripts_dir),
        ("SD_SCRIPTS_DIR", environment.get("SD_SCRIPTS_DIR")),
        ("the folder of this script", beside if (beside / TRAINER).is_file() else None),
    ):
        if folder:
            root = Path(folder).expanduser().resolve()
            check_checkout(root, named=f"{name} {folder}")
            return root
    if options.host == "sd-scripts":
        raise UserError(
            "--host sd-scripts: where is it? Give --sd_scripts_dir or SD_SCRIPTS_DIR, or put this "
            f"script beside {TRAINER}"
        )
    return None


def check_checkout(root: Path, *, named: str) -> None:
    """Refuse a folder that is not a checkout, one that is too old, or a fork of one.

    Raises:
        UserError: what is missing.
    """
    trainer = root / TRAINER
    if not trainer.is_file() or not (root / "library").is_dir():
        raise UserError(
            f"{named}: no checkout of sd-scripts ({TRAINER} and the folder library are not both "
            "there); give the folder that holds them"
        )
    missing = SIGNS_OF_AGE - _parameters_of_process_batch(trainer)
    if missing:
        raise UserError(
            f"{named}: this sd-scripts is older than {OLDEST}, or a fork of an older one (its "
            f"NetworkTrainer.process_batch lacks {', '.join(sorted(missing))}); update it to "
            f"{OLDEST} or later, or use --host standalone"
        )


def _parameters_of_process_batch(trainer: Path) -> set[str]:
    """Read without importing; empty where the file has no such method.

    Raises:
        UserError: the file is not Python.
    """
    try:
        tree = ast.parse(trainer.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{trainer}: is not Python ({error}); get sd-scripts again") from error
    for found in ast.walk(tree):
        if isinstance(found, ast.ClassDef) and found.name == "NetworkTrainer":
            for method in found.body:
                if isinstance(method, ast.FunctionDef) and method.name == "process_batch":
                    return {one.arg for one in (*method.args.args, *method.args.kwonlyargs)}
    return set()


def check_libraries(root: Path) -> None:
    """Compare the installed libraries with those that the checkout pins.

    A difference causes a warning. Another major version is refused, unless the checkout was made to
    run with it too.

    Raises:
        UserError: a library is missing, or of a major version that cannot work.
    """
    differences = []
    any_major = _supports_transformers_5(root)
    for name, wanted in _pins(root).items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"{name} is not installed, {root.name} wants {name}=={wanted}; run this in the "
                "environment of sd-scripts (pip install -r requirements.txt there)"
            ) from None
        if not any_major and installed.split(".")[0] != wanted.split(".")[0]:
            raise UserError(
                f"{name} {installed} is installed, {root.name} wants {name}=={wanted}; run this "
                "in the environment of sd-scripts, or use --host standalone"
            )
        if installed.split("+")[0] != wanted:
            differences.append(f"{name} {installed} (wanted {wanted})")
    if differences:
        logger.warning("not the versions that sd-scripts pins: %s", ", ".join(differences))


def _supports_transformers_5(root: Path) -> bool:
    """Whether the checkout is v0.10.5 or later, which runs with transformers 4 and 5.

    Source: sd-scripts pull request 2315; the class was renamed in transformers 5.
    """
    pipeline = root / "library" / "lpw_stable_diffusion.py"
    if not pipeline.is_file():
        return False
    return NAME_IN_5 in pipeline.read_text(encoding="utf-8", errors="replace")


def _pins(root: Path) -> dict[str, str]:
    """Exact versions in ``requirements.txt`` of the libraries that matter here."""
    requirements = root / "requirements.txt"
    if not requirements.is_file():
        return {}
    pins = dict(PIN.findall(requirements.read_text(encoding="utf-8", errors="replace")))
    return {name: pins[name] for name in LIBRARIES if name in pins}
