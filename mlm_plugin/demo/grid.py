"""Pictures of the same prompts by several models, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mlm_plugin.demo.trial import as_images
from mlm_plugin.pocket.concepts import Concept, training_scenes
from mlm_plugin.pocket.world import render

__all__ = ["comparison_grid"]

SCALE = 2  # nearest neighbour
TEXT_WIDTH, HEAD, GAP = 190, 24, 6
PAPER, INK, SOFT = (250, 249, 246), (30, 30, 34), (110, 108, 102)


def comparison_grid(
    concept: Concept, texts: Sequence[str], columns: Mapping[str, Tensor]
) -> Image.Image:
    """A row per prompt and a column per model, with the training pictures above.

    Args:
        concept: its training pictures are shown.
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
