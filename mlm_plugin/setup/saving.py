"""When trained files and training states are written, under kohya's names."""

from __future__ import annotations

import dataclasses
import errno
import logging
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import OPTIONS, OutputOptions, TrainConfig
from mlm_plugin.contextualizer_file import LoadedContextualizer
from mlm_plugin.data.dataset import TrainDataset
from mlm_plugin.errors import UserError, shown_error
from mlm_plugin.export.lora_files import SAVE_DTYPES
from mlm_plugin.export.metadata import file_metadata
from mlm_plugin.export.modelspec import names_in_prompts, trigger_phrase
from mlm_plugin.export.run_facts import RunFacts, dataset_facts, file_identity
from mlm_plugin.export.sidecar import is_own_preview, own_preview, write_preview, write_sidecar
from mlm_plugin.export.thumbnails import thumbnail
from mlm_plugin.files import remove_temporaries
from mlm_plugin.methods import Export, Method
from mlm_plugin.mlm_setup import prompt_set_names
from mlm_plugin.models.checkpoints import StableDiffusion
from mlm_plugin.setup.best_file import BestFile
from mlm_plugin.training.callbacks import Callback, SaveFailed, StepResult
from mlm_plugin.training.logs import CurveLogger
from mlm_plugin.training.optimizers import optimizer_description
from mlm_plugin.training.processes import same_outcome
from mlm_plugin.training.trainer import Trainer

__all__ = [
    "RunRecord",
    "Saver",
    "removed_epoch",
    "removed_step",
    "require_output_name",
]

logger = logging.getLogger(__name__)

MAX_NAME_BYTES = 255
"""The longest file name of common file systems."""

ADDITIONS = r"(-step\d{8}|-\d{6}|-best)?(_embedding\w*|\w*_xti|_lora|_bundle|-state)?"
"""What steps and methods add to ``output_name``, as a pattern."""

MAX_NAMED = 5  # files in one message

LONGEST_ADDITION = len(".-step00000000-state.12345678.tmp.old")
"""What temporary names, step and state add to ``output_name`` at most."""


def require_output_name(options: OutputOptions) -> None:
    """Refuse before training what no file can be called; say what will be replaced.

    Raises:
        UserError: the name is too long, or belongs to a folder.
    """
    name = options.output_name or "last"
    room = MAX_NAME_BYTES - LONGEST_ADDITION - len(f".{options.save_model_as}")
    if (length := len(name.encode())) > room:
        raise UserError(
            f"output_name has {length} bytes, and at most {room} are allowed, as file names have "
            f"at most {MAX_NAME_BYTES} with all that is added; choose a shorter one"
        )
    path = Path(options.output_dir) / f"{name}.{options.save_model_as}"
    _warn_of_others(path)
    if path.is_dir():
        raise UserError(
            f"output_name = {name!r}: {path} is a folder, so the file cannot be written; remove "
            "it or choose another name"
        )
    if path.exists():
        _require_replaceable(path)
        logger.warning("%s exists and will be replaced; output_name chooses another name", path)


def _require_replaceable(path: Path) -> None:
    """A read-only file can be replaced where its folder can be written; an immutable one cannot."""
    try:
        with path.open("r+b"):
            pass
    except OSError as error:
        if error.errno == errno.EPERM:
            raise UserError(
                f"output_name: {path} exists and cannot be replaced ({error.strerror}): it is "
                "immutable (chattr -i changes that); choose another name"
            ) from error


def _warn_of_others(path: Path) -> None:
    """Name what an earlier run of this name left, of another method or kind of file."""
    ours = re.compile(rf"{re.escape(path.stem)}{ADDITIONS}(\.\w+)?")
    suffixes = {f".{kind}" for kind in OPTIONS["save_model_as"].choices}
    found = path.parent.iterdir() if path.parent.is_dir() else []
    names = sorted(
        item.name
        for item in found
        if item != path and ours.fullmatch(item.name) and (item.is_dir() or item.suffix in suffixes)
    )
    if names:
        logger.warning(
            "%s: files of an earlier run with this output_name: %s; those that this run does not "
            "overwrite stay",
            path.parent,
            ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else ""),
        )


class SavedFile(NamedTuple):
    """What is said of one file in its header.

    Attributes:
        words: the concepts in it and their words in WebUIs, as ``Method.webui_files`` says.
        needs: names of the embeddings that are used with it.
        thumbnail: a small picture as data URL.
    """

    words: Mapping[str, str]
    needs: tuple[str, ...] = ()
    thumbnail: str | None = None


def saved_files(method: Method, path: Path, *, picture: str | None = None) -> dict[Path, SavedFile]:
    """What the headers of a save's files say, with the words of the sidecars."""
    files, words = method.files(path), method.webui_files(path)
    names = {file.stem for file in files}
    return {
        file: SavedFile(
            words.get(file, {}),
            tuple(w for w in words.get(file, {}).values() if w in names - {file.stem}),
            picture,
        )
        for file in files
    }


class RunRecord:
    """Metadata for every file of a run."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        dataset: TrainDataset,
        models: StableDiffusion,
        concepts: Sequence[Concept],
        seed: int,
        contextualizers: Sequence[LoadedContextualizer] = (),
    ):
        self.contextualizers = "+".join(item.digest for item in contextualizers)
        self.config = config.replace(seed=seed)
        self.dataset, self.models, self.concepts = dataset, models, tuple(concepts)
        self.started_at = time.time()
        self._facts: RunFacts | None = None

    def metadata(
        self, trainer: Trainer, kind: str, file: SavedFile, *, epoch: int
    ) -> dict[str, str]:
        """The header of a file of this kind that is written now."""
        if self._facts is None:
            self._facts = self._gather(trainer)
        facts = dataclasses.replace(
            self._facts,
            steps=trainer.progress.current_step,
            epoch=epoch,
            finished_at=time.time(),
            words=file.words,
            needs=file.needs,
            thumbnail=file.thumbnail,
        )
        return file_metadata(self.config, facts, kind=kind)

    def _gather(self, trainer: Trainer) -> RunFacts:
        config, models = self.config, self.models
        mlm = {}
        if trainer.regularizer:
            mlm = {
                "mlm_read_at": trainer.mlm_read_at,
                "mlm_target": config.mlm.mlm_target,
                "mlm_prompt_set": prompt_set_names(config.mlm, self.concepts),
                "mlm_contextualizer": self.contextualizers,
                "mlm_seed": config.schedule.seed
                if config.mlm.mlm_seed is None
                else config.mlm.mlm_seed,
            }
        return RunFacts(
            session_id=random.SystemRandom().randrange(2**32),
            started_at=self.started_at,
            datasets=dataset_facts(
                self.dataset.datasets,
                self.dataset.images,
                triggers=[concept.text for concept in self.concepts],
            ),
            num_batches_per_epoch=trainer.plan.batches_per_epoch,
            num_epochs=trainer.plan.num_epochs,
            max_train_steps=trainer.plan.num_steps,
            base_model_version=models.version,
            prediction_type=models.prediction_type,
            optimizer=optimizer_description(
                config.optimizer.optimizer_type, config.optimizer.optimizer_args
            ),
            model=file_identity(models.source),
            vae=file_identity(config.model.vae) if config.model.vae else None,
            num_processes=trainer.accelerator.num_processes,
            num_validation_images=len(self.dataset.held_out),
            concepts=self.concepts,
            **mlm,
        )


class Saver(Callback):
    """Writes files and states when they are due, and removes those that are too old.

    Args:
        config: names, intervals, precision.
        record: metadata of the run.
        newest_sample: the last picture drawn, for the preview.
        ranking: ranks the files by their context, where that is asked for.
        curves: get what the ranking measures.

    Attributes:
        how_to_continue: said after a stop; ``{}`` stands for the folder of the state.
    """

    how_to_continue = "continue with --resume {}"

    def __init__(
        self,
        config: TrainConfig,
        *,
        record: RunRecord,
        newest_sample: Callable[[], Path | None] = lambda: None,
        ranking: BestFile | None = None,
        curves: Sequence[CurveLogger] = (),
    ):
        self.options: OutputOptions = config.output
        self.folder = Path(self.options.output_dir)
        self.name = self.options.output_name or "last"
        self.record = record
        self.newest_sample = newest_sample
        self.ranking, self.curves = ranking, curves
        self._spared: str | None = None  # a file that is kept for its rank alone

    def on_train_start(self, trainer: Trainer) -> None:
        """Remove leftovers of killed runs; refuse a disk that cannot hold what is trained."""
        if not trainer.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self.folder, self._is_ours(trainer))
        dtype = SAVE_DTYPES[self.options.save_precision]
        needed = sum(
            parameter.numel() * (dtype or parameter.dtype).itemsize
            for parameter in trainer.method.parameters()
        )
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"output_dir = {str(self.folder)!r}: {free / 1e6:.1f} MB are free, and the file "
                f"needs {needed / 1e6:.1f} MB; free some or choose another folder"
            )

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Save every n steps."""
        every, step = self.options.save_every_n_steps, trainer.progress.current_step
        if not every or step % every or step >= trainer.plan.num_steps:
            return
        last, last_state = self.options.save_last_n_steps, self.options.save_last_n_steps_state
        removed = partial(removed_step, step, every=every)
        old, old_state = removed(last=last), removed(last=last_state or last)
        self._try_to_save(trainer, self._step_name, step, old=old, old_state=old_state)

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Save every n epochs, except after the last one, which is the final file."""
        every, epoch = self._epochs_between(trainer), trainer.progress.current_epoch
        if not every or epoch % every or epoch >= trainer.plan.num_epochs:
            return
        last, last_state = self.options.save_last_n_epochs, self.options.save_last_n_epochs_state
        removed = partial(removed_epoch, epoch, every=every)
        old, old_state = removed(last=last), removed(last=last_state or last)
        self._try_to_save(trainer, self._epoch_name, epoch, old=old, old_state=old_state)

    def on_train_end(self, trainer: Trainer) -> None:
        """Save the final file, its sidecar and preview, and the state where one is asked for.

        Raises:
            SaveFailed: something could not be saved there; the message says where it is instead.
        """
        problems = [self._save_last_file(trainer)]
        if self._wants_final_state:
            problems.append(self._save_last_state(trainer, self._state_folder(self.name)))
        if found := [problem for problem in problems if problem]:
            raise SaveFailed("; ".join(found))
        if self.ranking is not None and trainer.accelerator.is_main_process:
            print(self.ranking.report(self._path))

    def on_stop(self, trainer: Trainer) -> None:
        """Save the state, so that nothing is lost; before the first step there is nothing.

        Raises:
            SaveFailed: it could not be saved there; the message says where it is instead.
        """
        if trainer.progress.current_step == 0:
            return
        folder = self._state_folder(self._step_name(trainer.progress.current_step))
        if problem := self._save_last_state(trainer, folder):
            raise SaveFailed(problem)
        if trainer.accelerator.is_main_process:
            logger.warning("state saved; %s", self.how_to_continue.format(folder))

    def measured(self) -> dict[str, Any]:
        """The ranking of the files."""
        if self.ranking is None:
            return {}
        return {"files": self.ranking.measured(), "spared": self._spared}

    def recall(self, trainer: Trainer, measured: Mapping[str, Any]) -> None:
        """The ranking before a resume, of the files that are still there."""
        if self.ranking is None:
            return
        self._spared = measured["spared"]
        self.ranking.recall(measured["files"])
        for name in measured["files"]:
            if not any(path.exists() for path in trainer.method.files(self._path(name))):
                self.ranking.forget(name)

    def _rank(self, trainer: Trainer, name: str) -> None:
        """Measure what has been saved, and remove a file that was kept for its rank alone."""
        if self.ranking is None:
            return
        with trainer.evaluating():
            values = self.ranking.measure(name, trainer.progress.current_step)
        for curves in self.curves:
            curves.log(trainer, values)
        if self._spared and not self.ranking.spares(self._spared):
            outdone, self._spared = self._spared, None
            self._remove(trainer, outdone)

    def _require_context(self) -> None:
        if self.ranking is not None:
            self.ranking.require_context()

    def _save_last_file(self, trainer: Trainer) -> str | None:
        """Save and report the final file; what went wrong, or ``None``."""
        path, epoch = self._path(self.name), trainer.plan.num_epochs
        try:
            self._export(trainer, path, epoch=epoch)
        except (OSError, UserError) as error:
            return self._elsewhere(
                trainer,
                _could_not(path, error),
                # the name may be what cannot be written
                lambda folder: self._export(trainer, folder / f"rescued{path.suffix}", epoch=epoch),
                name=f"rescued{path.suffix}",
            )
        self._rank(trainer, self.name)
        if not trainer.accelerator.is_main_process:
            return None
        try:
            self._report(trainer, path)
        except UserError as error:
            return str(error)
        return None

    def _save_last_state(self, trainer: Trainer, folder: Path) -> str | None:
        """Save a state that has no later one; what went wrong, or ``None``."""
        try:
            trainer.save_state(folder)
        except (OSError, UserError) as error:
            return self._elsewhere(
                trainer,
                _could_not(folder, error),
                lambda other: trainer.save_state(other / "rescued-state"),
                name="rescued-state",
            )
        return None

    def _elsewhere(
        self, trainer: Trainer, what: str, save: Callable[[Path], None], *, name: str
    ) -> str:
        """Save in the system's temporary folder; says where it is. Every process must call it."""
        folders = [self.folder]

        def create() -> None:
            if trainer.accelerator.is_main_process:
                folders[0] = Path(tempfile.mkdtemp(prefix="mlm_plugin-"))

        try:
            same_outcome(trainer.accelerator, create)
            save(folders[0])
        except (OSError, UserError) as error:
            return f"{what}, nor in {folders[0]} ({shown_error(error, limit=500)})"
        return f"{what}; it is saved as {folders[0] / name}, in a temporary folder: move it now"

    def _report(self, trainer: Trainer, path: Path) -> None:
        """Read the files back, say what they hold, and write what WebUIs show beside them."""
        method = trainer.method
        found, files = method.verify(path), method.files(path)
        names = [str(files[0])]
        names += [f"{file.name}/" if file.is_dir() else file.name for file in files[1:]]
        print(f"wrote {', '.join(names)} ({found})")
        try:
            for file, words in method.webui_files(path).items():
                self._write_webui_files(file, words)
        except OSError as error:
            logger.warning("%s is saved, but not all files beside it (%s)", path, error)

    def on_lost(self, trainer: Trainer) -> None:
        """Save what is trained so far; a state needs the processes that may be gone."""
        if not trainer.accelerator.is_main_process:
            return
        path = self._path(self._step_name(trainer.progress.current_step))
        self._write(trainer, path, epoch=trainer.progress.current_epoch)
        logger.error("a process failed: %s holds what is trained, and there is no state", path)

    def _write_webui_files(self, file: Path, words: Mapping[str, str]) -> None:
        """Write JSON and preview beside a file, and print a hint where WebUIs use other words."""
        concepts = self.record.concepts
        write_sidecar(
            file,
            base_model_version=self.record.models.version,
            activation_text=trigger_phrase(self.options, concepts, words) or "",
            description=self.options.metadata_description or "",
        )
        is_embedding = file.stem in words.values()
        if picture := self.newest_sample():
            from PIL import Image

            with Image.open(picture) as image:
                write_preview(file, image, is_embedding=is_embedding)
        elif is_own_preview(old := own_preview(file, is_embedding=is_embedding)):
            logger.warning(
                "%s is from an earlier run with this output_name; this run drew no samples", old
            )
        if words:
            prompt = names_in_prompts(concepts, words)
            print(f"in WebUIs, use {file.name} with {prompt!r} in the prompt")

    @property
    def _wants_final_state(self) -> bool:
        return self.options.save_state or self.options.save_state_on_train_end

    def _try_to_save(
        self,
        trainer: Trainer,
        name_of: Callable[[int], str],
        number: int,
        *,
        old: int | None,
        old_state: int | None,
    ) -> None:
        """Save during the run; what is too old is removed once there is something newer.

        A full disk does not end a run that may find space later.
        """
        name = name_of(number)
        path, folder = self._path(name), self._state_folder(name)
        epoch = trainer.progress.current_epoch
        if self._has_written(trainer, path, lambda: self._export(trainer, path, epoch=epoch)):
            self._rank(trainer, name)
            self._remove(trainer, old and name_of(old))
        if self.options.save_state:
            if self._has_written(trainer, folder, lambda: trainer.save_state(folder)):
                self._remove_state(trainer, old_state and name_of(old_state))
        self._require_context()

    def _has_written(self, trainer: Trainer, path: Path, write: Callable[[], None]) -> bool:
        try:
            write()
        except (OSError, UserError) as error:
            if trainer.accelerator.is_main_process:
                logger.error("%s; training continues", _could_not(path, error))
            return False
        return True

    def _export(self, trainer: Trainer, path: Path, *, epoch: int) -> None:
        """Write what is trained; every process must call it, and all fail where one does."""

        def export() -> None:
            if trainer.accelerator.is_main_process:
                self._write(trainer, path, epoch=epoch)

        same_outcome(trainer.accelerator, export)

    def _write(self, trainer: Trainer, path: Path, *, epoch: int) -> None:
        """Write what is trained, on this process alone."""
        saved = saved_files(trainer.method, path, picture=self._thumbnail(path))
        with trainer.evaluating():
            trainer.method.export(
                Export(
                    path,
                    metadata=lambda kind, file: self.record.metadata(
                        trainer, kind, saved[file], epoch=epoch
                    ),
                    dtype=SAVE_DTYPES[self.options.save_precision],
                )
            )

    def _thumbnail(self, path: Path) -> str | None:
        """The newest sample for the headers of the final files; intermediate ones stay small."""
        picture = self.newest_sample() if path == self._path(self.name) else None
        try:
            return picture and thumbnail(picture)
        except OSError as error:
            logger.warning("%s: the sample is not in the header (%s)", path, error)
            return None

    def _epochs_between(self, trainer: Trainer) -> int | None:
        if ratio := self.options.save_n_epoch_ratio:
            return max(1, trainer.plan.num_epochs // ratio)
        return self.options.save_every_n_epochs

    def _is_ours(self, trainer: Trainer) -> Callable[[str], bool]:
        """Whether a file or folder is one that this run writes, at whatever step."""
        start = len(self.name)
        stems = {file.stem[start:] for file in trainer.method.files(self._path(self.name))}
        ours = re.compile(
            rf"{re.escape(self.name)}(-step\d{{8}}|-\d{{6}})?"
            rf"({'|'.join(map(re.escape, stems))}|-state)(\.\w+)?"
        )
        return lambda name: bool(ours.fullmatch(name))

    def _epoch_name(self, epoch: int) -> str:
        return f"{self.name}-{epoch:06d}"

    def _step_name(self, step: int) -> str:
        return f"{self.name}-step{step:08d}"

    def _state_folder(self, name: str) -> Path:
        return self.folder / f"{name}-state"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.{self.options.save_model_as}"

    def _remove(self, trainer: Trainer, name: str | None) -> None:
        if name and self.ranking is not None and self.ranking.spares(name):
            self._spared = name
            return
        if name and self.ranking is not None:
            self.ranking.forget(name)
        if not name or not trainer.accelerator.is_main_process:
            return
        for path in trainer.method.files(self._path(name)):
            try:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:
                logger.warning("the old %s could not be removed (%s)", path, error)

    def _remove_state(self, trainer: Trainer, name: str | None) -> None:
        if name and trainer.accelerator.is_main_process:
            shutil.rmtree(self._state_folder(name), ignore_errors=True)


def _could_not(path: Path, error: Exception) -> str:
    return f"{path} could not be saved ({shown_error(error, limit=500)})"


def removed_epoch(epoch: int, *, every: int, last: int | None) -> int | None:
    """The epoch whose file is too old once ``epoch`` is saved; ``last`` counts files.

    Source: sd-scripts ``library/train_util.py`` ``get_remove_epoch_no``.
    """
    old = epoch - every * last if last else 0
    return old if old > 0 else None


def removed_step(step: int, *, every: int, last: int | None) -> int | None:
    """The step whose file is too old once ``step`` is saved; ``last`` counts steps.

    Source: sd-scripts ``library/train_util.py`` ``get_remove_step_no``.
    """
    if not last:
        return None
    old = step - last - 1
    old -= old % every
    return old if old > 0 else None
