"""`mlm-plugin evaluate` on a pocket model: scores by the oracle, if prompts have labels."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mlm_plugin.commands.evaluate import run_evaluate
from mlm_plugin.data.images import image_tensor
from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.options import parse_evaluate
from mlm_plugin.pocket.concepts import (
    find_concept,
    prompt_templates,
    training_scenes,
    write_concept,
)
from mlm_plugin.pocket.oracle import load_oracle
from mlm_plugin.pocket.scores import identity, prompt_fidelity
from mlm_plugin.pocket.shipped import pocket_model
from mlm_plugin.pocket.world import draw_scene, render

DOG = find_concept("sks dog")
PROMPTS = prompt_templates(DOG)
ORACLE = {"prompt_fidelity", "identity", "seen_subject", "seen_background", "seen_position",
          "seen_companion"}  # fmt: skip


@pytest.fixture(scope="module")
def pocket():
    return pocket_model()


@pytest.fixture
def data(tmp_path):
    """What `mlm-plugin pocket concept` writes."""
    write_concept(DOG, tmp_path / "dog")
    return tmp_path / "dog"


@pytest.fixture
def arguments(pocket, data, tmp_path):
    """Flags of a short evaluation; later flags take precedence."""
    return [
        *("--pretrained_model_name_or_path", str(pocket)),
        *("--train_data_dir", str(data / "train")),
        *("--class_token", "dog"),
        *("--prompts", str(data / "test_prompts.txt")),
        *("--num_images_per_prompt", "1"),
        *("--steps", "1"),
        *("--clip_model", "none"),
        *("--dino_model", "none"),
        *("--mlm_contextualizer", "none"),
        *("--output", str(tmp_path / "out")),
    ]


def evaluate(*argv):
    assert run_evaluate(parse_evaluate(argv)) == 0


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def put_pictures(folder, scenes):
    """As if the model had drawn these; existing pictures are not drawn again."""
    (folder / "pictures").mkdir(parents=True)
    for number, scene in enumerate(scenes):
        Image.fromarray(render(scene)).save(folder / "pictures" / f"{number:03d}_00.png")


def as_asked():
    rng = np.random.default_rng(0)
    return [
        replace(draw_scene(rng, held_out=None, **prompt.said), paint=DOG.scene.paint)
        for prompt in PROMPTS
    ]


def test_scores_are_those_of_the_oracle_on_what_was_asked(arguments, pocket, tmp_path):
    scenes = as_asked()
    put_pictures(tmp_path / "out", scenes)
    evaluate(*arguments)
    results = results_of(tmp_path / "out")
    assert set(results["measures"]) == ORACLE
    pixels = torch.stack([image_tensor(render(scene)) for scene in scenes])
    with torch.no_grad():
        predictions = load_oracle(pocket / "oracle.safetensors")(pixels)
    rows = [row["scores"] for row in results["prompts"]]
    for name, expected in (("prompt_fidelity", prompt_fidelity(predictions, PROMPTS)),
                           ("identity", identity(pixels, DOG))):  # fmt: skip
        assert [row[name] for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)
        assert results["measures"][name]["mean"] == pytest.approx(float(expected.mean()), abs=1e-5)
    asked = [index for index, prompt in enumerate(PROMPTS) if "background" in prompt.said]
    assert [i for i, row in enumerate(rows) if "seen_background" in row] == asked
    assert results["measures"]["seen_background"]["n"] == len(asked)
    assert results["measures"]["seen_background"]["mean"] > 0.9


def test_training_pictures_show_nothing_that_is_asked(arguments, tmp_path):
    put_pictures(tmp_path / "out", training_scenes(DOG, number=len(PROMPTS)))
    evaluate(*arguments)
    measures = results_of(tmp_path / "out")["measures"]
    assert measures["seen_background"]["mean"] == 0
    assert measures["prompt_fidelity"]["mean"] < 0.3  # the oracle errs on the rest


def test_csv_and_page_show_the_scores_and_how_they_were_taken(arguments, tmp_path, capsys):
    evaluate(*arguments)
    out = tmp_path / "out"
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert set(table[0]) >= ORACLE
    rows = results_of(out)["prompts"]
    for line, row in zip(table, rows, strict=True):
        assert float(line["identity"]) == pytest.approx(row["scores"]["identity"], abs=1e-6)
        assert (line["seen_companion"] == "") == ("seen_companion" not in row["scores"])
    page = (out / "report.html").read_text(encoding="utf-8")
    for text in ("Prompt fidelity", "Identity", "Background seen", "look of sks dog",
                 "The oracle on true pictures", "Fidelity and likeness"):  # fmt: skip
        assert text in page
    assert "Prompt fidelity" in capsys.readouterr().out


def test_a_comparison_shows_the_scores(arguments, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    put_pictures(out, training_scenes(DOG, number=len(PROMPTS)))
    put_pictures(other, as_asked())
    evaluate(*arguments)
    evaluate(*arguments, "--output", str(other), "--label", "as asked")
    evaluate("--compare", str(out), str(other), "--output", str(tmp_path / "both"))
    found = json.loads((tmp_path / "both" / "comparison.json").read_text())
    change = found["differences_to_first"][0]
    assert set(change) == ORACLE
    assert change["seen_background"]["mean"] > 0.9
    page = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    assert page.count("Prompt fidelity") >= 3
    results = results_of(other)
    results["judges"]["Oracle"] = "another"
    (other / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="different models of Oracle"):
        evaluate("--compare", str(out), str(other), "--output", str(tmp_path / "both"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: (data / "test_prompts.json").unlink(), "test_prompts.json that says what"),
        (lambda data: ["--resolution", "32"], "it reads pictures of 64 pixels, not of 32"),
    ],
    ids=["no labels", "another size"],
)
def test_without_what_it_needs_the_oracle_is_left_out_and_says_why(
    arguments, data, tmp_path, capsys, change, reason
):
    evaluate(*arguments, *(change(data) or []))
    results = results_of(tmp_path / "out")
    assert results["measures"] == {}
    assert reason in results["judges"]["Oracle left out"]
    warning = f"the oracle is left out: {results['judges']['Oracle left out']}\n"
    assert warning in capsys.readouterr().err


def test_a_prompt_without_labels_has_its_identity_alone(arguments, data, tmp_path):
    with (data / "test_prompts.txt").open("a") as file:
        file.write("a {} that sleeps\n")
    evaluate(*arguments)
    results = results_of(tmp_path / "out")
    assert set(results["prompts"][-1]["scores"]) == {"identity"}
    assert results["measures"]["identity"]["n"] == len(PROMPTS) + 1
    assert results["measures"]["prompt_fidelity"]["n"] == len(PROMPTS)
    assert results["judges"]["Prompts without labels"] == "1 of 25: identity alone"


def test_a_damaged_oracle_and_a_stranger_are_one_line_before_anything_is_drawn(
    arguments, pocket, data, tmp_path
):
    model = tmp_path / "model"
    shutil.copytree(pocket, model)
    shutil.copy(model / "vae" / "diffusion_pytorch_model.safetensors", model / "oracle.safetensors")
    with pytest.raises(UserError, match="is not an oracle of this world"):
        evaluate(*arguments, "--pretrained_model_name_or_path", str(model))
    labels = data / "test_prompts.json"
    labels.write_text(labels.read_text().replace("sks dog", "sks unicorn"))
    with pytest.raises(UserError, match="concept 'sks unicorn': unknown; choose one of: sks dog"):
        evaluate(*arguments)
    assert not (tmp_path / "out" / "pictures").exists()
