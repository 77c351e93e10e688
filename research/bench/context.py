"""What all trials share: the model, the oracle, data folders and contextualizers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from mlm_plugin.demo.trial import as_images, pipeline_of
from mlm_plugin.files import atomic_path
from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.pocket.concepts import Concept, write_concept
from mlm_plugin.pocket.oracle import Oracle, load_oracle
from mlm_plugin.pocket.shipped import CONTEXTUALIZER
from mlm_plugin.pocket.text_to_image import Sampling, generate
from mlm_plugin.pretraining.run import pretrain
from research.bench.grammars import GRAMMARS, draw_linked_scene
from research.bench.plan import PLAN, BenchPlan, Trial
from research.pocket_model.contextualizer import CONTEXTUALIZER_RECIPE, contextualizer_captions

__all__ = ["BenchContext"]

NUM_CLASS_IMAGES = 200  # as in the presets


class BenchContext:
    """Model and oracle, and shared data that is created on first use.

    Args:
        model: folder of a pocket model.
        folder: for everything that is written.
        plan: when and how trainings are evaluated.
    """

    def __init__(self, model: Path, folder: Path, plan: BenchPlan = PLAN):
        self.model, self.folder, self.plan = Path(model), Path(folder), plan
        self.oracle: Oracle = load_oracle(self.model / "oracle.safetensors")

    @property
    def sampling(self) -> Sampling:
        """How pictures are drawn."""
        return Sampling(self.plan.num_steps, self.plan.guidance)

    def prepare(self, trials: Iterable[Trial]) -> None:
        """Create what these trials share, so that parallel ones only read it."""
        for arm, _setting, concept, _seed in trials:
            self.data(concept)
            if arm.regularizer == "prior_preservation":
                self.class_images(concept.scene.subject)
            elif arm.regularizer not in ("plain", "untrained"):
                self.prompts(concept, arm.grammar)
            if arm.regularizer == "mlm":
                self.contextualizer(arm.grammar)

    def data(self, concept: Concept) -> Path:
        """Training pictures of a concept."""
        folder = self.folder / "concepts" / concept.name.replace(" ", "_")
        if not (folder / "train").exists():
            write_concept(concept, folder)
        return folder / "train"

    def prompts(self, concept: Concept, grammar: str) -> tuple[Path, list[str]]:
        """Prompts of a term, as a file and as texts."""
        texts = GRAMMARS[grammar](concept)
        path = self.data(concept).parent / f"contexts-{grammar}.txt"
        if not path.exists():
            with atomic_path(path) as temporary:
                temporary.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return path, texts

    def contextualizer(self, grammar: str) -> Path:
        """A contextualizer pretrained on captions of this grammar, or else of the free one."""
        if grammar != "linked":
            return self.model / CONTEXTUALIZER
        path = self.folder / "contextualizers" / f"{grammar}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            captions = contextualizer_captions(seed=0, draw=draw_linked_scene)
            pretrain(
                self.frozen_text_encoder(), path, options=CONTEXTUALIZER_RECIPE, captions=captions
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
