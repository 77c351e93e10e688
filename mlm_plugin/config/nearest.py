"""A hint for misspelt names: the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]

SIMILAR = 0.8
"""Of ``difflib``'s ratio: a slip of the finger, and not another name that looks alike."""


def did_you_mean(name: str, names: Iterable[str], *, prefix: str = "") -> str:
    """``"; did you mean x?"`` with the nearest of the names, or an empty text.

    A name may also be cut off at a word. Case, and dash or underscore, are ignored. It is appended
    to an error message.
    """
    spellings = {_spelling(known): known for known in sorted(names)}
    given = _spelling(name)
    close = difflib.get_close_matches(given, spellings, n=1, cutoff=SIMILAR)
    close = close or [known for known in spellings if known.startswith(f"{given}_")]
    return f"; did you mean {prefix}{spellings[close[0]]}?" if close else ""


def _spelling(name: str) -> str:
    return name.replace("-", "_").lower()
