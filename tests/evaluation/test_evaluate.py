"""`mlm-plugin evaluate` as a user runs it: files, resume, refusals, comparison, the page."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mlm_plugin.commands.evaluate import run_evaluate
from mlm_plugin.contextualizer_file import digest_of
from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.options import parse_evaluate
from mlm_plugin.evaluation.text_encoders import existing_contextualizer
from mlm_plugin.files import cache_dir
from mlm_plugin.models.checkpoints import load_stable_diffusion

NASTY = "<script>alert('x')</script> & \"quoted\""


@pytest.fixture
def arguments(toy_folder, toy_pictures, tiny_clip, tiny_dino, toy_contextualizer, tmp_path):
    """Flags of a short evaluation; later flags take precedence."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a {} on the beach\na {} wearing a red hat\n<b>a</b> {} & co\n")
    return [
        *("--pretrained_model_name_or_path", str(toy_folder)),
        *("--train_data_dir", str(toy_pictures)),
        *("--class_token", "dog"),
        *("--prompts", str(prompts)),
        *("--num_images_per_prompt", "2"),
        *("--steps", "2"),
        *("--clip_model", str(tiny_clip)),
        *("--dino_model", str(tiny_dino)),
        *("--mlm_contextualizer", str(toy_contextualizer)),
        *("--output", str(tmp_path / "out")),
    ]


def evaluate(*argv):
    assert run_evaluate(parse_evaluate(argv)) == 0


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def pixels_of(folder):
    return {path.name: np.asarray(Image.open(path)) for path in (folder / "pictures").iterdir()}


def test_every_number_is_in_the_files_and_the_page_is_self_contained(
    arguments, tmp_path, capsys, page_of
):
    evaluate(*arguments, "--label", NASTY)
    out = tmp_path / "out"
    results = results_of(out)
    assert set(results["measures"]) == {
        "clip_t", "clip_i", "dino", "diversity_clip", "diversity_dino"
    }  # fmt: skip
    for name, entry in results["measures"].items():
        column = [row["scores"][name] for row in results["prompts"]]
        assert entry["mean"] == pytest.approx(sum(column) / 3)
    row = results["prompts"][0]
    assert (row["prompt"], row["text"]) == ("a sks dog on the beach", "a dog on the beach")
    assert [entry["file"] for entry in row["pictures"]] == [
        f"pictures/000_0{j}.png" for j in (0, 1)
    ]
    assert len({entry["seed"] for r in results["prompts"] for entry in r["pictures"]}) == 6
    assert set(results["text"]["text_encoder"]["masked_words"]) == {"concept", "class", "random"}
    assert results["settings"]["seed"] == 0
    assert "torch" in results["versions"]
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["prompt"] for line in table] == [r["prompt"] for r in results["prompts"]]
    assert float(table[1]["dino"]) == pytest.approx(
        results["prompts"][1]["scores"]["dino"], abs=1e-6
    )
    page = page_of(out / "report.html")
    assert page.tags.count("img") == 5 + 6
    assert NASTY in page.text
    assert "<b>a</b>" in page.text
    assert "wrote" in capsys.readouterr().out


def test_a_stopped_drawing_continues_and_gives_the_same_pictures(arguments, tmp_path):
    evaluate(*arguments, "--batch_size", "1")
    out = tmp_path / "out"
    whole, first = pixels_of(out), results_of(out)
    kept = out / "pictures" / "000_00.png"
    marked = Image.new("RGB", (64, 64), "red")
    marked.save(kept)
    (out / "pictures" / "001_01.png").unlink()
    evaluate(*arguments, "--batch_size", "1")
    again = pixels_of(out)
    assert (again["000_00.png"] == np.asarray(marked)).all()  # existing pictures are kept
    assert (again["001_01.png"] == whole["001_01.png"]).all()
    assert results_of(out)["prompts"][1] == first["prompts"][1]


def test_more_pictures_of_a_prompt_may_follow_and_other_settings_may_not(arguments, tmp_path):
    evaluate(*arguments)
    whole = pixels_of(tmp_path / "out")
    evaluate(*arguments, "--num_images_per_prompt", "3", "--label", "more")
    more = pixels_of(tmp_path / "out")
    assert len(more) == 9
    assert all((more[name] == whole[name]).all() for name in whole)
    with pytest.raises(UserError, match="made with steps 2, not 3; choose another --output"):
        evaluate(*arguments, "--steps", "3")


def test_pictures_of_a_folder_are_those_of_its_weights(arguments, toy_folder, tmp_path):
    """The folder of a training may hold other weights when it is evaluated again."""
    trained, moved = tmp_path / "trained", tmp_path / "moved"
    shutil.copytree(toy_folder, trained)
    arguments += ["--num_images_per_prompt", "1"]
    evaluate(*arguments, "--checkpoint", str(trained))
    trained.rename(moved)
    evaluate(*arguments, "--checkpoint", str(moved))
    for part in ("unet", "text_encoder"):
        (file,) = (moved / part).glob("*.safetensors")
        before = load_file(file)
        name = min(before)
        save_file(before | {name: before[name] + 1e-3}, file, {"format": "pt"})
        with pytest.raises(UserError, match="pictures were made with checkpoint"):
            evaluate(*arguments, "--checkpoint", str(moved))
        save_file(before, file, {"format": "pt"})


def test_the_text_encoder_alone_needs_no_pictures_and_no_judges(arguments, tmp_path, page_of):
    evaluate(*arguments, "--text_only", "--clip_model", "none/there", "--train_data_dir", "none")
    out = tmp_path / "out"
    results = results_of(out)
    assert results["measures"] == {}
    assert results["text"]["text_encoder"]["drift"]["everyday"] == pytest.approx(0, abs=1e-6)
    assert not (out / "pictures").exists()
    page_of(out / "report.html")


@pytest.mark.parametrize("place", ["beside the file", "cache"])
@pytest.mark.parametrize("separator", ["+", ", "])
def test_the_contextualizer_that_a_run_was_trained_with_is_found(
    place, separator, arguments, toy_folder, toy_contextualizer, tmp_path, caplog, monkeypatch
):
    """`auto` takes it, though another one would fit too."""
    monkeypatch.setenv("MLM_PLUGIN_CACHE", str(tmp_path / "cache"))  # nothing of other tests
    folder = tmp_path / "trained" if place == "beside the file" else cache_dir() / "contextualizers"
    folder.mkdir(exist_ok=True, parents=True)
    own, other = folder / "own.safetensors", folder / "another.safetensors"
    shutil.copy(toy_contextualizer, own)
    with safe_open(own, framework="pt") as file:
        header = file.metadata()
    save_file({k: 2 * v for k, v in load_file(own).items()}, other, metadata=header)
    trained = tmp_path / "trained" / "dog.safetensors"
    trained.parent.mkdir(exist_ok=True)
    named = separator.join((digest_of(own), "0123456789abcdef"))
    save_file({"x": torch.ones(1)}, trained, metadata={"ss_mlm_contextualizer": named})
    options = parse_evaluate([*arguments, "--mlm_contextualizer", "auto"]).options
    base = load_stable_diffusion(toy_folder).text_encoders[0]
    found = existing_contextualizer(dataclasses.replace(options, lora=str(trained)), base)
    own.unlink()
    assert found == str(own)
    caplog.clear()
    found = existing_contextualizer(dataclasses.replace(options, lora=str(trained)), base)
    other.unlink()
    assert found == str(other)
    assert "0123456789abcdef" in caplog.text, "that it is another one is said"


def test_text_only_pretrains_nothing_where_the_model_brings_a_contextualizer(tmp_path, capsys):
    argv = ["--pretrained_model_name_or_path", "pocket", "--class_token", "dog", "--text_only"]
    evaluate(*argv, "--output", str(tmp_path))
    assert results_of(tmp_path)["text"]["text_encoder"]["masked_words"]
    assert "pretraining" not in capsys.readouterr().err


def test_a_missing_judge_is_found_before_anything_is_drawn(arguments, tmp_path):
    with pytest.raises(UserError, match="--dino_model nobody/none"):
        evaluate(*arguments, "--dino_model", "nobody/none")
    assert not (tmp_path / "out" / "pictures").exists()


def test_what_fails_before_it_draws_leaves_the_folder_free(arguments, tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        evaluate(*arguments, "--lora", str(tmp_path / "nothere.safetensors"))
    with pytest.raises(UserError, match="sampler 'nope' is not known"):
        evaluate(*arguments, "--sampler", "nope")
    evaluate(*arguments)


def test_a_photo_that_cannot_be_read_is_named_before_anything_is_drawn(
    arguments, toy_pictures, tmp_path
):
    photos = tmp_path / "photos"
    shutil.copytree(toy_pictures, photos)
    hidden = photos / ".ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "broken.png").write_bytes(b"x")
    evaluate(*arguments, "--train_data_dir", str(photos), "--output", str(tmp_path / "first"))
    (photos / "broken.png").write_bytes(b"x")
    with pytest.raises(UserError, match="^--train_data_dir: .*broken.png: "):
        evaluate(*arguments, "--train_data_dir", str(photos))
    assert not (tmp_path / "out" / "pictures").exists()


def test_text_only_does_not_replace_an_evaluation_with_pictures(arguments, tmp_path):
    evaluate(*arguments)
    with pytest.raises(UserError, match="^--text_only: .* holds an evaluation with pictures"):
        evaluate(*arguments, "--text_only")
    assert results_of(tmp_path / "out")["measures"]


def test_masks_of_no_photo_are_refused(arguments, tmp_path):
    (tmp_path / "masks").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "masks" / "other.png")
    with pytest.raises(UserError, match="no mask is named as a photo"):
        evaluate(*arguments, "--masks", str(tmp_path / "masks"))


def test_long_prompts_are_named_or_read_whole(arguments, tmp_path, capsys):
    prompts = tmp_path / "long.txt"
    prompts.write_text("a {} on the beach\n" + "a {} " + "red " * 90 + "\n")
    few = (*arguments, "--prompts", str(prompts), "--num_images_per_prompt", "1")
    evaluate(*few)
    assert "1 prompt(s) have more than 75 tokens and are cut" in capsys.readouterr().err
    evaluate(*few, "--max_token_length", "150", "--output", str(tmp_path / "whole"))
    assert "are cut" not in capsys.readouterr().err
    short, whole = pixels_of(tmp_path / "out"), pixels_of(tmp_path / "whole")
    assert (short["001_00.png"] != whole["001_00.png"]).any()


def test_masks_given_later_add_their_measures(arguments, toy_pictures, tmp_path):
    evaluate(*arguments)
    masks = tmp_path / "masks"
    masks.mkdir()
    half = np.zeros((64, 64), np.uint8)
    half[:, 20:] = 255
    for path in [*toy_pictures.rglob("*.png"), *(tmp_path / "out" / "pictures").iterdir()]:
        Image.fromarray(half).save(masks / path.name)
    evaluate(*arguments, "--masks", str(masks))
    assert {"dino_fg", "dino_bg"} <= results_of(tmp_path / "out")["measures"].keys()
    assert "6 pictures and 5 photos" in (tmp_path / "out" / "report.html").read_text()


def test_finished_evaluations_are_compared_prompt_by_prompt(arguments, tmp_path, page_of):
    evaluate(*arguments, "--label", NASTY)
    other = str(tmp_path / "other")
    evaluate(*arguments, "--output", other, "--scale", "2", "--label", "with MLM")
    both = tmp_path / "both"
    evaluate("--compare", str(tmp_path / "out"), other, "--output", str(both))
    found = json.loads((both / "comparison.json").read_text())
    runs = [results_of(tmp_path / "out"), results_of(tmp_path / "other")]
    change = found["differences_to_first"][0]["clip_t"]
    assert change["n"] == 3
    assert change["mean"] == pytest.approx(
        runs[1]["measures"]["clip_t"]["mean"] - runs[0]["measures"]["clip_t"]["mean"]
    )
    assert found["runs"][0]["values"]["dino"] == runs[0]["measures"]["dino"]["mean"]
    page = page_of(both / "report.html")
    assert page.tags.count("img") == 12
    assert NASTY in page.text


def test_what_cannot_be_compared_is_refused(arguments, tmp_path):
    evaluate(*arguments)
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="at least two"):
        evaluate("--compare", out, "--output", str(tmp_path / "both"))
    with pytest.raises(UserError, match="holds no results.json"):
        evaluate("--compare", out, str(tmp_path), "--output", str(tmp_path / "both"))
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "out", copy)
    results = results_of(copy)
    results["judges"]["CLIP"] = "another"
    (copy / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="different models of CLIP"):
        evaluate("--compare", out, str(copy), "--output", str(tmp_path / "both"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", ""], "--output"),
        (["--class_token", ""], "--class_token is missing"),
        (["--stepz", "3"], "--stepz"),
        (["--steps", "0"], "--steps = 0"),
        (["--steps", "1000"], "--steps 1000: at most 999"),
        (["--clip_skip", "0"], "--clip_skip = 0"),
        (["--max_token_length", "100"], "--max_token_length 100: must be 75, 150 or 225"),
        (["--lora_weight", "0.5"], "--lora_weight has no effect without --lora"),
        (["--compare", "a", "b"], "--pretrained_model_name_or_path has no effect with --compare"),
        (["--resolution", "100"], "multiple of 8"),
        (["--precision", "fp8"], "fp8"),
        (["--xti", "a", "--embedding", "b"], "--xti and --embedding"),
        (["--embedding", "b", "--placeholder_token", ""], "--placeholder_token is empty"),
    ],
)
def test_bad_flags_are_one_line(flags, message):
    complete = ["--pretrained_model_name_or_path", "m", "--class_token", "dog",
                "--train_data_dir", "d", "--output", "o"]  # fmt: skip
    with pytest.raises(UserError, match=message):
        parse_evaluate([*complete, *flags])


def test_the_report_shows_in_a_browser(arguments, screenshot_of, tmp_path):
    evaluate(*arguments)
    pixels = screenshot_of(tmp_path / "out" / "report.html")
    strong = pixels.max(axis=-1) - pixels.min(axis=-1) > 60  # coloured: pictures
    assert strong.mean() > 0.05
    assert (abs(pixels - pixels[5, 5]).max(axis=-1) > 150).mean() > 0.005, "ink: there is text"
