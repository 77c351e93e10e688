"""`mlm-plugin pocket`: what the demo writes, and what is only in a checkout."""

import contextlib
import io
import re
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mlm_plugin.cli import main
from mlm_plugin.demo.command import run_pocket
from mlm_plugin.demo.run import DemoSettings, run_demo
from mlm_plugin.errors import UserError
from mlm_plugin.pocket.concepts import REPORTED, find_concept
from mlm_plugin.pocket.shipped import pocket_model
from mlm_plugin.pocket.text_to_image import Sampling
from mlm_plugin.training.step_bar import StepBar

SHORT = DemoSettings(num_train_steps=4, sampling=Sampling(num_steps=2, guidance=4.0))
LEARNED = ("without the term", "with the term")
TRAINED = ("without_term", "with_term")  # their folders


def demo(folder, concept=REPORTED[0]):
    return run_demo(concept, model=pocket_model(), output=folder, settings=SHORT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a short demo, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert demo(folder) == 0
    return folder, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def stopped_at(title, step):
    """Ctrl-C in this step of the training of this name."""
    on_step_end = StepBar.on_step_end

    def stop(bar, trainer, result):
        if bar.title.startswith(title) and trainer.progress.current_step == step:
            signal.raise_signal(signal.SIGINT)
        on_step_end(bar, trainer, result)

    StepBar.on_step_end = stop
    try:
        yield
    finally:
        StepBar.on_step_end = on_step_end


def test_it_writes_two_loras_and_two_pictures_and_says_where(finished):
    folder, out, _ = finished
    plain, mlm = (load_file(folder / name / "last.safetensors") for name in TRAINED)
    assert plain.keys() == mlm.keys()
    assert any(not torch.equal(plain[name], mlm[name]) for name in plain)
    for name in ("demo.png", "all_prompts.png"):
        with Image.open(folder / name) as picture:
            assert picture.width > 6 * 128
            assert len(set(picture.convert("L").getdata())) > 50
        assert (folder / name).stat().st_size < 300_000
    assert f"picture: {(folder / 'demo.png').resolve()}" in out


def test_it_prints_the_counts_of_both_trainings(finished):
    _, out, _ = finished
    assert re.search(r"Everything as asked: \d+ of 24 without the term, \d+ of 24 with it", out)
    for name in ("Background", "Position", "Companion", "Likeness"):
        assert re.search(rf"^{name} .*without, .*with it", out, re.MULTILINE)


def test_every_part_has_a_bar(finished):
    _, _, err = finished
    for title in ("before training", "before training, class word", *LEARNED):
        assert re.search(rf"{title}: 24 pictures: 100%", err)
    for title in LEARNED:
        assert re.search(rf"{title}: training: 100%.* 4/4", err)


def test_a_finished_demo_is_not_made_again(finished, capsys):
    folder, _, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert demo(folder) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert capsys.readouterr().out.count("done before") == 4


@pytest.mark.parametrize(
    ("title", "step"),
    [
        (LEARNED[0], 4),
        (LEARNED[1], 2),
        pytest.param(LEARNED[0], 2, marks=pytest.mark.slow),
        pytest.param(LEARNED[1], 4, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_demo_goes_on_and_ends_like_any_other(title, step, finished, tmp_path, capsys):
    with stopped_at(title, step):
        assert demo(tmp_path) == 130
    err = capsys.readouterr().err
    assert "the same command goes on from here" in err
    assert "--resume" not in err
    assert demo(tmp_path) == 0
    again = capsys.readouterr()
    assert again.out.count("done before") == 2 + LEARNED.index(title) + (step == 4)
    assert step == 4 or "50%" in again.err  # the bar starts where the training does
    for name in TRAINED:
        for file in ("last.safetensors", "pictures.safetensors"):
            found, expected = (
                load_file(tmp_path / name / file),
                load_file(finished[0] / name / file),
            )
            assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert list(tmp_path.glob("*/*-state")) == []


def test_a_folder_with_another_demo_is_refused(finished, refused):
    with refused(["concept 'sks dog', not 'ktn bird'", "choose another --output"]):
        demo(finished[0], find_concept("ktn bird"))


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["demo", "--output", "{}", "--model", "{}"], "no oracle.safetensors there"),
        (["demo"], "required: --output"),
        (["bake"], "bake"),
    ],
)
def test_bad_input_is_one_line(argv, named, tmp_path):
    with pytest.raises(UserError, match=named) as error:
        run_pocket([part.format(tmp_path) for part in argv])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("command", "module"), [("build", "research.pocket_model"), ("bench", "research.bench")]
)
def test_what_is_not_installed_says_what_to_run(command, module, capsys):
    assert main(["pocket", command, "--output", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"pocket {command}: not part of the installed package" in line
    assert f"python -m {module}`" in line
