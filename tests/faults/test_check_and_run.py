"""``--check`` and the run agree on options drawn from a seed: what one refuses, so does the other.

The run is cut after its set-up, on the toy model.
"""

import itertools
import random

import pytest

from mlm_plugin.commands.rehearsal import rehearse
from mlm_plugin.commands.train import build_trainer, check_run
from mlm_plugin.config.loading import config_from_values
from mlm_plugin.config.options import OPTIONS
from mlm_plugin.errors import UserError
from mlm_plugin.methods import METHODS
from mlm_plugin.setup.accelerator import check_accelerator, create_accelerator
from mlm_plugin.setup.data import create_dataset

NUMBER = 200
IN_DEFAULT_SUITE = 20
NUMBERS = {bool: (True,), int: (0, 1, 2, 8, 500), float: (0, 0.5, 1, -1, 30)}
TEXTS = {
    "network_module": ("networks.lora", "lycoris.kohya", "networks.dylora"),
    "network_args": (["conv_dim=2"], ["algo=lokr"], ["algo=none"], ["preset=unet-only"], ["x=1"]),
    "optimizer_type": ("AdamW8bit", "SGDNesterov", "Adafactor", "Prodigy", "AdamX", "LBFGS"),
    "optimizer_args": (["weight_decay=0.1"], ["eps=0"], ["betas=3"], ["betas=2,2"], ["x=1"]),
    "lr_scheduler": ("cosine", "linear", "piecewise_constant", "adafactor", "cosine_with_min_lr"),
    "lr_scheduler_type": ("CosineAnnealingLR", "StepLR", "Nothing"),
    "lr_scheduler_args": (["T_max=3"], ["step_size=2"], ["step_rules='1:2,0.1'"]),
    "placeholder_token": ("sks", "a", "two words"),
    "class_token": ("dog", "dog house"),
    "init_word": ("cat", "id:3", "id:99999999", "cat house", ["cat", "dog"]),
    "mlm_prompt_set": ("person", "captions", "absent.toml"),
    "mlm_prompt_syntax": ("tags",),
    "mlm_contextualizer": ("absent.safetensors",),
    "resolution": ("64", "128,64", "8"),
    "face_crop_aug_range": ("0.5,0.8", "2,1"),
    "vae": ("absent.pt", "/absent/folder"),
    "network_weights": ("absent.safetensors",),
    "weights": ("absent.safetensors",),
    "resume": ("absent-state",),
    "sample_prompts": ("absent.txt", "absent.png"),
    "log_tracker_config": ("absent.toml",),
    "reg_data_dir": ("absent",),
    "conditioning_data_dir": ("absent",),
    "output_name": ("a", "a/b"),
    "caption_extension": (".caption", "none"),
}
APART = {  # need a network, minutes or a device; or no part of the set-up
    *"host sd_scripts_dir mlm_script mlm_arch config_file output_config check".split(),
    "debug_dataset",
    *"generate_class_images torch_compile dynamo_backend xformers tokenizer_cache_dir".split(),
    *"log_with logging_dir wandb_run_name wandb_api_key console_log_file".split(),
    *"pretrained_model_name_or_path train_data_dir dataset_config output_dir method".split(),
    *(name for name in OPTIONS if name.startswith("metadata_") or name.startswith("console_")),
}
TRIED = sorted(set(OPTIONS) - APART)


def drawn_options(number):
    """Options of a method and values of one to four others."""
    rng = random.Random(f"configurations/{number}")
    options = {"method": rng.choice(sorted(METHODS))}
    for name in rng.sample(TRIED, rng.randint(1, 4)):
        entry = OPTIONS[name]
        values = TEXTS.get(name) or entry.choices or NUMBERS.get(entry.kind, ("text",))
        options[name] = rng.choice(values)
    return options


def verdict_of(step):
    """``None``, or the line with which a step refuses."""
    try:
        step()
    except UserError as error:
        return str(error)


@pytest.fixture
def verdicts(toy_folder, toy_pictures, toy_contextualizer, tmp_path, monkeypatch):
    """``verdicts(options)``: what the check says, and what the set-up of the run says."""
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(tmp_path)
    base = {
        "pretrained_model_name_or_path": str(toy_folder),
        "train_data_dir": str(toy_pictures),
        "mlm_target": "class",
        "mlm_contextualizer": str(toy_contextualizer),
        "output_dir": str(tmp_path / "out"),
        "caption_extension": ".txt",
        "resolution": "64",
        "learning_rate": 1e-3,
        "max_train_steps": 4,
        "max_data_loader_n_workers": 0,
        "seed": 1,
    }

    def checked(options):
        run = check_run(config_from_values({**base, **options}, place="drawn"))
        check_accelerator(run.config)
        return run, create_dataset(*run, seed=1)

    def check(options):
        run, dataset = checked(options)
        rehearse(run, dataset, seed=1, num_processes=1, download=False)

    def set_up(options):
        run, dataset = checked(options)
        accelerator = create_accelerator(run.config)
        build_trainer(
            run.config, accelerator=accelerator, dataset=dataset, concepts=run.concepts, seed=1
        )

    def both(options):
        found = verdict_of(lambda: check(options)), verdict_of(lambda: set_up(options))
        AcceleratorState._reset_state(reset_partial_state=True)
        return found

    return both


def assert_agree(numbers, verdicts):
    refused = 0
    for number in numbers:
        options = drawn_options(number)
        check, run = verdicts(options)
        assert (check is None) == (run is None), (number, options, check, run)
        refused += run is not None
    return refused / len(numbers)


@pytest.mark.parametrize("start", range(0, IN_DEFAULT_SUITE, 10))
def test_the_check_and_the_run_agree(start, verdicts):
    assert 0.1 < assert_agree(range(start, start + 10), verdicts) < 1


@pytest.mark.slow
@pytest.mark.parametrize("start", range(IN_DEFAULT_SUITE, NUMBER, 20))
def test_the_check_and_the_run_agree_on_more(start, verdicts):
    assert_agree(range(start, start + 20), verdicts)


def test_most_options_are_drawn():
    drawn = set(itertools.chain.from_iterable(map(drawn_options, range(NUMBER))))
    assert len(drawn & set(TRIED)) > 0.8 * len(TRIED)
