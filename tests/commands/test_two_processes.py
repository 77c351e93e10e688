"""Two processes train as one with twice the batch, end with the same weights, and stop together.

This file is also the program that `accelerate launch` starts twice, in a folder with the command
line of every run (``runs.json``); each process writes there what it saw (``rank0.pt``,
``rank1.pt``).
"""

import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from mlm_plugin.cli import train_main
from mlm_plugin.commands.train import build_trainer
from mlm_plugin.config.datasets import resolve_datasets
from mlm_plugin.config.loading import load_config
from mlm_plugin.mlm.regularizer import MLMRegularizer
from mlm_plugin.mlm_setup import MLMSetup
from mlm_plugin.networks.kohya_names import part_of
from mlm_plugin.setup.accelerator import SHARDING, create_accelerator
from mlm_plugin.setup.data import create_dataset, find_concepts
from mlm_plugin.training.callbacks import Callback
from mlm_plugin.training.guards import NonFiniteLoss
from mlm_plugin.training.interrupt import Stopped
from mlm_plugin.training.validation import Validator

ROOT = Path(__file__).parents[2]
SEED = 1
SGD = ("--optimizer_type", "SGDNesterov", "--learning_rate", "0.1")


# --- what each process does ---


def start(arguments):
    """Everything that the command line builds before its first step."""
    config = load_config(list(arguments))
    datasets = resolve_datasets(config)
    concepts = find_concepts(config, datasets)
    accelerator = create_accelerator(config)
    dataset = create_dataset(config, datasets, concepts, seed=SEED)
    return build_trainer(
        config, accelerator=accelerator, dataset=dataset, concepts=concepts, seed=SEED
    )


class KnownNoise:
    """The denoising loss with noise and timestep determined by picture and step.

    So they are the same whichever process sees the picture, in a batch of whichever size.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def __call__(self, predict, latents, *, loss_weights_B, **_masks):
        noise, timesteps = zip(*map(self._draw, latents), strict=True)
        noise, timesteps = torch.stack(noise), torch.stack(timesteps)
        scheduler = self.trainer.models.noise_scheduler
        error = predict(scheduler.add_noise(latents, noise, timesteps), timesteps) - noise
        return (error.square().mean(dim=(1, 2, 3)) * loss_weights_B).mean()

    def _draw(self, latents):
        name = latents.numpy().tobytes() + bytes([self.trainer.progress.current_step])
        seed = int.from_bytes(sha256(name).digest()[:7], "big")
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(latents.shape, generator=generator)
        return noise, torch.randint(1000, (), generator=generator)


class BothRanks:
    """The term of both processes in turn, as one process sees it batch by batch."""

    def __init__(self, regularizer):
        self.regularizers = [copy.copy(regularizer) for _ in range(2)]
        for rank, one in enumerate(self.regularizers):
            one.seed = f"{SEED}/{rank}"

    def __call__(self, call):
        return self.regularizers[call % 2](call // 2)


class SignalAfter(Callback):
    """Sends this process SIGTERM once a number of steps is done."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer, result):
        if trainer.progress.current_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def shared_run(arguments, rank):
    """A run with known noise, and the pictures and prompts that this process saw."""
    trainer = start(arguments)
    trainer.diffusion_loss = KnownNoise(trainer)
    if trainer.regularizer and trainer.accelerator.num_processes == 1:
        trainer.regularizer = BothRanks(trainer.regularizer)
    before = weights_of(trainer)
    trainer.loader.sampler.start_epoch(0)
    epoch = [batch.image_paths for batch in trainer.loader]
    prompts = []
    if isinstance(trainer.regularizer, MLMRegularizer):
        encoder = trainer.regularizer.encoders[0]
        encode = encoder.encode
        encoder.encode = lambda ids_BL: (
            prompts.extend(map(tuple, ids_BL.tolist())) or encode(ids_BL)
        )
    trainer.run()
    seen = {"before": before, "weights": weights_of(trainer)}
    return seen | {"epoch": epoch, "prompts": prompts}


def one_sided_run(arguments, rank):
    """Each process gives a gradient to one tensor only: rank 0 to the first, rank 1 to the next."""
    trainer = start(arguments)
    before = weights_of(trainer)
    mine = trainer.method.parameters()[rank]
    trainer.diffusion_loss = lambda *_inputs, **_masks: (rank + 1) * mine.sum()
    trainer.run()
    return {"before": before, "weights": weights_of(trainer)}


def stopped_run(arguments, rank):
    """A signal reaches rank 1 alone."""
    trainer = start(arguments)
    if rank == 1:
        trainer.callbacks.append(SignalAfter(1))
    try:
        trainer.run()
    except Stopped as stopped:
        return {"weights": weights_of(trainer), "exit_code": stopped.exit_code}
    raise AssertionError("the run went on")


def failing_run(arguments, rank):
    """The loss of rank 1 alone is not finite in the second step."""
    trainer = start(arguments)
    plain, weights = trainer.diffusion_loss, []

    def loss(*inputs, **masks):
        weights.append(weights_of(trainer))
        fails = rank == 1 and trainer.progress.current_step == 1
        return plain(*inputs, **masks) * (float("nan") if fails else 1.0)

    trainer.diffusion_loss = loss
    try:
        trainer.run()
    except NonFiniteLoss as error:
        return {"weights": weights_of(trainer), "first": weights[0], "error": str(error)}
    raise AssertionError("the run went on")


def plain_run(arguments, rank):
    """The whole program; anything that rank 1 might write is in a separate folder."""
    if rank:
        at = arguments.index("--output_dir") + 1
        arguments = [*arguments[:at], f"{arguments[at]}-rank1", *arguments[at + 1 :]]
        arguments += ["--logging_dir", f"{arguments[at]}"]
    return {"exit_code": train_main(arguments)}


def validated_run(arguments, rank):
    """The loss of held-out pictures, before the run and in it."""
    trainer = start(arguments)
    (validator,) = (one for one in trainer.callbacks if isinstance(one, Validator))
    before = validator.measure(trainer)
    trainer.run()
    return {"before": before, "losses": validator.losses, "weights": weights_of(trainer)}


RUNS = {
    "shared": shared_run,
    "accumulated": shared_run,
    "one-sided": one_sided_run,
    "stopped": stopped_run,
    "failing": failing_run,
    "straight": plain_run,
    "resumed": plain_run,
    "refused": plain_run,
    "sdxl": shared_run,
    "validated": validated_run,
}


def weights_of(trainer):
    """A copy of what is trained."""
    return {name: tensor.clone() for name, tensor in trainer.method.state_dict().items()}


@contextmanager
def process_group(store, rank):
    """One group for each run, as if each had been launched separately."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    torch.distributed.barrier()  # a run that ends at once must not leave the other one connecting
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def main():
    torch.set_num_threads(1)
    MLMSetup.__init__.__kwdefaults__["num_targets"] = 64  # as in the process of the tests
    folder, rank, seen = Path(sys.argv[1]), int(os.environ["RANK"]), {}
    for name, arguments in json.loads((folder / "runs.json").read_text()).items():
        with process_group(folder / f"{name}.store", rank):
            seen[name] = RUNS[name](arguments, rank)
    torch.save(seen, folder / f"rank{rank}.pt")


# --- the tests ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def runs(folder, toy_folder, toy_pictures, toy_contextualizer, request):
    """The command lines of all runs, by name."""
    (source,) = toy_pictures.iterdir()
    few, many = folder / "few" / "1_sks dog", folder / "many" / "3_sks dog"
    for target in (few, many):
        shutil.copytree(source, target)
    for path in few.glob("4.*"):
        path.unlink()
    common = [
        *("--pretrained_model_name_or_path", str(toy_folder), "--caption_extension", ".txt"),
        *("--resolution", "64", "--network_dim", "4", "--network_alpha", "4", "--cache_latents"),
        *("--learning_rate", "1e-3", "--max_data_loader_n_workers", "0", "--seed", "1"),
        *(
            "--mlm_target",
            "class",
            "--mlm_contextualizer",
            str(toy_contextualizer),
            "--mlm_batch_size",
            "2",
        ),
        *("--train_batch_size", "2"),
    ]
    without_term = ["--mlm_loss_weight", "0"]

    def run(name, data, *flags):
        output = ["--output_dir", str(folder / name), "--output_name", "dog"]
        return [*common, "--train_data_dir", str(data.parent), *output, *flags]

    saving = ("--save_every_n_steps", "1", "--save_last_n_steps", "1", "--save_state")
    straight = run("straight", many, "--max_train_steps", "4", *saving, "--network_dropout", "0.1")
    state = folder / "straight" / "dog-step00000002-state"
    other = folder / "other-state"
    other.mkdir()
    progress = {"current_epoch": 1, "current_step": 2, "batches_in_epoch": 2, "num_batches": 2}
    (other / "train_state.json").write_text(json.dumps(progress | {"seed": 1, "num_processes": 1}))
    nowhere = ["--pretrained_model_name_or_path", "someone/not-there"]  # a hub id may exist
    sdxl = [
        *("--pretrained_model_name_or_path", str(request.getfixturevalue("toy_sdxl_folder"))),
        *(
            "--mlm_target",
            "class",
            "--mlm_contextualizer",
            request.getfixturevalue("toy_sdxl_contextualizers"),
        ),
    ]
    return {
        "shared": run("shared", few, *SGD, *without_term, "--max_train_steps", "2"),
        "accumulated": run(
            *("accumulated", many, *SGD, "--mlm_loss_weight", "0.5", "--max_train_steps", "2"),
            *("--gradient_accumulation_steps", "3"),
        ),
        "one-sided": run(
            *("one-sided", few, *without_term, "--max_train_steps", "1", "--max_grad_norm", "0"),
            *("--optimizer_type", "SGD", "--learning_rate", "1"),
            *("--optimizer_args", "weight_decay=0.5"),
        ),
        "stopped": run("stopped", many, "--max_train_steps", "6"),
        "failing": run("failing", many, "--max_train_steps", "6"),
        "straight": [*straight, "--logging_dir", str(folder / "logs")],
        "resumed": [*straight, "--output_name", "resumed", "--resume", str(state)],
        "refused": run("refused", many, "--resume", str(other), *nowhere),
        "sdxl": run("sdxl", few, *sdxl, "--max_train_steps", "1"),
        "validated": run(
            *("validated", many, "--max_train_steps", "3", "--validate_every_n_steps", "2"),
            *("--validation_split", "0.6", "--train_batch_size", "1"),
        ),
    }


@pytest.fixture(scope="module")
def printed(folder, runs):
    """All runs by two processes, and their output."""
    (folder / "runs.json").write_text(json.dumps(runs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--main_process_port", str(port)),
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*launcher, __file__, str(folder)],
        timeout=1800,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def ranks(folder, printed):
    """What each process saw, by run."""
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """A process trains once; tests train many times, in any order."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def error_in(capsys):
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if line.startswith("error: "))
    return line


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_close(a, b, *, start):
    """Equal up to rounding, relative to the change of the weights."""
    assert a.keys() == b.keys() == start.keys()
    moved = max((b[name] - start[name]).abs().max() for name in b)
    apart = max((b[name] - a[name]).abs().max() for name in b)
    assert moved > 1e-3
    assert apart < 1e-4 * moved, (apart, moved)


@pytest.mark.parametrize(
    "name", ["shared", "accumulated", "one-sided", "stopped", "failing", "sdxl", "validated"]
)
def test_both_processes_hold_the_same_weights_in_the_end(ranks, name):
    first, second = (rank[name]["weights"] for rank in ranks)
    assert_equal(first, second)


def test_two_processes_train_as_one_with_twice_the_batch(runs, ranks):
    alone = shared_run([*runs["shared"], "--train_batch_size", "4"], 0)
    assert [len(batch) for batch in alone["epoch"]] == [4]
    assert [len(batch) for rank in ranks for batch in rank["shared"]["epoch"]] == [2, 2]
    assert_close(ranks[0]["shared"]["weights"], alone["weights"], start=alone["before"])


def test_processes_share_the_held_out_pictures_and_agree_on_their_loss(runs, ranks):
    """Three batches, so one process has two of them."""
    first, second = (rank["validated"] for rank in ranks)
    assert first["losses"] == second["losses"]
    assert list(first["losses"]) == [2, 3]
    assert first["before"] == second["before"]
    alone = validated_run(runs["validated"], 0)
    assert alone["before"] == first["before"]


def test_gradients_of_both_losses_are_the_mean_over_batches_and_processes(runs, ranks):
    alone = shared_run([*runs["accumulated"], "--gradient_accumulation_steps", "6"], 0)
    assert_close(ranks[0]["accumulated"]["weights"], alone["weights"], start=alone["before"])


def test_a_tensor_without_gradient_on_one_process_counts_as_zero_there(ranks):
    before, after = ranks[0]["one-sided"]["before"], ranks[0]["one-sided"]["weights"]
    first, second, *others = before
    rate, decay = 1.0, 0.5
    for name, gradient in ((first, 0.5), (second, 1.0)):  # means of (1, 0) and (0, 2)
        expected = before[name] - rate * (gradient + decay * before[name])
        torch.testing.assert_close(after[name], expected)
    for name in others:  # without any gradient nothing changes, not even by decay
        assert torch.equal(after[name], before[name]), name


def test_the_processes_see_every_picture_of_an_epoch_once(ranks):
    parts = [rank["accumulated"]["epoch"] for rank in ranks]
    assert sorted(len(batch) for part in parts for batch in part) == [1, *[2] * 7]
    assert [len(part) for part in parts] == [4, 4]
    seen = Counter(Path(path).name for part in parts for batch in part for path in batch)
    assert seen == {f"{number}.png": 3 for number in range(5)}


def test_no_two_batches_of_mlm_prompts_are_the_same(ranks):
    drawn = [rank["accumulated"]["prompts"] for rank in ranks]
    assert [len(prompts) for prompts in drawn] == [8, 8]  # 2 in each of 3 + 1 batches
    batches = [tuple(prompts[i : i + 2]) for prompts in drawn for i in range(0, 8, 2)]
    assert len(set(batches)) == len(batches)


def test_a_signal_on_one_process_stops_both_and_the_state_is_whole(folder, ranks):
    assert [rank["stopped"]["exit_code"] for rank in ranks] == [143, 143]
    # the signal comes between two steps, and the second one tells the other process
    assert names_in(folder / "stopped") == ["dog-step00000002-state"]
    state = folder / "stopped" / "dog-step00000002-state"
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= set(names_in(state))
    assert_equal(load_file(state / "model.safetensors"), ranks[0]["stopped"]["weights"])


def test_a_bad_loss_on_one_process_stops_both_one_step_back(folder, ranks):
    errors = {rank["failing"]["error"] for rank in ranks}
    assert len(errors) == 1
    assert "the loss is nan at step 2" in errors.pop()
    assert_equal(ranks[0]["failing"]["weights"], ranks[0]["failing"]["first"])
    assert not list(folder.glob("failing/*-state")), "there is nothing to go on from"


def test_only_the_first_process_writes_and_says_so(folder, ranks, printed):
    assert [rank["straight"]["exit_code"] for rank in ranks] == [0, 0]
    assert names_in(folder / "straight-rank1") == []
    assert names_in(folder / "straight") == [
        "dog-state",
        "dog-step00000002-state",
        "dog-step00000002.safetensors",
        "dog-step00000003-state",
        "dog-step00000003.safetensors",
        "dog.json",
        "dog.safetensors",
        "resumed-state",
        "resumed-step00000003-state",
        "resumed-step00000003.safetensors",
        "resumed.json",
        "resumed.safetensors",
    ]
    assert len(names_in(folder / "logs")) == 1  # of the uninterrupted run; the resumed one has none
    assert printed.count(f"wrote {folder / 'straight' / 'dog.safetensors'}") == 1


def test_a_resumed_run_of_two_processes_ends_as_a_straight_one(folder, ranks):
    assert [rank["resumed"]["exit_code"] for rank in ranks] == [0, 0]
    out = folder / "straight"
    straight, resumed = (load_file(out / f"{name}.safetensors") for name in ("dog", "resumed"))
    assert_equal(straight, resumed)


def test_another_number_of_processes_is_refused_before_a_model_is_looked_for(
    folder, runs, ranks, printed, capsys
):
    assert [rank["refused"]["exit_code"] for rank in ranks] == [2, 2]
    assert "was trained with 1 process(es), now there are 2" in printed
    state = ["--resume", str(folder / "straight" / "dog-step00000002-state")]
    assert train_main([*runs["refused"], *state]) == 2
    line = error_in(capsys)
    assert "was trained with 2 process(es), now there are 1; start as many as before" in line


def test_both_text_encoders_of_sdxl_are_trained_by_two_processes(ranks):
    before, after = ranks[0]["sdxl"]["before"], ranks[0]["sdxl"]["weights"]
    moved = {part_of(name) for name in before if (before[name] != after[name]).any()}
    assert moved == {"textencoder1", "textencoder2", "unet"}


@pytest.mark.parametrize("variable", SHARDING)
def test_a_launch_that_would_cut_the_model_into_pieces_is_refused(
    runs, variable, monkeypatch, capsys
):
    monkeypatch.setenv(variable, "true")
    assert train_main(runs["shared"]) == 2
    line = error_in(capsys)
    assert SHARDING[variable] in line
    assert "--multi_gpu" in line


if __name__ == "__main__":
    main()
