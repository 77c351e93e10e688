"""Train a pocket model from scratch: every stage in order, each saved when done, to resume from.

``DIR/stages`` has the results of the stages in fp32. ``DIR`` itself is the product in fp16: a
diffusers folder, the CLIP model it came from, the oracle and the quality report.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from mlm_plugin.config.pretraining import PretrainOptions
from mlm_plugin.errors import UserError
from mlm_plugin.export.checkpoint import model_index
from mlm_plugin.files import atomic_path, require_writable
from mlm_plugin.models.text_encoder import TextEncoder
from mlm_plugin.pocket.oracle import Oracle, load_oracle
from mlm_plugin.pocket.shipped import CONTEXTUALIZER, TOKENIZER_FILES, save_text_encoder
from mlm_plugin.pocket.text_to_image import Sampling, TextToImage, generate, noise_schedule
from mlm_plugin.pretraining.run import pretrain
from research.facts import facts_of_here
from research.pocket_model import quality
from research.pocket_model.contextualizer import CONTEXTUALIZER_RECIPE, contextualizer_captions
from research.pocket_model.networks import Sizes, new_clip, new_unet, new_vae, preprocessor_config
from research.pocket_model.train_clip import build_tokenizer, text_states, train_clip
from research.pocket_model.train_loop import Job, TrainPlan
from research.pocket_model.train_oracle import oracle_accuracy, save_oracle, train_oracle
from research.pocket_model.train_unet import train_unet
from research.pocket_model.train_vae import train_vae

__all__ = ["FULL", "TINY", "Recipe", "build"]


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the result, apart from the seed."""

    sizes: Sizes
    num_merges: int
    vae: TrainPlan
    clip: TrainPlan
    oracle: TrainPlan
    unet: TrainPlan
    contextualizer: PretrainOptions
    oracle_pool: int
    unet_pool: int
    num_prompts: int = 1000
    num_steps: int = 30
    guidance: float = 4.0


FULL = Recipe(
    sizes=Sizes(),
    num_merges=2500,
    vae=TrainPlan(6000, 32, 2e-3),
    clip=TrainPlan(1500, 128, 1e-3, ema_decay=0.998),
    oracle=TrainPlan(5000, 128, 2e-3, ema_decay=0.998),
    unet=TrainPlan(5000, 128, 1e-3, ema_decay=0.9995, save_every_n_steps=250),
    contextualizer=CONTEXTUALIZER_RECIPE,
    oracle_pool=12_000,
    unet_pool=30_000,
)
TINY = Recipe(
    sizes=Sizes(
        vae_channels=(4, 8, 16, 16),
        text_width=32,
        text_layers=2,
        vision_width=32,
        vision_layers=2,
        projection=32,
        unet_channels=(32, 32),
        oracle_channels=8,
    ),
    num_merges=600,
    vae=TrainPlan(180, 8, 4e-3, warmup_steps=20, ema_decay=0.9),
    clip=TrainPlan(150, 32, 3e-3, warmup_steps=20, ema_decay=0.9),
    oracle=TrainPlan(200, 64, 4e-3, warmup_steps=20, ema_decay=0.9),
    unet=TrainPlan(250, 28, 3e-3, warmup_steps=20, ema_decay=0.95),
    contextualizer=dataclasses.replace(CONTEXTUALIZER_RECIPE, max_train_steps=20),
    oracle_pool=1000,
    unet_pool=1000,
    num_prompts=64,
    num_steps=8,
)


def build(
    output: Path,
    *,
    recipe: Recipe = FULL,
    seed: int = 0,
    device: torch.device | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Train a pocket model into ``output`` and return its quality report.

    Raises:
        UserError: the folder belongs to another recipe or cannot be written.
        Interrupted: after a signal, with the state saved.
    """
    builder = _Builder(
        Path(output), recipe, seed, device or torch.device("cpu"), show_progress=show_progress
    )
    return builder.run()


class _Builder:
    def __init__(
        self, output: Path, recipe: Recipe, seed: int, device: torch.device, *, show_progress: bool
    ):
        self.output, self.stages = output, output / "stages"
        self.recipe, self.seed, self.device = recipe, seed, device
        self.show_progress = show_progress
        require_writable(self.stages, "--output")
        self._claim()
        self.seconds_path = self.stages / "seconds.json"
        self.seconds: dict[str, float] = (
            json.loads(self.seconds_path.read_text()) if self.seconds_path.exists() else {}
        )

    def run(self) -> dict[str, Any]:
        tokenizer = self._tokenizer()
        vae = self._stage("vae", AutoencoderKL, lambda: new_vae(self.recipe.sizes), train_vae)
        clip = self._stage(
            "clip",
            CLIPModel,
            lambda: new_clip(self.recipe.sizes, vocab_size=len(tokenizer)),
            lambda clip, job: train_clip(clip, tokenizer, job),
        )
        oracle = self._oracle(vae)
        unet = self._stage(
            "unet",
            UNet2DConditionModel,
            lambda: new_unet(self.recipe.sizes),
            lambda unet, job: train_unet(
                unet,
                clip.text_model,
                tokenizer,
                vae,
                pool_size=self.recipe.unet_pool,
                job=job,
            ),
        )
        self._save_product(tokenizer, vae, clip, oracle, unet)
        card = self._quality_report(tokenizer, vae, clip, oracle, unet)
        _write_json(self.output / "quality.json", card)
        return card

    def _tokenizer(self) -> CLIPTokenizer:
        folder = self.stages / "tokenizer"
        if not (folder / "merges.txt").exists():
            build_tokenizer(folder, num_merges=self.recipe.num_merges)
        return CLIPTokenizer.from_pretrained(folder)

    def _stage(self, name: str, cls, new: Callable, train: Callable):
        """Load a finished stage from its folder, or train a new model."""
        folder = self.stages / name
        if (folder / "config.json").exists():
            return cls.from_pretrained(folder).to(self.device).eval().requires_grad_(False)
        model = self._seeded(name, new)
        self._timed(name, lambda job: train(model, job))
        unfinished = self.stages / f".{name}"
        model.save_pretrained(unfinished)
        unfinished.rename(folder)
        return model.eval().requires_grad_(False)

    def _oracle(self, vae: AutoencoderKL) -> Oracle:
        path = self.stages / "oracle.safetensors"
        if not path.exists():
            oracle = self._seeded("oracle", lambda: Oracle(self.recipe.sizes.oracle_channels))
            pool_size = self.recipe.oracle_pool
            self._timed(
                "oracle", lambda job: train_oracle(oracle, vae, pool_size=pool_size, job=job)
            )
            save_oracle(oracle, path)
        return load_oracle(path).to(self.device)

    def _seeded(self, name: str, new: Callable):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return new().to(self.device)

    def _timed(self, name: str, train: Callable[[Job], float]) -> None:
        job = Job(
            plan=getattr(self.recipe, name),
            seed=self.seed,
            state_path=self.stages / f"{name}.state.pt",
            device=self.device,
            show_progress=self.show_progress,
        )
        self.seconds[name] = round(train(job), 1)
        _write_json(self.seconds_path, self.seconds)
        job.state_path.unlink(missing_ok=True)

    def _save_product(self, tokenizer, vae, clip: CLIPModel, oracle: Oracle, unet) -> None:
        half = torch.float16
        for folder, name in itertools.product(("tokenizer", "clip"), TOKENIZER_FILES):
            content = (self.stages / "tokenizer" / name).read_bytes()
            with atomic_path(self.output / folder / name) as temporary:
                temporary.write_bytes(content)
        for name, model in (("vae", vae), ("unet", unet), ("clip", clip)):
            copy = type(model).from_pretrained(self.stages / name, torch_dtype=half)
            copy.save_pretrained(self.output / name)
            if name == "clip":
                save_text_encoder(copy, self.output / "text_encoder")
        _write_json(self.output / "clip" / "preprocessor_config.json", preprocessor_config())
        self._contextualizer(tokenizer)
        noise_schedule().save_pretrained(self.output / "scheduler")
        save_oracle(oracle, self.output / "oracle.safetensors", dtype=half)
        _write_json(self.output / "model_index.json", model_index("DDPMScheduler"))

    def _contextualizer(self, tokenizer) -> None:
        """Made for the text encoder as shipped, so that users' runs find the same encoder."""
        path = self.output / CONTEXTUALIZER
        if path.exists():
            return
        folder = self.output / "text_encoder"
        model = CLIPTextModel.from_pretrained(folder, torch_dtype=torch.float32).to(self.device)
        began = time.monotonic()
        pretrain(
            TextEncoder(tokenizer, model.eval().requires_grad_(False)),
            path,
            options=self.recipe.contextualizer,
            captions=contextualizer_captions(seed=self.seed),
            show_progress=self.show_progress,
        )
        self.seconds["contextualizer"] = round(time.monotonic() - began, 1)
        _write_json(self.seconds_path, self.seconds)

    def _quality_report(self, tokenizer, vae, clip, oracle, unet) -> dict[str, Any]:
        began = time.monotonic()
        prompts = quality.held_out_prompts(self.recipe.num_prompts, seed=self.seed)
        pictures = generate(
            [prompt.text for prompt in prompts],
            TextToImage(unet, vae, partial(text_states, clip.text_model, tokenizer)),
            Sampling(self.recipe.num_steps, self.recipe.guidance),
            seed=self.seed,
        )
        verdict = quality.judge(oracle, pictures, prompts)
        return {
            **verdict,
            "missed_bars": quality.missed_bars(verdict),
            "num_prompts": len(prompts),
            "sampler": "ddim",
            "num_steps": self.recipe.num_steps,
            "guidance": self.recipe.guidance,
            "seed": self.seed,
            "oracle_accuracy": oracle_accuracy(oracle, vae, num_pictures=512, seed=self.seed),
            "seconds": {**self.seconds, "quality": round(time.monotonic() - began, 1)},
            **facts_of_here(self.device),
            "recipe": dataclasses.asdict(self.recipe),
        }

    def _claim(self) -> None:
        path = self.stages / "recipe.json"
        ours = json.loads(
            json.dumps({"seed": self.seed, "recipe": dataclasses.asdict(self.recipe)})
        )
        if path.exists() and json.loads(path.read_text()) != ours:
            raise UserError(
                f"--output {self.output}: has a model of another recipe or seed; choose another "
                "folder"
            )
        _write_json(path, ours)


def _write_json(path: Path, content: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
