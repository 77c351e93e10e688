"""The page of a run: written by a real one, read as a browser does."""

import json
import re
from pathlib import Path

import pytest

from mlm_plugin.cli import train_main
from mlm_plugin.evaluation.run_page import MAX_COLUMNS, MAX_TILES, _evenly
from mlm_plugin.mlm.kept_context import kept_context, lost_by_token

PROMPTS = "a sks dog & <b>a cat</b> --w 64 --h 64 --s 2 --d 1\nsks dog --w 64 --h 64 --s 2 --d 2\n"


@pytest.fixture(autouse=True)
def _fresh(_fresh_accelerator):
    """A process trains once."""


@pytest.fixture
def run(toy_folder, toy_pictures, toy_contextualizer, tmp_path):
    """Trains and returns the page's path."""

    def run(*flags, code=0):
        (tmp_path / "prompts.txt").write_text(PROMPTS)
        command = [
            *("--pretrained_model_name_or_path", str(toy_folder)),
            *("--train_data_dir", str(toy_pictures), "--output_dir", str(tmp_path / "out")),
            *("--mlm_target", "class", "--mlm_contextualizer", str(toy_contextualizer)),
            *"--output_name dog --caption_extension .txt --resolution 64 --seed 1".split(),
            *"--learning_rate 1e-3 --max_train_steps 12 --save_every_n_steps 4".split(),
            *"--max_data_loader_n_workers 0".split(),
            *("--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "4"),
            *flags,
        ]
        assert train_main(command) == code
        return tmp_path / "out" / "dog.html"

    return run


def test_the_page_shows_curves_samples_sentences_files_and_settings(run, page_of, screenshot_of):
    path = run("--save_last_n_steps", "2")
    page = page_of(path)
    text = " ".join(page.text.split())
    assert "step 12 of 12" in text
    assert "a sks dog & <b>a cat</b>" in page.text, "text is escaped"
    assert page.tags.count("svg") == 4  # diffusion, term, drift, context
    assert "Drift: cosine" in text
    assert page.tags.count("img") == 2 * 3
    for part in ("dog-step00000004", "dog-step00000008", "learning_rate", "0.001", "torch"):
        assert part in text
    assert "save_last_n_steps = 2 is below save_every_n_steps" in text, "warnings of the start too"
    assert path.stat().st_size < 1_000_000
    screenshot_of(path)


def test_a_file_that_was_removed_is_not_recommended(run, page_of):
    path = run("--save_last_n_steps", "2", "--learning_rate", "1", "--mlm_loss_weight", "0")
    named = re.findall(r"Take (\S+?):? ", page_of(path).text)
    assert [(path.parent / f"{name}.safetensors").is_file() for name in named] == [True]


def test_a_plain_run_without_a_concept_has_a_page_too(run, page_of, toy_pictures, tmp_path):
    page = page_of(run("--mlm_loss_weight", "0", "--sample_every_n_steps", "0"))
    assert page.tags.count("svg") == 3  # diffusion, drift, context
    assert "img" not in page.tags


def test_the_loss_of_held_out_pictures_has_a_curve(run, page_of):
    plain = ("--mlm_loss_weight", "0", "--sample_every_n_steps", "0")
    page = page_of(run(*plain, "--validation_split", "0.2", "--validate_every_n_steps", "6"))
    assert page.tags.count("svg") == 4  # diffusion, validation, drift, context
    assert "Diffusion loss of 1 picture(s) that are not trained on" in " ".join(page.text.split())


def test_encoders_that_stay_as_they_are_have_no_drift(run, page_of):
    page = page_of(run("--network_train_unet_only", "--mlm_target", "states"))
    assert "Drift" not in page.text


def test_it_is_written_during_the_run_and_after_a_stop(run, page_of):
    path = run("--learning_rate", "1", "--mlm_stop_below", "0.99", "--mlm_loss_weight", "0")
    assert "step 4 of 12" in " ".join(page_of(path).text.split())


@pytest.mark.parametrize("flags", [["--no_mlm_page"], ["--max_train_steps", "9"]])
def test_there_is_no_page_where_none_is_due(run, flags):
    assert not run(*flags).exists()


def test_a_page_that_cannot_be_written_costs_a_warning(run, tmp_path, capsys):
    (tmp_path / "out" / "dog.html").mkdir(parents=True)
    run()
    printed = capsys.readouterr()
    assert "dog.html could not be saved" in printed.err
    assert "page of the run" not in printed.out
    assert (tmp_path / "out" / "dog.safetensors").is_file()


def test_the_words_of_a_sentence_are_those_of_the_prompt(run):
    page = Path(run("--save_every_n_steps", "6")).read_text()
    sentence = re.search(r'<p class="sentence">(.*?)</p>', page, re.S)[1]
    words = re.sub(r"<small>\d+</small>|<[^>]+>", " ", sentence).split()
    assert words.index("dog") == words.index("sks") + 1
    assert len(words) >= 4


def test_long_runs_are_thinned_out_evenly():
    steps = _evenly(range(1, 501), MAX_COLUMNS)
    assert (len(steps), steps[0], steps[-1]) == (MAX_COLUMNS, 1, 500)
    gaps = {b - a for a, b in zip(steps, steps[1:], strict=False)}
    assert max(gaps) - min(gaps) <= 1
    assert MAX_TILES // 40 <= MAX_COLUMNS
    assert _evenly([3, 5], 12) == [3, 5]


def test_what_tokens_lose_adds_up_to_what_is_lost():
    import torch

    generator = torch.Generator().manual_seed(0)
    g, noise = (torch.randn(50, 6, generator=generator, dtype=torch.double) for _ in range(2))
    h = g + 0.1 * noise
    variation = (g - g.mean(0)).square().sum(1)
    lost = (lost_by_token(h, g) * variation).sum() / variation.sum()
    assert 1 - lost.item() == pytest.approx(kept_context(h, g))


def measured(state):
    return json.loads((state / "measured.json").read_text())


@pytest.fixture
def resumable(run):
    """The folder of a straight run, and what starts it again from its first state."""
    flags = ("--save_state", "--sample_every_n_steps", "0", "--learning_rate", "0.1")
    flags += ("--validation_split", "0.2", "--validate_every_n_steps", "3")
    out = run(*flags).parent
    return out, lambda: run(*flags, "--resume", str(out / "dog-step00000004-state"))


def test_a_resumed_run_goes_on_with_its_curves_and_its_ranking(resumable):
    out, resume = resumable
    straight = measured(out / "dog-state")
    assert [step for step, _ in straight["PageLosses"]["diffusion"]] == list(range(1, 13))
    assert list(straight["Validator"]["losses"]) == ["3", "6", "9", "12"]
    assert len(straight["DriftWatch"]["te/drift_cos"]) == 12
    assert "dog-step00000004" in straight["Saver"]["files"]
    resume()
    assert measured(out / "dog-state") == straight


def test_a_resumed_run_shows_the_samples_of_before(run, page_of, capsys):
    out = run("--save_state").parent
    straight = page_of(out / "dog.html").tags.count("img")
    capsys.readouterr()
    resumed = run("--save_state", "--resume", str(out / "dog-step00000008-state"))
    assert page_of(resumed).tags.count("img") == straight
    assert "could not be saved" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[1]", '{"PageLosses": {"diffusion": 3}}', '{"Saver": 5}'])
def test_curves_that_are_damaged_begin_again(resumable, text, capsys):
    out, resume = resumable
    (out / "dog-step00000004-state" / "measured.json").write_text(text)
    resume()
    assert "measured" in capsys.readouterr().err
    assert [step for step, _ in measured(out / "dog-state")["PageLosses"]["diffusion"]][-1] == 12


def test_a_file_that_is_gone_is_not_ranked_again(resumable):
    out, resume = resumable
    (out / "dog-step00000004.safetensors").unlink()
    resume()
    assert list(measured(out / "dog-state")["Saver"]["files"]) == ["dog-step00000008", "dog"]
