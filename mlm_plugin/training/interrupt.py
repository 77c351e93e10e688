"""Ctrl-C and SIGTERM end a loop after the current step, so that nothing is lost."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

__all__ = ["StopRequest", "Stopped"]

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """A run ended at a step boundary, mostly by a signal."""

    def __init__(self, exit_code: int, why: str = "stopped by a signal"):
        super().__init__(why)
        self.exit_code = exit_code


class StopRequest:
    """While entered, SIGINT and SIGTERM set :attr:`signal_number` instead of ending the process.

    A second signal ends the process at once. Outside the main thread it does nothing.
    """

    def __init__(self):
        self.signal_number: int | None = None
        self._is_ending = False
        self._previous: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.signal_number is not None

    @property
    def exit_code(self) -> int:
        """The shell's code for a process ended by this signal (130 for Ctrl-C)."""
        return 128 + (self.signal_number or 0)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def expect_end(self) -> None:
        """From now on only the last files are written: the next signal waits for them too."""
        self.signal_number, self._is_ending = None, True

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self:
            raise KeyboardInterrupt
        self.signal_number = number
        what = "saving the last files" if self._is_ending else "stopping after this step"
        logger.warning("%s; once more to stop at once", what)
