"""A hint for misspelt names: the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]


def did_you_mean(name: str, names: Iterable[str], *, prefix: str = "") -> str:
    """``"; did you mean x?"`` with the nearest of the names, or an empty text.

    Case, and dash or underscore, are ignored. It is appended to an error message.
    """
    spellings = {_spelling(known): known for known in sorted(names)}
    close = difflib.get_close_matches(_spelling(name), spellings, n=1)
    return f"; did you mean {prefix}{spellings[close[0]]}?" if close else ""


def _spelling(name: str) -> str:
    return name.replace("-", "_").lower()
