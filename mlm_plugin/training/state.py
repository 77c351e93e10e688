"""Training state on disk: everything an interrupted run needs to end like an uninterrupted one.

The folder keeps the file names of sd-scripts' states (accelerate's ``save_state`` plus
``train_state.json``). The MLM stream and the data order need no file: both are named by seed and
position.
"""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from mlm_plugin.config.options import OPTIONS
from mlm_plugin.errors import UserError, shown_error
from mlm_plugin.files import disk_errors, put_in_place
from mlm_plugin.methods.base import Method
from mlm_plugin.models.weights_files import read_weights, write_weights
from mlm_plugin.training.processes import same_outcome

__all__ = [
    "Progress",
    "RunIdentity",
    "check_state",
    "load_state",
    "read_measured",
    "read_progress",
    "save_state",
]

logger = logging.getLogger(__name__)

PROGRESS_FILE = "train_state.json"
MEASURED_FILE = "measured.json"
WEIGHTS_FILE = "model.safetensors"
SCALER_FILE = "scaler.pt"


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        current_epoch: current epoch, from 1 (kohya's name).
        current_step: optimizer steps done since the start of training (kohya's name).
        batches_in_epoch: batches of this epoch that are done, on each process.
        num_batches: batches done since the start, on each process; names the MLM draws.
        seed: seed of the run.
        num_processes: processes that share the batches.
    """

    current_epoch: int = 1
    current_step: int = 0
    batches_in_epoch: int = 0
    num_batches: int = 0
    seed: int = 0
    num_processes: int = 1


@dataclass(frozen=True)
class RunIdentity:
    """What a run must have in common with a state that it resumes from.

    Attributes:
        seed: seed of data order, noise and MLM prompts.
        num_processes: processes that share the batches.
        settings: options on which a state depends, by name; without any, they are not compared.
    """

    seed: int
    num_processes: int = 1
    settings: Mapping[str, str] = field(default_factory=dict)


def save_state(
    folder: Path,
    *,
    accelerator: Accelerator,
    method: Method,
    progress: Progress,
    settings: Mapping[str, str],
    measured: Mapping[str, Any],
) -> None:
    """Write a state folder; it has its final name only when it is complete.

    Every process must call it: each adds its random state. ``settings`` are the options on which
    the state depends, by name, for :func:`check_state`; ``measured`` is for
    :func:`read_measured`.

    Raises:
        OSError: on every process, whichever could not write.
    """
    unfinished = _shared_temporary_folder(folder, accelerator)
    values = {**asdict(progress), "settings": dict(settings)}

    def write() -> None:
        with disk_errors(folder):
            accelerator.save_state(str(unfinished))

    def complete() -> None:
        if accelerator.is_main_process:
            _write_parts(unfinished, method, values, measured)
            _move_into_place(unfinished, folder)

    try:
        same_outcome(accelerator, write)
        same_outcome(accelerator, complete)
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)


def _shared_temporary_folder(folder: Path, accelerator: Accelerator) -> Path:
    name = [None]

    def create() -> None:
        if accelerator.is_main_process:
            folder.parent.mkdir(parents=True, exist_ok=True)
            name[0] = tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)

    same_outcome(accelerator, create)
    return Path(broadcast_object_list(name)[0])


def _write_parts(
    unfinished: Path, method: Method, values: Mapping[str, object], measured: Mapping[str, Any]
) -> None:
    """What accelerate's state lacks: the weights, the progress and what was measured."""
    write_weights(unfinished / WEIGHTS_FILE, method.state_dict(), metadata={})
    (unfinished / MEASURED_FILE).write_text(json.dumps(measured), encoding="utf-8")
    path = unfinished / PROGRESS_FILE
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")


def _move_into_place(unfinished: Path, folder: Path) -> None:
    if not folder.exists():
        put_in_place(unfinished, folder)
        return
    old = unfinished.with_name(f"{unfinished.name}.old")  # a folder cannot be replaced in one move
    folder.rename(old)
    try:
        put_in_place(unfinished, folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_progress(folder: Path) -> Progress:
    """The progress of the run in a state folder.

    Raises:
        UserError: the folder is not a state of this trainer.
    """
    values = _read_values(folder)
    names = {item.name for item in fields(Progress)}
    missing = names - values.keys()
    if missing:
        raise UserError(
            f"resume: {folder} was written by another trainer ({PROGRESS_FILE} lacks "
            f"{', '.join(sorted(missing))}); start a new run from its files instead "
            "(network_weights, weights)"
        )
    for name in names:
        if type(values[name]) is not int or values[name] < 0:
            raise UserError(
                f"resume: {folder / PROGRESS_FILE}: {name} is {values[name]!r}, not a whole "
                "number; resume from an earlier state"
            )
    return Progress(**{name: values[name] for name in names})


def read_measured(folder: Path) -> dict[str, Any]:
    """What the callbacks of the run had measured, by their names; nothing if it is not known."""
    path = folder / MEASURED_FILE
    if not path.is_file():  # of an earlier version
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s is damaged (%s); curves and ranking begin again", path, error)
        return {}


def check_state(folder: Path, identity: RunIdentity) -> Progress:
    """The progress of the run in a state folder; refused where resuming would change the run.

    Other seeds or numbers of processes mean other batches and prompts; with other settings, the
    optimizer state would restore the old ones. A state of an earlier version has no settings to
    compare.

    Raises:
        UserError: the folder is not a state, or not one of this run; names what differs.
    """
    progress = read_progress(folder)
    if progress.seed != identity.seed:
        raise UserError(
            f"resume: {folder} was trained with seed {progress.seed}, now it is {identity.seed}"
        )
    if progress.num_processes != identity.num_processes:
        raise UserError(
            f"resume: {folder} was trained with {progress.num_processes} process(es), now there "
            f"are {identity.num_processes}; start as many as before, or start a new run from its "
            "files (network_weights, weights)"
        )
    _check_settings(folder, identity.settings)
    _require_whole(folder, identity.num_processes)
    return progress


def _check_settings(folder: Path, settings: Mapping[str, str]) -> None:
    before = _read_values(folder).get("settings") or {}
    if not isinstance(before, dict):
        raise UserError(
            f"resume: {folder / PROGRESS_FILE}: settings is {before!r:.60}, not an object; resume "
            "from an earlier state"
        )
    if not before or not settings:
        return
    before = _unchanged(settings) | before  # a state may be older than an option
    names = sorted(before.keys() | settings.keys())
    changes = [
        f"{name} {before.get(name, 'not set')} (now {settings.get(name, 'not set')})"
        for name in names
        if before.get(name) != settings.get(name)
    ]
    if changes:
        old = "the old value" if len(changes) == 1 else "the old values"
        raise UserError(
            f"resume: {folder} was trained with {', '.join(changes)}; give {old}, or start a new "
            "run from its files (network_weights, weights)"
        )


def _unchanged(settings: Mapping[str, str]) -> dict[str, str]:
    """The options that have their default."""
    return {
        name: value
        for name, value in settings.items()
        if name in OPTIONS and value == str(OPTIONS[name].default)
    }


def load_state(
    folder: Path, *, accelerator: Accelerator, method: Method, identity: RunIdentity
) -> Progress:
    """Load weights, optimizer, scheduler and random states; returns the progress of the run.

    Raises:
        UserError: the folder is not a state, or belongs to another seed, number of processes,
            optimizer or other settings.
    """
    progress = check_state(folder, identity)
    if accelerator.scaler is not None and not (folder / SCALER_FILE).is_file():
        raise UserError(
            f"resume: {folder / SCALER_FILE} is missing: the state was written without "
            "mixed_precision fp16, or is not complete; give the old mixed_precision, or resume "
            "from an earlier state"
        )
    _load_weights(method, folder / WEIGHTS_FILE)
    try:
        accelerator.load_state(str(folder))
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"resume: {folder} does not fit this optimizer or its parts ({error}); give the old "
            "optimizer and learning rates, or start a new run from its files (network_weights, "
            "weights)"
        ) from error
    return progress


def _load_weights(method: Method, path: Path) -> None:
    weights, own = _whole_weights(path), method.state_dict()
    if different := sorted(weights.keys() ^ own.keys()):
        what = "lacks" if different[0] in own else "has besides what is trained"
        raise _damaged(path, f"{what} {different[0]} and {len(different) - 1} more names")
    try:
        method.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:  # a name is missing or a shape is another
        raise UserError(
            f"resume: {path} does not fit what is trained ({shown_error(error)}); "
            "resume from an earlier state"
        ) from error


def _whole_weights(path: Path) -> dict[str, Tensor]:
    weights = read_weights(path)
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"resume: {path} holds NaN or infinity in {name}; resume from an earlier state"
            )
    return weights


def _require_whole(folder: Path, num_processes: int) -> None:
    """Read every file of a state, so that a damaged one is named before a model is loaded.

    accelerate skips random states that it cannot read, and would go on with other ones.
    """
    _require_files(folder, num_processes)
    _whole_weights(folder / WEIGHTS_FILE)
    for path in sorted([*folder.glob("*.bin"), *folder.glob(SCALER_FILE)]):
        content = _read_tensors(path)
        _require_dict(path, content)
        _require_finite(path, content)
    for path in sorted(folder.glob("random_states_*.pkl")):
        _require_random_states(path)


def _require_files(folder: Path, num_processes: int) -> None:
    random_states = [f"random_states_{index}.pkl" for index in range(num_processes)]
    for name in (WEIGHTS_FILE, "optimizer.bin", "scheduler.bin", *random_states):
        if not (folder / name).is_file():
            raise _damaged(folder / name, "is missing")


def _require_random_states(path: Path) -> None:
    from accelerate.checkpointing import load

    try:
        content = load(path)  # what accelerate calls: NumPy's arrays and nothing that runs code
    except Exception as error:  # a damaged pickle can fail with any exception
        raise _damaged(path, "cannot be read") from error
    _require_dict(path, content)
    setters = {
        "random_state": random.Random().setstate,
        "numpy_random_seed": np.random.RandomState().set_state,
        "torch_manual_seed": torch.Generator().set_state,
    }
    for name, set_state in setters.items():
        try:
            set_state(content[name])
        except Exception as error:  # of whatever kind a wrong value causes in each library
            raise _damaged(path, f"has no {name} that can be used") from error


def _require_finite(path: Path, content: object) -> None:
    """Refuse NaN and infinity in a tensor, and NaN in a number, however deep."""
    if isinstance(content, dict):
        for value in content.values():
            _require_finite(path, value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            _require_finite(path, value)
    elif isinstance(content, Tensor):
        if content.is_floating_point() and not content.isfinite().all():
            raise _not_finite(path)
    elif isinstance(content, float) and math.isnan(content):
        raise _not_finite(path)


def _not_finite(path: Path) -> UserError:
    return UserError(f"resume: {path} holds NaN or infinity; resume from an earlier state")


def _read_tensors(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail with any exception
        raise _damaged(path, "cannot be read") from error


def _require_dict(path: Path, content: object) -> None:
    if not isinstance(content, dict):
        raise _damaged(path, f"holds a {type(content).__name__}, not a dict")


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"resume: {path} {what}: the state is not complete; resume from an earlier state, or start "
        "a new run from its files (network_weights, weights)"
    )


def _read_values(folder: Path) -> dict:
    path = folder / PROGRESS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"resume: {folder} is not a training state ({PROGRESS_FILE}: {error}); give a folder "
            "that ends in -state"
        ) from error
    if not isinstance(values, dict):
        raise UserError(
            f"resume: {path} holds a {type(values).__name__}, not an object; "
            "resume from an earlier state"
        )
    return values
