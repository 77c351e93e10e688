"""What is watched of a run in kohya's network trainers: its page, its best file, its early end.

Everything happens where a file has been saved: the network's ``save_weights`` is the one call that
network modules and versions of sd-scripts have in common. The first process saves, and so it alone
scores and writes. The training goes on with the same weights, modes and random states.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator, PartialState
from torch import nn

from mlm_plugin.config.concepts import Concept, concepts_of
from mlm_plugin.config.options import MLMOptions, TrainConfig
from mlm_plugin.errors import UserError, shown_error
from mlm_plugin.files import atomic_path, copy_file, read_text, remove_temporaries
from mlm_plugin.mlm_setup import on_device, trigger_of
from mlm_plugin.models.key_values import matrices_of
from mlm_plugin.random_state import preserved_random_state
from mlm_plugin.sd_scripts.architectures import Architecture
from mlm_plugin.sd_scripts.arguments import WatchOptions
from mlm_plugin.sd_scripts.data import LearnedData
from mlm_plugin.sd_scripts.network_term import Models, encoders_of
from mlm_plugin.sd_scripts.term import LossParts
from mlm_plugin.sd_scripts.text_encoders import is_clip_text_model
from mlm_plugin.setup.best_file import BestFile, ContextLost, ranking_of
from mlm_plugin.training.context_score import ScoredModel

if TYPE_CHECKING:  # it is only imported where a page is asked for
    from mlm_plugin.evaluation.run_page import RunPage

__all__ = ["RunWatch", "WatchedRun", "check_watching", "watch_run"]

logger = logging.getLogger(__name__)

Losses = tuple[float, float | None]
"""Of a micro-batch: diffusion, and the term's where it acted."""

RANKING_FILE = "mlm_best.json"  # in a saved state
MANY = 500  # micro-batches whose losses wait on the device
ALSO = ("accelerate", "lycoris_lora")  # versions on the page
SAVES = ("save_every_n_steps", "save_every_n_epochs", "save_n_epoch_ratio")
NOT_READ = (
    "what a file keeps of its context is read from the U-Net and CLIP of Stable Diffusion 1, 2 and "
    "XL alone"
)


class WatchedRun(NamedTuple):
    """A run of a network trainer, before anything is trained.

    Attributes:
        args: options of the host.
        mlm: options of the term, which has the prompts.
        models: untrained.
        architecture: of the base model.
        data: names the concepts.
    """

    args: argparse.Namespace
    mlm: MLMOptions
    models: Models
    architecture: Architecture
    data: LearnedData | None


def check_watching(
    options: WatchOptions, args: argparse.Namespace, architecture: Architecture
) -> None:
    """Refuse what cannot be done, before anything is computed; warn of what has no effect.

    Args:
        options: what is asked for.
        args: options of the host.
        architecture: of the base model.

    Raises:
        UserError: names the option.
    """
    for name in options.needing_score:
        if not architecture.is_unet:
            raise UserError(f"{name}: {NOT_READ}; leave it out")
        if not any(getattr(args, option, None) for option in SAVES):
            logger.warning("%s has no effect without %s", name, " or ".join(SAVES))
    if options.stop_below is not None and getattr(args, "deepspeed", False):
        raise UserError(
            "mlm_stop_below: with deepspeed the state cannot be saved by the process that finds "
            "the context lost; leave it out"
        )


def watch_run(options: WatchOptions, run: WatchedRun, state: PartialState) -> RunWatch | None:
    """Set up what the options ask for; ``None`` if they ask for nothing.

    Args:
        options: all processes have the same.
        run: its models are untrained.
        state: this process, and its device; an ``Accelerator`` will do.

    Raises:
        UserError: what is asked for cannot be had in this run.
    """
    if not options.given:
        return None
    watch, is_needed = RunWatch(options, run), bool(options.needing_score)
    concepts = concepts_of(TrainConfig(mlm=run.mlm), run.data.datasets, required=is_needed)
    if not state.is_main_process:
        return watch
    _remove_leftovers(options, run.args)
    with nullcontext() if is_needed else _only_a_warning("the page shows what it can"):
        watch.ranking = _ranking(options, run, concepts, watch=watch, device=state.device)
    if options.page:
        with _only_a_warning("there is no page of the run"):
            watch.page = _page(options.page, run, concepts, watch.ranking, state.device)
    watch.follow(run.models.network)
    return watch


def _remove_leftovers(options: WatchOptions, args: argparse.Namespace) -> None:
    """Of killed runs of this name."""
    folder = Path(args.output_dir or ".")
    remove_temporaries(folder, lambda name: Path(name).stem == _best_name(args))
    if options.page:
        remove_temporaries(options.page.parent, lambda name: name == options.page.name)


def _best_name(args: argparse.Namespace) -> str:
    return f"{args.output_name or 'last'}-best"


def _can_be_scored(run: WatchedRun) -> bool:
    return run.architecture.is_unet and all(map(is_clip_text_model, run.models.text_encoders))


def _ranking(
    options: WatchOptions,
    run: WatchedRun,
    concepts: tuple[Concept, ...],
    *,
    watch: RunWatch,
    device: torch.device,
) -> BestFile | None:
    """The ranking that the options ask for; a page does without, with a word."""
    if not _can_be_scored(run):
        for name in options.needing_score:
            raise UserError(f"{name}: {NOT_READ}; leave it out")
        logger.warning("mlm_page: %s; the page shows the rest", NOT_READ)
        return None
    if not concepts:
        logger.warning(
            "the page shows no words around the concept: it is not known; give placeholder_token "
            "and class_token, or name the folder of the pictures 20_sks dog"
        )
        return None
    watch.models = [run.models.network, run.models.unet, *run.models.text_encoders]
    return ranking_of(
        _scored_model(run, watch, device),
        run.mlm,
        concepts,
        captions=run.data.captions,
        keep=options.keep_best,
        stop_below=options.stop_below,
    )


def _scored_model(run: WatchedRun, watch: RunWatch, device: torch.device) -> ScoredModel:
    """The models, which the host has not yet moved to their device."""
    found = list(encoders_of(run.args, run.models, run.architecture).values())
    encoders, layers = [one.text_encoder for one in found], matrices_of(run.models.unet)
    matrices = [matrix for layer in layers for matrix in layer]

    @contextmanager
    def untrained() -> Iterator[None]:
        models = [model for encoder in encoders for model in encoder.models]
        with evaluated(watch.models, device), on_device([*models, *matrices], device):
            yield

    return ScoredModel(
        encoders[0],
        lambda texts: torch.cat([one.encode_captions(texts) for one in encoders], dim=-1),
        layers,
        trains_text=any(one.is_trained for one in found),
        untrained=untrained,
        autocast=watch.autocast,
    )


def _page(
    path: Path,
    run: WatchedRun,
    concepts: tuple[Concept, ...],
    ranking: BestFile | None,
    device: torch.device,
) -> RunPage:
    from mlm_plugin.evaluation.run_page import RunFacts, RunPage, can_draw_curves
    from mlm_plugin.evaluation.versions import library_versions
    from mlm_plugin.sd_scripts.page_facts import TIME, drawn_samples, given_settings

    if not can_draw_curves():
        logger.warning("the page shows no curves: matplotlib is missing (pip install matplotlib)")
    facts = RunFacts(
        run.args.output_name or "last",
        trigger_of(concepts) or "",
        given_settings(run.args, sys.argv[1:]),
        "What was given on the command line or in the config_file.",
        library_versions(device, also=ALSO),
    )
    samples = partial(drawn_samples, run.args, since=time.strftime(TIME))
    return RunPage(path, facts, ranking=ranking, samples=samples)


class RunWatch:
    """Follows one run: notes its losses, and looks at every file that it saves.

    Args:
        options: what is asked for.
        run: what is followed.

    Attributes:
        step: optimizer steps so far.
        models: that every look at a file puts into evaluation mode; empty without a ranking, so
            that the trainer can delete its text encoders.
        has_ended: whether the training has ended; the last file is saved after that.
        ranking: of the files; on the first process alone.
        page: of the run; on the first process alone.
    """

    def __init__(self, options: WatchOptions, run: WatchedRun):
        self.options, self.args = options, run.args
        self.models: list[nn.Module] = []
        self.step = 0
        self.has_ended = False
        self.ranking: BestFile | None = None
        self.page: RunPage | None = None
        self._accelerator: Accelerator | None = None
        self._batches: list[tuple[int, LossParts]] = []  # micro-batches, not yet read
        self._losses: dict[int, list[Losses]] = defaultdict(list)  # read, not yet on the page
        self._curves: dict[str, float] = {}
        self._readers: list[object] = []  # of these curves
        self._lost: ContextLost | None = None
        self._best_copy: Path | None = None

    def attach(self, accelerator: Accelerator) -> None:
        """Take the accelerator, which exists before the first step."""
        self._accelerator = accelerator
        if self.ranking and self.options.keep_best:
            accelerator.register_save_state_pre_hook(self._save_ranking)
            accelerator.register_load_state_pre_hook(self._load_ranking)

    def autocast(self) -> AbstractContextManager:
        """The precision of the run; before the models are prepared, that of their weights."""
        return self._accelerator.autocast() if self._accelerator else nullcontext()

    def follow(self, network: nn.Module) -> None:
        """Look at every file that the network saves."""
        save_weights = network.save_weights

        def saved(file, dtype, metadata, *args, **kwargs):
            result = save_weights(file, dtype, metadata, *args, **kwargs)
            self._look_at(Path(file), metadata or {})
            return result

        network.save_weights = saved

    def note(self, parts: LossParts) -> None:
        """Keep the losses of a micro-batch; they stay on the device, which need not wait."""
        if self.page:
            self._batches.append((self.step + 1, parts))
        if len(self._batches) >= MANY:
            self._read_losses()
        if self._accelerator.sync_gradients:
            self.step += 1

    def new_curves(self, reader: object) -> dict[str, float]:
        """What the last file keeps, once for each reader, such as a tracker."""
        if reader in self._readers:
            return {}
        self._readers.append(reader)
        return self._curves

    def end_if_lost(self) -> None:
        """End the run on all processes where the last file has lost its context.

        Raises:
            SystemExit: with code 0, as in the standalone trainer.
        """
        if self.options.stop_below is None or not self._accelerator.check_trigger():
            return
        self._accelerator.end_training()
        if self._lost:
            print(f"\nstopped: {self._lost}; the files and the state are saved", file=sys.stderr)
        raise SystemExit(0)

    def _look_at(self, file: Path, metadata: dict[str, str]) -> None:
        step = int(metadata.get("ss_steps", self.step))  # with skipped steps kohya's is higher
        if self.ranking:
            with _only_a_warning(f"{file} is saved, but could not be examined"):
                self._rank(file, step)
        if self.page:
            with _only_a_warning(f"{file} is saved, but is not on the page"):
                self._write_page(step, metadata)
        if self.has_ended:
            self._report(file)

    def _rank(self, file: Path, step: int) -> None:
        with evaluated(self.models, self._accelerator.device):
            self._curves, self._readers = self.ranking.measure(file.stem, step), []
        for name in self.ranking.files:
            if not self.options.keep_best and not file.with_stem(name).exists():
                self.ranking.forget(name)
        try:
            self.ranking.require_context()
        except ContextLost as lost:
            if not self.has_ended:
                self._end_at_next_step(lost)
        if self.options.keep_best and self.ranking.best == file.stem:
            self._keep(file)

    def _end_at_next_step(self, lost: ContextLost) -> None:
        """Save the state where kohya's trainer is about to save its own, unless it does."""
        if not getattr(self.args, "save_state", False):
            name = self.args.output_name or "last"
            self._accelerator.save_state(str(Path(self.args.output_dir) / f"{name}-state"))
        self._lost = lost
        self._accelerator.set_trigger()

    def _write_page(self, step: int, metadata: dict[str, str]) -> None:
        if commit := metadata.get("ss_sd_scripts_commit_hash"):
            self.page.facts.versions["sd-scripts"] = commit
        self._read_losses()
        for number, batches in self._losses.items():
            diffusion, mlm = zip(*batches, strict=True)
            with_term = [one for one in mlm if one is not None]
            self.page.add_step(
                number + step - self.step,
                fmean(diffusion),
                fmean(with_term) if with_term else None,
            )
        self._losses.clear()
        self.page.write(step=step, num_steps=int(self.args.max_train_steps))

    def _read_losses(self) -> None:
        for step, parts in self._batches:
            mlm = parts.term.loss.item() if parts.term else None
            self._losses[step].append((parts.diffusion.item(), mlm))
        self._batches = []

    def _keep(self, file: Path) -> None:
        """A copy, which kohya's trainer does not remove when the file is too old."""
        best = file.with_name(f"{_best_name(self.args)}{file.suffix}")
        copy_file(file, best)
        self._show_copy(best)

    def _show_copy(self, best: Path) -> None:
        self._best_copy = best
        if self.page:
            self.page.best_copy = best.stem

    def _save_ranking(self, _models: Any, _weights: Any, output_dir: str) -> None:
        if self._best_copy:
            measured = self.ranking.measured()[self.ranking.best]
            known = {"copy": self._best_copy.name, "measured": measured}
            with atomic_path(Path(output_dir) / RANKING_FILE) as temporary:
                temporary.write_text(json.dumps(known), encoding="utf-8")

    def _load_ranking(self, _models: Any, input_dir: str) -> None:
        """Go on from the best file of the run that is resumed, if its copy is still there.

        It is known by the copy's name: kohya's trainer counts from 0 and names files again.
        """
        path = Path(input_dir) / RANKING_FILE
        if not path.is_file():
            return
        with _only_a_warning(f"{path} could not be read, the best file is chosen again"):
            known = json.loads(read_text(path))
            copy = Path(self.args.output_dir) / known["copy"]
            if copy.is_file():
                self.ranking.recall({copy.stem: known["measured"]})
                self._show_copy(copy)

    def _report(self, file: Path) -> None:
        """The last lines of a run; a file that is not the last may have been removed."""
        if self.ranking and self.ranking.files:
            print(self.ranking.report(lambda name: self._best_copy or file.with_stem(name)))
        if self.page and self.page.path.is_file():
            print(f"page of the run: {self.page.path.resolve()}")


@contextmanager
def _only_a_warning(what: str) -> Iterator[None]:
    """Whatever goes wrong in the block is not worth a run."""
    try:
        yield
    except Exception as error:
        logger.warning("%s (%s); training continues", what, shown_error(error))


@contextmanager
def evaluated(models: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Evaluation mode inside the block; every module and random stream then is as before."""
    modules = [module for model in models for module in model.modules()]
    modes = [module.training for module in modules]
    with preserved_random_state(device):
        for module in modules:
            module.training = False
        try:
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
