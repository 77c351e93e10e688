"""Helpers for files: atomic writes, text written by people, the user's cache folder.

What gets its final name is on the disk before (:func:`put_in_place`), so that neither a kill nor a
power cut leaves half a file under that name.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mlm_plugin.errors import UserError

__all__ = [
    "atomic_path",
    "cache_dir",
    "cached_folder",
    "disk_errors",
    "parse_json",
    "put_in_place",
    "read_text",
    "remove_leftovers",
    "require_writable",
    "writable_cache_dir",
]

logger = logging.getLogger(__name__)

STARTED = time.time()  # of this process, nearly

# torch.save reports a full or failing disk as a RuntimeError with one of these.
TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream error")


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
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def put_in_place(temporary: Path, final: Path) -> None:
    """Give a complete file or folder its final name, once all of it is on the disk.

    A file replaces the old one; a folder needs a name that is free.

    Raises:
        OSError: the disk is full or fails, or ``final`` is a folder.
    """
    if temporary.is_dir():
        for item in temporary.rglob("*"):
            _sync(item)
    _sync(temporary)
    os.replace(temporary, final)
    _sync(final.parent)


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what killed runs of this output name left: temporary files and folders.

    A folder that was killed between its two renames gets its name back. What was changed since
    this process began belongs to a run beside it and stays. Call it before the run writes anything.
    """
    ours = re.compile(
        rf"\.(?P<final>{re.escape(name)}(-step\d{{8}}|-\d{{6}})?(-state)?)"
        r"\.[a-z0-9_]{8}(\.tmp)?(?P<end>\.old|\.\w+)?"
    )
    for path in list(folder.glob(".*")):
        found = ours.fullmatch(path.name)
        if found is None or path.stat().st_mtime > STARTED:
            continue
        final = folder / found["final"]
        if found["end"] == ".old" and not final.exists():
            path.rename(final)
            logger.warning("%s: a killed run left it half renamed; it has its name again", final)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    if path.is_dir():
        if os.name == "nt":  # Windows cannot open a folder
            return
        flags = os.O_RDONLY
    else:
        flags = os.O_RDWR if os.name == "nt" else os.O_RDONLY
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks cannot
            raise
    finally:
        os.close(handle)


@contextmanager
def disk_errors(path: str | os.PathLike) -> Iterator[None]:
    """Errors of the disk inside the block are ``OSError``, whatever library writes.

    Args:
        path: what is written; the message names it.

    Raises:
        OSError: in place of ``SafetensorError`` and of ``torch.save``'s ``RuntimeError``.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: {_one_line(error)}") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in TORCH_WRITE_ERRORS):
            raise
        raise OSError(
            f"{path}: cannot be written, is the disk full? ({_one_line(error)})"
        ) from error


def _one_line(error: Exception, *, limit: int = 160) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


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


def writable_cache_dir() -> Path:
    """The cache folder; where it cannot be written, a temporary one, with one warning."""
    try:
        require_writable(cache_dir(), "MLM_PLUGIN_CACHE")
    except UserError as error:
        return _temporary_cache(str(error))
    return cache_dir()


@cache
def _temporary_cache(reason: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mlm_plugin-cache-"))
    logger.warning("%s; until then %s is used, which the next run will not find", reason, folder)
    return folder


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
        folder = writable_cache_dir() / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = folder.with_name(f".{folder.name}.{random.SystemRandom().getrandbits(32):08x}")
        try:
            build(unfinished)
            try:
                put_in_place(unfinished, folder)
            except OSError:  # another process was faster
                if not folder.exists():
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder
