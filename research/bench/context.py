"""What all trials share: the model, the oracle, data folders and contextualizers."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import CLIPTextModel, CLIPTokenizer

from mlm_plugin.data.images import list_images
from mlm_plugin.demo.options import RESOLUTION
from mlm_plugin.files import atomic_path
from mlm_plugin.models.checkpoints import load_stable_diffusion
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.pocket.concepts import Concept, write_concept
from mlm_plugin.pocket.oracle import Oracle, load_oracle
from mlm_plugin.pocket.shipped import CONTEXTUALIZER
from mlm_plugin.pocket.text_to_image import Sampling
from mlm_plugin.pretraining.run import pretrain
from mlm_plugin.training.draw_class_images import ClassImageSettings, draw_class_images
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
                self.data_beside_class_images(concept)
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

    def data_beside_class_images(self, concept: Concept) -> Path:
        """Training pictures of a concept, repeated until there are as many as of its class."""
        pictures = list_images(next(self.data(concept).iterdir()))
        folder = self.data(concept).parent / "train_beside_class_images"
        target = folder / f"{NUM_CLASS_IMAGES // len(pictures)}_{concept.name}"
        for picture in pictures:
            if not (target / picture.name).exists():
                with atomic_path(target / picture.name) as temporary:
                    shutil.copyfile(picture, temporary)
        return folder

    def class_images(self, subject: str) -> Path:
        """Captioned pictures of the class by the untrained model, for prior preservation."""
        folder = self.folder / "class_images" / subject
        draw_class_images(
            folder / f"1_{subject}",
            ClassImageSettings(
                prompt=f"a photo of a {subject}",
                model=str(self.model),
                seed=0,
                size=(RESOLUTION, RESOLUTION),
                num_steps=self.sampling.num_steps,
                scale=self.sampling.guidance,
            ),
            num_images=NUM_CLASS_IMAGES,
            caption_extension=".caption",
            load=lambda: load_stable_diffusion(str(self.model)),
            accelerator=Accelerator(cpu=True),
        )
        return folder

    def frozen_text_encoder(self) -> TextEncoder:
        """The untrained text encoder."""
        model = CLIPTextModel.from_pretrained(
            self.model / "text_encoder", torch_dtype=torch.float32
        )
        tokenizer = CLIPTokenizer.from_pretrained(self.model / "tokenizer")
        return TextEncoder(tokenizer, model.eval().requires_grad_(False))
