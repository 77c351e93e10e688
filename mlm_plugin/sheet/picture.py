"""Puts tiles and labels on one picture. Sizes are pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont

from mlm_plugin.training.samples import enlarged

__all__ = ["contact_sheet"]

PAPER, INK, SOFT = (255, 255, 255), (24, 24, 28), (84, 84, 92)
SMALLEST_TEXT = 17
TILES_PER_TEXT = 20  # side of a tile, over the size of the letters


def contact_sheet(
    columns: Sequence[Sequence[Image.Image]],
    *,
    titles: Sequence[str],
    prompts: Sequence[str],
    heading: str,
    footing: str,
) -> Image.Image:
    """A row for each prompt, below its text; a column for each title.

    Args:
        columns: square tiles of one size, by column and row; tiny ones are enlarged.
        titles: of the columns.
        prompts: of the rows.
        heading: at the top, in large letters.
        footing: at the bottom, in soft ones.
    """
    tiles = [[enlarged(tile) for tile in column] for column in columns]
    sheet = _Sheet(side=tiles[0][0].width, num_columns=len(tiles))
    sheet.text(heading, sheet.large)
    sheet.row_of_titles(titles)
    for number, prompt in enumerate(prompts):
        sheet.text(f"\u201c{prompt}\u201d", sheet.small)
        sheet.row([column[number] for column in tiles])
    sheet.text(footing, sheet.small, SOFT)
    return sheet.finished()


class _Sheet:
    """Grows downwards; what is drawn is kept until the height is known."""

    def __init__(self, *, side: int, num_columns: int):
        self.side, self.size = side, max(SMALLEST_TEXT, side // TILES_PER_TEXT)
        self.gap = self.size // 2
        self.margin = 2 * self.size
        self.small = ImageFont.load_default(self.size)
        self.large = ImageFont.load_default(round(1.4 * self.size))
        self.inner_width = num_columns * (side + self.gap) - self.gap
        self.height = self.margin
        self.strokes: list[Callable[[Image.Image], None]] = []

    def text(self, text: str, font: ImageFont.FreeTypeFont, colour=INK) -> None:
        """Lines as wide as the tiles."""
        for line in _wrapped(text, font, self.inner_width):
            self._write((self.margin, self.height), line, font, colour)
            self.height += round(1.35 * font.size)
        self.height += self.gap

    def row_of_titles(self, titles: Sequence[str]) -> None:
        """Each in the middle above its tiles."""
        lines = [_wrapped(title, self.small, self.side) for title in titles]
        line_height = round(1.35 * self.size)
        self.height += self.gap
        for number, of_title in enumerate(lines):
            for row, line in enumerate(of_title):
                left = self._left(number) + (self.side - self.small.getlength(line)) / 2
                self._write((left, self.height + row * line_height), line, self.small, INK)
        self.height += max(map(len, lines)) * line_height + self.gap

    def row(self, tiles: Sequence[Image.Image]) -> None:
        """Tiles side by side."""
        for number, tile in enumerate(tiles):
            at = (self._left(number), self.height)
            self.strokes.append(lambda image, tile=tile, at=at: image.paste(tile, at))
        self.height += self.side + 3 * self.gap

    def finished(self) -> Image.Image:
        """The picture."""
        size = (self.inner_width + 2 * self.margin, self.height + self.margin - self.gap)
        image = Image.new("RGB", size, PAPER)
        for stroke in self.strokes:
            stroke(image)
        return image

    def _left(self, column: int) -> int:
        return self.margin + column * (self.side + self.gap)

    def _write(self, at: tuple[float, float], line: str, font, colour) -> None:
        self.strokes.append(lambda image: ImageDraw.Draw(image).text(at, line, colour, font))


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines that are no wider; words that are wider are broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        pieces = _broken(word, font, width)
        lines[-1:] = [lines[-1], *pieces] if lines[-1] else pieces
    return lines


def _broken(word: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces
