"""Two processes, and the disk fails for one of them: both go on, or both end, and none waits.

This file is also the program that `accelerate launch` starts twice, as in
``tests/commands/test_two_processes.py``.
"""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
FAILS = {  # run -> (rank, part of the name of what this rank cannot write)
    "intermediate file": (0, "dog-step00000001.safetensors"),
    "intermediate state": (0, "dog-step00000001-state"),
    "random state of the other": (1, "random_states_1.pkl"),
    "final file": (0, "dog.safetensors"),
    "final state": (0, "dog-state"),
}


# --- what each process does ---


@contextmanager
def failing(part, spare):
    """Neither a rename to that name nor a ``torch.save`` under it works outside of ``spare``."""
    replace, save = os.replace, torch.save

    def refuse(path):
        if part in Path(path).name and not Path(path).is_relative_to(spare):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def no_replace(source, target):
        refuse(target)
        replace(source, target)

    def no_save(content, path, *values, **settings):
        if "step00000001" in str(path):
            refuse(path)
        save(content, path, *values, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlm_plugin.files.os.replace", no_replace)
        patch.setattr("accelerate.checkpointing.torch.save", no_save)
        yield


@contextmanager
def process_group(store, rank):
    from accelerate.state import AcceleratorState

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    torch.distributed.barrier()
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def lost_run(folder, rank):
    """Rank 1 is killed in the second step."""
    from mlm_plugin.cli import train_main
    from mlm_plugin.training.trainer import Trainer

    step = Trainer._train_step

    def killed(trainer, *values, **settings):
        if rank == 1 and trainer.progress.current_step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer, *values, **settings)

    Trainer._train_step = killed
    with process_group(folder / "lost.store", rank):
        code = train_main(json.loads((folder / "lost.json").read_text()))
    os._exit(code)  # without waiting for the other one


def program():
    from mlm_plugin.cli import train_main

    torch.set_num_threads(1)
    if sys.argv[2:] == ["lost"]:
        lost_run(Path(sys.argv[1]), int(os.environ["RANK"]))
    folder, rank, codes = Path(sys.argv[1]), int(os.environ["RANK"]), {}
    spare = folder / "temporary"
    tempfile.tempdir = str(spare)
    for name, arguments in json.loads((folder / "runs.json").read_text()).items():
        at, part = FAILS.get(name, (None, ""))
        with process_group(folder / f"{name}.store", rank):
            if at == rank:
                with failing(part, spare):
                    codes[name] = train_main(arguments)
            else:
                codes[name] = train_main(arguments)
    (folder / f"rank{rank}.json").write_text(json.dumps(codes))


# --- the tests ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def flags(toy_folder, toy_pictures):
    return [
        *("--pretrained_model_name_or_path", str(toy_folder)),
        *("--train_data_dir", str(toy_pictures), "--method", "textual_inversion"),
        *("--resolution", "64", "--max_train_steps", "2", "--seed", "1", "--output_name", "dog"),
        *("--max_data_loader_n_workers", "0", "--mlm_loss_weight", "0"),
    ]


@pytest.fixture(scope="module")
def environment():
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def printed(folder, flags, environment):
    """All runs by two processes, and their output."""
    (folder / "temporary").mkdir()
    flags = [*flags, "--save_every_n_steps", "1", "--save_state"]
    runs = {name: [*flags, "--output_dir", str(folder / name)] for name in FAILS}
    (folder / "runs.json").write_text(json.dumps(runs))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
            *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
            *("--dynamo_backend", "no", "--main_process_port", free_port()),
            *(__file__, str(folder)),
        ],
        timeout=300,  # a process that waits for the other one would wait for a day
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def codes(folder, printed):
    """Exit codes of both processes, by run."""
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2))
    return {name: (first[name], second[name]) for name in FAILS}


@pytest.mark.parametrize("name", FAILS)
def test_both_processes_end_alike(codes, folder, name):
    assert codes[name] == ((1, 1) if name.startswith("final") else (0, 0))
    names = sorted(path.name for path in (folder / name).iterdir())
    assert not [n for n in names if n.startswith(".")]
    kept = {"dog-state", "dog-step00000001-state"} - {FAILS[name][1]}
    if name.startswith("random"):
        kept -= {"dog-step00000001-state"}
    assert kept == {n for n in names if n.endswith("-state")}
    for state in kept:
        found = {path.name for path in (folder / name / state).iterdir()}
        assert {"random_states_0.pkl", "random_states_1.pkl", "model.safetensors"} <= found


def test_nothing_is_lost(folder, printed):
    assert len(list(folder.glob("temporary/mlm_plugin-*/rescued.safetensors"))) == 1
    for file in folder.glob("temporary/mlm_plugin-*/rescued.safetensors"):
        assert load_file(file)
    (state,) = folder.glob("temporary/mlm_plugin-*/rescued-state")
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= {p.name for p in state.iterdir()}


def test_it_is_said_once_and_without_a_traceback(printed):
    assert "Traceback" not in printed
    assert printed.count("training continues") == 3
    assert printed.count("error: ") == 2
    assert printed.count("in a temporary folder: move it now") == 2


def test_a_process_that_is_killed_does_not_take_the_weights_with_it(folder, flags, environment):
    """Without the launcher, which would end the other one too."""
    out = folder / "lost"
    (folder / "lost.json").write_text(json.dumps([*flags, "--output_dir", str(out)]))
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), "lost"],
            env=environment | common | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    text, _ = processes[0].communicate(timeout=120)
    assert processes[1].wait(timeout=120) == -signal.SIGKILL
    assert processes[0].returncode == 1
    assert "Traceback" not in text
    assert "another process of this run has ended" in text
    assert load_file(out / "dog-step00000001.safetensors")


if __name__ == "__main__":
    program()
