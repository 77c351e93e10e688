"""What the command line does with an exception: the one place that decides it.

What a user can cause is one line. Anything else is a mistake of the program: a short report with
versions and the command, and a file that holds the traceback.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mlm_plugin import __version__
from mlm_plugin.errors import UserError
from mlm_plugin.files import is_of_the_disk

__all__ = ["TRACEBACK", "exit_code_of", "one_line"]

TRACEBACK = "--traceback"
"""The flag that shows every traceback on the terminal."""

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")
TOOL_LIBRARIES = ("jinja2", "markupsafe", "matplotlib", "tensorboard", "toml", "tomli_w", "tqdm")
"""What kohya's trainers may not have installed, besides the above."""
SECRETS = ("wandb_api_key", "huggingface_token")
LONG_WORD = re.compile(r"\S{160,}")
DEAD_WORKER = "DataLoader worker (pid"  # as PyTorch calls it
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def exit_code_of(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a command and return its exit code, whatever happens.

    Args:
        command: takes the arguments, returns an exit code.
        argv: may hold ``--traceback``, which the command does not see.

    Returns:
        That of the command; 2 for what a user can mend, 1 once training has begun or after an
        unexpected error, 130 after Ctrl-C.
    """
    arguments = [argument for argument in argv if argument != TRACEBACK]
    try:
        return command(arguments)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `mlm-plugin prompts | head`
        sys.stderr.close()
        return 0
    except Exception as error:
        if TRACEBACK in argv:
            traceback.print_exc()
        line = _line_of(error)
        if line is None:
            print(_report(error), file=sys.stderr)
            return 1
        print(f"error: {one_line(line)}", file=sys.stderr)
        of_the_disk = isinstance(error, OSError) and is_of_the_disk(error)
        return getattr(error, "exit_code", 1 if of_the_disk else UserError.exit_code)


def one_line(text: str) -> str:
    """Text without line breaks and control characters; words that fill the screen are cut."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return LONG_WORD.sub(_shortened, " ".join(printable.split(" ")).strip())


def _shortened(match: re.Match) -> str:
    word = match[0]
    return f"{word[:60]}...{word[-20:]} ({len(word)} characters)"


def _line_of(error: Exception) -> str | None:
    """The one line for an error that a user can mend; ``None`` for any other."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and (error.errno is not None or is_of_the_disk(error)):
        place = f"{error.filename}: " if error.filename is not None else ""
        hint = "; free some space or choose a folder of yours" if is_of_the_disk(error) else ""
        return f"{place}{error.strerror or error}{hint}"
    if isinstance(error, ModuleNotFoundError) and error.name in (*LIBRARIES, *TOOL_LIBRARIES):
        package = error.name.replace("_", "-")
        return f"this command needs {package}, which is not installed here: pip install {package}"
    if _is_out_of_memory(error):
        return (
            f"not enough memory ({one_line(str(error))[:120] or type(error).__name__}); "
            "smaller batches (train_batch_size, batch_size) and resolutions need less; in training "
            "gradient_checkpointing, cache_latents and AdamW8bit too: `mlm-plugin estimate` with "
            "the same options says how much"
        )
    if DEAD_WORKER in str(error):
        return (
            "a process that loads pictures was killed, mostly for lack of memory "
            f"({one_line(str(error))[:120]}); set max_data_loader_n_workers = 0"
        )
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """Told by name and words, so that torch need not be imported."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)


def _report(error: Exception) -> str:
    """A few lines to send to the authors; the traceback is in a file."""
    facts = [_versions(), f"command: {_command()}"]
    text = "".join(traceback.format_exception(error))
    what = f"{type(error).__name__}: {one_line(str(error))[:300]}"
    try:
        facts.append(f"traceback: {_written([*facts, text])}")
    except OSError:  # no place for a file: better here than lost
        facts.append(text)
    return "\n".join([f"error: unexpected {what}", *(f"  {fact}" for fact in facts)])


def _versions() -> str:
    found = [f"mlm_plugin {__version__}", f"Python {platform.python_version()}"]
    for name in LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join([*found, platform.platform()])


def _command() -> str:
    """The command line as it was typed, without keys."""
    words, hide_next = [], False
    for word in sys.argv:
        name, equals, _ = word.lstrip("-").partition("=")
        is_secret = word.startswith("--") and name in SECRETS
        words.append("***" if hide_next else f"--{name}=***" if is_secret and equals else word)
        hide_next = is_secret and not equals
    return one_line(shlex.join(words))


def _written(lines: Sequence[str]) -> Path:
    """A new file in the system's folder for temporary files."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    handle, name = tempfile.mkstemp(prefix=f"mlm-plugin-error-{stamp}-", suffix=".txt")
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("\n".join(lines))
    return Path(name)
