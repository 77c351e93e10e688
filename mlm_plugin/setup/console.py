"""What the user sees besides the progress bar."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from mlm_plugin.config.options import LogOptions
from mlm_plugin.errors import UserError
from mlm_plugin.files import is_of_the_disk

__all__ = [
    "keep_warnings",
    "kept_warnings",
    "output_to",
    "quiet_imports",
    "quiet_libraries",
    "setup_console",
]

MAX_WARNINGS = 40
LOUD_LIBRARIES = (
    "bitsandbytes",
    "httpx",
    "PIL",
    "transformers.tokenization_utils_base",
    "transformers.utils.import_utils",  # asks for torchvision, which nothing here needs
)


def setup_console(options: LogOptions) -> None:
    """Send messages of this package to stderr or ``console_log_file``; keep libraries quiet.

    Processes other than the first only report warnings.

    Raises:
        UserError: ``console_log_file`` cannot be written.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # a character that the console lacks must not end a run
            stream.reconfigure(errors="backslashreplace")
        if not isinstance(stream, _Lossy):
            setattr(sys, name, _Lossy(stream))
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    level = options.console_log_level or ("INFO" if is_first else "WARNING")
    if options.console_log_file:
        handler: logging.Handler = _log_file(options.console_log_file)
    else:
        handler = logging.StreamHandler(sys.stderr)
    full = "%(asctime)s %(levelname)-7s %(message)s"
    form = "%(levelname)s: %(message)s" if options.console_log_simple else full
    handler.setFormatter(logging.Formatter(form, datefmt="%H:%M:%S"))
    root = logging.getLogger("mlm_plugin")
    root.handlers[:] = [handler]
    keep_warnings(root)
    root.setLevel(level)
    root.propagate = False


class KeptWarnings(logging.Handler):
    """Keeps the warnings of a run, each once, for its page."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text."""
        text = record.getMessage()
        if text not in self.lines and len(self.lines) < MAX_WARNINGS:
            self.lines.append(text)


def keep_warnings(of: logging.Logger) -> None:
    """Keep the warnings of a logger from now on, and forget those before."""
    root, ours = logging.getLogger(), logging.getLogger("mlm_plugin")
    for logger in (root, ours):
        logger.handlers[:] = [one for one in logger.handlers if not isinstance(one, KeptWarnings)]
    handler = KeptWarnings()
    of.addHandler(handler)
    if of is root and not ours.propagate:  # our messages do not reach it
        ours.addHandler(handler)


def kept_warnings() -> list[str]:
    """The warnings since :func:`keep_warnings`; empty without it."""
    handlers = [*logging.getLogger().handlers, *logging.getLogger("mlm_plugin").handlers]
    return next((one.lines for one in handlers if isinstance(one, KeptWarnings)), [])


def _log_file(path: str) -> logging.Handler:
    try:
        return _LogFile(path, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"console_log_file = {path!r}: cannot be written ({error.strerror}); choose another"
        ) from error


class _LogFile(logging.FileHandler):
    """A file of messages; once it cannot be written, they go to the terminal."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Called where a message could not be written."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        terminal = logging.StreamHandler(sys.stderr)
        terminal.setFormatter(self.formatter)
        logger = logging.getLogger("mlm_plugin")
        kept = [one for one in logger.handlers if one is not self]
        logger.handlers[:] = [terminal, *kept]
        logger.warning("console_log_file = %r: cannot be written (%s)", self.baseFilename, error)
        terminal.handle(record)


class _Lossy:
    """A terminal, or the file it is redirected to: if that is full, the run goes on without it."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what can be written."""
        try:
            return self._stream.write(text)
        except OSError as error:
            if not is_of_the_disk(error):
                raise
            return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        try:
            self._stream.flush()
        except OSError as error:
            if not is_of_the_disk(error):
                raise


def quiet_imports() -> None:
    """Silence what libraries print during import; call it before importing them."""
    for name in LOUD_LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Switch off the loading bars of transformers and diffusers."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@contextlib.contextmanager
def output_to(path: Path, *, append: bool = False) -> Iterator[None]:
    """Redirect everything printed in the block to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a" if append else "w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield
