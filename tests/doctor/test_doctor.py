"""The doctor against the networks it reads, on files of every kind, and what it says and mends."""

import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mlm_plugin.cli import main, train_main
from mlm_plugin.commands.doctor import _with_class
from mlm_plugin.config.options import NetworkOptions
from mlm_plugin.doctor.diagnosis import Findings, broken_verdict, verdict_of
from mlm_plugin.doctor.examination import Patient, Prompts, Reading, reading_of
from mlm_plugin.doctor.learned_file import LearnedFile, contents_of, read_learned_file
from mlm_plugin.doctor.weight_changes import weight_change
from mlm_plugin.export.embedding_files import save_embedding
from mlm_plugin.export.lora_files import save_lora
from mlm_plugin.mlm.kept_context import kept_context
from mlm_plugin.models.checkpoints import load_stable_diffusion, load_text_side
from mlm_plugin.networks.create import create_network

needs_lycoris = pytest.mark.skipif(
    importlib.util.find_spec("lycoris") is None, reason="the LyCORIS package is not installed"
)
KINDS = [
    "lora",
    *(
        pytest.param(algo, marks=needs_lycoris)
        for algo in (
            *("algo=lora", "algo=loha", "algo=lokr", "algo=lokr factor=2 decompose_both=True"),
            *("algo=full", "algo=glora", "algo=diag-oft", "algo=lora dora_wd=True"),
        )
    ),
]
SCALABLE = [kind for kind in KINDS if not any(w in str(kind) for w in ("oft", "dora"))]
PROMPTS = Prompts(
    ("a photo of {} in the jungle", "{} on the beach at night", "a red {}"), "sks dog"
)
ORDINARY = Prompts(PROMPTS.templates, "dog")


@pytest.fixture(params=["sd", "sdxl"])
def folder(request, toy_folder, toy_sdxl_folder):
    return toy_folder if request.param == "sd" else toy_sdxl_folder


def network_on(models, kind, *, size=0.1):
    """A network with random weights, as if it were trained."""
    args = () if kind == "lora" else kind.split()
    module = "networks.lora" if kind == "lora" else "lycoris.kohya"
    options = NetworkOptions(
        network_module=module, network_args=args, network_dim=4, network_alpha=2.0
    )
    network = create_network(models, options)
    generator = torch.Generator().manual_seed(0)
    state = {
        key: value if key.endswith("alpha") else value + size * torch.randn(
            value.shape, generator=generator
        ).to(value)
        for key, value in network.kohya_state_dict().items()
    }  # fmt: skip
    network.load_kohya_state_dict(state)
    network.train(False)
    return network


@pytest.fixture
def file_of(tmp_path):
    """Writes the file of a network."""

    def write(network, name="x.safetensors", **metadata):
        save_lora(tmp_path / name, network.kohya_state_dict(), metadata=metadata)
        return tmp_path / name

    return write


# --- what a file does to the model --------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_states_keys_and_values_are_those_of_the_network_itself(kind, folder, file_of):
    models = load_stable_diffusion(str(folder))
    path = file_of(network_on(models, kind))
    patient = Patient(read_learned_file(path), load_text_side(str(folder)))
    assert patient.has_text_part
    assert any(one.module is not None for one in patient.key_values)
    trained = Patient(LearnedFile(path, {}), models)
    with torch.no_grad():
        wanted = trained.states(PROMPTS, strength=1)
        for ours, theirs in zip(patient.states(PROMPTS, strength=1), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
        states = torch.cat(wanted, dim=1)
        for one, other in zip(patient.key_values, trained.key_values, strict=True):
            changed = one.layer.weight + weight_change(one.module, one.layer).weight
            torch.testing.assert_close(
                states @ changed.T, other.layer(states), atol=2e-5, rtol=1e-4
            )


def test_the_model_is_left_as_it_was(folder, file_of):
    path = file_of(network_on(load_stable_diffusion(str(folder)), "lora"))
    patient = Patient(read_learned_file(path), load_text_side(str(folder)))
    before = patient.states(PROMPTS, strength=0)
    patient.states(PROMPTS, strength=1)
    for was, is_now in zip(before, patient.states(PROMPTS, strength=0), strict=True):
        assert torch.equal(was, is_now)


def test_a_file_in_the_names_of_diffusers_is_the_same_file(toy_folder, file_of, tmp_path):
    models = load_stable_diffusion(str(toy_folder))
    network = network_on(models, "lora")
    path = file_of(network)
    tensors = {}
    for name, module in models.text_encoders[0].model.named_modules():
        if hasattr(module, "lora_A"):
            tensors |= _in_diffusers_names(f"text_encoder.{name}", module)
    for name, module in models.unet.named_modules():
        if hasattr(module, "lora_A"):
            tensors |= _in_diffusers_names(f"unet.{name}", module)
    save_file(tensors, tmp_path / "diffusers.safetensors")
    ours, theirs = (
        Patient(read_learned_file(one), load_text_side(str(toy_folder))).states(PROMPTS, strength=1)
        for one in (path, tmp_path / "diffusers.safetensors")
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def _in_diffusers_names(name, module):
    (adapter,) = module.lora_A
    scale = module.scaling[adapter]
    return {
        f"{name}.lora_A.weight": module.lora_A[adapter].weight.detach().contiguous(),
        f"{name}.lora_B.weight": (scale * module.lora_B[adapter].weight.detach()).contiguous(),
    }


# --- the score --------------------------------------------------------------------------------


def test_what_all_tokens_share_costs_nothing_and_noise_costs_its_variance():
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(4000, 8, generator=generator)
    noise = torch.randn(4000, 8, generator=generator)
    assert kept_context(g, g) == 1
    assert kept_context(g + 100, g) == pytest.approx(1)
    assert kept_context(torch.ones_like(g), g) == pytest.approx(0)
    assert kept_context(g + 0.5 * noise, g) == pytest.approx(0.75, abs=0.02)
    assert kept_context(0.8 * g, g) == pytest.approx(0.96)
    assert kept_context(-g, g) == 0


def test_stronger_files_keep_less(folder, file_of):
    path = file_of(network_on(load_stable_diffusion(str(folder)), "lora", size=0.3))
    patient = Patient(read_learned_file(path), load_text_side(str(folder)))
    untrained = patient.states(PROMPTS, strength=0)
    readings = [
        reading_of(patient, patient.states(PROMPTS, strength=s), untrained, unet=s)
        for s in (0, 0.5, 1)
    ]
    for shares in ([r.text for r in readings], [r.image for r in readings]):
        assert shares[0] == pytest.approx(1)
        assert shares == sorted(shares, reverse=True)
        assert shares[2] < 0.98


def test_the_concepts_own_tokens_are_not_compared(toy_folder, tmp_path):
    """An embedding for a word leaves the words before it as they are."""
    save_embedding(tmp_path / "zwx.safetensors", {"emb_params": torch.randn(2, 32)}, metadata={})
    models = load_text_side(str(toy_folder))
    patient = Patient(read_learned_file(tmp_path / "zwx.safetensors"), models, word="zwx")
    before = Prompts(("a photo of {}",), "dog")
    wanted = patient.states(before, strength=0)[0]
    with patient.with_embedding():
        found = patient.states(Prompts(before.templates, "zwx"), strength=0)[0]
    assert found.shape == wanted.shape
    assert torch.allclose(found[:3], wanted[:3])  # a photo of
    assert not torch.allclose(found[3], wanted[3])  # EOS


# --- a run of ours, and the same with its text encoder part multiplied ----------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The LoRA of a short run on the pocket model, whose gradients are those of a real one."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    output = tmp_path_factory.mktemp("trained")
    flags = [
        *"--pretrained_model_name_or_path pocket --train_data_dir pocket".split(),
        *("--output_dir", str(output)),
        *"--resolution 64 --output_name dog --mlm_loss_weight 0 --seed 1".split(),
        *"--network_dim 8 --network_alpha 8 --unet_lr 5e-3 --text_encoder_lr 5e-4".split(),
        *"--max_train_steps 40 --max_data_loader_n_workers 0".split(),
    ]
    assert train_main(flags) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    return output / "dog.safetensors"


def multiplied(path, target, factor):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {
        key: factor * value if key.startswith("lora_te") and "lora_up" in key else value
        for key, value in load_file(path).items()
    }
    save_file(tensors, target, metadata)
    return target


def test_a_multiplied_text_encoder_part_is_told_and_brought_back(trained, tmp_path, capsys):
    path = multiplied(trained, tmp_path / "five.safetensors", 5)
    mended = tmp_path / "mended.safetensors"
    report = tmp_path / "report.json"
    flags = [str(path), "--base", "pocket", "--json", str(report)]
    assert main(["doctor", *flags, "--fit", "--output", str(mended)]) == 0
    assert "text encoder part too strong" in capsys.readouterr().out
    found = json.loads(report.read_text())["findings"]
    assert found["fit"] == pytest.approx(1 / 5, rel=0.2)
    was, is_now, five = map(load_file, (trained, mended, path))
    for key in was:
        if key.startswith("lora_te") and "lora_up" in key:
            torch.testing.assert_close(is_now[key], five[key] * found["fit"])
            assert is_now[key].norm().item() == pytest.approx(was[key].norm().item(), rel=0.2)
        else:
            assert torch.equal(is_now[key], was[key])


def test_the_file_as_trained_is_not_told_to_be_multiplied(trained, tmp_path, capsys):
    report = tmp_path / "report.json"
    flags = [str(trained), "--base", "pocket", "--json", str(report)]
    assert main(["doctor", *flags]) == 0
    assert "learning rate explains" not in capsys.readouterr().out
    assert json.loads(report.read_text())["findings"]["amplified"] == pytest.approx(1, rel=0.35)
    assert json.loads(report.read_text())["trigger"].startswith("sks")


def test_metadata_stay_but_for_the_hashes(trained, tmp_path):
    target = tmp_path / "half.safetensors"
    flags = ["doctor", str(trained), "--rescale_text_encoder", "0.5", "--output", str(target)]
    assert main(flags) == 0
    with safe_open(trained, "pt") as file:
        before = file.metadata()
    with safe_open(target, "pt") as file:
        behind = file.metadata()
    changed = {key for key in before if before[key] != behind[key]}
    assert "sshs_model_hash" in changed
    assert changed <= {"sshs_model_hash", "sshs_legacy_hash"}
    assert behind.keys() - before.keys() == {"mlm_text_encoder_scale"}
    assert behind["mlm_text_encoder_scale"] == "0.5"


# --- mending by hand ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCALABLE)
def test_a_rescaled_part_changes_the_encoder_so_many_times_as_much(
    kind, toy_folder, file_of, tmp_path
):
    path = file_of(network_on(load_stable_diffusion(str(toy_folder)), kind))
    target = tmp_path / "half.safetensors"
    flags = ["doctor", str(path), "--rescale_text_encoder", "0.5", "--output", str(target)]
    assert main(flags) == 0
    whole, half = (read_learned_file(one).of_text_encoder(0) for one in (path, target))
    clip = dict(load_text_side(str(toy_folder)).text_encoders[0].model.named_modules())
    layers = {name.replace(".", "_"): layer for name, layer in clip.items()}
    for name, module in whole.items():
        layer = layers.get(name) or layers[name.removeprefix("text_model_")]
        if isinstance(layer, nn.Linear):
            torch.testing.assert_close(
                weight_change(half[name], layer).weight, 0.5 * weight_change(module, layer).weight,
                atol=1e-6, rtol=1e-4,
            )  # fmt: skip


@needs_lycoris
@pytest.mark.parametrize("kind", ["algo=diag-oft", "algo=lora dora_wd=True"])
def test_an_algorithm_whose_strength_is_no_factor_is_refused(
    kind, toy_folder, file_of, tmp_path, capsys
):
    path = file_of(network_on(load_stable_diffusion(str(toy_folder)), kind))
    target = tmp_path / "half.safetensors"
    flags = ["doctor", str(path), "--rescale_text_encoder", "0.5", "--output", str(target)]
    assert main(flags) == 2
    assert "cannot be rescaled inside the file" in capsys.readouterr().err
    assert not target.exists()


# --- files that are broken, or no such files ------------------------------------------------------


def test_a_tensor_that_is_not_finite_is_named(trained, tmp_path, capsys):
    tensors = load_file(trained)
    key = next(key for key in tensors if "lora_up" in key)
    tensors[key][0, 0] = math.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    assert main(["doctor", str(tmp_path / "nan.safetensors")]) == 1
    printed = capsys.readouterr().out
    assert "broken: 1 tensor(s)" in printed
    assert key in printed


def test_halves_and_empty_networks_are_told(trained, tmp_path):
    tensors = load_file(trained)
    half = {key: tensor for key, tensor in tensors.items() if "lora_down" not in key}
    save_file(half, tmp_path / "half.safetensors")
    empty = {k: torch.zeros_like(t) if "lora_up" in k else t for k, t in tensors.items()}
    save_file(empty, tmp_path / "empty.safetensors")
    for name, word in (("half", "one of their two matrices"), ("empty", "nothing in the file")):
        contents = contents_of(read_learned_file(tmp_path / f"{name}.safetensors"))
        assert word in broken_verdict(contents).verdict


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"model.diffusion_model.x": torch.ones(1), "y": torch.ones(1), "z": torch.ones(1)},
         "neither a LoRA nor an embedding"),
        (None, "cannot be read as safetensors"),
    ],
)  # fmt: skip
def test_other_files_are_refused_in_one_line(content, word, tmp_path, capsys):
    path = tmp_path / "other.safetensors"
    if content is None:
        path.write_bytes(b"nothing")
    else:
        save_file(content, path)
    assert main(["doctor", str(path)]) == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--fit"], "--output: name the mended file"),
        (["--output", "y.safetensors"], "add --fit or --rescale_text_encoder"),
        (["--fit", "--output", "y.safetensors"], "needs --base"),
        (["--fit", "--rescale_text_encoder", "1", "--output", "y.safetensors"], "drop one"),
        (["--rescale_text_encoder", "-1", "--output", "y.safetensors"], "from 0 to 10"),
        (["--rescale_text_encoder", "1", "--output", "y.ckpt"], ".safetensors"),
        (["--rescale_text_encoder", "1", "--output", "SELF"], "the file that is examined"),
        (["--page", "p.html"], "needs --base"),
        (["--base", "/absent"], "/absent"),
        (["--clip_skip", "0"], "at least 1"),
        (["--strength", "1"], "--strength"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_one_line(flags, word, trained, capsys):
    flags = [str(trained) if flag == "SELF" else flag for flag in flags]
    assert main(["doctor", str(trained), *flags]) == 2
    assert word in capsys.readouterr().err


def test_a_file_for_another_model_is_refused(trained, toy_sdxl_folder, capsys):
    assert main(["doctor", str(trained), "--base", str(toy_sdxl_folder)]) == 2
    assert "give the model it was trained on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(f"algo={algo}", marks=needs_lycoris)
        for algo in ("loha", "lokr", "full", "glora")
    ],
)
def test_a_lycoris_for_another_model_is_refused(kind, toy_folder, toy_sdxl_folder, file_of, capsys):
    path = file_of(network_on(load_stable_diffusion(str(toy_folder)), kind))
    assert main(["doctor", str(path), "--base", str(toy_sdxl_folder)]) == 2
    *_log, line = capsys.readouterr().err.splitlines()
    assert f"--base: {toy_sdxl_folder} is Stable Diffusion XL and has no layer for" in line
    assert "give the model it was trained on" in line


def test_a_text_encoders_part_for_another_model_is_refused(toy_folder, file_of, capsys):
    state = network_on(load_stable_diffusion(str(toy_folder)), "lora").kohya_state_dict()
    text = {key: value for key, value in state.items() if key.startswith("lora_te")}
    path = file_of(SimpleNamespace(kohya_state_dict=lambda: text))
    assert main(["doctor", str(path), "--base", "pocket"]) == 2
    *_log, line = capsys.readouterr().err.splitlines()
    assert "give the model it was trained on" in line


def test_a_file_for_flux_is_counted_and_not_examined(tmp_path, toy_folder, capsys):
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    pair = {
        f"{name}.lora_down.weight": torch.ones(4, 8),
        f"{name}.lora_up.weight": torch.ones(8, 4),
    }
    save_file(pair, tmp_path / "flux.safetensors")
    assert main(["doctor", str(tmp_path / "flux.safetensors")]) == 0
    assert "LoRA (1) for FLUX; 1 transformer modules; rank 4" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "flux.safetensors"), "--base", str(toy_folder)]) == 2
    assert "is for FLUX" in capsys.readouterr().err


# --- embeddings and pages -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trigger", "class_token", "prompted"),
    [
        ("sks", "teddy bear", "sks teddy bear"),
        ("sks teddy bear", "teddy bear", "sks teddy bear"),
        ("sks catfish", "cat", "sks catfish cat"),
        ("sks", None, "sks"),
    ],
)
def test_the_class_is_in_the_prompts_once(trigger, class_token, prompted):
    assert _with_class(trigger, class_token) == prompted


@pytest.mark.parametrize(("size", "level"), [(0.02, "good"), (5.0, "strong")])
def test_a_loud_embedding_is_told_from_a_quiet_one(size, level, toy_folder, tmp_path):
    models = load_text_side(str(toy_folder))
    encoder = models.text_encoders[0]
    dog = encoder.token_embedding.weight[encoder.tokenizer("dog").input_ids[1:-1]]
    vector = dog + size * torch.randn(dog.shape, generator=torch.Generator().manual_seed(0))
    save_embedding(tmp_path / "zwx.safetensors", {"emb_params": vector}, metadata={})
    report = tmp_path / "report.json"
    flags = [str(tmp_path / "zwx.safetensors"), "--base", str(toy_folder), "--class_token", "dog"]
    assert main(["doctor", *flags, "--json", str(report)]) == 0
    assert json.loads(report.read_text())["verdict"]["level"] == level


def test_the_page_holds_the_verdict_and_needs_nothing_from_outside(
    trained, tmp_path, page_of, screenshot_of
):
    path = multiplied(trained, tmp_path / "<b>five&.safetensors", 5)
    page = tmp_path / "page.html"
    assert main(["doctor", str(path), "--base", "pocket", "--page", str(page)]) == 0
    found = page_of(page)
    assert "text encoder part too strong" in found.text
    assert "<b>five&.safetensors" in found.text
    assert found.tags.count("svg") == 2
    screenshot_of(page)


@pytest.mark.parametrize(
    ("text", "image", "whole", "word"),
    [
        (0.99, 0.99, 0.98, "sentences stay whole: 98 %"),
        (0.90, 0.99, 0.90, "text encoder part too strong: context words lose 10 %"),
        (0.99, 0.90, 0.90, "U-Net part too strong"),
        (0.96, 0.96, 0.93, "the two parts together too strong: 93 %"),
    ],
)
def test_the_verdict_names_the_part(text, image, whole, word):
    def reading(encoder, blocks):
        return Reading({"text encoder": encoder}, {"IN01": blocks})

    findings = Findings(
        whole=reading(text, whole),
        text_part=reading(text, text),
        image_part=reading(1.0, image),
        leak=reading(1.0, 1.0),
        curve=[(0.0, 1.0), (1.0, text)],
        fit=0.5,
    )
    diagnosis = verdict_of(findings)
    assert diagnosis.verdict.startswith(word)
    advised = "train with the MLM term" in diagnosis.advice  # at every place it reads
    assert advised == (diagnosis.level == "strong")


def test_a_prompt_that_is_too_long_is_told(trained, tmp_path, capsys):
    (tmp_path / "long.txt").write_text(f"{'a very long prompt ' * 30} of {{}}\n")
    flags = [str(trained), "--base", "pocket", "--prompts", str(tmp_path / "long.txt")]
    assert main(["doctor", *flags]) == 2
    assert "the trigger is cut off" in capsys.readouterr().err


def test_beside_a_kohya_trainer_only_the_page_is_missing(trained, tmp_path, capsys, monkeypatch):
    """Libraries of pages are not those of sd-scripts."""
    for name in [name for name in sys.modules if name.startswith("mlm_plugin.doctor.page")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlm_plugin.evaluation.charts", None)
    flags = [str(trained), "--base", "pocket"]
    assert main(["doctor", *flags]) == 0
    assert main(["doctor", *flags, "--page", str(tmp_path / "p.html")]) == 2
    assert "--page needs " in capsys.readouterr().err


@pytest.mark.parametrize("left_out", ["lora_te", "lora_unet"])
def test_a_file_with_one_part_is_examined(left_out, trained, tmp_path, capsys):
    path = tmp_path / "part.safetensors"
    tensors = {k: v for k, v in load_file(trained).items() if not k.startswith(left_out)}
    save_file(tensors, path)
    assert main(["doctor", str(path), "--base", "pocket", "--page", str(tmp_path / "p.html")]) == 0
    assert "sentences stay whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("metadata", "given", "trigger"),
    [
        ({"modelspec.trigger_phrase": "sks dog, zwx cat", "ss_mlm_placeholder_token": "sks"}, None,
         "sks dog"),
        ({"ss_mlm_placeholder_token": "sks, zwx"}, None, "sks"),
        ({"modelspec.trigger_phrase": "sks dog"}, "my dog", "my dog"),
        ({"modelspec.trigger_phrase": "sks dog"}, "", ""),
        ({}, None, ""),
    ],
)  # fmt: skip
def test_the_trigger_is_the_users_or_that_of_the_metadata(tmp_path, metadata, given, trigger):
    assert LearnedFile(tmp_path / "x", metadata, given_trigger=given).trigger == trigger
