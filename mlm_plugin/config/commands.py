"""The argument parser of `mlm-plugin`'s commands."""

from __future__ import annotations

import argparse
from typing import NoReturn

from mlm_plugin.errors import UserError

__all__ = ["LARGEST_SEED", "CommandParser"]

LARGEST_SEED = 2**63 - 1  # of torch


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all user errors.

    Raises:
        UserError: instead of argparse's exit.
    """

    def error(self, message: str) -> NoReturn:
        """Raise an error that points to the help."""
        raise UserError(f"{message}; see `{self.prog} --help`")
