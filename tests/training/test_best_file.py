"""Files ranked by the context that they keep: on real runs of every method."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlm_plugin.cli import train_main
from mlm_plugin.config.methods import METHOD_CLASSES
from mlm_plugin.methods.lora import LoRAMethod
from mlm_plugin.setup.best_file import BestFile, ContextLost
from mlm_plugin.training.context_score import ContextReading, ScorePrompts
from mlm_plugin.training.trainer import Trainer


@pytest.fixture(autouse=True)
def _fresh(_fresh_accelerator):
    """A process trains once."""


@pytest.fixture
def run(toy_folder, toy_pictures, tmp_path):
    """Trains for a few steps with a save at each; the exit code."""

    def run(*flags, model=toy_folder, folder="out"):
        return train_main(
            [
                *("--pretrained_model_name_or_path", str(model)),
                *("--train_data_dir", str(toy_pictures)),
                *("--output_dir", str(tmp_path / folder), "--output_name", "dog"),
                *"--caption_extension .txt --resolution 64 --seed 1 --mlm_loss_weight 0".split(),
                *"--max_train_steps 4 --save_every_n_steps 1 --mlm_keep_best".split(),
                *"--max_data_loader_n_workers 0".split(),
                *flags,
            ]
        )

    return run


class Scripted:
    """A score that says what it is told."""

    def __init__(self, *kept):
        self.kept = iter(kept)

    def __call__(self):
        return ContextReading(1.0, next(self.kept))


def ranked(*kept, **options):
    ranking = BestFile(Scripted(*kept), **{"keep": True, "stop_below": None, **options})
    for number in range(len(kept)):
        ranking.measure(f"step{number}", number)
    return ranking


@pytest.mark.parametrize(
    ("kept", "best"),
    [
        ((0.99, 0.97, 0.96), "step2"),
        ((0.99, 0.97, 0.90), "step1"),
        ((0.99, 0.80, 0.96), "step2"),
        ((0.80, 0.90, 0.70), "step1"),
    ],
)
def test_the_best_is_the_last_that_reads_its_context(kept, best):
    ranking = ranked(*kept)
    assert ranking.best == best
    assert [name for name in ranking.kept if ranking.spares(name)] == [best]


def test_a_run_ends_where_its_context_is_lost():
    ranked(0.9, 0.8, stop_below=0.7).require_context()
    with pytest.raises(ContextLost, match="69% of the context is kept, mlm_stop_below is 70%"):
        ranked(0.9, 0.69, stop_below=0.7).require_context()
    assert not ranked(0.9, keep=False).spares("step0")


def test_prompts_hold_one_concept_and_are_the_same_in_every_run():
    texts = ["a sks dog here", "a zwx cat there", "sks dog and zwx cat"]
    drawn = [
        ScorePrompts.drawn(lambda rng: rng.choice(texts), ["sks dog", "zwx cat"]) for _ in range(2)
    ]
    assert drawn[0] == drawn[1]
    assert sorted(drawn[0].texts) == texts[:2]


@pytest.mark.parametrize("method", METHOD_CLASSES)
def test_every_method_is_scored_and_trains_the_same_weights(method, run, tmp_path, capsys):
    flags = ["--method", method, "--learning_rate", "1e-3"]
    assert run(*flags) == 0
    printed = capsys.readouterr()
    assert "best by its context: " in printed.out
    assert printed.err.count("of the context\n") == 4
    assert run(*flags, "--mlm_keep_best=false", folder="plain") == 0
    for path in (tmp_path / "plain").glob("*.safetensors"):
        ours, theirs = load_file(tmp_path / "out" / path.name), load_file(path)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_sdxl_with_a_frozen_text_encoder_and_cached_captions(run, toy_sdxl_folder, capsys):
    flags = ["--network_train_unet_only", "--cache_text_encoder_outputs", "--learning_rate=1e-3"]
    assert run(*flags, model=toy_sdxl_folder) == 0
    assert "best by its context: " in capsys.readouterr().out


@pytest.fixture
def own_pictures(toy_pictures, tmp_path):
    """The toy's pictures in a folder of another name, with captions of one's own."""

    def own(folder, caption=None):
        target = tmp_path / "data" / folder
        target.mkdir(parents=True)
        for path in toy_pictures.rglob("*.png"):
            shutil.copy(path, target)
            if caption:
                (target / path.name).with_suffix(".txt").write_text(caption)
        return ["--train_data_dir", str(tmp_path / "data"), "--save_every_n_steps", "6"]

    return own


PAGE_ALONE = ["--mlm_keep_best=false", "--max_train_steps", "12"]


def test_a_concept_without_a_class_word_is_scored(run, own_pictures, capsys):
    assert run(*own_pictures("5_sks"), *PAGE_ALONE) == 0
    assert "best by its context" in capsys.readouterr().out


def test_what_cannot_be_scored_costs_the_page_its_words_alone(run, own_pictures, capsys):
    far = f"{'a long caption ' * 40} sks dog"
    flags = [*own_pictures("5_sks dog", far), "--mlm_prompt_set", "captions"]
    assert run(*flags, *PAGE_ALONE) == 0
    printed = capsys.readouterr()
    assert "the page shows no words around the concept" in printed.err
    assert "page of the run" in printed.out
    assert run(*flags, "--mlm_keep_best", folder="asked") == 2
    assert "no prompt holds 'sks dog' within 75 tokens" in capsys.readouterr().err


def test_prompts_that_all_hold_two_concepts_are_named_as_such(run, own_pictures, capsys):
    own_pictures("5_sks dog", "sks dog next to zwx cat on the beach")
    flags = own_pictures("5_zwx cat", "sks dog next to zwx cat on the beach")
    flags += ["--caption_extension", ".txt", "--mlm_prompt_set", "captions", "--mlm_keep_best"]
    assert run(*flags) == 2
    message = capsys.readouterr().err
    assert "every prompt holds several concepts" in message
    assert "mlm_joint_share = 0.5" in message


def test_the_best_file_outlives_the_others(run, tmp_path):
    """The first file keeps most, as training at this rate destroys the context."""
    flags = ["--learning_rate", "1", "--save_last_n_steps", "1", "--max_train_steps", "5"]
    assert run(*flags) == 0
    names = {path.stem for path in (tmp_path / "out").glob("*.safetensors")}
    assert "dog-step00000001" in names
    assert "dog-step00000002" not in names


def test_a_run_that_lost_its_context_stops_with_a_state(run, tmp_path, capsys):
    assert run("--learning_rate", "1", "--mlm_stop_below", "0.9") == 0
    assert "of the context is kept, mlm_stop_below is 90%" in capsys.readouterr().err
    states = list((tmp_path / "out").glob("dog-step*-state"))
    assert len(states) == 1
    assert not (tmp_path / "out" / "dog.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--save_every_n_steps", "0"], "mlm_keep_best"),
        (["--mlm_stop_below", "2"], "mlm_stop_below = "),
    ],
)
def test_options_without_effect_are_refused_or_named(flags, part, run, capsys):
    run(*flags)
    assert part in capsys.readouterr().err


def test_the_score_is_1_before_training_and_falls_with_it(run, monkeypatch):
    readings = []
    measure = BestFile.measure

    def record(self, name, step):
        curves = measure(self, name, step)
        readings.append(self.files[name].reading)
        return curves

    monkeypatch.setattr(BestFile, "measure", record)
    assert run("--learning_rate", "1e-9") == 0
    assert all(min(reading) > 0.9999 for reading in readings)
    readings.clear()
    assert run("--learning_rate", "3e-1", folder="strong") == 0
    assert min(readings[-1]) < 0.95


def test_a_file_that_is_saved_again_is_the_last_and_is_there():
    ranking = BestFile(lambda: ContextReading(1.0, 1.0), keep=False, stop_below=None)
    ranking.recall({"dog": [4, 1.0, 1.0], "dog-step00000002": [2, 1.0, 1.0]})
    ranking.forget("dog")
    assert ranking.best == "dog-step00000002"
    ranking.measure("dog", 8)
    assert list(ranking.there) == ["dog-step00000002", "dog"]
    assert ranking.best == "dog"


def test_the_shares_of_all_files_are_in_the_curves(run, tmp_path):
    """The last file's too, which is saved when everything else has ended."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run("--logging_dir", str(tmp_path / "logs")) == 0
    (events,) = (tmp_path / "logs").rglob("events.out.tfevents.*")
    curves = EventAccumulator(str(events))
    curves.Reload()
    shares = curves.Scalars("context/cross_attention")
    assert [share.step for share in shares] == [1, 2, 3, 4]


@pytest.fixture
def full_disk(monkeypatch):
    """Files and states of the steps that are added to the set cannot be written."""
    steps = set()
    export, save_state = LoRAMethod.export, Trainer.save_state

    def refuse(name):
        if any(f"step{step:08d}" in name for step in steps):
            raise OSError(28, "No space left on device")

    def refusing_export(method, target):
        refuse(target.path.name)
        export(method, target)

    def refusing_save_state(trainer, folder):
        refuse(folder.name)
        save_state(trainer, folder)

    monkeypatch.setattr(LoRAMethod, "export", refusing_export)
    monkeypatch.setattr(Trainer, "save_state", refusing_save_state)
    return steps


def test_what_is_old_stays_where_nothing_newer_could_be_saved(run, full_disk, tmp_path, capsys):
    full_disk.add(3)
    flags = ["--save_last_n_steps", "1", "--save_state", "--mlm_keep_best=false"]
    assert run(*flags, "--learning_rate", "1e-9") == 0
    assert capsys.readouterr().err.count("could not be saved") == 2
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"dog-step00000001.safetensors", "dog-step00000001-state"} <= names


def test_a_file_that_could_not_be_saved_has_no_rank(run, full_disk, tmp_path, capsys):
    """The first file keeps most, but it is not there."""
    full_disk.add(1)
    assert run("--learning_rate", "1", "--max_train_steps", "5") == 0
    best = capsys.readouterr().out.rpartition("best by its context: ")[2].partition(", which")[0]
    assert "step00000001" not in best
    assert Path(best).exists()
