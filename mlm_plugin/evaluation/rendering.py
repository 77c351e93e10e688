"""Report pages from the templates: self-contained, without scripts, light or dark.

Jinja escapes every text. Knows no measures.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from mlm_plugin.data.images import open_image
from mlm_plugin.files import atomic_path

__all__ = ["REPORT_FILE", "Figure", "Section", "Table", "letter", "render", "sections_page",
           "write_report"]  # fmt: skip

REPORT_FILE = "report.html"
SMALL = 128  # pixels; pictures up to this side are embedded unchanged and shown with hard edges
LONGEST_SIDE = 256
JPEG_QUALITY = 84


class EmbeddedPicture(NamedTuple):
    """A picture as a data URI, with the size at which it is stored."""

    uri: str
    width: int
    height: int
    is_small: bool


class Table(NamedTuple):
    """Plain text; without headings the first column labels the second."""

    rows: Sequence[Sequence[str]]
    headings: Sequence[str] = ()


class Figure(NamedTuple):
    """A chart of ``charts`` and its caption."""

    chart: Markup
    caption: str


class Section(NamedTuple):
    """A titled part of :func:`sections_page`."""

    title: str
    content: Table | Figure
    lead: str = ""


def letter(index: int) -> str:
    """The name of a run in a comparison: A, B, ..."""
    return chr(ord("A") + index % 26)


def embed_picture(path: Path) -> EmbeddedPicture | None:
    """Read a picture, scale it down and encode it; None where it cannot be read."""
    try:
        image = Image.fromarray(open_image(path))
    except ValueError:
        return None
    is_small = max(image.size) <= SMALL
    buffer = io.BytesIO()
    if is_small:
        image.save(buffer, "PNG")
    else:
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    kind = "png" if is_small else "jpeg"
    return EmbeddedPicture(f"data:image/{kind};base64,{data}", *image.size, is_small)


ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {"letter": letter, "embed_picture": embed_picture}


def render(template: str, **context: Any) -> str:
    """Fill one of the templates; every value but ``Markup`` is escaped."""
    return ENVIRONMENT.get_template(template).render(context)


def sections_page(title: str, sections: Sequence[Section]) -> str:
    """A page of tables and figures, one after the other."""
    return render("sections.html", title=title, sections=sections)


def write_report(folder: Path, html: str) -> Path:
    """Write the page, completely or not at all."""
    path = folder / REPORT_FILE
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path
