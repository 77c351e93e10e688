"""A trainer of any method on the toy model, made from options as the command line makes it."""

import pytest

from mlm_plugin.commands.train import build_trainer
from mlm_plugin.config.concepts import concepts_of
from mlm_plugin.config.datasets import resolve_datasets
from mlm_plugin.config.loading import load_config
from mlm_plugin.data.dataset import TrainDataset
from mlm_plugin.methods.checks import check_config
from mlm_plugin.setup.accelerator import create_accelerator


@pytest.fixture
def trainer_of(toy_folder, toy_pictures, toy_contextualizer, _fresh_accelerator):
    """Makes a trainer; options are those of the command line, a list gives several values."""

    def make(method, *, steps=4, **options):
        flat = {
            "method": method,
            "pretrained_model_name_or_path": toy_folder,
            "train_data_dir": toy_pictures,
            "output_dir": "unused",
            "caption_extension": ".txt",
            "resolution": 64,
            "network_dim": 4,
            "network_alpha": 4,
            "learning_rate": 2e-3,
            "max_train_steps": steps,
            "train_batch_size": 2,
            "max_data_loader_n_workers": 0,
            "seed": 1,
            "mlm_target": "class",
            "mlm_contextualizer": toy_contextualizer,
            "mlm_batch_size": 2,
            **options,
        }
        config = load_config([part for name, value in flat.items() for part in flag(name, value)])
        check_config(config)
        datasets = resolve_datasets(config)
        trainer = build_trainer(
            config,
            accelerator=create_accelerator(config),
            dataset=TrainDataset(datasets, seed=1),
            concepts=concepts_of(config, datasets, required=True),
            seed=1,
        )
        trainer.callbacks = []  # nothing is saved automatically
        return trainer

    return make


@pytest.fixture
def sdxl_trainer_of(trainer_of, toy_sdxl_folder, toy_sdxl_contextualizers):
    """The same on the SDXL toy, with a contextualizer for each text encoder."""

    def make(method, **options):
        sdxl = {
            "pretrained_model_name_or_path": toy_sdxl_folder,
            "mlm_target": "class",
            "mlm_contextualizer": toy_sdxl_contextualizers,
        }
        return trainer_of(method, **{**sdxl, **options})

    return make


def flag(name, value):
    if value is True:
        return [f"--{name}"]
    return [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
