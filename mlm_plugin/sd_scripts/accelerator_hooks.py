"""The MLM term, and what watches a run, in the accelerator of a trainer whose loop is not ours.

``Accelerator.backward`` is where accumulation, loss scaling, DDP and DeepSpeed begin: a term that
is added to its argument is treated as the rest of the loss.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from mlm_plugin.errors import UserError
from mlm_plugin.sd_scripts.run_watch import RunWatch
from mlm_plugin.sd_scripts.term import LossParts, MLMTerm

__all__ = [
    "exits_on_user_error",
    "join_accelerator",
    "join_next_accelerator",
    "shown_in_progress_bar",
    "wrapped",
]

LOSSES_SHOWN = {"avr_loss", "loss"}
"""Names in the progress bars of training: of most scripts, of textual inversion."""

_waiting = ExitStack()


def join_next_accelerator(term: MLMTerm | None, watch: RunWatch | None) -> None:
    """Add a term to the losses of the accelerator that prepares models next.

    Args:
        term: ``None``: nothing is added. A term that still waits for its accelerator is dropped.
        watch: follows the run; ``None``: nothing does.
    """
    _waiting.close()
    if term is None and watch is None:
        return

    def prepare(original: Callable) -> Callable:
        def prepare(self, *args, **kwargs):
            _waiting.close()
            join_accelerator(self, term, watch)
            return original(self, *args, **kwargs)

        return prepare

    _waiting.enter_context(wrapped(Accelerator, "prepare", prepare))


def join_accelerator(
    accelerator: Accelerator, term: MLMTerm | None, watch: RunWatch | None
) -> None:
    """Add the term, and let the run be watched, until the training of this accelerator ends.

    The loss that the trainer records stays that of the diffusion, as in validation: the difference
    of the two, its ``divergence``, compares like with like.
    """
    joined = ExitStack()
    if term:
        term.attach(accelerator)
        joined.enter_context(shown_in_progress_bar(term))
    if watch:
        watch.attach(accelerator)
    logging_trackers: list[Any] = []

    def backward(original: Callable) -> Callable:
        def backward(loss, *args, **kwargs):
            if not logging_trackers:  # the trainer creates them just before its first step
                logging_trackers.extend(accelerator.trackers)
                for tracker in logging_trackers:
                    joined.enter_context(wrapped(tracker, "log", log))
            if watch:
                watch.end_if_lost()
            parts = LossParts(loss.detach())
            if term:
                with exits_on_user_error():
                    loss = term.add_to(loss, accelerator)
                parts = term.parts
            if watch:
                watch.note(parts)
            return original(loss, *args, **kwargs)

        return backward

    def log(original: Callable) -> Callable:
        def log(values, *args, **kwargs):
            if "loss/current" in values:  # not of validation
                ours = term.parts.logs() if term and term.parts else {}
                values = {**values, **ours, **(watch.new_curves(original) if watch else {})}
            return original(values, *args, **kwargs)

        return log

    def end_training(original: Callable) -> Callable:
        def end_training(*args, **kwargs):
            joined.close()
            if watch:
                watch.has_ended = True
            return original(*args, **kwargs)

        return end_training

    joined.enter_context(wrapped(accelerator, "backward", backward))
    joined.enter_context(wrapped(accelerator, "end_training", end_training))


@contextmanager
def shown_in_progress_bar(term: MLMTerm) -> Iterator[None]:
    """Put ``mlm``, the term's loss, into the trainer's progress bar, for runs without a logger.

    In steps without the term it stays that of the last step with it.
    """
    shown: dict[str, float] = {}

    def set_postfix(original: Callable) -> Callable:
        def set_postfix(self, *args, **values):
            if LOSSES_SHOWN & values.keys():
                if term.parts and term.parts.term:
                    shown["mlm"] = term.parts.term.loss.item()
                values |= shown
            return original(self, *args, **values)

        return set_postfix

    with wrapped(tqdm, "set_postfix", set_postfix):
        yield


@contextmanager
def exits_on_user_error() -> Iterator[None]:
    """One line and exit code 2, as on our own command line; the host would print a traceback.

    Options are named as network arguments are written, without dashes.
    """
    try:
        yield
    except UserError as error:
        message = re.sub(r"--(?=[a-z])", "", str(error))
        print(f"error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error


@contextmanager
def wrapped(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """A method of a class or an object, replaced inside the block."""
    is_own = name in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
