"""The parser of `mlm-plugin`'s commands. Knows no command."""

from __future__ import annotations

import argparse
from typing import NoReturn

from mlm_plugin.errors import UserError

__all__ = ["CommandParser"]


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as all errors of users are.

    Raises:
        UserError: in place of argparse's own exit.
    """

    def error(self, message: str) -> NoReturn:
        """Refuse what was given and name the help that says what is allowed."""
        raise UserError(f"{message}; see `{self.prog} --help`")
