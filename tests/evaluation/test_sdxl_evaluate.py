"""`mlm-plugin evaluate` on SDXL: measures of both text encoders, resume, comparison, refusals."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mlm_plugin.commands.evaluate import run_evaluate
from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.options import parse_evaluate

ENCODERS = ("clip_l", "clip_g")


@pytest.fixture(scope="module")
def arguments(toy_sdxl_folder, toy_pictures, toy_sdxl_contextualizers, tmp_path_factory):
    """Flags of a short evaluation without judges; later flags take precedence."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a {} on the beach\na {} wearing a red hat\n")
    return [
        *("--pretrained_model_name_or_path", str(toy_sdxl_folder)),
        *("--train_data_dir", str(toy_pictures)),
        *("--class_token", "dog"),
        *("--prompts", str(prompts)),
        *("--num_images_per_prompt", "1"),
        *("--steps", "1"),
        *("--resolution", "64"),
        *("--clip_model", "none"),
        *("--dino_model", "none"),
        *("--mlm_contextualizer", toy_sdxl_contextualizers),
    ]


@pytest.fixture(scope="module")
def text_only(arguments, tmp_path_factory):
    """The folder of a finished evaluation of the text encoders alone."""
    out = tmp_path_factory.mktemp("evaluations") / "sdxl"
    evaluate(*arguments, "--text_only", "--output", str(out))
    return out


def evaluate(*argv):
    assert run_evaluate(parse_evaluate(argv)) == 0


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def lines_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_each_text_encoder_has_its_measures_in_every_file(text_only):
    results = results_of(text_only)
    assert results["model"] == {"family": "sdxl", "resolution": 64}
    assert tuple(results["text"]) == ENCODERS
    for name, groups in results["text"].items():
        assert set(groups["masked_words"]) == {"concept", "class", "random"}
        assert groups["drift"]["everyday"] == pytest.approx(0, abs=1e-6)
        assert groups["distances"]["inter"] > 0
        assert groups["embedding"]["norm"] > 0
        assert (groups["projected"] is not None) == (name == "clip_g")
        headline = results["text_headline"]
        assert headline[f"masked_loss_{name}"] == groups["masked_words"]["concept"]["loss"]
    assert results["text"]["clip_g"]["projected"]["drift"] == pytest.approx(0, abs=1e-6)
    words = [groups["masked_words"]["concept"] for groups in results["text"].values()]
    assert words[0]["num_masked"] == words[1]["num_masked"]
    assert words[0]["loss"] != words[1]["loss"]
    text = lines_of(text_only / "text.csv")
    assert tuple(line["text_encoder"] for line in text) == ENCODERS
    for line, groups in zip(text, results["text"].values(), strict=True):
        loss = groups["masked_words"]["concept"]["loss"]
        assert float(line["masked_words.concept.loss"]) == pytest.approx(loss, abs=1e-6)
    prompts = lines_of(text_only / "results.csv")
    for name in ENCODERS:
        column = [float(line[f"text_inter_{name}"]) for line in prompts]
        expected = results["text"][name]["distance_per_prompt"]
        assert column == pytest.approx(expected, abs=1e-6)


def test_the_report_names_both_text_encoders(text_only, page_of):
    text = page_of(text_only / "report.html").text
    for number, name in (("first", "clip_l"), ("second", "clip_g")):
        assert f"Masked words, {name}" in text
        assert f"{name}, the {number} text encoder" in text
    assert text.count("Pooled text: drift") == 1


def test_a_stopped_drawing_continues_and_gives_the_same_pictures(arguments, tmp_path, page_of):
    out = tmp_path / "out"
    evaluate(*arguments, "--mlm_contextualizer", "none", "--output", str(out))
    files = [out / "pictures" / f"00{i}_00.png" for i in (0, 1)]
    whole = [np.asarray(Image.open(file)) for file in files]
    assert whole[0].shape == (64, 64, 3)
    files[1].unlink()
    Image.new("RGB", (64, 64), "red").save(files[0])
    evaluate(*arguments, "--mlm_contextualizer", "none", "--output", str(out))
    assert (np.asarray(Image.open(files[0])) == (255, 0, 0)).all()  # existing pictures are kept
    assert (np.asarray(Image.open(files[1])) == whole[1]).all()
    assert results_of(out)["text"]["clip_l"]["masked_words"] is None
    assert page_of(out / "report.html").tags.count("img") == 5 + 2


def test_runs_of_sd_1_and_sdxl_are_in_separate_rows(
    text_only, arguments, toy_folder, toy_contextualizer, tmp_path, page_of, capsys
):
    sd1 = tmp_path / "sd1"
    model = ["--pretrained_model_name_or_path", str(toy_folder)]
    contextualizer = ["--mlm_contextualizer", str(toy_contextualizer)]
    evaluate(*arguments, *model, *contextualizer, "--text_only", "--output", str(sd1))
    same = tmp_path / "same"
    shutil.copytree(text_only, same)
    both, alike = tmp_path / "both", tmp_path / "alike"
    evaluate("--compare", str(text_only), str(same), "--output", str(alike))
    assert "different text encoders" not in capsys.readouterr().err
    evaluate("--compare", str(sd1), str(text_only), "--output", str(both))
    assert (
        "different text encoders (A: text_encoder; B: clip_l and clip_g)" in capsys.readouterr().err
    )
    values = [run["values"] for run in json.loads((both / "comparison.json").read_text())["runs"]]
    assert [run["masked_loss"] is None for run in values] == [False, True]
    assert [run["masked_loss_clip_g"] is None for run in values] == [True, False]
    assert "different text encoders" in page_of(both / "report.html").text
    assert "different text encoders" not in page_of(alike / "report.html").text


def test_contextualizers_that_do_not_fit_are_found_before_anything_is_drawn(
    arguments, toy_sdxl_contextualizers, tmp_path
):
    first, second = toy_sdxl_contextualizers.split(",")
    out = tmp_path / "out"
    for setting, message in (
        (first, r"names 1 file\(s\), needed: 2"),
        (f"{second},{first}", "was made for text encoder"),
        (f"{first},none.safetensors", "no such file: none.safetensors"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(*arguments, "--mlm_contextualizer", setting, "--output", str(out))
    assert not (out / "pictures").exists()


def test_a_contextualizer_may_be_left_out_for_one_text_encoder(
    arguments, toy_sdxl_contextualizers, tmp_path
):
    setting = f"none,{toy_sdxl_contextualizers.split(',')[1]}"
    flags = ["--text_only", "--mlm_contextualizer", setting, "--output", str(tmp_path)]
    evaluate(*arguments, *flags)
    found = {name: groups["masked_words"] for name, groups in results_of(tmp_path)["text"].items()}
    assert found["clip_l"] is None
    assert found["clip_g"]["concept"]["num_masked"] > 0


def test_the_report_shows_in_a_browser(text_only, screenshot_of):
    pixels = screenshot_of(text_only / "report.html")
    assert (abs(pixels - pixels[5, 5]).max(axis=-1) > 150).mean() > 0.005, "ink: there is text"
