"""Training of both CLIP towers and their tokenizer. Shapes: B captions, L tokens, D width.

The contrastive loss alone hardly teaches the text tower left and right, since few pairs of a batch
differ in nothing else. So both towers also predict the attributes, with linear heads that are
discarded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from mlm_plugin.pocket.captions import RARE_WORDS, all_words, caption_scene
from mlm_plugin.pocket.world import ATTRIBUTES, draw_scene, generator_of, labels
from mlm_plugin.toy import build_toy_tokenizer, toy_corpus
from research.pocket_model.pictures import draw_any_scene, scene_pixels
from research.pocket_model.train_loop import Job, run_train_loop

__all__ = ["build_tokenizer", "label_loss", "label_tensors", "text_states", "train_clip"]

UNNAMED_SHARE = 0.1
NUM_CORPUS_CAPTIONS = 20_000


def build_tokenizer(folder: Path, *, num_merges: int) -> int:
    """Train the BPE on captions of the world and on built-in prompts; returns its size."""
    return build_toy_tokenizer(folder, _corpus(), num_merges=num_merges)


def _corpus() -> Iterable[str]:
    rng = generator_of("corpus")
    for _ in range(NUM_CORPUS_CAPTIONS):
        yield caption_scene(draw_scene(rng), rng).text
    yield from sorted(all_words()) * 200
    yield from toy_corpus()


def train_clip(
    clip: CLIPModel,
    tokenizer,
    job: Job,
) -> float:
    """Train both towers on scenes and their captions; returns the seconds."""
    device = job.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        text_heads = label_heads(clip.config.text_config.hidden_size)
        vision_heads = label_heads(clip.config.vision_config.hidden_size)
    extra_words = (*RARE_WORDS, *_ordinary_words(tokenizer))

    def loss_of(rng, _step: int):
        scenes = [
            draw_any_scene(rng, unnamed_share=UNNAMED_SHARE, held_out=False)
            for _ in range(job.plan.batch_size)
        ]
        captions = [caption_scene(scene, rng, extra_words=extra_words) for scene in scenes]
        ids_BL = tokenizer(
            [caption.text for caption in captions], padding="longest", return_tensors="pt"
        ).input_ids
        text_BD = clip.text_model(input_ids=ids_BL.to(device)).pooler_output
        image_BD = clip.vision_model(pixel_values=scene_pixels(scenes).to(device)).pooler_output
        contrast = contrastive_loss(
            clip.text_projection(text_BD),
            clip.visual_projection(image_BD),
            clip.logit_scale.clamp(max=4.6).exp(),
        )
        said = label_tensors([caption.labels() for caption in captions], device)
        shown = label_tensors([labels(scene) for scene in scenes], device)
        text_loss = label_loss(text_heads(text_BD), said)
        vision_loss = label_loss(vision_heads(image_BD), shown)
        return contrast + text_loss + vision_loss, {
            "contrast": float(contrast.detach()),
            "text": float(text_loss.detach()),
            "vision": float(vision_loss.detach()),
        }

    clip.train()
    seconds = run_train_loop(
        "clip",
        {
            "clip": clip,
            "text_heads": text_heads.to(device),
            "vision_heads": vision_heads.to(device),
        },
        loss_of,
        job,
    )
    clip.eval()
    return seconds


def contrastive_loss(text_BD: Tensor, image_BD: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of matching pairs within the batch.

    Source: CLIP (arXiv 2103.00020), figure 3.
    """
    logits_BB = scale * F.normalize(text_BD, dim=-1) @ F.normalize(image_BD, dim=-1).T
    target_B = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, target_B) + F.cross_entropy(logits_BB.T, target_B)) / 2


def label_heads(width: int) -> nn.Linear:
    """One linear layer that predicts all attributes."""
    return nn.Linear(width, sum(len(values) for values in ATTRIBUTES.values()))


def label_tensors(rows: list[dict[str, int]], device: torch.device) -> dict[str, Tensor]:
    """Label dictionaries as one tensor per attribute, ``(B,)``."""
    return {name: torch.tensor([row[name] for row in rows], device=device) for name in ATTRIBUTES}


def label_loss(logits: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
    """Mean over attributes of the cross-entropy; -100 is ignored."""
    parts = logits.split([len(values) for values in ATTRIBUTES.values()], dim=-1)
    losses = [
        F.cross_entropy(part, targets[name], reduction="sum") / (targets[name] >= 0).sum().clamp(1)
        for name, part in zip(ATTRIBUTES, parts, strict=True)
    ]
    return torch.stack(losses).mean()


@torch.no_grad()
def text_states(text_model: nn.Module, tokenizer, texts: Sequence[str]) -> Tensor:
    """Conditioning of the U-Net, ``(B, 77, D)``, as in the Stable Diffusion pipeline."""
    ids_BL = tokenizer(
        list(texts), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    device = next(text_model.parameters()).device
    return text_model(input_ids=ids_BL.to(device)).last_hidden_state


def _ordinary_words(tokenizer) -> list[str]:
    """Whole words of the vocabulary without a meaning in this world."""
    named = all_words()
    return sorted(
        word
        for token in tokenizer.get_vocab()
        if (word := token.removesuffix("</w>")) != token
        and len(word) > 2
        and word.isalpha()
        and word.isascii()
        and word not in named
    )
