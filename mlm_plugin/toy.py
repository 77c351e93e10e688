"""A Stable-Diffusion-shaped model and five pictures, small enough to build in seconds.

The weights are random: it learns nothing that is worth looking at. It exists so that the whole path
from pictures to LoRA file runs on a bare machine with no download, and so that tests have a model
with the module names of the real one. It is used with ``toy`` as model or data folder.
"""

from __future__ import annotations

import colorsys
import json
import random
from collections.abc import Iterable
from pathlib import Path

from mlm_plugin.files import cached_folder
from mlm_plugin.mlm.prompts import PromptSet
from mlm_plugin.prompt_sets.english import subjects
from mlm_plugin.prompt_sets.files import BUILTIN

__all__ = ["build_toy_data", "build_toy_model", "toy_data", "toy_model"]

TOY_VERSION = 2  # part of the cache folder's name: raise it when the recipe changes
TOY_SUBJECT = "sks dog"
TOY_RARE_WORDS = ("sks", "zwx", "ohwx")
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
WORD_PATTERN = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def toy_model() -> Path:
    """The toy model as a diffusers folder in the user's cache, built on first use."""
    return cached_folder(f"toy-{TOY_VERSION}/model", build_toy_model)


def toy_data() -> Path:
    """Five pictures in a kohya data folder in the user's cache, drawn on first use."""
    return cached_folder(f"toy-{TOY_VERSION}/data", build_toy_data)


def build_toy_model(folder: Path, *, seed: int = 0) -> None:
    """Write a diffusers folder with SD 1.5's module names and toy sizes (about 7 MB)."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from mlm_plugin.export.checkpoint import model_index

    vocab_size = build_toy_tokenizer(folder / "tokenizer", toy_corpus())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocab_size,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=77,
                bos_token_id=vocab_size - 2,
                eos_token_id=vocab_size - 1,
                pad_token_id=vocab_size - 1,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 32, 32, 32),
            layers_per_block=2,
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,  # a group norm over one value is undefined
        )
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 32, 32),
            layers_per_block=1,
            sample_size=64,
            scaling_factor=0.18215,
        )
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    text_encoder.save_pretrained(folder / "text_encoder")
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    scheduler.save_pretrained(folder / "scheduler")
    index = model_index(type(scheduler).__name__)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def build_toy_tokenizer(folder: Path, corpus: Iterable[str], *, num_merges: int = 1442) -> int:
    """Train a small BPE in CLIP's format (``</w>`` ends a word) and return its number of tokens.

    Equal texts give equal files. The trainer breaks ties between pairs by the ids of their symbols;
    it numbers single letters by their code, but letters that end a word in the order of a hash map.
    So the latter are passed beforehand, as special tokens.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    word_ends = [f"{char}</w>" for char in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(word_ends) + num_merges,
        initial_alphabet=alphabet,
        special_tokens=word_ends,
        end_of_word_suffix="</w>",
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = list(dict.fromkeys([*alphabet, *word_ends, *map("".join, merges), *SPECIAL_TOKENS]))

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: id for id, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    bos, eos = SPECIAL_TOKENS
    special = {"bos_token": bos, "eos_token": eos, "unk_token": eos, "pad_token": eos}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | special))
    return len(tokens)


def toy_corpus(*, num_prompts: int = 2000, seed: int = 0) -> Iterable[str]:
    """Text for the toy vocabulary: built-in prompts with ordinary subjects, and the rare words."""
    rng = random.Random(seed)
    for name in BUILTIN:
        prompt_set, names = PromptSet.load(name), subjects(name)
        for _ in range(num_prompts):
            yield prompt_set.sample(rng, rng.choice(names))
    yield from TOY_RARE_WORDS * 200


def build_toy_data(folder: Path) -> None:
    """Draw five pictures of one little dog on the same lawn, ``10_sks dog/0.png`` and so on."""
    from PIL import Image, ImageDraw

    target = folder / f"10_{TOY_SUBJECT}"
    target.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for number in range(5):
        image = Image.new("RGB", (96, 96), _rgb(0.58, 0.35, 0.95))
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 62, 96, 96), fill=_rgb(0.30, 0.55, 0.70 + 0.04 * rng.random()))
        x, y, fur = 34 + rng.randint(-8, 8), 46 + rng.randint(-3, 3), _rgb(0.07, 0.6, 0.75)
        draw.ellipse((x, y, x + 34, y + 20), fill=fur)  # body
        draw.ellipse((x + 24, y - 12, x + 44, y + 8), fill=fur)  # head
        draw.polygon(
            [(x + 27, y - 8), (x + 30, y - 20), (x + 35, y - 10)], fill=_rgb(0.06, 0.7, 0.45)
        )
        draw.ellipse((x + 36, y - 6, x + 39, y - 3), fill=(20, 20, 20))
        for leg in (4, 12, 22, 29):
            draw.rectangle((x + leg, y + 14, x + leg + 4, y + 28), fill=fur)
        draw.arc((x - 12, y - 8, x + 6, y + 12), 60, 200, fill=fur, width=4)
        image.save(target / f"{number}.png")
        (target / f"{number}.txt").write_text(f"a photo of {TOY_SUBJECT} on the lawn\n")


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)
