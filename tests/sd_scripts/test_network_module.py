"""The network module in a stub trainer: the real calls in the real order, no sd-scripts needed."""

import argparse
import gc
import json
import logging
import os
import re
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mlm_plugin import kohya
from mlm_plugin.config.options import OPTIONS
from mlm_plugin.errors import UserError
from mlm_plugin.sd_scripts.architectures import ARCHITECTURES
from mlm_plugin.sd_scripts.arguments import WatchOptions
from mlm_plugin.sd_scripts.launch import SCRIPTS, _run_network, refuse_watching
from mlm_plugin.sd_scripts.network_module import split_arguments
from mlm_plugin.sd_scripts.page_facts import drawn_samples, given_settings
from mlm_plugin.sd_scripts.run_watch import check_watching
from mlm_plugin.sd_scripts.term import STATE_FILE

pytestmark = pytest.mark.usefixtures("_fresh_accelerator", "_sd_scripts")


class StubUNet(nn.Module):
    """Cross-attention alone, under the names of sd-scripts' U-Net."""

    def __init__(self, width=32):
        super().__init__()
        attn2 = nn.Module()
        attn2.to_k, attn2.to_v = (nn.Linear(width, 16, bias=False) for _ in range(2))
        self.middle_block = nn.ModuleDict({"attn2": attn2})


class Adapter(nn.Module):
    def __init__(self, name, target):
        super().__init__()
        self.lora_name, self.target = name, target
        self.lora_down = nn.Linear(target.in_features, 2, bias=False)
        self.lora_up = nn.Linear(2, target.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)

    def apply_to(self):
        org_forward = self.target.forward
        self.target.forward = lambda x: org_forward(x) + self.lora_up(self.lora_down(x))
        del self.target


class LoRANetwork(nn.Module):
    """``networks.lora``: the methods that a trainer calls."""

    def __init__(self, text_encoder, unet):
        super().__init__()
        body = getattr(text_encoder, "text_model", text_encoder)  # flat since transformers 5.6
        self.text_encoder_loras = [Adapter("lora_te", body.encoder.layers[0].mlp.fc1)]
        self.unet_loras = [Adapter("lora_unet", unet.middle_block.attn2.to_v)]

    def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True):
        if not apply_text_encoder:
            self.text_encoder_loras = []
        for lora in self.text_encoder_loras + self.unet_loras:
            lora.apply_to()
            self.add_module(lora.lora_name, lora)

    def save_weights(self, file, dtype, metadata):
        save_file(self.state_dict(), file, metadata)


class Trainer:
    """``NetworkTrainer``: the methods that the launcher overrides."""

    def get_tokenizers(self, tokenize_strategy):
        return [tokenize_strategy.tokenizer]

    def assert_extra_args(self, args, train_dataset_group):
        pass

    def post_process_network(self, args, accelerator, network, text_encoders, unet):
        pass

    def update_metadata(self, metadata):
        pass


BUILT_DATA = SimpleNamespace(subsets=[SimpleNamespace(class_tokens="sks dog", is_reg=False)])


class Tracker(GeneralTracker):
    """Keeps what is logged."""

    name = "kept"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self):
        super().__init__(_blank=True)
        self.logged = []

    @property
    def tracker(self):
        return self.logged

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None):
        self.logged.append(dict(values))


@pytest.fixture
def _sd_scripts(monkeypatch):
    """Modules of sd-scripts under their real names."""

    class SdTokenizeStrategy:
        pass

    class ConfigSanitizer:
        def __init__(self, support_dreambooth, support_finetuning, support_controlnet, dropout):
            pass

    class BlueprintGenerator:
        def __init__(self, sanitizer):
            pass

        def generate(self, user_config, args):
            subsets = user_config["datasets"][0]["subsets"]
            params = [SimpleNamespace(params=SimpleNamespace(**subset)) for subset in subsets]
            return SimpleNamespace(
                dataset_group=SimpleNamespace(datasets=[SimpleNamespace(subsets=params)])
            )

    def subsets_of(train_data_dir, reg_data_dir):
        return [
            {"image_dir": train_data_dir, "class_tokens": "sks dog", "is_reg": False},
            {"image_dir": train_data_dir, "class_tokens": "dog", "is_reg": True},
        ]

    strategy = SimpleNamespace(get_strategy=lambda: SdTokenizeStrategy())
    SdTokenizeStrategy.tokenizer = None  # set by the run
    modules = {
        "library": {},
        "library.strategy_base": {"TokenizeStrategy": strategy},
        "library.config_util": {
            "BlueprintGenerator": BlueprintGenerator,
            "ConfigSanitizer": ConfigSanitizer,
            "generate_dreambooth_subsets_config_by_subdirs": subsets_of,
        },
        "networks": {},
        "networks.lora": {"create_network": create_lora, "create_network_from_weights": from_file},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            parent, _, child = name.partition(".")
            monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    return SdTokenizeStrategy


def create_lora(
    multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None, **rest
):
    network = LoRANetwork(text_encoder, unet)
    network.given = rest
    return network


def from_file(multiplier, file, vae, te, unet, weights_sd=None, for_inference=False, **rest):
    return create_lora(multiplier, None, None, vae, te, unet, **rest), {}


OWN = {
    "seed": 3,
    "learning_rate": 0.5,
    "text_encoder_lr": None,
    "max_train_steps": 4,
    "max_train_epochs": None,
    "clip_skip": None,
    "network_train_unet_only": False,
    "network_weights": None,
    "network_dropout": None,
    "dataset_class": None,
    "dataset_config": None,
    "in_json": None,
    "train_data_dir": "data",
    "reg_data_dir": None,
    "masked_loss": False,
    "no_metadata": False,
    "gradient_accumulation_steps": 1,
    "resume": None,
    "save_state": None,
    "save_every_n_steps": None,
    "output_name": "dog",
    "sample_prompts": None,
}


@pytest.fixture
def train(toy_folder, toy_contextualizer, tmp_path, _sd_scripts):
    """A run of the stub trainer; returns its losses, logs, file and accelerator."""
    from transformers import CLIPTextModel, CLIPTokenizer

    def train(*network_args, module=kohya, trainer=None, scaler=None, num_batches=4, **changes):
        tokenizer = CLIPTokenizer.from_pretrained(toy_folder / "tokenizer")
        _sd_scripts.tokenizer = tokenizer
        if module is kohya:
            words = ("mlm_target=class", f"mlm_contextualizer={toy_contextualizer}")
            network_args = (*words, *network_args)
        out = {"output_dir": str(tmp_path / "out")}
        args = argparse.Namespace(**OWN | out | changes)
        args.network_args, args.network_module = list(network_args), module.__name__
        torch.manual_seed(args.seed)
        trainer = trainer or Trainer()
        trainer.get_tokenizers(_sd_scripts)
        trainer.assert_extra_args(args, BUILT_DATA)
        accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=args.gradient_accumulation_steps
        )
        model = CLIPTextModel.from_pretrained(toy_folder / "text_encoder").eval()
        unet = StubUNet()
        pairs = dict(argument.split("=", 1) for argument in args.network_args)
        pairs.setdefault("dropout", args.network_dropout)
        network = module.create_network(
            1.0, 4, 1, None, model, unet, neuron_dropout=args.network_dropout, **pairs
        )
        if hasattr(network, "prepare_network"):
            network.prepare_network(args)
        trainer.post_process_network(args, accelerator, network, [model], unet)
        network.apply_to(model, unet, not args.network_train_unet_only, True)
        model.requires_grad_(False)
        unet.requires_grad_(False)
        unet = accelerator.prepare(unet)
        network = accelerator.prepare(network)
        optimizer = torch.optim.SGD(network.parameters(), lr=args.learning_rate)
        optimizer = accelerator.prepare(optimizer)
        tracker, other_tracker = accelerator.trackers = [Tracker(), Tracker()]
        accelerator.scaler = scaler
        if args.resume:
            accelerator.load_state(args.resume)
        gradients, losses = [], []
        batch = tokenizer(["a photo of sks dog"], return_tensors="pt").input_ids
        for number in range(1, num_batches + 1):
            with accelerator.accumulate(network):
                on_step_start = getattr(network, "on_step_start", lambda *args: None)
                on_step_start(model, unet)
                states = model(batch)[0]
                values = unet.middle_block.attn2.to_v(states)
                loss = ((values - torch.randn_like(values)) ** 2).mean()
                accelerator.backward(loss)
                gradients.append([p.grad.clone() for p in network.parameters()])
                optimizer.step()
                optimizer.zero_grad()
            if args.save_every_n_steps and number % args.save_every_n_steps == 0:
                (tmp_path / "out").mkdir(exist_ok=True)
                name = f"{args.output_name}-step{number:08d}.safetensors"
                saved = {"ss_steps": str(number), "ss_sd_scripts_commit_hash": "abcdef"}
                network.save_weights(str(tmp_path / "out" / name), None, saved)
            losses.append(loss.item())
            for one in accelerator.trackers:
                one.log({"loss/current": loss.item(), "loss/average": 0.0}, step=len(losses))
                one.log({"loss/validation/step_average": 0.0}, step=len(losses))
        if args.save_state:
            accelerator.save_state(args.save_state)
        accelerator.end_training()
        metadata = {"ss_network_module": args.network_module, "ss_seed": "3"}
        if args.network_args:
            metadata["ss_network_args"] = json.dumps(pairs)
        file = tmp_path / f"{len(list(tmp_path.glob('*.safetensors')))}.safetensors"
        network.save_weights(str(file), None, metadata)
        return SimpleNamespace(
            losses=losses,
            gradients=gradients,
            logged=tracker.logged,
            logged_elsewhere=other_tracker.logged,
            file=file,
            weights=load_file(file),
            metadata=metadata_of(file),
            network=network,
            accelerator=accelerator,
            tracker=tracker,
        )

    return train


def metadata_of(file):
    with safe_open(file, framework="pt") as weights:
        return weights.metadata()


def plain_module():
    return sys.modules["networks.lora"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def curve(run, tag):
    return [values[tag] for values in run.logged if tag in values]


def test_at_weight_0_the_file_is_the_plain_one(train):
    plain = train(module=plain_module())
    ours = train("mlm_loss_weight=0")
    assert same(plain.weights, ours.weights)
    assert plain.losses == ours.losses
    assert plain.metadata == ours.metadata


def test_the_term_changes_the_weights_and_is_logged_beside_the_loss_of_the_host(train):
    plain = train(module=plain_module())
    ours = train("mlm_loss_weight=1", "mlm_target=word")
    assert plain.weights.keys() == ours.weights.keys()
    assert not same(plain.weights, ours.weights)
    assert curve(ours, "loss/current") == ours.losses == curve(ours, "loss/diffusion")
    assert len(curve(ours, "loss/mlm")) == len(ours.losses)
    assert min(curve(ours, "loss/mlm")) > 0
    validation = [values for values in ours.logged if "loss/validation/step_average" in values]
    assert all(len(values) == 1 for values in validation)


def test_the_noise_of_the_host_is_that_of_the_plain_run(train):
    plain = train(module=plain_module())
    ours = train("mlm_loss_weight=1e-12", "mlm_target=word")
    assert ours.losses == pytest.approx(plain.losses, rel=1e-5)


@pytest.mark.parametrize("name", ["mlm_plugin.kohya", "networks.lora"])
def test_the_launcher_adds_one_term_whatever_the_network_module(train, toy_contextualizer, name):
    """Its flags reach our module too."""
    flags = {"mlm_target": "class", "mlm_contextualizer": str(toy_contextualizer)}
    flags |= {"mlm_loss_weight": "0.5", "mlm_every_n_steps": "2", "mlm_page": "true"}
    runs = [train("mlm_loss_weight=0.5", "mlm_every_n_steps=2")]

    class Launched(Trainer):
        def train(self, args):
            module = sys.modules[args.network_module]
            runs.append(train(module=module, trainer=self, **vars(args)))

    args = argparse.Namespace(**flags, network_module=name)
    _run_network(SimpleNamespace(Launched=Launched), SCRIPTS[0]._replace(trainer="Launched"), args)
    alone, launched = runs
    assert same(alone.weights, launched.weights)
    assert curve(alone, "loss/mlm") == curve(launched, "loss/mlm")


def test_the_file_names_the_inner_module_and_what_the_term_did(train):
    run = train("conv_dim=2", "mlm_loss_weight=0.5")
    assert run.network.given == {"conv_dim": "2", "dropout": None}
    assert run.metadata["ss_network_module"] == "networks.lora"
    assert json.loads(run.metadata["ss_network_args"]) == {"conv_dim": "2", "dropout": None}
    assert run.metadata["ss_mlm_loss_weight"] == "0.5"
    assert run.metadata["ss_mlm_placeholder_token"] == "sks"
    assert "ss_network_args" not in train("mlm_loss_weight=0.5").metadata
    unnamed = train("mlm_loss_weight=0.5", no_metadata=True).metadata
    assert not any("mlm" in name for name in unnamed)


def test_the_accelerator_is_as_before_once_training_has_ended(train):
    prepare = Accelerator.prepare
    run = train("mlm_loss_weight=1")
    assert Accelerator.prepare is prepare
    assert not {"backward", "end_training"} & vars(run.accelerator).keys()
    assert "log" not in vars(run.tracker)


class FakeScaler:
    """A GradScaler of a fixed scale that works on a CPU."""

    def scale(self, loss):
        return loss * 1024

    def state_dict(self):
        return {}


def test_the_term_is_scaled_and_divided_like_the_rest_of_the_loss(train):
    def first_step(*network_args, **changes):
        return train("mlm_target=word", *network_args, num_batches=1, **changes).gradients[0]

    once = first_step("mlm_loss_weight=1")
    plain = first_step("mlm_loss_weight=0")
    assert any(not torch.equal(a, b) for a, b in zip(once, plain, strict=True))
    scaled = first_step("mlm_loss_weight=1", scaler=FakeScaler(), gradient_accumulation_steps=2)
    for expected, found in zip(once, scaled, strict=True):
        assert torch.allclose(found, expected * 1024 / 2, rtol=1e-5)


def test_schedules_count_optimizer_steps(train):
    run = train("mlm_start_step=1", "mlm_target=word", gradient_accumulation_steps=2)
    assert [("loss/mlm" in values) for values in run.logged if "loss/current" in values] == [
        False, False, True, True,
    ]  # fmt: skip


def test_states_go_on_counting(train, tmp_path):
    train("mlm_loss_weight=1", save_state=tmp_path / "state")
    assert json.loads((tmp_path / "state" / STATE_FILE).read_text()) == {"step": 4, "call": 4}
    run = train("mlm_end_step=4", resume=tmp_path / "state", num_batches=1)
    assert "loss/mlm" not in run.logged[0]


@pytest.mark.parametrize("target", ["states", "class"])
def test_the_u_net_alone_is_read_at_its_cross_attention(train, target):
    run = train(f"mlm_target={target}", "mlm_loss_weight=1", network_train_unet_only=True)
    assert set(run.weights) == {"lora_unet.lora_down.weight", "lora_unet.lora_up.weight"}
    assert run.metadata["ss_mlm_read_at"] == "cross_attention"
    assert curve(run, "loss/mlm")[0] == pytest.approx(0, abs=1e-7)
    assert curve(run, "loss/mlm")[-1] > 1e-6


@pytest.mark.parametrize(
    ("network_args", "changes", "place"),
    [
        (["mlm_target=states"], {}, "both"),
        (["mlm_target=states"], {"unet_lr": 0.0}, "encoder"),
        ([], {}, "encoder"),
    ],
)
def test_states_are_read_wherever_something_is_trained(train, network_args, changes, place):
    run = train(*network_args, num_batches=1, **changes)
    assert run.metadata["ss_mlm_read_at"] == place


def test_the_concept_comes_from_the_arguments_or_from_the_data(train):
    named = train("placeholder_token=zxq, ohwx", "class_token=cat, duck toy").metadata
    assert named["ss_mlm_placeholder_token"] == "zxq, ohwx"
    assert named["ss_mlm_class_token"] == "cat, duck toy"
    assert train().metadata["ss_mlm_class_token"] == "dog"


def test_options_may_also_be_keys_of_the_toml(train):
    """sd-scripts keeps keys that it does not know."""
    assert train(mlm_loss_weight=0.25).metadata["ss_mlm_loss_weight"] == "0.25"
    both = train("mlm_loss_weight=0.5", mlm_loss_weight=0.25)
    assert both.metadata["ss_mlm_loss_weight"] == "0.5"


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (["ohwx dog on the grass"] * 2, "none of the 2 captions holds it"),
        (["asks dogs", "a dog"], "the first is 'asks dogs'"),
        (["sks dog", "sks dog in the snow"], None),
    ],
)
def test_the_concept_must_be_in_the_captions(
    train, tmp_path, toy_pictures, capsys, captions, message
):
    photo = sorted(toy_pictures.rglob("*.png"))[0].read_bytes()
    (tmp_path / "data").mkdir()
    for number, caption in enumerate(captions):
        (tmp_path / "data" / f"{number}.png").write_bytes(photo)
        if caption:
            (tmp_path / "data" / f"{number}.caption").write_text(caption)
    named = {"train_data_dir": str(tmp_path / "data"), "num_batches": 1}
    if message is None:
        train(**named)
        assert "concept 'sks dog' (class word 'dog', in 2 of 2 captions)" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as ended:
        train("placeholder_token=sks", "class_token=dog", **named)
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: placeholder_token = 'sks'")
    assert message in last


def test_prompts_can_be_the_captions_of_the_data(train, tmp_path, toy_pictures):
    for number, photo in enumerate(sorted(toy_pictures.rglob("*.png"))[:2]):
        target = tmp_path / "data" / f"{number}.png"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(photo.read_bytes())
        target.with_suffix(".caption").write_text("a photo of sks dog in the snow")
    run = train("mlm_prompt_set=captions", train_data_dir=str(tmp_path / "data"))
    assert run.metadata["ss_mlm_prompt_set"] == "captions"


@pytest.mark.parametrize(
    ("network_args", "changes", "message"),
    [
        (["mlm_los_weight=1"], {}, "network_args: unknown key 'mlm_los_weight'; did you mean"),
        (["mlm_loss_weight=high"], {}, "network_args: mlm_loss_weight = 'high' is not allowed"),
        (["mlm_loss_weight=-1"], {}, "mlm_loss_weight = '-1' is not allowed"),
        (["inner=networks.lorra"], {}, "inner = 'networks.lorra': cannot be imported"),
        (["inner=mlm_plugin.kohya"], {}, "must be another module"),
        (["inner=json"], {}, "is not a network module"),
        (["mlm_read_at=encoder"], {"text_encoder_lr": 0}, "text_encoder_lr = 0 leaves"),
        ([], {"dataset_class": "my.Data"}, "give placeholder_token"),
        (["class_token=dog,cat"], {"dataset_class": "my.Data"}, "placeholder_token"),
        (["mlm_page=yes"], {}, "mlm_page = 'yes' is not allowed; it must be true, or the path"),
        (["mlm_keep_best=always"], {}, "network_args: mlm_keep_best = 'always' is not allowed"),
        (["mlm_stop_below=1.5"], {}, "mlm_stop_below = '1.5' is not allowed"),
        (["mlm_pages=true"], {}, "unknown key 'mlm_pages'; did you mean mlm_page"),
        (["mlm_stop_below=0.5"], {"deepspeed": True}, "mlm_stop_below: with deepspeed"),
        (
            ["mlm_loss_weight=0", "mlm_keep_best=true"],
            {"dataset_class": "my.Data"},
            "placeholder_token",
        ),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(train, capsys, network_args, changes, message):
    with pytest.raises(SystemExit) as stop:
        train(*network_args, **changes)
    assert stop.value.code == 2
    *_progress, printed = capsys.readouterr().err.splitlines()
    assert printed.startswith("error: ")
    assert message in printed
    assert "--" not in printed


def test_an_unknown_architecture_is_one_line(train, capsys, monkeypatch):
    class HunyuanImageTokenizeStrategy:
        pass

    strategy = sys.modules["library.strategy_base"].TokenizeStrategy
    monkeypatch.setattr(strategy, "get_strategy", lambda: HunyuanImageTokenizeStrategy())
    with pytest.raises(SystemExit):
        train()
    assert "HunyuanImage models are not supported" in capsys.readouterr().err


def test_a_trainer_that_gives_no_options_is_refused(capsys, toy_text_encoder):
    model, unet = toy_text_encoder.model, StubUNet()
    network = kohya.create_network(1.0, 4, 1, None, model, unet)
    with pytest.raises(SystemExit):
        network.apply_to(model, unet)
    assert "does not call prepare_network" in capsys.readouterr().err


def test_a_file_is_loaded_by_the_module_that_wrote_it(train, toy_text_encoder, monkeypatch):
    file = train("mlm_loss_weight=1").file
    loaded = []

    def create_network_from_weights(*args, **rest):
        loaded.append(rest)
        return from_file(*args, **rest)

    for name in ("networks.other", "os_of_a_stranger"):
        other = ModuleType(name)
        other.create_network = create_lora
        other.create_network_from_weights = create_network_from_weights
        monkeypatch.setitem(sys.modules, name, other)
    for writer, count in (("networks.lora", 0), ("networks.other", 1), ("os_of_a_stranger", 1)):
        save_file(load_file(file), file, {"ss_network_module": writer})
        network, _ = kohya.create_network_from_weights(
            1.0, str(file), None, toy_text_encoder.model, StubUNet(), for_inference=True
        )
        assert type(network) is LoRANetwork  # nothing is trained, so no term
        assert len(loaded) == count
    given = {"inner": "networks.other", "mlm_loss_weight": "1", "conv_dim": "2"}
    network, _ = kohya.create_network_from_weights(
        1.0, str(file), None, toy_text_encoder.model, StubUNet(), **given
    )
    assert isinstance(network, LoRANetwork)
    assert network.given == {"conv_dim": "2"}
    assert hasattr(network, "prepare_network")


def test_a_run_that_ended_early_leaves_nothing_for_the_next(train, toy_text_encoder):
    args = argparse.Namespace(**OWN, network_args=None, mlm_target="states")
    model, unet = toy_text_encoder.model, StubUNet()
    sys.modules["library.strategy_base"].TokenizeStrategy.get_strategy()
    type(
        sys.modules["library.strategy_base"].TokenizeStrategy.get_strategy()
    ).tokenizer = toy_text_encoder.tokenizer
    Accelerator(cpu=True)
    kohya.create_network(1.0, 4, 1, None, model, unet).prepare_network(args)
    run = train("mlm_loss_weight=0")
    assert not curve(run, "loss/mlm")


@pytest.mark.parametrize("page", [{}, {"mlm_page": True}])
def test_text_encoders_that_the_trainer_deletes_are_freed(tmp_path, monkeypatch, page):
    class FluxTokenizeStrategy:
        pass

    class Network(nn.Module):
        def save_weights(self, file, dtype, metadata):
            pass

    inner = ModuleType("networks.lora_flux")
    inner.create_network = lambda *args, **rest: Network()
    monkeypatch.setitem(sys.modules, inner.__name__, inner)
    strategy = sys.modules["library.strategy_base"].TokenizeStrategy
    monkeypatch.setattr(strategy, "get_strategy", FluxTokenizeStrategy)
    Accelerator(cpu=True)
    text_encoders = [nn.Linear(1, 1), nn.Linear(1, 1)]
    kept = [weakref.ref(model) for model in text_encoders]
    network = kohya.create_network(1.0, 4, 1, None, text_encoders, StubUNet(), **page)
    network.prepare_network(
        argparse.Namespace(**OWN, mlm_loss_weight=0, output_dir=tmp_path, network_args=None)
    )
    del text_encoders
    gc.collect()
    assert [model() for model in kept] == [None, None]


@pytest.fixture
def lycoris(monkeypatch):
    """LyCORIS as another inner module."""
    module = ModuleType("lycoris.kohya")
    module.create_network = create_lora
    monkeypatch.setitem(sys.modules, "lycoris", ModuleType("lycoris"))
    monkeypatch.setitem(sys.modules, "lycoris.kohya", module)
    return module


def test_the_network_chosen_in_a_gui_stays_the_inner_one(
    train, lycoris, tmp_path, monkeypatch, capsys
):
    config = tmp_path / "gui.toml"
    config.write_text(
        'network_module = "lycoris.kohya"\n[more]\nnetwork_args = ["conv_dim=4", "dropout=0.1"]\n'
    )
    monkeypatch.setattr(sys, "argv", ["train_network.py", "--config_file", str(config)])
    run = train("mlm_loss_weight=0.5", "conv_dim=8")
    assert run.metadata["ss_network_module"] == "lycoris.kohya"
    assert run.network.given == {"conv_dim": "8", "dropout": "0.1"}
    assert json.loads(run.metadata["ss_network_args"]) == run.network.given
    assert train("inner=networks.lora").metadata["ss_network_module"] == "networks.lora"
    config.write_text('network_module = "lycoris.kohya"\nnetwork_args = ["algo=full"]\n')
    with pytest.raises(SystemExit):
        train("mlm_loss_weight=0.5", "mlm_target=states", "mlm_read_at=both")
    assert "network_args algo=full" in capsys.readouterr().err
    config.write_text('network_module = "mlm_plugin.kohya"\n')
    assert train().metadata["ss_network_module"] == "networks.lora"
    config.write_text('network_module = "mlm_plugin.kohya"\ninner = "lycoris.kohya"\n')
    assert train().metadata["ss_network_module"] == "lycoris.kohya"
    assert train("inner=networks.lora").metadata["ss_network_module"] == "networks.lora"


def test_an_argument_of_lycoris_names_it(train, lycoris):
    run = train("algo=locon")
    assert run.metadata["ss_network_module"] == "lycoris.kohya"
    assert run.network.given == {"algo": "locon", "dropout": None}


WATCHED = ("mlm_target=states", "mlm_page=true", "mlm_keep_best=true")


def names_in(folder):
    return {path.name for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("rate", [0.5, 0.0])
def test_a_watched_run_trains_the_same_weights(train, rate, toy_text_encoder):
    """Gradients, noise and modes are those of the run without a page, at every step."""
    changes = {"save_every_n_steps": 1, "text_encoder_lr": rate}
    term = ("mlm_target=states",)
    bare, watched = train(*term, **changes), train(*WATCHED, **changes)
    assert bare.losses == watched.losses
    assert all(
        torch.equal(one, other)
        for step, same_step in zip(bare.gradients, watched.gradients, strict=True)
        for one, other in zip(step, same_step, strict=True)
    )
    assert same(bare.weights, watched.weights)
    assert watched.network.training == bare.network.training


def test_the_page_of_a_run_is_written_with_every_file(train, page_of, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = train(*WATCHED, save_every_n_steps=1)
    page = page_of(tmp_path / "out" / "dog.html")
    text = " ".join(page.text.split())
    assert "step 4 of 4" in text
    assert "sks dog" in text
    for step in range(1, 5):
        assert f"dog-step{step:08d}" in text
    assert "abcdef" in text, "the version of sd-scripts"
    assert "accelerate" in text
    assert page.tags.count("svg") == 3  # diffusion, term, context
    assert f"page of the run: {tmp_path / 'out' / 'dog.html'}" in capsys.readouterr().out
    assert len(curve(run, "context/cross_attention")) == 4
    assert run.logged_elsewhere == run.logged


def test_a_resumed_run_keeps_the_best_file_of_the_run_before(train, tmp_path):
    """The network goes astray behind the saved state."""
    best, state = tmp_path / "out" / "dog-best.safetensors", tmp_path / "state"
    settings = {"save_every_n_steps": 1, "num_batches": 1}
    train(*WATCHED, save_state=str(state), **settings)
    kept = best.read_bytes()
    network = state / "model_1.safetensors"
    save_file({name: 100 * weight + 10 for name, weight in load_file(network).items()}, network)
    train(*WATCHED, resume=str(state), **settings)
    assert best.read_bytes() == kept
    (state / "mlm_best.json").unlink()
    train(*WATCHED, resume=str(state), **settings)
    assert best.read_bytes() != kept


def test_the_page_of_a_plain_run_may_have_a_path_of_its_own(train, page_of, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "pages" / "own.html"
    plain = train(module=plain_module(), save_every_n_steps=2)
    watched = train("mlm_loss_weight=0", f"mlm_page={path}", save_every_n_steps=2)
    assert same(plain.weights, watched.weights)
    assert plain.losses == watched.losses
    page = page_of(path)
    assert page.tags.count("svg") == 2  # diffusion, context
    assert not (tmp_path / "out" / "dog.html").exists()


def test_without_a_rate_nothing_is_lost_and_with_a_high_one_much_is(train, page_of, tmp_path):
    def kept():
        text = " ".join(page_of(tmp_path / "out" / "dog.html").text.split())
        found = re.findall(r"dog-step0000000(\d)\s*\1\s*?(\d{1,2}|100)%", text)
        return [int(share) for _, share in found]

    train(*WATCHED, save_every_n_steps=2, learning_rate=1e-9)
    assert kept() == [100, 100]
    train(*WATCHED, save_every_n_steps=2, learning_rate=50.0)
    assert min(kept()) < 50


def test_a_copy_of_the_best_file_is_kept(train, tmp_path, capsys):
    """The first file keeps most, as training at this rate destroys the context."""
    (tmp_path / "out").mkdir()
    left = tmp_path / "out" / ".dog-best.safetensors.abcdefgh.tmp"  # by a run that was killed
    left.touch()
    os.utime(left, (0, 0))
    train(*WATCHED, save_every_n_steps=1, learning_rate=20.0)
    folder = tmp_path / "out"
    assert "dog-best.safetensors" in names_in(folder)
    assert not left.exists()
    best = load_file(folder / "dog-best.safetensors")
    assert same(best, load_file(folder / "dog-step00000001.safetensors"))
    assert "best by its context: " in (printed := capsys.readouterr().out)
    assert "dog-best.safetensors, which keeps" in printed
    assert "Take dog-best" in re.sub("<[^>]+>", "", (folder / "dog.html").read_text())


def test_a_run_that_lost_its_context_ends_with_a_state(train, tmp_path, capsys):
    given = ("mlm_target=states", "mlm_stop_below=0.9")
    with pytest.raises(SystemExit) as stop:
        train(*given, save_every_n_steps=1, learning_rate=20.0)
    assert stop.value.code == 0
    assert "of the context is kept, mlm_stop_below is 90%" in capsys.readouterr().err
    state = tmp_path / "out" / "dog-state"
    counted = json.loads((state / STATE_FILE).read_text())["step"]
    assert names_in(tmp_path / "out") == {
        f"dog-step{step:08d}.safetensors" for step in range(1, counted + 1)
    }
    assert counted < 4
    assert "dog.safetensors" not in names_in(tmp_path / "out")
    assert train("mlm_target=states", resume=str(state), learning_rate=1e-9).losses


def test_a_run_that_keeps_its_context_does_not_end_early(train):
    given = ("mlm_target=states", "mlm_stop_below=0.9")
    assert len(train(*given, save_every_n_steps=1, learning_rate=1e-9).losses) == 4


def test_a_page_that_cannot_be_written_costs_a_warning(train, tmp_path, caplog):
    (tmp_path / "out" / "dog.html").mkdir(parents=True)
    watched, bare = train(*WATCHED, save_every_n_steps=2), train("mlm_target=states")
    assert "dog.html could not be saved" in caplog.text
    assert same(watched.weights, bare.weights)


def test_a_file_that_cannot_be_examined_costs_a_warning(train, tmp_path, caplog):
    (tmp_path / "out" / "dog-best.safetensors").mkdir(parents=True)
    watched, bare = train(*WATCHED, save_every_n_steps=2), train("mlm_target=states")
    assert "is saved, but could not be examined" in caplog.text
    assert same(watched.weights, bare.weights)


@pytest.mark.parametrize("propagate", [True, False])
def test_a_page_without_a_concept_or_matplotlib_shows_the_rest(
    train, page_of, tmp_path, monkeypatch, propagate
):
    monkeypatch.setattr(logging.getLogger("mlm_plugin"), "propagate", propagate)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    given = ("mlm_loss_weight=0", "mlm_page=true")
    train(*given, dataset_class="my.Data", save_every_n_steps=2)
    text = page_of(tmp_path / "out" / "dog.html").text
    assert "Settings" in text
    for line in ("it is not known; give placeholder_token", "pip install matplotlib"):
        assert line in text, "the page has the warnings of the run"


@pytest.mark.parametrize("options", [{"keep_best": True}, {"stop_below": 0.5}])
def test_options_of_the_ranking_need_files_and_a_unet(options, caplog):
    given = WatchOptions(**options)
    check_watching(
        given, argparse.Namespace(save_every_n_epochs=1), ARCHITECTURES["SdTokenizeStrategy"]
    )
    assert not caplog.text
    check_watching(
        given, argparse.Namespace(save_every_n_epochs=None), ARCHITECTURES["SdTokenizeStrategy"]
    )
    assert f"{given.needing_score[0]} has no effect without save_every_n_steps" in caplog.text
    for architecture in ARCHITECTURES.values():
        if not architecture.is_unet:
            with pytest.raises(UserError, match=f"{given.needing_score[0]}: .* leave it out"):
                check_watching(given, argparse.Namespace(), architecture)
            check_watching(WatchOptions(Path("page.html")), argparse.Namespace(), architecture)


def test_scripts_without_a_network_are_not_watched():
    for script in SCRIPTS:
        refuse_watching(script, argparse.Namespace(mlm_page=None, mlm_stop_below=""))
        refused = script.method != "lora"
        with pytest.raises(UserError, match="mlm_page: ") if refused else nullcontext():
            refuse_watching(script, argparse.Namespace(mlm_page=True))


def test_the_pictures_of_this_run_are_found_by_step_and_epoch(tmp_path):
    folder = tmp_path / "sample"
    folder.mkdir()
    names = [
        "dog_000010_00_20260101120001_1.png",
        "dog_000010_01_20260101120002.png",
        "dog_e000002_01_20260101130000_7.png",
        "dog_000010_00_20250101120001_1.png",  # of an earlier run
        "cat_000010_00_20260101120001_1.png",
        "dog_big_000010_00_20260101120001_1.png",
        "dog_000010.txt",
    ]
    for name in names:
        (folder / name).touch()
    (tmp_path / "prompts.txt").write_text("a sks dog --w 64\n")
    args = argparse.Namespace(
        output_dir=str(tmp_path), output_name="dog", sample_prompts=str(tmp_path / "prompts.txt")
    )
    found = drawn_samples(args, since="20260101120000")
    assert found.prompts == ["a sks dog", "prompt 2"]
    paths = [folder / name for name in names[:3]]
    assert found.drawn == {10: paths[:2], "epoch 2": [None, paths[2]]}
    assert drawn_samples(args, since="20270101000000") is None


def test_the_settings_of_a_page_are_those_that_were_given_without_secrets(tmp_path):
    (tmp_path / "run.toml").write_text('[a]\nseed = 3\nwandb_api_key = "secret"\n')
    args = argparse.Namespace(
        seed=3, wandb_api_key="secret", config_file=str(tmp_path / "run.toml"),
        learning_rate=1e-4, max_train_steps=5,
    )  # fmt: skip
    argv = ["--learning_rate=1e-4", "--huggingface_token", "secret", "--config_file", "run.toml"]
    assert given_settings(args, argv) == {"learning_rate": 1e-4, "seed": 3}


def test_every_option_of_the_term_is_a_network_argument():
    names = [name for name, entry in OPTIONS.items() if entry.group == "mlm"]
    given = split_arguments({name: "x" for name in names} | {"inner": "a.b", "algo": "locon"})
    assert set(given.ours) == set(names)
    assert given.inner == "a.b"
    assert given.rest == {"algo": "locon"}


def test_the_module_needs_only_what_sd_scripts_installs():
    """Our other requirements cannot be imported in this process."""
    others = ("peft", "lycoris", "matplotlib", "jinja2", "tomli", "tomli_w", "bitsandbytes")
    program = (
        "import sys\n"
        f"others = {others!r}\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in others:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import mlm_plugin.kohya\n"
        "from mlm_plugin.mlm.prompts import PromptSet\n"
        "PromptSet.load('living', syntax='natural')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_page_needs_only_what_torch_installs_besides():
    """jinja2 comes with torch; matplotlib and peft do not."""
    program = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('peft', 'lycoris', 'matplotlib', 'tomli_w'))\n"
        "from mlm_plugin.evaluation import run_page, versions\n"
        "from mlm_plugin.sd_scripts import page_facts, run_watch\n"
        "assert not run_page.can_draw_curves()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
