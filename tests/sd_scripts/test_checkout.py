"""The sd-scripts host in a real checkout: every kind of run, some steps each.

Runs where SD_SCRIPTS_DIR names a checkout, with the Python of its environment. The models have real
module names and toy widths (``shrunken_sd_scripts.py``); pictures and vocabulary are real.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CHECKOUT = os.environ.get("SD_SCRIPTS_DIR")
PROGRAM = Path(__file__).parent / "shrunken_sd_scripts.py"
ROOT = Path(__file__).parents[2]
PHOTOS = ROOT.parent / "shared" / "data" / "dreambooth" / "dog"
STORE = "weights_sd_scripts.json"  # of v0.10.1 with the libraries it pins
LORA = ("--network_module", "networks.lora", "--network_dim", "4", "--network_alpha", "4")

LYCORIS = "3.2.0.post2"

pytestmark = [
    pytest.mark.skipif(CHECKOUT is None, reason="SD_SCRIPTS_DIR names no checkout of sd-scripts"),
    pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photos (shared/data) are not here"),
]


def call(*arguments, **environment):
    """Run the program; returns what it printed."""
    variables = os.environ | {"SD_SCRIPTS_DIR": CHECKOUT, "HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run(
        [*map(str, arguments)], capture_output=True, text=True, env=variables, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, contextualizers, tokenizers and photos, by their names in the runs."""
    folder = tmp_path_factory.mktemp("sd-scripts")
    tokenizer = ROOT.parent / "shared" / "data" / "clip-vit-large-patch14-tokenizer"
    if not tokenizer.is_dir():
        pytest.skip("the real CLIP vocabulary (shared/data) is not here")
    call(sys.executable, PROGRAM, "build", folder, tokenizer)
    for name in ("data/2_sks dog", "token/2_zxq"):
        (folder / name).mkdir(parents=True)
        for photo in sorted(PHOTOS.glob("*.jpg"))[:4]:
            shutil.copyfile(photo, folder / name / photo.name)
    return folder


@pytest.fixture
def arguments(folder, tmp_path):
    """Flags that all runs share; later ones take precedence."""
    return [
        *("--pretrained_model_name_or_path", folder / "sd15"),
        *("--tokenizer_cache_dir", folder / "tokenizers"),
        *("--train_data_dir", folder / "data", "--resolution", "64", "--enable_bucket"),
        *("--min_bucket_reso", "64", "--max_bucket_reso", "128"),
        *("--max_train_steps", "3", "--max_data_loader_n_workers", "0", "--seed", "7"),
        *("--learning_rate", "1e-3", "--save_model_as", "safetensors"),
        *("--output_dir", tmp_path / "out", "--logging_dir", tmp_path / "logs"),
    ]


@pytest.fixture
def both(arguments, folder, tmp_path):
    """The files of a plain run and of a run with the term, and the curves of the latter."""

    def both(script, *flags, ours=(), contextualizer="sd15.safetensors", weight=0.1):
        plain = ["plain", script, *arguments, *flags, "--output_name", "plain"]
        call(sys.executable, PROGRAM, *plain)
        files = ",".join(str(folder / name) for name in contextualizer.split(","))
        call(
            *(sys.executable, PROGRAM, "mlm", *arguments, *flags, "--output_name", "mlm"),
            *("--logging_dir", tmp_path / "our_logs", "--mlm_loss_weight", weight),
            *("--mlm_target", "class", "--mlm_contextualizer", files, *ours),
        )
        out = tmp_path / "out"
        plain, ours = out / "plain.safetensors", out / "mlm.safetensors"
        assert shapes(plain) == shapes(ours)
        assert all(torch.isfinite(value).all() for value in load_file(ours).values())
        return plain, ours, curves(tmp_path / "our_logs")

    return both


@pytest.fixture
def stays(same_weights):
    """The weights of a run are those of before, in the version that the digests are of."""

    def stays(run, file):
        if (Path(CHECKOUT) / "train_textual_inversion_XTI.py").is_file():  # v0.11 has none
            same_weights(STORE, run, [file])

    return stays


def need_lycoris():
    """Skip, by name, where LyCORIS is missing or fails in the plain scripts too."""
    pytest.importorskip("lycoris")
    found = importlib.metadata.version("lycoris_lora")
    if int(found.split(".")[0]) > 3:
        pytest.skip(f"lycoris_lora {found} fails in plain sd-scripts; install {LYCORIS}")


def shapes(path):
    return {name: (value.shape, value.dtype) for name, value in load_file(path).items()}


def changed(first, second):
    """Names of the tensors in which two files differ."""
    first, second = load_file(first), load_file(second)
    return {name for name in first if not torch.equal(first[name], second[name])}


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def curves(folder):
    """Scalars of all TensorBoard files below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = {}
    for path in folder.rglob("events*"):
        events = EventAccumulator(str(path))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            values[tag] = [event.value for event in events.Scalars(tag)]
    return values


def assert_logged(values, *, steps=3):
    for tag in ("loss/diffusion", "loss/mlm", "loss/mlm_weighted", "mlm/accuracy"):
        assert len(values[tag]) == steps, tag


def test_at_weight_0_the_lora_is_the_plain_one_bit_for_bit(both, stays):
    plain, ours, values = both("train_network.py", *LORA, weight=0)
    assert not changed(plain, ours)
    stays("lora, weight 0", ours)
    assert "loss/mlm" not in values
    assert not any("mlm" in name for name in metadata_of(ours))


def test_a_lora_of_sd_1(both, stays):
    plain, ours, values = both("train_network.py", *LORA)
    assert len(load_file(ours)) == 3 * (72 + 192)
    stays("lora", ours)
    assert any(name.startswith("lora_te_") for name in changed(plain, ours))
    assert_logged(values)
    assert values["loss/current"] == values["loss/diffusion"]
    metadata = metadata_of(ours)
    assert metadata["ss_mlm_placeholder_token"] == "sks"
    assert metadata["ss_network_module"] == "networks.lora"


@pytest.mark.parametrize("algo", ["locon", "lokr"])
def test_lycoris(both, algo):
    need_lycoris()
    network = ("--network_module", "lycoris.kohya", "--network_dim", "4", "--network_alpha", "4")
    plain, ours, values = both(
        "train_network.py", *network, "--network_args", f"algo={algo}", "conv_dim=4"
    )
    assert any(name.startswith("lora_te_") for name in changed(plain, ours))
    assert_logged(values)


def test_a_lora_of_sdxl_hears_the_term_in_both_text_encoders(both, folder, stays):
    model = ("--pretrained_model_name_or_path", folder / "sdxl.safetensors")
    plain, ours, values = both(
        *("sdxl_train_network.py", *model, *LORA),
        contextualizer="sdxl1.safetensors,sdxl2.safetensors",
    )
    assert len(load_file(ours)) == 3 * (72 + 192 + 722)
    stays("SDXL lora", ours)
    names = changed(plain, ours)
    assert any(name.startswith("lora_te1_") for name in names)
    assert any(name.startswith("lora_te2_") for name in names)
    # the U-Net sees the state before the last layer, and so does the term
    assert not any(name.startswith("lora_te1_text_model_encoder_layers_11_") for name in names)
    assert_logged(values)
    assert metadata_of(ours)["ss_mlm_contextualizer"].count(",") == 1


@pytest.mark.parametrize("target", ["states", "class"])
def test_the_u_net_alone_hears_the_term_in_its_cross_attention(both, target):
    plain, ours, values = both(
        *("train_network.py", *LORA, "--network_train_unet_only"), ours=("--mlm_target", target)
    )
    names = changed(plain, ours)
    assert names
    assert all(name.startswith("lora_unet_") for name in load_file(ours))
    assert any("attn2_to_k" in name for name in names)
    assert metadata_of(ours)["ss_mlm_read_at"] == "cross_attention"
    assert len(values["loss/mlm"]) == 3
    assert values["loss/mlm"][0] < values["loss/mlm"][-1]  # it starts where nothing is changed


def test_sdxl_with_cached_outputs_hears_the_term_in_its_cross_attention(both, folder):
    model = ("--pretrained_model_name_or_path", folder / "sdxl.safetensors")
    cached = ("--network_train_unet_only", "--cache_text_encoder_outputs")
    plain, ours, values = both(
        *("sdxl_train_network.py", *model, *LORA, *cached), ours=("--mlm_target", "states")
    )
    assert len(load_file(ours)) == 3 * 722
    assert any("attn2_to_v" in name for name in changed(plain, ours))
    assert len(values["loss/mlm"]) == 3


@pytest.fixture
def parts(folder):
    """Where the transformers have their files, and flags that SD 3 and FLUX share."""
    parts = folder / "parts"
    shared = ("--t5xxl", parts / "t5xxl.safetensors", "--t5xxl_max_token_length", "32")
    network = ("--network_dim", "4", "--network_alpha", "4")
    return {
        "sd3": (
            *("--pretrained_model_name_or_path", parts / "sd3.safetensors", *shared),
            *("--clip_l", parts / "sd3_l.safetensors", "--clip_g", parts / "sd3_g.safetensors"),
            *("--vae", parts / "sd3_vae.safetensors"),
            *("--network_module", "networks.lora_sd3", *network),
        ),
        "flux": (
            *("--pretrained_model_name_or_path", parts / "flux.safetensors", *shared),
            *("--clip_l", parts / "flux_l.safetensors", "--ae", parts / "flux_ae.safetensors"),
            *("--network_module", "networks.lora_flux", *network),
        ),
        "anima": (
            *("--pretrained_model_name_or_path", parts / "anima.safetensors"),
            *("--qwen3", folder / "qwen3", "--vae", parts / "qwen_vae.safetensors"),
            *("--timestep_sampling", "sigmoid"),
            *("--network_module", "networks.lora_anima", *network),
        ),
        "lumina": (
            *("--pretrained_model_name_or_path", parts / "lumina.safetensors"),
            *("--gemma2", parts / "gemma2.safetensors", "--ae", parts / "flux_ae.safetensors"),
            *("--network_module", "networks.lora_lumina", *network),
        ),
    }


@pytest.mark.parametrize("cached", [(), ("--cache_text_encoder_outputs",)])
def test_a_lora_of_sd3_hears_the_term_in_both_clip_encoders(both, parts, cached):
    plain, ours, values = both(
        *("sd3_train_network.py", *parts["sd3"], *cached),
        contextualizer="sd3_l.safetensors,sd3_g.safetensors",
    )
    names = changed(plain, ours)
    assert any(name.startswith("lora_te1_") for name in names)
    assert any(name.startswith("lora_te2_") for name in names)
    assert not any(name.startswith("lora_te3_") for name in load_file(ours))
    assert_logged(values)
    assert metadata_of(ours)["ss_mlm_contextualizer"].count(",") == 1


@pytest.mark.parametrize("cached", [(), ("--cache_text_encoder_outputs",)])
def test_a_lora_of_flux_hears_the_term_in_clip(both, parts, cached):
    plain, ours, values = both(
        *("flux_train_network.py", *parts["flux"], *cached), contextualizer="flux_l.safetensors"
    )
    names = changed(plain, ours)
    # FLUX sees the last state, and so does the term
    assert any(name.startswith("lora_te1_text_model_encoder_layers_11_") for name in names)
    assert not any(name.startswith("lora_te3_") for name in load_file(ours))
    assert_logged(values)
    assert metadata_of(ours)["ss_mlm_contextualizer"].count(",") == 0


def test_weights_in_captions_are_no_part_of_the_prompts(arguments, folder, tmp_path):
    launched = (sys.executable, PROGRAM, "mlm", *LORA)
    term = ("mlm_loss_weight=0.1", "mlm_prompt_set=captions", "mlm_target=class")
    term += (f"mlm_contextualizer={folder / 'sd15.safetensors'}",)
    flags = [f"--{part}" for part in term]
    module = (sys.executable, PROGRAM, "plain", "train_network.py", "--network_dim", "4")
    module += ("--network_module", "mlm_plugin.kohya", "--network_args", *term)
    weighted = "a photo of a (sks dog:1.3) on a [red] ((sofa))"
    found = []
    for caption, command in (
        ("a photo of a sks dog on a red sofa", (*launched, *flags)),
        (weighted, (*launched, *flags, "--weighted_captions")),
        (weighted, (*module, "--weighted_captions")),
    ):
        data = tmp_path / f"data {len(found)}"
        target = data / "2_sks dog"
        target.mkdir(parents=True)
        shutil.copyfile(sorted(PHOTOS.glob("*.jpg"))[0], target / "photo.jpg")
        (target / "photo.txt").write_text(caption)
        logs = tmp_path / f"logs {len(found)}"
        call(*command, *arguments, "--caption_extension", ".txt", "--train_data_dir", data,
             "--logging_dir", logs)  # fmt: skip
        found.append(curves(logs)["loss/mlm"][0])
    assert found[0] == found[1] == found[2]


def test_textual_inversion(both, folder, stays):
    plain, ours, values = both(
        "train_textual_inversion.py",
        *("--train_data_dir", folder / "token", "--token_string", "zxq", "--init_word", "dog"),
        *("--num_vectors_per_token", "2"),
        # masked words pull from the first step on; a teacher only once the concept has moved away
        ours=("--method", "textual_inversion", "--mlm_target", "word"),
    )
    assert metadata_of(ours)["ss_mlm_class_token"] == "dog"  # of init_word
    assert changed(plain, ours) == {"emb_params"}
    stays("textual_inversion", ours)
    assert load_file(ours)["emb_params"].shape[0] == 2
    assert metadata_of(ours)["ss_mlm_placeholder_token"] == "zxq zxq1"
    assert_logged(values)


def test_dreambooth(both, stays):
    plain, ours, values = both("train_db.py", ours=("--method", "dreambooth"))
    names = changed(plain, ours)
    assert any(name.startswith("cond_stage_model.") for name in names)
    assert not any(name.startswith("first_stage_model.") for name in names)
    stays("dreambooth", ours)
    assert_logged(values)
    assert values["loss"] == values["loss/diffusion"]


def test_dreambooth_of_the_u_net_alone_is_read_at_its_cross_attention(both):
    plain, ours, values = both(
        *("train_db.py", "--stop_text_encoder_training", "-1"),
        ours=("--method", "dreambooth", "--mlm_target", "states"),
        weight=1,
    )
    names = changed(plain, ours)
    assert any("attn2.to_k" in name for name in names)
    assert not any(name.startswith("cond_stage_model.") for name in names)
    assert len(values["loss/mlm"]) == 3
    assert values["loss/mlm"][0] < values["loss/mlm"][-1]


@pytest.mark.parametrize("flags", [(), ("--cache_text_encoder_outputs",)])
def test_whole_sdxl_without_text_encoders_is_read_at_its_cross_attention(both, folder, flags):
    plain, ours, values = both(
        *("sdxl_train.py", "--pretrained_model_name_or_path", folder / "sdxl.safetensors", *flags),
        ours=("--method", "dreambooth", "--mlm_target", "states"),
        weight=1,
    )
    assert any("attn2.to_v" in name for name in changed(plain, ours))
    assert values["loss/mlm"][0] < values["loss/mlm"][-1]


def test_the_clip_encoders_of_a_whole_sd3_hear_the_term(arguments, parts, folder, tmp_path):
    model = parts["sd3"][: parts["sd3"].index("--network_module")]
    flags = (*arguments, *model, "--train_text_encoder")
    call(sys.executable, PROGRAM, "plain", "sd3_train.py", *flags, "--output_name", "plain")
    files = f"{folder / 'sd3_l.safetensors'},{folder / 'sd3_g.safetensors'}"
    printed = call(
        *(sys.executable, PROGRAM, "mlm", *flags, "--method", "dreambooth", "--output_name", "mlm"),
        *("--logging_dir", tmp_path / "ours", "--mlm_loss_weight", "0.1"),
        *("--mlm_target", "word", "--mlm_contextualizer", files),
    )
    assert "read at encoder, 2 text encoders" in printed
    for part in ("clip_l", "clip_g"):
        plain, ours = (tmp_path / "out" / f"{name}_{part}.safetensors" for name in ("plain", "mlm"))
        assert shapes(plain) == shapes(ours)
        assert changed(plain, ours)
    assert_logged(curves(tmp_path / "ours"))


def test_validation_and_states_are_those_of_the_plain_trainer(arguments, folder, tmp_path):
    flags = [
        *(*arguments, *LORA, "--gradient_checkpointing", "--save_state_on_train_end"),
        *("--validation_split", "0.4", "--validate_every_n_steps", "3", "--validation_seed", "1"),
    ]
    call(sys.executable, PROGRAM, "plain", "train_network.py", *flags, "--output_name", "plain")
    ours = [
        *("--logging_dir", tmp_path / "ours", "--output_name", "ours"),
        *(
            "--mlm_target",
            "class",
            "--mlm_contextualizer",
            folder / "sd15.safetensors",
            "--mlm_loss_weight",
        ),
    ]
    printed = call(sys.executable, PROGRAM, "mlm", *flags, *ours, "1e-9")
    for tag in ("loss/validation/step_average", "loss/validation/step_divergence"):
        plain, found = curves(tmp_path / "logs")[tag], curves(tmp_path / "ours")[tag]
        assert plain == pytest.approx(found, rel=1e-4), tag
    assert "MLM term: concept 'sks dog' (class word 'dog', in " in printed
    assert ", mlm=" in printed
    states = tmp_path / "out"
    assert (states / "ours-state" / "mlm_state.json").is_file()
    longer = ("--max_train_steps", "5", "--output_name", "resumed", "--resume")
    call(
        *(sys.executable, PROGRAM, "plain", "train_network.py", *flags, *longer),
        states / "ours-state",
    )
    printed = call(
        *(sys.executable, PROGRAM, "mlm", *flags, *ours, "0.1", *longer),
        states / "plain-state",
    )
    assert "counting from 0" in " ".join(printed.split())


def test_two_processes_end_with_the_same_weights(arguments, folder, tmp_path):
    launcher = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--main_process_port", "29763"),
    ]
    call(
        *(*launcher, PROGRAM, "mlm", *arguments, *LORA, "--network_dropout", "0.1"),
        *("--gradient_accumulation_steps", "2", "--mlm_loss_weight", "0.1"),
        *("--mlm_target", "class", "--mlm_contextualizer", folder / "sd15.safetensors"),
        ACCELERATE_USE_CPU="1",
        RANK_WEIGHTS=str(tmp_path),
    )
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert len(first) == 3 * (72 + 192)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_both_hosts_train_the_same(arguments, folder, tmp_path):
    """One photo, the same start and the same draws: the losses agree step by step."""
    pytest.importorskip("peft", reason="the standalone trainer needs peft")
    (tmp_path / "one" / "4_sks dog").mkdir(parents=True)
    shutil.copyfile(PHOTOS / "00.jpg", tmp_path / "one" / "4_sks dog" / "00.jpg")
    call(*(sys.executable, PROGRAM, "plain", "train_network.py", *arguments, *LORA))
    flags = [
        *(*arguments, *LORA, "--train_data_dir", tmp_path / "one"),
        *("--network_weights", tmp_path / "out" / "last.safetensors"),
        *(
            "--mlm_target",
            "class",
            "--mlm_contextualizer",
            folder / "sd15.safetensors",
            "--mlm_loss_weight",
            "0.1",
        ),
    ]
    found = {}
    for host in ("mlm", "standalone"):
        output = ("--logging_dir", tmp_path / host, "--output_name", host)
        alone = ("--host", "standalone") if host == "standalone" else ()
        call(sys.executable, PROGRAM, host, *flags, *output, *alone, SHARED_DRAWS="1")
        found[host] = curves(tmp_path / host)
    for tag in ("loss/diffusion", "loss/mlm", "mlm/accuracy"):
        assert found["mlm"][tag] == pytest.approx(found["standalone"][tag], rel=1e-4), tag
    out = tmp_path / "out"
    assert shapes(out / "mlm.safetensors") == shapes(out / "standalone.safetensors")


# --- the network module -----------------------------------------------------------------------

CHANGING = ("ss_output_name", "modelspec.title", "modelspec.date", "sshs_", "_at", "_session_id")
"""Parts of the metadata's names that differ from run to run."""


@pytest.fixture
def module(arguments, folder, tmp_path):
    """The same for a run with our network module around the one of the plain run."""

    def module(
        script, *flags, inner="networks.lora", rest=(), ours=(), weight=0.1, contextualizer=None
    ):
        rank = ("--network_dim", "4", "--network_alpha", "4")
        shared = ["plain", script, *arguments, *flags, *rank]
        own = ("--network_args", *rest) if rest else ()
        call(
            *(sys.executable, PROGRAM, *shared, "--network_module", inner, *own),
            *("--output_name", "plain"),
        )
        names = contextualizer or ["sd15"]
        files = ",".join(str(folder / f"{name}.safetensors") for name in names)
        given = (f"inner={inner}", f"mlm_loss_weight={weight}")
        if names != ["auto"] and "mlm_target=states" not in ours:
            given += ("mlm_target=class", f"mlm_contextualizer={files}")
        call(
            *(sys.executable, PROGRAM, *shared, "--network_module", "mlm_plugin.kohya"),
            *("--network_args", *rest, *given, *ours, "--output_name", "mlm"),
            *("--logging_dir", tmp_path / "our_logs"),
        )
        plain, ours = (tmp_path / "out" / f"{name}.safetensors" for name in ("plain", "mlm"))
        assert shapes(plain) == shapes(ours)
        assert lasting(metadata_of(plain)) == lasting(metadata_of(ours))
        return plain, ours, curves(tmp_path / "our_logs")

    return module


def lasting(metadata):
    """What runs of the same options have in common."""
    return {
        name: value
        for name, value in metadata.items()
        if not name.startswith("ss_mlm_") and not any(part in name for part in CHANGING)
    }


def distributions():
    return [found.metadata["Name"] for found in importlib.metadata.distributions()]


def version_of(name):
    return tuple(map(int, importlib.metadata.version(name).split(".")[:2]))


def has_module(name):
    return (Path(CHECKOUT) / f"{name.replace('.', '/')}.py").is_file()


def test_module_at_weight_0_is_the_plain_run_bit_for_bit(module):
    plain, ours, values = module("train_network.py", weight=0)
    assert not changed(plain, ours)
    assert "loss/mlm" not in values
    assert not any("mlm" in name for name in metadata_of(ours))


def test_module_and_launcher_train_the_same(module, arguments, folder, tmp_path):
    """Alone, and the module in the launcher, which adds the term once."""
    plain, ours, values = module("train_network.py")
    assert any(name.startswith("lora_te_") for name in changed(plain, ours))
    for name, inner in (("launched", ()), ("both", ("--network_module", "mlm_plugin.kohya"))):
        call(
            *(sys.executable, PROGRAM, "mlm", *arguments, *LORA, *inner, "--output_name", name),
            *("--logging_dir", tmp_path / name, "--mlm_loss_weight", "0.1"),
            *("--mlm_target", "class", "--mlm_contextualizer", folder / "sd15.safetensors"),
        )
        launched = curves(tmp_path / name)
        for tag in ("loss/diffusion", "loss/mlm", "mlm/accuracy"):
            assert values[tag] == pytest.approx(launched[tag], rel=1e-6), tag
        assert not changed(ours, tmp_path / "out" / f"{name}.safetensors")
    assert values["loss/current"] == values["loss/diffusion"]


@pytest.mark.parametrize(
    ("inner", "rest"),
    [
        ("lycoris.kohya", ("algo=locon", "conv_dim=4")),
        ("lycoris.kohya", ("algo=lokr", "conv_dim=4")),
        ("networks.oft", ()),
    ],
)
def test_module_around_other_networks(module, inner, rest):
    if inner.startswith("lycoris"):
        need_lycoris()
    alone = inner == "networks.oft"  # on the U-Net only
    unet_only = ("--network_train_unet_only",) if alone else ()
    plain, ours, values = module("train_network.py", *unet_only, inner=inner, rest=rest)
    assert any("_te" in name for name in changed(plain, ours)) is not alone
    assert changed(plain, ours)
    assert len(values["loss/mlm"]) == 3


@pytest.mark.parametrize(
    ("inner", "rest"), [("networks.loha", ("conv_dim=4",)), ("networks.lokr", ())]
)
def test_module_around_native_loha_and_lokr(module, folder, inner, rest):
    """They are made for SDXL and Anima."""
    if not has_module(inner):
        pytest.skip(f"this checkout has no {inner}")
    model = ("--pretrained_model_name_or_path", folder / "sdxl.safetensors")
    encoders = ["sdxl1", "sdxl2"]
    plain, ours, values = module(
        "sdxl_train_network.py", *model, inner=inner, rest=rest, contextualizer=encoders
    )
    assert any("_te" in name for name in changed(plain, ours))
    assert_logged(values)


def test_module_on_sdxl(module, folder):
    model = ("--pretrained_model_name_or_path", folder / "sdxl.safetensors")
    plain, ours, values = module("sdxl_train_network.py", *model, contextualizer=["sdxl1", "sdxl2"])
    names = changed(plain, ours)
    assert any(name.startswith("lora_te1_") for name in names)
    assert any(name.startswith("lora_te2_") for name in names)
    assert_logged(values)


def test_module_on_sdxl_with_cached_outputs(module, folder):
    model = ("--pretrained_model_name_or_path", folder / "sdxl.safetensors")
    cached = ("--network_train_unet_only", "--cache_text_encoder_outputs")
    plain, ours, values = module(
        "sdxl_train_network.py", *model, *cached, ours=("mlm_target=states",)
    )
    assert any("attn2_to_v" in name for name in changed(plain, ours))
    assert values["loss/mlm"][-1] > 0


@pytest.mark.parametrize(
    ("script", "arch", "encoders"),
    [
        ("sd3_train_network.py", "sd3", ["sd3_l", "sd3_g"]),
        ("flux_train_network.py", "flux", ["flux_l"]),
    ],
)
def test_module_on_sd3_and_flux(module, parts, script, arch, encoders):
    inner = parts[arch][-5]
    plain, ours, values = module(script, *parts[arch][:-6], inner=inner, contextualizer=encoders)
    assert any(name.startswith("lora_te1_") for name in changed(plain, ours))
    assert_logged(values)


CACHED = ("--network_train_unet_only", "--cache_text_encoder_outputs")
FAMILIES = ("sd3", "flux", "anima", "lumina")


@pytest.fixture
def family(module, parts):
    """A plain run of a transformer and one with the module around its network."""

    def family(arch, *flags, **settings):
        shared, inner = parts[arch][:-6], parts[arch][-5]
        return module(f"{arch}_train_network.py", *shared, *flags, inner=inner, **settings)

    return family


@pytest.mark.parametrize("arch", ["anima", "lumina"])
def test_module_at_weight_0_is_the_plain_run_of_a_transformer(family, arch):
    plain, ours, values = family(arch, weight=0)
    assert not changed(plain, ours)
    assert "loss/mlm" not in values


@pytest.mark.parametrize("arch", ["anima", "lumina"])
@pytest.mark.parametrize("target", ["class", "states"])
def test_module_on_a_language_model_that_reads_itself(family, arch, target):
    """No contextualizer is asked for, and the term starts at zero."""
    ours = (f"mlm_target={target}",)
    plain, ours, values = family(arch, ours=ours, weight=10, contextualizer=["auto"])
    assert any(name.startswith("lora_te_") for name in changed(plain, ours))
    assert values["loss/mlm"][0] == pytest.approx(0, abs=1e-6)
    assert max(values["loss/mlm"]) > 0
    assert values["loss/diffusion"][0] == values["loss/current"][0]
    read_at = "both" if (arch, target) == ("anima", "states") else "encoder"
    assert metadata_of(ours)["ss_mlm_read_at"] == read_at


@pytest.mark.parametrize("arch", FAMILIES)
def test_module_reads_a_transformer_that_is_trained_alone(family, arch):
    """With cached outputs, the usual way; nobody asks for ``states``."""
    plain, ours, values = family(arch, *CACHED, weight=10, contextualizer=["auto"])
    assert changed(plain, ours)
    assert not any(name.startswith("lora_te") for name in load_file(ours))
    assert values["loss/mlm"][0] == 0
    assert values["loss/mlm"][-1] > 0
    facts = metadata_of(ours)
    assert (facts["ss_mlm_read_at"], facts["ss_mlm_target"]) == ("cross_attention", "states")


def test_module_trains_the_adapter_of_anima_with_the_language_model_kept(family):
    rest = ("train_llm_adapter=true",)
    plain, ours, values = family("anima", *CACHED, rest=rest, weight=10, contextualizer=["auto"])
    assert any("llm_adapter" in name for name in changed(plain, ours))
    assert values["loss/mlm"][-1] > 0


@pytest.mark.parametrize("arch", ["sd3", "flux"])
def test_module_reads_t5_where_states_are_compared(family, arch):
    plain, ours, values = family(
        arch, rest=("train_t5xxl=True",), ours=("mlm_target=states",), contextualizer=["auto"]
    )
    assert any(name.startswith("lora_te3_") for name in changed(plain, ours))
    assert values[f"loss/mlm_te{3 if arch == 'sd3' else 2}"][-1] > 0


def test_module_reads_a_t5_in_fp8_in_the_precision_of_the_run(family, folder, tmp_path):
    weights = load_file(folder / "parts" / "t5xxl.safetensors")
    file = tmp_path / "t5xxl_fp8.safetensors"
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in weights.items()}, file)
    flags = ("--network_train_unet_only", "--cache_text_encoder_outputs", "--t5xxl", file)
    _plain, _ours, values = family(
        "flux", *flags, "--fp8_base", "--mixed_precision", "bf16", contextualizer=["auto"]
    )
    assert values["loss/mlm"][0] == 0
    assert values["loss/mlm"][-1] > 0


@pytest.mark.parametrize("arch", ["anima", "lumina"])
def test_module_and_launcher_train_a_language_model_alike(family, parts, arguments, tmp_path, arch):
    _plain, ours, _values = family(arch, contextualizer=["auto"])
    call(
        *(sys.executable, PROGRAM, "mlm", *arguments, *parts[arch]),
        *("--mlm_loss_weight", "0.1", "--output_name", "launched"),
    )
    assert not changed(ours, tmp_path / "out" / "launched.safetensors")


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (("mlm_target=class", "mlm_read_at=both"), "take mlm_target = states"),
        (("mlm_target=word",), "mlm_target = word: no word is masked for a language model"),
        (
            ("mlm_target=class", "mlm_contextualizer=a.safetensors"),
            "mlm_contextualizer = 'a.safetensors' has no effect",
        ),
    ],
)
def test_module_refuses_what_a_language_model_cannot_do(parts, arguments, ours, message):
    command = (
        *(sys.executable, PROGRAM, "plain", "anima_train_network.py", *arguments),
        *(*parts["anima"], "--network_module", "mlm_plugin.kohya", "--network_args", *ours),
    )
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        env=os.environ | {"SD_SCRIPTS_DIR": CHECKOUT, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.stderr.splitlines()[-1]


def test_module_with_accumulation_masks_and_regularization_images(module, folder, tmp_path):
    reg = tmp_path / "reg" / "1_dog"
    reg.mkdir(parents=True)
    shutil.copyfile(sorted(PHOTOS.glob("*.jpg"))[4], reg / "dog.jpg")
    flags = ("--gradient_accumulation_steps", "2", "--masked_loss", "--reg_data_dir", reg.parent)
    plain, ours, values = module("train_network.py", *flags)
    assert len(values["loss/mlm"]) == 6
    assert changed(plain, ours)


def test_module_leaves_validation_alone(module, tmp_path):
    split = ("--validation_split", "0.4", "--validate_every_n_steps", "3", "--validation_seed", "1")
    _plain, _ours, values = module("train_network.py", *split, weight=1e-9)
    tag = "loss/validation/step_average"
    assert values[tag] == pytest.approx(curves(tmp_path / "logs")[tag], rel=1e-4)


def test_module_resumes_and_starts_from_weights(module, arguments, folder, tmp_path):
    plain, ours, _ = module("train_network.py", "--save_state_on_train_end")
    state = tmp_path / "out" / "mlm-state"
    assert (state / "mlm_state.json").is_file()
    again = ["plain", "train_network.py", *arguments, "--network_module", "mlm_plugin.kohya"]
    given = (
        *("--network_args", "mlm_loss_weight=0.1"),
        "mlm_target=class",
        f"mlm_contextualizer={folder / 'sd15.safetensors'}",
    )
    rank = ("--network_dim", "4", "--network_alpha", "4")
    printed = call(
        *(sys.executable, PROGRAM, *again, *rank, *given, "--resume", state),
        *("--max_train_steps", "5", "--output_name", "resumed"),
    )
    assert "continuing from step 3" in " ".join(printed.split())
    weights = ("--network_weights", plain, "--dim_from_weights", "--base_weights", ours)
    states = ("--network_args", "mlm_loss_weight=0.1", "mlm_target=states")
    call(*(sys.executable, PROGRAM, *again, *states, *weights, "--output_name", "continued"))
    assert shapes(tmp_path / "out" / "continued.safetensors") == shapes(ours)


def test_module_in_two_processes_ends_with_the_same_weights(arguments, folder, tmp_path):
    launcher = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--main_process_port", "29764"),
    ]
    call(
        *(*launcher, PROGRAM, "plain", "train_network.py", *arguments),
        *("--network_module", "mlm_plugin.kohya", "--network_dim", "4", "--network_dropout", "0.1"),
        *("--gradient_accumulation_steps", "2", "--network_args", "mlm_loss_weight=0.1"),
        "mlm_target=class",
        f"mlm_contextualizer={folder / 'sd15.safetensors'}",
        ACCELERATE_USE_CPU="1",
        RANK_WEIGHTS=str(tmp_path),
    )
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert len(first) == 3 * (72 + 192)
    assert all(torch.equal(first[name], second[name]) for name in first)


GUI = """\
bucket_no_upscale = true
bucket_reso_steps = 64
caption_extension = ".txt"
clip_skip = 1
dynamo_backend = "no"
enable_bucket = true
epoch = 1
gradient_accumulation_steps = 1
huber_c = 0.1
huber_schedule = "snr"
learning_rate = 0.001
loss_type = "l2"
lr_scheduler = "cosine"
lr_scheduler_args = []
lr_scheduler_num_cycles = 1
lr_scheduler_power = 1
max_bucket_reso = 128
max_data_loader_n_workers = 0
max_grad_norm = 1
max_timestep = 1000
max_train_steps = 3
min_bucket_reso = 64
mixed_precision = "no"
network_alpha = 4
network_dim = 4
noise_offset_type = "Original"
optimizer_args = []
optimizer_type = "AdamW"
output_name = "gui"
prior_loss_weight = 1
resolution = "64,64"
sample_prompts = ""
sample_sampler = "euler_a"
save_every_n_epochs = 1
save_model_as = "safetensors"
save_precision = "float"
seed = 7
text_encoder_lr = [ 0.0005,]
train_batch_size = 1
unet_lr = 0.001
wandb_run_name = "gui"
"""
"""Keys and value types as the kohya_ss GUI saves them, with small numbers."""


@pytest.mark.parametrize("as_flags", [False, True])
def test_module_runs_from_the_toml_of_a_gui(folder, tmp_path, as_flags):
    """Two lines more in the file, or what was typed into the field for additional parameters."""
    inner = "lycoris.kohya" if as_flags else "networks.lora"
    if as_flags:
        need_lycoris()
    ours = ["mlm_loss_weight=0.1", "mlm_target=states"]
    values = {
        "pretrained_model_name_or_path": folder / "sd15",
        "train_data_dir": folder / "data",
        "output_dir": tmp_path / "out",
        "tokenizer_cache_dir": folder / "tokenizers",
        "network_module": inner if as_flags else "mlm_plugin.kohya",
    }
    network_args = ["algo=locon", "conv_dim=4"] if as_flags else ours
    lines = [f'{name} = "{value}"' for name, value in values.items()]
    config = tmp_path / "gui.toml"
    gui = GUI
    if version_of("transformers") >= (5, 6):  # where sd-scripts itself cannot skip layers
        gui = gui.replace("clip_skip = 1\n", "")
    config.write_text(gui + "\n".join((*lines, f"network_args = {json.dumps(network_args)}\n")))
    typed = ("--network_module", "mlm_plugin.kohya", "--network_args", *ours) if as_flags else ()
    call(sys.executable, PROGRAM, "plain", "train_network.py", "--config_file", config, *typed)
    metadata = metadata_of(tmp_path / "out" / "gui.safetensors")
    assert metadata["ss_network_module"] == inner
    assert metadata["ss_mlm_target"] == "states"
    if as_flags:
        wanted = {"algo": "locon", "conv_dim": "4", "dropout": None}
        assert json.loads(metadata["ss_network_args"]) == wanted
    else:
        assert "ss_network_args" not in metadata


def test_our_requirements_change_no_library_of_sd_scripts(tmp_path):
    """Needs an index of packages, or what is missing in pip's cache."""
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--report", report, ROOT],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip("pip cannot reach an index")
    found = {part["metadata"]["name"] for part in json.loads(report.read_text())["install"]}
    assert "mlm-plugin" in found
    present = {name.lower() for name in distributions()}
    assert not {name for name in found - {"mlm-plugin"} if name.lower() in present}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["mlm_los_weight=1"], "did you mean mlm_loss_weight"),
        (["inner=networks.nothing"], "inner = 'networks.nothing': cannot be imported"),
    ],
)
def test_module_refuses_in_one_line(arguments, given, message):
    done = subprocess.run(
        [
            *map(str, (sys.executable, PROGRAM, "plain", "train_network.py", *arguments)),
            *("--network_module", "mlm_plugin.kohya", "--network_args", *given),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"SD_SCRIPTS_DIR": CHECKOUT, "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


WATCHED = ("mlm_page=true", "mlm_keep_best=true")
EVERY = ("--save_every_n_steps", "1", "--network_dropout", "0.1")


@pytest.fixture
def watched(arguments, tmp_path):
    """A run of our module with and without a page; returns its text, once both were compared."""

    def watched(script, *flags, ours=("mlm_target=states",)):
        shared = ["plain", script, *arguments, *EVERY, *flags]
        rank = ("--network_dim", "4", "--network_alpha", "4")
        module = ("--network_module", "mlm_plugin.kohya", "--network_args", *ours)
        call(sys.executable, PROGRAM, *shared, *rank, *module, "--output_name", "bare")
        printed = call(
            *(sys.executable, PROGRAM, *shared, *rank, *module, *WATCHED),
            *("--output_name", "seen"),
        )
        out = tmp_path / "out"
        for path in sorted(out.glob("bare*.safetensors")):
            assert not changed(path, out / path.name.replace("bare", "seen")), path.name
        assert metadata_of(out / "seen-best.safetensors")["ss_output_name"] == "seen"
        assert "page of the run: " in printed
        assert "could not be" not in printed
        return (out / "seen.html").read_text(encoding="utf-8")

    return watched


def test_a_watched_lora_trains_the_same_weights(watched):
    page = watched("train_network.py")
    for part in (
        "sks dog",
        "seen-step00000002",
        "learning_rate",
        "accelerate",
        "What is still read",
    ):
        assert part in page


def test_a_watched_unet_alone_trains_the_same_weights(watched):
    assert "What is still read" in watched("train_network.py", "--network_train_unet_only")


def test_a_watched_lycoris_trains_the_same_weights(watched):
    need_lycoris()
    page = watched("train_network.py", ours=("mlm_target=states", "algo=locon", "conv_dim=4"))
    assert "lycoris_lora" in page


@pytest.mark.parametrize("cached", [False, True])
def test_a_watched_lora_of_sdxl_trains_the_same_weights(watched, folder, cached):
    model = ("--pretrained_model_name_or_path", folder / "sdxl.safetensors")
    flags = ("--network_train_unet_only", "--cache_text_encoder_outputs") if cached else ()
    assert "What is still read" in watched("sdxl_train_network.py", *model, *flags)


def test_a_plain_run_in_the_launcher_is_watched_and_stays_the_plain_one(arguments, tmp_path):
    flags = [*arguments, *LORA, *EVERY, "--output_name"]
    call(sys.executable, PROGRAM, "plain", "train_network.py", *flags, "plain")
    toml = tmp_path / "watch.toml"
    toml.write_text("mlm_loss_weight = 0\nmlm_page = true\nmlm_keep_best = true\n")
    given = ("--config_file", toml, "--save_last_n_steps", "1")
    call(sys.executable, PROGRAM, "mlm", *flags, "seen", *given)
    out = tmp_path / "out"
    assert not changed(out / "plain.safetensors", out / "seen.safetensors")
    assert (out / "seen-best.safetensors").is_file()
    assert "mlm_loss_weight" in (out / "seen.html").read_text(encoding="utf-8")


def test_a_run_that_lost_its_context_ends_and_can_be_resumed(arguments, tmp_path):
    given = ("mlm_loss_weight=0", "mlm_stop_below=0.9")
    run = ["plain", "train_network.py", *arguments, *EVERY, "--network_module", "mlm_plugin.kohya"]
    flags = ("--learning_rate", "0.1", "--output_name", "lost", "--network_args", *given)
    printed = call(sys.executable, PROGRAM, *run, *flags, "--max_train_steps", "8")
    assert "of the context is kept, mlm_stop_below is 90%" in printed
    out = tmp_path / "out"
    files = sorted(out.glob("lost*.safetensors"))
    assert 1 <= len(files) < 8
    step = json.loads((out / "lost-state" / "train_state.json").read_text())["current_step"]
    assert files[-1].name == f"lost-step{step:08d}.safetensors"
    again = ("--resume", out / "lost-state", "--output_name", "on", "--network_args", given[0])
    call(sys.executable, PROGRAM, *run, *again, "--max_train_steps", "9")
    assert (out / "on.safetensors").is_file()


def test_two_processes_end_together_where_the_context_is_lost(arguments, tmp_path):
    launcher = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--main_process_port", "29765"),
    ]
    given = ("mlm_target=states", "mlm_stop_below=0.9", *WATCHED)
    printed = call(
        *(*launcher, PROGRAM, "plain", "train_network.py", *arguments, *EVERY),
        *("--network_module", "mlm_plugin.kohya", "--learning_rate", "0.1"),
        *("--max_train_steps", "8", "--output_name", "lost", "--network_args", *given),
        ACCELERATE_USE_CPU="1",
        RANK_WEIGHTS=str(tmp_path),
    )
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert printed.count("mlm_stop_below is 90%") == 1
    assert (tmp_path / "out" / "lost-state").is_dir()
    assert (tmp_path / "out" / "lost.html").is_file()
    assert not (tmp_path / "out" / "lost.safetensors").exists()


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_page_of_a_transformer_shows_curves_and_settings(family, arch, tmp_path):
    plain, ours, _ = family(arch, weight=0, ours=("mlm_page=true",))
    assert not changed(plain, ours)
    page = (tmp_path / "out" / "mlm.html").read_text(encoding="utf-8")
    assert "read from the U-Net and CLIP of Stable Diffusion" in page
    assert "What is still read" not in page
