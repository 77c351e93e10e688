"""The loss of held-out pictures: which they are, what is measured, and that no more changes."""

import ast
import json
import logging
import math
import os
import random
import re
import shutil
import typing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from mlm_plugin.cli import train_main
from mlm_plugin.commands.train import check_run, trainer_of
from mlm_plugin.config.datasets import DatasetConfig, SubsetConfig
from mlm_plugin.config.loading import load_config
from mlm_plugin.config.options import LossOptions
from mlm_plugin.data.dataset import BatchKey, TrainDataset
from mlm_plugin.data.sources import split
from mlm_plugin.errors import UserError
from mlm_plugin.methods import METHODS
from mlm_plugin.training.validation import Validator, at_timestep, validation_timesteps

CHECKOUT = os.environ.get("SD_SCRIPTS_DIR")  # read here: tests run without it
SEED = 1
HELD_OUT = ("--validation_split", "0.4", "--validation_seed", "0")
"""Of five pictures in one folder the last two: see ``SPLITS``."""

SPLITS = [
    # number of pictures, share, seed, held out: sd-scripts' ``split_train_val``, 0.10.1
    (7, 0.2, 1234, [6]),  # the example of its own test
    (5, 0.2, 1, [1]),
    (5, 0.4, 0, [3, 4]),
    (12, 0.25, 42, [0, 1, 10]),
    (10, 0.7, 3, [2, 3, 4, 7, 8, 9]),  # 0 is in both of its parts
    (5, 0.3, 1, [1]),  # 0 likewise
    (5, 0.1, 1, []),
    (1, 0.9, 1, []),
]


@pytest.fixture(autouse=True)
def _fresh(_fresh_accelerator):
    """A process trains once."""


@pytest.fixture
def pictures(toy_pictures, tmp_path):
    """Five pictures without repeats, and the three of them that ``HELD_OUT`` trains on."""
    (source,) = toy_pictures.iterdir()
    every = shutil.copytree(source, tmp_path / "all" / "1_sks dog")
    kept = shutil.copytree(source, tmp_path / "kept" / "1_sks dog")
    for path in [*kept.glob("3.*"), *kept.glob("4.*")]:
        path.unlink()
    return SimpleNamespace(all=every.parent, kept=kept.parent)


@pytest.fixture
def flags(toy_folder, toy_contextualizer, pictures, tmp_path):
    """Flags of a small run on all five pictures; later flags take precedence."""
    return [
        *("--pretrained_model_name_or_path", str(toy_folder)),
        *("--train_data_dir", str(pictures.all), "--caption_extension", ".txt"),
        *"--resolution 64 --network_dim 4 --network_alpha 4 --learning_rate 1e-3".split(),
        *f"--train_batch_size 2 --max_train_steps 3 --seed {SEED}".split(),
        *"--max_data_loader_n_workers 0 --mlm_batch_size 2".split(),
        *("--mlm_contextualizer", str(toy_contextualizer)),
        *("--output_dir", str(tmp_path / "out"), "--output_name", "dog"),
    ]


def build(flags):
    """The trainer that the command line would run."""
    return trainer_of(check_run(load_config(list(flags))))


def validator_of(trainer):
    (validator,) = (one for one in trainer.callbacks if isinstance(one, Validator))
    return validator


def weights_of(trainer):
    return {name: tensor.clone() for name, tensor in trainer.method.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def curves(folder):
    """``{tag: {step: value}}`` of the only run in a folder of TensorBoard's."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = folder.iterdir()
    events = EventAccumulator(str(run / "network_train"))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


# --- which pictures are held out --------------------------------------------------------


@pytest.mark.parametrize(("number", "share", "seed", "held_out"), SPLITS)
def test_the_pictures_that_kohya_holds_out_are_held_out(number, share, seed, held_out):
    trained, validated = split(range(number), share, seed=seed)
    assert validated == held_out
    assert sorted(trained + validated) == list(range(number))


def kohyas_split():
    if CHECKOUT is None:
        pytest.skip("no sd-scripts checkout (SD_SCRIPTS_DIR) here")
    source = (Path(CHECKOUT) / "library" / "train_util.py").read_text("utf-8")
    found = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "split_train_val"
    ]
    scope = {"random": random, "math": math, "logging": logging, **vars(typing)}
    exec(compile(ast.Module(found, type_ignores=[]), "train_util", "exec"), scope)
    return scope["split_train_val"]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.2, 0.25, 0.3, 1 / 3, 0.5, 0.7, 0.9, 0.99])
def test_the_split_is_that_of_kohyas_own_function(share):
    theirs = kohyas_split()
    for number in range(1, 60):
        for seed in (0, 1, 42, 2**31):
            names = [f"{i}.png" for i in range(number)]
            trained, validated = split(names, share, seed=seed)
            their_trained, their_validated = (
                theirs(names, [None] * number, is_training, share, seed)[0]
                for is_training in (True, False)
            )
            assert set(trained) == set(their_trained)
            assert set(validated) == set(their_validated) - set(their_trained)
            assert len(set(their_validated) & set(their_trained)) <= 1


def folder_of(pictures, **settings):
    return SubsetConfig(
        image_dir=pictures.all / "1_sks dog",
        caption_extension=".txt",
        class_tokens="sks dog",
        **settings,
    )


def names_of(infos):
    return [info.path.name for info in infos]


def test_each_data_set_has_its_own_share_and_regularization_images_none(pictures, tmp_path):
    regularization = shutil.copytree(pictures.all / "1_sks dog", tmp_path / "reg")
    common = {"batch_size": 2, "resolution": (64, 64)}
    dataset = TrainDataset(
        [
            DatasetConfig(
                **common,
                validation_split=0.4,
                validation_seed=0,
                subsets=(
                    folder_of(pictures, num_repeats=3),
                    SubsetConfig(image_dir=regularization, is_reg=True, class_tokens="dog"),
                ),
            ),
            DatasetConfig(**common, validation_split=0.2, subsets=(folder_of(pictures),)),
            DatasetConfig(**common, subsets=(folder_of(pictures),)),
        ],
        seed=SEED,  # of the second data set, which has no seed of its own
    )
    assert names_of(dataset.held_out) == ["3.png", "4.png", "1.png"]
    assert dataset.num_train_images == 3 * 3 + 4 + 5
    assert dataset.num_reg_images == 3 * 3, "as many as are trained on"
    validation = dataset.validation_set(seed=0)
    assert names_of(validation.images) == ["3.png", "4.png", "1.png"]
    assert validation.num_train_images == 3, "without repeats"


def test_pictures_of_a_metadata_file_are_held_out_too(pictures, tmp_path):
    """In the order of the file, as sd-scripts reads it; there it holds none of them out."""
    folder, path = pictures.all / "1_sks dog", tmp_path / "meta.json"
    names = [f"{number}.png" for number in (4, 3, 2, 1, 0)]
    path.write_text(json.dumps({str(folder / name): {"caption": "sks dog"} for name in names}))
    subset = SubsetConfig(metadata_file=path)
    share = {"validation_split": 0.4, "validation_seed": 0}
    config = DatasetConfig(batch_size=2, resolution=(64, 64), subsets=(subset,), **share)
    assert names_of(TrainDataset([config], seed=SEED).held_out) == ["1.png", "0.png"]


def test_nothing_about_held_out_pictures_is_random(pictures):
    for path in (pictures.all / "1_sks dog").glob("*.txt"):
        path.write_text("sks dog, {red|green|blue}, a, b, c, d, e, f")
    subset = folder_of(
        pictures,
        shuffle_caption=True,
        caption_tag_dropout_rate=0.5,
        caption_dropout_rate=0.5,
        caption_dropout_every_n_epochs=1,
        token_warmup_step=0.5,
        enable_wildcard=True,
        flip_aug=True,
        color_aug=True,
    )
    config = DatasetConfig(batch_size=2, resolution=(64, 64), subsets=(subset,))
    plain = DatasetConfig(batch_size=2, resolution=(64, 64), subsets=(folder_of(pictures),))
    share = {"validation_split": 0.4, "validation_seed": 0}
    augmented, unchanged = (
        TrainDataset([DatasetConfig(**{**vars(one), **share})], seed=SEED).validation_set(seed=0)
        for one in (config, plain)
    )
    first, again, other = (
        augmented[BatchKey(0, 0)],
        augmented[BatchKey(0, 0)],
        unchanged[BatchKey(0, 0)],
    )
    assert first.captions == again.captions
    assert torch.equal(first.pixel_values, again.pixel_values)
    assert torch.equal(first.pixel_values, other.pixel_values)
    for caption in first.captions:
        assert caption.split(", ")[2:] == list("abcdef")
        assert caption.split(", ")[1] in ("red", "green", "blue")


# --- what is measured -------------------------------------------------------------------


def test_the_loss_is_that_of_the_diffusion_at_four_timesteps(flags):
    """Computed here from the parts, with the term on."""
    trainer = build([*flags, *HELD_OUT, "--cache_latents"])
    assert trainer.regularizer is not None
    validator = validator_of(trainer)
    batch = validator.dataset[BatchKey(0, 0)]
    assert sorted(Path(path).name for path in batch.image_paths) == ["3.png", "4.png"]
    models, errors = trainer.models, []
    latents = batch.latents * models.vae.config.scaling_factor
    with torch.no_grad(), trainer.evaluating():
        states = trainer.encode(batch.captions).states
        for number, timestep in enumerate((200, 400, 600, 800)):
            torch.manual_seed(0 + number)  # validation_seed
            noise = torch.randn_like(latents)
            timesteps = torch.full((2,), timestep)
            noisy = models.noise_scheduler.add_noise(latents, noise, timesteps)
            predicted = models.unet(noisy, timesteps, encoder_hidden_states=states).sample
            errors.append(nn.functional.mse_loss(predicted, noise).item())
    assert validator.measure(trainer) == pytest.approx(np.mean(errors), rel=1e-5)


@pytest.mark.parametrize("limits", [(None, None), (0, 1000), (20, 980), (7, 11), (500, 500)])
def test_the_timesteps_are_kohyas(limits):
    low, high = limits
    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000))
    options = LossOptions(min_timestep=low, max_timestep=high)
    loss = SimpleNamespace(noise_scheduler=scheduler, options=options)
    low, high = low or 0, 1000 if high is None else high
    expected = np.linspace(low, high, 4 + 2, dtype=int)[1:-1]  # sd-scripts' train_network.py
    assert validation_timesteps(loss) == expected.tolist()
    assert at_timestep(loss, 300).options.min_timestep == 300
    assert loss.options == options


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def test_measuring_twice_gives_one_number_and_leaves_everything_as_it_was(flags):
    trainer = build([*flags, *HELD_OUT, "--network_dropout", "0.5", "--noise_offset", "0.1"])
    validator = validator_of(trainer)
    trainer.method.train(True)
    weights, states, steps = weights_of(trainer), random_states(), vars(trainer.progress).copy()
    modes = [module.training for module in trainer.models.unet.modules()]
    assert any(modes)
    seen = []
    trainer.models.unet.register_forward_hook(
        lambda unet, *_: seen.append(
            (torch.is_grad_enabled(), any(m.training for m in unet.modules()))
        )
    )
    first = validator.measure(trainer)
    assert seen == 4 * [(False, False)], "neither a gradient nor dropout, at each timestep"
    assert random_states() == states
    torch.manual_seed(99)
    random.seed(99)
    assert validator.measure(trainer) == first
    assert [module.training for module in trainer.models.unet.modules()] == modes
    assert vars(trainer.progress) == steps
    assert all(parameter.grad is None for parameter in trainer.method.parameters())
    assert_same(weights_of(trainer), weights)
    with torch.no_grad():
        for parameter in trainer.method.parameters():
            parameter += 0.1
    assert validator.measure(trainer) != first, "it is about these weights"


def test_the_same_seed_names_the_same_noise_in_runs_of_other_seeds(flags):
    losses = {
        validator_of(trainer).measure(trainer)  # of a LoRA that changes nothing yet
        for seed in ("1", "2")
        for trainer in [build([*flags, *HELD_OUT, "--seed", seed, "--train_batch_size", "1"])]
    }
    assert len(losses) == 1


def test_max_validation_steps_counts_batches(flags):
    few = [*flags, *HELD_OUT, "--train_batch_size", "1"]
    every = validator_of(build(few))
    assert (len(every.dataset), every.num_batches) == (2, 2)
    assert validator_of(build([*few, "--max_validation_steps", "1"])).num_batches == 1
    assert validator_of(build([*few, "--max_validation_steps", "9"])).num_batches == 2


# --- the run is as without it -----------------------------------------------------------

CACHED_TEXT = ("--network_train_unet_only", "--cache_text_encoder_outputs", "--cache_latents")
TAGS = ("--shuffle_caption", "--caption_tag_dropout_rate", "0.3", "--flip_aug")
RUNS = {
    **{name: ("--method", name) for name in METHODS},
    "without the term": ("--mlm_loss_weight", "0", "--network_dropout", "0.3"),
    "cached latents": ("--cache_latents", "--network_dropout", "0.3"),
    "cached text": (*CACHED_TEXT, "--mlm_loss_weight", "0"),
    "cached text, read at the cross-attention": (*CACHED_TEXT, "--mlm_read_at", "cross_attention"),
    "tags": (*TAGS, "--caption_dropout_rate", "0.3"),
    "accumulated": ("--gradient_accumulation_steps", "2", "--train_batch_size", "1"),
    "template": ("--method", "textual_inversion", "--use_object_template"),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_weights_are_those_of_a_run_on_the_same_pictures(name, flags, pictures):
    flags = [*flags, *RUNS[name]]
    kept = build([*flags, "--train_data_dir", str(pictures.kept)])
    kept.run()
    trainer = build([*flags, *HELD_OUT, "--validate_every_n_steps", "1"])
    assert sorted(names_of(validator_of(trainer).dataset.images)) == ["3.png", "4.png"]
    trainer.run()
    assert_same(weights_of(kept), weights_of(trainer))
    losses = validator_of(trainer).losses
    assert list(losses) == [1, 2, 3]
    assert all(map(math.isfinite, losses.values()))
    assert len(set(losses.values())) == 3, "it follows the weights"


def test_a_schedule_free_optimizer_validates_its_averaged_weights(flags, pictures):
    pytest.importorskip("schedulefree")
    flags = [*flags, "--optimizer_type", "AdamWScheduleFree", "--mlm_loss_weight", "0"]
    kept = build([*flags, "--train_data_dir", str(pictures.kept)])
    kept.run()
    trainer = build([*flags, *HELD_OUT, "--validate_every_n_steps", "1"])
    trainer.run()
    assert_same(weights_of(kept), weights_of(trainer))


def test_a_lora_of_sdxl_validates(flags, toy_sdxl_folder, toy_sdxl_contextualizers, pictures):
    flags = [
        *(*flags, "--min_bucket_reso", "64", "--max_train_steps", "2"),
        *("--pretrained_model_name_or_path", str(toy_sdxl_folder)),
        *("--mlm_contextualizer", toy_sdxl_contextualizers),
    ]
    kept = build([*flags, "--train_data_dir", str(pictures.kept)])
    kept.run()
    trainer = build([*flags, *HELD_OUT])
    trainer.run()
    assert_same(weights_of(kept), weights_of(trainer))
    assert list(validator_of(trainer).losses) == [2]


def test_a_resumed_run_continues_and_validates_as_an_uninterrupted_one(flags, tmp_path):
    """The state is saved within the second of three epochs."""
    flags = [
        *(*flags, *HELD_OUT, "--max_train_steps", "6", "--validate_every_n_steps", "2"),
        *("--save_every_n_steps", "3", "--save_state", "--network_dropout", "0.3"),
    ]
    assert train_main([*flags, "--logging_dir", str(tmp_path / "straight")]) == 0
    state = tmp_path / "out" / "dog-step00000003-state"
    again = ("--resume", str(state), "--output_name", "again")
    assert train_main([*flags, *again, "--logging_dir", str(tmp_path / "resumed")]) == 0
    straight, resumed = (
        curves(tmp_path / name)["loss/validation/step_average"] for name in ("straight", "resumed")
    )
    assert list(straight) == [2, 4, 6]
    assert resumed == {step: straight[step] for step in (4, 6)}
    with (
        safe_open(tmp_path / "out" / "dog.safetensors", "pt") as one,
        safe_open(tmp_path / "out" / "again.safetensors", "pt") as other,
    ):
        for name in one.keys():  # noqa: SIM118 - a file, not a dict
            assert torch.equal(one.get_tensor(name), other.get_tensor(name)), name


# --- where it is seen -------------------------------------------------------------------


def test_report_console_curves_and_metadata_show_it(flags, tmp_path, capsys):
    """Five steps in epochs of two: the third epoch is cut short, as in sd-scripts."""
    flags = [*flags, *HELD_OUT, "--max_train_steps", "5", "--validate_every_n_steps", "4"]
    assert train_main([*flags, "--logging_dir", str(tmp_path / "logs")]) == 0
    printed = capsys.readouterr()
    assert "3 images, 3 per epoch" in printed.out
    assert "validation: 2 held out, not trained on (3.png, 4.png)" in printed.out
    assert printed.err.count("step 4: validation loss ") == 1, "measured once, for both tags"
    found = curves(tmp_path / "logs")
    by_step = found["loss/validation/step_average"]
    by_epoch = found["loss/validation/epoch_average"]
    assert list(by_step) == [4]
    assert list(by_epoch) == [1, 2, 3]
    assert by_step[4] == by_epoch[2]
    diffusion = found["loss/diffusion"]
    recent = (diffusion[3] + diffusion[4]) / 2
    divergence = found["loss/validation/step_divergence"][4]
    assert divergence == pytest.approx(by_step[4] - recent, abs=1e-6)
    assert list(found["loss/validation/epoch_divergence"]) == [1, 2, 3]
    with safe_open(tmp_path / "out" / "dog.safetensors", "pt") as file:
        metadata = file.metadata()
    expected = {
        "ss_num_train_images": "3",
        "ss_num_validation_images": "2",
        "ss_validation_split": "0.4",
        "ss_validation_seed": "0",
        "ss_validate_every_n_steps": "4",
        "ss_validate_every_n_epochs": "None",
        "ss_max_validation_steps": "None",
    }
    assert {name: metadata[name] for name in expected} == expected


def test_epochs_between_validations(flags):
    trainer = build([*flags, *HELD_OUT, "--max_train_steps", "8", "--validate_every_n_epochs", "3"])
    trainer.run()
    assert list(validator_of(trainer).losses) == [6]


def test_a_tracker_that_fails_costs_its_curves_and_not_the_run(flags, tmp_path, caplog):
    trainer = build([*flags, *HELD_OUT, "--logging_dir", str(tmp_path / "logs")])

    class FullDisk:
        name = "tensorboard"

        def log(self, values, step):
            raise OSError(28, "No space left on device")

        def finish(self):
            pass

    trainer.accelerator.trackers = [FullDisk()]
    trainer.run()
    assert list(validator_of(trainer).losses) == [2, 3]
    assert caplog.text.count("the curves end here") == 1


# --- refusals ---------------------------------------------------------------------------

STEPS = ("--validate_every_n_steps", "2")
REFUSALS = {
    "all": (["--validation_split", "1"], ["validation_split = 1", "0 to below 1"]),
    "more than all": (["--validation_split", "1.5"], ["validation_split = 1.5", "0 to below 1"]),
    "negative": (["--validation_split", "-0.1"], ["validation_split", "-0.1", "at least 0"]),
    "no number": (["--validation_split", "nan"], ["validation_split", "nan"]),
    "too small a share": (
        ["--validation_split", "0.1"],
        ["validation_split = 0.1", "none of 5 picture(s)", "at least 0.2"],
    ),
    "steps alone": (STEPS, ["validate_every_n_steps = 2", "needs validation_split"]),
    "epochs alone": (
        ["--validate_every_n_epochs", "1"],
        ["validate_every_n_epochs = 1", "needs validation_split"],
    ),
    "batches alone": (
        ["--max_validation_steps", "1"],
        ["max_validation_steps = 1", "needs validation_split"],
    ),
    "no batches": (
        [*HELD_OUT, "--max_validation_steps", "0"],
        ["max_validation_steps", "at least 1"],
    ),
    "steps after the end": (
        [*HELD_OUT, "--validate_every_n_steps", "4"],
        ["validate_every_n_steps = 4", "3 step(s)"],
    ),
    "epochs after the end": (
        [*HELD_OUT, "--validate_every_n_epochs", "3"],
        ["validate_every_n_epochs = 3", "2 epoch(s)"],
    ),
    "negative seed": (
        [*HELD_OUT, "--validation_seed", "-1"],
        ["validation_seed", "-1", "at least 0"],
    ),
}


def error_in(printed):
    (line,) = (line for line in printed.splitlines() if line.startswith("error: "))
    return line


@pytest.mark.parametrize("name", REFUSALS)
def test_what_could_not_validate_is_refused_in_one_line(name, flags, capsys):
    argv, parts = REFUSALS[name]
    assert train_main([*flags, *argv]) == 2
    line = error_in(capsys.readouterr().err)
    for part in parts:
        assert part in line
    assert train_main([*flags, *argv, "--check"]) == 2
    assert error_in(capsys.readouterr().err) == line


def test_a_single_picture_cannot_be_shared(flags, pictures, capsys):
    for path in (pictures.all / "1_sks dog").iterdir():
        if path.stem != "0":
            path.unlink()
    assert train_main([*flags, "--validation_split", "0.9"]) == 2
    assert "none of 1 picture(s) is held out" in error_in(capsys.readouterr().err)


def test_the_share_that_a_refusal_advises_is_enough(pictures):
    folder = pictures.all / "1_sks dog"
    common = {"batch_size": 2, "resolution": (64, 64), "subsets": (folder_of(pictures),)}
    while left := sorted(folder.glob("*.png"))[1:]:
        with pytest.raises(UserError, match="at least") as caught:
            TrainDataset([DatasetConfig(**common, validation_split=0.001)], seed=SEED)
        advised = float(re.search(r"at least ([\d.]+)", str(caught.value))[1])
        enough = TrainDataset([DatasetConfig(**common, validation_split=advised)], seed=SEED)
        assert len(enough.held_out) == 1
        left[0].unlink()


def test_a_share_that_every_data_set_replaces_by_none_is_refused(flags, pictures, tmp_path, capsys):
    path = tmp_path / "data.toml"
    folder = (pictures.all / "1_sks dog").as_posix()
    path.write_text(
        "[[datasets]]\nvalidation_split = 0.0\n[[datasets.subsets]]\n"
        f'image_dir = "{folder}"\nclass_tokens = "sks dog"\n'
    )
    given = ["--dataset_config", str(path), "--validation_split", "0.4"]
    assert train_main([*flags, *given]) == 2
    assert "validation_split = 0.4 has no effect" in error_in(capsys.readouterr().err)


def test_a_share_in_the_data_set_file_validates_and_a_seed_alone_is_named(
    flags, pictures, tmp_path, capsys
):
    path = tmp_path / "data.toml"
    folder = (pictures.all / "1_sks dog").as_posix()
    subset = f'[[datasets.subsets]]\nimage_dir = "{folder}"\nclass_tokens = "sks dog"\n'
    shares = "validation_split = 0.4\nvalidation_seed = 0\n"
    path.write_text(f"[general]\n{shares}[[datasets]]\n{subset}")
    flags = [*flags, "--dataset_config", str(path), "--check"]
    assert train_main([*flags, *STEPS]) == 0
    assert "2 held out, not trained on (3.png, 4.png)" in capsys.readouterr().out
    path.write_text(f"[general]\nvalidation_seed = 0\n[[datasets]]\n{subset}")
    assert train_main(flags) == 0
    printed = capsys.readouterr()
    assert "validation_seed has no effect without validation_split" in printed.err
    assert "held out" not in printed.out
