"""Helpers for files: atomic writes, text written by people, the user's cache folder."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlm_plugin.errors import UserError

__all__ = [
    "atomic_path",
    "cache_dir",
    "cached_folder",
    "parse_json",
    "read_text",
    "require_writable",
]


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block succeeds.

    A kill at any moment leaves the old file or none, never half a file under the final name.
    An exception in the block removes the temporary file. Parent folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f".{path.stem}.", suffix=f".tmp{path.suffix}", dir=path.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(folder: str | os.PathLike, option: str) -> None:
    """Create a folder and try to write there, before hours depend on it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{option} = {str(folder)!r}: cannot be written ({error.strerror}); choose another"
        ) from error


def read_text(path: str | os.PathLike) -> str:
    """A UTF-8 file, with or without byte order mark.

    Raises:
        UserError: it is missing or in another encoding.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from error


def parse_json(text: str, path: str | os.PathLike) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is not JSON, or nested more deeply than anyone writes; names the file.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path}: is nested too deeply to be read") from error


def cache_dir() -> Path:
    """The folder for results worth keeping between runs.

    ``$MLM_PLUGIN_CACHE`` if set, else ``mlm_plugin`` in the platform's cache folder.
    """
    if chosen := os.environ.get("MLM_PLUGIN_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "mlm_plugin"


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """A folder in the user's cache, made on first use: all of it, or none.

    Args:
        name: below the cache folder; parts may be joined by ``/``.
        build: fills a folder that does not exist yet.
    """
    folder = cache_dir() / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = folder.with_name(f".{folder.name}.{random.SystemRandom().getrandbits(32):08x}")
        try:
            build(unfinished)
            try:
                unfinished.rename(folder)
            except OSError:  # another process was faster
                if not folder.exists():
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder
