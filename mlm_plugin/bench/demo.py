"""`mlm-plugin pocket demo`: one concept learned twice, and what became of the prompts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mlm_plugin.bench.plan import MLM_WEIGHT, Arm, BenchPlan
from mlm_plugin.bench.trial import Scores, Workshop, as_images, look_at_base, train_and_watch
from mlm_plugin.pocket.concepts import Concept, prompt_templates, training_scenes
from mlm_plugin.pocket.world import render
from mlm_plugin.training.trainer import Stopped

__all__ = ["comparison_grid", "run_demo"]

ARMS = {"plain": Arm("lora"), "with MLM": Arm("lora", "mlm", MLM_WEIGHT["lora"])}
SEED = 1
NUM_SHOWN = 6  # prompts in the grid
SCALE = 2  # nearest neighbour
TEXT_WIDTH, HEAD, GAP = 190, 24, 6
PAPER, INK, SOFT = (250, 249, 246), (30, 30, 34), (110, 108, 102)


def run_demo(plan: BenchPlan, concept: Concept, *, model: Path, output: Path) -> int:
    """Train without and with the term, write the files and ``grid.png``; returns the exit code.

    Args:
        plan: when to stop and how to draw.
        concept: what is learned.
        model: folder of a pocket model.
        output: new files go here.
    """
    workshop = Workshop(model, output, plan)
    looks = {"base model": look_at_base(concept, concept.name, SEED, workshop)}
    ceiling = look_at_base(concept, concept.scene.subject, SEED, workshop).scores
    for title, arm in ARMS.items():
        print(f"training {concept.name!r}, {title}: {plan.num_train_steps('lora')} steps",
              flush=True)  # fmt: skip
        folder = output / arm.regularizer
        try:
            watcher = train_and_watch(arm, concept, SEED, workshop, folder, keep_files=True)
        except Stopped as stopped:
            print(f"stopped: {stopped}", file=sys.stderr)
            return stopped.exit_code
        looks[title] = list(watcher.scores.values())[-1], watcher.pictures
    texts = [prompt.text.replace("{}", concept.name) for prompt in prompt_templates(concept)]
    columns = {title: pictures for title, (_, pictures) in looks.items()}
    grid = comparison_grid(concept, texts[:NUM_SHOWN], columns)
    grid.save(output / "grid.png")
    print(f"wrote {output / 'plain' / 'last.safetensors'}, {output / 'mlm' / 'last.safetensors'} "
          f"and {output / 'grid.png'}")  # fmt: skip
    print(result_line(concept, looks["plain"][0], looks["with MLM"][0], ceiling))
    return 0


def result_line(concept: Concept, plain: Scores, mlm: Scores, ceiling: Scores) -> str:
    """What the oracle saw, in one line."""
    return (
        f"of what {len(prompt_templates(concept))} prompts ask for, the pictures show "
        f"{plain.prompt_fidelity:.0%} plain and {mlm.prompt_fidelity:.0%} with MLM "
        f"({ceiling.prompt_fidelity:.0%} for an ordinary {concept.scene.subject}); the "
        f"{concept.scene.subject} is itself to {plain.identity:.0%} plain and {mlm.identity:.0%} "
        "with MLM"
    )


def comparison_grid(
    concept: Concept, texts: Sequence[str], columns: Mapping[str, Tensor]
) -> Image.Image:
    """A row per prompt, a column per model; the training pictures above.

    Args:
        concept: whose training pictures.
        texts: the prompts.
        columns: title -> pictures ``(B, 3, 64, 64)`` in [-1, 1], the first for the first text.
    """
    side = SCALE * 64
    width = TEXT_WIDTH + len(columns) * (side + GAP)
    height = HEAD + side + GAP + HEAD + len(texts) * (side + GAP)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    draw.text((GAP, GAP), "trained on", INK, font)
    for number, scene in enumerate(training_scenes(concept)[: len(columns)]):
        picture = Image.fromarray(render(scene)).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (TEXT_WIDTH + number * (side + GAP), HEAD))
    top = HEAD + side + GAP
    for number, (title, pictures) in enumerate(columns.items()):
        left = TEXT_WIDTH + number * (side + GAP)
        draw.text((left, top + GAP), title, INK, font)
        for row, image in enumerate(as_images(pictures)[: len(texts)]):
            picture = image.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top + HEAD + row * (side + GAP)))
    for row, text in enumerate(texts):
        place = (GAP, top + HEAD + row * (side + GAP) + side // 3)
        draw.multiline_text(place, _wrapped(text, draw, font), SOFT, font)
    return sheet


def _wrapped(text: str, draw: ImageDraw.ImageDraw, font) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= TEXT_WIDTH - 2 * GAP:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
