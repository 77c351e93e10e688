"""What the MLM term adds to a training step of Anima, at full width and by layers.

    SD_SCRIPTS_DIR=../sd-scripts python -m research.benchmarks.anima_step

Random weights in the real classes of a checkout of sd-scripts. The image model and the language
model are timed with one and with two layers; the difference, times the real number of layers, and
the rest give the time of all. The output head has its whole vocabulary of 151,936. Forward and
backward, batch 1, prompts of the built-in set.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

from mlm_plugin.mlm.next_word import NextWordHead
from mlm_plugin.mlm.prompts import PromptSet

NUM_BLOCKS, NUM_LAYERS = 28, 28  # of Anima's transformer and of Qwen3-0.6B
NUM_PROMPTS = 8  # mlm_batch_size
CAPTION_LENGTH = 512  # sd-scripts pads every caption to it


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    checkout = Path(os.environ["SD_SCRIPTS_DIR"])
    sys.path.insert(0, str(checkout))
    tokenizer = AutoTokenizer.from_pretrained(checkout / "configs" / "qwen3_06b")
    rng = random.Random(0)
    prompts = PromptSet.load("person")
    texts = [prompts.sample(rng, "sks girl") for _ in range(NUM_PROMPTS)]
    ids_BL = tokenizer(texts, padding="longest", return_tensors="pt").input_ids
    num_behind = sum(len(tokenizer(text.partition("sks girl")[2]).input_ids) for text in texts)

    def timed(step: Callable[[], None]) -> float:
        step()
        seconds = []
        for _ in range(given.rounds):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    image = by_layers(lambda n: timed(image_step(n, given.resolution)), NUM_BLOCKS)
    caption = torch.randint(0, 1000, (1, CAPTION_LENGTH))
    text = by_layers(lambda n: timed(language_step(n, caption)), NUM_LAYERS)
    reading = by_layers(lambda n: timed(language_step(n, ids_BL)), NUM_LAYERS)
    head = timed(head_step(num_behind))
    print(f"{torch.get_num_threads()} CPU threads, fp32, {given.resolution} x {given.resolution}")
    print(f"image model {image:.2f} s, language model on a caption {text:.2f} s")
    print(
        f"term: language model on {NUM_PROMPTS} prompts of up to {ids_BL.shape[1]} tokens "
        f"{reading:.2f} s, head at {num_behind} tokens {head:.2f} s"
    )
    plain = image + text
    print(f"a step with the term takes {(plain + reading + head) / plain:.3f} of the plain one")


def by_layers(measure: Callable[[int], float], count: int) -> float:
    """Seconds for ``count`` layers, from those for one and for two."""
    one, two = measure(1), measure(2)
    return one + (count - 1) * (two - one)


def image_step(num_blocks: int, resolution: int) -> Callable[[], None]:
    """Forward and backward of the transformer, whose weights are frozen, on one picture."""
    from library import anima_models, attention

    size = resolution // 16
    block = anima_models.Block(
        x_dim=2048, context_dim=1024, num_heads=16, use_adaln_lora=True, adaln_lora_dim=256
    )
    block.requires_grad_(False)
    x = torch.randn(1, 1, size, size, 2048, requires_grad=True)
    times, shift = torch.randn(1, 1, 2048), torch.randn(1, 1, 3 * 2048)
    context = torch.randn(1, CAPTION_LENGTH, 1024)
    params = attention.AttentionParams.create_attention_params("torch", False)

    def step() -> None:
        y = x
        for _ in range(num_blocks):
            y = block(y, times, context, params, False, adaln_lora_B_T_3D=shift)
        y.sum().backward()

    return step


def language_step(num_layers: int, ids_BL: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of Qwen3-0.6B, shortened, its weights frozen."""
    config = Qwen3Config(
        vocab_size=1000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=num_layers,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    model = Qwen3Model(config).requires_grad_(False)
    inputs = torch.randn(*ids_BL.shape, 1024, requires_grad=True)

    def step() -> None:
        model(inputs_embeds=inputs).last_hidden_state.sum().backward()

    return step


def head_step(num_tokens: int) -> Callable[[], None]:
    """Forward and backward of the divergence over the whole vocabulary."""
    table_VD = torch.randn(151_936, 1024) * 0.02
    head = NextWordHead(lambda: table_VD)
    states_ND, teacher_ND = torch.randn(2, num_tokens, 1024).unbind()
    states_ND.requires_grad_()
    return lambda: head.divergence(states_ND, teacher_ND).sum().backward()


if __name__ == "__main__":
    main()
