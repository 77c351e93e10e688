"""The ranking of a standalone run's files, where its options or its page ask for one."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import TrainConfig
from mlm_plugin.data.dataset import TrainDataset
from mlm_plugin.methods import Method
from mlm_plugin.setup.best_file import BestFile, ranking_of
from mlm_plugin.setup.data import captions_of
from mlm_plugin.training.context_score import ScoredModel

__all__ = ["watch_context"]


def watch_context(
    config: TrainConfig,
    method: Method,
    concepts: Sequence[Concept],
    dataset: TrainDataset,
    *,
    accelerator: Accelerator,
    for_page: bool,
) -> BestFile | None:
    """The ranking that the options or a page ask for; ``None`` if none does.

    Args:
        config: options of the run.
        method: untrained.
        concepts: what is learned.
        dataset: its captions may serve as prompts.
        accelerator: its precision.
        for_page: whether the run's page shows it.

    Raises:
        UserError: the options ask for it, and there are no prompts.
    """
    options = config.output
    is_asked = options.mlm_keep_best or options.mlm_stop_below is not None
    if not is_asked and not (for_page and concepts):
        return None
    method.train(False)
    return ranking_of(
        ScoredModel.of_method(method, accelerator.autocast),
        config.mlm,
        concepts,
        captions=captions_of(dataset),
        keep=options.mlm_keep_best,
        stop_below=options.mlm_stop_below,
    )
