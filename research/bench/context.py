"""What all trials share: the model, its judges, data folders and contextualizers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from mlm_plugin.demo.trial import as_images, pipeline_of
from mlm_plugin.evaluation.metric_models import Clip, load_clip
from mlm_plugin.files import atomic_path
from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.pocket.concepts import Concept, contexts, write_concept
from mlm_plugin.pocket.oracle import Oracle, load_oracle
from mlm_plugin.pocket.shipped import CONTEXTUALIZER
from mlm_plugin.pocket.text_to_image import Sampling, generate
from mlm_plugin.pretrain import pretrain
from research.bench.plan import BenchPlan, Setting
from research.pocket_model.contextualizer import CONTEXTUALIZER_RECIPE, contextualizer_captions

__all__ = ["BenchContext"]

NUM_CLASS_IMAGES = 40


class BenchContext:
    """Model and judges, and shared data that is created on first use.

    Args:
        model: folder of a pocket model.
        folder: for everything that is written.
        plan: when and how trainings are evaluated.
    """

    def __init__(self, model: Path, folder: Path, plan: BenchPlan):
        self.model, self.folder, self.plan = Path(model), Path(folder), plan
        self.oracle: Oracle = load_oracle(self.model / "oracle.safetensors")
        self.clip: Clip = load_clip(str(self.model / "clip"))

    @property
    def sampling(self) -> Sampling:
        """How pictures are drawn."""
        return Sampling(self.plan.num_steps, self.plan.guidance)

    def prepare(self, settings: Sequence[Setting], concepts: Sequence[Concept]) -> None:
        """Create shared data, so that parallel trials only read it."""
        for concept in concepts:
            self.data(concept)
            for setting in settings:
                self.prompts(concept, setting)
            if any(setting.regularizer == "prior_preservation" for setting in settings):
                self.class_images(concept.scene.subject)
        for num_blocks in {s.num_blocks for s in settings if s.regularizer == "mlm"}:
            self.contextualizer(num_blocks)

    def data(self, concept: Concept) -> Path:
        """Training pictures of a concept."""
        folder = self.folder / "concepts" / concept.name.replace(" ", "_")
        if not (folder / "train").exists():
            write_concept(concept, folder)
        return folder / "train"

    def prompts(self, concept: Concept, setting: Setting) -> tuple[Path, list[str]]:
        """Prompts of the setting's term, as a file and as texts."""
        choice = setting.contexts
        texts = contexts(concept, number=choice.number, families=choice.families)
        name = f"contexts-{choice.number}-{'-'.join(choice.families)}.txt"
        path = self.data(concept).parent / name
        if not path.exists():
            with atomic_path(path) as temporary:
                temporary.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return path, texts

    def contextualizer(self, num_blocks: int) -> Path:
        """A contextualizer of this depth, pretrained on captions of the world."""
        if num_blocks == CONTEXTUALIZER_RECIPE.num_layers:
            return self.model / CONTEXTUALIZER
        path = self.folder / "contextualizers" / f"{num_blocks}_blocks.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            pretrain(
                self.frozen_text_encoder(),
                path,
                options=dataclasses.replace(CONTEXTUALIZER_RECIPE, num_layers=num_blocks),
                captions=contextualizer_captions(seed=0),
            )
        return path

    def class_images(self, subject: str) -> Path:
        """Pictures of the class by the untrained model, for prior preservation."""
        folder = self.folder / "class_images" / subject
        if not folder.exists():
            pictures = generate(
                [f"a photo of a {subject}"] * NUM_CLASS_IMAGES,
                pipeline_of(load_stable_diffusion(str(self.model))),
                self.sampling,
                seed=0,
            )
            target = folder / f"1_{subject}"
            target.mkdir(parents=True)
            for number, image in enumerate(as_images(pictures)):
                image.save(target / f"{number}.png")
        return folder

    def frozen_text_encoder(self) -> TextEncoder:
        """The untrained text encoder."""
        model = CLIPTextModel.from_pretrained(
            self.model / "text_encoder", torch_dtype=torch.float32
        )
        tokenizer = CLIPTokenizer.from_pretrained(self.model / "tokenizer")
        return TextEncoder(tokenizer, model.eval().requires_grad_(False))
