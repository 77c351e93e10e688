"""A miniature rebuilt from scratch: it resumes, every loader reads it; slow ones: it learns."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from transformers import CLIPTokenizer

from mlm_plugin.errors import UserError
from mlm_plugin.pocket.captions import Caption, all_words
from mlm_plugin.pocket.oracle import Oracle, load_oracle
from mlm_plugin.pocket.world import held_out_pairs
from research.pocket_model.__main__ import main
from research.pocket_model.build import FULL, TINY, build
from research.pocket_model.networks import new_vae
from research.pocket_model.quality import BARS, held_out_prompts, judge, missed_bars
from research.pocket_model.train_clip import build_tokenizer
from research.pocket_model.train_loop import Interrupted, Job, TrainPlan, run_train_loop
from research.pocket_model.train_oracle import save_oracle
from research.pocket_model.train_vae import vae_loss


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The whole miniature: its quality report, and the last losses of every training."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    loop_logger = logging.getLogger("research.pocket_model.train_loop")
    loop_logger.addHandler(handler)
    before = loop_logger.level
    loop_logger.setLevel(logging.INFO)
    try:
        card = build(tmp_path_factory.mktemp("learned"), recipe=TINY, show_progress=False)
    finally:
        loop_logger.removeHandler(handler)
        loop_logger.setLevel(before)
    return card, last_losses(messages)


def last_losses(messages):
    """Last numbers of every training, by stage: ``{"clip": {"loss": 4.5, ...}}``."""
    found = {}
    for message in messages:
        name, _, numbers = message.partition(": ")
        if numbers.startswith("loss "):
            pairs = (pair.split() for pair in numbers.split(", "))
            found[name] = {key: float(value) for key, value in pairs}
    return found


@pytest.mark.slow
def test_every_training_lowers_its_loss(learned):
    _, losses = learned
    assert losses["autoencoder"]["mse"] < 0.32  # 0.6 without a picture
    assert losses["clip"]["contrast"] < 2.6  # 3.47 by chance, batch 32
    assert losses["clip"]["text"] < 1.5  # 1.7 by chance
    assert losses["oracle"]["loss"] < 1.3
    assert losses["unet"]["loss"] < 0.12


def test_the_autoencoder_minds_things_more_than_their_background():
    vae = new_vae(TINY.sizes)
    vae.encode = lambda pixels: SimpleNamespace(
        latent_dist=DiagonalGaussianDistribution(torch.zeros(1, 8, 8, 8))
    )
    vae.decode = lambda latents: SimpleNamespace(sample=torch.zeros(1, 3, 64, 64))
    pixels = torch.zeros(1, 3, 64, 64)
    pixels[..., :16] = 1.0  # wrong by 1 in a quarter of the picture
    even, heavy = torch.ones(1, 1, 64, 64), torch.ones(1, 1, 64, 64)
    heavy[..., :16] = 3.0
    assert float(vae_loss(vae, pixels, even)[0]) == pytest.approx(2 * 1 / 4)
    assert float(vae_loss(vae, pixels, heavy)[0]) == pytest.approx(2 * 3 / 6)


@pytest.mark.parametrize("recipe", [TINY, FULL], ids=["tiny", "full"])
def test_no_norm_of_the_autoencoder_erases_brightness(recipe):
    vae = new_vae(recipe.sizes)
    norms = [module for module in vae.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert norms
    assert all(norm.num_channels // norm.num_groups >= 4 for norm in norms)


@pytest.mark.slow
def test_the_oracle_is_right_about_pictures(learned):
    accuracy = learned[0]["oracle_accuracy"]
    assert accuracy["background"] > 0.9
    assert accuracy["position"] > 0.6


@pytest.mark.slow
def test_the_model_draws_backgrounds_that_the_prompt_names(learned):
    assert learned[0]["accuracy"]["background"] > 0.25  # 0.1 by chance


def test_the_report_says_how_it_was_made(tiny_pocket):
    folder, card, recipe = tiny_pocket
    assert json.loads((folder / "quality.json").read_text()) == json.loads(json.dumps(card))
    assert card["seed"] == 0
    assert card["num_prompts"] == recipe.num_prompts
    assert set(card["seconds"]) == {"vae", "clip", "oracle", "unet", "contextualizer", "quality"}
    assert card["recipe"]["sizes"]["text_width"] == 32


def test_a_second_call_trains_nothing(tiny_pocket):
    folder, card, recipe = tiny_pocket
    again = build(folder, recipe=recipe, show_progress=False)
    assert again["accuracy"] == card["accuracy"]
    assert {**again["seconds"], "quality": 0} == {**card["seconds"], "quality": 0}


def test_another_seed_needs_another_folder(tiny_pocket):
    with pytest.raises(UserError, match="another recipe or seed"):
        build(tiny_pocket[0], recipe=tiny_pocket[2], seed=1)


def test_our_loader_takes_the_folder(tiny_pocket):
    from mlm_plugin.models.checkpoints import load_stable_diffusion

    models = load_stable_diffusion(str(tiny_pocket[0]))
    (text_encoder,) = models.text_encoders
    states = text_encoder.encode(text_encoder.tokenize(["a red cat"])[:, 0])
    assert states.shape == (1, 77, 32)


def test_the_text_encoder_is_the_clip_text_tower(tiny_pocket):
    from transformers import CLIPModel, CLIPTextModel

    folder = tiny_pocket[0]
    ids = torch.tensor([[1, 5, 9]])
    alone = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32)
    whole = CLIPModel.from_pretrained(folder / "clip", torch_dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            alone(input_ids=ids).last_hidden_state,
            whole.text_model(input_ids=ids).last_hidden_state,
        )


def test_words_of_the_world_are_whole_tokens(tmp_path):
    build_tokenizer(tmp_path, num_merges=FULL.num_merges)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    split = [w for w in all_words() if len(tokenizer(w, add_special_tokens=False).input_ids) > 1]
    assert split == []


def test_an_oracle_comes_back_from_its_file(tmp_path):
    oracle = Oracle(channels=8).eval()
    save_oracle(oracle, tmp_path / "oracle.safetensors")
    pixels = torch.rand(2, 3, 64, 64)
    again = load_oracle(tmp_path / "oracle.safetensors")(pixels)
    assert again.values("subject") == oracle(pixels).values("subject")


def test_held_out_prompts_ask_for_what_was_never_shown():
    prompts = held_out_prompts(30, seed=0)
    assert all(held_out_pairs(prompt.said) for prompt in prompts)
    assert prompts == held_out_prompts(30, seed=0)


def test_the_verdict_counts_what_was_said():
    oracle = Oracle(channels=8).eval()
    pixels = torch.rand(1, 3, 64, 64)
    seen = {name: oracle(pixels).values(name)[0] for name in ("subject", "background")}
    wrong = {**seen, "background": "snow" if seen["background"] != "snow" else "sea"}
    pictures = pixels.repeat(2, 1, 1, 1)
    verdict = judge(oracle, pictures, [Caption("", seen), Caption("", wrong)])
    assert verdict["accuracy"] == {"background": 0.5, "subject": 1.0}
    assert verdict["pairs"] == {"background+subject": 0.5}


def test_missed_bars_are_named_with_what_was_reached():
    good = {"accuracy": dict.fromkeys(BARS, 0.99), "mean_of_pairs": 0.9}
    assert missed_bars(good) == {}
    assert missed_bars({**good, "mean_of_pairs": 0.5}) == {"pairs": 0.5}


def _train(path, loss_of, num_steps=6):
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 3)
    plan = TrainPlan(num_steps, 1, 1e-2, warmup_steps=2, save_every_n_steps=1)
    job = Job(plan, seed=0, state_path=path, show_progress=False)
    run_train_loop("test", {"layer": layer}, lambda rng, step: loss_of(layer, rng, step), job)
    return layer.weight.detach()


def _loss(layer, rng, _step):
    return layer(torch.randn(4, 3) + float(rng.random())).square().mean(), {}


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path):
    straight = _train(tmp_path / "straight.pt", _loss)

    def stopped_at_three(layer, rng, step):
        if step == 3:
            raise RuntimeError("stopped")
        return _loss(layer, rng, step)

    with pytest.raises(RuntimeError, match="stopped"):
        _train(tmp_path / "resumed.pt", stopped_at_three)
    assert torch.equal(_train(tmp_path / "resumed.pt", _loss), straight)


def test_a_signal_saves_the_state_and_tells_the_exit_code(tmp_path):
    import os
    import signal

    def interrupting(layer, rng, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return _loss(layer, rng, step)

    with pytest.raises(Interrupted) as stopped:
        _train(tmp_path / "state.pt", interrupting)
    assert stopped.value.exit_code == 130
    straight = _train(tmp_path / "straight.pt", _loss)
    assert torch.equal(_train(tmp_path / "state.pt", _loss), straight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output"),
        (["--output", "x", "--seed", "-1"], "--seed -1"),
        (["--output", "x", "--device", "abacus"], "--device abacus"),
        (["bake", "--output", "x"], "bake"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        main(arguments)
    assert "\n" not in str(error.value)
