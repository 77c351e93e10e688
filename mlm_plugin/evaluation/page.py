"""The bare page of a report: style sheet, frame, and pictures as text.

One file with everything in it, no script, nothing fetched; light or dark as the reader's system
is. Knows no measures.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from mlm_plugin.data.images import open_image

__all__ = ["details", "page", "picture", "picture_grid", "section", "table"]

SMALL = 128  # pixels; pictures up to here stay as they are and are shown with hard edges
LONGEST_SIDE = 256
JPEG_QUALITY = 84

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1c1c1e; --soft: #63636a; --rule: #e3e0d9;
  --wash: #f2f0ea; --bar: #dfe8f1;
  --s0: #1f5f99; --s1: #c0602b; --s2: #3f7d57; --s3: #7a5aa6; --s4: #a8852a; --s5: #a8456b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #131416; --card: #1a1c1f; --ink: #e9e7e2; --soft: #9b9ba3; --rule: #2c2e33;
    --wash: #1f2125; --bar: #243546;
    --s0: #7fb6e6; --s1: #e89a68; --s2: #86c49d; --s3: #b79ce0; --s4: #d9b964; --s5: #e08bae;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 "Inter", "Segoe UI", system-ui, -apple-system, "Helvetica Neue", "DejaVu Sans",
    Arial, sans-serif;
  font-feature-settings: "kern", "liga"; -webkit-font-smoothing: antialiased;
}
main { max-width: 1080px; margin: 0 auto; padding: 56px 28px 96px; }
h1, h2 { font-family: "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, "DejaVu Serif",
  serif; font-weight: 600; letter-spacing: -0.01em; text-wrap: balance; }
h1 { font-size: 44px; line-height: 1.1; margin: 6px 0 12px; }
h2 { font-size: 25px; line-height: 1.2; margin: 0 0 6px; }
h3 { font-size: 15px; font-weight: 600; margin: 30px 0 10px; }
p { margin: 0 0 12px; max-width: 70ch; }
.eyebrow { font-size: 12px; letter-spacing: 0.12em; text-transform: uppercase; color: var(--soft);
  margin: 0; }
.lede { font-size: 17px; color: var(--soft); }
.soft, figcaption, caption { color: var(--soft); font-size: 14px; }
section { margin-top: 60px; padding-top: 22px; border-top: 1px solid var(--rule); }
code { font: 0.9em/1.4 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.concept { color: var(--s0); font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1px;
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; overflow: hidden;
  margin: 34px 0 0; }
.tile { background: var(--card); padding: 18px 22px 16px; box-shadow: 0 0 0 1px var(--rule); }
.tile .name { font-size: 13px; font-weight: 600; }
.tile .value { font-size: 34px; line-height: 1.25; font-variant-numeric: tabular-nums;
  letter-spacing: -0.02em; }
.tile .value small { font-size: 14px; color: var(--soft); letter-spacing: 0; margin-left: 6px;
  white-space: nowrap; }
.tile .meaning { font-size: 13px; line-height: 1.4; color: var(--soft); }
.strip { display: flex; flex-wrap: wrap; gap: 8px; margin-top: 14px; }
.strip img { height: 120px; width: auto; }
img { display: block; border-radius: 4px; background: var(--wash); }
img.small { image-rendering: pixelated; }
.prompt { margin: 0; padding: 20px 0; border-top: 1px solid var(--rule); break-inside: avoid; }
.prompt:first-of-type { border-top: 0; }
.prompt header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 14px;
  margin-bottom: 10px; }
.prompt .number { width: 1.6em; color: var(--soft); font-variant-numeric: tabular-nums; }
.prompt .text { flex: 1 1 320px; font-size: 17px; }
.scores { font-size: 13px; color: var(--soft); font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.scores b { color: var(--ink); font-weight: 600; margin: 0 10px 0 4px; }
.scores b:last-child { margin-right: 0; }
.grid { display: grid; grid-template-columns: repeat(var(--n), 1fr); gap: 8px; }
.grid img { width: 100%; height: auto; }
.runs { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr));
  gap: 14px 22px; }
.runs .grid { gap: 6px; }
.runs .head { display: flex; justify-content: space-between; gap: 12px; font-size: 13px;
  margin-bottom: 6px; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 7px; }
.key.s0 { background: var(--s0); } .key.s1 { background: var(--s1); }
.key.s2 { background: var(--s2); } .key.s3 { background: var(--s3); }
.key.s4 { background: var(--s4); } .key.s5 { background: var(--s5); }
.scroll { overflow-x: auto; margin: 16px 0 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums lining-nums; }
caption { text-align: left; padding-bottom: 8px; }
th { font-weight: 600; text-align: left; vertical-align: bottom; padding: 6px 14px 6px 0;
  border-bottom: 1px solid var(--ink); }
td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: baseline; }
th.n, td.n { text-align: right; white-space: nowrap; padding-left: 10px; }
th:last-child, td:last-child { padding-right: 6px; }
td.n.bar { background: linear-gradient(to left, var(--bar) calc(var(--v) * 100%), transparent 0)
  no-repeat right center / 100% 66%; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
td .delta { display: block; font-size: 12px; color: var(--soft); }
td.best { font-weight: 700; } td.best .delta { font-weight: 400; }
table.facts td:first-child { color: var(--soft); width: 15em; white-space: nowrap; }
table.facts td { overflow-wrap: anywhere; }
details { margin-top: 18px; }
summary { cursor: pointer; font-weight: 600; font-size: 15px; }
figure { margin: 22px 0 0; }
figure figcaption { margin-top: 8px; max-width: 76ch; }
svg { display: block; width: 100%; max-width: 820px; height: auto; overflow: visible; }
svg text { fill: var(--ink); font-size: 12.5px; font-variant-numeric: tabular-nums; }
svg .tick { fill: var(--soft); font-size: 12px; } svg .axis { fill: var(--soft); font-size: 13px; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .span { stroke: var(--rule); stroke-width: 3; stroke-linecap: round; }
svg .reference { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 4; }
svg .interval { stroke-width: 1.5; opacity: 0.7; }
svg .dot { stroke: var(--paper); stroke-width: 1.5; } svg .faint { opacity: 0.35; }
svg .s0 { fill: var(--s0); stroke: var(--s0); } svg .s1 { fill: var(--s1); stroke: var(--s1); }
svg .s2 { fill: var(--s2); stroke: var(--s2); } svg .s3 { fill: var(--s3); stroke: var(--s3); }
svg .s4 { fill: var(--s4); stroke: var(--s4); } svg .s5 { fill: var(--s5); stroke: var(--s5); }
svg .dot { stroke: var(--paper); } svg .bar { stroke: none; }
@media (max-width: 640px) { main { padding: 32px 16px 64px; } h1 { font-size: 34px; }
  .tiles, .grid { grid-template-columns: repeat(2, 1fr); } }
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #555; --rule: #ccc; --wash: #f4f4f4;
    --bar: #dfe8f1; --s0: #1f5f99; --s1: #c0602b; --s2: #3f7d57; --s3: #7a5aa6; --s4: #a8852a;
    --s5: #a8456b; }
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; }
  section { margin-top: 28px; } h2, h3 { break-after: avoid; }
  tr, figure, .tile { break-inside: avoid; } .strip img { height: 90px; }
  svg .dot, .key { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def page(title: str, body: str) -> str:
    """The whole document; ``body`` is HTML, ``title`` plain text."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str, *, lead: str = "") -> str:
    """A part of the page; ``body`` is HTML, title and lead plain text."""
    lead = f'<p class="soft">{escape(lead)}</p>' if lead else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{lead}\n{body}\n</section>"


def picture_grid(images: Sequence[str], *, at_least: int = 4) -> str:
    """Image elements in rows of as many as there are, from ``at_least`` to 8."""
    columns = min(max(len(images), at_least), 8)
    return f'<div class="grid" style="--n:{columns}">{"".join(images)}</div>'


def details(title: str, body: str) -> str:
    """A part that is folded up until it is asked for."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, both plain text."""
    cells = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows
    )
    return f'<div class="scroll"><table class="facts">{cells}</table></div>'


def picture(path: Path, *, alt: str) -> str:
    """An image element with the picture in it, scaled down; an empty frame where it is missing.

    Args:
        path: the file.
        alt: what stands for it, plain text.
    """
    try:
        image = Image.fromarray(open_image(path))
    except ValueError:
        return f'<img alt="{escape(f"{alt} (file missing)", quote=True)}">'
    small = max(image.size) <= SMALL
    buffer = io.BytesIO()
    if small:
        image.save(buffer, "PNG")
    else:
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    kind = "png" if small else "jpeg"
    return (
        f'<img src="data:image/{kind};base64,{data}" width="{image.width}" '
        f'height="{image.height}" alt="{escape(alt, quote=True)}"'
        f"{' class=small' if small else ''}>"
    )
