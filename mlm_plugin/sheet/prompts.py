"""The prompts of a contact sheet: from a file or the command line, with the trigger in place."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mlm_plugin.errors import UserError
from mlm_plugin.files import read_text
from mlm_plugin.sheet.options import SheetOptions

__all__ = ["sheet_prompts"]

SLOT = "{}"
SAMPLE_OPTION = re.compile(r"\s--\w+(\s|$)")  # as in kohya's prompt files


def sheet_prompts(options: SheetOptions, *, trigger: str) -> list[str]:
    """The prompts in their order.

    Args:
        options: name the prompts, and the trigger if the user gives one.
        trigger: what the file's metadata say; may be empty.

    Raises:
        UserError: there are none, one is there twice, or a trigger is missing or unused.
    """
    texts = _from_file(options.prompts) if options.prompts else list(options.prompt)
    texts = [" ".join(text.split()) for text in texts]
    if not all(texts):
        raise UserError("--prompt: one of the texts is empty; leave it out")
    with_slot = [text for text in texts if SLOT in text]
    word = trigger if options.trigger is None else options.trigger
    if options.trigger is not None and not with_slot:
        raise UserError(
            f"--trigger {options.trigger}: no prompt has {SLOT} for it; write {SLOT} or drop it"
        )
    if with_slot and not word:
        raise UserError(f"{with_slot[0]!r} has {SLOT} for the trigger: name it with --trigger")
    filled = [text.replace(SLOT, word) for text in texts]
    if double := _first_double(filled):
        raise UserError(f"the prompt {double!r} is there twice; remove one")
    return filled


def _first_double(texts: Sequence[str]) -> str | None:
    return next((text for number, text in enumerate(texts) if text in texts[:number]), None)


def _from_file(path: str) -> list[str]:
    texts = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        if found := SAMPLE_OPTION.search(line):
            raise UserError(
                f"--prompts {path}, line {number}: {found[0].strip()} would be read as words; the "
                "options of sample prompts are given to the command, for all prompts"
            )
        texts.append(line)
    if not texts:
        raise UserError(f"--prompts {path}: has no prompt; write one per line")
    return texts
