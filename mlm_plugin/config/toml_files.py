"""TOML files written by people: parsed, or refused with one clear line. Knows no keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlm_plugin.errors import UserError
from mlm_plugin.files import read_text

try:
    import tomllib
except ImportError:  # Python 3.10
    try:
        import tomli as tomllib
    except ImportError:  # in the environment of sd-scripts
        import toml as tomllib

__all__ = ["read_toml"]


def read_toml(path: str | Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        UserError: The file is missing, not UTF-8 or not TOML; names the file and the line.
    """
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except ValueError as error:  # the base class of all their errors
        message = f"{path}: is not valid TOML: {error}"
        if "\\" in text:
            message += "; write Windows paths with / or in single quotes"
        raise UserError(message) from error
    except RecursionError as error:
        raise UserError(f"{path}: is nested too deeply to be read") from error
