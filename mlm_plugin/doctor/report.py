"""What was found, as facts for JSON and pages and as lines for the terminal."""

from __future__ import annotations

from typing import Any

from mlm_plugin.doctor.diagnosis import Diagnosis, Findings, percent
from mlm_plugin.doctor.examination import Reading
from mlm_plugin.doctor.learned_file import Contents, LearnedFile, bundled
from mlm_plugin.models.components import TITLES

__all__ = ["facts_of", "lines_of"]

MAX_NAMED = 5
WRITERS = {"ss_mlm_version": "mlm_plugin", "ss_sd_scripts_commit_hash": "sd-scripts"}


def facts_of(
    file: LearnedFile,
    contents: Contents,
    findings: Findings | None,
    diagnosis: Diagnosis | None,
) -> dict[str, Any]:
    """Everything that was found, in JSON's types. Shares are between 0 and 1.

    Args:
        file: what was examined.
        contents: what it holds.
        findings: ``None`` where it was not read on a base model.
        diagnosis: ``None`` likewise, unless it is broken.
    """
    return {
        "file": str(file.path),
        "title": file.path.name,
        "model": file.other_model or TITLES.get(file.family, "unknown"),
        "trigger": file.trigger,
        "made_by": _made_by(file),
        "modules": dict(contents.counts),
        "algorithms": dict(contents.algorithms),
        "ranks": {str(rank): count for rank, count in contents.ranks.items()},
        "vectors": [len(vectors_ND) for vectors_ND in file.embeddings],
        "broken": list(contents.broken),
        "halves": list(contents.halves),
        "unknown": list(file.ignored),
        "bundled_embeddings": bundled(file),
        "verdict": None if diagnosis is None else diagnosis._asdict(),
        "findings": None if findings is None else _shares(findings),
    }


def _shares(findings: Findings) -> dict[str, Any]:
    return {
        "with_trigger": _reading(findings.whole),
        "text_encoder_part": _reading(findings.text_part),
        "unet_part": _reading(findings.image_part),
        "without_trigger": _reading(findings.leak),
        "curve": [[strength, round(kept, 4)] for strength, kept in findings.curve],
        "fit": findings.fit,
        "amplified": findings.amplified,
        "ordinary_word": findings.ordinary,
    }


def _reading(reading: Reading) -> dict[str, Any]:
    return {
        "text_encoders": {name: round(share, 4) for name, share in reading.encoders.items()},
        "unet_blocks": {name: round(share, 4) for name, share in reading.blocks.items()},
        "unet": None if reading.image is None else round(reading.image, 4),
    }


def _made_by(file: LearnedFile) -> str:
    given = file.metadata.get("modelspec.implementation_version") or file.metadata.get("software")
    return given or next((name for key, name in WRITERS.items() if key in file.metadata), "unknown")


def lines_of(
    file: LearnedFile,
    contents: Contents,
    findings: Findings | None,
    diagnosis: Diagnosis | None,
) -> list[str]:
    """The report on the terminal; the verdict comes last."""
    lines = [f"{file.path.name}: {_kind(file, contents)}"]
    lines.append(f"  trigger: {file.trigger or 'not in the file; give --trigger'}")
    if file.ignored and not file.embeddings:
        shown = ", ".join(file.ignored[:MAX_NAMED])
        lines.append(f"  not examined: {len(file.ignored)} other tensor(s) ({shown})")
    if not file.embeddings and not contents.counts.get("text encoder"):
        lines.append("  no text encoder part")
    lines += _left_out(file, contents)
    if findings is not None:
        lines += _finding_lines(findings)
    if diagnosis is None:
        return [*lines, *_hints(file)]
    lines.append(diagnosis.verdict)
    return [*lines, f"  {diagnosis.advice}"] if diagnosis.advice else lines


def _left_out(file: LearnedFile, contents: Contents) -> list[str]:
    """Of Anima only the text encoder part is examined."""
    parts = (f"{n} {part}" for part, n in contents.counts.items() if part != "text encoder")
    shown = ", ".join(parts)
    if not file.is_anima or not shown:
        return []
    return [f"  the transformer's reading is not examined ({shown} modules)"]


def _hints(file: LearnedFile) -> list[str]:
    """What to give so that the file is examined; nothing where it cannot be."""
    if file.is_anima and file.has_text_part:
        return ["  give --qwen3 PATH to see what its text encoder part does to sentences"]
    return [] if file.other_model else ["  give --base MODEL to see what it does to sentences"]


def _kind(file: LearnedFile, contents: Contents) -> str:
    model = file.other_model or TITLES.get(file.family, "an unknown kind of model")
    if file.embeddings:
        return f"embedding of {len(file.embeddings[0])} vector(s) for {model}"
    algorithms = ", ".join(f"{name} ({count})" for name, count in contents.algorithms.items())
    parts = ", ".join(f"{count} {part} modules" for part, count in contents.counts.items())
    ranks = ", ".join(map(str, contents.ranks))
    return f"{algorithms} for {model}; {parts}" + (f"; rank {ranks}" if ranks else "")


def _finding_lines(findings: Findings) -> list[str]:
    lines = _text_rows(findings) if findings.whole.image is None else _rows(findings)
    if findings.curve:
        curve = ", ".join(f"{s:g}: {percent(kept)}" for s, kept in findings.curve)
        lines.append(f"  text encoder part at strength {curve}")
    return lines


def _text_rows(findings: Findings) -> list[str]:
    """Where text encoders alone are read."""
    rows = [("around the trigger", findings.whole), ("without the trigger", findings.leak)]
    lines = ["  context kept                        text encoder"]
    return lines + [f"    {name:<32} {percent(r.text):>12}" for name, r in rows]


def _rows(findings: Findings) -> list[str]:
    rows = [
        ("around the trigger", findings.whole),
        ("by its text encoder part alone", findings.text_part),
        ("by its U-Net part alone", findings.image_part),
        ("without the trigger", findings.leak),
    ]
    lines = ["  context kept                        text encoder   U-Net"]
    return lines + [
        f"    {name:<32} {percent(r.text):>12} {percent(r.image):>10}" for name, r in rows
    ]
