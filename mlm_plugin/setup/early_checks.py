"""What a run will need and can be looked for before anything is loaded: `--check` does it too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlm_plugin.config.datasets import Concept
from mlm_plugin.config.options import MLMOptions, ModelOptions, TrainConfig
from mlm_plugin.contextualizer_file import read_contextualizer
from mlm_plugin.errors import UserError
from mlm_plugin.export.thumbnails import thumbnail
from mlm_plugin.methods import METHODS
from mlm_plugin.mlm_setup import trigger_of
from mlm_plugin.models.diffusers_folder import require_named
from mlm_plugin.networks.create import check_network
from mlm_plugin.networks.network_args import parse_network_args, warn_of_output_norms
from mlm_plugin.prompt_sets.files import find_set_file
from mlm_plugin.setup.accelerator import require_device
from mlm_plugin.setup.sampling import draws_samples
from mlm_plugin.training.optimizers import find_optimizer_class
from mlm_plugin.training.samples import parse_sample_prompts
from mlm_plugin.training.state import read_progress

__all__ = ["require_what_is_named"]


def require_what_is_named(config: TrainConfig, concepts: Sequence[Concept]) -> None:
    """Refuse a model, file, package or precision that is not there.

    Raises:
        UserError: names the option.
    """
    require_device(config)
    _require_models(config.model)
    if METHODS[config.schedule.method].trains_network:
        check_network(config.network)
        if config.network.network_module == "lycoris.kohya":
            warn_of_output_norms(parse_network_args(config.network.network_args))
    find_optimizer_class(config.optimizer.optimizer_type)
    if draws_samples(config):
        parse_sample_prompts(config.sampling.sample_prompts, trigger=trigger_of(concepts))
    _require_thumbnail(config.output.metadata_thumbnail)
    if config.schedule.resume:
        read_progress(Path(config.schedule.resume))
    if config.mlm.mlm_loss_weight:
        _require_term(config.mlm)


def _require_thumbnail(value: str | None) -> None:
    if not value or value.startswith("data:"):
        return
    try:
        thumbnail(value)
    except OSError as error:
        raise UserError(
            f"metadata_thumbnail = {value!r}: {' '.join(str(error).split())}; give a picture file "
            "or a data URL"
        ) from error


def _require_term(options: MLMOptions) -> None:
    """Its prompt set and, unless states are compared, its contextualizers."""
    if options.mlm_prompt_set not in ("auto", "captions"):
        find_set_file(options.mlm_prompt_set)
    if options.mlm_target == "states" or options.mlm_contextualizer == "auto":
        return
    is_one = Path(options.mlm_contextualizer).is_file()
    names = [options.mlm_contextualizer] if is_one else options.mlm_contextualizer.split(",")
    for name in names:
        if name.strip() != "auto":
            read_contextualizer(name.strip())


def _require_models(options: ModelOptions) -> None:
    for name in ("pretrained_model_name_or_path", "vae"):
        if source := getattr(options, name):
            require_named(str(source), option=f"--{name}")
