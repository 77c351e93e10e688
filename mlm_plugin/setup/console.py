"""What the user sees besides the progress bar."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from mlm_plugin.config.options import LogOptions

__all__ = ["output_to", "quiet_imports", "quiet_libraries", "setup_console"]

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
    """
    for stream in (sys.stdout, sys.stderr):  # a character that the console lacks must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    level = options.console_log_level or ("INFO" if is_first else "WARNING")
    if options.console_log_file:
        handler: logging.Handler = logging.FileHandler(options.console_log_file, encoding="utf-8")
    else:
        handler = logging.StreamHandler(sys.stderr)
    full = "%(asctime)s %(levelname)-7s %(message)s"
    form = "%(levelname)s: %(message)s" if options.console_log_simple else full
    handler.setFormatter(logging.Formatter(form, datefmt="%H:%M:%S"))
    root = logging.getLogger("mlm_plugin")
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False


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
def output_to(path: Path) -> Iterator[None]:
    """Redirect everything printed in the block to a new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield
