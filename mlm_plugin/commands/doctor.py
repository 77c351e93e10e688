"""`mlm-plugin doctor`: examine a finished file, say what is wrong, mend it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlm_plugin.config.options import LogOptions
from mlm_plugin.doctor.diagnosis import (
    Findings,
    broken_verdict,
    examine_embedding,
    examine_network,
    verdict_of,
)
from mlm_plugin.doctor.examination import Patient, Prompts
from mlm_plugin.doctor.learned_file import LearnedFile, contents_of, read_learned_file
from mlm_plugin.doctor.mending import check_mending, rescale_text_encoders
from mlm_plugin.doctor.options import DoctorOptions
from mlm_plugin.doctor.report import facts_of, lines_of
from mlm_plugin.errors import UserError
from mlm_plugin.evaluation.eval_prompts import load_templates
from mlm_plugin.evaluation.text_measures import random_words
from mlm_plugin.files import atomic_path
from mlm_plugin.models.checkpoints import ModelSettings, StableDiffusion, load_text_side
from mlm_plugin.models.components import TITLES
from mlm_plugin.models.qwen3 import AnimaText, load_anima_text
from mlm_plugin.setup.builtin_names import model_path
from mlm_plugin.setup.console import quiet_libraries, setup_console

__all__ = ["run_doctor"]

NUM_ORDINARY_WORDS = 4
NO_CLASS = "thing"


def run_doctor(options: DoctorOptions) -> int:
    """Run the command; returns the exit code: 1 for a file that is broken.

    Raises:
        UserError: from any of the steps.
    """
    setup_console(LogOptions())
    quiet_libraries()
    page = None if options.page is None else _page_writer()
    file = replace(read_learned_file(options.file), given_trigger=options.trigger)
    if options.output is not None:
        check_mending(file, options.output)
    _check_model(options, file)
    contents = contents_of(file)
    diagnosis, findings = broken_verdict(contents), None
    if diagnosis is None and _can_examine(options, file):
        findings = _examine(options, file)
        diagnosis = verdict_of(findings)
    print("\n".join(lines_of(file, contents, findings, diagnosis)))
    facts = facts_of(file, contents, findings, diagnosis)
    if options.json is not None:
        _write_text(options.json, json.dumps(facts, indent=1))
    if page is not None:
        _write_text(options.page, page(facts))
    is_broken = diagnosis is not None and diagnosis.level == "broken"
    if options.output is not None and not is_broken:
        _mend(options, file, findings)
    return 1 if is_broken else 0


def _check_model(options: DoctorOptions, file: LearnedFile) -> None:
    """Refuse the option that is for another kind of file, before anything is loaded."""
    if options.base is not None and file.is_anima:
        raise UserError(
            f"--base: {file.path} is for Anima; give its text encoder Qwen3 with --qwen3"
        )
    if options.qwen3 is not None and not file.is_anima:
        advice = "leave it out" if file.other_model else "give the model with --base"
        kind = file.other_model or TITLES.get(file.family, "Stable Diffusion")
        raise UserError(f"--qwen3: {file.path} is for {kind}, not for Anima; {advice}")


def _can_examine(options: DoctorOptions, file: LearnedFile) -> bool:
    """Whether there is a model to read, and in Anima's files something that it shows."""
    return options.base is not None or (options.qwen3 is not None and file.has_text_part)


def _models(options: DoctorOptions) -> StableDiffusion | AnimaText:
    if options.qwen3 is not None:
        return load_anima_text(options.qwen3)
    return load_text_side(model_path(options.base), ModelSettings(clip_skip=options.clip_skip))


def _examine(options: DoctorOptions, file: LearnedFile) -> Findings:
    models = _models(options)
    templates = load_templates(options.prompts, class_token=options.class_token)
    ordinary = options.class_token or NO_CLASS
    if file.embeddings:
        words = random_words(models.text_encoders[0], NUM_ORDINARY_WORDS, seed=0)
        patient = Patient(file, models, word=file.trigger)
        return examine_embedding(patient, templates, class_token=ordinary, words=words)
    concept = _with_class(file.trigger or ordinary, options.class_token)
    prompts = (Prompts(templates, word) for word in (concept, ordinary))
    return examine_network(Patient(file, models), *prompts)


def _with_class(trigger: str, class_token: str | None) -> str:
    """``sks`` and ``teddy bear`` as ``sks teddy bear``; a trigger may have the class already."""
    if not class_token or f" {class_token} " in f" {trigger} ":
        return trigger
    return f"{trigger} {class_token}"


def _mend(options: DoctorOptions, file: LearnedFile, findings: Findings | None) -> None:
    strength = options.rescale
    if strength is None:
        strength = findings.fit
        if strength == 1:
            print("nothing to mend: the text encoder part is not too strong; no file is written")
            return
    rescale_text_encoders(file, strength, options.output)
    print(f"wrote {options.output}: the text encoder part at {strength:g}, all else as it was")


def _page_writer() -> Callable[[Mapping[str, Any]], str]:
    """What turns facts into a page; its libraries may be missing beside a kohya trainer.

    Raises:
        UserError: they are.
    """
    try:
        from mlm_plugin.doctor.page import doctor_page
    except ImportError as error:
        raise UserError(f"--page needs {error.name}: `pip install {error.name}`") from error
    return doctor_page


def _write_text(path: str, text: str) -> None:
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"wrote {path}")
