"""`mlm-plugin compare` as a user runs it: trials, continuation, refusals, the pages."""

import csv
import json
import re
import shutil
import signal
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from mlm_plugin.cli import main
from mlm_plugin.commands.train import train
from mlm_plugin.compare import run as compare_run
from mlm_plugin.compare import trials
from mlm_plugin.compare.plan import read_plan
from mlm_plugin.compare.subjects import find_subjects
from mlm_plugin.compare.trials import DrawAtSteps, checked_trials
from mlm_plugin.config.loading import load_config
from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.rendering import embed_picture

STEPS = "evaluation_steps = [0, 1, 2]"
PLAN = """
evaluation_steps = [0, 1, 2]
seeds = [0]
prompts = "{prompts}"
blind_pairs = 4

[drawing]
steps = 1

[common]
resolution = "64"
train_batch_size = 1
network_train_text_encoder_only = true
network_dim = 2
network_alpha = 2
learning_rate = 1e-2
cache_latents = true
max_data_loader_n_workers = 0
mlm_loss_weight = 0
optimizer_type = "AdamW"

[[arms]]
name = "plain"

[[arms]]
name = "with <MLM>"
mlm_loss_weight = 0.1
mlm_target = "class"
mlm_contextualizer = "{contextualizer}"
"""


class Workplace:
    """A folder with plan, subjects and results; ``run`` is the command."""

    def __init__(self, folder, flags):
        self.folder, self.flags = folder, flags
        self.plan, self.out = folder / "plan.toml", folder / "out"

    def run(self, *more):
        return main(["compare", *self.flags, "--subjects", str(self.folder / "subjects"),
                     "--plan", str(self.plan), "--output", str(self.out), *more])  # fmt: skip

    def change(self, old, new):
        text = self.plan.read_text(encoding="utf-8")
        assert old in text
        self.plan.write_text(text.replace(old, new), encoding="utf-8")

    @property
    def trials(self):
        return sorted(path.name for path in (self.out / "trials").iterdir())

    def trial(self, start):
        (path,) = (self.out / "trials").glob(f"{start}-0-*")
        return path

    @property
    def results(self):
        return json.loads((self.out / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def flags(toy_folder, tiny_clip, tiny_dino):
    return ["--pretrained_model_name_or_path", str(toy_folder), "--clip_model", str(tiny_clip),
            "--dino_model", str(tiny_dino)]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, flags, toy_pictures, toy_contextualizer):
    """Two arms on two subjects, one in kohya's layout and one as plain photos, all done."""
    folder = tmp_path_factory.mktemp("compare")
    (photos,) = (path for path in toy_pictures.iterdir() if path.is_dir())
    shutil.copytree(photos, folder / "subjects" / "dog" / "10_sks dog")
    shutil.copytree(photos, folder / "subjects" / "cat", ignore=shutil.ignore_patterns("*.txt"))
    (folder / "subjects" / "cat" / "subject.toml").write_text('class_token = "cat"\n')
    prompts = folder / "prompts.txt"
    prompts.write_text("a {} on the beach\n<b>a</b> {} & co\n")
    (folder / "plan.toml").write_text(
        PLAN.format(prompts=prompts.as_posix(), contextualizer=toy_contextualizer.as_posix())
    )
    place = Workplace(folder, flags)
    assert place.run() == 0
    return place


@pytest.fixture
def place(finished, tmp_path):
    """A copy of the finished comparison, to change."""
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    return Workplace(tmp_path, finished.flags)


@pytest.fixture
def trained(monkeypatch):
    """Titles of the trials that are trained; ``stop_at`` ends the process before one."""

    class Trained(list):
        stop_at = None

    titles, real = Trained(), compare_run.train_trial

    def train_trial(trial):
        if len(titles) == titles.stop_at:
            raise KeyboardInterrupt
        titles.append(trial.title)
        real(trial)

    monkeypatch.setattr(compare_run, "train_trial", train_trial)
    return titles


@pytest.fixture
def interrupted_at(monkeypatch):
    """``with interrupted_at(step):`` Ctrl-C while its pictures are drawn; yields the steps done."""
    real = DrawAtSteps.on_step_end

    @contextmanager
    def interrupted(step):
        steps = []

        def on_step_end(self, trainer, result):
            real(self, trainer, result)
            steps.append(trainer.progress.current_step)
            if steps[-1] == step:
                signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(DrawAtSteps, "on_step_end", on_step_end)
            yield steps

    return interrupted


def test_every_trial_has_its_pictures_its_file_and_its_scores(finished):
    assert [name.rpartition("-")[0] for name in finished.trials] == [
        "plain-cat-0", "plain-dog-0", "with_MLM_-cat-0", "with_MLM_-dog-0"
    ]  # fmt: skip
    for name in finished.trials:
        trial = finished.out / "trials" / name
        assert len(list(trial.glob("step00000[12]/pictures/00[01]_00.png"))) == 4
        assert (trial / "last.safetensors").is_file()
    records = finished.results["records"]
    assert [(r["arm"], r["subject"], r["step"]) for r in records] == [
        (arm, subject, step)
        for subject in ("cat", "dog") for arm in ("plain", "with <MLM>") for step in (0, 1, 2)
    ]  # fmt: skip
    assert all({"clip_t", "clip_i", "dino"} <= record["measures"].keys() for record in records)
    assert finished.results["summary"]["differences_to_first"]["with <MLM>"]["dino"]["n"] == 2


def test_the_untrained_model_is_drawn_once_for_all_arms(finished):
    folders = sorted(
        path.name.rpartition("-")[0] for path in (finished.out / "untrained").iterdir()
    )
    assert folders == ["cat-0", "dog-0"]
    at_start = {
        (r["subject"], r["arm"]): r["measures"]
        for r in finished.results["records"]
        if r["step"] == 0
    }
    for subject in ("cat", "dog"):
        assert at_start[subject, "plain"] == at_start[subject, "with <MLM>"]
    found = finished.results["summary"]["text_at_equal_likeness"]["with <MLM>"]
    assert found["n"] == 2


def test_arms_that_start_from_other_models_draw_their_own(place, capsys):
    shutil.rmtree(place.out)
    for line in ("clip_skip = 2", 'network_args = ["conv_dim=4"]', 'method = "pivotal"'):
        text = place.plan.read_text(encoding="utf-8")
        place.plan.write_text(f"{text}{line}\n", encoding="utf-8")  # in the last arm
        code = place.run("--check")
        printed = capsys.readouterr()
        assert code == 0, printed.err
        assert "8 steps, 24 pictures" in printed.out
        place.plan.write_text(text, encoding="utf-8")
    assert place.run("--check") == 0
    assert "8 steps, 20 pictures" in capsys.readouterr().out


def test_a_trial_is_done_again_when_a_file_of_its_arm_has_changed(place):
    contexts = place.folder / "contexts.txt"

    def checked(text):
        contexts.write_text(f"{text}\n", encoding="utf-8")
        subjects = find_subjects(place.folder / "subjects")
        return checked_trials(
            read_plan(str(place.plan)), subjects, model=place.flags[1], output=place.out
        )

    line = f'mlm_prompt_set = "{contexts.as_posix()}"'
    place.plan.write_text(f"{place.plan.read_text(encoding='utf-8')}{line}\n", encoding="utf-8")
    before, after = checked("{} on the beach"), checked("{} in the rain")
    pairs = list(zip(before, after, strict=True))
    assert [old.folder == new.folder for old, new in pairs] == [True, False] * 2
    assert all(old.untrained == new.untrained for old, new in pairs)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('network_args = ["conv_dmi=4"]', "did you mean conv_dim"),
        ('lr_scheduler = "cosinus"', "cosinus"),
        ('mlm_prompt_set = "missing.txt"', "missing.txt"),
    ],
)
def test_what_an_arm_would_be_refused_for_is_found_before_the_first_trial(
    place, line, named, capsys
):
    place.plan.write_text(f"{place.plan.read_text(encoding='utf-8')}{line}\n", encoding="utf-8")
    assert place.run("--check") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "arm 'with <MLM>', subject 'cat'" in message
    assert named in message


@pytest.mark.usefixtures("_fresh_accelerator")
def test_drawing_leaves_no_trace_in_the_training(finished, toy_folder, tmp_path):
    flags = {"pretrained_model_name_or_path": toy_folder, "output_dir": tmp_path, "seed": 0,
             "train_data_dir": finished.folder / "subjects" / "dog", "max_train_steps": 2,
             "resolution": 64, "network_dim": 2, "network_alpha": 2, "learning_rate": 1e-2,
             "max_data_loader_n_workers": 0, "mlm_loss_weight": 0,
             "optimizer_type": "AdamW"}  # fmt: skip
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    argv += ["--cache_latents", "--network_train_text_encoder_only"]
    assert train(load_config(argv)) == 0
    plain = load_file(finished.trial("plain-dog") / "last.safetensors")
    alone = load_file(tmp_path / "last.safetensors")
    assert plain.keys() == alone.keys()
    assert all((plain[name] == alone[name]).all() for name in plain)
    assert any(tensor.any() for name, tensor in plain.items() if "lora_up" in name)


def test_the_last_evaluation_is_what_evaluate_draws_from_the_file(finished, tmp_path):
    trial = finished.trial("with_MLM_-dog")
    argv = ["evaluate", *finished.flags, "--lora", str(trial / "last.safetensors"),
            "--class_token", "dog", "--train_data_dir", str(finished.folder / "subjects" / "dog"),
            "--prompts", str(finished.folder / "prompts.txt"), "--num_images_per_prompt", "1",
            "--steps", "1", "--mlm_contextualizer", "none", "--output", str(tmp_path)]  # fmt: skip
    assert main(argv) == 0
    for name in ("000_00.png", "001_00.png"):
        ours = np.asarray(Image.open(trial / "step000002" / "pictures" / name)).astype(int)
        theirs = np.asarray(Image.open(tmp_path / "pictures" / name))
        assert abs(ours - theirs).max() <= 1
    assert finished.results["records"][-1]["measures"]["clip_t"] == pytest.approx(
        json.loads((tmp_path / "results.json").read_text())["measures"]["clip_t"]["mean"], abs=1e-4
    )


def test_what_is_done_is_not_done_again(place, trained, capsys):
    (place.out / "report.html").unlink()
    assert place.run() == 0
    assert trained == []
    assert "4 trials are done" in capsys.readouterr().out
    assert (place.out / "report.html").is_file()


def test_a_comparison_killed_between_trials_continues(place, finished, trained, interrupted_at):
    shutil.rmtree(place.trial("plain-dog"))
    half = place.trial("with_MLM_-dog")  # as a kill within a trial leaves it
    (half / "trial.json").unlink()
    stale = half / "step000001" / "pictures" / "000_00.png"
    shutil.copy(half / "step000001" / "pictures" / "001_00.png", stale)
    with interrupted_at(2):  # the last evaluation
        assert place.run() == 130
    assert trained == ["plain, dog, seed 0"]
    assert place.run() == 0
    assert trained[1:] == ["with <MLM>, dog, seed 0"]
    assert stale.read_bytes() == (finished.out / stale.relative_to(place.out)).read_bytes()
    assert place.results["records"] == finished.results["records"]
    assert (place.out / "key.csv").read_text() == (finished.out / "key.csv").read_text()


def test_a_signal_within_a_trial_saves_its_state_to_continue_from(
    place, finished, interrupted_at, capsys
):
    name = place.trial("plain-dog")
    shutil.rmtree(name)
    with interrupted_at(1):
        assert place.run() == 130
    err = capsys.readouterr().err
    assert "stopped; the same command continues" in err
    assert "--resume" not in err
    assert re.search(r"training: .* 1/2", err)
    assert list(name.glob("*-state"))
    with interrupted_at(None) as steps:
        assert place.run() == 0
    assert steps == [2], "it did not start again"
    assert not list(name.glob("*-state"))
    whole = load_file(finished.trial("plain-dog") / "last.safetensors")
    continued = load_file(name / "last.safetensors")
    assert all((whole[key] == continued[key]).all() for key in whole)


def test_an_evaluation_that_failed_is_finished_before_the_training_goes_on(
    place, finished, capsys, monkeypatch
):
    name = place.trial("plain-dog")
    shutil.rmtree(name)
    real, drawn = trials.draw_pictures, []

    def draw_pictures(folder, *args, **kwargs):
        drawn.append(folder.name)
        if drawn.count("step000001") == 1:
            raise UserError("no room on the card")
        return real(folder, *args, **kwargs)

    monkeypatch.setattr(trials, "draw_pictures", draw_pictures)
    assert place.run() == 2
    assert "no room on the card" in capsys.readouterr().err
    assert place.run() == 0
    pictures = sorted(path.relative_to(name) for path in name.glob("step*/pictures/*.png"))
    as_ever = finished.trial("plain-dog")
    assert pictures == sorted(
        path.relative_to(as_ever) for path in as_ever.glob("step*/pictures/*.png")
    )
    assert place.results["records"] == finished.results["records"]


def test_a_changed_arm_has_its_trials_made_again_and_the_others_stay(place, trained):
    before = place.trials
    shutil.rmtree(place.folder / "subjects" / "cat")
    place.change("mlm_loss_weight = 0.1", "mlm_loss_weight = 0.2")
    assert place.run() == 0
    assert trained == ["with <MLM>, dog, seed 0"]
    assert set(before) < set(place.trials), "old trials are kept"
    place.change("mlm_loss_weight = 0.2", "mlm_loss_weight = 0.1")
    assert place.run() == 0
    assert len(trained) == 1, "and found again"


def test_changed_photos_make_a_new_trial(place, trained):
    shutil.rmtree(place.folder / "subjects" / "cat")
    (folder,) = (place.folder / "subjects" / "dog").iterdir()
    (folder / "0.png").unlink()
    trained.stop_at = 0
    assert place.run() == 130
    assert trained == []


def test_other_judges_score_the_same_pictures(place, trained):
    assert place.run("--dino_model", "none") == 0
    assert trained == []
    assert "dino" not in place.results["records"][0]["measures"]


def test_check_says_how_much_there_is_to_do_and_trains_nothing(place, trained, capsys):
    shutil.rmtree(place.out)
    place.change("seeds = [0]", "seeds = [0, 1]")
    assert place.run("--check") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("8 trials (arms: 2, seeds: 2, subjects: 2), 16 steps, 40 pictures; 0 ")
    assert trained == []
    assert not (place.out / "trials").exists()


# --- the pages ------------------------------------------------------------------------------


def test_the_report_shows_curves_differences_pictures_and_settings(finished, page_of):
    report = finished.out / "report.html"
    page = page_of(report)
    text = report.read_text(encoding="utf-8")
    assert page.tags.count("img") == 2 * (5 + 2 * 2), "photos, and a picture per prompt and arm"
    assert text.count('<g class="curve">') == 2 + 2 * 3, "means, then also two subjects"
    assert "with <MLM>" in page.text
    assert "<b>a</b>" in page.text
    assert "Text at equal likeness" in page.text
    assert "p 0.500" in page.text or "p 1.000" in page.text, "two subjects cannot tell more"
    assert "mlm_contextualizer" in page.text
    assert "prefers-color-scheme: dark" in text


def test_the_key_names_the_pictures_of_the_sheet(finished, page_of):
    page = page_of(finished.out / "blind.html")
    assert not re.search(r"plain|MLM", page.text), "the sheet does not tell"
    with (finished.out / "key.csv").open(encoding="utf-8", newline="") as file:
        key = list(csv.DictReader(file))
    assert [line["pair"] for line in key] == ["1", "2", "3", "4"]
    assert {line["A"] for line in key} == {"plain", "with <MLM>"}, "sides are mixed"
    pictures = [page.addresses[start : start + 3] for start in range(0, 12, 3)]
    for line, (left, right, _) in zip(key, pictures, strict=True):
        assert {line["A"], line["B"]} == {"plain", "with <MLM>"}
        for side, uri in (("A", left), ("B", right)):
            file = finished.out / line[f"{side}_file"]
            assert embed_picture(file).uri == uri
            trial = json.loads((file.parents[2] / "trial.json").read_text(encoding="utf-8"))
            assert trial["trial"] == f"{line[side]}, {line['subject']}, seed {line['seed']}"
            prompt = ("on the beach", "& co")[int(file.name[:3])]
            assert line["prompt"].endswith(prompt)


@pytest.mark.parametrize("name", ["report.html", "blind.html"])
def test_a_page_shows_in_a_browser(finished, screenshot_of, name):
    pixels = screenshot_of(finished.out / name)
    assert (abs(pixels - pixels[5, 5]).max(axis=-1) > 150).mean() > 0.005, "ink: there is text"


# --- refusals -------------------------------------------------------------------------------


def refused(place, capsys, *more):
    capsys.readouterr()
    assert place.run(*more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (STEPS, "evaluation_steps = [2, 1]", "evaluation_steps = .*rising list of steps"),
        (STEPS, "", "evaluation_steps is missing"),
        ("seeds = [0]", "seeds = 0", "seeds = 0 is not allowed; it must be a list"),
        ("seeds = [0]", "sedes = [0]", "unknown key 'sedes'; did you mean seeds?"),
        ("steps = 1", "steps = 0", r"\[drawing\]: steps = 0"),
        ("steps = 1", 'sampler = "best"', "sampler = 'best': expected one of ddim"),
        ("network_dim = 2", "network_dmi = 2", "arm 'plain': unknown key 'network_dmi'"),
        ("mlm_loss_weight = 0.1", "mlm_loss_weight = -1", "arm 'with <MLM>': mlm_loss_weight"),
        ("mlm_loss_weight = 0.1", "network_train_unet_only = true\nmlm_loss_weight = 1",
         "arm 'with <MLM>', subject 'cat'"),
        ("network_dim = 2", "network_dim = 2\nseed = 3", "seed cannot be set: seeds names it"),
        ("network_dim = 2", "max_train_steps = 3", "the last of evaluation_steps sets the length"),
        ('name = "plain"', 'name = "with <MLM>"', "two arms are named 'with <MLM>'"),
        ('name = "plain"', "", "arm 1: name is missing"),
        ('name = "plain"', 'name = "plain"\nmixed_precision = "bf16"', "mixed_precision differs"),
        ("[common]", "[common", "is not valid TOML"),
    ],
)  # fmt: skip
def test_a_wrong_plan_is_one_line_and_nothing_is_trained(place, capsys, old, new, message):
    shutil.rmtree(place.out)
    place.change(old, new)
    assert re.search(message, refused(place, capsys))
    assert not (place.out / "trials").exists()


def test_wrong_subjects_are_one_line(place, capsys):
    subjects = place.folder / "subjects"
    assert "there is no such file; give a TOML file, or one of sd15, sdxl" in refused(
        place, capsys, "--plan", "none"
    )
    assert "is the folder of one subject" in refused(
        place, capsys, "--subjects", str(subjects / "dog")
    )
    assert "is the folder of one subject" in refused(
        place, capsys, "--subjects", str(subjects / "cat")
    )
    assert "no such folder" in refused(place, capsys, "--subjects", str(subjects / "bird"))
    (subjects / "cat" / "subject.toml").write_text('class = "cat"\n')
    assert "unknown key 'class'; did you mean class_token?" in refused(place, capsys)
    (subjects / "cat" / "subject.toml").unlink()
    assert "write subject.toml into it" in refused(place, capsys)
    shutil.rmtree(subjects / "cat")
    (subjects / "cat").mkdir()
    assert "holds neither photos nor a folder like '10_sks dog'" in refused(place, capsys)
    (subjects / "cat").rmdir()
    (subjects / "dog" / "1_zwx dog").mkdir()
    assert "its folders name 'sks dog', 'zwx dog'" in refused(place, capsys)
    (subjects / "dog" / "1_zwx dog").rmdir()
    no_judges = ("--clip_model", "none", "--dino_model", "none")
    assert "both 'none'" in refused(place, capsys, *no_judges)
    assert "--dino_model nobody/none" in refused(place, capsys, "--dino_model", "nobody/none")
