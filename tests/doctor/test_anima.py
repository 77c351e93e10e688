"""The doctor on files of Anima: their text encoder part against a small Qwen3."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from mlm_plugin.cli import main
from mlm_plugin.doctor.amplification import amplification
from mlm_plugin.doctor.examination import Patient, Prompts
from mlm_plugin.doctor.learned_file import contents_of, read_learned_file
from mlm_plugin.models.language_model import LanguageModelEncoder
from mlm_plugin.models.qwen3 import load_anima_text

PROMPTS = Prompts(
    ("a photo of {} in the jungle", "{} on the beach at night", "a red {}, sitting"), "sks girl"
)
LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
"""What sd-scripts' ``networks.lora_anima`` trains in every layer of Qwen3."""

DIT = ("lora_unet_blocks_0_cross_attn_k_proj", "lora_unet_llm_adapter_blocks_0_self_attn_q_proj")
NORM = "lora_unet_blocks_0_adaln_modulation_cross_attn_1"
SD_SCRIPTS_DIR = os.environ.get("SD_SCRIPTS_DIR")


def language_model(width=16):
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    config = Qwen3Config(vocab_size=512, initializer_range=0.2, **sizes, **heads)
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def qwen3_folder(byte_tokenizer, tmp_path_factory):
    """A folder as transformers writes it."""
    folder = tmp_path_factory.mktemp("qwen3")
    language_model().save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def pair(shape, size, generator, *, rank=4, alpha=2.0):
    """A LoRA module in kohya's names."""
    out, width = shape
    return {
        "lora_down.weight": torch.randn(rank, width, generator=generator),
        "lora_up.weight": size * torch.randn(out, rank, generator=generator),
        "alpha": torch.tensor(alpha),
    }


def text_part(size):
    """Tensors for every linear layer that ``networks.lora_anima`` takes."""
    generator, trunk = torch.Generator().manual_seed(0), language_model().model
    return {
        f"lora_te_layers_{number}_{name.replace('.', '_')}.{key}": tensor
        for number in range(2)
        for name in LINEARS
        for key, tensor in pair(
            trunk.layers[number].get_submodule(name).weight.shape, size, generator
        ).items()
    }


def image_part(size=0.1):
    generator = torch.Generator().manual_seed(1)
    return {
        f"{name}.{key}": tensor
        for name in DIT
        for key, tensor in pair((16, 16), size, generator).items()
    }


@pytest.fixture
def write(tmp_path):
    """Writes a file of tensors."""

    def write(tensors, name="girl.safetensors", **metadata):
        save_file(tensors, tmp_path / name, metadata or None)
        return tmp_path / name

    return write


def merged(model, tensors):
    """The trunk with the file's changes in its weights, computed without the doctor."""
    for path, layer in model.named_modules():
        name = f"lora_te_{path.replace('.', '_')}"
        if f"{name}.alpha" in tensors:
            up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
            layer.weight.data += tensors[f"{name}.alpha"] / len(down) * (up @ down)
    return model


def examined(path, folder, tmp_path, *flags):
    """Exit code and facts."""
    report = tmp_path / "report.json"
    code = main(["doctor", str(path), "--qwen3", str(folder), "--json", str(report), *flags])
    return code, json.loads(report.read_text())


# --- the language model and its states ------------------------------------------------------------


def test_the_loaded_model_is_the_one_that_was_saved(qwen3_folder, byte_tokenizer):
    ids = byte_tokenizer("a photo of sks girl in the jungle", return_tensors="pt").input_ids
    (encoder,) = load_anima_text(str(qwen3_folder)).text_encoders
    with torch.no_grad():
        wanted = language_model().model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(encoder.encode(ids), wanted)


def test_states_are_those_of_the_changed_model_around_the_concept(
    qwen3_folder, byte_tokenizer, write
):
    """By a forward pass of sd-scripts' kind: padded to 512, masked, cut out by hand."""
    tensors = text_part(0.1)
    models = load_anima_text(str(qwen3_folder))
    patient = Patient(read_learned_file(write(tensors)), models)
    assert patient.has_text_part
    assert not patient.key_values
    changed, wanted = merged(language_model().model, tensors), []
    for text in PROMPTS.texts:
        batch = byte_tokenizer(text, padding="max_length", max_length=512, return_tensors="pt")
        with torch.no_grad():
            states = changed(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask
            ).last_hidden_state[0]
        before = len(byte_tokenizer(text[: text.index("sks girl")].rstrip()).input_ids)
        behind = len(byte_tokenizer(text[: text.index("sks girl") + 8]).input_ids)
        end = len(byte_tokenizer(text).input_ids)
        wanted += [states[1:before], states[behind:end]]
    (found,) = patient.states(PROMPTS, strength=1)
    torch.testing.assert_close(found, torch.cat(wanted), atol=2e-5, rtol=1e-4)
    (untrained,) = patient.states(PROMPTS, strength=0)
    assert not torch.allclose(found, untrained, atol=1e-2)


NETWORK_OF_SD_SCRIPTS = """
import sys, types
import diffusers, safetensors.torch, torch, transformers

sys.path.insert(0, sys.argv[1])
stand_in = types.ModuleType("torchvision")  # only named by what is imported here
stand_in.transforms = None
sys.modules["torchvision"] = stand_in
from networks import lora_anima

folder, path, states, *texts = sys.argv[2:]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
trunk = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).model
network = lora_anima.create_network(1.0, 4, 2.0, None, [trunk], torch.nn.Module())
network.apply_to([trunk], None, True, False)
torch.manual_seed(1)
for lora in network.text_encoder_loras:
    torch.nn.init.normal_(lora.lora_up.weight, std=0.1)
safetensors.torch.save_file(network.state_dict(), path)
with torch.no_grad():
    batch = tokenizer(texts, padding="max_length", max_length=512, return_tensors="pt")
    torch.save(trunk.eval()(**batch).last_hidden_state, states)
"""


@pytest.mark.skipif(not SD_SCRIPTS_DIR, reason="SD_SCRIPTS_DIR names no checkout of sd-scripts")
def test_states_are_those_of_the_network_of_sd_scripts(qwen3_folder, tmp_path):
    if importlib.util.find_spec("cv2") is None:
        pytest.skip("cv2, which sd-scripts needs, is not installed")
    path, states = tmp_path / "theirs.safetensors", tmp_path / "states.pt"
    arguments = map(str, (SD_SCRIPTS_DIR, qwen3_folder, path, states, *PROMPTS.texts))
    command = [sys.executable, "-c", NETWORK_OF_SD_SCRIPTS, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    file, models = read_learned_file(path), load_anima_text(str(qwen3_folder))
    assert contents_of(file).counts == {"text encoder": 2 * len(LINEARS)}
    around = models.text_encoders[0].positions_around
    rows = [around(text, PROMPTS.concept) for text in PROMPTS.texts]
    wanted = torch.cat([one[row] for one, row in zip(torch.load(states), rows, strict=True)])
    (found,) = Patient(file, models).states(PROMPTS, strength=1)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("caption", "words", "around"),
    [
        ("a photo of sks girl in the jungle", "sks girl", "photo of in the jungle"),
        ("sks girl on the beach", "sks girl", "on the beach"),
        ("a girlish girl, sitting", "girl", "girlish, sitting"),
        ("a red girl", "girl", "red"),
        ("a cat", "girl", None),
        ("walking " * 300 + "girl", "girl", None),
    ],
    ids=["middle", "start", "whole words", "end", "absent", "cut off"],
)
def test_tokens_around_the_concept(caption, words, around, byte_tokenizer):
    encoder = LanguageModelEncoder(byte_tokenizer, None)
    positions = encoder.positions_around(caption, words)
    if around is None:
        assert positions is None
    else:
        ids = byte_tokenizer(caption).input_ids
        assert byte_tokenizer.decode([ids[i] for i in positions]).split() == around.split()


def test_tokens_around_the_concept_behind_a_prefix(byte_tokenizer):
    encoder = LanguageModelEncoder(byte_tokenizer, None, prefix="about a girl: ")
    positions = encoder.positions_around("a girl in the jungle", "girl")
    ids = byte_tokenizer("about a girl: a girl in the jungle").input_ids
    assert byte_tokenizer.decode([ids[i] for i in positions]).split() == "a in the jungle".split()


# --- what is said of a file -----------------------------------------------------------------------


def test_a_part_of_zeros_keeps_everything(qwen3_folder, write, tmp_path):
    path = write(text_part(0.0) | image_part())
    code, facts = examined(path, qwen3_folder, tmp_path, "--class_token", "girl")
    assert (code, facts["verdict"]["level"], facts["model"]) == (0, "good", "Anima")
    findings = facts["findings"]
    for row in ("with_trigger", "without_trigger"):
        assert findings[row]["text_encoders"] == {"Qwen3": 1.0}
        assert (findings[row]["unet"], findings[row]["unet_blocks"]) == (None, {})
    assert [kept for _, kept in findings["curve"]] == [1.0] * 6
    assert findings["fit"] == 1.0


def test_a_strong_part_loses_context_and_is_mended(qwen3_folder, write, tmp_path, capsys):
    path = write(text_part(0.2) | image_part(), **{"modelspec.trigger_phrase": "sks"})
    mended = tmp_path / "mended.safetensors"
    flags = ["--class_token", "girl", "--fit", "--output", str(mended)]
    code, facts = examined(path, qwen3_folder, tmp_path, *flags)
    printed = capsys.readouterr().out
    assert code == 0
    assert "text encoder part too strong" in printed
    assert "the transformer's reading is not examined (1 transformer, 1 llm_adapter" in printed
    assert "U-Net" not in printed
    shares = [kept for _, kept in facts["findings"]["curve"]]
    assert shares == sorted(shares, reverse=True)
    fit = facts["findings"]["fit"]
    assert 0 < fit < 1
    before, behind = load_file(path), load_file(mended)
    for key, tensor in before.items():
        is_factor = key.startswith("lora_te") and "lora_up" in key
        torch.testing.assert_close(behind[key], fit * tensor if is_factor else tensor)
    with safe_open(mended, "pt") as file:
        assert file.metadata()["mlm_text_encoder_scale"] == f"{fit:g}"
    _, again = examined(mended, qwen3_folder, tmp_path, "--class_token", "girl")
    assert again["verdict"]["level"] == "good"
    assert again["findings"]["with_trigger"]["text_encoders"]["Qwen3"] >= 0.95


def test_a_weak_part_is_good_and_the_verdict_speaks_of_the_encoder(
    qwen3_folder, write, tmp_path, capsys
):
    code, _ = examined(write(text_part(0.01)), qwen3_folder, tmp_path)
    printed = capsys.readouterr().out
    assert code == 0
    assert "sentences stay whole" in printed
    assert "what the transformer reads of it is not examined" in printed


def test_a_page(qwen3_folder, write, tmp_path, page_of, screenshot_of):
    page = tmp_path / "page.html"
    path = write(text_part(0.2))
    code, _ = examined(path, qwen3_folder, tmp_path, "--page", str(page))
    assert code == 0
    found = page_of(page)
    assert "text encoder part too strong" in found.text
    assert "U-Net" not in found.text
    assert found.tags.count("svg") == 1
    screenshot_of(page)
    path = write(image_part(), "transformer.safetensors")
    assert examined(path, qwen3_folder, tmp_path, "--page", str(page))[0] == 0
    assert "llm_adapter: 1" in page_of(page).text
    assert "the transformer's reading is not examined" in page_of(page).text


@pytest.mark.parametrize("with_encoder", [True, False], ids=["with --qwen3", "without"])
def test_a_file_of_the_transformer_alone_is_counted(
    with_encoder, qwen3_folder, write, tmp_path, capsys
):
    flags = ["--qwen3", str(qwen3_folder)] if with_encoder else []
    report = tmp_path / "report.json"
    assert main(["doctor", str(write(image_part())), *flags, "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "LoRA (2) for Anima; 1 transformer modules, 1 llm_adapter modules; rank 4" in printed
    assert "no text encoder part" in printed
    assert "the transformer's reading is not examined (1 transformer, 1 llm_adapter" in printed
    assert "give --" not in printed.replace("give --trigger", "")
    facts = json.loads(report.read_text())
    assert (facts["findings"], facts["verdict"]) == (None, None)
    assert facts["modules"] == {"transformer": 1, "llm_adapter": 1}


@pytest.mark.parametrize(
    ("tensors", "model"),
    [
        (lambda: text_part(0.1), "Anima"),
        (lambda: {k: v for k, v in image_part().items() if "adapter" in k}, "Anima"),
        (lambda: text_part(0.1) | {"lora_unet_layers_0_attention_qkv.alpha": torch.ones(())},
         "Lumina 2"),
    ],
    ids=["text part alone", "adapter alone", "lumina"],
)  # fmt: skip
def test_the_model_is_told_by_any_part(tensors, model, write):
    assert read_learned_file(write(tensors())).other_model == model


def test_a_text_part_of_lumina_is_told_by_its_metadata(write):
    path = write(text_part(0.1), **{"modelspec.architecture": "lumina-2/lora"})
    assert read_learned_file(path).other_model == "Lumina 2"


def test_without_the_encoder_it_is_asked_for(write, capsys):
    assert main(["doctor", str(write(text_part(0.1)))]) == 0
    assert "give --qwen3 PATH" in capsys.readouterr().out


# --- the same file in ComfyUI's names -------------------------------------------------------------


def in_comfyui_names(tensors):
    """As sd-scripts' ``convert_anima_lora_to_comfy.py`` names them."""
    paths = {
        **{f"lora_te_layers_{n}_{name.replace('.', '_')}":
           f"text_encoders.qwen3_06b.transformer.model.layers.{n}.{name}"
           for n in range(2) for name in LINEARS},
        DIT[0]: "diffusion_model.blocks.0.cross_attn.k_proj",
        DIT[1]: "diffusion_model.llm_adapter.blocks.0.self_attn.q_proj",
    }  # fmt: skip
    paths[NORM] = "diffusion_model.blocks.0.adaln_modulation.cross_attn.1"  # sic
    endings = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    split = ((*key.split(".", 1), tensor) for key, tensor in tensors.items())
    return {f"{paths[name]}.{endings.get(end, end)}": tensor for name, end, tensor in split}


def test_a_file_in_the_names_of_comfyui_is_the_same_file(write, tmp_path):
    tensors = text_part(0.2) | image_part() | {f"{NORM}.alpha": torch.tensor(1.0)}
    kohyas = read_learned_file(write(tensors))
    path = write(in_comfyui_names(tensors), "comfyui.safetensors")
    comfys = read_learned_file(path)
    assert comfys.other_model == "Anima"
    assert not comfys.ignored
    assert comfys.modules.keys() == kohyas.modules.keys()
    for name, module in kohyas.modules.items():
        assert comfys.modules[name].keys() == module.keys()
    target = tmp_path / "half.safetensors"
    flags = ["--rescale_text_encoder", "0.5", "--output", str(target)]
    assert main(["doctor", str(path), *flags]) == 0
    before, behind = load_file(path), load_file(target)
    assert before.keys() == behind.keys()
    for key, tensor in before.items():
        is_factor = key.startswith("text_encoders") and "lora_B" in key
        torch.testing.assert_close(behind[key], 0.5 * tensor if is_factor else tensor)


def test_a_file_of_wan_is_not_taken_for_one_of_anima(write, capsys):
    tensors = {f"diffusion_model.blocks.{n}.self_attn.q.lora_A.weight": torch.ones(4, 8)
               for n in range(3)}  # fmt: skip
    refused([write(tensors)], "neither a LoRA nor an embedding", capsys)


@pytest.mark.parametrize(
    ("arguments", "is_told"),
    [("{}", True), ('{"network_reg_lrs": "blocks.*=1e-3"}', False),
     ('{"loraplus_lr_ratio": "4"}', False)],
)  # fmt: skip
def test_an_enlarged_part_is_told_where_the_rates_are_known(arguments, is_told, write):
    rates = {"ss_unet_lr": "1e-4", "ss_text_encoder_lr": "[1e-5]", "ss_optimizer": "AdamW8bit"}
    path = write(text_part(0.1) | image_part(0.2), ss_network_args=arguments, **rates)
    found = amplification(read_learned_file(path))
    assert found == (pytest.approx(5, rel=0.2) if is_told else None)


# --- one file of weights --------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["beside", "checkout"])
def test_a_file_of_weights_takes_the_configuration_beside_it_or_of_sd_scripts(
    place, qwen3_folder, tmp_path
):
    weights = load_file(qwen3_folder / "model.safetensors")
    shipped = tmp_path / "sd-scripts" / "configs" / "qwen3_06b"
    target = tmp_path if place == "beside" else shipped
    target.mkdir(parents=True, exist_ok=True)
    for path in qwen3_folder.glob("*.json"):
        (target / path.name).write_bytes(path.read_bytes())
    for prefix in ("model.", ""):
        named = {prefix + name.removeprefix("model."): tensor for name, tensor in weights.items()}
        save_file(named, tmp_path / "qwen_3_06b_base.safetensors")
        models = load_anima_text(
            str(tmp_path / "qwen_3_06b_base.safetensors"),
            environment={"SD_SCRIPTS_DIR": str(tmp_path / "sd-scripts")},
        )
        found = models.text_encoders[0].model.state_dict()
        for name, tensor in language_model().model.state_dict().items():
            torch.testing.assert_close(found[name], tensor)


def test_the_tokenizer_that_sd_scripts_ships_is_read(tmp_path):
    if not SD_SCRIPTS_DIR:
        pytest.skip("SD_SCRIPTS_DIR is not set")
    from mlm_plugin.models.qwen3 import _tokenizer

    tokenizer = _tokenizer(Path(SD_SCRIPTS_DIR) / "configs" / "qwen3_06b")
    encoder = LanguageModelEncoder(tokenizer, None)
    positions = encoder.positions_around("a photo of sks girl, in the café", "sks girl")
    ids = tokenizer("a photo of sks girl, in the café").input_ids
    assert tokenizer.decode([ids[i] for i in positions]) == " photo of, in the café"


# --- refusals -------------------------------------------------------------------------------------


def refused(flags, word, capsys):
    assert main(["doctor", *map(str, flags)]) == 2
    error = capsys.readouterr().err.strip()
    assert word in error
    assert "\n" not in error


def test_a_base_for_anima_and_an_encoder_for_others_are_refused(
    qwen3_folder, toy_folder, write, capsys
):
    path = write(text_part(0.1))
    refused([path, "--base", toy_folder], "give its text encoder Qwen3 with --qwen3", capsys)
    for name, model in (
        ("lora_unet_double_blocks_0_img_attn_qkv", "FLUX"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "Stable Diffusion"),
    ):
        tensors = {f"{name}.lora_down.weight": torch.ones(4, 8)}
        tensors[f"{name}.lora_up.weight"] = torch.ones(8, 4)
        other = write(tensors, f"{model}.safetensors")
        refused([other, "--qwen3", qwen3_folder], f"is for {model}, not for Anima", capsys)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--qwen3", "/absent"], "/absent does not exist"),
        (["--qwen3", "x", "--base", "y"], "drop one"),
        (["--qwen3", "x", "--clip_skip", "2"], "drop one"),
        (["--page", "p.html"], "for Anima --qwen3"),
    ],
)
def test_options_that_do_not_fit_are_refused(flags, word, write, capsys):
    refused([write(text_part(0.1)), *flags], word, capsys)


def test_another_model_as_the_encoder_is_refused(toy_folder, tmp_path, write, capsys, monkeypatch):
    monkeypatch.delenv("SD_SCRIPTS_DIR", raising=False)
    path = write(text_part(0.1))
    refused([path, "--qwen3", toy_folder], "no config.json of a language model", capsys)
    refused([path, "--qwen3", toy_folder / "text_encoder"], "type clip_text_model", capsys)
    save_file({"model.diffusion_model.x": torch.ones(1)}, tmp_path / "sd.safetensors")
    refused([path, "--qwen3", tmp_path / "sd.safetensors"], "holds no language model", capsys)
    bare = tmp_path / "bare" / "qwen.safetensors"
    bare.parent.mkdir()
    save_file({"model.embed_tokens.weight": torch.ones(2, 2)}, bare)
    refused([path, "--qwen3", bare], "holds weights alone", capsys)


def test_an_encoder_of_another_size_or_with_gaps_is_refused(
    qwen3_folder, byte_tokenizer, tmp_path, write, capsys
):
    path = write(text_part(0.1))
    language_model(width=24).save_pretrained(tmp_path / "wide")
    byte_tokenizer.save_pretrained(tmp_path / "wide")
    refused([path, "--qwen3", tmp_path / "wide"], "no layer of their shape for", capsys)
    weights = load_file(tmp_path / "wide" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "wide" / "model.safetensors")
    refused([path, "--qwen3", tmp_path / "wide"], "lacks 1 tensors", capsys)


def test_a_tokenizer_that_is_absent_or_of_another_model_is_refused(
    qwen3_folder, byte_tokenizer, tmp_path, write, capsys
):
    path, folder = write(text_part(0.1)), tmp_path / "bare"
    language_model().save_pretrained(folder)
    refused([path, "--qwen3", folder], "holds no tokenizer", capsys)
    (folder / "tokenizer.json").write_text("{}")
    refused([path, "--qwen3", folder], "the tokenizer cannot be read", capsys)
    larger = copy.deepcopy(byte_tokenizer)
    larger.add_tokens([f"<{number}>" for number in range(9)])
    larger.save_pretrained(folder)
    refused([path, "--qwen3", folder], "do not belong together", capsys)


def test_a_file_without_text_part_cannot_be_mended(qwen3_folder, write, tmp_path, capsys):
    flags = ["--qwen3", qwen3_folder, "--fit", "--output", tmp_path / "m.safetensors"]
    refused([write(image_part()), *flags], "there is nothing to rescale", capsys)


def test_prompts_that_cannot_be_compared_are_refused(qwen3_folder, write, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    flags = [write(text_part(0.1)), "--qwen3", qwen3_folder, "--prompts", prompts]
    prompts.write_text(f"{'a very long prompt ' * 200} of {{}}\n")
    refused(flags, "the trigger is cut off", capsys)
    prompts.write_text("{}\n")
    refused(flags, "nothing around {} to compare", capsys)
