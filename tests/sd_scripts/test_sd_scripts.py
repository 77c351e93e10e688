"""The sd-scripts host without sd-scripts: stubs with the real signatures, real text encoders."""

import argparse
import copy
import importlib.util
import inspect
import io
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from mlm_plugin.cli import train_main
from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import OPTIONS, MLMOptions
from mlm_plugin.config.pretraining import PretrainOptions
from mlm_plugin.errors import UserError
from mlm_plugin.pretraining.run import pretrain
from mlm_plugin.sd_scripts import data, locate
from mlm_plugin.sd_scripts.arguments import (
    add_mlm_arguments,
    answer_in_one_line,
    read_mlm_options,
    text_encoder_rates,
    why_network_has_no_gradient,
    why_script_has_no_gradient,
    why_script_trains_no_text,
)
from mlm_plugin.sd_scripts.launch import SCRIPTS, architecture_of, choose_script, finish_options
from mlm_plugin.sd_scripts.locate import (
    LaunchOptions,
    check_libraries,
    find_checkout,
    launch_options,
)
from mlm_plugin.sd_scripts.mixin import with_mlm
from mlm_plugin.sd_scripts.patches import (
    ScriptFacts,
    collected_text_encoders,
    frozen_text_encoders,
    summed_backward,
    with_mlm_embedding,
)
from mlm_plugin.sd_scripts.term import STATE_FILE, MLMTerm
from mlm_plugin.sd_scripts.text_encoders import wrap_text_encoder

pytestmark = pytest.mark.usefixtures("_fresh_accelerator")
PACKAGE = Path(__file__).parents[2]


class StubData:
    """As much of a ``DatasetGroup`` as is read."""

    def __init__(self, class_tokens="sks dog"):
        self.subsets = [
            SimpleNamespace(class_tokens="dog", is_reg=True),
            SimpleNamespace(class_tokens=class_tokens, is_reg=False),
        ]
        self.image_data = {
            "1.png": SimpleNamespace(
                caption=f"a photo of {class_tokens} in the snow", is_reg=False
            ),
            "2.png": SimpleNamespace(caption="a photo of a dog", is_reg=True),
        }
        self.datasets = [self]

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return index


class StubUNet(nn.Module):
    """Cross-attention alone, under the names of sd-scripts' U-Net of SDXL."""

    def __init__(self, width=32):
        super().__init__()
        attn2 = nn.Module()
        attn2.to_k, attn2.to_v = (nn.Linear(width, 16, bias=False) for _ in range(2))
        self.middle_block = nn.ModuleDict({"attn2": attn2})


class StubNetwork(nn.Module):
    """One low-rank module on the text encoder and one on the U-Net, attached like kohya's."""

    def __init__(self, text_encoder, unet, *, dropout=0.0):
        super().__init__()
        body = getattr(text_encoder, "text_model", text_encoder)  # flat since transformers 5.6
        target = body.encoder.layers[0].mlp.fc1
        self.down = nn.Parameter(torch.randn(2, target.in_features) * 0.02)
        self.up = nn.Parameter(torch.zeros(target.out_features, 2))
        self.unet = nn.Parameter(torch.zeros(()))
        self.text_encoder_loras = [self.down]
        org_forward = target.forward

        def forward(x):
            change = nn.functional.dropout(x @ self.down.T, dropout) @ self.up.T
            return org_forward(x) + change

        value = unet.middle_block.attn2.to_v
        self.value_down = nn.Parameter(torch.randn(2, value.in_features) * 0.02)
        self.value_up = nn.Parameter(torch.zeros(value.out_features, 2))
        org_value = value.forward

        def value_forward(x):
            return org_value(x) + x @ self.value_down.T @ self.value_up.T

        def apply_to():
            value.forward = value_forward
            if self.text_encoder_loras:
                target.forward = forward

        self.apply_to = apply_to


class StubTrainer:
    """sd-scripts v0.10.1 ``NetworkTrainer``: the overridden methods, in its order of calls."""

    network_class = StubNetwork
    unet_width = 32

    def __init__(self):
        self.losses, self.validation_losses, self.logs, self.noises = [], [], [], []
        self.shown = []

    def generate_step_logs(
        self,
        args,
        current_loss,
        avr_loss,
        lr_scheduler,
        lr_descriptions,
        optimizer=None,
        keys_scaled=None,
        mean_norm=None,
        maximum_norm=None,
        mean_grad_norm=None,
        mean_combined_norm=None,
    ):
        return {"loss/current": current_loss, "loss/average": avr_loss}

    def assert_extra_args(self, args, train_dataset_group, val_dataset_group):
        pass

    def get_tokenizers(self, tokenize_strategy):
        return [tokenize_strategy.tokenizer]

    def get_text_encoders_train_flags(self, args, text_encoders):
        return [not args.network_train_unet_only] * len(text_encoders)

    def post_process_network(self, args, accelerator, network, text_encoders, unet):
        pass

    def update_metadata(self, metadata, args):
        pass

    def process_batch(
        self,
        batch,
        text_encoders,
        unet,
        network,
        vae,
        noise_scheduler,
        vae_dtype,
        weight_dtype,
        accelerator,
        args,
        text_encoding_strategy,
        tokenize_strategy,
        is_train=True,
        train_text_encoder=True,
        train_unet=True,
    ):
        with torch.set_grad_enabled(is_train):
            states = text_encoders[0](batch)[0]
            noise = torch.randn_like(states)
            if is_train:
                self.noises.append(noise)
            return ((states + self.network.unet - noise) ** 2).mean()

    def step(self, call, *, is_train=True):
        return self.process_batch(*call, is_train=is_train)

    def text_encoders_of(self, model):
        return [model]

    def train(self, args, text_encoder):
        """The loop of train_network.py, without images."""
        torch.manual_seed(args.seed)
        random.seed(args.seed)
        names = ("tokenizer", "clip_l", "clip_g", "t5xxl")  # of sd, sd3 and flux
        self.get_tokenizers(SimpleNamespace(**dict.fromkeys(names, text_encoder.tokenizer)))
        self.assert_extra_args(args, StubData(), None)
        self.accelerator = accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=args.gradient_accumulation_steps
        )
        model = text_encoder.model
        models = self.text_encoders_of(model)
        self.unet = unet = StubUNet(self.unet_width)
        self.network = network = self.network_class(model, unet, dropout=args.network_dropout)
        if args.network_train_unet_only:
            network.text_encoder_loras = []
        self.post_process_network(args, accelerator, network, models, unet)
        network.apply_to()
        optimizer = torch.optim.SGD(network.parameters(), lr=args.learning_rate)
        model.requires_grad_(False)
        network, optimizer = accelerator.prepare(network, optimizer)
        if args.resume:
            accelerator.load_state(args.resume)
        self.metadata = {}
        self.update_metadata(self.metadata, args)
        batch = text_encoder.tokenize(["a photo of sks dog"])[:, 0]
        call = (
            batch,
            [model],
            None,
            network,
            None,
            None,
            None,
            None,
            accelerator,
            args,
            None,
            None,
        )
        tracker = SimpleNamespace(
            name="list", log=lambda values, step: self.logs.append(values), finish=lambda: None
        )
        accelerator.trackers = [tracker]
        self.progress_bar = tqdm(range(args.num_batches), file=io.StringIO())
        for step in self.progress_bar:
            with accelerator.accumulate(network):
                loss = self.step(call)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            self.losses.append(loss.item())
            self.progress_bar.set_postfix(avr_loss=loss.item())
            self.shown.append(self.progress_bar.postfix)
            tracker.log(self.generate_step_logs(args, loss.item(), 0.0, None, None), step=step)
            state = torch.get_rng_state()
            self.validation_losses.append(self.step(call, is_train=False).item())
            torch.set_rng_state(state)
        accelerator.end_training()
        if args.save_state:
            accelerator.save_state(args.save_state)


class ManyRatesNetwork(StubNetwork):
    """``networks.lora_sd3`` and ``networks.lora_flux``: a learning rate for each text encoder."""

    train_t5xxl = False

    def prepare_optimizer_params_with_multiple_te_lrs(self, text_encoder_lr, unet_lr, default_lr):
        raise AssertionError("the loop of these tests has one rate")


class UntouchedT5(nn.Module):
    """Fails when it is run, moved or cast."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(model_type="t5")
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, *args, **kwargs):
        raise AssertionError("T5 was run")

    def _apply(self, *args, **kwargs):
        raise AssertionError("T5 was moved or cast")


class StubSd3Trainer(StubTrainer):
    """sd-scripts v0.10.1 ``Sd3NetworkTrainer``: CLIP-L, CLIP-G and T5."""

    network_class = ManyRatesNetwork
    num_clips = 2

    def assert_extra_args(self, args, train_dataset_group, val_dataset_group):
        self.train_clip = not args.network_train_unet_only
        self.train_t5xxl = False

    def get_tokenizers(self, tokenize_strategy):
        return [tokenize_strategy.tokenizer] * self.num_clips + ["T5's"]

    def text_encoders_of(self, model):
        self.clips = [model, *(copy.deepcopy(model) for _ in range(1, self.num_clips))]
        return [*self.clips, UntouchedT5()]

    def post_process_network(self, args, accelerator, network, text_encoders, unet):
        self.train_t5xxl = network.train_t5xxl

    def get_text_encoders_train_flags(self, args, text_encoders):
        return [self.train_clip] * self.num_clips + [self.train_t5xxl]


class StubFluxTrainer(StubSd3Trainer):
    """sd-scripts v0.10.1 ``FluxNetworkTrainer``: CLIP-L and T5."""

    num_clips = 1


class KeywordTrainer(StubTrainer):
    """A version that names every argument."""

    def step(self, call, *, is_train=True):
        names = (
            "batch text_encoders unet network vae noise_scheduler vae_dtype weight_dtype "
            "accelerator args text_encoding_strategy tokenize_strategy"
        ).split()
        return self.process_batch(**dict(zip(names, call, strict=True)), is_train=is_train)


class LaterTrainer(StubTrainer):
    """A version with another order and one more parameter."""

    def process_batch(self, accelerator, batch, text_encoders, *, is_train=True, inpainting=None):
        return StubTrainer.process_batch(
            self, batch, text_encoders, *[None] * 6, accelerator, *[None] * 3, is_train=is_train
        )

    def step(self, call, *, is_train=True):
        return self.process_batch(call[8], call[0], call[1], is_train=is_train)


def parse(*flags, **changes):
    """Options as parsed by sd-scripts, its own defaults included."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--learning_rate", type=float, default=0.5)
    parser.add_argument("--max_train_steps", type=int, default=4)
    add_mlm_arguments(parser)
    own = {
        "seed": 3,
        "clip_skip": None,
        "network_train_unet_only": False,
        "text_encoder_lr": None,
        "max_train_epochs": None,
        "gradient_accumulation_steps": 1,
        "network_dropout": 0.0,
        "num_batches": 4,
        "resume": None,
        "save_state": None,
    }
    args = parser.parse_args(list(flags))
    for name, value in (own | changes).items():
        setattr(args, name, value)
    return args


@pytest.fixture
def run(toy_folder, toy_contextualizer):
    """Train a stub host; returns the trainer and the text encoder."""
    from transformers import CLIPTextModel, CLIPTokenizer

    from mlm_plugin.models.text_encoder import TextEncoder

    def run(*flags, host=StubTrainer, arch="sd", plain=False, **changes):
        text_encoder = TextEncoder(
            CLIPTokenizer.from_pretrained(toy_folder / "tokenizer"),
            CLIPTextModel.from_pretrained(toy_folder / "text_encoder").eval(),
        )
        words = ("--mlm_target", "class", "--mlm_contextualizer", str(toy_contextualizer))
        args = parse(*words, *flags, **changes)
        trainer = host() if plain else with_mlm(host, arch=arch)()
        trainer.train(args, text_encoder)
        return trainer, text_encoder

    return run


def weights(trainer):
    return {name: value.clone() for name, value in trainer.network.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# --- the network trainers ---------------------------------------------------------------------


def test_at_weight_0_the_run_is_the_plain_one_bit_for_bit(run):
    plain, _ = run(plain=True)
    zero, _ = run("--mlm_loss_weight", "0")
    assert same(weights(plain), weights(zero))
    assert plain.losses == zero.losses
    assert plain.logs == zero.logs
    assert zero.metadata == {}


@pytest.mark.parametrize("host", [StubTrainer, KeywordTrainer, LaterTrainer])
def test_the_term_is_added_whatever_the_order_of_the_arguments(run, host):
    plain, _ = run(plain=True, host=host)
    ours, _ = run("--mlm_loss_weight", "0.5", host=host)
    first = ours.logs[0]
    assert first["loss/diffusion"] == first["loss/current"] == plain.losses[0]
    assert first["loss/mlm_weighted"] == pytest.approx(0.5 * first["loss/mlm"])
    assert 0 <= first["mlm/accuracy"] <= 1
    assert not torch.equal(weights(plain)["up"], weights(ours)["up"])


def test_gradients_reach_only_what_is_trained(run):
    _, before = run(plain=True, num_batches=0)
    _, after = run("--mlm_loss_weight", "0.5")
    assert same(before.model.state_dict(), after.model.state_dict())
    assert all(parameter.grad is None for parameter in after.model.parameters())


def test_the_host_draws_the_same_noise_with_and_without_the_term(run):
    plain, _ = run(plain=True, network_dropout=0.5)
    ours, _ = run("--mlm_loss_weight", "0.5", network_dropout=0.5)
    assert all(torch.equal(a, b) for a, b in zip(plain.noises, ours.noises, strict=True))


@pytest.mark.parametrize(
    "flags", [(), ("--mlm_every_n_steps", "2"), ("--mlm_read_at", "cross_attention")]
)
def test_losses_of_training_and_validation_hold_no_term(run, flags):
    """Their difference, ``loss/validation/*_divergence``, compares like with like."""
    plain, _ = run(plain=True, learning_rate=0.0, num_batches=2)
    flags = ("--mlm_loss_weight", "5", "--mlm_target", "word", *flags)
    ours, _ = run(*flags, text_encoder_lr=1e-9, unet_lr=1e-9, learning_rate=0.0)
    assert "loss/mlm" in ours.logs[0]
    assert ours.validation_losses[:2] == plain.validation_losses
    assert ours.losses[:2] == plain.losses


def test_the_progress_bar_shows_the_term_without_any_logger(run):
    plain, _ = run(plain=True)
    assert [text.split("=")[0] for text in plain.shown] == ["avr_loss"] * 4
    ours, _ = run("--mlm_loss_weight", "0.5", "--mlm_target", "word", "--mlm_every_n_steps", "2")
    expected = [ours.logs[acted]["loss/mlm"] for acted in (0, 0, 2, 2)]
    shown = [float(text.split("mlm=")[1]) for text in ours.shown]
    assert shown == pytest.approx(expected, rel=1e-2)
    bar = tqdm(range(1), file=io.StringIO())
    bar.set_postfix(avr_loss=1.0)
    assert bar.postfix == "avr_loss=1"  # the next run's bar is left alone


def test_the_schedule_goes_by_optimizer_steps_of_its_own(run):
    trainer, _ = run(
        *("--mlm_loss_weight", "0.5", "--mlm_start_step", "1", "--mlm_every_n_steps", "2"),
        num_batches=8,
        gradient_accumulation_steps=2,
    )
    acts = ["loss/mlm" in logs for logs in trainer.logs]
    assert acts == [False, False, True, True, False, False, True, True]
    assert trainer.logs[2]["loss/mlm_weighted"] == pytest.approx(trainer.logs[2]["loss/mlm"])
    assert (trainer.mlm.step, trainer.mlm.call) == (4, 8)


def test_counters_are_saved_beside_the_state_and_go_on(run, tmp_path):
    state = str(tmp_path / "state")
    run("--mlm_loss_weight", "0.5", save_state=state, num_batches=3)
    assert json.loads((tmp_path / "state" / STATE_FILE).read_text()) == {"step": 3, "call": 3}
    resumed, _ = run("--mlm_loss_weight", "0.5", resume=state, num_batches=1)
    assert resumed.mlm.step == 4
    plain, _ = run(plain=True, resume=state, num_batches=1)  # a plain run loads it too
    assert len(plain.losses) == 1


def test_the_state_of_a_plain_run_is_loaded_and_counted_from_0(run, tmp_path):
    state = str(tmp_path / "state")
    run(plain=True, save_state=state)
    resumed, _ = run("--mlm_loss_weight", "0.5", resume=state, num_batches=2)
    assert resumed.mlm.step == 2


def test_the_metadata_says_what_was_done(run):
    trainer, _ = run("--mlm_loss_weight", "0.5", num_batches=1)
    metadata = trainer.metadata
    assert all(isinstance(value, str) for value in metadata.values())
    assert metadata["ss_mlm_loss_weight"] == "0.5"
    assert metadata["ss_mlm_placeholder_token"] == "sks"
    assert metadata["ss_mlm_class_token"] == "dog"
    assert metadata["ss_mlm_prompt_set"] == "living"
    assert metadata["ss_mlm_seed"] == "3"
    assert len(metadata["ss_mlm_contextualizer"]) == 16


def test_prompts_can_be_the_captions_of_the_data(run):
    trainer, _ = run("--mlm_loss_weight", "0.5", "--mlm_prompt_set", "captions", num_batches=1)
    regularizer = trainer.mlm._regularizer
    assert regularizer.sample_prompt(random.Random(0)) == "a photo of sks dog in the snow"


def test_the_run_says_what_the_term_does(run, capsys):
    run("--mlm_loss_weight", "0.5", num_batches=1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "MLM term" in line]
    for part in (
        *("concept 'sks dog'", "class word 'dog'", "in 1 of 1 captions", "weight 0.5"),
        *("target class, read at encoder", "1 text encoder"),
    ):
        assert part in line
    run("--mlm_loss_weight", "0", num_batches=1)
    assert "MLM" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("captions", "subset", "named"),
    [
        (["ohwx dog on the grass"], {}, "'ohwx dog on the grass'"),
        (["asks dogs", ""], {}, "none of the 2 captions"),
        (["a dog", "a cat"], {"caption_prefix": "photo,", "caption_suffix": ", ohwx"}, "'photo, a"),
        ("a dog", {}, "none of the 1 captions"),
    ],
)
def test_a_concept_that_no_caption_holds_is_refused(captions, subset, named):
    term = MLMTerm(MLMOptions(mlm_loss_weight=0.5), seed=0)
    with pytest.raises(UserError, match="placeholder_token = 'sks'") as caught:
        term.use_data(built(captions, **subset))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("captions", "subset", "lacking"),
    [
        (["a photo of sks dog", "a dog", "ohwx dog"], {}, 2),
        (["SKS dog", "(sks dog:1.2)", "1girl, sks  dog, snow"], {}, 0),
        (["a dog", ""], {"caption_prefix": "sks dog,"}, 0),
        (["a dog"], {"templates": ["a photo of a sks", "a rendering of a sks"]}, 0),
    ],
)
def test_captions_without_the_concept_are_counted(captions, subset, lacking, monkeypatch, caplog):
    monkeypatch.setattr(data.logger, "propagate", True)
    term = MLMTerm(MLMOptions(mlm_loss_weight=0.5), seed=0)
    term.use_data(built(captions, **subset))
    warnings = [record.message for record in caplog.records if "captions lack" in record.message]
    assert warnings == [text for text in warnings if text.startswith(f"{lacking} of")]
    assert len(warnings) == bool(lacking)
    number = len(term.captions)
    assert f"in {number - lacking} of {number} captions" in term.describe()


def built(captions, *, templates=None, **settings):
    """A data set as sd-scripts builds it."""
    subset = SimpleNamespace(class_tokens="sks dog", is_reg=False, **settings)
    for name in ("caption_prefix", "caption_suffix"):
        vars(subset).setdefault(name, None)
    images = {
        str(number): SimpleNamespace(caption=caption, is_reg=False)
        for number, caption in enumerate([captions] if isinstance(captions, str) else captions)
    }
    images["reg"] = SimpleNamespace(caption="a dog", is_reg=True)
    return SimpleNamespace(
        subsets=[subset],
        image_data=images,
        image_to_subset=dict.fromkeys(images, subset),
        replacements={"": templates} if templates else {},
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"network_train_unet_only": True}, "network_train_unet_only"),
        ({"cache_text_encoder_outputs": True}, "cache_text_encoder_outputs"),
        ({"text_encoder_lr": 0}, "text_encoder_lr = 0"),
        ({"text_encoder_lr": [0.0, 0.0]}, "text_encoder_lr = 0"),
        ({"learning_rate": 0.0}, "learning_rate = 0"),
        ({"learning_rate": 0.0, "text_encoder_lr": []}, "learning_rate = 0"),
    ],
)
def test_runs_without_a_gradient_are_refused_with_the_reason(run, changes, reason):
    with pytest.raises(UserError, match=reason):
        run("--mlm_loss_weight", "0.5", "--mlm_read_at", "encoder", **changes)
    with pytest.raises(UserError, match="mlm_read_at = cross_attention|learning_rate = 0"):
        run("--mlm_loss_weight", "0.5", "--mlm_read_at", "both", **changes)
    run("--mlm_loss_weight", "0", **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"network_train_unet_only": True, "cache_text_encoder_outputs": True},
            "network_train_unet_only and cache_text_encoder_outputs leave the text encoder",
        ),
        (
            {"network_train_unet_only": True, "text_encoder_lr": 0},
            "network_train_unet_only and text_encoder_lr = 0 leave",
        ),
        (
            {
                "network_train_unet_only": True,
                "cache_text_encoder_outputs": True,
                "text_encoder_lr": [0.0, 0.0],
            },
            "network_train_unet_only, cache_text_encoder_outputs and text_encoder_lr = 0 leave",
        ),
    ],
)
def test_one_refusal_names_every_line_to_change(run, refused, changes, named):
    with refused([named, "take mlm_read_at = cross_attention"]):
        run("--mlm_loss_weight", "0.5", "--mlm_read_at", "encoder", **changes)


U_NET_ONLY = {
    "network_train_unet_only": True,
    "unet_lr": 0.5,
    "cache_text_encoder_outputs": True,
    "text_encoder_lr": None,
}


@pytest.mark.parametrize("target", ["states", "class", "word"])
def test_training_the_u_net_alone_is_read_at_its_cross_attention(run, target):
    plain, _ = run(plain=True, **U_NET_ONLY)
    ours, text_encoder = run("--mlm_loss_weight", "0.5", "--mlm_target", target, **U_NET_ONLY)
    assert ours.metadata["ss_mlm_read_at"] == "cross_attention"
    assert all("loss/mlm" in logs for logs in ours.logs)
    assert ("mlm/accuracy" in ours.logs[0]) == (target != "states")
    assert same(text_encoder.model.state_dict(), run(plain=True)[1].model.state_dict())
    before, after = weights(plain), weights(ours)
    assert torch.equal(before["down"], after["down"])
    # kohya's U-Net is not run here: whatever moves its keys and values is the term, which is 0
    # where nothing else does, except for hidden words
    assert not before["value_up"].any()
    assert after["value_up"].any() == (target == "word")


@pytest.mark.parametrize("place", ["cross_attention", "both"])
def test_the_cross_attention_is_read_beside_a_trained_text_encoder(run, place):
    ours, _ = run("--mlm_loss_weight", "0.5", "--mlm_read_at", place, "--mlm_target", "states")
    moved = weights(ours)
    assert moved["up"].any()
    assert moved["value_up"].any()
    assert ("loss/mlm_te1" in ours.logs[0]) == (place == "both")


@pytest.mark.parametrize("is_oft", [False, True])
def test_a_network_without_text_encoder_modules_is_read_at_the_cross_attention(run, is_oft):
    class UNetOnly(StubTrainer):
        def post_process_network(self, args, accelerator, network, text_encoders, unet):
            network.text_encoder_loras = []
            if is_oft:  # networks.oft has a list for the U-Net alone
                del network.text_encoder_loras
                network.unet_ofts = [network.value_up]
                network.apply_to = lambda: None

    trainer, _ = run("--mlm_loss_weight", "0.5", host=UNetOnly, num_batches=0)
    assert trainer.mlm.setup.read_at == "cross_attention"
    with pytest.raises(UserError, match="no text encoder is trained"):
        run("--mlm_loss_weight", "0.5", "--mlm_read_at", "encoder", host=UNetOnly)


def test_a_transformer_whose_text_layers_are_not_known_is_refused(run_sd3):
    with pytest.raises(UserError, match="text layers of this transformer are not known"):
        run_sd3("--mlm_target", "states", "--mlm_read_at", "both")


def test_a_network_that_does_not_say_what_it_trains_is_refused_at_the_first_step(run, capsys):
    class Frozen(StubTrainer):
        def post_process_network(self, args, accelerator, network, text_encoders, unet):
            del network.text_encoder_loras
            network.apply_to = lambda: None

        def process_batch(self, *args, **kwargs):
            return self.network.unet * 1.0

        process_batch.__signature__ = inspect.signature(StubTrainer.process_batch)

    with pytest.raises(SystemExit):
        run("--mlm_loss_weight", "0.5", host=Frozen)
    assert "nothing that the term reads is trained" in capsys.readouterr().err


def test_text_encoders_that_are_not_clip_are_left_alone(run):
    class Other(StubTrainer):
        def post_process_network(self, args, accelerator, network, text_encoders, unet):
            text_encoders[0].config.model_type = "t5"

    with pytest.raises(UserError, match="no text encoder is trained"):
        run("--mlm_loss_weight", "0.5", "--mlm_read_at", "encoder", host=Other)
    with pytest.raises(UserError, match="a text encoder here that is not CLIP"):
        run("--mlm_loss_weight", "0.5", host=Other)


@pytest.mark.parametrize("name", ["get_tokenizers", "post_process_network", "update_metadata"])
def test_a_trainer_of_another_shape_is_refused(name):
    changed = type("NetworkTrainer", (StubTrainer,), {name: lambda self, batch: None})
    with pytest.raises(UserError, match=f"NetworkTrainer.{name} lacks"):
        with_mlm(changed, arch="sd")


# --- SD 3 and FLUX ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw_contextualizer(toy_folder, tmp_path_factory):
    """A contextualizer for the state before the last layer, without the final norm."""
    from transformers import CLIPTextModel, CLIPTokenizer

    path = tmp_path_factory.mktemp("contextualizer") / "raw.safetensors"
    text_encoder = wrap_text_encoder(
        CLIPTextModel.from_pretrained(toy_folder / "text_encoder").eval(),
        CLIPTokenizer.from_pretrained(toy_folder / "tokenizer"),
        arch="sd3",
        clip_skip=None,
    )
    options = PretrainOptions(max_train_steps=3, batch_size=4, eval_every_n_steps=3, num_held_out=8)
    pretrain(text_encoder, path, options=options, show_progress=False)
    return str(path)


@pytest.fixture
def run_sd3(run, raw_contextualizer):
    def run_sd3(*flags, **changes):
        weight = ("--mlm_loss_weight", "0.5")
        files = ("--mlm_contextualizer", f"{raw_contextualizer},{raw_contextualizer}")
        return run(*weight, *files, *flags, host=StubSd3Trainer, arch="sd3", **changes)[0]

    return run_sd3


def collected_clips(trainer):
    return [encoder.text_encoder.model for encoder in trainer.mlm.setup.encoders]


@pytest.mark.parametrize("cached", [False, True])
def test_sd3_hears_the_term_in_both_clip_encoders_whether_t5_is_cached_or_not(run_sd3, cached):
    trainer = run_sd3(cache_text_encoder_outputs=cached)
    assert collected_clips(trainer) == trainer.clips
    assert all("loss/mlm" in logs for logs in trainer.logs)


@pytest.mark.parametrize("cached", [False, True])
def test_flux_hears_the_term_in_clip_whether_t5_is_cached_or_not(run, cached):
    trainer, _ = run(
        *("--mlm_loss_weight", "0.5"),
        **{"host": StubFluxTrainer, "arch": "flux", "cache_text_encoder_outputs": cached},
        clip_skip=2,  # not read by FLUX
    )
    assert collected_clips(trainer) == trainer.clips
    assert all("loss/mlm" in logs for logs in trainer.logs)


def test_a_clip_encoder_with_rate_0_is_left_out(run_sd3):
    trainer = run_sd3(text_encoder_lr=[1e-4, 0.0])
    assert collected_clips(trainer) == trainer.clips[:1]


def test_a_rate_for_t5_alone_trains_no_clip_encoder(run_sd3):
    with pytest.raises(UserError, match="no text encoder is trained"):
        run_sd3("--mlm_read_at", "encoder", text_encoder_lr=[0.0, 0.0, 1e-4])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"network_train_unet_only": True}, "network_train_unet_only"),
        ({"text_encoder_lr": [0.0]}, "text_encoder_lr = 0"),
    ],
)
def test_reading_the_encoder_is_refused_where_flux_trains_no_clip(run, changes, reason):
    flags = ("--mlm_loss_weight", "0.5", "--mlm_read_at", "encoder")
    with pytest.raises(UserError, match=reason) as caught:
        run(*flags, host=StubFluxTrainer, arch="flux", **changes)
    assert "\n" not in str(caught.value)


def test_networks_without_a_rate_for_each_encoder_use_the_first():
    args = argparse.Namespace(learning_rate=1.0, text_encoder_lr=[0.5, 0.25])
    one = SimpleNamespace()
    each = SimpleNamespace(prepare_optimizer_params_with_multiple_te_lrs=None)
    assert text_encoder_rates(args, one, count=3) == [0.5, 0.5, 0.5]
    assert text_encoder_rates(args, each, count=3) == [0.5, 0.25, 0.25]
    args.text_encoder_lr = []
    assert text_encoder_rates(args, each, count=2) == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("arch", ["sd3", "flux"])
def test_contextualizers_are_made_for_half_weights_which_are_unchanged(
    toy_text_encoder, tmp_path, monkeypatch, arch, dtype
):
    monkeypatch.setenv("MLM_PLUGIN_CACHE", str(tmp_path))
    small = PretrainOptions(max_train_steps=2, batch_size=4, eval_every_n_steps=2, num_held_out=8)
    monkeypatch.setattr("mlm_plugin.pretraining.find.SMALL_ENCODER", small)
    model = toy_text_encoder.model.to(dtype)
    before = copy.deepcopy(model.state_dict())
    term = MLMTerm(MLMOptions(mlm_loss_weight=0.5), seed=3)
    wrapped = wrap_text_encoder(model, toy_text_encoder.tokenizer, arch=arch, clip_skip=None)
    term.add_text_encoders([wrapped], Accelerator(cpu=True))
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert same(before, model.state_dict())


# --- scripts whose loop is a function ---------------------------------------------------------


class StubStrategy:
    def encode_tokens(self, tokenize_strategy, models, tokens):
        return [models[0](tokens)[0]]


def train_whole_model(args, text_encoder, *, freeze_from=None):
    """The loop of train_db.py, without a U-Net."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = text_encoder.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(StubData()))
    ids = text_encoder.tokenize(["a photo of sks dog"])[:, 0]
    logs = []
    tracker = SimpleNamespace(name="list", log=lambda values, step: logs.append(values))
    accelerator.trackers = [tracker]
    shift = torch.zeros((), requires_grad=True)
    for step in range(args.num_batches):
        with torch.set_grad_enabled(freeze_from is None or step < freeze_from):
            (states,) = StubStrategy().encode_tokens(None, [model], ids)
        loss = ((states + shift) ** 2).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log({"loss": loss.item()}, step=step)
    accelerator.log({"loss/epoch": 0.0}, step=1)
    return logs


@pytest.fixture
def term(toy_contextualizer):
    return MLMTerm(
        MLMOptions(
            mlm_target="class", mlm_loss_weight=0.5, mlm_contextualizer=str(toy_contextualizer)
        ),
        seed=3,
    )


def collected(term, text_encoder):
    return collected_text_encoders(term, facts_of(text_encoder))


def facts_of(text_encoder):
    return ScriptFacts("sd", None, lambda: [text_encoder.tokenizer])


def test_the_term_enters_a_loop_through_its_backward_pass(term, toy_text_encoder):
    originals = (Accelerator.backward, Accelerator.log, Accelerator.prepare)
    with collected(term, toy_text_encoder), summed_backward(term, [StubStrategy]):
        logs = train_whole_model(parse(num_batches=3), toy_text_encoder)
    assert (Accelerator.backward, Accelerator.log, Accelerator.prepare) == originals
    assert [set(values) for values in logs[:3]] == [
        {"loss", "loss/diffusion", "loss/mlm", "loss/mlm_weighted", "mlm/accuracy"}
    ] * 3
    assert set(logs[3]) == {"loss/epoch"}
    assert logs[0]["loss"] == logs[0]["loss/diffusion"]
    assert (term.step, term.call) == (3, 3)
    assert [concept.text for concept in term.setup.concepts] == ["sks dog"]


def test_with_checkpointing_gradients_of_both_losses_arrive_together(term, toy_text_encoder):
    """Fused optimizers step when a gradient has arrived, and DDP sends it then."""
    model = toy_text_encoder.model.train()
    model.requires_grad_(True)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with collected(term, toy_text_encoder):
        Accelerator(cpu=True).prepare(model)
    assert model.is_gradient_checkpointing
    weight = next(layer for name, layer in model.named_parameters() if "fc1.weight" in name)
    arrivals = []
    weight.register_post_accumulate_grad_hook(lambda _weight: arrivals.append(1))
    ids = toy_text_encoder.tokenize_trimmed(["a photo of sks dog"])
    loss = toy_text_encoder.encode(ids).square().mean()
    (loss + toy_text_encoder.encode_storing(ids).mean()).backward()
    assert arrivals == [1]


@pytest.mark.parametrize("fused", ["fused_backward_pass", "fused_optimizer_groups"])
@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"train_text_encoder": True, "mlm_read_at": "both"}, "both"),
        ({"train_text_encoder": False}, "cross_attention"),
    ],
)
def test_an_optimizer_that_would_step_twice_is_refused(whole_model, refused, fused, changes, place):
    asked = {"weight": 0.1, "file": "sdxl_train.py", fused: 2, "gradient_checkpointing": True}
    with refused([f"mlm_read_at = {place}", fused]):
        whole_model("", **asked, **changes)


def test_gradients_that_processes_would_exchange_twice_are_refused(
    whole_model, refused, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = {"weight": 0.1, "file": "sdxl_train.py", "train_text_encoder": False}
    with refused(["mlm_read_at = cross_attention", "training on several GPUs"]):
        whole_model("", **asked, gradient_checkpointing=True)


def train_unet(args, text_encoder, loader_module):
    """The loop of sdxl_train.py for the U-Net alone, at the cross-attention of a stub."""
    torch.manual_seed(0)
    model, _unet = loader_module.load_target_model(args)
    model.requires_grad_(False)
    accelerator, unet = Accelerator(cpu=True), StubUNet()
    unet = accelerator.prepare(unet)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    optimizer, _loader = accelerator.prepare(optimizer, DataLoader(StubData()))
    model.forward = None  # cached outputs: it is not needed any more
    attn2 = unet.middle_block.attn2
    for _ in range(args.num_batches):
        loss = sum((layer.weight - 1).square().mean() for layer in (attn2.to_k, attn2.to_v))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return attn2.to_k.weight


def test_a_loop_that_trains_the_u_net_alone_is_read_at_its_cross_attention(toy_text_encoder):
    """The text encoder reads the prompts once, and is not called again."""
    model, org_forward = toy_text_encoder.model, toy_text_encoder.model.forward
    train_util = SimpleNamespace(load_target_model=lambda _args: (model, None))
    plain = train_unet(parse(num_batches=3), toy_text_encoder, train_util)
    model.forward = org_forward
    term = MLMTerm(MLMOptions(mlm_loss_weight=0.5), seed=3)
    given = frozen_text_encoders(term, facts_of(toy_text_encoder), [train_util])
    with given, summed_backward(term, [StubStrategy], trains_text=False):
        with_term = train_unet(parse(num_batches=3), toy_text_encoder, train_util)
    assert not torch.equal(plain, with_term)
    assert (term.step, term.call) == (3, 3)
    assert term.setup.read_at == "cross_attention"
    assert term.parts.term.loss > 0
    assert "1 text encoder" in term.describe()


def test_a_text_encoder_that_is_frozen_later_gets_no_term_from_then_on(term, toy_text_encoder):
    with collected(term, toy_text_encoder), summed_backward(term, [StubStrategy]):
        train_whole_model(parse(num_batches=4), toy_text_encoder, freeze_from=2)
    assert term.call == 2


def test_a_loop_that_never_trains_the_text_encoder_is_refused(term, toy_text_encoder):
    with collected(term, toy_text_encoder), summed_backward(term, [StubStrategy]):
        with pytest.raises(UserError, match="does not train the text encoder"):
            train_whole_model(parse(), toy_text_encoder, freeze_from=0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train_text_encoder": False}, "without train_text_encoder"),
        ({"cache_text_encoder_outputs": True}, "cache_text_encoder_outputs"),
        ({"stop_text_encoder_training": -1}, "stop_text_encoder_training = -1"),
        ({"learning_rate_te": 0}, "learning_rate_te = 0"),
        ({"train_text_encoder": True, "learning_rate_te1": 0, "learning_rate_te2": 0.0}, "te1 and"),
    ],
)
def test_scripts_that_leave_the_text_encoder_alone_are_read_at_the_u_net_or_refused(
    changes, reason
):
    args = argparse.Namespace(learning_rate=1e-4, **changes)
    is_sd = "stop_text_encoder_training" in changes or "learning_rate_te" in changes

    def why(place="auto", arch="sd" if is_sd else "sdxl"):
        file = {"sd": "train_db.py", "sdxl": "sdxl_train.py", "sd3": "sd3_train.py"}[arch]
        options = MLMOptions(mlm_read_at=place)
        return why_script_has_no_gradient(args, options, file=file, arch=arch)

    assert why() is None
    assert why("cross_attention") is None
    assert reason in why("encoder")
    assert reason in why("both")
    if not is_sd:
        assert reason in why(arch="sd3"), "whole SD 3 is read at its text encoders alone"
    args.learning_rate = 0.0
    assert "learning_rate = 0" in why()


@pytest.mark.parametrize(
    ("file", "foreign"),
    [
        ("train_db.py", {"cache_text_encoder_outputs": True, "train_text_encoder": False}),
        ("fine_tune.py", {"train_text_encoder": True, "stop_text_encoder_training": 0}),
        ("sdxl_train.py", {"train_text_encoder": True, "stop_text_encoder_training": 0}),
    ],
)
def test_options_of_a_toml_that_a_script_does_not_read_decide_nothing(file, foreign):
    args = argparse.Namespace(learning_rate=1e-4, **foreign)
    assert why_script_trains_no_text(args, file=file) is None


def test_scripts_that_train_one_of_two_text_encoders_are_welcome():
    args = argparse.Namespace(
        learning_rate=1e-4, train_text_encoder=True, learning_rate_te1=0.0, learning_rate_te2=None
    )
    options = MLMOptions()
    assert why_script_has_no_gradient(args, options, file="sdxl_train.py", arch="sdxl") is None
    args = argparse.Namespace(learning_rate=0.0, text_encoder_lr=[0, 1])
    assert why_network_has_no_gradient(args, MLMOptions(), arch="sdxl") is None


# --- textual inversion ------------------------------------------------------------------------


class StubEmbeddingTrainer:
    """sd-scripts v0.10.1 ``TextualInversionTrainer``: its own loop, a growing vocabulary."""

    folder = "zxq"

    def __init__(self, text_encoder):
        self.text_encoder = text_encoder

    def get_tokenizers(self, tokenize_strategy):
        return [tokenize_strategy.tokenizer]

    def load_target_model(self, args, weight_dtype, accelerator):
        return "sd_v1", [self.text_encoder.model], None, None

    def save_weights(self, file, updated_embs, save_dtype, metadata):
        self.saved = metadata

    def train(self, args):
        (tokenizer,) = self.get_tokenizers(self.text_encoder)
        accelerator = Accelerator(cpu=True)
        _, (model,), _, _ = self.load_target_model(args, None, accelerator)
        tokenizer.add_tokens(["zxq", "zxq1"])
        model.resize_token_embeddings(len(tokenizer))
        embedding = model.get_input_embeddings()
        data = StubData("a photo of zxq")
        data.subsets[1].class_tokens = self.folder
        optimizer, loader = accelerator.prepare(
            torch.optim.SGD(embedding.parameters(), lr=0.1), DataLoader(data)
        )
        model = accelerator.prepare(model)
        model.requires_grad_(False)
        embedding.requires_grad_(True)
        ids = self.text_encoder.tokenize(["a photo of zxq zxq1"])[:, 0]
        for _ in range(args.num_batches):
            (states,) = StubStrategy().encode_tokens(None, [model], ids)
            accelerator.backward((states**2).mean())
            self.gradient = embedding.weight.grad[-2:].clone()
            optimizer.step()
            optimizer.zero_grad()
        self.save_weights("x.safetensors", None, None, {"modelspec.title": "x"})


def embedding_run(text_encoder, contextualizer, *flags, init_word=None):
    args = parse(
        *("--mlm_target", "class", "--mlm_contextualizer", str(contextualizer), *flags),
        token_string="zxq",
        num_vectors_per_token=2,
        num_batches=2,
        init_word=init_word,
    )
    trainer = with_mlm_embedding(StubEmbeddingTrainer, arch="sd", strategies=[StubStrategy])(
        text_encoder
    )
    trainer.train(args)
    return trainer


def test_textual_inversion_learns_its_embeddings_with_the_term(
    toy_text_encoder, toy_contextualizer
):
    flags = ("--class_token", "dog", "--mlm_loss_weight", "0.5")
    trainer = embedding_run(toy_text_encoder, toy_contextualizer, *flags)
    assert trainer.mlm.call == 2
    assert trainer.saved["modelspec.title"] == "x"
    assert trainer.saved["ss_mlm_placeholder_token"] == "zxq zxq1"
    (encoder,) = trainer.mlm._regularizer.encoders
    assert len(encoder.token_table) == encoder.contextualizer.sizes.vocab_size
    first, second = (
        toy_text_encoder.tokenizer.convert_tokens_to_ids(word) for word in ("zxq", "zxq1")
    )
    assert {(first,), (second,)} <= encoder.vocabulary.protected
    assert trainer.gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("flags", "folder", "expected"),
    [
        ((), "zxq", "puppy"),
        (("--class_token", "dog"), "zxq", "dog"),
        ((), "zxq cat", "cat"),  # the data know better than the initial value
        ((), None, "puppy"),
    ],
)
def test_the_initial_word_is_the_class_where_nothing_else_names_it(
    toy_text_encoder, toy_contextualizer, monkeypatch, flags, folder, expected
):
    monkeypatch.setattr(StubEmbeddingTrainer, "folder", folder)
    given = ("--mlm_loss_weight", "0.5", *flags)
    trainer = embedding_run(toy_text_encoder, toy_contextualizer, *given, init_word="puppy")
    assert trainer.saved["ss_mlm_class_token"] == expected


def test_without_any_class_word_textual_inversion_is_refused(
    toy_text_encoder, toy_contextualizer, refused
):
    with refused(["--class_token"]):
        embedding_run(toy_text_encoder, toy_contextualizer, "--mlm_loss_weight", "0.5")


def test_textual_inversion_at_weight_0_is_the_plain_run(toy_text_encoder, toy_contextualizer):
    trainer = embedding_run(toy_text_encoder, toy_contextualizer, "--mlm_loss_weight", "0")
    assert trainer.mlm is None
    assert trainer.saved == {"modelspec.title": "x"}


# --- which states are used --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "clip_skip"), [("sd", None), ("sd", 2), ("sdxl", None), ("sd3", None), ("flux", 2)]
)
def test_the_states_are_those_that_the_unet_sees(toy_text_encoder, arch, clip_skip):
    model = toy_text_encoder.model
    ids = toy_text_encoder.tokenize(["a photo of a dog"])[:, 0]
    output = model(ids, output_hidden_states=True, return_dict=True)
    expected = {
        ("sd", None): output.last_hidden_state,
        ("sd", 2): toy_text_encoder.body.final_layer_norm(output.hidden_states[-2]),
        ("sdxl", None): output.hidden_states[-2],
        ("sd3", None): output.hidden_states[-2],
        ("flux", 2): output.last_hidden_state,
    }[arch, clip_skip]
    wrapped = wrap_text_encoder(model, toy_text_encoder.tokenizer, arch=arch, clip_skip=clip_skip)
    torch.testing.assert_close(wrapped.encode(ids), expected)


def test_what_flux_sees_is_the_state_at_the_end_of_the_text(toy_text_encoder):
    model, tokenizer = toy_text_encoder.model, toy_text_encoder.tokenizer
    ids = toy_text_encoder.tokenize(["a photo of a dog"])[:, 0]
    end = (ids == tokenizer.eos_token_id).int().argmax(dim=-1)
    states = wrap_text_encoder(model, tokenizer, arch="flux", clip_skip=None).encode(ids)
    torch.testing.assert_close(states[0, end], model(ids).pooler_output)


def test_every_choice_of_states_has_its_own_contextualizer(toy_text_encoder):
    model, tokenizer = toy_text_encoder.model, toy_text_encoder.tokenizer
    prints = {
        wrap_text_encoder(model, tokenizer, arch=arch, clip_skip=skip).fingerprint()
        for arch, skip in (("sd", None), ("sd", 2), ("sdxl", None))
    }
    assert len(prints) == 3
    one = wrap_text_encoder(model, tokenizer, arch="sd", clip_skip=1).fingerprint()
    assert one == toy_text_encoder.fingerprint()


def test_two_encoders_need_two_contextualizer_files(toy_text_encoder, toy_contextualizer):
    options = MLMOptions(mlm_target="class", mlm_contextualizer=str(toy_contextualizer))
    term, accelerator = MLMTerm(options, seed=0), Accelerator(cpu=True)
    term.add_text_encoders([toy_text_encoder], accelerator)
    with pytest.raises(UserError, match="names 1 file"):
        term.add_text_encoders([toy_text_encoder], accelerator)
    both = f"{toy_contextualizer},{toy_contextualizer}"
    term = MLMTerm(MLMOptions(mlm_target="class", mlm_contextualizer=both), seed=0)
    for _ in range(2):
        term.add_text_encoders([toy_text_encoder], accelerator)
    assert len(term.setup.encoders) == 2


def test_hidden_words_of_two_encoders_are_the_same_where_only_one_is_trained(
    toy_text_encoder, toy_contextualizer
):
    both = f"{toy_contextualizer},{toy_contextualizer}"
    term = MLMTerm(MLMOptions(mlm_target="word", mlm_contextualizer=both), seed=0)
    term.setup.read_at, term.setup.num_targets = "both", 4
    term.setup.use_concepts([Concept("sks", "dog")])
    encoders = [toy_text_encoder, toy_text_encoder]
    term.add_text_encoders(encoders, Accelerator(cpu=True), trained=[True, False])
    first, second = (encoder.targets for encoder in term.setup.encoders)
    assert [one.labels for one in first] == [one.labels for one in second]
    assert len(first) == 4


# --- options ----------------------------------------------------------------------------------


def test_values_of_a_toml_are_brought_to_their_type():
    args = parse(mlm_loss_weight="1e-2", placeholder_token="sks", mlm_batch_size=4.0)
    options = read_mlm_options(args)
    assert options.mlm_loss_weight == 0.01
    assert options.placeholder_token == ("sks",)
    assert options.mlm_batch_size == 4


def test_token_string_names_the_placeholder():
    assert read_mlm_options(parse(token_string="zxq")).placeholder_token == ("zxq",)


def test_a_resumed_run_may_be_shorter_than_the_step_at_which_the_term_starts():
    given = {"mlm_start_step": 4, "mlm_loss_weight": 0.1}
    assert read_mlm_options(parse(**given, resume="state")).mlm_start_step == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlm_wieght": 1}, "unknown key 'mlm_wieght'"),
        ({"mlm_loss_weight": "much"}, "mlm_loss_weight = 'much'"),
        ({"mlm_probability": 1.5}, "mlm_probability = 1.5"),
        ({"mlm_joint_share": 2}, "mlm_joint_share = 2"),
        ({"mlm_start_step": 3, "mlm_end_step": 3}, "mlm_end_step = 3"),
        ({"mlm_start_step": 4}, "is after the end"),
    ],
)
def test_bad_options_are_one_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        read_mlm_options(parse(**changes))
    assert "\n" not in str(caught.value)


@pytest.fixture
def kohya_parser():
    """A parser of sd-scripts, with our options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    add_mlm_arguments(parser)
    answer_in_one_line(parser)
    return parser


def test_the_help_shows_choices_and_defaults(kohya_parser):
    printed = " ".join(kohya_parser.format_help().split())
    printed = printed.replace("sd- scripts", "sd-scripts")
    for name in ("method", "mlm_arch", "host", "mlm_target", "mlm_read_at"):
        entry = OPTIONS[name]
        described = printed.split(f"--{name} TEXT ")[1]
        choices = f"One of: {', '.join(entry.choices)}. (default: {entry.default})"
        assert choices in described.split(" --")[0], name


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--mlm_los_weight", "0.1"], ["--mlm_los_weight", "did you mean --mlm_loss_weight?"]),
        (["--mixed-precison=fp16"], ["--mixed-precison", "did you mean --mixed_precision?"]),
        (["--seedd", "3", "--seed", "4"], ["unknown flag --seedd; did you mean --seed?"]),
        (["stray"], ["cannot place 'stray'"]),
        (["--seed", "x"], ["--seed: invalid int value: 'x'"]),
        (["--mixed_precision", "fp17"], ["--mixed_precision", "fp17", "bf16"]),
        (["--mlm_loss_weight"], ["--mlm_loss_weight: expected one argument"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(kohya_parser, refused, argv, parts):
    with refused(["command line: ", *parts]):
        kohya_parser.parse_args(argv)


# --- where the checkout is --------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "sd-scripts"
    (root / "library").mkdir(parents=True)
    write_trainer(root, "self, batch, *, is_train=True, text_encoding_strategy, tokenize_strategy")
    return root


def write_trainer(root, parameters):
    body = f"    def process_batch({parameters}):\n        pass\n"
    (root / "train_network.py").write_text(f"class NetworkTrainer:\n{body}")


def options_of(*argv):
    return launch_options(argv)


def test_without_a_checkout_the_standalone_trainer_runs(tmp_path):
    assert find_checkout(options_of(), script=tmp_path / "x.py", environment={}) is None


def test_a_checkout_is_found_by_flag_toml_environment_and_place(checkout, tmp_path):
    elsewhere = tmp_path / "x.py"
    flag = options_of("--sd_scripts_dir", str(checkout))
    assert find_checkout(flag, script=elsewhere, environment={}) == checkout
    (tmp_path / "run.toml").write_text(f"[mlm]\nsd_scripts_dir = '{checkout.as_posix()}'\n")
    toml = options_of("--config_file", str(tmp_path / "run"))
    assert find_checkout(toml, script=elsewhere, environment={}) == checkout
    named = {"SD_SCRIPTS_DIR": str(checkout)}
    assert find_checkout(options_of(), script=elsewhere, environment=named) == checkout
    beside = checkout / "train_network_mlm.py"
    assert find_checkout(options_of(), script=beside, environment={}) == checkout
    alone = options_of("--host", "standalone", "--sd_scripts_dir", str(checkout))
    assert find_checkout(alone, script=beside, environment=named) is None


def test_a_flag_wins_over_the_toml(tmp_path):
    (tmp_path / "run.toml").write_text('method = "dreambooth"\n[a]\nmlm_arch = "sdxl"\n')
    options = options_of("--config_file", str(tmp_path / "run.toml"), "--mlm_arch", "sd")
    assert (options.method, options.mlm_arch) == ("dreambooth", "sd")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sd_scripts_dir", "nowhere"], "no checkout of sd-scripts"),
        (["--host", "sd-scripts"], "--host sd-scripts: where is it"),
        (["--host", "kohya"], "host = 'kohya' is not allowed"),
        (["--mlm_arch", "sd1"], "mlm_arch = 'sd1' is not allowed"),
    ],
)
def test_a_wrong_place_is_one_line_and_exit_code_2(flags, message, capsys):
    assert train_main(flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


OLD = (
    "self, batch, tokenizers, text_encoders, unet, network, vae, noise_scheduler, vae_dtype, "
    "weight_dtype, accelerator, args, train_text_encoder=True"
)
"""Of a fork that had validation losses before sd-scripts had them."""


@pytest.mark.parametrize(
    ("parameters", "lacks"),
    [
        (OLD, "is_train, text_encoding_strategy, tokenize_strategy"),
        ("self, batch, is_train, tokenizers", "text_encoding_strategy, tokenize_strategy"),
        ("self, batch, text_encoding_strategy, tokenize_strategy", "lacks is_train"),
    ],
)
def test_a_fork_of_an_old_checkout_is_named_before_its_libraries(
    checkout, capsys, parameters, lacks
):
    write_trainer(checkout, parameters)
    (checkout / "requirements.txt").write_text("accelerate==0.25.0\n")
    assert train_main(["--sd_scripts_dir", str(checkout)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "a fork of an older one" in error
    assert lacks in error
    assert "accelerate" not in error


def test_a_checkout_without_process_batch_is_too_old(checkout):
    for trainer in ("class NetworkTrainer: ...\n", "def process_batch(is_train): ...\n"):
        (checkout / "train_network.py").write_text(trainer)
        with pytest.raises(UserError, match="older than v0.10.0"):
            find_checkout(
                options_of("--sd_scripts_dir", str(checkout)), script="x.py", environment={}
            )


def test_a_damaged_trainer_is_one_line(checkout, refused):
    (checkout / "train_network.py").write_bytes(b"<html>\x00")
    with refused(["train_network.py", "is not Python"]):
        find_checkout(options_of("--sd_scripts_dir", str(checkout)), script="x.py", environment={})


def test_libraries_of_another_major_version_are_refused_others_named(checkout, monkeypatch, caplog):
    pins = "transformers==4.54.1\ndiffusers[torch]==0.32.1\n# accelerate==9.9\neinops==0.7.0\n"
    (checkout / "requirements.txt").write_text(pins)
    installed = {"transformers": "4.55.0", "diffusers": "0.32.1+local"}
    monkeypatch.setattr(locate.importlib.metadata, "version", lambda name: installed[name])
    monkeypatch.setattr(locate.logger, "propagate", True)
    check_libraries(checkout)
    assert "transformers 4.55.0 (wanted 4.54.1)" in caplog.text
    assert "diffusers" not in caplog.text
    installed["transformers"] = "5.6.0"
    with pytest.raises(UserError, match="transformers 5.6.0 is installed"):
        check_libraries(checkout)
    pipeline = checkout / "library" / "lpw_stable_diffusion.py"
    pipeline.write_text("from transformers import CLIPFeatureExtractor\n")  # up to v0.10.4
    with pytest.raises(UserError, match="transformers 5.6.0 is installed"):
        check_libraries(checkout)
    pipeline.write_text("from transformers import CLIPImageProcessor as CLIPFeatureExtractor\n")
    caplog.clear()
    check_libraries(checkout)
    assert "transformers 5.6.0 (wanted 4.54.1)" in caplog.text


def test_a_missing_library_is_named(checkout, monkeypatch):
    (checkout / "requirements.txt").write_text("transformers==4.54.1\n")

    def version(name):
        raise locate.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(locate.importlib.metadata, "version", version)
    with pytest.raises(UserError, match="transformers is not installed"):
        check_libraries(checkout)


# --- which script -----------------------------------------------------------------------------


def launch(**changes):
    defaults = LaunchOptions("auto", None, "lora", "auto", None, None)
    return choose_script(defaults._replace(**changes)).file


def test_method_and_architecture_choose_the_script():
    assert launch() == "train_network.py"
    assert launch(mlm_arch="sdxl") == "sdxl_train_network.py"
    assert launch(mlm_arch="sd3") == "sd3_train_network.py"
    assert launch(mlm_arch="flux") == "flux_train_network.py"
    assert launch(method="dreambooth") == "train_db.py"
    assert launch(method="dreambooth", mlm_arch="sdxl") == "sdxl_train.py"
    assert launch(method="dreambooth", mlm_arch="sd3") == "sd3_train.py"
    assert launch(method="textual_inversion") == "train_textual_inversion.py"
    assert launch(mlm_script="fine_tune") == "fine_tune.py"
    assert {script.file for script in SCRIPTS} >= {"fine_tune.py", "train_db.py"}


@pytest.mark.parametrize("method", ["xti", "custom_diffusion", "pivotal"])
def test_methods_that_kohya_does_not_have_live_in_the_standalone_trainer(method):
    with pytest.raises(UserError, match="--host standalone"):
        launch(method=method)


@pytest.mark.parametrize(
    ("changes", "serving"),
    [
        ({"mlm_arch": "flux", "method": "dreambooth"}, "flux_train_network.py"),
        ({"mlm_arch": "sd3", "method": "textual_inversion"}, "sd3_train_network.py, sd3_train.py"),
        ({"mlm_arch": "anima", "method": "dreambooth"}, "anima_train_network.py"),
        ({"mlm_script": "gen_img.py"}, "sd3_train.py"),
        ({"mlm_script": "flux_train"}, "flux_train_network.py"),
    ],
)
def test_scripts_without_a_place_for_the_term_are_refused(refused, changes, serving):
    with refused(["the MLM term", serving]):
        launch(**changes)


def test_options_are_finished_as_the_script_itself_does(refused):
    for script in SCRIPTS:
        for given, expected in (("sdpa", "torch"), ("flash", "flash"), (None, None)):
            args = argparse.Namespace(attn_mode=given, show_timesteps=None)
            finish_options(script, args)
            assert args.attn_mode == (expected if script.arch == "anima" else given)
        finish_options(script, argparse.Namespace())  # older versions have neither
        showing = argparse.Namespace(show_timesteps="console")
        if script.arch in ("anima", "flux"):
            with refused(["show_timesteps", script.file]):
                finish_options(script, showing)
        else:  # which train all the same
            finish_options(script, showing)


@pytest.fixture
def whole_model(tmp_path):
    """A script of sd-scripts whose loop is a function; returns a way to start it."""

    def whole_model(body, file="train_db.py", **changes):
        path = tmp_path / f"script{len(list(tmp_path.glob('*.py')))}.py"
        path.write_text(f"def train(args):\n    args.done = True\n{body}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        (script,) = (script for script in SCRIPTS if script.file == file)
        args = parse("--mlm_loss_weight", str(changes.pop("weight", 0)), **changes)
        script.run(module, script, args)
        return args.done

    return whole_model


UNPACKED = "    training_models = training_models[0] if False else None\n"


@pytest.mark.parametrize("weight", [0, 0.1])
@pytest.mark.parametrize(
    "changes",
    [
        {"stop_text_encoder_training": 2},
        {"stop_text_encoder_training": "3", "max_train_steps": 4},
        {"stop_text_encoder_training": 100, "max_train_epochs": 2},
    ],
)
def test_a_stop_that_would_end_in_a_type_error_is_refused_first(
    whole_model, refused, weight, changes
):
    stop = changes["stop_text_encoder_training"]
    with refused([f"stop_text_encoder_training = {stop}", "--host standalone"]):
        whole_model(UNPACKED, weight=weight, **changes)


def test_a_stop_that_does_no_harm_is_welcome(whole_model):
    assert whole_model(UNPACKED, stop_text_encoder_training=None)
    assert whole_model(UNPACKED, stop_text_encoder_training=-1)
    assert whole_model(UNPACKED, stop_text_encoder_training=4)  # after the last step
    assert whole_model("    training_models = []\n", stop_text_encoder_training=2)


@pytest.mark.parametrize("file", [script.file for script in SCRIPTS if script.trainer is None])
def test_whole_models_are_not_found_in_what_deepspeed_makes_of_them(whole_model, refused, file):
    given = {"file": file, "train_text_encoder": True, "deepspeed": True}
    with refused(["deepspeed", file]):
        whole_model("", weight=0.1, **given)
    assert whole_model("", weight=0, **given)


def test_whole_sd3_cannot_be_read_at_its_transformer(whole_model, refused):
    asked = {"weight": 0.1, "train_text_encoder": True, "file": "sd3_train.py"}
    for place in ("both", "cross_attention"):
        with refused([f"mlm_read_at = {place}", "text encoders alone"]):
            term = MLMTerm(MLMOptions(mlm_loss_weight=0.1, mlm_read_at=place), seed=0)
            with collected_text_encoders(term, ScriptFacts("sd3", None, list)):
                pass
    with refused(["without train_text_encoder"]):
        whole_model("", **asked | {"train_text_encoder": False})
    with refused(["cache_text_encoder_outputs leaves"]):
        whole_model("", **asked, cache_text_encoder_outputs=True)


@pytest.mark.parametrize(
    ("key", "arch"),
    [
        ("cond_stage_model.transformer.x", "sd"),
        ("conditioner.embedders.1.model.x", "sdxl"),
        ("model.diffusion_model.joint_blocks.0.x", "sd3"),
        ("double_blocks.0.img_attn.x", "flux"),
        ("single_transformer_blocks.0.attn.x", "flux"),
        ("model.diffusion_model.double_blocks.0.x", "flux"),
        ("net.llm_adapter.embed.weight", "anima"),
        ("llm_adapter.embed.weight", "anima"),
        ("context_refiner.0.attention.qkv.weight", "lumina"),
        ("model.diffusion_model.context_refiner.0.attention.qkv.weight", "lumina"),
    ],
)
def test_a_file_says_its_architecture_by_its_names(tmp_path, key, arch):
    for name in ("model.safetensors", "model.sft"):
        save_file({key: torch.zeros(1)}, tmp_path / name)
        assert architecture_of(str(tmp_path / name)) == arch


def test_hunyuan_image_is_refused_in_one_line(tmp_path, refused):
    weights = {name: torch.zeros(1) for name in ("byt5_in.fc1.x", "double_blocks.0.x")}
    save_file(weights, tmp_path / "model.safetensors")
    with refused(["HunyuanImage", "model.safetensors"]):
        launch(pretrained_model_name_or_path=str(tmp_path / "model.safetensors"))


def test_a_folder_says_its_architecture_by_its_pipeline(tmp_path, toy_folder):
    assert architecture_of(str(toy_folder)) == "sd"
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    assert architecture_of(str(tmp_path)) == "sdxl"


def test_an_unknown_model_is_asked_about():
    with pytest.raises(UserError, match="--mlm_arch"):
        architecture_of("someone/some-model")


def test_importing_the_host_needs_no_sd_scripts():
    code = (
        "import sys\n"
        "from mlm_plugin.sd_scripts import arguments, launch, locate, mixin, patches, term\n"
        "print([m for m in ('library', 'train_network', 'peft') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE
    ).stdout
    assert output.strip() == "[]"


COLLECT_WITHOUT_PEFT = """
import importlib.machinery, sys
import pytest

class WithoutPeft(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "peft" else super().find_spec(name, path, target)

finders = sys.meta_path
sys.meta_path = [
    WithoutPeft if finder is importlib.machinery.PathFinder else finder for finder in finders
]
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_these_tests_are_collected_where_only_the_libraries_of_sd_scripts_are():
    """sd-scripts pins no peft; what a checkout needs besides is skipped by name."""
    command = [sys.executable, "-c", COLLECT_WITHOUT_PEFT, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "test_network_module.py" in done.stdout
