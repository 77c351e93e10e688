"""One picture that shows what the term changed: equal prompts and noise, one column per model.

A tick or a cross on every tile says whether everything that the prompt asks for is seen. Sizes are
pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mlm_plugin.demo.trial import as_images
from mlm_plugin.demo.verdict import Judgement
from mlm_plugin.pocket.concepts import Concept, training_scenes
from mlm_plugin.pocket.world import PICTURE_SIDE, render

__all__ = ["Column", "comparison_picture", "prompts_to_show", "selection_line"]

SIDE = 3 * PICTURE_SIDE  # of a tile, by nearest neighbour
SMALL_SIDE = 2 * PICTURE_SIDE  # of a training picture
MARGIN, GAP, BETWEEN_BLOCKS = 32, 10, 48
PAPER, INK, SOFT = (255, 255, 255), (24, 24, 28), (84, 84, 92)
RIGHT, WRONG = (0, 122, 92), (196, 48, 16)  # told apart by the colour-blind, and by their signs
TITLE, TEXT, SMALL, SMALLEST = 30, 21, 18, 14  # font sizes
SIZES = (TITLE, TEXT, SMALL, SMALLEST)
NUM_BLOCKS = 2  # prompts side by side


class Column(NamedTuple):
    """What one model drew.

    Attributes:
        title: stands above.
        pictures: ``(B, 3, 64, 64)`` in [-1, 1], one for each prompt.
        judgement: of these pictures.
    """

    title: str
    pictures: Tensor
    judgement: Judgement


def prompts_to_show(columns: Sequence[Column], number: int) -> list[int]:
    """Indices of prompts: first those that a column gets wrong, then others; all in their order."""
    wrong = _is_wrong(columns)
    if number >= len(wrong):
        return list(range(len(wrong)))
    return sorted(range(len(wrong)), key=lambda index: not wrong[index])[:number]


def selection_line(columns: Sequence[Column], shown: Sequence[int]) -> list[str]:
    """Says which prompts are shown, unless all are."""
    wrong = _is_wrong(columns)
    if len(shown) == len(wrong):
        return []
    num_wrong, num_shown = sum(wrong), len(shown)
    if num_wrong >= num_shown:
        chosen = f"the first of {num_wrong} that a column gets wrong"
    else:
        chosen = f"the {num_wrong} that a column gets wrong, and the first that all get right"
    return [f"Shown: {num_shown} of {len(wrong)} prompts, {chosen}."]


def _is_wrong(columns: Sequence[Column]) -> list[bool]:
    return [any(found) for found in zip(*(c.judgement.wrong for c in columns), strict=True)]


def comparison_picture(
    concept: Concept,
    texts: Sequence[str],
    columns: Sequence[Column],
    *,
    shown: Sequence[int],
    verdict: Sequence[str],
) -> Image.Image:
    """Training pictures, tiles with their marks, and the verdict.

    Args:
        concept: its training pictures are shown.
        texts: the prompts.
        columns: one for each model.
        shown: indices of the prompts in their order.
        verdict: lines at the bottom.
    """
    sheet = _Sheet(len(columns), len(shown), num_lines=len(verdict))
    sheet.head(concept)
    titles = [column.title for column in columns]
    tiles = [as_images(column.pictures) for column in columns]
    for block in range(min(NUM_BLOCKS, len(shown))):
        sheet.titles(block, titles)
    for place, index in enumerate(shown):
        sheet.prompt(place, texts[index])
        for number, column in enumerate(columns):
            sheet.tile(place, number, tiles[number][index], column.judgement.wrong[index])
    sheet.foot(verdict)
    return sheet.image


class _Sheet:
    """Where everything is, and how it is drawn."""

    def __init__(self, num_columns: int, num_prompts: int, *, num_lines: int):
        self.num_columns = num_columns
        self.block_width = num_columns * (SIDE + GAP) - GAP
        self.row_height = TEXT + SIDE + SMALL + 4 * GAP
        self.top = MARGIN + TITLE + SMALL_SIDE + 4 * GAP + TEXT + GAP
        self.bottom = self.top + -(-num_prompts // NUM_BLOCKS) * self.row_height
        width = 2 * MARGIN + NUM_BLOCKS * self.block_width + (NUM_BLOCKS - 1) * BETWEEN_BLOCKS
        height = self.bottom + 2 * MARGIN + num_lines * (TEXT + GAP) + TITLE
        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.fonts = {size: ImageFont.load_default(size) for size in SIZES}

    def head(self, concept: Concept) -> None:
        """Title, training pictures, and how to read the marks."""
        self._text((MARGIN, MARGIN), f"\u201c{concept.name}\u201d is learned from these:", TITLE)
        top = MARGIN + TITLE + 2 * GAP
        for number, scene in enumerate(training_scenes(concept)):
            picture = Image.fromarray(render(scene))
            left = MARGIN + number * (SMALL_SIDE + GAP)
            self.image.paste(_enlarged(picture, SMALL_SIDE), (left, top))
        self._legend(MARGIN + self.block_width + BETWEEN_BLOCKS, top)

    def _legend(self, left: int, top: int) -> None:
        """How to read the marks."""
        signs = {
            True: "all that the prompt asks for is seen",
            False: "something else is seen, as named below",
        }
        for row, (is_right, text) in enumerate(signs.items()):
            middle = top + 18 + row * 44
            self._mark((left + 16, middle), is_right=is_right)
            self._text((left + 44, middle - TEXT // 2), text, TEXT)
        self._text((left, top + 92), "Equal prompts, equal noise in every column.", TEXT, SOFT)

    def titles(self, block: int, titles: Sequence[str]) -> None:
        """Titles of the columns of a block."""
        for number, title in enumerate(titles):
            left = self._left(block, number)
            self._text((left, self.top - TEXT - GAP), title, TEXT)

    def prompt(self, place: int, text: str) -> None:
        """The text above the tiles of a prompt."""
        block, top = self._place(place)
        text = f"\u201c{text}\u201d"
        self._text((self._left(block, 0), top), text, self._fitting(text), SOFT)

    def _fitting(self, text: str) -> int:
        """The largest size at which a text is no wider than a block."""
        for size in (TEXT, SMALL):
            if self.draw.textlength(text, self.fonts[size]) <= self.block_width:
                return size
        return SMALLEST

    def tile(self, place: int, column: int, picture: Image.Image, wrong: dict[str, str]) -> None:
        """A picture with its mark, and what is wrong with it."""
        block, top = self._place(place)
        left, top = self._left(block, column), top + TEXT + GAP
        colour = WRONG if wrong else RIGHT
        self.image.paste(_enlarged(picture, SIDE), (left, top))
        self.draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline=colour, width=3)
        self._mark((left + SIDE - 22, top + 22), is_right=not wrong)
        if wrong:
            self._text((left, top + SIDE + 3), f"seen: {', '.join(wrong.values())}", SMALL, WRONG)

    def foot(self, lines: Sequence[str]) -> None:
        """The verdict."""
        right = self.image.width - MARGIN
        self.draw.line((MARGIN, self.bottom, right, self.bottom), fill=SOFT, width=2)
        for number, line in enumerate(lines):
            top = self.bottom + 2 * GAP + number * (TEXT + GAP) + (TITLE - GAP if number else 0)
            self._text((MARGIN, top), line, TEXT if number else TITLE)

    def _left(self, block: int, column: int) -> int:
        return MARGIN + block * (self.block_width + BETWEEN_BLOCKS) + column * (SIDE + GAP)

    def _place(self, place: int) -> tuple[int, int]:
        """Block and top of a prompt; the first prompts are side by side."""
        row, block = divmod(place, NUM_BLOCKS)
        return block, self.top + row * self.row_height

    def _text(self, at: tuple[int, int], text: str, size: int, colour=INK) -> None:
        self.draw.text(at, text, colour, self.fonts[size], spacing=GAP)

    def _mark(self, at: tuple[int, int], *, is_right: bool) -> None:
        """A tick or a cross in a disc around ``at``."""
        (x, y), colour = at, RIGHT if is_right else WRONG
        self.draw.ellipse((x - 16, y - 16, x + 16, y + 16), fill=colour, outline=PAPER, width=2)
        if is_right:
            self.draw.line((x - 7, y, x - 2, y + 6, x + 8, y - 6), PAPER, width=4, joint="curve")
        else:
            self.draw.line((x - 6, y - 6, x + 6, y + 6), PAPER, width=4)
            self.draw.line((x - 6, y + 6, x + 6, y - 6), PAPER, width=4)


def _enlarged(picture: Image.Image, side: int) -> Image.Image:
    return picture.resize((side, side), Image.Resampling.NEAREST)
