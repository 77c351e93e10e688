"""`mlm-plugin sheet` as a user runs it: strengths, order, refusals, what is in the file."""

import importlib.util
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from mlm_plugin.cli import main
from mlm_plugin.config.options import NetworkOptions
from mlm_plugin.evaluation.evaluated_model import LearnedFiles, load_evaluated_model
from mlm_plugin.evaluation.generate import DrawingSettings, draw
from mlm_plugin.export.embedding_files import save_embedding
from mlm_plugin.export.lora_files import save_lora
from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.models.conditioning import encode_captions
from mlm_plugin.networks.create import create_network
from mlm_plugin.sheet.drawing import draw_columns
from mlm_plugin.sheet.options import parse_sheet
from mlm_plugin.sheet.picture import contact_sheet
from mlm_plugin.training.samples import (
    SampleFiles,
    SampleModels,
    SamplePrompt,
    enlarged,
    generate_samples,
)

needs_lycoris = pytest.mark.skipif(
    importlib.util.find_spec("lycoris") is None, reason="the LyCORIS package is not installed"
)
KINDS = [
    "lora",
    *(
        pytest.param(kind, marks=needs_lycoris)
        for kind in ("algo=loha", "algo=lokr", "algo=lora dora_wd=True", "algo=diag-oft")
    ),
]
PROMPTS = ["a photo of sks dog", "sks dog in the snow", "a cat"]
SETTINGS = DrawingSettings(num_images=1, seed=3, steps=2, scale=4.0, batch_size=2)


@pytest.fixture
def lora_of(tmp_path):
    """Writes a LoRA or LyCORIS with random weights for the model of a folder."""

    def write(folder, kind="lora", name="x.safetensors", **options):
        args = () if kind == "lora" else tuple(kind.split())
        module = "networks.lora" if kind == "lora" else "lycoris.kohya"
        network = create_network(
            load_stable_diffusion(str(folder)),
            NetworkOptions(network_module=module, network_args=args, network_dim=4, **options),
        )
        generator = torch.Generator().manual_seed(0)
        state = {
            key: value if key.endswith("alpha") else value + 0.2 * torch.randn(
                value.shape, generator=generator
            ).to(value)
            for key, value in network.kohya_state_dict().items()
        }  # fmt: skip
        save_lora(tmp_path / name, state, metadata={"modelspec.trigger_phrase": "sks dog"})
        return str(tmp_path / name)

    return write


def load(folder, **files):
    return load_evaluated_model(str(folder), LearnedFiles(**files), placeholder_token="")


def arrays(pictures):
    return [np.asarray(picture) for picture in pictures]


def all_equal(ones, others):
    pairs = zip(arrays(ones), arrays(others), strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)


def drawn_at(model, scales, **settings):
    return list(draw_columns(model, PROMPTS, scales, SETTINGS, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_strength_0_is_the_base_model_and_1_is_the_file_whatever_came_before(
    toy_folder, lora_of, kind
):
    path = lora_of(toy_folder, kind)
    (plain,) = drawn_at_without_lora(toy_folder)
    full, none, half, again, none_again = drawn_at(load(toy_folder, lora=path), [1, 0, 0.5, 1, 0])
    assert all_equal(none, plain)
    assert all_equal(none_again, plain)
    assert all_equal(again, full)
    assert all_equal(full, [p for batch in evaluated(toy_folder, path) for p in batch])
    assert not all_equal(full, plain)
    assert not all_equal(half, plain)
    assert not all_equal(half, full)


def drawn_at_without_lora(folder):
    model = load(folder)
    return [[p for batch in batches() for p in draw(model, batch, [3] * len(batch), SETTINGS)]]


def evaluated(folder, path):
    """What `evaluate` draws with a file."""
    model = load(folder, lora=path)
    return [draw(model, batch, [3] * len(batch), SETTINGS) for batch in batches()]


def batches():
    return PROMPTS[:2], PROMPTS[2:]


def test_full_strength_is_the_trainers_own_sample(toy_folder, lora_of, tmp_path):
    path = lora_of(toy_folder)
    model = load(toy_folder, lora=path)
    (column,) = drawn_at(model, [1])
    models = load_stable_diffusion(str(toy_folder))
    options = NetworkOptions(network_weights=path, dim_from_weights=True)
    create_network(models, options).train(False)
    drawing = SampleModels(
        unet=models.unet,
        vae=models.vae,
        encode=partial(encode_captions, models.text_encoders),
        noise_scheduler=models.noise_scheduler,
        prediction_type=models.prediction_type,
    )
    side = model.resolution
    prompts = [SamplePrompt(text, "", side, side, 3, sample_steps=2, scale=4) for text in PROMPTS]
    samples = generate_samples(prompts, drawing, SampleFiles(tmp_path, step=1))
    for ours, theirs in zip(column, samples, strict=True):
        difference = np.asarray(enlarged(ours)).astype(int) - np.asarray(Image.open(theirs))
        assert np.abs(difference).max() <= 1  # rounding: prompts are drawn in batches here


def test_text_encoder_and_unet_have_strengths_of_their_own(toy_folder, lora_of):
    path = lora_of(toy_folder)
    full, weak, none = drawn_at(load(toy_folder, lora=path), [1, 0.5, 0], text_encoder_scale=0)
    model = load(toy_folder, lora=path)
    assert not all_equal(full, drawn_at(model, [1])[0])
    model.network.set_strength(text_encoder=0, unet=1)
    bare = load(toy_folder)
    with torch.no_grad():
        assert torch.equal(model.encode(PROMPTS).states, bare.encode(PROMPTS).states)
    assert not all_equal(weak, full)
    assert all_equal(none, drawn_at_without_lora(toy_folder)[0])


def test_every_picture_is_drawn_once(toy_folder, lora_of):
    model, calls = load(toy_folder, lora=lora_of(toy_folder)), []
    model.pipeline.unet.register_forward_hook(
        lambda _module, inputs, _output: calls.append(len(inputs[0]))
    )
    ready = []
    columns = list(draw_columns(model, PROMPTS, [0, 1], SETTINGS, on_picture=ready.append))
    assert [len(column) for column in columns] == [3, 3]
    assert ready == [2, 1, 2, 1]
    assert calls == 2 * [4, 4, 2, 2]  # with and without the prompt, in two steps


def test_rows_are_prompts_and_columns_are_strengths():
    columns = [
        [Image.new("RGB", (300, 300), (60 * column, 80 * row, 200)) for row in range(3)]
        for column in range(2)
    ]
    labels = {"heading": "x", "footing": "y"}
    sheet = contact_sheet(columns, titles=["0", "1"], prompts=["a", "b " * 200, "c"], **labels)
    pixels = np.asarray(sheet)
    where = {}
    for column in range(2):
        for row in range(3):
            ys, xs = np.where((pixels == (60 * column, 80 * row, 200)).all(axis=-1))
            assert len(ys) == 300 * 300  # nothing is written over a tile
            where[column, row] = xs.min(), ys.min()
    assert where[0, 0][0] == where[0, 2][0] < where[1, 0][0] == where[1, 2][0]
    assert where[0, 0][1] == where[1, 0][1] < where[0, 1][1] < where[0, 2][1] == where[1, 2][1]


@pytest.mark.parametrize(("side", "shown"), [(64, 256), (512, 512)])
def test_tiny_tiles_are_enlarged_and_long_words_are_broken(side, shown):
    tile = Image.new("RGB", (side, side), (10, 200, 10))
    labels = {"titles": ["w" * 300], "heading": "h" * 400, "footing": "f"}
    sheet = contact_sheet([[tile]], prompts=["word"], **labels)
    assert (np.asarray(sheet) == (10, 200, 10)).all(axis=-1).sum() == shown**2
    assert sheet.width < shown + 120
    edges = np.asarray(sheet)[:, [0, -1]]
    assert (edges == 255).all()


def run(*argv):
    return main(["sheet", *argv])


def test_the_file_holds_the_settings_and_nothing_else_is_left(
    toy_folder, lora_of, tmp_path, capsys
):
    prompts = tmp_path / "p.txt"
    prompts.write_text("# of a dog\na photo of {}\n\na cat, asleep\n", encoding="utf-8")
    output = tmp_path / "out" / "sheet.png"
    flags = ["--base", str(toy_folder), "--output", str(output), "--prompts", str(prompts)]
    assert run(lora_of(toy_folder), *flags, "--scales", "0.5,1", "--steps", "1") == 0
    printed = capsys.readouterr()
    assert printed.out == f"wrote {output}\n"
    assert "4/4" in printed.err
    assert [path.name for path in output.parent.iterdir()] == ["sheet.png"]
    text = Image.open(output).text["parameters"]
    assert text.splitlines()[:2] == ["a photo of sks dog", "a cat, asleep"]
    assert "Steps: 1, Sampler: ddim, CFG scale: 7.5, Seed: 0, Size: 64x64" in text
    assert 'Lora: x.safetensors, Lora strengths: "0.5, 1"' in text


@needs_lycoris
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["lora", "algo=loha", "algo=lokr", "algo=lora dora_wd=True"])
def test_networks_draw_in_every_precision(toy_folder, lora_of, tmp_path, kind, precision):
    flags = ["--base", str(toy_folder), "--output", str(tmp_path / "s.png"), "--prompt", "a cat"]
    flags += ["--scales", "0,1", "--steps", "1", "--precision", precision]
    assert run(lora_of(toy_folder, kind), *flags) == 0


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--scales", "0,strong"], ["--scales 0,strong", "'strong' is not a number"]),
        (["--scales", "0,,1"], ["--scales", "''"]),
        (["--scales", "0,nan"], ["--scales", "'nan'"]),
        (["--scales", "0.7,0.70"], ["--scales", "0.7 is there twice"]),
        (["--prompts", "none.txt"], ["--prompts FILE or --prompt TEXT"]),
        (["--prompt", "a cat", "a  cat"], ["'a cat' is there twice"]),
        (["--prompt", "a cat", "--trigger", "sks"], ["--trigger sks", "no prompt has {}"]),
        (["--prompt", "a {}", "--trigger", ""], ["'a {}'", "--trigger"]),
        (["--output", "sheet.jpg"], ["--output sheet.jpg", ".png"]),
        (["--sampler", "magic"], ["--sampler magic", "euler_a"]),
        (["--steps", "0"], ["--steps 0"]),
        (["--steps", "1000"], ["--steps 1000: at most 999"]),
        (["--max_token_length", "100"], ["--max_token_length 100"]),
        (["--resolution", "100"], ["--resolution 100"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--precision", "int8"], ["--precision int8", "bf16"]),
        (["--guidance_scale", "inf"], ["--guidance_scale inf"]),
        (["--strength", "1"], ["--strength"]),
    ],
)
def test_what_cannot_be_drawn_is_one_line_before_a_model_is_read(
    lora_of, toy_folder, tmp_path, capsys, flags, parts
):
    path = lora_of(toy_folder)
    base = ["--base", "no such model", "--output", str(tmp_path / "s.png"), "--prompt", "a dog"]
    assert run(path, *base, *flags) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert all(part in line for part in parts)


def test_files_that_are_no_lora_of_this_model_are_one_line(
    lora_of, toy_folder, toy_sdxl_folder, tmp_path, capsys
):
    embedding = tmp_path / "e.safetensors"
    save_embedding(embedding, {"emb_params": torch.randn(1, 32)}, metadata={"a": "b"})
    unet_only = lora_of(toy_folder, name="u.safetensors", network_train_unet_only=True)
    cases = [
        ("none.safetensors", [], "there is no such file"),
        (str(embedding), [], "is an embedding, which has no strength"),
        (lora_of(toy_sdxl_folder, name="xl.safetensors"), [], "another kind of model"),
        (unet_only, ["--text_encoder_scale", "0.5"], "--text_encoder_scale"),
    ]
    if importlib.util.find_spec("lycoris") is not None:
        xl = lora_of(toy_sdxl_folder, "algo=lokr", name="lokr.safetensors")
        full = lora_of(toy_folder, "algo=full", name="full.safetensors")
        cases += [(xl, [], "another kind of model"), (full, [], "algo=full")]
    for path, flags, part in cases:
        base = ["--base", str(toy_folder), "--output", str(tmp_path / "s.png"), "--prompt", "a dog"]
        assert run(path, *base, *flags) == 2
        error = capsys.readouterr().err
        line = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(line) == 1
        assert part in line[0]
        assert "Traceback" not in error
        assert not (tmp_path / "s.png").exists()


def test_options_of_sample_prompts_are_not_read_as_words(lora_of, toy_folder, tmp_path, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a dog\na cat --n blurry --w 512\n", encoding="utf-8")
    flags = ["--base", "x", "--output", str(tmp_path / "s.png"), "--prompts", str(prompts)]
    assert run(lora_of(toy_folder), *flags) == 2
    assert "line 2: --n would be read as words" in capsys.readouterr().err


def test_defaults_hold_the_base_model_and_the_file():
    options = parse_sheet([__file__, "--base", "b", "--output", "o.png", "--prompt", "a", "b"])
    assert options.scales == (0, 0.4, 0.7, 1)
    assert options.prompt == ("a", "b")
